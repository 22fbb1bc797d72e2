"""Rows are what a convolution multiplies, drawn evenly, and merge to the same bits in any order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from onnxcompress.contract import Kind, Want
from onnxcompress.numerics.histogram import Unobservable
from onnxcompress.numerics.row_sample import Patches, RowSample, RowSampleBuilder
from onnxcompress.observe.observations import Observations

EVERYTHING = 1 << 20
WINDOWS = [
    Patches(kernel=(3, 3), strides=(1, 1), dilations=(1, 1), pads=(1, 1, 1, 1)),
    Patches(kernel=(3, 2), strides=(2, 1), dilations=(1, 2), pads=(0, 1, 2, 0)),
    Patches(kernel=(1, 1), strides=(2, 2), dilations=(1, 1), pads=(0, 0, 0, 0)),
    Patches(kernel=(3, 3), strides=(2, 2), dilations=(1, 1), auto_pad="SAME_UPPER"),
    Patches(kernel=(2, 4), strides=(2, 1), dilations=(1, 1), auto_pad="SAME_LOWER"),
    Patches(kernel=(3, 3), strides=(1, 2), dilations=(2, 1), auto_pad="VALID"),
    Patches(kernel=(3,), strides=(2,), dilations=(1,), pads=(2, 0)),
    Patches(kernel=(2, 1, 2), strides=(1, 1, 1), dilations=(1, 1, 2), pads=(0, 0, 1, 1, 0, 0)),
]


def sample(arrays: Any, patches: Patches) -> RowSample:
    builder = RowSampleBuilder(patches)
    for array in arrays:
        builder.add(array)
    return builder.build()


def everything(patches: Patches, **fields: Any) -> Patches:
    given = {name: getattr(patches, name) for name in Patches.__slots__}
    return Patches(**{**given, "rows": EVERYTHING, "rows_each": EVERYTHING, **fields})


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_all_rows_times_the_weight_are_the_convolution(window: Patches) -> None:
    rank = len(window.kernel)
    random = np.random.default_rng(0)
    data = random.integers(-9, 9, (2, 3, *(7, 8, 5)[:rank])).astype(np.float32)
    weight = random.integers(-9, 9, (4, 3, *window.kernel)).astype(np.float32)
    attributes: dict[str, Any] = {"strides": window.strides, "dilations": window.dilations}
    if window.auto_pad == "NOTSET":
        attributes["pads"] = window.pads
    node = helper.make_node("Conv", ["x", "w"], ["y"], auto_pad=window.auto_pad, **attributes)
    outputs: Any = ReferenceEvaluator(node).run(None, {"x": data, "w": weight})
    expected = np.moveaxis(outputs[0], 1, -1)
    found = sample([data], everything(window)).rows @ np.moveaxis(weight, 1, -1).reshape(4, -1).T
    expected = expected.reshape(-1, 4)
    assert np.array_equal(sorted(found.tolist()), sorted(expected.tolist()))


def test_padding_holds_the_zero_point() -> None:
    window = everything(WINDOWS[0], fill=7)
    rows = sample([np.full((1, 1, 1, 1), 9, np.uint8)], window).rows
    assert rows.dtype == np.uint8
    assert rows.tolist() == [[7, 7, 7, 7, 9, 7, 7, 7, 7]]


def test_each_array_gives_few_rows_and_the_sample_is_even() -> None:
    places = np.arange(4000, dtype=np.float32)[:, None]
    patches = Patches(rows=500, rows_each=50)
    found = sample([places + 4000 * i for i in range(40)], patches)
    assert len(found.rows) == 500
    assert np.unique(found.rows // 4000, return_counts=True)[1].max() <= 50
    assert np.histogram(found.rows % 4000, 4)[0].min() > 500 / 4 * 0.75


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(7)), st.integers(1, 6), st.integers(1, 40))
def test_any_order_and_any_shards_give_the_same_bits(
    order: Sequence[int], cut: int, limit: int
) -> None:
    random = np.random.default_rng(3)
    arrays = [random.integers(0, 4, (random.integers(1, 30), 3), np.uint8) for _ in range(6)]
    arrays.append(arrays[0])  # equal arrays have equal priorities
    patches = Patches(rows=limit, rows_each=8)
    expected = sample(arrays, patches)
    shuffled = [arrays[i] for i in order]
    found = sample(shuffled[:cut], patches).merge(sample(shuffled[cut:], patches))
    assert np.array_equal(found.priorities, expected.priorities)
    assert np.array_equal(found.rows, expected.rows)


def test_saved_samples_come_back_and_merge(tmp_path: Path) -> None:
    window = everything(WINDOWS[1], rows=40)
    arrays = np.random.default_rng(0).integers(0, 255, (3, 2, 3, 6, 6), np.uint8)
    want = Want("x", Kind.ROWS, patches=window)
    parts = [Observations({want: sample([array], window)}) for array in arrays]
    parts[0].save(tmp_path / "s.npz")
    merged = Observations.load(tmp_path / "s.npz").merge(parts[1]).merge(parts[2])
    assert np.array_equal(merged.rows("x", window), sample(arrays, window).rows)


def test_what_has_no_rows_is_unobservable() -> None:
    with pytest.raises(Unobservable, match="spatial"):
        sample([np.zeros((1, 3, 4), np.float32)], WINDOWS[0])
    with pytest.raises(Unobservable, match="channels"):
        sample([np.zeros((1, 3)), np.zeros((1, 4))], Patches())


def test_rows_of_another_length_are_refused_when_they_come() -> None:
    builder = RowSampleBuilder(Patches())
    builder.add(np.ones((2, 3), np.float32))
    with pytest.raises(Unobservable, match="changes"):
        builder.add(np.ones((2, 4), np.float32))
    assert len(builder.build().rows) == 2
