"""Reconstruction: blocks by cuts, weights between codes, and codes that bring outputs nearer."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress import api
from onnxcompress.contract import Result
from onnxcompress.errors import InputError
from onnxcompress.numerics.affine import Affine
from onnxcompress.numerics.fidelity import Fidelity
from onnxcompress.pipeline import Outcome
from onnxcompress.session import Session
from onnxcompress.train.block_samples import Samples
from onnxcompress.train.blocks import blocks
from onnxcompress.train.reconstruct import Reconstruction, reconstruct
from onnxcompress.train.soft_rounding import soften
from onnxcompress.train.tape import Tape

Array = np.ndarray[Any, Any]
FEW = Reconstruction(steps=120, layers=1, threads=1)
FORMS: dict[str, dict[str, Any]] = {
    "packed": {"scheme": "weights", "min_elements": 1},
    "a channel": {"scheme": "weights", "target": "qnn", "block_size": 0, "min_elements": 1},
    "static": {"scheme": "static", "effort": "thorough"},
}


def network() -> ir.Model:
    """Convolutions, one of them in a residual block, a depthwise one, and two matrices."""
    text = """<ir_version: 10, opset_import: ["": 21]>
    net (float[N,3,6,6] x) => (float[N,5] y) {
        a = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(x, w1, b1)
        b = Relu(a)
        c = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=8>(b, w2, b2)
        d = Add(b, c)
        e = Relu(d)
        p = GlobalAveragePool(e)
        f = Flatten(p)
        g = Gemm<transB=1>(f, w3, b3)
        h = Relu(g)
        y = MatMul(h, w4)
    }"""
    random = np.random.default_rng(1)
    proto = onnx.parser.parse_model(text)
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 1, 3, 3), "b2": (8,), "w3": (16, 8),
              "b3": (16,), "w4": (16, 5)}  # fmt: skip
    for name, shape in shapes.items():
        array = (random.standard_normal(shape) / 3).astype(np.float32)
        array[np.abs(array) < 0.02] = 0
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def inputs(seed: int) -> dict[str, Array]:
    """Smooth over their places, as data are: of white noise rounding to nearest is best."""
    white = np.random.default_rng(seed).standard_normal((48, 3, 6, 6))
    return {"x": white.cumsum(1).cumsum(2).cumsum(3).astype(np.float32) / 6}


def quantized(form: str) -> Outcome:
    return api.quantize(network(), inputs(0), **FORMS[form])


@cache
def reconstructed(form: str) -> Result:
    data = api.as_data(inputs(0), network())
    return reconstruct(network(), quantized(form).model, data, options=FEW)


def noise(model: ir.Model) -> float:
    """Of the output on inputs that nothing has seen, in parts of its power."""
    found = Fidelity()
    pair = (Session(m, threads=1).run(inputs(9))["y"] for m in (network(), model))
    found.update(*pair)
    return found.noise_to_signal


@pytest.mark.parametrize("form", ["packed", "a channel"])
def test_four_bits_lose_less(form: str) -> None:
    result = reconstructed(form)
    assert result.modified and result.figures["blocks improved"]
    assert noise(result.model) < 0.7 * noise(quantized(form).model)


@pytest.mark.parametrize("form", FORMS)
def test_never_worse_by_its_own_measure_and_of_the_same_form(form: str) -> None:
    result, before = reconstructed(form), quantized(form).model
    assert result.figures["output error after"] <= result.figures["output error before"]  # pyright: ignore[reportOperatorIssue]
    kept = {n: v.const_value for n, v in before.graph.initializers.items()}
    for name, value in result.model.graph.initializers.items():
        now, then = value.const_value, kept[name]
        assert now is not None and then is not None
        assert (now.dtype, now.shape, now.nbytes) == (then.dtype, then.shape, then.nbytes)
        if "scale" in name or "zero_point" in name:
            assert np.array_equal(now.numpy(), then.numpy())
    assert [n.op_type for n in result.model.graph] == [n.op_type for n in before.graph]


def test_the_same_seed_gives_the_same_bytes() -> None:
    data = api.as_data(inputs(0), network())
    again = reconstruct(network(), quantized("packed").model, data, options=FEW)
    pair = (ir.to_proto(r.model).SerializeToString() for r in (again, reconstructed("packed")))
    assert len(set(pair)) == 1


def test_zeros_of_the_float_weight_stay_zeros() -> None:
    result = reconstructed("a channel").model
    codes = result.graph.initializers["w1_quantized"].const_value
    assert codes is not None
    zeros = network().graph.initializers["w1"].const_value.numpy() == 0  # pyright: ignore[reportOptionalMemberAccess]
    assert zeros.any()
    assert not codes.numpy().astype(np.int8).reshape(zeros.shape)[zeros].any()


def test_a_model_of_other_weights_is_left_alone() -> None:
    other = network()
    for name in ("w1", "w2", "w3", "w4"):
        tensor = other.graph.initializers[name].const_value
        assert tensor is not None
        other.graph.initializers[name].const_value = ir.tensor(-tensor.numpy(), name=name)
    before = quantized("packed").model
    result = reconstruct(other, before, api.as_data(inputs(0), other), options=FEW)
    assert not result.modified
    assert {s.reason for s in result.skips} == {"its weight in the float model was not found"}
    assert ir.to_proto(result.model) == ir.to_proto(before)


def test_blocks_end_at_cuts_with_the_functions_behind() -> None:
    graph = network().graph
    layers = [n for n in graph if n.op_type in ("Conv", "Gemm", "MatMul")]

    def outputs(most: int) -> list[tuple[str | None, int]]:
        return [(b.output.name, len(b.layers)) for b in blocks(graph, layers, most)]

    assert outputs(1) == [("b", 1), ("e", 1), ("h", 1), ("y", 1)]
    assert outputs(2) == [("e", 2), ("y", 2)]
    assert outputs(4) == outputs(2)  # there is a pool between


def test_parts_of_too_many_layers_go_one_by_one() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["": 21]>
    net (float[N,4] x) => (float[N,4] y, float[N,4] z)
    <float[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}> {
        a = MatMul(x, w)
        b = MatMul(a, w)
        c = Relu(b)
        d = MatMul(a, w)
        y = Add(c, d)
        z = MatMul(y, w)
    }""")
    layers = [n for n in model.graph if n.op_type == "MatMul"]
    found = blocks(model.graph, layers, 1)
    assert [b.output.name for b in found] == ["a", "y", "y", "z"]


