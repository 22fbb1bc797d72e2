"""Recipes: an ordered list of passes with options, a target and gates, as a TOML file.

    target = "cpu"

    [gates]
    top1_agreement = ">= 0.98"

    [[passes]]
    name = "insert_qdq"
    activations = "uint8"

A table `[train]` holds the options of `distill`, which trains before it runs the passes, a table
`[tune]` those of `tune`, which trains what they quantized.

Strict: an unknown key, pass, option or value is refused with the nearest known one.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from onnxcompress import options, targets
from onnxcompress.contract import Pass
from onnxcompress.errors import InputError, did_you_mean
from onnxcompress.gates import Gate
from onnxcompress.registry import Registry, installed
from onnxcompress.train.augment import read_steps, write_steps
from onnxcompress.train.settings import Training, Tuning

_KEYS = ("target", "gates", "train", "passes", "tune")
_MAX_BYTES = 1 << 20
_Kind = TypeVar("_Kind", bound=Training)


@dataclass(frozen=True)
class Recipe:
    """What to do to a model, for which runtime, and what the result must hold."""

    passes: tuple[Pass, ...] = ()
    target: str = "cpu"
    gates: tuple[Gate, ...] = ()
    training: Training | None = None
    """How a student is trained first, where there is one."""
    tuning: Tuning | None = None
    """How what the passes quantized is trained, if it is."""

    @classmethod
    def from_toml(cls, path: str | Path, registry: Registry | None = None) -> Recipe:
        """Read a recipe file.

        Raises:
            InputError: if it cannot be read or anything in it is unknown or of the wrong type.
        """
        path = Path(path)
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise InputError(f"{path} is over 1 MiB: is it a recipe?")
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"{path} cannot be read as a recipe ({error.strerror}): check the path"
            ) from error
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} cannot be read as a recipe: it is not text, write it as TOML"
            ) from error
        return cls.from_text(text, str(path), registry)

    @classmethod
    def from_text(
        cls, text: str, where: str = "recipe", registry: Registry | None = None
    ) -> Recipe:
        """Read a recipe from TOML text; `where` opens every complaint. Raises like `from_toml`."""
        registry = registry or installed()
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{where} is not valid TOML: {error}") from error
        for key in table:
            if key not in _KEYS:
                raise InputError(f"{where}: no key {key!r}{did_you_mean(key, _KEYS)}")
        return cls(
            _passes(table.get("passes", []), where, registry),
            _target(table.get("target", "cpu"), where),
            _gates(table.get("gates", {}), where),
            _training(table.get("train"), Training, "train", where),
            _training(table.get("tune"), Tuning, "tune", where),
        )

    def to_toml(self) -> str:
        """The recipe as TOML, options at their defaults left out; reads back to an equal recipe."""
        parts = [f"target = {_toml(self.target)}\n"]
        if self.gates:
            lines = (f"{g.metric} = {_toml(g.condition)}\n" for g in self.gates)
            parts.append("[gates]\n" + "".join(lines))
        if self.training is not None:
            parts.append("[train]\n" + _options(self.training))
        for pass_ in self.passes:
            table = {"name": pass_.name, **options.changed(pass_)}
            parts.append("[[passes]]\n" + "".join(f"{k} = {_toml(v)}\n" for k, v in table.items()))
        if self.tuning is not None:
            parts.append("[tune]\n" + _options(self.tuning))
        return "\n".join(parts)


def _passes(tables: Any, where: str, registry: Registry) -> tuple[Pass, ...]:
    if not isinstance(tables, list):
        raise InputError(f"{where}: write each pass as a table [[passes]] with its name")
    return tuple(
        _pass(table, f"{where}: pass {i}", registry)
        for i, table in enumerate(cast("list[Any]", tables), 1)
    )


def _pass(table: Any, where: str, registry: Registry) -> Pass:
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):  # pyright: ignore[reportUnknownMemberType]
        raise InputError(f'{where} has no name: write name = "…" in its [[passes]]')
    given = cast("Mapping[str, Any]", table)
    try:
        kind = registry.pass_class(given["name"])
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    rest = {k: v for k, v in given.items() if k != "name"}
    return options.build(kind, rest, f"{where} ({kind.name})")


def _target(name: Any, where: str) -> str:
    if not isinstance(name, str):
        raise InputError(f"{where}: target must be a string, not {name!r}")
    try:
        targets.load(name)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return name


def _gates(table: Any, where: str) -> tuple[Gate, ...]:
    if not isinstance(table, dict):
        raise InputError(f'{where}: write gates as a table [gates] of metric = ">= bound"')
    bounds = cast("dict[str, Any]", table)
    for metric, condition in bounds.items():
        if not isinstance(condition, str):
            raise InputError(
                f'{where}: gate {metric!r} must be a string such as ">= 0.98", not {condition!r}'
            )
    try:
        return tuple(Gate.parse(f"{metric} {condition}") for metric, condition in bounds.items())
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _training(table: Any, kind: type[_Kind], key: str, where: str) -> _Kind | None:
    if table is None:
        return None
    if not isinstance(table, dict):
        raise InputError(f"{where}: write how to {key} as a table [{key}] of options")
    given = dict(cast("Mapping[str, Any]", table))
    steps = read_steps(given.pop("augment", []), f"{where}: {key}: augment")
    return replace(options.build(kind, given, f"{where}: {key}"), augment=steps)


def _options(training: Training) -> str:
    table = options.changed(replace(training, augment=()))
    if training.augment:
        table["augment"] = write_steps(training.augment)
    return "".join(f"{k} = {_toml(v)}\n" for k, v in table.items())


def _toml(value: Any) -> str:
    """A bool, number, string, list or table of them as TOML; strings are JSON's but for DEL."""
    if isinstance(value, dict):
        table = cast("dict[str, Any]", value)
        return f"{{{', '.join(f'{k} = {_toml(v)}' for k, v in table.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(_toml(v) for v in cast('list[Any]', value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
