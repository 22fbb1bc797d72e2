"""Shows a report in a terminal: how, then what you got, which stays in sight above the prompt."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxcompress.report import Attempt, GateResult, Report
from onnxcompress.report.summary import (
    Row,
    Verdict,
    arithmetic_rows,
    clean,
    cost_rows,
    decibels,
    headline,
    kernel_fate,
    kernel_parts,
    passes_done,
    percent,
    quality_rows,
    shorten,
    skip_groups,
    unfused,
)

_STYLES = {Verdict.BETTER: "green", Verdict.WORSE: "red", Verdict.NEUTRAL: ""}
_WORST_LAYERS = 5
_WORST_PARTS = 8
_NAME = 27


def show(report: Report, console: Console, *, details: bool = True) -> None:
    """Print `report`.

    Args:
        console: where to; people's text goes to stderr by the house's rule.
        details: also the passes, the outputs, the layers and what was declined.
    """
    if details:
        tables = (_passes, _skips, _outputs, _layers, _parts)
        for table in (make(report) for make in tables):
            if table.row_count:
                console.print(table)
    for note in report.notes:
        console.print(Text(f"note: {clean(note)}", style="dim"))
    if lost := unfused(report):
        console.print(Text(lost, style="yellow"))
    _show_verdicts(report, console)
    console.print(Text(headline(report), style="bold"))
    results = [*cost_rows(report), *arithmetic_rows(report), *quality_rows(report)]
    if results:
        console.print(_results(results))


def _show_verdicts(report: Report, console: Console) -> None:
    for attempt in report.attempts:
        line = f"{clean(attempt.scheme)}: {clean(attempt.because)}"
        console.print(Text(f"{'kept' if attempt.kept else 'not kept'}  {line}", style=_of(attempt)))
    if met := [gate for gate in report.gates if gate.passed]:
        console.print(Text(f"gates met: {', '.join(map(_brief, met))}", style="green"))
    for gate in report.gates:
        if not gate.passed:
            console.print(Text(f"gate NOT MET: {clean(gate.reason)}", style="red"))
    failures = report.validation.failures if report.validation else ()
    for failure in failures:
        console.print(Text(f"failure: {clean(failure)}", style="bold red"))
    told = report.validation.warnings if report.validation else ()
    for warning in (*report.warnings, *told):
        console.print(Text(f"warning: {clean(warning)}", style="yellow"))


def _of(attempt: Attempt) -> str:
    return "" if attempt.kept else "dim"


def _brief(gate: GateResult) -> str:
    return f"{gate.gate.metric} {gate.figure:.3g} ({gate.gate.condition})"


def _results(rows: list[Row]) -> Table:
    table = _table("", "", "before", "after", "change", right=(1, 2))
    for row in rows:
        change = Text(row.change, style=_STYLES[row.verdict])
        table.add_row(Text(row.label), Text(row.before), Text(row.after), change)
    return table


def _outputs(report: Report) -> Table:
    right = (1, 2, 3, 4, 5, 6)
    k = f"top {report.validation.top_k}" if report.validation else ""
    table = _table(
        "outputs", "output", "SQNR", "cosine", "max error", "relative", "agree", k, right=right
    )
    for output in report.validation.outputs if report.validation else ():
        name = Text(clean(output.name))
        if output.skipped or output.sqnr is None:
            table.add_row(name, Text(clean(output.skipped), style="dim"))
            continue
        figures = [decibels(output.sqnr), f"{output.cosine or 0:.6f}"]
        figures += [f"{output.max_error or 0:.3g}", f"{output.max_relative or 0:.3g}"]
        figures += [_share(output.agreement), _share(output.agreement_top_k)]
        table.add_row(name, *map(Text, figures))
    return table


def _layers(report: Report) -> Table:
    table = _table(
        "where the error enters", "tensor", "operator", "SQNR", "before it", "noise added",
        right=(2, 3, 4),
    )  # fmt: skip
    for layer in report.validation.worst_layers(_WORST_LAYERS) if report.validation else ():
        figures = (decibels(layer.sqnr), decibels(layer.upstream), f"{100 * layer.added:.3g} %")
        table.add_row(
            Text(shorten(clean(layer.tensor), _NAME)), Text(clean(layer.op)), *map(Text, figures)
        )
    return table


def _parts(report: Report) -> Table:
    columns = ("kernel", "operator", "of noise", "of arithmetic", kernel_fate(report))
    table = _table("layers by sensitivity", *columns, right=(2, 3))
    for name, *rest in kernel_parts(report, _WORST_PARTS):
        table.add_row(Text(shorten(name, _NAME)), *map(Text, rest))
    return table


def _passes(report: Report) -> Table:
    table = _table("passes", "pass", "what it did", "declined", right=(2,))
    for name, done, declined in passes_done(report):
        table.add_row(Text(name), Text(done), Text(str(declined) if declined else ""))
    return table


def _skips(report: Report) -> Table:
    table = _table("left alone", "pass", "sites", "why")
    for group in skip_groups(report):
        table.add_row(*map(Text, (group.pass_name, group.ops, group.reason)))
    return table


def _table(title: str, *columns: str, right: tuple[int, ...] = ()) -> Table:
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None)
    for i, column in enumerate(columns):
        justify = "right" if i in right else "left"
        table.add_column(column, justify=justify, header_style="dim", overflow="fold")
    return table


def _share(value: float | None) -> str:
    return "" if value is None else percent(value)
