"""Large models: time over the number of nodes, memory over the bytes of weights.

python -m tests.benchmarks.scale nodes 1000 3000 10000 30000
python -m tests.benchmarks.scale weights 3072
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper

from onnxcompress import model_io
from onnxcompress.model_io import writing
from tests.benchmarks.graphs import generate

MIB = 1 << 20


def weights_of(folder: Path, mebibytes: int, each: int = 16) -> Path:
    """A chain of MatMuls whose weights of `each` MiB lie in a sparse data file."""
    side = int((each * MIB / 4) ** 0.5)
    made, weights, value = [], [], "x"
    for index in range(mebibytes // each):
        weight = TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[side, side])
        weight.data_location = TensorProto.EXTERNAL
        for key, entry in (("location", "model.bin"), ("offset", str(index * each * MIB))):
            weight.external_data.add(key=key, value=entry)
        weights.append(weight)
        made.append(helper.make_node("MatMul", [value, weight.name], [f"y{index}"]))
        value = f"y{index}"
    ports = [helper.make_tensor_value_info(p, TensorProto.FLOAT, ["n", side]) for p in ("x", value)]
    graph = helper.make_graph(made, "g", ports[:1], ports[1:], weights)
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    with (folder / "model.bin").open("wb") as file:
        file.truncate(mebibytes * MIB)
        for index in range(mebibytes // each):  # a mark, so that weights differ
            file.seek(index * each * MIB)
            file.write(np.float32(index + 1).tobytes())
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def double_weights(model: ir.Model) -> ir.Model:
    """Change every weight, on demand."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.LazyTensor(
            lambda tensor=tensor: ir.tensor(tensor.numpy() * 2),
            dtype=tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name,
        )
    return model


def read_weights(model: ir.Model) -> ir.Model:
    """Look at every weight, as a pass does that chooses by magnitude."""
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        float(np.abs(value.const_value.numpy()).max())
    return model


WORK: dict[str, Callable[[ir.Model], ir.Model]] = {
    "copy": lambda model: model,
    "read": read_weights,
    "double": double_weights,
}


def extra_memory(
    source: Path, target: Path, work: str, inline_limit: int = writing.INLINE_LIMIT
) -> tuple[float, float]:
    """(MiB, seconds) of load, work and save in a process of its own, above its imports.

    The peak is of the resident set, which counts mapped pages of files too.
    """
    program = [sys.executable, "-m", "tests.benchmarks.scale", "one"]
    arguments = [str(source), str(target), work, str(inline_limit)]
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, check=True)
    memory, seconds = done.stdout.split()
    return float(memory), float(seconds)


def _one(source: str, target: str, work: str, inline_limit: str) -> None:
    writing.INLINE_LIMIT = int(inline_limit)
    before, start = _peak(), time.perf_counter()
    model_io.save(WORK[work](model_io.load(source)), target)
    print(_peak() - before, time.perf_counter() - start)


def _peak() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)


def nodes_table(sizes: list[int]) -> Iterator[str]:
    yield "| nodes | load s | save s |\n| ---: | ---: | ---: |"
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            path = Path(folder) / "model.onnx"
            model_io.save(generate(size), path)
            start = time.perf_counter()
            model = model_io.load(path)
            loaded = time.perf_counter()
            model_io.save(model, path)
            yield f"| {size} | {loaded - start:.2f} | {time.perf_counter() - loaded:.2f} |"


def weights_table(mebibytes: int) -> Iterator[str]:
    yield f"| {mebibytes} MiB of weights | extra peak MiB | s |\n| --- | ---: | ---: |"
    for work in WORK:
        with tempfile.TemporaryDirectory() as folder:
            source = weights_of(Path(folder), mebibytes)
            memory, seconds = extra_memory(source, Path(folder) / "out.onnx", work)
            yield f"| load, {work}, save | {memory:.0f} | {seconds:.1f} |"


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    if kind == "one":
        _one(*arguments)
    else:
        sizes = [int(argument) for argument in arguments]
        for line in nodes_table(sizes) if kind == "nodes" else weights_table(*sizes):
            print(line, flush=True)
