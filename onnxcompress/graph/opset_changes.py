"""What changed in the meaning of ONNX's operators from version 7 to 24, and how to say it anew.

Most new versions only accept more types, or add attributes whose defaults are the old meaning;
those need nothing and are not listed. What is listed was read off the schemas that the onnx
package has of every version (attributes and inputs that came, went or changed their default) and
the operator changelog (onnx.ai/onnx/operators).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from onnxcompress.contract import Array

OLDEST, NEWEST = 7, 24  # the newest that ONNX Runtime has kernels for

Edit = Callable[[], object]
_INT64_MAX = np.iinfo(np.int64).max


class Declined(Exception):
    """The new version cannot say what the node means; the message is the reason."""


class Types:
    """Types and ranks of values, inferred on a copy where the model does not state them."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._inferred: Mapping[str | None, ir.Value] | None = None

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        return value.dtype or getattr(self._find(value), "dtype", None)

    def rank(self, value: ir.Value) -> int | None:
        shape = value.shape or getattr(self._find(value), "shape", None)
        return None if shape is None else shape.rank()

    def _find(self, value: ir.Value) -> ir.Value | None:
        if self._inferred is None:
            self._inferred = self._infer()
        return self._inferred.get(value.name)

    def _infer(self) -> dict[str | None, ir.Value]:
        copy = self._model.clone()
        try:
            ShapeInferencePass()(copy)
        except Exception:  # it has many kinds of failure; what it could not infer is not known
            return {}
        found: dict[str | None, ir.Value] = {}
        for node in copy.graph:
            found.update((value.name, value) for value in node.outputs)
        return found


