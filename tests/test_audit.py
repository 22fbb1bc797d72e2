"""The audit counts what a run multiplies, and believes only what the runtime fused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.passes.quantize_dynamic import QuantizeDynamic
from onnxcompress.validation.audit import audit
from tests.passes.calibrated import feeds_of, quantized
from tests.passes.exactness import Net
from tests.passes.test_insert_qdq import conv


def network() -> Net:
    net = Net()
    x = net.op("Relu", conv(net, net.input("x", 2, 8, 10, 10), c_out=16))
    x = net.op("Tanh", conv(net, x, 16, 4, group=4))
    x = net.op("Flatten", x)
    net.op("Gemm", x, net.normal("w", 400, 5), out="y")
    net.output("y")
    return net


MACS = 2 * 100 * 16 * 72 + 2 * 100 * 4 * 36 + 2 * 400 * 5


def test_a_float_model_has_no_integers() -> None:
    net = network()
    found = audit(ir.from_proto(net.model()), feeds_of(net)[0])
    assert (found.macs, found.integer_macs, found.share) == (MACS, 0, 0)
    assert not found.unfused


def test_a_cell_that_gives_its_last_state_only_counts() -> None:
    net = Net()
    random = np.random.default_rng(0)
    w = net.weight("W", random.standard_normal((1, 64, 8)))
    r = net.weight("R", random.standard_normal((1, 64, 16)))
    x = net.op("LSTM", net.input("x", 5, 3, 8), w, r, hidden_size=16)
    net.op("Identity", x, out="y")
    net.output("y")
    model = ir.from_proto(net.model())
    cell = next(node for node in model.graph if node.op_type == "LSTM")
    cell.resize_outputs(2)
    cell.outputs[1].name = "last"
    x = cell.outputs[0]
    x.replace_all_uses_with(cell.outputs[1])
    x.name = ""
    assert audit(model, feeds_of(net)[0]).macs == 5 * 3 * (64 * 8 + 64 * 16)


def test_fused_kernels_count() -> None:
    net = network()
    model, _ = quantized(net.model(), feeds_of(net))
    assert audit(model, feeds_of(net)[0]).share == 1
    partly, _ = quantized(net.model(), feeds_of(net), exclude=("Gemm",))
    found = audit(partly, feeds_of(net)[0])
    assert found.macs == MACS and found.integer_macs == MACS - 2 * 400 * 5


def test_pairs_that_only_cost_are_named() -> None:
    net = network()
    model, _ = quantized(net.model(), feeds_of(net))
    node = next(n for n in model.graph if n.op_type == "Conv")
    quantizer = next(
        n
        for n in model.graph
        if n.op_type == "QuantizeLinear"
        and n.inputs[0]
        and (p := n.inputs[0].producer()) is not None
        and p.op_type == "Relu"
    )
    relu = quantizer.inputs[0]
    assert relu is not None
    tanh = ir.node("Tanh", [relu], name="in_between")
    model.graph.insert_before(quantizer, tanh)
    quantizer.replace_input_with(0, tanh.outputs[0])
    tanh.outputs[0].name = "in_between"
    found = audit(model, feeds_of(net)[0])
    assert [skip.node for skip in found.unfused] == [node.name]
    assert found.integer_macs == MACS - 2 * 100 * 16 * 72


def test_dynamic_products_and_recurrent_cells_count() -> None:
    net = Net()
    random = np.random.default_rng(0)
    w = net.weight("W", random.standard_normal((1, 64, 8)))
    r = net.weight("R", random.standard_normal((1, 64, 16)))
    x = net.op("LSTM", net.input("x", 5, 3, 8), w, r, hidden_size=16)
    net.op("MatMul", net.op("Squeeze", x), net.normal("v", 16, 4), out="y")
    net.output("y")
    feed: dict[str, Any] = feeds_of(net)[0]
    lstm, product = 5 * 3 * (64 * 8 + 64 * 16), 5 * 3 * 16 * 4
    model = ir.from_proto(net.model())
    assert audit(model, feed).macs == lstm + product
    QuantizeDynamic(min_elements=0)(model)
    assert audit(model, feed).integer_macs == lstm + product
