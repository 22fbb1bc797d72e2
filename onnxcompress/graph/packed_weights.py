"""Weights that are integers in the file and floats in the kernel, which costs no time.

    DQ(W_q, scale) ─ Conv    ⇒    Mul(Cast(W_q), scale) ─ Conv

ONNX Runtime computes a DequantizeLinear of constants anew on every run, so that it can make
integer kernels of it; a Cast and a Mul of constants it folds once, as it loads the model.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.graph.names import FreshNames
from onnxcompress.graph.rewriting import initializer, insert
from onnxcompress.operators import constant


def unpacked(dequantizer: ir.Node, graph: ir.Graph, fresh: FreshNames) -> ir.Value | None:
    """The floats that a DequantizeLinear of an initializer gives, to the bit, for `graph`.

    Args:
        graph: the main graph, in front of which they are made, so that all bodies see them.

    Returns:
        None where it has a zero point, which would take a third operator, or blocks.
    """
    codes, scale = dequantizer.inputs[0], constant(dequantizer.inputs[1])
    zero = constant(dequantizer.inputs[2]) if len(dequantizer.inputs) > 2 else None
    assert codes is not None and codes.shape is not None
    if scale is None or scale.ndim > 1 or (zero is not None and zero.any()):
        return None
    name = (codes.name or "weight").removesuffix("_quantized")
    step = initializer(graph, fresh(f"{name}_step"), _along(scale, dequantizer, len(codes.shape)))
    first, float32 = graph[0], int(ir.DataType.FLOAT)
    whole = insert(first, "Cast", [codes], fresh(f"{name}_whole"), {"to": float32})
    floats = insert(first, "Mul", [whole, step], fresh(f"{name}_unpacked"))
    whole.shape = floats.shape = codes.shape
    return floats


def packed(value: ir.Value | None) -> ir.Value | None:
    """The integer initializer behind `unpacked` floats; None where `value` is something else."""
    whole = _first_input(value, "Mul")
    codes = _first_input(whole, "Cast")
    return codes if codes is not None and codes.is_initializer() else None


def _first_input(value: ir.Value | None, op_type: str) -> ir.Value | None:
    producer = None if value is None else value.producer()
    return producer.inputs[0] if producer is not None and producer.op_type == op_type else None


def _along(scale: Array, dequantizer: ir.Node, rank: int) -> Array:
    """The scale as it broadcasts against the weight."""
    if scale.ndim == 0 or scale.size == 1:
        return scale.reshape(())
    shape = [1] * rank
    axis = dequantizer.attributes["axis"].as_int() if "axis" in dequantizer.attributes else 1
    shape[axis] = scale.size
    return scale.reshape(shape)
