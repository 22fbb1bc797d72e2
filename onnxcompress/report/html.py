"""Shows a report as one self-contained HTML page: no script, nothing loaded from anywhere.

Text is escaped by the template; this module works out the charts' geometry.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnxcompress.errors import InputError
from onnxcompress.report import Report
from onnxcompress.report import summary as say
from onnxcompress.report.trade_off import trade_off
from onnxcompress.report.training import curves
from onnxcompress.validation.layers import Layer

_WORST_LAYERS = 10
_MOST_PARTS = 40
_MOST_BARS = 400
_LOWEST_TOP, _HIGHEST_TOP, _STEP = 30, 80, 10
"""dB: the chart's upper end lies between the first two, in whole steps."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One layer of the chart, in percent of its width and height."""

    x: float
    width: float
    height: float
    kind: str
    """`exact`, `worst` (among the layers that added most noise) or `plain`."""
    title: str


@dataclass(frozen=True, slots=True)
class Chart:
    """SQNR of every tensor in graph order."""

    top: int
    """dB at the upper end."""
    ticks: tuple[int, ...]
    bars: tuple[Bar, ...]


def render(report: Report) -> str:
    """The page.

    Raises:
        InputError: if jinja2 is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise InputError(
            "an HTML report needs jinja2: pip install 'onnxcompress[report]'"
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("onnxcompress.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("template.html.j2")
    validation = report.validation
    return template.render(
        report=report,
        say=say,
        costs=say.cost_rows(report),
        arithmetic=say.arithmetic_rows(report),
        quality=say.quality_rows(report),
        unfused=say.unfused(report),
        chart=layer_chart(validation.layers) if validation and validation.layers else None,
        worst=validation.worst_layers(_WORST_LAYERS) if validation else [],
        plot=trade_off(report.mixed) if report.mixed else None,
        courses=curves(report.training) if report.training else [],
        parts=say.kernel_parts(report, _MOST_PARTS),
        skips=say.skip_groups(report),
        passes=say.passes_done(report),
        tables=say.figure_tables(report),
    )


def layer_chart(layers: Sequence[Layer]) -> Chart:
    """Bars of the layers' SQNR; what is above the upper end is cut there.

    Of very many layers each bar shows the worst of a few neighbours.
    """
    finite = [layer.sqnr for layer in layers if math.isfinite(layer.sqnr)]
    highest = _STEP * math.ceil(max(finite, default=0.0) / _STEP)
    top = min(_HIGHEST_TOP, max(_LOWEST_TOP, highest))
    noisy = heapq.nlargest(_WORST_LAYERS, layers, key=lambda layer: layer.added)
    worst = {layer.tensor for layer in noisy if layer.added > 0}
    step = math.ceil(len(layers) / _MOST_BARS)
    groups = [layers[i : i + step] for i in range(0, len(layers), step)]
    bars = (_bar(group, i / len(groups), 1 / len(groups), top, worst)
            for i, group in enumerate(groups))  # fmt: skip
    ticks = tuple(range(0, top + 1, _STEP if top <= 50 else 2 * _STEP))
    return Chart(top, ticks, tuple(bars))


def _bar(group: Sequence[Layer], start: float, width: float, top: int, worst: set[str]) -> Bar:
    layer = next((x for x in group if x.tensor in worst), min(group, key=lambda x: x.sqnr))
    title = f"{say.clean(layer.tensor)} ({say.clean(layer.op)}): {say.decibels(layer.sqnr)}"
    if layer.added > 0:
        title += f", adds {100 * layer.added:.3g} % noise"
    kind = "exact" if layer.sqnr == math.inf else "plain"
    return Bar(
        x=round(100 * (start + 0.08 * width), 4),
        width=round(84 * width, 4),
        height=round(max(1.0, 100 * min(layer.sqnr / top, 1.0)), 3),
        kind="worst" if layer.tensor in worst else kind,
        title=title,
    )
