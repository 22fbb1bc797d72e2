"""What is chosen of the variants that pass: the cheapest, or one that is far more faithful.

Cost is latency times size. Int8 whose outputs somebody could tell from the float model's is given
up for ten decibels, an error a tenth as strong, where they cost at most 0.3 more. Both are
measured on the model at hand: rounding that all layers share costs what integers gain and stays,
damage that a few layers do goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from onnxcompress.validation import OutputFigures, Validation
from onnxcompress.variants import ALIKE, Variant

GAIN: Final = 10.0
"""dB of SQNR that are worth `PRICE`."""
PRICE: Final = 0.3
"""Share of a variant's cost that may be paid for it."""
_CLEAR: Final = 30.0
"""dB: an error of 3 %, below which values are told apart."""
_DECIDED: Final = 0.9
"""Share of equal decisions: where classes are ranked, order counts, and values do not."""


def choose(passing: Sequence[Variant], *, faithful: bool) -> Variant:
    """The variant to write.

    Args:
        passing: those that meet all gates, one at least.
        faithful: whether fidelity beyond the gates counts; a person who gave gates has said
            what is enough.
    """
    best = _cheapest(passing)
    if faithful and differs(best.report.validation):
        better = [v for v in passing if _is_worth(v, best)]
        return _cheapest(better or [best])
    return best


def differs(validation: Validation | None) -> bool:
    """Whether somebody could tell the candidate's outputs from the original's."""
    return any(map(_differs, validation.outputs if validation else ()))


def affordable(latency: float) -> float:
    """The share of the arithmetic that may go back to float for `PRICE`.

    Args:
        latency: of the variant that is all integers, over the original's: its difference to 1 is
            taken to be spread over the arithmetic.
    """
    whole = 1 / latency - 1
    return 1.0 if whole <= PRICE else PRICE / whole


def _cheapest(variants: Sequence[Variant]) -> Variant:
    """Of those that cost the least, or hardly more, the most faithful."""
    least = min(v.cost for v in variants)
    return max((v for v in variants if v.cost <= least * ALIKE), key=lambda v: v.sqnr)


def _is_worth(variant: Variant, best: Variant) -> bool:
    return variant.sqnr >= best.sqnr + GAIN and _price(variant, best) <= PRICE


def _price(variant: Variant, best: Variant) -> float:
    """What `variant` costs more, at the least that their timing allows to say."""
    a, b = (v.report.measured.latency for v in (variant, best))
    latency = a.low / b.high if a and b else 1.0
    return latency * variant.size / best.size - 1


def _differs(output: OutputFigures) -> bool:
    if output.ranked and output.agreement is not None:
        return output.agreement < _DECIDED
    return output.sqnr is not None and output.sqnr < _CLEAR
