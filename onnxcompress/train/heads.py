"""Transfer learning: another head on a trained trunk.

The head is the last linear operator (Gemm, MatMul with its Add, Conv) on the way to the output,
behind which nothing mixes classes but a softmax: only such operators follow it as `_TAIL` lists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.errors import InputError, did_you_mean
from onnxcompress.graph.inference import infer
from onnxcompress.graph.linear import (
    Declined,
    Linear,
    NoSite,
    dimensions,
    is_op,
    linear,
    opset_version,
    origin,
)
from onnxcompress.graph.names import FreshNames
from onnxcompress.graph.scopes import sources
from onnxcompress.operators import constant, out_axis
from onnxcompress.passes.remove_unused import RemoveUnused

_LAYOUT: Final = ("Flatten", "Reshape", "Squeeze", "Identity", "Dropout", "Cast")
_SHARE: Final = ("Softmax", "LogSoftmax", "Sigmoid")
_TAIL: Final = (*_LAYOUT, *_SHARE, "GlobalAveragePool", "Relu")
"""What may stand between a head and the output: it treats all classes alike, however many."""
_ELSEWHERE: Final = "name the node whose place the new head takes with at="


@dataclass(frozen=True)
class Head:
    """The last linear operator of a classifier or regressor, and what follows it."""

    linear: Linear
    bias: ir.Node | None
    """An Add of a constant behind it, if that holds the bias."""
    tail: tuple[ir.Node, ...]
    """What follows on the way to the output, in the graph's order."""
    output: ir.Value

    @property
    def node(self) -> ir.Node:
        return self.linear.node

    @property
    def features(self) -> ir.Value:
        """What the head reads."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def classes(self) -> int:
        """How many numbers it gives for a sample."""
        return self.linear.out_channels


def find_head(model: ir.Model, at: str | None = None, output: str | None = None) -> Head:
    """The head of `model`.

    Args:
        at: name of the node; what stands behind it up to the output must be as in `_TAIL`.
        output: the output that it feeds, where there are several.

    Raises:
        InputError: if there is none: it is quantized, say, or something else follows it.
    """
    value = _output(model, output)
    if at is not None and at not in (names := [n.name for n in model.graph]):
        known = [name for name in names if name]
        raise InputError(f"the model has no node {at!r}{did_you_mean(at, known)}")
    opset = opset_version(model.opset_imports, 1)
    tail: list[ir.Node] = []
    bias: ir.Node | None = None
    found = value
    while True:
        node = found.producer()
        if node is None:
            raise InputError(f"nothing before the output {value.name!r} is linear, so it has no "
                             "head to replace")  # fmt: skip
        if at in (None, node.name) and (head := _linear(node, opset)) is not None:
            _check_pool(node, tail)
            return Head(head, bias, tuple(reversed(tail)), value)
        if (data := _bias_of(node)) is not None and bias is None:
            bias, found = node, data
            continue
        if not is_op(node, *_TAIL) or node.inputs[0] is None:
            raise InputError(
                f"the head cannot be replaced: {node.op_type} {node.name!r} stands between it and "
                f"the output {value.name!r}; cut the model there, or "
                + (_ELSEWHERE if at is None else "name another node")
            )
        tail.append(node)
        found = node.inputs[0]


def _output(model: ir.Model, name: str | None) -> ir.Value:
    outputs = {v.name or "": v for v in model.graph.outputs}
    if name is None and len(outputs) == 1:
        return next(iter(outputs.values()))
    if name is None:
        shown = ", ".join(map(repr, outputs))
        raise InputError(
            f"the model has the outputs {shown}: say with output= which the head feeds"
        )
    if name not in outputs:
        raise InputError(f"the model has no output {name!r}{did_you_mean(name, outputs)}")
    return outputs[name]


def _linear(node: ir.Node, opset: int) -> Linear | None:
    """`node` as a head; None where it is of another kind."""
    if not is_op(node, "Gemm", "MatMul", "Conv"):
        return None
    try:
        found = linear(node, opset)
    except (NoSite, Declined) as error:
        reason = str(error) or "it multiplies two values computed at run time"
        raise InputError(
            f"the head {node.op_type} {node.name!r} cannot be replaced: {reason}; take the model "
            "before it was quantized"
        ) from error
    shape = dimensions(found.weight)
    if found.index != 1 or (is_op(node, "Gemm", "MatMul") and len(shape) != 2):
        raise InputError(f"the head {node.op_type} {node.name!r} cannot be replaced: its weight "
                         "is no matrix on the right-hand side")  # fmt: skip
    if found.view[0] != 1 and is_op(node, "Conv"):
        raise InputError(f"the head Conv {node.name!r} cannot be replaced: it has groups")
    if is_op(node, "Gemm") and found.data_axis != 1:
        raise InputError(f"the head Gemm {node.name!r} cannot be replaced: it transposes its data")
    return found


def _check_pool(node: ir.Node, tail: Sequence[ir.Node]) -> None:
    """Refuse a pool over what are classes, where they do not lie on its channel axis."""
    pools = [pool for pool in tail if is_op(pool, "GlobalAveragePool")]
    if pools and not is_op(node, "Conv"):
        raise InputError(f"the head {node.op_type} {node.name!r} cannot be replaced: "
                         f"GlobalAveragePool {pools[0].name!r} averages its classes")  # fmt: skip


def _bias_of(node: ir.Node) -> ir.Value | None:
    """The data of an Add of a constant behind a MatMul or Conv."""
    if not is_op(node, "Add"):
        return None
    for data, other in (node.inputs, tuple(reversed(node.inputs))):
        if data is None or constant(origin(other)) is None:
            continue
        if is_op(data.producer(), "MatMul", "Gemm", "Conv"):
            return data
    return None


def _with_bias(graph: ir.Graph, head: Head) -> Head:
    """The head of a MatMul without a bias, with an Add of zeros behind it."""
    names, old = FreshNames(graph), head.node.outputs[0]
    dtype = head.linear.weight.dtype
    zeros = _initializer(graph, names, None, np.zeros(head.classes), dtype)
    add = ir.node("Add", [old, zeros], name=names(f"{head.node.name}_bias"))
    new = add.outputs[0]
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    add.replace_input_with(0, old)
    new.name, old.name = old.name, names(f"{old.name}_unbiased")
    graph.insert_after(head.node, add)
    return replace(head, bias=add, output=new if head.output is old else head.output)


def replace_head(
    model: ir.Model,
    outputs: int,
    *,
    at: str | None = None,
    output: str | None = None,
    seed: int = 0,
    init: Literal["he", "zero"] = "he",
    logits: bool = False,
) -> ir.Model:
    """`model` with a fresh head for another number of classes; the trunk shares its weights.

    The one place where an interface changes, for it was asked to: the output's shape, where it
    counts the classes.

    Args:
        outputs: how many numbers the new head gives a sample.
        at: name of the head's node; `find_head` finds it otherwise.
        output: the output that it feeds, where there are several.
        init: how weights begin: "he" is normal of variance 2 / fan-in (He et al., Delving Deep
            into Rectifiers, 2015), "zero" gives every class the same figure. Biases are zero.
        logits: leave out a softmax or sigmoid behind the head, as losses on logits want.

    Raises:
        InputError: if there is no head that can be replaced.
    """
    if outputs < 1:
        raise InputError(f"outputs is {outputs} but a head must give at least one number")
    if init not in ("he", "zero"):
        raise InputError(f'init is {init!r} but must be "he" or "zero"')
    copy = model.clone()
    head = find_head(copy, at, output)
    shape = list(dimensions(head.linear.weight))
    shape[out_axis(head.node, len(shape)) or 0] = outputs
    weight = np.zeros(shape)
    if init == "he":
        fan_in = math.prod(shape) // outputs
        weight = np.random.default_rng(seed).normal(0, math.sqrt(2 / fan_in), shape)
    _install(copy, head, weight, np.zeros(outputs))
    _follow(copy, head, outputs)
    if logits:
        _drop_shares(head)
    RemoveUnused().call(copy)
    _, failure = infer(copy)
    if failure:
        raise InputError(f"the head {head.node.name!r} cannot give {outputs} numbers: {failure}")
    return copy


def set_head(
    model: ir.Model, weight: Array, bias: Array, *, at: str | None = None, output: str | None = None
) -> ir.Model:
    """`model` with these numbers in its head, whatever way it keeps them.

    Args:
        weight: (features, classes), as many as the head has.
        bias: (classes,).

    Raises:
        InputError: as `find_head`, or if a bias has no place in the head.
    """
    copy = model.clone()
    head = find_head(copy, at, output)
    if is_op(head.node, "MatMul") and head.bias is None and np.any(bias):
        head = _with_bias(copy.graph, head)
    shape = dimensions(head.linear.weight)
    across = weight if (out_axis(head.node, len(shape)) or 0) == 1 else weight.T
    _install(copy, head, across.reshape(shape), bias)
    RemoveUnused().call(copy)
    return copy


def _install(model: ir.Model, head: Head, weight: Array, bias: Array) -> None:
    """Put a weight in the head's own layout, and a bias, in place of what it has."""
    node, names, dtype = head.node, FreshNames(model.graph), head.linear.weight.dtype
    for scale in ("alpha", "beta"):
        node.attributes.pop(scale, None)
    arrays = {1: weight}
    if head.bias is not None:
        node.resize_inputs(2)
    elif not is_op(node, "MatMul"):
        arrays[2] = bias
        node.resize_inputs(3)
    for index, array in arrays.items():
        old = node.inputs[index]
        node.replace_input_with(index, _initializer(model.graph, names, old, array, dtype))
    if head.bias is not None:
        index = 1 if constant(origin(head.bias.inputs[1])) is not None else 0
        shape = (-1, *[1] * (len(head.linear.view) - 3)) if is_op(node, "Conv") else (-1,)
        new = _initializer(model.graph, names, head.bias.inputs[index], bias.reshape(shape), dtype)
        head.bias.replace_input_with(index, new)


