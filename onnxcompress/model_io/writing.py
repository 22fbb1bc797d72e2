"""Writes models: whole or not at all, tensor by tensor, the data before the model."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx
import onnx_ir as ir
from onnx.external_data_helper import ExternalDataInfo
from onnx.serialization import registry as _formats

from onnxcompress.errors import InputError, OnnxCompressError
from onnxcompress.garbage import rarely_collected
from onnxcompress.model_io import tensors, wire
from onnxcompress.model_io.atomic import Draft, locked, sync
from onnxcompress.model_io.mapped import MappedFile
from onnxcompress.model_io.reading import TYPE, is_text

INLINE_LIMIT = 1_800_000_000
"""Bytes of weights from which they go to a data file: protobuf readers stop at 2 GiB."""

_IN_DATA = 1 << 10  # bytes from which a weight goes to the data file, if there is one
_ALIGNMENT = 64  # of weights in the data file
_PLACEHOLDER = "onnxcompress:tensor:"

Tensor = ir.TensorProtocol


@dataclass(frozen=True, slots=True)
class SavedFiles:
    """What `save` wrote: the model, its data file where it needed one, and their bytes in sum."""

    model: Path
    data: Path | None
    size: int


def check_writable(path: str | os.PathLike[str]) -> None:
    """Fail before the work rather than after it.

    Raises:
        InputError: if a model cannot be written at `path`: no such folder, a folder itself, not
            permitted, or a suffix of one of ONNX's text forms.
    """
    _target(Path(path))


def save(model: ir.Model, path: str | os.PathLike[str]) -> SavedFiles:
    """Write a model to `path`; until it is there whole, what was there before stays.

    Weights below `INLINE_LIMIT` bytes in sum go into the `.onnx`; above, those of 1 KiB and more
    go to `<stem>.<digest>.data` beside it. They are written one at a time, lazy ones evaluated
    and dropped, and the model stays usable, also after writing over the files that it came from.
    Equal models give equal bytes.

    Raises:
        InputError: if it cannot be written there, or the disk is full.
    """
    path = Path(path)
    target = _target(path)
    with _writing(path), rarely_collected(), ExitStack() as stack:
        draft = _Draft(stack.enter_context(Draft(target.parent)))
        data = None
        if sum(tensor.nbytes for tensor, _ in tensors.slots(model)) < INLINE_LIMIT:
            _write_inline(model, draft)
        else:
            data = _DataDraft(stack.enter_context(Draft(target.parent)), target.stem)
            _write_beside(model, draft, data)
        return _publish(target, draft, data)


class _Draft:
    """A file in the making that counts what is written to it."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.size = 0

    def write(self, data: bytes) -> None:
        self.draft.write(data)
        self.size += len(data)

    def put(self, tensor: Tensor) -> None:
        end = self.size + tensor.nbytes
        tofile: Any = getattr(tensor, "tofile", None)  # not every implementation has it
        if tofile is None:
            self.write(tensor.tobytes())
        else:
            tofile(self)
        if self.size != end:
            raise OnnxCompressError(
                f"tensor {tensor.name!r} evaluated to {self.size - end:+} bytes of what it declared"
            )


class _DataDraft(_Draft):
    """A data file in the making, to be named by its content."""

    def __init__(self, draft: Draft, stem: str) -> None:
        super().__init__(draft)
        self._stem = stem
        self._digest = hashlib.blake2b(digest_size=8)

    def write(self, data: bytes) -> None:
        super().write(data)
        self._digest.update(data)

    @property
    def name(self) -> str:
        return f"{self._stem}.{self._digest.hexdigest()}.data"


