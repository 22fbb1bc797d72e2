"""Verbs that rewrite a model without comparing, and what observes it for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from onnxcompress.cli import flags
from onnxcompress.cli.console import Verb, emit, stages, tell
from onnxcompress.errors import InputError

if TYPE_CHECKING:
    from onnxcompress.api import Quantization
    from onnxcompress.data import Data, Images
    from onnxcompress.observe import Progress
    from onnxcompress.pipeline import Outcome
    from onnxcompress.schemes import Effort


@click.command(cls=Verb, epilog=flags.epilog(flags.examples("optimize model.onnx -o exact.onnx")))
@flags.model
@flags.output
@flags.as_json
def optimize(model: Path, output: Path, as_json: bool) -> None:
    """Fold and simplify MODEL exactly.

    Folds batchnorm, constants and scales, removes identities and what nothing reads.
    """
    from onnxcompress import api

    _rewrite("optimize", model, output, as_json, lambda stage: api.optimize(model))


@click.command(
    cls=Verb,
    epilog=flags.epilog(
        flags.examples(
            "quantize model.onnx -o int8.onnx --calibrate inputs.npz --method entropy",
            "quantize model.onnx -o int8.onnx --statistics a.npz --statistics b.npz",
            "quantize model.onnx -o int8.onnx --scheme dynamic --exclude 'head/*'",
        ),
        flags.DATA,
        flags.IMAGES,
    ),
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
    asked = {**given, "calibrate": calibrate, "statistics": statistics or None}
    if effort == "best" and scheme == "weights":
        del asked["calibrate"]  # codes are chosen by data
    _refuse_others(scheme, asked)
    pixels = flags.read_images(images)
    data, notes = _cleaned(calibrate, model, pixels) if clean and calibrate else (calibrate, ())
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
        notes=notes,
    )


@click.command(
    cls=Verb,
    epilog=flags.epilog(
        flags.examples("calibrate model.onnx -o statistics.npz --data inputs.npz"),
        flags.DATA,
        flags.IMAGES,
    ),
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
    chosen, notes = _cleaned(data, model, pixels) if clean else (data, ())
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


@click.command(
    cls=Verb,
    epilog=flags.epilog(
        flags.examples(
            "prune model.onnx -o sparse.onnx --sparsity 0.5 --exclude Gather",
            "prune model.onnx -o sparse.onnx --sparsity 0.8 --calibrate inputs.npz",
        ),
        flags.DATA,
        flags.IMAGES,
    ),
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
@click.option(
    "--calibrate",
    metavar="DATA",
    help="Inputs over which layers then get back the means and variances of their outputs.",
)
@flags.samples
@flags.images
@flags.as_json
def prune(
    model: Path,
    output: Path,
    calibrate: str | None,
    samples: int,
    images: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Set the least of the weights of MODEL to zero.

    Applies the exact rewrites first.
    """
    from onnxcompress import api

    given = {name: value for name, value in options.items() if value not in (None, ())}
    given |= {"calibrate": calibrate, "samples": samples, "images": flags.read_images(images)}
    _rewrite(
        *("prune", model, output, as_json),
        lambda stage: api.prune(model, progress=stage("renormalizing"), **given),
    )


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


def _cleaned(source: str, model: Path, images: Images | None) -> tuple[Data, tuple[str, ...]]:
    """The data without what `--clean` leaves out, and what is to be said of that."""
    from onnxcompress import api

    data = api.cleaned(source, model, images)
    return data, data.notes


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