def _initializer(
    graph: ir.Graph, names: FreshNames, old: ir.Value | None, array: Array, dtype: ir.DataType
) -> ir.Value:
    """A new initializer, under the name of the one it replaces where nothing else reads that."""
    name = (old.name if old is not None else None) or "head_bias"
    if old is not None and old.is_initializer() and len(old.uses()) == 1:
        del graph.initializers[name]
    else:
        name = names(name)
    tensor = ir.Tensor(array.astype(dtype.numpy()), name=name, dtype=dtype)
    value = ir.val(name, const_value=tensor)
    graph.register_initializer(value)
    return value


def _follow(model: ir.Model, head: Head, outputs: int) -> None:
    """Let what follows the head, and the output's shape, count `outputs`."""
    behind = [head.node, *([head.bias] if head.bias else []), *head.tail]
    names = FreshNames(model.graph)
    for node in behind:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
        if is_op(node, "Reshape"):
            _reshape(model.graph, names, node, head.classes, outputs)
    if (shape := head.output.shape) is None:
        return
    counts = [axis for axis, size in enumerate(shape) if size == head.classes]
    if not counts and any(isinstance(size, int) for size in shape[1:]):
        raise InputError(f"the output {head.output.name!r} of shape {list(shape)} has no axis of "
                         f"the {head.classes} numbers that the head gives")  # fmt: skip
    if counts:
        # Samples may be as many as classes were: those of a Conv lie behind the samples.
        first = [axis for axis in counts if axis == 1] if is_op(head.node, "Conv") else []
        axis = (first or counts[-1:])[0]
        sizes = [outputs if i == axis else size for i, size in enumerate(shape)]
        head.output.shape = ir.Shape(sizes)


