"""Statistics of batch normalizations counted anew, for weights that are no longer what they were.

Pruning, quantizing or averaging weights moves what a normalization reads; the mean and variance
that it came with no longer bring that to 0 and 1. What is folded has none: there `correct_bias`
does as much for the means.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array, Kind, Result, Skip, Want
from onnxcompress.data import Data, Images, interface, open_data
from onnxcompress.errors import InputError
from onnxcompress.graph.linear import is_op
from onnxcompress.graph.scopes import reads
from onnxcompress.observe import observe
from onnxcompress.operators import constant
from onnxcompress.train.batch_statistics import normalizations
from onnxcompress.train.tape import Tape

_BATCH: Final = 32
_FAR: Final = 8.0
"""Standard deviations from what was subtracted to the mean from which squares lose digits."""

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
    levels = _levels(copy.graph, found)
    for done, level in enumerate(levels, 1):
        if _count(copy, level, source, executor):
            _count(copy, level, source, executor)
        if progress is not None:
            progress(done, len(levels))
    skips = _skipped(copy.graph, {node for node, _ in found})
    return Result(copy, modified=True, skips=skips, figures={"reestimated": len(found)})


def _skipped(graph: ir.Graph, done: Collection[ir.Node]) -> tuple[Skip, ...]:
    reason = "it is in training mode, or its statistics are no float32 constants of its own"
    left = [n for n in graph if is_op(n, "BatchNormalization") and n not in done]
    return tuple(Skip(n.name or n.outputs[0].name or "", n.op_type, reason) for n in left)


def _levels(graph: ir.Graph, norms: Sequence[Norm]) -> list[list[Norm]]:
    """The normalizations by how many of them lie before each on the longest path."""
    own, depths = dict(norms), dict[ir.Value, int]()
    levels = list[list[Norm]]()
    for node in graph:
        depth = max((depths.get(v, 0) for v in reads(node)), default=0)
        if node in own:
            if depth == len(levels):
                levels.append([])
            levels[depth].append((node, own[node]))
            depth += 1
        depths |= dict.fromkeys(node.outputs, depth)
    return levels


def _count(model: ir.Model, norms: Sequence[Norm], data: Data, executor: Executor | None) -> bool:
    """Set statistics by what normalizations read; whether they were too far off to be exact.

    Var x = E (x - s)² - (E (x - s))², with s the mean that was there.
    """
    copy = model.clone()
    tape, wants = Tape(copy.graph), list[tuple[Want, Want]]()
    nodes = {node.outputs[0].name: node for node in copy.graph}
    for norm, _ in norms:
        rest = _less_mean(tape, nodes[norm.outputs[0].name])
        square = tape.op("Mul", [rest, rest])
        wants.append((_mean_of(rest), _mean_of(square)))
    feeds = data.batches(_BATCH)
    seen = observe(copy, feeds, [want for pair in wants for want in pair], executor=executor)
    far = False
    for (_, (mean, variance)), (first, second) in zip(norms, wants, strict=True):
        for want in seen.missing((first, second)):
            raise InputError(f"{mean.name!r} cannot be counted: {seen.reasons[want]}")
        moved = seen.mean(first.value, 1)
        spread = np.maximum(seen.mean(second.value, 1) - np.square(moved), 0)
        far |= bool((np.square(moved) > _FAR**2 * spread).any())
        _set(mean, moved + constant(mean))
        _set(variance, spread)
    return far


def _less_mean(tape: Tape, node: ir.Node) -> ir.Value:
    """What the node reads, less the mean that it keeps: a normalization that scales nothing."""
    x, scale, _, mean, _ = node.inputs
    assert scale is not None and scale.shape is not None
    sizes = tuple(d for d in scale.shape if isinstance(d, int))
    one, zero = (tape.constant(np.full(sizes, number, np.float32)) for number in (1, 0))
    old = {"is_test": 1} if "is_test" in node.attributes else {}
    return tape.op("BatchNormalization", [x, one, zero, mean, one], {"epsilon": 0.0, **old})


def _mean_of(value: ir.Value) -> Want:
    return Want(value.name or "", Kind.MEAN, axis=1)


def _set(value: ir.Value, array: Array) -> None:
    value.const_value = ir.Tensor(array.astype(np.float32), name=value.name)
