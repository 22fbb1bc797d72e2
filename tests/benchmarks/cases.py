"""The models that are measured, each with its samples and a way to score what is made of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from tests.benchmarks import resnet50
from tests.benchmarks.samples import Feed, cut, feeds

ort: Any = onnxruntime
MODELS = Path(__file__).parent.parent.parent / "models"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is asked of a run of the benchmarks."""

    folder: Path
    """For whatever is made; temporary."""
    zoo: Path | None = None
    only: tuple[str, ...] = ()
    """Names of cases; all where empty."""
    quick: bool = False
    """Small sizes and one round: to see that it works, not to believe the figures."""
    samples: int = 100
    """Feeds that calibrate."""
    rounds: int = 3
    """How often a job is timed."""


@dataclass(frozen=True, slots=True)
class Score:
    """How good a model is at its task."""

    value: float | None
    """Higher is better; None where nobody knows the truth."""
    agreement: float | None
    """Share of decisions (or rank correlation) in common with the float model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A float model with its samples."""

    name: str
    model: Path
    calibration: Path
    """An npz of samples, all of which calibrate."""
    held_out: Path
    """An npz of samples, none of which calibrates."""
    score: Callable[[Path], Score]
    origin: str
    """models, onnx or zoo."""

    def feeds(self) -> Iterator[Feed]:
        """The calibration samples, batches of 1."""
        return feeds(self.calibration, ranks(session(self.model)))

    def held_out_feeds(self) -> Iterator[Feed]:
        """Samples to compare on that calibrated nothing, batches of 1."""
        return feeds(self.held_out, ranks(session(self.model)))


def all_cases(setting: Setting) -> Iterator[Case]:
    """Every model asked for, those in the repository first."""
    makers: dict[str, Callable[[], Case]] = {
        path.parent.name: partial(_of_models, path.parent, setting)
        for path in sorted(MODELS.glob("*/model.onnx"))
    }
    if not setting.quick:
        makers["resnet50"] = partial(_resnet50, setting)
    if setting.zoo and not setting.quick:
        names = sorted(path.parent.name for path in setting.zoo.glob("*/meta.json"))
        makers |= {name: partial(_of_zoo, setting.zoo, name, setting) for name in names}
    for name, make in makers.items():
        if not setting.only or name in setting.only:
            yield make()


def session(model: Path, threads: int = 0) -> Any:
    """Any model in ONNX Runtime, as a program would run it by default."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def ranks(running: Any) -> dict[str, int]:
    """The number of axes of each input."""
    return {port.name: len(port.shape) for port in running.get_inputs()}


def _of_models(folder: Path, setting: Setting) -> Case:
    samples = setting.folder / f"{folder.name}.npz"
    return Case(
        name=folder.name,
        model=folder / "model.onnx",
        calibration=cut(folder / "calibration.npz", samples, slice(setting.samples)),
        held_out=folder / "evaluation.npz",
        score=partial(_classify, folder / "model.onnx", folder / "evaluation.npz"),
        origin="models",
    )


def _resnet50(setting: Setting) -> Case:
    model = resnet50.build(setting.folder / "resnet50.onnx")
    calibration, evaluation = (setting.folder / f"resnet50_{n}.npz" for n in ("calib", "eval"))
    np.savez(calibration, **{resnet50.INPUT: resnet50.images(setting.samples, seed=1)})
    np.savez(evaluation, **{resnet50.INPUT: resnet50.images(100, seed=2)})
    return Case(
        name="resnet50",
        model=model,
        calibration=calibration,
        held_out=evaluation,
        score=partial(_tell_apart, model, evaluation),
        origin="onnx",
    )


def _of_zoo(zoo: Path, name: str, setting: Setting) -> Case:
    known, samples, held_out = (
        setting.folder / f"{name}{part}.npz" for part in ("_known", "", "_held_out")
    )
    told = _python(str(zoo / "feeds.py"), name, "calib", str(known), "--zoo", str(zoo))
    return Case(
        name=name,
        model=Path(told.splitlines()[0]),
        calibration=cut(known, samples, slice(setting.samples)),
        held_out=cut(known, held_out, slice(setting.samples, None)),
        score=partial(_zoo_score, zoo, name),
        origin="zoo",
    )


def _zoo_score(zoo: Path, name: str, model: Path) -> Score:
    told = json.loads(_python(str(zoo / "zoo_eval.py"), str(zoo), name, str(model)))
    extra = told["extra"]
    agreement = extra.get("fp32_agree", extra.get("fp32_spearman", told["score"]))
    return Score(told["score"], agreement)


def _python(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True
    ).stdout


def _classify(original: Path, evaluation: Path, model: Path) -> Score:
    """Top-1 of the first output against the labels, and against the original's."""
    expected, found = (_scores(path, evaluation).argmax(axis=-1) for path in (original, model))
    with np.load(evaluation, allow_pickle=False) as data:
        value = float(np.mean(found == data["labels"]))
    return Score(value, float(np.mean(found == expected)))


def _tell_apart(original: Path, evaluation: Path, model: Path) -> Score:
    """Agreement alone, on what tells a sample from the average one.

    A network of random weights calls every picture the same; the class that grew most differs.
    """
    expected, found = (_scores(path, evaluation) for path in (original, model))
    average = expected.mean(axis=0)
    same = (found - average).argmax(axis=-1) == (expected - average).argmax(axis=-1)
    return Score(None, float(np.mean(same)))


def _scores(model: Path, samples: Path) -> Any:
    running = session(model)
    rows = [running.run(None, feed)[0] for feed in feeds(samples, ranks(running))]
    return np.concatenate(rows)
