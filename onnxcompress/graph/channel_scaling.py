"""Divides the channels of values by factors, the model's function unchanged.

Channels of a value may be divided by s > 0 where what makes it can give it out divided, and all
that reads it can take it multiplied::

    LayerNormalization(g, b) ─ x ─ MatMul(W)   =   LayerNormalization(g/s, b/s) ─ x/s ─ MatMul(s W)

What lies between gets divided too: homogeneous functions, moves that keep the channels apart,
sums, products with something that does not change, and attention, which mixes rows only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.graph.folding import Edit, Folding
from onnxcompress.graph.linear import (
    Declined,
    Linear,
    NoSite,
    combined,
    dimensions,
    float_constant,
    is_op,
    linear,
    permutation,
    rank_of,
)
from onnxcompress.operators import HOMOGENEOUS, Role, constant, int_attribute, operator

_MOST_VALUES: Final = 64

Change = Callable[[Array], Edit | None]
"""What happens to one constant, given the factors (C,); raises `Declined` where it cannot."""


@dataclass(frozen=True, slots=True)
class Channels:
    """Axes of a value, counted from the right, whose indices in this order count its channels."""

    axes: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    def shaped(self, factors: Array) -> Array:
        """`factors` (C,), to broadcast against the value."""
        shape = [1] * -min(self.axes)
        for axis, size in zip(self.axes, self.sizes, strict=True):
            shape[axis] = size
        return factors.reshape(self.sizes).transpose(np.argsort(self.axes)).reshape(shape)


@dataclass(slots=True)
class Site:
    """Values whose channels are divided by the same factors, and the constants that see to it."""

    values: dict[ir.Value, Channels] = field(default_factory=dict[ir.Value, Channels])
    layers: dict[ir.Node, None] = field(default_factory=dict[ir.Node, None])
    """Linear operators that read the divided values, and whose weights are multiplied."""
    changes: dict[tuple[ir.Node, int], tuple[str, Change]] = field(
        default_factory=dict[tuple[ir.Node, int], tuple[str, Change]]
    )

    def scale(self, folding: Folding, factors: Array) -> None:
        """Divide by `factors`, float64 (C,) of positive numbers.

        Raises:
            Declined: nothing was changed.
        """
        edits = [change(factors) for _, change in self.changes.values()]
        for edit in edits:
            if edit is not None:
                folding.set_constant(edit)
        for value in self.values:
            value.name = folding.fresh(f"{value.name}_scaled")

    def change(self, node: ir.Node, index: int, how: str, change: Change) -> None:
        """Note what becomes of a constant: one change each, or none can see what it starts from."""
        if self.changes.setdefault((node, index), (how, change))[0] != how:
            raise Declined(f"{node.op_type} {node.name} both makes and reads it")

    def copy(self) -> Site:
        return Site(dict(self.values), dict(self.layers), dict(self.changes))


def site_of(folding: Folding, value: ir.Value, channels: Channels) -> Site:
    """All that must change so that `channels` of `value` can be divided.

    Raises:
        NoSite, Declined: they cannot.
    """
    search = _Search(folding, value)
    search.divide(value, channels)
    return search.site


def copy_of(folding: Folding, value: ir.Value, channels: Channels) -> Site:
    """What must change so that the linear operators that read `value` can take a divided copy."""
    search = _Search(folding, value)
    for user, index in value.uses():
        if user.graph is value.graph and is_op(user, "MatMul", "Gemm"):
            search.read_by_product(user, index, channels)
    return search.site


class _Search:
    """Follows a division to everything that touches a divided value."""

    def __init__(self, folding: Folding, value: ir.Value) -> None:
        self.folding = folding
        self.graph = value.graph
        self.site = Site()

    def divide(self, value: ir.Value, channels: Channels) -> None:
        known = self.site.values.get(value)
        if known is not None:
            if known != channels:
                raise Declined("its channels are read in two orders")
            return
        producer = value.producer()
        if producer is None or value.is_graph_output() or value is not producer.outputs[0]:
            raise Declined(f"{value.name} is given, handed out or one of several outputs")
        if len(self.site.values) == _MOST_VALUES:
            raise Declined(f"it hangs together with more than {_MOST_VALUES} values")
        self.site.values[value] = channels
        self._give(producer, channels)
        for user, index in value.uses():
            if user.graph is not self.graph:
                raise Declined(f"{value.name} is read in a body of control flow")
            self._take(user, index, channels)

    def _give(self, node: ir.Node, channels: Channels) -> None:
        """Let `node` give out its value divided."""
        if (layer := self._linear(node)) is not None:
            _check(channels, layer.out_axis, layer.rank, layer.out_channels, node)
            self._change_linear(node, layer, outputs=True)
        elif operator(node).role is Role.NORMALIZE:
            self._normalization(node, channels)
        elif is_op(node, "MatMul"):
            self.divide(_columns(node, channels), channels)
        elif is_op(node, "Mul", "Div") and not _constants(node):
            self._factor(node, channels)
        else:
            self._link(node, channels, towards_input=True)

    def _take(self, node: ir.Node, index: int, channels: Channels) -> None:
        """Let `node` take its input `index` divided."""
        if (layer := self._linear(node)) is not None:
            if not layer.in_axes or index != 1 - layer.index:
                raise Declined(f"{node.op_type} {node.name} reads it as something else than data")
            count = math.prod(layer.view[axis] for axis in layer.in_axes)
            _check(channels, layer.data_axis, layer.data_rank, count, node)
            self.site.layers[node] = None
            self._change_linear(node, layer, outputs=False)
        elif is_op(node, "MatMul") and index == 1:
            _columns(node, channels)
            self.divide(node.outputs[0], channels)
        elif is_op(node, "Mul", "Div") and not _constants(node):
            other = node.inputs[1 - index]
            if other in self.site.values or (index == 1 and is_op(node, "Div")):
                raise Declined(f"{node.op_type} {node.name} multiplies it, or divides, by itself")
            self.divide(node.outputs[0], channels)
        elif index != 0 and not is_op(node, "Mul", "Add", "Sub"):
            raise Declined(f"{node.op_type} {node.name} reads it as something else than data")
        else:
            self._link(node, channels, towards_input=False)

    def read_by_product(self, node: ir.Node, index: int, channels: Channels) -> None:
        """`_take` where that needs no other value to be divided; else nothing."""
        before = self.site.copy()
        try:
            if self._linear(node) is not None:
                self._take(node, index, channels)
        except Declined:
            self.site = before

    def _linear(self, node: ir.Node) -> Linear | None:
        try:
            return linear(node, self.folding.opset)
        except NoSite:
            return None

    def _change_linear(self, node: ir.Node, layer: Linear, *, outputs: bool) -> None:
        folding = self.folding

        def weight(factors: Array) -> Edit:
            layer = linear(node, folding.opset)
            axes = layer.out_axes if outputs else layer.in_axes
            return folding.weight_edit(layer, 1 / factors if outputs else factors, axes)

        def bias(factors: Array) -> Edit | None:
            tensor = linear(node, folding.opset).new_bias(1 / factors, np.zeros(1))
            return None if tensor is None else Edit(node, layer.bias_index, tensor)

        self.site.change(node, layer.index, "out" if outputs else "in", weight)
        if outputs and not is_op(node, "MatMul"):
            layer.new_bias(np.full(1, 0.5), np.zeros(1))  # raises where none could be made
            self.site.change(node, layer.bias_index, "out", bias)

    def _change_vector(self, node: ir.Node, index: int, channels: Channels, *, up: bool) -> None:
        """A constant that broadcasts against the value: multiplied if `up`, or divided."""

        def change(factors: Array) -> Edit:
            tensor = float_constant(node.inputs[index])
            assert tensor is not None
            scale = channels.shaped(factors if up else 1 / factors)
            return Edit(node, index, combined(tensor, scale, np.zeros(1)))

        self.site.change(node, index, "up" if up else "down", change)

    def _normalization(self, node: ir.Node, channels: Channels) -> None:
        row, rank = operator(node), rank_of(node.outputs[0])
        axis = int_attribute(node, "axis", -1) if row.channel_axis == -1 else row.channel_axis
        if row.weight is None or axis is None:
            raise Declined(f"{node.op_type} {node.name} has no scale for each channel")
        for index in (row.weight, row.bias):
            if index is None or index >= len(node.inputs) or node.inputs[index] is None:
                continue
            tensor = float_constant(node.inputs[index])
            if tensor is None or tensor.shape.rank() != 1:
                raise Declined(f"the scale of {node.op_type} {node.name} is not a constant vector")
            _check(channels, axis, rank, tensor.size, node)
            self._change_vector(node, index, Channels((-1,), channels.sizes), up=False)

    def _factor(self, node: ir.Node, channels: Channels) -> None:
        """Of two computed factors the one is divided that can be, the second if both can."""
        operands = [v for v in node.inputs if v is not None]
        candidates = operands[:1] if is_op(node, "Div") else operands[::-1]
        if any(v in self.site.values for v in operands):
            return  # that is where the division comes from
        before, reasons = self.site, list[str]()
        for value in candidates:
            self.site = before.copy()
            try:
                self.divide(value, channels)
            except (NoSite, Declined) as reason:
                reasons.append(str(reason))
            else:
                return
        raise Declined(reasons[0])

    def _link(self, node: ir.Node, channels: Channels, *, towards_input: bool) -> None:
        """Divide what is on the other side of a node that hands channels on."""
        value = node.inputs[0] if towards_input else node.outputs[0]
        constants = _constants(node)
        if is_op(node, "Add", "Sub"):
            self._add(node, constants, channels)
            return
        if is_op(node, "Mul", "Div") and constants != [0, 1]:
            (at,) = constants
            if is_op(node, "Div") and at == 0:
                raise Declined(f"Div {node.name} divides by it")
            if _spans(node, at, channels):
                up = towards_input == is_op(node, "Div")
                self._change_vector(node, at, channels, up=up)
                return
            value = node.inputs[1 - at] if towards_input else value
        elif is_op(node, *_MOVES):
            channels = _MOVES[node.op_type](node, channels, towards_input)
        elif not is_op(node, *HOMOGENEOUS) or any(v.name for v in node.outputs[1:]):
            raise Declined(f"{node.op_type} {node.name} cannot take or give it divided")
        elif operator(node).role in (Role.AVERAGE, Role.MOVE) and "Pool" in node.op_type:
            _check(channels, 1, rank_of(node.inputs[0]), channels.count, node)
        assert value is not None
        self.divide(value, channels)

    def _add(self, node: ir.Node, constants: list[int], channels: Channels) -> None:
        for at, value in enumerate(node.inputs):
            if at in constants:
                self._change_vector(node, at, channels, up=False)
            elif value is not None:
                self.divide(value, channels)
        self.divide(node.outputs[0], channels)


def _constants(node: ir.Node) -> list[int]:
    """Which of the first two inputs are constant."""
    return [i for i, v in enumerate(node.inputs[:2]) if float_constant(v) is not None]


def _spans(node: ir.Node, index: int, channels: Channels) -> bool:
    """Whether a constant has a value of its own for each channel."""
    tensor = float_constant(node.inputs[index])
    assert tensor is not None
    shape = dimensions(tensor)
    places = zip(channels.axes, channels.sizes, strict=True)
    fits = len(shape) >= -min(channels.axes) and channels.count > 1
    return fits and all(shape[axis] == size for axis, size in places)


def _columns(product: ir.Node, channels: Channels) -> ir.Value:
    """The right one of two computed matrices, whose columns, and stack, the product keeps."""
    left, right = product.inputs
    ranks = rank_of(left), rank_of(right)
    assert right is not None
    if -2 in channels.axes or -1 not in channels.axes or 1 in channels.sizes[:-1]:
        raise Declined(f"the product {product.name} mixes its channels")
    if None in ranks or ranks[0] != ranks[1] or left is right:
        raise Declined(f"the product {product.name} has operands of other ranks")
    return right


def _check(channels: Channels, axis: int, rank: int | None, count: int, node: ir.Node) -> None:
    """Raise unless `channels` are `count` and lie on `axis` of a value of this rank."""
    if axis >= 0:
        if rank is None:
            raise Declined(f"the rank of the data of {node.op_type} {node.name} is unknown")
        axis -= rank
    if channels.axes != (axis,) or channels.count != count:
        raise Declined(f"{node.op_type} {node.name} has other channels")


def _transposed(node: ir.Node, channels: Channels, towards_input: bool) -> Channels:
    perm = permutation(node)
    rank = len(perm)
    if -min(channels.axes) > rank:
        raise Declined(f"Transpose {node.name} has fewer axes")
    places = [axis % rank for axis in channels.axes]
    moved = [perm[p] if towards_input else perm.index(p) for p in places]
    return Channels(tuple(p - rank for p in moved), channels.sizes)


def _reshaped(node: ir.Node, channels: Channels, towards_input: bool) -> Channels:
    """Channels that fill the last axes fill the last axes of the same product on the other side.

    Towards the input its declared shape is believed at first: what makes the value is asked for
    channels of just these sizes, or the division is declined.
    """
    k = len(channels.axes)
    sizes = _target(node)
    ascending = channels.axes == tuple(range(-k, 0))
    if not ascending or (towards_input and k > 1 and sizes[-k:] != list(channels.sizes)):
        raise Declined(f"Reshape {node.name} mixes its channels, or has an unknown shape")
    source = node.inputs[0]
    if towards_input:
        shape = None if source is None else source.shape
        sizes = [] if shape is None else [d if isinstance(d, int) else None for d in shape]
    elif _merges(node, sizes) and rank_of(source) == len(sizes) - 1 + k:
        return Channels((-1,), (channels.count,))
    return _filling(node, sizes, channels.count)


def _merges(node: ir.Node, sizes: list[int | None]) -> bool:
    """Whether the target shape is (0, …, 0, -1): leading axes kept, all others made one."""
    kept = sizes[-1:] == [-1] and all(size == 0 for size in sizes[:-1])
    return kept and len(sizes) > 1 and int_attribute(node, "allowzero", 0) == 0


def _filling(node: ir.Node, sizes: list[int | None], count: int) -> Channels:
    """The last axes whose product is `count`."""
    product, taken = 1, 0
    while product < count and taken < len(sizes):
        taken += 1
        size = sizes[-taken]
        if size is None or size < 1:
            break
        product *= size
    if product != count:
        raise Declined(f"Reshape {node.name} mixes its channels, or has an unknown shape")
    found = [size for size in sizes[len(sizes) - taken :] if size is not None]
    return Channels(tuple(range(-taken, 0)), tuple(found))


def _target(reshape: ir.Node) -> list[int | None]:
    """The target shape, None for each size that is computed as the model runs."""
    value = reshape.inputs[1]
    array = constant(value)
    if array is not None:
        return [int(size) for size in array.reshape(-1)]
    node = None if value is None else value.producer()
    if not is_op(node, "Concat"):
        return [None]
    assert node is not None
    sizes: list[int | None] = []
    for part in node.inputs:
        array = constant(part)
        sizes += [None] if array is None else [int(size) for size in array.reshape(-1)]
    return sizes


_MOVES: Final = {"Transpose": _transposed, "Reshape": _reshaped}
