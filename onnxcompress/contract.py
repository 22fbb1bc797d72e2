"""What a pass is, what it may ask for, and what it reports.

A pass rewrites one graph and touches nothing else: no file, no session, no data. What it must
know about the values that flow through the model it states as `Want`s; the pipeline observes the
model and binds the answer with `dataclasses.replace(pass_, statistics=...)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Protocol

import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.errors import InputError
from onnxcompress.numerics.row_sample import Patches

Array = npt.NDArray[Any]
Figure = float | int | str | Mapping[str, float]
"""One thing that a pass has to report, or the same thing of many tensors by name."""


class Kind(StrEnum):
    """What an observer keeps of a value. Each is a sum or an extremum, so shards merge exactly."""

    HISTOGRAM = "histogram"
    """Range-free histogram with exact minimum and maximum; thresholds come from it."""
    CHANNEL_RANGE = "channel_range"
    """Minimum and maximum of each channel along `Want.axis`."""
    MEAN = "mean"
    """Sum and count of each channel along `Want.axis`, in float64."""
    ROWS = "rows"
    """A uniform sample of what a kernel multiplies by its weight, cut as `Want.patches` says."""


@dataclass(frozen=True, slots=True)
class Want:
    """One observation that a pass needs: which value, and what to keep of it."""

    value: str
    kind: Kind = Kind.HISTOGRAM
    axis: int | None = None
    patches: Patches | None = None
    feeds: int | None = field(default=None, compare=False)
    """How many feeds tell it well enough, of however many there are; None: all that are given."""


@dataclass(frozen=True, slots=True)
class Skip:
    """A site that a pass declined: the node (or tensor), its operator, and why."""

    node: str
    op: str
    reason: str


class Histogram(Protocol):
    """What a pass sees of a range-free histogram (`numerics.histogram` has the implementation)."""

    @property
    def minimum(self) -> float: ...
    @property
    def maximum(self) -> float: ...
    def points(self) -> tuple[Array, Array]: ...


class Statistics(Protocol):
    """Everything observed, by value name. Immutable; `observe.Observations` implements it."""

    def histogram(self, value: str) -> Histogram: ...
    def channel_range(self, value: str, axis: int) -> tuple[Array, Array]: ...
    def mean(self, value: str, axis: int) -> Array: ...
    def rows(self, value: str, patches: Patches) -> Array: ...
    def missing(self, wants: Iterable[Want]) -> list[Want]: ...
    @property
    def reasons(self) -> Mapping[Want, str]:
        """Why what was wanted could not be observed, where it was tried."""
        ...


@dataclass
class Result(ir.passes.PassResult):
    """A `PassResult` that also says what was declined and what was done, for the report."""

    skips: tuple[Skip, ...] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict[str, Figure])


@dataclass(frozen=True, kw_only=True)
class Pass(ir.passes.InPlacePass):
    """A graph rewrite whose dataclass fields are its options (and its keys in a recipe).

    Subclasses set `name` (the recipe's key, the file's name), `exact` (the float function is
    unchanged to float tolerance) and implement `call`. The first line of the docstring is the
    pass's help.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = False

    def call(self, model: ir.Model) -> Result:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class CalibratedPass(Pass):
    """A pass that needs statistics of values as they flow through the model it is given.

    One that is exact names anew the values that it changes, so what was observed of the others
    still holds behind it.
    """

    statistics: Statistics | None = field(default=None, repr=False, compare=False)

    def wants(self, model: ir.Model) -> Sequence[Want]:
        """What must be observed on `model` as it stands at this step."""
        raise NotImplementedError

    def observed(self, wants: Sequence[Want]) -> Statistics:
        """The bound statistics, which hold all of `wants`.

        Raises:
            InputError: if nothing was bound or a wanted value is missing from it.
        """
        missing = wants if self.statistics is None else self.statistics.missing(wants)
        if self.statistics is None or missing:
            known: Mapping[Want, str] = self.statistics.reasons if self.statistics else {}
            for want in missing:
                if want in known:
                    raise InputError(f"{self.name} cannot use {want.value!r}: {known[want]}")
            names = ", ".join(repr(w.value) for w in missing[:5])
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise InputError(
                f"{self.name} needs statistics of {names}{more}: calibrate this model with data"
            )
        return self.statistics
