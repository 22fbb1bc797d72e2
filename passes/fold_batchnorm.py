"""Fold BatchNormalization into the linear operators beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Pass, Result, Skip
from onnxcompress.graph.folding import Folding
from onnxcompress.graph.linear import (
    Affine,
    Declined,
    NoSite,
    check_range,
    float_constant,
    is_inference,
    is_op,
    rank_of,
    spread,
    tensor_of,
)
from onnxcompress.operators import float_attribute


@dataclass(frozen=True, kw_only=True)
class FoldBatchnorm(Pass):
    """Fold batch normalization into the convolutions and matrix products beside it.

    At inference it is `y = a x + s` on each channel of axis 1, with `a = scale / sqrt(var + eps)`
    and `s = bias - mean * a` (ONNX BatchNormalization, opsets 1 to 15):

        Conv(W, b) -> BN   becomes   Conv(a W, a b + s)
        BN -> Conv(W, b)   becomes   Conv(W a, b + W s)     without zero padding, or s = 0
        BN -> BN           becomes   BN

    likewise ConvTranspose (before it only with s = 0), Gemm and MatMul (whose shift is the Add
    behind it), with groups, through Identity and Transpose, in subgraphs and functions. One that
    stands alone becomes Mul or Add where one of the two says it all.

    Left alone, each with its reason in `skips`: training mode; parameters or weights that are not
    constant (a graph input with an initializer is the caller's to change); values read elsewhere or
    exported; another axis; a weight that would overflow or turn denormal in its dtype; a weight
    over 1 MiB that others share (a smaller one is copied).
    """

    name: ClassVar[str] = "fold_batchnorm"
    exact: ClassVar[bool] = True

    split: bool = False
    """Write one that stands alone as Mul and Add. In float they take about 1.7 times as long as
    one BatchNormalization in ONNX Runtime, but unlike it they have integer kernels."""

    def call(self, model: ir.Model) -> Result:
        folding = Folding(model)
        skips: list[Skip] = []
        seen = 0
        for nodes in folding.containers():
            norms = [n for n in nodes if is_op(n, "BatchNormalization")]
            seen += len(norms)
            reasons = {n: self._fold_after(folding, n) for n in norms}
            for node in reversed(norms):
                reason = reasons[node] if node.graph is not None else None
                if reason is not None and (reason := self._fold_before(folding, node, reason)):
                    skips.append(Skip(node.name or str(node.outputs[0].name), node.op_type, reason))
        folding.finish()
        figures = {"folded": seen - len(skips), "left": len(skips)}
        return Result(model, folding.modified, skips=tuple(skips), figures=figures)

    def _fold_after(self, folding: Folding, node: ir.Node) -> str | None:
        """Fold into what comes before; why not ("" if nothing foldable comes before), or None."""
        try:
            folding.into_producer(node, node.inputs[0], affine_of(node, folding.opset))
        except NoSite:
            return ""
        except Declined as declined:
            return str(declined)
        return None

    def _fold_before(self, folding: Folding, node: ir.Node, reason: str) -> str | None:
        """Fold into what comes behind, or write as Mul or Add; why not, or None."""
        try:
            affine = affine_of(node, folding.opset)
        except Declined as declined:
            return str(declined)
        try:
            folding.into_consumers(node, node.inputs[0], affine, may_add=True)
            return None
        except NoSite:
            pass
        except Declined as declined:
            reason = reason or str(declined)
        try:
            self._write_alone(folding, node, affine)
            return None
        except Declined as declined:
            return reason or str(declined)

    def _write_alone(self, folding: Folding, node: ir.Node, affine: Affine) -> None:
        data = node.inputs[0]
        if affine.scales and affine.shifts and not self.split:
            raise Declined("it stands alone, and is faster so than as Mul and Add")
        rank = rank_of(data) or rank_of(node.outputs[0])
        dtype = node.outputs[0].dtype or (data.dtype if data is not None else None)
        if data is None or rank == 1 or dtype is None:
            raise Declined("the rank or type of its data is unknown")
        check_range(affine.scale, dtype)
        steps = [
            (op_type, tensor_of(spread(array, 1, rank), dtype))
            for op_type, array, needed in (
                ("Mul", affine.scale, affine.scales or not affine.shifts),
                ("Add", affine.shift, affine.shifts),
            )
            if needed
        ]
        folding.replace(node, data, *steps)


def affine_of(node: ir.Node, opset: int) -> Affine:
    """What an inference BatchNormalization computes.

    Raises:
        Declined: if it is not one, or its parameters are not finite constants of one shape.
    """
    if not is_inference(node, opset):
        raise Declined("it is in training mode, or keeps statistics by position")
    tensors = (float_constant(v) for v in node.inputs[1:5])
    parameters = [t.numpy().astype(np.float64) for t in tensors if t is not None]
    if len(parameters) != 4:
        raise Declined("a parameter is not constant")
    shapes = {p.shape for p in parameters}
    if len(shapes) != 1 or parameters[0].ndim != 1 or parameters[0].size == 0:
        raise Declined("its parameters are not one number for each channel")
    scale, bias, mean, variance = parameters
    variance = variance + float(np.float32(float_attribute(node, "epsilon", 1e-5)))
    if not np.all(variance > 0):
        raise Declined("the variance plus epsilon is not positive")
    with np.errstate(over="ignore", invalid="ignore"):
        scale = scale / np.sqrt(variance)
        shift = bias - mean * scale
    if not (np.all(np.isfinite(scale)) and np.all(np.isfinite(shift))):
        raise Declined("a parameter is not finite")
    return Affine(scale, shift, axis=1)
