"""Where integers run: which nodes a target computes on integers, and which values carry a pair.

A QuantizeLinear/DequantizeLinear pair that does not become part of an integer kernel only costs.
So quantization starts at the operators that are worth it by themselves (convolutions and matrix
products), and spreads to cheaper ones only where their inputs are integers already and somebody
behind them wants integers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Skip
from onnxcompress.graph.quantized_weights import dequantizer_of
from onnxcompress.graph.scopes import nodes_within
from onnxcompress.numerics.affine import affine, dequantize, quantize
from onnxcompress.numerics.fidelity import Fidelity
from onnxcompress.operators import (
    DEFAULT_DOMAINS,
    constant,
    constant_tensor,
    data_inputs,
    float_attribute,
    int_attribute,
    out_axis,
    output_range,
)
from onnxcompress.targets import Target

_LEAST_CONSTANT_SQNR = 30.0


@dataclass(frozen=True, slots=True)
class Placement:
    """What of a graph runs on integers, in graph order."""

    kernels: dict[ir.Node, None] = field(default_factory=dict[ir.Node, None])
    moves: dict[ir.Node, None] = field(default_factory=dict[ir.Node, None])
    roots: dict[ir.Value, None] = field(default_factory=dict[ir.Value, None])
    """Values that get a pair with parameters of their own."""
    skips: list[Skip] = field(default_factory=list[Skip])
    left: dict[ir.Node, str] = field(default_factory=dict[ir.Node, str])
    """Nodes that have a kernel and stay in float, and why."""

    def decline(self, node: ir.Node, reason: str) -> None:
        """Leave a node in float that was worth a line in the report."""
        self.left[node] = reason
        self.skips.append(Skip(node.name or "", node.op_type, reason))

    def root(self, value: ir.Value) -> ir.Value:
        """The value whose parameters `value` has: itself, or what moves made it from."""
        while (producer := value.producer()) is not None and producer in self.moves:
            value = data_inputs(producer)[0]
        return value


def matches(node: ir.Node, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern (with * and ?) is the node's name or its operator type."""
    return any(fnmatchcase(node.name or "", p) or fnmatchcase(node.op_type, p) for p in patterns)


def place(
    graph: ir.Graph,
    target: Target,
    wanted: Callable[[ir.Node], bool],
    refused: Mapping[ir.Node, str] | None = None,
) -> Placement:
    """Decide which of the graph's nodes run on integers on `target`.

    Args:
        graph: the main graph; nodes inside bodies of If, Loop and Scan are placed with it.
        target: what the runtime can do.
        wanted: whether a person allows this node to be quantized.
        refused: nodes that cannot be quantized for another reason, which is given.
    """
    plan = Placement()
    nodes = list(nodes_within(graph))
    opset = graph.opset_imports.get("", 0)
    carried = _spread(nodes, opset, target, wanted, refused or {}, plan)
    _trim(nodes, target, plan)
    inside = _joined(target, plan)
    for node in nodes:
        if node not in plan.kernels:
            continue
        for value in data_inputs(node):
            if constant_tensor(value) is None and value not in inside:
                plan.roots[plan.root(value)] = None
        if target.kernels[node.op_type].output == "integer":
            made = (v for v in kernel_outputs(node, target) if v in carried and v not in inside)
            plan.roots.update(dict.fromkeys(made))
    return plan


def _spread(
    nodes: Sequence[ir.Node],
    opset: int,
    target: Target,
    wanted: Callable[[ir.Node], bool],
    refused: Mapping[ir.Node, str],
    plan: Placement,
) -> set[ir.Value]:
    """Mark kernels and moves from inputs to outputs; returns the values that exist as integers."""
    carried: set[ir.Value] = set()
    misfused: set[ir.Value] = set()
    for node in nodes:
        if _is_misfused(node) or (_hands_on(node, target) and node.inputs[0] in misfused):
            misfused.update(node.outputs)
        kernel = target.kernels.get(node.op_type) if node.domain in DEFAULT_DOMAINS else None
        if kernel is not None:
            if not kernel.anchor and not _follows(node, carried):
                plan.left[node] = "what it reads are no integers"
                continue
            reason = _refusal(node, target) if wanted(node) else "excluded by name or type"
            reason = refused.get(node, reason)
            if not misfused.isdisjoint(data_inputs(node)):
                reason = "a pair before it would fuse an average pool that counts differently then"
            if reason is not None:
                plan.decline(node, reason)
                continue
            plan.kernels[node] = None
            if kernel.output in ("integer", "wanted"):
                carried.update(kernel_outputs(node, target))
        elif can_move(node, target, opset) and data_inputs(node)[0] in carried and wanted(node):
            plan.moves[node] = None
            carried.update(node.outputs)
    return carried


