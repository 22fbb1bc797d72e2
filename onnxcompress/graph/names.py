"""One name, one value: what statistics, exclusions and reports need to speak of a value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

from onnxcompress.graph.scopes import scopes, subgraphs, values_of


class FreshNames:
    """Names that no value or node has in any scope of the given graphs and functions."""

    def __init__(self, *roots: ir.Graph | ir.Function) -> None:
        found = [scope for root in roots for scope in scopes(root)]
        self._taken = {v.name for scope in found for v in values_of(scope)}
        self._taken |= {node.name for scope in found for node in scope}
        self._copies: Counter[str] = Counter()

    def __call__(self, base: str) -> str:
        """`base` itself, or with a number behind it where it is taken; never the same twice."""
        name = base
        while name in self._taken:
            self._copies[base] += 1
            name = f"{base}_{self._copies[base]}"
        self._taken.add(name)
        return name


def make_unique(model: ir.Model) -> None:
    """Rename values inside subgraphs whose names occur elsewhere in the model.

    The main graph keeps every name, so the interface and its initializers do too. Subgraphs of
    operators of other domains are left alone, since some find their inputs by name; a function's
    values have a scope of their own. Linear in the number of values.
    """
    bodies = list(_standard_subgraphs(model.graph))
    if not bodies:
        return
    fresh = FreshNames(model.graph)
    seen = {v.name for v in values_of(model.graph)}
    for graph in bodies:
        for value in values_of(graph):
            if value.name and value.name in seen:
                value.name = fresh(value.name)
            seen.add(value.name)


def _standard_subgraphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    for node in graph:
        if node.domain != "" or not node.attributes.data:
            continue
        for inner in subgraphs(node):
            yield inner
            yield from _standard_subgraphs(inner)
