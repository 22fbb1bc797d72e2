"""A quantized model as one that can be trained, and back.

    DQ(codes, s) ─ Conv    ⇔    W ─ Q(s) ─ DQ(s) ─ Conv

The trainable form computes what the quantized model computes. Its weights are floats that a
quantizer rounds to the same grid, so that training sees the loss of the rounded ones while small
steps of the floats add up (Jacob et al., 2018; gradients in `rules.quantization`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array, Skip
from onnxcompress.errors import InputError
from onnxcompress.graph.evaluate import evaluation
from onnxcompress.graph.linear import is_op
from onnxcompress.graph.names import FreshNames
from onnxcompress.graph.plain_codes import Packing, expand
from onnxcompress.graph.quantized_weights import dequantizer_of, kernel_axes, trimmed
from onnxcompress.graph.rewriting import become, initializer, insert
from onnxcompress.numerics.affine import SMALLEST_SCALE, Affine, dequantize, quantize
from onnxcompress.operators import (
    Role,
    constant,
    constant_tensor,
    int_attribute,
    operator,
    out_axis,
)
from onnxcompress.passes.raise_opset import RaiseOpset
from onnxcompress.passes.remove_unused import RemoveUnused

_DYNAMIC: Final = frozenset(
    (
        *("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"),
        *("DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
    )
)
_MOVES: Final = ("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
"""Operators between codes and their DequantizeLinear that lose none and repeat none."""
_TRAINED: Final = frozenset(
    ("int32", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (2, 4, 8, 16)))
)
_OPSET: Final = 21


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant that the quantized model holds as codes and the trainable one as floats."""

    floats: str
    """Name of the initializer in the trainable form."""
    codes: str
    """Name of the initializer in the quantized model, its kernels' own packing undone."""
    grid: Affine
    place: Array | None
    """Where in the codes' initializer each value lies, by flat index; None where it is the same."""
    order: Sequence[int] | None
    """Axes as an integer kernel walks them whose pairs must not saturate; None without one."""


@dataclass(frozen=True)
class FakeQuantized:
    """A quantized model in trainable form."""

    model: ir.Model
    quantized: ir.Model
    weights: tuple[Weight, ...]
    packings: Mapping[str, Packing]
    """How the quantized model holds what the trainable one reads as plain codes, by their name."""
    skips: tuple[Skip, ...]
    """What stays as it is, with reasons."""


def fake_quantize(quantized: ir.Model) -> FakeQuantized:
    """The trainable form of a model that holds weights as codes.

    Weights behind a DequantizeLinear (by tensor, channel or block; 2, 4, 8 or 16 bits), or in
    MatMulNBits and GatherBlockQuantized, become float32 initializers: codes times scale, which is
    where the quantized model stands. Biases in 32 bits become floats as they are; their grid is
    too fine to matter. A weight that several nodes read stays one. Quantizers of activations
    stay, as do zero points.

    Args:
        quantized: not altered. Bodies of If, Loop and Scan are left as they are.

    Raises:
        InputError: if there is nothing to train, or the model is quantized as it runs.
    """
    _refuse_dynamic(quantized)
    model = quantized.clone()
    packings, skips = expand(model)
    RemoveUnused().call(model)
    if packings:
        _raise_opset(model)
    names = {name: packing.name for name, packing in packings.items()}
    weights = list(_Rewrite(model.graph, names, skips).run())
    if not weights:
        reason = f": {skips[0].op} {skips[0].node!r}: {skips[0].reason}" if skips else ""
        raise InputError(f"the model holds no codes that could be trained{reason}; quantize it "
                         "first, static or weights alone")  # fmt: skip
    RemoveUnused().call(model)
    return FakeQuantized(model, quantized, tuple(weights), packings, tuple(skips))


def settle(fake: FakeQuantized, trained: ir.Model | None = None) -> ir.Model:
    """The quantized model with codes of trained weights.

    What was not trained keeps its bytes. Everything but codes and floats is that of the quantized
    model: interface, names, operators, types, packing. Zeros are zeros still, and what no pair of
    products saturated does not do so now.

    Args:
        trained: the trainable form with other weights; that of `fake` when None.
    """
    result = fake.quantized.clone()
    kept = result.graph.initializers
    start, floats = _floats(fake.model), _floats(trained or fake.model)
    for name, array in floats.items():
        if name in kept and not np.array_equal(array, start[name]):
            kept[name].const_value = ir.Tensor(array, name=name)
    for weight in fake.weights:
        array = floats[weight.floats]
        if not np.array_equal(array, start[weight.floats]):
            packing = fake.packings.get(weight.codes)
            value = kept[packing.name if packing else weight.codes]
            value.const_value = _stored(array, weight, packing, value)
    return result