def _is_misfused(node: ir.Node) -> bool:
    """Whether ONNX Runtime's integer kernel, which it takes between any pairs, is another function.

    Its QLinearAveragePool divides windows that reach beyond the padding by their whole size.
    """
    flags = ("ceil_mode", "count_include_pad")
    return node.op_type == "AveragePool" and all(int_attribute(node, f, 0) for f in flags)


def _hands_on(node: ir.Node, target: Target) -> bool:
    """Whether a QuantizeLinear behind the node may be moved before it."""
    return bool(node.inputs) and (node.op_type in target.moves or node.op_type in target.absorbs)


def _follows(node: ir.Node, carried: set[ir.Value]) -> bool:
    inputs = [v for v in data_inputs(node) if constant_tensor(v) is None]
    return bool(inputs) and all(v in carried for v in inputs)


def _trim(nodes: Sequence[ir.Node], target: Target, plan: Placement) -> None:
    """Return to float what ends in float anyway: it would lose precision and gain nothing."""
    for node in reversed(nodes):
        cheap = node in plan.kernels and not target.kernels[node.op_type].anchor
        if not cheap and node not in plan.moves:
            continue
        outputs = kernel_outputs(node, target) if cheap else node.outputs
        if not any(
            user in plan.kernels or user in plan.moves for v in outputs for user in _users(v)
        ):
            plan.kernels.pop(node, None)
            plan.moves.pop(node, None)
            plan.left[node] = "nothing behind it computes on integers"


def _joined(target: Target, plan: Placement) -> set[ir.Value]:
    """Values that never leave the kernel that makes them, for what reads them runs within it."""
    found: set[ir.Value] = set()
    for node in plan.kernels:
        if target.kernels[node.op_type].joins:
            own = (v for v in data_inputs(node) if v.graph is node.graph)
            inside = (v for v in own if _is_private(v, target, plan))
            found.update(itertools.islice(inside, 1))
    return found


def _is_private(value: ir.Value, target: Target, plan: Placement) -> bool:
    """Whether a kernel that starts by itself makes the value for one reader alone."""
    node = value.producer()
    if node is None or node not in plan.kernels or value.is_graph_output():
        return False
    return target.kernels[node.op_type].anchor and len(value.uses()) == 1


def kernel_outputs(node: ir.Node, target: Target) -> list[ir.Value]:
    """What a kernel gives out: `absorbed_output`, or each of several outputs."""
    return [absorbed_output(node, target)] if len(node.outputs) == 1 else list(node.outputs)


def absorbed_output(node: ir.Node, target: Target) -> ir.Value:
    """The output of `node`, or of the Relu or Clip behind it that QuantizeLinear swallows."""
    value = node.outputs[0]
    while not value.is_graph_output() and len(value.uses()) == 1:
        (user,) = _users(value)
        if user.op_type not in target.absorbs or user.graph is not node.graph:
            break
        bounds = output_range(user)
        if user.inputs[0] is not value or bounds is None or not bounds[0] <= 0 <= bounds[1]:
            break  # the integers always hold zero, so they cannot clip to a range without it
        value = user.outputs[0]
    return value


def _users(value: ir.Value) -> Iterator[ir.Node]:
    return (usage.node for usage in value.uses())


def can_move(node: ir.Node, target: Target, opset: int) -> bool:
    """Whether the target runs the node on integers whose values it only moves."""
    first = target.moves.get(node.op_type)
    if first is None or opset < first or node.domain not in DEFAULT_DOMAINS:
        return False
    if node.op_type == "MaxPool":
        return len(node.outputs) == 1
    if node.op_type == "Resize":
        mode = node.attributes.get("mode")
        return (mode is None or mode.as_string() == "nearest") and _text(
            node, "coordinate_transformation_mode"
        ) != "tf_crop_and_resize"
    if node.op_type == "Pad":
        return _pads_with_zero(node)  # no other value is sure to lie in the range of what it pads
    return True


