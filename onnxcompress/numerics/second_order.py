"""Integers for a weight that disturb the output of its layer least, not the weight itself.

With rows x of the layer's input and H = E[x xᵀ], the output error of weights Ŵ in place of W is

    E‖(W - Ŵ) x‖² = tr((W - Ŵ) H (W - Ŵ)ᵀ).

With H = L Lᵀ and e = w - ŵ for one row, that is Σ_k L_kk² (e_k + Σ_{j>k} e_j L_jk / L_kk)². Taken
from the last column to the first, each column can be rounded with all earlier mistakes made good
in it, so that only its own rounding is left in its term. That is what GPTQ does, without the
inverse of H (Frantar et al., GPTQ, 2022; Chee et al., QuIP, 2023, who prove the two equal).

H of a layer that is too wide is never formed: its columns are rounded in parts, and each part
makes good what the parts before it did to the output.

A bias can take any constant error. Where there is one, H may be the covariance of x, and the
mean of what is lost, (W - Ŵ) E[x], is the bias's to give back.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.saturation import PAIR_LIMIT

Floats = npt.NDArray[np.floating[Any]]
Codes = npt.NDArray[np.int8]
Indices = npt.NDArray[np.intp]

_BLOCK: Final = 64
_JUDGES: Final = 512
"""Rows that tell whether a channel's codes are better than plain ones."""
_CHANNELS: Final = 1024
"""Output channels at a time: what is worked on stays in the cache."""
_INT8_MAX: Final = 127


def mean_square(weights: Floats, rows: Floats) -> Floats:
    """E[(w x)²] over rows x, of each w: [G, N, K] and [G, n, K] to [G, N], in float64."""
    outputs = weights @ np.swapaxes(rows, 1, 2)
    return np.einsum("gnr,gnr->gn", outputs, outputs, dtype=np.float64) / max(1, rows.shape[1])


def round_rows(
    weights: Floats,
    codes: Codes,
    scales: Floats,
    rows: Floats,
    *,
    damping: float,
    bound_pairs: bool,
    widest: int = 1 << 30,
) -> tuple[Codes, Floats, Floats]:
    """Codes with less output error than `codes`; in rows where that fails, `codes` themselves.

    With them the output errors [G, N] before and after, over the rows x.

    A weight of exactly zero stays zero, for it may have been pruned.

    Args:
        weights: [G, N, K], G independent groups of N rows.
        codes: [G, N, K], plain rounding of the weights.
        scales: [G, N].
        rows: [G, n, K], n samples x of the layer's input, of the type to compute in.
        damping: share of the mean diagonal that is added to the diagonal of H before the search,
            for inputs that the sample did not show.
        bound_pairs: keep neighbouring codes of one sign within `PAIR_LIMIT`, as `codes` are.
        widest: columns to treat together, at least 2; time and memory grow with its square.

    Raises:
        numpy.linalg.LinAlgError: if a damped matrix is not positive definite.
    """
    target = (weights / scales[..., None]).astype(rows.dtype, copy=False)
    judges = rows[:, :_JUDGES]
    before = mean_square(target - codes, judges)
    found = np.empty_like(codes)
    step = widest - widest % 2  # neighbours stay together
    lost = None
    for start in range(0, target.shape[2], step):
        part = np.s_[:, :, start : start + step]
        found[part] = _round_part(target[part], rows[part], lost, damping, bound_pairs)
        if start + step < target.shape[2]:
            more = (target[part] - found[part]) @ np.swapaxes(rows[part], 1, 2)
            lost = more if lost is None else lost + more
    after = mean_square(target - found, judges)
    chosen = np.where((after < before)[..., None], found, codes)
    unit = np.square(scales, dtype=np.float64)
    return chosen, before * unit, np.minimum(before, after) * unit


def _round_part(
    target: Floats, rows: Floats, lost: Floats | None, damping: float, bound_pairs: bool
) -> Codes:
    """Codes [G, N, k] for some columns, given what is lost at the output already [G, N, n]."""
    # From the last to the first: what has most energy is rounded while most is left to help it.
    order = np.argsort(np.einsum("gnk,gnk->gk", rows, rows), axis=1, kind="stable")
    factor, started = _unit_factor(np.take_along_axis(rows, order[:, None], 2), lost, damping)
    found = np.empty(target.shape, np.int8)
    for channel in range(0, target.shape[1], _CHANNELS):
        some = np.s_[:, channel : channel + _CHANNELS]
        columns = np.take_along_axis(np.swapaxes(target[some], 1, 2), order[..., None], 1)
        wanted = columns if started is None else columns + np.swapaxes(started[some], 1, 2)
        codes = _successive(columns, wanted, factor, _partners(order) if bound_pairs else None)
        np.put_along_axis(found[some], order[:, None], np.swapaxes(codes, 1, 2), 2)
    return found


