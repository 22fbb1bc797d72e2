"""Validation: figures of known errors, decisions, labels, where the error enters, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcompress.errors import InputError
from onnxcompress.numerics.decisions import Agreement, Metric, Scorer, within_top
from onnxcompress.numerics.fidelity import Fidelity
from onnxcompress.session import Feed, Session
from onnxcompress.validation import compare
from onnxcompress.validation.class_scores import gives_class_scores

CHAIN = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y)
<float[4, 4] w1 = {W1}, float[4, 4] w2 = {W2}>
{{
  a = MatMul(x, w1)
  b = Relu(a)
  b2 = Identity(b)
  y = MatMul(b2, w2)
}}
"""


def chain(first: float = 1.0, second: float = 1.0) -> ir.Model:
    """Two identity layers, each scaled."""
    w1, w2 = (np.eye(4).ravel() * scale for scale in (first, second))
    text = CHAIN.format(W1=_braces(w1), W2=_braces(w2))
    return ir.from_onnx_text(text)


def one(expression: str, kind: str = "float[N, 4]", out: str = "float[N, 4]") -> ir.Model:
    """A model of one input `x` and one output `y`."""
    header = '<ir_version: 8, opset_import: ["" : 17]>'
    return ir.from_onnx_text(f"{header} g ({kind} x) => ({out} y) {{ {expression} }}")


def _braces(values: np.ndarray) -> str:
    return "{" + ", ".join(f"{v:.9g}" for v in values) + "}"


def feeds(count: int = 3, rows: int = 2, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((rows, 4)).astype(np.float32)} for _ in range(count)]


def test_a_model_is_exactly_itself():
    found = compare(chain(), chain(), feeds())
    (y,) = found.outputs
    assert found.feeds == 3 and not found.failures and not found.warnings
    assert y.max_error == y.max_relative == 0 and y.sqnr == math.inf
    assert y.cosine == pytest.approx(1) and y.agreement == 1
    assert y.agreement_top_k is None, "four classes have no five best"
    assert all(layer.sqnr == math.inf and layer.added == 0 for layer in found.layers)


def test_a_scaled_output_has_the_sqnr_of_its_scale():
    (y,) = compare(chain(), chain(second=1.1), feeds(), top_k=2).outputs
    peak = max(np.maximum(f["x"], 0).max() for f in feeds())
    assert y.sqnr == pytest.approx(20, abs=1e-3)
    assert y.max_error == pytest.approx(0.1 * peak, rel=1e-4)
    assert y.max_relative == pytest.approx(0.1, rel=1e-4)
    assert y.cosine == pytest.approx(1) and y.agreement == 1 and y.agreement_top_k == 1


def test_layers_say_where_the_error_enters():
    found = compare(chain(), chain(first=1.1), feeds())
    by_name = {layer.tensor: layer for layer in found.layers}
    assert list(by_name) == ["a", "b", "y"], "in graph order, without what only moved"
    assert by_name["a"].sqnr == pytest.approx(20, abs=1e-3)
    assert by_name["a"].upstream == math.inf
    assert by_name["a"].added == pytest.approx(0.01, rel=1e-3)
    assert by_name["y"].upstream == pytest.approx(by_name["b"].sqnr)
    assert by_name["y"].added == pytest.approx(0, abs=1e-6)
    assert found.worst_layers()[0] == by_name["a"]


def test_layers_pair_by_the_names_given_and_may_be_left_out():
    other = chain(first=1.1)
    for node in other.graph:
        if node.outputs[0].name == "a":
            node.outputs[0].name = "renamed"
    paired = compare(chain(), other, feeds(), names={"a": "renamed"})
    assert "a" in {layer.tensor for layer in paired.layers}
    assert "a" not in {layer.tensor for layer in compare(chain(), other, feeds()).layers}
    assert compare(chain(), other, feeds(), layers=False).layers == ()


def test_models_without_a_common_tensor_have_no_layers():
    found = compare(one("y = Identity(x)"), one("y = Identity(x)"), feeds())
    assert found.layers == () and found.outputs[0].sqnr == math.inf