class Site:
    """A node to be said anew; edits are collected first and made when all nodes have theirs."""

    def __init__(
        self, node: ir.Node, types: Types, names: set[str | None], in_function: bool
    ) -> None:
        self.node = node
        self.types = types
        self._names = names
        self._in_function = in_function

    def attribute(self, name: str) -> Any:
        """The attribute's value, None when absent."""
        found = self.node.attributes.get(name)
        if found is not None and found.is_ref():
            raise Declined(f"attribute {name} is a parameter of the function around it")
        return None if found is None else found.value

    def input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def dtype(self) -> np.dtype[Any]:
        value = self.input(0)
        dtype = None if value is None else self.types.dtype(value)
        if dtype is None:
            raise Declined("the type of its input is not known: run infer_shapes before")
        return dtype.numpy()

    def constant_of(self, index: int) -> Array | None:
        value = self.input(index)
        if value is None or value.is_graph_input():
            return None
        if value.is_initializer():
            return None if value.const_value is None else value.const_value.numpy()
        producer = value.producer()
        if producer is None or producer.op_type != "Constant" or "value" not in producer.attributes:
            return None
        return producer.attributes["value"].as_tensor().numpy()

    def set_input(self, index: int, name: str, array: Array) -> None:
        """Make the array the node's input, in place of the attribute of this name."""
        self.node.attributes.pop(name, None)
        if len(self.node.inputs) <= index:
            self.node.resize_inputs(index + 1)
        self.node.replace_input_with(index, self._constant(name, array))

    def set_attribute(self, name: str, value: Any) -> None:
        self.node.attributes[name] = ir.convenience.convert_attribute(name, value)

    def before(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """The output of a new node before this one."""
        new = ir.node(op, inputs, attributes)
        new.outputs[0].name = self._name(op.lower())
        self.node.prepend(new)
        return new.outputs[0]

    def _constant(self, suffix: str, array: Array) -> ir.Value:
        graph = self.node.graph
        if self._in_function or not isinstance(graph, ir.Graph):
            return self.before("Constant", value=ir.tensor(array))
        name = self._name(suffix)
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.type, value.shape = (
            ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            ir.Shape(array.shape),
        )
        graph.register_initializer(value)
        return value

    def _name(self, suffix: str) -> str:
        base = name = f"{self.node.outputs[0].name}_{suffix}"
        count = 0
        while name in self._names:
            count += 1
            name = f"{base}_{count}"
        self._names.add(name)
        return name


Adapter = Callable[[Site], Edit | None]


def _ints_to_input(name: str, index: int = 1) -> Adapter:
    def adapt(site: Site) -> Edit | None:
        values = site.attribute(name)
        if values is None:
            return None
        return lambda: site.set_input(index, name, np.atleast_1d(np.array(values, np.int64)))

    return adapt


def _slice(site: Site) -> Edit | None:
    moves = [_ints_to_input(name, i)(site) for i, name in enumerate(("starts", "ends", "axes"), 1)]
    return lambda: [move() for move in moves if move]


def _pad(site: Site) -> Edit | None:
    move = _ints_to_input("pads")(site)
    value = site.attribute("value") or 0.0
    dtype = site.dtype() if value else None

    def edit() -> None:
        if move:
            move()
        site.node.attributes.pop("value", None)
        if dtype is not None:
            site.set_input(2, "value", np.array(value, dtype))

    return edit


def _clip(site: Site) -> Edit | None:
    bounds = {name: site.attribute(name) for name in ("min", "max")}
    if all(bound is None for bound in bounds.values()):
        return None
    dtype = site.dtype()

    def edit() -> None:
        for index, (name, bound) in enumerate(bounds.items(), 1):
            if bound is not None:
                site.set_input(index, name, np.array(bound, dtype))

    return edit


def _dropout(site: Site) -> Edit | None:
    if any(mask.uses() or mask.is_graph_output() for mask in site.node.outputs[1:]):
        raise Declined("its mask is read, which was of another type")
    return lambda: site.node.attributes.pop("ratio", None)


def _spatial(site: Site) -> Edit | None:
    if site.attribute("spatial") == 0:
        raise Declined("spatial=0 normalizes every position by itself, which no newer version does")
    return lambda: site.node.attributes.pop("spatial", None)


def _inference_only(site: Site) -> Edit | None:
    if len(site.node.outputs) > 1:
        raise Declined("it has the outputs of training mode")
    return None


def _softmax(site: Site) -> Edit | None:
    """Before 13 the axes from `axis` on were one: the product of their sizes was normalized."""
    axis, value = site.attribute("axis"), site.input(0)
    axis = 1 if axis is None else axis
    if value is None:
        raise Declined("it has no input")
    rank = site.types.rank(value)
    if axis == -1 or (rank is not None and axis % max(rank, 1) == rank - 1):
        return lambda: site.set_attribute("axis", -1)

    def edit() -> None:
        node = site.node
        shape = site.before("Shape", value)
        flat = site.before("Flatten", value, axis=axis)
        result = site.before(node.op_type, flat, axis=-1)
        node.op_type = "Reshape"
        node.attributes.clear()
        node.resize_inputs(2)
        node.replace_input_with(0, result)
        node.replace_input_with(1, shape)

    return edit


def _resize(site: Site) -> Edit | None:
    """Upsample, and Resize of version 10, in the coordinates that they had.

    ONNX Runtime, whose meaning it is (the standard was silent), rounds the nearest position down
    when enlarging and up when reducing.
    """
    mode, scales = site.attribute("mode") or "nearest", site.attribute("scales")
    if mode not in ("nearest", "linear"):
        raise Declined(f"mode {mode} is not of the standard")
    down = False
    if mode == "nearest" and site.node.op_type == "Resize":  # Upsample only enlarges
        factors = site.constant_of(1)
        down = factors is not None and bool((factors < 1).any())
        if factors is None or (down and (factors > 1).any()):
            raise Declined("which way it rounds depends on scales that are not known or differ")

    def edit() -> None:
        node = site.node
        node.op_type = "Resize"
        if scales is None:
            given = node.inputs[1]
            node.resize_inputs(3)
            node.replace_input_with(1, None)
            node.replace_input_with(2, given)
        else:
            site.set_input(2, "scales", np.array(scales, np.float32))
        site.set_attribute("mode", mode)
        site.set_attribute("coordinate_transformation_mode", "asymmetric")
        if mode == "nearest":
            site.set_attribute("nearest_mode", "ceil" if down else "floor")

    return edit


def _no_tf_half_pixel(site: Site) -> Edit | None:
    if site.attribute("coordinate_transformation_mode") == "tf_half_pixel_for_nn":
        raise Declined("tf_half_pixel_for_nn is no longer in the standard")
    return None


def _scatter(site: Site) -> Edit | None:
    def edit() -> None:
        site.node.op_type = "ScatterElements"

    return edit


def _split_evenly(site: Site) -> Edit | None:
    def edit() -> None:
        if site.input(1) is None:
            site.set_attribute("num_outputs", len(site.node.outputs))

    return edit


def _roi_align(site: Site) -> Edit | None:
    return lambda: site.set_attribute("coordinate_transformation_mode", "output_half_pixel")


def _grid_sample(site: Site) -> Edit | None:
    mode = site.attribute("mode") or "bilinear"
    renamed = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    return lambda: site.set_attribute("mode", renamed)


def _dft(site: Site) -> Edit | None:
    axis = site.attribute("axis")
    return lambda: site.set_input(2, "axis", np.array(1 if axis is None else axis, np.int64))


def _never(reason: str) -> Adapter:
    def adapt(site: Site) -> Edit | None:
        raise Declined(reason)

    return adapt


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_AXES = _ints_to_input("axes")

CHANGES: dict[str, dict[int, Adapter]] = {
    "BatchNormalization": {9: _spatial, 14: _inference_only},
    "Clip": {11: _clip},
    "DFT": {20: _dft},
    "Dropout": {12: _dropout},
    "GridSample": {20: _grid_sample},
    "GroupNormalization": {21: _never("scale and bias went from per group to per channel")},
    **{name: {13: _softmax} for name in ("Softmax", "LogSoftmax", "Hardmax")},
    "Pad": {11: _pad},
    **{f"Reduce{name}": {18: _AXES} for name in _REDUCTIONS},
    "ReduceSum": {13: _AXES},
    "Resize": {11: _resize, 13: _no_tf_half_pixel},
    "RoiAlign": {16: _roi_align},
    "Scan": {9: _never("before version 9 it had a batch axis")},
    "Scatter": {11: _scatter},
    "Slice": {10: _slice},
    "Split": {13: _ints_to_input("split"), 18: _split_evenly},
    "Squeeze": {13: _AXES},
    "TopK": {10: _ints_to_input("k")},
    "Unsqueeze": {13: _AXES},
    "Upsample": {10: _resize},
}
"""By operator: the versions that changed its meaning or its form, and what to do about each."""


def edits(site: Site, old: int, new: int) -> list[Edit]:
    """What makes of a node of version `old` one that means the same in version `new`.

    Raises:
        Declined: if there is no such node.
    """
    node = site.node
    changes = [a for version, a in CHANGES.get(node.op_type, {}).items() if old < version <= new]
    if not changes:
        _check_form(node, old, new)
    return [edit for adapt in changes if (edit := adapt(site)) is not None]


def _check_form(node: ir.Node, old: int, new: int) -> None:
    """Decline what the list of changes does not know: it must not pass in silence."""
    before, after = _schema(node.op_type, old), _schema(node.op_type, new)
    if before is None or after is None or after.deprecated:
        raise Declined(f"version {old if before is None else new} has no such operator")
    if before.since_version == after.since_version:
        return
    unknown = [name for name in node.attributes if name not in after.attributes]
    if unknown:
        raise Declined(f"version {new} has no attribute {unknown[0]}")
    inputs = len(node.inputs)
    if not after.min_input <= inputs <= after.max_input or len(node.outputs) > after.max_output:
        raise Declined(f"version {new} has other inputs or outputs")


@lru_cache(maxsize=1024)
def _schema(op: str, version: int) -> Any:
    try:
        return onnx.defs.get_schema(op, version, "")
    except onnx.defs.SchemaError:
        return None
