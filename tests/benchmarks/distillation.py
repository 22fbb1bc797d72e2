"""What a teacher is worth: students taught by it beside the same students taught by few labels.

The labels are a small part of those that the teacher itself learned from; of the rest, the inputs
alone are used. All is scored on evaluation data that neither saw, three seeds each, which draw
which samples keep their labels, fresh weights, and the order of the batches. Training data comes
from the packages that the models' own scripts take it from, the extra `train`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxcompress import api
from onnxcompress.contract import Array
from onnxcompress.model_io import load
from onnxcompress.session import Session
from onnxcompress.train.augment import Augmentation, Swap
from onnxcompress.train.distill import distill
from onnxcompress.train.loop import train
from onnxcompress.train.losses import CrossEntropy
from onnxcompress.train.optimizers import AdamW
from onnxcompress.train.schedules import warm_up
from onnxcompress.train.students import derive
from tests.benchmarks.cases import MODELS, Setting
from tests.benchmarks.table import Goal, goals, table

Arrays = dict[str, Array]
SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class Task:
    """A teacher of `models/`, a student, and how both ways of teaching it go."""

    name: str
    samples: Callable[[int], tuple[Arrays, int]]
    """All samples in a seed's order, and how many of them, the first, keep their labels."""
    student: str
    rate: float
    batch: int
    label_epochs: int
    """For about as many steps with labels alone; fewer where more of them only fit noise."""
    epochs: int
    temperature: float = 2.0
    sparsity: float = 0.0
    """At which pruning hurts."""
    recovery: int = 60
    """Epochs in the calibration data to recover from that."""
    augment: tuple[Augmentation, ...] = ()


def tables(setting: Setting) -> Iterator[str]:
    """Students by labels and by teacher, int8 of the latter, and pruned models recovered."""
    chosen = [t for t in TASKS if not setting.only or t.name in setting.only]
    seeds = 1 if setting.quick else SEEDS
    held: list[Goal] = []
    header = ("model", "student", "labels", "teacher", "student's start", "labels alone",
              "distilled", "gap closed", "int8")  # fmt: skip
    yield from table(header, (_taught(task, seeds, setting.quick, held) for task in chosen))
    header = ("model", "sparsity", "samples", "float", "pruned", "renormalized", "taught",
              "of what was lost")  # fmt: skip
    pruned = [task for task in chosen if task.sparsity]
    yield from table(header, (_recovered(task, seeds, setting.quick, held) for task in pruned))
    yield from goals(held)


def _taught(task: Task, seeds: int, quick: bool, held: list[Goal]) -> list[str]:
    teacher, evaluation = model_of(task)
    best = score(teacher, evaluation)
    try:
        runs = [_run(task, teacher, evaluation, seed, quick) for seed in range(seeds)]
    except ImportError as error:
        return [task.name, task.student, f"needs the extra train ({error.name})", *6 * ["-"]]
    start, alone, distilled, small = np.array([run[1:] for run in runs]).T
    closed = (distilled.mean() - alone.mean()) / (best - alone.mean())
    held += [
        Goal(what=f"{task.name}: worst seed of the distilled over the best of labels alone",
             figure=100 * (distilled.min() - alone.max()), bound=0, at_most=False, unit="points"),
        Goal(what=f"{task.name}: gap closed", figure=100 * closed, bound=50, at_most=False,
             unit="%"),
        Goal(what=f"{task.name}: lost by int8", figure=100 * (distilled - small).mean(),
             bound=0.3, unit="points"),
    ]  # fmt: skip
    return [
        *(task.name, task.student, str(int(runs[0][0])), percent(best)),
        *map(spread, (start, alone, distilled)),
        percent(closed),
        spread(small),
    ]


