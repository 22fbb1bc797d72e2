"""Outputs of layers brought back to the means and variances that they had before pruning.

    y' = (y - m') d / d' + m        channel by channel, folded into the layer's weight and bias

m and d are the mean and the deviation of the model that it was made of, m' and d' its own over the
same data. Nothing is trained and no labels are needed; zeros stay zeros. It does for any layer what
counting statistics anew does for one with a normalization behind it (`reestimate`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array, Result, Skip
from onnxcompress.data import Data, Images, interface, open_data
from onnxcompress.graph.inference import infer
from onnxcompress.graph.linear import is_op
from onnxcompress.graph.names import FreshNames
from onnxcompress.graph.rewriting import initializer
from onnxcompress.operators import constant_tensor
from onnxcompress.passes.fold_scales import FoldScales
from onnxcompress.passes.forget_shapes import ForgetShapes
from onnxcompress.passes.remove_unused import RemoveUnused
from onnxcompress.train.moments import Moments, in_levels, moments
from onnxcompress.train.reestimate import Progress

_MOST: Final = 10.0
"""What a channel is multiplied by at most: of one that has died, only noise is left."""


def renormalize(
    model: ir.Model,
    like: ir.Model,
    data: Any,
    *,
    images: Images | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Result:
    """Give the layers' outputs the moments of those of the same names in another model.

    Layers are convolutions and products with constant weights in the main graph, biases included;
    those whose output the model returns are left. What follows others is counted when these are
    done, so the data is run once for each layer on the longest path.

    Args:
        model: not altered; made of `like` by pruning or in another way that keeps names.
        data: inputs, as `open_data` opens them.
        executor: runs parts of the data in other processes.

    Raises:
        InputError: if the data does not suit the model.

    Source: Jordan et al., REPAIR: REnormalizing Permuted Activations for Interpolation Repair
    (2022), where it mends averages of models, and, last section, pruned ones.
    """
    copy = model.clone()
    infer(copy)
    sites = _sites(copy, like)
    if not sites:
        why = "no layer whose output others read has the name of one of the other model's"
        return Result(copy, modified=False, skips=(Skip("", "", why),))
    source = open_data(data, interface(copy), images=images)
    wanted = _of_level(like, list(sites.items()), source, executor)
    fresh, levels = FreshNames(copy.graph), in_levels(copy.graph, sites)
    for done, level in enumerate(levels, 1):
        found = _of_level(copy, level, source, executor)
        for node, axis in level:
            name = node.outputs[0].name or ""
            _insert(node, axis, _affine(wanted[name], found[name]), fresh)
        if progress is not None:
            progress(done, len(levels))
    for change in (FoldScales(), RemoveUnused(), ForgetShapes()):
        change.call(copy)
    return Result(copy, modified=True, figures={"renormalized": len(sites)})


def _sites(model: ir.Model, like: ir.Model) -> dict[ir.Node, int]:
    """Nodes that end a layer, and the axis of its channels."""
    others = {v.name for node in like.graph for v in node.outputs}
    found = dict[ir.Node, int]()
    for node in model.graph:
        weight = constant_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
        if weight is None or not is_op(node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        last, axis = _with_bias(node), -1 if is_op(node, "MatMul") else 1
        value = last.outputs[0]
        known = value.shape is not None and isinstance(value.shape[axis], int)
        if known and value.name in others and not value.is_graph_output():
            found[last] = axis
    return found


def _with_bias(node: ir.Node) -> ir.Node:
    """The Add of a constant that alone reads a product, else the node itself."""
    uses = node.outputs[0].uses()
    if not is_op(node, "MatMul") or len(uses) != 1 or node.outputs[0].is_graph_output():
        return node
    ((user, index),) = uses
    constant = is_op(user, "Add") and constant_tensor(user.inputs[1 - index]) is not None
    return user if constant else node


def _of_level(
    model: ir.Model, nodes: Sequence[tuple[ir.Node, int]], data: Data, executor: Executor | None
) -> dict[str, Moments]:
    found = dict[str, Moments]()
    for axis in (1, -1):
        values = [node.outputs[0] for node, its in nodes if its == axis]
        guesses = {v.name or "": np.zeros(_channels(v, axis)) for v in values}
        found |= moments(model, guesses, data, executor, axis=axis) if guesses else {}
    return found


def _channels(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    assert isinstance(size, int)
    return size


def _affine(wanted: Moments, found: Moments) -> Mapping[str, Array]:
    """Factor and summand of each channel."""
    (mean, variance), (own, spread) = wanted, found
    least = np.maximum(variance / _MOST**2, np.finfo(np.float32).tiny)
    factor = np.sqrt(variance / np.maximum(spread, least))
    return {"Mul": factor, "Add": mean - factor * own}


def _insert(node: ir.Node, axis: int, affine: Mapping[str, Array], fresh: FreshNames) -> None:
    """Multiply and add behind a node."""
    value, graph = node.outputs[0], node.graph
    assert isinstance(graph, ir.Graph) and value.shape is not None
    column = [-1, *[1] * (len(value.shape) - 2)] if axis == 1 else [-1]
    users, last = list(value.uses()), value
    for op, array in affine.items():
        name = fresh(f"{value.name}_{op}")
        other = initializer(graph, name, array.astype(np.float32).reshape(column))
        made = ir.node(op, [last, other], name=fresh(name))
        made.outputs[0].name = fresh(name)
        made.outputs[0].type, made.outputs[0].shape = value.type, value.shape
        graph.insert_after(last.producer() or node, made)
        last = made.outputs[0]
    for user, index in users:
        user.replace_input_with(index, last)
