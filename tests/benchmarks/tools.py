"""The commands that are measured: what they are called, and how they are run on a case."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
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
_MODULES = {"runtime": "runtime_quantizer", "nncf": "nncf_quantizer"}
_TRANSFORMERS = ("minilm_stsb", "name_language")


@dataclass(frozen=True, slots=True)
class Tool:
    """A way to make a model smaller: a verb of ours, a method of ONNX Runtime's or NNCF's."""

    name: str
    verb: str
    option: str = ""

    @property
    def ours(self) -> bool:
        return self.verb not in _MODULES

    def command(self, case: Case, output: Path) -> list[str]:
        """What makes `output` of the case's model."""
        model, samples = str(case.model), str(case.calibration)
        if module := _MODULES.get(self.verb):
            program = [sys.executable, "-m", f"tests.benchmarks.{module}"]
            return [*program, self.option, model, str(output), samples]
        command = [*verb(self.verb), model, "-o", str(output)]
        if self.option == "dynamic":
            return [*command, "--scheme", "dynamic"]
        kind = "--scheme" if self.option == "static" else "--method"
        chosen = [kind, self.option] if self.option else []
        return [*command, "--calibrate", samples, *chosen]


TOOLS = (
    *(Tool(f"ours {method}", "quantize", method) for method in METHODS),
    Tool("ours dynamic", "quantize", "dynamic"),
    Tool("ours compress", "compress"),
    Tool("ours compress static", "compress", "static"),
    *(Tool(f"ORT {m}", "runtime", m) for m in ("MinMax", "Percentile", "Entropy", "Dynamic")),
    Tool("NNCF", "nncf", "default"),
    Tool("NNCF transformer", "nncf", "transformer"),
)
HAS_NNCF = find_spec("nncf") is not None


def tools_for(case: Case) -> Iterator[Tool]:
    """Those that are installed and meant for such a model."""
    for tool in TOOLS:
        suits = tool.option != "transformer" or case.name in _TRANSFORMERS
        if suits and (HAS_NNCF or tool.verb != "nncf"):
            yield tool


def verb(name: str) -> list[str]:
    """Our command line up to its verb, without the start-up of a script's wrapper."""
    start = "from onnxcompress.cli import main; main()"
    return [sys.executable, "-c", start, name]
