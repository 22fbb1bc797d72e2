"""Make trained ONNX models smaller and faster, and prove that they still work."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxcompress.api import calibrate, load_statistics, optimize, prune, quantize
    from onnxcompress.comparison import validate
    from onnxcompress.contract import CalibratedPass, Pass, Result, Skip, Want
    from onnxcompress.data import Images, open_data
    from onnxcompress.distillation import distill
    from onnxcompress.errors import GateError, InputError, IntegrityError, OnnxCompressError
    from onnxcompress.gates import Gate
    from onnxcompress.inspection import inspect
    from onnxcompress.job import compress
    from onnxcompress.measure import bench
    from onnxcompress.model_io import load, save
    from onnxcompress.pipeline import run
    from onnxcompress.recipe import Recipe
    from onnxcompress.report import Report
    from onnxcompress.train.model import Model
    from onnxcompress.tuning import tune

    __version__: str

# What is imported when it is first asked for: `import onnxcompress` alone costs nothing. No
# module has the name of a function here, or importing it would hide the function.
_MODULES = {
    "api": ("calibrate", "load_statistics", "optimize", "prune", "quantize"),
    "comparison": ("validate",),
    "contract": ("CalibratedPass", "Pass", "Result", "Skip", "Want"),
    "data": ("Images", "open_data"),
    "distillation": ("distill",),
    "errors": ("GateError", "InputError", "IntegrityError", "OnnxCompressError"),
    "gates": ("Gate",),
    "inspection": ("inspect",),
    "job": ("compress",),
    "measure": ("bench",),
    "model_io": ("load", "save"),
    "pipeline": ("run",),
    "recipe": ("Recipe",),
    "report": ("Report",),
    "train.model": ("Model",),
    "tuning": ("tune",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "CalibratedPass",
    "Gate",
    "GateError",
    "Images",
    "InputError",
    "IntegrityError",
    "Model",
    "OnnxCompressError",
    "Pass",
    "Recipe",
    "Report",
    "Result",
    "Skip",
    "Want",
    "bench",
    "calibrate",
    "compress",
    "distill",
    "inspect",
    "load",
    "load_statistics",
    "open_data",
    "optimize",
    "prune",
    "quantize",
    "run",
    "save",
    "tune",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("onnxcompress")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
