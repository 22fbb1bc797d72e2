"""Join a product of matrices and its bias into Gemm, whose integer kernel takes the bias too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxcompress.contract import Pass, Result
from onnxcompress.operators import DEFAULT_DOMAINS, constant_tensor


@dataclass(frozen=True, kw_only=True)
class FuseGemm(Pass):
    """Write MatMul(x, W) + b as Gemm(x, W, b) where x and W are matrices and b is a vector.

    ONNX Runtime does the same to a float model by itself, but in a quantized one it leaves a
    float Gemm behind, because by then the bias is no longer part of the pair. So this runs before
    pairs are inserted. Exact: the same products and sums. Declines silently (ONNX Runtime would
    not fuse either) where ranks are unknown or differ, the product is used twice or exported, or
    W or b is not constant. Goes into the main graph only.

    Source: ONNX Gemm, MatMul.
    """

    name: ClassVar[str] = "fuse_gemm"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> Result:
        graph = model.graph
        fused = 0
        for node in list(graph):
            add = _bias_of(node)
            if add is None:
                continue
            bias = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
            gemm = ir.node("Gemm", [*node.inputs, bias], name=node.name or add.name)
            result, old = gemm.outputs[0], add.outputs[0]
            result.name, result.type, result.shape = old.name, old.type, old.shape
            graph.insert_before(add, gemm)
            old.replace_all_uses_with(result, replace_graph_outputs=True)
            graph.remove([add, node], safe=True)
            fused += 1
        return Result(model, modified=bool(fused), figures={"products fused": fused})


def _bias_of(node: ir.Node) -> ir.Node | None:
    """The Add behind a MatMul that gives each output column its constant bias."""
    if node.op_type != "MatMul" or node.domain not in DEFAULT_DOMAINS:
        return None
    data, weight = node.inputs[0], constant_tensor(node.inputs[1])
    product = node.outputs[0]
    if data is None or data.shape is None or data.shape.rank() != 2:
        return None
    if weight is None or weight.shape.rank() != 2 or weight.dtype != ir.DataType.FLOAT:
        return None
    if product.is_graph_output() or len(product.uses()) != 1:
        return None
    (usage,) = product.uses()
    add = usage.node
    if add.op_type != "Add" or add.domain not in DEFAULT_DOMAINS or add.graph is not node.graph:
        return None
    bias = constant_tensor(add.inputs[1 - usage.idx])
    fits = bias is not None and bias.shape.numpy() == (weight.shape.numpy()[1],)
    return add if fits else None
