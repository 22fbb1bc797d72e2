"""Magnitude pruning: the exact count, the exact order, and every way in which a weight is held."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.contract import Result
from onnxcompress.errors import InputError
from onnxcompress.numerics.magnitudes import cut_smallest, prune
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.passes.prune_magnitude import PruneMagnitude
from onnxcompress.passes.quantize_dynamic import QuantizeDynamic
from tests.passes.exactness import Net, apply, run

PASS = PruneMagnitude(sparsity=0.5, scope="tensor", min_elements=0)


def weights(proto: onnx.ModelProto) -> dict[str, Any]:
    return {w.name: numpy_helper.to_array(w) for w in proto.graph.initializer}


def layers(*values: Any, dtype: Any = np.float32) -> onnx.ModelProto:
    """A chain of products with these weights, w0, w1, ..., each with a bias."""
    net = Net(dtype=dtype)
    x = net.input("x", "N", len(values[0]))
    for index, value in enumerate(values):
        x = net.op("MatMul", x, net.weight(f"w{index}", value))
        x = net.op("Add", x, net.normal(f"b{index}", value.shape[1]))
    net.output(net.op("Relu", x, out="y"))
    return net.model()


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_half_of_each_tensor_is_zero():
    proto = layers(normal(8, 5), 10 * normal(5, 5))
    after, result = apply(PASS, proto)
    assert result.figures == {
        "weights": 65,
        "zeros": 32,
        "sparsity": 32 / 65,
        "sparsity of w0": 0.5,
        "sparsity of w1": 12 / 25,
    }
    assert [np.count_nonzero(w == 0) for w in weights(after).values()] == [20, 0, 12, 0]
    onnx.checker.check_model(after)


def test_globally_the_smaller_tensor_gives_more():
    small, large = normal(6, 6), 3 * normal(6, 6, seed=1)
    _, result = apply(PruneMagnitude(min_elements=0), layers(small, large))
    assert result.figures["zeros"] == 36
    shares = {k: float(v) for k, v in result.figures.items()}
    assert shares["sparsity of w0"] > 0.6 > 0.4 > shares["sparsity of w1"]


def test_a_threshold_is_strict_and_in_the_dtype_of_the_weight():
    weight = np.asarray([[0.1, -0.1], [0.0999, 7]], np.float32)
    after, result = apply(PruneMagnitude(threshold=0.1, min_elements=0), layers(weight))
    assert weights(after)["w0"].tolist() == [[weight[0, 0], weight[0, 1]], [0, 7]]
    assert result.figures["zeros"] == 1


def test_of_equal_magnitudes_the_first_go():
    weight = np.asarray([[1, -1, 1], [-1, 1, 1]], np.float32)
    after, _ = apply(dataclasses.replace(PASS, sparsity=1 / 3), layers(weight))
    assert weights(after)["w0"].tolist() == [[0, 0, 1], [-1, 1, 1]]


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
def test_a_second_run_changes_nothing(scope: Any, sparsity: float):
    pass_ = dataclasses.replace(PASS, scope=scope, sparsity=sparsity)
    once, first = apply(pass_, layers(normal(7, 5), normal(5, 3)))
    twice, second = apply(pass_, once)
    assert first.modified == (sparsity > 0)
    assert not second.modified and twice == once and second.figures == first.figures


class Held:
    """An array as `cut_smallest` reads it."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def numpy(self) -> Any:
        return self.array


DTYPES = st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
NUMBERS = st.floats(-4, 4, width=16) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-7])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(hnp.arrays(np.float64, st.integers(0, 40), elements=NUMBERS), DTYPES),
        min_size=1,
        max_size=4,
    ),
    st.floats(0, 1),
)
def test_exactly_the_smallest_go(arrays: Any, share: float):
    held = [Held((a * (1 + 1e-12)).astype(dtype)) for a, dtype in arrays]
    count = round(sum(h.array.size for h in held) * share)
    wide = any(h.array.dtype == np.float64 for h in held)
    cuts = cut_smallest(held, count, wide=wide)
    pruned = [prune(h.array, cut) for h, cut in zip(held, cuts, strict=True)]
    before = np.concatenate([h.array.astype(np.float64) for h in held])
    after = np.concatenate([p.astype(np.float64) for p in pruned])
    assert np.count_nonzero(after == 0) == max(count, np.count_nonzero(before == 0))
    assert sum(cut.zeros for cut in cuts) == np.count_nonzero(after == 0)
    gone = after != before
    assert sum(cut.changed for cut in cuts) == np.count_nonzero(gone)
    assert not after[gone].any(), "what is not zero was not touched"
    kept = np.abs(after[after != 0])
    assert np.abs(before[gone]).max(initial=0) <= kept.min(initial=np.inf)


