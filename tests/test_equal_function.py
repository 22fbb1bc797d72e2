"""Equalization and smoothing leave the float function of whole models as it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxcompress import api, schemes
from onnxcompress.measure import random_feed
from onnxcompress.model_io import load
from onnxcompress.passes.equalize import Equalize
from onnxcompress.passes.smooth import Smooth
from onnxcompress.pipeline import run
from onnxcompress.session import Session

MODELS = Path(__file__).parents[1] / "models"
ZOO = Path(__file__).parents[2] / "shared" / "zoo"
SAMPLES = 32


def rewritten(path: Path, data: Any) -> int:
    """Scale channels; compare what the runtime computes, its own rewrites off; how many were."""
    before = run(load(path), schemes.before_static()).model
    watch = api.observer(api.as_data(data, before), SAMPLES)
    done = run(before, (Equalize(), Smooth()), observer=watch)
    original, candidate = (Session(m, optimization="none") for m in (before, done.model))
    for feed in api.as_data(data, before).first(8):
        actual = candidate.run(feed)
        for name, expected in original.run(feed).items():
            largest = np.abs(expected).max(initial=0)
            np.testing.assert_allclose(actual[name], expected, rtol=0, atol=1e-4 * largest)
    equalize, smooth = (record.figures for record in done.records)
    return _count(equalize["pairs of layers"]) + _count(smooth["values smoothed"])


def _count(figure: Any) -> int:
    assert isinstance(figure, int)
    return figure


@pytest.mark.parametrize(
    ("name", "least"),
    [("photo_digits", 1), ("name_language", 1), ("segment_tabular", 1), ("vowel_lstm", 0)],
)
def test_reference_models(name: str, least: int) -> None:
    folder = MODELS / name
    assert rewritten(folder / "model.onnx", folder / "calibration.npz") >= least


@pytest.mark.zoo
@pytest.mark.skipif(not ZOO.is_dir(), reason="no zoo beside the checkout")
@pytest.mark.parametrize("name", ["mobilenetv2", "tinydarknet", "magika", "minilm_stsb"])
def test_zoo(name: str) -> None:
    spec = importlib.util.spec_from_file_location("zoo_eval", ZOO / "zoo_eval.py")
    assert spec is not None and spec.loader is not None
    zoo_eval = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo_eval)
    path = Path(zoo_eval.load(name, str(ZOO), limit=8)[0])
    model = load(path)
    rewritten(path, [random_feed(model, seed=seed) for seed in range(8)])
