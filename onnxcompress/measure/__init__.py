"""Measures models on their own: size, latency, peak memory; and benches them in turns.

Memory can only be told in a process of its own: `python -m onnxcompress.measure MODEL`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.data.ports import Port, interface
from onnxcompress.errors import InputError
from onnxcompress.measure.latency import Latency, in_turns, runner
from onnxcompress.model_io import load, size_on_disk
from onnxcompress.session import Feed

INPUT_KEY = "input:"
"""Before an input's name in the feed's file, so that no name is one of savez's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One model by itself, in a process of its own."""

    path: str
    size: int
    """Bytes, external data included."""
    p50_ms: float
    p90_ms: float
    runs: int
    peak_memory: int
    """Bytes that loading and running the model added to the process at most."""
    against_first: Latency | None = None
    """Timed in turns with the first model of the bench; None for that one itself."""


def bench(
    paths: Sequence[Path],
    feed: Feed | None = None,
    *,
    threads: int = 1,
    seconds: float = 3.0,
    dims: Mapping[str, int] | None = None,
) -> list[Measurement]:
    """Measure each model by itself, and each after the first in turns with the first.

    Args:
        feed: what every model runs on; random by its inputs when None.
        threads: threads of one operator.
        seconds: budget of one model's timing and of one pair.
        dims: sizes of symbolic dimensions of random feeds; 1 where absent.

    Raises:
        InputError: if a model or the feed does not run.
    """
    feeds = [random_feed(load(path), dims=dims) if feed is None else feed for path in paths]
    alone = [
        measure(path, f, threads=threads, seconds=seconds)
        for path, f in zip(paths, feeds, strict=True)
    ]
    if len(paths) < 2:
        return alone
    first, *others = (runner(p, f, threads) for p, f in zip(paths, feeds, strict=True))
    return [alone[0]] + [
        replace(m, against_first=in_turns(first, other, seconds=seconds))
        for m, other in zip(alone[1:], others, strict=True)
    ]


def measure(
    path: Path, feed: Feed | None = None, *, threads: int = 1, seconds: float = 3.0
) -> Measurement:
    """Latency and peak memory of a model in a process of its own.

    Raises:
        InputError: if the model or the feed does not run.
    """
    if feed is None:
        feed = random_feed(load(path))
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "feed.npz"
        arrays: dict[str, Any] = {INPUT_KEY + name: array for name, array in feed.items()}
        np.savez(inputs, **arrays)
        command = [sys.executable, "-P", "-m", "onnxcompress.measure", "--feed", str(inputs)]
        command += ["--threads", str(threads), "--seconds", str(seconds), "--", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"cannot measure {path}: {_last_line(done.stderr)}")
    return Measurement(path=str(path), size=size_on_disk(path), **json.loads(done.stdout))


def random_feed(
    model: ir.Model, *, seed: int = 0, dims: Mapping[str, int] | None = None
) -> dict[str, Array]:
    """A feed made up from the model's inputs: normal floats, integers of 0 and 1.

    Args:
        seed: the same gives the same feed.
        dims: sizes of symbolic dimensions by name; 1 where absent.

    Raises:
        InputError: if an input is no tensor of numbers or has no known rank.
    """
    rng = np.random.default_rng(seed)
    return {port.name: _random_array(port, rng, dims or {}) for port in interface(model)}


def _random_array(port: Port, rng: np.random.Generator, dims: Mapping[str, int]) -> Array:
    if port.shape is None or port.dtype.kind == "O":
        raise InputError(f"input {port.name!r} is {port.describe()}: give data for this model")
    shape = [d if isinstance(d, int) else dims.get(d or "", 1) for d in port.shape]
    if port.dtype.kind in "biu":
        return rng.integers(0, 2, shape).astype(port.dtype)
    return rng.standard_normal(shape).astype(port.dtype)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "the process died without a word, perhaps out of memory"
