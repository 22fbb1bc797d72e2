"""Feeds for a net, passes with statistics of the model as it stands, and what is lost by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxcompress.contract import CalibratedPass, Result
from onnxcompress.numerics.fidelity import Fidelity
from onnxcompress.observe import observe
from onnxcompress.passes.infer_shapes import InferShapes
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.passes.remove_unused import RemoveUnused
from onnxcompress.session import Optimization, Session
from tests.passes.exactness import Net

Feed = dict[str, Any]


def feeds_of(net: Net, seed: int = 1, count: int = 6) -> list[Feed]:
    """Normal numbers for every input of a net."""
    random = np.random.default_rng(seed)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in net.inputs}
    return [
        {name: random.standard_normal(shape).astype(net.dtype) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def apply(pass_: CalibratedPass, model: ir.Model, feeds: Sequence[Feed]) -> Result:
    """Observe, bind, apply; the model that comes out is checked."""
    wants = pass_.wants(model)
    statistics = observe(model, feeds, wants) if wants else None
    result = replace(pass_, statistics=statistics)(model)
    assert isinstance(result, Result)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return result


def quantized(
    proto: onnx.ModelProto, feeds: Sequence[Feed], **options: Any
) -> tuple[ir.Model, Result]:
    """A model with pairs, and what the pass that placed them says."""
    model = ir.from_proto(proto)
    InferShapes()(model)
    result = apply(InsertQdq(**options), model, feeds)
    RemoveUnused()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model, result


def sqnr(
    original: ir.Model, model: ir.Model, feeds: Sequence[Feed], optimization: Optimization = "all"
) -> float:
    """dB of all outputs on all feeds together."""
    fidelity = Fidelity()
    for expected, found in _outputs(original, model, feeds, optimization):
        fidelity.update(expected, found)
    return fidelity.sqnr


def least_sqnr(
    original: ir.Model, model: ir.Model, feeds: Sequence[Feed], optimization: Optimization
) -> float:
    """dB of the output and the feed that lose most."""
    worst = np.inf
    for expected, found in _outputs(original, model, feeds, optimization):
        fidelity = Fidelity()
        fidelity.update(expected, found)
        worst = min(worst, fidelity.sqnr)
    return worst


def _outputs(
    original: ir.Model, model: ir.Model, feeds: Sequence[Feed], optimization: Optimization
) -> Iterator[tuple[Any, Any]]:
    """Each output of the original as it is written, and of the other model."""
    first, second = (
        Session(original, optimization="none"),
        Session(model, optimization=optimization),
    )
    for feed in feeds:
        expected, found = first.run(feed), second.run(feed)
        assert list(expected) == list(found)
        yield from zip(expected.values(), found.values(), strict=True)
