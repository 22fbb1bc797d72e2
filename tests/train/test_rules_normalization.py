"""Normalizations: by the batch, a layer, an instance, groups, and by the root mean square."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.train.gradcheck import check

random = np.random.default_rng(0)
_SINGLE: dict[str, Any] = {"step": 1e-2, "tolerance": 1e-3}
"""ONNX Runtime computes in single precision, so steps are wide."""


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return random.standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spatial", [(), (5,), (3, 4)])
def test_batch_normalization(spatial: tuple[int, ...], dynamic: bool) -> None:
    inputs = {"x": normal(4, 3, *spatial, dtype=np.float64)}
    inputs |= {k: normal(3, dtype=np.float64) for k in "sbm"}
    inputs["v"] = random.uniform(0.5, 2, 3)
    check("BatchNormalization", inputs, wrt=("x", "s", "b", "m", "v"), dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
def test_layer_normalization(dynamic: bool) -> None:
    wrt = ("x", "s", "b")
    single = {"x": normal(2, 3, 8), "s": normal(8), "b": normal(8)}
    check("LayerNormalization", single, wrt=wrt, dynamic=dynamic, **_SINGLE)
    double = {k: normal(*s, dtype=np.float64) for k, s in zip("xsb", [(2, 3, 8)] * 3, strict=True)}
    double |= {"s": double["s"][0], "b": double["b"][0]}
    check("LayerNormalization", double, {"axis": 1}, wrt=wrt, dynamic=dynamic)
    check("LayerNormalization", {"x": normal(3, 8), "s": normal(8)}, wrt=("x", "s"), **_SINGLE)


@pytest.mark.parametrize("dynamic", [False, True])
def test_instance_normalization(dynamic: bool) -> None:
    inputs = {"x": normal(2, 3, 4, 4), "s": normal(3), "b": normal(3)}
    check("InstanceNormalization", inputs, wrt=("x", "s", "b"), dynamic=dynamic, **_SINGLE)


@pytest.mark.parametrize(("opset", "entries"), [(18, 2), (21, 4)])
def test_group_normalization(opset: int, entries: int) -> None:
    inputs = {"x": normal(2, 4, 3, 3), "s": normal(entries), "b": normal(entries)}
    options = {"wrt": ("x", "s", "b"), "opset": opset, **_SINGLE}
    check("GroupNormalization", inputs, {"num_groups": 2}, **options)


def test_root_mean_square() -> None:
    inputs = {"x": normal(2, 3, 8), "s": normal(8)}
    check("RMSNormalization", inputs, wrt=("x", "s"), opset=23, **_SINGLE)
