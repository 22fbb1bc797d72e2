"""Optimizers as ONNX operators: how weights and their states follow from gradients.

All that computes is value by value, and what depends on the step alone (learning rate, bias
corrections) comes in as numbers worked out in double precision: one small graph serves weights of
any shape, laid end to end, and its results may be written where they were read from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Protocol

import onnx_ir as ir

from onnxcompress.errors import InputError
from onnxcompress.train.tape import Tape


class Optimizer(Protocol):
    """What a training step asks of an optimizer."""

    @property
    def lr(self) -> float:
        """The learning rate, which a schedule multiplies."""
        ...

    @property
    def states(self) -> Sequence[str]:
        """Names of what is kept of each weight: float32 tensors of its shape, zero at first."""
        ...

    def coefficients(self, lr: float, step: int, decay: bool) -> dict[str, float]:
        """The numbers of one step (counted from 1), the same names each time.

        `decay` tells whether weight decay applies, which it does not to biases and to the scales
        of normalizations.
        """
        ...

    def emit(
        self,
        tape: Tape,
        weight: ir.Value,
        gradient: ir.Value,
        states: Mapping[str, ir.Value],
        coefficients: Mapping[str, ir.Value],
    ) -> tuple[ir.Value, dict[str, ir.Value]]:
        """The new weight and the new states."""
        ...


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum.

        v <- momentum v + g + weight_decay w
        w <- w - lr v                                     or, with nesterov,
        w <- w - lr (g + weight_decay w + momentum v)

    Attributes:
        lr: learning rate, above 0.
        momentum: from 0 to below 1; with 0 nothing is kept of a weight.

    Source: Sutskever et al., On the importance of initialization and momentum in deep learning
    (2013), in the form in which the learning rate stands outside of v.
    """

    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self.lr > 0, "SGD: lr", self.lr, "above 0")
        _check(0 <= self.momentum < 1, "SGD: momentum", self.momentum, "from 0 to below 1")
        _check(self.weight_decay >= 0, "SGD: weight_decay", self.weight_decay, "0 or more")
        if self.nesterov and not self.momentum:
            raise InputError("SGD: nesterov needs a momentum above 0")

    @property
    def states(self) -> Sequence[str]:
        return ("momentum",) if self.momentum else ()

    def coefficients(self, lr: float, step: int, decay: bool) -> dict[str, float]:
        return {"rate": lr, **({"decay": self.weight_decay * decay} if self.weight_decay else {})}

    def emit(
        self,
        tape: Tape,
        weight: ir.Value,
        gradient: ir.Value,
        states: Mapping[str, ir.Value],
        coefficients: Mapping[str, ir.Value],
    ) -> tuple[ir.Value, dict[str, ir.Value]]:
        new: dict[str, ir.Value] = {}
        if self.weight_decay:
            gradient = tape.op("Add", [gradient, tape.op("Mul", [weight, coefficients["decay"]])])
        direction = gradient
        if self.momentum:
            momentum = tape.scalar(self.momentum, weight)
            held = tape.op("Mul", [states["momentum"], momentum])
            direction = new["momentum"] = tape.op("Add", [held, gradient])
            if self.nesterov:
                direction = tape.op("Add", [gradient, tape.op("Mul", [direction, momentum])])
        return tape.op("Sub", [weight, tape.op("Mul", [direction, coefficients["rate"]])]), new


@dataclass(frozen=True)
class AdamW:
    """Adam with weight decay that does not pass through its moments.

        m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g²
        w <- w - lr weight_decay w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Attributes:
        lr: learning rate, above 0.
        betas: b1 and b2, from 0 to below 1.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019), with the decay
    multiplied by the learning rate as most frameworks have it.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        _check(self.lr > 0, "AdamW: lr", self.lr, "above 0")
        _check(all(0 <= b < 1 for b in self.betas), "AdamW: betas", self.betas, "from 0 to below 1")
        _check(self.eps > 0, "AdamW: eps", self.eps, "above 0")
        _check(self.weight_decay >= 0, "AdamW: weight_decay", self.weight_decay, "0 or more")

    @property
    def states(self) -> Sequence[str]:
        return ("mean", "variance")

    def coefficients(self, lr: float, step: int, decay: bool) -> dict[str, float]:
        first, second = (1 - beta**step for beta in self.betas)
        keep = 1 - lr * self.weight_decay * decay
        return {"keep": keep, "rate": lr * sqrt(second) / first, "eps": self.eps * sqrt(second)}

    def emit(
        self,
        tape: Tape,
        weight: ir.Value,
        gradient: ir.Value,
        states: Mapping[str, ir.Value],
        coefficients: Mapping[str, ir.Value],
    ) -> tuple[ir.Value, dict[str, ir.Value]]:
        square = tape.op("Mul", [gradient, gradient])
        mean = _average(tape, states["mean"], gradient, self.betas[0])
        variance = _average(tape, states["variance"], square, self.betas[1])
        bounded = tape.op("Add", [tape.op("Sqrt", [variance]), coefficients["eps"]])
        step = tape.op("Div", [tape.op("Mul", [mean, coefficients["rate"]]), bounded])
        kept = tape.op("Mul", [weight, coefficients["keep"]])
        return tape.op("Sub", [kept, step]), {"mean": mean, "variance": variance}


def _average(tape: Tape, old: ir.Value, new: ir.Value, beta: float) -> ir.Value:
    """beta old + (1 - beta) new."""
    held = tape.op("Mul", [old, tape.scalar(beta, old)])
    return tape.op("Add", [held, tape.op("Mul", [new, tape.scalar(1 - beta, old)])])


def _check(holds: bool, what: str, found: object, wanted: str) -> None:
    if not holds:
        raise InputError(f"{what} is {found} but must be {wanted}")
