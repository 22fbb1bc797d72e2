"""In which order to buy silence: what takes most noise away for its price comes first.

Every source of noise has holders; it falls silent once all of them are bought. Buying a source's
holders may silence others too, which count. This is greedy set covering with prices, as Chvátal,
A Greedy Heuristic for the Set-Covering Problem, 1979, analyzed it.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Purchase:
    """Holders that are bought together, and the noise that is left after them."""

    holders: tuple[int, ...]
    left: float


def purchases(
    sources: Sequence[tuple[tuple[int, ...], float]], prices: Sequence[float]
) -> list[Purchase]:
    """Buy until every source is silent.

    Args:
        sources: holders and noise (>= 0) of each.
        prices: of each holder, above 0.

    Returns:
        Disjoint purchases; ties fall to the source that comes first. Near-linear in the number
        of sources where each shares holders with few others.
    """
    return _Shop(sources, prices).buy()


class _Shop:
    def __init__(
        self, sources: Sequence[tuple[tuple[int, ...], float]], prices: Sequence[float]
    ) -> None:
        self._holders = [frozenset(holders) for holders, _ in sources]
        self._noise = [noise for _, noise in sources]
        self._prices = prices
        self._of_holder: defaultdict[int, list[int]] = defaultdict(list)
        for i, holders in enumerate(self._holders):
            for holder in sorted(holders):
                self._of_holder[holder].append(i)
        self._bought: set[int] = set()
        self._version = [0] * len(sources)

    def buy(self) -> list[Purchase]:
        bought: list[tuple[tuple[int, ...], list[float]]] = []
        heap = [self._offer(i) for i in range(len(self._holders))]
        heapq.heapify(heap)
        loud = set(range(len(self._holders)))
        while heap:
            _, i, version = heapq.heappop(heap)
            if i not in loud or version != self._version[i]:
                continue
            new = self._holders[i] - self._bought
            self._bought |= new
            touched = self._touching(new)
            silenced = {t for t in touched & loud if self._holders[t] <= self._bought}
            bought.append((tuple(sorted(new)), [self._noise[t] for t in silenced]))
            loud -= silenced
            for t in sorted(self._around(touched) & loud):
                self._version[t] += 1
                heapq.heappush(heap, self._offer(t))
        return _with_what_is_left(bought)

    def _offer(self, i: int) -> tuple[float, int, int]:
        new = self._holders[i] - self._bought
        after = self._bought | new
        silenced = (t for t in self._touching(new) if self._holders[t] <= after)
        gain = math.fsum(self._noise[t] for t in silenced)
        return -gain / math.fsum(self._prices[h] for h in new), i, self._version[i]

    def _touching(self, holders: frozenset[int]) -> set[int]:
        return {t for h in holders for t in self._of_holder[h]}

    def _around(self, sources: set[int]) -> set[int]:
        return {t for s in sources for h in self._holders[s] for t in self._of_holder[h]}


def _with_what_is_left(
    bought: Sequence[tuple[tuple[int, ...], Sequence[float]]],
) -> list[Purchase]:
    """Summed from the end, so that the last leaves nothing."""
    found: list[Purchase] = []
    left = 0.0
    for holders, silenced in reversed(bought):
        found.append(Purchase(holders, left))
        left += math.fsum(silenced)
    return found[::-1]
