"""Starts sessions on models in memory, whose weights are handed over beside the protobuf."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.errors import InputError
from onnxcompress.session.runtime import (
    EXPORT_AGAIN,
    LEVELS,
    PROVIDERS,
    one_sentence,
    ort,
    to_ort,
)

# Below this an initializer stays in the protobuf: shape inference and fusions read its value.
SHARED_BYTES = 1024
LOCATION = "weights"
FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"


def start(
    model: ir.Model | Path, outputs: Sequence[str] | None, options: Any, title: str
) -> tuple[Any, list[Any]]:
    """The session, and the arrays that must live as long as it does."""
    if isinstance(model, Path):
        if outputs is None:
            with one_sentence(f"cannot load {title}", EXPORT_AGAIN):
                return ort.InferenceSession(str(model), options, PROVIDERS), []
        model = model_io.load(model)
    with (
        one_sentence(f"cannot load {title}", EXPORT_AGAIN),
        tempfile.TemporaryDirectory() as folder,
    ):
        copy = model.clone()
        if outputs is not None:
            replace_outputs(copy.graph, outputs, title)
        # ONNX Runtime checks that the named file exists, though every initializer is handed over.
        (Path(folder) / LOCATION).touch()
        options.add_session_config_entry(FOLDER_OF_WEIGHTS, folder)
        weights = _take_weights(copy.graph)
        lend = options.graph_optimization_level == LEVELS["none"]
        if lend:
            for name, weight in weights.items():
                options.add_initializer(name, weight)
        else:
            # Fusions read weights, which the call above keeps from them; this one copies.
            options.add_external_initializers(list(weights), list(weights.values()))
        content = ir.to_proto(copy).SerializeToString()
        session = ort.InferenceSession(content, options, PROVIDERS)
        return session, list(weights.values()) if lend else []


def replace_outputs(graph: ir.Graph, names: Sequence[str], title: str) -> None:
    """Let the graph give out the values of these names.

    Raises:
        InputError: if it has no such value.
    """
    known = {v.name: v for v in (*graph.initializers.values(), *graph.inputs)}
    known.update((v.name, v) for node in graph for v in node.outputs)
    missing = [name for name in names if name not in known]
    if missing:
        raise InputError(f"{title} has no value {missing[0]!r} in its main graph")
    graph.outputs[:] = [known[name] for name in dict.fromkeys(names)]


def _take_weights(graph: ir.Graph) -> dict[str, Any]:
    """Reduce large initializers to references, and return their arrays by name."""
    weights: dict[str, Any] = {}
    for value, tensor in large(graph):
        array = np.require(tensor.numpy(), requirements=["C", "ALIGNED"])
        value.const_value = reference(value, tensor, LOCATION, 0)
        weights[value.name or ""] = to_ort(array)
    return weights


def large(graph: ir.Graph) -> Generator[tuple[ir.Value, ir.TensorProtocol]]:
    """Initializers that are not worth a place in the protobuf."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < SHARED_BYTES or tensor.dtype in _INLINE:
            continue
        # ONNX Runtime drops what nothing reads, and then misses it.
        if value.uses() or value.is_graph_output():
            yield value, tensor


def reference(
    value: ir.Value, tensor: ir.TensorProtocol, location: str, offset: int
) -> ir.ExternalTensor:
    """What stands for a weight in the protobuf."""
    shape, name = ir.Shape(tensor.shape.numpy()), value.name or ""
    return ir.ExternalTensor(location, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name)


# Kinds whose arrays in memory are not laid out as ONNX Runtime stores them.
_INLINE = {ir.DataType.STRING, ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.FLOAT4E2M1} | {
    ir.DataType[name] for name in ("INT2", "UINT2") if name in ir.DataType.__members__
}
