"""Settings as what JSON can hold, and back: data classes of this package by name, never code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import numpy as np

from onnxcompress.recipe import Recipe
from onnxcompress.train import augment, clean, denoise, losses, optimizers, schedules
from onnxcompress.train.augment.table import KINDS as STEPS

_KINDS: Final[Mapping[str, type[Any]]] = {
    kind.__name__: kind
    for kind in (
        *(losses.CrossEntropy, losses.MeanSquared, losses.KullbackLeibler, losses.FeatureMatch),
        *(losses.Cosine, optimizers.SGD, optimizers.AdamW),
        *(schedules.warm_up, schedules.stepped, schedules.one_cycle),
        *(*STEPS, augment.Compose),
        *(clean.Cleaner, clean.RobustDistance, clean.Detector),
        *(denoise.MedianFilter, denoise.SavitzkyGolay),
    )
}
_FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    function.__name__: function
    for function in (schedules.constant, schedules.linear, schedules.cosine)
}
_TABLE, _RECIPE = "table", "recipe"


class Unwritable(Exception):
    """It is not of the kinds that have names here, such as a callable of somebody's own."""


def written(value: Any) -> Any:
    """A number, word or None as it is, a sequence as a list, all else as {name: its contents}.

    Raises:
        Unwritable: if it, or something within it, is of another kind.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return written(cast("Any", value).tolist())
    if isinstance(value, tuple | list):
        return [written(item) for item in cast("Sequence[Any]", value)]
    if isinstance(value, Mapping):
        table = cast("Mapping[Any, Any]", value)
        return {_TABLE: {str(name): written(item) for name, item in table.items()}}
    if isinstance(value, Recipe):
        return {_RECIPE: value.to_toml()}
    name = getattr(value, "__name__", type(value).__name__)
    if _FUNCTIONS.get(name) is value:
        return {name: {}}
    if _KINDS.get(name) is not type(value):
        raise Unwritable(name)
    options = (field.name for field in dataclasses.fields(_KINDS[name]) if field.init)
    return {name: {option: written(getattr(value, option)) for option in options}}


def read_back(plain: Any) -> Any:
    """What was written, lists as tuples.

    Raises:
        ValueError, TypeError, InputError: if it is nothing that `written` gives.
    """
    if isinstance(plain, list):
        return tuple(map(read_back, cast("list[Any]", plain)))
    if not isinstance(plain, dict):
        return plain
    ((name, content),) = cast("dict[str, Any]", plain).items()
    if name == _RECIPE:
        return Recipe.from_text(content, "its recipe")
    options = {option: read_back(item) for option, item in content.items()}
    if name == _TABLE:
        return options
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    if name not in _KINDS:
        raise ValueError(f"there is no {name!r}")
    return _KINDS[name](**options)
