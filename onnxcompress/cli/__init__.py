"""The command line: verbs and flags to calls of the API; nothing heavy is imported before."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import click

from onnxcompress.cli import flags
from onnxcompress.cli.console import Verb, emit, stages, tell
from onnxcompress.errors import GateError, InputError

if TYPE_CHECKING:
    from onnxcompress.api import Quantization
    from onnxcompress.attempts import Scheme
    from onnxcompress.observe import Progress
    from onnxcompress.pipeline import Outcome
    from onnxcompress.report import Report
    from onnxcompress.schemes import Effort


@click.group(epilog=flags.EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="onnxcompress")
def main() -> None:
    """Make trained ONNX models smaller and faster, and prove that they still work.

    Start with: onnxcompress compress model.onnx -o small.onnx --calibrate inputs.npz
    """


main.command_class = Verb
# On its way out Python looks for garbage once more, which in a large graph takes seconds.
atexit.register(gc.freeze)


@main.command(
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
    )
)
@flags.model
@flags.output
@flags.calibrate
@click.option(
    "--evaluate", metavar="DATA", help="Inputs to compare on; else the last fifth of --calibrate."
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="TOML of passes, target and gates, in place of --scheme and --target.",
)
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


@main.command(epilog=flags.epilog(flags.examples("optimize model.onnx -o exact.onnx")))
@flags.model
@flags.output
@flags.as_json
def optimize(model: Path, output: Path, as_json: bool) -> None:
    """Fold and simplify MODEL exactly.

    Folds batchnorm, constants and scales, removes identities and what nothing reads.
    """
    from onnxcompress import api

    _rewrite("optimize", model, output, as_json, lambda stage: api.optimize(model))


@main.command(
    epilog=flags.epilog(
        flags.examples(
            "quantize model.onnx -o int8.onnx --calibrate inputs.npz --method entropy",
            "quantize model.onnx -o int8.onnx --statistics a.npz --statistics b.npz",
            "quantize model.onnx -o int8.onnx --scheme dynamic --exclude 'head/*'",
        ),
        flags.DATA,
        flags.IMAGES,
    )
)
@flags.model
@flags.output
@flags.calibrate
@click.option(
    "--statistics",
    multiple=True,
    type=click.Path(path_type=Path),
    help="What `calibrate` wrote, in place of data; repeatable, and then merged.",
)
@click.option(
    "--scheme",
    type=click.Choice(["static", "dynamic", "weights", "float16", "bfloat16", "float8"]),
    default="static",
    show_default=True,
    help="Observe activations beforehand, scale them at run time, or leave them in float; or store "
    "short floats, computed in where the target has kernels (float8 is for tensorrt). Static and "
    "float8 need data.",
)
@click.option(
    "--method",
    type=click.Choice(["minmax", "percentile", "mse", "entropy"]),
    help="How ranges of activations are chosen (static).  [default: mse]",
)
@click.option(
    "--percentile", type=float, help="Values within range, in percent.  [default: 99.999]"
)
@click.option(
    "--activations",
    type=click.Choice(["uint8", "int8", "uint16", "int16"]),
    help="Type of activations, one that the target takes (static).  [default: the target's]",
)
@click.option(
    "--per-channel/--per-tensor",
    default=None,
    help="A weight's scales: one an output channel, or one.  [default: per-channel]",
)
@flags.bits
@flags.block_size
@flags.effort("fast")
@flags.include
@flags.exclude
@flags.target
@flags.samples
@flags.images
@flags.clean
@flags.as_json
def quantize(
    model: Path,
    output: Path,
    calibrate: str | None,
    statistics: tuple[Path, ...],
    scheme: Quantization,
    effort: Effort,
    target: str,
    samples: int,
    images: str | None,
    clean: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize MODEL, without comparing.

    Writes what one scheme gives; `compress` tries several and compares.
    """
    from onnxcompress import api
    from onnxcompress.observe.observations import merge_all

    given = {name: value for name, value in options.items() if value not in (None, ())}
    _refuse_others(scheme, {**given, "calibrate": calibrate, "statistics": statistics or None})
    pixels = flags.read_images(images)
    data = api.cleaned(calibrate, model, pixels) if clean and calibrate else calibrate
    merged = merge_all([api.load_statistics(path) for path in statistics]) if statistics else None
    _rewrite(
        "quantize",
        model,
        output,
        as_json,
        lambda stage: api.quantize(
            model,
            data,
            scheme=scheme,
            effort=effort,
            statistics=merged,
            target=target,
            samples=samples,
            images=pixels,
            progress=stage("calibrating"),
            **given,
        ),
        notes=() if data is None or isinstance(data, str) else data.notes,
    )