def test_a_soft_weight_starts_at_the_float_and_hardens_to_its_code() -> None:
    grid = Affine(np.array(0.5, np.float32), np.array(0, np.int8), "int8")
    floats = np.array([0.6, -0.9, 0.0, 3.0, 0.7], np.float32)
    now = np.array([0.5, -1.0, 0.0, 3.0, 1.5], np.float32)  # the last was not rounded to nearest
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21})
    soft, choice = soften(Tape(graph), "w", floats, now, grid)
    soft.type, soft.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([5])
    graph.outputs.append(soft)
    (value,) = Session(ir.Model(graph, ir_version=10)).run({}).values()
    np.testing.assert_allclose(value[:4], floats[:4], atol=1e-5)
    assert 1.0 < value[4] < 1.5
    v = graph.initializers[choice.v].const_value
    assert v is not None
    np.testing.assert_array_equal(choice.codes(v.numpy()), now / 0.5)


def test_samples_of_other_shapes_are_not_joined() -> None:
    samples = Samples([{"x": np.zeros((1, n), np.float32)} for n in (3, 4, 3, 4, 4)])
    shapes = {samples.batch(np.random.default_rng(seed), 3)["x"].shape for seed in range(20)}
    assert shapes == {(2, 3), (3, 4)}
    assert [str(d) for d in samples.shapes["x"]] == ["x_0", "x_1"]


def test_best_effort_reconstructs_and_needs_data() -> None:
    before = api.quantize(network(), **FORMS["packed"]).model
    outcome = api.quantize(network(), inputs(0), effort="best", **FORMS["packed"])
    assert outcome.records[-1].name == "reconstruct"
    assert noise(outcome.model) <= noise(before)
    with pytest.raises(InputError, match="give data"):
        api.quantize(network(), effort="best", **FORMS["packed"])


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        Reconstruction(steps=0)
    with pytest.raises(InputError, match="at least 2 feeds"):
        few = {"x": inputs(0)["x"][:1]}
        reconstruct(network(), quantized("packed").model, api.as_data(few, network()))
