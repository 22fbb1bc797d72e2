"""The command line: verbs and flags to calls of the API; nothing heavy is imported before."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.errors import GateError, InputError, OnnxCompressError

if TYPE_CHECKING:
    from onnxcompress.gates import Gate
    from onnxcompress.images import Images
    from onnxcompress.job import Scheme
    from onnxcompress.observe import Progress
    from onnxcompress.pipeline import Outcome
    from onnxcompress.report import Report

DATA = """\b
DATA is one of
  inputs.npz            arrays named after the model's inputs, samples on the first axis;
                        an array `labels` holds the targets
  folder                of .npz feeds, of images (say how with --images), or of ONNX
                        test_data_set_* folders
  module:callable       or file.py:callable, which returns an iterable of feeds
"""
EXIT_CODES = """\b
Exit codes: 0 done, 1 unexpected failure, 2 bad usage or input, 3 a gate was not met,
4 integrity or signature failure. A failure leaves every file as it was.
"""

_model = click.argument("model", type=click.Path(path_type=Path))
_output = click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Model to write."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
_target = click.option("--target", default="cpu", show_default=True, help="Runtime to aim at.")
_images = click.option(
    "--images",
    metavar="OPTIONS",
    help="How images become the input: 'size=[224, 224], mean=[0.5], std=[0.25]'.",
)
_samples = click.option(
    "--samples",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Feeds to use at most.",
)
_threads = click.option(
    "--threads",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Threads of an operator.",
)
_report = click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Report to write: .html for a page with pictures, .json for machines, else text.",
)
_gate = click.option(
    "--gate",
    "gates",
    multiple=True,
    metavar="GATE",
    help="Bound to hold: 'sqnr >= 30'. Repeatable.",
)
_include = click.option(
    "--include", multiple=True, metavar="PATTERN", help="Only nodes of this name or type (*, ?)."
)
_exclude = click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Not nodes of this name or type (*, ?)."
)


class _Verb(click.Command):
    """A verb whose failures are one sentence and an exit code, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OnnxCompressError as error:
            _fail(str(error), error.exit_code)
        except MemoryError:
            _fail("out of memory: use a smaller --samples or a machine with more", 1)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except Exception as error:
            if os.environ.get("ONNXCOMPRESS_TRACEBACK"):
                raise
            name = type(error).__name__
            _fail(f"unexpected {name}: {error} (ONNXCOMPRESS_TRACEBACK=1 shows where)", 1)


def _fail(message: str, code: int) -> None:
    click.echo(f"onnxcompress: {' '.join(message.split())}", err=True)
    raise click.exceptions.Exit(code)


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="onnxcompress")
def main() -> None:
    """Make trained ONNX models smaller and faster, and prove that they still work.

    Start with: onnxcompress compress model.onnx -o small.onnx --calibrate inputs.npz
    """


main.command_class = _Verb


