"""Training from beginning to end: epochs of mini-batches, validation, early stopping, checkpoints.

A run is a function of its arguments. The order of an epoch follows from the seed and the epoch,
what `augment` draws from these and the batch; kernels give the same bits each time on the same
number of threads of one machine. So a run that was killed and goes on from its checkpoint ends
with the same bytes as one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.data import Images, Port, interface
from onnxcompress.errors import InputError, did_you_mean
from onnxcompress.train import checkpoint as checkpoints
from onnxcompress.train.augment import Augmentation, bound, softens
from onnxcompress.train.batch_statistics import LEAST, are_fresh, kept_statistics
from onnxcompress.train.checkpoint import Checkpoint, digest, model_digest
from onnxcompress.train.history import Epoch, History
from onnxcompress.train.losses import CrossEntropy, Loss
from onnxcompress.train.objective import weights_read
from onnxcompress.train.optimizers import AdamW, Optimizer
from onnxcompress.train.parameters import trainable_weights
from onnxcompress.train.samples import Samples, fixed_batch, open_samples
from onnxcompress.train.schedules import Schedule, cosine
from onnxcompress.train.step import Step
from onnxcompress.train.tally import Tally

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called after each step with the steps done, how many there are, and the epoch's figures yet."""

_EVALUATED: Final = 256
"""Samples that are evaluated at a time where the model leaves that free."""
_SAMPLED: Final = 997
"""Steps whose rates tell schedules apart."""


@dataclass(frozen=True)
class Trained:
    """What came of training."""

    model: ir.Model
    history: History


