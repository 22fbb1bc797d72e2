"""Static quantization: QuantizeLinear/DequantizeLinear pairs from calibration statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxcompress import targets
from onnxcompress.contract import Array, CalibratedPass, Histogram, Kind, Result, Skip, Want
from onnxcompress.errors import InputError
from onnxcompress.graph.placement import Placement, kernel_outputs, matches, place
from onnxcompress.graph.quantized_weights import WeightStore
from onnxcompress.graph.tied_scales import fixed_range, tie
from onnxcompress.numerics.affine import FLOAT8, RANGES, Affine, affine, even
from onnxcompress.numerics.thresholds import clip_range, whole_zero
from onnxcompress.operators import averaged, data_inputs, float_attribute, output_range, slope

_NEVER_SEEN = "calibration never came to the body that it is in"


@dataclass(frozen=True, kw_only=True)
class InsertQdq(CalibratedPass):
    """Quantize weights and activations statically, so that kernels run on integers.

    Before and after, for a convolution between two others::

        x ─ Conv(W, b) ─ Relu ─ y        x_q ─ DQ ─ Conv(DQ(W_q), DQ(b_q)) ─ Relu ─ Q ─ y_q

    q = saturate(round(x / scale) + zero_point). Activations take one scale a tensor from the
    histogram observed by calibration, weights one scale an output channel, a bias int32 with
    scale = scale_x · scale_w. A tensor with several consumers is quantized once. Operators that
    only move values run on the integers and keep their parameters. A DequantizeLinear output
    takes the name of the value that it stands for, so names and the graph's outputs survive.

    With `activations` in float8, on targets that have it, the codes are 8-bit floats: scale is the
    bound over the type's largest value (448 for float8e4m3fn), there is no zero_point, and only
    what matrix products and convolutions read is rounded; outputs, and what others read, are not.

    Declines, with a line in the report: operators without an integer kernel on the target,
    weights that are computed or that the caller may override, values that are not float32,
    whatever `include` and `exclude` say, what calibration never came to.

    Goes into bodies of If, Loop and Scan. What a body reads from outside is quantized where it is
    made, once, and has a DequantizeLinear in each body with a kernel that reads it, since the
    runtime makes one kernel of what stands in one body.

    Not idempotent by itself (its own output has no float kernels left to quantize, so a second
    run changes nothing).

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, 2018; Micikevicius et al., FP8 Formats for Deep Learning,
    2022; ONNX QuantizeLinear, DequantizeLinear.
    """

    name: ClassVar[str] = "insert_qdq"

    target: str = "cpu"
    """Runtime whose kernels and schemes are aimed at."""
    activations: targets.Activations | None = None
    """Type of activations, one that the target takes; its own when None."""
    method: Literal["minmax", "percentile", "mse", "entropy"] = "mse"
    """How an activation's range is chosen from its histogram; in float8, mse is minmax: steps grow
    with the magnitude, so clipping gains nothing by squared error."""
    percentile: float = 99.999
    """Share of values, in percent, that the range covers with method percentile."""
    per_channel: bool = True
    """One scale for each output channel of a weight instead of one for the whole tensor."""
    include: tuple[str, ...] = ("*",)
    """Node names or operator types to quantize; * and ? match."""
    exclude: tuple[str, ...] = ()
    """Node names or operator types to leave in float; * and ? match."""

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise InputError(f"percentile {self.percentile} is not over 50 and at most 100")
        target = self._target()
        if self.method == "entropy" and target.activations.dtype in FLOAT8:
            raise InputError("method entropy is for integers: take mse, percentile or minmax")

    def wants(self, model: ir.Model) -> Sequence[Want]:
        plan, target = self._place(model), self._target()
        return _wants(root for root in plan.roots if not _is_given(root, plan, target))

    def could_want(self, model: ir.Model) -> Sequence[Want]:
        """What must be observed to place pairs whatever nodes `exclude` names later."""
        return _wants(self._place(model).roots)

    def call(self, model: ir.Model) -> Result:
        plan, target = self._place_observed(model), self._target()
        if not target.kernels:
            plan.skips.append(Skip("", "", f"{target.name} computes nothing on integers"))
        opset = model.graph.opset_imports.get("", 0)
        if plan.kernels and opset < target.opset:
            reason = f"opset {opset} has not what {target.activations.dtype} needs: {target.opset}"
            return Result(model, modified=False, skips=(Skip("", "", reason), *plan.skips))
        if not plan.kernels:
            return Result(model, modified=False, skips=tuple(plan.skips))
        parameters = self._all_parameters(plan)
        tie(plan, target, parameters)
        weights = WeightStore(model.graph, target, per_channel=self.per_channel)
        _Rewrite(plan, parameters, weights).run()
        codes = "float8" if target.activations.dtype in FLOAT8 else "integer"
        figures = {f"{codes} kernels": len(plan.kernels), "quantized values": len(plan.roots)}
        return Result(model, modified=True, skips=tuple(plan.skips), figures=figures)

    def _target(self) -> targets.Target:
        return targets.load(self.target).with_activations(self.activations)

    def _place(self, model: ir.Model, refused: Mapping[ir.Node, str] | None = None) -> Placement:
        def wanted(node: ir.Node) -> bool:
            return matches(node, self.include) and not matches(node, self.exclude)

        return place(model.graph, self._target(), wanted, refused)

    def _place_observed(self, model: ir.Model) -> Placement:
        """A placement without kernels inside bodies whose values calibration did not see."""
        plan = self._place(model)
        refused: dict[ir.Node, str] = {}
        while unseen := self._unseen(model, plan):
            refused |= unseen
            plan = self._place(model, refused)
        return plan

    def _unseen(self, model: ir.Model, plan: Placement) -> dict[ir.Node, str]:
        """Kernels that read or make a value inside a body that was not observed, and why not."""
        if self.statistics is None:
            return {}
        target, main = self._target(), model.graph
        free = [root for root in plan.roots if not _is_given(root, plan, target)]
        inside = [root for root in free if root.graph is not main]
        missing = self.statistics.missing(Want(root.name or "") for root in inside)
        reasons = {w.value: self.statistics.reasons.get(w, _NEVER_SEEN) for w in missing}
        found: dict[ir.Node, str] = {}
        for node in plan.kernels if reasons else ():
            read = (plan.root(value) for value in data_inputs(node))
            for value in (*read, *kernel_outputs(node, target)):
                if value.name in reasons:
                    found[node] = f"cannot use {value.name!r}: {reasons[value.name]}"
        return found

    def _all_parameters(self, plan: Placement) -> dict[ir.Value, Affine]:
        """Of every root, in graph order."""
        target = self._target()
        observed = [root for root in plan.roots if not _is_given(root, plan, target)]
        statistics = self.observed(_wants(observed))
        parameters = {
            root: self._parameters(root, statistics.histogram(root.name or "")) for root in observed
        }
        for root in plan.roots:
            if (fixed := fixed_range(root, target)) is not None:
                parameters[root] = even(*fixed, target.activations.dtype)
            elif root not in parameters:
                parameters[root] = _behind_leaky_relu(root, plan, parameters)
        return parameters

    def _parameters(self, value: ir.Value, histogram: Histogram) -> Affine:
        scheme, producer = self._target().activations, value.producer()
        qmin, qmax = RANGES[scheme.dtype]
        whole = self.method == "mse" and scheme.dtype in FLOAT8
        low, high = clip_range(
            _as_consumed(value, histogram),
            "minmax" if whole else self.method,
            qmin=qmin,
            qmax=qmax,
            symmetric=scheme.symmetric,
            percentile=self.percentile,
            averaged=_averaged(value),
        )
        bounds = None if producer is None else output_range(producer)
        if bounds is not None:
            low, high = (float(np.clip(x, *bounds)) for x in (low, high))
        elif not scheme.symmetric and low <= histogram.minimum and histogram.maximum <= high:
            low, high = whole_zero(low, high, qmax - qmin)
        return affine(low, high, scheme.dtype, symmetric=scheme.symmetric)


def _wants(roots: Iterable[ir.Value]) -> list[Want]:
    return [Want(root.name or "", Kind.HISTOGRAM) for root in roots]


@dataclass(frozen=True, slots=True)
class _Weighted:
    """A histogram whose points count by how much of their error is left behind an activation."""

    histogram: Histogram
    consumer: ir.Node

    @property
    def minimum(self) -> float:
        return self.histogram.minimum

    @property
    def maximum(self) -> float:
        return self.histogram.maximum

    def points(self) -> tuple[Array, Array]:
        x, counts = self.histogram.points()
        factor = slope(self.consumer, x.astype(np.float64))
        return x, counts if factor is None else counts * np.square(factor)


def _as_consumed(value: ir.Value, histogram: Histogram) -> Histogram:
    """LeakyRelu shrinks negative values, and their errors: the range may cut them shorter."""
    uses = value.uses()
    if value.is_graph_output() or len(uses) != 1:
        return histogram
    (usage,) = uses
    return _Weighted(histogram, usage.node)


def _averaged(value: ir.Value) -> float:
    """How many elements of `value` make one of what its readers give out; 1 where they do not
    average, or where sizes are unknown."""
    counts = [averaged(usage.node) for usage in value.uses()]
    return min(counts, default=1.0) if not value.is_graph_output() else 1.0


def _is_given(root: ir.Value, plan: Placement, target: targets.Target) -> bool:
    """Whether the parameters of `root` follow from the target, or from the value before it."""
    return fixed_range(root, target) is not None or _shares_scale(root, plan, target)


def _shares_scale(value: ir.Value, plan: Placement, target: targets.Target) -> bool:
    """Whether `value` gets the scale of what LeakyRelu makes it from.

    What passes through is not rounded again then. A finer scale of its own would not bring back
    what the first rounding took.
    """
    node = value.producer()
    if target.activations.symmetric or node is None or node not in plan.kernels:
        return False
    return node.op_type == "LeakyRelu" and 0 <= float_attribute(node, "alpha", 0.01) <= 1


def _behind_leaky_relu(
    value: ir.Value, plan: Placement, parameters: Mapping[ir.Value, Affine]
) -> Affine:
    node = value.producer()
    assert node is not None
    source = parameters[plan.root(data_inputs(node)[0])]
    qmin, qmax = source.range
    alpha = float_attribute(node, "alpha", 0.01)
    below = np.ceil(alpha * (int(source.zero_point) - qmin))
    zero_point = np.asarray(min(qmin + below, qmax), source.dtype)
    return Affine(source.scale, zero_point, source.dtype)


class _Rewrite:
    """One application of a placement to a graph and its bodies."""

    def __init__(
        self, plan: Placement, parameters: Mapping[ir.Value, Affine], weights: WeightStore
    ) -> None:
        self.plan = plan
        self.parameters = parameters
        self.weights = weights
        kernels = weights.target.kernels
        givers = (node for node in plan.kernels if kernels[node.op_type].output != "float")
        made = (kernel_outputs(node, weights.target) for node in givers)
        self.produced = {value for values in made for value in values}
        self.move_roots = {node: plan.root(node.outputs[0]) for node in plan.moves}
        self.names = {root: root.name or "" for root in plan.roots}

    def run(self) -> None:
        for node in self.plan.kernels:
            data = data_inputs(node)[0]
            self.weights.quantize_operands(node, self.parameters.get(self.plan.root(data)))
        for root in self.plan.roots:
            self._insert_pair(root)
        for node in self.plan.moves:
            self._move_integers(node)
        self.weights.drop_unused()

    def _insert_pair(self, root: ir.Value) -> None:
        parameters = self.parameters[root]
        users = list(root.uses())
        constants = self.weights.parameters(root.name or "", parameters)
        dtype = ir.DataType[parameters.dtype.upper()]
        stated = {} if len(constants) > 1 else {"output_dtype": dtype.value}
        quantizer = ir.node("QuantizeLinear", [root, *constants], stated)
        integers = quantizer.outputs[0]
        integers.name = self.weights.fresh(f"{root.name}_quantized")
        integers.type = ir.TensorType(dtype)
        integers.shape = root.shape
        quantizer.name = integers.name
        producer = root.producer()
        graph = root.graph
        assert graph is not None
        if producer is None:
            graph.insert_before(graph[0], quantizer)
        else:
            graph.insert_after(producer, quantizer)
        readers: list[tuple[ir.Node, int]] = []
        for user, index in users:
            if user in self.plan.moves and index == 0:
                user.replace_input_with(index, integers)
            elif root in self.produced or user in self.plan.kernels:
                readers.append((user, index))
        self._dequantize(root, integers, constants, readers, takes_name=root in self.produced)

    def _move_integers(self, node: ir.Node) -> None:
        root = self.move_roots[node]
        parameters = self.parameters[root]
        constants = self.weights.parameters(self.names[root], parameters)
        source = node.inputs[0]
        assert source is not None
        if node.op_type == "Pad":
            node.resize_inputs(max(3, len(node.inputs)))
            node.replace_input_with(2, constants[1])  # it pads with zero, as placement sees to
        for value in node.outputs:
            readers = [(u, i) for u, i in value.uses() if u not in self.plan.moves or i != 0]
            value.type = source.type
            self._dequantize(value, value, constants, readers, takes_name=True)

    def _dequantize(
        self,
        original: ir.Value,
        integers: ir.Value,
        constants: Sequence[ir.Value],
        readers: Sequence[tuple[ir.Node, int]],
        *,
        takes_name: bool,
    ) -> None:
        """Give `readers` (and the graph's outputs) floats made from `integers`.

        Kernels in other bodies get floats of their own, since nothing fuses across a border.
        """
        home = integers.graph
        assert isinstance(home, ir.Graph)
        exported = takes_name and original.is_graph_output()
        by_graph: dict[ir.Graph, list[tuple[ir.Node, int]]] = {}
        for user, index in readers:
            graph = user.graph if user in self.plan.kernels else home
            assert isinstance(graph, ir.Graph)
            by_graph.setdefault(graph, []).append((user, index))
        if exported:
            by_graph.setdefault(home, [])
        for graph in sorted(by_graph, key=lambda graph: graph is not home):
            floats = self._floats(original, integers, constants, graph, takes_name=takes_name)
            for user, index in by_graph[graph]:
                user.replace_input_with(index, floats)
            if exported and graph is home:
                home.outputs[:] = [floats if v is original else v for v in home.outputs]
            takes_name = False

    def _floats(
        self,
        original: ir.Value,
        integers: ir.Value,
        constants: Sequence[ir.Value],
        graph: ir.Graph,
        *,
        takes_name: bool,
    ) -> ir.Value:
        """The output of a new DequantizeLinear in `graph`."""
        dequantizer = ir.node("DequantizeLinear", [integers, *constants])
        floats = dequantizer.outputs[0]
        name = original.name or ""
        if takes_name:
            suffix = "quantized" if original is integers else "float"
            original.name = self.weights.fresh(f"{name}_{suffix}")
        floats.name = name if takes_name else self.weights.fresh(f"{name}_dequantized")
        floats.type, floats.shape = ir.TensorType(ir.DataType.FLOAT), original.shape
        dequantizer.name = self.weights.fresh(f"{name}_dequantize")
        producer = integers.producer()
        assert producer is not None
        if graph is producer.graph:
            graph.insert_after(producer, dequantizer)
        else:
            graph.insert_before(graph[0], dequantizer)
        return floats
