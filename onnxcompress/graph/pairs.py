"""Reads back the pairs that `insert_qdq` wrote and who needs them, and takes them out again.

A pair is held by the integer kernels that read it, and by the one before it if that cannot give
out floats. With none of them left on integers, it only costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import onnx_ir as ir

from onnxcompress.graph.names import FreshNames
from onnxcompress.graph.packed_weights import unpacked
from onnxcompress.graph.placement import absorbed_output
from onnxcompress.graph.quantized_weights import FLOAT, dequantizer_of
from onnxcompress.graph.scopes import nodes_within
from onnxcompress.operators import DEFAULT_DOMAINS, data_inputs, operator
from onnxcompress.targets import Target


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A value that goes on as integers, through moves, until a DequantizeLinear."""

    quantizer: ir.Node
    moves: tuple[ir.Node, ...]
    dequantizers: tuple[ir.Node, ...]
    maker: ir.Node | None
    """The integer kernel that gives it out and could not give floats, or not through a Relu."""
    readers: tuple[ir.Node, ...]
    """The integer kernels that read it."""

    @property
    def holders(self) -> tuple[ir.Node, ...]:
        """All that need it to be integers."""
        return self.readers if self.maker is None else (self.maker, *self.readers)

    @property
    def value(self) -> ir.Value:
        """The floats that are quantized."""
        floats = self.quantizer.inputs[0]
        assert floats is not None
        return floats

    @property
    def name(self) -> str:
        """What the value was called before it was quantized."""
        own = self.value.name or ""
        names = (d.outputs[0].name for d in self.dequantizers)
        return next((name for name in names if name and own.startswith(name)), own)


@dataclass(frozen=True, slots=True, eq=False)
class Integers:
    """What of a graph runs on integers, in graph order."""

    graph: ir.Graph
    kernels: tuple[ir.Node, ...]
    pairs: tuple[Pair, ...]

    @classmethod
    def of(cls, graph: ir.Graph, target: Target) -> Integers:
        """Read the graph and its bodies; pairs that something unknown reads are left out."""
        nodes = list(nodes_within(graph))
        kernels = {node: None for node in nodes if _runs_on_integers(node, target)}
        makers = {
            output: node
            for node in kernels
            if (output := absorbed_output(node, target)) is not node.outputs[0]
            or target.kernels[node.op_type].output == "integer"
        }
        pairs = (
            _pair(node, target, kernels, makers)
            for node in nodes
            if node.op_type == "QuantizeLinear" and node.domain in DEFAULT_DOMAINS
        )
        return cls(graph, tuple(kernels), tuple(p for p in pairs if p is not None))

    def return_to_float(self, kernels: Iterable[ir.Node], packed: Iterable[ir.Node] = ()) -> bool:
        """Give `kernels` back their weights, drop the pairs that nobody holds any more.

        Weights of those that are `packed` too stay integers, of which the runtime makes floats as
        it loads.

        Returns whether anything changed. Constants that nothing reads afterwards are left for
        `remove_unused`.
        """
        floats, stored = dict.fromkeys(kernels), set(packed)
        if not floats:
            return False
        weights = FloatWeights(self.graph)
        for kernel in floats:
            weights.restore(kernel, packed=kernel in stored)
        for pair in self.pairs:
            if pair.holders and all(holder in floats for holder in pair.holders):
                drop(pair)
            elif pair.maker is None or pair.maker in floats:
                _read_floats(pair, floats)
        return True