def train(
    model: ir.Model,
    data: Any,
    *,
    losses: Sequence[Loss],
    optimizer: Optimizer | None = None,
    schedule: Schedule = cosine,
    epochs: int,
    batch_size: int = 32,
    seed: int = 0,
    evaluate: Any = None,
    monitor: str = "loss",
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    augment: Sequence[Augmentation] = (),
    trainable: Sequence[str] = ("*",),
    masks: Mapping[str, Array] | None = None,
    clip_norm: float | None = None,
    accumulate: int | None = None,
    batch_statistics: bool | None = None,
    threads: int = 0,
    images: Images | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a model in ONNX Runtime.

    Args:
        model: not altered.
        data: what `onnxcompress.data` opens: arrays by input name with the samples on the first
            axis, in a mapping or an `.npz`, with what the losses read (`labels`, a teacher's
            outputs) among them; or folders, readers and other sources, with `labels` at most.
        optimizer: AdamW by default.
        schedule: factor of the optimizer's learning rate by step.
        batch_size: samples a step. The last batch of an epoch may have less; where the model
            fixes its first dimension, what does not fill a batch is left out of the epoch.
        evaluate: data like `data` that is not trained on. The weights of the epoch that it comes
            out best at are what is returned.
        monitor: by what epochs are compared: `loss` (less is better, as for each loss by its
            type's name) or `accuracy`.
        patience: epochs without a better one after which training stops.
        checkpoint: a file that training goes on from if it is there. Written every
            `checkpoint_seconds` and at the end.
        augment: called one after the other on each batch that is trained on.
        trainable: patterns of the weights to train; see `parameters.trainable_weights`. What the
            losses do not depend on is left as it is.
        masks: see `Step`, as `clip_norm` and `threads`.
        accumulate: pieces that a batch is computed in; 1, or as many as the model's first
            dimension demands.
        batch_statistics: normalize with the mean and variance of each batch (of each piece of
            it) where the model has batch normalizations, as fresh weights need; see `Step`. By
            default where one of them has means of 0 and variances of 1, as before any training,
            and pieces hold two samples; else with the statistics that the model came with, as
            suits weights that are trained already. What is left for the last batch of an epoch
            is left out where it does not give each piece two.

    Raises:
        InputError: if something does not suit the model or the data, a gradient cannot be had,
            the loss becomes NaN or infinite, or the checkpoint is of another run.
    """
    optimizer = optimizer or AdamW()
    _check(epochs, batch_size, seed, patience, evaluate)
    ports = interface(model)
    pieces = _pieces(batch_size, accumulate, fixed_batch(ports))
    read = weights_read(model, losses)
    names = [n for n in trainable_weights(model, trainable) if n in read or n in trainable]
    each = batch_size // pieces
    if batch_statistics is None:
        batch_statistics = each >= LEAST and are_fresh(model)
    elif batch_statistics and not kept_statistics(model):
        raise InputError("the model has no batch normalization with statistics of its own: "
                         "leave batch_statistics out")  # fmt: skip
    if softens(augment):
        losses = [replace(x, soft=True) if isinstance(x, CrossEntropy) else x for x in losses]
    step = Step(
        model,
        losses,
        optimizer,
        trainable=names,
        clip_norm=clip_norm,
        accumulate=pieces,
        masks=masks,
        threads=threads,
        batch_statistics=batch_statistics,
    )
    samples = open_samples(data, ports, step.targets, images=images)
    held = None
    if evaluate is not None:
        held = open_samples(evaluate, ports, step.targets, images=images)
    run = _Run(
        step=step,
        samples=samples,
        held=held,
        lr=optimizer.lr,
        schedule=schedule,
        epochs=epochs,
        batch_size=batch_size,
        fixed=fixed_batch(ports),
        least=LEAST * pieces if batch_statistics else 1,
        seed=seed,
        patience=patience,
        augment=_bound(augment, ports, step),
        progress=progress or _silent,
    )
    history = History(monitor=monitor)
    if checkpoint is None:
        return run.go(history, None)
    settings = (losses, optimizer, epochs, batch_size, seed, monitor, patience, augment, names,
                clip_norm, pieces, threads, batch_statistics, run.rates,
                *sorted((masks or {}).items()))  # fmt: skip
    setup = {
        "model": model_digest(model),
        "data": digest(samples.digest, held.digest if held else None),
        "settings": digest(*settings),
    }
    return run.go(history, _File(Path(checkpoint), setup, checkpoint_seconds))


@dataclass(frozen=True)
class _File:
    """Where checkpoints go, what they must be of, and how often they are written."""

    path: Path
    setup: Mapping[str, str]
    seconds: float


@dataclass(kw_only=True)
class _Run:
    step: Step
    samples: Samples
    held: Samples | None
    lr: float
    schedule: Schedule
    epochs: int
    batch_size: int
    fixed: int | None
    least: int
    """Samples that a batch must have."""
    seed: int
    patience: int | None
    augment: Augmentation
    progress: Progress

    def __post_init__(self) -> None:
        if self.fixed:
            self.least = self.batch_size
        if self.samples.size < self.least:
            raise InputError(f"{self.samples.where}: a batch takes {self.least} samples, "
                             f"there are {self.samples.size}")  # fmt: skip
        whole, rest = divmod(self.samples.size, self.batch_size)
        self.batches = whole + (rest >= self.least)
        self.best: Array | None = None

    @property
    def total(self) -> int:
        return self.epochs * self.batches

    @property
    def rates(self) -> list[float]:
        """The schedule at some steps."""
        spread = range(0, self.total, max(1, self.total // _SAMPLED))
        return [self.schedule(done, self.total) for done in spread]

    def go(self, history: History, file: _File | None) -> Trained:
        epoch, batch, tally = 0, 0, Tally()
        found = checkpoints.load(file.path, file.setup) if file else None
        if found:
            epoch, batch, tally, history = (
                found.epoch, found.batch, Tally(**found.tally), found.history
            )  # fmt: skip
            self.step.restore(found.state)
            self.best = found.best
        saved = time.monotonic()
        while epoch < self.epochs and not history.stopped:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.samples.size)
            while batch < self.batches:
                tally += self._train(order, epoch, batch)
                batch += 1
                self.progress(epoch * self.batches + batch, self.total, tally.figures)
                if file and batch < self.batches and time.monotonic() - saved >= file.seconds:
                    self._save(file, epoch, batch, tally, history)
                    saved = time.monotonic()
            history = self._end(epoch, tally, history)
            epoch, batch, tally = epoch + 1, 0, Tally()
            last = epoch == self.epochs or history.stopped
            if file and (last or time.monotonic() - saved >= file.seconds):
                self._save(file, epoch, batch, tally, history)
                saved = time.monotonic()
        if self.best is not None:
            self.step.restore(self.step.state(copy=False) | {"weight": self.best})
        return Trained(self.step.result(), history)

    def _train(self, order: Array, epoch: int, batch: int) -> Tally:
        start = batch * self.batch_size
        feed = self.samples.take(order[start : start + self.batch_size])
        rng = np.random.default_rng([self.seed, epoch, batch + 1])
        return self.step.run(self.augment(feed, rng), self._rate(epoch * self.batches + batch))

    def _rate(self, done: int) -> float:
        return self.lr * self.schedule(done, self.total)

    def _end(self, epoch: int, tally: Tally, history: History) -> History:
        """The history with this epoch; keeps the weights if they are the best."""
        validation = self._evaluate(history.monitor)
        rate = self._rate((epoch + 1) * self.batches - 1)
        history = history.with_epoch(
            Epoch(number=epoch + 1, rate=rate, training=tally.figures, validation=validation)
        )
        if history.best == epoch + 1:
            self.best = self.step.state(copy=False)["weight"].copy()
        if self.patience is not None and history.waited >= self.patience:
            history = replace(history, stopped=True)
        return history

    def _evaluate(self, monitor: str) -> dict[str, float]:
        if self.held is None:
            return {}
        tally = Tally()
        for feed in self.held.stretches(self.fixed or _EVALUATED, whole=self.fixed is not None):
            tally += self.step.evaluate(feed)
        if not tally.samples:
            raise InputError(f"{self.held.where}: the model takes {self.fixed} samples at a time, "
                             f"there are {self.held.size}")  # fmt: skip
        if monitor not in tally.figures:
            raise InputError(f"monitor is {monitor!r}, which is no figure of the validation"
                             f"{did_you_mean(monitor, tally.figures)}")  # fmt: skip
        return tally.figures

    def _save(self, file: _File, epoch: int, batch: int, tally: Tally, history: History) -> None:
        found = Checkpoint(
            setup=file.setup,
            epoch=epoch,
            batch=batch,
            tally=asdict(tally),
            history=history,
            state=self.step.state(copy=False),
            best=self.best,
        )
        checkpoints.save(found, file.path)


def _check(epochs: int, batch_size: int, seed: int, patience: int | None, evaluate: Any) -> None:
    bounds = {"epochs": (epochs, 1), "batch_size": (batch_size, 1), "seed": (seed, 0)}
    if patience is not None:
        bounds["patience"] = (patience, 1)
        if evaluate is None:
            raise InputError("patience needs data to evaluate on: give evaluate")
    for name, (value, least) in bounds.items():
        if value < least:
            raise InputError(f"{name} is {value} but must be {least} or more")


def _pieces(batch_size: int, accumulate: int | None, fixed: int | None) -> int:
    """The pieces that a batch is computed in."""
    if fixed is None:
        return accumulate or 1
    if batch_size % fixed or accumulate not in (None, batch_size // fixed):
        raise InputError(
            f"the model takes {fixed} samples at a time: make batch_size ({batch_size}) a multiple "
            "and leave accumulate to follow from it"
        )
    return batch_size // fixed


def _bound(augment: Sequence[Augmentation], ports: Sequence[Port], step: Step) -> Augmentation:
    floats = [port.name for port in ports if port.dtype.kind == "f"]
    others = [port.name for port in ports if port.name not in floats]
    return bound(augment, floats, next(iter(step.classes.values()), None), others)


def _silent(done: int, total: int, figures: Mapping[str, float]) -> None:
    pass
