"""Where feeds come from. A source gives feeds as they are stored; `data` checks and converts them.

A feed of a source is `(where, arrays)`: where it lies, for complaints, and array-likes by input
name, perhaps with `labels`; nothing is read from disk or decoded before it is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from onnxcompress.contract import Array
from onnxcompress.data.arrays import opened, stored_npz
from onnxcompress.data.ports import Port, check_dtype, check_names, shape_complaint, spec
from onnxcompress.errors import InputError, OnnxCompressError

Item = tuple[str, Mapping[str, Any]]


class Source(Protocol):
    """An ordered run of feeds that can be read from any place on, again and again."""

    @property
    def size(self) -> int | None:
        """How many feeds there are; None where only reading tells."""
        ...

    @property
    def uniform(self) -> bool:
        """Whether the first feed's names, dtypes and shapes are those of all."""
        ...

    @property
    def note(self) -> str:
        """What of the source is not used, if anything, for the report."""
        ...

    def items(self, start: int, stop: int | None) -> Iterator[Item]: ...


@dataclass(frozen=True)
class Indexed:
    """Feeds found by number; `span` gives feeds i to j joined, where that costs no copy."""

    size: int
    get: Callable[[int], Item]
    span: Callable[[int, int], Item] | None = None
    uniform: bool = False
    note: str = ""

    def items(self, start: int, stop: int | None) -> Iterator[Item]:
        return map(self.get, range(start, self.size if stop is None else min(stop, self.size)))


@dataclass(frozen=True)
class Stream:
    """Feeds of an iterable that starts anew each time it is iterated."""

    begin: Callable[[], Iterable[Any]]
    where: str
    ports: Sequence[Port]
    size: int | None = None
    uniform: bool = False
    note: str = ""

    def items(self, start: int, stop: int | None) -> Iterator[Item]:
        feeds = _guarded(self.begin, self.where, self.ports)
        return itertools.islice(feeds, start, stop)


@dataclass
class Once:
    """Feeds of an iterator that cannot start anew, kept while they are read, up to `budget` bytes.

    Beyond that they are let go, and a second reading is refused.
    """

    begin: Callable[[], Iterable[Any]]
    where: str
    ports: Sequence[Port]
    budget: int = 1 << 30
    size: int | None = None
    uniform: bool = False
    note: str = ""
    _kept: list[Item] | None = field(default_factory=list[Item])
    _feeds: Iterator[Item] | None = None

    def items(self, start: int, stop: int | None) -> Iterator[Item]:
        return itertools.islice(self._all(), start, stop)

    def _all(self) -> Iterator[Item]:
        if self._kept is None:
            raise InputError(
                f"{self.where} can be read only once and is too large to keep: pass a callable "
                "that returns a new iterator, or a file"
            )
        if self._feeds is None:
            self._feeds = _guarded(self.begin, self.where, self.ports)
        for i in itertools.count():  # readers may take turns, so each keeps its own place
            if (item := self._item(self._feeds, i)) is None:
                return
            yield item

    def _item(self, feeds: Iterator[Item], i: int) -> Item | None:
        if self._kept is not None and i < len(self._kept):
            return self._kept[i]
        if (item := next(feeds, None)) is not None:
            self._keep(item)
        return item

    def _keep(self, item: Item) -> None:
        if self._kept is None:
            return
        self._kept.append(item)
        self.budget -= sum(v.nbytes for v in item[1].values())
        if self.budget < 0:
            self._kept = None


@dataclass(frozen=True)
class Picked:
    """Some feeds of a source that only reading tells the length of."""

    source: Source
    numbers: frozenset[int]
    change: Callable[[Item], Item]
    size: int
    uniform: bool
    note: str

    def items(self, start: int, stop: int | None) -> Iterator[Item]:
        numbered = enumerate(self.source.items(0, None))
        chosen = (self.change(item) for i, item in numbered if i in self.numbers)
        return itertools.islice(chosen, start, stop)


def pick(
    source: Source,
    numbers: Sequence[int],
    change: Callable[[dict[str, Array]], dict[str, Array]] | None,
) -> Source:
    """The feeds of `source` that have these rising numbers, their arrays changed by `change`."""

    def changed(item: Item) -> Item:
        if change is None:
            return item
        where, raw = item
        return where, change({name: np.asarray(value) for name, value in raw.items()})

    size, uniform, note = len(numbers), source.uniform, source.note
    if not isinstance(source, Indexed):
        return Picked(source, frozenset(numbers), changed, size, uniform, note)
    get = source.get
    return Indexed(size, lambda i: changed(get(numbers[i])), uniform=uniform, note=note)


def _guarded(
    begin: Callable[[], Iterable[Any]], where: str, ports: Sequence[Port]
) -> Iterator[Item]:
    """Somebody else's iterable as items; its failures become ours, its arrays our own copies.

    A copy, for a reader may fill the same buffer again while we hold it.
    """
    index = 0
    try:
        for index, given in enumerate(begin()):
            place = f"{where}, feed {index}"
            named = _named(given, place, ports)
            yield place, {name: np.array(value) for name, value in named.items()}
    except OnnxCompressError:
        raise
    except Exception as error:
        raise InputError(
            f"{where} failed after feed {index}: {type(error).__name__}: {error}"
        ) from error


def _named(given: Any, where: str, ports: Sequence[Port]) -> Mapping[str, Any]:
    """A feed by input names; a bare array feeds a model of one input."""
    if isinstance(given, Mapping):
        return cast("Mapping[str, Any]", given)
    if len(ports) == 1 and hasattr(given, "__array__"):
        return {ports[0].name: given}
    names = ", ".join(repr(p.name) for p in ports)
    raise InputError(
        f"{where} is of type {type(given).__name__}: give a dict of arrays by input name ({names})"
    )


