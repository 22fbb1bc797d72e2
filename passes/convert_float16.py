"""Convert a float32 model to 16-bit floats, or only what it stores of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final, Literal

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import CalibratedPass, Histogram, Kind, Result, Skip, Want
from onnxcompress.graph.names import FreshNames
from onnxcompress.graph.placement import matches
from onnxcompress.graph.precision import FLOAT, Plan, Precision
from onnxcompress.graph.scopes import nodes_within
from onnxcompress.numerics.short_floats import blocks, rounded
from onnxcompress.operators import ANY_FLOAT, DEFAULT_DOMAINS, QUANTIZERS, constant_tensor

_LARGE: Final = 1 << 20  # bytes; what is larger is rounded when it is read
_STORED: Final = 256
"""Smaller constants are not worth a Cast."""


@dataclass(frozen=True, kw_only=True)
class ConvertFloat16(CalibratedPass):
    """Compute and store in float16 or bfloat16 what does not need float32.

    Before and after, with W and b float32, W' and b' rounded to nearest::

        x ─ Conv(W, b) ─ Exp ─ y       x ─ Cast ─ Conv(W', b') ─ Cast ─ Exp ─ y

    With `compute` off all arithmetic stays in float32 and only the file is halved; ONNX Runtime
    folds the Casts as it loads the model::

        x ─ Conv(W, b) ─ Exp ─ y       x ─ Conv(Cast(W'), Cast(b')) ─ Exp ─ y

    What stays in float32:

    - operators that take nothing else in the model's opset, by their ONNX schemas, or that need
      its range or precision: exponentials and powers, sums, coordinates to sample at;
    - nodes with a constant that would overflow (float16 ends at 65504) or that is so small that
      rounding errs by more than it does on normal numbers (epsilons), and what such a value
      flows to, up to an operator whose output is bounded, such as Softmax;
    - with data, nodes that take or give values observed beyond a quarter of the type's range, or
      too small for it;
    - numbers that were integers, such as positions, and what is computed with them;
    - nodes beside QuantizeLinear and DequantizeLinear, which fuse in float32 only;
    - cheap nodes among such, where that saves Casts.

    A value is cast once, for all that need it in the other type. Inputs and outputs keep their
    types, as do those of bodies of If, Loop and Scan, inside which nodes are converted too.
    Functions are left alone (inline them first). Data are optional: without them ranges are taken
    from the constants alone.

    A second run may at most move a Cast. Sources: Micikevicius et al., Mixed Precision Training,
    ICLR 2018; Kalamkar et al., A Study of BFLOAT16 for Deep Learning Training, 2019; the ONNX
    operators' schemas.
    """

    name: ClassVar[str] = "convert_float16"

    dtype: Literal["float16", "bfloat16"] = "float16"
    """The type: float16 is finer, bfloat16 has the range of float32."""
    compute: bool = True
    """Compute in the type as well; off, weights are only stored in it."""
    include: tuple[str, ...] = ("*",)
    """Node names or operator types to compute in the type; * and ? match."""
    exclude: tuple[str, ...] = ()
    """Node names or operator types to leave in float32; * and ? match."""

    def wants(self, model: ir.Model) -> Sequence[Want]:
        if not self.compute:
            return ()
        precision = Precision(model, self._type)
        values = [v for _, v in precision.floats(model.graph.inputs)]
        for node in model.graph:
            if node.op_type != "Constant":
                values += [v for _, v in precision.floats(node.outputs) if v.name]
        return [Want(value.name or "", Kind.HISTOGRAM) for value in values]

    def call(self, model: ir.Model) -> Result:
        precision = Precision(model, self._type)
        skips = [
            Skip(function.name, "", "it is a function: inline functions first")
            for function in model.functions.values()
        ]
        if not precision.castable:
            reason = f"opset {model.graph.opset_imports.get('', 1)} has no {self.dtype}"
            return Result(model, modified=False, skips=(Skip("", "", reason),))
        plan = precision.plan(self._wanted, self._seen(model)) if self.compute else Plan()
        rewrite = _Rewrite(model, precision, plan)
        rewrite.run()
        return Result(
            model,
            modified=rewrite.modified,
            skips=(*skips, *plan.skips, *rewrite.skips),
            figures={
                f"nodes in {self.dtype}": len(plan.halved),
                f"constants in {self.dtype}": rewrite.stored,
                "casts added": rewrite.added,
            },
        )

    @property
    def _type(self) -> ir.DataType:
        return ir.DataType[self.dtype.upper()]

    def _wanted(self, node: ir.Node) -> bool:
        return matches(node, self.include) and not matches(node, self.exclude)

    def _seen(self, model: ir.Model) -> Any:
        """What was observed of a value of the main graph."""
        statistics = self.statistics

        def histogram(value: ir.Value) -> Histogram | None:
            if statistics is None or value.graph is not model.graph or not value.name:
                return None
            missing = statistics.missing([Want(value.name, Kind.HISTOGRAM)])
            return None if missing else statistics.histogram(value.name)

        return histogram


class _Rewrite:
    """One application of a plan to a model."""

    def __init__(self, model: ir.Model, precision: Precision, plan: Plan) -> None:
        self.model, self.precision, self.plan = model, precision, plan
        self.dtype = precision.dtype
        self.skips: list[Skip] = []
        self.stored = self.added = 0
        self.modified = False
        self._fresh = FreshNames(model.graph)
        self._graphs = [model.graph, *model.graph.subgraphs()]
        self._nodes = list(nodes_within(model.graph))
        self._halves = {
            node.outputs[i] for node, halved in plan.halved.items() for i in halved.outputs
        }
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for value in self._constants():
            self._store(value)
        for node in self._nodes:
            if node in self.plan.halved and node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", self.dtype.value)
            if node.op_type not in ANY_FLOAT or node.domain not in DEFAULT_DOMAINS:
                self._connect(node)
        for graph in self._graphs:
            self._connect_outputs(graph)
        for value in self._halves:
            value.type = ir.TensorType(self.dtype)
        self.modified = bool(self._halves or self._casts)

    def _constants(self) -> Iterator[ir.Value]:
        """All float32 constants, overridable ones left out."""
        for graph in self._graphs:
            for _, value in self.precision.floats(graph.initializers.values()):
                if constant_tensor(value) is not None:
                    yield value
                elif value.is_graph_input():
                    reason = "it is a weight that the caller may override"
                    self.skips.append(Skip(value.name or "", "", reason))
        for node in self._nodes:
            if node.op_type == "Constant" and node.domain in DEFAULT_DOMAINS:
                yield from (v for _, v in self.precision.floats(node.outputs))

    def _store(self, value: ir.Value) -> None:
        """Round a constant where all that read it want that, or where it is worth a Cast."""
        tensor, uses = constant_tensor(value), value.uses()
        if tensor is None or value.is_graph_output() or not uses:
            return
        if not all(self.plan.reads(user, index) for user, index in uses):
            if tensor.size < _STORED or not all(_may_be_cast(user) for user, _ in uses):
                return
            if (loss := self.precision.loss(value)) is not None:
                self.skips.append(Skip(value.name or "", "", f"it {loss}"))
                return
        make = _computed if tensor.nbytes <= _LARGE else _RoundedTensor
        _put(value, make(tensor, self.dtype, value.name))
        self._halves.add(value)
        self.stored += 1

    def _connect(self, node: ir.Node) -> None:
        """Give each input of `node` in the type that it reads."""
        for index, value in enumerate(node.inputs):
            if value is not None:
                wanted = self.dtype if self.plan.reads(node, index) else FLOAT
                if (given := self._as(value, wanted)) is not value:
                    node.replace_input_with(index, given)

    def _connect_outputs(self, graph: ir.Graph) -> None:
        """Give the graph's outputs in float32; those of the model keep their names."""
        for index, value in enumerate(graph.outputs):
            given = self._as(value, FLOAT)
            if given is not value and graph is self.model.graph:
                name = value.name or ""
                value.name = self._fresh(f"{name}_{self.dtype.name.lower()}")
                given.name = name
            graph.outputs[index] = given

    def _kind(self, value: ir.Value) -> ir.DataType | None:
        return self.dtype if value in self._halves else self.precision.types.dtype(value)

    def _as(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """`value` in float32 or the 16-bit type, cast where it is made; others as they are."""
        kind = self._kind(value)
        if kind is wanted or (kind is not FLOAT and value not in self._halves):
            return value
        source = _cast_from(value)
        if source is not None and self._kind(source) is wanted is self.dtype:
            return source
        key = (value, wanted)
        if key not in self._casts:
            self._casts[key] = self._cast(value, wanted)
        return self._casts[key]

    def _cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        self.added += 1
        node = ir.node("Cast", [value], {"to": wanted.value})
        output, producer = node.outputs[0], value.producer()
        output.name = node.name = self._fresh(f"{value.name}_{wanted.name.lower()}")
        output.type, output.shape = ir.TensorType(wanted), value.shape
        if producer is not None:
            assert producer.graph is not None
            producer.graph.insert_after(producer, node)
        else:
            graph = value.graph
            assert isinstance(graph, ir.Graph)
            graph.insert_before(graph[0], node) if len(graph) else graph.append(node)
        return output


class _RoundedTensor(ir.LazyTensor):
    """A large tensor that is rounded when it is read, and piece by piece when it is written."""

    def __init__(self, source: ir.TensorProtocol, dtype: ir.DataType, name: str | None) -> None:
        shape = ir.Shape(source.shape.numpy())
        super().__init__(partial(_computed, source, dtype, name), dtype, shape, name=name)
        self._source = source

    def tofile(self, file: Any) -> None:
        """Write the bytes to `file`, little-endian, without holding them all."""
        for block in blocks(self._source.numpy()):
            bits = rounded(block, self.dtype.numpy()).view(np.uint16)
            file.write(bits.astype("<u2", copy=False).tobytes())


def _computed(source: ir.TensorProtocol, dtype: ir.DataType, name: str | None) -> ir.Tensor:
    array = source.numpy()
    out = np.empty(array.shape, dtype.numpy())
    flat, start = out.reshape(-1), 0
    for block in blocks(array):
        flat[start : start + block.size] = rounded(block, dtype.numpy())
        start += block.size
    return ir.Tensor(out, dtype, name=name)


def _put(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    producer = value.producer()
    if producer is None or value.const_value is not None:
        value.const_value = tensor
    if producer is not None:
        producer.attributes.clear()
        producer.attributes["value"] = ir.AttrTensor("value", tensor)


def _may_be_cast(reader: ir.Node) -> bool:
    """Whether `reader` works as well where this input is not a constant in the file."""
    return reader.domain in DEFAULT_DOMAINS and reader.op_type not in QUANTIZERS


def _cast_from(value: ir.Value) -> ir.Value | None:
    """What a Cast node made `value` from."""
    producer = value.producer()
    if producer is None or producer.op_type != "Cast" or producer.domain not in DEFAULT_DOMAINS:
        return None
    return producer.inputs[0]
