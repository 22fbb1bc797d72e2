"""The value of one node whose inputs are all known, as ONNX Runtime would compute it.

The reference implementation of the ONNX operators does the arithmetic, at the model's own opset
version; this module says for which operators and types it may speak for the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.operators import DEFAULT_DOMAINS, int_attribute

Tensors = Sequence[ir.TensorProtocol | None]
"""A node's inputs in order, None for an absent one."""

_MOVES: Final[frozenset[str]] = frozenset(
    (
        *("Concat", "ConstantOfShape", "Expand", "Flatten", "Gather", "Reshape", "Shape"),
        *("Size", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"),
    )
)
"""Their outputs are copies of input values, or of shapes: exact in every type."""
_ELEMENTWISE: Final[frozenset[str]] = frozenset(
    (
        *("Abs", "Add", "And", "Cast", "Ceil", "Cos", "Div", "Equal", "Erf", "Exp", "Floor"),
        *("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Log", "Max", "Min", "Mod"),
        *("Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign"),
        *("Sin", "Sqrt", "Sub", "Tanh", "Xor"),
    )
)
_SUMS: Final[frozenset[str]] = frozenset(
    (
        *("CumSum", "MatMul", "Range", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean"),
        *("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
    )
)

_INTEGERS: Final = frozenset(ir.DataType[f"{u}INT{n}"] for u in ("", "U") for n in (8, 16, 32, 64))
_MATH_TYPES: Final = _INTEGERS | {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.BOOL}
_MOVE_TYPES: Final = _MATH_TYPES | {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_TYPES: Final[dict[str, frozenset[ir.DataType]]] = (
    dict.fromkeys(_MOVES, _MOVE_TYPES)
    | dict.fromkeys(_ELEMENTWISE | _SUMS, _MATH_TYPES)
    | {"Cast": _MATH_TYPES | {ir.DataType.FLOAT16}}
)
EVALUATED: Final = frozenset(_TYPES)
"""Operators that `evaluation` may accept."""

_ROUNDING: Final = "the runtime may round this type differently"
"""ONNX Runtime computes much of 16-bit arithmetic in float32, and rounds only now and then."""

_OLDEST_OPSET: Final = 7
"""Before it, binary operators broadcast along an `axis` attribute."""


class Undecided(Exception):
    """Why a node's value is left to the runtime."""


def evaluation(
    node: ir.Node, inputs: Tensors, version: int, spare: int
) -> Callable[[], list[Array]]:
    """A function that computes the node's outputs; it does not depend on the node any more.

    Args:
        node: a node of the default ONNX domain.
        inputs: its inputs; read whenever the function is called.
        version: the opset version of the graph that holds the node.
        spare: by how many elements the outputs may exceed the inputs; checked before anything
            is allocated.

    Raises:
        Undecided: for an operator or type that the runtime may evaluate to something else, an
            attribute that a function's caller sets, or outputs too large; and by the returned
            function, for values on which ONNX leaves the result open and for invalid ones.
    """
    _check_known(node, inputs, version)
    _check_elements(node, inputs, spare)
    op_type, n_outputs = node.op_type, len(node.outputs)
    attributes = {name: _plain(a) for name, a in node.attributes.items()}

    def evaluate() -> list[Array]:
        from onnx.reference.ops import load_op  # a tenth of all imports, for what few models need

        try:
            arrays = [None if t is None else t.numpy() for t in inputs]
            _check_defined(op_type, arrays, attributes)
            with np.errstate(all="ignore"):
                kernel = load_op("", op_type, version)
                results: Any = kernel.eval(*arrays, n_outputs=n_outputs, **attributes)
        except Undecided:
            raise
        except Exception as error:  # an invalid node fails in as many ways as there are operators
            raise Undecided(f"cannot be evaluated: {error}") from error
        return _stored(results if n_outputs > 1 else (results,), _TYPES[op_type])

    return evaluate


def _check_known(node: ir.Node, inputs: Tensors, version: int) -> None:
    types = _TYPES.get(node.op_type)
    if node.domain not in DEFAULT_DOMAINS:
        raise Undecided("is not an ONNX operator")
    if types is None or version < _OLDEST_OPSET:
        raise Undecided(f"is not evaluated at opset {version}")
    if any(t is not None and t.dtype not in types for t in inputs):
        raise Undecided(_ROUNDING)
    if any(a.is_ref() for a in node.attributes.values()):
        raise Undecided("has an attribute that the function's caller sets")


def _check_elements(node: ir.Node, inputs: Tensors, spare: int) -> None:
    given = [t for t in inputs if t is not None]
    try:
        count = _expanded(node, given)
    except (ArithmeticError, IndexError, ValueError) as error:
        raise Undecided(f"cannot be evaluated: {error}") from error
    if count > sum(t.size for t in given) + spare:
        raise Undecided(f"would expand to {count} elements")


def _expanded(node: ir.Node, given: Sequence[ir.TensorProtocol]) -> int:
    """Elements of the output of an operator that can have more than it is given; 0 for others."""
    shapes = [tuple(t.shape.numpy()) for t in given]
    match node.op_type:
        case "ConstantOfShape":
            return math.prod(given[0].numpy().tolist())
        case "Expand":
            return math.prod(np.broadcast_shapes(shapes[0], tuple(given[1].numpy().tolist())))
        case "Tile":
            return given[0].size * math.prod(given[1].numpy().tolist())
        case "Range":
            start, limit, delta = (t.numpy().item() for t in given)
            return math.ceil((limit - start) / delta)
        case "Gather":
            return (
                given[0].size // max(1, shapes[0][int_attribute(node, "axis", 0)]) * given[1].size
            )
        case "MatMul":
            (a, b), n = shapes, shapes[1][-1:] if len(shapes[1]) > 1 else ()
            return math.prod((*np.broadcast_shapes(a[:-2], b[:-2]), *a[-2:-1], *n))
        case op if op in _ELEMENTWISE or op == "Where":
            return math.prod(np.broadcast_shapes(*shapes))
        case _:
            return 0


def _check_defined(op: str, arrays: Sequence[Array | None], attributes: Mapping[str, Any]) -> None:
    """Refuse what ONNX leaves open."""
    first, last = (arrays[0], arrays[-1]) if arrays else (None, None)
    if op in {"Div", "Mod"} and last is not None and last.dtype.kind in "iu" and not last.all():
        raise Undecided("divides integers by zero")
    if op == "Cast" and first is not None and first.dtype.kind == "f" and first.size:
        target = ir.DataType(attributes.get("to", 0))
        if target in _MOVE_TYPES - _MATH_TYPES:
            raise Undecided(_ROUNDING)
        if target in _INTEGERS:
            limits = np.iinfo(target.numpy())
            if not (first.min() > limits.min - 1.0 and first.max() < limits.max + 1.0):
                raise Undecided("casts a value that the integer type cannot hold")


def _plain(attribute: ir.Attr) -> Any:
    """An attribute as the reference implementation takes it."""
    if attribute.type == ir.AttributeType.TENSOR:
        return ir.to_proto(attribute.as_tensor())
    return attribute.value


def _stored(results: Sequence[Any], types: Collection[ir.DataType]) -> list[Array]:
    arrays = [np.asarray(r) for r in results]
    stored = {np.dtype(t.numpy()) for t in types}
    if any(a.dtype not in stored for a in arrays):
        raise Undecided(f"has a result of type {arrays[0].dtype}")
    return arrays
