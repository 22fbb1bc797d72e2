"""Fold `x -> scale * x + shift`, channel by channel, into the linear operators beside it.

    after:   scale * (W x + b) + shift  =  (scale W) x + (scale b + shift)
    before:  W (scale x + shift) + b    =  (W scale) x + (W shift + b)

A MatMul has no bias: the Add of a constant behind it is taken as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.graph.linear import (
    LARGE,
    Affine,
    Declined,
    Linear,
    NoSite,
    combined,
    dimensions,
    float_constant,
    is_op,
    linear,
    opset_version,
    origin,
    permutation,
    rank_of,
    spread,
    tensor_of,
)
from onnxcompress.graph.names import FreshNames
from onnxcompress.graph.scopes import nodes_within


@dataclass(frozen=True)
class Edit:
    """Give `node` the constant `tensor` as its input `index`."""

    node: ir.Node
    index: int
    tensor: ir.TensorProtocol


class Folding:
    """One pass's rewriting of one model. Every method either does the whole or raises first."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.opset = 0
        self.modified = False
        self._as_nodes = False
        self._fresh: FreshNames | None = None
        self._shared: dict[ir.Value, bool] = {}
        self._loose: dict[ir.Value, None] = {}

    def containers(self) -> Iterator[list[ir.Node]]:
        """The nodes of the main graph and of each function, with those of their subgraphs.

        A function has no initializers, and before IR version 4 an initializer must be an input:
        there new constants become Constant nodes.
        """
        default = opset_version(self.model.graph.opset_imports, 1)
        for graph in (self.model.graph, *self.model.functions.values()):
            self.opset = opset_version(graph.opset_imports, default)
            self._as_nodes = isinstance(graph, ir.Function) or (self.model.ir_version or 0) < 4
            yield list(nodes_within(graph))

    def into_producer(self, node: ir.Node, value: ir.Value | None, affine: Affine) -> None:
        """Fold `node`, which computes `affine` of `value`, into the operator behind `value`.

        Behind a MatMul a shift stays as one Add in `node`'s place.

        Raises:
            NoSite, Declined: nothing was changed.
        """
        source, bias, there, passed = self._source(value, affine)
        site = linear(source, self.opset)
        if source.graph is not node.graph:
            raise Declined("the operator before it is in another graph")
        if any(self.is_shared(v) for v in passed):
            raise Declined("the value before it is also read elsewhere")
        there.check(site.out_axis, site.rank, site.out_channels)
        edits = list(bias)
        if there.scales:
            edits.append(self.weight_edit(site, there.scale, site.out_axes))
        addend = None
        if not is_op(source, "MatMul"):
            edits += _bias_edits(site, there.scale, there.shift)
        elif there.shifts and not bias:
            addend = tensor_of(spread(affine.shift, affine.axis, rank_of(value)), site.weight.dtype)
        if not edits:
            raise NoSite
        self._apply(edits)
        for v in passed:
            v.name = self.fresh(f"{v.name}_folded")
        if addend is None:
            self.take_over(passed[0], node.outputs[0])
            self.drop(node)
        else:
            self.replace(node, passed[0], ("Add", addend))

    def into_consumers(
        self, node: ir.Node, value: ir.Value | None, affine: Affine, *, may_add: bool
    ) -> None:
        """Fold `node`, which computes `affine` of `value`, into every operator that reads it.

        Args:
            may_add: whether a MatMul without a bias may get an Add for the shift.

        Raises:
            NoSite, Declined: nothing was changed.
        """
        if value is None:
            raise NoSite
        out = node.outputs[0]
        passed: list[ir.Value] = []
        plans: list[tuple[Linear, list[Edit], Array | None]] = []
        for user, index, there in self._sinks(out, affine, passed):
            site = linear(user, self.opset)
            if user.graph is not node.graph:
                raise Declined("the operator behind it is in another graph")
            plans.append((site, *self._edits_before(site, index, there)))
        if not plans:
            raise NoSite
        if any(v.is_graph_output() for v in passed):
            raise Declined("its output is a graph output")
        added = [
            (site, tensor_of(spread(rest, site.out_axis, None), site.weight.dtype))
            for site, _, rest in plans
            if rest is not None
        ]
        if added and not may_add:
            raise Declined("it would only move the addition behind the MatMul")
        self._apply([edit for _, edits, _ in plans for edit in edits])
        for site, tensor in added:
            self._add_behind(site.node, tensor)
        for v in passed[1:]:
            v.name = self.fresh(f"{v.name}_folded")
        out.replace_all_uses_with(value)
        self._shared.pop(value, None)
        self.drop(node)

    def is_shared(self, value: ir.Value) -> bool:
        """Whether `value` has another reader than one; remembered, so that hubs stay cheap."""
        if value not in self._shared:
            self._shared[value] = value.is_graph_output() or len(value.uses()) > 1
        return self._shared[value]

    def set_constant(self, edit: Edit) -> None:
        """Apply one edit: in place where nobody else sees the constant, else to a copy."""
        node, index, tensor = edit.node, edit.index, edit.tensor
        self.modified = True
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        old = node.inputs[index]
        if old is not None and old.is_initializer() and not self.is_shared(old):
            tensor.name = old.name
            old.const_value, old.shape = tensor, ir.Shape(dimensions(tensor))
            return
        source = origin(old)
        base = f"{node.outputs[0].name}_bias" if source is None else source.name
        node.replace_input_with(index, self.constant(tensor, f"{base}_folded", node))
        if old is not None:
            self._loose[old] = None

    def constant(self, tensor: ir.TensorProtocol, name: str, reader: ir.Node) -> ir.Value:
        """A new constant where the node `reader` can read it."""
        graph = reader.graph
        assert graph is not None
        tensor.name = self.fresh(name)
        shape, kind = ir.Shape(dimensions(tensor)), ir.TensorType(tensor.dtype)
        value = ir.Value(name=tensor.name, shape=shape, type=kind, const_value=tensor)
        if self._as_nodes:
            attributes = {"value": ir.AttrTensor("value", tensor)}
            graph.insert_before(reader, ir.node("Constant", [], attributes, outputs=[value]))
        else:
            graph.register_initializer(value)
        return value

    def fresh(self, base: str) -> str:
        """A name that no value of the model has, in any scope."""
        if self._fresh is None:
            self._fresh = FreshNames(self.model.graph, *self.model.functions.values())
        return self._fresh(base)

    def take_over(self, new: ir.Value, old: ir.Value) -> None:
        """Let `new` stand where `old` stood: its readers, name, type, and shape."""
        new.type = old.type or new.type
        new.shape = old.shape if old.is_graph_output() else old.shape or new.shape
        new.metadata_props.update(old.metadata_props)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = None, old.name
        self._shared.pop(new, None)

    def replace(self, node: ir.Node, data: ir.Value, *steps: tuple[str, ir.TensorProtocol]) -> None:
        """Put a chain of (operator, constant), starting from `data`, in the place of `node`."""
        graph, out = node.graph, node.outputs[0]
        assert graph is not None
        for op_type, tensor in steps:
            constant = self.constant(tensor, f"{out.name}_{op_type.lower()}", node)
            step = ir.node(op_type, [data, constant])
            step.outputs[0].name = self.fresh(f"{out.name}_part")
            step.outputs[0].type, step.outputs[0].shape = out.type, out.shape
            graph.insert_before(node, step)
            data = step.outputs[0]
        self.take_over(data, out)
        self.drop(node)

    def drop(self, node: ir.Node) -> None:
        """Remove `node`, whose output nobody reads any more."""
        assert node.graph is not None
        self._loose |= dict.fromkeys(v for v in node.inputs if v is not None)
        node.graph.remove(node, safe=True)
        self.modified = True

    def finish(self) -> None:
        """Remove the constants, and the Identity nodes behind them, that nothing reads any more."""
        loose = list(self._loose)
        while loose:
            value = loose.pop()
            if value.is_graph_output() or value.is_graph_input() or value.uses():
                continue
            node, graph = value.producer(), value.graph
            if graph is None:
                continue
            if node is not None and is_op(node, "Constant", "Identity"):
                loose += [v for v in node.inputs if v is not None]
                graph.remove(node, safe=True)
            elif value.is_initializer() and value.name is not None:
                del graph.initializers[value.name]

    def _apply(self, edits: list[Edit]) -> None:
        for edit in edits:
            self.set_constant(edit)

    def _source(
        self, value: ir.Value | None, affine: Affine
    ) -> tuple[ir.Node, list[Edit], Affine, list[ir.Value]]:
        """The operator behind `value`, seen through Identity, Transpose and a MatMul's bias.

        Also: the edit of that bias, `affine` as it acts on the operator's own output, and the
        values on the way, which all change, `value` first.
        """
        passed: list[ir.Value] = []
        bias: list[Edit] = []
        while value is not None and (node := value.producer()) is not None:
            passed.append(value)
            data = 0
            if is_op(node, "Transpose"):
                perm = permutation(node)
                affine = affine.moved(perm[affine.axis % len(perm)])
            elif not bias and (constant := _bias_of_product(node)) is not None:
                bias = [_addend_edit(node, constant, affine.scale, affine.shift, affine.axis)]
                data = 1 - constant
            elif not is_op(node, "Identity"):
                return node, bias, affine, passed
            value = node.inputs[data]
        raise NoSite

    def _sinks(
        self, value: ir.Value, affine: Affine, passed: list[ir.Value]
    ) -> Iterator[tuple[ir.Node, int, Affine]]:
        """Who reads `value`, at which input, and how `affine` acts there; through moves as above.

        Appends to `passed` the values on the way, which will be without `affine`.
        """
        passed.append(value)
        for user, index in value.uses():
            if is_op(user, "Identity"):
                yield from self._sinks(user.outputs[0], affine, passed)
            elif is_op(user, "Transpose"):
                perm = permutation(user)
                moved = affine.moved(perm.index(affine.axis % len(perm)))
                yield from self._sinks(user.outputs[0], moved, passed)
            else:
                yield user, index, affine

    def weight_edit(self, site: Linear, scale: Array, axes: tuple[int, ...]) -> Edit:
        """The edit of the weight of `site` to `scale` times itself along `axes` of its view.

        Raises:
            Declined: if it is large and shared, or would overflow or turn denormal.
        """
        value = site.node.inputs[site.index]
        while site.weight.nbytes > LARGE and value is not None:
            if self.is_shared(value):
                raise Declined("the weight is large and shared")
            node = value.producer()
            value = node.inputs[0] if node is not None and node.inputs else None
        return Edit(site.node, site.index, site.scaled(scale, axes))

    def _edits_before(
        self, site: Linear, index: int, affine: Affine
    ) -> tuple[list[Edit], Array | None]:
        """The edits for `affine` on the data of `site`, and the shift that it cannot hold."""
        site.check_data(index, affine)
        edits: list[Edit] = []
        if affine.scales:
            edits.append(self.weight_edit(site, affine.scale, site.in_axes))
        if not affine.shifts:
            return edits, None
        carried = site.carried(affine.shift)
        if not is_op(site.node, "MatMul"):
            return edits + _bias_edits(site, None, carried), None
        behind = self._bias_behind(site.node)
        if behind is None:
            return edits, carried
        return [*edits, _addend_edit(*behind, None, carried, site.out_axis)], None

    def _bias_behind(self, product: ir.Node) -> tuple[ir.Node, int] | None:
        """The Add of a constant that alone reads a MatMul, and the index of that constant."""
        out = product.outputs[0]
        if self.is_shared(out) or not out.uses():
            return None
        (add, index), *_ = out.uses()
        if not is_op(add, "Add") or add.graph is not product.graph:
            return None
        return (add, 1 - index) if float_constant(add.inputs[1 - index]) is not None else None

    def _add_behind(self, product: ir.Node, tensor: ir.TensorProtocol) -> None:
        """Add a constant to what a MatMul makes, under the old name."""
        graph, old = product.graph, product.outputs[0]
        assert graph is not None
        new = ir.Value(name=None)
        self.take_over(new, old)
        old.name = self.fresh(f"{new.name}_product")
        constant = self.constant(tensor, f"{new.name}_add", product)
        graph.insert_after(product, ir.node("Add", [old, constant], outputs=[new]))


