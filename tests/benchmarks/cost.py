"""What calibration costs beside plain inference, and whether the whole job keeps its budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

from onnxcompress import api, schemes
from onnxcompress.model_io import load
from onnxcompress.observe import observe
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.pipeline import run
from tests.benchmarks import job
from tests.benchmarks.cases import Case, Setting, all_cases, session
from tests.benchmarks.table import number, table
from tests.benchmarks.tools import IMPORTS, METHODS, TOOLS

_HEADER = (
    *("model", "session start s", "plain inference s", "observe s", "÷ start + plain"),
    *("at most 1.5", "interpreter and imports s", "budget s"),
    *(*(f"{method} s" for method in METHODS), "within budget"),
)
_FACTOR, _SPARE = 2.0, 1.0
"""The budget: interpreter and imports, twice the plain inference, and a second."""
_OBSERVE = 1.5
"""Observing may cost this much of plain inference, the start of the session included in both."""


def tables(setting: Setting) -> Iterator[str]:
    """One table, a row a case: everything in a row was measured in turns."""
    yield from table(_HEADER, (_row(case, setting) for case in all_cases(setting)))


def _row(case: Case, setting: Setting) -> list[str]:
    tools = {t.option: t for t in TOOLS if t.verb == "quantize" and t.option in METHODS}
    commands = {m: t.command(case, setting.folder / "cost.onnx") for m, t in tools.items()}
    work: dict[str, Callable[[], float]] = {
        "start": lambda: _clocked(lambda: session(case.model)),
        "plain": plain(case),
        "observe": observing(case),
        "imports": lambda: job.run(IMPORTS).seconds,
        **{m: partial(_job, command) for m, command in commands.items()},
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(setting.rounds):
        for name, measure in work.items():
            times[name].append(measure())
    found = {name: median(taken) for name, taken in times.items()}
    budget = found["imports"] + _FACTOR * found["plain"] + _SPARE
    ratio = found["observe"] / (found["start"] + found["plain"])
    late = [m for m in METHODS if not found[m] <= budget]
    return [
        case.name,
        *(number(found[name]) for name in ("start", "plain", "observe")),
        f"{ratio:.2f}",
        "pass" if ratio <= _OBSERVE else "**fail**",
        *(number(found["imports"]), number(budget), *(number(found[m]) for m in METHODS)),
        f"**fail**: {', '.join(late)}" if late else "pass",
    ]


def plain(case: Case) -> Callable[[], float]:
    """Seconds of inference alone: a session as by default, its samples one after another."""
    running = session(case.model)
    feeds = list(case.feeds())

    def measure() -> None:
        for feed in feeds:
            running.run(None, feed)

    return lambda: _clocked(measure)


def observing(case: Case) -> Callable[[], float]:
    """Seconds to observe all that static quantization wants, the session's start included."""
    model = run(load(case.model), schemes.before_static()).model
    wants = InsertQdq().wants(model)
    data = api.as_data(case.calibration, model)
    return lambda: _clocked(lambda: observe(model, data, wants, total=data.size))


def _clocked(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _job(command: list[str]) -> float:
    """Seconds of a whole job.

    Raises:
        RuntimeError: if it failed.
    """
    done = job.run(command)
    if done.failure:
        raise RuntimeError(f"{' '.join(command[2:])}: {done.failure}")
    return done.seconds
