"""Reads models: checked before anything is allocated, weights left in their file."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx.external_data_helper import ExternalDataInfo
from onnx.serialization import registry as _formats

from onnxcompress.errors import InputError
from onnxcompress.garbage import rarely_collected
from onnxcompress.graph import names
from onnxcompress.model_io import tensors, wire
from onnxcompress.model_io.mapped import MappedFile

TYPE = "onnxcompress:type"
"""Where `Value.meta` keeps a type that onnx_ir lacks."""
_OLDEST_IR_VERSION = 3


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
                value.meta[TYPE] = maps[value.name]
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
        small = wire.holds(b"location")  # what is large is looked into, not through: it has weights

        def wanted(data: wire.Buffer, start: int, end: int) -> bool:
            return end - start >= wire.STREAMED or small(data, start, end)

        wire.rewrite(content, 0, len(content), wanted=wanted, edit=note)
        files.update(tensors.contained(path, location).resolve() for location in locations)
        return sum(file.stat().st_size for file in files)


def is_text(path: Path) -> bool:
    """Whether the suffix is that of one of ONNX's text forms."""
    return _formats.get_format_from_file_extension(path.suffix) not in (None, "protobuf")


def _parse(path: Path) -> tuple[onnx.ModelProto, MappedFile | None]:
    """The model's protocol buffer without its large weights, and the file that they lie in."""
    if is_text(path):
        proto, file = _parse_text(path), None
    else:
        file = MappedFile(path)
        if not file.size:
            raise ValueError("the file is empty")
        cut = wire.rewrite(
            file.buffer,
            0,
            file.size,
            wanted=lambda _, start, end: end - start >= wire.STREAMED,
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
    if is_text(path):
        return _parse_text(path).SerializeToString()
    return MappedFile(path).buffer


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
