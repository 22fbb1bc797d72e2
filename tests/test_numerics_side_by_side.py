"""Work side by side: in order, a few at a time, on one BLAS thread each."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from threadpoolctl import threadpool_info

from onnxcompress.numerics.side_by_side import side_by_side


def threads() -> list[int]:
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


def test_results_come_in_order_whatever_takes_long() -> None:
    def work(item: int) -> int:
        time.sleep(0.01 * (item % 3 == 0))
        return item * item

    assert list(side_by_side(work, range(30))) == [i * i for i in range(30)]


def test_each_has_one_thread_of_blas_and_the_caller_gets_his_back() -> None:
    before = threads()
    assert all(set(found) <= {1} for found in side_by_side(lambda _: threads(), range(4)))
    assert threads() == before


def test_items_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    found = side_by_side(lambda item: item, items())
    assert next(found) == 0
    assert len(taken) < 100
    found.close()


def test_what_fails_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(lambda item: 1 // item, [1, 0, 1]))