def _bias_edits(site: Linear, scale: Array | None, shift: Array) -> list[Edit]:
    """The edit of the bias of `site` to `scale * bias + shift`, or none where nothing changes."""
    tensor = site.new_bias(scale, shift)
    return [] if tensor is None else [Edit(site.node, site.bias_index, tensor)]


def _bias_of_product(node: ir.Node) -> int | None:
    """The index of the constant that `node`, an Add, adds to what a MatMul made; else None."""
    if not is_op(node, "Add"):
        return None
    constants = [i for i, v in enumerate(node.inputs) if float_constant(v) is not None]
    if len(constants) != 1:
        return None
    data = node.inputs[1 - constants[0]]
    while data is not None and is_op(source := data.producer(), "Identity", "Transpose"):
        assert source is not None
        data = source.inputs[0]
    is_product = data is not None and is_op(data.producer(), "MatMul")
    return constants[0] if is_product else None


def _addend_edit(add: ir.Node, index: int, scale: Array | None, shift: Array, axis: int) -> Edit:
    """The edit that makes the addend of `add` into `scale * addend + shift` along `axis`."""
    tensor, rank = float_constant(add.inputs[index]), rank_of(add.outputs[0])
    assert tensor is not None
    factor = None if scale is None else spread(scale, axis, rank)
    return Edit(add, index, combined(tensor, factor, spread(shift, axis, rank)))
