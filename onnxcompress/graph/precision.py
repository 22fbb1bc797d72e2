"""Which nodes of a float32 model compute in a 16-bit float, and which stay as they are.

What an operator accepts is read from its ONNX schema; what would overflow or lose too much, from
the constants and, where there are any, the observed ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir

from onnxcompress.contract import Array, Histogram, Skip
from onnxcompress.graph.scopes import nodes_within, subgraphs
from onnxcompress.numerics.short_floats import (
    largest,
    overflows,
    relative_error,
    unit_roundoff,
)
from onnxcompress.operators import (
    ANY_FLOAT,
    DEFAULT_DOMAINS,
    QUANTIZERS,
    WIDE,
    Role,
    constant_tensor,
    operator,
    output_range,
)

FLOAT: Final = ir.DataType.FLOAT
_HEADROOM: Final = 4.0
"""How much larger than anything observed a value may become."""
_WEIGHTY: Final = 1024
"""Constants of more elements make a node worth computing in 16 bits whatever is around it."""
_TRANSPARENT: Final = ANY_FLOAT | {"Constant"}
_HEAVY: Final = frozenset((Role.CONTRACT, Role.NORMALIZE))
_SWEEPS: Final = 2
_OVERFLOW: Final = "would overflow"
Histograms = Callable[[ir.Value], Histogram | None]
"""What was observed of a value; None where nothing was."""


@dataclass(frozen=True, slots=True)
class Halved:
    """The inputs and outputs of a node, by index, that change from float32 to the 16-bit type."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Declined(Exception):
    """Why a node stays in float32."""


