"""Shows a report as one self-contained HTML page: no script, nothing loaded from anywhere.

Text is escaped by the template; this module works out the charts' geometry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnxcompress.errors import InputError
from onnxcompress.layers import Layer
from onnxcompress.report import Report
from onnxcompress.report import summary as say

_WORST_LAYERS = 10
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
        quality=say.quality_rows(report),
        chart=layer_chart(validation.layers) if validation and validation.layers else None,
        worst=validation.worst_layers(_WORST_LAYERS) if validation else [],
        skips=say.skip_groups(report),
        passes=say.passes_done(report),
    )


def layer_chart(layers: Sequence[Layer]) -> Chart:
    """Bars of the layers' SQNR; what is above the upper end is cut there."""
    finite = [layer.sqnr for layer in layers if math.isfinite(layer.sqnr)]
    highest = _STEP * math.ceil(max(finite, default=0.0) / _STEP)
    top = min(_HIGHEST_TOP, max(_LOWEST_TOP, highest))
    ranked = sorted(range(len(layers)), key=lambda i: -layers[i].added)[:_WORST_LAYERS]
    worst = {i for i in ranked if layers[i].added > 0}
    width = 100 / len(layers)
    bars = (_bar(layer, i, width, top, i in worst) for i, layer in enumerate(layers))
    ticks = tuple(range(0, top + 1, _STEP if top <= 50 else 2 * _STEP))
    return Chart(top, ticks, tuple(bars))


def _bar(layer: Layer, index: int, width: float, top: int, worst: bool) -> Bar:
    exact = layer.sqnr == math.inf
    share = min(max(layer.sqnr / top, 0.0), 1.0)
    title = f"{say.clean(layer.tensor)} ({say.clean(layer.op)}): {say.decibels(layer.sqnr)}"
    if layer.added > 0:
        title += f", adds {100 * layer.added:.3g} % noise"
    return Bar(
        x=round(index * width + 0.08 * width, 4),
        width=round(0.84 * width, 4),
        height=round(max(1.0, 100 * share), 3),
        kind="exact" if exact else "worst" if worst else "plain",
        title=title,
    )
