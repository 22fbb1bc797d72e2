"""Cleaning: what is dropped and what is not, that it is told, and what smoothing does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import scipy.signal
from click.testing import CliRunner

from onnxcompress.api import load_statistics
from onnxcompress.cli import main
from onnxcompress.contract import Array
from onnxcompress.data import Data, Feed, Port, open_data
from onnxcompress.errors import InputError
from onnxcompress.train.clean import (
    DUPLICATE,
    NOT_FINITE,
    OUTLIER,
    Cleaner,
    Cleaning,
    Detector,
    RobustDistance,
)
from onnxcompress.train.denoise import MedianFilter, SavitzkyGolay

MODELS = Path(__file__).parents[2] / "models"
PORTS = (Port("x", np.dtype(np.float32), ("N", 12)),)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def dropped(cleaning: Cleaning, reason: str) -> list[int]:
    return [sample.index for sample in cleaning.dropped if sample.reason == reason]


DRAWS: dict[str, Callable[[np.random.Generator], Array]] = {
    "normal": lambda r: r.normal(size=(600, 32)),
    "wide": lambda r: r.normal(size=(300, 3, 20, 20)),
    "single": lambda r: r.normal(size=(600, 1)),
    "uniform": lambda r: r.random((600, 8)),
    "exponential": lambda r: r.exponential(size=(600, 10)),
    "lognormal": lambda r: np.exp(r.normal(size=(600, 20))),
    "sparse": lambda r: (r.random((600, 64)) < 0.02).astype(float),
    "constant": lambda _: np.ones((600, 4)),
}


@pytest.mark.parametrize("kind", list(DRAWS))
def test_clean_data_of_any_kind_stays_nearly_whole(kind: str) -> None:
    found = [Cleaner().arrays({"x": DRAWS[kind](rng(seed))})[1] for seed in range(3)]
    assert sum(len(c.dropped) for c in found) <= 0.002 * sum(c.total for c in found)
    assert not any(c.spared for c in found)


def spoil(x: Array, bad: list[int]) -> None:
    """Wrong scale, a spike, and noise ten times as wide."""
    x[bad[0]] *= 255
    x[bad[1]].flat[5] = 1e4
    x[bad[2]] = rng(1).normal(0, 10 * x.std(), x[0].shape)


@pytest.mark.parametrize("name", ["photo_digits", "segment_tabular", "vowel_lstm"])
def test_mistakes_among_real_samples_are_found_and_little_else(name: str) -> None:
    with np.load(MODELS / name / "calibration.npz") as arrays:
        data = dict(arrays)
    assert not Cleaner().arrays(data)[1].dropped
    key = next(k for k, a in data.items() if a.dtype.kind == "f")
    data[key] = data[key].copy()
    spoil(data[key], [11, 40, 77])
    data[key][23].flat[3] = np.nan
    data[key][50].flat[9] = np.inf
    kept, found = Cleaner().arrays(data)
    assert dropped(found, OUTLIER) == [11, 40, 77]
    assert dropped(found, NOT_FINITE) == [23, 50]
    assert np.isfinite(kept[key]).all()
    assert {len(a) for a in kept.values()} == {found.total - 5}
    assert found.kept == [i for i in range(found.total) if i not in (11, 23, 40, 50, 77)]


def test_labels_go_along_and_decide_nothing() -> None:
    data = {"x": rng().normal(size=(40, 3)), "labels": np.arange(40.0)}
    data["labels"][3] = 1e9
    data["x"][7] = np.nan
    data["labels"][9] = np.nan
    kept, found = Cleaner().arrays(data | {"scale": np.array(2.0)})
    assert found.counts == {NOT_FINITE: 2}
    assert 1e9 in kept["labels"]
    assert 7.0 not in kept["labels"]
    assert kept["scale"] == 2


def test_a_group_of_its_own_stays_and_the_notes_say_so() -> None:
    x = np.concatenate([rng().normal(size=(160, 5)), rng().normal(90, 1, size=(40, 5))])
    kept, found = Cleaner().arrays({"x": x})
    assert len(kept["x"]) == 200
    assert found.spared == 40
    assert "40 of 200 samples look like outliers but were kept" in found.notes[0]
    assert len(Cleaner(most=0.2).arrays({"x": x})[0]["x"]) == 160
    assert len(Cleaner(outliers=None).arrays({"x": x})[1].dropped) == 0


def test_equal_samples_are_dropped_if_asked_the_first_one_stays() -> None:
    x = rng().normal(size=(600, 4)).astype(np.float32)
    x[[300, 599]] = x[17]
    data = {"x": x, "labels": np.arange(600)}
    _, found = Cleaner(duplicates=True).arrays(data)
    assert dropped(found, DUPLICATE) == [300, 599]
    assert not Cleaner().arrays(data)[1].dropped


def test_what_is_told() -> None:
    x = rng().normal(size=(60, 4))
    x[:10] = np.nan
    _, found = Cleaner().arrays({"x": x})
    assert found.notes == ("10 of 60 samples dropped (not finite): 0, 1, 2, 3, 4, 5, 6, 7, …",)
    assert Cleaner().arrays({"x": x[10:]})[1].notes == ("all 50 samples are clean",)
    few = Cleaner().arrays({"x": x[10:20]})[1]
    assert few.notes == ("no outliers were sought: 10 samples do not tell what is usual, 16 may",)
    ids = Cleaner().arrays({"ids": np.arange(40).reshape(20, 2)})[1]
    assert ids.notes == ("no outliers were sought: no input holds floats",)


def test_what_cannot_be_cleaned_is_refused() -> None:
    with pytest.raises(InputError, match="no sample is finite"):
        Cleaner().arrays({"x": np.full((5, 2), np.nan)})
    with pytest.raises(InputError, match="equally many samples"):
        Cleaner().arrays({"x": np.zeros((5, 2)), "y": np.zeros((4, 2))})
    with pytest.raises(InputError, match="most must be"):
        Cleaner(most=0.9)
    with pytest.raises(InputError, match="threshold must be above 0"):
        RobustDistance(0)


@pytest.mark.parametrize(
    "name", ["IsolationForest", "LocalOutlierFactor", "EllipticEnvelope", "OneClassSVM"]
)
def test_detectors_of_scikit_learn_find_what_is_far_out(name: str) -> None:
    x = rng().normal(size=(300, 6))
    x[[50, 200]] = [[40] * 6, [-60, 60] * 3]
    cleaner = Cleaner(outliers=Detector(name))
    _, found = cleaner.arrays({"x": x})
    assert {50, 200} <= set(dropped(found, OUTLIER))
    assert len(found.dropped) <= 9
    assert cleaner.arrays({"x": x})[1] == found


def test_a_detector_that_is_not_there_or_fails_is_told() -> None:
    with pytest.raises(InputError, match="no detector 'IsolationFores', did you mean"):
        Detector("IsolationFores")
    with pytest.raises(InputError, match=r"IsolationForest failed: .*'tree'"):
        Cleaner(outliers=Detector(options={"tree": 3})).arrays({"x": np.eye(20)})


def rows(bad: dict[int, float]) -> Array:
    x = rng().normal(size=(80, 12)).astype(np.float32)
    for index, value in bad.items():
        x[index, 4] = value
    return x


def sources(x: Array) -> Iterator[Data]:
    def stream() -> Iterator[Feed]:
        for row in x:
            yield {"x": row[None]}

    yield open_data({"x": x, "labels": np.arange(80)}, PORTS, finite=False)
    yield open_data([{"x": row[None]} for row in x], PORTS, finite=False)
    yield open_data(stream, PORTS, finite=False)


def test_data_is_cleaned_whatever_its_source() -> None:
    x = rows({0: np.nan, 33: 1e5, 79: np.inf})
    kept = [i for i in range(80) if i not in (0, 33, 79)]
    for data in sources(x):
        cleaned, found = Cleaner().data(data)
        assert found.kept == kept
        for _ in range(2):
            np.testing.assert_array_equal(np.concatenate([f["x"] for f in cleaned]), x[kept])
        joined = np.concatenate([f["x"] for f in cleaned.batches(8)])
        np.testing.assert_array_equal(joined, x[kept])
        assert cleaned.size == 77
        assert "2 of 80 samples dropped (not finite): 0, 79" in cleaned.notes[-2]
        part, rest = cleaned.split(0.1)
        assert (part.size, rest.size) == (69, 8)
        assert [f["x"][0, 0] for f in cleaned.first(3)] == list(x[kept[:3], 0])
    labelled, _ = Cleaner().data(next(sources(x)))
    assert labelled.labels is not None
    assert labelled.labels.tolist() == kept


def test_a_part_of_the_data_is_cleaned_as_that_part() -> None:
    data = next(sources(rows({50: 1e5, 70: np.nan})))
    _, second = data.split(0.5)
    cleaned, found = Cleaner().data(second)
    assert [d.index for d in found.dropped] == [10, 30]
    assert cleaned.size == 38


def test_feeds_of_different_lengths_are_compared_by_what_they_have_in_common() -> None:
    ports = (Port("x", np.dtype(np.float32), ("N", "T")),)
    feeds = [{"x": rng(i).normal(size=(1, 20 + i)).astype(np.float32)} for i in range(60)]
    feeds[7]["x"] = feeds[7]["x"] * 100
    _, found = Cleaner().data(open_data(feeds, ports))
    assert [d.index for d in found.dropped] == [7]


def test_feeds_are_smoothed_as_they_are_read() -> None:
    x = rows({})
    cleaned, _ = Cleaner(smooth=(MedianFilter(width=3),)).data(next(sources(x)))
    found = np.concatenate([feed["x"] for feed in cleaned])
    np.testing.assert_array_equal(found, MedianFilter(width=3)({"x": x})["x"])
    assert found.dtype == np.float32


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    """Calibration data of which one sample is not finite and one far out."""
    with np.load(MODELS / "segment_tabular" / "calibration.npz") as arrays:
        features = arrays["features"]
    features[5, 2], features[9, 3] = np.nan, 1e7
    np.savez(tmp_path / "spoiled.npz", features=features)
    return tmp_path / "spoiled.npz"


def command(*arguments: str | Path) -> dict[str, object]:
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_verbs_clean_what_they_observe_and_tell(spoiled: Path, tmp_path: Path) -> None:
    model = MODELS / "segment_tabular" / "model.onnx"
    refused = CliRunner().invoke(
        main, ["calibrate", str(model), "--data", str(spoiled), "-o", str(tmp_path / "s.npz")]
    )
    assert refused.exit_code == 2
    out = tmp_path / "out.onnx"
    for told in (
        command("calibrate", model, "--data", spoiled, "-o", tmp_path / "s.npz", "--clean"),
        command("quantize", model, "--calibrate", spoiled, "-o", out, "--clean"),
        command("compress", model, "--calibrate", spoiled, "-o", out, "--clean", "--scheme",
                "static", "--effort", "fast"),
    ):  # fmt: skip
        notes = " ".join(str(note) for note in cast("list[object]", told["notes"]))
        assert "samples dropped (not finite): 5" in notes
        assert "samples dropped (outlier): 9" in notes
    left = load_statistics(tmp_path / "s.npz")
    assert left.histogram("/Div_output_0").maximum < 10


def test_the_median_takes_spikes_away_and_keeps_edges() -> None:
    x = np.zeros((2, 3, 20), np.float32)
    x[..., 10:] = 1
    spiked = x.copy()
    spiked[0, 1, 4] = 50
    np.testing.assert_array_equal(MedianFilter(width=3)({"x": spiked})["x"], x)
    turned = MedianFilter(width=3, axis=1)({"x": spiked.transpose(0, 2, 1)})["x"]
    np.testing.assert_array_equal(turned, x.transpose(0, 2, 1))


@pytest.mark.parametrize(("width", "order"), [(5, 2), (7, 0), (9, 3), (3, 1)])
def test_savitzky_and_golay_as_scipy_has_them(width: int, order: int) -> None:
    x = rng().normal(size=(4, 30))
    found = SavitzkyGolay(width=width, order=order)({"x": x, "labels": x})
    expected: Array = np.asarray(scipy.signal.savgol_filter(x, width, order))
    np.testing.assert_allclose(found["x"], expected, atol=1e-12)
    np.testing.assert_array_equal(found["labels"], x)


def test_smoothing_takes_noise_and_keeps_a_slow_signal() -> None:
    signal = np.sin(np.linspace(0, 6, 200))[None]
    noisy = signal + 0.2 * rng().normal(size=signal.shape)
    smooth = SavitzkyGolay(width=21)({"x": noisy})["x"]
    assert ((smooth - signal) ** 2).mean() < 0.2 * ((noisy - signal) ** 2).mean()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MedianFilter(width=4), "odd number"),
        (lambda: MedianFilter(axis=0), "axis 0 holds the samples"),
        (lambda: SavitzkyGolay(width=5, order=5), "order must be"),
        (lambda: MedianFilter(width=31)({"x": np.zeros((2, 20))}), "no 31 positions along axis -1"),
        (lambda: MedianFilter(inputs=("y",))({"x": np.zeros((2, 20))}), "no array 'y'"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make()
