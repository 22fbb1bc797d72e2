"""What a teacher says of data: its outputs and inner values, computed once and kept.

A run is cut into shards of a fixed size, each computed on one thread, and every shard is rounded
and put in its place by itself: what comes out has the same bits whoever ran it. Kept on disk it is
one `.npy` a value, half the size of what the teacher gives, mapped when it is read again, under a
name that follows from the teacher's graph and weights, all of the data, and the value.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnx
import onnx_ir as ir
from numpy.lib import format as npy

from onnxcompress.contract import Array
from onnxcompress.data import Images, interface
from onnxcompress.data.arrays import StoredArray, stored_npy
from onnxcompress.errors import InputError
from onnxcompress.model_io.atomic import Draft, publish
from onnxcompress.observe import Progress
from onnxcompress.session import Session
from onnxcompress.train.checkpoint import model_digest
from onnxcompress.train.samples import Samples, fixed_batch, open_samples

Precision = Literal["float16", "float32"]

_SHARD: Final = 32
"""Samples that are run at a time where the model leaves that free."""
_WORKERS: Final = 8
_IN_FLIGHT: Final = 16
_FORMAT: Final = 1


def teacher_outputs(
    teacher: ir.Model,
    data: Any,
    values: Sequence[str] | None = None,
    *,
    cache: str | Path | None = None,
    precision: Precision = "float16",
    executor: Executor | None = None,
    images: Images | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a teacher on all samples and keep what it gives.

    Args:
        data: what `train` takes: arrays by input name with the samples on the first axis.
        values: names of any float values of the teacher's main graph that have the samples on
            their first axis; its outputs when None.
        cache: a folder to keep them in and to look for them first; in memory when None.
        precision: what they are kept in. float16 has 11 bits, far more than a teacher is sure of.
        executor: runs shards of the data, in other processes or machines if it likes; threads of
            this process when None. The result does not depend on which, to the bit.
        progress: called with the samples done and how many there are.

    Returns:
        Arrays [samples, ...] by value name, of dtype `precision`; those on disk are mapped by
        `np.asarray`.

    Raises:
        InputError: if the data does not suit, a value is not one float a sample, is not finite or
            does not fit the precision, or the cache cannot be written.
    """
    names = tuple(v.name or "" for v in teacher.graph.outputs) if values is None else tuple(values)
    names = tuple(dict.fromkeys(names))
    samples = open_samples(data, interface(teacher), (), images=images)
    run = _Run(teacher, samples, precision, executor, progress or _silent)
    if cache is None:
        return _in_memory(run, names)
    folder = Path(cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _on_disk(run, names, folder)
    except OSError as error:
        raise InputError(f"teacher outputs cannot be kept in {folder}: {error}") from error


@dataclass(frozen=True)
class Taught:
    """An augmentation that asks the teacher about each batch as it is then.

    Where inputs are changed at random, a student that is held against what the teacher says of
    the very same inputs learns its function, not its answers.

    Source: Beyer et al., Knowledge distillation: a good teacher is patient and consistent (2022).
    """

    teacher: Session = field(repr=False)
    targets: Mapping[str, str]
    """The teacher's values by the names of the batch's arrays that they replace."""

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array]:
        found = self.teacher.run({name: batch[name] for name in self.teacher.inputs})
        return {**batch, **{target: found[value] for target, value in self.targets.items()}}


@dataclass(frozen=True)
class _Run:
    """A teacher and the samples that it is asked about."""

    teacher: ir.Model
    samples: Samples
    precision: Precision
    executor: Executor | None
    progress: Progress

    def shards(self, names: tuple[str, ...]) -> Iterator[dict[str, Array]]:
        """What it gives of a few samples at a time, in order."""
        size = fixed_batch(interface(self.teacher)) or _SHARD
        feeds = (filled(feed, size) for feed in self.samples.stretches(size))
        counts = (len(range(i, min(i + size, self.samples.size)))
                  for i in range(0, self.samples.size, size))  # fmt: skip
        done = 0
        for count, found in zip(counts, self._found(names, feeds), strict=True):
            done += count
            self.progress(done, self.samples.size)
            yield {name: array[:count] for name, array in found.items()}

    def _found(
        self, names: tuple[str, ...], feeds: Iterable[dict[str, Array]]
    ) -> Iterator[dict[str, Array]]:
        if executor := self.executor:
            content = _content(self.teacher)
            yield from _in_order(
                executor.submit(_elsewhere, content, names, self.precision, feed) for feed in feeds
            )
            return
        session = _session(self.teacher, names)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, _WORKERS)) as pool:
            yield from _in_order(
                pool.submit(_told, session, names, self.precision, feed) for feed in feeds
            )

    @property
    def digest(self) -> str:
        """Of the teacher and of every sample."""
        found = hashlib.sha256(model_digest(self.teacher).encode())
        imports = sorted(self.teacher.graph.opset_imports.items())
        found.update(repr((_FORMAT, self.precision, imports)).encode())
        for feed in self.samples.stretches(_SHARD):
            for name, array in sorted(feed.items()):
                found.update(f"{name} {array.dtype} {array.shape}".encode())
                found.update(array.tobytes())
        return found.hexdigest()