def _run(
    task: Task, teacher: ir.Model, evaluation: Arrays, seed: int, quick: bool
) -> tuple[float, ...]:
    samples, count = task.samples(seed)
    few = {name: array[:count] for name, array in samples.items()}
    rest = {name: array[count:] for name, array in samples.items() if name != "labels"}
    student = _student(task, teacher, rest, seed)
    settings: dict[str, Any] = {"optimizer": AdamW(task.rate), "seed": seed}
    alone = train(
        student,
        few,
        losses=[CrossEntropy("logits")],
        schedule=warm_up(),
        epochs=1 if quick else task.label_epochs,
        batch_size=min(task.batch, count),
        **settings,
    )
    distilled = distill(
        teacher,
        student,
        few,
        unlabelled=rest,
        temperature=task.temperature,
        epochs=1 if quick else task.epochs,
        batch_size=task.batch,
        **settings,
    )
    small = api.quantize(distilled.model, rest, effort="thorough")
    models = (student, alone.model, distilled.model, small.model)
    return (count, *(score(model, evaluation) for model in models))


def _recovered(task: Task, seeds: int, quick: bool, held: list[Goal]) -> list[str]:
    """A pruned teacher renormalized and taught by the whole one on its calibration data alone.

    Its zeros stay.
    """
    teacher, evaluation = model_of(task)
    with np.load(MODELS / task.name / "calibration.npz", allow_pickle=False) as data:
        inputs = dict(data)
    bare = api.prune(teacher, task.sparsity).model
    pruned = api.prune(teacher, task.sparsity, calibrate=inputs).model
    found: list[float] = []
    for seed in range(seeds):
        taught = distill(
            teacher,
            pruned,
            inputs,
            optimizer=AdamW(1e-3, weight_decay=0),
            epochs=1 if quick else task.recovery,
            batch_size=32,
            seed=seed,
            masks=_masks(pruned),
            augment=task.augment,
        )
        found.append(score(taught.model, evaluation))
    whole, hurt, start = (score(model, evaluation) for model in (teacher, bare, pruned))
    back = (float(np.mean(found)) - hurt) / (whole - hurt)
    held.append(Goal(what=f"{task.name}: lost score back", figure=100 * back, bound=70,
                     at_most=False, unit="%"))  # fmt: skip
    return [task.name, f"{task.sparsity:g}", str(len(next(iter(inputs.values())))),
            *map(percent, (whole, hurt, start)), spread(np.array(found)),
            percent(back)]  # fmt: skip


def _masks(pruned: ir.Model) -> Arrays:
    """Where the weights that pruning reached are not zero."""
    values = pruned.graph.initializers.items()
    weights = {n: v.const_value.numpy() for n, v in values if v.const_value is not None}
    return {n: a != 0 for n, a in weights.items() if a.dtype == np.float32 and a.ndim > 1
            and (a == 0).any()}  # fmt: skip


def _student(task: Task, teacher: ir.Model, data: Arrays, seed: int) -> ir.Model:
    if task.student == "frames":
        return derive(_frames(), "fresh", seed=seed).model
    return derive(teacher, task.student, data, seed=seed).model


def _frames() -> ir.Model:
    """Each frame by itself through two layers, then the mean over those of the utterance."""
    text = """<ir_version: 10, opset_import: ["" : 18]>
    frames (float[N,T,12] features, int64[N] lengths) => (float[N,9] logits)
    <int64 zero = {0}, int64 one = {1}, int64[1] first = {0}, int64[1] last = {-1},
     int64[1] middle = {1}> {
      shape = Shape<start=1, end=2>(features)
      count = Squeeze(shape, first)
      steps = Range(zero, count, one)
      ends = Unsqueeze(lengths, last)
      within = Less(steps, ends)
      mask = Cast<to=1>(within)
      columns = Unsqueeze(mask, last)
      a = MatMul(features, w1)
      b = Add(a, b1)
      c = Relu(b)
      d = MatMul(c, w2)
      e = Add(d, b2)
      f = Relu(e)
      g = Mul(f, columns)
      total = ReduceSum<keepdims=0>(g, middle)
      number = ReduceSum<keepdims=0>(columns, middle)
      mean = Div(total, number)
      logits = Gemm(mean, w3, b3)
    }"""
    proto = onnx.parser.parse_model(text)
    shapes = {"w1": (12, 64), "b1": (64,), "w2": (64, 64), "b2": (64,), "w3": (64, 9), "b3": (9,)}
    for name, shape in shapes.items():
        zeros = np.zeros(shape, np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(zeros, name))
    return ir.from_proto(proto)


