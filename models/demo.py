"""The main job on a real model with its real data: what `make demo` runs.

The digits model gets its calibration data to observe and its labelled evaluation data to be
judged on; the command is the one that anyone would type.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = Path("models/photo_digits")
OUT = Path("build/demo")


def main() -> int:
    """Run the command in the checkout's root; its exit code."""
    (ROOT / OUT).mkdir(parents=True, exist_ok=True)
    arguments = [
        *("compress", str(MODEL / "model.onnx")),
        *("--output", str(OUT / "small.onnx")),
        *("--calibrate", str(MODEL / "calibration.npz")),
        *("--evaluate", str(MODEL / "evaluation.npz")),
        *("--report", str(OUT / "report.html")),
    ]
    print(f"$ {shlex.join(['onnxcompress', *arguments])}", flush=True)
    program = Path(sys.executable).with_name("onnxcompress")
    code = subprocess.run([program, *arguments], cwd=ROOT, check=False).returncode
    if code == 0:
        print(f"\nThe model is {OUT / 'small.onnx'}, the report {OUT / 'report.html'}.")
    return code


if __name__ == "__main__":
    sys.exit(main())
