"""Files that appear whole or not at all.

A file is written without a name where the system can (`O_TMPFILE`: if the process is killed or
the disk is full, it was never there), else under a temporary name that is locked while its writer
lives. It is flushed, and takes its name by a rename. Names change under a lock on the folder, so
a temporary name that nobody has locked is what a killed process left, and is cleared away.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

try:
    import fcntl
except ImportError:  # Windows has no such locks, but it does not let go of open files either
    fcntl = None

_TEMPORARY = ".onnxcompress-{}.tmp"
_NAMELESS = hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").is_dir()


class Draft:
    """A file being written in `folder`; without `publish` it leaves no trace.

    Raises:
        OSError: from any method, as the system has it; what was there before is untouched.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._temporary: Path | None = None
        self._fd = self._open()

    def _open(self) -> int:
        if _NAMELESS:
            with suppress(OSError):  # not every file system can
                return os.open(self.folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
        with locked(self.folder):
            self._temporary = self._unused_name()
            fd = os.open(self._temporary, flags, 0o666)
            _lock(fd, wait=False)
            return fd

    def _unused_name(self) -> Path:
        return self.folder / _TEMPORARY.format(secrets.token_hex(8))

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    def flush(self) -> None:
        """Wait until the content is on the disk."""
        os.fsync(self._fd)

    def publish(self, target: Path) -> None:
        """Give the flushed file its name, in place of an older file whose mode it takes over.

        To be called with the folder `locked`.
        """
        with suppress(FileNotFoundError):
            mode = stat.S_IMODE(target.stat().st_mode)
            if hasattr(os, "fchmod"):
                os.fchmod(self._fd, mode)
        if self._temporary is None:
            self._temporary = self._unused_name()
            # A folder's descriptor makes Python call linkat, which alone follows this link.
            nameless = f"/proc/self/fd/{self._fd}"
            os.link(nameless, self._temporary, src_dir_fd=self._fd, follow_symlinks=True)
        self._temporary.replace(target)
        self._temporary = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write `path` whole or not at all.

    Raises:
        OSError: as the system has it; what was there before is untouched.
    """
    with Draft(path.parent) as draft:
        draft.write(content)
        publish({path: draft})


def publish(drafts: Mapping[Path, Draft]) -> None:
    """Give drafts of one folder, now written, their names, all of it lasting.

    Raises:
        OSError: as the system has it.
    """
    for draft in drafts.values():
        draft.flush()
    folder = next(iter(drafts)).parent
    with locked(folder):
        for path, draft in drafts.items():
            draft.publish(path)
    sync(folder)


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Be the only one that names files in `folder`, cleared of what killed processes left."""
    if fcntl is None:
        _clear_abandoned(folder)
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        _lock(fd, wait=True)
        _clear_abandoned(folder)
        yield
    finally:
        os.close(fd)


def sync(folder: Path) -> None:
    """Make the names in `folder` durable, where the system can."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _clear_abandoned(folder: Path) -> None:
    for path in folder.glob(_TEMPORARY.format("*")):
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY)
            try:
                abandoned = _lock(fd, wait=False)
            finally:
                os.close(fd)
            if abandoned:
                path.unlink()


def _lock(fd: int, *, wait: bool) -> bool:
    """Whether this descriptor has the lock; file systems without locks give it to everyone."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
