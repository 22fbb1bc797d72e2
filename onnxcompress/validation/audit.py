"""How much of a model's arithmetic really runs on integers, by ONNX Runtime's own graph.

What was meant as an integer kernel is one only if the runtime fused it: its optimized graph is
read back and held against the model node by node.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from onnxcompress.contract import Skip
from onnxcompress.graph.arithmetic import (
    INTEGERS,
    Shape,
    contracts,
    multiply_accumulates,
    stated_shapes,
)
from onnxcompress.graph.bodies import expose
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
    """Multiply-accumulates of one sample's run; those of a body as often as the run came to it."""
    integer_macs: int
    """Those of them that kernels compute on integers."""
    float8_macs: int = 0
    """Those of them that the target computes on 8-bit floats, by its table."""
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
    contractions = [node for node in model.graph.all_nodes() if contracts(node)]
    _tell_apart(contractions, FreshNames(model.graph))
    promised = "" if target is None or target.measurable else target.name
    fused = _table_says(contractions, target) if target and promised else _fused(model)
    float8 = _table_says_float8(contractions, target) if target and promised else set[str]()
    reason = f"{promised} has no kernel for it" if promised else "the runtime did not fuse it"
    macs = multiplications(model, contractions, feed)
    eighths = {n for n in contractions if n.name in float8}
    integer = {n for n in contractions if n.op_type in INTEGERS or n.name in fused} - eighths
    others = (n for n in contractions if n not in integer and n not in eighths)
    unfused = [n for n in others if _is_between_pairs(n)]
    return Audit(
        macs=sum(macs.values()),
        integer_macs=sum(macs[node] for node in integer),
        float8_macs=sum(macs[node] for node in eighths),
        unfused=tuple(Skip(n.name or "", n.op_type, reason) for n in unfused),
        promised=promised,
    )


def _tell_apart(nodes: Iterable[ir.Node], fresh: FreshNames) -> None:
    """Give each a name that none of the others has, in whatever bodies they are."""
    seen: set[str | None] = {None, ""}
    for node in nodes:
        if node.name in seen:
            node.name = fresh(f"{node.op_type}_of_{node.outputs[0].name}")
        seen.add(node.name)


def _fused(model: ir.Model) -> set[str]:
    """Names of the nodes that ONNX Runtime computes on integers here."""
    nodes = optimized_model(model).graph.all_nodes()
    return {_TOKEN.sub("", n.name or "") for n in nodes if n.op_type in _INTEGER_KERNELS}


def _table_says(nodes: Iterable[ir.Node], target: Target) -> set[str]:
    """Names of those of `nodes` that the target computes on integers by its table."""
    return {n.name or "" for n in nodes if n.op_type in target.kernels and _is_between_pairs(n)}


def _table_says_float8(nodes: Iterable[ir.Node], target: Target) -> set[str]:
    """Names of those of `nodes` that read float8 and that the target computes in it."""
    said = _table_says(nodes, target)
    kinds = {kind for kind in target.floats if kind.startswith("float8")}
    return said & {n.name or "" for n in nodes if kinds & {_stored_type(v) for v in n.inputs[:2]}}


def _stored_type(value: ir.Value | None) -> str:
    """The type, as targets spell it, that DequantizeLinear made the value from."""
    producer = None if value is None else value.producer()
    codes = producer.inputs[0] if producer is not None else None
    if codes is None:
        return ""
    quantizer = codes.producer()
    stated = None if quantizer is None else quantizer.attributes.get("output_dtype")
    dtype = codes.dtype if stated is None else ir.DataType(stated.as_int())
    return "" if dtype is None else dtype.name.lower()


def _is_between_pairs(node: ir.Node) -> bool:
    """Whether the node reads a weight and data that were quantized."""
    read = [v.producer() for v in node.inputs[:2] if v is not None]
    return all(p is not None and p.op_type == "DequantizeLinear" for p in read)


def multiplications(model: ir.Model, nodes: Iterable[ir.Node], feed: Feed) -> Mapping[ir.Node, int]:
    """Multiply-accumulates of each of the model's `nodes`, by the shapes that one run shows.

    A node inside a body counts at each visit; where its values cannot be seen (`graph.bodies`), it
    counts once by the shapes that the graph states, if it does.

    Raises:
        InputError: if ONNX Runtime refuses the model or the feed.
    """
    nodes = list(nodes)
    values = {v.name: v for n in nodes for v in (*n.inputs[:3], n.outputs[0]) if v and v.name}
    known = {name: v.const_value for name, v in values.items() if v.const_value is not None}
    shapes: dict[str, list[Shape]] = {n: [tuple(t.shape.numpy())] for n, t in known.items()}
    exposed = expose(model, [name for name in values if name not in shapes])
    if wanted := [name for name in values if name not in shapes and name not in exposed.reasons]:
        session = Session(
            exposed.model, outputs=wanted, optimization="none", prepack=False, frugal=True
        )
        found = exposed.visits(session.run(feed))
        shapes |= {name: [array.shape for array in arrays] for name, arrays in found.items()}
    return {node: _over_visits(node, shapes) for node in nodes}


def _over_visits(node: ir.Node, found: Mapping[str, Sequence[Shape]]) -> int:
    names = {v.name for v in (*node.inputs[:3], node.outputs[0]) if v is not None and v.name}
    if not all(name in found for name in names):
        stated = stated_shapes(node)
        return multiply_accumulates(node, stated) if stated is not None else 0
    visits = max(len(found[name]) for name in names) if all(found[n] for n in names) else 0
    return sum(
        # What a body reads from outside has less visits, each of which serves several of the body.
        multiply_accumulates(node, {n: found[n][i * len(found[n]) // visits] for n in names})
        for i in range(visits)
    )
