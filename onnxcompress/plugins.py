"""What other packages add by entry points: found by name, imported only when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from onnxcompress.errors import InputError


def plugins(group: str) -> Mapping[str, EntryPoint]:
    """The entry points of a group by name, such as those of `onnxcompress.passes`."""
    return {point.name: point for point in entry_points(group=group)}


def load_plugin(point: EntryPoint) -> Any:
    """What an entry point names.

    Raises:
        InputError: if importing it fails, whatever the reason: it is another package's code.
    """
    try:
        return point.load()
    except Exception as error:
        raise InputError(
            f"plugin {point.name!r} ({point.value}) cannot be loaded: {type(error).__name__}: "
            f"{error}; reinstall or remove its package"
        ) from error
