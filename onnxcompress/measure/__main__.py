"""Measures one model in this process, whose memory is then the model's: figures as JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.errors import OnnxCompressError
from onnxcompress.measure import INPUT_KEY
from onnxcompress.measure.latency import runner
from onnxcompress.session import Feed


def _measure_here(path: Path, feed: Feed, threads: int, seconds: float) -> dict[str, float]:
    """What `Measurement` says of a model, taken in this process."""
    _forget_peak()
    before = _peak_memory()
    run = runner(path, feed, threads)
    for _ in range(3):
        run()
    peak = _peak_memory() - before
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 10 or (time.perf_counter() < end and len(times) < 10_000):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    p50, p90 = np.percentile(times, (50, 90)).tolist()
    return {"p50_ms": p50, "p90_ms": p90, "runs": len(times), "peak_memory": peak}


def _forget_peak() -> None:
    """Start the peak anew from what is resident now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_memory() -> int:
    """Bytes resident at most.

    Linux's `ru_maxrss` is inherited from the parent across fork and exec, so VmHWM comes first.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    import resource  # no such module on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m onnxcompress.measure")
    parser.add_argument("model", type=Path)
    parser.add_argument("--feed", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args(arguments)
    with np.load(given.feed, allow_pickle=False) as arrays:
        feed: dict[str, Any] = {k.removeprefix(INPUT_KEY): arrays[k] for k in arrays.files}
    try:
        figures = _measure_here(given.model, feed, given.threads, given.seconds)
    except OnnxCompressError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
