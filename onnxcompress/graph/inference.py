"""ONNX's own shape inference, held to what it can be trusted with."""

from __future__ import annotations

import logging

import onnx_ir as ir
from onnx_ir.passes.common import shape_inference


def infer(model: ir.Model) -> tuple[bool, str]:
    """Fill in types and shapes of inner values; what inputs and outputs say of themselves stays.

    Returns whether anything was filled in, and why not where that failed: onnx_ir writes types of
    sequences down as those of tensors, so models that compute with sequences are left alone.
    """
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    if any("Sequence" in node.op_type or "Optional" in node.op_type for node in nodes):
        return False, "values that are no tensors keep ONNX's inference from the model"
    outputs = [(v, v.type, v.shape) for v in model.graph.outputs]
    logger, complaints = logging.getLogger(shape_inference.__name__), _Complaints()
    logger.addFilter(complaints)
    try:
        modified = shape_inference.ShapeInferencePass()(model).modified
    finally:
        logger.removeFilter(complaints)
    for value, type_, shape in outputs:
        value.type, value.shape = type_, shape
    return modified, "ONNX's shape inference failed" if complaints.heard else ""


class _Complaints(logging.Filter):
    """Hears what the inference logs when it fails, which is all that it does then."""

    heard = False

    def filter(self, record: logging.LogRecord) -> bool:
        self.heard = self.heard or record.levelno >= logging.WARNING
        return False
