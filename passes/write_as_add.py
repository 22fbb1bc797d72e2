"""Write Sum of two and Sub of a constant as Add, which has an integer kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Pass, Result
from onnxcompress.graph.names import FreshNames
from onnxcompress.graph.rewriting import initializer
from onnxcompress.operators import DEFAULT_DOMAINS, constant

_BROADCASTS = 8


@dataclass(frozen=True, kw_only=True)
class WriteAsAdd(Pass):
    """Replace Sum(a, b) by Add(a, b) and Sub(a, c) by Add(a, -c) where c is a float constant.

    Older exporters write residual connections as Sum; runtimes know both in float only. Exact:
    all broadcast alike from opset 8 on, and a float is negated without rounding. Sums of one or
    of three and more stay. Goes into the main graph only. Idempotent.

    Source: ONNX Sum, Sub, Add.
    """

    name: ClassVar[str] = "write_as_add"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> Result:
        written = 0
        if model.graph.opset_imports.get("", 0) >= _BROADCASTS:
            fresh = FreshNames(model.graph)
            for node in model.graph:
                if node.domain in DEFAULT_DOMAINS and _is_addition(node, model.graph, fresh):
                    node.op_type = "Add"
                    written += 1
        return Result(model, modified=bool(written), figures={"written as Add": written})


def _is_addition(node: ir.Node, graph: ir.Graph, fresh: FreshNames) -> bool:
    """Whether the node's inputs, a subtracted constant negated here, need only be added."""
    if node.op_type == "Sum":
        return len(node.inputs) == 2
    if node.op_type != "Sub":
        return False
    array = constant(node.inputs[1])
    if array is None or array.dtype != np.float32:
        return False
    name = fresh(f"{node.outputs[0].name}_addend")
    node.replace_input_with(1, initializer(graph, name, -array))
    return True
