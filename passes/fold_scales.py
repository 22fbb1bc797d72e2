"""Fold Mul, Div, Add and Sub of constants into the weights beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array, Pass, Result, Skip
from onnxcompress.graph.folding import Edit, Folding
from onnxcompress.graph.linear import (
    LARGE,
    Affine,
    Declined,
    NoSite,
    check_range,
    dimensions,
    float_constant,
    is_op,
    linear,
    tensor_of,
)
from onnxcompress.graph.scopes import Declared
from onnxcompress.operators import Role, operator

_ROUNDS: Final = 256.0
"""`(x + c) - d` of constants at least this large that nearly cancel may be there to round `x`."""

_FUSED: Final = ("Erf", "Tanh", "Sqrt", "Pow", "Reciprocal")
"""What shows that arithmetic nearby is a Gelu or a normalization, which the runtime fuses whole."""


@dataclass(frozen=True, kw_only=True)
class FoldScales(Pass):
    """Fold Mul, Div, Add and Sub of constants into the weights and biases beside them.

        Conv(W, b) -> Mul(a) -> Add(s)   becomes   Conv(a W, a b + s)
        Mul(a) -> Conv(W, b)             becomes   Conv(W a, b)
        Mul(a) -> Mul(c)                 becomes   Mul(a c);  likewise Add, Sub and Div

    where the constant is one number, or one for each channel of Conv, ConvTranspose, Gemm, MatMul
    or BatchNormalization; also `c - x`; through Identity and Transpose; in subgraphs and functions.

    Left alone without a word: what has no such neighbour, integers, and an Add behind a MatMul,
    which ONNX Runtime fuses by itself. Left alone with its reason in `skips`: a value read
    elsewhere or exported, broadcasting that may enlarge the value, a shift before zero padding, a
    weight that is not constant, that would overflow or turn denormal in its dtype, or that is over
    1 MiB and shared; sums that cancel; and a scale that ends a Gelu or a normalization.
    """

    name: ClassVar[str] = "fold_scales"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> Result:
        folding, declared = Folding(model), Declared(model)
        skips: list[Skip] = []
        folded = 0
        for nodes in folding.containers():
            if folding.opset < 7:  # broadcasting had attributes of its own
                continue
            scales = [n for n in nodes if is_op(n, "Mul", "Div", "Add", "Sub")]
            reasons = {n: _attempt(_fold_after, folding, n) for n in scales}
            for node in reversed(scales):
                reason = reasons[node]
                if reason is not None:
                    before = _attempt(_fold_before, folding, node, declared)
                    reason = None if before is None else reason or before
                folded += reason is None
                if reason:
                    skips.append(Skip(node.name or str(node.outputs[0].name), node.op_type, reason))
        folding.finish()
        figures = {"folded": folded, "left": len(skips)}
        return Result(model, folding.modified, skips=tuple(skips), figures=figures)


def _attempt(fold: Callable[..., None], *args: object) -> str | None:
    """Why `fold` declined, "" if there was nothing to fold into, None if it did."""
    try:
        fold(*args)
    except NoSite:
        return ""
    except Declined as declined:
        return str(declined)
    return None


def _fold_after(folding: Folding, node: ir.Node) -> None:
    data, constant = _operands(node)
    previous = data.producer()
    if previous is not None and _is_same_kind(previous, node):
        try:
            return _merge(folding, previous, node)
        except NoSite:
            pass
    return folding.into_producer(node, data, _affine(node, constant))


def _fold_before(folding: Folding, node: ir.Node, declared: Declared) -> None:
    data, constant = _operands(node)
    affine = _affine(node, constant)
    if _ends_fusion(data):
        raise NoSite
    if not _keeps_shape(folding, declared, data, affine):
        if any(operator(u.node).role is Role.CONTRACT for u in node.outputs[0].uses()):
            raise Declined("broadcasting may enlarge its data")
        raise NoSite
    folding.into_consumers(node, data, affine, may_add=False)


def _operands(node: ir.Node) -> tuple[ir.Value, int]:
    """The value of the moment, and the index of the constant; NoSite where not one of each."""
    constants = [i for i, v in enumerate(node.inputs) if float_constant(v) is not None]
    data = node.inputs[1 - constants[0]] if len(constants) == 1 else None
    if data is None:
        raise NoSite
    return data, constants[0]


def _affine(node: ir.Node, constant: int) -> Affine:
    """What `node` computes of its data; NoSite where that is not affine and the same by channel."""
    tensor = float_constant(node.inputs[constant])
    assert tensor is not None
    shape = dimensions(tensor)
    wide = [i for i, n in enumerate(shape) if n != 1]
    if len(wide) > 1 or 0 in shape or (is_op(node, "Div") and constant == 0):
        raise NoSite
    array = tensor.numpy().astype(np.float64).reshape(-1)
    scale, shift = np.ones(1), np.zeros(1)
    if is_op(node, "Mul", "Div"):
        with np.errstate(divide="ignore"):
            scale = array if is_op(node, "Mul") else 1 / array
    elif is_op(node, "Sub") and constant == 0:
        scale, shift = -scale, array
    else:
        shift = array if is_op(node, "Add") else -array
    if not (np.all(np.isfinite(scale)) and np.all(np.isfinite(shift))):
        raise Declined("the constant is not finite, or divides by zero")
    axis = wide[0] - len(shape) if wide else -1
    return Affine(scale, shift, axis=axis, rank=len(shape))


def _is_same_kind(previous: ir.Node, node: ir.Node) -> bool:
    """Whether both multiply or divide, or both add or subtract."""
    kinds = (("Mul", "Div"), ("Add", "Sub"))
    return any(is_op(previous, *kind) and is_op(node, *kind) for kind in kinds)


def _merge(folding: Folding, previous: ir.Node, node: ir.Node) -> None:
    """Let `previous` do with one constant what it and `node` do with two."""
    data, index = _operands(node)
    inner, slot = _operands(previous)
    if (index == 0 and is_op(node, "Sub", "Div")) or previous.graph is not node.graph:
        raise NoSite
    if _ends_fusion(inner):
        raise NoSite
    if folding.is_shared(data):
        raise Declined("the value before it is also read elsewhere")
    old, new = float_constant(previous.inputs[slot]), float_constant(node.inputs[index])
    assert old is not None and new is not None
    if max(old.nbytes, new.nbytes) > LARGE or old.dtype != new.dtype:
        raise Declined("the constants are large")
    inverts = is_op(node, "Sub", "Div") != (is_op(previous, "Sub", "Div") and slot == 1)
    first, second = old.numpy().astype(np.float64), new.numpy().astype(np.float64)
    if is_op(node, "Add", "Sub"):
        array = _sum(first, second, inverts)
    else:
        array = _product(first, second, inverts)
        check_range(array, old.dtype)
    if array.size > max(first.size, second.size):
        raise Declined("the merged constant would grow by broadcasting")
    folding.set_constant(Edit(previous, slot, tensor_of(array, old.dtype)))
    folding.take_over(data, node.outputs[0])
    folding.drop(node)


def _sum(first: Array, second: Array, inverts: bool) -> Array:
    total = first - second if inverts else first + second
    larger = np.maximum(np.abs(first), np.abs(second))
    if np.any((np.abs(total) < larger / 16) & (larger >= _ROUNDS)):
        raise Declined("two large constants nearly cancel, which may be there to round")
    return total


def _product(first: Array, second: Array, inverts: bool) -> Array:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return first / second if inverts else first * second


def _ends_fusion(value: ir.Value, depth: int = 4) -> bool:
    """Whether `value` is arithmetic on what only a Gelu or a normalization would compute."""
    node = value.producer()
    if node is None or depth == 0 or operator(node).role is not Role.ELEMENTWISE:
        return False
    sources = [v for v in node.inputs if v is not None]
    return any(is_op(v.producer(), *_FUSED) or _ends_fusion(v, depth - 1) for v in sources)


def _keeps_shape(folding: Folding, declared: Declared, data: ir.Value, affine: Affine) -> bool:
    """Whether `affine`, by channel, meets as many channels in `data`, or is one number."""
    channels = max(affine.scale.size, affine.shift.size)
    shape = declared.shape(data)
    if channels == 1:
        return True
    if shape is not None:
        return len(shape) >= -affine.axis and shape[affine.axis] == channels
    node = data.producer()
    while node is not None and operator(node).role is Role.ACTIVATION and node.inputs[0]:
        node = node.inputs[0].producer()
    try:
        site = None if node is None else linear(node, folding.opset)
        if site is not None:
            affine.check(site.out_axis, site.rank, site.out_channels)
    except (NoSite, Declined):
        return False
    return site is not None
