"""One training step: forward, loss, backward and update, in ONNX Runtime, on bound arrays.

Weights, gradients and states lie in flat arrays that sessions are bound to for good. The first
session reads weights and a batch and writes the loss and the gradients; the second writes new
weights and states over the old ones, a stretch at a time. Nothing is copied between steps but the
batch where it does not begin on a boundary of a cache line.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.errors import InputError
from onnxcompress.session import Binding, Session
from onnxcompress.train.augment import one_hot
from onnxcompress.train.batch_statistics import LEAST, follow, kept_statistics
from onnxcompress.train.blocked import block_size, for_cpu, is_by_size
from onnxcompress.train.losses import Loss
from onnxcompress.train.objective import LOSS, Objective, objective, squares, update, with_gradients
from onnxcompress.train.optimizers import Optimizer
from onnxcompress.train.parameters import Layout, aligned, as_aligned
from onnxcompress.train.tally import Tally

Feed = Mapping[str, Array]

_REMEDY: Final = (
    "lower the learning rate, clip gradients (clip_norm=1) or look for outliers in the data"
)
_SIZES: Final = 4
"""Sizes of batches that sessions are kept for: whole ones, the last of an epoch, and pieces."""
_MANY: Final = 4
"""Stretches of weights from which it is worth waking other threads."""


class Step:
    """A model in training.

    Args:
        model: not altered.
        losses: their weighted sum is made small.
        trainable: names of float32 initializers of the main graph (`trainable_weights` finds
            them by patterns); all others are frozen.
        clip_norm: gradients are scaled down so that the norm of all together is at most this
            (Pascanu et al., On the difficulty of training recurrent neural networks, 2013).
        accumulate: the pieces that a batch is cut into, run one by one; their gradients add up to
            that of the whole batch.
        masks: by weight, an array of its shape; where it is zero the weight is and stays zero.
        threads: of one operator; 0 leaves the choice to ONNX Runtime. The same number gives the
            same bits.
        batch_statistics: let batch normalizations of the main graph normalize with each piece's
            own mean and variance, which take two samples or more; those that they came with
            follow, and are what is evaluated with.

    Raises:
        InputError: if a loss, a mask or a name does not suit the model, or a gradient cannot be
            had.
    """

    def __init__(
        self,
        model: ir.Model,
        losses: Sequence[Loss],
        optimizer: Optimizer,
        *,
        trainable: Sequence[str],
        clip_norm: float | None = None,
        accumulate: int = 1,
        masks: Mapping[str, Array] | None = None,
        threads: int = 0,
        batch_statistics: bool = False,
    ) -> None:
        if clip_norm is not None and not clip_norm > 0:
            raise InputError(f"clip_norm is {clip_norm} but must be above 0")
        if accumulate < 1:
            raise InputError(f"accumulate is {accumulate} but must be 1 or more")
        self._model, self._optimizer, self._threads = model, optimizer, threads
        self._clip_norm, self._accumulate = clip_norm, accumulate
        given = _arrays(model, trainable)
        self._momenta = kept_statistics(model) if batch_statistics else {}
        kept = _arrays(model, list(self._momenta)) if self._momenta else {}
        self._layout = Layout(_shapes(given), _shapes(kept))
        self._flat = {
            name: aligned([self._layout.size])
            for name in (
                "weight",
                "gradient",
                *optimizer.states,
                *(["sum"] if accumulate > 1 else []),
            )
        }
        self._weights = self._layout.views(self._flat["weight"])
        for name, array in (given | kept).items():
            self._weights[name][...] = array
        self._total = self._flat["sum" if accumulate > 1 else "gradient"]
        batch = self._layout.views(self._total)
        self._following = [(self._weights[n], batch[n], m) for n, m in self._momenta.items()]
        self._zeros = self._masked(masks or {})
        self._objective = objective(model, losses, list(self._weights))
        self._scalars = {name: aligned([]) for name in self._objective.scalars}
        self._inputs = _dtypes(self._objective, self._weights)
        self._backward: dict[int | None, Binding] = {}
        self._by_size = is_by_size(self._objective.model.graph)
        if self._by_size:
            self._with_gradients(None)  # what has no gradient is told before the first batch
        else:
            self._backward_of(None)
        self._updates = self._bind_updates()
        self.steps = 0
        """Updates so far."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of what the losses read of a batch beside the student's inputs."""
        return tuple(self._objective.targets)

    @property
    def classes(self) -> Mapping[str, int]:
        """How many classes labels are of, by the labels' name, where the model tells."""
        return self._objective.classes

    def run(self, feed: Feed, lr: float | None = None) -> Tally:
        """Update the weights by one batch.

        Args:
            feed: the student's inputs and the losses' by name, with the samples on the first axis
                of those that have axes.
            lr: the learning rate, instead of the optimizer's.

        Returns:
            The batch's figures, by the weights before the update.

        Raises:
            InputError: if the loss (or, where it is clipped, the gradient) is NaN or infinite, the
                weights then being as they were, or the feed does not suit the model.
        """
        parts = _parts(self._checked(feed), self._accumulate)
        samples = sum(size for size, _ in parts)
        self._check_statistics(min(size for size, _ in parts))
        tally = Tally()
        if self._accumulate > 1:
            self._total.fill(0)
        for size, part in parts:
            tally += self._measure(self._backward_of(size), size, part)
            _check_finite(tally.sums[LOSS], "loss", self.steps + 1)
            if self._accumulate > 1:
                self._flat["gradient"] *= np.float32(size / samples)
                self._total += self._flat["gradient"]
        for view, zeros in self._zeros.values():
            view[zeros] = 0
        self._update(self._optimizer.lr if lr is None else lr)
        return tally

    def evaluate(self, feed: Feed) -> Tally:
        """The figures of a batch; nothing is updated."""
        feed = self._checked(feed)
        return self._measure(self._forward, _samples(feed), feed)

    def weights(self) -> dict[str, Array]:
        """The weights by name, where they lie: the next step changes them."""
        return dict(self._weights)

    def state(self, *, copy: bool = True) -> dict[str, Array]:
        """All that `restore` needs to go on from here, to the bit.

        Without `copy` the arrays are those that the next step changes.
        """
        kept = {name: self._flat[name] for name in ("weight", *self._optimizer.states)}
        copies = {name: array.copy() for name, array in kept.items()} if copy else kept
        return copies | {"steps": np.array(self.steps)}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go back to what `state` gave, of a step of the same model and settings.

        Raises:
            InputError: if it is the state of something else.
        """
        names = ("weight", *self._optimizer.states)
        if any(n not in state or state[n].shape != (self._layout.size,) for n in names):
            raise InputError("this is not a state of a training step of this model and optimizer")
        for name in names:
            self._flat[name][...] = state[name]
        self.steps = int(state["steps"])

    def result(self) -> ir.Model:
        """The model with its weights as they are now, its interface as it came.

        Raises:
            InputError: if the last step made a weight NaN or infinite.
        """
        for name, array in self._weights.items():
            if not np.isfinite(array).all():
                raise InputError(f"training made {name!r} NaN or infinite; {_REMEDY}")
        copy = self._model.clone()
        for name, array in self._weights.items():
            copy.graph.initializers[name].const_value = ir.Tensor(array.copy(), name=name)
        return copy

    def _measure(self, binding: Binding, size: int, feed: Feed) -> Tally:
        binding.feed(feed)
        binding.run()
        return Tally.of(self._objective, self._scalars, size)

    def _update(self, lr: float) -> None:
        clip = {} if self._clip_norm is None else {"clip": self._clip()}
        self.steps += 1
        for decay, (scalars, bindings) in self._updates.items():
            found = self._optimizer.coefficients(lr, self.steps, decay) | clip
            for name, array in scalars.items():
                array[...] = found[name]
            self._run_each(bindings)
        for kept, batch, momentum in self._following:
            follow(kept, batch, momentum, self.steps)

    def _check_statistics(self, samples: int) -> None:
        if self._momenta and samples < LEAST:
            raise InputError(
                "batch normalization takes its statistics of two samples or more, and there is "
                "one: take larger batches, fewer pieces (accumulate), or batch_statistics=False"
            )

    def _clip(self) -> float:
        assert self._clip_norm is not None
        self._run_each([binding for _, binding in self._squares])
        total = math.fsum(float(found) for found, _ in self._squares)
        _check_finite(total, "gradient's norm", self.steps + 1)
        return min(1.0, self._clip_norm / max(math.sqrt(total), 1e-12))

    def _run_each(self, bindings: Sequence[Binding]) -> None:
        """Stretch by stretch; many of them on all cores, each on one."""
        if len(bindings) < _MANY:
            for binding in bindings:
                binding.run()
        else:
            list(self._workers.map(Binding.run, bindings))

    @cached_property
    def _workers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads or os.cpu_count())

    def _checked(self, feed: Feed) -> dict[str, Array]:
        missing = [name for name in self._inputs if name not in feed]
        if missing:
            raise InputError(f"a batch has no array {missing[0]!r}, which training reads")
        found = {name: self._label(name, feed[name]) for name in self._inputs}
        return {name: as_aligned(found[name], dtype) for name, dtype in self._inputs.items()}

    def _label(self, name: str, array: Array) -> Array:
        """`array`; of labels, with class numbers in range, as probabilities where need be."""
        classes = self.classes.get(name)
        if classes is None or array.dtype.kind not in "iu":
            return array
        if array.size and array.max() >= classes:
            raise InputError(
                f"{name!r} holds {array.max()} but the model tells classes 0 to {classes - 1} apart"
            )
        return array if self._inputs[name].kind in "iu" else one_hot(array, classes)

    def _masked(self, masks: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
        """The views of gradients that have masked elements, and which these are."""
        found: dict[str, tuple[Array, Array]] = {}
        views = self._layout.views(self._total)
        for name, mask in masks.items():
            if name not in views:
                raise InputError(f"there is a mask of {name!r}, which is not trained")
            if mask.shape != views[name].shape:
                raise InputError(
                    f"the mask of {name!r} has shape {list(mask.shape)} but the weight has "
                    f"{list(views[name].shape)}"
                )
            found[name] = views[name], np.asarray(mask) == 0
            self._weights[name][found[name][1]] = 0
        return found

    def _backward_of(self, samples: int | None) -> Binding:
        """Forward and backward of a batch, whatever its size unless that makes them faster."""
        size = samples if self._by_size else None
        if size not in self._backward:
            if len(self._backward) == _SIZES:
                del self._backward[next(iter(self._backward))]
            self._backward[size] = self._bind_backward(size)
        return self._backward[size]

    def _bind_backward(self, samples: int | None) -> Binding:
        model, gradients = self._with_gradients(samples)
        names = [*self._objective.scalars, *gradients.values()]
        model = for_cpu(model, names)
        session = Session(model, outputs=names, threads=self._threads, training=True)
        views = self._layout.views(self._flat["gradient"])
        found = {gradients[name]: view for name, view in views.items()}
        return session.bind(self._weights, {**self._scalars, **found})

    def _with_gradients(self, samples: int | None) -> tuple[ir.Model, dict[str, str]]:
        trained = [name for name in self._weights if name not in self._momenta]
        options = {"samples": samples, "block": block_size()}
        return with_gradients(self._objective, trained, self._momenta, **options)

    @cached_property
    def _forward(self) -> Binding:
        found = self._objective
        model = for_cpu(found.model.clone(), found.scalars)
        session = Session(model, outputs=found.scalars, threads=self._threads, training=True)
        return session.bind(self._weights, self._scalars)

    def _bind_updates(self) -> dict[bool, tuple[dict[str, Array], list[Binding]]]:
        """Scalars and the stretches that are updated with them, by whether weights decay."""
        graph = update(self._optimizer, clipped=self._clip_norm is not None)
        session = Session(graph.model, threads=1, training=True)
        flat = {**self._flat, "gradient": self._total}
        found: dict[bool, tuple[dict[str, Array], list[Binding]]] = {}
        for chunk in self._layout.chunks:
            if chunk.decay not in found:
                names = [name for name in graph.inputs if name not in flat]
                found[chunk.decay] = {name: aligned([]) for name in names}, []
            scalars, bindings = found[chunk.decay]
            part = {name: flat[name][chunk.start : chunk.stop] for name in graph.inputs
                    if name in flat}  # fmt: skip
            outputs = {output: part[name] for name, output in graph.outputs.items()}
            bindings.append(session.bind({**part, **scalars}, outputs))
        return found

    @cached_property
    def _squares(self) -> list[tuple[Array, Binding]]:
        session = Session(squares(), threads=1, training=True)
        found: list[tuple[Array, Binding]] = []
        for chunk in self._layout.chunks:
            part, total = self._total[chunk.start : chunk.stop], aligned([])
            found.append((total, session.bind({"gradient": part}, {"squares": total})))
        return found


def _check_finite(figure: float, name: str, step: int) -> None:
    if not math.isfinite(figure):
        raise InputError(f"training stopped in step {step}: the {name} is {figure}; {_REMEDY}")


def _shapes(arrays: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def _arrays(model: ir.Model, names: Sequence[str]) -> dict[str, Array]:
    if not names:
        raise InputError("there is nothing to train: name weights in trainable")
    found: dict[str, Array] = {}
    for name in names:
        value = model.graph.initializers.get(name)
        if value is None or value.const_value is None or value.dtype is not ir.DataType.FLOAT:
            raise InputError(f"{name!r} is no float32 initializer of the model's main graph")
        found[name] = value.const_value.numpy()
    return found


def _dtypes(found: Objective, weights: Mapping[str, Any]) -> dict[str, np.dtype[Any]]:
    """The types of what a batch must hold."""
    inputs = [
        v for v in found.model.graph.inputs if v.name not in weights and not v.is_initializer()
    ]
    return {v.name or "": np.dtype(v.dtype.numpy()) for v in inputs if v.dtype is not None}


def _samples(feed: Feed) -> int:
    sizes = {name: array.shape[0] for name, array in feed.items() if array.ndim}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name!r} {size}" for name, size in sizes.items())
        raise InputError(f"the arrays of a batch do not have equally many samples: {shown}")
    return next(iter(sizes.values()), 1)


def _parts(feed: Feed, pieces: int) -> list[tuple[int, Feed]]:
    """The batch in pieces of nearly one size, with their sizes."""
    samples = _samples(feed)
    if pieces == 1:
        return [(samples, feed)]
    ends = [samples * i // pieces for i in range(pieces + 1)]
    return [
        (stop - start, {n: as_aligned(a[start:stop], a.dtype) if a.ndim else a
                        for n, a in feed.items()})
        for start, stop in pairwise(ends)
        if stop > start
    ]  # fmt: skip
