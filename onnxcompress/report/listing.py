"""Shows in a terminal what the verbs without a report found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxcompress.inspection import Inspection
from onnxcompress.measure import Measurement
from onnxcompress.observe.observations import Observations
from onnxcompress.outlook import Outlook, Runs
from onnxcompress.report.summary import clean, percent, shorten
from onnxcompress.report.summary import size as format_size

_MOST_OPERATORS = 12
_FATES = {
    Runs.INTEGERS: "integers",
    Runs.MOVED: "integers, moved",
    Runs.ABSORBED: "the kernel before",
    Runs.WEIGHTS: "integer weights",
    Runs.FLOAT: "float",
}


def show_bench(models: Sequence[Measurement], console: Console) -> None:
    """Print a line a model; ratios are against the first, timed in turns with it."""
    table = Table(box=None, header_style="dim")
    table.add_column("model", overflow="fold")
    for column in ("size", "p50 ms", "p90 ms", "peak memory", "against the first"):
        table.add_column(column, justify="right")
    for model in models:
        pair = model.against_first
        ratio = "" if pair is None else f"{pair.ratio:.3f} ({pair.low:.3f} to {pair.high:.3f})"
        figures = (format_size(model.size), f"{model.p50_ms:.3f}", f"{model.p90_ms:.3f}")
        row = (clean(Path(model.path).name), *figures, format_size(model.peak_memory), ratio)
        table.add_row(*map(Text, row))
    console.print(table)


def show_inspection(found: Inspection, console: Console) -> None:
    """Print what is in the model and what would run on integers."""
    opsets = ", ".join(f"{clean(domain) or 'onnx'} {v}" for domain, v in found.opsets.items())
    console.print(Text(clean(found.name), style="bold"))
    facts = {
        "size": format_size(found.size),
        "made for": f"IR version {found.ir_version}, opset {opsets}",
        "parameters": f"{found.parameters:,}",
        "stored as": _joined({k: format_size(v) for k, v in found.dtypes.items()}),
        "inputs": "; ".join(f"{clean(p.name)}: {p.describe()}" for p in found.inputs),
        "outputs": "; ".join(clean(o) for o in found.outputs),
        "operators": _joined(found.operators),
        "nodes folded": f"{found.folded} by the exact rewrites",
        f"integers on {found.target}": _joined(found.integer) or "nothing",
        "of the arithmetic": "unknown: the graph does not state all shapes"
        if found.integer_share is None
        else f"{percent(found.integer_share)}, with named dimensions as 1",
    }
    table = Table(box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        table.add_row(Text(name), Text(fact))
    console.print(table)
    console.print(_by_operator(found))


def _by_operator(found: Inspection) -> Table:
    """A line an operator and fate: how many nodes, their part of the arithmetic, and why."""
    table = Table(box=None, header_style="dim")
    for column in ("operator", "runs on", "nodes", "MACs"):
        table.add_column(column, justify="left" if column in ("operator", "runs on") else "right")
    table.add_column("why not on integers", overflow="fold")
    groups: dict[tuple[str, str, str], list[Outlook]] = defaultdict(list)
    for node in found.nodes:
        groups[node.op, _FATES[node.runs], node.reason].append(node)
    total = sum(node.macs or 0 for node in found.nodes)
    ranked = sorted(groups.items(), key=lambda item: -sum(n.macs or 0 for n in item[1]))
    for (op, fate, reason), nodes in ranked:
        share = "?" if any(n.macs is None for n in nodes) else _share(nodes, total)
        example = f" (such as {shorten(clean(nodes[0].node), 32)!r})" if reason else ""
        row = (clean(op), fate, str(len(nodes)), share, clean(reason) + example)
        table.add_row(*map(Text, row))
    return table


def _share(nodes: Sequence[Outlook], total: int) -> str:
    macs = sum(n.macs or 0 for n in nodes)
    return percent(macs / total) if macs else ""


def show_observations(
    name: str, found: Observations, notes: Sequence[str], console: Console
) -> None:
    """Print what was done to the data, how much was observed, and what could not be."""
    for note in notes:
        console.print(Text(clean(note)))
    console.print(Text(f"{clean(name)}: statistics of {len(found.kept)} values"))
    for want, reason in found.reasons.items():
        console.print(Text(f"not observed: {clean(want.value)}, {clean(reason)}"))


def _joined(counts: Mapping[str, int | str]) -> str:
    items = [f"{clean(name)} {count}" for name, count in counts.items()]
    more = len(items) - _MOST_OPERATORS
    shown = items[: _MOST_OPERATORS + (more == 1)]
    return ", ".join(shown) + (f", and {more} kinds more" if more > 1 else "")
