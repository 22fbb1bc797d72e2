"""Layers worked on side by side, one core each.

BLAS threads of their own would split every product of a layer, the many small ones too: on a
busy machine they wait for each other longer than they compute. One thread a layer also gives the
same bytes on any number of cores.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from threadpoolctl import threadpool_limits  # pyright: ignore[reportMissingTypeStubs]

_MOST: Final = 8
"""Layers at a time at most, for each holds matrices."""
_Item = TypeVar("_Item")
_T = TypeVar("_T")


def side_by_side(work: Callable[[_Item], _T], items: Iterable[_Item]) -> Generator[_T]:
    """`work` of each item, in the items' order; at most twice as many as cores are held."""
    workers = min(os.cpu_count() or 1, _MOST)
    waiting: deque[Future[_T]] = deque()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        for item in items:
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
            waiting.append(pool.submit(work, item))
        while waiting:
            yield waiting.popleft().result()
