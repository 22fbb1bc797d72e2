"""What a report says to people, in words and rows, for every way of showing it.

Names in it come from models and are not trusted: `clean` takes out what could drive a terminal.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from onnxcompress.contract import Figure, Skip
from onnxcompress.numerics.decisions import Metric
from onnxcompress.report import Report
from onnxcompress.validation import OutputFigures

_SAME = 0.005
"""Relative difference below which two amounts are called the same."""
_MEMORY_NOISE = 0.05
"""What the peak memory of two runs of one model differs by, relatively."""
_POINT = 0.01
_EXAMPLES = 3


class Verdict(StrEnum):
    """How a row reads at a glance."""

    BETTER = "better"
    WORSE = "worse"
    NEUTRAL = "neutral"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of "what you got"."""

    label: str
    before: str = ""
    after: str
    change: str = ""
    verdict: Verdict = Verdict.NEUTRAL
    ratio: float | None = None
    """After over before, where both are amounts of one kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipGroup:
    """Sites that one pass declined for one reason."""

    pass_name: str
    reason: str
    count: int
    ops: str
    """Operators by number: `3 Conv, 1 Gemm`."""
    examples: str
    """The first few nodes."""


def headline(report: Report) -> str:
    """The result in one sentence."""
    if report.result is None:
        return f"Nothing better than {clean(report.source.name)} came of it."
    parts = [row.change for row in cost_rows(report)]
    shares = [o.agreement for o in _compared(report) if o.agreement is not None]
    parts += [f"{percent(min(shares))} of decisions the same"] if shares else []
    said = ", ".join(parts)
    if not all(gate.passed for gate in report.gates):
        missed = "a gate was not met"
        said += f"; not written, {missed}" if report.verb == "compress" else f"; {missed}"
    if report.validation and report.validation.failures:
        said += "; unusable, see the failures"
    return f"{clean(report.result.name)}: {said}"


def cost_rows(report: Report) -> list[Row]:
    """Size, latency and memory, as far as they were measured."""
    found: list[Row] = []
    source, result, measured = report.source, report.result, report.measured
    if result and source.size:
        words = ("smaller", "larger", "same size")
        found.append(_cost("size", size(source.size), size(result.size),
                           result.size / source.size, words))  # fmt: skip
    if latency := measured.latency:
        words = ("faster", "slower", "same speed")
        sure = not latency.low <= 1 <= latency.high
        before = latency.original_ms  # times drift from turn to turn, the ratio within one does not
        found.append(_cost("latency", milliseconds(before), milliseconds(before * latency.ratio),
                           latency.ratio, words, sure=sure))  # fmt: skip
    if measured.source and measured.result and measured.source.peak_memory > 0:
        before, after = measured.source.peak_memory, measured.result.peak_memory
        words = ("less memory", "more memory", "same memory")
        ratio = after / before
        found.append(_cost("peak memory", size(before), size(after), ratio, words,
                           sure=abs(ratio - 1) > _MEMORY_NOISE))  # fmt: skip
    return found


def quality_rows(report: Report) -> list[Row]:
    """Score, agreement and SQNR of every output that was compared."""
    outputs = _compared(report)
    return [
        row
        for output in outputs
        for row in _quality(output, f" of {clean(output.name)}" if len(outputs) > 1 else "")
    ]


def arithmetic_rows(report: Report) -> list[Row]:
    """How much runs on integers, where anything is multiplied at all."""
    if report.audit is None or not report.audit.macs:
        return []
    promised = report.audit.promised
    by = f", by the table of {promised}: not measured" if promised else ""
    share, label = report.audit.share, "arithmetic in integers"
    if report.audit.float8_macs:
        share, label = report.audit.float8_macs / report.audit.macs, "arithmetic in float8"
    return [Row(label=label, after=percent(share) + by)]


def unfused(report: Report) -> str:
    """The operators whose pairs only cost, in one line; empty where there are none."""
    if report.audit is None or not report.audit.unfused:
        return ""
    group = _skip_group("", "", [*report.audit.unfused])
    return f"pairs that did not fuse: {group.ops} ({group.examples})"


def skip_groups(report: Report) -> list[SkipGroup]:
    """What was declined, by pass and reason, most frequent first."""
    groups: defaultdict[tuple[str, str], dict[Skip, None]] = defaultdict(dict)
    for record in report.passes:  # a pass that runs twice declines the same sites twice
        for skip in record.skips:
            groups[record.name, skip.reason][skip] = None
    found = [_skip_group(name, reason, [*skips]) for (name, reason), skips in groups.items()]
    return sorted(found, key=lambda group: -group.count)


def passes_done(report: Report) -> list[tuple[str, str, int]]:
    """Each pass that did or declined something: its name, what in words, sites declined.

    Those that found nothing to do are counted in one last line.
    """
    busy = [record for record in report.passes if record.modified or record.skips]
    rows = [(r.name, _figures(r.figures.items(), r.modified), len(r.skips)) for r in busy]
    if idle := len(report.passes) - len(busy):
        rows.append((f"{idle} {'others' if busy else 'passes'}", "found nothing to do", 0))
    return rows


def figure_tables(report: Report) -> list[tuple[str, str, Mapping[str, float]]]:
    """What passes report of each tensor: the pass, what it is, and the figures by name."""
    return [
        (record.name, name, value)
        for record in report.passes
        for name, value in record.figures.items()
        if isinstance(value, Mapping) and value
    ]


def kernel_parts(report: Report, most: int) -> list[tuple[str, str, str, str, str]]:
    """Kernels by sensitivity, worst first: name, operator, shares of noise and arithmetic, fate."""
    kernels = report.mixed.kernels if report.mixed else ()
    macs = sum(kernel.macs for kernel in kernels) or 1
    return [
        (
            clean(kernel.node),
            clean(kernel.op),
            f"{100 * kernel.noise:.3g} %",
            f"{100 * kernel.macs / macs:.3g} %",
            "float, weight in int8" if kernel.packed else "float" if kernel.floats else "integers",
        )
        for kernel in kernels[:most]
    ]


def kernel_fate(report: Report) -> str:
    """What the last column of `kernel_parts` says: of the result, or of a candidate."""
    return "now in" if report.mixed and report.mixed.kept else "would be in"


def shorten(text: str, width: int) -> str:
    """`text` in `width` characters, cut in the middle: both ends of a tensor's name tell most."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[-end:]}"


