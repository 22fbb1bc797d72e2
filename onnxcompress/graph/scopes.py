"""What may be relied on about a value, given the graph that it lives in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import onnx_ir as ir

from onnxcompress.operators import constant_tensor


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The bodies of a control-flow node: the graphs that its attributes hold."""
    # Behind `data` is a dict, whose values come without a call of Python code for each.
    for attribute in node.attributes.data.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            yield from attribute.as_graphs()


def scopes(root: ir.Graph | ir.Function) -> Iterator[ir.Graph | ir.Function]:
    """A graph or function and all bodies within it, outermost first."""
    yield root
    for node in root:
        if node.attributes.data:
            for body in subgraphs(node):
                yield from scopes(body)


def nodes_within(root: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """The nodes of a graph or function, those of its bodies behind each node that holds them."""
    for node in root:
        yield node
        if node.attributes.data:
            for body in subgraphs(node):
                yield from nodes_within(body)


def reads(node: ir.Node) -> list[ir.Value]:
    """The inputs of a node, and what its bodies read of the graph around them."""
    inner = (v for body in subgraphs(node) for n in body.all_nodes() for v in n.inputs)
    return [v for v in chain(node.inputs, inner) if v is not None]


def sources(values: Iterable[ir.Value]) -> set[ir.Value]:
    """These values and all that they are computed from."""
    waiting = list(values)
    found = set(waiting)
    while waiting:
        node = waiting.pop().producer()
        if node is not None:
            new = {v for v in reads(node) if v not in found}
            found |= new
            waiting.extend(new)
    return found


def values_of(scope: ir.Graph | ir.Function) -> list[ir.Value]:
    """What the scope itself defines, without the bodies in it."""
    outputs = chain.from_iterable(node.outputs for node in scope)
    initializers = scope.initializers.data.values() if isinstance(scope, ir.Graph) else ()
    return list(dict.fromkeys(chain(scope.inputs, initializers, outputs)))


class Declared:
    """The declared shapes of a model that hold on every run.

    ONNX Runtime checks what is fed against the inputs' shapes. An intermediate shape is only a
    note: where an input is dynamic it may have been taken with other inputs, and within a
    subgraph a Loop may carry another shape every time.
    """

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        shapes = [v.shape for v in model.graph.inputs]
        self._static = all(s is not None and s.is_static() for s in shapes)

    def shape(self, value: ir.Value) -> ir.Shape | None:
        """The shape of `value`, None where it cannot be relied on."""
        tensor = constant_tensor(value)
        if tensor is not None:
            return ir.Shape(tensor.shape.numpy())
        if value.graph is self._graph and (self._static or value.is_graph_input()):
            return value.shape
        return None


class Names:
    """The names of a main graph or function that mean another value in a scope within it."""

    def __init__(self, root: ir.Graph | ir.Function) -> None:
        seen: set[str | None] = set()
        self._repeated: set[str | None] = set()
        for graph in scopes(root):
            for value in values_of(graph):
                (self._repeated if value.name in seen else seen).add(value.name)

    def unique(self, name: str | None) -> bool:
        """Whether no other value has this name."""
        return name not in self._repeated

    def reach(self, name: str | None, graph: ir.Graph | None, value: ir.Value) -> bool:
        """Whether `name`, as defined in `graph`, means the same to all that read `value`."""
        return name not in self._repeated or all(u.node.graph is graph for u in value.uses())
