"""The ResNet-50 of the onnx wheel's light models, with seeded random weights.

The light models make their weights with ConstantOfShape nodes, all of one value. Random ones,
scaled so that activations keep their size (He et al., Delving Deep into Rectifiers, 2015), make
it a model that costs what ResNet-50 costs; nobody can say what is on the pictures.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, version_converter
from onnx.backend.test.loader import DATA_DIR

INPUT = "gpu_0/data_0"
_OPSET = 13  # the first with per-channel DequantizeLinear, which both tools need
_IR_VERSION = 8


def build(path: Path) -> Path:
    """Write the model: float32 (1, 3, 224, 224) to 1000 probabilities, about 100 MB."""
    model = onnx.load(Path(DATA_DIR) / "light" / "light_resnet50.onnx")
    graph = model.graph
    shapes = {w.name: numpy_helper.to_array(w) for w in graph.initializer}
    made = [n for n in graph.node if n.op_type == "ConstantOfShape"]
    random = np.random.default_rng(0)
    weights = {n.output[0]: _weight(n.output[0], shapes[n.input[0]], random) for n in made}
    read = {name for n in graph.node if n not in made for name in n.input}
    kept = [w for w in graph.initializer if w.name in read and w.name not in weights]
    nodes = [n for n in graph.node if n.op_type != "ConstantOfShape"]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in weights.items())
    inputs = [v for v in graph.input if v.name == INPUT]
    del graph.input[:]
    graph.input.extend(inputs)
    model.ir_version = _IR_VERSION
    onnx.save(version_converter.convert_version(model, _OPSET), path)
    return path


def _weight(name: str, shape: Any, random: Any) -> Any:
    if len(shape) > 1:
        gain = 1e-4 if name.startswith("gpu_0/pred") else 2
        spread = math.sqrt(gain / math.prod(shape[1:]))
        return random.normal(0, spread, shape).astype(np.float32)
    if name.endswith(("_s_0", "_riv_0")):  # scale and variance of a batch normalization
        # A block's last scale is small, so that the residual sums do not grow.
        middle = 0.5 if "branch2c_bn_s" in name else 1.0
        return (middle * random.uniform(0.8, 1.2, shape)).astype(np.float32)
    return random.normal(0, 0.1, shape).astype(np.float32)


def images(count: int, seed: int) -> Any:
    """Blurred noise, float32 (count, 3, 224, 224): like pictures, most of it is slow."""
    random = np.random.default_rng(seed)
    coarse = random.standard_normal((count, 3, 7, 7), np.float32)
    fine = random.standard_normal((count, 3, 224, 224), np.float32)
    return np.kron(coarse, np.ones((32, 32), np.float32)) + 0.25 * fine
