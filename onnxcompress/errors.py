"""The few kinds of failure, and the exit code a pipeline sees for each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OnnxCompressError(Exception):
    """A failure with one sentence for a person: what, where (file, node), and the remedy."""

    exit_code = 1


class InputError(OnnxCompressError):
    """What was handed in cannot be used: a path, a model, data, an option or a recipe."""

    exit_code = 2


class DataError(InputError):
    """A sample cannot be read or used; no other way of compressing makes up for it."""


class GateError(OnnxCompressError):
    """The result exists but a gate was not met, so nothing was written; `report` says more."""

    exit_code = 3

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class IntegrityError(OnnxCompressError):
    """A file is not what its signature or checksum says it is."""

    exit_code = 4


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or what there is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f", did you mean {near[0]!r}?"
    shown = ", ".join(repr(n) for n in names[:8]) or "none"
    return f"; there are: {shown}{', …' if len(names) > 8 else ''}"