def _floats(model: ir.Model) -> dict[str, Array]:
    found = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {n: t.numpy() for n, t in found.items() if t and t.dtype is ir.DataType.FLOAT}


def _stored(
    array: Array, weight: Weight, packing: Packing | None, value: ir.Value
) -> ir.TensorProtocol:
    """What `value`, which holds the codes of a weight, holds of its new floats."""
    tensor = value.const_value
    assert tensor is not None
    before, codes = tensor.numpy(), quantize(array, weight.grid)
    if weight.order is not None:
        codes = trimmed(codes, weight.order)
    if packing is not None:
        codes = packing.stored_codes(codes.view(np.uint8), before)
    elif weight.place is not None:
        whole = before.copy()
        whole.reshape(-1)[weight.place] = codes.reshape(-1)
        codes = whole
    return ir.tensor(codes, tensor.dtype, name=value.name)


class _Stays(Exception):
    """Why codes are left as they are."""


class _Rewrite:
    """One application to a main graph whose kernels' own packing is undone."""

    def __init__(self, graph: ir.Graph, names: Mapping[str, str], skips: list[Skip]) -> None:
        self.graph, self.names, self.skips = graph, names, skips
        self._fresh = FreshNames(graph)
        self._position = {node: i for i, node in enumerate(graph)}
        self._zeros: dict[tuple[object, ...], ir.Value] = {}

    def run(self) -> Iterator[Weight]:
        for value in list(self.graph.initializers.values()):
            readers = _readers(value)
            if not readers:
                continue
            try:
                yield self._weight(value, readers)
            except _Stays as reason:
                self.skips.append(Skip(readers[0].name or "", readers[0].op_type, str(reason)))

    def _weight(self, codes: ir.Value, readers: Sequence[ir.Node]) -> Weight:
        self._check(codes, readers)
        first = min(readers, key=self._position.__getitem__)
        source, tensor = first.inputs[0], codes.const_value
        assert source is not None and tensor is not None
        place, array = None, tensor.numpy()
        if source is not codes:
            place = self._moved(source, codes, np.arange(array.size).reshape(array.shape))
            array, place = array.reshape(-1)[place], place.reshape(-1)
        grid, *others = (_grid(node, tensor.dtype, array.ndim) for node in readers)
        if any(node.inputs[0] is not source for node in readers) or not all(
            _same(grid, other) for other in others
        ):
            raise _Stays("its codes are read on several grids")
        held = codes.name or "weight"
        name = self._fresh(self.names.get(held, held).removesuffix("_quantized"))
        floats = initializer(self.graph, name, dequantize(array, grid))
        found = Weight(name, held, grid, place, _order(array, readers))
        if grid.dtype == "int32":
            for node in readers:
                node.outputs[0].replace_all_uses_with(floats)
            return found
        self._round(floats, first, readers, grid)
        return found

    def _check(self, codes: ir.Value, readers: Sequence[ir.Node]) -> None:
        tensor = constant_tensor(codes)
        if tensor is None:
            raise _Stays("its codes can be overridden")
        if tensor.dtype.name.lower() not in _TRAINED:
            raise _Stays(f"codes of type {tensor.dtype.name.lower()} are not trained")
        if any(node.graph is not self.graph for node in readers):
            raise _Stays("a body of If, Loop or Scan reads its codes")
        if _read_otherwise(codes):
            raise _Stays("its codes are read as integers too")
        if any(v.is_graph_output() for node in readers for v in node.outputs):
            raise _Stays("what it gives is an output of the model")

    def _round(
        self, floats: ir.Value, first: ir.Node, readers: Sequence[ir.Node], grid: Affine
    ) -> None:
        """Let the readers take what a QuantizeLinear makes of the floats."""
        scale, zero = first.inputs[1], first.inputs[2] if len(first.inputs) > 2 else None
        if not grid.scale.all():
            scale = initializer(self.graph, self._fresh(f"{floats.name}_scale"), grid.scale)
        if zero is None:
            zero = self._zero_points(grid)
        attributes = {n: a.as_int() for n, a in first.attributes.items() if n != "output_dtype"}
        name, dtype = self._fresh(f"{floats.name}_codes"), ir.DataType[grid.dtype.upper()]
        rounded = insert(first, "QuantizeLinear", [floats, scale, zero], name, attributes, dtype)
        for node in readers:
            become(node, "DequantizeLinear", [rounded, scale, zero], dict(first.attributes))

    def _zero_points(self, grid: Affine) -> ir.Value:
        key = (grid.dtype, grid.zero_point.shape)
        if key not in self._zeros:
            self._zeros[key] = initializer(
                self.graph, self._fresh(f"{grid.dtype}_middle"), grid.zero_point
            )
        return self._zeros[key]

    def _moved(self, value: ir.Value, codes: ir.Value, index: Array) -> Array:
        """`index` as what lies between `codes` and `value` moves it."""
        node = value.producer()
        if value is codes or node is None:
            return index
        first, *others = node.inputs
        assert first is not None
        index = self._moved(first, codes, index)
        if is_op(node, "Identity"):
            return index
        given = [ir.tensor(index), *(constant_tensor(v) for v in others)]
        if any(v is not None and t is None for v, t in zip(others, given[1:], strict=True)):
            raise _Stays(f"a {node.op_type} in front of it is not constant")
        return evaluation(node, given, self.graph.opset_imports[""], 0)()[0]


