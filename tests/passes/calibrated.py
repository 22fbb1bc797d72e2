"""Apply passes to a model one after another, each with statistics of the model as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx
import onnx_ir as ir

from onnxcompress.contract import CalibratedPass, Result
from onnxcompress.observe import observe


def apply(pass_: CalibratedPass, model: ir.Model, feeds: Sequence[dict[str, Any]]) -> Result:
    """Observe, bind, apply; the model that comes out is checked."""
    wants = pass_.wants(model)
    statistics = observe(model, feeds, wants) if wants else None
    result = replace(pass_, statistics=statistics)(model)
    assert isinstance(result, Result)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return result
