"""A quantized model and its floats: `tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxcompress.cli import flags
from onnxcompress.cli.console import Verb, stages, tell


@click.command(
    cls=Verb,
    epilog=flags.epilog(
        flags.examples(
            "tune small.onnx --teacher model.onnx -o tuned.onnx --data inputs.npz",
            "tune small.onnx --teacher model.onnx -o tuned.onnx --data inputs.npz --epochs 30 "
            "--keep-zeros",
            "tune small.onnx -o tuned.onnx --data labelled.npz --recipe tune.toml",
        ),
        flags.DATA,
        flags.IMAGES,
    ),
)
@click.argument("quantized", type=click.Path(path_type=Path))
@flags.output
@click.option("-d", "--data", "data", required=True, metavar="DATA", help="Inputs to learn from.")
@click.option(
    "--teacher",
    type=click.Path(path_type=Path),
    help="The float model, or a better one; labels among DATA are learned without it.",
)
@flags.unlabelled
@flags.evaluate("data")
@flags.recipe("TOML with a table [tune] of the options below.")
@flags.learning(
    epochs=10, lr="Learning rate; else by the grids' steps.", zeros="Zeros of a pruned model stay."
)
@flags.cache
@flags.samples
@flags.threads
@flags.images
@flags.report
@flags.as_json
def tune(
    quantized: Path,
    output: Path,
    data: str,
    teacher: Path | None,
    unlabelled: str | None,
    evaluate: str | None,
    recipe: Path | None,
    cache: Path | None,
    samples: int,
    threads: int,
    images: str | None,
    report: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train the codes of QUANTIZED by what TEACHER says of inputs.

    QUANTIZED is static or has weights alone in few bits, made by whatever tool. It is trained as
    it is rounded, on the grids that it has. Where held-out data do not say that this made it
    better, it is written as it came.
    """
    from dataclasses import replace

    from onnxcompress.recipe import Recipe
    from onnxcompress.train.settings import Tuning
    from onnxcompress.tuning import tune_files as run

    flags.check_report(report, quantized, output)
    plan = Recipe() if recipe is None else Recipe.from_toml(recipe)
    given = {name: value for name, value in options.items() if value is not None}
    with stages(as_json) as stage:
        done = run(
            quantized,
            output,
            data,
            teacher=teacher,
            unlabelled=unlabelled,
            evaluate=evaluate,
            tuning=replace(plan.tuning or Tuning(), **given),
            cache=cache,
            samples=samples,
            threads=threads,
            images=flags.read_images(images),
            stage=stage,
        )
    tell(done, report, as_json)
