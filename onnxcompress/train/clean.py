"""Cleaning: samples that are not finite, outliers and duplicates are dropped, and it is told which.

Each sample is summed up in a few figures as it is read, so the data may be of any size: one
reading decides, the next ones leave out what was found. Outliers are sought among floats alone.
"""

from __future__ import annotations

import hashlib
import importlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

from onnxcompress.contract import Array
from onnxcompress.data import Data
from onnxcompress.errors import InputError, did_you_mean
from onnxcompress.train.denoise import MedianFilter, SavitzkyGolay
from onnxcompress.train.samples import LABELS

Smoother = MedianFilter | SavitzkyGolay

NOT_FINITE: Final = "not finite"
OUTLIER: Final = "outlier"
DUPLICATE: Final = "duplicate"

_BLOCKS: Final = 32
_FEWEST: Final = 16
"""Samples below which nothing tells what is usual among them."""
_CHUNK: Final = 256
_NORMAL_MAD: Final = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
_LEAST_SPREAD: Final = 0.2
_HUGE: Final = 1e100
"""What squares of larger numbers would overflow beyond."""
_COMPONENTS: Final = 16
_DETECTORS: Final = {
    "IsolationForest": "ensemble",
    "LocalOutlierFactor": "neighbors",
    "EllipticEnvelope": "covariance",
    "OneClassSVM": "svm",
}


class Finder(Protocol):
    """Says which samples lie far out."""

    def find(self, table: Array) -> Array:
        """For each row of figures (n, k) whether it is an outlier: bool (n,)."""
        ...


@dataclass(frozen=True)
class RobustDistance:
    """Distance from the median in units of the median absolute deviation, figure by figure.

    A sample's distance is the root mean square of its figures' and, apart, the largest of them; it
    is an outlier where the logarithm of one lies more than `threshold` robust standard deviations
    above the samples' median, these taken as 0.2 at least, so that the default means four times
    the usual distance in the tightest data and far more in data of heavy tails.

    The median and its deviation bear half of the data being bad (Rousseeuw and Croux,
    Alternatives to the Median Absolute Deviation, 1993; Iglewicz and Hoaglin, How to Detect and
    Handle Outliers, 1993). Figures of which most samples have the same count in the mean alone.
    """

    threshold: float = 7.0

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise InputError(f"threshold must be above 0, not {self.threshold}")

    def find(self, table: Array) -> Array:
        centred = np.abs(table - np.median(table, axis=0))
        spread = _NORMAL_MAD * np.median(centred, axis=0)
        usual, varied = spread > 0, centred.max(0) > 0
        if not varied.any():
            return np.zeros(len(table), bool)
        scale = np.where(usual, spread, table.std(0))
        distances = centred[:, varied] / scale[varied]
        found = [np.sqrt((distances**2).mean(1))]
        if usual.any():
            found.append((centred[:, usual] / spread[usual]).max(1))
        return np.any([self._far(distance) for distance in found], axis=0)

    def _far(self, distance: Array) -> Array:
        logs = np.log(np.maximum(distance, 1e-9))
        above = logs - np.median(logs)
        spread = max(_NORMAL_MAD * float(np.median(np.abs(above))), _LEAST_SPREAD)
        return above > self.threshold * spread


@dataclass(frozen=True)
class Detector:
    """One of scikit-learn's detectors (the extra `clean`), on principal components of the figures.

    `IsolationForest` (Liu et al., 2008), `LocalOutlierFactor` (Breunig et al., 2000),
    `EllipticEnvelope` (Mahalanobis distance by the minimum covariance determinant; Rousseeuw and
    Van Driessen, 1999) and `OneClassSVM` (Schölkopf et al., 2001). They take about `share`
    of the samples for outliers, whatever the data; `options` are those of the class. Random ones
    start from the same seed each time.
    """

    name: str = "IsolationForest"
    share: float = 0.02
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.name not in _DETECTORS:
            raise InputError(f"no detector {self.name!r}{did_you_mean(self.name, _DETECTORS)}")
        if not 0 < self.share <= 0.5:
            raise InputError(f"share must be above 0 and at most 0.5, not {self.share}")

    def find(self, table: Array) -> Array:
        try:
            module: Any = importlib.import_module(f"sklearn.{_DETECTORS[self.name]}")
        except ImportError as error:
            raise InputError(
                f"{self.name} is scikit-learn's: install it with pip install 'onnxcompress[clean]'"
            ) from error
        try:
            # The search for a determinant tells of roundings on its way, which harm nothing.
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
                detector = getattr(module, self.name)(**self.options)
                known = detector.get_params()
                given = {"random_state": 0, "contamination": self.share, "nu": self.share}
                detector.set_params(
                    **{k: v for k, v in given.items() if k in known and k not in self.options}
                )
                return np.asarray(detector.fit_predict(_components(table))) == -1
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.name} failed: {' '.join(str(error).split())}") from error


