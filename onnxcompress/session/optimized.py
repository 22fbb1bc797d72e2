"""What ONNX Runtime makes of a model: to read, to time node by node, and to run as it is."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.session.runtime import (
    EXPORT_AGAIN,
    LEVELS,
    PROVIDERS,
    Optimization,
    one_sentence,
    options_of,
    ort,
    title_of,
)
from onnxcompress.session.start import (
    FOLDER_OF_WEIGHTS,
    LOCATION,
    SHARED_BYTES,
    large,
    reference,
    replace_outputs,
)

_ORIGINAL = "original"
_ALIGNMENT = 64
# The most channels that a block of ONNX Runtime's own layout holds on any machine.
_BLOCK = 16


def optimized_model(model: ir.Model | Path, *, optimization: Optimization = "all") -> ir.Model:
    """The graph that ONNX Runtime makes of `model` on this CPU, to see which operators it fused.

    It is for reading: large weights in it have no data behind them.

    Raises:
        InputError: if ONNX Runtime refuses the model.
    """
    title = title_of(model)
    with tempfile.TemporaryDirectory() as folder:
        path = _optimize(model, None, optimization, title, Path(folder))
        with one_sentence(f"wrote {title} in a form that cannot be read", EXPORT_AGAIN):
            return ir.load(path)  # pyright: ignore[reportUnknownMemberType]


def profile(
    model: ir.Model | Path, feed: Mapping[str, Any], *, threads: int = 1, runs: int = 12
) -> tuple[ir.Model, dict[str, float]]:
    """What ONNX Runtime makes of `model`, and the median seconds of each node in its main graph.

    Nodes are named anew, so that each is told by its name.

    Raises:
        InputError: if ONNX Runtime refuses the model or the feed.
    """
    title = title_of(model)
    with (
        tempfile.TemporaryDirectory() as folder,
        one_sentence(f"cannot profile {title}", "give data that suits the model"),
    ):
        path = _optimize(model, None, "all", title, Path(folder))
        optimized = ir.load(path)  # pyright: ignore[reportUnknownMemberType]
        for index, node in enumerate(optimized.graph):
            node.name = f"node_{index}"
        ir.save(optimized, path)  # pyright: ignore[reportUnknownMemberType]
        options = options_of("none", verbose=False)
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(path), options, PROVIDERS)
        for _ in range(runs):
            session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    found: dict[str, list[float]] = {}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") == "Node" and name != event["name"]:
            found.setdefault(name, []).append(event["dur"] / 1e6)
    return optimized, {name: float(np.median(times)) for name, times in found.items()}


def _optimize(
    model: ir.Model | Path,
    outputs: Sequence[str] | None,
    optimization: Optimization,
    title: str,
    folder: Path,
) -> Path:
    """Write what ONNX Runtime makes of `model` to `folder`, large weights to a file beside it."""
    options = options_of(optimization, verbose=False)
    options.add_session_config_entry("session.disable_prepacking", "1")
    path = folder / "optimized.onnx"
    options.optimized_model_filepath = str(path)
    for key, value in (("file_name", LOCATION), ("min_size_in_bytes", str(SHARED_BYTES))):
        options.add_session_config_entry(
            f"session.optimized_model_external_initializers_{key}", value
        )
    with one_sentence(f"cannot load {title}", EXPORT_AGAIN):
        ort.InferenceSession(str(_as_file(model, outputs, title, folder)), options, PROVIDERS)
    return path


def _as_file(
    model: ir.Model | Path, outputs: Sequence[str] | None, title: str, folder: Path
) -> Path:
    """The model in a file: what ONNX Runtime reads from one, it need not hold a copy of."""
    if isinstance(model, Path):
        if outputs is None:
            return model
        model = model_io.load(model)
    copy = model.clone()
    if outputs is not None:
        replace_outputs(copy.graph, outputs, title)
    with (folder / _ORIGINAL).open("wb") as file:
        for value, tensor in large(copy.graph):
            file.write(bytes(-file.tell() % _ALIGNMENT))
            value.const_value = reference(value, tensor, _ORIGINAL, file.tell())
            file.write(tensor.tobytes())
    path = folder / "original.onnx"
    path.write_bytes(ir.to_proto(copy).SerializeToString())
    return path


def start_unordered(
    model: ir.Model | Path,
    outputs: Sequence[str] | None,
    unordered: Collection[str],
    options: Any,
    title: str,
) -> Any:
    """A session on `model` as optimized, that gives out `unordered` as its kernels leave them."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = _optimize(model, outputs, "all", title, Path(folder))
        found = onnx.ModelProto.FromString(path.read_bytes())
        _drop_reorders(found.graph, unordered)
        options.graph_optimization_level = LEVELS["none"]
        options.add_session_config_entry(FOLDER_OF_WEIGHTS, folder)
        with one_sentence(f"cannot load {title}", EXPORT_AGAIN):
            return ort.InferenceSession(found.SerializeToString(), options, PROVIDERS)


def _drop_reorders(graph: onnx.GraphProto, unordered: Collection[str]) -> None:
    """Let the graph give out values of blocked channels where it unblocks them for its outputs.

    Only where the channels fill the blocks, so that there are no other elements between them.
    """
    outputs = {value.name for value in graph.output}
    reorders = {
        node.input[0]: node
        for node in graph.node
        if node.op_type == "ReorderOutput"
        and node.output[0] in outputs.intersection(unordered)
        and next(a.i for a in node.attribute if a.name == "channels") % _BLOCK == 0
    }
    names = {node.output[0]: f"{node.output[0]}_reordered" for node in reorders.values()}
    names |= {source: node.output[0] for source, node in reorders.items()}
    used = {name for node in _all_nodes(graph) for name in node.input}
    unused = {node.output[0] for node in reorders.values()} - used
    kept = [node for node in graph.node if unused.isdisjoint(node.output)]
    del graph.node[:]
    graph.node.extend(kept)
    for node in _all_nodes(graph):
        for ports in (node.input, node.output):
            ports[:] = [names.get(name, name) for name in ports]


def _all_nodes(graph: onnx.GraphProto) -> Generator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _all_nodes(body)
