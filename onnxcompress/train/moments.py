"""Means and variances of values over data, channel by channel, whatever the batches."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Final, TypeVar

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array, Kind, Want
from onnxcompress.data import Data
from onnxcompress.errors import InputError
from onnxcompress.graph.scopes import reads, values_of
from onnxcompress.observe import observe
from onnxcompress.train.tape import Tape

_BATCH: Final = 32
_FAR: Final = 8.0
"""Standard deviations from the guess to the mean from which squares lose digits."""
_T = TypeVar("_T")

Moments = tuple[Array, Array]
"""Mean and variance, float64 (channels,)."""


def moments(
    model: ir.Model,
    guesses: Mapping[str, Array],
    data: Data,
    executor: Executor | None = None,
    *,
    axis: int = 1,
) -> dict[str, Moments]:
    """Of values of the main graph by name; sums are exact, in float64.

    Var x = E (x - s)² - (E (x - s))², with s a guess of the mean; where it is far off, the data is
    run again with what came out.

    Args:
        guesses: one number a channel.
        axis: of the channels: 1, or -1.

    Raises:
        InputError: if a value cannot be counted, or the data does not suit the model.
    """
    found = _counted(model, guesses, data, executor, axis)
    far = {
        name: mean
        for name, (mean, variance) in found.items()
        if (np.square(mean - guesses[name]) > _FAR**2 * variance).any()
    }
    return found | (_counted(model, far, data, executor, axis) if far else {})


def in_levels(graph: ir.Graph, chosen: Mapping[ir.Node, _T]) -> list[list[tuple[ir.Node, _T]]]:
    """Nodes, with what goes with them, by how many of them lie before on the longest path."""
    depths, levels = dict[ir.Value, int](), list[list[tuple[ir.Node, _T]]]()
    for node in graph:
        depth = max((depths.get(v, 0) for v in reads(node)), default=0)
        if node in chosen:
            if depth == len(levels):
                levels.append([])
            levels[depth].append((node, chosen[node]))
            depth += 1
        depths |= dict.fromkeys(node.outputs, depth)
    return levels


def _counted(
    model: ir.Model,
    guesses: Mapping[str, Array],
    data: Data,
    executor: Executor | None,
    axis: int,
) -> dict[str, Moments]:
    copy = model.clone()
    values = {v.name: v for v in values_of(copy.graph)}
    tape, wants = Tape(copy.graph), dict[str, tuple[Want, Want]]()
    shifts = {name: guess.astype(np.float32) for name, guess in guesses.items()}
    for name, shift in shifts.items():
        rest = _less(tape, values[name], shift, axis)
        square = tape.op("Mul", [rest, rest])
        first, second = (Want(v.name or "", Kind.MEAN, axis=axis) for v in (rest, square))
        wants[name] = first, second
    every = [want for pair in wants.values() for want in pair]
    seen = observe(copy, data.batches(_BATCH), every, executor=executor)
    for name, pair in wants.items():
        for want in seen.missing(pair):
            raise InputError(f"{name!r} cannot be counted: {seen.reasons[want]}")
    found = dict[str, Moments]()
    for name, (first, second) in wants.items():
        moved, power = seen.mean(first.value, axis), seen.mean(second.value, axis)
        found[name] = shifts[name] + moved, np.maximum(power - np.square(moved), 0)
    return found


def _less(tape: Tape, value: ir.Value, shift: Array, axis: int) -> ir.Value:
    """The value less one number a channel; on axis 1 by a normalization, which asks no rank."""
    if axis == -1:
        return tape.op("Sub", [value, tape.constant(shift)])
    one, zero, mean = (tape.constant(a) for a in (np.ones_like(shift), 0 * shift, shift))
    old = tape.graph.opset_imports.get("", 7) < 7
    attributes = {"epsilon": 0.0} | ({"is_test": 1} if old else {})
    return tape.op("BatchNormalization", [value, one, zero, mean, one], attributes)
