"""Linear operators as linear maps: how a weight lies, and what a scale and a shift do to it.

Conv, ConvTranspose, Gemm, MatMul and an inference BatchNormalization; which input is the weight and
on which axis its channels lie is in the operator table. Arithmetic is in float64 and rounded once
to the weight's dtype. Nothing here changes a graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.operators import (
    DEFAULT_DOMAINS,
    Role,
    constant_tensor,
    float_attribute,
    in_axis,
    int_attribute,
    operator,
    out_axis,
)

LARGE: Final = 1 << 20
"""Bytes above which a weight is computed on demand and never duplicated."""

LIMITS: Final = {
    ir.DataType.FLOAT16: (2.0**-14, 65504.0),
    ir.DataType.BFLOAT16: (2.0**-126, 3.3895313892515355e38),
    ir.DataType.FLOAT: (2.0**-126, float(np.finfo(np.float32).max)),
    ir.DataType.DOUBLE: (2.0**-1022, float(np.finfo(np.float64).max)),
}
"""Smallest normal and largest finite number of the dtypes that fold."""


class NoSite(Exception):
    """There is no linear operator here to fold into."""


class Declined(Exception):
    """There is one, but folding into it would not be exact or no gain; the message says why."""


@dataclass(frozen=True)
class Affine:
    """`x -> scale * x + shift` along `axis` of a tensor of at least `rank` dimensions.

    `scale` and `shift` are finite float64 of shape (channels,), or (1,) where all are alike.
    A negative axis counts from the right.
    """

    scale: Array
    shift: Array
    axis: int
    rank: int = 1

    @property
    def scales(self) -> bool:
        return bool(np.any(self.scale != 1))

    @property
    def shifts(self) -> bool:
        return bool(np.any(self.shift != 0))

    def check(self, axis: int, rank: int | None, channels: int) -> None:
        """Raise `Declined` unless this acts on `axis` of a tensor of `rank` and `channels`."""
        if self.rank > (rank or 1):
            raise Declined("broadcasting may add dimensions")
        own = max(self.scale.size, self.shift.size)
        if own == 1:
            return
        if self.axis != axis and (rank is None or self.axis % rank != axis % rank):
            raise Declined("it acts along another axis than the operator's channels")
        if own != channels:
            raise Declined(f"it has {own} channels, the operator {channels}")

    def moved(self, axis: int) -> Affine:
        """The same, where its axis has become `axis`."""
        return replace(self, axis=axis)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear operator, and how its constant weight lies.

    `view` is the weight's shape with groups split off as an axis of their own; `out_axes` and
    `in_axes` are the axes of `view` that together count output and input channels. `out_axis` and
    `data_axis` are the channel axes of output and data (from the right for MatMul), `rank` and
    `data_rank` their ranks where known.
    """

    node: ir.Node
    index: int
    weight: ir.TensorProtocol
    view: tuple[int, ...]
    out_axes: tuple[int, ...]
    in_axes: tuple[int, ...] = ()
    out_axis: int = 1
    data_axis: int = 1
    rank: int | None
    data_rank: int | None

    @property
    def out_channels(self) -> int:
        return self._count(self.out_axes)

    @property
    def bias_index(self) -> int:
        return operator(self.node).bias or 0

    def scaled(self, scale: Array, axes: tuple[int, ...]) -> ir.TensorProtocol:
        """The weight times `scale` along `axes` of `view`; computed on demand if it is large.

        Raises:
            Declined: unless each channel's largest value is zero or a normal number of the dtype.
                Then rounding errs by at most half a unit in the last place of that value.
        """
        weight, view = self.weight, self.view
        shape = [n if i in axes else 1 for i, n in enumerate(view)]
        factor = np.broadcast_to(scale, self._count(axes)).reshape(shape)
        others = tuple(i for i in range(len(view)) if i not in axes)
        array = weight.numpy().reshape(view)
        peak = np.maximum(array.max(others, keepdims=True), -array.min(others, keepdims=True))
        check_range(peak.astype(np.float64) * factor, weight.dtype)

        def compute() -> ir.TensorProtocol:
            array = weight.numpy().reshape(view)
            out = np.empty_like(array)
            np.multiply(array, factor, out=out, dtype=np.float64, casting="unsafe")
            return ir.Tensor(out.reshape(dimensions(weight)), dtype=weight.dtype)

        if weight.nbytes <= LARGE:
            return compute()
        return ir.LazyTensor(compute, dtype=weight.dtype, shape=ir.Shape(dimensions(weight)))

    def check_data(self, index: int, affine: Affine) -> None:
        """Raise unless `affine` on input `index` passes through to the output exactly."""
        if not self.in_axes:
            raise NoSite
        if index != (1 - self.index):
            raise Declined("the operator behind it reads it as a weight or bias")
        affine.check(self.data_axis, self.data_rank, self._count(self.in_axes))
        if not affine.shifts:
            return
        if is_op(self.node, "ConvTranspose"):
            raise Declined("a shift reaches the positions of a ConvTranspose unequally")
        if is_op(self.node, "Conv") and pads_with_zeros(self.node, self.view[3:]):
            raise Declined("the Conv behind it pads with zeros, which a shift would change")
        if is_op(self.node, "MatMul") and len(self.view) != 2:
            raise Declined("a shift before a batch of matrices is not one shift behind it")

    def carried(self, shift: Array) -> Array:
        """What `shift` on every input channel adds to each output channel: float64 (out,)."""
        array = self.weight.numpy().reshape(self.view)
        counts = [self.view[a] for a in self.in_axes]
        shift = np.broadcast_to(shift, self._count(self.in_axes)).reshape(counts)
        subscripts = list(range(len(self.view))), list(self.in_axes), list(self.out_axes)
        total = np.einsum(
            *(array, subscripts[0], shift, subscripts[1], subscripts[2]),
            dtype=np.float64,
            casting="unsafe",
        )
        return total.reshape(-1) * float_attribute(self.node, "alpha", 1.0)

    def new_bias(self, scale: Array | None, shift: Array) -> ir.TensorProtocol | None:
        """The bias times `scale` plus `shift`, each (out,) or (1,); None where nothing changes.

        Raises:
            Declined: if it is computed as the model runs, or would overflow or grow.
        """
        index, beta = self.bias_index, float_attribute(self.node, "beta", 1.0)
        old = self.node.inputs[index] if index < len(self.node.inputs) else None
        rescales = old is not None and scale is not None and bool(np.any(scale != 1))
        if not np.any(shift) and (beta == 0 or not rescales):
            return None
        if beta == 0:
            raise Declined("the Gemm disregards its bias: beta is 0")
        if old is None:
            return tensor_of(np.zeros(self.out_channels) + shift / beta, self.weight.dtype)
        tensor = float_constant(old)
        if tensor is None:
            raise Declined("the bias is not constant")
        return combined(tensor, scale, shift / beta)

    def _count(self, axes: tuple[int, ...]) -> int:
        return int(np.prod([self.view[a] for a in axes]))


