"""Checkpoints: files that training goes on from after it was killed, with the same bits to come.

An uncompressed `.npz`, written beside its name and renamed: the arrays of `Step.state`, the best
weights so far, and a JSON text of where in the run it was. Random draws follow from the seed, the
epoch and the batch, so that is their state too.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import onnx_ir as ir
from numpy.lib import format as npy

from onnxcompress.contract import Array
from onnxcompress.data.arrays import stored_npz
from onnxcompress.errors import InputError
from onnxcompress.model_io.atomic import Draft, publish
from onnxcompress.train.history import History

_SCHEMA: Final = 1
_POSITION: Final = "position"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a run is."""

    setup: Mapping[str, str]
    """Digests of what makes the run what it is, by what they are of."""
    epoch: int
    """Whole epochs done."""
    batch: int
    """Batches of the next one done."""
    tally: Mapping[str, Any]
    """Figures of these batches."""
    history: History
    state: Mapping[str, Array]
    best: Array | None


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write it whole or not at all.

    Raises:
        InputError: if it cannot be written there.
    """
    position = {
        "schema": _SCHEMA,
        "setup": dict(checkpoint.setup),
        "epoch": checkpoint.epoch,
        "batch": checkpoint.batch,
        "tally": dict(checkpoint.tally),
        "history": asdict(checkpoint.history),
    }
    arrays = {f"state.{name}": array for name, array in checkpoint.state.items()}
    if checkpoint.best is not None:
        arrays["best"] = checkpoint.best
    arrays[_POSITION] = np.frombuffer(json.dumps(position).encode(), np.uint8)
    try:
        _write(path, arrays)
    except OSError as error:
        raise InputError(f"the checkpoint {path} cannot be written: {error}") from error


def load(path: Path, setup: Mapping[str, str]) -> Checkpoint | None:
    """The checkpoint at `path`; None where there is none yet.

    Raises:
        InputError: if it is no checkpoint, or one of a run that was set up in another way.
    """
    if not path.exists():
        return None
    arrays = {name: np.asarray(array) for name, array in stored_npz(path).items()}
    try:
        position = json.loads(arrays.pop(_POSITION).tobytes())
        if position["schema"] != _SCHEMA:
            raise InputError(f"{path} is a checkpoint of another version: remove it to start anew")
        found = Checkpoint(
            setup=position["setup"],
            epoch=position["epoch"],
            batch=position["batch"],
            tally=position["tally"],
            history=History.of(position["history"]),
            best=arrays.pop("best", None),
            state={name.removeprefix("state."): array for name, array in arrays.items()},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no checkpoint: remove it or name another file") from error
    other = [name for name, digest in setup.items() if found.setup.get(name) != digest]
    if other:
        raise InputError(
            f"{path} is the checkpoint of another run, whose {' and '.join(other)} "
            f"{'were' if len(other) > 1 or other[0].endswith('s') else 'was'} not the same: "
            "remove it to start anew, or name another file"
        )
    return found


def digest(*parts: object) -> str:
    """Of numbers, texts, arrays, and data classes of these, by what they say of themselves."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            array = cast(Array, part)
            found.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
        else:
            found.update(_spelled(part).encode())
        found.update(b"\0")
    return found.hexdigest()


def model_digest(model: ir.Model) -> str:
    """Of the nodes and weights of a model's main graph."""
    found = hashlib.sha256()
    for node in model.graph:
        names = [v.name if v else "" for v in (*node.inputs, *node.outputs)]
        attributes = sorted((n, str(a.value)) for n, a in node.attributes.items())
        found.update(repr((node.domain, node.op_type, names, attributes)).encode())
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None:
            found.update(repr((name, str(tensor.dtype), tuple(tensor.shape.numpy()))).encode())
            found.update(tensor.tobytes())
    return found.hexdigest()


def _spelled(part: object) -> str:
    """Its text, without what differs from one process to the next."""
    if isinstance(part, list | tuple):
        return f"[{', '.join(map(_spelled, cast('Sequence[object]', part)))}]"
    if hasattr(part, "__code__") or type(part).__repr__ is object.__repr__:
        return f"{type(part).__qualname__} {getattr(part, '__qualname__', '')}"
    return repr(part)


class _Stream(io.RawIOBase):
    """A draft as a file that is written from its beginning to its end."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        self._draft.write(view)
        return len(view)


def _write(path: Path, arrays: Mapping[str, Array]) -> None:
    with Draft(path.parent) as draft:
        with zipfile.ZipFile(_Stream(draft), "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    npy.write_array(member, np.asarray(array), allow_pickle=False)
        publish({path: draft})
