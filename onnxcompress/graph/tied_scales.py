"""Values that a target wants on one scale: what its tied kernels read and give out."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from onnxcompress.graph.placement import Placement, kernel_outputs
from onnxcompress.numerics.affine import Affine, affine
from onnxcompress.operators import data_inputs
from onnxcompress.targets import Target

_FARTHEST: Final = 4.0
"""How much coarser than its own a scale may be: two of its bits are lost then."""


def tie(plan: Placement, target: Target, parameters: dict[ir.Value, Affine]) -> None:
    """Give values that are tied to each other one scale and zero_point, in place.

    An operator that moves one value gives out the scale that it takes. One that joins several has
    them covered by one scale, unless that is more than `_FARTHEST` times the finest: it then costs
    a rescaling where it would cost accuracy. A value whose scale the target fixes keeps it.
    """
    member: dict[ir.Value, list[ir.Value]] = {}
    tied = [node for node in plan.kernels if target.kernels[node.op_type].tied]
    for node in sorted(tied, key=lambda node: len(data_inputs(node)) > 1):
        roots = (plan.root(value) for value in data_inputs(node))
        read = [value for value in dict.fromkeys(roots) if value in plan.roots]
        shared = _cover([parameters[value] for value in read], target)
        if shared is None:
            continue
        values = (*read, *(v for v in kernel_outputs(node, target) if v in plan.roots))
        group = list(dict.fromkeys(v for value in values for v in member.get(value, [value])))
        member.update(dict.fromkeys(group, group))
        parameters.update((v, shared) for v in group if fixed_range(v, target) is None)


def fixed_range(value: ir.Value, target: Target) -> tuple[float, float] | None:
    """The range that the target prescribes for what makes `value`; None where it is free."""
    producer = value.producer()
    kernel = None if producer is None else target.kernels.get(producer.op_type)
    return None if kernel is None else kernel.fixed


def _cover(sources: list[Affine], target: Target) -> Affine | None:
    """Parameters for all of `sources`; None where there are none, or they are too far apart."""
    ranges = {_range(source) for source in sources}
    if len(ranges) <= 1:
        return sources[0] if sources else None
    lows, highs = zip(*ranges, strict=True)
    scheme = target.activations
    shared = affine(min(lows), max(highs), scheme.dtype, symmetric=scheme.symmetric)
    finest = min(float(source.scale) for source in sources)
    return shared if float(shared.scale) <= _FARTHEST * finest else None


def _range(parameters: Affine) -> tuple[float, float]:
    low, high = parameters.range
    zero, scale = int(parameters.zero_point), float(parameters.scale)
    return (low - zero) * scale, (high - zero) * scale
