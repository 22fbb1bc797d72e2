"""Whether a graph computes class scores at a value, told from the operators that made it.

An argmax says something of logits and nothing of an embedding, though both are floats of one
shape. Scores come from a matrix product, a convolution or a softmax; embeddings and hidden states
from a normalization or a recurrent operator.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.operators import Role, constant_tensor, operator

_FARTHEST = 64
_RECURRENT = {"LSTM", "GRU", "RNN"}
_SCORING = {"Softmax", "LogSoftmax", "Sigmoid", "HardSigmoid"}
_TRANSPARENT = {"QuantizeLinear", "DequantizeLinear", "BatchNormalization"}


def gives_class_scores(value: ir.Value) -> bool | None:
    """Yes, no, or None where the graph does not tell.

    Walks back over what moves scores, shifts them by a constant or scales them by one number.
    """
    for _ in range(_FARTHEST):
        node = value.producer()
        if node is None:
            return None
        verdict = _verdict(node)
        source = _source(node)
        if verdict is not None or source is None:
            return verdict
        value = source
    return None


def _verdict(node: ir.Node) -> bool | None:
    """What this operator alone tells."""
    role = operator(node).role
    if role is Role.CONTRACT:
        return node.op_type not in _RECURRENT
    if node.op_type in _SCORING or _is_softmax(node):
        return True
    if role is Role.NORMALIZE and node.op_type not in _TRANSPARENT:
        return False
    if role is not Role.ELEMENTWISE:
        return None
    if node.op_type in ("Add", "Sub"):
        return True if any(_is_product(v) for v in node.inputs) else None
    return None if _scalar_operand(node) else False


def _source(node: ir.Node) -> ir.Value | None:
    """The input that scores would come from; None where the walk ends."""
    if operator(node).role is Role.OTHER and node.op_type not in _TRANSPARENT:
        return None
    flowing = [v for v in node.inputs[:2] if v is not None and constant_tensor(v) is None]
    if operator(node).role is Role.ELEMENTWISE and len(flowing) != 1:
        return None
    return flowing[0] if flowing else None


def _is_softmax(node: ir.Node) -> bool:
    """exp(x) / Σ exp(x), as exporters write it out."""
    numerator = node.inputs[0].producer() if node.op_type == "Div" and node.inputs[0] else None
    return numerator is not None and numerator.op_type == "Exp"


def _is_product(value: ir.Value | None) -> bool:
    """Whether `value` is a product that waits for its bias."""
    node = value.producer() if value is not None else None
    return node is not None and node.op_type in ("MatMul", "Conv", "Gemm", "Einsum")


def _scalar_operand(node: ir.Node) -> bool:
    return any(t.size == 1 for v in node.inputs if (t := constant_tensor(v)) is not None)
