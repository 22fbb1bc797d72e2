"""A head fitted in closed form: ridge regression on what the trunk gives, in one run over the data.

The sums of features, targets and their products are all that is kept of the samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.data import Data, interface, open_data
from onnxcompress.errors import InputError
from onnxcompress.graph.linear import is_op
from onnxcompress.session import Session
from onnxcompress.train.augment import one_hot
from onnxcompress.train.heads import Head, features, find_head, replace_head, set_head

_BATCH = 64
_GRID = np.logspace(-8, 2, 41)


@dataclass(frozen=True)
class Fitted:
    """A model with a fitted head, and how the fit went."""

    model: ir.Model
    samples: int
    ridge: float
    """What was added to the diagonal, in parts of the features' mean variance."""
    explained: float
    """Share of the targets' variance that the fit explains, on the samples it was fitted to."""


@dataclass
class Sums:
    """First and second moments of features x (k,) and targets y (c,), in float64."""

    count: int
    x: Array
    y: Array
    xx: Array
    xy: Array
    yy: float

    @classmethod
    def of(cls, x: Array, y: Array) -> Sums:
        """Those of features (n, k) and targets (n, c)."""
        x, y = x.astype(np.float64), y.astype(np.float64)
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, float((y * y).sum()))

    def __iadd__(self, other: Sums) -> Sums:
        self.count += other.count
        self.x += other.x
        self.y += other.y
        self.xx += other.xx
        self.xy += other.xy
        self.yy += other.yy
        return self

    def solve(self, ridge: float | None) -> tuple[Array, Array, float, float]:
        """Weight (k, c), bias (c,), the ridge in use, and the share of variance explained.

        Minimizes |y - xW - b|² + λ|W|² with λ = ridge · trace / k of the centred products. Where
        ridge is None it minimizes the generalized cross-validation error (Golub, Heath, Wahba,
        Technometrics 1979), in which the eigenvalues e stand for the freedom spent, Σ e/(e+λ).
        """
        n, mean_x, mean_y = self.count, self.x / self.count, self.y / self.count
        cxx = self.xx - n * np.outer(mean_x, mean_x)
        cxy = self.xy - n * np.outer(mean_x, mean_y)
        total = self.yy - n * float(mean_y @ mean_y)
        values, vectors = np.linalg.eigh(cxx)
        values, turned = np.maximum(values, 0), vectors.T @ cxy
        unit = float(values.mean()) or 1.0
        power = (turned * turned).sum(1)

        def error(share: float) -> float:
            """What the fit leaves of `total`."""
            full = values + share * unit
            return total - float((power * (2 / full - values / full**2)).sum())

        def validated(share: float) -> float:
            free = n - 1 - float((values / (values + share * unit)).sum())
            return max(error(share), 0.0) / free**2 if free > 0 else np.inf

        chosen = float(min(_GRID, key=validated)) if ridge is None else ridge
        weight = vectors @ (turned / (values + chosen * unit)[:, None])
        explained = 1 - error(chosen) / total if total > 0 else 1.0
        return weight, mean_y - mean_x @ weight, chosen, explained


def fit_head(
    model: ir.Model,
    data: Any,
    labels: Array | None = None,
    *,
    outputs: int | None = None,
    at: str | None = None,
    output: str | None = None,
    ridge: float | None = None,
) -> Fitted:
    """`model` with its head fitted to labels by ridge regression, the trunk as it is.

    A baseline for transfer that takes one run, and a start for training. For classes, targets are
    1 for the sample's own and 0 for the others: the largest output names the class, but outputs
    are no log-likelihoods before training made them so. Positions that are averaged behind the
    head are averaged before it here, which is the same, for the head is linear.

    Args:
        data: anything that `open_data` opens.
        labels: whole numbers (n,) are classes, negative ones unknown; floats (n, outputs) are
            targets themselves. Those of the data when None.
        outputs: how many classes there are; as many as the labels name when None.
        at, output: as for `find_head`.
        ridge: what is added to the diagonal, in parts of the features' mean variance; chosen by
            generalized cross-validation when None.

    Raises:
        InputError: if the head cannot be fitted, or data or labels do not suit.
    """
    if ridge is not None and not ridge > 0:
        raise InputError(f"ridge is {ridge} but must be above 0")
    opened = open_data(data, interface(model))
    targets = _targets(opened.labels if labels is None else np.asarray(labels), outputs)
    classes = targets.shape[1]
    found = find_head(model, at, output)
    if classes != found.classes or outputs is not None:
        model = replace_head(model, classes, at=at, output=output, init="zero")
        found = find_head(model, at, output)
    sums = _sums(model, found, opened, targets, at, output)
    weight, bias, chosen, explained = sums.solve(ridge)
    fitted = set_head(model, weight, bias, at=at, output=output)
    return Fitted(fitted, sums.count, chosen, explained)


def _targets(labels: Array | None, classes: int | None) -> Array:
    """Targets (n, classes), those of unlabelled samples NaN."""
    if labels is None:
        raise InputError("there are no labels to fit a head to: add an array 'labels' to the data")
    if labels.dtype.kind == "f":
        targets = labels.reshape(len(labels), -1)
        if classes not in (None, targets.shape[1]):
            raise InputError(f"targets have {targets.shape[1]} columns, the head {classes} outputs")
        return targets
    labels = labels.reshape(-1)
    most = int(labels.max(initial=-1)) + 1
    if most == 0 or (classes or most) < most:
        raise InputError(f"labels name class {most - 1} but a head of {classes} outputs has not")
    targets = one_hot(labels, classes or most)
    targets[labels < 0] = np.nan
    return targets


def _sums(
    model: ir.Model, head: Head, data: Data, targets: Array, at: str | None, output: str | None
) -> Sums:
    session = Session(features(model, at=at, output=output))
    average = _averages(head)
    sums, done = None, 0
    for feed in data.batches(_BATCH):
        (values,) = session.run(feed).values()
        x = _rows(values, head, average)
        y = targets[done : done + len(x)]
        done += len(x)
        known = np.isfinite(y).all(1)
        if len(y) < len(x) or not known.any():
            continue
        part = Sums.of(x[: len(y)][known], y[known])
        if sums is None:
            sums = part
        else:
            sums += part
    if done != len(targets) or sums is None:
        raise InputError(f"there are {len(targets)} labels but the trunk gives {done} vectors")
    return sums


def _rows(values: Array, head: Head, average: bool) -> Array:
    """Features as (n, k): of samples where positions are averaged, else of positions."""
    if is_op(head.node, "Conv"):
        values = np.moveaxis(values, 1, -1)
    if average:
        values = values.reshape(len(values), -1, values.shape[-1]).mean(1)
    return values.reshape(-1, values.shape[-1])


def _averages(head: Head) -> bool:
    """Whether positions are averaged behind the head.

    Raises:
        InputError: if its figures are bent before that, or it looks at more than one position.
    """
    if is_op(head.node, "Conv") and any(size != 1 for size in head.linear.view[3:]):
        raise InputError(f"the head Conv {head.node.name!r} is wider than one position: train it")
    for node in head.tail:
        if is_op(node, "Relu", "Softmax", "LogSoftmax", "Sigmoid"):
            bent = node
            rest = head.tail[head.tail.index(node) :]
            if any(is_op(n, "GlobalAveragePool") for n in rest):
                raise InputError(f"{bent.op_type} {bent.name!r} stands between the head and the "
                                 "average over positions: train the head instead")  # fmt: skip
            return False
        if is_op(node, "GlobalAveragePool"):
            return True
    return False
