"""Work out the types and shapes of inner values, which placement and validation read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxcompress.contract import Pass, Result, Skip
from onnxcompress.graph.inference import infer


@dataclass(frozen=True, kw_only=True)
class InferShapes(Pass):
    """Fill in the types and shapes of inner values by ONNX's own shape inference.

    Exact: no node changes. What inputs and outputs say of themselves stays word for word. Where
    inference fails, the model is left as it was, with a line in the report. So are models that
    compute with sequences, whose types onnx_ir's inference writes down as those of tensors. Goes
    into bodies of If, Loop and Scan.

    Source: `onnx.shape_inference`.
    """

    name: ClassVar[str] = "infer_shapes"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> Result:
        modified, reason = infer(model)
        skips = (Skip("", "", reason),) if reason else ()
        return Result(model, modified=modified, skips=skips)
