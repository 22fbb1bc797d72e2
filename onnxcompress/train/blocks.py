"""Cuts a graph into blocks of layers that are reconstructed together.

A cut is where a single tensor carries all that layers have computed so far. What lies between two
cuts is a layer or a residual block, and some in a row are a chain, as long as what lies between
them computes value by value: behind a pool there is less to hold a layer against. Where there are
more layers between two cuts than are to be treated together, each is a block of its own.

Source: Li et al., BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction,
2021, who find blocks to be better than layers and than whole networks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

import onnx_ir as ir

from onnxcompress.graph.scopes import reads, subgraphs
from onnxcompress.operators import QUANTIZERS, Role, constant_tensor, operator

_CLOSE: Final = (Role.ACTIVATION, Role.ELEMENTWISE)
_RANDOM: Final = ("RandomNormal", "RandomUniform")


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Some layers and what lies between them and right behind, up to one value."""

    nodes: tuple[ir.Node, ...]
    output: ir.Value
    layers: tuple[ir.Node, ...]

    def inputs(self, constants: Collection[ir.Value]) -> list[ir.Value]:
        """What it reads of the graph around it, but for `constants`."""
        own = {value for node in self.nodes for value in node.outputs}
        read = dict.fromkeys(chain.from_iterable(reads(node) for node in self.nodes))
        return [v for v in read if v not in own and v not in constants]


def blocks(graph: ir.Graph, layers: Collection[ir.Node], most: int) -> list[Block]:
    """The layers in blocks of at most `most`, in the graph's order."""
    found: list[Block] = []
    row: list[_Part] = []
    for part in _parts(graph, layers):
        held = sum(len(p.layers) for p in row)
        if not (part.layers or part.linked) or held + len(part.layers) > most:
            found += _closed(row)
            row = []
        if len(part.layers) > most or (part.layers and part.output is None):
            found += map(alone, part.layers)
        elif part.layers or (row and part.output is not None):
            row.append(part)
    return [*found, *_closed(row)]


def alone(layer: ir.Node) -> Block:
    """One layer with the functions of single values behind it that nothing else reads."""
    nodes = [layer]
    while (following := _only_reader(nodes[-1].outputs[0])) is not None:
        nodes.append(following)
    return Block(tuple(nodes), nodes[-1].outputs[0], (layer,))


def constants_of(graph: ir.Graph) -> set[ir.Value]:
    """The values of a main graph that are the same on every run."""
    found = {v for v in graph.initializers.values() if constant_tensor(v) is not None}
    for node in graph:
        fixed = node.op_type not in _RANDOM and not any(subgraphs(node))
        if fixed and all(v is None or v in found for v in node.inputs):
            found.update(node.outputs)
    return found


@dataclass(slots=True, eq=False)
class _Part:
    """What lies between two cuts."""

    nodes: list[ir.Node] = field(default_factory=list[ir.Node])
    layers: list[ir.Node] = field(default_factory=list[ir.Node])
    output: ir.Value | None = None

    @property
    def close(self) -> bool:
        """Whether it belongs to the layer in front of it."""
        return not self.layers and all(map(_is_close, self.nodes))

    @property
    def linked(self) -> bool:
        """Whether a chain may go on behind it."""
        return all(_is_close(node) or node.op_type in QUANTIZERS for node in self.nodes)


def _parts(graph: ir.Graph, layers: Collection[ir.Node]) -> Iterator[_Part]:
    """What lies between cuts; the last has no output where it does not end in one value."""
    waiting = Counter(chain(graph.outputs, *(reads(node) for node in graph)))
    computed: set[ir.Value] = set()
    live: set[ir.Value] = set()
    part = _Part()
    for node in graph:
        read = [v for v in reads(node) if v in computed]
        if not read and node not in layers:
            continue
        waiting.subtract(read)
        live.difference_update([v for v in read if not waiting[v]])
        computed.update(node.outputs)
        live.update(v for v in node.outputs if waiting[v])
        part.nodes.append(node)
        if node in layers:
            part.layers.append(node)
        if len(live) == 1:
            (part.output,) = live
            yield part
            part = _Part()
    if part.nodes:
        yield part


def _closed(row: Sequence[_Part]) -> list[Block]:
    """The parts as one block, without what does not belong to its last layer."""
    size = max((i + 1 for i, part in enumerate(row) if part.layers), default=0)
    while 0 < size < len(row) and row[size].close:
        size += 1
    if not size:
        return []
    output = row[size - 1].output
    assert output is not None
    nodes = chain.from_iterable(part.nodes for part in row[:size])
    layers = chain.from_iterable(part.layers for part in row[:size])
    return [Block(tuple(nodes), output, tuple(layers))]


def _only_reader(value: ir.Value) -> ir.Node | None:
    """A function of single values that alone reads `value`."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    (usage,) = uses
    node = usage.node
    return node if node.graph is value.graph and _is_close(node) else None


def _is_close(node: ir.Node) -> bool:
    """Whether it computes each value from those at its place."""
    return operator(node).role in _CLOSE and node.op_type not in ("Softmax", "LogSoftmax", "Cast")
