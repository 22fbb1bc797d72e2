"""NNCF as a command, as its documentation says to use it; needs the extra `bench`.

python -m tests.benchmarks.nncf_quantizer default|transformer MODEL OUTPUT SAMPLES
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from tests.benchmarks.samples import feeds

ort: Any = onnxruntime


def main(kind: str, model: str, output: str, samples: str) -> None:
    os.environ["NNCF_CI"] = "1"  # so that it tells nobody that it was used
    nncf: Any = importlib.import_module("nncf")
    logging.disable(logging.WARNING)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    ranks = {port.name: len(port.shape) for port in session.get_inputs()}
    data = list(feeds(Path(samples), ranks))
    made = nncf.quantize(
        onnx.load(model),
        nncf.Dataset(data),
        subset_size=len(data),
        model_type=nncf.ModelType.TRANSFORMER if kind == "transformer" else None,
    )
    onnx.save(made, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
