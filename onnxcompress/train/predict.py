"""What a model gives of samples, of which it takes some at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from onnxcompress.contract import Array
from onnxcompress.data import Port
from onnxcompress.errors import InputError
from onnxcompress.session import Session
from onnxcompress.train.samples import Samples, fixed_batch
from onnxcompress.train.teacher import filled

_ROWS: Final = 256
"""Samples that are run at a time where the model leaves that free."""


def outputs_of(session: Session, ports: Sequence[Port], samples: Samples) -> dict[str, Array]:
    """Outputs by name, the samples on their first axis.

    Raises:
        InputError: if an output does not have them there.
    """
    fixed = fixed_batch(ports)
    found: dict[str, list[Array]] = {name: [] for name in session.outputs}
    for feed in samples.stretches(fixed or _ROWS):
        rows = max(len(array) for array in feed.values() if array.ndim)
        feed = {port.name: feed[port.name] for port in ports}
        for name, array in session.run(filled(feed, fixed) if fixed else feed).items():
            found[name].append(_rows(name, array, rows))
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


def _rows(name: str, array: Array, rows: int) -> Array:
    """The output without what fills the model's batch."""
    if not array.ndim or len(array) < rows:
        raise InputError(f"the output {name!r} is {list(array.shape)} for {rows} samples: they are "
                         "not on its first axis, so run the model in a Session")  # fmt: skip
    return array[:rows]
