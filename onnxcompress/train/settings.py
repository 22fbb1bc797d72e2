"""How to train, as options: the `[train]` table of a recipe and the flags of `distill`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.errors import InputError
from onnxcompress.train.augment import Augmentation
from onnxcompress.train.optimizers import SGD, AdamW, Optimizer
from onnxcompress.train.schedules import SCHEDULES

_SPARSE = 0.01
"""Share of a weight that must be zero before that looks intended."""
_UPDATES = 50
"""Full updates that take a weight over one step of its grid."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Options of distillation."""

    epochs: int = 30
    batch_size: int = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float | None = None
    """Learning rate; 0.001 for adamw and 0.01 for sgd where none is given."""
    weight_decay: float = 0.01
    schedule: Literal["constant", "linear", "cosine", "warm_up", "stepped", "one_cycle"] = "warm_up"
    """Course of the learning rate; warm_up rises and then falls as cosine does."""
    clip_norm: float | None = None
    temperature: float = 2.0
    """Softens what the teacher says of classes."""
    label_weight: float = 1.0
    """Of the labels beside the teacher."""
    features: tuple[str, ...] = ()
    """Inner values to match, by names that both models have."""
    trainable: tuple[str, ...] = ("*",)
    """Patterns of the weights to train; `!` before one takes away what it finds."""
    keep_zeros: bool = False
    """Let zeros of a pruned student stay zeros."""
    batch_statistics: bool | None = None
    """Train batch normalizations with the statistics of batches; where not said, fresh ones."""
    augment: tuple[Augmentation, ...] = ()
    """Changes batches at random, after which the teacher is asked about them; see `augment`."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)} but must be {least} or more")
        if not self.temperature > 0 or not self.label_weight >= 0:
            raise InputError("temperature must be above 0 and label_weight 0 or more")
        _ = self.rule

    @property
    def rule(self) -> Optimizer:
        """The optimizer."""
        kind = AdamW if self.optimizer == "adamw" else SGD
        found = kind(weight_decay=self.weight_decay)
        return found if self.lr is None else replace(found, lr=self.lr)

    def arguments(self, student: ir.Model) -> dict[str, Any]:
        """What `train.distill.distill` takes."""
        return {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "optimizer": self.rule,
            "schedule": SCHEDULES[self.schedule],
            "clip_norm": self.clip_norm,
            "temperature": self.temperature,
            "label_weight": self.label_weight,
            "features": self.features,
            "trainable": self.trainable,
            "masks": masks_of(student) if self.keep_zeros else None,
            "augment": self.augment,
            "batch_statistics": self.batch_statistics,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class Tuning(Training):
    """Options of quantization-aware tuning."""

    epochs: int = 10
    lr: float | None = None
    """Learning rate; for adamw a fiftieth of the grids' median step where none is given."""
    weight_decay: float = 0.0

    def rule_for(self, step: float) -> Optimizer:
        """The optimizer for weights on grids of this median step.

        AdamW moves a weight by up to its rate: 0.0003 is right for 4 bits, 0.001 for 2.
        """
        if self.lr is None and self.optimizer == "adamw":
            return AdamW(step / _UPDATES, weight_decay=self.weight_decay)
        return self.rule

    def arguments(self, student: ir.Model) -> dict[str, Any]:
        """What `train.tune.tune` takes."""
        found = super().arguments(student)
        del found["masks"]  # of floats, which a quantized model has not yet
        found["optimizer"] = self.rule_for
        return found | {"keep_zeros": self.keep_zeros}


def masks_of(model: ir.Model) -> dict[str, Array]:
    """Where pruned weights are not zero: those of two or more axes that have their share of zeros.

    By initializer, for `train(masks=...)`.
    """
    found: dict[str, Array] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or value.dtype is not ir.DataType.FLOAT or len(tensor.shape) < 2:
            continue
        mask = tensor.numpy() != 0
        if _SPARSE <= 1 - np.count_nonzero(mask) / max(mask.size, 1) < 1:
            found[name] = mask
    return found
