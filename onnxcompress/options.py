"""A table of options (from TOML) to a typed dataclass and back: strict in names, types, values."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from onnxcompress.errors import InputError, did_you_mean

T = TypeVar("T")


@cache
def fields(cls: type[Any]) -> Mapping[str, Any]:
    """The options of a dataclass: name to type.

    A field hidden from `repr` is bound by the engine (a pass's statistics) and is no option.
    """
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init and f.repr}


def build(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass `cls` with the options of `table`.

    Raises:
        InputError: for an unknown option, one that lacks, a value of the wrong type, or one that
            `cls` refuses; `where` (file and place) opens the sentence.
    """
    known = fields(cls)
    for name in table:
        if name not in known:
            raise InputError(f"{where}: no option {name!r}{did_you_mean(name, known)}")
    for name in _required(cls):
        if name not in table:
            raise InputError(f"{where}: {name!r} must be given")
    values = {n: _coerce(v, known[n], f"{where}: option {n!r}") for n, v in table.items()}
    try:
        return cls(**values)
    except (InputError, ValueError, TypeError) as error:
        raise InputError(f"{where}: {error}") from error


def changed(instance: object) -> dict[str, Any]:
    """The options that differ from their defaults, as values that TOML can hold.

    None, which TOML has not, is the word `none`.
    """
    kind = type(instance)
    defaults = {f.name: _default(f) for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    values = {n: getattr(instance, n) for n in fields(kind)}
    return {n: _plain(v) for n, v in values.items() if v != defaults[n]}


def _required(cls: type[Any]) -> list[str]:
    options = (f for f in dataclasses.fields(cls) if f.init)
    return [f.name for f in options if _default(f) is dataclasses.MISSING]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _plain(value: Any) -> Any:
    if value is None:
        return "none"
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    return value


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as `hint`: bool, int, float, str, Literal, Enum, tuple, a union of these, or a table
    that is a dataclass or maps names to any of them."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _union(value, args, where)
    if origin is Literal:
        return _choice(value, {a: a for a in args}, where)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _choice(value, {e.value: e for e in hint}, where)
    if origin is Mapping or _is_table(hint):
        return _table(value, hint, where)
    if origin is tuple and isinstance(value, list):
        return _items(value, args, where)  # pyright: ignore[reportUnknownArgumentType]
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise InputError(f"{where} must be {_describe(hint)}, not {value!r}")
    return value


def _union(value: Any, args: tuple[Any, ...], where: str) -> Any:
    if value == "none" and type(None) in args:
        return None
    kinds = [a for a in args if a is not type(None)]
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal:
        return _choice(value, {**{a: a for a in get_args(kinds[0])}, "none": None}, where)
    if len(kinds) == 1:
        return _coerce(value, kinds[0], where)
    for kind in kinds:
        try:
            return _coerce(value, kind, where)
        except InputError:
            continue
    raise InputError(f"{where} must be {' or '.join(map(_describe, args))}, not {value!r}")


def _choice(value: Any, choices: Mapping[Any, Any], where: str) -> Any:
    for choice, meaning in choices.items():
        if type(value) is type(choice) and value == choice:
            return meaning
    hint = did_you_mean(value, map(str, choices)) if isinstance(value, str) else ""
    shown = ", ".join(repr(c) for c in choices)
    raise InputError(
        f"{where} must be one of {shown}, not {value!r}{hint if 'did' in hint else ''}"
    )


def _is_table(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(cast("type[Any]", hint))


def _table(value: Any, hint: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be a table, not {value!r}")
    table = cast("dict[str, Any]", value)
    if _is_table(hint):
        return build(hint, table, where)
    kind = get_args(hint)[1]
    return {name: _coerce(item, kind, f"{where}: {name!r}") for name, item in table.items()}


def _items(value: list[Any], args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
    if len(kinds) != len(value):
        raise InputError(f"{where} must be a list of {len(kinds)}, not of {len(value)}")
    return tuple(_coerce(v, k, where) for v, k in zip(value, kinds, strict=True))


def _describe(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return (
            f"a list ({', '.join('…' if a is Ellipsis else _describe(a) for a in get_args(hint))})"
        )
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    if hint is type(None):
        return "'none'"
    return names.get(hint) or str(getattr(hint, "__name__", hint))
