"""Layer-by-layer reconstruction: codes by which blocks give out what the float model does there.

Needs no labels. In the graph's order, so that a block makes good what those before it did wrong:
its inputs are tapped from the quantized model as it then is, what it should give out from the
float model, and each weight's code is chosen between two (`soft_rounding`) by the gradient of the
squared difference. Codes are all that changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array, Result, Skip
from onnxcompress.data import Data
from onnxcompress.errors import InputError
from onnxcompress.graph.quantized_weights import trimmed
from onnxcompress.graph.scopes import values_of
from onnxcompress.numerics.affine import dequantize
from onnxcompress.numerics.fidelity import Fidelity
from onnxcompress.session import Session
from onnxcompress.train.block_samples import TARGET, Samples, take
from onnxcompress.train.blocks import Block, alone, blocks, constants_of
from onnxcompress.train.coded_layers import Layer, coded_layers, counterpart
from onnxcompress.train.fake_quantize import fake_quantize, settle
from onnxcompress.train.losses import MeanSquared
from onnxcompress.train.optimizers import AdamW
from onnxcompress.train.soft_rounding import BETA, STRENGTH, Choice, Decided, soften
from onnxcompress.train.step import Step
from onnxcompress.train.tape import Tape

Progress = Callable[[int, int | None], None]

_HELD: Final = 4
"""One in so many samples is held out, to judge by."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How blocks are reconstructed; the same gives the same codes.

    Attributes:
        steps: updates of a block.
        samples: feeds to read at most, a fourth of which judges.
        layers: the most that are treated together.
        memory: bytes of inputs and outputs that are kept of a block at most.
        batch: samples of a step at most; fewer where they are large.
        lr: of Adam, held for `hold` of the steps and then falling to zero.
        strength: of the term that decides, as a share of the error to begin with.
        begin: share of the steps before anything is decided.
        end: share of the steps after which all that is open is driven alike.
        betas: the exponent, from `begin` to `end`.
        threads: of one operator; 0 leaves the choice to ONNX Runtime.
    """

    steps: int = 400
    samples: int = 128
    layers: int = 4
    memory: int = 1 << 28
    batch: int = 32
    lr: float = 0.05
    hold: float = 0.7
    strength: float = 20.0
    begin: float = 0.2
    end: float = 0.7
    betas: tuple[float, float] = (20.0, 2.0)
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.samples, self.layers, self.batch, self.memory) < 1 or self.lr <= 0:
            raise InputError(
                "reconstruction needs steps, samples, layers, batch and memory of at least 1 and "
                "an lr above 0"
            )

    def rate(self, step: int) -> float:
        """The learning rate."""
        return self.lr * min(1.0, (1 - step / self.steps) / (1 - self.hold))

    def schedule(self, step: int) -> dict[str, Array]:
        """Exponent and strength, as the training graph reads them."""
        done = step / self.steps
        part = min(1.0, max(0.0, (done - self.begin) / (self.end - self.begin)))
        hot, cold = self.betas
        beta = cold + (hot - cold) * (0.5 + 0.5 * np.cos(np.pi * part))
        strength = self.strength if done >= self.begin else 0.0
        return {BETA: np.asarray(beta, np.float32), STRENGTH: np.asarray(strength, np.float32)}


def reconstruct(
    model: ir.Model,
    quantized: ir.Model,
    data: Data,
    *,
    options: Reconstruction | None = None,
    progress: Progress | None = None,
) -> Result:
    """Choose anew the codes of Conv, ConvTranspose, Gemm and MatMul in a quantized model.

    A block whose error on samples held out is not lower keeps its codes, and so do all where the
    model's outputs are no closer. File, structure, types and scales stay; a weight of exactly zero
    stays zero, and codes clear of saturation stay clear of it.

    Args:
        model: what `quantized` was made from, with the same names of values; not altered.
        quantized: static int8, or weights alone in 4 or 8 bits; not altered.
        data: inputs, to be spread over; at least a few.
        progress: called with the layers done and how many there are.

    Returns:
        The new model, what was declined, and as figures the blocks, those that improved, and the
        outputs' error in parts of their power before and after, on feeds held out.

    Raises:
        InputError: if there are no weights to choose codes of, or too few data.

    Sources: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, 2020; Li et
    al., BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction, 2021.
    """
    fake = fake_quantize(quantized)
    work = _Work(model, fake.model.clone(), data, options or Reconstruction())
    layers, skips = coded_layers(work.quantized.graph, fake.weights, work.floats)
    before = work.output_error()
    found = work.run(layers, skips, progress)
    after = work.output_error()
    better = after < before
    figures = {
        "blocks": len(found),
        "blocks improved": sum(found) if better else 0,
        "output error before": before,
        "output error after": min(before, after),
    }
    result = settle(fake, work.quantized) if better else quantized.clone()
    return Result(result, modified=better, skips=(*fake.skips, *skips), figures=figures)


class _Work:
    """The quantized model as it is so far, and what its blocks are held against."""

    def __init__(
        self, model: ir.Model, quantized: ir.Model, data: Data, options: Reconstruction
    ) -> None:
        self.model, self.quantized, self.options = model, quantized, options
        self.floats = {v.name or "": v for v in values_of(model.graph)}
        self._feeds = list(data.spread(options.samples))
        if len(self._feeds) < 2:
            raise InputError("reconstruction needs at least 2 feeds: one of each 4 is held out")
        self._constants = constants_of(quantized.graph)
        self._random = np.random.default_rng(options.seed)

    def output_error(self) -> float:
        """Mean over the outputs of the error in parts of their power, on feeds held out."""
        names = [v.name or "" for v in self.model.graph.outputs]
        sums = {name: Fidelity() for name in names}
        sessions = [Session(m, threads=self.options.threads) for m in (self.model, self.quantized)]
        for feed in self._feeds[::_HELD]:
            wanted, found = (session.run(feed) for session in sessions)
            for name in names:
                if wanted[name].dtype.kind == "f" and wanted[name].shape == found[name].shape:
                    sums[name].update(wanted[name], found[name])
        return float(np.mean([s.noise_to_signal for s in sums.values() if s.count] or [0.0]))

    def run(
        self, layers: Mapping[ir.Node, Layer], skips: list[Skip], progress: Progress | None
    ) -> list[bool]:
        """Whether each block improved; those that cannot be trained whole go layer by layer."""
        improved: list[bool] = []
        waiting = blocks(self.quantized.graph, layers, self.options.layers)[::-1]
        done = 0
        while waiting:
            block = waiting.pop()
            try:
                improved.append(self._reconstruct(block, [layers[n] for n in block.layers]))
            except InputError as reason:
                if len(block.layers) > 1:
                    waiting += map(alone, reversed(block.layers))
                    continue
                skips += [Skip(n.name or "", n.op_type, str(reason)) for n in block.layers]
            done += len(block.layers)
            if progress is not None:
                progress(done, len(layers))
        return improved

    def _reconstruct(self, block: Block, layers: Sequence[Layer]) -> bool:
        target = counterpart(block.output, self.floats)
        if target is None:
            raise InputError("the float model has no value that stands for its output")
        inputs = [v.name or "" for v in block.inputs(self._constants)]
        samples = take(
            self.model,
            self.quantized,
            self._feeds,
            inputs,
            target,
            memory=self.options.memory,
            threads=self.options.threads,
        )
        judges, rest = samples.part(slice(0, None, _HELD)), samples.but(_HELD)
        before = self._error(block, judges)
        begin = self._error(block, rest)
        if not begin:
            return False
        kept = [(layer.floats, layer.floats.const_value) for layer in layers]
        self._write(layers, self._train(block, layers, rest, begin))
        if self._error(block, judges) < before:
            return True
        for value, tensor in kept:
            value.const_value = tensor
        return False

    def _error(self, block: Block, samples: Samples) -> float:
        """Mean squared difference of what the block gives out as it is."""
        return samples.error(Session(self._copy(block, samples), threads=self.options.threads))

    def _copy(self, block: Block, samples: Samples) -> ir.Model:
        """The block as a model, for samples of any number."""
        names = [n for n in samples.shapes if n != TARGET]
        graph = ir.convenience.extract(self.quantized.graph, names, [block.output.name or ""])
        samples.declare(graph)
        return ir.Model(graph, ir_version=self.quantized.ir_version)

    def _train(
        self, block: Block, layers: Sequence[Layer], samples: Samples, begin: float
    ) -> dict[str, Array]:
        """The codes that were found, by the weights' names."""
        options, model = self.options, self._copy(block, samples)
        choices = _soften_all(model.graph, layers)
        step = Step(
            model,
            [
                MeanSquared(block.output.name or "", TARGET, weight=1 / begin),
                Decided(list(choices.values())),
            ],
            AdamW(lr=options.lr, weight_decay=0.0),
            trainable=[choice.v for choice in choices.values()],
            threads=options.threads,
        )
        size = samples.joinable(Session(self._copy(block, samples)), options.batch)
        for number in range(options.steps):
            batch = samples.batch(self._random, size)
            step.run({**batch, **options.schedule(number)}, options.rate(number))
        trained = step.weights()
        return {name: choice.codes(trained[choice.v]) for name, choice in choices.items()}

    def _write(self, layers: Sequence[Layer], codes: Mapping[str, Array]) -> None:
        for layer in layers:
            name = layer.floats.name or ""
            found = codes[name]
            if layer.weight.order is not None:
                found = trimmed(found, layer.weight.order)
            floats = dequantize(found, layer.weight.grid)
            layer.floats.const_value = ir.Tensor(floats, name=name)


def _soften_all(graph: ir.Graph, layers: Sequence[Layer]) -> dict[str, Choice]:
    """Let a copy of a block read weights between two codes; the choices by the weights' names."""
    values = {v.name: v for v in values_of(graph)}
    tape, found = Tape(graph), dict[str, Choice]()
    for layer in layers:
        name = layer.floats.name or ""
        soft, found[name] = soften(tape, name, layer.original(), layer.now(), layer.weight.grid)
        values[layer.restored.name].replace_all_uses_with(soft)
    graph.sort()
    return found
