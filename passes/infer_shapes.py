"""Work out the types and shapes of inner values, which placement and validation read."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import shape_inference

from onnxcompress.contract import Pass, Result, Skip


@dataclass(frozen=True, kw_only=True)
class InferShapes(Pass):
    """Fill in the types and shapes of inner values by ONNX's own shape inference.

    Exact: no node changes. What inputs and outputs say of themselves stays word for word. Where
    inference fails, the model is left as it was, with a line in the report. So are models that
    compute with sequences, whose types onnx_ir's inference writes down as those of tensors.

    Source: `onnx.shape_inference`.
    """

    name: ClassVar[str] = "infer_shapes"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> Result:
        nodes = ir.traversal.RecursiveGraphIterator(model.graph)
        if any("Sequence" in node.op_type or "Optional" in node.op_type for node in nodes):
            skip = Skip("", "", "values that are no tensors keep ONNX's inference from the model")
            return Result(model, modified=False, skips=(skip,))
        outputs = [(v, v.type, v.shape) for v in model.graph.outputs]
        logger, complaints = logging.getLogger(shape_inference.__name__), _Complaints()
        logger.addFilter(complaints)
        try:
            modified = shape_inference.ShapeInferencePass()(model).modified
        finally:
            logger.removeFilter(complaints)
        for value, type_, shape in outputs:
            value.type, value.shape = type_, shape
        skips = (Skip("", "", "ONNX's shape inference failed"),) if complaints.heard else ()
        return Result(model, modified=modified, skips=skips)


class _Complaints(logging.Filter):
    """Hears what the inference logs when it fails, which is all that it does then."""

    heard = False

    def filter(self, record: logging.LogRecord) -> bool:
        self.heard = self.heard or record.levelno >= logging.WARNING
        return False
