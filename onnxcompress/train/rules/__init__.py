"""Vector-Jacobian rules: the gradients of a node's inputs, given those of its outputs."""

from __future__ import annotations

from typing import Final

from onnxcompress.train.rules import (
    activation,
    contraction,
    convolution,
    elementwise,
    movement,
    normalization,
    pooling,
    quantization,
    recurrent,
    reduction,
    resizing,
    summation,
)
from onnxcompress.train.tape import Rule

RULES: Final[dict[str, Rule]] = (
    elementwise.RULES
    | activation.RULES
    | contraction.RULES
    | convolution.RULES
    | pooling.RULES
    | normalization.RULES
    | reduction.RULES
    | movement.RULES
    | resizing.RULES
    | summation.RULES
    | quantization.RULES
    | recurrent.RULES
)
"""By operator of the default ONNX domain; what is absent has no gradient here."""
