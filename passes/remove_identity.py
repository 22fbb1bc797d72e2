"""Remove nodes whose output is their input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array, Pass, Result, Skip
from onnxcompress.graph.scopes import Declared, Names, subgraphs
from onnxcompress.operators import DEFAULT_DOMAINS, constant_tensor, int_attribute

_SMALL: Final = 1 << 16
"""Bytes up to which a constant is read to see whether it changes anything."""
_INT32_MAX: Final = 2**31 - 1
_SHADOWED: Final = "its name means another value in a subgraph that reads it"


@dataclass(frozen=True, kw_only=True)
class RemoveIdentity(Pass):
    """Remove nodes that hand their input on unchanged in value, type and shape.

    ```
    x ─ Identity ─ Cast(to x's type) ─ Dropout ─ Mul(·, 1) ─ Relu    ⇒    x ─ Relu
    ```
    Those are Identity; Cast and CastLike to the same type; Transpose by the identity permutation;
    Reshape, Expand and Tile to the shape that is there; Flatten of a matrix; Slice of everything;
    Pad by nothing; Concat, Sum, Mean, Max and Min of one value; Dropout at inference whose mask is
    not read; Mul, Div and Pow by 1, Add and Sub of 0 that do not broadcast (x + 0 is x but for the
    sign of zero).

    Where the output is a graph output, the input takes over its name, type and shape. The node
    stays, with a Skip, where that cannot be: the input is itself a graph input, an initializer,
    an output, or of an outer scope. Goes into subgraphs and functions.
    """

    name: ClassVar[str] = "remove_identity"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> Result:
        removal = _Removal(model)
        for graph in (model.graph, *model.functions.values()):
            removal.visit(graph, Names(graph), graph.opset_imports.get("", 1))
        return Result(
            model,
            modified=removal.removed > 0,
            skips=tuple(removal.skips),
            figures={"removed": removal.removed},
        )


@dataclass
class _Removal:
    """One run over one model."""

    model: ir.Model
    removed: int = 0
    skips: list[Skip] = field(default_factory=list[Skip])

    def __post_init__(self) -> None:
        self.declared = Declared(self.model)

    def visit(self, graph: ir.Graph | ir.Function, names: Names, version: int) -> None:
        places: dict[ir.Value, int | None] = {}
        for i, value in enumerate(graph.outputs):
            places[value] = None if value in places else i
        dropped: list[ir.Node] = []
        for node in graph:
            for subgraph in subgraphs(node):
                self.visit(subgraph, names, version)
            source = self._source(node, version)
            if source is None:
                continue
            target = node.outputs[0]
            reason = _obstacle(source, target, names, places)
            if reason is not None:
                self.skips.append(Skip(node.name or str(target.name), node.op_type, reason))
                continue
            place = places.pop(target, None)
            if place is not None:
                graph.outputs[place] = source
                places[source] = place
                _take_over(source, target)
            target.replace_all_uses_with(source)
            node.resize_inputs(0)
            dropped.append(node)
        graph.remove(dropped)
        self.removed += len(dropped)

    def _source(self, node: ir.Node, version: int) -> ir.Value | None:
        """The input that is the node's only read output, or None."""
        test = _TESTS.get(node.op_type)
        known = node.domain in DEFAULT_DOMAINS and node.op_identifier() not in self.model.functions
        if test is None or not known or any(a.is_ref() for a in node.attributes.values()):
            return None
        if any(v.is_graph_output() or v.uses() for v in node.outputs[1:]):
            return None
        index = test(_Site(node, version, self.declared))
        return None if index is None or index >= len(node.inputs) else node.inputs[index]


def _obstacle(
    source: ir.Value, target: ir.Value, names: Names, places: Mapping[ir.Value, int | None]
) -> str | None:
    """Why `source` cannot stand for `target`, or None."""
    if not target.is_graph_output():
        return None if names.reach(source.name, source.graph, target) else _SHADOWED
    if places.get(target) is None:
        return "its output is a graph output more than once"
    if source.graph is not target.graph or source.producer() is None or source.is_graph_output():
        return "joins a graph output to an input, constant, outer value or another output"
    return None if names.reach(target.name, source.graph, source) else _SHADOWED


def _take_over(source: ir.Value, target: ir.Value) -> None:
    """Let `source` be the graph output that `target` was, declared as it was."""
    source.name = target.name
    source.type = target.type or source.type
    source.shape = target.shape
    source.doc_string = target.doc_string
    source.metadata_props.update(target.metadata_props)


