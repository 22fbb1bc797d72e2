"""Markdown tables, and verdicts on goals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A bound on a figure, and what was measured; None where nothing could be."""

    what: str
    figure: float | None
    bound: float
    at_most: bool = True
    unit: str = ""

    @property
    def met(self) -> bool:
        if self.figure is None:
            return False
        return self.figure <= self.bound if self.at_most else self.figure >= self.bound

    def row(self) -> list[str]:
        sign = "≤" if self.at_most else "≥"
        verdict = "pass" if self.met else "**fail**"
        if self.figure is None:
            verdict = "not measured"
        bound = f"{sign} {number(self.bound, self.unit)}"
        return [self.what, number(self.figure, self.unit), bound, verdict]


def goals(found: Sequence[Goal]) -> Iterator[str]:
    """A table of goals; nothing where there are none."""
    if found:
        yield from table(("goal", "measured", "bound", ""), (goal.row() for goal in found))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table, each as soon as its row is there; an empty line ends it."""
    yield _line(header)
    yield _line(["---", *["---:"] * (len(header) - 1)])
    for row in rows:
        yield _line(row)
    yield ""


def number(value: float | None, unit: str = "") -> str:
    """Three digits that matter, or a dash."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}{' ' if unit else ''}{unit}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
