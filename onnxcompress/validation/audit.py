"""How much of a model's arithmetic really runs on integers, by ONNX Runtime's own graph.

What was meant as an integer kernel is one only if the runtime fused it: its optimized graph is
read back and held against the model node by node.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from onnxcompress.contract import Skip
from onnxcompress.graph.names import FreshNames
from onnxcompress.operators import DEFAULT_DOMAINS, Role, int_attribute, operator
from onnxcompress.session import Feed, Session, optimized_model

Shape = tuple[int, ...]

_INTEGER_KERNELS: Final = frozenset(
    {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger"}
    | {"ConvInteger", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
)
_ALWAYS: Final = frozenset({"MatMulInteger", "ConvInteger", "DynamicQuantizeLSTM"})
"""Integer kernels by what the model itself says, whatever they are fused with."""
_RECURRENT: Final = frozenset({"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"})
_TOKEN: Final = re.compile(r"_token_\d+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Multiplications of one run of a model, and what became of its pairs."""

    macs: int
    """Multiply-accumulates of one sample's run, in the main graph."""
    integer_macs: int
    """Those of them that kernels compute on integers."""
    unfused: tuple[Skip, ...] = ()
    """Operators between pairs that the runtime still computes in float: the pairs only cost."""

    @property
    def share(self) -> float:
        """The part of the arithmetic that runs on integers, from 0 to 1."""
        return self.integer_macs / self.macs if self.macs else 0.0


def audit(model: ir.Model, feed: Feed) -> Audit:
    """Read back what ONNX Runtime makes of `model` on this machine.

    Args:
        model: not altered.
        feed: one run's inputs, whose shapes the arithmetic is counted for.

    Raises:
        InputError: if ONNX Runtime refuses the model or the feed.
    """
    model = model.clone()
    fresh = FreshNames(model.graph)
    contractions = [node for node in model.graph if _contracts(node)]
    for node in contractions:
        node.name = node.name or fresh(f"{node.op_type}_of_{node.outputs[0].name}")
    fused = {
        _TOKEN.sub("", node.name or "")
        for node in optimized_model(model).graph
        if node.op_type in _INTEGER_KERNELS
    }
    macs = _macs(model, contractions, feed)
    integer = [n for n in contractions if n.op_type in _ALWAYS or n.name in fused]
    unfused = [n for n in contractions if n not in integer and _is_between_pairs(n)]
    return Audit(
        macs=sum(macs.values()),
        integer_macs=sum(macs[node] for node in integer),
        unfused=tuple(
            Skip(n.name or "", n.op_type, "the runtime did not fuse it") for n in unfused
        ),
    )


def _contracts(node: ir.Node) -> bool:
    if node.op_type in _ALWAYS:
        return True
    return node.domain in DEFAULT_DOMAINS and operator(node).role is Role.CONTRACT


def _is_between_pairs(node: ir.Node) -> bool:
    """Whether the node reads a weight and data that were integers."""
    read = [v.producer() for v in node.inputs[:2] if v is not None]
    return all(p is not None and p.op_type == "DequantizeLinear" for p in read)


def _macs(model: ir.Model, nodes: Iterable[ir.Node], feed: Feed) -> Mapping[ir.Node, int]:
    """Multiply-accumulates of each node, by the shapes that one run shows."""
    nodes = list(nodes)
    values = {v.name: v for n in nodes for v in (*n.inputs[:3], n.outputs[0]) if v and v.name}
    known = {name: v.const_value for name, v in values.items() if v.const_value is not None}
    shapes: dict[str, Shape] = {name: tuple(t.shape.numpy()) for name, t in known.items()}
    if wanted := [name for name in values if name not in shapes]:
        session = Session(model, outputs=wanted, optimization="none", prepack=False, frugal=True)
        shapes |= {name: array.shape for name, array in session.run(feed).items()}
    return {node: _macs_of(node, shapes) for node in nodes}


def _macs_of(node: ir.Node, found: Mapping[str, Shape]) -> int:
    shapes: list[Shape] = [
        found[v.name] if v is not None and v.name else () for v in node.inputs[:3]
    ]
    output = found.get(node.outputs[0].name or "", ())  # a cell may give its last state only
    if node.op_type in _RECURRENT:
        steps, batch = shapes[0][:2]
        return steps * batch * (math.prod(shapes[1]) + math.prod(shapes[2]))
    if node.op_type in ("Conv", "ConvInteger"):
        return math.prod(output) * math.prod(shapes[1][1:])
    if node.op_type == "ConvTranspose":
        return math.prod(shapes[0]) * math.prod(shapes[1][1:])
    if node.op_type == "Gemm":
        return math.prod(output) * shapes[0][0 if int_attribute(node, "transA", 0) else 1]
    return math.prod(output) * math.prod(shapes[0][-1:])