@main.command(
    epilog=flags.epilog(
        flags.examples("calibrate model.onnx -o statistics.npz --data inputs.npz"),
        flags.DATA,
        flags.IMAGES,
    )
)
@flags.model
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Statistics (.npz)."
)
@click.option("--data", "data", required=True, metavar="DATA", help="Inputs to observe.")
@flags.target
@flags.samples
@flags.images
@flags.clean
@flags.as_json
def calibrate(
    model: Path,
    output: Path,
    data: str,
    target: str,
    samples: int,
    images: str | None,
    clean: bool,
    as_json: bool,
) -> None:
    """Observe MODEL on DATA, for `quantize --statistics`.

    All methods of `quantize` find their ranges in them, and those of several runs merge.
    """
    from onnxcompress import api
    from onnxcompress.model_io import check_writable
    from onnxcompress.report import listing

    check_writable(output)
    pixels = flags.read_images(images)
    chosen = api.cleaned(data, model, pixels) if clean else data
    with stages(as_json) as stage:
        found = api.calibrate(
            model,
            chosen,
            target=target,
            samples=samples,
            images=pixels,
            progress=stage("calibrating"),
        )
    found.save(output)
    notes = () if isinstance(chosen, str) else chosen.notes
    content = {
        "statistics": output.name,
        "values": [want.value for want in found.kept],
        "notes": list(notes),
        "unobserved": {want.value: reason for want, reason in found.reasons.items()},
    }
    emit(
        content,
        as_json,
        lambda console: listing.show_observations(output.name, found, notes, console),
    )


@main.command(
    epilog=flags.epilog(
        flags.examples("prune model.onnx -o sparse.onnx --sparsity 0.5 --exclude Gather")
    )
)
@flags.model
@flags.output
@click.option(
    "--sparsity", type=float, help="Share of weights that become zero, from 0 to 1.  [default: 0.5]"
)
@click.option("--threshold", type=float, help="Zero all magnitudes below this instead.")
@click.option(
    "--scope",
    type=click.Choice(["layer_adaptive", "global", "tensor"]),
    help="Rank weights over the whole model, by what they are to their own tensor or by magnitude, "
    "or within each tensor.  [default: layer_adaptive]",
)
@flags.include
@flags.exclude
@flags.as_json
def prune(model: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Set the least of the weights of MODEL to zero.

    Applies the exact rewrites first.
    """
    from onnxcompress import api

    given = {name: value for name, value in options.items() if value not in (None, ())}
    _rewrite("prune", model, output, as_json, lambda stage: api.prune(model, **given))


@main.command(
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
    )
)
@click.argument("teacher", type=click.Path(path_type=Path))
@click.argument("student")
@flags.output
@click.option("--data", "data", required=True, metavar="DATA", help="Inputs to learn from.")
@click.option("--unlabelled", metavar="DATA", help="More inputs, without labels.")
@click.option(
    "--evaluate", metavar="DATA", help="Inputs to compare on; else the last fifth of --data."
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="TOML with a table [train] of the options below and passes to run on the student.",
)
@click.option("--epochs", type=int, help="Times through the data.  [default: 30]")
@click.option("--batch-size", type=int, help="Samples a step.  [default: 64]")
@click.option("--lr", type=float, help="Learning rate.  [default: 0.001]")
@click.option("--temperature", type=float, help="Softens the teacher's answers.  [default: 2]")
@click.option("--keep-zeros", is_flag=True, default=None, help="Zeros of a pruned STUDENT stay.")
@click.option("--seed", type=int, help="Of all draws.  [default: 0]")
@click.option(
    "--quantize",
    type=click.Choice(["static", "dynamic", "weights", "float16"]),
    help="Quantize the student afterwards, with compensation.",
)
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Folder to keep the teacher's answers in."
)
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


@main.command(
    epilog=flags.epilog(
        flags.examples(
            "validate model.onnx small.onnx --data inputs.npz --gate 'top1_agreement >= 0.98'"
        ),
        flags.DATA,
        flags.GATES,
        flags.IMAGES,
    )
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


@main.command(epilog=flags.epilog(flags.examples("bench model.onnx small.onnx --seconds 5")))
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


@main.command(epilog=flags.epilog(flags.examples("inspect model.onnx")))
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


def _rewrite(
    verb: str,
    source: Path,
    output: Path,
    as_json: bool,
    work: Callable[[Callable[[str], Progress]], Outcome],
    notes: tuple[str, ...] = (),
) -> None:
    """Run a verb that rewrites without comparing, save, and tell what was done."""
    from onnxcompress.model_io import check_writable, save
    from onnxcompress.report import ModelFile, Report

    check_writable(output)
    with stages(as_json) as stage:
        outcome = work(stage)
    original = ModelFile.of(source)
    save(outcome.model, output)
    result = ModelFile.of(output)
    report = Report(verb=verb, source=original, result=result, passes=outcome.records, notes=notes)
    tell(report, None, as_json)


_BELONGS: Final = {
    "calibrate": ("static", "float16", "bfloat16", "float8"),
    **dict.fromkeys(("statistics", "method", "percentile"), ("static", "float8")),
    "activations": ("static",),
    "per_channel": ("static", "dynamic", "float8"),
    "bits": ("weights",),
    "block_size": ("weights",),
}


def _refuse_others(scheme: str, given: dict[str, Any]) -> None:
    """See that every option that was given belongs to the scheme.

    Raises:
        InputError: naming the first that does not.
    """
    for name, schemes in _BELONGS.items():
        if given.get(name) is not None and scheme not in schemes:
            flag, owners = name.replace("_", "-"), " or ".join(schemes)
            raise InputError(f"--{flag} belongs to the {owners} scheme: leave it out")
