"""The exact rewrites before and after training: batchnorm goes into weights when it may."""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress import schemes
from onnxcompress.contract import Pass
from onnxcompress.passes.deduplicate_initializers import DeduplicateInitializers
from onnxcompress.passes.fold_batchnorm import FoldBatchnorm
from onnxcompress.passes.forget_shapes import ForgetShapes
from onnxcompress.pipeline import run


def to_train(model: ir.Model, *, by_batch: bool = False) -> ir.Model:
    """A copy after the exact rewrites, but that equal weights, such as zero biases, stay apart.

    Batch normalizations stay too if they are to be trained with the statistics of batches.
    """
    passes = _passes()
    if by_batch:
        passes = [p for p in passes if not isinstance(p, FoldBatchnorm)]
    return run(model, passes).model


def when_trained(model: ir.Model) -> ir.Model:
    """The model itself after what `to_train` may have left for later."""
    return run(model, (*_passes(), ForgetShapes()), copy=False).model


def _passes() -> list[Pass]:
    return [p for p in schemes.exact() if not isinstance(p, DeduplicateInitializers)]
