"""A converted model computes the same in ONNX Runtime, or is left as it was with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from onnxcompress.contract import Result
from onnxcompress.errors import InputError
from onnxcompress.graph.opset_changes import NEWEST
from onnxcompress.passes.raise_opset import RaiseOpset

BOTH = (13, NEWEST)
# Halves: ONNX Runtime computes some old operators on float16 in float32, without rounding.
X = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float16).astype(np.float32)


def parse(nodes: str, opset: int, output: str = "float y", head: str = "float[n,3,4,6] x"):
    text = f'<ir_version: 7, opset_import: ["": {opset}]> g ({head}) => ({output}) {{ {nodes} }}'
    model = onnx.parser.parse_model(text)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    return model


def run(model: onnx.ModelProto, feed: dict[str, Any]) -> list[Any]:
    options: Any = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return list(session.run(None, feed))


def convert(model: onnx.ModelProto, minimum: int) -> tuple[onnx.ModelProto, Result]:
    graph = ir.from_proto(model)
    result = RaiseOpset(minimum=minimum)(graph)
    assert isinstance(result, Result)
    return ir.to_proto(graph), result


def check(model: onnx.ModelProto, minimum: int, feed: dict[str, Any] | None = None) -> Result:
    """The converted model is valid and gives the same; its interface is the same."""
    feed = {"x": X} if feed is None else feed
    converted, result = convert(model, minimum)
    assert result.modified and not result.skips, result.skips
    assert {o.domain: o.version for o in converted.opset_import}[""] == minimum
    assert converted.graph.input == model.graph.input
    assert converted.graph.output == model.graph.output
    results = run(converted, feed)
    for value, array in zip(converted.graph.output, results, strict=True):
        value.CopyFrom(helper.make_tensor_value_info(value.name, 1, np.shape(array)))
    onnx.checker.check_model(converted)
    for was, now in zip(run(model, feed), results, strict=True):
        np.testing.assert_allclose(now, was, rtol=1e-6, atol=1e-7)
        assert np.asarray(now).dtype == np.asarray(was).dtype
    return result


def declined(model: onnx.ModelProto, minimum: int = 21) -> str:
    """The model is left as it was; returns the reason."""
    before = ir.to_proto(ir.from_proto(model))
    after, result = convert(model, minimum)
    assert not result.modified and len(result.skips) == 1
    assert after == before
    return result.skips[0].reason


CASES = {
    "squeeze": (11, "a = Unsqueeze<axes=[1]>(x) b = Squeeze<axes=[1]>(a) y = Relu(b)"),
    "squeeze negative": (11, "a = Unsqueeze<axes=[-1, 0]>(x) y = Squeeze<axes=[-1, 0]>(a)"),
    "squeeze all": (9, "a = Unsqueeze<axes=[0]>(x) y = Squeeze(a)"),
    "reduce sum": (11, "y = ReduceSum<axes=[1, -1], keepdims=0>(x)"),
    "reduce sum all": (7, "y = ReduceSum(x)"),
    "reduce mean": (11, "a = ReduceMean<axes=[2, 3]>(x) y = Neg(a)"),
    "reduce others": (13, "a = ReduceMax<axes=[1]>(x) b = ReduceL2<axes=[1]>(x) y = Add(a, b)"),
    "softmax coerced": (11, "y = Softmax(x)"),
    "softmax coerced at 2": (11, "y = Softmax<axis=2>(x)"),
    "softmax coerced before -1": (11, "y = Softmax<axis=-2>(x)"),
    "softmax whole": (9, "y = Softmax<axis=0>(x)"),
    "softmax last": (11, "y = Softmax<axis=3>(x)"),
    "log softmax": (11, "a = Relu(x) y = LogSoftmax<axis=1>(a)"),
    "hardmax": (11, "y = Hardmax<axis=2>(x)"),
    "clip": (7, "a = Neg(x) y = Clip<min=-0.5, max=0.5>(a)"),
    "clip half": (9, "a = Cast<to=10>(x) b = Clip<min=0.0>(a) y = Cast<to=1>(b)"),
    "clip open": (9, "y = Clip<max=0.25>(x)"),
    "pad": (9, "y = Pad<pads=[0, 0, 1, 2, 0, 0, 0, 1], value=1.5>(x)"),
    "pad reflect": (9, 'y = Pad<mode="reflect", pads=[0, 0, 1, 1, 0, 0, 1, 1]>(x)'),
    "pad negative": (7, "y = Pad<pads=[0, 0, -1, 1, 0, 0, 0, 0]>(x)"),
    "slice": (9, "y = Slice<axes=[2, 3], starts=[1, -4], ends=[9223372036854775807, -1]>(x)"),
    "slice without axes": (7, "y = Slice<starts=[0, 1], ends=[2, 3]>(x)"),
    "top k": (9, "y, i = TopK<k=2, axis=2>(x)"),
    "split": (11, "a, b = Split<axis=3, split=[2, 4]>(x) y = Concat<axis=3>(b, a)"),
    "split evenly": (11, "a, b = Split<axis=3>(x) y = Sub(b, a)"),
    "split evenly 13": (13, "a, b = Split<axis=3>(x) y = Sub(b, a)"),
    "dropout": (7, "y = Dropout<ratio=0.7>(x)"),
    "dropout unread mask": (10, "y, m = Dropout(x)"),
    "upsample nearest": (7, 'y = Upsample<mode="nearest", scales=[1.0, 1.0, 2.0, 2.5]>(x)'),
    "upsample linear": (7, 'y = Upsample<mode="linear", scales=[1.0, 1.0, 1.5, 2.0]>(x)'),
    "upsample input": (9, 's = Constant<value=float[4] {1, 1, 2, 3}>() y = Upsample(x, s)'),
    "resize up": (10, 's = Constant<value=float[4] {1, 1, 1.7, 3.1}>() y = Resize(x, s)'),
    "resize down": (10, 's = Constant<value=float[4] {1, 1, 0.6, 0.4}>() y = Resize(x, s)'),
    "resize linear": (
        10,
        's = Constant<value=float[4] {1, 1, 0.6, 1.9}>() y = Resize<mode="linear">(x, s)',
    ),
    "resize 11": (
        11,
        "r = Constant<value=float[0] {}>() s = Constant<value=float[0] {}>() "
        "z = Constant<value=int64[4] {2, 3, 7, 5}>() "
        'y = Resize<mode="cubic", coordinate_transformation_mode="align_corners">(x, r, s, z)',
    ),
    "batchnorm": (
        7,
        "s = Constant<value=float[3] {1, 2, 3}>() v = Constant<value=float[3] {1, 4, 2}>() "
        "y = BatchNormalization<spatial=1, momentum=0.5>(x, s, s, s, v)",
    ),
    "batchnorm 9": (9, "s = Constant<value=float[3] {1, 2, 3}>() "
                       "y = BatchNormalization(x, s, s, s, s)"),
    "gemm": (7, "a = Flatten(x) b = Transpose<perm=[1, 0]>(a) c = Constant<value=float {1}>() "
                "y = Gemm<alpha=0.5>(a, b, c)"),
    "pools": (7, "a = AveragePool<kernel_shape=[2, 2], pads=[1, 1, 0, 0]>(x) "
                 "y = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(a)"),
    "depth to space": (9, "a = Reshape(x, s) y = DepthToSpace<blocksize=2>(a)"),
    "cast": (9, "a = Cast<to=7>(x) b = Cast<to=9>(a) y = Cast<to=1>(b)"),
    "scatter": (9, "a = Shape(x) b = Constant<value=int64[1] {1}>() "
                   "c = Constant<value=int64[1] {9}>() d = Scatter(a, b, c) y = Cast<to=1>(d)"),
    "argmax": (7, "a = ArgMax<axis=2>(x) y = Cast<to=1>(a)"),
    "quantize": (10, "s = Constant<value=float {0.1}>() z = Constant<value=uint8 {128}>() "
                     "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)"),
}  # fmt: skip
CASES["depth to space"] = (
    9,
    "s = Constant<value=int64[4] {2, 12, 3, 2}>() " + CASES["depth to space"][1],
)


@pytest.mark.parametrize("minimum", BOTH)
@pytest.mark.parametrize("case", CASES)
def test_what_changed_is_said_anew(case: str, minimum: int):
    opset, nodes = CASES[case]
    if opset < minimum:
        check(parse(nodes, opset), minimum)


@pytest.mark.parametrize(
    ("opset", "nodes"),
    [
        (16, 'y = GridSample<mode="bicubic">(x, g)'),
        (16, "y = GridSample(x, g)"),
    ],
)
def test_grid_sample(opset: int, nodes: str):
    grid = np.random.default_rng(1).uniform(-1, 1, (2, 3, 5, 2)).astype(np.float32)
    model = parse(nodes, opset, head="float[n,3,4,6] x, float[n,3,5,2] g")
    check(model, 21, {"x": X, "g": grid})


@pytest.mark.parametrize("nodes", ["y = DFT(x)", "y = DFT<axis=2, onesided=1>(x)"])
def test_dft(nodes: str):
    model = parse(nodes, 17, head="float[2,8,4,1] x")
    check(model, 21, {"x": np.random.default_rng(1).normal(size=(2, 8, 4, 1)).astype(np.float32)})


def test_roi_align():
    nodes = (
        "i = Constant<value=int64[1] {0}>() y = RoiAlign<output_height=2, output_width=2>(x, r, i)"
    )
    rois = np.array([[0.3, 0.2, 4.1, 3.3]], np.float32)
    model = parse(nodes, 10, head="float[n,3,4,6] x, float[k,4] r")
    check(model, 21, {"x": X, "r": rois})


def test_softmax_of_unknown_rank_and_of_an_empty_batch():
    model = parse("y = Softmax<axis=1>(x)", 11)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    converted, _ = convert(model, 21)
    for x in (X, X[:0]):
        was, now = run(model, {"x": x}), run(converted, {"x": x})
        np.testing.assert_allclose(now[0], was[0], rtol=1e-6)


@pytest.mark.parametrize("minimum", BOTH)
def test_inside_subgraphs(minimum: int):
    nodes = """y = If (c) <then_branch = a () => (float t) { t = ReduceSum<axes=[1]>(x) },
                          else_branch = b () => (float t) { u = Softmax(x) t = Squeeze(u) }>"""
    model = parse(nodes, 11, head="bool c, float[n,3,4,6] x")
    for attribute in model.graph.node[0].attribute:
        attribute.g.output[0].type.tensor_type.ClearField("shape")
    for condition in (True, False):
        result = check(model, minimum, {"c": np.array(condition), "x": X})
    assert result.figures == {"from": 11, "to": minimum, "rewritten": 2}


def test_inside_functions():
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 12, "local": 1]>
        g (float[n,3,4,6] x) => (float[a,b,c,d] y) { y = local.f(x) }
        <opset_import: ["": 12], domain: "local">
        f (a) => (b) { s = ReduceSum<axes=[1]>(a) b = Softmax<axis=1>(s) }"""
    )
    converted, result = convert(model, 21)
    assert result.modified and converted.functions[0].opset_import[0].version == 21
    np.testing.assert_allclose(run(converted, {"x": X})[0], run(model, {"x": X})[0], rtol=1e-6)


