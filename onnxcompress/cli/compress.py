"""The main job: `compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from onnxcompress.cli import flags
from onnxcompress.cli.console import Verb, stages, tell
from onnxcompress.errors import GateError

if TYPE_CHECKING:
    from onnxcompress.attempts import Scheme
    from onnxcompress.report import Report
    from onnxcompress.schemes import Effort


@click.command(
    cls=Verb,
    epilog=flags.epilog(
        flags.examples(
            "compress model.onnx -o small.onnx --calibrate inputs.npz --report small.html",
            "compress model.onnx -o small.onnx --calibrate photos --images 'mean=[0.5]'",
            "compress model.onnx -o small.onnx --calibrate inputs.npz --max-drop 0.01",
            "compress model.onnx -o small.onnx --calibrate inputs.npz --gate 'sqnr >= 30'",
        ),
        flags.DATA,
        flags.GATES,
        flags.IMAGES,
    ),
)
@flags.model
@flags.output
@flags.calibrate
@flags.evaluate("calibrate")
@flags.recipe("TOML of passes, target and gates, in place of --scheme and --target.")
@click.option(
    "--scheme",
    type=click.Choice(
        ["auto", "static", "dynamic", "weights", "float16", "bfloat16", "float8", "none"]
    ),
    default="auto",
    show_default=True,
    help="Quantization to try; weights leaves the arithmetic in float, float8 is for targets that "
    "have it (tensorrt), none applies exact rewrites only.",
)
@flags.bits
@flags.block_size
@flags.effort("thorough")
@flags.gates
@flags.max_drop
@flags.min_sqnr
@flags.target
@flags.samples
@flags.threads
@flags.images
@flags.clean
@flags.report
@flags.as_json
def compress(
    model: Path,
    output: Path,
    calibrate: str | None,
    evaluate: str | None,
    recipe: Path | None,
    scheme: Scheme,
    bits: int | None,
    block_size: int | None,
    effort: Effort,
    gates: tuple[str, ...],
    max_drop: float | None,
    min_sqnr: float | None,
    target: str,
    samples: int,
    threads: int,
    images: str | None,
    clean: bool,
    report: Path | None,
    as_json: bool,
) -> None:
    """Make MODEL smaller and faster, and prove it: the main job.

    Tries static and dynamic int8, runs each beside the original on data held out of calibration,
    times both in turns, and keeps the smallest and fastest (least size times latency) that passes
    all gates; else the exact rewrites alone. A --recipe or --scheme that passes is kept.

    Without gates or a budget, outputs that could be told from the float model's (SQNR below
    30 dB or, of class scores, more than a tenth of the decisions) count too: a variant with
    10 dB more is kept where it costs at most 0.3 more, and the few layers that make nearly all of
    the error are tried in float for that.

    Without --gate these gates hold: size_ratio <= 1, latency_ratio <= 1.03 (3 % is the noise of
    a measurement), sqnr >= 10 and, where there are labels, accuracy_drop <= 0.02. A model that no
    variant improves within them is written as it came. With --gate only yours hold; where no
    variant passes, nothing is written and the exit code is 3.

    Where static int8 misses what bounds quality, the layers that it hurts most for their
    arithmetic go back to float until it holds. --max-drop and --min-sqnr take the place of the
    bounds on sqnr and accuracy_drop above; what is written never loses more.

    For a --target that this machine does not run nothing is timed: latency and memory decide
    nothing and no gate holds them unless you give one, and what runs on integers is what the
    target's table promises.
    """
    from onnxcompress.job import compress as run
    from onnxcompress.recipe import Recipe

    flags.check_report(report, model, output)
    with stages(as_json) as stage:
        try:
            done = run(
                model,
                output,
                calibrate=calibrate,
                evaluate=evaluate,
                recipe=None if recipe is None else Recipe.from_toml(recipe),
                target=target,
                scheme=scheme,
                bits=bits,
                block_size=block_size,
                effort=effort,
                gates=flags.read_gates(gates),
                max_drop=max_drop,
                min_sqnr=min_sqnr,
                images=flags.read_images(images),
                clean=clean,
                samples=samples,
                threads=threads,
                stage=stage,
            )
        except GateError as error:
            tell(cast("Report", error.report), report, as_json)
            raise
    tell(done, report, as_json)
