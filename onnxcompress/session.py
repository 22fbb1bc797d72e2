"""Runs models in ONNX Runtime: the one place that imports it.

Weights are not serialised: the graph is handed over as a small protobuf whose large initializers
are only named, and their arrays (memory-mapped where the model came from a file) are passed
beside it. Models over 2 GB run this way too. Without optimization the session computes with these
very arrays and starts in milliseconds; with it, ONNX Runtime takes a copy.
"""

from __future__ import annotations

import ctypes
import json
import math
import re
import tempfile
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

from onnxcompress import model_io
from onnxcompress.contract import Array
from onnxcompress.errors import InputError, OnnxCompressError

Feed = Mapping[str, Any]
Optimization = Literal["all", "basic", "none"]

ort: Any = onnxruntime  # it comes without types

_LEVELS: dict[Optimization, Any] = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
# Below this an initializer stays in the protobuf: shape inference and fusions read its value.
_SHARED_BYTES = 1024
_LOCATION, _ORIGINAL = "weights", "original"
_ALIGNMENT = 64
# The most channels that a block of ONNX Runtime's own layout holds on any machine.
_BLOCK = 16
_PROVIDERS = ["CPUExecutionProvider"]
_FATAL, _WARNING = 4, 2
_EXPORT_AGAIN = "export it again in a form that this version runs"


