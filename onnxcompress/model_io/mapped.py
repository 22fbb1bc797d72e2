"""Tensors that lie in a file and enter memory only while someone looks at them.

`onnx_ir.ExternalTensor` keeps what it mapped, one mapping and one file descriptor a tensor, and
finds its file by name at first use. Here a file is mapped once, when it was checked: it may be
replaced or removed afterwards, thousands of tensors cost one descriptor, and the pages of an array
are given back when the array goes, so streaming through 3 GB of weights does not need 3 GB.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array

_MAP_FROM = 1 << 16  # a smaller file is read: a mapping would cost a page and a descriptor
_RELEASE_FROM = 1 << 20
_STRIDE = 16 << 20


class MappedFile:
    """A file's bytes, mapped read-only; valid whatever becomes of its name.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("not a regular file")
            self.size = status.st_size
            self.buffer: bytes | mmap.mmap = (
                file.read() if self.size < _MAP_FROM else mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
            )

    def release(self, start: int, length: int) -> None:
        """Give back the memory of these bytes; they are read again from the file when needed."""
        if isinstance(self.buffer, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            page = start - start % mmap.PAGESIZE
            self.buffer.madvise(mmap.MADV_DONTNEED, page, start + length - page)


class MappedTensor(ir.LazyTensor):
    """A tensor of any dtype but string at `offset` (bytes) of a mapped file.

    `numpy` gives a read-only view of the file where the offset is aligned for the dtype, else a
    copy; either lives as long as its holder, and nothing is kept here.
    """

    def __init__(
        self, file: MappedFile, offset: int, dtype: ir.DataType, shape: ir.Shape, name: str | None
    ) -> None:
        super().__init__(partial(_read, file, offset, dtype, shape), dtype, shape, name=name)
        self.file = file
        self.offset = offset

    def tofile(self, file: Any) -> None:
        """Write the bytes to `file` without ever holding more than a few of them."""
        end = self.offset + self.nbytes
        for start in range(self.offset, end, _STRIDE):
            stop = min(start + _STRIDE, end)
            file.write(self.file.buffer[start:stop])
            self.file.release(start, stop - start)


def _read(file: MappedFile, offset: int, dtype: ir.DataType, shape: ir.Shape) -> ir.TensorProtocol:
    size = math.prod(shape.numpy())
    if dtype.bitwidth < 8:
        packed = _view(file, offset, np.dtype(np.uint8), math.ceil(size * dtype.itemsize))
        return ir.PackedTensor(packed, dtype, shape=shape)
    flat = _view(file, offset, np.dtype(dtype.numpy()), size)
    return ir.Tensor(flat.reshape(shape.numpy()), dtype, shape=shape)


def _view(file: MappedFile, offset: int, dtype: np.dtype[Any], count: int) -> Array:
    flat = np.frombuffer(file.buffer, dtype.newbyteorder("<"), count=count, offset=offset)
    large = flat.nbytes >= _RELEASE_FROM
    if flat.flags.aligned:
        if large:
            weakref.finalize(flat, file.release, offset, flat.nbytes).atexit = False
        return flat
    copy = flat.copy()
    copy.flags.writeable = False
    if large:
        file.release(offset, flat.nbytes)
    return copy
