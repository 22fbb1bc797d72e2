"""Layers given back to float compute what they did before, and the rest stays as it was."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress import api
from onnxcompress.contract import Result
from onnxcompress.passes.remove_unused import RemoveUnused
from onnxcompress.passes.restore_float import RestoreFloat
from onnxcompress.pipeline import run
from onnxcompress.session import Session
from tests.fragile import chain, feeds


def restored(model: ir.Model, nodes: Sequence[str]) -> ir.Model:
    found = run(model, [RestoreFloat(nodes=tuple(nodes)), RemoveUnused()]).model
    onnx.checker.check_model(ir.to_proto(found), full_check=True)
    return found


def output(model: ir.Model) -> np.ndarray:
    session = Session(model, optimization="none")
    return np.stack([session.run(feed)["y"] for feed in feeds()])


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.fixture(scope="module")
def quantized() -> ir.Model:
    return api.quantize(chain(), feeds()).model


def test_all_of_it_in_float_is_the_original(quantized: ir.Model) -> None:
    found = restored(quantized, ["*"])
    assert "QuantizeLinear" not in operators(found)
    assert {v.name for n in found.graph for v in n.outputs} == {
        v.name for n in chain().graph for v in n.outputs
    }
    np.testing.assert_allclose(output(found), output(chain()), rtol=1e-5, atol=1e-5)


def test_one_layer_keeps_the_pairs_that_its_neighbours_need(quantized: ir.Model) -> None:
    found = restored(quantized, ["conv2"])
    weights = {n.name: n.inputs[1] for n in found.graph if n.op_type == "Conv"}
    floats = [name for name, value in weights.items() if value and value.is_initializer()]
    assert floats == ["conv2"]
    assert operators(found).count("QuantizeLinear") == operators(quantized).count("QuantizeLinear")
    assert not np.array_equal(output(found), output(quantized))


def test_a_pair_goes_with_the_last_that_needs_it(quantized: ir.Model) -> None:
    found = restored(quantized, ["conv1", "conv2"])
    names = {v.name for n in found.graph for v in n.outputs}
    assert "r1" in names and not any("r1_" in (name or "") for name in names)
    assert operators(found).count("QuantizeLinear") == (
        operators(quantized).count("QuantizeLinear") - 1
    )


def test_what_stays_on_integers_is_not_touched(quantized: ir.Model) -> None:
    found = restored(quantized, ["conv2"])
    before, after = quantized.graph.initializers, found.graph.initializers
    for name in ("w0_quantized", "w1_quantized", "w3_quantized", "w4_quantized"):
        a, b = before[name].const_value, after[name].const_value
        assert a is not None and b is not None
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_it_is_idempotent_and_says_when_nothing_changed(quantized: ir.Model) -> None:
    found = restored(quantized, ["conv2"])
    again = RestoreFloat(nodes=("conv2",))(found.clone())
    assert isinstance(again, Result) and not again.modified
    assert not RestoreFloat(nodes=("nothing",))(found.clone()).modified


def test_steps_of_one_give_what_one_step_gives(quantized: ir.Model) -> None:
    steps = restored(restored(quantized, ["conv1"]), ["conv2"])
    np.testing.assert_array_equal(output(steps), output(restored(quantized, ["conv1", "conv2"])))


def test_a_model_whose_floats_are_gone_is_left_alone(quantized: ir.Model) -> None:
    foreign = ir.from_proto(ir.to_proto(quantized))
    result = RestoreFloat(nodes=("conv*",))(foreign)
    assert isinstance(result, Result) and not result.modified
    assert {skip.node for skip in result.skips} == {f"conv{i}" for i in range(5)}
