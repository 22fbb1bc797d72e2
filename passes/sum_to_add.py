"""Write a Sum of two values as Add, which has an integer kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxcompress.contract import Pass, Result
from onnxcompress.operators import DEFAULT_DOMAINS

_BROADCASTS = 8


@dataclass(frozen=True, kw_only=True)
class SumToAdd(Pass):
    """Replace Sum(a, b) by Add(a, b).

    Older exporters write residual connections as Sum, which runtimes know in float only. Exact:
    both add and broadcast alike from opset 8 on; before it Sum does not broadcast, and Add needs
    the same shapes there too. Sums of one or of three and more stay. Goes into the main graph
    only. Idempotent. Source: ONNX Sum, Add.
    """

    name: ClassVar[str] = "sum_to_add"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> Result:
        written = 0
        if model.graph.opset_imports.get("", 0) >= _BROADCASTS:
            for node in model.graph:
                if node.op_type == "Sum" and node.domain in DEFAULT_DOMAINS:
                    if len(node.inputs) != 2:
                        continue
                    node.op_type = "Add"
                    written += 1
        return Result(model, modified=bool(written), figures={"sums written as Add": written})
