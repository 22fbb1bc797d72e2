"""Weights that are integers in the file: the same floats to the bit, and folded at loading."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress import api
from onnxcompress.graph.packed_weights import packed
from onnxcompress.passes.remove_unused import RemoveUnused
from onnxcompress.passes.restore_float import RestoreFloat
from onnxcompress.passes.shield_floats import ShieldFloats
from onnxcompress.pipeline import run
from onnxcompress.session import Session, optimized_model
from tests.fragile import chain, feeds

INNER = """
<ir_version: 8, opset_import: ["": 17]>
g (bool c, float[1, 4] x) => (float[1, 8] y)
<float[4, 8] w = {WEIGHTS}> {
    y = If (c) <
        then_branch = t () => (float[1, 8] a) { a = MatMul(x, w) },
        else_branch = e () => (float[1, 8] b) { b = MatMul(x, w) }
    >
}
"""


@pytest.fixture(scope="module")
def quantized() -> ir.Model:
    return api.quantize(chain(), feeds()).model


def returned(model: ir.Model, nodes: tuple[str, ...], packed: tuple[str, ...]) -> ir.Model:
    passes = [RestoreFloat(nodes=nodes, packed=packed), ShieldFloats(), RemoveUnused()]
    found = run(model, passes).model
    onnx.checker.check_model(ir.to_proto(found), full_check=True)
    return found


def output(model: ir.Model, optimization: str = "none") -> np.ndarray:
    session = Session(model, optimization=optimization)  # pyright: ignore[reportArgumentType]
    return np.stack([session.run(feed)["y"] for feed in feeds(2)])


def test_they_are_the_floats_of_the_integers_to_the_bit(quantized: ir.Model) -> None:
    found = returned(quantized, ("conv2",), packed=("conv2",))
    before, after = (
        Session(model, outputs=[name], optimization="none").run(feeds(1)[0])[name]
        for model, name in ((quantized, "w2_dequantized"), (found, "w2_unpacked"))
    )
    np.testing.assert_array_equal(before, after)


def test_the_file_keeps_their_integers_and_no_floats(quantized: ir.Model) -> None:
    found = returned(quantized, ("*",), packed=("conv1", "conv3"))
    kinds = {n.name: packed(n.inputs[1]) for n in found.graph if n.op_type == "Conv"}
    assert {name for name, codes in kinds.items() if codes is not None} == {"conv1", "conv3"}
    large = [v for v in found.graph.initializers.values() if v.shape and len(v.shape) == 4]
    int8 = {v.name for v in large if v.dtype == ir.DataType.INT8}
    assert int8 == {"w1_quantized", "w3_quantized"}


def test_the_runtime_folds_them_and_does_not_round_them_again(quantized: ir.Model) -> None:
    found = returned(quantized, ("conv2",), packed=("conv2",))
    operators = [node.op_type for node in optimized_model(found).graph]
    assert "Cast" not in operators and "Mul" not in operators
    assert operators.count("QLinearConv") == 4
    np.testing.assert_allclose(output(found, "all"), output(found), rtol=0.05, atol=0.05)


def test_a_second_run_finds_nothing_to_do(quantized: ir.Model) -> None:
    found = returned(quantized, ("conv2",), packed=("conv2",))
    assert not RestoreFloat(nodes=("conv2",), packed=("*",))(found.clone()).modified


def test_bodies_read_them_from_the_main_graph() -> None:
    weights = ", ".join(str(i / 7 - 2) for i in range(32))
    model = ir.from_onnx_text(INNER.replace("WEIGHTS", weights))
    rng = np.random.default_rng(0)
    data = [
        {"c": np.array(i % 2 == 0), "x": rng.standard_normal((1, 4)).astype(np.float32)}
        for i in range(8)
    ]
    quantized = api.quantize(model, data).model
    found = returned(quantized, ("*",), packed=("*",))
    assert [n.op_type for n in found.graph] == ["Cast", "Mul", "If"]
    for feed in data:
        expected = Session(model).run(feed)["y"]
        np.testing.assert_allclose(Session(found).run(feed)["y"], expected, atol=0.1)
