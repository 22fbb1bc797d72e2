"""Integers for a weight that disturb the output of its layer least, not the weight itself.

With rows x of the layer's input and H = E[x xᵀ], the output error of weights Ŵ in place of W is

    E‖(W - Ŵ) x‖² = tr((W - Ŵ) H (W - Ŵ)ᵀ).

With H = L Lᵀ and e = w - ŵ for one row, that is Σ_k L_kk² (e_k + Σ_{j>k} e_j L_jk / L_kk)². Taken
from the last column to the first, each column can be rounded with all earlier mistakes made good
in it, so that only its own rounding is left in its term. That is what GPTQ does, without the
inverse of H (Frantar et al., GPTQ, 2022; Chee et al., QuIP, 2023, who prove the two equal).

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
_INT8_MAX: Final = 127


def gram_matrix(rows: Floats) -> Floats:
    """Mean of x xᵀ over rows x: [G, n, K] to [G, K, K]."""
    gram = np.swapaxes(rows, 1, 2) @ rows
    gram /= rows.shape[1]
    return gram


def output_error(errors: Floats, gram: Floats) -> Floats:
    """e H eᵀ of each row e: [G, N, K] and [G, K, K] to [G, N]."""
    return np.maximum(np.einsum("gnk,gnk->gn", errors @ gram, errors), 0)


def round_rows(
    weights: Floats,
    codes: Codes,
    scales: Floats,
    gram: Floats,
    *,
    damping: float,
    bound_pairs: bool,
) -> tuple[Codes, Floats, Floats]:
    """Codes with less output error than `codes`; in rows where that fails, `codes` themselves.

    With them the output errors [G, N] before and after.

    A weight of exactly zero stays zero, for it may have been pruned.

    Args:
        weights: [G, N, K], G independent groups of N rows.
        codes: [G, N, K], plain rounding of the weights.
        scales: [G, N].
        gram: [G, K, K], of the type to compute in.
        damping: share of the mean diagonal that is added to the diagonal before the search, for
            inputs that the sample did not show.
        bound_pairs: keep neighbouring codes of one sign within `PAIR_LIMIT`, as `codes` are.

    Raises:
        numpy.linalg.LinAlgError: if a damped matrix is not positive definite.
    """
    target = (weights / scales[..., None]).astype(gram.dtype)
    columns = np.ascontiguousarray(np.swapaxes(target, 1, 2))
    found = np.swapaxes(_successive(columns, gram, damping, bound_pairs), 1, 2)
    before, after = (output_error(target - c, gram) for c in (codes, found))
    chosen = np.where((after < before)[..., None], found, codes).astype(np.int8)
    unit = np.square(scales, dtype=np.float64)
    return chosen, before * unit, np.minimum(before, after) * unit


def _successive(target: Floats, gram: Floats, damping: float, bound_pairs: bool) -> Floats:
    """Round column after column of [G, K, N], each making good the mistakes before it."""
    groups, size, _ = target.shape
    # From the last to the first: what has most energy is rounded while most is left to help it.
    order = np.argsort(np.einsum("gkk->gk", gram), axis=1, kind="stable")
    factor = _unit_factor(gram, order, damping)
    each = np.arange(groups, dtype=np.intp)
    codes, errors = np.zeros_like(target), np.zeros_like(target)  # errors stand in `order`
    for stop in range(size, 0, -_BLOCK):
        start = max(stop - _BLOCK, 0)
        later = np.swapaxes(factor[:, stop:, start:stop], 1, 2) @ errors[:, stop:]
        block = np.swapaxes(factor[:, start:stop, start:stop], 1, 2).copy()
        for k in range(stop - 1, start - 1, -1):
            within = block[:, k - start, None, k + 1 - start :] @ errors[:, k + 1 : stop]
            at = order[:, k]
            wanted = target[each, at]
            code = np.rint(wanted + later[:, k - start] + within[:, 0])
            low, high = _limits(codes, each, at, bound_pairs)
            code = np.minimum(np.maximum(code, low), high)
            code *= wanted != 0
            codes[each, at] = code
            errors[:, k] = wanted - code
    return codes


def _unit_factor(gram: Floats, order: Indices, damping: float) -> Floats:
    """L of the damped matrix with rows and columns in `order`, each column over its diagonal."""
    group = np.arange(len(gram))[:, None, None]
    matrix = gram[group, order[:, :, None], order[:, None, :]]
    diagonal = np.einsum("gkk->gk", matrix)  # a view
    mean = diagonal.mean(axis=1, keepdims=True)
    diagonal += np.where(mean > 0, damping * mean, 1)
    factor = np.linalg.cholesky(matrix)
    factor /= np.einsum("gkk->gk", factor)[:, None, :].copy()
    return factor


def _limits(
    codes: Floats, each: Indices, at: Indices, bound_pairs: bool
) -> tuple[Floats | int, Floats | int]:
    """Least and largest code for column `at` of each group, given the one beside it in its pair."""
    if not bound_pairs:
        return -_INT8_MAX, _INT8_MAX
    partner = at ^ 1
    exists = partner < codes.shape[1]
    beside = codes[each, np.where(exists, partner, at)] * exists[:, None]
    low = np.maximum(-_INT8_MAX, -PAIR_LIMIT - np.minimum(beside, 0))
    return low, np.minimum(_INT8_MAX, PAIR_LIMIT - np.maximum(beside, 0))
