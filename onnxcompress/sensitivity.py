"""How much each source of quantization noise adds to the outputs of a quantized model.

A source is the rounded weight of one kernel, or one pair, whose rounding all its readers share.
Each is measured by itself: with everything else given back to float, what is left at the outputs
is its doing, after all that later layers do to it. Noise of different sources is nearly
uncorrelated, so powers add up: what a set of sources costs is the sum over it. The error found at
a layer itself, as SQNR layer by layer tells it, has neither property: it holds the noise of all
layers before, and says nothing of what becomes of it behind.

Source: one layer at a time on a few samples, Nagel et al., A White Paper on Neural Network
Quantization, 2021, section 3.6, and AIMET's automatic mixed precision; that powers add, Lin et
al., Fixed Point Quantization of Deep Convolutional Networks, 2016.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.graph.pairs import FloatWeights, Integers, drop, has_floats, is_restorable
from onnxcompress.numerics.decisions import is_float
from onnxcompress.numerics.fidelity import Fidelity
from onnxcompress.observe import Progress
from onnxcompress.session import Feed, Session
from onnxcompress.targets import Target

_MOST: Final = 256
"""Runs over the feeds, unless told otherwise."""

Kind = Literal["weights", "values"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Something that is rounded, and the noise that it leaves at the outputs."""

    kind: Kind
    name: str
    """The kernel, or the value that the pair rounds."""
    holders: tuple[int, ...]
    """The kernels that must run on floats for it to fall silent, by their place in the graph."""
    noise: float
    """Noise power at the outputs over their signal power, summed over the outputs."""


@dataclass(frozen=True, slots=True)
class _Site:
    kind: Kind
    name: str
    holders: tuple[int, ...]
    place: int


def measure_sources(
    model: ir.Model,
    target: Target,
    feeds: Sequence[Feed],
    *,
    progress: Progress,
    runs: int | None = None,
) -> list[Source]:
    """Measure every source of `model` that can be given back to float.

    Of more sources than runs, neighbours are measured together with half of the runs, and the
    loudest of them taken apart with the other half, as group testing does: that finds the few that
    make nearly all of the noise, and where no few do, it does not matter which.

    Args:
        model: what `insert_qdq` made, still in memory; not altered.
        target: the runtime that it was made for.
        feeds: a few of the calibration data; each is run once a source.
        progress: told the runs done and how many there are.
        runs: over the feeds, at most.

    Raises:
        InputError: if the model does not run on the feeds.
    """
    sites = _sites(Integers.of(model.graph, target))
    runs = min(runs or _MOST, len(sites))
    size = 1 if runs == len(sites) else math.ceil(2 * len(sites) / runs)
    blocks = [sites[start : start + size] for start in range(0, len(sites), size)]
    expected = _run(_only(model, target, ()), feeds)
    done = 0

    def noise(block: Sequence[_Site]) -> float:
        nonlocal done
        progress(done, runs)
        done += 1
        return _noise(expected, _run(_only(model, target, block), feeds))

    found = [(noise(block), block) for block in blocks]
    while done < runs:
        loudest = max(range(len(found)), key=lambda i: (len(found[i][1]) > 1) * found[i][0])
        both, block = found[loudest]
        if len(block) == 1:
            break
        half = len(block) // 2
        first = noise(block[:half])
        found[loudest : loudest + 1] = [
            (first, block[:half]),
            (max(both - first, 0.0), block[half:]),
        ]
    return [_source(site, power / len(block)) for power, block in found for site in block]


def _source(site: _Site, noise: float) -> Source:
    return Source(kind=site.kind, name=site.name, holders=site.holders, noise=noise)


def kernel_name(node: ir.Node) -> str:
    """What a kernel is called in reports and patterns: its name, or its first output's."""
    return node.name or node.outputs[0].name or ""


def _sites(integers: Integers) -> list[_Site]:
    place = {node: i for i, node in enumerate(integers.kernels)}
    fixed = {place[node] for node in integers.kernels if not is_restorable(node)}
    weights = (
        _Site("weights", kernel_name(node), (i,), i)
        for node, i in place.items()
        if has_floats(node)
    )
    values = (
        _Site("values", pair.name, tuple(sorted(place[node] for node in pair.holders)), i)
        for i, pair in enumerate(integers.pairs)
        if pair.holders
    )
    found = (site for group in (weights, values) for site in group)
    return [site for site in found if fixed.isdisjoint(site.holders)]


def _only(model: ir.Model, target: Target, kept: Iterable[_Site]) -> ir.Model:
    """A copy in which, of all that could be given back to float, only `kept` is rounded."""
    model = model.clone()
    integers = Integers.of(model.graph, target)
    silent = {(site.kind, site.place) for site in _sites(integers)}
    silent -= {(site.kind, site.place) for site in kept}
    weights = FloatWeights(model.graph)
    for kind, place in sorted(silent):
        if kind == "weights":
            weights.restore(integers.kernels[place])
        else:
            drop(integers.pairs[place])
    return model


def _run(model: ir.Model, feeds: Sequence[Feed]) -> list[Mapping[str, Array]]:
    # As the graph is written: ONNX Runtime must not fuse what stands alone here.
    session = Session(model, optimization="none", prepack=False, spinning=False)
    return [session.run(feed) for feed in feeds]


def _noise(expected: Sequence[Mapping[str, Array]], found: Sequence[Mapping[str, Array]]) -> float:
    errors: dict[str, Fidelity] = {}
    for exact, rounded in zip(expected, found, strict=True):
        for name, array in exact.items():
            other = rounded[name]
            if is_float(array) and array.shape == other.shape:
                errors.setdefault(name, Fidelity()).update(array, other)
    return sum(error.noise_to_signal for error in errors.values())
