"""Weights in training: which they are, and the memory that they lie in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.errors import InputError, did_you_mean

_BOUNDARY: Final = 64
"""Bytes. Kernels may sum in another order where an array begins elsewhere in a cache line."""
_CHUNK: Final = 1 << 16
"""Elements that are updated at a time, so that they and their states stay in the cache."""
_STATISTICS: Final = {
    "BatchNormalization": (3, 4),
    "Clip": (1, 2),
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
}
"""Inputs that are no weights by operator: what was counted, bounds, and grids."""

_LAYERS: Final = {"Gemm": (1, 2), "MatMul": (1,), "Conv": (1, 2), "ConvTranspose": (1, 2)}
"""Inputs that are weights and biases, of whatever size."""


def aligned(shape: Sequence[int], dtype: Any = np.float32) -> Array:
    """Zeros that begin on a boundary of 64 bytes, so that a sum over them has the same bits."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + _BOUNDARY, np.uint8)
    start = -raw.ctypes.data % _BOUNDARY
    return raw[start : start + size].view(dtype).reshape(shape)


def as_aligned(array: Array, dtype: Any) -> Array:
    """`array` itself where it begins there, is contiguous and of `dtype`; else a copy that is."""
    fits = array.dtype == dtype and array.flags.c_contiguous
    if fits and array.ctypes.data % _BOUNDARY == 0:
        return array
    copy = aligned(array.shape, dtype)
    copy[...] = array
    return copy


def trainable_weights(model: ir.Model, patterns: Iterable[str]) -> list[str]:
    """The float32 initializers of the main graph that `patterns` name, in the graph's order.

    A pattern is a name, or has the wildcards of a shell (`*`, `?`, `[...]`), by which only weights
    are found: tensors that are no bounds, no grids of a quantizer and no statistics of a batch
    normalization, those of one element only where they are weights or biases of a layer. A pattern
    after `!` takes away what it finds.

    Raises:
        InputError: if a pattern finds nothing.
    """
    floats = {
        name: value
        for name, value in model.graph.initializers.items()
        if value.dtype is ir.DataType.FLOAT and value.uses()
    }
    weights = [name for name, value in floats.items() if _is_weight(value)]
    chosen: set[str] = set()
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        found = {wanted} if wanted in floats else {n for n in weights if fnmatchcase(n, wanted)}
        if not found:
            raise InputError(
                f"{wanted!r} names no float32 weight of the model{did_you_mean(wanted, weights)}"
            )
        chosen = chosen - found if pattern.startswith("!") else chosen | found
    return [name for name in floats if name in chosen]


def _is_weight(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None:
        return False
    if tensor.size < 2:
        return any(_is_of_layer(use.node, use.idx) for use in value.uses())
    uses = ((use.node.op_type, use.idx) for use in value.uses())
    return not any(index in _STATISTICS.get(op, ()) for op, index in uses)


def _is_of_layer(node: ir.Node, index: int) -> bool:
    """Whether a layer of one output has its weight or bias here: other scalars are settings."""
    if node.op_type == "Add":
        given = [None if value is None else value.producer() for value in node.inputs]
        return any(source is not None and source.op_type == "MatMul" for source in given)
    return index in _LAYERS.get(node.op_type, ())


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of the weights that is updated at a time."""

    start: int
    stop: int
    decay: bool


class Layout:
    """Where weights lie in one flat array: each on a boundary, those that decay before the others.

    Args:
        shapes: by name. Weight decay applies to those with two or more axes longer than one, not
            to biases and the scales of normalizations.
        kept: those of arrays that lie behind all weights and are in no chunk.
    """

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], kept: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        step = _BOUNDARY // np.dtype(np.float32).itemsize
        decaying = {n: sum(d > 1 for d in shape) > 1 for n, shape in shapes.items()}
        weights = sorted(shapes, key=lambda n: not decaying[n])
        self.shapes = {n: tuple(shapes[n]) for n in weights}
        self.shapes |= {n: tuple(shape) for n, shape in (kept or {}).items()}
        self._starts: dict[str, int] = {}
        position = middle = last = 0
        for name, shape in self.shapes.items():
            self._starts[name] = position
            position += -(-math.prod(shape) // step) * step
            middle = position if decaying.get(name) else middle
            last = position if name in decaying else last
        self.size = position
        """Elements of the flat array, those between weights included, which stay zero."""
        self.chunks = (*_chunks(0, middle, True), *_chunks(middle, last, False))

    def views(self, flat: Array) -> dict[str, Array]:
        """The weights' own parts of a flat array, by name."""
        return {
            name: flat[start : start + math.prod(self.shapes[name])].reshape(self.shapes[name])
            for name, start in self._starts.items()
        }


def _chunks(start: int, stop: int, decay: bool) -> Iterator[Chunk]:
    for first in range(start, stop, _CHUNK):
        yield Chunk(first, min(first + _CHUNK, stop), decay)
