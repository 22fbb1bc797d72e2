"""The pipeline copies the model, observes what passes want, and records what they did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.api import as_data, observer
from onnxcompress.contract import CalibratedPass, Kind, Pass, Result, Skip, Statistics, Want
from onnxcompress.errors import InputError
from onnxcompress.observe import observe
from onnxcompress.pipeline import run


@dataclass(frozen=True, kw_only=True)
class Rename(Pass):
    name: ClassVar[str] = "rename"
    to: str = "renamed"

    def call(self, model: ir.Model) -> Result:
        modified = model.graph.name != self.to
        model.graph.name = self.to
        return Result(model, modified=modified, skips=(Skip("n", "Relu", "because"),))


@dataclass(frozen=True, kw_only=True)
class Look(CalibratedPass):
    name: ClassVar[str] = "look"
    seen: list[float] = field(default_factory=list[float], repr=False, compare=False)
    changes: bool = False

    def wants(self, model: ir.Model) -> Sequence[Want]:
        return [Want("h")]

    def call(self, model: ir.Model) -> Result:
        self.seen.append(self.observed(self.wants(model)).histogram("h").maximum)
        return Result(model, modified=self.changes)


def model() -> ir.Model:
    return ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x) => (float[2] y) { h = Relu(x)  y = Neg(h) }"""
    )


class Watch:
    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, model: ir.Model, wants: Sequence[Want]) -> Statistics:
        self.runs += 1
        return observe(model, [{"x": np.array([1, self.runs + 1], np.float32)}], wants)


def test_the_callers_model_is_not_altered() -> None:
    original = model()
    outcome = run(original, [Rename()])
    assert original.graph.name == "g" and outcome.model.graph.name == "renamed"
    (record,) = outcome.records
    assert (record.name, record.modified, record.options) == ("rename", True, {"to": "renamed"})
    assert record.skips[0].reason == "because" and record.seconds >= 0


def test_neighbours_share_an_observation_until_something_changes() -> None:
    watch, looks = Watch(), [Look(), Look(), Look(changes=True), Look()]
    run(model(), looks, observer=watch)
    assert [look.seen for look in looks] == [[2.0], [2.0], [2.0], [3.0]]
    assert watch.runs == 2


@dataclass(frozen=True, kw_only=True)
class LookExactly(Look):
    """Names anew what it changes, if it does."""

    exact: ClassVar[bool] = True
    value: str = "h"
    renames: bool = False

    def wants(self, model: ir.Model) -> Sequence[Want]:
        return [Want(self.value)] if any(v.name == self.value for v in values(model)) else []

    def call(self, model: ir.Model) -> Result:
        if wants := self.wants(model):
            self.seen.append(self.observed(wants).histogram(self.value).maximum)
        for value in values(model) if self.renames else ():
            if value.name == self.value:
                value.name = f"{self.value}2"
        return Result(model, modified=self.renames)


def values(model: ir.Model) -> list[ir.Value]:
    return [value for node in model.graph for value in node.outputs]


def test_exact_neighbours_share_what_neither_changed() -> None:
    shared = [LookExactly(renames=True), LookExactly(value="y")]
    watch, looks = Watch(), [*shared, LookExactly(value="h2"), Look()]
    run(model(), looks[:3], observer=watch)
    assert [look.seen for look in looks] == [[2.0], [-1.0], [3.0], []]
    assert watch.runs == 2


def test_given_statistics_are_used_without_running() -> None:
    watch, look = Watch(), Look()
    statistics = observe(model(), [{"x": np.array([7, 7], np.float32)}], [Want("h")])
    run(model(), [look], statistics=statistics, observer=watch)
    assert look.seen == [7.0] and watch.runs == 0


def test_without_statistics_it_refuses_naming_them() -> None:
    with pytest.raises(InputError, match="look needs statistics of 'h'"):
        run(model(), [Look()])


def test_no_more_feeds_are_run_than_tell_enough() -> None:
    runs: list[int | None] = []
    data = as_data({"x": np.arange(20, dtype=np.float32).reshape(10, 2)}, model())
    watch = observer(data, progress=lambda done, total: runs.append(total) if done == 1 else None)
    few, many = Want("h", feeds=3), Want("h", Kind.MEAN, 0, feeds=5)
    told = watch(model(), [few])
    assert not told.missing([few]) and told.missing([Want("h"), Want("h", feeds=4)])
    assert not watch(model(), [few, many]).missing([few, many, Want("h", feeds=5)])
    assert not watch(model(), [few, Want("h", Kind.MEAN, 0)]).missing([Want("h"), many])
    assert runs == [3, 5, 10]
