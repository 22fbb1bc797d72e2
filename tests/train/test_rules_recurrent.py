"""Recurrent cells in every direction, with and without biases, initial states and lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.errors import InputError
from onnxcompress.graph.inference import infer
from onnxcompress.passes.raise_opset import RaiseOpset
from onnxcompress.train.gradients import LEAST_OPSET
from tests.train.gradcheck import check, check_model

ROOT = Path(__file__).parents[2]
_STEPS, _BATCH, _FEATURES, _WIDTH = 4, 2, 3, 2
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def cell(op_type: str, directions: int, given: str) -> dict[str, Any]:
    """The inputs of a cell: weights alone, with bias and states, or with lengths too."""
    random = np.random.default_rng(0)
    rows = _GATES[op_type] * _WIDTH
    shapes = {"x": (_STEPS, _BATCH, _FEATURES), "w": (directions, rows, _FEATURES)}
    shapes |= {"r": (directions, rows, _WIDTH)}
    if given != "weights":
        shapes |= {"b": (directions, 2 * rows), "n": (), "h": (directions, _BATCH, _WIDTH)}
        shapes |= {"c": (directions, _BATCH, _WIDTH)} if op_type == "LSTM" else {}
    inputs: dict[str, Any] = {
        k: random.standard_normal(s).astype(np.float32) for k, s in shapes.items()
    }
    if "n" in inputs:
        inputs["n"] = np.array([4, 2], np.int32) if given == "lengths" else None
    return inputs


@pytest.mark.parametrize("given", ["weights", "states", "lengths"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op_type", ["RNN", "GRU", "GRU reset late", "LSTM"])
def test_cells(op_type: str, direction: str, given: str) -> None:
    op_type, *late = op_type.split(" ", 1)
    inputs = cell(op_type, 2 if direction == "bidirectional" else 1, given)
    attributes: dict[str, Any] = {"hidden_size": _WIDTH, "direction": direction}
    attributes |= {"linear_before_reset": 1} if late else {}
    wrt = [k for k, v in inputs.items() if v is not None and k != "n"]
    outputs = 3 if op_type == "LSTM" else 2
    options: dict[str, Any] = {"outputs": outputs, "step": 4e-3, "tolerance": 1e-3}
    check(op_type, inputs, attributes, wrt=wrt, **options)


def test_any_number_of_steps_and_samples() -> None:
    inputs = cell("LSTM", 1, "states")
    options: dict[str, Any] = {"fixed": ("w", "r", "b"), "dynamic": True, "outputs": 3}
    options |= {"wrt": ("x", "h", "c"), "step": 4e-3, "tolerance": 1e-3}
    check("LSTM", inputs, {"hidden_size": _WIDTH}, **options)


def test_other_activations_are_named() -> None:
    with pytest.raises(InputError, match="activations are relu"):
        attributes = {"hidden_size": _WIDTH, "activations": ["Relu"]}
        check("RNN", cell("RNN", 1, "weights"), attributes, outputs=2)


def test_a_whole_model() -> None:
    model = ir.load(ROOT / "models" / "vowel_lstm" / "model.onnx")
    RaiseOpset(minimum=LEAST_OPSET)(model)
    infer(model)
    data = np.load(ROOT / "models" / "vowel_lstm" / "calibration.npz")
    feed = {v.name or "": data[v.name or ""][:4] for v in model.graph.inputs}
    weights = [
        v
        for v in model.graph.initializers.values()
        if v.dtype == ir.DataType.FLOAT and v.const_value is not None and v.const_value.size > 8
    ]
    assert len(weights) >= 3
    for value in weights:
        assert value.name is not None and value.const_value is not None
        feed[value.name] = value.const_value.numpy()
        del model.graph.initializers[value.name]
        model.graph.inputs.append(value)
    names = [v.name or "" for v in weights]
    check_model(model, feed, names, step=1e-3, tolerance=2e-3)
