"""Data in training: samples found by number, and what the losses hold outputs against beside them.

Arrays have their samples on the first axis. Those of an uncompressed `.npz` stay in the file; a
batch is gathered into buffers that are used again, a stretch of samples is a view.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from onnxcompress.contract import Array
from onnxcompress.data import Data, Images, Port, open_data
from onnxcompress.data import batchable as _batchable
from onnxcompress.data.arrays import StoredArray, opened, stored_npz
from onnxcompress.data.sources import from_columns
from onnxcompress.errors import InputError
from onnxcompress.train.parameters import aligned

LABELS: Final = "labels"
"""The array of classes beside a model's inputs."""
TARGET: Final = "target"
"""The array of values beside them."""
_ENOUGH = 64
"""Samples whose content tells data sets apart."""
_READ = 256


class Samples:
    """Arrays with one element a sample along the first axis; those without axes are of all."""

    def __init__(self, arrays: Mapping[str, Any], where: str) -> None:
        self._arrays, self.where = dict(arrays), where
        sizes = {n: np.shape(a)[0] for n, a in arrays.items() if np.shape(a)}
        if len(set(sizes.values())) > 1:
            shown = ", ".join(f"{name!r} {size}" for name, size in sizes.items())
            raise InputError(f"{where}: arrays do not have equally many samples: {shown}")
        self.size = next(iter(sizes.values()), 1)
        self._buffers: dict[str, Array] = {}

    def take(self, indices: Array) -> dict[str, Array]:
        """These samples, in arrays that the next call writes over."""
        return {name: self._gather(name, array, indices) for name, array in self._arrays.items()}

    def stretches(self, size: int, *, whole: bool = False) -> Iterator[dict[str, Array]]:
        """All samples in order, `size` at a time; with `whole`, none where fewer are left."""
        last = self.size - self.size % size if whole else self.size
        for start in range(0, last, size):
            yield {
                name: array[start : start + size] if (array := np.asarray(held)).ndim else array
                for name, held in self._arrays.items()
            }

    @property
    def digest(self) -> str:
        """Of names, types, shapes and some of the samples."""
        found = hashlib.sha256()
        spread = np.unique(np.linspace(0, self.size - 1, min(self.size, _ENOUGH)).astype(int))
        for name, held in sorted(self._arrays.items()):
            array = np.asarray(held)
            found.update(f"{name} {array.dtype} {array.shape}".encode())
            found.update((array[spread] if array.ndim else array).tobytes())
        return found.hexdigest()

    def _gather(self, name: str, held: Any, indices: Array) -> Array:
        array = np.asarray(held)
        if not array.ndim:
            return array
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < len(indices):
            buffer = self._buffers[name] = aligned((len(indices), *array.shape[1:]), array.dtype)
        found = buffer[: len(indices)]
        np.take(array, indices, axis=0, out=found, mode="clip")  # which needs no buffer between
        return found


def open_samples(
    source: Any,
    ports: Sequence[Port],
    extras: Sequence[str],
    *,
    images: Images | None = None,
    where: str = "the training data",
) -> Samples:
    """Open data for a model's inputs and the arrays that losses read beside them.

    Args:
        source: a mapping of arrays or an `.npz`, with the arrays named `extras` among them; or
            anything else that `onnxcompress.data` opens, which is read into memory and can have
            `labels` alone beside the inputs.
        where: what complaints about a mapping call it.

    Raises:
        InputError: if arrays are missing, do not suit the model, or differ in their samples.
    """
    if not _batchable(ports) and fixed_batch(ports) is None:
        shown = ", ".join(f"{port.name!r} {port.describe()}" for port in ports)
        raise InputError(f"the model cannot be trained in batches: its inputs {shown} have no "
                         "first axis for the samples in common")  # fmt: skip
    if (stored := from_npz(source)) is not None:
        arrays, where = stored, str(Path(source))
    elif isinstance(source, Mapping):
        arrays = cast("Mapping[str, Any]", source)
    else:
        arrays, where = _read_all(open_data(source, ports, images=images))
    for missing in (name for name in extras if name not in arrays):
        raise InputError(f"{where} has no array {missing!r}, which a loss reads")
    own = {p.name: arrays[p.name] for p in ports if p.name in arrays}
    from_columns(own, ports, where)
    columns = {p.name: _rows(p, own[p.name]) for p in ports}
    return Samples(columns | {name: opened(arrays[name]) for name in extras}, where)


def from_npz(source: Any) -> dict[str, StoredArray] | None:
    """The arrays of an `.npz`, where they lie; None where the source is something else."""
    path = Path(source) if isinstance(source, str | Path) else None
    if path is None or path.suffix.lower() != ".npz" or not path.is_file():
        return None
    return stored_npz(path)


def fixed_batch(ports: Sequence[Port]) -> int | None:
    """The samples that the model takes at a time; None where it leaves that free.

    Raises:
        InputError: if its inputs differ in it.
    """
    sizes = {port.shape[0] for port in ports if port.shape}
    fixed = {size for size in sizes if isinstance(size, int)}
    if fixed and len(sizes) > 1:
        raise InputError("the first dimensions of the model's inputs are not the same")
    return next(iter(fixed), None)


def _rows(port: Port, held: Any) -> Any:
    """An array whose first axis counts feeds, as one whose first axis counts samples."""
    held = opened(held)
    if port.shape is not None and len(held.shape) == len(port.shape) + 1:
        array = np.asarray(held)
        return array.reshape(-1, *array.shape[2:])
    return held


def _read_all(data: Data) -> tuple[dict[str, Any], str]:
    feeds, labels = list(data.batches(_READ)), data.labels
    names = feeds[0] if feeds else {}
    arrays = {
        n: np.concatenate([feed[n] for feed in feeds]) if feeds[0][n].ndim else feeds[0][n]
        for n in names
    }
    return arrays | ({} if labels is None else {LABELS: labels}), data.where


def names_of_floats(arrays: Mapping[str, Array]) -> list[str]:
    """Arrays of floating point that have samples, but labels."""
    return [n for n, a in arrays.items() if n != LABELS and a.ndim and a.dtype.kind == "f"]