def test_only_the_first_feeds_are_tapped():
    data = feeds(2)
    data[1]["x"] = data[1]["x"] * 0 + 1
    only_first = compare(chain(), chain(first=1.1), data, layer_feeds=1).layers
    assert only_first == compare(chain(), chain(first=1.1), data[:1]).layers


def test_paths_and_models_mix(tmp_path: Path):
    path = tmp_path / "m.onnx"
    ir.save(chain(), path)
    for original, candidate in ((path, chain()), (str(path), path)):
        assert compare(original, candidate, feeds()).outputs[0].sqnr == math.inf


def test_nan_in_the_candidate_is_a_failure_and_enters_no_sum():
    candidate = one("z = Sqrt(x) s = Mul(z, z) y = Identity(s)")
    data = [{"x": np.array([[4, -1, 1, 9]], np.float32)}]
    found = compare(one("y = Identity(x)"), candidate, data)
    assert found.outputs[0].broken == 1 and found.outputs[0].max_error == pytest.approx(0, abs=1e-5)
    assert "'y'" in found.failures[0] and "1 NaN or infinite" in found.failures[0]


def test_infinities_of_the_original_are_nobodys_error():
    data = [{"x": np.array([[0, 1, 2, 4]], np.float32)}]
    found = compare(one("y = Log(x)"), one("y = Log(x)"), data)
    assert found.outputs[0].sqnr == math.inf and not found.failures


def test_another_shape_at_run_time_is_a_failure():
    header = '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4] x) => (float[M, K] y)'
    kept = ir.from_onnx_text(header + "{ y = Identity(x) }")
    turned = ir.from_onnx_text(header + "{ y = Transpose(x) }")
    found = compare(kept, turned, feeds())
    assert "[2, 4] in the original, [4, 2] in the candidate" in found.failures[0]
    assert found.outputs[0].skipped


def test_sequences_are_skipped_with_a_reason():
    m = one("y = SequenceConstruct(x, x)", out="seq(float[N, 4])")
    found = compare(m, m, feeds())
    assert "not a tensor" in found.outputs[0].skipped and not found.failures


def test_integer_outputs_agree_element_by_element():
    least = one("y = ArgMin<axis = 1, keepdims = 0>(x)", out="int64[N]")
    most = one("y = ArgMax<axis = 1, keepdims = 0>(x)", out="int64[N]")
    assert compare(most, most, feeds()).outputs[0].agreement == 1
    assert compare(most, least, feeds()).outputs[0].agreement == 0


def test_accuracy_of_classes_before_and_after():
    data = [{"x": np.eye(4, dtype=np.float32)}]
    flipped = one("y = Neg(x)")
    (y,) = compare(one("y = Identity(x)"), flipped, data, labels=[0, 1, 2, 0]).outputs
    assert y.score and (y.score.metric, y.score.original) == (Metric.ACCURACY, 0.75)
    assert y.score.candidate == 0.25, "the first of three equal scores wins for the last row"
    assert y.agreement == 0


def test_labels_come_with_the_data():
    class Labelled(list[dict[str, np.ndarray]]):
        labels = np.array([3])

    data = Labelled([{"x": np.array([[0, 0, 0, 1]], np.float32)}])
    (y,) = compare(chain(), chain(), data).outputs
    assert y.score and y.score.original == y.score.candidate == 1


def test_labels_must_be_as_many_as_the_samples():
    with pytest.raises(InputError, match="5 labels but output 'y' gave 6 samples"):
        compare(chain(), chain(), feeds(), labels=[0] * 5)


def test_labels_that_fit_nothing_are_told():
    found = compare(chain(), chain(), feeds(), labels=np.zeros((6, 7)))
    assert found.outputs[0].score is None and "fit no output" in found.warnings[0]


@pytest.mark.parametrize("labels", ["cat", [["a"]], 3])
def test_labels_that_are_no_numbers_by_sample_are_refused(labels: object):
    with pytest.raises(InputError, match="labels must be an array of numbers"):
        compare(chain(), chain(), feeds(), labels=labels)  # pyright: ignore[reportArgumentType]


