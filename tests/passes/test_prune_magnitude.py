"""Magnitude pruning: the exact count, the exact order, and every way in which a weight is held."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from onnxcompress import variants
from onnxcompress.cli import main
from onnxcompress.contract import Pass, Result
from onnxcompress.errors import InputError
from onnxcompress.measure import Measurement
from onnxcompress.numerics.magnitudes import cut_smallest, prune
from onnxcompress.numerics.saturation import trim_pairs
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.passes.prune_magnitude import PruneMagnitude
from onnxcompress.passes.quantize_dynamic import QuantizeDynamic
from onnxcompress.targets import Target
from tests.passes.exactness import Net, apply, run

PASS = PruneMagnitude(sparsity=0.5, scope="tensor", min_elements=0)


NUMBERS_32 = st.floats(-4, 4, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0])


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
        "sparsity by tensor": {"w0": 0.5, "w1": 12 / 25},
    }
    assert [np.count_nonzero(w == 0) for w in weights(after).values()] == [20, 0, 12, 0]
    onnx.checker.check_model(after)


def shares(result: Result) -> dict[str, float]:
    found = result.figures["sparsity by tensor"]
    assert isinstance(found, Mapping)
    return dict(found)


def test_globally_the_smaller_tensor_gives_more():
    small, large = normal(6, 6), 3 * normal(6, 6, seed=1)
    pass_ = PruneMagnitude(scope="global", min_elements=0)
    _, result = apply(pass_, layers(small, large))
    assert result.figures["zeros"] == 36
    assert shares(result)["w0"] > 0.6 > 0.4 > shares(result)["w1"]


def test_by_default_the_scale_of_a_tensor_does_not_matter():
    pass_ = PruneMagnitude(min_elements=0)
    plain, first = apply(pass_, layers(normal(6, 9), normal(9, 6, seed=1)))
    after, second = apply(pass_, layers(normal(6, 9), 1024 * normal(9, 6, seed=1)))
    assert first.figures == second.figures and first.figures["zeros"] == 54
    assert 0.3 < shares(first)["w0"] < 0.7
    assert np.array_equal(1024 * weights(plain)["w1"], weights(after)["w1"])


SMALL = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.just(5)), elements=NUMBERS_32)


@settings(max_examples=60, deadline=None)
@given(st.lists(SMALL, min_size=1, max_size=3), st.floats(0, 1))
def test_by_default_the_smallest_of_each_tensor_go(values: Any, share: float):
    before = {f"w{i}": value for i, value in enumerate(values)}
    net = Net()
    for name, value in before.items():
        net.op("MatMul", net.input(f"x_{name}", 1, len(value)), net.weight(name, value))
    after, result = apply(PruneMagnitude(sparsity=share, min_elements=0), net.model())
    count = round(sum(v.size for v in values) * share)
    zeros = 0
    for name, weight in weights(after).items():
        gone = weight != before[name]
        kept = np.abs(weight[weight != 0])
        assert not weight[gone].any(), "what is not zero was not touched"
        assert np.abs(before[name][gone]).max(initial=0) <= kept.min(initial=np.inf)
        zeros += np.count_nonzero(weight == 0)
    assert zeros == result.figures["zeros"] == max(count, sum((v == 0).sum() for v in values))


def test_a_threshold_is_strict_and_in_the_dtype_of_the_weight():
    weight = np.asarray([[0.1, -0.1], [0.0999, 7]], np.float32)
    after, result = apply(PruneMagnitude(threshold=0.1, min_elements=0), layers(weight))
    assert weights(after)["w0"].tolist() == [[weight[0, 0], weight[0, 1]], [0, 7]]
    assert result.figures["zeros"] == 1


def test_of_equal_magnitudes_the_first_go():
    weight = np.asarray([[1, -1, 1], [-1, 1, 1]], np.float32)
    after, _ = apply(dataclasses.replace(PASS, sparsity=1 / 3), layers(weight))
    assert weights(after)["w0"].tolist() == [[0, 0, 1], [-1, 1, 1]]


@pytest.mark.parametrize("scope", ["layer_adaptive", "global", "tensor"])
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


SEEN: Any = Seen()
QDQ = InsertQdq(statistics=SEEN)


@pytest.fixture(params=["bounded", "free"])
def pair_sums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights for processors whose sums of pairs saturate, and for others."""
    bounded = property(lambda _: request.param == "bounded")
    monkeypatch.setattr(Target, "bounds_pair_sums", bounded)


