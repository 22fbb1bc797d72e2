"""Data: an iterable of feeds for a model, from files, folders, readers or any Python iterable.

Names, dtypes and shapes are checked when the data is opened; values are read, converted and
checked for NaN feed by feed, so no more than one batch of the data set is in memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np

from onnxcompress.contract import Array
from onnxcompress.data.arrays import stored_npy, stored_npz
from onnxcompress.data.images import SUFFIXES, Images, photos
from onnxcompress.data.ports import Feed, Port, check, conversions, convert, interface
from onnxcompress.data.sources import (
    Indexed,
    Item,
    Once,
    Source,
    Stream,
    from_columns,
    from_list,
    from_npz_folder,
    from_test_data,
    pick,
)
from onnxcompress.errors import DataError, InputError
from onnxcompress.plugins import load_plugin, plugins

__all__ = ["Data", "Feed", "Images", "Port", "interface", "open_data"]


@dataclass(frozen=True)
class Data:
    """Feeds of a model, checked, in a fixed order; iterate as often as you like.

    Attributes:
        notes: what is done to the data on the way, a sentence each, for the report.
    """

    source: Source
    ports: tuple[Port, ...]
    where: str
    notes: tuple[str, ...] = ()
    start: int = 0
    stop: int | None = None

    def __iter__(self) -> Iterator[Feed]:
        """Feeds by input name, in the model's dtypes and ranks.

        Raises:
            DataError: for NaN, infinity, an integer out of range, or a source that fails.
        """
        items = self._items()
        while True:
            with _of_the_data():
                item = next(items, None)
                if item is None:
                    return
                feed = self._feed(item)
            yield feed

    @property
    def size(self) -> int | None:
        """How many feeds there are; None where only reading the source tells."""
        if self.source.size is None:
            return None
        stop = self.source.size if self.stop is None else min(self.stop, self.source.size)
        return max(0, stop - self.start)

    def __len__(self) -> int:
        if self.size is None:
            raise TypeError(f"the length of {self.where} is not known before it is read")
        return self.size

    def __bool__(self) -> bool:
        return True

    @property
    def labels(self) -> Array | None:
        """The target of every sample, in the feeds' order; None where the source has none."""
        if any(port.name == "labels" for port in self.ports):
            return None
        first = next(self._items(), None)
        if first is None or "labels" not in first[1]:
            return None
        if isinstance(self.source, Indexed) and self.source.span is not None:
            return _labels(*self.source.span(self.start, self.start + len(self)))
        return np.concatenate([_labels(where, raw) for where, raw in self._items()])

    def batches(self, n: int) -> Iterator[Feed]:
        """Feeds joined along the first axis, up to `n` samples each.

        Only where every input has a free first dimension (or is the same 0-d value); feeds of
        different shapes stay apart. Elsewhere it gives the feeds as they are.
        """
        if n <= 1 or not batchable(self.ports):
            return iter(self)
        if isinstance(self.source, Indexed) and self.source.span is not None:
            return self._spans(self.source.span, n)
        return _joined(self, n, {p.name for p in self.ports if p.shape})

    def _spans(self, span: Callable[[int, int], Item], n: int) -> Iterator[Feed]:
        stop = self.start + len(self)
        for i in range(self.start, stop, n):
            with _of_the_data():
                where, raw = span(i, min(i + n, stop))
                feed = convert(raw, self.ports, where)
            yield feed

    def first(self, n: int) -> Data:
        """The first `n` feeds."""
        end = self.start + n
        return replace(self, stop=end if self.stop is None else min(end, self.stop))

    def spread(self, n: int) -> Data:
        """`n` feeds evenly from the whole, for a source may be sorted; the first where it streams.

        All of them if there are no more than `n`.
        """
        if self.size is None or not isinstance(self.source, Indexed):
            return self.first(n)
        if n >= self.size:
            return self
        get, start, size = self.source.get, self.start, self.size

        def at(i: int) -> Item:
            return get(start + i * size // n)

        source = replace(self.source, size=n, get=at, span=None)
        return replace(self, source=source, start=0, stop=None)

    def picked(
        self,
        numbers: Sequence[int],
        notes: tuple[str, ...] = (),
        change: Callable[[Feed], Feed] | None = None,
    ) -> Data:
        """The feeds of these rising numbers, each changed by `change`, with more notes."""
        picked = pick(self.source, [self.start + i for i in numbers], change)
        return replace(self, source=picked, start=0, stop=None, notes=(*self.notes, *notes))

    def unchecked(self) -> Iterator[Feed]:
        """Inputs by name as `__iter__` gives them, but NaN and infinity too."""
        return (self._feed(item, finite=False) for item in self._items())

    def split(self, fraction: float = 0.2) -> tuple[Data, Data]:
        """The data without its last `fraction`, and that part held out.

        Raises:
            InputError: if there are fewer than two feeds, so that nothing could be held out.
        """
        size = sum(1 for _ in self._items()) if self.size is None else self.size
        if size < 2:
            raise InputError(
                f"{self.where} has one feed, none can be held out: give more, or other data to "
                "compare on"
            )
        middle = self.start + size - min(size - 1, max(1, round(size * fraction)))
        return replace(self, stop=middle), replace(self, start=middle, stop=self.start + size)

    def _feed(self, item: Item, *, finite: bool = True) -> Feed:
        where, raw = item
        if not self.source.uniform:
            check(raw, self.ports, where)
        return convert(raw, self.ports, where, finite=finite)

    def _items(self) -> Iterator[Item]:
        return self.source.items(self.start, self.stop)


@contextmanager
def _of_the_data() -> Generator[None]:
    try:
        yield
    except InputError as error:
        raise DataError(str(error)) from error


def batchable(ports: Iterable[Port]) -> bool:
    """Whether feeds may be joined along the first axis.

    Every input that has axes must leave its first free; names of first dimensions must agree and
    occur nowhere else, else the axis means something other than the batch.
    """
    shapes = [port.shape for port in ports]
    if any(s is None or (s and isinstance(s[0], int)) for s in shapes) or not any(shapes):
        return False
    firsts = {s[0] for s in shapes if s and s[0] is not None}
    others = {d for s in shapes if s for d in s[1:]}
    return len(firsts) <= 1 and not firsts & others


def _joined(feeds: Iterable[Feed], n: int, names: set[str]) -> Iterator[Feed]:
    """Runs of feeds that differ in the first axis of `names` alone, joined up to `n` rows."""
    held: list[Feed] = []
    rows = 0
    for feed in feeds:
        count = min(len(feed[name]) for name in names)
        if held and (rows + count > n or not _alike(held[0], feed, names)):
            yield _join(held, names)
            held, rows = [], 0
        held.append(feed)
        rows += count
    if held:
        yield _join(held, names)


def _alike(a: Feed, b: Feed, names: set[str]) -> bool:
    return all(a[k].shape[1:] == b[k].shape[1:] if k in names else bool(a[k] == b[k]) for k in a)


def _join(feeds: list[Feed], names: set[str]) -> Feed:
    if len(feeds) == 1:
        return feeds[0]
    return {k: np.concatenate([f[k] for f in feeds]) if k in names else v
            for k, v in feeds[0].items()}  # fmt: skip


def _labels(where: str, raw: Mapping[str, Any]) -> Array:
    if "labels" not in raw:
        raise InputError(f"{where} has no 'labels' but the first feed has: give all feeds labels")
    return np.atleast_1d(np.asarray(raw["labels"]))


def open_data(
    source: Any, ports: Sequence[Port], *, images: Images | None = None, finite: bool = True
) -> Data:
    """Open a source of feeds for a model's inputs (`interface(model)`).

    Args:
        source: a path (`.npz`, `.npy`, a folder of `.npz`, of images, or of ONNX
            `test_data_set_*`), `module:callable`, `file.py:callable`, `plugin:rest` for an entry
            point of the group `onnxcompress.data` (called with the rest and the ports), a dict of
            arrays as in an `.npz`, an ONNX Runtime CalibrationDataReader, a list or other iterable
            of feeds, or a callable that returns one of these.
        images: how an image becomes the input; needed for a folder of images.
        finite: refuse at once what begins with NaN or infinity; False where it will be cleaned.

    Raises:
        InputError: if it does not exist, cannot be read, or does not suit the model.
    """
    if isinstance(source, Data):
        return source
    ports = tuple(ports)
    opened, where = _open(source, ports, images)
    first = next(opened.items(0, 1), None)
    if first is None:
        raise InputError(f"{where} is empty: give at least one feed")
    place, raw = first
    check(raw, ports, place)
    convert(raw, ports, place, finite=finite)
    if opened.size is not None and not opened.uniform:
        for place, raw in opened.items(1, None):
            check(raw, ports, place)
    notes = [*conversions(first[1], ports, first[0]), *([opened.note] if opened.note else [])]
    return Data(opened, ports, where, tuple(f"{where}: {note}" for note in notes))


def _open(source: Any, ports: tuple[Port, ...], images: Images | None) -> tuple[Source, str]:
    if isinstance(source, str | Path):
        path = Path(source)
        if os.path.lexists(path):
            try:
                return _open_path(path, ports, images), str(path)
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error}") from error
        if isinstance(source, str) and ":" in source:
            return _from_object(_named_callable(source, ports), ports, source), source
        raise InputError(
            f"{str(source)[:200]} does not exist: give data as a path or 'module:callable'"
        )
    where = getattr(source, "__qualname__", type(source).__name__)
    return _from_object(source, ports, where), where


