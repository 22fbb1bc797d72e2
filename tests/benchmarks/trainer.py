"""One side of a race: a process that trains a network in one framework, a few steps when asked.

Each line that it reads is answered by a line: the number of steps, then their best time, the last
loss and the most memory so far. The framework has trained something tiny before it counts memory,
so that what it loads once is not counted.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.networks import NETWORKS, TINY, Network

Feed = Mapping[str, np.ndarray]
LR = 1e-3


def ours(model: bytes, threads: int) -> Callable[[Feed], float]:
    """A training step in ONNX Runtime."""
    import onnx_ir as ir
    from onnx import load_model_from_string

    from onnxcompress.train.losses import CrossEntropy
    from onnxcompress.train.optimizers import SGD
    from onnxcompress.train.parameters import trainable_weights
    from onnxcompress.train.step import Step

    graph = ir.from_proto(load_model_from_string(model))
    trainable = trainable_weights(graph, ["*"])
    step = Step(graph, [CrossEntropy("y")], SGD(LR), trainable=trainable, threads=threads)
    return lambda feed: step.run(feed).loss


def theirs(module: Any, threads: int) -> Callable[[Feed], float]:
    """A training step in PyTorch, eagerly."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR, momentum=0.9)

    def step(feed: Feed) -> float:
        optimizer.zero_grad()
        x, labels = (torch.from_numpy(feed[name]) for name in ("x", "labels"))
        loss = torch.nn.functional.cross_entropy(module(x), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main(side: str, name: str, threads: str, folder: str) -> None:
    """Train as standard input asks, until it ends."""
    step_of = partial(_step, side, int(threads), Path(folder))
    step_of(TINY)(TINY.batch())
    network = next(n for n in NETWORKS if n.name == name)
    feed = network.batch()
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
    before = _resident("VmRSS")
    step = step_of(network)
    for line in sys.stdin:
        best, loss = float("inf"), 0.0
        for _ in range(int(line)):
            begin = time.perf_counter()
            loss = step(feed)
            best = min(best, time.perf_counter() - begin)
        print(json.dumps([best, loss, _resident("VmHWM") - before]), flush=True)


def _step(side: str, threads: int, folder: Path, network: Network) -> Callable[[Feed], float]:
    if side == "ours":
        return ours((folder / f"{network.name}.onnx").read_bytes(), threads)
    return theirs(network.module(), threads)


def _resident(field: str) -> float:
    """MB of this process: those in memory (VmRSS) or the most that were (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


if __name__ == "__main__":
    main(*sys.argv[1:])
