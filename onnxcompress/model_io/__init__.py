"""Load and save models: the one place that touches a model's path.

A model from outside is not trusted: sizes are checked against the file before anything is
allocated, and references to data stay within the model's folder. Its weights stay in the file,
mapped, whether they lie in the `.onnx` itself or beside it. A model is written as a whole or not
at all, tensor by tensor; `docs/decisions/saving.md` says how and why.
"""

from __future__ import annotations

from onnxcompress.model_io.reading import load, size_on_disk
from onnxcompress.model_io.writing import SavedFiles, check_writable, save

__all__ = ["SavedFiles", "check_writable", "load", "save", "size_on_disk"]
