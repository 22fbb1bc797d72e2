"""Values that a target wants on one scale: what its tied kernels read and give out."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxcompress.graph.placement import Placement, kernel_outputs
from onnxcompress.numerics.affine import Affine, affine
from onnxcompress.operators import data_inputs
from onnxcompress.targets import Target


def tie(plan: Placement, target: Target, parameters: dict[ir.Value, Affine]) -> None:
    """Give values that are tied to each other one scale and zero_point, in place.

    It covers the ranges of all that tied kernels do not make themselves: what they make is what
    they read, moved. A value whose scale the target fixes keeps it.
    """
    made = {v for node in _tied(plan, target) for v in kernel_outputs(node, target)}
    for group in _groups(plan, target):
        sources = [parameters[v] for v in group if v not in made]
        shared = sources[0] if len(set(map(_range, sources))) == 1 else _cover(sources, target)
        parameters.update((v, shared) for v in group if not _is_fixed(v, target))


def _groups(plan: Placement, target: Target) -> list[list[ir.Value]]:
    """The values with a pair that tied kernels connect, in graph order."""
    member: dict[ir.Value, list[ir.Value]] = {}
    for node in _tied(plan, target):
        values = [plan.root(v) for v in data_inputs(node)] + kernel_outputs(node, target)
        found = [member.get(v, [v]) for v in dict.fromkeys(values) if v in plan.roots]
        group = list(dict.fromkeys(v for part in found for v in part))
        member.update(dict.fromkeys(group, group))
    distinct = {id(group): group for group in member.values()}
    return list(distinct.values())


def _tied(plan: Placement, target: Target) -> Iterator[ir.Node]:
    return (node for node in plan.kernels if target.kernels[node.op_type].tied)


def _is_fixed(value: ir.Value, target: Target) -> bool:
    producer = value.producer()
    kernel = None if producer is None else target.kernels.get(producer.op_type)
    return kernel is not None and kernel.fixed is not None


def _cover(sources: list[Affine], target: Target) -> Affine:
    lows, highs = zip(*map(_range, sources), strict=True)
    scheme = target.activations
    return affine(min(lows), max(highs), scheme.dtype, symmetric=scheme.symmetric)


def _range(parameters: Affine) -> tuple[float, float]:
    low, high = parameters.range
    zero, scale = int(parameters.zero_point), float(parameters.scale)
    return (low - zero) * scale, (high - zero) * scale
