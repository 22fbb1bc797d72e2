"""The main job: try what may help, measure each variant, keep the best, and never a worse one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxcompress import schemes
from onnxcompress.api import SAMPLES
from onnxcompress.attempts import Job, Scheme
from onnxcompress.budget import Budget
from onnxcompress.data import Images
from onnxcompress.errors import GateError, InputError
from onnxcompress.gates import Gate
from onnxcompress.model_io import check_writable, save
from onnxcompress.recipe import Recipe
from onnxcompress.report import ModelFile, Report
from onnxcompress.variants import Stage, silent


def compress(
    source: str | Path,
    output: str | Path,
    *,
    calibrate: Any = None,
    evaluate: Any = None,
    recipe: Recipe | None = None,
    target: str = "cpu",
    scheme: Scheme = "auto",
    bits: int | None = None,
    block_size: int | None = None,
    effort: schemes.Effort = "thorough",
    gates: Sequence[Gate] = (),
    max_drop: float | None = None,
    min_sqnr: float | None = None,
    images: Images | None = None,
    clean: bool = False,
    samples: int = SAMPLES,
    threads: int = 1,
    stage: Stage | None = None,
) -> Report:
    """Compress the model at `source` and write the best variant that passes the gates to `output`.

    Tries static and dynamic quantization and the exact rewrites alone; or the recipe or scheme
    that was asked for, and the exact rewrites where it fails. Where static quantization loses more
    than the gates allow, activations take 16 bits if the target has kernels for them, and then
    layers go back to float until it holds (`mixed.mix`). Each variant is saved, run beside the
    original on held-out data, and timed in turns with it. Of those that pass all gates the one
    with the least product of latency and size is kept; among equals, the most faithful; with no
    gate or budget given, one that is far more faithful for little more (`worth`), for which the
    few layers that make nearly all of the error are tried in float. Where none passes the default
    gates, the model is written as it came. For a target that this machine does
    not run nothing is timed, and latency decides nothing.

    Args:
        calibrate: data that static quantization observes; without it only dynamic is tried.
        evaluate: data to compare on; the last fifth of `calibrate` is held out when None, and
            made-up inputs are used where there is no data at all.
        recipe: passes to run in place of the schemes, with its own gates and target.
        effort: what static quantization does against its error, see `schemes.static`; best also
            reconstructs layers on the data, with weights alone too.
        scheme: try only this one; "weights" leaves the arithmetic in float, "float16" and
            "bfloat16" too where the target has no kernels for them, "float8" is for targets that
            have, "none" applies the exact rewrites alone.
        bits: of a weight, 4 or 8, with the scheme "weights".
        block_size: values that share a scale, with the scheme "weights".
        gates: bounds that the result must hold; `Budget.default_gates` when empty.
        max_drop: accuracy that may be lost or, without labels, share of decisions that may differ.
        min_sqnr: signal to noise that each output must keep, in dB. A budget takes the place of
            the default gates on quality, and joins gates that were given.
        images: how an image becomes the input; needed for a folder of images.
        clean: leave feeds that are not finite out, and of `calibrate` those that are far out too;
            the notes say which.
        samples: feeds that calibration reads at most.
        threads: threads of one operator while latency is measured.
        stage: told of each stage.

    Raises:
        InputError: if the model, the data or the output cannot be used.
        GateError: if no variant passes the gates that were asked for; nothing was written.
            `GateError.report` has the figures of the first variant.
    """
    check_writable(output)
    blocks = {"bits": bits, "block_size": block_size}
    blocks = {name: value for name, value in blocks.items() if value is not None}
    if blocks and scheme != "weights":
        raise InputError(f"{next(iter(blocks))} belongs to the weights scheme: leave it out")
    if recipe is not None and (recipe.training is not None or recipe.tuning is not None):
        raise InputError("the recipe's tables [train] and [tune] are for distill: leave them out "
                         "to compress")  # fmt: skip
    job = Job(
        source=Path(source),
        target=recipe.target if recipe else target,
        gates=(*(recipe.gates if recipe else ()), *gates),
        budget=Budget(max_drop=max_drop, min_sqnr=min_sqnr),
        samples=samples,
        threads=threads,
        stage=stage or silent,
        best_effort=effort == "best",
    )
    with job.timed("load"):
        job.open(calibrate, evaluate, images, clean)
    asked = recipe is not None or scheme != "auto"
    for name, passes in job.plans(recipe, scheme, effort, blocks):
        if asked and job.passing():
            break
        variant = job.attempt(name, passes)
        job.check_budget()
        if variant is not None:
            job.mend(variant, effort)
    if recipe is None:
        job.refine()
    best = job.best()
    report = job.report(best)
    if best.refusal and not job.by_default:
        raise GateError(
            f"{source}: no variant passes the gates, nothing was written: {best.refusal}; "
            "loosen the gate or try another recipe",
            report,
        )
    if best.refusal:
        report = job.report(None)
    with job.timed("save"):
        save(job.model if best.refusal else best.outcome.model, output)
    measured = replace(report.measured, seconds=dict(job.seconds))
    return replace(report, result=ModelFile.of(Path(output)), measured=measured)
