"""Gradients against central differences, both computed in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from onnxcompress.graph.inference import infer
from onnxcompress.session import Session
from onnxcompress.train.gradients import add_gradients
from onnxcompress.train.tape import Tape

Arrays = Mapping[str, Any]


def one_node(
    op_type: str,
    inputs: Arrays,
    attributes: Mapping[str, Any] | None = None,
    *,
    fixed: Sequence[str] = (),
    outputs: int = 1,
    opset: int = 18,
    dynamic: bool = False,
) -> ir.Model:
    """A model of one operator; `fixed` inputs are initializers, `dynamic` ones have no sizes."""
    names = [f"y{i}" if i else "y" for i in range(outputs)]
    node = helper.make_node(op_type, [k if v is not None else "" for k, v in inputs.items()], names)
    node.attribute.extend(helper.make_attribute(k, v) for k, v in (attributes or {}).items())
    given = {k: np.asarray(v) for k, v in inputs.items() if v is not None}
    ports = [
        helper.make_tensor_value_info(
            name,
            helper.np_dtype_to_tensor_dtype(array.dtype),
            [f"{name}_{i}" for i in range(array.ndim)] if dynamic else array.shape,
        )
        for name, array in given.items()
        if name not in fixed
    ]
    weights = [onnx.numpy_helper.from_array(given[n], n) for n in fixed]
    results = [helper.make_empty_tensor_value_info(name) for name in names]
    graph = helper.make_graph([node], "one_node", ports, results, weights)
    opsets = [helper.make_opsetid("", opset)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def check(
    op_type: str,
    inputs: Arrays,
    attributes: Mapping[str, Any] | None = None,
    *,
    wrt: Sequence[str] = ("x",),
    step: float = 1e-4,
    tolerance: float = 1e-6,
    **options: Any,
) -> dict[str, np.ndarray]:
    """The gradients of one operator, which must agree with differences of its outputs.

    Float32 operators that are linear in each input are checked with a `step` of 1.
    """
    model = one_node(op_type, inputs, attributes, **options)
    fixed = options.get("fixed", ())
    feed = {k: np.asarray(v) for k, v in inputs.items() if v is not None and k not in fixed}
    return check_model(model, feed, wrt, step=step, tolerance=tolerance)


def check_model(
    model: ir.Model, feed: Arrays, wrt: Sequence[str], *, step: float, tolerance: float
) -> dict[str, np.ndarray]:
    """Gradients of a random sum of the model's outputs, along random directions."""
    names = [v.name or "" for v in model.graph.outputs]
    found = Session(model, optimization="none").run(feed)
    random = np.random.default_rng(0)
    weights = {n: random.standard_normal(a.shape).astype(a.dtype) for n, a in found.items()}
    whole = with_gradients(model, weights, wrt)
    gradients = Session(whole).run(feed)
    grads = {name: gradients[f"{name}_gradient"] for name in wrt}
    plain = Session(model, outputs=names, optimization="none")

    def loss(moved: Arrays) -> float:
        results = plain.run({**feed, **moved})
        return sum(float((weights[n].astype(np.float64) * results[n]).sum()) for n in names)

    for name in wrt:
        x, gradient = np.asarray(feed[name]), grads[name].astype(np.float64)
        assert gradient.shape == x.shape and grads[name].dtype == x.dtype, name
        for _ in range(3):
            way = random.choice([-1.0, 1.0], x.shape).astype(x.dtype)
            ahead, behind = (loss({name: x + s * way}) for s in (step, -step))
            slope = (ahead - behind) / (2 * step)
            size = max(float(np.abs(gradient).sum()), abs(slope), 1e-3)
            assert abs(slope - float((gradient * way).sum())) <= tolerance * size, name
    return grads


def with_gradients(model: ir.Model, weights: Arrays, wrt: Sequence[str]) -> ir.Model:
    """A copy that also gives, as NAME_gradient, those of the outputs' sum by `weights`."""
    copy = model.clone()
    infer(copy)
    for value in copy.graph.outputs:
        value.type = ir.TensorType(ir.DataType.from_numpy(weights[value.name or ""].dtype))
    graph, tape = copy.graph, Tape(copy.graph)
    parts = [
        tape.op(
            "ReduceSum",
            [tape.op("Mul", [v, tape.constant(weights[v.name or ""])], like=v)],
            {"keepdims": 0},
        )
        for v in graph.outputs
    ]
    loss = tape.op("Sum", parts)
    for value in (*parts, loss):
        value.type, value.shape = graph.outputs[0].type, ir.Shape([])
    values = {v.name: v for v in (*graph.inputs, *graph.initializers.values())}
    values |= {v.name: v for n in graph for v in n.outputs}
    found = add_gradients(graph, loss, [values[name] for name in wrt])
    for name in wrt:
        output = tape.op("Identity", [found[values[name]]], like=values[name])
        output.name = f"{name}_gradient"
        graph.outputs.append(output)
    return copy
