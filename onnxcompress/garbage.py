"""Keeps Python's garbage collector from looking through large graphs again and again."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

_RARELY: Final = (500_000, 100, 10)


@contextmanager
def rarely_collected() -> Generator[None]:
    """Look for garbage after 500,000 new objects, not 700, and at older ones hardly ever.

    A graph of 30,000 nodes is a million objects, nearly all of which stay; at Python's own pace
    a third of the time that it takes to load and rewrite one goes to looking for others.
    """
    before = gc.get_threshold()
    gc.set_threshold(*_RARELY)
    try:
        yield
    finally:
        gc.set_threshold(*before)
