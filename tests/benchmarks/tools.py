"""The commands that are measured: what they are called, and how they are run on a case."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.cases import Case

IMPORTS = (
    sys.executable,
    "-c",
    "import onnxcompress.api, onnxcompress.cli, onnxcompress.report.terminal",
)
"""The interpreter and all that `quantize` imports, and no work."""
METHODS = ("minmax", "percentile", "mse", "entropy")
BASELINE = "ORT MinMax"


@dataclass(frozen=True, slots=True)
class Tool:
    """A way to make a model smaller: a verb of ours or a method of ONNX Runtime's quantizer."""

    name: str
    verb: str
    option: str = ""

    @property
    def ours(self) -> bool:
        return self.verb != "runtime"

    def command(self, case: Case, output: Path) -> list[str]:
        """What makes `output` of the case's model."""
        model, samples = str(case.model), str(case.calibration)
        if self.verb == "runtime":
            module = "tests.benchmarks.runtime_quantizer"
            return [sys.executable, "-m", module, self.option, model, str(output), samples]
        command = [*verb(self.verb), model, "-o", str(output)]
        if self.option == "dynamic":
            return [*command, "--scheme", "dynamic"]
        chosen = ["--method", self.option] if self.option else []
        return [*command, "--calibrate", samples, *chosen]


TOOLS = (
    *(Tool(f"ours {method}", "quantize", method) for method in METHODS),
    Tool("ours dynamic", "quantize", "dynamic"),
    Tool("ours compress", "compress"),
    *(Tool(f"ORT {m}", "runtime", m) for m in ("MinMax", "Percentile", "Entropy", "Dynamic")),
)


def verb(name: str) -> list[str]:
    """Our command line up to its verb, without the start-up of a script's wrapper."""
    start = "from onnxcompress.cli import main; main()"
    return [sys.executable, "-c", start, name]
