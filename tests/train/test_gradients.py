"""What lies between the weights and the loss, and whole models against differences in double."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from onnxcompress.errors import InputError
from onnxcompress.graph.inference import infer
from onnxcompress.passes.raise_opset import RaiseOpset
from onnxcompress.session import Session
from onnxcompress.train import gradients
from onnxcompress.train.gradients import add_gradients, unsupported
from tests.train.gradcheck import check, with_gradients

ROOT = Path(__file__).parents[2]


def parse(text: str, opset: int = 18) -> ir.Model:
    header = f'<ir_version: 10, opset_import: ["": {opset}]> g '
    model = ir.from_onnx_text(header + text)
    infer(model)
    return model


def value(model: ir.Model, name: str) -> ir.Value:
    everything = [*model.graph.inputs, *model.graph.initializers.values()]
    everything += [v for node in model.graph for v in node.outputs]
    return next(v for v in everything if v.name == name)


def gradient_of(model: ir.Model, loss: str, *names: str) -> list[ir.Value | None]:
    wrt = [value(model, n) for n in names]
    found = add_gradients(model.graph, value(model, loss), wrt)
    return [found.get(v) for v in wrt]


def run(model: ir.Model, outputs: list[ir.Value | None], feed: dict[str, np.ndarray]) -> list:
    names = [v.name or "" for v in outputs if v is not None]
    found = Session(model, outputs=names).run(feed)
    return [found[n].tolist() for n in names]


def test_gradients_of_several_uses_add_up() -> None:
    model = parse("""(float[3] x) => (float loss) {
        a = Mul(x, x)
        b = Add(a, x)
        c = Mul(b, x)
        loss = ReduceSum<keepdims=0>(c)
    }""")
    x = np.array([1, 2, -1], np.float32)
    gradient = gradient_of(model, "loss", "x")
    assert run(model, gradient, {"x": x}) == [(3 * x**2 + 2 * x).tolist()]


def test_inner_values_and_inputs_at_once() -> None:
    model = parse("""(float[2] x) => (float loss) {
        a = Mul(x, x)
        loss = ReduceSum<keepdims=0>(a)
    }""")
    found = gradient_of(model, "loss", "x", "a", "loss")
    assert run(model, found, {"x": np.array([1, 3], np.float32)}) == [[2, 6], [1, 1], 1]


def test_only_what_lies_between_is_differentiated() -> None:
    """The operator without a rule comes before the weight: it is frozen and no obstacle."""
    model = parse("""(float[2] x, float[2] w) => (float loss) {
        a = ReduceProd<keepdims=1>(x)
        b = Mul(a, w)
        loss = ReduceSum<keepdims=0>(b)
        unused = ReduceProd<keepdims=1>(w)
    }""")
    gradient = gradient_of(model, "loss", "w")
    feed = {"x": np.array([2, 3], np.float32), "w": np.ones(2, np.float32)}
    assert run(model, gradient, feed) == [[6, 6]]


def test_what_the_loss_does_not_depend_on_is_left_out() -> None:
    model = parse("""(float[2] x, float[2] y) => (float loss) {
        loss = ReduceSum<keepdims=0>(x)
    }""")
    assert gradient_of(model, "loss", "y") == [None]


def test_every_unsupported_node_is_named_and_nothing_is_emitted() -> None:
    model = parse(
        """(float[2, 3, 4, 4] x) => (float loss) {
        i, m = MaxPool<kernel_shape=[2, 2]>(x)
        n = LayerNormalization(i, i)
        a = ReduceProd<keepdims=0>(n)
        b = Det(n)
        c = ReduceSum<keepdims=0>(b)
        loss = Add(a, c)
    }"""
    )
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    x, loss = model.graph.inputs[0], value(model, "loss")
    skips = unsupported(model.graph, loss, [x])
    assert {s.op for s in skips} == {"ReduceProd", "Det"}
    with pytest.raises(InputError, match=r"ReduceProd.*Det|Det.*ReduceProd"):
        add_gradients(model.graph, loss, [x])
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_control_flow_that_reads_a_weight_is_named() -> None:
    model = parse("""(float[2] w, bool c) => (float loss) {
        y = If (c) <
            then_branch = yes () => (float[2] a) { a = Mul(w, w) },
            else_branch = no () => (float[2] b) { b = Neg(w) }
        >
        loss = ReduceSum<keepdims=0>(y)
    }""")
    skips = unsupported(model.graph, value(model, "loss"), [value(model, "w")])
    assert [s.op for s in skips] == ["If"]


def test_integers_and_truths_carry_nothing() -> None:
    model = parse("""(float[3] x) => (float loss) {
        i = Cast<to=7>(x)
        f = Cast<to=1>(i)
        b = Greater(x, f)
        m = Cast<to=1>(b)
        y = Mul(x, m)
        loss = ReduceSum<keepdims=0>(y)
    }""")
    gradient = gradient_of(model, "loss", "x")
    assert run(model, gradient, {"x": np.array([0.5, 1, -0.5], np.float32)}) == [[1, 0, 0]]


def test_any_batch_size_runs() -> None:
    model = parse("""(float[N, 3, 6, 6] x, float[4, 3, 3, 3] w, float[4, 2] v) => (float loss) {
        a = Conv<strides=[2, 2], pads=[1, 1, 1, 1]>(x, w)
        b = Relu(a)
        c = GlobalAveragePool(b)
        d = Flatten(c)
        e = MatMul(d, v)
        loss = ReduceMean<keepdims=0>(e)
    }""")
    found = gradient_of(model, "loss", "w", "v", "x")
    for batch in (1, 5):
        feed = {"x": np.ones((batch, 3, 6, 6), np.float32)}
        feed |= {"w": np.ones((4, 3, 3, 3), np.float32), "v": np.ones((4, 2), np.float32)}
        w, v, x = run(model, found, feed)
        assert np.shape(w) == (4, 3, 3, 3) and np.shape(v) == (4, 2)
        assert np.shape(x) == (batch, 3, 6, 6)


def test_old_operators_must_be_raised_first() -> None:
    model = parse("(float[2] x) => (float[2] y) { y = Mul(x, x) }", opset=13)
    with pytest.raises(InputError, match="raise the opset"):
        add_gradients(model.graph, model.graph.outputs[0], list(model.graph.inputs))


def test_cost_is_linear_in_nodes() -> None:
    def seconds(count: int) -> float:
        lines = [f"v{i + 1} = Tanh(v{i})" for i in range(count)]
        body = "\n".join([*lines, f"loss = ReduceSum<keepdims=0>(v{count})"])
        model = parse(f"(float[2] v0) => (float loss) {{ {body} }}")
        begin = time.process_time()
        gradient_of(model, "loss", "v0")
        return time.process_time() - begin

    assert min(seconds(1200) for _ in range(3)) < 8 * min(seconds(300) for _ in range(3)) + 0.02


def test_the_same_graph_gives_the_same_bytes() -> None:
    def emitted() -> bytes:
        model = parse("(float[2] x) => (float loss) { y = Gelu(x) loss = ReduceSum(y) }", 20)
        gradient_of(model, "loss", "x")
        return ir.to_proto(model).SerializeToString(deterministic=True)

    assert emitted() == emitted()


def test_a_gradient_that_is_not_a_number_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tape, node, given):  # type: ignore[no-untyped-def]
        return [tape.op("Mul", [given[0], tape.scalar(float("nan"), node.inputs[0])])]

    monkeypatch.setitem(gradients.RULES, "Neg", broken)
    with pytest.raises(AssertionError):
        check("Neg", {"x": np.ones(3)})


@pytest.mark.parametrize(
    ("name", "step"), [("photo_digits", 1e-6), ("name_language", 2e-4), ("segment_tabular", 2e-4)]
)
def test_a_whole_model_agrees_with_differences_in_double(name: str, step: float) -> None:
    """ONNX's reference evaluates Erf in single precision: where it occurs, steps are wider."""
    model = ir.load(ROOT / "models" / name / "model.onnx")
    RaiseOpset(minimum=gradients.LEAST_OPSET)(model)
    data = np.load(ROOT / "models" / name / "calibration.npz")
    feed = {v.name or "": data[v.name or ""][:1] for v in model.graph.inputs}
    floats = {n: v for n, v in model.graph.initializers.items() if v.dtype == ir.DataType.FLOAT}
    wrt = [n for n, v in floats.items() if v.const_value is not None and v.const_value.size > 8]
    output = model.graph.outputs[0].name or ""
    random = np.random.default_rng(0)
    shape = Session(model).run(feed)[output].shape
    weights = random.standard_normal(shape).astype(np.float32)
    found = Session(with_gradients(model, {output: weights}, wrt)).run(feed)
    found = {n: found[f"{n}_gradient"].astype(np.float64) for n in wrt}
    proto, arrays = in_double(ir.to_proto(model))
    evaluator = ReferenceEvaluator(proto)
    doubles = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in feed.items()}

    def loss(change: dict[str, np.ndarray], by: float) -> float:
        moved = {n: arrays[n] + by * way for n, way in change.items()}
        results: Any = evaluator.run([output], {**doubles, **moved})
        return float((results[0] * weights).sum())

    norm = np.sqrt(sum((g**2).sum() for g in found.values()))
    for part in (wrt[::3], wrt[1::3], wrt[2::3]):
        change = {n: random.standard_normal(found[n].shape) for n in part}
        length = np.sqrt(sum((w**2).sum() for w in change.values()))
        change = {n: way / length for n, way in change.items()}
        slope = (loss(change, step) - loss(change, -step)) / (2 * step)
        wanted = sum(float((found[n] * way).sum()) for n, way in change.items())
        assert abs(slope - wanted) < 1e-4 * norm


def in_double(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The model with float64 in place of float32, and its initializers."""
    double, numpy_helper = onnx.TensorProto.DOUBLE, onnx.numpy_helper
    tensors = [*proto.graph.initializer]
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = double
            if attribute.HasField("t"):
                tensors.append(attribute.t)
    for tensor in tensors:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return proto, {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