@dataclass(frozen=True, slots=True)
class Dropped:
    """A sample that was left out: its number in the data as it came, and why."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class Cleaning:
    """What cleaning found, for the report."""

    total: int
    """Samples (of `Data`, feeds) as they came."""
    dropped: tuple[Dropped, ...] = ()
    """In the order of the data."""
    spared: int = 0
    """Outliers that were all kept, for there were more than may be dropped."""
    unsearched: str = ""
    """Why no outliers were sought, if so."""

    @property
    def kept(self) -> list[int]:
        """Numbers of the samples that stay."""
        gone = {sample.index for sample in self.dropped}
        return [i for i in range(self.total) if i not in gone]

    @property
    def counts(self) -> dict[str, int]:
        """How many were dropped, by reason."""
        return dict(Counter(sample.reason for sample in self.dropped))

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for a person."""
        found: list[str] = []
        for reason, count in self.counts.items():
            numbers = [str(s.index) for s in self.dropped if s.reason == reason]
            more = ", …" if len(numbers) > 8 else ""
            found.append(f"{count} of {self.total} samples dropped ({reason}): "
                         f"{', '.join(numbers[:8])}{more}")  # fmt: skip
        if self.spared:
            found.append(f"{self.spared} of {self.total} samples look like outliers but were kept, "
                         "for so many are hardly mistakes: look at the data")  # fmt: skip
        if self.unsearched:
            found.append(f"no outliers were sought: {self.unsearched}")
        return tuple(found) or (f"all {self.total} samples are clean",)


