"""Fewer layers: blocks that a model can do without, found in the graph and chosen by trial."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import chain, pairwise, zip_longest

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.errors import InputError
from onnxcompress.graph.scopes import reads, values_of
from onnxcompress.operators import Role, constant_tensor, operator, weight_inputs
from onnxcompress.passes.remove_unused import RemoveUnused
from onnxcompress.session import Feed, Session


@dataclass(frozen=True, slots=True)
class Block:
    """What lies between two values of one shape; nothing else looks into it.

    entry ─ … ─ exit ─ rest     =>     entry ─ rest
    """

    entry: ir.Value
    exit: ir.Value
    nodes: tuple[ir.Node, ...]

    @property
    def name(self) -> str:
        """That of its first weighted node."""
        named = next(n for n in self.nodes if _is_weighted(n))
        return named.name or named.outputs[0].name or ""


@dataclass(frozen=True)
class Dropped:
    """A model without some blocks."""

    model: ir.Model
    blocks: tuple[str, ...]
    """Names of those dropped, in the order in which they went."""
    changes: tuple[float, ...]
    """Error of the outputs after each, in parts of their own power."""


def drop_layers(model: ir.Model, count: int, feeds: Sequence[Feed]) -> Dropped:
    """`model` without `count` blocks: each time the one whose absence changes outputs least.

    A block is a residual block (in a transformer, attention is one and the feed-forward part
    another) or a layer with weights by itself that gives what it takes, in shape. Unlike
    counting from the end, trying finds those that do little where they stand.

    Args:
        model: shapes inferred; not altered.
        feeds: a few batches to compare outputs on.

    Raises:
        InputError: if there are not so many blocks, or the model does not run on the feeds.

    Source: Sajjad et al., On the effect of dropping layers of pre-trained transformer models
    (2023), and Veit et al., Residual networks behave like ensembles (2016), by which few blocks
    of a residual network can be missed little.
    """
    wanted = _outputs(model, feeds)
    names: list[str] = []
    changes: list[float] = []
    for _ in range(count):
        tried = [
            (_change(without, wanted, feeds), i, block.name, without)
            for i, block in enumerate(_fitting(model, feeds))
            if (without := _without(model, block)) is not None
        ]
        if not tried:
            raise InputError(
                f"{len(names)} of {count} layers could be dropped: no other block has values of "
                "one shape before and behind it"
            )
        change, _, name, model = min(tried, key=lambda found: found[:2])
        names.append(name)
        changes.append(change)
    return Dropped(model, tuple(names), tuple(changes))


def blocks(graph: ir.Graph) -> list[Block]:
    """The blocks of the main graph that could each be dropped, in its order.

    Along each way from an input, the values that all of it passes through are the stations; a
    block reaches from a station before weights to the next such station.
    """
    order = _Order(graph)
    sizes = chain.from_iterable(v.shape for v in graph.inputs if v.shape is not None)
    names = {d.value for d in sizes if not isinstance(d, int)}
    found: dict[tuple[ir.Value, ir.Value], Block] = {}
    for value in graph.inputs:
        stations = list(order.stations(value))
        heavy = [
            (a, b) for a, b in pairwise(stations) if any(map(_is_weighted, order.between(a, b)))
        ]
        starts = [a for a, _ in heavy[1:]]
        for (entry, near), far in zip_longest(heavy, starts):
            ends = [end for end in (far, near) if end and _may_be_alike(entry, end, names)]
            block = next((b for end in ends if (b := order.block(entry, end))), None)
            if block is not None:
                found.setdefault((block.entry, block.exit), block)
    return list(found.values())


def _fitting(model: ir.Model, feeds: Sequence[Feed]) -> list[Block]:
    """The blocks whose ends turn out to be of one shape."""
    found = blocks(model.graph)
    if not found:
        return []
    ends = [v.name or "" for block in found for v in (block.entry, block.exit)]
    shapes = {
        name: array.shape for name, array in Session(model, outputs=ends).run(feeds[0]).items()
    }
    return [b for b in found if shapes[b.entry.name or ""] == shapes[b.exit.name or ""]]


class _Order:
    """The nodes of a graph by number, and where their ways meet again.

    Source: Cooper, Harvey, Kennedy, A simple, fast dominance algorithm (2001), of which one pass
    is enough without cycles.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.nodes = list(graph)
        self._number = {node: i for i, node in enumerate(self.nodes)}
        self._readers: dict[ir.Value, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for value in reads(node):
                self._readers.setdefault(value, []).append(i)
        self._end = len(self.nodes)
        self._next = [self._end] * (self._end + 1)
        for i in reversed(range(self._end)):
            self._next[i] = self._meeting(self.nodes[i].outputs)

    def _meeting(self, values: Sequence[ir.Value]) -> int:
        """The first node that all ways from these values to the outputs pass."""
        if any(v.is_graph_output() for v in values):
            return self._end
        found: int | None = None
        for reader in chain.from_iterable(self._readers.get(v, ()) for v in values):
            if not _is_shape(self.nodes[reader]):
                found = reader if found is None else self._common(found, reader)
        return self._end if found is None else found

    def _common(self, a: int, b: int) -> int:
        while a != b:
            a, b = (self._next[a], b) if a < b else (a, self._next[b])
        return a

    def stations(self, value: ir.Value) -> Iterator[ir.Value]:
        """The values that all ways from `value` pass, in order."""
        yield value
        at = self._meeting([value])
        while at != self._end:
            used = [v for v in self.nodes[at].outputs if v in self._readers or v.is_graph_output()]
            if len(used) == 1:
                yield used[0]
            at = self._next[at]

    def between(self, entry: ir.Value, end: ir.Value) -> list[ir.Node]:
        """The nodes on the ways from one value to another."""
        start, last = entry.producer(), end.producer()
        assert last is not None
        first = 0 if start is None else self._number[start] + 1
        some = self.nodes[first : self._number[last] + 1]
        reached, leading = {entry}, {end}
        forward = list[ir.Node]()
        for node in some:
            if not reached.isdisjoint(reads(node)):
                forward.append(node)
                reached.update(node.outputs)
        found = list[ir.Node]()
        for node in reversed(forward):
            if not leading.isdisjoint(node.outputs):
                found.append(node)
                leading.update(reads(node))
        return found[::-1]

    def block(self, entry: ir.Value, end: ir.Value) -> Block | None:
        """The block between two stations; None where something else reads what is in it."""
        nodes = self.between(entry, end)
        inside = {self._number[node] for node in nodes}
        for value in chain.from_iterable(node.outputs for node in nodes):
            if value.is_graph_output():
                return None
            if value is not end and not inside.issuperset(self._readers.get(value, ())):
                return None
        return Block(entry, end, tuple(nodes))


def _is_shape(node: ir.Node) -> bool:
    """Whether it looks at sizes only, so that what it gives is no way of the data."""
    return node.op_type in ("Shape", "Size")


def _is_weighted(node: ir.Node) -> bool:
    weighted = operator(node).role is Role.CONTRACT
    return weighted and any(constant_tensor(v) is not None for v in weight_inputs(node))


def _may_be_alike(a: ir.Value, b: ir.Value, names: AbstractSet[str | None]) -> bool:
    """Whether two values may be of one type and shape; sizes that have no name may be any."""
    if a.dtype is None or a.dtype is not b.dtype or a.shape is None or b.shape is None:
        return False
    if len(a.shape) != len(b.shape):
        return False
    pairs = [(_size(x, names), _size(y, names)) for x, y in zip(a.shape, b.shape, strict=True)]
    return all(x is None or y is None or x == y for x, y in pairs)


def _size(dim: int | ir.SymbolicDim, names: AbstractSet[str | None]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    return dim.value if dim.value in names else None


def _without(model: ir.Model, block: Block) -> ir.Model | None:
    copy = model.clone()
    entry, exit_ = block.entry.name, block.exit.name
    values = {v.name: v for v in values_of(copy.graph)}
    values[exit_].replace_all_uses_with(values[entry])
    RemoveUnused().call(copy)
    return copy


def _outputs(model: ir.Model, feeds: Sequence[Feed]) -> list[dict[str, Array]]:
    session = Session(model)
    return [
        {name: array for name, array in session.run(feed).items() if array.dtype.kind == "f"}
        for feed in feeds
    ]


def _change(model: ir.Model, wanted: Sequence[dict[str, Array]], feeds: Sequence[Feed]) -> float:
    """The worst output's squared error in parts of its power."""
    found = _outputs(model, feeds)
    shares = [0.0]
    for name in wanted[0] if wanted else ():
        pairs = [
            (w[name].astype(float), f[name].astype(float))
            for w, f in zip(wanted, found, strict=True)
        ]
        error = sum(float(np.square(w - f).sum()) for w, f in pairs)
        shares.append(error / max(sum(float(np.square(w).sum()) for w, _ in pairs), 1e-30))
    return max(shares)
