"""The operator table: what every pass needs to know about ONNX operators, stated once.

Passes ask here which input of a node is its weight, on which axis its output channels lie, which
operators only move values, and what range an output is bound to; none of them lists operators
of its own. Sources: the ONNX operator specification, opsets 6 to 25.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array


class Role(StrEnum):
    """How an operator treats the values that it is given."""

    CONTRACT = "contract"
    """Multiplies and sums over an axis: where the arithmetic of a network is."""
    MOVE = "move"
    """Every output value is one of the input's values (or a given constant)."""
    ELEMENTWISE = "elementwise"
    """Combines several inputs value by value, broadcasting."""
    ACTIVATION = "activation"
    """A function of one input, value by value."""
    AVERAGE = "average"
    """Output values lie within the range of the input's values, but are new."""
    NORMALIZE = "normalize"
    """Rescales by statistics of the values, along some axes."""
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One row of the table. Indices count the node's inputs; axes count from the left."""

    role: Role
    data: tuple[int, ...] | None = (0,)
    """Inputs whose values flow to the output; None: all of them."""
    weight: int | None = None
    recurrent: int | None = None
    """The weight that multiplies the node's own earlier output."""
    bias: int | None = None
    out_axis: int | None = None
    """Axis of the weight that holds the output channels."""
    in_axis: int | None = None
    """Axis of the weight that is summed over with the data's channels."""
    channel_axis: int | None = None
    """Axis of the data and of the output that holds their channels."""
    output_range: tuple[float, float] | None = None
    """Bounds that the output cannot leave, whatever the input."""


_CONTRACT: Final = {
    "Conv": Operator(role=Role.CONTRACT, weight=1, bias=2, out_axis=0, in_axis=1, channel_axis=1),
    # (C_in, C_out / group, ...): with groups, out_axis holds the channels of one group only.
    "ConvTranspose": Operator(
        role=Role.CONTRACT, weight=1, bias=2, out_axis=1, in_axis=0, channel_axis=1
    ),
    # With transB = 0; `out_axis` and `in_axis` below read the attribute.
    "Gemm": Operator(
        role=Role.CONTRACT, data=(0, 1), weight=1, bias=2, out_axis=1, in_axis=0, channel_axis=1
    ),
    "MatMul": Operator(
        role=Role.CONTRACT, data=(0, 1), weight=1, out_axis=-1, in_axis=-2, channel_axis=-1
    ),
    "LSTM": Operator(role=Role.CONTRACT, weight=1, recurrent=2, bias=3),
    "GRU": Operator(role=Role.CONTRACT, weight=1, recurrent=2, bias=3),
    "RNN": Operator(role=Role.CONTRACT, weight=1, recurrent=2, bias=3),
    "Einsum": Operator(role=Role.CONTRACT, data=None),
}

_MOVE: Final = {
    name: Operator(role=Role.MOVE)
    for name in (
        *("Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split"),
        *("Expand", "Tile", "DepthToSpace", "SpaceToDepth", "Gather", "GatherElements"),
        *("GatherND", "Compress", "ReverseSequence", "MaxPool", "GlobalMaxPool", "ReduceMax"),
        *("ReduceMin", "Dropout"),
    )
} | {
    "Concat": Operator(role=Role.MOVE, data=None),
    "Pad": Operator(role=Role.MOVE),
    "Resize": Operator(role=Role.AVERAGE),
    "Upsample": Operator(role=Role.AVERAGE),
    "Where": Operator(role=Role.MOVE, data=(1, 2)),
    "Max": Operator(role=Role.MOVE, data=None),
    "Min": Operator(role=Role.MOVE, data=None),
}

_ELEMENTWISE: Final = {
    name: Operator(role=Role.ELEMENTWISE, data=(0, 1))
    for name in ("Add", "Sub", "Mul", "Div", "Pow")
} | {name: Operator(role=Role.ELEMENTWISE, data=None) for name in ("Sum", "Mean")}