@dataclass(frozen=True, kw_only=True)
class Cleaner:
    """What to drop, and how to smooth what stays.

    Samples that are not finite always go.

    Attributes:
        outliers: finds them; None keeps them.
        most: share of the samples that may go as outliers. Where more are found they are rather a
            group of their own than mistakes: all stay, and the notes say so.
        duplicates: drop what is equal to an earlier sample in all inputs, labels aside.
        smooth: filters for the samples that stay, in order.
    """

    outliers: Finder | None = field(default_factory=RobustDistance)
    most: float = 0.05
    duplicates: bool = False
    smooth: tuple[Smoother, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.most <= 0.5:
            raise InputError(f"most must be from 0 to 0.5, not {self.most}")

    def arrays(self, arrays: Mapping[str, Array]) -> tuple[dict[str, Array], Cleaning]:
        """Arrays by name, samples on the first axis, without the bad ones; and what went.

        Arrays without axes stay. An array `labels`, and all that are not floats, go along but
        decide nothing unless they are not finite.

        Raises:
            InputError: if arrays differ in their samples, or no sample is finite.
        """
        lined = {name: np.asarray(a) for name, a in arrays.items() if np.ndim(a)}
        sizes = {len(a) for a in lined.values()}
        if len(sizes) != 1:
            raise InputError(f"arrays do not have equally many samples: {sorted(sizes)}")
        total = sizes.pop()
        found = self._decide(
            {name: a[i : i + _CHUNK] for name, a in lined.items()} for i in range(0, total, _CHUNK)
        )
        kept = {name: a[found.kept] for name, a in lined.items()}
        return self._smoothed({**arrays, **kept}), found

    def data(self, data: Data) -> tuple[Data, Cleaning]:
        """Data without its bad feeds, which are found in one reading, and what went.

        A feed is a sample here, however many rows it has. What was done is among the data's notes.

        Raises:
            InputError: if no feed is finite.
        """
        found = self._decide(
            {name: array[None] for name, array in feed.items()} for feed in data.unchecked()
        )
        change = self._smoothed if self.smooth else None
        notes = tuple(f"{data.where}: {note}" for note in found.notes)
        return data.picked(found.kept, notes, change), found

    def _smoothed(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        changed = dict(arrays)
        for smoother in self.smooth:
            changed = smoother(changed)
        return changed

    def _decide(self, chunks: Iterator[Mapping[str, Array]]) -> Cleaning:
        figures = _Figures()
        for chunk in chunks:
            figures.add(chunk, self.duplicates)
        if not figures.finite.any():
            raise InputError("no sample is finite: there is nothing left to use")
        reasons: dict[int, str] = dict.fromkeys(
            np.flatnonzero(~figures.finite).tolist(), NOT_FINITE
        )
        reasons |= {i: DUPLICATE for i in figures.repeated if i not in reasons}
        good = np.array([i for i in range(figures.total) if i not in reasons])
        spared, unsearched = 0, ""
        table = figures.table()
        if self.outliers is None:
            pass
        elif table is None:
            unsearched = "no input holds floats"
        elif len(good) < _FEWEST:
            unsearched = f"{len(good)} samples do not tell what is usual, {_FEWEST} may"
        else:
            far = good[self.outliers.find(table[good])]
            if len(far) > self.most * len(good):
                spared = len(far)
            else:
                reasons |= dict.fromkeys(far.tolist(), OUTLIER)
        dropped = tuple(Dropped(i, reasons[i]) for i in sorted(reasons))
        return Cleaning(figures.total, dropped, spared, unsearched)


class _Figures:
    """What is kept of samples: a few numbers of each array of floats, and a digest."""

    def __init__(self) -> None:
        self.total = 0
        self.repeated: list[int] = []
        self._finite: list[Array] = []
        self._rows: list[tuple[Array, Array]] = []
        self._seen: set[bytes] = set()

    @property
    def finite(self) -> Array:
        return np.concatenate([np.zeros(0, bool), *self._finite])

    def add(self, chunk: Mapping[str, Array], digest: bool) -> None:
        size = len(next(iter(chunk.values())))
        floats = {name: a.reshape(size, -1) for name, a in chunk.items() if a.dtype.kind == "f"}
        finite = np.ones(size, bool)
        for array in floats.values():
            finite &= np.isfinite(array).all(1)
        searched = [a for name, a in floats.items() if name != LABELS and a.shape[1]]
        clear = [
            np.clip(np.where(finite[:, None], a, 0).astype(np.float64), -_HUGE, _HUGE)
            for a in searched
        ]
        brief = [_brief(a) for a in clear] or [np.zeros((size, 0))]
        detail = [_detail(a) for a in clear] or [np.zeros((size, 0))]
        self._rows.append((np.hstack(brief), np.hstack(detail)))
        self._finite.append(finite)
        if digest:
            self._note_digests({n: a for n, a in chunk.items() if n != LABELS}, size)
        self.total += size

    def table(self) -> Array | None:
        """Figures (n, k) that all samples have; None where no array is of floats."""
        if not self._rows or not self._rows[0][0].shape[1]:
            return None
        alike = len({detail.shape[1] for _, detail in self._rows}) == 1
        return np.vstack([np.hstack(row) if alike else row[0] for row in self._rows])

    def _note_digests(self, chunk: Mapping[str, Array], size: int) -> None:
        for i in range(size):
            digest = hashlib.blake2b()
            for name in sorted(chunk):
                digest.update(f"{name}{chunk[name].shape[1:]}".encode())
                digest.update(np.ascontiguousarray(chunk[name][i]).tobytes())
            if (key := digest.digest()) in self._seen:
                self.repeated.append(self.total + i)
            self._seen.add(key)


def _brief(x: Array) -> Array:
    """Mean, spread and extremes of rows (n, d): (n, 4)."""
    return np.stack([x.mean(1), x.std(1), x.min(1), x.max(1)], axis=1)


def _detail(x: Array) -> Array:
    """The elements of rows if they are few, else mean and largest size of 32 stretches of them."""
    if x.shape[1] <= 2 * _BLOCKS:
        return x
    parts = np.array_split(x, _BLOCKS, axis=1)
    return np.stack([f for p in parts for f in (p.mean(1), np.abs(p).max(1))], axis=1)


def _components(table: Array) -> Array:
    """The first principal components of what varies, in robust units: (n, at most n / 10 or 16).

    A covariance of more, or of figures that follow from others, could not be told.
    """
    centred = table - np.median(table, axis=0)
    spread = _NORMAL_MAD * np.median(np.abs(centred), axis=0)
    scale = np.where(spread > 0, spread, table.std(0))
    units = centred[:, scale > 0] / scale[scale > 0]
    left, sizes, _ = np.linalg.svd(units, full_matrices=False)
    count = int(
        min(_COMPONENTS, max(len(table) // 10, 1), (sizes > 1e-6 * sizes.max(initial=0)).sum())
    )
    return left[:, :count] * sizes[:count]