def test_no_feeds_is_an_input_error():
    with pytest.raises(InputError, match="no feeds"):
        compare(chain(), chain(), [])


@pytest.mark.parametrize(
    ("candidate", "said"),
    [
        (one("y = Identity(x)", kind="float[N, 5]"), r"input 'x' is FLOAT \[N,4\].*\[N,5\]"),
        (one("y = Identity(x)", "double[N, 4]", "double[N, 4]"), "input 'x' is FLOAT.*DOUBLE"),
        (one("y = Identity(x)", out="float[N, 4, 1]"), "output 'y'"),
        (one("y = Identity(x) z = Neg(y)"), None),
    ],
)
def test_interfaces_that_differ_are_told_in_one_sentence(candidate: ir.Model, said: str | None):
    if said is None:
        compare(one("y = Identity(x)"), candidate, feeds())
        return
    with pytest.raises(InputError, match=said) as failure:
        compare(one("y = Identity(x)"), candidate, feeds())
    assert "\n" not in str(failure.value)


def test_a_missing_output_is_told():
    two = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> '
        "g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) { y = Neg(x) z = Abs(x) }"
    )
    with pytest.raises(InputError, match="output 'z' is absent in the original"):
        compare(one("y = Neg(x)"), two, feeds())
    with pytest.raises(InputError, match=r"output 'z' .* absent in the candidate"):
        compare(two, one("y = Neg(x)"), feeds())


W = "w = Constant<value = float[4, 4] {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}>()"
V = "v = Constant<value = float[4] {1, 2, 3, 4}>()"
TWO = "two = Constant<value = float {2}>()"


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("y = MatMul(x, x)", True),
        (f"{W} {V} m = MatMul(x, w) y = Add(m, v)", True),
        (f"{W} {TWO} m = MatMul(x, w) d = Div(m, two) y = Identity(d)", True),
        (f"{W} m = MatMul(x, w) r = Relu(m) y = Softmax(r)", True),
        ("e = Exp(x) s = ReduceSum(e) y = Div(e, s)", True),
        (f"{V} y = LayerNormalization(x, v)", False),
        (f"{W} {V} m = MatMul(x, w) n = Mul(m, v) y = Add(n, v)", False),
        ("y = Mul(x, x)", False),
        ("y = Tanh(x)", None),
        ("y = custom.Op(x)", None),
    ],
)
def test_the_graph_says_whether_it_gives_class_scores(nodes: str, expected: bool | None):
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17, "custom" : 1]> '
        f"g (float[4, 4] x) => (float[4, 4] y) {{ {nodes} }}"
    )
    assert gives_class_scores(model.graph.outputs[0]) is expected


def test_hidden_states_have_no_decisions_but_scores_of_tokens_have():
    tokens = one("y = Softmax(x)", "float[N, 3, 4]", "float[N, 3, 4]")
    hidden = one("y = Tanh(x)", "float[N, 3, 4]", "float[N, 3, 4]")
    data = [{"x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)}]
    assert compare(tokens, tokens, data).outputs[0].agreement == 1
    assert compare(hidden, hidden, data).outputs[0].agreement is None


@given(hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-100, 100, width=32)))
def test_fidelity_does_not_depend_on_how_the_stream_is_cut(values: np.ndarray):
    other = (values * np.float32(1.25)).astype(np.float32)
    whole, cut = Fidelity(), Fidelity()
    whole.update(values, other)
    for a, b in zip(values, other, strict=True):
        cut.update(a[None], b[None])
    assert whole.max_error == cut.max_error and whole.count == cut.count
    assert whole.noise_to_signal == pytest.approx(cut.noise_to_signal)


def test_figures_of_silence():
    both, only_noise = Fidelity(), Fidelity()
    both.update(np.zeros(3), np.zeros(3))
    only_noise.update(np.zeros(3), np.ones(3))
    assert (both.sqnr, both.cosine, both.max_relative) == (math.inf, 1.0, 0.0)
    assert (only_noise.sqnr, only_noise.cosine) == (-math.inf, 0.0)


