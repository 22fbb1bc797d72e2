"""Which scheme each region of a graph takes, by what ONNX Runtime takes for it on this machine.

A region is a contraction and what follows it up to the next ones. Matrix products with few rows
and large weights wait for memory: their weights in 4 bits arrive sooner than in 8. All others
compute, and 8-bit integers are faster at that.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from glob import escape
from typing import Final

import onnx_ir as ir

from onnxcompress import schemes
from onnxcompress.operators import Role, constant_tensor, operator
from onnxcompress.passes.quantize_weights import QuantizeWeights
from onnxcompress.pipeline import run
from onnxcompress.session import Feed, profile

_LARGE: Final = 1 << 22
"""Weights from which on a product waits for memory: more bytes than the nearer caches hold."""
_WORTH: Final = 0.9
"""Share of a region's time from which on another scheme is taken: less is noise."""


def memory_bound(
    model: ir.Model, candidate: ir.Model, feed: Feed, *, target: str = "cpu", threads: int = 1
) -> tuple[str, ...]:
    """Patterns of the matrix products that run faster with weights in 4 bits than in `candidate`.

    Args:
        model: the float model.
        candidate: what the static or dynamic scheme made of it.
        feed: one run's inputs.
        threads: threads of one operator.

    Raises:
        InputError: if ONNX Runtime refuses a model or the feed.
    """
    if not any(_size(v) >= _LARGE for v in model.graph.initializers.values()):
        return ()
    prepared = run(model, schemes.before_static(target)).model
    products = _large_products(prepared)
    if not products:
        return ()
    regions = region_of(prepared)
    patterns = tuple(escape(name) for name in products)
    packed = run(prepared, (QuantizeWeights(target=target, include=patterns),)).model
    before, after = (
        region_seconds(*profile(m, feed, threads=threads), regions) for m in (candidate, packed)
    )
    return tuple(
        escape(name)
        for name, region in products.items()
        if region in before and region in after and after[region] < _WORTH * before[region]
    )


def region_of(model: ir.Model) -> dict[str, str]:
    """The region of each value of the main graph, by name: the output of its contraction."""
    regions: dict[ir.Value, str] = {}
    for node in model.graph:
        known = [regions[v] for v in node.inputs if v is not None and v in regions]
        if _contracts(node):
            known = [node.outputs[0].name or ""]
        if known:
            regions.update((value, known[-1]) for value in node.outputs)
    return {value.name: region for value, region in regions.items() if value.name}


def region_seconds(
    optimized: ir.Model, seconds: Mapping[str, float], regions: Mapping[str, str]
) -> dict[str, float]:
    """The time of each region, from that of each node of what ONNX Runtime made of a model.

    A value in integers has its float's name and `_quantized` behind it. A node that makes a value
    of any other name counts for the first of those that read it.
    """
    owners: dict[ir.Node, str | None] = {}
    total: dict[str, float] = defaultdict(float)
    for node in reversed(optimized.graph):
        names = (v.name.removesuffix("_quantized") for v in node.outputs if v.name)
        named = (regions[name] for name in names if name in regions)
        read = (owners.get(use.node) for v in node.outputs for use in v.uses())
        owner = next(named, None) or next((region for region in read if region), None)
        owners[node] = owner
        if owner is not None:
            total[owner] += seconds.get(node.name or "", 0.0)
    return total


def _large_products(model: ir.Model) -> dict[str, str]:
    """Region by name of each product with a large constant weight whose name is its own."""
    names = Counter(node.name for node in model.graph)
    return {
        node.name: node.outputs[0].name or ""
        for node in model.graph
        if node.op_type in ("MatMul", "Gemm") and _contracts(node)
        if node.name and names[node.name] == 1
        if (weight := constant_tensor(node.inputs[1])) is not None and weight.size >= _LARGE
    }


def _size(initializer: ir.Value) -> int:
    return 0 if initializer.const_value is None else initializer.const_value.size


def _contracts(node: ir.Node) -> bool:
    return operator(node).role is Role.CONTRACT
