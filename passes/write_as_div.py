"""Write the factor in front of an Erf as a divisor, by which ONNX Runtime knows Gelu."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Pass, Result
from onnxcompress.graph.linear import is_op
from onnxcompress.graph.names import FreshNames
from onnxcompress.graph.rewriting import become, initializer
from onnxcompress.operators import constant_tensor, is_number

_BROADCASTS: Final = 7


@dataclass(frozen=True, kw_only=True)
class WriteAsDiv(Pass):
    """Replace Erf(Mul(x, √½)) by Erf(Div(x, √2)).

    Exporters that fold a division into its reciprocal keep ONNX Runtime from joining what Gelu
    is written out in, and the bias before it: five passes over the widest values of a transformer
    in place of one. Exact but for the last bit of the quotient. Goes into the main graph only.
    Idempotent.

    Source: ONNX Erf, Mul, Div.
    """

    name: ClassVar[str] = "write_as_div"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> Result:
        graph, fresh = model.graph, FreshNames(model.graph)
        root: ir.Value | None = None
        written = 0
        for node in graph if graph.opset_imports.get("", 0) >= _BROADCASTS else ():
            if (index := _factor(node)) is not None:
                if root is None:
                    root = initializer(graph, fresh("sqrt_2"), np.array(math.sqrt(2), np.float32))
                become(node, "Div", [node.inputs[1 - index], root])
                written += 1
        return Result(model, modified=bool(written), figures={"written as Div": written})


def _factor(node: ir.Node) -> int | None:
    """Which input of a Mul, read by Erf alone, is the number √½."""
    product = node.outputs[0]
    if not is_op(node, "Mul") or product.is_graph_output():
        return None
    if not all(is_op(use.node, "Erf") for use in product.uses()):
        return None
    for index in (1, 0):
        factor, data = node.inputs[index], node.inputs[1 - index]
        if not is_number(factor, math.sqrt(0.5)):
            continue
        tensor = constant_tensor(factor)
        assert tensor is not None
        # A factor with axes of its own might give the product more of them than x has.
        rank = 0 if data is None or data.shape is None else data.shape.rank()
        if tensor.dtype is ir.DataType.FLOAT and len(tensor.shape) <= rank:
            return index
    return None
