"""What was done to a model and what it cost, as data: for JSON, a terminal, or one HTML file.

Figures of a clock or a process, and the sentences that tell them, stand under one key of the JSON
(`measured`). The rest is the same for the same inputs, to the byte, where the same was decided:
`kept` and `passed` say what came of the figures and stand in their places.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, cast

import numpy as np

from onnxcompress.measure import Measurement
from onnxcompress.measure.latency import Latency
from onnxcompress.mixed import Mixed
from onnxcompress.model_io import size_on_disk
from onnxcompress.pipeline import Record
from onnxcompress.report.gating import MEASURED, GateResult, check
from onnxcompress.train.history import History
from onnxcompress.validation import Validation
from onnxcompress.validation.audit import Audit

__all__ = [
    "Attempt",
    "GateResult",
    "Measured",
    "ModelFile",
    "Report",
    "check",
    "to_json",
    "to_plain",
]

SCHEMA = 1
"""Raised when a key of the JSON changes its meaning or goes away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """A model as it lies on disk."""

    name: str
    """Without its folder, which is nobody's business."""
    size: int
    """Bytes, external data included."""
    sha256: str
    """Of the `.onnx` file alone."""

    @classmethod
    def of(cls, path: Path) -> ModelFile:
        """Read size and checksum.

        Raises:
            InputError: if it is no model that can be read.
        """
        size = size_on_disk(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(name=path.name, size=size, sha256=digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One scheme that was tried on the way, and why it was kept or not."""

    scheme: str
    kept: bool
    because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What depends on the machine and the moment."""

    latency: Latency | None = None
    """Result against source, in turns."""
    source: Measurement | None = None
    result: Measurement | None = None
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    """Wall time by stage: load, calibrate, passes, validate, save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The whole story of one run."""

    verb: str
    source: ModelFile
    result: ModelFile | None = None
    """What came of it; None where nothing did."""
    target: str = ""
    passes: tuple[Record, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    """The schemes tried, in order; the last one kept is the result."""
    validation: Validation | None = None
    audit: Audit | None = None
    """How much of the result's arithmetic runs on integers; None where that cannot be told."""
    mixed: Mixed | None = None
    """How layers were chosen to go back to float, where a budget asked for it."""
    training: History | None = None
    """The epochs of training, where there was any."""
    gates: tuple[GateResult, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader should know that is no warning: how data was split or converted."""
    warnings: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    measured: Measured = field(default_factory=Measured)


def to_json(report: Report, *, indent: int | None = 2) -> str:
    """The report as JSON, keys sorted, infinities as the strings "inf" and "-inf"."""
    content = cast("dict[str, Any]", to_plain(report))
    content["schema"] = SCHEMA
    measured = content["measured"]
    measured["pass_seconds"] = [p.pop("seconds") for p in content["passes"]]
    measured["because"] = [attempt.pop("because") for attempt in content["attempts"]]
    measured["gates"] = {
        str(result.gate): {key: plain.pop(key) for key in ("figure", "reason")}
        for result, plain in zip(report.gates, content["gates"], strict=True)
        if result.gate.metric in MEASURED
    }
    return json.dumps(content, sort_keys=True, indent=indent, allow_nan=False)


def to_plain(value: object) -> object:
    """`value` in what JSON has; sets are sorted, what JSON lacks is spelled as text."""
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {str(key): to_plain(item) for key, item in items}
    if isinstance(value, set | frozenset):
        return sorted((to_plain(item) for item in cast("set[object]", value)), key=str)
    if isinstance(value, Enum):
        return to_plain(value.value)
    if isinstance(value, Iterable):
        return [to_plain(item) for item in cast("Iterable[object]", value)]
    if isinstance(value, np.generic):
        return to_plain(cast(object, value.item()))
    return str(value)
