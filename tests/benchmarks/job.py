"""Runs a command in a process of its own and tells its wall time and peak memory.

The command is started by a small launcher, for Linux lets a process inherit its parent's peak
(`ru_maxrss` survives fork and exec): the launcher's own is a few MB, below any tool's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What running a command cost."""

    seconds: float
    """Wall time from start to exit, interpreter and imports included."""
    cpu: float
    """Seconds of all cores together, which other work on the machine lengthens less."""
    peak: float
    """MB resident at most, mapped pages of files included; of the largest process it started."""
    output: str
    """What it printed."""
    failure: str
    """One line if it failed, else empty."""


def run(command: Sequence[str]) -> Job:
    """Run `command` and wait for it, in an empty folder: some tools leave things where they run."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        launcher = [sys.executable, "-I", "-S", __file__, str(result), *command]
        done = subprocess.run(
            launcher, capture_output=True, text=True, cwd=folder, env=environment(), check=False
        )
        code, seconds, cpu, peak = json.loads(result.read_text())
    failure = _last_line(done.stderr) if code else ""
    return Job(seconds=seconds, cpu=cpu, peak=peak, output=done.stdout, failure=failure)


def environment() -> dict[str, str]:
    """One in which the project's modules and tests are found."""
    path = (str(ROOT), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join(lines[-1].split())[:160].replace("|", "/") if lines else "died without a word"


def _launch(result: str, *command: str) -> None:
    start = time.perf_counter()
    child = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 1e6
    Path(result).write_text(json.dumps([os.waitstatus_to_exitcode(status), seconds, cpu, peak]))


if __name__ == "__main__":
    _launch(*sys.argv[1:])
