"""Values inside the bodies of If, Loop and Scan, made visible from the main graph.

What a body computes is computed anew at each visit, or not at all. On a copy of the model, a
sequence runs through the control flow beside the data, and each visit appends what it computed::

    y = If(c) <then: y = Neg(h)>      s, y = If(c) <then: y = Neg(h); s = SequenceInsert(s, h)
              <else: y = x>                        <else: y = x;      s = s>

A Loop carries the sequence from one iteration to the next. A Scan carries tensors only, so what it
computed leaves it as a scan output, stacked over the iterations. Sequences keep every visit apart,
with a shape of its own, and all of them in memory until the run ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, Final, cast

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.graph.inference import infer
from onnxcompress.graph.names import FreshNames
from onnxcompress.graph.scopes import nodes_within, subgraphs, values_of
from onnxcompress.operators import DEFAULT_DOMAINS

Path = Sequence[tuple[ir.Node, ir.Graph]]
"""The control flow around a value, outermost first: each node, and the body of it to enter."""

_KNOWN: Final = frozenset({"If", "Loop", "Scan"})
_FIRST_OPSET: Final = 13
"""In which Loop and If let sequences through."""
_LISTED: Final = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BOOL}
    | {ir.DataType[f"{sign}INT{bits}"] for sign in ("", "U") for bits in (8, 16, 32, 64)}
)
"""Tensors that a sequence may hold."""


@dataclass(frozen=True, slots=True)
class Exposed:
    """A model whose main graph has values that were inside bodies, under their own names."""

    model: ir.Model
    depths: Mapping[str, int] = field(default_factory=dict[str, int])
    """How many axes in front each such value gained by Scans around it."""
    reasons: Mapping[str, str] = field(default_factory=dict[str, str])
    """Why the others could not be brought out."""

    def visits(self, found: Mapping[str, Any]) -> dict[str, list[Any]]:
        """What a run of the model gave for each name, one entry for each time it was computed."""
        return {name: visits(value, self.depths.get(name)) for name, value in found.items()}


def visits(found: Any, depth: int | None) -> list[Any]:
    """One value as it was at each visit of its body; `depth` is None outside of bodies."""
    if depth is None:
        return [found]
    arrays = cast(list[Array], found if isinstance(found, list) else [found])
    for _ in range(depth):
        arrays = [np.asarray(part) for array in arrays for part in array]
    return arrays


def inner_values(graph: ir.Graph) -> dict[str, list[ir.Value]]:
    """The values inside the bodies of `graph` by name, of which there should be one each."""
    found: dict[str, list[ir.Value]] = {}
    for value in chain.from_iterable(values_of(body) for body in graph.subgraphs()):
        if value.name:
            found.setdefault(value.name, []).append(value)
    return found


def expose(model: ir.Model, names: Iterable[str]) -> Exposed:
    """A copy of `model` that computes the same and gives out those of `names` inside bodies.

    Args:
        model: not altered, and given back as it is where no name is inside a body.
        names: of any values; those of the main graph are visible already.
    """
    outside = {value.name for value in values_of(model.graph)}
    inner = inner_values(model.graph)
    wanted = [name for name in dict.fromkeys(names) if name in inner and name not in outside]
    if not wanted:
        return Exposed(model)
    model = model.clone()
    if any(value.dtype is None for name in wanted for value in inner[name]):
        infer(model)
    return _Exposure(model).run(wanted)


class _Exposure:
    """Rewrites one copy of a model."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graph = model.graph
        self.fresh = FreshNames(model.graph)
        self.values = inner_values(model.graph)
        self.owners = {body: node for node in nodes_within(model.graph) for body in subgraphs(node)}

    def run(self, names: Sequence[str]) -> Exposed:
        depths: dict[str, int] = {}
        reasons: dict[str, str] = {}
        for name in names:
            reason = self._obstacle(self.values[name])
            if reason:
                reasons[name] = reason
            else:
                depths[name] = self._expose(name)
        return Exposed(self.model, depths, reasons)

    def _obstacle(self, found: Sequence[ir.Value]) -> str:
        """Why the value cannot be brought out; empty where it can."""
        if len(found) > 1:
            return "several values inside bodies have this name: load the model from its file"
        (value,) = found
        path = self._path(value)
        for node, _ in path:
            if node.op_type not in _KNOWN or node.domain not in DEFAULT_DOMAINS:
                return f"it is inside a body of {node.op_type}, which is unknown"
        scans = [node.op_type == "Scan" for node, _ in path]
        if any(outer and not inner for outer, inner in pairwise(scans)):
            return "it is inside an If or Loop within a Scan, which gives out tensors only"
        if not all(
            _keeps_shape(value, body, self.graph)
            for (_, body), is_scan in zip(path, scans, strict=True)
            if is_scan
        ):
            return "its shape may change from one iteration of the Scan around it to the next"
        if not isinstance(value.type, ir.TensorType) or value.dtype not in _LISTED:
            return "it is inside a body and not a tensor of known type that a sequence may hold"
        if not all(scans) and self.graph.opset_imports.get("", 0) < _FIRST_OPSET:
            return f"bodies let sequences out from opset {_FIRST_OPSET} on: raise the opset"
        return ""

    def _path(self, value: ir.Value) -> Path:
        path: list[tuple[ir.Node, ir.Graph]] = []
        body = value.graph
        while isinstance(body, ir.Graph) and body is not self.graph:
            path.append((self.owners[body], body))
            body = self.owners[body].graph
        return path[::-1]

    def _expose(self, name: str) -> int:
        """Bring one value out to the main graph; returns the axes that Scans put in front."""
        (value,) = self.values[name]
        path, depth = [*self._path(value)], 0
        while path and path[-1][0].op_type == "Scan":
            value, depth = self._scanned(*path.pop(), value), depth + 1
        if path:
            assert value.dtype is not None
            empty = ir.node("SequenceEmpty", [], {"dtype": value.dtype.value})
            self.graph.insert_before(self.graph[0], empty)
            value = self._threaded(self._sequence(empty.outputs[0], value), path, value)
        (inside,) = self.values[name]
        inside.name, value.name = self.fresh(name), name
        return depth

    def _scanned(self, scan: ir.Node, body: ir.Graph, value: ir.Value) -> ir.Value:
        """The output of `scan` that holds `value` of all iterations."""
        body.outputs.append(self._append(body, "Identity", [value], value))
        for name in ("scan_output_axes", "scan_output_directions"):
            if name in scan.attributes:
                given = scan.attributes[name].as_ints()
                scan.attributes[name] = ir.AttrInt64s(name, [*given, 0])
        scan.resize_outputs(len(scan.outputs) + 1)
        stacked = scan.outputs[-1]
        stacked.type, stacked.name = value.type, self.fresh(f"{value.name}_scanned")
        return stacked

    def _threaded(self, sequence: ir.Value, path: Path, value: ir.Value) -> ir.Value:
        """`sequence`, of the graph at which `path` begins, with `value` of each visit appended."""
        if not path:
            body = value.graph
            assert isinstance(body, ir.Graph)
            grown = self._append(body, "SequenceInsert", [sequence, value])
            return self._sequence(grown, value)
        (node, body), *rest = path
        if node.op_type == "If":
            body.outputs.append(self._threaded(sequence, rest, value))
            for other in subgraphs(node):
                if other is not body:
                    other.outputs.append(self._unchanged(other, sequence, value))
            return self._sequence(self._new_output(node, len(node.outputs)), value)
        carried = len(body.inputs) - 2
        entering = self._sequence(ir.Value(), value)
        body.inputs.append(entering)
        node.resize_inputs(carried + 3)
        node.replace_input_with(carried + 2, sequence)
        body.outputs.insert(carried + 1, self._threaded(entering, rest, value))
        return self._sequence(self._new_output(node, carried), value)

    def _unchanged(self, body: ir.Graph, sequence: ir.Value, value: ir.Value) -> ir.Value:
        """`sequence` as a value of `body`. Identity takes sequences only from opset 14 on."""
        assert value.dtype is not None
        nothing = ir.tensor(np.empty(0, value.dtype.numpy()))
        constant = ir.node("Constant", [], {"value": nothing})
        body.append(constant)
        constant.outputs[0].name = self.fresh(f"{value.name}_nothing")
        grown = self._append(body, "SequenceInsert", [sequence, constant.outputs[0]])
        shrunk = self._append(body, "SequenceErase", [self._sequence(grown, value)])
        return self._sequence(shrunk, value)

    def _new_output(self, node: ir.Node, index: int) -> ir.Value:
        """A new output of `node` at `index`; those from there on move up by one."""
        node.resize_outputs(len(node.outputs) + 1)
        for last in range(len(node.outputs) - 1, index, -1):
            old, new = node.outputs[last - 1], node.outputs[last]
            new.type, new.shape, name = old.type, old.shape, old.name
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            old.name, new.name = None, name
            if name in self.values:
                self.values[name] = [new if v is old else v for v in self.values[name]]
        return node.outputs[index]

    def _append(
        self, body: ir.Graph, op_type: str, inputs: list[ir.Value], like: ir.Value | None = None
    ) -> ir.Value:
        """The output of a new node at the end of `body`."""
        node = ir.node(op_type, inputs)
        body.append(node)
        output = node.outputs[0]
        output.name = self.fresh(f"{inputs[-1].name}_{op_type}")
        if like is not None:
            output.type, output.shape = like.type, like.shape
        return output

    def _sequence(self, sequence: ir.Value, value: ir.Value) -> ir.Value:
        """`sequence`, with a name and the type of a list of tensors like `value`."""
        assert value.dtype is not None
        sequence.type = ir.SequenceType(ir.TensorType(value.dtype))
        sequence.shape = None
        sequence.name = sequence.name or self.fresh(f"{value.name}_visits")
        return sequence


def _keeps_shape(value: ir.Value, body: ir.Graph, graph: ir.Graph) -> bool:
    """Whether each dimension is a number or one of what enters the body or the model."""
    if value.shape is None:
        return False
    entering = chain(body.inputs, graph.inputs)
    fixed = {d.value for v in entering if v.shape is not None for d in _symbols(v.shape)}
    return all(d.value is not None and d.value in fixed for d in _symbols(value.shape))


def _symbols(shape: ir.Shape) -> Iterator[ir.SymbolicDim]:
    return (d for d in shape if isinstance(d, ir.SymbolicDim))
