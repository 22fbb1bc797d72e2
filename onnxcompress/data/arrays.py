"""Arrays in .npy and .npz files, described by their headers and read only when asked.

What a header declares is held against what the file can hold before anything is allocated, and
pickled arrays are refused. An array that is not compressed (`np.save`, `np.savez`) is mapped.
Formats: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html and PKWARE's
APPNOTE for zip.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from onnxcompress.contract import Array
from onnxcompress.errors import InputError
from onnxcompress.model_io.mapped import MappedFile

_PLAUSIBLE_RATIO = 200
_SUSPECT_FROM = 1 << 28
"""Bytes from which an array that is compressed more than `_PLAUSIBLE_RATIO` times is refused."""
_LOCAL_HEADER = 30
_MAX_HEADER = 1 << 16
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    struct.error,
)


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array in a file; `np.asarray` views it there, or decompresses it into memory.

    Attributes:
        member: its name in the .npz; None for a .npy.
        offset: where its elements start in the file, bytes; None where they are compressed.
    """

    file: MappedFile
    member: str | None
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    offset: int | None

    def __array__(self, dtype: np.dtype[Any] | None = None, copy: bool | None = None) -> Array:
        return np.array(self._read(), dtype=dtype, copy=copy)

    def _read(self) -> Array:
        size = math.prod(self.shape)
        if size * self.dtype.itemsize == 0:
            return np.empty(self.shape, self.dtype)
        if self.offset is None:
            return self._decompressed()
        # Samples seen before need no memory any more; a page that is still in use comes back.
        self.file.release(self.offset, size * self.dtype.itemsize)
        flat = np.frombuffer(self.file.buffer, self.dtype, size, self.offset)
        return flat.reshape(self.shape, order="F" if self.fortran else "C")

    def _decompressed(self) -> Array:
        try:
            with zipfile.ZipFile(self.file.path) as archive:
                with archive.open(f"{self.member}.npy") as content:
                    if _header(content)[:3] != (self.shape, self.fortran, self.dtype):
                        raise ValueError("it was changed since it was opened")
                with archive.open(f"{self.member}.npy") as content:
                    return npy.read_array(content, allow_pickle=False)
        except _BROKEN as error:
            raise _damaged(self.file.path, self.member, error) from error


def opened(array: Any) -> Any:
    """The array in memory; a stored one that need not be decompressed stays where it is."""
    mapped = isinstance(array, StoredArray) and array.offset is not None
    return array if mapped else np.asarray(array)


def stored_npy(path: Path) -> StoredArray:
    """The array of a .npy file.

    Raises:
        InputError: if it cannot be read, holds pickled objects, or is shorter than it declares.
    """
    try:
        file = MappedFile(path)
        shape, fortran, dtype, start = _header(io.BytesIO(file.buffer[:_MAX_HEADER]))
    except _BROKEN as error:
        raise _damaged(path, None, error) from error
    _check_size(path, None, dtype, shape, file.size - start)
    return StoredArray(file, None, dtype, shape, fortran, start)


def stored_npz(path: Path) -> dict[str, StoredArray]:
    """The arrays of an .npz file by name.

    Raises:
        InputError: as `stored_npy`, and for an array that expands beyond belief.
    """
    try:
        file = MappedFile(path)
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
            if sum(m.compress_size for m in members) > file.size:
                raise zipfile.BadZipFile("its members overlap")
            arrays = [_member(file, archive, member) for member in members]
    except _BROKEN as error:
        raise _damaged(path, None, error) from error
    return {a.member: a for a in arrays if a.member is not None}


def _member(file: MappedFile, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> StoredArray:
    name, size, packed = _name(member), member.file_size, member.compress_size
    if size > _SUSPECT_FROM and size > _PLAUSIBLE_RATIO * packed:
        raise InputError(
            f"{file.path}: array {name!r} expands {packed} bytes to {size}: "
            "save it with np.savez if it is real"
        )
    with archive.open(member) as content:
        shape, fortran, dtype, start = _header(content)
    offset = None
    if member.compress_type == zipfile.ZIP_STORED:
        begin = _content_offset(file, member)
        offset, size = begin + start, min(size, packed, file.size - begin)
    _check_size(file.path, name, dtype, shape, size - start)
    return StoredArray(file, name, dtype, shape, fortran, offset)


def _name(member: zipfile.ZipInfo) -> str:
    return member.filename.removesuffix(".npy")


def _content_offset(file: MappedFile, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: after its local header, whose last fields have two lengths."""
    end = member.header_offset + _LOCAL_HEADER
    name_length, extra_length = struct.unpack("<HH", file.buffer[end - 4 : end])
    return end + name_length + extra_length


def _header(content: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, Fortran order, dtype, and where the elements start."""
    head = io.BytesIO(content.read(_MAX_HEADER))
    version = npy.read_magic(head)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    try:
        shape, fortran, dtype = read(head)
    except Exception as error:  # a damaged header takes NumPy's parser to places of every kind
        raise ValueError(f"its header is damaged: {error}") from error
    if any(d < 0 for d in shape):
        raise ValueError(f"its header declares shape {shape}")
    return shape, fortran, dtype, head.tell()


def _check_size(
    path: Path, name: str | None, dtype: np.dtype[Any], shape: tuple[int, ...], held: int
) -> None:
    place = str(path) if name is None else f"{path}: array {name!r}"
    if dtype.hasobject:
        raise InputError(f"{place} holds pickled Python objects: save numbers or strings instead")
    declared = math.prod(shape) * dtype.itemsize
    if declared > held:
        raise InputError(
            f"{place} declares {declared} bytes but the file holds {held}: write it again"
        )


def _damaged(path: Path, name: str | None, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} does not exist")
    place = str(path) if name is None else f"{path}: array {name!r}"
    return InputError(f"{place} cannot be read as NumPy data, write it again: {error}")
