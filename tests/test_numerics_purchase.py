"""The order in which noise is bought silent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress.numerics.purchase import purchases

HOLDERS = 6
SOURCES = st.lists(
    st.tuples(
        st.sets(st.integers(0, HOLDERS - 1), min_size=1, max_size=3).map(
            lambda s: tuple(sorted(s))
        ),
        st.floats(0, 10, allow_nan=False),
    ),
    min_size=1,
    max_size=12,
)
PRICES = st.lists(st.floats(0.1, 10), min_size=HOLDERS, max_size=HOLDERS)


def test_the_loudest_for_its_price_comes_first() -> None:
    found = purchases([((0,), 1.0), ((1,), 8.0), ((2,), 4.0)], [1.0, 10.0, 1.0])
    assert [p.holders for p in found] == [(2,), (0,), (1,)]
    assert [p.left for p in found] == [9.0, 8.0, 0.0]


def test_what_two_hold_is_bought_with_both() -> None:
    found = purchases([((0,), 1.0), ((0, 1), 10.0), ((2,), 3.0)], [1.0, 1.0, 1.0])
    assert [p.holders for p in found] == [(0, 1), (2,)]  # and with it what 0 holds alone


def test_a_source_becomes_cheaper_once_one_of_its_holders_is_bought() -> None:
    sources = [((0,), 100.0), ((0, 1), 6.0), ((2,), 5.0)]
    found = purchases(sources, [10.0, 1.0, 1.0])
    assert [p.holders for p in found] == [(0,), (1,), (2,)]


@given(SOURCES, PRICES)
def test_every_holder_is_bought_once_and_nothing_is_left(
    sources: list[tuple[tuple[int, ...], float]], prices: list[float]
) -> None:
    found = purchases(sources, prices)
    bought = [h for p in found for h in p.holders]
    assert sorted(bought) == sorted({h for holders, _ in sources for h in holders})
    left = [p.left for p in found]
    assert left == sorted(left, reverse=True) and left[-1] == 0
    have: set[int] = set()
    for purchase in found:
        have.update(purchase.holders)
        loud = sum(noise for holders, noise in sources if not have.issuperset(holders))
        assert purchase.left == pytest.approx(loud)


@given(st.lists(st.floats(0, 10), min_size=HOLDERS, max_size=HOLDERS), PRICES)
def test_alone_they_are_bought_by_noise_over_price(noise: list[float], prices: list[float]) -> None:
    found = purchases([((i,), n) for i, n in enumerate(noise)], prices)
    ratios = [noise[h] / prices[h] for p in found for h in p.holders]
    assert ratios == sorted(ratios, reverse=True)
