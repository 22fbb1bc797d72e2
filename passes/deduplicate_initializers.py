"""Store equal initializers once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import onnx_ir as ir

from onnxcompress.contract import Pass, Result, Skip
from onnxcompress.graph.scopes import Names, subgraphs

_PROBE: Final = 256
_HOISTED: Final = 1024

_Scopes = dict[ir.Graph, "ir.Graph | None"]
"""Graphs from the outside in, each with the graph around it."""


@dataclass(frozen=True, kw_only=True)
class DeduplicateInitializers(Pass):
    """Make one initializer of all that have the same type, shape and bytes.

    ```
    a = [1, 2]   b = [1, 2]              a = [1, 2]
    Add(x, a)    Mul(y, b)       ⇒       Add(x, a)    Mul(y, a)
    ```
    A shared weight is harder to change, so this comes last among the exact passes. Bytes are read
    of initializers that agree in type and shape only, and beyond a few elements at both ends only
    of those that agree there too; a tensor in a file is streamed. A subgraph's initializer gives
    way to an equal one of a graph around it; equal ones of separate subgraphs move into the graph
    around both, unless they are small.

    Graph inputs (which the caller may override) and graph outputs are left alone, as are strings
    and tensors that are computed on demand. Skipped: an initializer whose readers would find
    another value under the name that stays.
    """

    name: ClassVar[str] = "deduplicate_initializers"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> Result:
        merged: list[int] = []
        skips: list[Skip] = []
        for root in (model.graph, *model.functions.values()):
            _merge(root, merged, skips, hoist=(model.ir_version or 4) >= 4)
        figures = {"merged": len(merged), "bytes_saved": sum(merged)}
        return Result(model, modified=bool(merged), skips=tuple(skips), figures=figures)


def _merge(
    root: ir.Graph | ir.Function, merged: list[int], skips: list[Skip], *, hoist: bool
) -> None:
    scopes = dict(_scopes(root, None))
    values = [v for graph in scopes for v in graph.initializers.values() if _is_private(v)]
    names: Names | None = None
    for equal in _equal(values):
        names = names or Names(root)
        if hoist and names.unique(equal[0].name):
            _hoist(equal, scopes)
        kept: dict[ir.Graph | None, ir.Value] = {}
        for value in equal:
            stays = next((kept[g] for g in _outward(value.graph, scopes) if g in kept), None)
            if stays is None:
                kept[value.graph] = value
            elif names.reach(stays.name, stays.graph, value):
                merged.append(_replace(value, stays))
            else:
                skips.append(Skip(value.name or "", "initializer", "a subgraph hides its equal"))


def _hoist(equal: list[ir.Value], scopes: _Scopes) -> None:
    """Move the first of the equal initializers to where all of their readers see it."""
    first = equal[0]
    graph, tensor = first.graph, first.const_value
    assert graph is not None and tensor is not None
    around = list(_outward(graph, scopes))
    for other in dict.fromkeys(v.graph for v in equal):
        seen = set(_outward(other, scopes))
        around = [g for g in around if g in seen]
    if around and around[0] is not graph and tensor.nbytes >= _HOISTED:
        del graph.initializers[first.name or ""]
        around[0].register_initializer(first)


def _outward(graph: ir.Graph | None, scopes: _Scopes) -> Iterator[ir.Graph]:
    """`graph` and the graphs around it."""
    while graph is not None:
        yield graph
        graph = scopes[graph]


def _scopes(
    graph: ir.Graph | ir.Function, outer: ir.Graph | None
) -> Iterator[tuple[ir.Graph, ir.Graph | None]]:
    inside = graph if isinstance(graph, ir.Graph) else None  # a function has no initializers
    if inside is not None:
        yield inside, outer
    for node in graph:
        for subgraph in subgraphs(node):
            yield from _scopes(subgraph, inside)


def _is_private(value: ir.Value) -> bool:
    """Whether nobody outside the model can tell this initializer from an equal one."""
    tensor = value.const_value
    if tensor is None or tensor.dtype == ir.DataType.STRING or type(tensor) is ir.LazyTensor:
        return False
    return not value.is_graph_input() and not value.is_graph_output()


def _equal(values: Iterable[ir.Value]) -> list[list[ir.Value]]:
    """Sets of initializers that are equal, in order; told apart as cheaply as can be."""
    groups = [list(values)]
    for key in (_kind, _ends, _digest):
        groups = [g for group in groups for g in _split(group, key) if len(g) > 1]
    return groups


def _split(
    values: Iterable[ir.Value], key: Callable[[ir.TensorProtocol], Hashable]
) -> Iterable[list[ir.Value]]:
    groups: dict[Hashable, list[ir.Value]] = {}
    for value in values:
        assert value.const_value is not None
        groups.setdefault(key(value.const_value), []).append(value)
    return groups.values()


def _kind(tensor: ir.TensorProtocol) -> Hashable:
    return tensor.dtype, tuple(tensor.shape.numpy())


def _ends(tensor: ir.TensorProtocol) -> Hashable:
    if tensor.dtype.bitwidth < 8:
        return None  # reading an element would unpack them all
    flat = tensor.numpy().flat
    return flat[:_PROBE].tobytes(), flat[-_PROBE:].tobytes()


def _digest(tensor: ir.TensorProtocol) -> Hashable:
    sink = _Digest()
    stream: Any = tensor  # every tensor of onnx_ir has `tofile`; its protocol leaves it out
    stream.tofile(sink)
    return sink.hash.digest()


class _Digest:
    """A file that keeps the hash of what is written to it."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(data)


def _replace(value: ir.Value, stays: ir.Value) -> int:
    """Let `stays` serve the readers of `value`; the bytes that this saves."""
    graph, tensor = value.graph, value.const_value
    assert graph is not None and tensor is not None
    value.replace_all_uses_with(stays)
    del graph.initializers[value.name or ""]
    return tensor.nbytes
