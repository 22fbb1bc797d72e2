"""What is in a model, what of it would run on integers, and what would not and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnxcompress import schemes, targets
from onnxcompress.data.ports import Port, interface
from onnxcompress.model_io import load, size_on_disk
from onnxcompress.outlook import Outlook, Runs, integer_share, outlook, qualified_type
from onnxcompress.pipeline import run


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A model at a glance; counts of nodes include those inside bodies and functions."""

    name: str
    size: int
    """Bytes on disk, external data included."""
    ir_version: int
    opsets: Mapping[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    parameters: int
    """Elements of all initializers."""
    dtypes: Mapping[str, int]
    """Bytes of initializers by dtype."""
    operators: Mapping[str, int]
    folded: int
    """Nodes that the exact rewrites remove."""
    target: str
    integer: Mapping[str, int]
    """Nodes by operator that would run on integers on the target."""
    integer_share: float | None
    """Their part of the multiplications; None where the graph does not state all shapes."""
    nodes: tuple[Outlook, ...]
    """What would become of each node that the exact rewrites leave."""


def inspect(path: str | Path, *, target: str = "cpu") -> Inspection:
    """Look at the model at `path` without writing anything.

    Raises:
        InputError: if it cannot be loaded or the target is unknown.
    """
    model = load(path)
    runtime = targets.load(target)
    prepared = run(model, schemes.before_static(target)).model
    folded = _nodes(model) - _nodes(prepared)
    nodes = outlook(prepared, runtime)
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value]
    dtypes: Counter[str] = Counter()
    for tensor in tensors:
        dtypes[tensor.dtype.name.lower()] += tensor.nbytes
    return Inspection(
        name=Path(path).name,
        size=size_on_disk(path),
        ir_version=model.ir_version,
        opsets=dict(model.graph.opset_imports),
        inputs=interface(model),
        outputs=tuple(_describe(v) for v in model.graph.outputs),
        parameters=sum(t.size for t in tensors),
        dtypes=dict(dtypes.most_common()),
        operators=_count(model.graph.all_nodes()),
        folded=folded,
        target=target,
        integer=dict(Counter(n.op for n in nodes if n.runs is not Runs.FLOAT).most_common()),
        integer_share=integer_share(nodes),
        nodes=tuple(nodes),
    )


def _count(nodes: Iterable[ir.Node]) -> dict[str, int]:
    return dict(Counter(map(qualified_type, nodes)).most_common())


def _nodes(model: ir.Model) -> int:
    return sum(1 for _ in model.graph.all_nodes())


def _describe(value: ir.Value) -> str:
    return f"{value.name}: {value.type}{value.shape if value.shape is not None else ''}"
