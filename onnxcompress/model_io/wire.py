"""A model's protocol buffer edited around its weights, which are never parsed or copied.

An ONNX file is nested length-delimited fields (protobuf.dev/programming-guides/encoding), so a
tensor's data can be cut out of it, or put into it, by touching only the headers on the way down:
model, graph, node, attribute, tensor. Reading turns large `raw_data` into references into the
file; writing turns placeholders into `raw_data` that is streamed.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, TypeVar

import onnx

Buffer = bytes | mmap.mmap

MODEL = "onnx.ModelProto"
TENSOR = "onnx.TensorProto"
RAW_DATA = 9
STREAMED = 1 << 16
"""Bytes from which a weight is not parsed with the graph."""

_MESSAGES: tuple[Any, ...] = (
    onnx.ModelProto,
    onnx.GraphProto,
    onnx.FunctionProto,
    onnx.NodeProto,
    onnx.AttributeProto,
    onnx.SparseTensorProto,
    onnx.TensorProto,
)
_NAMES = {message.DESCRIPTOR.full_name for message in _MESSAGES}
_CHILDREN: dict[str, dict[int, str]] = {
    message.DESCRIPTOR.full_name: {
        field.number: field.message_type.full_name
        for field in message.DESCRIPTOR.fields
        if field.message_type is not None and field.message_type.full_name in _NAMES
    }
    for message in _MESSAGES
}
_LENGTH_DELIMITED = 2
_FIXED = {1: 8, 5: 4}
_MAX_DEPTH = 100  # of nested messages, as protobuf's own parsers


Chunk = TypeVar("Chunk", bound=Sized)
"""A part of the result: bytes, or anything that knows how many bytes it will be."""
Edit = Callable[[Buffer, int, int], Sequence[Chunk]]
Wanted = Callable[[Buffer, int, int], bool]


def rewrite(
    data: Buffer,
    start: int,
    end: int,
    *,
    wanted: Wanted,
    edit: Edit[Chunk],
    kind: str = MODEL,
    depth: int = 0,
) -> list[bytes | Chunk]:
    """The message `data[start:end]` in chunks, its tensors replaced by what `edit` makes of them.

    Args:
        wanted: whether to look inside `data[start:end]`; what is not wanted is kept as it is.
        edit: the new content of the tensor message `data[start:end]`, in chunks.
        kind: the full name of the message's type.

    Raises:
        ValueError: if the bytes are not a message: a field reaches beyond its parent's end.
    """
    if depth > _MAX_DEPTH:
        raise ValueError("messages are nested too deeply")
    chunks: list[bytes | Chunk] = []
    kept = start
    for number, field, body, stop in fields(data, start, end):
        child = _CHILDREN[kind].get(number)
        if child is None or not wanted(data, body, stop):
            continue
        inner = (
            edit(data, body, stop)
            if child == TENSOR
            else rewrite(data, body, stop, wanted=wanted, edit=edit, kind=child, depth=depth + 1)
        )
        chunks += [data[kept:field], header(number, sum(map(len, inner))), *inner]
        kept = stop
    chunks.append(data[kept:end])
    return chunks


def fields(data: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, where it starts, where its value starts, where it ends) of a message.

    Raises:
        ValueError: if a field reaches beyond `end` or has an unknown wire type.
    """
    at = start
    while at < end:
        tag, body = _varint(data, at, end)
        wire_type = tag & 7
        if wire_type == _LENGTH_DELIMITED:
            length, body = _varint(data, body, end)
            stop = body + length
        elif wire_type in _FIXED:
            stop = body + _FIXED[wire_type]
        elif wire_type == 0:
            stop = _varint(data, body, end)[1]
        else:
            raise ValueError(f"unknown wire type {wire_type} at byte {at}")
        if stop > end:
            raise ValueError(f"the field at byte {at} ends at {stop}, beyond {end}")
        yield tag >> 3, at, body, stop
        at = stop


def header(number: int, length: int) -> bytes:
    """The tag and length that stand before a length-delimited field."""
    return _encode(number << 3 | _LENGTH_DELIMITED) + _encode(length)


def _varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"a number is cut off at byte {at}")


def _encode(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def holds(text: bytes) -> Wanted:
    """Wants messages with these bytes in them."""
    return lambda data, start, end: data.find(text, start, end) >= 0