def from_list(feeds: Sequence[Any], where: str, ports: Sequence[Port]) -> Indexed:
    """Feeds that are in memory."""

    def get(i: int) -> Item:
        place = f"{where}, feed {i}"
        return place, _named(feeds[i], place, ports)

    return Indexed(len(feeds), get)


def from_columns(arrays: Mapping[str, Any], ports: Sequence[Port], where: str) -> Indexed:
    """Feeds out of one array an input, as in the design's `.npz`.

    An array with one axis more than the model's input holds one feed a sample; a 0-d array is the
    same for all; any other has its samples on the first axis, as many a feed as the model's first
    dimension says where that is fixed (samples left over at the end are not used), else one.

    Raises:
        InputError: if arrays are missing, do not fit the model, or differ in their samples.
    """
    check_names(arrays, ports, where)
    fits = {p.name: p for p in ports}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, array in arrays.items():
        dtype, shapes[name] = spec(array, f"{where}: array {name!r}")
        if name in fits:
            check_dtype(fits[name], dtype, where)
            _check_column(fits[name], shapes[name], where)
    steps, size, left = _steps(fits, shapes, where)
    note = f"the last {left} samples do not fill the model's batch and are not used" if left else ""
    source: dict[str, Any] = {}

    def span(i: int, j: int) -> Item:
        if not source:  # what cannot be mapped is read once, when the first feed is asked for
            source.update((name, opened(array)) for name, array in arrays.items())
        feed = {name: _cut(np.asarray(source[name]), step, i, j) for name, step in steps.items()}
        return f"{where}, sample {i}" + (f" to {j - 1}" if j > i + 1 else ""), feed

    joinable = span if 0 not in steps.values() else None
    return Indexed(size, lambda i: span(i, i + 1), joinable, uniform=True, note=note)


def _check_column(port: Port, shape: tuple[int, ...], where: str) -> None:
    if port.shape is None or (not shape and not port.shape):
        return
    if _own_axis(port, shape):
        if not port.accepts(shape[1:]):
            raise InputError(shape_complaint(port, shape[1:], f"{where}, each sample"))
    else:
        rows = replace(port, shape=(None, *port.shape[1:]) if port.shape else ())
        if not rows.accepts(shape):
            raise InputError(shape_complaint(rows, shape, where))
    if shape[0] == 0:
        raise InputError(f"{where}: array {port.name!r} is empty: give it at least one sample")


def _own_axis(port: Port | None, shape: tuple[int, ...]) -> bool:
    return port is not None and port.shape is not None and len(shape) == len(port.shape) + 1


def _steps(
    ports: Mapping[str, Port], shapes: Mapping[str, tuple[int, ...]], where: str
) -> tuple[dict[str, int | None], int, int]:
    """How many rows of each array a feed takes, how many feeds there are, how many rows are left.

    None: the array is the same for all feeds. 0: an axis of its own counts the feeds.
    """
    steps: dict[str, int | None] = {}
    fixed: dict[int, int] = {}  # rows of an array whose first dimension the model fixes: that one
    for name, shape in shapes.items():
        port = ports.get(name)
        first = port.shape[0] if port is not None and port.shape else None
        if not shape:
            steps[name] = None
        elif _own_axis(port, shape):
            steps[name] = 0
        elif isinstance(first, int):
            steps[name] = fixed[shape[0]] = first
    for name, shape in shapes.items():
        steps.setdefault(name, fixed.get(shape[0], 1) if shape else None)
    counts = {(shapes[n][0] // (s or 1), s) for n, s in steps.items() if s is not None}
    rows = {s: {shapes[n][0] for n in steps if steps[n] == s} for _, s in counts}
    sizes = {count for count, _ in counts} or {1}
    if len(sizes) > 1 or any(len(lengths) > 1 for lengths in rows.values()):
        shown = ", ".join(f"{n!r} {shapes[n][0]}" for n, s in steps.items() if s is not None)
        raise InputError(f"{where}: arrays do not have equally many samples: {shown}")
    size = sizes.pop()
    if size == 0:
        need = max(step for step in fixed.values())
        raise InputError(f"{where}: the model takes {need} samples at a time, there are fewer")
    return steps, size, max((r % s for r, s in fixed.items()), default=0)


def _cut(array: Array, step: int | None, i: int, j: int) -> Array:
    if step is None:
        return array
    return array[i] if step == 0 else array[i * step : j * step]


def from_npz_folder(paths: Sequence[Path]) -> Indexed:
    """One feed an `.npz` file."""
    return Indexed(len(paths), lambda i: (str(paths[i]), stored_npz(paths[i])))


def from_test_data(folders: Sequence[Path], ports: Sequence[Port]) -> Indexed:
    """ONNX backend test data: `input_0.pb`, … in each folder, by the position of the inputs.

    The expected outputs beside them (`output_0.pb`, …) are not needed: what a rewritten model is
    held against is the original.
    """

    names = {f"input_{k}": port.name for k, port in enumerate(ports)}

    def get(i: int) -> Item:
        files = sorted(folders[i].glob("input_*.pb"))
        return str(folders[i]), {names.get(f.stem, f.stem): _tensor(f) for f in files}

    return Indexed(len(folders), get)


def _tensor(file: Path) -> Array:
    import onnx
    from google.protobuf.message import DecodeError

    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(file.read_bytes())
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise InputError(f"{file} points to another file: store its values in it")
        return onnx.numpy_helper.to_array(tensor)
    except (DecodeError, OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} is not a tensor in ONNX form, write it again: {error}") from error
