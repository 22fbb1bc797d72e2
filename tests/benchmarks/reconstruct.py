"""What reconstruction adds to rounding to nearest and by second order, and what time it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from onnxcompress.api import Quantization, quantize
from onnxcompress.errors import InputError
from onnxcompress.model_io import save
from onnxcompress.schemes import Effort
from tests.benchmarks.cases import Case, Setting, all_cases
from tests.benchmarks.methods import Fidelity
from tests.benchmarks.table import number, table

_HEADER = ("model", "weights", "effort", "score", "agrees with float", "SQNR dB", "seconds")
_FORMS: tuple[tuple[str, Quantization, dict[str, Any], tuple[Effort, ...]], ...] = (
    ("8 bits, static", "static", {}, ("fast", "thorough", "best")),
    ("4 bits, blocks of 32", "weights", {}, ("fast", "best")),
    ("4 bits, a channel", "weights", {"block_size": 0, "target": "qnn"}, ("fast", "best")),
)


def tables(setting: Setting) -> Iterator[str]:
    """A row for each effort; second order belongs to static quantization."""
    rows = (row for case in all_cases(setting) for row in _rows(case, setting))
    yield from table(_HEADER, rows)


def _rows(case: Case, setting: Setting) -> Iterator[list[str]]:
    fidelity = Fidelity(case.model, case.held_out_feeds())
    path = setting.folder / "reconstructed.onnx"
    for title, scheme, options, efforts in _FORMS:
        for effort in efforts:
            begin = time.perf_counter()
            data = case.calibration if scheme == "static" or effort == "best" else None
            try:
                found = quantize(case.model, data, scheme=scheme, effort=effort, **options).model
            except InputError as error:
                yield [case.name, title, effort, "", "", f"**fail**: {error}", ""]
                continue
            seconds = time.perf_counter() - begin
            save(found, path)
            score = case.score(path)
            yield [
                *(case.name, title, effort, number(score.value), number(score.agreement)),
                *(number(fidelity.sqnr(found)), number(seconds)),
            ]
