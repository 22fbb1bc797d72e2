"""A large teacher and a small student: `distill`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.cli import flags
from onnxcompress.cli.console import Verb, stages, tell

if TYPE_CHECKING:
    from onnxcompress.api import Quantization


@click.command(
    cls=Verb,
    epilog=flags.epilog(
        flags.examples(
            "distill teacher.onnx student.onnx -o taught.onnx --data inputs.npz",
            "distill teacher.onnx drop:2+narrow:0.5 -o small.onnx --data inputs.npz "
            "--quantize static",
            "distill model.onnx pruned.onnx -o recovered.onnx --data inputs.npz --keep-zeros",
        ),
        flags.STUDENT,
        flags.DATA,
        flags.IMAGES,
    ),
)
@click.argument("teacher", type=click.Path(path_type=Path))
@click.argument("student")
@flags.output
@click.option("--data", "data", required=True, metavar="DATA", help="Inputs to learn from.")
@flags.unlabelled
@flags.evaluate("data")
@flags.recipe("TOML with a table [train] of the options below and passes to run on the student.")
@flags.learning(
    epochs=30, lr="Learning rate.  [default: 0.001]", zeros="Zeros of a pruned STUDENT stay."
)
@click.option(
    "--quantize",
    type=click.Choice(["static", "dynamic", "weights", "float16"]),
    help="Quantize the student afterwards, with compensation.",
)
@flags.cache
@flags.samples
@flags.threads
@flags.images
@flags.report
@flags.as_json
def distill(
    teacher: Path,
    student: str,
    output: Path,
    data: str,
    unlabelled: str | None,
    evaluate: str | None,
    recipe: Path | None,
    quantize: Quantization | None,
    cache: Path | None,
    samples: int,
    threads: int,
    images: str | None,
    report: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Teach STUDENT what TEACHER says of inputs.

    Labels are not needed; where DATA has some, they are learned from too. The student's scores of
    classes are held against the teacher's, softened by a temperature, other outputs by their
    squared error. The teacher runs once over the data.
    """
    from dataclasses import replace

    from onnxcompress.distillation import distill_files as run
    from onnxcompress.recipe import Recipe
    from onnxcompress.train.settings import Training

    flags.check_report(report, teacher, output)
    plan = Recipe() if recipe is None else Recipe.from_toml(recipe)
    given = {name: value for name, value in options.items() if value is not None}
    with stages(as_json) as stage:
        done = run(
            teacher,
            student,
            output,
            data,
            unlabelled=unlabelled,
            evaluate=evaluate,
            recipe=plan,
            training=replace(plan.training or Training(), **given),
            quantize=quantize,
            cache=cache,
            samples=samples,
            threads=threads,
            images=flags.read_images(images),
            stage=stage,
        )
    tell(done, report, as_json)
