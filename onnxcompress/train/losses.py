"""Losses as ONNX operators: what a student's values are held against.

Each is the mean over the samples of the first axis of a figure that each sample has by itself, so
that a batch cut into pieces gives the same gradient. `output` and the first of each of `pairs`
name values of the student's graph; `labels`, `target` and the second of `pairs` name inputs that
the training graph has beside the student's (or one of the student's own, as an autoencoder needs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from onnxcompress.errors import InputError, did_you_mean
from onnxcompress.graph.scopes import values_of
from onnxcompress.train.tape import Tape, dims_of

_TINY = 1e-12
_ZERO = np.array(0, np.int64)
_OFF_ON = np.array([0, 1], np.float32)


class Loss(Protocol):
    """A term of what training makes small."""

    @property
    def weight(self) -> float:
        """What its figure is multiplied by in the sum of all."""
        ...

    def emit(self, terms: Terms) -> ir.Value:
        """Its figure, a float32 scalar."""
        ...


def learns_classes(losses: Sequence[Loss]) -> bool:
    """Whether one of them holds scores against labels."""
    return any(isinstance(loss, CrossEntropy) for loss in losses)


class Terms:
    """What losses read, and the tape that they are written on."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self._values = {v.name: v for v in values_of(tape.graph)}
        self.targets: dict[str, ir.Value] = {}
        """Inputs that were added, by name."""
        self.classes: dict[str, int] = {}
        """How many classes there are to labels, by their name, where that is known."""
        self.hits: list[tuple[ir.Value, ir.Value]] = []
        """How many labels an output met, and how many there were: float32 scalars."""

    def value(self, name: str) -> ir.Value:
        """A value of the student's graph.

        Raises:
            InputError: if there is none of that name, or its type or rank is unknown.
        """
        if name not in self._values:
            known = [known for known in self._values if known]
            raise InputError(f"a loss reads {name!r}, no value of the model"
                             f"{did_you_mean(name, known)}")  # fmt: skip
        value = self._values[name]
        if value.dtype is not ir.DataType.FLOAT or dims_of(value) is None:
            raise InputError(f"a loss reads {name!r}, which is not float32 of known rank")
        return value

    def target(
        self, name: str, shape: Sequence[int | ir.SymbolicDim], dtype: ir.DataType
    ) -> ir.Value:
        """An input to hold values against; added where there is none yet."""
        known = self._values.get(name) if name in self._own_inputs() else self.targets.get(name)
        if known is None:
            if name in self._values:
                raise InputError(f"{name!r} names both a loss's input and a value of the model")
            known = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
            self.tape.graph.inputs.append(known)
            self.targets[name] = known
        if known.dtype is not dtype:
            raise InputError(f"a loss takes {name!r} as {dtype.name} but it is {known.dtype}")
        return known

    def _own_inputs(self) -> set[str | None]:
        return {v.name for v in self.tape.graph.inputs} - set(self.targets)

    def like(self, name: str, value: ir.Value) -> ir.Value:
        """A target of the type and shape of `value`."""
        return self.target(name, list(value.shape or ()), ir.DataType.FLOAT)

    def sum(self, value: ir.Value, *axes: int) -> ir.Value:
        """The sum over some axes, which go."""
        return self.tape.op("ReduceSum", [value, self.tape.ints(*axes)], {"keepdims": 0})

    def mean(self, value: ir.Value, *axes: int) -> ir.Value:
        """The mean over some axes, which go; over all where none are named."""
        given = [self.tape.ints(*axes)] if axes else []
        return self.tape.op("ReduceMean", [value, *given], {"keepdims": 0})

    def number(self, number: float) -> ir.Value:
        """A constant of float32."""
        return self.tape.constant(np.array(number, np.float32))

    def times(self, value: ir.Value, factor: float) -> ir.Value:
        """`value` multiplied by a number."""
        if factor == 1.0:
            return value
        return self.tape.op("Mul", [value, self.number(factor)])

    def at_least(self, value: ir.Value, bound: float) -> ir.Value:
        """`value` kept from being so small that dividing by it overflows."""
        return self.tape.op("Max", [value, self.number(bound)])

    def each(self, value: ir.Value) -> ir.Value:
        """The sum over all axes but the first: float32 [n]."""
        axes = range(1, len(dims_of(value) or ()))
        return self.sum(value, *axes) if axes else value

    def norms(self, value: ir.Value) -> ir.Value:
        """The sum of squares over all axes but the first: float32 [n]."""
        return self.each(self.tape.op("Mul", [value, value], like=value))


