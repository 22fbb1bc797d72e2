"""Verbs that look at models and write none: `validate`, `bench`, `inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from onnxcompress.cli import flags
from onnxcompress.cli.console import Verb, emit, stages, tell
from onnxcompress.errors import GateError


@click.command(
    cls=Verb,
    epilog=flags.epilog(
        flags.examples(
            "validate model.onnx small.onnx --data inputs.npz --gate 'top1_agreement >= 0.98'"
        ),
        flags.DATA,
        flags.GATES,
        flags.IMAGES,
    ),
)
@click.argument("original", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option("--data", metavar="DATA", help="Inputs to compare on; made up where there are none.")
@flags.gates
@flags.samples
@flags.threads
@flags.images
@flags.report
@flags.as_json
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
    """Compare any CANDIDATE with its ORIGINAL.

    Quality on the same inputs, output by output and tensor by tensor, size, latency and memory.
    """
    from onnxcompress.comparison import validate as run

    flags.check_report(report, original, candidate)
    with stages(as_json) as stage:
        done = run(
            original,
            candidate,
            data=data,
            gates=flags.read_gates(gates),
            samples=samples,
            threads=threads,
            images=flags.read_images(images),
            stage=stage,
        )
    tell(done, report, as_json)
    missed = [gate for gate in done.gates if not gate.passed]
    if missed:
        raise GateError(f"{candidate}: {missed[0].reason}", done)


@click.command(
    cls=Verb, epilog=flags.epilog(flags.examples("bench model.onnx small.onnx --seconds 5"))
)
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--seconds",
    type=click.FloatRange(0.1),
    default=3.0,
    show_default=True,
    help="Time to spend on a model, and on each pair.",
)
@flags.threads
@flags.as_json
def bench(models: tuple[Path, ...], seconds: float, threads: int, as_json: bool) -> None:
    """Measure size, latency and memory of MODELS.

    Each is timed by itself and in turns with the first.
    """
    from onnxcompress.measure import bench as run
    from onnxcompress.report import listing, to_plain

    found = run(models, threads=threads, seconds=seconds)
    content = {"models": to_plain(found)}
    emit(content, as_json, lambda console: listing.show_bench(found, console))


@click.command(cls=Verb, epilog=flags.epilog(flags.examples("inspect model.onnx")))
@flags.model
@flags.target
@flags.as_json
def inspect(model: Path, target: str, as_json: bool) -> None:
    """Show what is in MODEL.

    And what of it would run on integers on the target, what would not, and why: by operator for
    people, node by node with --json.
    """
    from onnxcompress.inspection import inspect as run
    from onnxcompress.report import listing, to_plain

    found = run(model, target=target)
    emit(to_plain(found), as_json, lambda console: listing.show_inspection(found, console))
