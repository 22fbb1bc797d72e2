"""Ours beside ONNX Runtime's own quantizer and NNCF: time, memory, size, score and latency."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from onnxcompress.errors import InputError
from onnxcompress.measure.latency import Latency, paired_latency
from onnxcompress.model_io import size_on_disk
from onnxcompress.session import Session
from tests.benchmarks import job
from tests.benchmarks.cases import Case, Score, Setting, all_cases
from tests.benchmarks.table import Goal, goals, number, table
from tests.benchmarks.tools import BASELINE, HAS_NNCF, Tool, tools_for

_QUICK = ("ours minmax", BASELINE)
_SLOW = 20.0
"""Seconds from which on a tool is run once only."""
_HEADER = (
    *("tool", "job s", "CPU s", "peak MB", "size MB", "score", "agrees with float"),
    *("latency ms", "÷ float", "÷ fastest of the others"),
)
_WANTED: Mapping[str, tuple[float, float | None]] = {
    "mobilenetv2": (0.785, 0.95),
    "tinydarknet": (0.640, 0.94),
    "magika": (0.966, 0.98),
    "minilm_stsb": (0.804, None),
    "silero_vad": (0.99, None),
}
"""Score and agreement that `compress` has to reach on the zoo."""
_LOSS = 0.002
"""Score that it may lose on the models of the repository."""
_WANTED_STATIC = {"minilm_stsb": 0.800}
"""Score to reach with `--scheme static` where the default takes another."""


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
    fastest_ratio: Latency | None = None
    """Ours only: against the fastest model that another tool made."""
    failure: str = ""

    @property
    def agreement(self) -> float | None:
        """With the float model."""
        return self.score.agreement if self.score else None


def tables(setting: Setting) -> Iterator[str]:
    """A table of tools and one of goals for every case."""
    if not HAS_NNCF:
        yield "NNCF is not installed (extra `bench`): compared without it."
        yield ""
    for case in all_cases(setting):
        score = case.score(case.model).value
        told = "" if score is None else f", score {score:.4f}"
        yield f"### {case.name}: float is {number(size_on_disk(case.model) / 1e6)} MB{told}"
        yield ""
        rows = _measure(case, setting)
        yield from table(_HEADER, (_cells(tool, row) for tool, row in rows.items()))
        yield from goals(list(_goals(case, score, rows)))


def _measure(case: Case, setting: Setting) -> Mapping[str, Row]:
    tools = [t for t in tools_for(case) if not setting.quick or t.name in _QUICK]
    folder = setting.folder / "made" / case.name
    folder.mkdir(parents=True, exist_ok=True)
    paths = {tool: folder / f"{tool.name.replace(' ', '_')}.onnx" for tool in tools}
    jobs: dict[Tool, list[job.Job]] = {tool: [] for tool in tools}
    for _ in range(setting.rounds):
        for tool, done in jobs.items():
            if not done or (done[0].seconds < _SLOW and not done[0].failure):
                done.append(job.run(tool.command(case, paths[tool])))
    rows = {tool: _row(case, done, paths[tool], setting) for tool, done in jobs.items()}
    timed = {t: r.float_ratio.ratio for t, r in rows.items() if r.float_ratio and not t.ours}
    if timed:
        fastest, feed = paths[min(timed, key=timed.__getitem__)], next(case.feeds())
        for tool, row in rows.items():
            if tool.ours and not row.failure:
                found = paired_latency(fastest, paths[tool], feed, seconds=_seconds(setting))
                rows[tool] = replace(row, fastest_ratio=found)
    return {tool.name: row for tool, row in rows.items()}


def _seconds(setting: Setting) -> float:
    """For one comparison of latency."""
    return 0.5 if setting.quick else 3.0


def _row(case: Case, done: list[job.Job], output: Path, setting: Setting) -> Row:
    failure = next((d.failure for d in done if d.failure), "")
    if failure or not _runs(output):
        return Row(failure=failure or "ONNX Runtime refuses the result")
    feed = next(case.feeds())
    return Row(
        seconds=median(d.seconds for d in done),
        cpu=median(d.cpu for d in done),
        peak=median(d.peak for d in done),
        size=size_on_disk(output) / 1e6,
        score=case.score(output),
        float_ratio=paired_latency(case.model, output, feed, seconds=_seconds(setting)),
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
        _ratio(row.fastest_ratio),
    ]


def _ratio(latency: Latency | None) -> str:
    if latency is None:
        return "-"
    return f"{latency.ratio:.2f} ({latency.low:.2f} to {latency.high:.2f})"


def _goals(case: Case, score: float | None, rows: Mapping[str, Row]) -> Iterator[Goal]:
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
        yield from _quality(case, score, rows, ran)
        yield from _speed(case, rows["ours compress"])


def _quality(
    case: Case, score: float | None, rows: Mapping[str, Row], ran: Mapping[str, Row]
) -> Iterator[Goal]:
    """What `compress` keeps, by itself and beside the others' static models."""
    ours = rows["ours compress"]
    found = {"score": _value(ours), "agreement": ours.agreement}
    least = None if score is None else score - _LOSS
    wanted = _WANTED.get(case.name, (least if case.origin == "models" else None, None))
    for (what, figure), bound in zip(found.items(), wanted, strict=True):
        if bound is not None:
            yield Goal(what=f"{what} of compress", figure=figure, bound=bound, at_most=False)
    if bound := _WANTED_STATIC.get(case.name):
        static = _value(rows["ours compress static"])
        yield Goal(what="score of static", figure=static, bound=bound, at_most=False)
    others = [r for n, r in ran.items() if not n.startswith("ours") and n != "ORT Dynamic"]
    best = {"score": map(_value, others), "agreement": (r.agreement for r in others)}
    for what, values in best.items():
        known = [value for value in values if value is not None]
        if known:
            yield Goal(what=f"{what} of compress, best of the others'", figure=found[what],
                       bound=max(known), at_most=False)  # fmt: skip


def _speed(case: Case, ours: Row) -> Iterator[Goal]:
    # ResNet-50 has to be twice as fast, which takes a CPU with VNNI.
    bound = 0.5 if case.origin == "onnx" else 1.0
    yield Goal(what="latency of compress ÷ float", figure=_known(ours.float_ratio), bound=bound)
    if ours.fastest_ratio or ours.failure:
        ratio = _known(ours.fastest_ratio)
        yield Goal(what="latency of compress ÷ fastest of the others", figure=ratio, bound=1.02)


def _known(latency: Latency | None) -> float | None:
    return latency.ratio if latency else None


def _value(row: Row) -> float | None:
    return row.score.value if row.score else None