def test_a_functions_parameter_is_declined():
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 12, "local": 1]>
        g (float[n,3] x) => (float[n] y) { y = local.f<k=[1]>(x) }
        <opset_import: ["": 12], domain: "local">
        f <k>(a) => (b) { b = ReduceSum<axes: ints = @k>(a) }"""
    )
    assert "parameter" in declined(model)


@pytest.mark.parametrize(
    ("opset", "nodes", "reason"),
    [
        (7, "y = BatchNormalization<spatial=0>(x, s, s, s, s)", "spatial"),
        (9, "y, a, b, c, d = BatchNormalization(x, s, s, s, s)", "training"),
        (10, "y, m = Dropout(x) z = Not(m)", "mask"),
        (10, "f = Constant<value=float[4] {1, 1, 0.5, 2}>() y = Resize(x, f)", "rounds"),
        (10, "f = Exp(x) y = Resize(x, f)", "rounds"),
        (9, 'y = Upsample<mode="bicubic">(x, s)', "mode bicubic"),
        (
            11,
            'y = Resize<coordinate_transformation_mode="tf_half_pixel_for_nn">(x, s, s)',
            "tf_half",
        ),
        (18, "y = GroupNormalization<num_groups=1>(x, s, s)", "per group"),
        (12, "y = Relu<alpha=1.0>(x)", "attribute alpha"),
        (12, "y = Invented(x)", "no such operator"),
        (6, "y = Relu(x)", "older than 7"),
        (7, "u = com.example.Odd(x) y = Clip<min=0.0>(u)", "type of its input"),
    ],
)
def test_what_cannot_be_said_anew_is_left(opset: int, nodes: str, reason: str):
    model = parse("s = Constant<value=float[3] {1, 2, 3}>() " + nodes, opset)
    assert reason in declined(model)


def test_ir_version_3_keeps_its_inputs_and_weights():
    model = parse("y = Clip<min=0.0>(x)", 7)
    model.ir_version = 3
    model.graph.node.insert(0, helper.make_node("Add", ["x", "w"], ["a"]))
    model.graph.node[1].input[0] = "a"
    model.graph.input.append(helper.make_tensor_value_info("w", 1, [6]))
    model.graph.initializer.append(helper.make_tensor("w", 1, [6], [1, 2, 3, 4, 5, 6]))
    check(model, 21)
    converted, _ = convert(model, 21)
    assert converted.ir_version == 10
    assert converted.graph.initializer[0] == model.graph.initializer[0]


def test_other_domains_and_lazy_weights_are_not_touched():
    model = ir.from_proto(parse("a = com.microsoft.Gelu(x) y = Add(a, w)", 11))
    model.opset_imports["com.microsoft"] = 1

    def refuse() -> ir.TensorProtocol:
        raise AssertionError("the weight was evaluated")

    tensor = ir.LazyTensor(refuse, ir.DataType.FLOAT, ir.Shape([6]), name="w")
    add = model.graph[1]
    value = ir.Value(name="w", const_value=tensor, type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.register_initializer(value)
    add.replace_input_with(1, value)
    assert RaiseOpset()(model).modified
    assert model.opset_imports == {"": 21, "com.microsoft": 1}
    assert model.graph[0].domain == "com.microsoft"


def test_new_names_do_not_collide():
    nodes = "y_axes = Neg(x) y_axes_1 = Neg(y_axes) y = ReduceSum<axes=[1]>(y_axes_1)"
    check(parse(nodes, 11), 21)


@pytest.mark.parametrize("opset", [13, 21, NEWEST])
def test_a_model_that_is_new_enough_is_left(opset: int):
    model = parse("y = Relu(x)", opset)
    _, result = convert(model, 13)
    assert not result.modified and not result.skips
    converted, _ = convert(model, NEWEST)
    assert not convert(converted, NEWEST)[1].modified


@pytest.mark.parametrize("minimum", [12, NEWEST + 1])
def test_a_version_that_is_not_known(minimum: int):
    with pytest.raises(InputError, match="minimum"):
        RaiseOpset(minimum=minimum)


def corpus() -> list[Path]:
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    return sorted(path.parent for path in data.glob("*/*/model.onnx"))


def test_onnxs_own_models():
    """Those that ONNX Runtime runs; `benchmarks/opsets.py` has the node tests."""
    converted = 0
    for folder in corpus():
        model = onnx.load(folder / "model.onnx")
        if model.opset_import[0].version < 7:
            continue
        feed = {}
        for index, value in enumerate(model.graph.input):
            path = folder / "test_data_set_0" / f"input_{index}.pb"
            if path.exists() and value.type.HasField("tensor_type"):
                feed[value.name] = numpy_helper.to_array(onnx.load_tensor(path))
        try:
            expected = run(model, feed)
        except Exception:  # ONNX Runtime does not run all of them
            continue
        raised, result = convert(model, 21)
        assert result.modified, folder
        converted += 1
        for was, now in zip(expected, run(raised, feed), strict=True):
            assert str(now) == str(was), folder
    assert converted > 15