def _unit_factor(rows: Floats, lost: Floats | None, damping: float) -> tuple[Floats, Floats | None]:
    """L of the damped H, each column over its diagonal; above the diagonal stands something else.

    With it what the columns must make good of `lost`, [G, N, k].
    """
    groups, count, size = rows.shape
    more = 0 if lost is None else lost.shape[1]
    matrix = np.empty((groups, size + more, size), rows.dtype)
    np.matmul(np.swapaxes(rows, 1, 2), rows, out=matrix[:, :size])
    if lost is not None:
        np.matmul(lost, rows, out=matrix[:, size:])
    matrix /= count
    diagonal = np.einsum("gkk->gk", matrix[:, :size])  # a view
    mean = diagonal.mean(axis=1, keepdims=True)
    diagonal += np.where(mean > 0, damping * mean, 1)
    _factorize(matrix)
    matrix /= diagonal[:, None].copy()
    return matrix[:, :size], matrix[:, size:] if more else None


def _factorize(matrix: Floats) -> None:
    """Replace the lower triangle of H in [H; R], [G, k + m, k], by L, and R by R L⁻ᵀ.

    In place and by blocks: numpy's own copies the matrix twice and is slower by its copies.
    """
    size = matrix.shape[2]
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        panel = matrix[:, start:, start:stop]
        panel -= matrix[:, start:, :start] @ np.swapaxes(matrix[:, start:stop, :start], 1, 2)
        top, rest = panel[:, : stop - start], panel[:, stop - start :]
        top[:] = np.linalg.cholesky(top)
        rest[:] = rest @ np.swapaxes(np.linalg.inv(top), 1, 2)


def _partners(order: Indices) -> Indices:
    """Where in `order` the other of each pair stands, [G, k]; the column itself if it has none."""
    size = order.shape[1]
    beside = np.where(order ^ 1 < size, order ^ 1, order)
    return np.take_along_axis(np.argsort(order, axis=1), beside, 1)


def _successive(target: Floats, wanted: Floats, factor: Floats, partners: Indices | None) -> Floats:
    """Round [G, k, N] column after column from the last, each making good the mistakes before it.

    Args:
        wanted: what `target` should be for the sake of earlier parts.
    """
    size = target.shape[1]
    codes, errors = np.zeros_like(target), np.empty_like(target)
    limits = _Limits(target, codes, partners)
    for stop in range(size, 0, -_BLOCK):
        start = max(stop - _BLOCK, 0)
        later = np.swapaxes(factor[:, stop:, start:stop], 1, 2) @ errors[:, stop:]
        later += wanted[:, start:stop]
        within = np.swapaxes(factor[:, start:stop, start:stop], 1, 2).copy()
        for k in range(stop - 1, start - 1, -1):
            here = within[:, k - start, None, k + 1 - start :] @ errors[:, k + 1 : stop]
            here += later[:, None, k - start]
            codes[:, k] = limits.round(here[:, 0], k)
            np.subtract(target[:, k], codes[:, k], out=errors[:, k])
    return codes


class _Limits:
    """What a column's codes may be: within int8, clear of saturation, and zero where pruned."""

    def __init__(self, target: Floats, codes: Floats, partners: Indices | None) -> None:
        groups, size, channels = target.shape
        self._target, self._codes, self._partners = target, codes, partners
        self._each = np.arange(groups, dtype=np.intp)
        self._zeros = np.count_nonzero(target, axis=(0, 2)) < groups * channels
        self._bound: npt.NDArray[np.bool_] = np.zeros(size, bool)
        if partners is not None:  # the second of a pair gives way
            self._bound = np.any(partners > np.arange(size, dtype=np.intp), axis=0)

    def round(self, wanted: Floats, k: int) -> Floats:
        """Codes [G, N] for column `k`, next to `wanted`."""
        code = np.rint(wanted)
        np.maximum(code, -_INT8_MAX, out=code)
        np.minimum(code, _INT8_MAX, out=code)
        if self._bound[k] and self._partners is not None:
            beside = self._codes[self._each, self._partners[:, k]]
            np.maximum(code, -PAIR_LIMIT - np.minimum(beside, 0), out=code)
            np.minimum(code, PAIR_LIMIT - np.maximum(beside, 0), out=code)
        if self._zeros[k]:
            code *= self._target[:, k] != 0
        return code
