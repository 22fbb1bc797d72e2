"""What was observed of a model's values: it merges, and can be saved and loaded.

Everything kept is an integer count, an extreme or an exact sum, so merging is associative and
commutative to the bit: shards of the data may be observed anywhere, in any order.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from onnxcompress.contract import Array, Kind, Want
from onnxcompress.errors import InputError
from onnxcompress.model_io.atomic import write_file
from onnxcompress.numerics.exact_sum import GRIDS, ExactSum
from onnxcompress.numerics.histogram import RangeFreeHistogram, Unobservable, extremes
from onnxcompress.numerics.row_sample import Patches, RowSample

_SCHEMA = 1
_NO_AXIS = -1000
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class ChannelRange:
    """Extremes of each channel, float32 [n] each."""

    minimum: Array
    maximum: Array

    @classmethod
    def of(cls, channels: Array) -> ChannelRange:
        """From [m, n, k], n channels.

        Raises:
            FloatingPointError: if an element is NaN.
            Unobservable: if one is infinite.
        """
        low, high = channels.min(axis=(0, 2)) + 0.0, channels.max(axis=(0, 2)) + 0.0
        extremes(np.concatenate([low, high]))
        return cls(low, high)

    def merge(self, other: ChannelRange) -> ChannelRange:
        """Of both.

        Raises:
            Unobservable: if the numbers of channels differ.
        """
        if self.minimum.shape != other.minimum.shape:
            raise Unobservable("the number of channels changes from feed to feed")
        return ChannelRange(
            np.minimum(self.minimum, other.minimum), np.maximum(self.maximum, other.maximum)
        )


Kept = RangeFreeHistogram | ChannelRange | ExactSum | RowSample


@dataclass(frozen=True, eq=False)
class Observations:
    """The `contract.Statistics` that passes are bound to.

    `reasons` says why what was wanted could not be observed.
    """

    kept: Mapping[Want, Kept] = field(default_factory=dict[Want, Kept])
    reasons: Mapping[Want, str] = field(default_factory=dict[Want, str])

    def histogram(self, value: str) -> RangeFreeHistogram:
        """Of all elements of the value."""
        return self._find(Want(value), RangeFreeHistogram)

    def channel_range(self, value: str, axis: int) -> tuple[Array, Array]:
        """Minimum and maximum of each channel, float32 [n] each."""
        found = self._find(Want(value, Kind.CHANNEL_RANGE, axis), ChannelRange)
        return found.minimum, found.maximum

    def mean(self, value: str, axis: int) -> Array:
        """Mean of each channel, float64 [n]."""
        return self._find(Want(value, Kind.MEAN, axis), ExactSum).mean()

    def rows(self, value: str, patches: Patches) -> Array:
        """A sample of the rows that `patches` cuts out of the value, [n, K] in its own type."""
        return self._find(Want(value, Kind.ROWS, patches=patches), RowSample).rows

    def missing(self, wants: Iterable[Want]) -> list[Want]:
        """Those of `wants` not observed, or on too few feeds; `reasons` may know why."""
        feeds = {want: want.feeds or math.inf for want in self.kept}
        return [want for want in wants if feeds.get(want, 0) < (want.feeds or math.inf)]

    def merge(self, other: Observations) -> Observations:
        """Of the data of both. What either could not observe is left out."""
        reasons = dict(self.reasons)
        kept: dict[Want, Any] = dict(self.kept)
        for want, theirs in other.kept.items():
            try:
                kept[want] = kept[want].merge(theirs) if want in kept else theirs
            except Unobservable as error:
                reasons[want] = str(error)
        for want, reason in other.reasons.items():
            reasons[want] = min(reason, reasons.get(want, reason))
        order = sorted(kept.keys() - reasons.keys(), key=_key)
        return Observations({want: kept[want] for want in order}, reasons)

    def save(self, path: Path) -> None:
        """Write an npz without pickle; the file appears whole or not at all.

        Raises:
            InputError: if it cannot be written.
        """
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **_packed(self))
        try:
            write_file(path, content.getvalue())
        except OSError as error:
            raise InputError(f"cannot write the statistics {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> Observations:
        """Read what `save` wrote.

        Raises:
            InputError: if it cannot be read, or is something else or damaged.
        """
        try:
            # Without compression an entry is no larger than the file, whatever it says it is.
            with zipfile.ZipFile(path) as archive:
                if any(e.compress_type != zipfile.ZIP_STORED for e in archive.infolist()):
                    raise ValueError("compressed")
            with np.load(path, allow_pickle=False) as arrays:
                return _unpacked({name: arrays[name] for name in arrays.files})
        except OSError as error:
            raise InputError(f"cannot read the statistics {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, EOFError, MemoryError, zipfile.BadZipFile) as e:
            raise InputError(
                f"{path} does not hold statistics that this version can read: calibrate again"
            ) from e

    def _find(self, want: Want, kind: type[_T]) -> _T:
        found = self.kept.get(want)
        if not isinstance(found, kind):
            why = self.reasons.get(want, "nothing asked for it in that run")
            raise InputError(f"no {want.kind} of {want.value!r} was observed: {why}")
        return found


def _key(want: Want) -> tuple[str, str, int, str]:
    """Sorts, and is what a file holds."""
    axis = _NO_AXIS if want.axis is None else want.axis
    patches = "" if want.patches is None else json.dumps(asdict(want.patches))
    return want.value, want.kind.value, axis, patches


def _want(key: tuple[str, str, int, str]) -> Want:
    value, kind, axis, patches = key
    return Want(
        str(value),
        Kind(kind),
        None if axis == _NO_AXIS else int(axis),
        _patches(json.loads(patches)) if patches else None,
    )


def _patches(fields: Mapping[str, Any]) -> Patches:
    tuples = {k: tuple(cast(list[int], v)) for k, v in fields.items() if isinstance(v, list)}
    everything: dict[str, Any] = {**fields, **tuples}
    return Patches(**everything)


def _packed(observations: Observations) -> dict[str, Array]:
    """A few long arrays rather than several for each value, and a manifest in JSON."""
    entries: list[dict[str, Any]] = []
    parts: dict[str, list[Array]] = {name: [empty] for name, empty in _EMPTY.items()}
    for want in sorted(observations.kept, key=_key):
        found = observations.kept[want]
        entry: dict[str, Any] = {"want": _key(want)}
        if isinstance(found, RangeFreeHistogram):
            parts["buckets"].append(found.buckets)
            parts["counts"].append(found.counts)
            parts["extremes"].append(np.array([found.minimum, found.maximum]))
            entry["size"] = len(found.buckets)
        elif isinstance(found, ChannelRange):
            parts["ranges"].append(np.stack([found.minimum, found.maximum]))
            entry["size"] = len(found.minimum)
        elif isinstance(found, RowSample):
            parts["priorities"].append(found.priorities)
            parts["rows"].append(np.ascontiguousarray(found.rows).view(np.uint8).reshape(-1))
            entry |= {"size": len(found.rows), "dtype": found.rows.dtype.str}
            entry["width"] = found.rows.shape[1]
        else:
            parts["words"].append(found.words)
            entry |= {"size": found.words.shape[1], "count": found.count}
        entries.append(entry)
    reasons = [(_key(want), observations.reasons[want]) for want in observations.reasons]
    manifest = {"schema": _SCHEMA, "kept": entries, "reasons": sorted(reasons)}
    arrays = {name: np.concatenate(part, axis=-1) for name, part in parts.items()}
    return {"manifest": np.array(json.dumps(manifest)), **arrays}


_EMPTY: dict[str, Array] = {
    "buckets": np.empty(0, np.uint16),
    "counts": np.empty(0, np.int64),
    "extremes": np.empty(0, np.float64),
    "ranges": np.empty((2, 0), np.float32),
    "words": np.empty((len(GRIDS), 0), np.int64),
    "priorities": np.empty(0, np.uint64),
    "rows": np.empty(0, np.uint8),
}


def _unpacked(arrays: Mapping[str, Array]) -> Observations:
    manifest = json.loads(str(arrays["manifest"][()]))
    if manifest["schema"] != _SCHEMA:
        raise ValueError("another schema")
    parts = {name: _Reader(arrays[name], empty) for name, empty in _EMPTY.items()}
    kept: dict[Want, Kept] = {}
    for entry in manifest["kept"]:
        want = _want(entry["want"])
        kept[want] = _kept(want, entry, parts)
    reasons = {_want(key): str(reason) for key, reason in manifest["reasons"]}
    return Observations(kept, reasons)


def _kept(want: Want, entry: Mapping[str, Any], parts: Mapping[str, _Reader]) -> Kept:
    kind, size = want.kind, int(entry["size"])
    if kind is Kind.CHANNEL_RANGE:
        return ChannelRange(*parts["ranges"].take(size))
    if kind is Kind.MEAN:
        return ExactSum(parts["words"].take(size), int(entry["count"]))
    if want.patches is not None:
        dtype, width = np.dtype(str(entry["dtype"])), int(entry["width"])
        content = parts["rows"].take(size * width * dtype.itemsize)
        rows = content.view(dtype).reshape(size, width)
        return RowSample(parts["priorities"].take(size), rows, want.patches.rows)
    buckets, counts = parts["buckets"].take(size), parts["counts"].take(size)
    minimum, maximum = (float(x) for x in parts["extremes"].take(2))
    ascending = bool(np.all(buckets[1:] > buckets[:-1]) and np.all(counts > 0))
    if not ascending or (size and not -np.inf < minimum <= maximum < np.inf):
        raise ValueError("not a histogram")
    return RangeFreeHistogram(buckets, counts, minimum, maximum)


class _Reader:
    """Takes pieces off the front of an array's last axis."""

    def __init__(self, array: Array, like: Array) -> None:
        if array.dtype != like.dtype or array.shape[:-1] != like.shape[:-1]:
            raise ValueError("not the array that was saved")
        self._rest = array

    def take(self, size: int) -> Array:
        if not 0 <= size <= self._rest.shape[-1]:
            raise ValueError("cut short")
        taken, self._rest = np.split(self._rest, [size], axis=-1)
        return taken


def merge_all(shards: Sequence[Observations]) -> Observations:
    """Of the data of all shards."""
    merged = Observations()
    for shard in shards:
        merged = merged.merge(shard)
    return merged