@given(
    hnp.arrays(np.float32, (3, 6), elements=st.floats(-5, 5, width=32)),
    st.integers(1, 6),
)
def test_the_winner_is_within_its_own_top_k(scores: np.ndarray, k: int):
    assert within_top(scores, scores, k).all()


def test_a_lone_probability_is_decided_at_a_half():
    agreement = Agreement(5, None)
    agreement.update(np.array([[0.2], [0.6], [0.9]]), np.array([[0.4], [0.4], [0.8]]))
    assert agreement.equal == pytest.approx(2 / 3)
    agreement.update(np.array([[7.0]]), np.array([[7.0]]))
    assert agreement.equal is None, "a value beyond 0..1 is no probability"


def test_binary_labels_of_probabilities_and_of_logits():
    for values in ([0.2, 0.6, 0.9], [-2.0, 0.3, 5.0]):
        scorer = Scorer(np.array([0, 1, 0]))
        scorer.update(np.array(values)[:, None], np.array(values)[::-1, None])
        assert scorer.score and scorer.score.original == pytest.approx(2 / 3)


def test_labels_that_are_values_give_the_rmse():
    scorer = Scorer(np.array([1.5, 2.5]))
    scorer.update(np.array([1.5, 2.5]), np.array([1.5, 4.5]))
    assert scorer.score and scorer.score.metric is Metric.RMSE
    assert (scorer.score.original, scorer.score.candidate) == (0, pytest.approx(math.sqrt(2)))


def test_negative_class_labels_are_left_out():
    scorer = Scorer(np.array([[0, -100], [1, 1]]))
    scores = np.array([[[2.0, 1], [1, 2]], [[1, 2], [2, 1]]])
    scorer.update(scores, scores)
    assert scorer.score and scorer.score.original == pytest.approx(2 / 3)


def test_a_tensor_is_compared_as_the_next_node_takes_it():
    """A ReLU that the quantized range took over is done by the pair that follows it."""
    clipped = one("a = Neg(x) r = Relu(a) y = Neg(r)")
    taken_over = one(
        "s = Constant<value = float {0.015625}>() z = Constant<value = uint8 {0}>()"
        "r = Neg(x) q = QuantizeLinear(r, s, z) d = DequantizeLinear(q, s, z) y = Neg(d)"
    )
    (relu, end) = compare(clipped, taken_over, feeds()).layers
    assert relu.tensor == "r" and relu.sqnr > 30 and end.sqnr == pytest.approx(relu.sqnr)


def test_what_the_runtime_loses_is_told_apart(monkeypatch: pytest.MonkeyPatch):
    class Lossy(Session):
        def run(self, feed: Feed) -> dict[str, np.ndarray]:
            return {name: array * 1.1 for name, array in super().run(feed).items()}

    kinds = iter((Session, Lossy))

    def choose(*args: Any, **kwargs: Any) -> Session:
        return next(kinds)(*args, **kwargs)

    monkeypatch.setattr("onnxcompress.validation.Session", choose)
    (warning,) = compare(chain(), chain(), feeds()).warnings
    assert "'y' has 20.0 dB as ONNX Runtime runs it" in warning


def test_a_model_whose_insides_cannot_be_given_out_is_still_validated(
    monkeypatch: pytest.MonkeyPatch,
):
    def refuse(*args: object, **kwargs: object) -> None:
        raise InputError("ONNX Runtime refuses")

    monkeypatch.setattr("onnxcompress.validation.layers.Session", refuse)
    found = compare(chain(), chain(), feeds())
    assert found.layers == () and found.outputs[0].sqnr == math.inf
    assert found.warnings == ("layers were not compared: ONNX Runtime refuses",)


def test_a_lone_number_is_compared():
    total = one("y = ReduceSum<keepdims=0>(x)", out="float")
    (y,) = compare(total, total, feeds()).outputs
    assert math.isinf(y.sqnr or 0)