@pytest.mark.usefixtures("pair_sums")
@pytest.mark.parametrize("pass_", [QuantizeDynamic(min_elements=0), QDQ], ids=lambda p: p.name)
def test_zeros_survive_quantization(pass_: Pass):
    """Of normal weights, and of pairs of large ones, whose sums would saturate."""
    weight = np.concatenate([normal(24, 12), np.full((8, 12), 4, np.float32)])
    sparse, _ = apply(dataclasses.replace(PASS, sparsity=0.6), layers(weight, normal(12, 12)))
    quantized, result = apply(pass_, sparse)
    assert result.modified
    held = weights(quantized)
    for name in ("w0", "w1"):
        zeros, codes = weights(sparse)[name] == 0, held[f"{name}_quantized"]
        assert codes.dtype == np.int8 and not codes[zeros].any() and codes.any()
        assert np.count_nonzero(zeros) == round(0.6 * zeros.size)
    points = [v for k, v in held.items() if k.startswith("w") and "zero_point" in k]
    assert not any(p.any() for p in points)


@given(hnp.arrays(np.int8, (3, 7), elements=st.integers(-127, 127) | st.just(0)))
def test_zeros_survive_the_trimming_of_pairs(rows: Any):
    assert not trim_pairs(rows)[rows == 0].any()


RECIPE = """
[gates]
accuracy_drop = "<= 0.02"
top1_agreement = ">= 0.9"

[[passes]]
name = "fold_batchnorm"

[[passes]]
name = "prune_magnitude"
sparsity = 0.3

[[passes]]
name = "insert_qdq"
"""
DIGITS = Path(__file__).parents[2] / "models" / "photo_digits"


def test_pruned_and_quantized_by_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(variants, "_LATENCY_SECONDS", 0.05)
    alone = Measurement(path="m.onnx", size=1, p50_ms=1, p90_ms=1, runs=1, peak_memory=1)
    monkeypatch.setattr(variants, "measure", lambda *args, **kwargs: alone)  # pyright: ignore[reportUnknownLambdaType]
    (tmp_path / "r.toml").write_text(RECIPE)
    done = CliRunner().invoke(
        main,
        [
            *("compress", f"{DIGITS}/model.onnx", "-o", f"{tmp_path}/small.onnx", "--json"),
            *("--recipe", f"{tmp_path}/r.toml", "--samples", "256"),
            *("--calibrate", f"{DIGITS}/calibration.npz"),
            *("--evaluate", f"{DIGITS}/evaluation.npz"),
        ],
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    _, pruned, quantized = report["passes"]
    figures = pruned["figures"]
    assert figures["sparsity"] == pytest.approx(0.3, abs=1e-4)
    assert 0 <= min(figures["sparsity by tensor"].values()) < 0.3
    assert 0.3 < max(figures["sparsity by tensor"].values()) < 0.9
    assert quantized["figures"]["integer kernels"] > 10 and not quantized["skips"]
    assert report["result"]["size"] < report["source"]["size"] / 3
    (attempt,) = [attempt for attempt in report["attempts"] if attempt["kept"]]
    assert attempt["scheme"] == "recipe"
    codes = [w for w in weights(onnx.load(tmp_path / "small.onnx")).values() if w.dtype == np.int8]
    zeros = sum(np.count_nonzero(c == 0) for c in codes if c.ndim > 1)
    assert figures["zeros"] <= zeros < 0.4 * figures["weights"]


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
    assert result.skips == () and result.figures == {
        "weights": 0,
        "zeros": 0,
        "sparsity by tensor": {},
    }


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
    return ir.tensor((np.arange(1 << 21, dtype=np.float32) % (1013 + seed)).reshape(1024, 2048))


@pytest.mark.parametrize("scope", ["layer_adaptive", "global"])
def test_large_weights_are_never_held(scope: Any):
    """Six weights of 8 MB: the peak stays near one of them."""
    model = ir.from_proto(layers(*(np.zeros((1, 1), np.float32) for _ in range(8))))
    shape = ir.Shape((1024, 2048))
    for index in range(6):
        lazy = ir.LazyTensor(partial(numbers, index), ir.DataType.FLOAT, shape)
        model.graph.initializers[f"w{index}"].const_value = lazy
    tracemalloc.start()
    try:
        result = dataclasses.replace(PASS, scope=scope)(model)
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
    assert peak < 36e6, "of 50 MB"
