"""Steps as a recipe writes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, cast

from onnxcompress import options
from onnxcompress.errors import InputError, did_you_mean
from onnxcompress.train.augment.alone import Crop, Flip, Noise, RandomErase, Shift
from onnxcompress.train.augment.mixing import CutMix, Mixup
from onnxcompress.train.augment.step import Augmentation, Step, title
from onnxcompress.train.augment.swapping import Swap

KINDS: Final[tuple[type[Step], ...]] = (
    *(Noise, Shift, Flip, Crop, RandomErase, Swap),
    *(Mixup, CutMix),
)
"""The steps that a recipe has names for."""
_STEPS: Final = {kind.name: kind for kind in KINDS}


def read_steps(items: Any, where: str = "augment") -> tuple[Augmentation, ...]:
    """Steps from a list as TOML has it: `[{noise = {std = 0.1}}, "flip"]`.

    Raises:
        InputError: for an unknown step, option or value; `where` opens the sentence.
    """
    if not isinstance(items, list):
        raise InputError(f'{where} must be a list such as [{{noise = {{std = 0.1}}}}, "flip"]')
    return tuple(_read(item, where) for item in cast("list[Any]", items))


def _read(item: Any, where: str) -> Augmentation:
    named: Any = {item: {}} if isinstance(item, str) else item
    if not isinstance(named, dict) or len(cast("dict[str, Any]", named)) != 1:
        raise InputError(f"{where}: a step is a name or {{name = {{options}}}}, not {item!r}")
    ((name, table),) = cast("dict[str, Any]", named).items()
    if name not in _STEPS:
        raise InputError(f"{where}: no step {name!r}{did_you_mean(name, _STEPS)}")
    if not isinstance(table, dict):
        raise InputError(f"{where}: {name} must be a table of options, not {table!r}")
    return options.build(_STEPS[name], cast("dict[str, Any]", table), f"{where}: {name}")


def write_steps(steps: Iterable[Augmentation]) -> list[dict[str, dict[str, Any]]]:
    """The list that `read_steps` reads.

    Raises:
        InputError: if a step is a callable of your own, which has no name in a recipe.
    """
    found: list[dict[str, dict[str, Any]]] = []
    for step in steps:
        if not isinstance(step, Step) or type(step) not in _STEPS.values():
            raise InputError(f"{step!r} is no step that a recipe has a name for")
        found.append({title(step): options.changed(step)})
    return found