def _pads_with_zero(node: ir.Node) -> bool:
    if _text(node, "mode") not in ("", "constant") or _optional(node, 2) is None:
        return True
    filler = constant(node.inputs[2])
    return filler is not None and not filler.any()


def _text(node: ir.Node, name: str) -> str:
    attribute = node.attributes.get(name)
    return "" if attribute is None else attribute.as_string()


def _refusal(node: ir.Node, target: Target) -> str | None:
    """Why a node of a type that has an integer kernel cannot use it; None where it can."""
    if all(dequantizer_of(value) for value in node.inputs[:2]):
        return "it reads integers already"
    if len(node.outputs) > 1 and node.op_type != "Split":
        return "it has more than one output"
    known = _REFUSALS.get(node.op_type)
    reason = known(node) if known else _refuse_constants(node, target)
    # What follows a kernel reads floats; what starts by itself might read anything.
    starts = known is None and target.kernels[node.op_type].anchor
    allowed = {ir.DataType.FLOAT} if starts else {None, ir.DataType.FLOAT}
    if reason is None and any(v.dtype not in allowed for v in data_inputs(node)):
        return "its data are not float32"
    return reason


def _refuse_conv(node: ir.Node) -> str | None:
    weight, bias = constant_tensor(node.inputs[1]), _optional(node, 2)
    if weight is None or (bias is not None and constant_tensor(bias) is None):
        return "its weight or bias is computed or can be overridden"
    if weight.dtype != ir.DataType.FLOAT:
        return f"its weight is {weight.dtype.name.lower()}, not float32"
    if constant_tensor(node.inputs[0]) is not None:
        return "its data are constant"
    return _refuse_values(node)


def _refuse_gemm(node: ir.Node) -> str | None:
    if any(float_attribute(node, name, 1.0) != 1 for name in ("alpha", "beta")):
        return "the integer kernel has no alpha and beta"
    if int_attribute(node, "transA", 0):
        return "the integer kernel does not transpose its data"
    weight, bias = constant_tensor(node.inputs[1]), constant_tensor(_optional(node, 2))
    if weight is not None and bias is not None and bias.shape.rank() != 1:
        return "its bias is not a vector"
    if weight is not None and bias is not None:
        axis = out_axis(node, weight.shape.rank())
        if axis is None or bias.size != weight.shape.numpy()[axis]:
            return "its bias does not have one value an output"
    return _refuse_conv(node)


def _refuse_matmul(node: ir.Node) -> str | None:
    left, right = node.inputs[0], node.inputs[1]
    if constant_tensor(left) is not None:
        return "its left operand is constant"
    weight = constant_tensor(right)
    if weight is None:
        if any(v is None or v.dtype != ir.DataType.FLOAT for v in (left, right)):
            return "the type of its operands is unknown"
        return None
    if weight.dtype != ir.DataType.FLOAT or weight.shape.rank() < 2:
        return "its weight is not a float32 matrix"
    return _refuse_values(node)


def _refuse_values(node: ir.Node) -> str | None:
    for value in node.inputs[1:]:
        array = constant(value)
        if array is not None and not np.isfinite(array).all():
            return "its weight holds NaN or infinity"
    return None


def _refuse_constants(node: ir.Node, target: Target) -> str | None:
    """A constant operand is quantized per tensor, so its own values must survive that."""
    if node.op_type == "AveragePool" and int_attribute(node, "ceil_mode", 0):
        return "the integer kernel rounds its output size down"
    kernel, scheme = target.kernels[node.op_type], target.activations
    for value in data_inputs(node):
        array = constant(value)
        if array is None:
            continue
        if kernel.tied or kernel.joins:
            return "its operand is constant"
        if array.dtype != np.float32 or not array.size or not np.isfinite(array).all():
            return "a constant operand is not finite float32"
        low, high = float(array.min()), float(array.max())
        parameters = affine(low, high, scheme.dtype, symmetric=scheme.symmetric)
        fidelity = Fidelity()
        fidelity.update(array, dequantize(quantize(array, parameters), parameters))
        if fidelity.sqnr < _LEAST_CONSTANT_SQNR:
            return "its constant operand does not fit one scale a tensor"
    return None


_REFUSALS: dict[str, Callable[[ir.Node], str | None]] = {
    "Conv": _refuse_conv,
    "Gemm": _refuse_gemm,
    "MatMul": _refuse_matmul,
}


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None