class FloatWeights:
    """Puts the floats that `insert_qdq` remembered in the place of integer constants."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._fresh = FreshNames(graph)
        self._made: dict[ir.Value, ir.Value] = {}
        self._unpacked: dict[ir.Value, ir.Value | None] = {}

    def restore(self, kernel: ir.Node, *, packed: bool = False) -> None:
        """Let the kernel read floats for each of its constants.

        Args:
            packed: those of its weight are made of the integers (`graph.packed_weights`), where
                that can be said in two operators.
        """
        for index, value in enumerate(kernel.inputs):
            codes = quantized_constant(value)
            if codes is not None and FLOAT in codes.meta:
                stays = packed and index == operator(kernel).weight
                floats = self._of_integers(value, codes) if stays else None
                kernel.replace_input_with(index, floats or self._float(codes))

    def _of_integers(self, value: ir.Value | None, codes: ir.Value) -> ir.Value | None:
        if codes not in self._unpacked:
            dequantizer = None if value is None else value.producer()
            assert dequantizer is not None
            self._unpacked[codes] = unpacked(dequantizer, self._graph, self._fresh)
        return self._unpacked[codes]

    def _float(self, codes: ir.Value) -> ir.Value:
        if codes not in self._made:
            tensor = cast(ir.TensorProtocol, codes.meta[FLOAT])
            name = self._fresh((codes.name or "weight").removesuffix("_quantized"))
            value = ir.val(name, const_value=tensor)
            self._graph.register_initializer(value)
            self._made[codes] = value
        return self._made[codes]


def drop(pair: Pair) -> None:
    """Let everything behind the pair read floats; its values get their names back."""
    floats = pair.value
    _replace_uses(pair.quantizer.outputs[0], floats)
    for move in pair.moves:
        for output in move.outputs:
            output.type = floats.type
        if move.op_type == "Pad" and len(move.inputs) > 2:
            move.replace_input_with(2, None)  # the zero_point: zero, which is the default
    for dequantizer in pair.dequantizers:
        source, restored = dequantizer.inputs[0], dequantizer.outputs[0]
        assert source is not None
        name = restored.name or ""
        if (source.name or "").startswith(name):
            restored.name = f"{name}_dropped"
            source.name = name
        graph = dequantizer.graph
        assert isinstance(graph, ir.Graph)
        if restored.is_graph_output():
            graph.outputs[:] = [source if v is restored else v for v in graph.outputs]
        _replace_uses(restored, source)
        graph.remove(dequantizer, safe=True)
    assert isinstance(pair.quantizer.graph, ir.Graph)
    pair.quantizer.graph.remove(pair.quantizer, safe=True)


def quantized_constant(value: ir.Value | None) -> ir.Value | None:
    """The integer initializer behind a DequantizeLinear; None where `value` is something else."""
    restore = dequantizer_of(value)
    codes = None if restore is None else restore.inputs[0]
    return codes if codes is not None and codes.is_initializer() else None


def has_floats(kernel: ir.Node) -> bool:
    """Whether the kernel reads integer constants and the floats of all of them are remembered."""
    return bool(_constants(kernel)) and is_restorable(kernel)


def is_restorable(kernel: ir.Node) -> bool:
    """Whether the floats of all of the kernel's constants, if it has any, are remembered."""
    return all(FLOAT in codes.meta for codes in _constants(kernel))


def _constants(kernel: ir.Node) -> list[ir.Value]:
    return [codes for v in kernel.inputs if (codes := quantized_constant(v)) is not None]


def _runs_on_integers(node: ir.Node, target: Target) -> bool:
    kernel = target.kernels.get(node.op_type) if node.domain in DEFAULT_DOMAINS else None
    if kernel is None:
        return False
    read = data_inputs(node)
    weight = operator(node).weight
    if weight is not None and weight < len(node.inputs) and node.inputs[weight] is not None:
        read = [*read, cast(ir.Value, node.inputs[weight])]
    if not read or not all(dequantizer_of(value) for value in read):
        return False
    users = (usage.node for usage in absorbed_output(node, target).uses())
    return kernel.output != "integer" or any(user.op_type == "QuantizeLinear" for user in users)


def _pair(
    quantizer: ir.Node,
    target: Target,
    kernels: dict[ir.Node, None],
    makers: dict[ir.Value, ir.Node],
) -> Pair | None:
    moves: list[ir.Node] = []
    dequantizers: list[ir.Node] = []
    queue = [quantizer.outputs[0]]
    for integers in queue:
        if integers.is_graph_output():
            return None
        for node, index in integers.uses():
            if node.op_type == "DequantizeLinear" and index == 0:
                dequantizers.append(node)
            elif node.op_type in target.moves and index == 0:
                moves.append(node)
                queue.extend(node.outputs)
            else:
                return None
    users = (usage.node for d in dequantizers for usage in d.outputs[0].uses())
    readers = dict.fromkeys(node for node in users if node in kernels)
    maker = makers.get(cast(ir.Value, quantizer.inputs[0]))
    return Pair(quantizer, tuple(moves), tuple(dequantizers), maker, tuple(readers))


def _read_floats(pair: Pair, kernels: dict[ir.Node, None]) -> None:
    """Let kernels that run on floats read what comes before a pair that others hold."""
    for dequantizer in pair.dequantizers:
        if dequantizer.inputs[0] is pair.quantizer.outputs[0]:
            for node, index in list(dequantizer.outputs[0].uses()):
                if node in kernels:
                    node.replace_input_with(index, pair.value)


def _replace_uses(value: ir.Value, by: ir.Value) -> None:
    for node, index in list(value.uses()):
        node.replace_input_with(index, by)
