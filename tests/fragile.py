"""Nets of convolutions in which int8 breaks a known layer, and inputs for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 8


def chain(
    layers: int = 5, *, weights: int | None = None, values: int | None = None, seed: int = 0
) -> ir.Model:
    """Convolutions `conv0`, `conv1` … with Relu between them.

    Args:
        weights: in this layer, every row of the weight has one huge element that meets a channel
            of zeros: rounded with it in one scale, the rest of the row is gone.
        values: what this layer gives out has a huge channel that the next one ignores.
    """
    rng = np.random.default_rng(seed)
    matrices = [
        rng.standard_normal((CHANNELS, CHANNELS, 3, 3)).astype(np.float32) / 8
        for _ in range(layers)
    ]
    if weights is not None:
        matrices[weights - 1][0] = 0
        matrices[weights][:, 0] = 100
    if values is not None:
        matrices[values][0] *= 300
        matrices[values + 1][:, 0] = 0
    nodes: list[onnx.NodeProto] = []
    value = "x"
    for i in range(layers):
        last = i == layers - 1
        out = "y" if last else f"c{i}"
        nodes.append(
            helper.make_node("Conv", [value, f"w{i}"], [out], name=f"conv{i}", pads=[1, 1, 1, 1])
        )
        if not last:
            nodes.append(helper.make_node("Relu", [out], [f"r{i}"], name=f"relu{i}"))
        value = f"r{i}"
    shape = ["N", CHANNELS, 8, 8]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(matrix, f"w{i}") for i, matrix in enumerate(matrices)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ir.from_proto(model)


def feeds(count: int = 6, seed: int = 1) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {"x": rng.standard_normal((1, CHANNELS, 8, 8)).astype(np.float32)} for _ in range(count)
    ]
