"""ONNX Runtime itself: its options, its values as arrays, and its errors as one sentence."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

from onnxcompress.errors import InputError, OnnxCompressError

Optimization = Literal["all", "basic", "none"]

ort: Any = onnxruntime  # it comes without types

LEVELS: dict[Optimization, Any] = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

PROVIDERS = ["CPUExecutionProvider"]
_FATAL, _WARNING = 4, 2
EXPORT_AGAIN = "export it again in a form that this version runs"


def title_of(model: ir.Model | Path) -> str:
    """What messages call the model."""
    return str(model) if isinstance(model, Path) else repr(model.graph.name or "model")


def weighs(model: ir.Model | Path) -> int:
    """Bytes of the main graph's initializers, or of the file."""
    if isinstance(model, Path):
        return model.stat().st_size
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)


def options_of(optimization: Optimization, verbose: bool) -> Any:
    """A session's options."""
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[optimization]
    options.log_severity_level = _WARNING if verbose else _FATAL
    return options


# Tensors that ONNX Runtime does not turn into arrays by itself.
FOREIGN = {"tensor(bfloat16)"} | {
    f"tensor(float8e{kind})" for kind in ("4m3fn", "4m3fnuz", "5m2", "5m2fnuz")
}


def to_ort(array: Any) -> Any:
    """The array as a value that shares its memory where it is contiguous."""
    array = np.asarray(array, order="C")
    if array.dtype.kind != "V":
        return ort.OrtValue.ortvalue_from_numpy(array)
    kind = int(ir.DataType.from_numpy(array.dtype))
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind)


def from_ort(value: Any) -> Any:
    """The tensor as an array that shares its memory."""
    if value.data_type() not in FOREIGN:
        return np.from_dlpack(value)
    dtype = ir.DataType(value.element_type()).numpy()
    shape: list[int] = value.shape()
    size = math.prod(shape) * dtype.itemsize
    content = ctypes.string_at(value.data_ptr(), size)
    return np.frombuffer(content, dtype).reshape(shape)


def trim() -> None:
    """Give freed memory back to the system: a start leaves twice the weights' bytes in the heap."""
    with suppress(OSError, AttributeError):  # glibc has it, other systems do without
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def one_sentence(failure: str, remedy: str) -> Generator[None]:
    """Turn ONNX Runtime's multi-line errors into one sentence; its binding raises many types."""
    try:
        yield
    except (OnnxCompressError, MemoryError):
        raise
    except Exception as error:
        text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", str(error))
        text = re.sub(r"\S+\.(?:cc|h|cpp):\d+ |^Load model from .*? failed:", "", text)
        reason = " ".join(text.split())[:500].rstrip(". ")
        raise InputError(f"ONNX Runtime {failure}: {reason}; {remedy}") from error
