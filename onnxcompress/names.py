"""One name, one value: what statistics, exclusions and reports need to speak of a value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain

import onnx_ir as ir


def make_unique(model: ir.Model) -> None:
    """Rename values inside subgraphs whose names occur elsewhere in the model.

    The main graph keeps every name, so the interface and its initializers do too. Subgraphs of
    operators of other domains are left alone, since some find their inputs by name; a function's
    values have a scope of their own. Linear in the number of values.
    """
    taken = {v.name for g in (model.graph, *model.graph.subgraphs()) for v in _values(g)}
    seen = {v.name for v in _values(model.graph)}
    copies: Counter[str] = Counter()
    for graph in _standard_subgraphs(model.graph):
        for value in _values(graph):
            if value.name and value.name in seen:
                value.name = _fresh(value.name, taken, copies)
            seen.add(value.name)


def _values(graph: ir.Graph) -> list[ir.Value]:
    outputs = chain.from_iterable(node.outputs for node in graph)
    return list(dict.fromkeys(chain(graph.inputs, graph.initializers.values(), outputs)))


def _standard_subgraphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    for node in graph:
        if node.domain != "":
            continue
        for attribute in node.attributes.values():
            for inner in subgraphs(attribute):
                yield inner
                yield from _standard_subgraphs(inner)


def subgraphs(attribute: ir.Attr) -> tuple[ir.Graph, ...]:
    """The graphs that an attribute holds."""
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return tuple(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else ()


def _fresh(name: str, taken: set[str | None], copies: Counter[str]) -> str:
    while True:
        copies[name] += 1
        candidate = f"{name}_{copies[name]}"
        if candidate not in taken:
            taken.add(candidate)
            return candidate