def _open_path(path: Path, ports: tuple[Port, ...], images: Images | None) -> Source:
    if path.is_dir():
        return _open_folder(path, ports, images)
    if path.suffix.lower() == ".npz":
        return from_columns(stored_npz(path), ports, str(path))
    if path.suffix.lower() == ".npy":
        if len(ports) != 1:
            raise InputError(f"{path} is one array but the model has {len(ports)} inputs: use .npz")
        return from_columns({ports[0].name: stored_npy(path)}, ports, str(path))
    raise InputError(f"{path} is neither .npz, .npy nor a folder: convert the data to .npz")


def _open_folder(path: Path, ports: tuple[Port, ...], images: Images | None) -> Source:
    sets = sorted(p for p in path.glob("test_data_set_*") if p.is_dir())
    if (path / "input_0.pb").exists():
        sets = [path]
    if sets:
        return from_test_data(sorted(sets, key=_set_number), ports)
    if feeds := sorted(path.glob("*.npz")):
        return from_npz_folder(feeds)
    if any(p.suffix.lower() in SUFFIXES for p in path.rglob("*")):
        return _open_images(path, ports, images)
    raise InputError(f"{path} holds no .npz, images or test_data_set_* folders")


def _set_number(path: Path) -> tuple[int, str]:
    number = path.name.rpartition("_")[2]
    return (int(number) if number.isdecimal() else 0, path.name)


