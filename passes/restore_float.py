"""Mixed precision: give layers that int8 hurts most back to float."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import onnx_ir as ir

from onnxcompress import targets
from onnxcompress.contract import Pass, Result, Skip
from onnxcompress.graph.pairs import Integers, is_restorable


@dataclass(frozen=True, kw_only=True)
class RestoreFloat(Pass):
    """Return integer kernels to float, and drop the pairs that no kernel needs any more.

    Runs behind `insert_qdq` and what corrects it, before the model is saved: the floats that it
    puts back are those that `insert_qdq` remembered. What stays on integers is not touched, so
    its rounding and its biases are what they were::

        DQ ─ Conv(DQ(W_q)) ─ Q ─ DQ ─ Conv …        DQ ─ Conv(W) ─ Q ─ DQ ─ Conv …

    A pair goes when the kernel that gives it out and all that read it are on floats.
    `remove_unused` takes away what nothing reads afterwards, `shield_floats` keeps ONNX Runtime
    from quantizing the weights again. `compress` chooses the nodes when it is given a budget.

    Where only the data's rounding hurts, the weight may stay in the file as it is (`packed`): the
    kernel reads Mul(Cast(W_q), scale), which ONNX Runtime folds as it loads, so that a kernel in
    float costs time and no space.

    Declines, with a line in the report, kernels whose floats are unknown. Idempotent.

    Source: mixed precision as in Dong et al., HAWQ: Hessian AWare Quantization of Neural Networks
    with Mixed-Precision, 2019, with two precisions.
    """

    name: ClassVar[str] = "restore_float"

    target: str = "cpu"
    """Runtime whose kernels were aimed at."""
    nodes: tuple[str, ...] = ()
    """Names of nodes to return to float (of their first output where they have none of their own);
    * and ? match."""
    packed: tuple[str, ...] = ()
    """Of these nodes, those whose weights stay integers in the file."""

    def call(self, model: ir.Model) -> Result:
        integers = Integers.of(model.graph, targets.load(self.target))
        wanted = [node for node in integers.kernels if _matches(node, self.nodes)]
        found = [node for node in wanted if is_restorable(node)]
        reason = "its float weight is unknown: run this behind insert_qdq, on the same model"
        skips = [
            Skip(node.name or "", node.op_type, reason)
            for node in wanted
            if not is_restorable(node)
        ]
        packed = [node for node in found if _matches(node, self.packed)]
        modified = integers.return_to_float(found, packed)
        figures = {"kernels in float": len(found), "with weights as integers": len(packed)}
        return Result(model, modified=modified, skips=tuple(skips), figures=figures)


def _matches(node: ir.Node, patterns: tuple[str, ...]) -> bool:
    name = node.name or node.outputs[0].name or ""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
