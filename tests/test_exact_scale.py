"""What the exact passes cost as graphs grow."""

from __future__ import annotations

import time

import numpy as np
import onnx_ir as ir

from onnxcompress.passes import EXACT
from tests.benchmarks.graphs import generate


def seconds(model: ir.Model) -> float:
    """Processor time, which the machine's other work does not lengthen much."""
    start = time.process_time()
    for pass_ in EXACT:
        pass_()(model)
    return time.process_time() - start


def test_generated_graphs_are_whole_and_reproducible() -> None:
    for nodes in (1, 100, 1001):
        model = generate(nodes)
        assert len(model.graph) == nodes
        text = ir.to_proto(model).SerializeToString()
        assert text == ir.to_proto(generate(nodes)).SerializeToString()
        assert text != ir.to_proto(generate(nodes, seed=1)).SerializeToString() or nodes == 1


def test_time_grows_with_the_nodes() -> None:
    small = min(seconds(generate(1_000)) for _ in range(3))
    large = min(seconds(generate(4_000)) for _ in range(2))
    assert large / small < 4**1.15 * 1.25, (small, large)


def hub(readers: int) -> ir.Model:
    """Many folded, identical and dead readers of one value and of one constant; many outputs."""
    x = ir.Value(name="x", shape=ir.Shape([4]), type=ir.TensorType(ir.DataType.FLOAT))
    one = ir.Value(name="one", const_value=ir.Tensor(np.ones(1, np.float32)))
    nodes: list[ir.Node] = []
    outputs: list[ir.Value] = []
    for _ in range(readers):
        folded = ir.node("Neg", [one])
        same = ir.node("Mul", [x, one])
        moved = ir.node("Add", [same.outputs[0], folded.outputs[0]])
        handed = ir.node("Identity", [moved.outputs[0]])
        nodes += [folded, same, moved, handed, ir.node("Exp", [x])]
        outputs.append(handed.outputs[0])
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=[one], opset_imports={"": 18})
    return ir.Model(graph, ir_version=9)


def test_neither_shared_values_nor_many_outputs_make_it_slower() -> None:
    small = min(seconds(hub(200)) for _ in range(3))
    model = hub(800)
    large = min(seconds(model), seconds(hub(800)))
    assert [n.op_type for n in model.graph] == ["Add"] * 800
    assert list(model.graph.initializers) and len(model.graph.initializers) == 1
    assert large / small < 4**1.15 * 1.25, (small, large)
