"""How our verbs grow: seconds with the number of nodes, memory with the bytes of weights.

python -m tests.benchmarks.growth VERB MODEL OUTPUT [STATISTICS] runs one verb and prints its
processor seconds, load and save included and imports left out: other work lengthens them less than
wall time, which would bend a fit.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir

from onnxcompress import api, model_io, schemes
from onnxcompress.numerics.histogram import HistogramBuilder
from onnxcompress.observe import Observations
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.pipeline import Outcome, run
from tests.benchmarks import job, scale
from tests.benchmarks.cases import Setting
from tests.benchmarks.graphs import generate
from tests.benchmarks.table import Goal, goals, number, table
from tests.benchmarks.tools import IMPORTS, verb

_SIZES = (1_000, 3_000, 10_000, 30_000)
_LARGE = 10_000
"""Nodes from which on one round will do."""
_MEBIBYTES = 3 * 1024
_EXPONENT, _SECONDS, _EXTRA = 1.15, 15.0, 500.0

VERBS: dict[str, Callable[..., Outcome]] = {
    "optimize": lambda model: api.optimize(model),
    "quantize": lambda model, path: api.quantize(model, statistics=api.load_statistics(path)),
}


def tables(setting: Setting) -> Iterator[str]:
    """Seconds by nodes, then memory by bytes."""
    yield from _nodes(setting)
    yield from _weights(setting)


def _nodes(setting: Setting) -> Iterator[str]:
    sizes = _SIZES[:2] if setting.quick else _SIZES
    seconds: dict[str, list[float]] = {name: [] for name in VERBS}
    whole: dict[str, float] = {}

    def rows() -> Iterator[list[str]]:
        for size in sizes:
            jobs = _measure(size, setting)
            for name, done in jobs.items():
                seconds[name].append(median(_printed(d) for d in done))
                whole[name] = median(d.seconds for d in done)
            figures = ((seconds[name][-1], whole[name]) for name in VERBS)
            yield [str(size), *(number(f) for pair in figures for f in pair)]

    columns = (f"{n}{what}" for n in VERBS for what in (" CPU s", ": whole job s"))
    yield from table(("nodes", *columns), rows())
    found: list[Goal] = []
    for name, taken in seconds.items():
        exponent = float(np.polyfit(np.log(sizes), np.log(taken), 1)[0])
        found.append(Goal(what=f"{name}: exponent of nodes", figure=exponent, bound=_EXPONENT))
        what = f"{name}: whole job at {sizes[-1]} nodes"
        found.append(Goal(what=what, figure=whole[name], bound=_SECONDS, unit="s"))
    yield from goals(found)


def _measure(size: int, setting: Setting) -> dict[str, list[job.Job]]:
    """Each verb on a graph of `size` nodes, in turns."""
    folder = setting.folder
    model, output, statistics = (folder / f"nodes{end}" for end in (".onnx", "_out.onnx", ".npz"))
    generated = generate(size)
    ir.save(generated, model)
    _statistics(generated).save(statistics)
    jobs: dict[str, list[job.Job]] = {name: [] for name in VERBS}
    for _ in range(setting.rounds if size < _LARGE else 1):
        for name, done in jobs.items():
            more = [str(statistics)] if name == "quantize" else []
            command = [sys.executable, "-m", __spec__.name, name, str(model), str(output), *more]
            done.append(job.run(command))
    return jobs


def _statistics(model: ir.Model) -> Observations:
    """Made up, for what is measured comes after them."""
    builder = HistogramBuilder()
    builder.add(np.random.default_rng(0).standard_normal(1000, np.float32))
    wants = InsertQdq().wants(run(model, schemes.before_static()).model)
    return Observations(dict.fromkeys(wants, builder.build()))


def _printed(done: job.Job) -> float:
    return float("nan") if done.failure else float(done.output)


def _weights(setting: Setting) -> Iterator[str]:
    mebibytes = 256 if setting.quick else _MEBIBYTES
    source, output = filled(setting.folder, mebibytes), setting.folder / "out" / "big.onnx"
    output.parent.mkdir(exist_ok=True)
    idle = job.run(IMPORTS)
    found: list[Goal] = []

    def rows() -> Iterator[list[str]]:
        for name, options in (("optimize", []), ("prune", ["--sparsity", "0.5"])):
            done = job.run([*verb(name), str(source), "-o", str(output), *options])
            extra = None if done.failure else done.peak - idle.peak
            what = f"{name}: extra peak memory"
            found.append(Goal(what=what, figure=extra, bound=_EXTRA, unit="MB"))
            yield [
                f"{name} {done.failure}".rstrip(),
                *(number(f) for f in (done.seconds, done.peak, extra)),
            ]

    header = (f"{mebibytes} MiB of weights", "job s", "peak MB", "above interpreter and imports MB")
    yield from table(header, rows())
    yield from goals(found)


def filled(folder: Path, mebibytes: int) -> Path:
    """A model whose external data is really on the disk, and random: holes cost no reading."""
    path = scale.weights_of(folder, mebibytes)
    random = np.random.default_rng(0)
    with (folder / "model.bin").open("r+b") as file:
        for _ in range(mebibytes // 16):
            file.write(random.standard_normal(4 * scale.MIB, np.float32).tobytes())
    return path


def _one(name: str, model: str, output: str, *more: str) -> None:
    start = time.process_time()
    model_io.save(VERBS[name](Path(model), *more).model, output)
    print(time.process_time() - start)


if __name__ == "__main__":
    _one(*sys.argv[1:])