@main.command(epilog=DATA + "\n" + EXIT_CODES)
@_model
@_output
@click.option("--calibrate", metavar="DATA", help="Inputs to observe; static needs them.")
@click.option("--evaluate", metavar="DATA", help="Inputs to compare on; else a fifth is held out.")
@click.option("--recipe", type=click.Path(path_type=Path), help="Passes and gates, as TOML.")
@click.option(
    "--scheme",
    type=click.Choice(["auto", "static", "dynamic", "none"]),
    default="auto",
    show_default=True,
    help="Quantization to try; none applies exact rewrites only.",
)
@_gate
@_target
@_samples
@_threads
@_images
@_report
@_json
def compress(
    model: Path,
    output: Path,
    calibrate: str | None,
    evaluate: str | None,
    recipe: Path | None,
    scheme: Scheme,
    gates: tuple[str, ...],
    target: str,
    samples: int,
    threads: int,
    images: str | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """Quantize MODEL by what is measured to be best, check it, and write it to OUTPUT.

    Tries static and dynamic int8, runs each beside the original on data held out of calibration,
    times both in turns, and keeps the fastest that passes all gates. Where none does, the exact
    rewrites alone are written. Without --gate a variant must not be larger (size_ratio <= 1) nor
    slower (latency_ratio <= 1.03, the noise of a measurement), must keep sqnr >= 10 dB on every
    output and, where there are labels, accuracy_drop <= 0.02.
    """
    from onnxcompress.job import compress as run
    from onnxcompress.recipe import Recipe

    _check_report(report)
    with _stages(as_json) as stage:
        try:
            done = run(
                model,
                output,
                calibrate=calibrate,
                evaluate=evaluate,
                recipe=None if recipe is None else Recipe.from_toml(recipe),
                target=target,
                scheme=scheme,
                gates=_parse(gates),
                images=_read_images(images),
                samples=samples,
                threads=threads,
                stage=stage,
            )
        except GateError as error:
            _tell(error.report, report, as_json)
            raise
    _tell(done, report, as_json)


@main.command(epilog=EXIT_CODES)
@_model
@_output
@_json
def optimize(model: Path, output: Path, as_json: bool) -> None:
    """Apply exact rewrites to MODEL: fold batchnorm, constants and scales, drop dead nodes."""
    from onnxcompress import api

    _rewrite("optimize", model, output, as_json, lambda stage: api.optimize(model))


@main.command(epilog=DATA + "\n" + EXIT_CODES)
@_model
@_output
@click.option("--calibrate", metavar="DATA", help="Inputs to observe; static needs them.")
@click.option(
    "--statistics",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Statistics from the calibrate verb in place of data; several are merged.",
)
@click.option(
    "--scheme", type=click.Choice(["static", "dynamic"]), default="static", show_default=True
)
@click.option(
    "--method",
    type=click.Choice(["minmax", "percentile", "mse", "entropy"]),
    help="How ranges of activations are chosen (static).",
)
@click.option("--percentile", type=float, help="Share of values, in percent, for that method.")
@click.option(
    "--activations", type=click.Choice(["uint8", "int8"]), help="Type of activations (static)."
)
@click.option(
    "--per-channel/--per-tensor",
    default=None,
    help="One weight scale an output channel (default) or a tensor.",
)
@_include
@_exclude
@_target
@_samples
@_images
@_json
def quantize(
    model: Path,
    output: Path,
    calibrate: str | None,
    statistics: tuple[Path, ...],
    scheme: str,
    target: str,
    samples: int,
    images: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize MODEL to 8 bits and write it, without comparing (`compress` compares)."""
    from onnxcompress import api
    from onnxcompress.observations import merge_all

    given = {name: value for name, value in options.items() if value not in (None, ())}
    static_only = {"method", "percentile", "activations"} & given.keys()
    if scheme == "dynamic" and static_only:
        raise InputError(f"--{min(static_only)} belongs to the static scheme: remove it")
    merged = merge_all([api.load_statistics(path) for path in statistics]) if statistics else None
    _rewrite(
        "quantize",
        model,
        output,
        as_json,
        lambda stage: api.quantize(
            model,
            calibrate,
            scheme=scheme,  # pyright: ignore[reportArgumentType]
            statistics=merged,
            target=target,
            samples=samples,
            images=_read_images(images),
            progress=stage("calibrating"),
            **given,
        ),
    )


@main.command(epilog=DATA + "\n" + EXIT_CODES)
@_model
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Statistics to write (.npz).",
)
@click.option("--data", "data", required=True, metavar="DATA", help="Inputs to observe.")
@_target
@_samples
@_images
def calibrate(
    model: Path, output: Path, data: str, target: str, samples: int, images: str | None
) -> None:
    """Observe MODEL on DATA and write statistics, for `quantize --statistics`."""
    from onnxcompress import api

    with _stages(quiet=False) as stage:
        found = api.calibrate(
            model,
            data,
            target=target,
            samples=samples,
            images=_read_images(images),
            progress=stage("calibrating"),
        )
    found.save(output)


@main.command(epilog=EXIT_CODES)
@_model
@_output
@click.option("--sparsity", type=float, help="Share of weights to set to zero, in [0, 1).")
@click.option("--threshold", type=float, help="Magnitude below which weights become zero.")
@click.option(
    "--scope",
    type=click.Choice(["tensor", "global"]),
    help="Rank weights within each tensor (default) or over the whole model.",
)
@_include
@_exclude
@_json
def prune(model: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Set the weights of MODEL that are least in magnitude to zero."""
    from onnxcompress import api

    given = {name: value for name, value in options.items() if value not in (None, ())}
    _rewrite("prune", model, output, as_json, lambda stage: api.prune(model, **given))


@main.command(epilog=DATA + "\n" + EXIT_CODES)
@click.argument("original", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option("--data", metavar="DATA", help="Inputs to compare on; made up where there are none.")
@_gate
@_samples
@_threads
@_images
@_report
@_json
def validate(
    original: Path,
    candidate: Path,
    data: str | None,
    gates: tuple[str, ...],
    samples: int,
    threads: int,
    images: str | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """Compare any CANDIDATE with its ORIGINAL on the same inputs: quality, size and latency."""
    from onnxcompress.job import validate as run

    _check_report(report)
    with _stages(as_json) as stage:
        done = run(
            original,
            candidate,
            data=data,
            gates=_parse(gates),
            samples=samples,
            threads=threads,
            images=_read_images(images),
            stage=stage,
        )
    _tell(done, report, as_json)
    missed = [gate for gate in done.gates if not gate.passed]
    if missed:
        raise GateError(f"{candidate}: {missed[0].reason}", done)


@main.command(epilog=EXIT_CODES)
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--seconds", type=click.FloatRange(0.1), default=3.0, show_default=True)
@_threads
@_json
def bench(models: tuple[Path, ...], seconds: float, threads: int, as_json: bool) -> None:
    """Latency, size and peak memory of MODELS, each timed in turns with the first."""
    from onnxcompress.measure import bench as run
    from onnxcompress.report import listing, to_plain

    found = run(models, threads=threads, seconds=seconds)
    _emit([to_plain(m) for m in found], as_json, lambda console: listing.show_bench(found, console))


@main.command(epilog=EXIT_CODES)
@_model
@_target
@_json
def inspect(model: Path, target: str, as_json: bool) -> None:
    """Show what is in MODEL, what would run on integers, and what would not and why."""
    from onnxcompress.inspection import inspect as run
    from onnxcompress.report import listing, to_plain

    found = run(model, target=target)
    _emit(to_plain(found), as_json, lambda console: listing.show_inspection(found, console))


def _rewrite(
    verb: str,
    source: Path,
    output: Path,
    as_json: bool,
    work: Callable[[Callable[[str], Progress]], Outcome],
) -> None:
    """Run a verb that rewrites without comparing, save, and tell what was done."""
    from onnxcompress.model_io import check_writable, save
    from onnxcompress.report import ModelFile, Report

    check_writable(output)
    with _stages(as_json) as stage:
        outcome = work(stage)
    original = ModelFile.of(source)
    save(outcome.model, output)
    result = ModelFile.of(output)
    _tell(Report(verb=verb, source=original, result=result, passes=outcome.records), None, as_json)


def _tell(report: Report | object, path: Path | None, as_json: bool) -> None:
    from onnxcompress.report import Report, terminal, to_json
    from onnxcompress.report.files import write

    assert isinstance(report, Report)
    if path is not None:
        write(report, path)
    _emit(json.loads(to_json(report)), as_json, lambda console: terminal.show(report, console))


def _emit(content: object, as_json: bool, show: Callable[[Any], None]) -> None:
    if as_json:
        click.echo(json.dumps(content, sort_keys=True, indent=2))
        return
    from rich.console import Console

    show(Console(stderr=True))


def _check_report(path: Path | None) -> None:
    if path is None:
        return
    from onnxcompress.report.files import check_format

    check_format(path)


def _parse(gates: tuple[str, ...]) -> list[Gate]:
    from onnxcompress.gates import Gate

    return [Gate.parse(text) for text in gates]


def _read_images(text: str | None) -> Images | None:
    if text is None:
        return None
    from onnxcompress.images import Images

    return Images.from_text(text)


@contextmanager
def _stages(quiet: bool) -> Generator[Callable[[str], Progress]]:
    """Progress bars on a terminal, one a stage; silence elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda name: lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:

        def stage(name: str) -> Progress:
            task = bars.add_task(name, total=None)

            def progress(done: int, total: int | None) -> None:
                bars.update(task, completed=done, total=total)
                if total is not None and done >= total:
                    bars.update(task, visible=False)

            return progress

        yield stage
