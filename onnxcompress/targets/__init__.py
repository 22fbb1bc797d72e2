"""What each runtime does well, as data: one TOML file a runtime beside this module.

Another package adds one with an entry point `name = module:path`, the path of its TOML file, in
the group `onnxcompress.targets`. What ships with the engine wins over one of the same name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Final, Literal

from onnxcompress.errors import InputError, did_you_mean
from onnxcompress.numerics.affine import FLOAT8
from onnxcompress.operators import TABLE, Role
from onnxcompress.options import build
from onnxcompress.plugins import load_plugin, plugins

Float8 = Literal["float8e4m3fn", "float8e5m2"]
Activations = Literal["uint8", "int8", "uint16", "int16", Float8]
Floats = Literal["float16", "bfloat16", Float8]
_GROUP: Final = "onnxcompress.targets"
_OPSET_OF_MORE_TYPES: Final = 21
"""The first whose QuantizeLinear gives 16 bits, and float8 without a zero_point of that type (ONNX
operator changelog)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """An operator that the runtime computes in integers."""

    output: Literal["integer", "wanted", "either", "float"] = "integer"
    """integer: it needs a pair behind it. wanted: its output is an integer where a kernel reads it.
    either: the same, but only kernels that start by themselves count as such. float: it never is,
    and what reads it beside kernels does not have it rounded."""
    anchor: bool = False
    """Worth quantizing by itself; others follow where their inputs are integers already."""
    tied: bool = False
    """Its inputs and outputs take one scale and zero_point."""
    joins: bool = False
    """Runs within the kernel before one of its inputs, so no pair may stand between the two."""
    fixed: tuple[float, float] | None = None
    """The range that the output's codes must divide evenly, with a scale that is a power of two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationScheme:
    """How the runtime wants activations: `dtype`, and whether zero_point must be the middle."""

    dtype: Activations
    symmetric: bool
    per_channel: bool
    """Whether a DequantizeLinear of data may have a scale for each channel."""
    alternatives: tuple[Activations, ...] = ()
    """Other types that the same kernels take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScheme:
    """How the runtime wants weights; `pair_sums` as `Target.bounds_pair_sums` reads it."""

    dtype: Literal["int8", Float8]
    symmetric: Literal[True]
    per_channel: tuple[str, ...]
    """Operators whose weights may have a scale for each output channel."""
    bias: Literal["int32", "float32"]
    pair_sums: Literal["auto", "bounded", "free"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One runtime: schemes it wants and operators it runs on integers (see `cpu.toml`)."""

    name: str = field(repr=False, default="")
    description: str
    provider: str
    """ONNX Runtime's execution provider for it."""
    machines: tuple[str, ...] = ()
    """`platform.machine()` in lower case where a measurement counts; any where empty."""
    opset: int
    """The least in which what the passes write is defined."""
    floats: tuple[Floats, ...]
    """Reduced float types that it computes in."""
    activations: ActivationScheme
    weights: WeightScheme
    kernels: Mapping[str, Kernel]
    moves: Mapping[str, int]
    """Run between QuantizeLinear and DequantizeLinear, from this opset on."""
    absorbs: tuple[str, ...]
    """Vanish into the kernel before them."""
    dynamic: tuple[str, ...]
    """Kernels of integer weights that quantize their data as it comes, or look integers up."""
    weight_only: tuple[str, ...] = ()
    """Operators of the domain com.microsoft that take weights in blocks of few bits."""

    def __post_init__(self) -> None:
        named = (*self.kernels, *self.moves, *self.absorbs, *self.dynamic)
        if (self.activations.dtype in FLOAT8) != (self.weights.dtype in FLOAT8):
            raise InputError("activations and weights are both 8-bit floats or neither is")
        for operator in (*named, *self.weights.per_channel):
            if operator not in TABLE:
                raise InputError(f"no operator {operator!r}{did_you_mean(operator, TABLE)}")

    @property
    def bounds_pair_sums(self) -> bool:
        """Whether weights must be scaled so that sums of two products fit in 16 bits."""
        if self.weights.pair_sums == "auto":
            return not machine_has_vnni()
        return self.weights.pair_sums == "bounded"

    @property
    def measurable(self) -> bool:
        """Whether running a model on this machine tells how fast the target runs it."""
        import platform

        known = not self.machines or platform.machine().lower() in self.machines
        return known and self.provider == _MEASURED

    def with_activations(self, dtype: Activations | None) -> Target:
        """The same with activations of `dtype`; its own where None.

        Raises:
            InputError: if its kernels do not take them.
        """
        own = self.activations
        if dtype is None or dtype == own.dtype:
            return self
        if dtype == "float8e4m3fn" or dtype == "float8e5m2":
            return self._in_float8(dtype)
        if dtype not in own.alternatives:
            kinds = " or ".join((own.dtype, *own.alternatives))
            raise InputError(f"target {self.name!r} takes {kinds} activations, not {dtype}")
        opset = max(self.opset, _OPSET_OF_MORE_TYPES) if dtype.endswith("16") else self.opset
        return replace(self, opset=opset, activations=replace(own, dtype=dtype))

    @property
    def float8(self) -> Float8:
        """The 8-bit float that it multiplies.

        Raises:
            InputError: if there is none.
        """
        for dtype in self.floats:
            if dtype == "float8e4m3fn" or dtype == "float8e5m2":
                return dtype
        raise InputError(
            f"target {self.name!r} computes nothing in float8: aim at one that does (tensorrt), or "
            "use another scheme"
        )

    def _in_float8(self, dtype: Float8) -> Target:
        """The same with operands of matrix products and convolutions as 8-bit floats.

        All else keeps its precision: it would gain no speed, and three bits are few.
        """
        if dtype not in self.floats:
            raise InputError(f"target {self.name!r} computes nothing in {dtype}")
        contractions = [op for op in self.kernels if TABLE[op].role is Role.CONTRACT]
        return replace(
            self,
            opset=max(self.opset, _OPSET_OF_MORE_TYPES),
            kernels=dict.fromkeys(contractions, Kernel(anchor=True, output="float")),
            moves={},
            absorbs=(),
            activations=replace(self.activations, dtype=dtype, symmetric=True, alternatives=()),
            weights=replace(self.weights, dtype=dtype, bias="float32", pair_sums="free"),
        )


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
    if "name" in table:
        raise InputError(f"target {name!r}: it is named by its file, leave 'name' out")
    return replace(build(Target, table, f"target {name!r}"), name=name)


_MEASURED: Final = "CPUExecutionProvider"
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
