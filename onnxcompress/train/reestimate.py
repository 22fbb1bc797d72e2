"""Statistics of batch normalizations counted anew, for weights that are no longer what they were.

Pruning, quantizing or averaging weights moves what a normalization reads; the mean and variance
that it came with no longer bring that to 0 and 1. What is folded has none: there `correct_bias`
does as much for the means.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array, Result, Skip
from onnxcompress.data import Data, Images, interface, open_data
from onnxcompress.errors import InputError
from onnxcompress.graph.linear import is_op
from onnxcompress.operators import constant
from onnxcompress.train.batch_statistics import normalizations
from onnxcompress.train.moments import in_levels, moments

Norm = tuple[ir.Node, tuple[ir.Value, ir.Value]]
Progress = Callable[[int, int], None]
"""Called with the rounds done, a run over the data each, and how many there are."""


def reestimate(
    model: ir.Model,
    data: Any,
    *,
    images: Images | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Result:
    """Set each BatchNormalization's mean and variance to those of what it reads of the data.

    They are those of all samples together, whatever the batches: sums are exact, in float64. Those
    that follow others are counted when these are set, so the data is run once for each
    normalization on the longest path. In the main graph only.

    Args:
        model: in float or with fake quantization; not altered.
        data: inputs, as `open_data` opens them.
        executor: runs parts of the data in other processes.

    Returns:
        A copy, and as `skips` the normalizations that keep what they have: in training mode, or
        with statistics that are no float32 constants of their own.

    Raises:
        InputError: if there is nothing to set, or the data does not suit the model.

    Source: Izmailov et al., Averaging weights leads to wider optima (2018), where it is done by
    averages over batches.
    """
    copy = model.clone()
    found = list(normalizations(copy))
    if not found:
        raise InputError("the model has no batch normalization with statistics of its own: they "
                         "are folded into weights, or there are none")  # fmt: skip
    source = open_data(data, interface(copy), images=images)
    levels = in_levels(copy.graph, dict(found))
    for done, level in enumerate(levels, 1):
        _count(copy, level, source, executor)
        if progress is not None:
            progress(done, len(levels))
    skips = _skipped(copy.graph, {node for node, _ in found})
    return Result(copy, modified=True, skips=skips, figures={"reestimated": len(found)})


def _skipped(graph: ir.Graph, done: Collection[ir.Node]) -> tuple[Skip, ...]:
    reason = "it is in training mode, or its statistics are no float32 constants of its own"
    left = [n for n in graph if is_op(n, "BatchNormalization") and n not in done]
    return tuple(Skip(n.name or n.outputs[0].name or "", n.op_type, reason) for n in left)


def _count(model: ir.Model, norms: Sequence[Norm], data: Data, executor: Executor | None) -> None:
    guesses = dict[str, Array]()
    for norm, (mean, _) in norms:
        guess = constant(mean)
        assert guess is not None
        guesses[_read(norm)] = guess
    found = moments(model, guesses, data, executor)
    for norm, pair in norms:
        for value, array in zip(pair, found[_read(norm)], strict=True):
            value.const_value = ir.Tensor(array.astype(np.float32), name=value.name)


def _read(norm: ir.Node) -> str:
    x = norm.inputs[0]
    assert x is not None
    return x.name or ""
