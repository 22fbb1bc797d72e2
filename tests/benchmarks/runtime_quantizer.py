"""ONNX Runtime's own quantizer as a command, as its documentation says to use it.

python -m tests.benchmarks.runtime_quantizer METHOD MODEL OUTPUT [SAMPLES]
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx import version_converter
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from tests.benchmarks.samples import feeds

ort: Any = onnxruntime
_OPSET = 13


class Reader(quantization.CalibrationDataReader):
    """The samples of an npz, one at a time."""

    def __init__(self, model: Path, samples: Path) -> None:
        session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        ranks = {port.name: len(port.shape) for port in session.get_inputs()}
        self._feeds = feeds(samples, ranks)

    def get_next(self) -> Any:
        return next(self._feeds, None)


def pre_process(source: Path, prepared: Path) -> None:
    """Shape inference and optimization; symbolic inference is left out where it fails.

    An older opset is raised to the first that has per-channel DequantizeLinear, as the quantizer
    itself advises.
    """
    model: Any = onnx.load(source)
    if any(o.domain in ("", "ai.onnx") and o.version < _OPSET for o in model.opset_import):
        source = prepared.with_name("raised.onnx")
        onnx.save(version_converter.convert_version(model, _OPSET), source)
    del model
    try:
        quant_pre_process(source, prepared)
    except Exception:  # it raises Exception itself, and asks to skip the step
        quant_pre_process(source, prepared, skip_symbolic_shape=True)


def main(method: str, model: str, output: str, samples: str = "") -> None:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        pre_process(Path(model), prepared)
        if method == "Dynamic":
            quantization.quantize_dynamic(prepared, Path(output))
            return
        quantization.quantize_static(
            prepared,
            output,
            Reader(Path(model), Path(samples)),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod[method],
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