def test_blocks_larger_than_one_agree_with_a_sort():
    arrays = [Held(normal(1100, 1000)), Held(normal(3, 5, seed=2))]
    (first, second) = cut_smallest(arrays, 700_001, wide=False)
    flat = np.concatenate([h.array.ravel() for h in arrays])
    limit = np.sort(np.abs(flat))[700_000]
    for held, cut in zip(arrays, (first, second), strict=True):
        assert np.array_equal(prune(held.array, cut) == 0, np.abs(held.array) <= limit)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats(dtype: Any):
    after, result = apply(PASS, layers(normal(8, 5), dtype=dtype))
    weight = weights(after)["w0"]
    assert weight.dtype == dtype and np.count_nonzero(weight == 0) == 20
    assert result.modified


def conv_net() -> onnx.ModelProto:
    """Every kind of constant beside weights: bias, norm, table, shape; and a recurrent layer."""
    net = Net()
    net.input("x", 2, 4, 6, 6)
    conv = net.op("Conv", "x", net.normal("w_conv", 4, 4, 3, 3), net.normal("b_conv", 4))
    flat = net.op("GlobalAveragePool", net.norm(conv, 4, out="n"))
    net.weights.append(numpy_helper.from_array(np.asarray([1, 2, 4], np.int64), "shape"))
    seq = net.op("Reshape", flat, "shape")
    lstm = net.op(
        *("LSTM", seq, net.normal("w_lstm", 1, 12, 4), net.normal("r_lstm", 1, 12, 3)),
        hidden_size=3,
    )
    table = net.op("Gather", net.normal("table", 9, 3), "ids")
    net.weights.append(numpy_helper.from_array(np.asarray([3, 5], np.int64), "ids"))
    net.output(net.op("Add", lstm, table, out="y"))
    return net.model()


def pruned_names(proto: onnx.ModelProto, pass_: PruneMagnitude) -> set[str]:
    after, _ = apply(pass_, proto)
    before = weights(proto)
    return {k for k, w in weights(after).items() if not np.array_equal(w, before[k])}


def test_weights_are_pruned_and_other_constants_are_not_unless_named():
    proto = conv_net()
    only = dataclasses.replace
    assert pruned_names(proto, PASS) == {"w_conv", "w_lstm", "r_lstm"}
    assert pruned_names(proto, only(PASS, exclude=("LSTM",))) == {"w_conv"}
    assert pruned_names(proto, only(PASS, exclude=("w_*",))) == {"r_lstm"}
    assert pruned_names(proto, only(PASS, include=("Gather",))) == {"table"}
    assert pruned_names(proto, only(PASS, include=("b_conv", "n_n"))) == {"b_conv", "n_scale"}
    assert pruned_names(proto, only(PASS, min_elements=100)) == {"w_conv"}


def test_a_constant_left_operand_is_a_weight():
    net = Net()
    net.input("x", 4, 3)
    net.output(net.op("MatMul", net.normal("w", 5, 4), "x", out="y"))
    assert pruned_names(net.model(), PASS) == {"w"}


def test_a_weight_of_several_products_is_pruned_once():
    net = Net()
    net.input("x", "N", 6)
    net.op("MatMul", net.op("MatMul", "x", net.normal("w", 6, 6)), "w", out="y")
    net.output("y")
    after, result = apply(PASS, net.model())
    assert np.count_nonzero(weights(after)["w"] == 0) == 18 == result.figures["zeros"]


def test_weights_in_branches_and_functions_and_constant_nodes():
    then, other, net = Net(prefix="t"), Net(prefix="e"), Net()
    for branch, name in ((then, "a"), (other, "b")):
        held = numpy_helper.from_array(normal(4, 4))
        branch.op("MatMul", "x", branch.op("Constant", value=held), out=name)
        branch.output(name, (2, 4))
    net.input("x", 2, 4)
    net.inputs.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, ()))
    net.op("If", "flag", out="c", then_branch=then.graph(), else_branch=other.graph())
    body = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(normal(4, 4))),
        helper.make_node("MatMul", ["u", "w"], ["v"]),
    ]
    opsets = [helper.make_opsetid("", 17)]
    net.functions.append(helper.make_function("own", "F", ["u"], ["v"], body, opsets))
    net.domains["own"] = 1
    net.op("F", "c", out="y", domain="own")
    net.output("y", (2, 4))
    net.infer = False
    after, result = apply(PASS, net.model())
    assert result.figures["zeros"] == 24 and result.figures["sparsity"] == 0.5
    sparse = normal(4, 4)
    sparse[np.abs(sparse) < np.median(np.abs(sparse))] = 0
    x = np.ones((2, 4), np.float32)
    (y,) = run(after, {"x": x, "flag": np.asarray(True)})
    np.testing.assert_allclose(y, x @ sparse @ sparse, rtol=1e-5)


def test_zeros_survive_dynamic_quantization():
    proto = layers(normal(24, 12), normal(12, 12, seed=1))
    sparse, _ = apply(dataclasses.replace(PASS, sparsity=0.7), proto)
    quantized, _ = apply(QuantizeDynamic(min_elements=0), sparse)
    zeros = weights(sparse)["w0"] == 0
    codes = weights(quantized)["w0_quantized"]
    assert not codes[zeros].any() and np.count_nonzero(zeros) == 202