def _open_images(path: Path, ports: tuple[Port, ...], images: Images | None) -> Source:
    if len(ports) != 1:
        raise InputError(f"{path} holds images but the model has {len(ports)} inputs: use .npz")
    if images is None:
        raise InputError(
            f"{path} holds images: tell how pixels become the input, such as "
            "mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]"
        )
    feeds, left = photos(path, ports[0], images)
    note = f"the last {left} images do not fill the model's batch and are not used" if left else ""
    return Indexed(len(feeds), feeds.__getitem__, uniform=True, note=note)


def _from_object(source: Any, ports: tuple[Port, ...], where: str) -> Source:
    if isinstance(source, Mapping):
        return from_columns(cast("Mapping[str, Any]", source), ports, where)
    if hasattr(source, "get_next"):
        return Once(partial(_read, source), where, ports)
    if isinstance(source, Sequence):
        return from_list(cast("Sequence[Any]", source), where, ports)
    if isinstance(source, Iterator):
        return Once(lambda: cast("Iterator[Any]", source), where, ports)
    if isinstance(source, Iterable):
        return Stream(lambda: cast("Iterable[Any]", source), where, ports)
    if callable(source):
        return _from_call(source, ports, where)
    raise InputError(f"{where} is no data: give a path, an iterable of feeds or a callable")


def _read(reader: Any) -> Iterator[Any]:
    """The feeds of an ONNX Runtime CalibrationDataReader."""
    while (feed := reader.get_next()) is not None:
        yield feed


def _from_call(call: Callable[[], Any], ports: tuple[Port, ...], where: str) -> Source:
    """A callable's feeds: it is called again for each reading if what it returns is used up."""
    result = _call(call, where)
    if not isinstance(result, Iterator):
        return _from_object(result, ports, where)
    waiting = [cast("Iterator[Any]", result)]
    return Stream(lambda: waiting.pop() if waiting else _call(call, where), where, ports)


def _call(call: Callable[..., Any], where: str, *args: Any) -> Any:
    try:
        return call(*args)
    except Exception as error:
        raise InputError(f"{where} failed: {type(error).__name__}: {error}") from error


def _named_callable(name: str, ports: tuple[Port, ...]) -> Any:
    """What `plugin:rest`, `module:callable` or `file.py:callable` stands for."""
    module, _, attribute = name.rpartition(":")
    prefix, _, rest = name.partition(":")
    if point := plugins("onnxcompress.data").get(prefix):
        return _call(load_plugin(point), name, rest, ports)
    found = _import(module, name)
    if not hasattr(found, attribute):
        raise InputError(f"{name}: {module} has no {attribute!r}")
    return getattr(found, attribute)


def _import(module: str, where: str) -> ModuleType:
    if not module.endswith(".py"):
        return _call(importlib.import_module, where, module)
    spec = importlib.util.spec_from_file_location(f"onnxcompress_data_{Path(module).stem}", module)
    if not Path(module).is_file() or spec is None or spec.loader is None:
        raise InputError(f"{where}: {module} does not exist")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses and pickling look a module up by its name
    _call(spec.loader.exec_module, where, loaded)
    return loaded
