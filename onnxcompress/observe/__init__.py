"""Taps: runs a model over data and keeps, of the values wanted, small statistics that merge.

Values become outputs of the session, those inside bodies by way of `graph.bodies`. Feeds run side
by side, one core each, and each is observed by the thread that ran it, while its values are still
in the cache.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from threading import Lock
from typing import Any, TypeVar, cast

import numpy as np
import onnx
import onnx_ir as ir

from onnxcompress.contract import Array, Kind, Want
from onnxcompress.errors import InputError
from onnxcompress.graph.bodies import Exposed, expose, visits
from onnxcompress.numerics.exact_sum import ExactSum
from onnxcompress.numerics.histogram import HistogramBuilder, Unobservable, sample_size
from onnxcompress.numerics.row_sample import RowSampleBuilder
from onnxcompress.observe.observations import ChannelRange, Observations, merge_all
from onnxcompress.operators import output_range
from onnxcompress.session import Feed, Session, weighs

__all__ = ["Observations", "Progress", "observe"]

Progress = Callable[[int, int | None], None]
"""Called with the feeds done and how many there are, if that is known."""

Bounds = Mapping[str, tuple[float, float]]
"""What values cannot lie beyond, by name."""

_T = TypeVar("_T")
_NO_DATA = "there is no data to calibrate with: give at least one feed"
_WORKERS = 8
_LARGE = 1 << 29
"""Bytes of weights from which writing them in a blocked layout costs more than it saves."""
_SHARD = 8
_BOUNDLESS = (-math.inf, math.inf)
_SHARDS_IN_FLIGHT = 32


def observe(
    model: ir.Model,
    feeds: Iterable[Feed],
    wants: Sequence[Want],
    *,
    total: int | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Observations:
    """Run `model` on every feed and keep what is wanted.

    A value inside the body of an If, Loop or Scan is observed at each visit, as if each were a
    feed; all visits of one feed are in memory at once. What no feed came to is left out. So is
    what cannot be observed (no tensor of numbers, an infinite element), and
    `Observations.reasons` says why. The result does not depend on the executor, nor on the order
    of the feeds.

    Args:
        model: not altered. Initializers are observed once, whatever the number of feeds.
        feeds: arrays by input name, of any batch size; at most a few are held at a time.
        total: how many feeds there are, for `progress`.
        executor: runs shards of the feeds, in other processes or machines if it likes. Threads
            of this process when None.

    Raises:
        InputError: if there are no feeds, a value is NaN, or the model does not run.
    """
    exposed = expose(model, [want.value for want in wants])
    model, plan = exposed.model, _plan(exposed, wants, total)
    progress = progress or _silent
    if executor is None:
        found = _observe_here(model, feeds, plan, total, progress)
    else:
        found = _observe_elsewhere(model, feeds, plan, total, progress, executor)
    return plan.known.merge(found)


@dataclass(frozen=True)
class _Plan:
    """Where each wanted value comes from."""

    inputs: tuple[Want, ...]
    taps: tuple[Want, ...]
    known: Observations
    """Initializers, and the reasons of what cannot be observed."""
    depths: Mapping[str, int]
    """For `visits`, of the values inside bodies."""
    bounds: Bounds
    sample: int
    """How many elements of a large value a histogram counts."""

    def observers(self) -> _Observers:
        """Of all that runs give."""
        return _Observers(self.inputs + self.taps, self.depths, self.bounds, self.sample)


def _plan(exposed: Exposed, wants: Sequence[Want], feeds: int | None) -> _Plan:
    graph = exposed.model.graph
    initializers = graph.initializers
    inputs = {v.name for v in graph.inputs} - set(initializers)
    produced = {v.name: node for node in graph for v in node.outputs}
    sample = sample_size(feeds)
    constants: list[Want] = []
    reasons: dict[Want, str] = {}
    fed: list[Want] = []
    taps: list[Want] = []
    for want in dict.fromkeys(wants):
        if want.kind in (Kind.CHANNEL_RANGE, Kind.MEAN) and want.axis is None:
            raise InputError(f"the {want.kind} of {want.value!r} needs an axis")
        if want.kind is Kind.ROWS and want.patches is None:
            raise InputError(f"the {want.kind} of {want.value!r} need patches")
        if want.value in inputs:
            fed.append(want)
        elif want.value in produced:
            taps.append(want)
        elif want.value in initializers and initializers[want.value].const_value is not None:
            constants.append(want)
        else:
            absent = "it is not a value of the model"
            reasons[want] = exposed.reasons.get(want.value, absent)
    known = _Observers(constants, {}, {}, sample)
    for name in dict.fromkeys(want.value for want in constants):
        tensor = initializers[name].const_value
        assert tensor is not None
        known.add({name: tensor.numpy()}, "the model")
    ranges = {want.value: output_range(produced[want.value]) for want in taps}
    bounds = {value: found for value, found in ranges.items() if found is not None}
    return _Plan(
        tuple(fed),
        tuple(taps),
        known.build().merge(Observations(reasons=reasons)),
        exposed.depths,
        bounds,
        sample,
    )


class _Observers:
    """What is kept of each wanted value; any threads may add to it."""

    def __init__(
        self, wants: Iterable[Want], depths: Mapping[str, int], bounds: Bounds, sample: int
    ) -> None:
        self._depths = depths
        self._by_value: defaultdict[str, list[_Observer]] = defaultdict(list)
        for want in wants:
            builder = _builder(want, bounds.get(want.value, _BOUNDLESS), sample)
            self._by_value[want.value].append(_Observer(want, builder))

    def add(self, values: Mapping[str, Any], where: str) -> None:
        """Observe the wanted ones of `values`.

        Raises:
            InputError: if one of them is NaN.
        """
        for value, observers in self._by_value.items():
            if value not in values:
                continue
            for array in visits(values[value], self._depths.get(value)):
                for observer in observers:
                    observer.add(array, where)

    def build(self) -> Observations:
        observers = [observer for each in self._by_value.values() for observer in each]
        kept = {o.want: o.builder.build() for o in observers if o.seen}
        reasons = {o.want: o.reason for o in observers if o.reason}
        found = {want: each for want, each in kept.items() if each is not None}
        return Observations(found, reasons).merge(Observations())


@dataclass(slots=True)
class _Observer:
    """Of one wanted value."""

    want: Want
    builder: HistogramBuilder | RowSampleBuilder | _ChannelsBuilder
    seen: bool = False
    reason: str = ""
    """Why it cannot be observed."""

    def add(self, array: Any, where: str) -> None:
        if self.reason:
            return
        try:
            self.builder.add(_numbers(array))
            self.seen = True
        except FloatingPointError as error:
            raise InputError(
                f"{self.want.value!r} holds NaN in {where}: check the data and the model"
            ) from error
        except Unobservable as error:
            self.reason = str(error)


class _ChannelsBuilder:
    """Ranges or sums of channels, merged as arrays come, from any threads."""

    def __init__(self, kind: type[ChannelRange] | type[ExactSum], axis: int) -> None:
        self._kind, self._axis = kind, axis
        self._found: ChannelRange | ExactSum | None = None
        self._lock = Lock()

    def add(self, array: Array) -> None:
        """Channels lie along the axis.

        Raises:
            FloatingPointError: if an element is NaN.
            Unobservable: if one is infinite, or there are more or fewer channels than before.
        """
        if not array.size:
            return
        found: Any = self._kind.of(_channels(array, self._axis))
        with self._lock:
            self._found = found if self._found is None else found.merge(self._found)

    def build(self) -> ChannelRange | ExactSum | None:
        """Of everything added so far; None of nothing."""
        return self._found


def _builder(
    want: Want, bounds: tuple[float, float], sample: int
) -> HistogramBuilder | RowSampleBuilder | _ChannelsBuilder:
    if want.kind is Kind.HISTOGRAM:
        return HistogramBuilder(sample, bounds)
    if want.patches is not None:
        return RowSampleBuilder(want.patches)
    kind = ChannelRange if want.kind is Kind.CHANNEL_RANGE else ExactSum
    return _ChannelsBuilder(kind, want.axis or 0)


def _numbers(value: Any) -> Array:
    if not isinstance(value, np.ndarray):
        raise Unobservable("it is not a tensor")
    array = cast(Array, value)
    if array.dtype != np.float32 and not np.can_cast(array.dtype, np.float32, "same_kind"):
        raise Unobservable("it does not hold real numbers")
    return array


def _channels(array: Array, axis: int) -> Array:
    """As float32 [m, channels, k]."""
    if not -array.ndim <= axis < array.ndim:
        raise Unobservable(f"it has no axis {axis}")
    axis %= array.ndim
    before = int(np.prod(array.shape[:axis]))
    return array.astype(np.float32, copy=False).reshape(before, array.shape[axis], -1)


def _observe_here(
    model: ir.Model, feeds: Iterable[Feed], plan: _Plan, total: int | None, progress: Progress
) -> Observations:
    cores = _cores()
    workers = max(1, min(cores, _WORKERS, cores if total is None else total))
    session = _session(model, plan.taps, cores // workers)
    observers = plan.observers()
    run = partial(_run, session, observers=observers)
    with ThreadPoolExecutor(workers) as pool:
        done = 0
        futures = (pool.submit(run, number, feed) for number, feed in enumerate(feeds))
        # One feed more than run, so that none of the workers waits for data.
        for _ in _in_flight(futures, workers + 1):
            done += 1
            progress(done, total)
    if not done:
        raise InputError(_NO_DATA)
    return observers.build()


def _observe_elsewhere(
    model: ir.Model,
    feeds: Iterable[Feed],
    plan: _Plan,
    total: int | None,
    progress: Progress,
    executor: Executor,
) -> Observations:
    try:
        content = ir.to_proto(model).SerializeToString()
    except ValueError as error:
        raise InputError(
            "the model is too large to send to an executor: calibrate it in this process"
        ) from error

    def run(shard: tuple[int, tuple[Feed, ...]]) -> Future[tuple[int, Observations]]:
        return executor.submit(_observe_shard, content, plan, *shard)

    shards, done = [Observations()], 0
    for size, found in _in_flight(map(run, _shards(feeds)), _SHARDS_IN_FLIGHT):
        shards.append(found)
        done += size
        progress(done, total)
    if not done:
        raise InputError(_NO_DATA)
    return merge_all(shards)


def _shards(feeds: Iterable[Feed]) -> Generator[tuple[int, tuple[Feed, ...]]]:
    """A few feeds at a time, with the number of the first."""
    rest, first = iter(feeds), 0
    while shard := tuple(islice(rest, _SHARD)):
        yield first, shard
        first += len(shard)


def _observe_shard(
    content: bytes, plan: _Plan, first: int, feeds: Sequence[Feed]
) -> tuple[int, Observations]:
    session = _cached_session(content, plan.taps)
    observers = plan.observers()
    for number, feed in enumerate(feeds, first):
        _run(session, number, feed, observers)
    return len(feeds), observers.build()


@lru_cache(maxsize=1)
def _cached_session(content: bytes, taps: tuple[Want, ...]) -> Session | None:
    return _session(ir.from_proto(onnx.ModelProto.FromString(content)), taps, threads=1)


def _session(model: ir.Model, taps: tuple[Want, ...], threads: int) -> Session | None:
    """None where only inputs are wanted, so that nothing has to run."""
    if not taps:
        return None
    outputs = tuple(dict.fromkeys(want.value for want in taps))
    ordered = {want.value for want in taps if want.kind is not Kind.HISTOGRAM}
    # Only convolutions, and what comes behind them, keep values in a layout of their own.
    blocked = any(node.op_type == "Conv" for node in model.graph)
    return Session(
        model,
        outputs=outputs,
        optimization="basic" if weighs(model) > _LARGE else "all",
        threads=threads,
        spinning=False,
        frugal=True,
        unordered=set(outputs) - ordered if blocked else (),
    )


def _run(session: Session | None, number: int, feed: Feed, observers: _Observers) -> None:
    values = session.run(feed) if session is not None else {}
    observers.add({**feed, **values}, f"feed {number}")


def _in_flight(futures: Iterable[Future[_T]], most: int) -> Generator[_T]:
    """Results as they come, drawing on `futures` only while less than `most` are under way."""
    running: set[Future[_T]] = set()
    for future in futures:
        running.add(future)
        if len(running) >= most:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (each.result() for each in done)
    yield from (each.result() for each in as_completed(running))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _silent(done: int, total: int | None) -> None:
    pass