@dataclass(frozen=True)
class _Site:
    """A node, and what its input may be relied on to be."""

    node: ir.Node
    version: int
    declared: Declared

    def value(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def array(self, index: int) -> Array | None:
        """The constant at an input, if it is small."""
        tensor = constant_tensor(self.value(index))
        return None if tensor is None or tensor.nbytes > _SMALL else tensor.numpy()

    def numbers(self, index: int, name: str) -> list[int] | None:
        """Integers that are a constant input since some opset, and an attribute before; or None."""
        if name in self.node.attributes:
            return list(self.node.attributes[name].as_ints())
        array = self.array(index)
        return None if array is None else array.reshape(-1).tolist()

    def shape(self, index: int = 0) -> ir.Shape | None:
        value = self.value(index)
        return None if value is None else self.declared.shape(value)


# Each test answers with the index of the input that the node hands on, or None.


def _single(site: _Site) -> int | None:
    return 0 if len(site.node.inputs) == 1 else None


def _cast(site: _Site) -> int | None:
    value, to = site.value(0), site.node.attributes.get("to")
    if value is None or value.dtype is None or to is None or to.type != ir.AttributeType.INT:
        return None
    return 0 if value.dtype == to.as_int() else None


def _cast_like(site: _Site) -> int | None:
    value, like = site.value(0), site.value(1)
    if value is None or like is None or value.dtype is None:
        return None
    return 0 if value.dtype == like.dtype else None


def _transpose(site: _Site) -> int | None:
    perm = site.node.attributes.get("perm")
    if perm is None:
        shape = site.shape()
        return 0 if shape is not None and len(shape) < 2 else None
    return 0 if list(perm.as_ints()) == list(range(len(perm.as_ints()))) else None


def _reshape(site: _Site) -> int | None:
    target, shape = site.array(1), site.shape()
    if target is None or shape is None or target.shape != (len(shape),) or 0 in shape.dims:
        return None
    copied = () if int_attribute(site.node, "allowzero", 0) else (0,)
    pairs = list(zip(target.tolist(), shape.dims, strict=True))
    # One dimension may be inferred: the others being the same, it is the same too.
    same = all(t == d or t in copied or t == -1 for t, d in pairs)
    return 0 if same and sum(t == -1 for t, _ in pairs) <= 1 else None


def _expand(site: _Site) -> int | None:
    target, shape = site.array(1), site.shape()
    if target is None:
        return None
    return 0 if _fits(tuple(target.tolist()), shape) else None


def _tile(site: _Site) -> int | None:
    repeats = site.array(1)
    return 0 if site.version >= 6 and repeats is not None and np.all(repeats == 1) else None


def _flatten(site: _Site) -> int | None:
    shape = site.shape()
    matrix = shape is not None and len(shape) == 2
    return 0 if matrix and int_attribute(site.node, "axis", 1) in (1, -1) else None


def _slice(site: _Site) -> int | None:
    starts, ends = site.numbers(1, "starts"), site.numbers(2, "ends")
    steps = [1] if site.value(4) is None else site.numbers(4, "steps")
    if starts is None or ends is None or steps is None:
        return None
    whole = not any(starts) and all(e >= _INT32_MAX for e in ends) and all(s == 1 for s in steps)
    return 0 if whole else None


def _pad(site: _Site) -> int | None:
    pads = site.numbers(1, "pads")
    return None if pads is None or any(pads) else 0


def _dropout(site: _Site) -> int | None:
    """Opset 12 trains if an input says so, 7 never, and before that unless `is_test` is set."""
    if site.version < 7:
        return 0 if int_attribute(site.node, "is_test", 0) == 1 else None
    training = site.value(2)
    if site.version < 12 or training is None:
        return 0
    mode = site.array(2)
    return 0 if mode is not None and not mode.any() else None


def _neutral(number: int, *others: int) -> _Test:
    """A test of a binary operator for a constant among `others` that is `number` throughout."""

    def test(site: _Site) -> int | None:
        for index in others if site.version >= 7 else ():
            array = site.array(index)
            if array is None or array.size == 0 or not np.all(array == number):
                continue
            if _fits(array.shape, site.shape(1 - index)):
                return 1 - index
        return None

    return test


def _fits(other: tuple[int, ...], shape: ir.Shape | None) -> bool:
    """Whether broadcasting with the shape `other` leaves a value of `shape` as it is."""
    if not other:
        return True
    if shape is None or len(other) > len(shape):
        return False
    return all(o in (1, d) for o, d in zip(reversed(other), reversed(shape.dims), strict=False))


_Test = Callable[[_Site], int | None]
_TESTS: Final[dict[str, _Test]] = {
    "Identity": _single,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Expand": _expand,
    "Tile": _tile,
    "Flatten": _flatten,
    "Slice": _slice,
    "Pad": _pad,
    "Dropout": _dropout,
    "Concat": _single,
    "Sum": _single,
    "Mean": _single,
    "Max": _single,
    "Min": _single,
    "Add": _neutral(0, 1, 0),
    "Sub": _neutral(0, 1),
    "Mul": _neutral(1, 1, 0),
    "Div": _neutral(1, 1),
    "Pow": _neutral(1, 1),
}
