"""Measuring: pairs in turns, intervals, a process of its own, made-up feeds."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress.errors import InputError
from onnxcompress.measure import bench, measure, random_feed
from onnxcompress.measure.latency import in_turns, median_interval, paired_latency

MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, T, 8] x, int64[N, 2] ids, bool[N] mask) => (float[N, T, 8] y)
{ y = Relu(x) }
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    ir.save(ir.from_onnx_text(MODEL), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


class Machine:
    """A clock that only the runs move, at a speed that drifts."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now, self.speed, self.drift = 0.0, 1.0, drift
        self.order: list[str] = []

    def run(self, name: str, seconds: float):
        def step() -> None:
            self.order.append(name)
            self.now += seconds * self.speed
            self.speed += self.drift

        return step

    def clock(self) -> float:
        return self.now


def test_the_ratio_is_told_and_the_order_changes_from_pair_to_pair():
    machine = Machine()
    a, b = machine.run("a", 1 / 64), machine.run("b", 1 / 128)
    found = in_turns(a, b, seconds=1, clock=machine.clock)
    assert found.low == found.ratio == found.high == 0.5
    assert (found.original_ms, found.candidate_ms) == (15.625, 7.8125)
    turns = [name for name, _ in itertools.groupby(machine.order[6:])]
    assert turns[:5] == ["a", "b", "a", "b", "a"], "a b, then b a, then a b"
    assert found.pairs == 10, "a steady machine needs no more than the fewest"


def test_a_machine_that_slows_down_does_not_bend_the_ratio():
    machine = Machine(drift=0.01)
    found = in_turns(machine.run("a", 0.01), machine.run("b", 0.01), clock=machine.clock)
    assert found.ratio == pytest.approx(1, abs=0.02)
    assert found.low <= 1 <= found.high


def test_time_is_up_where_the_interval_stays_wide():
    machine = Machine()
    rng = np.random.default_rng(0)

    def noisy() -> None:
        machine.now += 0.01 * rng.lognormal()

    found = in_turns(noisy, machine.run("b", 0.01), seconds=3, clock=machine.clock)
    assert found.high > 1.1 * found.low and 3 <= machine.now < 4


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
def test_the_interval_holds_the_median(values: list[float]):
    low, high = median_interval(np.array(values))
    assert min(values) <= low <= np.median(values) <= high <= max(values)


def test_the_interval_covers_the_true_median_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    draws = [median_interval(rng.lognormal(size=30)) for _ in range(1000)]
    assert np.mean([low <= 1 <= high for low, high in draws]) >= 0.94


def test_a_model_against_itself(path: Path):
    feed = random_feed(ir.load(path))
    found = paired_latency(path, ir.load(path), feed, seconds=0.3)
    assert 0.3 < found.ratio < 3 and found.low <= found.ratio <= found.high


def test_memory_and_latency_are_measured_in_a_process_of_its_own(tmp_path: Path):
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[1, 2048] x) => (float[1, 2048] y) '
    model = ir.from_onnx_text(text + "<float[1] w = {1}> { y = MatMul(x, w) }")
    weight = model.graph.initializers["w"]
    weight.const_value = ir.tensor(np.ones((2048, 2048), np.float32), name="w")
    weight.shape = ir.Shape((2048, 2048))
    ir.save(model, tmp_path / "big.onnx")
    found = measure(tmp_path / "big.onnx", seconds=0.1)
    assert found.size > 16e6
    assert 14e6 < found.peak_memory < 120e6, "the weights, and what ONNX Runtime adds"
    assert 0 < found.p50_ms <= found.p90_ms and found.runs >= 10


def test_bench_holds_every_model_against_the_first(path: Path, tmp_path: Path):
    other = tmp_path / "other.onnx"
    ir.save(ir.from_onnx_text(MODEL), other)
    first, second = bench([path, other], seconds=0.1, dims={"T": 3})
    assert first.against_first is None
    assert second.against_first and second.against_first.pairs >= 10


def test_a_model_that_does_not_run_is_told_in_one_sentence(path: Path):
    with pytest.raises(InputError, match=f"cannot measure {path}: ONNX Runtime cannot run"):
        measure(path, {"x": np.zeros((1, 1, 7), np.float32)}, seconds=0.1)


def test_a_made_up_feed_follows_the_inputs_and_the_seed():
    model = ir.from_onnx_text(MODEL)
    feed = random_feed(model, dims={"T": 5})
    assert {k: (v.shape, v.dtype) for k, v in feed.items()} == {
        "x": ((1, 5, 8), np.float32),
        "ids": ((1, 2), np.int64),
        "mask": ((1,), np.bool_),
    }
    assert set(np.unique(feed["ids"])) <= {0, 1}
    again, other = random_feed(model, dims={"T": 5}), random_feed(model, dims={"T": 5}, seed=1)
    assert np.array_equal(feed["x"], again["x"]) and not np.array_equal(feed["x"], other["x"])


@pytest.mark.parametrize("kind", ["string[N]", "seq(float[N])", "float"])
def test_what_cannot_be_made_up_is_told(kind: str):
    model = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]> g ({kind} x) => ({kind} y) {{ y = Identity(x) }}'
    )
    if kind == "float":
        model.graph.inputs[0].shape = None
    with pytest.raises(InputError, match="input 'x'"):
        random_feed(model)
