"""What goes into a block of a quantized model, and what the float model gives out there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.errors import InputError
from onnxcompress.session import Session

Sample = Mapping[str, Array]
TARGET: Final = "onnxcompress.target"
"""The name, in a sample, of what the block should give out."""

_LEAST: Final = 8
"""Samples that are kept however large they are."""
_ELEMENTS: Final = 1 << 19
"""Of the largest array of a batch: a map with many places needs fewer samples a step."""


@dataclass(frozen=True)
class Samples:
    """Arrays by name, of one feed each."""

    kept: Sequence[Sample]

    @property
    def shapes(self) -> Mapping[str, ir.Shape]:
        """The shape that holds for all, by name; sizes that differ and the first have names."""
        return {n: _shape(n, [s[n].shape for s in self.kept]) for n in self.kept[0]}

    def part(self, index: slice) -> Samples:
        """Some of them."""
        return Samples(self.kept[index])

    def but(self, every: int) -> Samples:
        """Those that are not each `every`-th."""
        return Samples([s for i, s in enumerate(self.kept) if i % every])

    def declare(self, graph: ir.Graph) -> None:
        """State the types and shapes of the graph's inputs and its one output."""
        shapes, first = self.shapes, self.kept[0]
        for value, name in (*((v, v.name or "") for v in graph.inputs), (graph.outputs[0], TARGET)):
            value.type = ir.TensorType(ir.DataType.from_numpy(first[name].dtype))
            value.shape = shapes[name]

    def error(self, session: Session) -> float:
        """Mean squared difference between what the session gives and what it should.

        Raises:
            InputError: if they differ in shape.
        """
        noise = count = 0
        for sample in self.kept:
            (found,) = session.run({n: sample[n] for n in session.inputs}).values()
            if found.shape != sample[TARGET].shape:
                raise InputError("the float model's value has another shape")
            noise += float(np.square(found - sample[TARGET], dtype=np.float64).sum())
            count += found.size
        return noise / max(count, 1)

    def joinable(self, session: Session, most: int) -> int:
        """How many samples go into a batch: 1 where joined ones do not give what each gives."""
        largest = max(array.size for array in self.kept[0].values())
        size = max(1, min(most, _ELEMENTS // max(largest, 1)))
        pair = self.alike(self.kept[0])[:2]
        if size == 1 or len(pair) < 2:
            return 1
        try:
            (joined,) = session.run(_joined(pair, session.inputs)).values()
            apart = [next(iter(session.run(_joined([s], session.inputs)).values())) for s in pair]
        except (InputError, ValueError):
            return 1
        wanted = np.concatenate(apart)
        same = joined.shape == wanted.shape and np.allclose(joined, wanted, rtol=1e-3, atol=1e-4)
        return size if same else 1

    def alike(self, sample: Sample) -> list[Sample]:
        """Those of the same shapes as `sample`."""
        return [s for s in self.kept if all(s[n].shape == a.shape for n, a in sample.items())]

    def batch(self, random: np.random.Generator, size: int) -> Sample:
        """Up to `size` samples of one shape, drawn without regard to what came before."""
        first = self.kept[int(random.integers(len(self.kept)))]
        group = self.alike(first)
        drawn: list[int] = random.permutation(len(group))[:size].tolist()
        return _joined([group[i] for i in drawn], list(first))


def take(
    model: ir.Model,
    quantized: ir.Model,
    feeds: Sequence[Sample],
    inputs: Sequence[str],
    target: str,
    *,
    memory: int,
    threads: int,
) -> Samples:
    """Run both models on the feeds until `memory` bytes are filled.

    Raises:
        InputError: if either has no such value, or the target is not float32.
    """
    taken = Session(quantized, outputs=inputs, threads=threads, frugal=True)
    given = Session(model, outputs=[target], threads=threads, frugal=True)
    found: list[Sample] = []
    for feed in feeds:
        sample = {name: np.array(array) for name, array in taken.run(feed).items()}
        sample[TARGET] = np.array(given.run(feed)[target])
        if sample[TARGET].dtype != np.float32 or not sample[TARGET].ndim:
            raise InputError("what the float model gives there is no array of float32")
        memory -= sum(array.nbytes for array in sample.values())
        if memory < 0 and len(found) >= _LEAST:
            break
        found.append(sample)
    return Samples(found)


def _joined(samples: Sequence[Sample], names: Sequence[str]) -> Sample:
    return {n: samples[0][n] if len(samples) == 1 or not samples[0][n].ndim
            else np.concatenate([s[n] for s in samples]) for n in names}  # fmt: skip


def _shape(name: str, shapes: Sequence[tuple[int, ...]]) -> ir.Shape:
    each = [set(sizes) for sizes in zip(*shapes, strict=True)]
    return ir.Shape(
        [f"{name}_{axis}" if not axis or len(sizes) > 1 else min(sizes)
         for axis, sizes in enumerate(each)]
    )  # fmt: skip