def _reshape(graph: ir.Graph, names: FreshNames, node: ir.Node, classes: int, outputs: int) -> None:
    target = node.inputs[1] if len(node.inputs) > 1 else None
    sizes = constant(origin(target))
    if sizes is None or target is None:
        raise InputError(f"the head cannot be replaced: the shape that Reshape {node.name!r} "
                         "behind it gives is computed")  # fmt: skip
    counts = np.flatnonzero(sizes == classes)
    if len(counts) == 0:
        return
    changed = sizes.copy()
    changed[counts[-1]] = outputs
    new = _initializer(graph, names, target, changed, ir.DataType.INT64)
    node.replace_input_with(1, new)


def _drop_shares(head: Head) -> None:
    """Turn what makes shares of logits into Identity: the output keeps its name."""
    for node in head.tail:
        if is_op(node, *_SHARE):
            node.op_type = "Identity"
            node.attributes.clear()


def trunk_of(model: ir.Model, at: str | None = None, output: str | None = None) -> list[str]:
    """Names of the floats among the initializers that what comes before the head reads.

    To freeze them, train `head_of` alone, or all but some of these:
    `trainable=["*", *("!" + name for name in trunk)]`. Raises like `find_head`.
    """
    read = sources([find_head(model, at, output).features])
    floats = ((n, v) for n, v in model.graph.initializers.items() if v.dtype is ir.DataType.FLOAT)
    return [name for name, value in floats if value in read]


def head_of(model: ir.Model, at: str | None = None, output: str | None = None) -> list[str]:
    """Names of the initializers of the head, weight and bias. Raises like `find_head`."""
    head = find_head(model, at, output)
    nodes = [head.node, *([head.bias] if head.bias is not None else [])]
    held = [origin(value) for node in nodes for value in node.inputs]
    return [v.name or "" for v in held if v is not None and v.is_initializer()]


def features(model: ir.Model, *, at: str | None = None, output: str | None = None) -> ir.Model:
    """A model that gives what the head of `model` reads, as its one output, under its own name.

    It takes the same inputs and shares the weights. Raises like `find_head`.
    """
    copy = model.clone()
    infer(copy)
    copy.graph.outputs[:] = [find_head(copy, at, output).features]
    RemoveUnused().call(copy)
    return copy