def clean(text: str) -> str:
    """`text` with every unprintable character (such as ESC) replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def size(count: int) -> str:
    """Bytes in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.{2 if count < 10 * scale else 1}f} {unit}"
    return f"{count} B"


def milliseconds(value: float) -> str:
    """A time as people read it."""
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def percent(share: float) -> str:
    """A share of one, never rounded up to the whole."""
    return "100 %" if share == 1 else f"{100 * min(share, 0.999):.1f} %"


def decibels(value: float) -> str:
    """An SQNR; an infinite one is no error at all."""
    return "exact" if value == math.inf else f"{value:.1f} dB"


def _compared(report: Report) -> list[OutputFigures]:
    outputs = report.validation.outputs if report.validation else ()
    return [output for output in outputs if not output.skipped]


def _cost(
    label: str,
    before: str,
    after: str,
    ratio: float,
    words: tuple[str, str, str],
    *,
    sure: bool = True,
) -> Row:
    less, more, same = words
    change, verdict = same, Verdict.NEUTRAL
    if sure and abs(ratio - 1) >= _SAME:
        better = ratio < 1
        times = 1 / max(ratio, 1e-9) if better else ratio
        change = f"{times:.2f}x {less if better else more}"
        verdict = Verdict.BETTER if better else Verdict.WORSE
    return Row(label=label, before=before, after=after, change=change, verdict=verdict, ratio=ratio)


def _quality(output: OutputFigures, of: str) -> list[Row]:
    found: list[Row] = []
    if score := output.score:
        found.append(_accuracy(output, of) if score.metric is Metric.ACCURACY else
                     Row(label=f"RMSE{of}", before=f"{score.original:.4g}",
                         after=f"{score.candidate:.4g}"))  # fmt: skip
    if output.agreement is not None:
        found.append(Row(label=f"same decisions{of}", after=percent(output.agreement)))
    if output.sqnr is not None:
        broken = Verdict.WORSE if output.broken else Verdict.NEUTRAL
        found.append(Row(label=f"SQNR{of}", after=decibels(output.sqnr), verdict=broken))
    return found


def _accuracy(output: OutputFigures, of: str) -> Row:
    assert output.score
    before, after = output.score.original, output.score.candidate
    gain = after - before
    verdict = Verdict.WORSE if gain < -_POINT else Verdict.BETTER if gain > 0 else Verdict.NEUTRAL
    return Row(
        label=f"accuracy{of}",
        before=f"{100 * before:.2f} %",
        after=f"{100 * after:.2f} %",
        change=f"{100 * gain:+.2f} points" if gain else "the same",
        verdict=verdict,
    )


def _skip_group(pass_name: str, reason: str, skips: list[Skip]) -> SkipGroup:
    ops = Counter(skip.op for skip in skips)
    nodes = [clean(skip.node) for skip in skips[:_EXAMPLES]]
    return SkipGroup(
        pass_name=pass_name,
        reason=clean(reason),
        count=len(skips),
        ops=", ".join(f"{count} {clean(op)}" for op, count in ops.most_common()),
        examples=", ".join(nodes) + (", …" if len(skips) > _EXAMPLES else ""),
    )


def _figures(figures: Iterable[tuple[str, Figure]], modified: bool) -> str:
    said = ", ".join(f"{name.replace('_', ' ')} {_figure(v)}" for name, v in figures if v)
    return clean(said) or ("changed the graph" if modified else "declined all of them")


def _figure(value: Figure) -> str:
    if isinstance(value, Mapping):  # of many tensors, the one that has most
        name, most = max(value.items(), key=lambda item: item[1])
        return f"{most:.4g} at most ({name})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
