"""Ours beside ONNX Runtime's own quantizer: time, memory, size, score and latency."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from onnxcompress.errors import InputError
from onnxcompress.measure.latency import Latency, paired_latency
from onnxcompress.model_io import size_on_disk
from onnxcompress.session import Session
from tests.benchmarks import job
from tests.benchmarks.cases import Case, Score, Setting, all_cases
from tests.benchmarks.table import Goal, goals, number, table
from tests.benchmarks.tools import BASELINE, TOOLS, Tool

_QUICK = ("ours minmax", BASELINE)
_SLOW = 20.0
"""Seconds from which on a tool is run once only."""
_HEADER = (
    *("tool", "job s", "CPU s", "peak MB", "size MB", "score", "agrees with float"),
    *("latency ms", "÷ float", f"÷ {BASELINE}"),
)
_BEST_KNOWN = {
    "mobilenetv2": 0.757,
    "tinydarknet": 0.637,
    "minilm_stsb": 0.80,
    "magika": 0.96,
    "silero_vad": 0.98,
}
"""What `compress` has to reach: the best that any tool is known to reach on the zoo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one tool made of one case."""

    seconds: float = 0.0
    cpu: float = 0.0
    peak: float = 0.0
    size: float = 0.0
    score: Score | None = None
    float_ratio: Latency | None = None
    """Latency against the float model's."""
    baseline_ratio: Latency | None = None
    failure: str = ""

    @property
    def agreement(self) -> float | None:
        """With the float model."""
        return self.score.agreement if self.score else None


def tables(setting: Setting) -> Iterator[str]:
    """A table of tools and one of goals for every case."""
    for case in all_cases(setting):
        yield f"### {case.name}: float is {_float(case)}"
        yield ""
        rows = _measure(case, setting)
        yield from table(_HEADER, (_cells(tool, row) for tool, row in rows.items()))
        yield from goals(list(_goals(case, rows)))


def _float(case: Case) -> str:
    score = case.score(case.model).value
    size = size_on_disk(case.model) / 1e6
    return f"{number(size)} MB" + ("" if score is None else f", score {score:.4f}")


def _measure(case: Case, setting: Setting) -> Mapping[str, Row]:
    tools = [t for t in TOOLS if not setting.quick or t.name in _QUICK]
    folder = setting.folder / "made" / case.name
    folder.mkdir(parents=True, exist_ok=True)
    paths = {tool: folder / f"{tool.name.replace(' ', '_')}.onnx" for tool in tools}
    jobs: dict[Tool, list[job.Job]] = {tool: [] for tool in tools}
    for _ in range(setting.rounds):
        for tool, done in jobs.items():
            if not done or (done[0].seconds < _SLOW and not done[0].failure):
                done.append(job.run(tool.command(case, paths[tool])))
    baseline = next((paths[t] for t in tools if t.name == BASELINE and _runs(paths[t])), None)
    return {t.name: _row(case, d, paths[t], baseline, setting) for t, d in jobs.items()}


def _row(
    case: Case, done: list[job.Job], output: Path, baseline: Path | None, setting: Setting
) -> Row:
    failure = next((d.failure for d in done if d.failure), "")
    if failure or not _runs(output):
        return Row(failure=failure or "ONNX Runtime refuses the result")
    seconds = 0.5 if setting.quick else 3.0
    feed = next(case.feeds())

    def against(other: Path) -> Latency:
        return paired_latency(other, output, feed, seconds=seconds)

    return Row(
        seconds=median(d.seconds for d in done),
        cpu=median(d.cpu for d in done),
        peak=median(d.peak for d in done),
        size=size_on_disk(output) / 1e6,
        score=case.score(output),
        float_ratio=against(case.model),
        baseline_ratio=against(baseline) if baseline not in (None, output) else None,
    )


def _runs(model: Path) -> bool:
    """Whether the file is there and ONNX Runtime takes it: some of what is written it does not."""
    try:
        Session(model)
    except InputError:
        return False
    return True


def _cells(tool: str, row: Row) -> list[str]:
    if row.failure:
        return [tool, f"fails: {row.failure}", *[""] * (len(_HEADER) - 2)]
    latency = row.float_ratio
    return [
        tool,
        *(number(v) for v in (row.seconds, row.cpu, row.peak, row.size)),
        *(
            "-" if v is None else f"{v:.4f}"
            for v in (_value(row), row.score.agreement if row.score else None)
        ),
        *(number(latency.candidate_ms if latency else None), _ratio(latency)),
        _ratio(row.baseline_ratio),
    ]


def _ratio(latency: Latency | None) -> str:
    if latency is None:
        return "-"
    return f"{latency.ratio:.2f} ({latency.low:.2f} to {latency.high:.2f})"


def _goals(case: Case, rows: Mapping[str, Row]) -> Iterator[Goal]:
    """The goals of the project that can be told from these rows; a tool that fails sets none."""
    ran = {name: row for name, row in rows.items() if not row.failure}
    baseline, percentile = ran.get(BASELINE), ran.get("ORT Percentile")
    static = ran.get("ours minmax")
    if static and baseline and case.origin != "models":
        share = 0.6 if case.origin == "onnx" else 1.0
        yield Goal(what=f"peak memory ÷ {BASELINE}", figure=static.peak / baseline.peak,
                   bound=share)  # fmt: skip
    if case.name == "mobilenetv2" and static and baseline and percentile:
        yield Goal(what=f"job ÷ {BASELINE}", figure=static.seconds / baseline.seconds, bound=1 / 3)
        for what, a, b in (
            ("job", static.seconds, percentile.seconds),
            ("peak memory", static.peak, percentile.peak),
        ):
            yield Goal(what=f"{what} ÷ ORT Percentile", figure=a / b, bound=1 / 15)
    if "ours compress" in rows:
        yield from _quality(case, rows["ours compress"], ran)


def _quality(case: Case, ours: Row, ran: Mapping[str, Row]) -> Iterator[Goal]:
    """Those on what `compress` chose; nothing is measured where it failed."""
    best = max((_value(r) or 0 for n, r in ran.items() if n.startswith("ORT")), default=0)
    bound = _BEST_KNOWN.get(case.name, best)
    if case.origin != "onnx":
        yield Goal(what="score of compress", figure=_value(ours), bound=bound, at_most=False)
    # ResNet-50 has to be twice as fast, which takes a CPU with VNNI.
    bound = 0.5 if case.origin == "onnx" else 1.03
    yield Goal(what="latency of compress ÷ float", figure=_known(ours.float_ratio), bound=bound)
    if BASELINE in ran:
        ratio = _known(ours.baseline_ratio)
        yield Goal(what=f"latency of compress ÷ {BASELINE}", figure=ratio, bound=1.03)


def _known(latency: Latency | None) -> float | None:
    return latency.ratio if latency else None


def _value(row: Row) -> float | None:
    return row.score.value if row.score else None