def filled(feed: dict[str, Array], size: int) -> dict[str, Array]:
    """A last shard that is not full, with its last sample again: some models take one size."""
    return {
        name: np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])
        if array.ndim and len(array) < size
        else array
        for name, array in feed.items()
    }


def _told(
    session: Session, names: tuple[str, ...], precision: Precision, feed: dict[str, Array]
) -> dict[str, Array]:
    """The teacher's values of a shard, rounded.

    Raises:
        InputError: if one cannot be kept.
    """
    samples = max(len(array) for array in feed.values() if array.ndim)
    found = session.run(feed)
    return {name: _rounded(name, found[name], precision, samples) for name in names}


def _rounded(name: str, array: Array, precision: Precision, samples: int) -> Array:
    if array.dtype.kind != "f" or array.shape[:1] != (samples,):
        raise InputError(
            f"the teacher's {name!r} is {array.dtype}{list(array.shape)} for {samples} samples: "
            "a student can learn from floats that have the samples on their first axis"
        )
    if not np.isfinite(array).all():
        raise InputError(f"the teacher's {name!r} is not finite: look for outliers in the data")
    with np.errstate(over="ignore"):
        kept = array.astype(precision)
    if not np.isfinite(kept).all():
        raise InputError(f"the teacher's {name!r} is beyond {precision}: keep it in float32")
    return kept


def _session(teacher: ir.Model, names: tuple[str, ...]) -> Session:
    return Session(teacher, outputs=names, threads=1, spinning=False)


def _content(teacher: ir.Model) -> bytes:
    try:
        return ir.to_proto(teacher).SerializeToString()
    except ValueError as error:
        raise InputError(
            "the teacher is too large to send to an executor: run it in this process"
        ) from error


def _elsewhere(
    content: bytes, names: tuple[str, ...], precision: Precision, feed: dict[str, Array]
) -> dict[str, Array]:
    return _told(_cached_session(content, names), names, precision, feed)


@lru_cache(maxsize=1)
def _cached_session(content: bytes, names: tuple[str, ...]) -> Session:
    return _session(ir.from_proto(onnx.ModelProto.FromString(content)), names)


def _in_order(futures: Iterable[Future[dict[str, Array]]]) -> Iterator[dict[str, Array]]:
    """Results in the order of their futures, a few of which are under way at a time."""
    waiting: deque[Future[dict[str, Array]]] = deque()
    for future in futures:
        waiting.append(future)
        if len(waiting) >= _IN_FLIGHT:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _in_memory(run: _Run, names: tuple[str, ...]) -> dict[str, Any]:
    shards = list(run.shards(names))
    return {name: np.concatenate([shard[name] for shard in shards]) for name in names}


def _on_disk(run: _Run, names: tuple[str, ...], folder: Path) -> dict[str, Any]:
    digest = run.digest
    paths = {
        name: folder / f"{hashlib.sha256(f'{digest} {name}'.encode()).hexdigest()[:40]}.npy"
        for name in names
    }
    held = {name: _held(path, run.samples.size) for name, path in paths.items()}
    if missing := tuple(name for name in names if held[name] is None):
        _write(run, {name: paths[name] for name in missing})
    return {name: held[name] or stored_npy(path) for name, path in paths.items()}


def _held(path: Path, samples: int) -> StoredArray | None:
    """What was kept there; None where there is nothing, or something damaged."""
    if not path.exists():
        return None
    try:
        found = stored_npy(path)
    except InputError:
        return None
    return found if found.shape[:1] == (samples,) else None


def _write(run: _Run, paths: Mapping[str, Path]) -> None:
    """Write what the teacher gives as it comes, each file whole or not at all."""
    folder = next(iter(paths.values())).parent
    with ExitStack() as stack:
        drafts = {name: stack.enter_context(Draft(folder)) for name in paths}
        begun = False
        for shard in run.shards(tuple(paths)):
            for name, array in shard.items():
                if not begun:
                    drafts[name].write(_header(array, run.samples.size))
                drafts[name].write(array.tobytes())
            begun = True
        publish({paths[name]: draft for name, draft in drafts.items()})


def _header(array: Array, samples: int) -> bytes:
    text = io.BytesIO()
    described = npy.header_data_from_array_1_0(array)
    npy.write_array_header_1_0(text, {**described, "shape": (samples, *array.shape[1:])})
    return text.getvalue()


def _silent(done: int, total: int | None) -> None:
    pass
