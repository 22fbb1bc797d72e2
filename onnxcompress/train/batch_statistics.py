"""Batch normalization in training: by each batch's own statistics, which the model's follow.

While gradients are taken, BatchNormalization normalizes with the mean and variance of the batch,
through which the gradient passes. Those that the model keeps follow at each step, and are what it
is evaluated and returned with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.graph.linear import is_inference, is_op
from onnxcompress.operators import constant, float_attribute
from onnxcompress.train.gradients import LEAST_OPSET
from onnxcompress.train.tape import Tape

LEAST: Final = 2
"""Samples that have statistics: of one, all that is normalized per channel may be a zero."""
_MEAN, _VARIANCE = 3, 4


def kept_statistics(model: ir.Model) -> dict[str, float]:
    """Momentum by initializer: means and variances of normalizations in the main graph.

    Only those that are constant float32 of one node's own, in inference form.
    """
    return {
        value.name or "": float_attribute(node, "momentum", 0.9)
        for node, pair in normalizations(model)
        for value in pair
    }


def normalizations(model: ir.Model) -> Iterator[tuple[ir.Node, tuple[ir.Value, ir.Value]]]:
    """Nodes of the main graph that normalize with a mean and a variance of their own."""
    opset = model.graph.opset_imports.get("", LEAST_OPSET)
    for node in model.graph:
        if not is_op(node, "BatchNormalization") or not is_inference(node, opset):
            continue
        mean, variance = node.inputs[_MEAN], node.inputs[_VARIANCE]
        if mean is not variance and _is_own(mean) and _is_own(variance):
            assert mean is not None and variance is not None
            yield node, (mean, variance)


def are_fresh(model: ir.Model) -> bool:
    """Whether a normalization has means of 0 and variances of 1 only, as before any training."""
    return any(_holds(mean, 0) and _holds(variance, 1) for _, (mean, variance) in
               normalizations(model))  # fmt: skip


def by_batch(model: ir.Model, wanted: bool | None) -> bool:
    """Whether to train with the batch's; where that is left open, only what is fresh."""
    return are_fresh(model) if wanted is None else wanted


def use_batch(graph: ir.Graph, kept: Collection[str]) -> dict[str, str]:
    """Normalize with the batch's statistics in place; names of their values by whose they are.

    The variance that is to be followed is that of a larger population, m / (m - 1) of the batch's,
    m being its values per channel.

    Source: Ioffe and Szegedy, Batch Normalization (2015), algorithms 1 and 2.
    """
    tape, found = Tape(graph), dict[str, str]()
    for node in [node for node in graph if is_op(node, "BatchNormalization")]:
        mean, variance = node.inputs[_MEAN], node.inputs[_VARIANCE]
        if mean is None or variance is None or mean.name not in kept:
            continue
        node.attributes["training_mode"] = ir.AttrInt64("training_mode", 1)
        node.attributes["momentum"] = ir.AttrFloat32("momentum", 0.0)  # what comes is the batch's
        batch = tape.output(node, 1), tape.output(node, 2)
        for value, like in zip(batch, (mean, variance), strict=True):
            value.type, value.shape = like.type, like.shape
        x = node.inputs[0]
        assert x is not None
        whole = tape.op("Cast", [tape.op("Size", [x])], {"to": ir.DataType.FLOAT})
        each = tape.op("Div", [whole, tape.cast(tape.op("Size", [mean]), mean)])
        rest = tape.op("Sub", [each, tape.scalar(1.0, mean)])
        wide = tape.op("Mul", [batch[1], tape.op("Div", [each, rest])], like=variance)
        found |= {mean.name or "": batch[0].name or "", variance.name or "": wide.name or ""}
    return found


def follow(kept: Array, batch: Array, momentum: float, step: int) -> None:
    """Move what is kept towards the batch's, in place; `step` counts from 1.

    At first it is the mean of the batches so far, so that nothing is left of where it began.
    """
    kept += np.float32(max(1 - momentum, 1 / step)) * (batch - kept)


def _is_own(value: ir.Value | None) -> bool:
    return (
        value is not None
        and value.is_initializer()
        and value.const_value is not None
        and value.dtype is ir.DataType.FLOAT
        and len(value.uses()) == 1
        and not value.is_graph_output()
        and not value.is_graph_input()
    )


def _holds(value: ir.Value, number: float) -> bool:
    found = constant(value)
    return found is not None and bool((found == number).all())
