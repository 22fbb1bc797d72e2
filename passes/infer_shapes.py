"""Work out the types and shapes of inner values, which placement and validation read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from onnxcompress.contract import Pass, Result, Skip


@dataclass(frozen=True, kw_only=True)
class InferShapes(Pass):
    """Fill in the types and shapes of inner values by ONNX's own shape inference.

    Exact: no node changes. What inputs and outputs say of themselves stays word for word. Where
    inference fails, the model is left as it was, with a line in the report.

    Source: `onnx.shape_inference`.
    """

    name: ClassVar[str] = "infer_shapes"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> Result:
        outputs = [(v, v.type, v.shape) for v in model.graph.outputs]
        try:
            modified = ShapeInferencePass()(model).modified
        except Exception as error:  # the checker behind it raises its own kinds
            reason = f"shape inference failed: {' '.join(str(error).split())[:200]}"
            return Result(model, modified=False, skips=(Skip("", "", reason),))
        for value, type_, shape in outputs:
            value.type, value.shape = type_, shape
        return Result(model, modified=modified)
