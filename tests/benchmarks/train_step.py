"""A training step beside PyTorch's: time and memory.

Forward, loss, backward and SGD with momentum, on the same network from the same weights, the same
batch and as many threads. Each framework has a process of its own, and they run in turns. PyTorch
is needed for the comparison alone: without it there is nothing to say.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tests.benchmarks.cases import Setting
from tests.benchmarks.job import environment
from tests.benchmarks.networks import NETWORKS, TINY, Network
from tests.benchmarks.table import Goal, goals, table

_ROUNDS = 15
_MEMORY = 1.5
"""The most memory beside PyTorch's."""


def tables(setting: Setting) -> Iterator[str]:
    """The best step of those taken in turns and the most memory, and what was wanted."""
    if importlib.util.find_spec("torch") is None:
        yield "PyTorch is not installed: there is nothing to compare with."
        yield ""
        return
    chosen = [n for n in NETWORKS if not setting.only or n.name in setting.only]
    for network in (TINY, *chosen):
        (setting.folder / f"{network.name}.onnx").write_bytes(network.exported())
    found: list[Goal] = []
    header = ("model", "threads", "ours, ms", "PyTorch, ms", "ratio")
    yield from table((*header, "ours, MB", "PyTorch, MB", "ratio"), _rows(setting, chosen, found))
    yield from goals(found)


def _rows(setting: Setting, networks: list[Network], found: list[Goal]) -> Iterator[list[str]]:
    """Rows of the table, whose verdicts are added to `found`."""
    for network, threads in product(networks, (1, 2)):
        sides = _race(network, threads, setting.folder, 1 if setting.quick else _ROUNDS)
        found += _goals(f"{network.name}, threads: {threads}", network.bound, *sides)
        yield [network.name, str(threads), *_cells(*sides)]


@dataclass(frozen=True, slots=True)
class Side:
    """What one framework took."""

    seconds: float
    """Of its best step."""
    loss: float
    """Of its last step."""
    memory: float
    """MB at most, beside what its libraries take by themselves."""


def _race(network: Network, threads: int, folder: Path, rounds: int) -> list[Side]:
    """Ours and PyTorch's, which must have come to the same loss."""
    with ExitStack() as stack:
        racers = [
            stack.enter_context(_process(side, network, threads, folder))
            for side in ("ours", "theirs")
        ]
        best = [math.inf, math.inf]
        last = [Side(math.inf, math.nan, math.nan)] * 2
        for _ in range(rounds):
            for index, racer in enumerate(racers):
                _ask(racer, 1)  # back into the cache
                last[index] = _ask(racer, 1)
                best[index] = min(best[index], last[index].seconds)
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.close()
    if not math.isclose(last[0].loss, last[1].loss, rel_tol=1e-3):
        raise RuntimeError(f"{network.name}: they do not train the same: {last}")
    return [Side(b, s.loss, s.memory) for b, s in zip(best, last, strict=True)]


def _process(side: str, network: Network, threads: int, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.trainer"]
    command += [side, network.name, str(threads), str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environ = {**environment(), "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, env=environ, **pipes)


def _ask(racer: subprocess.Popen[str], steps: int) -> Side:
    assert racer.stdin is not None and racer.stdout is not None
    racer.stdin.write(f"{steps}\n")
    racer.stdin.flush()
    return Side(*json.loads(racer.stdout.readline()))


def _cells(ours: Side, theirs: Side) -> list[str]:
    times, memory = [[getattr(s, n) for s in (ours, theirs)] for n in ("seconds", "memory")]
    return [
        *(f"{1e3 * seconds:.1f}" for seconds in times),
        f"{times[0] / times[1]:.2f}",
        *(f"{size:.0f}" for size in memory),
        f"{memory[0] / memory[1]:.2f}",
    ]


def _goals(what: str, bound: float | None, ours: Side, theirs: Side) -> Iterator[Goal]:
    if bound is not None:
        share = ours.seconds / theirs.seconds
        yield Goal(what=f"{what}, share of PyTorch's time", figure=share, bound=bound)
    share = ours.memory / theirs.memory
    yield Goal(what=f"{what}, share of PyTorch's memory", figure=share, bound=_MEMORY)