class Types:
    """The types of a model's values: as declared, else by the schemas of what makes them."""

    def __init__(self, model: ir.Model) -> None:
        self._opset = model.graph.opset_imports.get("", 1)
        self._found: dict[ir.Value, ir.DataType | None] = {}
        for node in nodes_within(model.graph):
            for index, value in enumerate(node.outputs):
                if value.type is None:
                    self._found[value] = self._made(node, index)

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The element type of a tensor; None for what is no tensor, or not known."""
        if value in self._found:
            return self._found[value]
        if value.type is None and value.const_value is not None:
            return value.const_value.dtype
        return value.dtype if isinstance(value.type, ir.TensorType) else None

    def schema(self, node: ir.Node) -> onnx.defs.OpSchema | None:
        """The schema that `node` is written to; None for an operator that is not of ONNX."""
        return _schema(node.op_type, self._opset) if node.domain in DEFAULT_DOMAINS else None

    def _made(self, node: ir.Node, index: int) -> ir.DataType | None:
        for body in subgraphs(node):
            outputs = body.outputs[len(body.outputs) - len(node.outputs) :]
            return self.dtype(outputs[index]) if len(outputs) > index else None
        schema = self.schema(node)
        if schema is None:
            return None
        if (tensor := constant_tensor(node.outputs[index])) is not None:
            return tensor.dtype
        name = _formal(schema.outputs, index).type_str
        for i, value in enumerate(node.inputs):
            if value is not None and _formal(schema.inputs, i).type_str == name:
                return self.dtype(value)
        if node.op_type == "ConstantOfShape":
            filling = node.attributes.get("value")
            return FLOAT if filling is None else filling.as_tensor().dtype
        if (given := node.attributes.get("to") or node.attributes.get("dtype")) is not None:
            return None if given.is_ref() else ir.DataType(given.as_int())
        return FLOAT if name == "tensor(float)" else None


_NOBODY: Final = ir.Node("", "", [])


@dataclass
class Plan:
    """What is converted: nodes, with their inputs and outputs, and why others are not."""

    halved: dict[ir.Node, Halved] = field(default_factory=dict[ir.Node, Halved])
    skips: list[Skip] = field(default_factory=list[Skip])

    def reads(self, node: ir.Node, index: int) -> bool:
        """Whether `node` takes its input `index` in the 16-bit type."""
        return node in self.halved and index in self.halved[node].inputs

    def makes(self, value: ir.Value) -> bool:
        """Whether `value` comes out of its node in the 16-bit type."""
        halved = self.halved.get(value.producer() or _NOBODY)
        return halved is not None and value.index() in halved.outputs


class Precision:
    """Plans one model's conversion to `dtype`, FLOAT16 or BFLOAT16."""

    def __init__(self, model: ir.Model, dtype: ir.DataType) -> None:
        self.model, self.dtype = model, dtype
        self.types = Types(model)
        self._numpy: np.dtype[Any] = dtype.numpy()
        self._name = f"tensor({dtype.name.lower()})"
        self._nodes = list(nodes_within(model.graph))
        self._losses: dict[ir.Value, str | None] = {}
        self._large: set[ir.Value] = set()
        self._counted: set[ir.Value] = set()

    @property
    def castable(self) -> bool:
        """Whether the model's opset has the type at all."""
        schema = _schema("Cast", self.model.graph.opset_imports.get("", 0))
        if schema is None:
            return False
        return all(self._name in t.allowed_type_strs for t in schema.type_constraints)

    def floats(self, values: Iterable[ir.Value | None]) -> Iterator[tuple[int, ir.Value]]:
        """Those of `values` that are float32 tensors, with their indices."""
        for index, value in enumerate(values):
            if value is not None and self.types.dtype(value) is FLOAT:
                yield index, value

    def loss(self, value: ir.Value) -> str | None:
        """Why the constant `value` cannot be rounded to the type; None where it can."""
        if value not in self._losses:
            tensor = constant_tensor(value)
            assert tensor is not None
            self._losses[value] = self._loss(tensor.numpy())
        return self._losses[value]

    def plan(self, wanted: Callable[[ir.Node], bool], histogram: Histograms) -> Plan:
        """Decide for every node.

        Args:
            wanted: False for nodes to be left alone.
            histogram: what was observed of a value, None where nothing was.
        """
        plan = Plan()
        for node in self._nodes:
            if not (any(self.floats(node.inputs)) or any(self.floats(node.outputs))):
                continue
            self._trace_integers(node)
            bad = self._trace_large(node, histogram)
            if node.op_type in _TRANSPARENT or any(True for _ in subgraphs(node)):
                continue
            try:
                if not wanted(node):
                    raise Declined("excluded by name or type")
                halved = self._accepted(node)
                if bad is not None:
                    raise Declined(bad)
                if halved.inputs:
                    plan.halved[node] = halved
            except Declined as reason:
                plan.skips.append(Skip(node.name or "", node.op_type, str(reason)))
        self._join_islands(plan)
        self._retarget_casts(plan)
        return plan

    def _accepted(self, node: ir.Node) -> Halved:
        """What of `node` changes, if its operator and its constants allow for it."""
        schema = self.types.schema(node)
        if schema is None:
            raise Declined("it is not an ONNX operator of a known version")
        if node.op_type in WIDE:
            raise Declined(f"{node.op_type} needs the range or precision of float32")
        if node.op_type in QUANTIZERS or self._beside_integers(node):
            raise Declined("kernels on integers fuse with float32 only")
        halved = self._signature(node, schema)
        if operator(node).role not in _HEAVY and any(v in self._counted for v in node.inputs):
            raise Declined("it computes with integers, such as positions or a mask")
        for index in halved.inputs:
            value = node.inputs[index]
            assert value is not None
            if constant_tensor(value) is None or _is_bound(node, index):
                continue
            if (loss := self.loss(value)) is not None:
                raise Declined(f"{value.name!r} {loss}")
        return halved

    def _signature(self, node: ir.Node, schema: onnx.defs.OpSchema) -> Halved:
        """The inputs and outputs whose type may change, by the operator's type parameters."""
        allowed = {t.type_param_str: t.allowed_type_strs for t in schema.type_constraints}
        inputs = [(i, _parameter(schema.inputs, i)) for i, _ in self.floats(node.inputs)]
        free = {name for _, name in inputs if self._name in allowed.get(name, ())}
        if inputs and not free:
            raise Declined(f"{node.op_type} does not take {self.dtype.name.lower()} in this opset")
        given = [(i, v) for i, v in enumerate(node.inputs) if v is not None]
        tied = [v for i, v in given if _parameter(schema.inputs, i) in free]
        if any(self.types.dtype(v) is None for v in tied):
            raise Declined("the type of an input is not known: run infer_shapes before")
        bound = {_parameter(schema.inputs, i) for i, _ in given}
        outputs: list[int] = []
        for index, value in enumerate(node.outputs):
            name = _formal(schema.outputs, index).type_str
            dtype = self.types.dtype(value)
            if value.name and name in allowed and (dtype is None or name not in bound):
                if len(allowed[name]) > 1 and dtype in {None, FLOAT}:
                    raise Declined("an attribute, not an input, decides on the type of its output")
            elif name in free and dtype is FLOAT:
                outputs.append(index)
        return Halved(tuple(i for i, name in inputs if name in free), tuple(outputs))

    def _beside_integers(self, node: ir.Node) -> bool:
        producers = [v.producer() for v in node.inputs if v is not None]
        users = [u.node for v in node.outputs for u in v.uses()]
        return any(n is not None and n.op_type in QUANTIZERS for n in (*producers, *users))

    def _trace_integers(self, node: ir.Node) -> None:
        """Follow numbers that were integers, and are exact in float32 only: positions, counts."""
        if operator(node).role in _HEAVY or any(True for _ in subgraphs(node)):
            return
        varying = [v for v in node.inputs if v is not None and constant_tensor(v) is None]
        floats = [v for _, v in self.floats(varying)]
        if node.op_type == "Cast":
            kind = None if not varying else self.types.dtype(varying[0])
            counted = kind is not None and kind.is_integer()
        else:
            counted = bool(floats)
        if counted and all(v in self._counted for v in floats):
            self._counted.update(v for _, v in self.floats(node.outputs))

    def _trace_large(self, node: ir.Node, histogram: Histograms) -> str | None:
        """Follow values that the type may not hold; which of them `node` meets, if any."""
        met = [v for _, v in self.floats(node.inputs) if self._is_large(v, histogram)]
        given = [
            v
            for i, v in self.floats(node.inputs)
            if constant_tensor(v) is not None and not _is_bound(node, i)
        ]
        source = bool(met) or any(self.loss(v) == _OVERFLOW for v in given)
        reason = f"{met[0].name!r} may overflow" if met else None
        for _, value in self.floats(node.outputs):
            seen = histogram(value)
            found = None if seen is None else self._poor(seen)
            if found is not None or (seen is None and source and not self._is_bounded(node)):
                self._large.add(value)
                reason = reason or f"its output {found or 'may overflow'}"
        return reason

    def _is_bounded(self, node: ir.Node) -> bool:
        bounds = output_range(node)
        within = bounds is not None and max(-bounds[0], bounds[1]) <= largest(self._numpy)
        return within or operator(node).role is Role.NORMALIZE

    def _is_large(self, value: ir.Value, histogram: Callable[[ir.Value], Histogram | None]) -> bool:
        if value in self._large:
            return True
        producer = value.producer()
        if producer is None:
            seen = histogram(value) if value.is_graph_input() else None
            return seen is not None and self._poor(seen) is not None
        return any(v in self._large for body in subgraphs(producer) for v in body.outputs)

    def _poor(self, seen: Histogram) -> str | None:
        """What the type would do to the values observed; None where nothing bad."""
        if max(-seen.minimum, seen.maximum) * _HEADROOM > largest(self._numpy):
            return "is observed so large that it may overflow"
        points, counts = seen.points()
        return self._fine(points.astype(np.float32), counts)

    def _loss(self, array: Array) -> str | None:
        return _OVERFLOW if overflows(array, self._numpy) else self._fine(array, None)

    def _fine(self, x: Array, counts: Array | None) -> str | None:
        if relative_error(x, self._numpy, counts) <= unit_roundoff(self._numpy):
            return None
        return f"is too small for {self.dtype.name.lower()}"

    def _join_islands(self, plan: Plan) -> None:
        """Leave cheap nodes in float32 where that saves casts: they are among such anyway."""
        light = [n for n in self._nodes if n in plan.halved and self._is_light(n)]
        for _ in range(_SWEEPS):
            for order in (light, reversed(light)):
                for node in order:
                    if node in plan.halved and self._cheaper_wide(node, plan):
                        del plan.halved[node]

    def _cheaper_wide(self, node: ir.Node, plan: Plan) -> bool:
        """Whether `node` needs fewer casts in float32; among equals, if only such nodes read it."""
        sources = {v for _, v in self.floats(node.inputs) if constant_tensor(v) is None}
        wide = sum(plan.makes(v) for v in sources)
        narrow = len(sources) - wide
        readers: set[bool] = set()
        for index in plan.halved[node].outputs:
            value = node.outputs[index]
            for user, i in value.uses():
                if not _is_blind(user):
                    readers.add(plan.reads(user, i))
            if value.is_graph_output():
                readers.add(False)
        as_wide, as_narrow = wide + (True in readers), narrow + (False in readers)
        return as_wide < as_narrow or (as_wide == as_narrow and readers == {False})

    def _is_light(self, node: ir.Node) -> bool:
        tensors = (constant_tensor(v) for v in node.inputs)
        sizes = [t.size for t in tensors if t is not None and t.dtype is FLOAT]
        return operator(node).role not in _HEAVY and max(sizes, default=0) <= _WEIGHTY

    def _retarget_casts(self, plan: Plan) -> None:
        """A cast to float32 that only 16-bit nodes read casts to their type at once."""
        for node in self._nodes:
            if node.op_type != "Cast" or node.domain not in DEFAULT_DOMAINS:
                continue
            (value,) = node.outputs
            uses = value.uses()
            if self.types.dtype(value) is not FLOAT or not uses or value.is_graph_output():
                continue
            if all(plan.reads(user, index) for user, index in uses):
                plan.halved[node] = Halved((), (0,))


def _is_blind(node: ir.Node) -> bool:
    """Whether `node` sees no values at all."""
    return node.op_type in {"Shape", "Size"} and node.domain in DEFAULT_DOMAINS


def _is_bound(node: ir.Node, index: int) -> bool:
    """Whether this input only bounds the others, so that it may saturate."""
    return node.op_type == "Clip" and index > 0


def _parameter(formals: Any, index: int) -> str:
    """The type parameter of an argument; none where each of a variadic has a type of its own."""
    formal = _formal(formals, index)
    return formal.type_str if formal.is_homogeneous else ""


def _formal(formals: Any, index: int) -> Any:
    return formals[min(index, len(formals) - 1)]


@cache
def _schema(op_type: str, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None
