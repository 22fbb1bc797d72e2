"""Build a small model, rewrite it, and see that it computes the same under the same interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxcompress.contract import Pass, Result

ort: Any = onnxruntime


class Net:
    """A graph under construction; `op` returns the name of the output that it adds."""

    def __init__(
        self, opset: int = 17, ir_version: int = 8, dtype: Any = np.float32, prefix: str = "v"
    ) -> None:
        self.prefix = prefix
        self.opset, self.ir_version, self.dtype = opset, ir_version, np.dtype(dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.domains: dict[str, int] = {}
        self.infer = True
        self.random = np.random.default_rng(0)

    def input(self, name: str, *shape: int | str | None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, self.elem_type, shape))
        return name

    def output(self, name: str, shape: Any = None) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, self.elem_type, shape))
        return name

    @property
    def elem_type(self) -> int:
        return helper.np_dtype_to_tensor_dtype(self.dtype)

    def weight(self, name: str, value: Any) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(value, self.dtype), name))
        return name

    def normal(self, name: str, *shape: int) -> str:
        return self.weight(name, self.random.standard_normal(shape))

    def op(self, op_type: str, *inputs: str, out: str = "", domain: str = "", **attrs: Any) -> str:
        out = out or f"{self.prefix}{len(self.nodes)}"
        node = helper.make_node(op_type, list(inputs), [out], f"n_{out}", domain=domain, **attrs)
        self.nodes.append(node)
        return out

    def norm(self, x: str, channels: int, out: str = "", **attrs: Any) -> str:
        """A BatchNormalization with parameters of its own."""
        out = out or f"{self.prefix}{len(self.nodes)}"
        names = [
            self.weight(f"{out}_scale", self.random.uniform(0.5, 2, channels)),
            self.normal(f"{out}_bias", channels),
            self.normal(f"{out}_mean", channels),
            self.weight(f"{out}_var", self.random.uniform(0.3, 2, channels)),
        ]
        return self.op("BatchNormalization", x, *names, out=out, **attrs)

    def graph(self, name: str = "g") -> onnx.GraphProto:
        return helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.weights)

    def model(self) -> onnx.ModelProto:
        opsets = [helper.make_opsetid("", self.opset)]
        opsets += [helper.make_opsetid(d, v) for d, v in self.domains.items()]
        proto = helper.make_model(
            self.graph(), opset_imports=opsets, ir_version=self.ir_version, functions=self.functions
        )
        return onnx.shape_inference.infer_shapes(proto) if self.infer else proto


@dataclass(frozen=True)
class Layer:
    """A linear operator on `x`: its data's shape, weight's shape, attributes, output channels."""

    op: str
    data: tuple[int, ...]
    weight: tuple[int, ...]
    channels: int
    attrs: tuple[tuple[str, Any], ...] = ()
    bias: tuple[int, ...] | None = None
    swap: bool = False

    def feed(self, net: Net) -> str:
        return net.input("x", *self.data)

    def add(self, net: Net, x: str, weight: str = "", bias: bool = True) -> str:
        weight = weight or net.normal(f"{net.prefix}w{len(net.nodes)}", *self.weight)
        inputs = [weight, x] if self.swap else [x, weight]
        if self.bias and bias:
            inputs.append(net.normal(f"{net.prefix}b{len(net.nodes)}", *self.bias))
        out = net.op(self.op, *inputs, **dict(self.attrs))
        if self.op == "MatMul" and bias:
            shape = (self.channels, 1) if self.swap else (self.channels,)
            out = net.op("Add", out, net.normal(f"{net.prefix}b{len(net.nodes)}", *shape))
        return out


def layer(op: str, data: Any, weight: Any, channels: int, bias: Any = None, **attrs: Any) -> Layer:
    swap = attrs.pop("swap", False)
    return Layer(op, data, weight, channels, tuple(attrs.items()), bias, swap)


LAYERS = {
    "conv1d": layer("Conv", (2, 3, 8), (4, 3, 3), 4, (4,)),
    "conv2d": layer("Conv", (2, 3, 6, 7), (4, 3, 3, 2), 4, (4,), strides=[2, 1], pads=[1, 0, 2, 1]),
    "conv3d": layer("Conv", (1, 2, 4, 5, 4), (3, 2, 2, 2, 2), 3, (3,)),
    "pointwise": layer("Conv", (2, 3, 5, 5), (4, 3, 1, 1), 4, (4,)),
    "grouped": layer("Conv", (2, 4, 6, 6), (6, 2, 3, 3), 6, (6,), group=2, dilations=[2, 2]),
    "depthwise": layer("Conv", (2, 4, 6, 6), (8, 1, 3, 3), 8, (8,), group=4, pads=[1] * 4),
    "same": layer("Conv", (2, 3, 6, 6), (4, 3, 3, 3), 4, (4,), auto_pad="SAME_UPPER"),
    "valid": layer("Conv", (2, 3, 6, 6), (4, 3, 3, 3), 4, (4,), auto_pad="VALID"),
    "transposed": layer("ConvTranspose", (2, 3, 5, 5), (3, 4, 3, 3), 4, (4,), strides=[2, 2]),
    "transposed_grouped": layer(
        *("ConvTranspose", (2, 4, 5), (4, 3, 3), 6, (6,)), group=2, strides=[2], output_padding=[1]
    ),
    "gemm": layer("Gemm", (3, 5), (5, 4), 4, (4,)),
    "gemm_b": layer("Gemm", (3, 5), (4, 5), 4, (1, 4), transB=1, alpha=0.5, beta=2.0),
    "gemm_a": layer("Gemm", (5, 3), (5, 4), 4, (1,), transA=1, alpha=2.0),
    "matmul": layer("MatMul", (3, 5), (5, 4), 4),
    "matmul_left": layer("MatMul", (2, 5, 3), (4, 5), 4, swap=True),
}


def apply(pass_: Pass, proto: onnx.ModelProto) -> tuple[onnx.ModelProto, Result]:
    result = pass_(ir.from_proto(proto))
    assert isinstance(result, Result)
    return ir.to_proto(result.model), result


def apply_twice(pass_: Pass, proto: onnx.ModelProto) -> tuple[onnx.ModelProto, Result]:
    """Rewrite `proto`; assert that the interface stays, and that a second run is idle."""
    after, result = apply(pass_, proto)
    assert list(after.graph.input) == list(proto.graph.input)
    assert list(after.graph.output) == list(proto.graph.output)
    again, second = apply(pass_, after)
    assert not second.modified and again == after
    return after, result


def check_exact(
    pass_: Pass, proto: onnx.ModelProto, *, rtol: float = 1e-5, feed: Any = None
) -> tuple[onnx.ModelProto, Result]:
    """Rewrite `proto`; assert that outputs and interface stay, and that a second run is idle."""
    plain = ir.to_proto(ir.from_proto(proto)).SerializeToString()
    after, result = apply_twice(pass_, proto)
    assert result.modified == (after.SerializeToString() != plain)
    assert list(after.opset_import) == list(proto.opset_import)
    feed = random_feed(proto) if feed is None else feed
    for expected, actual in zip(run(proto, feed), run(after, feed), strict=True):
        assert_close(actual, expected, rtol)
    return after, result


def random_feed(proto: onnx.ModelProto) -> dict[str, Any]:
    random, given = np.random.default_rng(1), {w.name for w in proto.graph.initializer}
    feed: dict[str, Any] = {}
    for value in proto.graph.input:
        kind = value.type.tensor_type
        shape = [d.dim_value or 2 for d in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if value.name not in given:
            feed[value.name] = np.asarray(random.standard_normal(shape)).astype(dtype)
    return feed


def run(proto: onnx.ModelProto, feed: dict[str, Any]) -> list[Any]:
    """Outputs from ONNX Runtime with its optimizations off; by reference where it has no kernel."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options)
    except ort.capi.onnxruntime_pybind11_state.NotImplemented:
        onnx.checker.check_model(proto)
        return list(ReferenceEvaluator(proto).run(None, feed))
    return list(session.run(None, feed))


def assert_close(actual: Any, expected: Any, rtol: float) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * largest)


def count(proto: onnx.ModelProto, *op_types: str) -> int:
    """How many nodes of these types there are, in subgraphs and functions too."""

    def nodes(some: Any) -> int:
        inner = [a.g.node for n in some for a in n.attribute if a.HasField("g")]
        return sum(n.op_type in op_types for n in some) + sum(map(nodes, inner))

    return nodes(proto.graph.node) + sum(nodes(f.node) for f in proto.functions)