_UNIT: Final = (0.0, 1.0)
_ACTIVATION: Final = {
    "Relu": Operator(role=Role.ACTIVATION, output_range=(0.0, np.inf)),
    "Clip": Operator(role=Role.ACTIVATION),
    "Sigmoid": Operator(role=Role.ACTIVATION, output_range=_UNIT),
    "HardSigmoid": Operator(role=Role.ACTIVATION, output_range=_UNIT),
    "Softmax": Operator(role=Role.ACTIVATION, output_range=_UNIT),
    "Tanh": Operator(role=Role.ACTIVATION, output_range=(-1.0, 1.0)),
    "Erf": Operator(role=Role.ACTIVATION, output_range=(-1.0, 1.0)),
    "Softplus": Operator(role=Role.ACTIVATION, output_range=(0.0, np.inf)),
    "Softsign": Operator(role=Role.ACTIVATION, output_range=(-1.0, 1.0)),
    "Abs": Operator(role=Role.ACTIVATION, output_range=(0.0, np.inf)),
    "Sqrt": Operator(role=Role.ACTIVATION, output_range=(0.0, np.inf)),
    "Exp": Operator(role=Role.ACTIVATION, output_range=(0.0, np.inf)),
    "PRelu": Operator(role=Role.ACTIVATION, weight=1),
} | {
    name: Operator(role=Role.ACTIVATION)
    for name in (
        *("LeakyRelu", "Elu", "Selu", "Celu", "Gelu", "HardSwish", "Swish", "Mish"),
        *("ThresholdedRelu", "LogSoftmax", "Neg", "Log", "Reciprocal", "Cast"),
    )
}

_AVERAGE: Final = {
    name: Operator(role=Role.AVERAGE, channel_axis=1)
    for name in ("AveragePool", "GlobalAveragePool")
} | {"ReduceMean": Operator(role=Role.AVERAGE)}

_NORMALIZE: Final = {
    "BatchNormalization": Operator(role=Role.NORMALIZE, weight=1, bias=2, channel_axis=1),
    "InstanceNormalization": Operator(role=Role.NORMALIZE, weight=1, bias=2, channel_axis=1),
    "GroupNormalization": Operator(role=Role.NORMALIZE, weight=1, bias=2, channel_axis=1),
    "LayerNormalization": Operator(role=Role.NORMALIZE, weight=1, bias=2, channel_axis=-1),
    "RMSNormalization": Operator(role=Role.NORMALIZE, weight=1, channel_axis=-1),
    "LpNormalization": Operator(role=Role.NORMALIZE),
    "LRN": Operator(role=Role.NORMALIZE, channel_axis=1),
}

TABLE: Final[dict[str, Operator]] = (
    _CONTRACT | _MOVE | _ELEMENTWISE | _ACTIVATION | _AVERAGE | _NORMALIZE
)
"""Operators of the default ONNX domain by type. What is absent is unknown: leave it alone."""

UNKNOWN: Final = Operator(role=Role.OTHER, data=())

WIDE: Final = frozenset(
    (
        *("Exp", "Log", "Pow", "Reciprocal", "Softplus", "LogSoftmax", "Sinh", "Cosh", "Tan"),
        *("Acosh", "Atanh", "Sin", "Cos", "Mod", "CumSum", "CumProd", "Det", "DFT", "STFT"),
        *("ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceLogSum"),
        *("ReduceLogSumExp", "LpNormalization", "LpPool", "GlobalLpPool", "LRN"),
        *("MeanVarianceNormalization", "SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"),
        *("GridSample", "AffineGrid", "RoiAlign", "MaxRoiPool", "BitCast"),
    )
)
"""Their results, inner sums, coordinates or bits need float32's range, precision or width.

Normalization and Softmax are not among them: their kernels sum in float32 whatever they are given.
"""

ANY_FLOAT: Final = frozenset(("Cast", "Shape", "Size", "NonZero"))
"""What they give does not depend on which type of float they read."""