@dataclass(frozen=True)
class CrossEntropy:
    """Negative log-likelihood of the labels, the softmax of `output` [n, ..., classes] being taken.

    `labels` are int64 [n, ...]; a negative one stands for a sample without a label, which adds
    nothing but counts among those that the mean is over, so that samples weigh the same in any
    batch. With smoothing s, the wanted probability of the label is 1 - s, and s is shared by all
    classes (Szegedy et al., Rethinking the Inception Architecture, 2016). Also counts the labels
    that `output` is largest at, for the accuracy.

    With `soft`, labels are float32 [n, ..., classes]: the wanted probabilities, as mixed samples
    have them, or zeros where there is no label.
    """

    output: str
    labels: str = "labels"
    smoothing: float = 0.0
    soft: bool = False
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise InputError(f"smoothing is {self.smoothing} but must be from 0 to below 1")

    def emit(self, terms: Terms) -> ir.Value:
        tape, logits = terms.tape, terms.value(self.output)
        if not logits.shape:
            raise InputError(f"{self.output!r} has no axis of classes to take labels of")
        wanted, label, given = self._labels(terms, logits)
        log = tape.op("LogSoftmax", [logits], {"axis": -1}, like=logits)
        found = terms.sum(tape.op("Mul", [wanted, log], like=logits), -1)
        if self.smoothing:
            even = terms.times(terms.mean(log, -1), self.smoothing)
            found = tape.op("Add", [terms.times(found, 1 - self.smoothing), even])
        self._count(terms, logits, label, given)
        return tape.op("Neg", [terms.mean(tape.op("Mul", [found, given]))])

    def _labels(self, terms: Terms, logits: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The wanted probabilities, their class, and 1 where there is a label."""
        tape, shape = terms.tape, list(logits.shape or ())
        if isinstance(shape[-1], int):
            terms.classes[self.labels] = shape[-1]
        if self.soft:
            labels = terms.target(self.labels, shape, ir.DataType.FLOAT)
            return labels, _largest(tape, labels), terms.sum(labels, -1)
        labels = terms.target(self.labels, shape[:-1], ir.DataType.INT64)
        there = tape.op("GreaterOrEqual", [labels, tape.constant(_ZERO)])
        inputs = [labels, tape.dim(logits, -1), tape.constant(_OFF_ON)]
        return tape.op("OneHot", inputs, {"axis": -1}), labels, _number(tape, there)

    def _count(self, terms: Terms, logits: ir.Value, label: ir.Value, given: ir.Value) -> None:
        tape = terms.tape
        right = _number(tape, tape.op("Equal", [_largest(tape, logits), label]))
        found = [tape.op("Mul", [right, given]), given]
        hits, labels = (tape.op("ReduceSum", [v], {"keepdims": 0}) for v in found)
        terms.hits.append((hits, labels))


def _largest(tape: Tape, value: ir.Value) -> ir.Value:
    return tape.op("ArgMax", [value], {"axis": -1, "keepdims": 0})


def _number(tape: Tape, truth: ir.Value) -> ir.Value:
    return tape.op("Cast", [truth], {"to": ir.DataType.FLOAT})


@dataclass(frozen=True)
class MeanSquared:
    """Mean of (output - target)², over all elements."""

    output: str
    target: str = "target"
    weight: float = 1.0

    def emit(self, terms: Terms) -> ir.Value:
        value = terms.value(self.output)
        difference = terms.tape.op("Sub", [value, terms.like(self.target, value)], like=value)
        return terms.mean(terms.tape.op("Mul", [difference, difference], like=value))


@dataclass(frozen=True)
class KullbackLeibler:
    """Divergence of the student's from the teacher's softened probabilities over the last axis.

        T² mean over samples of  sum of p (log p - log q),   p = softmax(target / T), q of output

    `target` are the teacher's logits. T² keeps gradients of one size whatever the temperature T
    (Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015).
    """

    output: str
    target: str = "target"
    temperature: float = 4.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature} but must be above 0")

    def emit(self, terms: Terms) -> ir.Value:
        tape, student = terms.tape, terms.value(self.output)
        cold = 1 / self.temperature
        logs = [
            tape.op("LogSoftmax", [terms.times(v, cold)], {"axis": -1}, like=student)
            for v in (terms.like(self.target, student), student)
        ]
        lost = tape.op("Sub", logs, like=student)
        each = terms.sum(tape.op("Mul", [tape.op("Exp", [logs[0]]), lost], like=student), -1)
        return terms.times(terms.mean(each), self.temperature**2)


@dataclass(frozen=True)
class FeatureMatch:
    """Squared error of inner values against a teacher's, in parts of the teacher's own power.

        sum over pairs of  mean over samples of  |s - t|² / |t|²

    `pairs` are (student's value, input that holds the teacher's), of equal shapes. Division by
    the power lets layers of any scale weigh the same; FitNets (Romero et al., 2015) with the
    scale taken out.
    """

    pairs: Sequence[tuple[str, str]]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.pairs:
            raise InputError("FeatureMatch needs at least one pair of a value and its target")

    def emit(self, terms: Terms) -> ir.Value:
        parts = [self._pair(terms, *pair) for pair in self.pairs]
        return terms.tape.op("Sum", parts) if len(parts) > 1 else parts[0]

    def _pair(self, terms: Terms, name: str, against: str) -> ir.Value:
        tape, value = terms.tape, terms.value(name)
        target = terms.like(against, value)
        error = terms.norms(tape.op("Sub", [value, target], like=value))
        return terms.mean(tape.op("Div", [error, terms.at_least(terms.norms(target), _TINY)]))


@dataclass(frozen=True)
class Cosine:
    """Mean over samples of 1 - cosine of the angle between output and target, each flattened."""

    output: str
    target: str = "target"
    weight: float = 1.0

    def emit(self, terms: Terms) -> ir.Value:
        tape, value = terms.tape, terms.value(self.output)
        target = terms.like(self.target, value)
        dot = terms.each(tape.op("Mul", [value, target], like=value))
        power = tape.op("Mul", [terms.norms(value), terms.norms(target)])
        cosine = tape.op("Div", [dot, tape.op("Sqrt", [terms.at_least(power, _TINY)])])
        return tape.op("Sub", [terms.number(1.0), terms.mean(cosine)])