class Session:
    """A model ready to run on the CPU.

    Args:
        model: a model in memory, which is not altered, or the path of one.
        outputs: the values to return, in this order; any value of the main graph (a graph input
            and an initializer too). The graph's outputs when None.
        optimization: how much ONNX Runtime rewrites the graph before it runs.
        threads: threads of one operator; 0 leaves the choice to ONNX Runtime.
        prepack: let kernels keep a second, reordered copy of the weights: faster runs, but a
            slower start and more memory, so turn it off for a few runs of a large model.
        spinning: let idle threads wait busily; turn it off where other threads need the cores.
        frugal: for many outputs at once: give each value its own memory for as long as it is
            needed instead of planning one block for all, and give back what lies freed in the heap.
        unordered: outputs whose elements may come in any order, which saves a copy of those that
            kernels keep in a layout of their own.
        training: for graphs that hold gradients: kernels that give the same bits at each run, and
            pairs of QuantizeLinear and DequantizeLinear that stay what they are.
        verbose: show ONNX Runtime's own warnings.

    Raises:
        InputError: if a wanted output does not exist or ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: ir.Model | Path,
        *,
        outputs: Sequence[str] | None = None,
        optimization: Optimization = "all",
        threads: int = 0,
        prepack: bool = True,
        spinning: bool = True,
        frugal: bool = False,
        unordered: Collection[str] = (),
        training: bool = False,
        verbose: bool = False,
    ) -> None:
        title = str(model) if isinstance(model, Path) else repr(model.graph.name or "model")
        options = _options(optimization, verbose)
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = not frugal
        options.add_session_config_entry("session.disable_prepacking", str(int(not prepack)))
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.use_deterministic_compute = training
        options.add_session_config_entry("session.disable_quant_qdq", str(int(training)))
        self._title = title
        if frugal:
            _trim()
        started: tuple[Any, list[Any]] | None = None
        if unordered and optimization == "all":
            with suppress(InputError):  # ONNX Runtime cannot always read what it wrote
                started = _start_unordered(model, outputs, unordered, options, title), []
        self._session, self._lent = started or _start(model, outputs, options, title)
        if frugal:
            _trim()
        self._run_options = ort.RunOptions()
        self._run_options.log_severity_level = options.log_severity_level
        ports = (*self._session.get_inputs(), *self._session.get_outputs())
        kinds = {port.type for port in ports}
        found = self._session.get_outputs()
        self._lists = [port.name for port in found if port.type.startswith("seq")]
        arrays_only = all(k.startswith("tensor(") and k != "tensor(string)" for k in kinds)
        self._as_values = arrays_only or not kinds.isdisjoint(_FOREIGN)
        self.inputs: tuple[str, ...] = tuple(v.name for v in self._session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(v.name for v in self._session.get_outputs())

    def run(self, feed: Feed) -> dict[str, Array]:
        """The outputs by name for one feed (arrays by input name), for reading only: no copies.

        Raises:
            InputError: if the feed does not fit the model or an operator fails on it.
        """
        with _one_sentence(f"cannot run {self._title}", "give data that suits the model"):
            if self._as_values:
                found = self._run_values(feed)
                return {name: found[name] for name in self.outputs}
            # Numbers that numpy makes of arrays without axes become arrays again.
            arrays = {k: v for k, v in feed.items() if not isinstance(v, list)}
            values = {**feed, **{k: np.asarray(v) for k, v in arrays.items()}}
            outputs = self._session.run(self.outputs, values, self._run_options)
        return dict(zip(self.outputs, outputs, strict=True))

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Binding:
        """A way to run on these very arrays, again and again."""
        failure = f"cannot run {self._title}"
        return Binding(self._session, failure, inputs, outputs)

    def _run_values(self, feed: Feed) -> dict[str, Array]:
        """Lists need a run of their own: they come as arrays only, foreign tensors never do."""
        values = {name: _to_ort(array) for name, array in feed.items()}
        found: dict[str, Array] = {}
        if tensors := [name for name in self.outputs if name not in self._lists]:
            outputs = self._session.run_with_ort_values(tensors, values, self._run_options)
            found |= zip(tensors, map(_from_ort, outputs), strict=True)
        if self._lists:
            outputs = self._session.run(self._lists, values, self._run_options)
            found |= zip(self._lists, outputs, strict=True)
        return found


class Binding:
    """Arrays that a session reads its inputs from and writes its outputs to; nothing is copied.

    They must be C-contiguous, of the session's types and of the shapes that come out. An output
    may be the array of an input if all that reads the input goes into that output: the kernels
    that compute value by value write where they read.
    """

    def __init__(
        self,
        session: Any,
        failure: str,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
    ) -> None:
        self._session, self._failure = session, failure
        self._bound = session.io_binding()
        self._arrays: dict[str, Any] = {}
        self.feed(inputs)
        for name, array in outputs.items():
            self._arrays[name] = _to_ort(array)
            self._bound.bind_ortvalue_output(name, self._arrays[name])

    def feed(self, inputs: Mapping[str, Array]) -> None:
        """Read these inputs from other arrays from now on."""
        for name, array in inputs.items():
            self._arrays[name] = _to_ort(array)
            self._bound.bind_ortvalue_input(name, self._arrays[name])

    def run(self) -> None:
        """Compute the outputs into their arrays.

        Raises:
            InputError: if the arrays do not fit the model or an operator fails on them.
        """
        with _one_sentence(self._failure, "give data that suits the model"):
            self._session.run_with_iobinding(self._bound)


def optimized_model(model: ir.Model | Path, *, optimization: Optimization = "all") -> ir.Model:
    """The graph that ONNX Runtime makes of `model` on this CPU, to see which operators it fused.

    It is for reading: large weights in it have no data behind them.

    Raises:
        InputError: if ONNX Runtime refuses the model.
    """
    title = str(model) if isinstance(model, Path) else repr(model.graph.name or "model")
    with tempfile.TemporaryDirectory() as folder:
        path = _optimize(model, None, optimization, title, Path(folder))
        with _one_sentence(f"wrote {title} in a form that cannot be read", _EXPORT_AGAIN):
            return ir.load(path)  # pyright: ignore[reportUnknownMemberType]


def profile(
    model: ir.Model | Path, feed: Feed, *, threads: int = 1, runs: int = 12
) -> tuple[ir.Model, dict[str, float]]:
    """What ONNX Runtime makes of `model`, and the median seconds of each node in its main graph.

    Nodes are named anew, so that each is told by its name.

    Raises:
        InputError: if ONNX Runtime refuses the model or the feed.
    """
    title = str(model) if isinstance(model, Path) else repr(model.graph.name or "model")
    with (
        tempfile.TemporaryDirectory() as folder,
        _one_sentence(f"cannot profile {title}", "give data that suits the model"),
    ):
        path = _optimize(model, None, "all", title, Path(folder))
        optimized = ir.load(path)  # pyright: ignore[reportUnknownMemberType]
        for index, node in enumerate(optimized.graph):
            node.name = f"node_{index}"
        ir.save(optimized, path)  # pyright: ignore[reportUnknownMemberType]
        options = _options("none", verbose=False)
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(path), options, _PROVIDERS)
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
    options = _options(optimization, verbose=False)
    options.add_session_config_entry("session.disable_prepacking", "1")
    path = folder / "optimized.onnx"
    options.optimized_model_filepath = str(path)
    for key, value in (("file_name", _LOCATION), ("min_size_in_bytes", str(_SHARED_BYTES))):
        options.add_session_config_entry(
            f"session.optimized_model_external_initializers_{key}", value
        )
    with _one_sentence(f"cannot load {title}", _EXPORT_AGAIN):
        ort.InferenceSession(str(_as_file(model, outputs, title, folder)), options, _PROVIDERS)
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
        _replace_outputs(copy.graph, outputs, title)
    with (folder / _ORIGINAL).open("wb") as file:
        for value, tensor in _large(copy.graph):
            file.write(bytes(-file.tell() % _ALIGNMENT))
            value.const_value = _reference(value, tensor, _ORIGINAL, file.tell())
            file.write(tensor.tobytes())
    path = folder / "original.onnx"
    path.write_bytes(ir.to_proto(copy).SerializeToString())
    return path


def _start_unordered(
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
        options.graph_optimization_level = _LEVELS["none"]
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", folder
        )
        with _one_sentence(f"cannot load {title}", _EXPORT_AGAIN):
            return ort.InferenceSession(found.SerializeToString(), options, _PROVIDERS)


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


def _options(optimization: Optimization, verbose: bool) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = _LEVELS[optimization]
    options.log_severity_level = _WARNING if verbose else _FATAL
    return options


def _start(
    model: ir.Model | Path, outputs: Sequence[str] | None, options: Any, title: str
) -> tuple[Any, list[Any]]:
    """The session, and the arrays that must live as long as it does."""
    if isinstance(model, Path):
        if outputs is None:
            with _one_sentence(f"cannot load {title}", _EXPORT_AGAIN):
                return ort.InferenceSession(str(model), options, _PROVIDERS), []
        model = model_io.load(model)
    with (
        _one_sentence(f"cannot load {title}", _EXPORT_AGAIN),
        tempfile.TemporaryDirectory() as folder,
    ):
        copy = model.clone()
        if outputs is not None:
            _replace_outputs(copy.graph, outputs, title)
        # ONNX Runtime checks that the named file exists, though every initializer is handed over.
        (Path(folder) / _LOCATION).touch()
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", folder
        )
        weights = _take_weights(copy.graph)
        lend = options.graph_optimization_level == _LEVELS["none"]
        if lend:
            for name, weight in weights.items():
                options.add_initializer(name, weight)
        else:
            # Fusions read weights, which the call above keeps from them; this one copies.
            options.add_external_initializers(list(weights), list(weights.values()))
        content = ir.to_proto(copy).SerializeToString()
        session = ort.InferenceSession(content, options, _PROVIDERS)
        return session, list(weights.values()) if lend else []


def _replace_outputs(graph: ir.Graph, names: Sequence[str], title: str) -> None:
    known = {v.name: v for v in (*graph.initializers.values(), *graph.inputs)}
    known.update((v.name, v) for node in graph for v in node.outputs)
    missing = [name for name in names if name not in known]
    if missing:
        raise InputError(f"{title} has no value {missing[0]!r} in its main graph")
    graph.outputs[:] = [known[name] for name in dict.fromkeys(names)]


def _take_weights(graph: ir.Graph) -> dict[str, Any]:
    """Reduce large initializers to references, and return their arrays by name."""
    weights: dict[str, Any] = {}
    for value, tensor in _large(graph):
        array = np.require(tensor.numpy(), requirements=["C", "ALIGNED"])
        value.const_value = _reference(value, tensor, _LOCATION, 0)
        weights[value.name or ""] = _to_ort(array)
    return weights


def _large(graph: ir.Graph) -> Generator[tuple[ir.Value, ir.TensorProtocol]]:
    """Initializers that are not worth a place in the protobuf."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _SHARED_BYTES or tensor.dtype in _INLINE:
            continue
        # ONNX Runtime drops what nothing reads, and then misses it.
        if value.uses() or value.is_graph_output():
            yield value, tensor


