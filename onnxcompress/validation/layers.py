"""Where the error enters: signal to noise at every tensor that two models have in common.

Both models run without ONNX Runtime's own optimizations and give out the tensors of equal name
(or paired by a mapping). The noise found at a tensor, less the noise of the worst tensor that it
is computed from, is what its layer added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.graph.bodies import expose
from onnxcompress.graph.scopes import subgraphs
from onnxcompress.numerics.decisions import is_float
from onnxcompress.numerics.fidelity import Fidelity, decibel
from onnxcompress.operators import Role, operator
from onnxcompress.session import Feed, Session

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, None}
_SOURCES = {"Constant", "ConstantOfShape", "Shape", "Size"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The error at one tensor of the original and what its node added to it."""

    tensor: str
    node: str
    op: str
    sqnr: float
    """Of the tensor, in dB: the error gathered on the way here. Infinite where exact."""
    upstream: float
    """SQNR in dB of the worst tensor it is computed from; infinite at the model's inputs."""
    added: float
    """Noise power that enters here, as a share of the tensor's signal power (0.01 is 20 dB)."""


class LayerTaps:
    """Runs both models with their common tensors given out, and accumulates the error at each.

    One feed's worth of those tensors of both models is in memory at a time; inside bodies of If,
    Loop and Scan a tensor is compared at each visit. Tensors that an operator only moved are left
    out.

    Args:
        original: the float model.
        candidate: what was made of it.
        names: the candidate's name of a tensor by the original's, where they differ.
        threads: as for `Session`.
    """

    def __init__(
        self,
        original: ir.Model,
        candidate: ir.Model,
        names: Mapping[str, str],
        *,
        threads: int = 0,
    ) -> None:
        self._graph = original.graph
        self._pairs = common_tensors(original, candidate, names)
        self._errors: dict[str, Fidelity] = {}
        sides = [expose(original, self._pairs), expose(candidate, self._pairs.values())]
        hidden = [set(side.reasons) for side in sides]
        self._pairs = {
            a: b for a, b in self._pairs.items() if a not in hidden[0] and b not in hidden[1]
        }
        taps = self._pairs.keys(), dict.fromkeys(self._pairs.values())
        self._sides = [
            (_session(side.model, list(names), threads), side)
            for side, names in zip(sides, taps, strict=True)
            if names
        ]

    def update(self, feed: Feed) -> None:
        """Run one feed through both models."""
        if not self._pairs:
            return
        expected, found = (side.visits(session.run(feed)) for session, side in self._sides)
        for name, other in self._pairs.items():
            if len(expected[name]) != len(found[other]):
                continue  # control flow that depends on the data took another way
            for a, b in zip(expected[name], found[other], strict=True):
                if _comparable(a, b):
                    self._errors.setdefault(name, Fidelity()).update(a, b)

    def sqnr(self, tensor: str) -> float | None:
        """SQNR in dB at a tensor of the original; None where it was not compared."""
        error = self._errors.get(tensor)
        return None if error is None else error.sqnr

    def layers(self) -> tuple[Layer, ...]:
        """What was found so far, in graph order, a body's before those of the node it is in.

        Noise flows from a node's inputs to its outputs, and through its bodies: where a tensor
        was not compared, what flowed in stands for it.
        """
        return tuple(self._layers(self._graph, {}))

    def _layers(self, graph: ir.Graph, noise: dict[ir.Value | None, float]) -> Iterator[Layer]:
        for node in graph:
            upstream = max((noise.get(v, 0.0) for v in node.inputs), default=0.0)
            for body in subgraphs(node):
                noise |= dict.fromkeys(body.inputs, upstream)
                yield from self._layers(body, noise)
            given = (noise.get(v, 0.0) for body in subgraphs(node) for v in body.outputs)
            upstream = max((upstream, *given))
            for value in node.outputs:
                error = self._errors.get(value.name or "")
                noise[value] = upstream if error is None else error.noise_to_signal
                if error is not None:
                    yield _layer(value, node, error.noise_to_signal, upstream)


def _session(model: ir.Model, taps: list[str], threads: int) -> Session:
    return Session(
        model, outputs=taps, optimization="none", threads=threads, prepack=False, spinning=False
    )


def common_tensors(
    original: ir.Model, candidate: ir.Model, names: Mapping[str, str]
) -> dict[str, str]:
    """The candidate's tensor for each tensor of the original that can be compared, in graph order.

    Args:
        names: the candidate's name by the original's, where they differ.
    """
    computed = {
        v.name: as_consumed(v).name or ""
        for node in candidate.graph.all_nodes()
        for v in node.outputs
        if v.dtype in _FLOATS
    }
    return {
        value.name: computed[other]
        for node in original.graph.all_nodes()
        if operator(node).role is not Role.MOVE and node.op_type not in _SOURCES
        for value in node.outputs
        if value.name and value.dtype in _FLOATS
        if (other := names.get(value.name, value.name)) in computed
    }


def as_consumed(value: ir.Value) -> ir.Value:
    """What stands for `value` further on: what it was quantized to, if nothing takes it as it is.

    A clipping that quantization took over (ReLU folded into the range) is done only there.
    """
    for op in ("QuantizeLinear", "DequantizeLinear"):
        users = {node for node, index in value.uses() if index == 0}
        if value.is_graph_output() or not users or any(n.op_type != op for n in users):
            return value
        value = min(users, key=lambda n: n.outputs[0].name or "").outputs[0]
    return value


def _comparable(a: object, b: object) -> bool:
    """An untyped tap may turn out to be anything: a sequence, integers, another shape."""
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return False
    x, y = cast(Array, a), cast(Array, b)
    return x.shape == y.shape and is_float(x) and is_float(y)


def _layer(value: ir.Value, node: ir.Node, noise: float, upstream: float) -> Layer:
    return Layer(
        tensor=value.name or "",
        node=node.name or "",
        op=node.op_type,
        sqnr=decibel(noise),
        upstream=decibel(upstream),
        added=max(0.0, noise - upstream),
    )
