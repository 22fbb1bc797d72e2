"""Take the weights of old models for what they are: constants, not inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import onnx_ir as ir

from onnxcompress.contract import Pass, Result

_SETTLED: Final = 4


@dataclass(frozen=True, kw_only=True)
class SettleInitializers(Pass):
    """Remove initializers from the inputs of models of IR version 3, which had to list them.

    From IR version 4 on an initializer that is also an input is a default that the caller may
    override, and no pass touches it. In version 3 every initializer was one, and ONNX Runtime
    lets nobody feed it. The inputs that a caller must give stay as they are. Exact.

    Source: the ONNX IR specification, "Initializers"; onnx/onnx pull request 1718.
    """

    name: ClassVar[str] = "settle_initializers"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> Result:
        if model.ir_version >= _SETTLED:
            return Result(model, modified=False)
        inputs = model.graph.inputs
        kept = [value for value in inputs if not value.is_initializer()]
        removed = len(inputs) - len(kept)
        inputs[:] = kept
        model.ir_version = _SETTLED
        return Result(model, modified=True, figures={"inputs removed": removed})