def linear(node: ir.Node, opset: int) -> Linear:
    """How `node` is linear in its data, by the meaning it has in `opset`.

    Raises:
        NoSite: if it is not a linear operator, or multiplies two values computed at run time.
        Declined: if its weight is not a floating-point constant of the expected shape.
    """
    if is_op(node, "MatMul", "Gemm"):
        return _product(node, opset)
    if not is_op(node, "Conv", "ConvTranspose", "BatchNormalization"):
        raise NoSite
    row = operator(node)
    index = row.weight or 0
    weight = float_constant(node.inputs[index])
    if weight is None or has_reference(node):
        raise Declined(f"the weight of the {node.op_type} beside it is not constant")
    shape = dimensions(weight)
    if 0 in shape:
        raise Declined("the weight is empty")
    if is_op(node, "BatchNormalization"):
        if not is_inference(node, opset) or len(shape) != 1:
            raise Declined("the BatchNormalization before it is not an inference one")
        rank = rank_of(node.outputs[0]) or rank_of(node.inputs[0])
        return Linear(
            node=node,
            index=index,
            weight=weight,
            view=shape,
            out_axes=(0,),
            rank=rank,
            data_rank=rank,
        )
    group, rank = int_attribute(node, "group", 1), len(shape)
    if row.out_axis is None or row.in_axis is None or rank < 3 or shape[0] % group:
        raise Declined(f"the weight's shape does not suit the {node.op_type} beside it")
    return Linear(
        node=node,
        index=index,
        weight=weight,
        view=(group, shape[0] // group, *shape[1:]),
        out_axes=(0, 1 + row.out_axis),
        in_axes=(0, 1 + row.in_axis),
        rank=rank,
        data_rank=rank,
    )


def _product(node: ir.Node, opset: int) -> Linear:
    """`linear` for MatMul with a constant on either side, and Gemm with one on the right."""
    constants = [float_constant(v) for v in node.inputs[:2]]
    index = 1 if constants[1] is not None else 0
    weight, other = constants[index], constants[1 - index]
    if weight is None or other is not None or has_reference(node):
        raise NoSite
    shape = dimensions(weight)
    rank = len(shape)
    if rank < 2 or 0 in shape or (is_op(node, "Gemm") and (index == 0 or opset < 7)):
        raise NoSite
    out, into = out_axis(node, rank) or 0, in_axis(node, rank) or 0
    if is_op(node, "Gemm"):
        axes, ranks = (1, 0 if int_attribute(node, "transA", 0) else 1), (2, 2)
    else:
        axes = (-1, -1) if index else (-2, -2)
        ranks = (rank_of(node.outputs[0]), rank_of(node.inputs[1 - index]))
    if index == 0:
        if ranks[1] is None or ranks[1] < 2:
            raise Declined("it is not known that the data of the MatMul beside it is a matrix")
        out, into = into, out
    return Linear(
        node=node,
        index=index,
        weight=weight,
        view=shape,
        out_axes=(out,),
        in_axes=(into,),
        out_axis=axes[0],
        data_axis=axes[1],
        rank=ranks[0],
        data_rank=ranks[1],
    )


def is_inference(batchnorm: ir.Node, opset: int) -> bool:
    """Whether this BatchNormalization uses its given mean and variance, per channel.

    Operator specification: from opset 14 `training_mode` says so, from 7 that it has one output
    only, before that `is_test`; `spatial` = 0 keeps statistics for each position.
    """
    if has_reference(batchnorm) or int_attribute(batchnorm, "spatial", 1) == 0:
        return False
    if any(v.name for v in batchnorm.outputs[1:]):
        return False
    if opset >= 14:
        return int_attribute(batchnorm, "training_mode", 0) == 0
    return opset >= 7 or int_attribute(batchnorm, "is_test", 0) == 1


def pads_with_zeros(conv: ir.Node, kernel: tuple[int, ...]) -> bool:
    """Whether a Conv may read zeros from outside its input."""
    mode = conv.attributes.get("auto_pad")
    if mode is not None and mode.as_string().startswith("SAME"):
        return any(k != 1 for k in kernel)
    pads = conv.attributes.get("pads")
    return pads is not None and any(pads.as_ints())


def permutation(transpose: ir.Node) -> list[int]:
    """`perm` of a Transpose; NoSite where it is not known."""
    attribute = transpose.attributes.get("perm")
    if attribute is not None and not attribute.is_ref():
        return list(attribute.as_ints())
    rank = rank_of(transpose.inputs[0])
    if attribute is not None or rank is None:
        raise NoSite
    return list(reversed(range(rank)))


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether `node` is one of these operators of the default ONNX domain."""
    return node is not None and node.domain in DEFAULT_DOMAINS and node.op_type in op_types


def has_reference(node: ir.Node) -> bool:
    """Whether an attribute is a parameter of the function around it, unknown until the call."""
    return any(a.is_ref() for a in node.attributes.values())


def opset_version(imports: Mapping[str, int], default: int) -> int:
    """The version of the default ONNX domain."""
    return imports.get("", imports.get("ai.onnx", default))


def rank_of(value: ir.Value | None, depth: int = 6) -> int | None:
    """The rank of `value`: declared, or by up to `depth` operators from what is declared."""
    if value is None:
        return None
    if value.shape is not None:
        return len(value.shape)
    if (tensor := constant_tensor(value)) is not None:
        return len(tensor.shape)
    node = value.producer()
    if node is None or depth == 0:
        return None
    if is_op(node, "MatMul"):
        left, right = (rank_of(v, depth - 1) for v in node.inputs)
        return None if left is None or right is None else product_rank(left, right)
    role = operator(node).role
    if is_op(node, "Identity", "Transpose", "BatchNormalization") or role is Role.ACTIVATION:
        return rank_of(node.inputs[0], depth - 1)
    if role is not Role.ELEMENTWISE:
        return None
    ranks = [rank_of(v, depth - 1) for v in node.inputs]
    known = [r for r in ranks if r is not None]
    return max(known) if len(known) == len(ranks) else None


def product_rank(left: int, right: int) -> int:
    """Rank of the MatMul of two values; a vector gives its dimension up."""
    return max(left, right, 2) - (left == 1) - (right == 1)


def dimensions(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(d) for d in tensor.shape.numpy())


def origin(value: ir.Value | None) -> ir.Value | None:
    """`value` without the Identity nodes in front of it."""
    while value is not None and (node := value.producer()) is not None and is_op(node, "Identity"):
        value = node.inputs[0]
    return value


def float_constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The floating-point tensor that `value` always holds, seen through Identity; or None."""
    tensor = constant_tensor(origin(value))
    return tensor if tensor is not None and tensor.dtype in LIMITS else None


def spread(array: Array, axis: int, rank: int | None) -> Array:
    """`array`, (channels,) or (1,), shaped to broadcast along `axis` of a tensor of `rank`."""
    if array.size == 1:
        return array.reshape(1)
    if axis >= 0:
        if rank is None:
            raise Declined("the rank of the value is unknown")
        axis -= rank
    return array.reshape((array.size,) + (1,) * (-axis - 1))


def combined(tensor: ir.TensorProtocol, scale: Array | None, shift: Array) -> ir.TensorProtocol:
    """`scale * tensor + shift` by broadcasting; Declined where it would grow or overflow."""
    if tensor.nbytes > LARGE:
        raise Declined("the constant to change is large")
    array = tensor.numpy().astype(np.float64)
    array = (array if scale is None else array * scale) + shift
    if array.size > max(tensor.size, shift.size, 1 if scale is None else scale.size):
        raise Declined("the constant to change would grow by broadcasting")
    return tensor_of(array, tensor.dtype)


def check_range(values: Array, dtype: ir.DataType) -> None:
    """Raise `Declined` unless every value is zero or a normal number of `dtype`."""
    tiny, largest = LIMITS[dtype]
    size = np.abs(values)
    if not np.all(size <= largest):
        raise Declined(f"a value is not finite in {dtype.name.lower()}")
    if np.any((size < tiny) & (size > 0)):
        raise Declined(f"a channel would become denormal in {dtype.name.lower()}")


def tensor_of(values: Array, dtype: ir.DataType) -> ir.TensorProtocol:
    """`values` rounded to `dtype`; Declined where one is not finite there."""
    if not np.all(np.abs(values) <= LIMITS[dtype][1]):
        raise Declined(f"a value is not finite in {dtype.name.lower()}")
    return ir.Tensor(values.astype(dtype.numpy()), dtype=dtype)
