"""Quantization-aware tuning: a quantized model trained as it is rounded, by what floats say.

Its weights become floats behind quantizers (`fake_quantize`), learn like any student's, and settle
to codes on the same grid. What comes out is never worse on held-out data than what came in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Skip
from onnxcompress.data import Data, Images, interface, open_data
from onnxcompress.errors import InputError
from onnxcompress.observe import Progress as Asking
from onnxcompress.session import Session
from onnxcompress.train.distill import Distilled, distill
from onnxcompress.train.fake_quantize import FakeQuantized, fake_quantize, settle
from onnxcompress.train.history import History
from onnxcompress.train.lesson import before_softmax
from onnxcompress.train.loop import Progress
from onnxcompress.train.losses import CrossEntropy, Loss, MeanSquared
from onnxcompress.train.objective import objective
from onnxcompress.train.optimizers import Optimizer
from onnxcompress.train.samples import LABELS, TARGET, fixed_batch, from_npz, open_samples
from onnxcompress.train.settings import Tuning, masks_of
from onnxcompress.train.tally import Tally
from onnxcompress.train.task import learned_output

_HELD: Final = 5
"""One in so many samples is held out."""
_BATCH: Final = 256


@dataclass(frozen=True)
class Tuned:
    """A quantized model with other codes, or as it came where no others were better."""

    model: ir.Model
    history: History
    better: bool
    """Whether it is better than what came in; else it is what came in."""
    before: float
    """The monitored figure of held-out data, as `after` by what is deployed, not by floats."""
    after: float
    """That of the tuned codes, kept or not."""
    losses: tuple[Loss, ...]
    samples: int
    skips: tuple[Skip, ...]
    """Codes that were not trained, and why not."""

    @property
    def monitor(self) -> str:
        """By what epochs were compared."""
        return self.history.monitor

    @property
    def notes(self) -> tuple[str, ...]:
        """How it went, a sentence each."""
        figures = (
            f"{self.monitor} on held-out data {self.before:.4g} before, {self.after:.4g} after"
        )
        said = figures if self.better else f"nothing was better, so it is as it came: {figures}"
        stay = [f"not trained: {s.op} {s.node!r}: {s.reason}" for s in self.skips]
        return (f"trained on {self.samples} samples", said, *stay)


def tune(
    quantized: ir.Model,
    data: Any,
    *,
    teacher: ir.Model | None = None,
    losses: Sequence[Loss] | None = None,
    optimizer: Optimizer | Callable[[float], Optimizer] | None = None,
    epochs: int = 10,
    evaluate: Any = None,
    keep_zeros: bool = False,
    images: Images | None = None,
    asking: Asking | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Tuned:
    """Train the codes of a quantized model, and its floats.

    Args:
        quantized: static or weights alone; not altered.
        data: without labels, where there is a teacher.
        teacher: the float model, or a better one; without it, labels or targets are learned.
        optimizer: or what makes one of the median step of the grids; AdamW with a learning rate of
            a fiftieth of it by default, without decay.
        evaluate: to choose the best epoch by and to hold against what came in; the last fifth of
            `data`, which is then not trained on, when None.
        keep_zeros: weights that are zero stay zero, where there are enough to look pruned.
        losses, epochs, images, asking, progress, options: as for `distill`.

    Raises:
        InputError: if the model holds no codes to train, or as `distill` does.

    Sources: Jacob et al., Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, 2018; Bengio, Léonard and Courville, 2013, for gradients.
    """
    fake = fake_quantize(quantized)
    optimizer = optimizer or Tuning().rule_for
    if evaluate is None:
        data, evaluate = _split(data, quantized, images)
    if teacher is None and losses is None:
        losses = _own_losses(fake.model, data)
    found = distill(
        teacher or fake.model,
        fake.model,
        data,
        losses=losses,
        optimizer=optimizer(_median_step(fake)) if callable(optimizer) else optimizer,
        epochs=epochs,
        evaluate=evaluate,
        masks=masks_of(fake.model) if keep_zeros else None,
        rewrite=False,
        images=images,
        asking=asking,
        progress=progress,
        **options,
    )
    result = settle(fake, found.model)
    before, after = (_figure(model, found) for model in (quantized, result))
    better = after > before if found.history.monitor == "accuracy" else after < before
    return Tuned(
        model=result if better else quantized.clone(),
        history=found.history,
        better=better,
        before=before,
        after=after,
        losses=found.losses,
        samples=found.samples,
        skips=fake.skips,
    )


def _median_step(fake: FakeQuantized) -> float:
    steps = [np.abs(w.grid.scale).reshape(-1) for w in fake.weights if w.grid.dtype != "int32"]
    return float(np.median(np.concatenate(steps))) if steps else 1.0


def _figure(model: ir.Model, taught: Distilled) -> float:
    """The monitored figure of held-out data, all of the runtime's own rewrites applied."""
    found = objective(model, taught.losses, ())
    session = Session(found.model, outputs=found.scalars)
    dtypes = {v.name or "": v.dtype.numpy() for v in found.model.graph.inputs if v.dtype}
    ports = interface(model)
    samples = open_samples(taught.held, ports, [name for name in found.targets if name in dtypes])
    fixed, tally = fixed_batch(ports), Tally()
    for feed in samples.stretches(fixed or _BATCH, whole=fixed is not None):
        size = max(len(array) for array in feed.values() if array.ndim)
        given = {name: np.asarray(feed[name], dtype) for name, dtype in dtypes.items()}
        tally += Tally.of(found, session.run(given), size)
    return tally.figures[taught.history.monitor]


def _split(data: Any, model: ir.Model, images: Images | None) -> tuple[Any, Any]:
    """All but the last fifth of the samples, and that."""
    arrays = from_npz(data) or data
    ports = interface(model)
    if not isinstance(arrays, Mapping):
        return open_data(data, ports, images=images).split()
    given = cast("Mapping[str, Any]", arrays)
    step = fixed_batch(ports) or 1
    size = min((np.shape(array)[0] for array in given.values() if np.shape(array)), default=0)
    held = -(-size // _HELD // step) * step
    if held >= size:
        raise InputError(f"the data has {size} samples, too few to hold some out: give more, or "
                         "data to evaluate on")  # fmt: skip
    columns = {name: np.asarray(array) for name, array in given.items()}
    learned = {n: a[: size - held] if a.ndim else a for n, a in columns.items()}
    return learned, {n: a[size - held :] if a.ndim else a for n, a in columns.items()}


def _own_losses(model: ir.Model, data: Any) -> tuple[Loss, ...]:
    """What labels or targets are learned by where there is no teacher.

    Raises:
        InputError: if there are none.
    """
    value = learned_output(model)
    scores, are_classes = before_softmax(value)
    given = set(cast("Mapping[str, Any]", data)) if isinstance(data, Mapping) else set[str]()
    if isinstance(data, Data) and data.labels is not None:
        given.add(LABELS)
    if TARGET in given:
        return (MeanSquared(value.name or "", TARGET),)
    if LABELS in given and are_classes:
        return (CrossEntropy(scores.name or ""),)
    raise InputError("there is nothing to tune by: give the float model as teacher, or labels of "
                     "classes (or a target) among the data")  # fmt: skip
