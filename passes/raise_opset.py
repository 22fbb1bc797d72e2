"""Convert a model to a newer version of ONNX's operators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_ir as ir

from onnxcompress.contract import Pass, Result, Skip
from onnxcompress.errors import InputError
from onnxcompress.graph.opset_changes import NEWEST, OLDEST, Declined, Edit, Site, Types, edits
from onnxcompress.graph.scopes import nodes_within

_LEAST = 13


@dataclass(frozen=True, kw_only=True)
class RaiseOpset(Pass):
    """Convert to newer ONNX operators where a scheme needs them.

    Most operators only accept more types from one version to the next. Those that differ are
    written anew, here from 12 to 13:

        ReduceSum(x) <axes=[1]>     becomes   ReduceSum(x, [1])
        Softmax(x) <axis=1>         becomes   Reshape(Softmax(Flatten(x) <axis=1>), Shape(x))

    The whole model is converted, with its subgraphs and functions, or nothing is: a node whose
    meaning the newer version cannot express, named in `skips`, leaves the model as it was. So do
    operators older than version 7. Operators of other domains stay as they are, weights are not
    touched, and the IR version rises with the operators where it must.

    The differences, from version 7 to 24, are those of the ONNX operator changelog
    (onnx.ai/onnx/operators); `onnxcompress.graph.opset_changes` lists them.
    """

    name: ClassVar[str] = "raise_opset"
    exact: ClassVar[bool] = True

    minimum: int = 21
    """Version of the default operators (opset) to have at least, from 13 to 24. Quantization per
    channel needs 13, in blocks or of 4 bits 21."""

    def __post_init__(self) -> None:
        if not _LEAST <= self.minimum <= NEWEST:
            raise InputError(
                f"raise_opset: minimum is {self.minimum} but must be from {_LEAST} to {NEWEST}"
            )

    def call(self, model: ir.Model) -> Result:
        scopes = [s for s in (model.graph, *model.functions.values()) if self._is_older(s)]
        if not scopes:
            return Result(model, modified=False)
        old = min(scope.opset_imports[""] for scope in scopes)
        if old < OLDEST:
            reason = f"operators of version {old} are older than {OLDEST}: export the model again"
            return Result(model, modified=False, skips=(Skip("", "", reason),))
        plan, skips = self._plan(model, scopes)
        if skips:
            return Result(model, modified=False, skips=tuple(skips))
        for edit in plan:
            edit()
        for scope in scopes:
            scope.opset_imports[""] = self.minimum
        model.ir_version = max(model.ir_version, _least_ir_version(self.minimum))
        figures = {"from": old, "to": self.minimum, "rewritten": len(plan)}
        return Result(model, modified=True, figures=figures)

    def _is_older(self, scope: ir.Graph | ir.Function) -> bool:
        return scope.opset_imports.get("", self.minimum) < self.minimum

    def _plan(
        self, model: ir.Model, scopes: list[ir.Graph | ir.Function]
    ) -> tuple[list[Edit], list[Skip]]:
        plan: list[Edit] = []
        skips: list[Skip] = []
        types, names = Types(model), set(_names(model))
        for scope in scopes:
            old = scope.opset_imports[""]
            for node in nodes_within(scope):
                if node.domain != "":
                    continue
                site = Site(node, types, names, in_function=isinstance(scope, ir.Function))
                try:
                    plan += edits(site, old, self.minimum)
                except Declined as reason:
                    skips.append(Skip(node.name or "", node.op_type, str(reason)))
        return plan, skips


def _names(model: ir.Model) -> Iterator[str | None]:
    functions = [inner for f in model.functions.values() for inner in (f, *f.subgraphs())]
    for scope in (model.graph, *model.graph.subgraphs(), *functions):
        yield from (value.name for value in scope.inputs)
        yield from (value.name for node in scope for value in node.outputs)
        if isinstance(scope, ir.Graph):
            yield from scope.initializers


def _least_ir_version(opset: int) -> int:
    return onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
