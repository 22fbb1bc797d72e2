"""The few kinds of failure, and the exit code a pipeline sees for each."""

from __future__ import annotations


class OnnxCompressError(Exception):
    """A failure with one sentence for a person: what, where (file, node), and the remedy."""

    exit_code = 1


class InputError(OnnxCompressError):
    """What was handed in cannot be used: a path, a model, data, an option or a recipe."""

    exit_code = 2


class GateError(OnnxCompressError):
    """The result exists but a gate was not met, so nothing was written."""

    exit_code = 3


class IntegrityError(OnnxCompressError):
    """A file is not what its signature or checksum says it is."""

    exit_code = 4
