"""The reference models are what their cards say: valid, as exporters write them, as accurate."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

MODELS = Path(__file__).parent.parent / "models"
NAMES = sorted(path.parent.name for path in MODELS.glob("*/train.py"))
UNFUSED_LAYER_NORM = ["ReduceMean", "Sub", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add"]
UNFUSED_GELU = ["Div", "Erf", "Add", "Mul", "Mul"]


def graph(name: str) -> onnx.GraphProto:
    return onnx.load(MODELS / name / "model.onnx").graph


def operators(name: str) -> list[str]:
    return [node.op_type for node in graph(name).node]


def runs(sequence: list[str], pattern: list[str]) -> int:
    """How often `pattern` stands in `sequence` without a gap."""
    width = len(pattern)
    return sum(sequence[i : i + width] == pattern for i in range(len(sequence) - width + 1))


def feeds(name: str, part: str) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(MODELS / name / f"{part}.npz", allow_pickle=False) as data:
        return dict(data)


def score(name: str) -> dict[str, Any]:
    return tomllib.loads((MODELS / name / "score.toml").read_text())


def logits(name: str, data: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    path = MODELS / name / "model.onnx"
    (output,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, data)
    return np.asarray(output)


def test_the_promised_models_are_there() -> None:
    assert NAMES == ["name_language", "photo_digits", "segment_tabular", "vowel_lstm"]


def test_the_repository_stays_small() -> None:
    files = [path for name in NAMES for path in (MODELS / name).iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000


@pytest.mark.parametrize("name", NAMES)
def test_model_is_valid_with_a_dynamic_batch(name: str) -> None:
    model = onnx.load(MODELS / name / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    values = [*model.graph.input, *model.graph.output]
    assert {value.type.tensor_type.shape.dim[0].dim_param for value in values} == {"N"}


@pytest.mark.parametrize("name", NAMES)
def test_float_accuracy_is_as_recorded(name: str) -> None:
    recorded = score(name)
    data = feeds(name, "evaluation")
    labels = data.pop("labels")
    correct = int((logits(name, data).argmax(axis=1) == labels).sum())
    assert len(labels) == recorded["samples"]
    assert recorded["accuracy"] == round(recorded["correct"] / recorded["samples"], 4)
    # Another CPU's kernels may turn a sample that stands on the edge.
    assert abs(correct - recorded["correct"]) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_card_and_table_state_the_recorded_accuracy(name: str) -> None:
    accuracy = f"{score(name)['accuracy']:.4f}"
    assert accuracy in (MODELS / name / "README.md").read_text()
    (row,) = [r for r in (MODELS / "README.md").read_text().splitlines() if f"[{name}]" in r]
    assert accuracy in row


@pytest.mark.parametrize("name", NAMES)
def test_data_is_named_after_the_inputs_and_disjoint(name: str) -> None:
    calibration, evaluation = feeds(name, "calibration"), feeds(name, "evaluation")
    inputs = {value.name for value in graph(name).input}
    assert set(calibration) == inputs
    assert set(evaluation) == inputs | {"labels"}
    seen, judged = (
        {b"".join(sample[n].tobytes() for n in sorted(inputs)) for sample in samples(data)}
        for data in (calibration, evaluation)
    )
    assert not seen & judged


def samples(data: dict[str, np.ndarray[Any, Any]]) -> list[dict[str, np.ndarray[Any, Any]]]:
    (count,) = {len(array) for array in data.values()}
    return [{n: array[i] for n, array in data.items()} for i in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_one_sample_gives_what_the_batch_gives(name: str) -> None:
    data = feeds(name, "calibration")
    batch = logits(name, {n: a[:4] for n, a in data.items()})
    singles = [logits(name, {n: a[i : i + 1] for n, a in data.items()}) for i in range(4)]
    np.testing.assert_allclose(np.concatenate(singles), batch, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_trained_weights_lie_on_the_grid_that_makes_training_repeat(name: str) -> None:
    for tensor in graph(name).initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.dims:
            steps = onnx.numpy_helper.to_array(tensor).astype(np.float64) * 2**16
            assert np.array_equal(steps, np.round(steps)), tensor.name


def test_convolutional_net_is_exported_unfolded() -> None:
    ops = operators("photo_digits")
    assert runs(ops, ["Conv", "BatchNormalization"]) == ops.count("Conv") == 11
    assert ops.count("Add") == 3
    groups = Counter(
        attribute.i
        for node in graph("photo_digits").node
        for attribute in node.attribute
        if attribute.name == "group"
    )
    assert groups == {1: 9, 96: 1, 192: 1}


def test_transformer_is_exported_in_parts() -> None:
    ops = operators("name_language")
    assert runs(ops, UNFUSED_LAYER_NORM) == 7
    assert runs(ops, UNFUSED_GELU) == 3
    assert ops.count("Softmax") == 3
    assert not {"LayerNormalization", "Gelu"} & set(ops)


def test_tabular_model_has_the_single_operators() -> None:
    ops = Counter(operators("segment_tabular"))
    assert (ops["LayerNormalization"], ops["Gelu"], ops["Gemm"]) == (3, 2, 6)


def test_recurrent_model_reads_lengths() -> None:
    """What lies beyond an utterance's length has no effect on it."""
    assert operators("vowel_lstm").count("LSTM") == 1
    data = feeds("vowel_lstm", "calibration")
    padded = np.arange(data["features"].shape[1])[None] >= data["lengths"][:, None]
    noisy = data | {"features": np.where(padded[..., None], np.float32(9), data["features"])}
    np.testing.assert_array_equal(logits("vowel_lstm", data), logits("vowel_lstm", noisy))


def test_opsets_span_the_exporters_of_several_years() -> None:
    opsets = {n: onnx.load(MODELS / n / "model.onnx").opset_import[0].version for n in NAMES}
    assert opsets == {
        "name_language": 13,
        "photo_digits": 17,
        "segment_tabular": 20,
        "vowel_lstm": 11,
    }
