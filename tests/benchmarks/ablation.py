"""Each method left out alone: what the default loses without it, and on how many models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onnxcompress.errors import InputError
from tests.benchmarks.cases import Case, Setting, all_cases
from tests.benchmarks.methods import COMPENSATION, DEFAULT, Fidelity, Pipelines, placing, without
from tests.benchmarks.table import table

_LEAST = 0.2
"""dB from which on a difference counts: other samples differ by less."""
_METHODS = {
    "(the default)": DEFAULT,
    "a scale for each output channel": placing({"per_channel": False}),
    "thresholds by least error": placing({"method": "minmax"}),
    **{name: without({name}) for name in (*COMPENSATION, "shield_floats", "quantize_dynamic")},
}
"""The passes that are left by what they do without; the first do without nothing."""


@dataclass(frozen=True, slots=True)
class Column:
    """SQNR of a model by the method that was left out, in dB; None where it could not be made."""

    name: str
    sqnr: Sequence[float | None]

    def gain(self, method: int) -> float:
        """dB that a method is worth: with it over without it; 0 where nobody can tell."""
        with_it, without_it = self.sqnr[0], self.sqnr[method]
        if with_it is None or without_it is None or with_it == without_it:
            return 0.0
        return with_it - without_it

    def cell(self, method: int) -> str:
        """SQNR without the method and, in brackets, what the method is worth."""
        found = self.sqnr[method]
        if found is None:
            return "fails"
        return f"{found:.1f} ({self.gain(method):+.1f})" if method else f"{found:.1f}"


def tables(setting: Setting) -> Iterator[str]:
    """SQNR in dB on held-out samples, a row a method, a column a model."""
    cases = (case for case in all_cases(setting) if case.origin != "onnx")
    columns = [_column(case) for case in cases]
    header = ("without", *(column.name for column in columns), "helps", "hurts")
    yield "SQNR of the worst output in dB without a method and, in brackets, what it is worth."
    yield ""
    yield from table(header, (row(i, title, columns) for i, title in enumerate(_METHODS)))


def _column(case: Case) -> Column:
    pipelines, fidelity = Pipelines(case), Fidelity(case.model, case.held_out_feeds())
    found: list[float | None] = []
    for passes in _METHODS.values():
        try:
            found.append(fidelity.sqnr(pipelines.run(passes).model))
        except InputError:
            found.append(None)
    return Column(case.name, found)


def row(method: int, title: str, columns: Sequence[Column]) -> list[str]:
    """The cells of a method; the last two say on how many models it helps and hurts."""
    gains = [column.gain(method) for column in columns]
    helps = sum(gain >= _LEAST for gain in gains)
    hurts = sum(gain <= -_LEAST for gain in gains)
    counts = [str(helps), str(hurts)] if method else ["", ""]
    return [title, *(column.cell(method) for column in columns), *counts]
