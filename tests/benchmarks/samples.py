"""Samples in an npz as feeds of batch 1, read the same way for every tool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Feed = dict[str, Any]


def feeds(path: Path, ranks: Mapping[str, int]) -> Iterator[Feed]:
    """One feed for each sample of the arrays in `path`.

    An array with one axis more than the model's input gives its samples without that axis; one of
    as many axes is cut into batches of 1; a 0-d array is the same for all samples.

    Args:
        ranks: the number of axes of each input of the model.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays: Feed = {name: file[name] for name in ranks}
    for index in range(max(len(a) for a in arrays.values() if a.ndim)):
        yield {name: _sample(a, index, ranks[name]) for name, a in arrays.items()}


def _sample(array: Any, index: int, rank: int) -> Any:
    if not array.ndim:
        return array
    return array[index] if array.ndim > rank else array[index : index + 1]


def cut(source: Path, target: Path, part: slice) -> Path:
    """Write that part of the samples of `source`."""
    with np.load(source, allow_pickle=False) as file:
        arrays: Feed = {name: file[name] for name in file.files}
    np.savez(target, **{name: a[part] if a.ndim else a for name, a in arrays.items()})
    return target
