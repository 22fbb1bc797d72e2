"""Remove what no output depends on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Final

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from onnxcompress.contract import Pass, Result
from onnxcompress.graph.scopes import nodes_within, subgraphs
from onnxcompress.operators import DEFAULT_DOMAINS

_OPTIONAL_FROM: Final = {
    "Dropout": 1,
    "GRU": 0,
    "LSTM": 0,
    "LayerNormalization": 1,
    "MaxPool": 1,
    "RNN": 0,
}
"""The first output that may be left out without another meaning of the rest.

Not BatchNormalization, which trains if it has them.
"""


@dataclass(frozen=True, kw_only=True)
class RemoveUnused(Pass):
    """Remove nodes, initializers, functions and optional outputs that no graph output needs.

    ```
    x ─┬─ Relu ─ y          x ─ Relu ─ y
       └─ Sqrt ─ ·     ⇒
    ```
    Graph inputs, outputs and opset imports stay, as do initializers that are also inputs. Goes
    into subgraphs and functions; what only a removed subgraph read is removed as well. A node
    without any output stays: it cannot be there for its value. Declines nothing.
    """

    name: ClassVar[str] = "remove_unused"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> Result:
        removed: Counter[str] = Counter()
        for graph in (model.graph, *model.functions.values()):
            _sweep(graph, removed)
        before = len(model.functions)
        RemoveUnusedFunctionsPass()(model)
        removed["functions"] += before - len(model.functions)
        return Result(model, modified=removed.total() > 0, figures=dict(removed))


def _sweep(graph: ir.Graph | ir.Function, removed: Counter[str]) -> None:
    """One walk from the outputs backwards: a node's readers are gone before it is looked at."""
    dead: list[ir.Node] = []
    for node in reversed(graph):
        if node.outputs and not any(_is_read(v) for v in node.outputs):
            _detach(node)
            dead.append(node)
            continue
        removed["outputs"] += _drop_outputs(node)
        for subgraph in subgraphs(node):
            _sweep(subgraph, removed)
    graph.remove(dead)
    removed["nodes"] += len(dead)
    if isinstance(graph, ir.Graph):
        unused = [v for v in graph.initializers.values() if not _is_read(v)]
        for value in unused:
            if not value.is_graph_input():
                del graph.initializers[value.name or ""]
                removed["initializers"] += 1


def _is_read(value: ir.Value) -> bool:
    return value.is_graph_output() or bool(value.uses())


def _detach(node: ir.Node) -> None:
    """Let go of all that the node reads, its subgraphs' captured values too."""
    for subgraph in subgraphs(node):
        for inner in nodes_within(subgraph):
            inner.resize_inputs(0)
    node.resize_inputs(0)


def _drop_outputs(node: ir.Node) -> int:
    """Leave out the optional outputs that nothing reads; how many there were."""
    first = _OPTIONAL_FROM.get(node.op_type)
    if first is None or node.domain not in DEFAULT_DOMAINS:
        return 0
    unread = [v for v in node.outputs[first:] if v.name and not _is_read(v)]
    for value in unread:
        value.name = ""
    size = len(node.outputs)
    while size and not node.outputs[size - 1].name:
        size -= 1
    node.resize_outputs(size)
    return len(unread)
