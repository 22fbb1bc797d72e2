"""What a model takes, and whether an array may be fed to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.errors import InputError, did_you_mean

Feed = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Port:
    """One input of a model.

    Attributes:
        shape: an int where the dimension is fixed, its name or None where it is free; None where
            the model does not even state the rank.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None

    def accepts(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape fits: the same rank, fixed dimensions equal."""
        if self.shape is None:
            return True
        if len(shape) != len(self.shape):
            return False
        pairs = zip(self.shape, shape, strict=True)
        return all(not isinstance(want, int) or want == got for want, got in pairs)

    def describe(self) -> str:
        """The dtype and shape as people write them: `float32[N,3,224,224]`."""
        if self.shape is None:
            return f"{self.dtype} of any shape"
        return f"{self.dtype}[{','.join('?' if d is None else str(d) for d in self.shape)}]"


def interface(model: ir.Model) -> tuple[Port, ...]:
    """The inputs that a run of the model needs; initializers that are also inputs are optional.

    Raises:
        InputError: for an input that is no tensor, or one without a dtype.
    """
    return tuple(_port(value) for value in model.graph.inputs if not value.is_initializer())


def _port(value: ir.Value) -> Port:
    name = value.name or ""
    if not isinstance(value.type, ir.TensorType):
        raise InputError(f"the model's input {name!r} is not a tensor, and only tensors can be fed")
    dims = None
    if value.shape is not None:
        dims = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return Port(name, np.dtype(value.type.dtype.numpy()), dims)


def check(raw: Mapping[str, Any], ports: Iterable[Port], where: str) -> None:
    """See that arrays suit a model by name, dtype and shape, without reading their elements.

    An array may be anything that NumPy makes an array of; one that is not in memory tells its
    `dtype` and `shape`. The name `labels` may be there beside the model's inputs.

    Raises:
        InputError: for what does not; `where` (the file or feed) opens the sentence.
    """
    ports = tuple(ports)
    check_names(raw, ports, where)
    for port in ports:
        dtype, shape = spec(raw[port.name], f"{where}: array {port.name!r}")
        check_dtype(port, dtype, where)
        if not port.accepts(shape):
            raise InputError(shape_complaint(port, shape, where))
        if shape and shape[0] == 0:
            raise InputError(f"{where}: array {port.name!r} is empty: give it at least one sample")


def check_names(names: Iterable[str], ports: Sequence[Port], where: str) -> None:
    """See that all inputs of the model are there and nothing else but `labels`."""
    names = set(names)
    known = {port.name for port in ports}
    unknown = sorted(names - known - {"labels"})
    for missing in (p for p in ports if p.name not in names):
        hint = f", there is {', '.join(map(repr, unknown[:5]))}" if unknown else ""
        raise InputError(
            f"{where} has no array {missing.name!r}{hint}: the model's inputs are "
            + ", ".join(f"{p.name!r}" for p in ports)
        )
    if unknown:
        raise InputError(
            f"{where}: array {unknown[0]!r} is no input of the model"
            f"{did_you_mean(unknown[0], known)} (remove it or rename it)"
        )


def check_dtype(port: Port, dtype: np.dtype[Any], where: str) -> None:
    """See that a dtype is the port's, or one that `convert` turns into it without guessing."""
    if dtype == port.dtype or _convertible(dtype, port.dtype):
        return
    place = f"{where}: array {port.name!r} is {dtype} but the model takes {port.dtype}"
    if dtype.kind in "iu" and port.dtype.kind == "f":
        raise InputError(
            f"{place}: convert and scale it as in training, such as x.astype(np.float32) / 255"
        )
    raise InputError(f"{place}: convert it with .astype(np.{port.dtype})")


def spec(value: Any, where: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The dtype and shape of an array-like, read from memory only if it does not tell them."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if isinstance(dtype, np.dtype) and isinstance(shape, tuple):
        return dtype, shape  # pyright: ignore[reportUnknownVariableType]
    array = as_array(value, where)
    return array.dtype, array.shape


def as_array(value: Any, where: str) -> Array:
    """`value` as NumPy's array.

    Raises:
        InputError: if it cannot be read or is no array.
    """
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise InputError(f"{where} is not an array: {error}") from error


def shape_complaint(port: Port, shape: Sequence[int], where: str) -> str:
    """The sentence for an array whose shape a port does not accept."""
    got = f"{where}: array {port.name!r} has shape {list(shape)} but the model takes"
    if port.shape is not None and len(shape) == len(port.shape):
        pairs = enumerate(zip(port.shape, shape, strict=True))
        axis, want = next((i, w) for i, (w, has) in pairs if isinstance(w, int) and w != has)
        return f"{got} {port.describe()}: make dimension {axis} {want}, it is {shape[axis]}"
    if not port.shape:
        return f"{got} {port.describe()}: give it one value, or a list of one value a sample"
    return (
        f"{got} {port.describe()}: give it {len(port.shape)} axes with the samples on the first, "
        "or one axis more with one feed a sample"
    )


def convert(
    raw: Mapping[str, Any], ports: Iterable[Port], where: str, *, finite: bool = True
) -> Feed:
    """The checked feed as ONNX Runtime takes it: the model's dtypes, aligned, in C order.

    Raises:
        InputError: for an integer out of range and, if all must be `finite`, NaN and infinity.
    """
    return {p.name: _convert(p, as_array(raw[p.name], where), where, finite) for p in ports}


def _convert(port: Port, array: Array, where: str, finite: bool) -> Array:
    place = f"{where}: array {port.name!r}"
    if array.dtype.kind in "iu" and not np.can_cast(array.dtype, port.dtype):
        limits = np.iinfo(port.dtype)
        if array.size and (array.min() < limits.min or array.max() > limits.max):
            raise InputError(f"{place} has values outside {port.dtype}, which the model takes")
    with np.errstate(over="ignore"):  # an overflow is found below as an infinity
        array = np.require(array, port.dtype, ["C_CONTIGUOUS", "ALIGNED"])
    if finite and array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"{place} holds NaN or infinity as {port.dtype}: clean the data")
    return array


def _convertible(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    if target.kind == "O":  # ONNX strings
        return source.kind == "U"
    return any(source.kind in kinds and target.kind in kinds for kinds in ("f", "iu"))


def conversions(raw: Mapping[str, Any], ports: Iterable[Port], where: str) -> list[str]:
    """A note for each array that `convert` gives another dtype."""
    dtypes = {p: spec(raw[p.name], where)[0] for p in ports}
    return [
        f"array {p.name!r} is converted from {dtype} to {p.dtype}"
        for p, dtype in dtypes.items()
        if dtype != p.dtype and p.dtype.kind != "O"
    ]
