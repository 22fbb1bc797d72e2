"""What each runtime does well, as data: one TOML file a runtime beside this module.

Another package adds one with an entry point `name = module:path`, the path of its TOML file, in
the group `onnxcompress.targets`. What ships with the engine wins over one of the same name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Final, Literal

from onnxcompress.errors import InputError, did_you_mean
from onnxcompress.numerics.affine import RANGES
from onnxcompress.plugins import load_plugin, plugins

Output = Literal["integer", "either"]
_GROUP: Final = "onnxcompress.targets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """An operator that the runtime computes in integers."""

    output: Output
    anchor: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationScheme:
    """How the runtime wants activations: `dtype`, and whether zero_point must be the middle."""

    dtype: str
    symmetric: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScheme:
    """How the runtime wants weights; `pair_sums` as `Target.bounds_pair_sums` reads it."""

    dtype: str
    symmetric: bool
    per_channel: bool
    pair_sums: Literal["auto", "bounded", "free"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One runtime: schemes it wants and operators it runs on integers (see `cpu.toml`)."""

    name: str
    description: str
    opset: int
    activations: ActivationScheme
    weights: WeightScheme
    kernels: Mapping[str, Kernel]
    moves: Mapping[str, int]
    absorbs: frozenset[str]

    @property
    def bounds_pair_sums(self) -> bool:
        """Whether weights must be scaled so that sums of two products fit in 16 bits."""
        if self.weights.pair_sums == "auto":
            return not machine_has_vnni()
        return self.weights.pair_sums == "bounded"


def names() -> list[str]:
    """The targets that ship with the engine and those of other packages, sorted."""
    return sorted({*_shipped(), *plugins(_GROUP)})


@cache
def load(name: str) -> Target:
    """The target `name`.

    Raises:
        InputError: if there is none of that name, or its file cannot be read as one.
    """
    file = _shipped().get(name)
    if file is None:
        point = plugins(_GROUP).get(name)
        if point is None:
            raise InputError(f"no target {name!r}{did_you_mean(name, names())}")
        found = load_plugin(point)
        if not isinstance(found, str | Path):
            raise InputError(f"target {name!r}: {point.value} is no path of a TOML file: {found!r}")
        file = Path(found)
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"target {name!r}: {file} cannot be read as TOML: {error}") from error
    return parse(name, table)


def _shipped() -> dict[str, Traversable]:
    files = resources.files("onnxcompress.targets").iterdir()
    return {f.name.removesuffix(".toml"): f for f in files if f.name.endswith(".toml")}


def parse(name: str, table: Mapping[str, Any]) -> Target:
    """A target from its TOML table.

    Raises:
        InputError: if a key is unknown, missing or holds what it cannot hold.
    """
    try:
        target = Target(
            name=name,
            description=table["description"],
            opset=table["opset"],
            activations=ActivationScheme(**table["activations"]),
            weights=WeightScheme(**table["weights"]),
            kernels={op: Kernel(**row) for op, row in table["kernels"].items()},
            moves=table["moves"],
            absorbs=frozenset(table["absorbs"]["operators"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"target {name!r}: {error}") from error
    for scheme in (target.activations, target.weights):
        if scheme.dtype not in RANGES:
            raise InputError(f"target {name!r}: {scheme.dtype!r} is not an integer type")
    return target


_CPUINFO: Final = Path("/proc/cpuinfo")


@cache
def machine_has_vnni() -> bool:
    """Whether this machine multiplies uint8 by int8 without saturating 16-bit sums.

    ARM adds in 32 bits. Where the processor cannot be asked, the answer is the careful one.
    """
    import platform

    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    try:
        with _CPUINFO.open(encoding="ascii", errors="replace") as lines:
            flags = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return False
    return bool({"avx512_vnni", "avx_vnni", "avx_vnni_int8"} & set(flags.split()))
