"""Load and save models: the one place that touches a model's path.

A model from outside is not trusted: sizes are checked against the file before anything is
allocated, and references to data stay within the model's folder. Its weights stay in the file,
mapped, whether they lie in the `.onnx` itself or beside it. A model is written as a whole or not
at all, tensor by tensor; `docs/decisions/saving.md` says how and why.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import onnx
import onnx_ir as ir
from onnx.external_data_helper import ExternalDataInfo
from onnx.serialization import registry as _formats

from onnxcompress.errors import InputError, OnnxCompressError
from onnxcompress.garbage import rarely_collected
from onnxcompress.graph import names
from onnxcompress.model_io import tensors, wire
from onnxcompress.model_io.atomic import Draft, locked, sync
from onnxcompress.model_io.mapped import MappedFile

INLINE_LIMIT = 1_800_000_000
"""Bytes of weights from which they go to a data file: protobuf readers stop at 2 GiB."""

_STREAMED = 1 << 16  # bytes from which a weight is not parsed with the graph
_IN_DATA = 1 << 10  # bytes from which a weight goes to the data file, if there is one
_ALIGNMENT = 64  # of weights in the data file
_OLDEST_IR_VERSION = 3
_TYPE = "onnxcompress:type"
_PLACEHOLDER = "onnxcompress:tensor:"

Tensor = ir.TensorProtocol


@dataclass(frozen=True, slots=True)
class SavedFiles:
    """What `save` wrote: the model, its data file where it needed one, and their bytes in sum."""

    model: Path
    data: Path | None
    size: int


def load(path: str | os.PathLike[str]) -> ir.Model:
    """The model in an ONNX file, its weights mapped, every value with a name of its own.

    Reads the binary form and, by suffix, ONNX's text forms. Values inside subgraphs are renamed
    where their name occurs elsewhere too; names in the main graph stay. Sparse initializers
    become dense ones, computed when needed; training information is dropped.

    Raises:
        InputError: if the file is missing, is not a whole ONNX model of IR version 3 or later,
            refers to data outside its folder or beyond a file's end, or declares a tensor whose
            size its data does not have.
    """
    path = Path(path)
    with _reading(path), rarely_collected():
        proto, file = _parse(path)
        sparse = tensors.take_sparse(proto.graph)
        maps = _take_map_types(proto.graph)
        model = ir.from_proto(proto)
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.name in maps:
                value.meta[_TYPE] = maps[value.name]
        data = tensors.Source(path, file, sparse)
        for tensor, put in tensors.slots(model):
            found = data.resolve(tensor)
            if found is not tensor:
                put(found)
        names.make_unique(model)
    opsets = model.opset_imports
    if "ai.onnx" in opsets:  # the other spelling of the default domain
        opsets.setdefault("", opsets.pop("ai.onnx"))
    return model


def size_on_disk(path: str | os.PathLike[str]) -> int:
    """Bytes of a model's file and of all data files that it refers to, each counted once.

    Raises:
        InputError: as `load`.
    """
    path = Path(path)
    with _reading(path):
        files = {path.resolve()}
        locations: set[str] = set()

        def note(data: wire.Buffer, start: int, end: int) -> list[bytes]:
            kept = [data[a:b] for n, a, _, b in wire.fields(data, start, end) if n != wire.RAW_DATA]
            tensor = onnx.TensorProto.FromString(b"".join(kept))
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                locations.add(ExternalDataInfo(tensor).location)
            return []

        content = _content(path)
        small = _holds(b"location")  # what is large is looked into, not through: it has weights

        def wanted(data: wire.Buffer, start: int, end: int) -> bool:
            return end - start >= _STREAMED or small(data, start, end)

        wire.rewrite(content, 0, len(content), wanted=wanted, edit=note)
        files.update(tensors.contained(path, location).resolve() for location in locations)
        return sum(file.stat().st_size for file in files)


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


def _parse(path: Path) -> tuple[onnx.ModelProto, MappedFile | None]:
    """The model's protocol buffer without its large weights, and the file that they lie in."""
    if _is_text(path):
        proto, file = _parse_text(path), None
    else:
        file = MappedFile(path)
        if not file.size:
            raise ValueError("the file is empty")
        cut = wire.rewrite(
            file.buffer,
            0,
            file.size,
            wanted=lambda _, start, end: end - start >= _STREAMED,
            edit=partial(_cut, location=path.name),
        )
        proto = onnx.ModelProto.FromString(b"".join(cut))
    if not proto.HasField("graph") or not proto.opset_import or proto.ir_version < 1:
        raise ValueError("it has no graph or no operator set")
    if proto.ir_version < _OLDEST_IR_VERSION:
        raise InputError(
            f"{path} is of IR version {proto.ir_version}, before {_OLDEST_IR_VERSION}: "
            "export it again with a newer exporter"
        )
    return proto, file


def _is_text(path: Path) -> bool:
    return _formats.get_format_from_file_extension(path.suffix) not in (None, "protobuf")


def _take_map_types(graph: onnx.GraphProto) -> dict[str | None, onnx.TypeProto]:
    """The types with a map in them, which onnx_ir lacks, by the name of the input or output."""
    taken: dict[str | None, onnx.TypeProto] = {}
    for info in (*graph.input, *graph.output, *graph.value_info):
        if _is_map(info.type):
            taken[info.name] = onnx.TypeProto.FromString(info.type.SerializeToString())
            info.ClearField("type")
    return taken


def _is_map(type_: onnx.TypeProto) -> bool:
    kind = type_.WhichOneof("value")
    if kind in ("sequence_type", "optional_type"):
        return _is_map(getattr(type_, kind).elem_type)
    return kind == "map_type"


def _parse_text(path: Path) -> onnx.ModelProto:
    return onnx.load(str(path), load_external_data=False)  # pyright: ignore[reportUnknownMemberType]


def _cut(data: wire.Buffer, start: int, end: int, *, location: str) -> list[bytes]:
    """A tensor message whose `raw_data` is replaced by a reference to where it lies."""
    kept: list[bytes] = []
    raw: tuple[int, int] | None = None
    for number, field, body, stop in wire.fields(data, start, end):
        if number == wire.RAW_DATA:
            raw = (body, stop - body)
        else:
            kept.append(data[field:stop])
    if raw is None:
        return kept
    reference = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", raw[0]), ("length", raw[1])):
        reference.external_data.add(key=key, value=str(value))
    return [*kept, reference.SerializeToString()]


def _content(path: Path) -> wire.Buffer:
    if _is_text(path):
        return _parse_text(path).SerializeToString()
    return MappedFile(path).buffer


def _holds(text: bytes) -> wire.Wanted:
    return lambda data, start, end: data.find(text, start, end) >= 0


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

    skeleton = _serialize(model, _STREAMED, stand_in)
    wanted = _holds(_PLACEHOLDER.encode())
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
            if _TYPE in value.meta:
                info.type.CopyFrom(cast("onnx.TypeProto", value.meta[_TYPE]))
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
    if _is_text(path):
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


@contextmanager
def _reading(path: Path) -> Generator[None]:
    """Turn whatever a parser says of bytes that are not a model into one sentence."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: give the path of an ONNX model") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder: give the path of the ONNX model in it") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({(error.strerror or '').lower()})") from error
    except Exception as error:
        cause: BaseException = error
        while inner := cause.__cause__ or cause.__context__:
            cause = inner
        text = " ".join(str(cause).split())[:200]
        raise InputError(
            f"{path} is not a whole ONNX model ({text}): export or copy it again"
        ) from error
