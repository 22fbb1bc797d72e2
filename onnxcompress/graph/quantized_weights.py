"""Constants in integer form: the initializers and DequantizeLinear nodes that quantizers emit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.graph.names import FreshNames
from onnxcompress.graph.rewriting import insert
from onnxcompress.numerics.affine import (
    FLOAT8,
    SMALLEST_SCALE,
    Affine,
    affine,
    quantize,
    symmetric_per_channel,
)
from onnxcompress.numerics.rows import code_bounds, row_bounds, row_codes, row_scales
from onnxcompress.numerics.saturation import trim_pairs
from onnxcompress.operators import (
    constant,
    constant_tensor,
    data_inputs,
    float_attribute,
    int_attribute,
    operator,
    out_axis,
)
from onnxcompress.targets import Target

FLOAT = "onnxcompress.float"
"""Key in `ir.Value.meta` of an integer constant: the float tensor that it stands for."""

_LARGEST_BIAS = 2.0**30
_LAZY_SIZE = 1 << 20
_INT8_MAX = 127


class WeightStore:
    """Adds integer constants to one graph, each once, under names that nothing else has."""

    def __init__(self, graph: ir.Graph, target: Target, *, per_channel: bool = True) -> None:
        self.graph = graph
        self.target = target
        self.per_channel = per_channel
        self.fresh = FreshNames(graph)
        self._first = graph[0]
        self._replaced: dict[ir.Value, None] = {}
        self._shared: dict[tuple[object, ...], ir.Value] = {}
        self._stored: dict[tuple[object, ...], tuple[ir.Value, ...]] = {}

    def initializer(self, name: str, content: Array | ir.TensorProtocol) -> ir.Value:
        """A new initializer of the graph."""
        name = self.fresh(name)
        # ir.tensor would ask a Protocol what it is, which costs more than all else here.
        tensor = ir.Tensor(content, name=name) if isinstance(content, np.ndarray) else content
        tensor.name = name
        value = ir.val(name, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def parameters(self, name: str, parameters: Affine) -> tuple[ir.Value, ...]:
        """Scale, named after `name`, and zero_point as initializers; equal ones are made once.

        8-bit floats have none: ONNX Runtime 1.32 drops a Relu in front of a QuantizeLinear with a
        zero_point of that type, and cannot load a Clip there.
        """
        zero_point = f"{parameters.dtype}_zero_point"
        scale = self._once((name, "scale"), f"{name}_scale", parameters.scale)
        if parameters.dtype in FLOAT8:
            return (scale,)
        return scale, self._once((zero_point,), zero_point, parameters.zero_point)

    def _once(self, key: tuple[str, ...], name: str, array: Array) -> ir.Value:
        content = (*key, array.shape, array.tobytes())
        if content not in self._shared:
            self._shared[content] = self.initializer(name, array)
        return self._shared[content]

    def quantize_operands(self, node: ir.Node, data: Affine | None) -> None:
        """Replace the node's constant operands by integers behind a DequantizeLinear.

        Args:
            node: a kernel of the target.
            data: parameters of the node's first data input, whose scale the bias needs.
        """
        row = operator(node)
        weight = node.inputs[row.weight] if row.weight is not None else None
        if weight is not None and constant_tensor(weight) is not None and data is not None:
            self._quantize_weight(node, weight, data)
            return
        for index, value in enumerate(node.inputs):
            if value is not None and value in data_inputs(node) and constant_tensor(value):
                self._replace(node, index, value, self._constant_parameters(value))

    def matrices(
        self, value: ir.Value, *, by_row: bool, factor: float = 1.0, keepdims: bool = False
    ) -> tuple[ir.Value, ir.Value]:
        """Integers (..., K, N) and scales of a constant stack of matrices, without zero points.

        Args:
            value: float32 (..., K, N), or (..., N, K) with `by_row`; N are output channels.
            factor: what the constant is multiplied by first.
            keepdims: scales are (..., 1, N), which broadcast against products, not (..., N). With
                one scale a matrix, N is 1 and left out, respectively.
        """
        source, pairs = constant_tensor(value), self.target.bounds_pair_sums
        assert source is not None

        def rows() -> Array:
            array = source.numpy() if by_row else np.swapaxes(source.numpy(), -1, -2)
            return array if factor == 1 else array * np.float32(factor)

        def columns() -> Array:
            codes = row_codes(rows(), bounds, bound_pairs=pairs)
            return np.ascontiguousarray(np.swapaxes(codes, -1, -2))

        bounds = row_bounds(rows(), bound_pairs=pairs)
        widest = bounds if self.per_channel else bounds.max(axis=-1, keepdims=True)
        scales = row_scales(widest)
        bounds = np.broadcast_to(widest, bounds.shape)
        if keepdims:
            scales = scales[..., None, :]
        elif not self.per_channel:
            scales = scales[..., 0]
        shape = (*bounds.shape[:-1], rows().shape[-1], bounds.shape[-1])
        return self._stored_once(
            value, ("columns", by_row, factor, keepdims), columns, shape, scales
        )

    def table(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Integers (V, D) and scales (V, 1) of a constant table (V, D), float32."""
        source = constant_tensor(value)
        assert source is not None
        bounds = row_bounds(source.numpy(), bound_pairs=False)

        def codes() -> Array:
            return row_codes(source.numpy(), bounds, bound_pairs=False)

        shape = source.shape.numpy()
        return self._stored_once(value, ("rows",), codes, shape, row_scales(bounds)[:, None])

    def _stored_once(
        self,
        value: ir.Value,
        how: tuple[object, ...],
        codes: Callable[[], Array],
        shape: Sequence[int],
        scales: Array,
    ) -> tuple[ir.Value, ir.Value]:
        name = value.name or "constant"

        def make() -> tuple[ir.Value, ...]:
            tensor = computed(codes, "int8", shape)
            return self.initializer(f"{name}_quantized", tensor), self.initializer(
                f"{name}_scale", scales
            )

        stored, scale = self.once(value, how, make)
        return stored, scale

    def once(
        self, value: ir.Value, how: tuple[object, ...], make: Callable[[], tuple[ir.Value, ...]]
    ) -> tuple[ir.Value, ...]:
        """What `make` gives in place of a constant, made once for each way of storing it."""
        self._replaced[value] = None
        if (value, *how) not in self._stored:
            self._stored[(value, *how)] = make()
        return self._stored[(value, *how)]

    def drop_unused(self) -> None:
        """Remove the float constants that only quantized nodes used, wherever they stand."""
        for value in self._replaced:
            if value.uses() or value.is_graph_output() or value.graph is None:
                continue
            if (producer := value.producer()) is not None:
                value.graph.remove(producer)
            elif value.name is not None:
                value.graph.initializers.pop(value.name, None)

    def _quantize_weight(self, node: ir.Node, weight: ir.Value, data: Affine) -> None:
        row = operator(node)
        assert row.weight is not None
        array = constant(weight)
        assert array is not None
        bias = (
            node.inputs[row.bias] if row.bias is not None and len(node.inputs) > row.bias else None
        )
        if self.target.weights.bias == "float32":
            bias = None
        parameters = self._weight_parameters(node, array, constant(bias), data)
        self._replace(node, row.weight, weight, parameters, _kernel_order(node, array.ndim))
        if row.bias is not None and bias is not None:
            scale = np.asarray(np.maximum(data.scale * parameters.scale, SMALLEST_SCALE))
            zero = np.zeros(scale.shape, np.int32)
            axis = None if parameters.axis is None else 0
            self._replace(node, row.bias, bias, Affine(scale, zero, "int32", axis))

    def _weight_parameters(
        self, node: ir.Node, weight: Array, bias: Array | None, data: Affine
    ) -> Affine:
        axis = out_axis(node, weight.ndim)
        per_channel = self.per_channel and node.op_type in self.target.weights.per_channel
        if not per_channel or axis is None or (node.op_type == "MatMul" and weight.ndim > 2):
            axis = None
        order = _kernel_order(node, weight.ndim)
        rows = _rows(weight, axis, order)
        bounded = order is not None and self.target.bounds_pair_sums
        bound = code_bounds(rows, bound_pairs=bounded)
        if bias is not None:
            # A channel whose weights are (nearly) zero must still hold its bias in 32 bits.
            least = np.abs(bias.astype(np.float64)) / (float(data.scale) * _LARGEST_BIAS)
            bound = np.maximum(bound, (least if axis is not None else least.max()) * _INT8_MAX)
        dtype = self.target.weights.dtype
        if axis is None:
            return affine(-float(bound[0]), float(bound[0]), dtype, symmetric=True)
        return symmetric_per_channel(bound, dtype, axis)

    def _constant_parameters(self, value: ir.Value) -> Affine:
        array = constant(value)
        assert array is not None
        scheme, low, high = self.target.activations, float(array.min()), float(array.max())
        return affine(low, high, scheme.dtype, symmetric=scheme.symmetric)

    def _replace(
        self,
        node: ir.Node,
        index: int,
        value: ir.Value,
        parameters: Affine,
        pairs: Sequence[int] | None = None,
    ) -> None:
        assert isinstance(node.graph, ir.Graph)
        how = (parameters.scale.tobytes(), parameters.dtype, parameters.axis)
        key = (value, *how, node.graph)
        restored = self._shared.get(key)
        if restored is None:
            bounded = pairs if self.target.bounds_pair_sums else None
            (stored,) = self.once(value, how, lambda: self._integers(value, parameters, bounded))
            restored = self._restored(value, stored, parameters, node.graph)
            self._shared[key] = restored
        node.replace_input_with(index, restored)

    def _integers(
        self, value: ir.Value, parameters: Affine, pairs: Sequence[int] | None
    ) -> tuple[ir.Value]:
        """A new initializer that holds the integers of `value`."""
        source = constant_tensor(value)
        assert source is not None
        name = value.name or "constant"

        def integers() -> Array:
            q = quantize(source.numpy(), parameters)
            return q if pairs is None else trimmed(q, pairs)

        tensor = computed(integers, parameters.dtype, source.shape.numpy())
        stored = self.initializer(f"{name}_quantized", tensor)
        stored.meta[FLOAT] = source
        return (stored,)

    def _restored(
        self, value: ir.Value, stored: ir.Value, parameters: Affine, graph: ir.Graph
    ) -> ir.Value:
        """The output of a new DequantizeLinear over `stored`, in the graph of what reads it.

        ONNX Runtime makes one kernel only of what stands in one body; its constants may not.
        """
        name = value.name or "constant"
        attributes = {} if parameters.axis is None else {"axis": parameters.axis}
        restored = self.before_all(
            "DequantizeLinear",
            [stored, *self.parameters(name, parameters)],
            self.fresh(f"{name}_dequantized"),
            attributes,
            graph,
        )
        restored.shape = stored.shape
        return restored

    def before(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, int | Sequence[int]] | None = None,
        dtype: ir.DataType = ir.DataType.FLOAT,
        *,
        domain: str = "",
    ) -> ir.Value:
        """The output of a new node before `node`, named after what that gives out."""
        name = self.fresh(f"{node.outputs[0].name}_{op_type}")
        return insert(node, op_type, inputs, name, attributes, dtype, domain=domain)

    def scaled_bias(self, node: ir.Node, bias: ir.Value) -> ir.Value:
        """The bias of a Gemm times its beta, computed before it."""
        beta = float_attribute(node, "beta", 1.0)
        if beta == 1:
            return bias
        factor = self.initializer(f"{node.outputs[0].name}_beta", np.asarray(beta, np.float32))
        return self.before(node, "Mul", [bias, factor])

    def before_all(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        attributes: Mapping[str, int | Sequence[int]],
        graph: ir.Graph | None = None,
    ) -> ir.Value:
        """The float output of a new node in front of `graph`, or where all bodies see it too."""
        first = self._first if graph in (None, self.graph) else graph[0]
        return insert(first, op_type, inputs, name, attributes)


