"""The verbs in Python: each takes a model, gives back a new one, and leaves the old as it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from onnxcompress import schemes
from onnxcompress.contract import Pass, Result, Skip, Statistics, Want
from onnxcompress.data import Data, Images, interface, open_data
from onnxcompress.errors import DataError, InputError
from onnxcompress.garbage import rarely_collected
from onnxcompress.model_io import load
from onnxcompress.observe import Observations, Progress, observe
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.passes.prune_magnitude import PruneMagnitude
from onnxcompress.passes.quantize_weights import QuantizeWeights
from onnxcompress.pipeline import Observer, Outcome, Record, run
from onnxcompress.train.clean import Cleaner

ModelLike = ir.Model | str | Path
Started = Callable[[str], None]
Quantization = Literal["static", "dynamic", "weights", "float16", "bfloat16", "float8"]

SAMPLES = 512
"""Feeds that calibration reads at most, unless told otherwise; more change no threshold."""


@rarely_collected()
def optimize(model: ModelLike, *, started: Started | None = None) -> Outcome:
    """Apply the exact rewrites: fold batchnorm, constants and scales, drop what nothing reads.

    Args:
        model: a model in memory or the path of one.
        started: told the name of each pass before it runs.

    Raises:
        InputError: if the model cannot be loaded.
    """
    return run(as_model(model), schemes.exact(), started=started, copy=_is_held(model))


def calibrate(
    model: ModelLike,
    data: Any,
    *,
    target: str = "cpu",
    samples: int = SAMPLES,
    images: Images | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Observations:
    """Observe what static quantization of `model` needs, for `quantize(statistics=...)`.

    Statistics of several runs, of other data or on other machines, merge with
    `Observations.merge` to what one run over all of the data gives.

    Args:
        data: anything that `open_data` opens.
        samples: feeds to read at most.
        images: how an image becomes the input; needed for a folder of images.
        progress: called with the feeds done and how many there are.
        executor: runs shards of the data, in other processes or machines if it likes.

    Raises:
        InputError: if the model or the data cannot be used.
    """
    model = as_model(model)
    opened = as_data(data, model, images)
    model = run(model, schemes.before_static(target)).model
    wants = InsertQdq(target=target).could_want(model)
    return observer(opened, samples, progress, executor)(model, wants)


@rarely_collected()
def quantize(
    model: ModelLike,
    data: Any = None,
    *,
    scheme: Quantization = "static",
    effort: schemes.Effort = "fast",
    statistics: Statistics | None = None,
    target: str = "cpu",
    samples: int = SAMPLES,
    images: Images | None = None,
    progress: Progress | None = None,
    started: Started | None = None,
    executor: Executor | None = None,
    **options: Any,
) -> Outcome:
    """Quantize a model, after the exact rewrites.

    Args:
        data: what to calibrate with; static and float8 need it, or `statistics`; float16 and
            bfloat16 leave in float32 what overflows in it.
        scheme: static (activations too, from statistics), dynamic (activations at run time), both
            in 8 bits, weights (alone, in 4 bits or 8; arithmetic stays in float), or short floats:
            float8, where the target has it, float16 or bfloat16.
        effort: what static quantization does against its error; see `schemes.static`. best, for
            weights alone too, reconstructs layers on the data, which takes minutes: see
            `train.reconstruct`.
        statistics: what `calibrate` gave.
        options: those of the pass, `InsertQdq` (static, float8), `QuantizeDynamic`,
            `QuantizeWeights` or `ConvertFloat16`.

    Raises:
        InputError: if the model or the data cannot be used, or neither data nor statistics are
            given where they are needed.
    """
    held, model = _is_held(model), as_model(model)
    passes = _passes(scheme, target, effort, options)
    if scheme in ("static", "float8") and data is None:
        if statistics is None:
            raise InputError(
                f"{scheme} quantization needs calibration data: give some, or use another scheme"
            )
        if effort != "fast" and scheme == "static":
            raise InputError(
                f"{effort} quantization runs the model: give data beside the statistics"
            )
    learns = effort == "best" and scheme in ("static", "weights")
    if learns and data is None:
        raise InputError("the best effort runs the model: give data, labels are not needed")
    watch = opened = None
    if data is not None and (learns or scheme not in ("dynamic", "weights")):
        opened = as_data(data, model, images)
        watch = observer(opened, samples, progress, executor)
    return rewrite(
        *(model, passes, watch),
        learn_from=opened.first(samples) if opened and learns else None,
        progress=progress,
        statistics=statistics,
        started=started,
        copy=held,
    )


def rewrite(
    model: ir.Model,
    passes: Iterable[Pass],
    watch: Observer | None,
    *,
    learn_from: Data | None = None,
    progress: Progress | None = None,
    started: Started | None = None,
    statistics: Statistics | None = None,
    copy: bool = True,
) -> Outcome:
    """`pipeline.run`, and with data to learn from reconstruction of what it quantized.

    Reconstruction holds the result against the model as it was right before it was quantized, so
    it is no pass, which would see only one of the two; its record stands behind theirs.
    """
    passes = tuple(passes)
    first = [i for i, p in enumerate(passes) if isinstance(p, InsertQdq | QuantizeWeights)]
    if learn_from is None or not first:
        return run(model, passes, statistics=statistics, observer=watch, started=started, copy=copy)
    floats = run(
        *(model, passes[: first[0]]),
        statistics=statistics,
        observer=watch,
        started=started,
        copy=copy,
    )
    done = run(
        *(floats.model, passes[first[0] :]),
        statistics=floats.statistics,
        observer=watch,
        started=started,
    )

    def work() -> Result:
        from onnxcompress.train.reconstruct import reconstruct  # all of training: only when used

        try:
            return reconstruct(floats.model, done.model, learn_from, progress=progress)
        except DataError:
            raise
        except InputError as reason:  # nothing that can be reconstructed: what there is stays
            return Result(done.model, modified=False, skips=(Skip("", "", str(reason)),))

    records = *floats.records, *done.records
    return _behind(records, "reconstruct", work, done.statistics, started)


def _behind(
    records: tuple[Record, ...],
    name: str,
    work: Callable[[], Result],
    statistics: Statistics | None,
    started: Started | None,
) -> Outcome:
    """What comes of work behind passes that is none itself, with its record behind theirs."""
    if started is not None:
        started(name)
    begin = time.perf_counter()
    found = work()
    seconds = time.perf_counter() - begin
    record = Record(name, {}, found.modified, found.skips, found.figures, seconds)
    return Outcome(found.model, (*records, record), statistics)


def _passes(
    scheme: Quantization, target: str, effort: schemes.Effort, options: dict[str, Any]
) -> tuple[Pass, ...]:
    match scheme:
        case "static":
            return schemes.static(target, effort, **options)
        case "dynamic":
            return schemes.dynamic(target, **options)
        case "weights":
            return schemes.weights(target, **options)
        case "float8":
            return schemes.float8(target, **options)
        case "float16" | "bfloat16":
            return schemes.half(scheme, target, **options)


def prune(
    model: ModelLike,
    sparsity: float | None = None,
    *,
    calibrate: Any = None,
    samples: int = SAMPLES,
    images: Images | None = None,
    started: Started | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Outcome:
    """Set the weights of least magnitude to zero, after the exact rewrites.

    Args:
        sparsity: share of weights to zero, in [0, 1).
        calibrate: inputs, over which the outputs of layers then get back the means and variances
            that they had (`train.renormalize`), which is worth much where much is pruned.
        samples: how many of its feeds are read at most.
        options: those of `PruneMagnitude`.

    Raises:
        InputError: if the model or the data cannot be loaded or the options make no sense.
    """
    cut, held = PruneMagnitude(sparsity=sparsity, **options), _is_held(model)
    model = as_model(model)
    if calibrate is None:
        return run(model, (*schemes.exact(), cut), started=started, copy=held)
    floats = run(model, schemes.exact(), started=started, copy=held)
    done = run(floats.model, (cut,), started=started)
    data = as_data(calibrate, floats.model, images).first(samples)

    def work() -> Result:
        from onnxcompress.train.renormalize import renormalize

        return renormalize(done.model, floats.model, data, progress=progress)

    return _behind((*floats.records, *done.records), "renormalize", work, None, started)


def load_statistics(path: str | Path) -> Observations:
    """Statistics that `calibrate` gave and `save` wrote.

    Raises:
        InputError: if the file cannot be read or holds something else.
    """
    return Observations.load(Path(path))


def as_model(model: ModelLike) -> ir.Model:
    """The model itself, loaded if it is a path."""
    return model if isinstance(model, ir.Model) else load(model)


def _is_held(model: ModelLike) -> bool:
    """Whether the caller has the model, so that it must stay as it is."""
    return isinstance(model, ir.Model)


def as_data(
    source: Any, model: ir.Model, images: Images | None = None, *, finite: bool = True
) -> Data:
    """The data, opened against the model's inputs and checked."""
    return open_data(source, interface(model), images=images, finite=finite)


def cleaned(source: Any, model: ModelLike, images: Images | None = None) -> Data:
    """The data without feeds that are not finite or far out; its notes say which went.

    Reads all of it once. `Cleaner` has the options.

    Raises:
        InputError: if the model or the data cannot be used, or no feed is finite.
    """
    return Cleaner().data(as_data(source, as_model(model), images, finite=False))[0]


def observer(
    data: Data,
    samples: int = SAMPLES,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Callable[[ir.Model, Sequence[Want]], Observations]:
    """Observes models on the first `samples` feeds of `data`, or as many of them as tell enough."""
    chosen = data.first(samples)

    def watch(model: ir.Model, wants: Sequence[Want]) -> Observations:
        enough = [want.feeds for want in wants if want.feeds is not None]
        most = None if len(enough) < len(wants) else max(enough, default=1)
        some = chosen if most is None else chosen.spread(most)
        told = [replace(want, feeds=most) for want in wants]
        return observe(model, some, told, total=some.size, progress=progress, executor=executor)

    return watch
