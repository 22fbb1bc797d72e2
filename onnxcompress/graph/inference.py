"""ONNX's own shape inference, read back without making a second model of what it gives."""

from __future__ import annotations

from collections.abc import Generator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from itertools import chain
from typing import Final

import onnx
import onnx_ir as ir

from onnxcompress.graph.scopes import subgraphs

_LARGE: Final = 1024
"""Bytes from which an initializer is no shape that others follow from, and stays out."""
_INFERRED: Final = "onnxcompress.inferred"
"""Marks, in `Value.meta`, what had no type before."""


def infer(model: ir.Model) -> tuple[bool, str]:
    """Fill in types and shapes of inner values; what inputs and outputs say of themselves stays.

    Returns whether anything was filled in, and why not where inference failed.

    Source: `onnx.shape_inference`.
    """
    try:
        with _without_weights(model):
            proto = ir.to_proto(model)
        inferred = onnx.shape_inference.infer_shapes(
            proto, check_type=True, strict_mode=True, data_prop=True
        )
    except Exception as error:  # it raises whatever its C++ or the serialization comes upon
        return False, f"ONNX's shape inference failed: {' '.join(str(error).split())[:200]}"
    return _adopt(model.graph, inferred.graph, set(model.graph.outputs)), ""


def forget(model: ir.Model) -> bool:
    """Take back what was inferred of values that had no type; whether there was any."""
    found = [
        value
        for graph in model.graphs()
        for node in graph
        for value in node.outputs
        if _INFERRED in value.meta
    ]
    for value in found:
        del value.meta[_INFERRED]
        value.type = value.shape = None
    return bool(found)


@contextmanager
def _without_weights(model: ir.Model) -> Generator[None]:
    """Let large initializers be written down as references: inference reads only their shapes."""
    taken: dict[ir.Value, ir.TensorProtocol] = {}
    try:
        for value in chain.from_iterable(g.initializers.values() for g in model.graphs()):
            tensor = value.const_value
            if tensor is not None and tensor.nbytes >= _LARGE:
                taken[value] = tensor
                shape = ir.Shape(tensor.shape.numpy())
                value.const_value = ir.ExternalTensor(
                    "weights", 0, tensor.nbytes, tensor.dtype, shape=shape, name=tensor.name or ""
                )
        yield
    finally:
        for value, tensor in taken.items():
            value.const_value = tensor


def _adopt(graph: ir.Graph, inferred: onnx.GraphProto, settled: AbstractSet[ir.Value]) -> bool:
    values = {v.name: v for node in graph for v in node.outputs if v not in settled}
    modified = False
    for info in (*inferred.value_info, *inferred.output):
        if (value := values.get(info.name)) is None:
            continue
        type_, shape = _described(info.type)
        if type_ is not None and type_ != value.type:
            if value.type is None:
                value.meta[_INFERRED] = True
            value.type, modified = type_, True
        if shape is not None and shape != value.shape:
            value.shape, modified = shape, True
    for node, proto in zip(graph, inferred.node, strict=True):
        if not node.attributes.data:
            continue
        bodies = (b for a in proto.attribute for b in ((a.g,) if a.HasField("g") else a.graphs))
        for body, found in zip(subgraphs(node), bodies, strict=True):
            modified |= _adopt(body, found, settled)
    return modified


def _described(proto: onnx.TypeProto) -> tuple[ir.TypeProtocol | None, ir.Shape | None]:
    """Type and shape that a protocol buffer states; onnx_ir's own readers take thrice as long."""
    if proto.WhichOneof("value") != "tensor_type" or proto.denotation:
        type_ = ir.serde.deserialize_type_proto_for_type(proto)
        tensor = isinstance(type_, ir.TensorType)
        return type_, ir.serde.deserialize_type_proto_for_shape(proto) if tensor else None
    stated = proto.tensor_type
    type_ = ir.TensorType(ir.DataType(stated.elem_type))
    if not stated.HasField("shape"):
        return type_, None
    dims = stated.shape.dim
    sizes = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims]
    denotations = [d.denotation or None for d in dims]
    return type_, ir.Shape(sizes, denotations=denotations, frozen=True)
