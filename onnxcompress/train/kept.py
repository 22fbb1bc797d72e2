"""What a saved `Model` keeps beside its graph: JSON in the file's metadata, read with mistrust."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from onnxcompress.errors import InputError
from onnxcompress.train.history import History
from onnxcompress.train.task import Task
from onnxcompress.train.written import Unwritable, read_back, written

KEY: Final = "onnxcompress.model"
"""Its name among the metadata."""
_DAMAGED: Final = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Kept:
    """Settings, history and how outputs are read."""

    settings: Mapping[str, Any]
    """Arguments of `Model` by name; what cannot be written is left out."""
    history: History | None
    task: Task | None

    def within(self, model: ir.Model) -> ir.Model:
        """A copy of the model that holds this; it shares the weights."""
        task = None
        if self.task is not None:
            classes = None if self.task.classes is None else self.task.classes.tolist()
            task = {**asdict(self.task), "classes": classes}
        plain = {
            "settings": self._written(),
            "history": None if self.history is None else asdict(self.history),
            "task": task,
        }
        copy = model.clone()
        copy.metadata_props[KEY] = json.dumps(plain, sort_keys=True)
        return copy

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of settings that are of no kind of ours, such as callables."""
        kept = self._written()
        return tuple(name for name in self.settings if name not in kept)

    def _written(self) -> dict[str, Any]:
        found = dict[str, Any]()
        for name, value in self.settings.items():
            with suppress(Unwritable):
                found[name] = written(value)
        return found


def take_kept(model: ir.Model, where: str, names: Collection[str]) -> Kept | None:
    """What was kept in a model, which is taken out of it; None where there is nothing.

    Of the settings, those of these names.

    Raises:
        InputError: if it cannot be read; `where` opens the sentence.
    """
    text = model.metadata_props.pop(KEY, None)
    if text is None:
        return None
    try:
        plain = json.loads(text)
        settings = {n: read_back(v) for n, v in plain["settings"].items() if n in names}
        history = None if plain["history"] is None else History.of(plain["history"])
        return Kept(settings, history, _task(plain["task"], model))
    except (*_DAMAGED, InputError) as error:
        raise InputError(
            f"{where}: what its metadata {KEY!r} keep cannot be read ({error}): save it again"
        ) from error


def _task(plain: Any, model: ir.Model) -> Task | None:
    if plain is None:
        return None
    fields: dict[str, Any] = dict(plain)
    if fields["classes"] is not None:
        fields["classes"] = np.array(fields["classes"])
    task = Task(**fields)
    if task.output not in (known := [v.name for v in model.graph.outputs]):
        raise ValueError(f"it speaks of the output {task.output!r}, there are {known}")
    return task