class _Payload:
    """A tensor's bytes as a chunk of the file."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._nbytes = tensor.nbytes

    def __len__(self) -> int:
        return self._nbytes


def _write_inline(model: ir.Model, draft: _Draft) -> None:
    payloads: list[Tensor] = []

    def stand_in(tensor: Tensor) -> Tensor:
        payloads.append(tensor)
        return _reference(tensor, f"{_PLACEHOLDER}{len(payloads) - 1}", 0)

    def fill(data: wire.Buffer, start: int, end: int) -> list[bytes | _Payload]:
        tensor = onnx.TensorProto.FromString(data[start:end])
        payload = payloads[int(ExternalDataInfo(tensor).location.removeprefix(_PLACEHOLDER))]
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        raw = wire.header(wire.RAW_DATA, payload.nbytes)
        return [tensor.SerializeToString(), raw, _Payload(payload)]

    skeleton = _serialize(model, wire.STREAMED, stand_in)
    wanted = wire.holds(_PLACEHOLDER.encode())
    for chunk in wire.rewrite(skeleton, 0, len(skeleton), wanted=wanted, edit=fill):
        if isinstance(chunk, _Payload):
            draft.put(chunk.tensor)
        else:
            draft.write(chunk)


def _write_beside(model: ir.Model, draft: _Draft, data: _DataDraft) -> None:
    offsets: dict[int, int] = {}  # by identity: a shared tensor is written once
    for tensor, _ in tensors.slots(model):
        if _streamed(tensor, _IN_DATA) and id(tensor) not in offsets:
            data.write(bytes(-data.size % _ALIGNMENT))
            offsets[id(tensor)] = data.size
            data.put(tensor)
    name = data.name
    draft.write(_serialize(model, _IN_DATA, lambda t: _reference(t, name, offsets[id(t)])))


def _streamed(tensor: Tensor, least: int) -> bool:
    large = tensor.nbytes >= least and tensor.dtype != ir.DataType.STRING
    return large or isinstance(tensor, ir.ExternalTensor)


def _reference(tensor: Tensor, location: str, offset: int) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _serialize(model: ir.Model, least: int, stand_in: Callable[[Tensor], Tensor]) -> bytes:
    """The model's bytes with stand-ins for tensors of `least` bytes; the model is as before."""
    with ExitStack() as restore:
        for tensor, put in tensors.slots(model):
            if _streamed(tensor, least):
                restore.callback(put, tensor)
                put(stand_in(tensor))
        proto = ir.to_proto(model)
        _drop_described_twice(proto.graph)
        values = (*model.graph.inputs, *model.graph.outputs)
        for info, value in zip((*proto.graph.input, *proto.graph.output), values, strict=True):
            if TYPE in value.meta:
                info.type.CopyFrom(cast("onnx.TypeProto", value.meta[TYPE]))
        return proto.SerializeToString(deterministic=True)


def _drop_described_twice(graph: onnx.GraphProto) -> None:
    """Remove what `value_info` says of initializers, which say it themselves."""
    own = {initializer.name for initializer in graph.initializer}
    kept = [info for info in graph.value_info if info.name not in own]
    if len(kept) < len(graph.value_info):
        del graph.value_info[:]
        graph.value_info.extend(kept)


def _publish(target: Path, draft: _Draft, data: _DataDraft | None) -> SavedFiles:
    """Name the files, data before model, and remove the data of the generation before."""
    folder = target.parent
    for each in (data, draft):
        if each is not None:
            each.draft.flush()
    with locked(folder):
        if data is not None:
            data.draft.publish(folder / data.name)
            sync(folder)
        draft.draft.publish(target)
        sync(folder)
        with suppress(OSError):  # an unreadable neighbour: what it may refer to stays
            for stale in _stale_data(target, data.name if data else ""):
                stale.unlink()
    size = draft.size + (data.size if data else 0)
    return SavedFiles(target, folder / data.name if data else None, size)


def _stale_data(target: Path, current: str) -> Iterator[Path]:
    """Data files of earlier generations of `target` that no model in the folder refers to."""
    ours = re.compile(re.escape(target.stem) + r"\.[0-9a-f]{16}\.data")
    entries = list(target.parent.iterdir())
    stale = [p for p in entries if ours.fullmatch(p.name) and p.name != current]
    if not stale:
        return
    models = [p for p in entries if _formats.get_format_from_file_extension(p.suffix)]
    contents = [MappedFile(p).buffer for p in models if p.is_file()]
    for path in stale:
        if all(content.find(path.name.encode()) < 0 for content in contents):
            yield path


def _target(path: Path) -> Path:
    """The file that `path` names, through links, if a model can be written there."""
    target = Path(os.path.realpath(path))
    folder = target.parent
    if is_text(path):
        problem = f"{path.suffix} is one of ONNX's text forms: use the suffix .onnx"
    elif target.is_dir():
        problem = "it is a folder: name a file in it"
    elif not folder.is_dir():
        problem = f"there is no folder {folder}: create it"
    elif target.exists() and not target.is_file():
        problem = "it is not a regular file: choose another name"
    elif target.exists() and not os.access(target, os.W_OK):
        problem = "the file is read-only: choose another name or change its mode"
    elif not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        problem = f"the folder {folder} is read-only: choose another"
    else:
        return target
    raise InputError(f"cannot write {path}: {problem}")


@contextmanager
def _writing(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({(error.strerror or str(error)).lower()}): nothing was changed, "
            "make room or choose another folder"
        ) from error