def _readers(codes: ir.Value) -> list[ir.Node]:
    """The DequantizeLinear nodes that read an initializer, through moves too."""
    return [node for node, i in _uses(codes) if is_op(node, "DequantizeLinear") and i == 0]


def _read_otherwise(codes: ir.Value) -> bool:
    return any(not is_op(node, "DequantizeLinear") or i for node, i in _uses(codes))


def _uses(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    for node, index in value.uses():
        if is_op(node, *_MOVES) and index == 0:
            for output in node.outputs:
                yield from _uses(output)
        else:
            yield node, index


def _grid(node: ir.Node, dtype: ir.DataType, rank: int) -> Affine:
    """The parameters of a DequantizeLinear of constants of `dtype` with `rank` axes.

    A scale of zero is taken for the smallest one: a dead channel keeps its codes.

    Raises:
        _Stays: if they are no constants in float32.
    """
    scale = constant(node.inputs[1])
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    points = None if scale is None else np.zeros(scale.shape, dtype.numpy())
    if zero is not None:
        points = constant(zero)
    if scale is None or points is None:
        raise _Stays("its scale or zero point is computed or can be overridden")
    if scale.dtype != np.float32:
        raise _Stays(f"its scale is {scale.dtype}, not float32")
    scale = np.where(scale == 0, SMALLEST_SCALE, scale)
    block = int_attribute(node, "block_size", 0)
    if scale.size == 1 and not block:
        return Affine(scale.reshape(()), points.reshape(()), dtype.name.lower())
    axis = int_attribute(node, "axis", 1) % rank
    return Affine(scale, points, dtype.name.lower(), axis, block)


def _same(a: Affine, b: Affine) -> bool:
    return (a.axis, a.block_size) == (b.axis, b.block_size) and all(
        np.array_equal(x, y) for x, y in ((a.scale, b.scale), (a.zero_point, b.zero_point))
    )


def _order(codes: Array, readers: Sequence[ir.Node]) -> Sequence[int] | None:
    """Axes as a kernel that reads the codes sums, if it is one whose pairs do not saturate."""
    if codes.dtype != np.int8:
        return None
    for node, index in (use for reader in readers for use in reader.outputs[0].uses()):
        row = operator(node)
        if row.role is not Role.CONTRACT or row.weight != index:
            continue
        if dequantizer_of(node.inputs[0]) is None:
            continue  # it multiplies floats
        if node.op_type == "Conv" or out_axis(node, codes.ndim) is not None:
            order = kernel_axes(node, codes.ndim)
            return order if np.array_equal(trimmed(codes, order), codes) else None
    return None


def _refuse_dynamic(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type in _DYNAMIC:
            raise InputError(
                f"{node.op_type} {node.name!r} quantizes what it reads as the model runs, which "
                "cannot be trained: quantize the original static or weights alone, and tune that"
            )


def _raise_opset(model: ir.Model) -> None:
    skips = RaiseOpset(minimum=_OPSET).call(model).skips
    if skips:
        raise InputError(
            f"weights in blocks are trained with operators of version {_OPSET}, to which this "
            f"model cannot be converted: {skips[0].op} {skips[0].node!r}: {skips[0].reason}"
        )
