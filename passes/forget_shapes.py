"""Forget the types and shapes that were inferred: whoever loads the model infers them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxcompress.contract import Pass, Result
from onnxcompress.graph.inference import forget


@dataclass(frozen=True, kw_only=True)
class ForgetShapes(Pass):
    """Leave out of the file what `infer_shapes` filled in for the passes behind it.

    Exact: no node changes, and notes that came with the model stay. In a graph of small weights
    they are a quarter of the file, and ONNX Runtime infers them anyway.

    Source: ONNX IR specification, `GraphProto.value_info`, which is optional.
    """

    name: ClassVar[str] = "forget_shapes"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> Result:
        return Result(model, modified=forget(model))
