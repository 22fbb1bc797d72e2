"""How much of a model's arithmetic really runs on integers, by ONNX Runtime's own graph.

What was meant as an integer kernel is one only if the runtime fused it: its optimized graph is
read back and held against the model node by node.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from onnxcompress.contract import Skip
from onnxcompress.graph.arithmetic import INTEGERS, Shape, contracts, multiply_accumulates
from onnxcompress.graph.names import FreshNames
from onnxcompress.session import Feed, Session, optimized_model
from onnxcompress.targets import Target

_INTEGER_KERNELS: Final = frozenset(
    {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger"}
    | {"ConvInteger", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
)
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
    promised: str = ""
    """The target whose table says so, where the runtime itself could not be asked; else empty."""

    @property
    def share(self) -> float:
        """The part of the arithmetic that runs on integers, from 0 to 1."""
        return self.integer_macs / self.macs if self.macs else 0.0


def audit(model: ir.Model, feed: Feed, target: Target | None = None) -> Audit:
    """Read back what ONNX Runtime makes of `model` on this machine.

    Args:
        model: not altered.
        feed: one run's inputs, whose shapes the arithmetic is counted for.
        target: the runtime that the model is for. Where this machine has another, what its table
            promises for operators between pairs stands in for what was fused.

    Raises:
        InputError: if ONNX Runtime refuses the model or the feed.
    """
    model = model.clone()
    fresh = FreshNames(model.graph)
    contractions = [node for node in model.graph if contracts(node)]
    for node in contractions:
        node.name = node.name or fresh(f"{node.op_type}_of_{node.outputs[0].name}")
    promised = "" if target is None or target.measurable else target.name
    fused = _table_says(contractions, target) if target and promised else _fused(model)
    reason = f"{promised} has no kernel for it" if promised else "the runtime did not fuse it"
    macs = multiplications(model, contractions, feed)
    integer = [n for n in contractions if n.op_type in INTEGERS or n.name in fused]
    unfused = [n for n in contractions if n not in integer and _is_between_pairs(n)]
    return Audit(
        macs=sum(macs.values()),
        integer_macs=sum(macs[node] for node in integer),
        unfused=tuple(Skip(n.name or "", n.op_type, reason) for n in unfused),
        promised=promised,
    )


def _fused(model: ir.Model) -> set[str]:
    """Names of the nodes that ONNX Runtime computes on integers here."""
    nodes = optimized_model(model).graph
    return {_TOKEN.sub("", n.name or "") for n in nodes if n.op_type in _INTEGER_KERNELS}


def _table_says(nodes: Iterable[ir.Node], target: Target) -> set[str]:
    """Names of those of `nodes` that the target computes on integers by its table."""
    return {n.name or "" for n in nodes if n.op_type in target.kernels and _is_between_pairs(n)}


def _is_between_pairs(node: ir.Node) -> bool:
    """Whether the node reads a weight and data that were integers."""
    read = [v.producer() for v in node.inputs[:2] if v is not None]
    return all(p is not None and p.op_type == "DequantizeLinear" for p in read)


def multiplications(model: ir.Model, nodes: Iterable[ir.Node], feed: Feed) -> Mapping[ir.Node, int]:
    """Multiply-accumulates of each of the model's `nodes`, by the shapes that one run shows.

    Raises:
        InputError: if ONNX Runtime refuses the model or the feed.
    """
    nodes = list(nodes)
    values = {v.name: v for n in nodes for v in (*n.inputs[:3], n.outputs[0]) if v and v.name}
    known = {name: v.const_value for name, v in values.items() if v.const_value is not None}
    shapes: dict[str, Shape] = {name: tuple(t.shape.numpy()) for name, t in known.items()}
    if wanted := [name for name in values if name not in shapes]:
        session = Session(model, outputs=wanted, optimization="none", prepack=False, frugal=True)
        shapes |= {name: array.shape for name, array in session.run(feed).items()}
    return {node: multiply_accumulates(node, shapes) for node in nodes}