def model_of(task: Task) -> tuple[ir.Model, Arrays]:
    folder: Path = MODELS / task.name
    with np.load(folder / "evaluation.npz", allow_pickle=False) as data:
        return load(folder / "model.onnx"), dict(data)


def score(model: ir.Model, evaluation: Arrays) -> float:
    feeds = {name: array for name, array in evaluation.items() if name != "labels"}
    (logits,) = Session(model).run(feeds).values()
    return float((logits.argmax(-1) == evaluation["labels"]).mean())


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def spread(shares: Array) -> str:
    """The mean of the seeds, and the lowest and the highest."""
    return f"{100 * shares.mean():.1f} ({100 * shares.min():.1f} to {100 * shares.max():.1f})"


def _mixed(samples: Arrays, share: float, seed: int) -> tuple[Arrays, int]:
    """Samples in a seed's order; a share keeps its labels."""
    size = len(samples["labels"])
    order = np.random.default_rng(seed).permutation(size)
    return {name: array[order] for name, array in samples.items()}, round(size * share)


def _script(name: str) -> Any:
    """The script that trained a model; it needs packages that a checkout may lack."""
    return importlib.import_module(f"models.{name}.train")


def _patches(seed: int) -> tuple[Arrays, int]:
    features, labels = _script("segment_tabular").table()
    learn = np.random.default_rng(0).permutation(len(labels))[:1050]  # as the script splits them
    return _mixed({"features": features[learn], "labels": labels[learn]}, 0.05, seed)


def _vowels(seed: int) -> tuple[Arrays, int]:
    return _mixed(_script("vowel_lstm").utterances("TRAIN"), 0.1, seed)


def _names(seed: int) -> tuple[Arrays, int]:
    script = _script("name_language")
    found = script.names()
    concepts = sorted({concept for concept, _, _ in found})
    learn = np.random.default_rng(0).permutation(concepts).tolist()[: len(concepts) * 86 // 100]
    words, labels = script.pick(found, learn)
    return _mixed({**script.encode(words), "labels": labels.astype(np.int64)}, 0.05, seed)


def _digits(seed: int) -> tuple[Arrays, int]:
    """A tenth of the digits with labels; each is drawn several times over the photographs."""
    script = _script("photo_digits")
    images, labels = importlib.import_module("sklearn.datasets").load_digits(return_X_y=True)
    learn = np.random.default_rng(0).permutation(len(labels))[:1150]
    rng = np.random.default_rng([1, seed])
    order = rng.permutation(learn)
    drawn = np.concatenate([np.tile(order[:115], 8), np.tile(order[115:], 4)])
    pictures = script.render(images[drawn].reshape(-1, 8, 8) / 16, script.backgrounds()[0], rng)
    return {"image": pictures, "labels": labels[drawn]}, 8 * 115


TASKS = (
    Task(name="segment_tabular", samples=_patches, student="drop:1+narrow:0.25+fresh", rate=3e-3,
         batch=64, label_epochs=200, epochs=40, sparsity=0.95, recovery=150),
    Task(name="vowel_lstm", samples=_vowels, student="frames", rate=3e-3, batch=32,
         label_epochs=200, epochs=100),
    Task(name="name_language", samples=_names, student="drop:3+narrow:0.5", rate=1e-3, batch=128,
         label_epochs=20, epochs=5, sparsity=0.8, recovery=150, augment=(Swap(),)),
    Task(name="photo_digits", samples=_digits, student="narrow:0.5", rate=2e-3, batch=64,
         label_epochs=12, epochs=4, sparsity=0.8, recovery=20),
)  # fmt: skip
"""The student of `vowel_lstm` is no part of its teacher: it reads frames one by one."""