def dequantizer_of(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes `value`; None where something else does."""
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def computed(integers: Callable[[], Array], dtype: str, shape: Sequence[int]) -> ir.TensorProtocol:
    """A tensor of `integers()`, made on demand where it is large."""
    kind = ir.DataType[dtype.upper()]
    if math.prod(shape) > _LAZY_SIZE:
        return ir.LazyTensor(lambda: ir.tensor(integers(), kind), kind, ir.Shape(shape))
    return ir.Tensor(integers(), kind)  # ir.tensor would ask a Protocol what it is


def kernel_axes(node: ir.Node, rank: int) -> list[int]:
    """Axes of the weight as an 8-bit kernel walks it: output channel first, then as it sums."""
    if node.op_type == "Conv":
        return [0, *range(2, rank), 1]
    axis = out_axis(node, rank)
    assert axis is not None
    return [axis, *(i for i in range(rank) if i != axis)]


def _kernel_order(node: ir.Node, rank: int) -> list[int] | None:
    """`kernel_axes`; None where the kernel adds in 32 bits anyway (a depthwise convolution)."""
    if node.op_type == "Conv":
        weight = constant_tensor(node.inputs[1])
        assert weight is not None
        channels, width = weight.shape.numpy()[:2]
        if width == 1 and channels == int_attribute(node, "group", 1) != 1:
            return None
    return kernel_axes(node, rank)


def _rows(weight: Array, axis: int | None, order: Sequence[int] | None) -> Array:
    """`weight` as (channels, K) in kernel order; one row where there is one scale."""
    if order is None:
        order = [axis or 0, *(i for i in range(weight.ndim) if i != (axis or 0))]
    rows = weight.transpose(order).reshape(weight.shape[order[0]], -1)
    if axis is not None:
        return rows
    return np.pad(rows, ((0, 0), (0, rows.shape[1] % 2))).reshape(1, -1)


def trimmed(q: Array, order: Sequence[int]) -> Array:
    """Codes whose pairs, along axes in `order` (`kernel_axes`), do not saturate 16-bit sums."""
    ordered = q.transpose(order)
    rows = trim_pairs(ordered.reshape(q.shape[order[0]], -1)).reshape(ordered.shape)
    return np.ascontiguousarray(rows.transpose(np.argsort(order)))
