"""Emitting nodes behind a graph, and what gradient rules need to know of the values they read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.names import FreshNames

Attributes = Mapping[str, Any]
Gradients = Sequence[ir.Value | None]


class Unsupported(Exception):
    """A rule cannot give the gradient of its node; the message says why."""


class Tape:
    """Puts nodes and constants with fresh names into a graph, to its end unless told otherwise.

    Args:
        graph: what to append to.
        wanted: the values whose gradients are asked for; None: all of them.
        block: channels in a block, if convolutions will work on blocks (`train.blocked`).
    """

    def __init__(
        self,
        graph: ir.Graph,
        wanted: Collection[ir.Value] | None = None,
        block: int | None = None,
    ) -> None:
        self.graph = graph
        self.block = block
        self.before: ir.Node | None = None
        """Where new nodes are put; None: to the end."""
        self._wanted = wanted
        self._fresh = FreshNames(graph)
        self._nodes: list[ir.Node] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._shapes: dict[ir.Value, ir.Value] = {}
        self._added_outputs: list[tuple[ir.Node, int, str | None]] = []

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Attributes | None = None,
        *,
        like: ir.Value | None = None,
        domain: str = "",
    ) -> ir.Value:
        """The output of a new node; it has the type and shape of `like` where that is given."""
        (output,) = self.ops(op_type, inputs, attributes, outputs=1, domain=domain)
        if like is not None:
            output.type, output.shape = like.type, like.shape
        return output

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Attributes | None = None,
        *,
        outputs: int,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        """The `outputs` outputs of a new node."""
        values = [ir.Value(name=self.name(f"{op_type}_grad")) for _ in range(outputs)]
        name = values[0].name
        node = ir.node(op_type, inputs, attributes, outputs=values, name=name, domain=domain)
        self._nodes.append(node)
        if self.before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.before, node)
        return node.outputs

    def within(self, body: ir.Graph) -> Tape:
        """A tape for the body of a node, whose names are fresh in this graph too."""
        inner = Tape(body)
        inner._fresh = self._fresh
        return inner

    def name(self, base: str) -> str:
        """`base`, or with a number behind it where something is called that already."""
        return self._fresh(base)

    def wanted(self, value: ir.Value | None) -> bool:
        """Whether somebody asks for the gradient of `value`."""
        return value is not None and (self._wanted is None or value in self._wanted)

    def constant(self, array: np.ndarray) -> ir.Value:
        """An initializer that holds `array`; the same one for the same bytes."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.name("constant_grad")
            value = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                const_value=ir.Tensor(array, name=name),
            )
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A constant int64 vector, as shapes and axes are given."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, number: float, like: ir.Value) -> ir.Value:
        """A constant without axes, of the type of `like`."""
        return self.constant(np.array(number, dtype_of(like).numpy()))

    def cast(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """`value` with elements of the type of `like`."""
        return self.op("Cast", [value], {"to": dtype_of(like).value})

    def shape(self, value: ir.Value) -> ir.Value:
        """The shape of `value` as an int64 vector: a constant where it is known."""
        dims = dims_of(value)
        if dims is not None and all(d is not None for d in dims):
            return self.ints(*(d for d in dims if d is not None))
        if value not in self._shapes:
            self._shapes[value] = self.op("Shape", [value])
        return self._shapes[value]

    def dim(self, value: ir.Value, axis: int) -> ir.Value:
        """The size of one axis as an int64 vector of one element."""
        dims = dims_of(value)
        known = None if dims is None else dims[axis]
        if known is not None:
            return self.ints(known)
        end = {} if axis == -1 else {"end": axis + 1}
        return self.op("Shape", [value], {"start": axis, **end})

    def join(self, *parts: ir.Value | int) -> ir.Value:
        """Pieces of a shape, one after the other."""
        given = [self.ints(p) if isinstance(p, int) else p for p in parts]
        arrays = [None if v.const_value is None else v.const_value.numpy() for v in given]
        known = [a for a in arrays if a is not None]
        if len(known) == len(given):
            return self.constant(np.concatenate(known))
        return self.op("Concat", given, {"axis": 0})

    def reshape_like(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """`value` with the shape of `like`."""
        dims = dims_of(like)
        if dims is not None and dims.count(None) == 1 and 0 not in dims:
            shape = self.ints(*(-1 if d is None else d for d in dims))
            return self.op("Reshape", [value, shape])
        return self.op("Reshape", [value, self.shape(like)], {"allowzero": 1})

    def zeros(self, like: ir.Value) -> ir.Value:
        """Zeros of the type and shape of `like`."""
        return self.op("Expand", [self.scalar(0.0, like), self.shape(like)])

    def output(self, node: ir.Node, index: int) -> ir.Value:
        """An output of a node of the graph, which is made to give it if it does not."""
        missing = index >= len(node.outputs) or not node.outputs[index].name
        if missing:
            size = len(node.outputs)
            before = node.outputs[index].name if index < size else None
            self._added_outputs.append((node, size, before))
            for position in range(size, index + 1):
                node.resize_outputs(position + 1)
                node.outputs[position].name = ""
            value = node.outputs[index]
            value.name = self.name(f"{node.outputs[0].name or node.op_type}_{index}")
        return node.outputs[index]

    def undo(self) -> None:
        """Take everything back out of the graph."""
        self.graph.remove(self._nodes, safe=True)
        for value in self._constants.values():
            assert value.name is not None
            del self.graph.initializers[value.name]
        for node, size, name in reversed(self._added_outputs):
            if name is not None:
                node.outputs[size - 1].name = name
            node.resize_outputs(size)
        self.__init__(self.graph, self._wanted, self.block)


Rule = Callable[[Tape, ir.Node, Gradients], Gradients]
"""The gradients of a node's inputs, given those of its outputs; None is a gradient of zero."""


def dtype_of(value: ir.Value) -> ir.DataType:
    """The type of a value's elements."""
    if value.dtype is None:
        raise Unsupported(f"the type of {value.name!r} is unknown: run shape inference first")
    return value.dtype


def dims_of(value: ir.Value) -> tuple[int | None, ...] | None:
    """The sizes of a value's axes, None for those known at run time only; None without a rank."""
    if value.const_value is not None:
        return tuple(value.const_value.shape.numpy())
    if value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else None for d in value.shape)


def rank_of(value: ir.Value) -> int:
    """How many axes a value has."""
    dims = dims_of(value)
    if dims is None:
        raise Unsupported(f"the shape of {value.name!r} is unknown: run shape inference first")
    return len(dims)


def sizes_of(value: ir.Value, first: int = 0) -> tuple[int, ...]:
    """The sizes of a value's axes from `first` on, which a rule must know beforehand."""
    rank_of(value)
    dims = (dims_of(value) or ())[first:]
    known = tuple(d for d in dims if d is not None)
    if len(known) != len(dims):
        raise Unsupported(f"the sizes of {value.name!r} are known at run time only")
    return known


def present(node: ir.Node, index: int) -> ir.Value | None:
    """The input at `index`; None where the node does not have it."""
    return node.inputs[index] if index < len(node.inputs) else None


def required(node: ir.Node, index: int) -> ir.Value:
    """The input at `index`, which the operator demands."""
    value = present(node, index)
    if value is None:
        raise Unsupported(f"its input {index} is missing")
    return value
