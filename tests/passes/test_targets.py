"""What each target wants is in the graph that is made for it, and still computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress import targets
from onnxcompress.errors import InputError
from onnxcompress.operators import constant
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.passes.quantize_dynamic import QuantizeDynamic
from onnxcompress.passes.round_second_order import RoundSecondOrder
from tests.passes.calibrated import apply, feeds_of, least_sqnr, quantized, sqnr
from tests.passes.exactness import Net
from tests.passes.test_insert_qdq import IMAGE, conv, ints

QUANTIZING = [name for name in targets.names() if targets.load(name).kernels]
SCHEMES = [
    (name, dtype)
    for name in QUANTIZING
    for dtype in (
        targets.load(name).activations.dtype,
        *targets.load(name).activations.alternatives,
    )
]


def network(seed: int = 0) -> Net:
    """A residual block, pooling, a concatenation, and a layer of products behind it."""
    net = Net(opset=21)
    net.random = np.random.default_rng(seed)
    x = net.op("Relu", conv(net, net.input("x", *IMAGE)))
    x = net.op("Relu", net.op("Add", conv(net, x), x))
    x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("Concat", conv(net, x), conv(net, x), axis=1)
    x = net.op("GlobalAveragePool", conv(net, x, 16))
    x = net.op("Relu", net.op("Gemm", net.op("Flatten", x), net.normal("w", 8, 16)))
    net.op("Gemm", x, net.normal("v", 16, 5), net.normal("c", 5), out="y")
    net.output("y")
    return net


def made_for(target: str, activations: str | None = None, net: Net | None = None) -> ir.Model:
    net = net or network()
    model, _ = quantized(net.model(), feeds_of(net), target=target, activations=activations)
    return model


def pairs(model: ir.Model) -> Iterator[tuple[ir.Node, np.ndarray, np.ndarray]]:
    """QuantizeLinear nodes with their scale and zero_point."""
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
            assert scale is not None and zero is not None
            yield node, scale, zero


def pair_of(value: ir.Value | None) -> tuple[float, int] | None:
    """Scale and zero_point of the DequantizeLinear before or the QuantizeLinear behind a value."""
    assert value is not None
    around = [value.producer(), *(usage.node for usage in value.uses())]
    for node in around:
        if node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
            assert scale is not None and zero is not None
            return float(scale), int(zero)
    return None


@pytest.mark.parametrize(("target", "activations"), SCHEMES)
def test_every_result_loads_and_is_as_faithful_as_for_cpu(target: str, activations: str) -> None:
    found: list[tuple[float, float]] = []
    for net in map(network, range(4)):  # of one draw of weights, either may be luckier by 3 dB
        feeds = feeds_of(net)
        original, model = ir.from_proto(net.model()), made_for(target, activations, net)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        least_sqnr(original, model, feeds, "all")  # loads with ONNX Runtime's rewrites too
        both = (model, made_for("cpu", None, net))
        ours, on_cpu = (least_sqnr(original, m, feeds, "none") for m in both)
        found.append((ours, on_cpu))
    # Symmetric codes of a ReLU use half of their range: 6 dB.
    lost = 6.0 if targets.load(target).activations.symmetric else 1.0
    ours, on_cpu = np.mean(found, axis=0)
    assert ours > on_cpu - lost


@pytest.mark.parametrize(("target", "activations"), SCHEMES)
def test_activations_are_of_the_type_asked_for(target: str, activations: str) -> None:
    scheme = targets.load(target).activations
    middle = {"int8": 0, "uint8": 128, "int16": 0, "uint16": 32768}[activations]
    found = list(pairs(made_for(target, activations)))
    assert found
    for _, _, zero in found:
        assert zero.dtype == activations
        assert not scheme.symmetric or zero == middle


@pytest.mark.parametrize(
    ("target", "activations", "words"),
    [
        ("tensorrt", "uint8", "target 'tensorrt' takes int8 activations, not uint8"),
        ("cpu", "uint16", "target 'cpu' takes uint8 or int8 activations, not uint16"),
        ("qnn", "int16", "target 'qnn' takes uint8 or uint16 activations, not int16"),
    ],
)
def test_other_activations_are_refused(target: str, activations: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        InsertQdq(target=target, activations=activations)


def test_16_bits_need_an_opset_that_has_them() -> None:
    net = Net(opset=17)
    net.op("Relu", conv(net, net.input("x", *IMAGE)), out="y")
    net.output("y")
    model, result = quantized(net.model(), feeds_of(net), target="qnn", activations="uint16")
    assert not result.modified and "opset 17" in result.skips[0].reason
    assert not list(pairs(model))


@pytest.mark.parametrize("target", QUANTIZING)
def test_biases_are_what_the_target_adds(target: str) -> None:
    kinds = {"int32": ir.DataType.INT32, "float32": ir.DataType.FLOAT}
    wanted = kinds[targets.load(target).weights.bias]
    biases = [n.inputs[2] for n in made_for(target).graph if len(n.inputs) > 2 and is_layer(n)]
    assert len(biases) == 6
    for bias in biases:
        assert bias is not None
        restore = bias.producer()
        assert (bias if restore is None else restore.inputs[0]).dtype == wanted  # pyright: ignore[reportOptionalMemberAccess]


def is_layer(node: ir.Node) -> bool:
    return node.op_type in ("Conv", "Gemm")


@pytest.mark.parametrize("target", QUANTIZING)
def test_scales_a_channel_stand_where_the_target_has_them(target: str) -> None:
    allowed = targets.load(target).weights.per_channel
    for node in made_for(target).graph:
        if is_layer(node):
            restore = node.inputs[1].producer()  # pyright: ignore[reportOptionalMemberAccess]
            assert restore is not None
            scale = constant(restore.inputs[1])
            assert scale is not None and (scale.size > 1) == (node.op_type in allowed)


@pytest.mark.parametrize("target", QUANTIZING)
def test_tied_operators_have_one_scale(target: str) -> None:
    kernels = targets.load(target).kernels
    tied = [n for n in made_for(target).graph if n.op_type in kernels and kernels[n.op_type].tied]
    assert len(tied) == {"tensorrt": 3, "openvino": 3, "qnn": 2}.get(target, 0)
    for node in tied:
        around = {pair_of(value) for value in (*node.inputs, *node.outputs)}
        assert len(around) == 1 and None not in around, node


@pytest.mark.parametrize(("factor", "tied"), [(0.5, True), (50.0, False)])
def test_a_tie_holds_along_a_chain_unless_it_would_cost_accuracy(factor: float, tied: bool) -> None:
    net = Net(opset=21)
    x = conv(net, net.input("x", *IMAGE))
    other = net.op("Mul", conv(net, "x"), net.weight("k", factor))
    joined = net.op("Concat", x, net.op("Transpose", other, perm=[0, 1, 3, 2]), axis=1)
    y = net.op("Transpose", joined, perm=[0, 1, 3, 2])
    net.op("Relu", net.op("Add", conv(net, y, 16), conv(net, x)), out="y")
    net.output("y")
    model, _ = quantized(net.model(), feeds_of(net), target="openvino", method="minmax")
    ends = [n for n in model.graph if n.op_type == "Transpose"]
    (concat,) = (n for n in model.graph if n.op_type == "Concat")
    for node in ends:
        assert pair_of(node.inputs[0]) == pair_of(node.outputs[0]) is not None
    around = {pair_of(v) for v in (*concat.inputs, *concat.outputs)}
    assert None not in around and (len(around) == 1) == tied
    assert least_sqnr(ir.from_proto(net.model()), model, feeds_of(net), "none") > 25


def test_tensorrt_adds_a_residual_within_the_convolution() -> None:
    model = made_for("tensorrt")
    (add,) = (n for n in model.graph if n.op_type == "Add")
    makers = {v.producer().op_type for v in add.inputs if v and v.producer()}  # pyright: ignore[reportOptionalMemberAccess]
    assert makers == {"Conv", "DequantizeLinear"}


@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
def test_an_output_that_nobody_wants_as_integers_stays_float(target: str) -> None:
    net = Net(opset=21)
    net.op("Tanh", conv(net, net.input("x", *IMAGE)), out="y")
    net.output("y")
    assert len(list(pairs(made_for(target, None, net)))) == 1
    assert len(list(pairs(made_for("cpu", None, net)))) == 2


@pytest.mark.parametrize("target", ["tensorrt", "openvino", "qnn"])
def test_nothing_stands_between_quantize_and_dequantize(target: str) -> None:
    for node, _, _ in pairs(made_for(target)):
        assert {usage.node.op_type for usage in node.outputs[0].uses()} == {"DequantizeLinear"}


@pytest.mark.parametrize(("activations", "step"), [("uint8", 2.0**-8), ("uint16", 2.0**-16)])
def test_qnn_has_sigmoid_and_tanh_on_the_scales_that_it_insists_on(
    activations: str, step: float
) -> None:
    net = Net(opset=21)
    x = net.op("Sigmoid", conv(net, net.input("x", *IMAGE)))
    y = net.op("Tanh", conv(net, net.op("Reshape", x, ints(net, 2, 8, 5, 20))))
    net.op("Relu", conv(net, y), out="y")
    net.output("y")
    model = made_for("qnn", activations, net)
    by_type = {n.op_type: n for n in model.graph}
    assert pair_of(by_type["Sigmoid"].outputs[0]) == (step, 0)
    assert pair_of(by_type["Reshape"].outputs[0]) == (step, 0)
    assert pair_of(by_type["Tanh"].outputs[0]) == (2 * step, 0.5 / step)
    assert least_sqnr(ir.from_proto(net.model()), model, feeds_of(net), "none") > 25


def test_operators_that_start_by_themselves_start_at_floats_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, kernel = targets.load("cpu"), targets.Kernel(anchor=True)
    starting = replace(cpu, kernels={**cpu.kernels, "Softmax": kernel, "Add": kernel})
    monkeypatch.setattr(targets, "load", lambda name: starting)
    net = Net(opset=21)
    net.op("Softmax", net.input("x", *IMAGE), out="y", axis=1)
    net.op("Cast", net.op("Add", net.op("Shape", "x"), ints(net, 1)), out="z", to=1)
    net.output("y")
    net.output("z")
    model = made_for("cpu", None, net)
    assert len(list(pairs(model))) == 2
    (add,) = (n for n in model.graph if n.op_type == "Add")
    assert pair_of(add.inputs[0]) is None and pair_of(add.outputs[0]) is None


@pytest.mark.parametrize("target", QUANTIZING)
def test_what_prepares_raw_data_stays_in_float(target: str) -> None:
    net = Net(opset=21)
    scaled = net.op("Mul", net.input("x", *IMAGE), net.normal("k", 8, 1, 1))
    net.op("Relu", conv(net, net.op("Add", scaled, net.normal("c", 8, 1, 1))), out="y")
    net.output("y")
    quantizers = [node for node, _, _ in pairs(made_for(target, None, net))]
    makers = {n.inputs[0].producer().op_type for n in quantizers if n.inputs[0]}  # pyright: ignore[reportOptionalMemberAccess]
    assert makers <= {"Add", "Relu"}


def test_a_split_is_tied_to_each_of_its_parts() -> None:
    net = Net(opset=21)
    x = conv(net, net.input("x", *IMAGE))
    net.nodes.append(
        onnx.helper.make_node("Split", [x], ["a", "b"], "split", axis=1, num_outputs=2)
    )
    net.op("Mul", conv(net, "a", 4), conv(net, "b", 4), out="y")
    net.output("y")
    for target in ("tensorrt", "openvino", "qnn"):
        model = made_for(target, None, net)
        (split,) = (n for n in model.graph if n.op_type == "Split")
        around = {pair_of(value) for value in (*split.inputs, *split.outputs)}
        assert len(around) == 1 and None not in around, target
        assert least_sqnr(ir.from_proto(net.model()), model, feeds_of(net), "none") > 25


@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
def test_rounding_and_bias_correction_reach_layers_whose_bias_stayed_float(target: str) -> None:
    net = network()
    proto, feeds = net.model(), feeds_of(net)
    model = made_for(target, None, net)
    rounded = apply(RoundSecondOrder(target=target), model, feeds)
    assert rounded.modified and rounded.figures["layers"] == 7 and not rounded.skips
    before, after = (rounded.figures[f"output error {when}"] for when in ("before", "after"))
    assert isinstance(before, float) and isinstance(after, float) and after < before / 2
    corrected = apply(CorrectBias(target=target), model, feeds)
    assert corrected.modified and not corrected.skips
    assert least_sqnr(ir.from_proto(proto), model, feeds, "none") > 35
    left = corrected.figures["mean error after"]
    assert isinstance(left, float) and left < 1e-9  # no step of an integer is left, only float32's
    assert not any(v.dtype == ir.DataType.INT32 for v in model.graph.initializers.values())


@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
def test_rounding_and_bias_correction_pay_at_the_output(target: str) -> None:
    """Where weights lose most, for what the data loses by its own rounding neither pass gives back.

    One large element a channel makes the steps of its weights coarse.
    """
    net = network()
    for weight in net.weights:
        array = onnx.numpy_helper.to_array(weight).copy()
        if array.ndim > 1:
            array[:, 0] *= 8
            weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    feeds, others = feeds_of(net, count=12), feeds_of(net, seed=2, count=24)
    original = ir.from_proto(net.model())
    model, _ = quantized(net.model(), feeds, target=target)
    plain, unseen = (sqnr(original, model, data, "none") for data in (feeds, others))
    apply(RoundSecondOrder(target=target), model, feeds)
    apply(CorrectBias(target=target), model, feeds)
    assert sqnr(original, model, feeds, "none") > plain
    assert sqnr(original, model, others, "none") > unseen


@pytest.mark.parametrize("target", ["cuda", "coreml"])
def test_no_pairs_for_a_runtime_without_integer_kernels(target: str) -> None:
    net = network()
    model, result = quantized(net.model(), feeds_of(net), target=target)
    assert not result.modified and not list(pairs(model))


@pytest.mark.parametrize("target", targets.names())
def test_weights_are_quantized_alone_only_where_that_runs(target: str) -> None:
    net = Net(opset=21)
    net.op("MatMul", net.input("x", 4, 128), net.normal("w", 128, 128), out="y")
    net.output("y")
    result = QuantizeDynamic(target=target)(ir.from_proto(net.model()))
    takes = "MatMul" in targets.load(target).dynamic
    assert result.modified == takes == (target in ("cpu", "cpu-arm", "web"))


def test_pairs_of_weights_are_bounded_for_the_web_whatever_this_machine_has() -> None:
    bounded = {n: targets.load(n).bounds_pair_sums for n in ("web", "tensorrt", "qnn", "cpu-arm")}
    assert bounded == {"web": True, "tensorrt": False, "qnn": False, "cpu-arm": False}


def test_a_symmetric_target_keeps_zero_in_the_middle_behind_leaky_relu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, symmetric = targets.load("cpu"), targets.load("tensorrt").activations
    monkeypatch.setattr(targets, "load", lambda name: replace(cpu, activations=symmetric))
    net = Net(opset=21)
    x = net.op("LeakyRelu", conv(net, net.input("x", *IMAGE)), alpha=0.1)
    net.op("Relu", net.op("Add", conv(net, x), net.normal("k", 8, 1, 1)), out="y")
    net.output("y")
    model = made_for("cpu", None, net)
    restored = (n for n in model.graph if n.op_type == "DequantizeLinear")
    zeros = [constant(n.inputs[2]) for n in restored]
    assert zeros and not any(zero.any() for zero in zeros if zero is not None)
