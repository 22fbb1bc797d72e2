"""What `quantize --effort thorough` costs beside plain inference on the samples that it reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import median

from tests.benchmarks import job
from tests.benchmarks.cases import Case, Setting, all_cases
from tests.benchmarks.cost import plain
from tests.benchmarks.table import number, table
from tests.benchmarks.tools import verb

_HEADER = (
    *("model", "samples", "plain inference s", "budget s", "job s", "÷ budget"),
    *("job's processor s", "peak MB", "within budget"),
)
_FACTOR, _SPARE = 3.0, 5.0
"""The budget of load to saved: three times the plain inference, and five seconds."""
_SAMPLES = 128


def tables(setting: Setting) -> Iterator[str]:
    """One table, a row a case: inference and job were measured in turns."""
    samples = setting.samples if setting.quick else _SAMPLES
    cases = all_cases(replace(setting, samples=samples))
    yield from table(_HEADER, (_row(case, setting, samples) for case in cases))


def _row(case: Case, setting: Setting, samples: int) -> list[str]:
    output = str(setting.folder / "thorough.onnx")
    command = [*verb("quantize"), str(case.model), "-o", output, "--effort", "thorough"]
    command += ["--calibrate", str(case.calibration), "--samples", str(samples)]
    inference = plain(case)
    inference()  # the first touches pages that the others find
    turns = [(inference(), job.run(command)) for _ in range(setting.rounds)]
    if failed := [done.failure for _, done in turns if done.failure]:
        return [case.name, str(samples), *([""] * 6), f"**fail**: {failed[0]}"]
    alone = median(seconds for seconds, _ in turns)
    budget = _FACTOR * alone + _SPARE
    seconds = median(done.seconds for _, done in turns)
    return [
        *(case.name, str(samples), number(alone), number(budget), number(seconds)),
        f"{seconds / budget:.2f}",
        number(median(done.cpu for _, done in turns)),
        number(max(done.peak for _, done in turns)),
        "pass" if seconds <= budget else "**fail**",
    ]