QUANTIZERS: Final = frozenset(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"))
"""Where floats and integers meet: kernels between them fuse in float32 only."""

HOMOGENEOUS: Final = frozenset(
    (
        *("Identity", "Dropout", "Relu", "LeakyRelu", "PRelu", "Abs", "Neg"),
        *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"),
    )
)
"""f(s·x) = s·f(x) for s > 0, each channel by itself; those of the pools lie on the second axis."""

DEFAULT_DOMAINS: Final = frozenset({"", "ai.onnx"})


def operator(node: ir.Node) -> Operator:
    """The table's row for `node`; `UNKNOWN` outside the default domain or for a new operator."""
    return TABLE.get(node.op_type, UNKNOWN) if node.domain in DEFAULT_DOMAINS else UNKNOWN


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs of `node` whose values flow to its outputs, absent ones left out."""
    row = operator(node)
    indices = range(len(node.inputs)) if row.data is None else row.data
    return [v for i in indices if i < len(node.inputs) and (v := node.inputs[i]) is not None]


def weight_inputs(node: ir.Node) -> list[ir.Value]:
    """What the node multiplies its data by: its weight, and a recurrent node's second one."""
    row = operator(node)
    indices = (i for i in (row.weight, row.recurrent) if i is not None and i < len(node.inputs))
    return [v for i in indices if (v := node.inputs[i]) is not None]


def out_axis(node: ir.Node, rank: int) -> int | None:
    """Axis of the weight (of `rank` dimensions) that holds output channels, counted from the left.

    None where there is no such axis: a vector as the right-hand side of MatMul, or ConvTranspose
    with groups, whose output channels are spread over two axes.
    """
    row = operator(node)
    if row.out_axis is None or (node.op_type == "MatMul" and rank < 2):
        return None
    if node.op_type == "Gemm":
        return 0 if int_attribute(node, "transB", 0) else 1
    if node.op_type == "ConvTranspose" and int_attribute(node, "group", 1) != 1:
        return None
    return row.out_axis % rank


def in_axis(node: ir.Node, rank: int) -> int | None:
    """Axis of the weight that is summed over, counted from the left; None where there is none."""
    row = operator(node)
    if row.in_axis is None:
        return None
    if node.op_type == "MatMul":
        return max(rank - 2, 0)
    if node.op_type == "Gemm":
        return 1 if int_attribute(node, "transB", 0) else 0
    return row.in_axis


def output_range(node: ir.Node) -> tuple[float, float] | None:
    """Bounds that the node's output cannot leave; for Clip they are read from its constants."""
    if node.op_type != "Clip" or node.domain not in DEFAULT_DOMAINS:
        return operator(node).output_range
    bounds: list[float] = []
    for index, (name, default) in enumerate((("min", -np.inf), ("max", np.inf)), start=1):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None:
            array = constant(value)
            if array is None or array.size != 1:
                return None
            bounds.append(float(array.reshape(())))
        else:
            bounds.append(float_attribute(node, name, default))
    return bounds[0], bounds[1]


def averaged(node: ir.Node) -> float:
    """How many elements of its input `node` takes the mean of for one of its output, at least.

    1 where it takes no mean, or where sizes are not known.
    """
    if node.domain not in DEFAULT_DOMAINS or node.op_type not in _AVERAGE:
        return 1.0
    taken, given = (v.shape if v is not None else None for v in (node.inputs[0], node.outputs[0]))
    if taken is None or given is None:
        return 1.0
    # Sizes that are not numbers stand for themselves, as that of the batch on both sides does.
    sizes = [math.prod(d for d in shape if isinstance(d, int)) for shape in (taken, given)]
    names = [sorted(str(d) for d in shape if not isinstance(d, int)) for shape in (taken, given)]
    return max(1.0, sizes[0] / max(sizes[1], 1)) if names[0] == names[1] else 1.0


def slope(node: ir.Node, x: Array) -> Array | None:
    """Derivative of the activation `node` at each point of `x`; None where it is not tabled.

    It tells how much of an error in the input is left in the output.
    """
    if node.domain not in DEFAULT_DOMAINS:
        return None
    if node.op_type == "LeakyRelu":
        return np.where(x < 0, float_attribute(node, "alpha", 0.01), 1.0)
    if node.op_type == "Relu":
        return np.where(x < 0, 0.0, 1.0)
    if node.op_type == "Sigmoid":
        y = 1 / (1 + np.exp(-np.clip(x, -80, 80)))
        return y * (1 - y)
    return None


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute, or the operator's default where it is absent."""
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.as_int()


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """A float attribute, or the operator's default where it is absent."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that `value` always holds: an initializer nobody can override, or a Constant.

    An initializer that is also a graph input may be replaced by the caller at run time, so it is
    not constant. Looks through no other operator.
    """
    if value is None:
        return None
    producer = value.producer()
    if producer is None:
        return value.const_value if value.is_initializer() and not value.is_graph_input() else None
    if producer.op_type == "Constant" and producer.domain in DEFAULT_DOMAINS:
        return _given_tensor(producer) or value.const_value
    return None


def _given_tensor(constant: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node, in any of the forms that it may be given in."""
    for name, attribute in constant.attributes.items():
        if attribute.is_ref():
            return None
        if name == "value":
            return attribute.as_tensor()
        if name in ("value_float", "value_floats"):
            return ir.Tensor(np.asarray(attribute.value, np.float32))
        if name in ("value_int", "value_ints"):
            return ir.Tensor(np.asarray(attribute.value, np.int64))
    return None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """`constant_tensor` as an array; reads the tensor's bytes."""
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy()


def is_number(value: ir.Value | None, number: float) -> bool:
    """Whether `value` is always this one number, of whatever rank, up to rounding to float32."""
    known = constant(value)
    return (
        known is not None and known.size == 1 and math.isclose(known.item(), number, rel_tol=1e-6)
    )