def _reference(
    value: ir.Value, tensor: ir.TensorProtocol, location: str, offset: int
) -> ir.ExternalTensor:
    shape, name = ir.Shape(tensor.shape.numpy()), value.name or ""
    return ir.ExternalTensor(location, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name)


# Kinds whose arrays in memory are not laid out as ONNX Runtime stores them.
_INLINE = {ir.DataType.STRING, ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.FLOAT4E2M1} | {
    ir.DataType[name] for name in ("INT2", "UINT2") if name in ir.DataType.__members__
}


# Tensors that ONNX Runtime does not turn into arrays by itself.
_FOREIGN = {"tensor(bfloat16)"} | {
    f"tensor(float8e{kind})" for kind in ("4m3fn", "4m3fnuz", "5m2", "5m2fnuz")
}


def _to_ort(array: Any) -> Any:
    array = np.asarray(array, order="C")
    if array.dtype.kind != "V":
        return ort.OrtValue.ortvalue_from_numpy(array)
    kind = int(ir.DataType.from_numpy(array.dtype))
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind)


def _from_ort(value: Any) -> Any:
    """The tensor as an array that shares its memory."""
    if value.data_type() not in _FOREIGN:
        return np.from_dlpack(value)
    dtype = ir.DataType(value.element_type()).numpy()
    shape: list[int] = value.shape()
    size = math.prod(shape) * dtype.itemsize
    content = ctypes.string_at(value.data_ptr(), size)
    return np.frombuffer(content, dtype).reshape(shape)


def _trim() -> None:
    """Give freed memory back to the system: a start leaves twice the weights' bytes in the heap."""
    with suppress(OSError, AttributeError):  # glibc has it, other systems do without
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def _one_sentence(failure: str, remedy: str) -> Generator[None]:
    """Turn ONNX Runtime's multi-line errors into one sentence; its binding raises many types."""
    try:
        yield
    except (OnnxCompressError, MemoryError):
        raise
    except Exception as error:
        text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", str(error))
        text = re.sub(r"\S+\.(?:cc|h|cpp):\d+ |^Load model from .*? failed:", "", text)
        reason = " ".join(text.split())[:500].rstrip(". ")
        raise InputError(f"ONNX Runtime {failure}: {reason}; {remedy}") from error
