"""What a saved `Model` keeps beside its graph: JSON in the file's metadata, read with mistrust."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, cast

import numpy as np
import onnx_ir as ir

from onnxcompress.errors import InputError
from onnxcompress.train.history import History
from onnxcompress.train.task import Task

KEY: Final = "onnxcompress.model"
"""Its name among the metadata."""
SETTINGS: Final = (
    "epochs", "batch_size", "quantize", "trainable", "temperature", "label_weight",
    "batch_statistics", "patience", "seed", "threads",
)  # fmt: skip
"""Arguments of `Model` that are numbers and words, and no paths."""


@dataclass(frozen=True)
class Kept:
    """Settings, history and how outputs are read."""

    settings: Mapping[str, Any]
    history: History | None
    task: Task | None

    def within(self, model: ir.Model) -> ir.Model:
        """A copy of the model that holds this; it shares the weights."""
        task = None
        if self.task is not None:
            classes = None if self.task.classes is None else self.task.classes.tolist()
            task = {**asdict(self.task), "classes": classes}
        plain = {
            "settings": {name: v for name, v in self.settings.items() if _is_plain(v)},
            "history": None if self.history is None else asdict(self.history),
            "task": task,
        }
        copy = model.clone()
        copy.metadata_props[KEY] = json.dumps(plain, sort_keys=True)
        return copy


def take_kept(model: ir.Model, where: str) -> Kept | None:
    """What was kept in a model, which is taken out of it; None where there is nothing.

    Raises:
        InputError: if it cannot be read; `where` opens the sentence.
    """
    text = model.metadata_props.pop(KEY, None)
    if text is None:
        return None
    try:
        plain = json.loads(text)
        settings = {n: _tupled(v) for n, v in plain["settings"].items() if n in SETTINGS}
        history = None if plain["history"] is None else History.of(plain["history"])
        return Kept(settings, history, _task(plain["task"], model))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{where}: what its metadata {KEY!r} keep cannot be read ({error}): save it again"
        ) from error


def _task(plain: Any, model: ir.Model) -> Task | None:
    if plain is None:
        return None
    fields: dict[str, Any] = dict(plain)
    if fields["classes"] is not None:
        fields["classes"] = np.array(fields["classes"])
    task = Task(**fields)
    if task.output not in (known := [v.name for v in model.graph.outputs]):
        raise ValueError(f"it speaks of the output {task.output!r}, there are {known}")
    return task


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold it."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, cast("Sequence[Any]", value)))
    return value is None or isinstance(value, bool | int | float | str)


def _tupled(value: Any) -> Any:
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value