@dataclasses.dataclass(frozen=True)
class Seen:
    """Statistics of a model whose every value was seen from -4 to 4."""

    minimum: float = -4.0
    maximum: float = 4.0

    def histogram(self, value: str) -> Seen:
        return self

    def points(self) -> tuple[Any, Any]:
        return np.asarray([-4, 4], np.float32), np.asarray([1, 1], np.int64)

    def missing(self, wants: Any) -> list[Any]:
        return []


def test_zeros_survive_static_quantization():
    sparse, _ = apply(dataclasses.replace(PASS, sparsity=0.7), layers(normal(24, 12)))
    seen: Any = Seen()
    quantized, result = apply(InsertQdq(statistics=seen), sparse)
    assert result.modified
    zeros = weights(sparse)["w0"] == 0
    assert not weights(quantized)["w0_quantized"][zeros].any() and zeros.sum() == 202
    points = [v for k, v in weights(quantized).items() if "w0" in k and "zero_point" in k]
    assert points and not any(p.any() for p in points)


def overridable() -> onnx.ModelProto:
    net = Net()
    net.input("x", 2, 3, 8, 8)
    net.op("Conv", "x", net.normal("w", 4, 3, 3, 3), out="y")
    net.input("w", 4, 3, 3, 3)
    net.output("y")
    return net.model()


def computed() -> onnx.ModelProto:
    net = Net()
    net.input("x", 2, 3, 8, 8)
    net.op("Conv", "x", net.op("Neg", net.normal("w", 4, 3, 3, 3)), out="y")
    net.output("y")
    return net.model()


def stored_as_integers() -> onnx.ModelProto:
    net = Net()
    net.input("x", 2, 4)
    net.weights.append(numpy_helper.from_array(np.ones((4, 4), np.int8), "q"))
    restored = net.op("DequantizeLinear", "q", net.weight("s", 0.5))
    net.op("MatMul", "x", restored, out="y")
    net.output("y")
    return net.model()


def tied() -> onnx.ModelProto:
    net = Net()
    net.weights.append(numpy_helper.from_array(np.asarray([1, 2], np.int64), "ids"))
    net.input("x", 2, 4)
    net.op("Gather", net.normal("w", 4, 4), "ids", out="y")
    net.op("MatMul", "x", "w", out="z")
    net.output("y")
    net.output("z")
    return net.model()


def returned() -> onnx.ModelProto:
    proto = layers(normal(4, 4))
    proto.graph.output.append(helper.make_tensor_value_info("w0", TensorProto.FLOAT, (4, 4)))
    return proto


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (overridable, "overridden"),
        (computed, "computed"),
        (stored_as_integers, "before quantizing"),
        (tied, "Gather 'n_y' reads it too"),
        (returned, "output of the model"),
    ],
)
def test_what_is_declined_and_why(make: Callable[[], onnx.ModelProto], why: str):
    proto = make()
    after, result = apply(PASS, proto)
    assert not result.modified and after == ir.to_proto(ir.from_proto(proto))
    (skip,) = result.skips
    assert why in skip.reason


def test_a_product_of_activations_is_no_site():
    net = Net()
    net.input("x", 4, 4)
    net.output(net.op("MatMul", "x", "x", out="y"))
    _, result = apply(PASS, net.model())
    assert result.skips == () and result.figures == {"weights": 0, "zeros": 0}


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 1.5},
        {"sparsity": -0.1},
        {"sparsity": float("nan")},
        {"threshold": -1.0},
        {"threshold": float("nan")},
        {"sparsity": 0.5, "threshold": 0.1},
    ],
)
def test_options_that_mean_nothing_are_refused(options: Any):
    with pytest.raises(InputError):
        PruneMagnitude(**options)


def numbers(seed: int) -> ir.TensorProtocol:
    return ir.tensor((np.arange(1 << 22, dtype=np.float32) % (1013 + seed)).reshape(2048, 2048))


def test_large_weights_are_never_held():
    """Six weights of 16 MB: the peak stays near one of them."""
    model = ir.from_proto(layers(*(np.zeros((1, 1), np.float32) for _ in range(8))))
    shape = ir.Shape((2048, 2048))
    for index in range(6):
        lazy = ir.LazyTensor(partial(numbers, index), ir.DataType.FLOAT, shape)
        model.graph.initializers[f"w{index}"].const_value = lazy
    tracemalloc.start()
    try:
        result = dataclasses.replace(PASS, scope="global")(model)
        weight = model.graph.initializers["w3"].const_value
        assert isinstance(weight, ir.LazyTensor)
        assert 0.45 < np.count_nonzero(weight.numpy() == 0) / weight.size < 0.55
        written = BytesIO()
        weight.tofile(written)
        assert written.getvalue() == weight.numpy().tobytes()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(result, Result) and result.figures["sparsity"] == 0.5
    assert peak < 72e6, "of 100 MB"
