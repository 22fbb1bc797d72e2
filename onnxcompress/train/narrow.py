"""Narrower layers: of the channels between two linear operators, the strongest are kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array, Result, Skip
from onnxcompress.errors import InputError
from onnxcompress.graph.linear import Declined, is_op
from onnxcompress.graph.names import FreshNames
from onnxcompress.operators import (
    DEFAULT_DOMAINS,
    Role,
    constant,
    constant_tensor,
    int_attribute,
    operator,
)
from onnxcompress.passes.remove_unused import RemoveUnused

_BLOCK = 8
"""Channels come in multiples of this, as kernels compute them."""
_ACROSS = frozenset(("Softmax", "LogSoftmax"))
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")


@dataclass(frozen=True, slots=True)
class _Slice:
    """A constant that has the channels along an axis."""

    node: ir.Node
    index: int
    axis: int


@dataclass(slots=True)
class _Chain:
    """Channels that a linear operator makes, and all that reads them until others sum over them."""

    producer: ir.Node
    channels: int
    made: list[_Slice]
    values: dict[ir.Value, int] = field(default_factory=dict[ir.Value, int])
    """The axis of the channels by value."""
    between: list[_Slice] = field(default_factory=list[_Slice])
    read: list[_Slice] = field(default_factory=list[_Slice])
    grouped: list[ir.Node] = field(default_factory=list[ir.Node])
    joins: list[tuple[ir.Node, ir.Value]] = field(default_factory=list[tuple[ir.Node, ir.Value]])


def narrow(model: ir.Model, ratio: float) -> Result:
    """Keep a share of the channels between each linear operator and the next, in place.

        Conv W [c, a] ─ act ─ Conv V [b, c]     =>     Conv W [k, a] ─ act ─ Conv V [b, k]

    Channel i counts as |W_i| |V_i|, the norms of what makes it and of what reads it; the largest
    are kept, in their order. Between may stand functions of one value, sums and products with
    constants or with each other (Gelu and SiLU in their parts), normalization by constants,
    pools and depthwise convolutions. Channels that are added to others, as those of a residual
    stream, reshaped, or returned are left with a Skip: narrow blocks keep the stream's width.

    Args:
        model: shapes inferred.
        ratio: share to keep, above 0 and below 1, in whole blocks of 8 channels where there are
            16 or more.

    Raises:
        InputError: if the ratio makes no sense, or nothing can be narrowed.

    Source: Li et al., Pruning filters for efficient ConvNets (2017), with the readers' norms.
    """
    if not 0 < ratio < 1:
        raise InputError(
            f"narrow: the share of channels to keep is {ratio} but must lie between 0 and 1"
        )
    fresh, skips = FreshNames(model.graph), list[Skip]()
    figures: dict[str, float] = {}
    for node in list(model.graph):
        try:
            chain = _chain(node)
            if chain is not None and (kept := _kept(chain.channels, ratio)) < chain.channels:
                _apply(model.graph, chain, _strongest(chain, kept), fresh)
                figures[node.name or node.outputs[0].name or ""] = kept
        except Declined as reason:
            skips.append(Skip(node.name or "", node.op_type, str(reason)))
    if not figures:
        why = f": {skips[0].op} {skips[0].node!r}: {skips[0].reason}" if skips else ""
        raise InputError(f"nothing in the model can be narrowed{why}")
    RemoveUnused().call(model)
    return Result(model, modified=True, skips=tuple(skips), figures={"channels": figures})


def _kept(channels: int, ratio: float) -> int:
    if channels < 2 * _BLOCK:
        return max(1, round(channels * ratio))
    return max(1, round(channels * ratio / _BLOCK)) * _BLOCK


def _chain(node: ir.Node) -> _Chain | None:
    """The channels that `node` makes; None where it is no linear operator.

    Raises:
        Declined: if fewer of them would not do.
    """
    found = _maker(node)
    if found is not None:
        axis = 1 if is_op(node, "Conv", "Gemm") else _rank(node.outputs[0]) - 1
        _follow(found, node.outputs[0], axis)
    return found


def _maker(node: ir.Node) -> _Chain | None:
    weight = constant_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
    if weight is None or not is_op(node, "Conv", "Gemm", "MatMul"):
        return None
    shape = weight.shape.numpy()
    if is_op(node, "Conv"):
        if int_attribute(node, "group", 1) != 1:
            return None
        axis = 0
    elif len(shape) != 2:
        return None
    else:
        axis = 0 if int_attribute(node, "transB", 0) else 1
    made = [_Slice(node, 1, axis)]
    if len(node.inputs) > 2 and (bias := node.inputs[2]) is not None:
        made += _broadcast(node, 2, bias, -1, shape[axis])
    return _Chain(node, shape[axis], made)


def _follow(chain: _Chain, value: ir.Value, axis: int) -> None:
    chain.values[value] = axis
    pending = [value]
    while pending:
        value = pending.pop()
        _rank(value)
        if value.is_graph_output():
            raise Declined("the model returns it")
        for node, index in value.uses():
            if node.graph is not value.graph:
                raise Declined(f"a body reads it at {node.op_type} {node.name!r}")
            for output, axis in _step(chain, node, index, chain.values[value]):
                if output not in chain.values:
                    chain.values[output] = axis
                    pending.append(output)
    for node, other in chain.joins:
        if other not in chain.values:
            raise Declined(f"{node.op_type} {node.name!r} joins it with other channels")
    if not chain.read:
        raise Declined("nothing sums over it")


def _step(chain: _Chain, node: ir.Node, index: int, axis: int) -> list[tuple[ir.Value, int]]:
    """What `node` makes of the channels that it reads at an input, and on which axis.

    Raises:
        Declined: if it needs all of them.
    """
    if node.domain not in DEFAULT_DOMAINS or any(v.uses() for v in node.outputs[1:]):
        raise _needs_all(node)
    role, output = operator(node).role, (node.outputs[0], axis)
    if is_op(node, "Conv", "Gemm", "MatMul"):
        return _product(chain, node, index, axis)
    if role is Role.ELEMENTWISE and len(node.inputs) == 2:
        _join(chain, node, index, axis)
        return [output]
    if index != 0:
        raise _needs_all(node)
    if is_op(node, "PRelu"):
        _join(chain, node, index, axis)
        return [output]
    if is_op(node, "BatchNormalization") and axis == 1:
        chain.between += [_Slice(node, i, 0) for i in range(1, 5)]
        if any(constant_tensor(v) is None for v in node.inputs[1:5]):
            raise _needs_all(node)
        return [output]
    if is_op(node, *_POOLS) and axis == 1:
        return [output]
    if is_op(node, "Flatten") and axis == 1 and _is_flat(node):
        return [output]
    if is_op(node, "Identity", "Dropout") or (
        role is Role.ACTIVATION and node.op_type not in _ACROSS
    ):
        return [output]
    raise _needs_all(node)


def _product(chain: _Chain, node: ir.Node, index: int, axis: int) -> list[tuple[ir.Value, int]]:
    weight = constant_tensor(node.inputs[1]) if index == 0 else None
    if weight is None:
        raise _needs_all(node)
    shape = weight.shape.numpy()
    if is_op(node, "Conv") and axis == 1:
        group = int_attribute(node, "group", 1)
        if group == 1:
            chain.read.append(_Slice(node, 1, 1))
            return []
        if group != chain.channels or shape[0] != group:
            raise Declined(f"Conv {node.name!r} has groups of several channels")
        chain.between.append(_Slice(node, 1, 0))
        if len(node.inputs) > 2 and (bias := node.inputs[2]) is not None:
            chain.between += _broadcast(node, 2, bias, 0, group)
        chain.grouped.append(node)
        return [(node.outputs[0], 1)]
    last = 1 if is_op(node, "Gemm") else _rank(node.inputs[0]) - 1
    if axis != last or len(shape) != 2 or int_attribute(node, "transA", 0):
        raise _needs_all(node)
    chain.read.append(_Slice(node, 1, 1 if int_attribute(node, "transB", 0) else 0))
    return []


def _join(chain: _Chain, node: ir.Node, index: int, axis: int) -> None:
    """A second operand: a constant, which may have the channels, or a value that must."""
    other = node.inputs[1 - index]
    mine, rank = node.inputs[index], _rank(node.outputs[0])
    if other is None or _rank(mine) != rank:
        raise _needs_all(node)
    if constant_tensor(other) is None:
        chain.joins.append((node, other))
        return
    chain.between += _broadcast(node, 1 - index, other, axis - rank, chain.channels)


def _broadcast(
    node: ir.Node, index: int, value: ir.Value, axis: int, channels: int
) -> list[_Slice]:
    """The slice of a constant that broadcasts along `axis`, negative from the right; or none."""
    tensor = constant_tensor(value)
    if tensor is None:
        raise Declined(f"{node.op_type} {node.name!r} adds what is not constant")
    shape = tensor.shape.numpy()
    if axis < -len(shape) or shape[axis] == 1:
        return []
    if shape[axis] != channels:
        raise _needs_all(node)
    return [_Slice(node, index, axis % len(shape))]


def _strongest(chain: _Chain, count: int) -> Array:
    """Indices of the channels to keep, in order."""
    made, read = (_norms(slices) for slices in (chain.made[:1], chain.read))
    order = np.argsort(-(made * read), kind="stable")
    return np.sort(order[:count])


def _norms(slices: list[_Slice]) -> Array:
    """The norm of all weights of each channel."""
    total = np.float64(0)
    for part in slices:
        weight = np.moveaxis(_array(part), part.axis, 0).astype(np.float64)
        total = total + np.square(weight.reshape(len(weight), -1)).sum(1)
    return np.sqrt(total)


def _apply(graph: ir.Graph, chain: _Chain, kept: Array, fresh: FreshNames) -> None:
    for part in (*chain.made, *chain.between, *chain.read):
        old = part.node.inputs[part.index]
        assert old is not None
        tensor = ir.Tensor(np.ascontiguousarray(np.take(_array(part), kept, axis=part.axis)))
        if old.is_initializer() and len(old.uses()) == 1 and not old.is_graph_output():
            old.const_value, old.shape = tensor, tensor.shape  # which keeps its name
            continue
        new = ir.Value(name=fresh(f"{old.name}_narrow"), const_value=tensor)
        new.type, new.shape = ir.TensorType(tensor.dtype), tensor.shape
        graph.register_initializer(new)
        part.node.replace_input_with(part.index, new)
    for node in chain.grouped:
        node.attributes["group"] = ir.AttrInt64("group", len(kept))
    for value, axis in chain.values.items():
        dims = list(value.shape or ())
        dims[axis] = len(kept)
        value.shape = ir.Shape(dims)


def _array(part: _Slice) -> Array:
    array = constant(part.node.inputs[part.index])
    assert array is not None
    return array


def _is_flat(flatten: ir.Node) -> bool:
    """Whether each channel is one element, so that flattening leaves the channels what they are."""
    value = flatten.inputs[0]
    if value is None or value.shape is None or int_attribute(flatten, "axis", 1) != 1:
        return False
    return all(d == 1 for d in list(value.shape)[2:])


def _rank(value: ir.Value | None) -> int:
    if value is None or value.shape is None:
        raise Declined("the rank of a value is not known")
    return len(value.shape)


def _needs_all(node: ir.Node) -> Declined:
    return Declined(f"{node.op_type} {node.name!r} needs all of its channels")
