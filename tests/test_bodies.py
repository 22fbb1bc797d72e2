"""Values inside bodies are observed as if each visit were a run of its own."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx.backend.test.case.node as node_tests
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress import schemes
from onnxcompress.contract import Kind, Want
from onnxcompress.errors import InputError
from onnxcompress.graph.bodies import expose
from onnxcompress.numerics.row_sample import Patches
from onnxcompress.observe import Observations, observe
from onnxcompress.pipeline import run
from onnxcompress.session import Session
from tests.passes.exactness import Net

Feed = dict[str, Any]
Floats = np.ndarray[Any, np.dtype[np.float32]]
PATCHES = Patches(rows=64, rows_each=4)

BRANCHES = """<ir_version: 8, opset_import: ["" : 13]>
g (float[N,3] x, bool c, bool d) => (float[N,3] y) {
  y = If(c) <
    then_branch = t () => (float[N,3] a) { yes = Add(x, x)  a = Neg(yes) },
    else_branch = e () => (float[N,3] b) {
      b = If(d) <
        then_branch = p () => (float[N,3] u) { deep = Abs(x)  u = Neg(deep) },
        else_branch = q () => (float[N,3] v) { v = Identity(x) }> }>
}"""
LOOP = """<ir_version: 8, opset_import: ["" : 13]>
g (float[N,3] x, int64 n) => (float[M,3] y, float[K] all) <bool on = {1}, int64 two = {2}> {
  y, all = Loop(n, on, x) <body = b (int64 i, bool go, float[A,3] state) =>
                                   (bool go_on, float[B,3] next, float number) {
    go_on = Identity(go)
    m = Mod(i, two)
    number = Cast<to=1>(m)
    odd = Cast<to=9>(m)
    next = If(odd) <
      then_branch = t () => (float[C,3] a) { longer = Concat<axis=0>(state, x)  a = Neg(longer) },
      else_branch = e () => (float[D,3] b) { b = Abs(state) }> }>
}"""
SCAN = """<ir_version: 8, opset_import: ["" : 13]>
g (float[3] h, float[T,3] x) => (float[3] y, float[T,3] z) {
  y, z = Scan<num_scan_inputs = 1, scan_output_axes = [0], body = b (float[3] s, float[3] e) =>
                                                              (float[3] t, float[3] o) {
    sum = Add(s, e)
    t = Neg(sum)
    o = Abs(e) }>(h, x)
}"""


def everything(name: str) -> list[Want]:
    kinds = (Kind.MEAN, Kind.CHANNEL_RANGE)
    rows = Want(name, Kind.ROWS, patches=PATCHES)
    return [Want(name), *(Want(name, kind, -1) for kind in kinds), rows]


def assert_as_if_fed(found: Observations, name: str, visits: Sequence[Floats]) -> None:
    """What was observed of `name` is what observing each visit's array by itself gives."""
    net = Net()
    net.output(net.op("Neg", net.input(name, *visits[0].shape)))
    model = ir.from_proto(net.model())
    model.graph.inputs[0].shape = ir.Shape([None] * visits[0].ndim)
    model.graph.outputs[0].shape = None
    expected = observe(model, [{name: visit} for visit in visits], everything(name))
    assert not found.missing(everything(name))
    mine, theirs = found.histogram(name), expected.histogram(name)
    assert (mine.minimum, mine.maximum) == (theirs.minimum, theirs.maximum)
    np.testing.assert_array_equal(mine.buckets, theirs.buckets)
    np.testing.assert_array_equal(mine.counts, theirs.counts)
    np.testing.assert_array_equal(found.mean(name, -1), expected.mean(name, -1))
    mine, theirs = found.channel_range(name, -1), expected.channel_range(name, -1)
    np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(found.rows(name, PATCHES), expected.rows(name, PATCHES))


def floats(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def branch_feeds(count: int = 12) -> list[Feed]:
    return [
        {"x": floats(n % 3 + 1, 3, seed=n), "c": np.array(n % 2 == 0), "d": np.array(n % 3 == 0)}
        for n in range(count)
    ]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_branches_are_observed_where_they_are_taken(elsewhere: bool) -> None:
    feeds, wants = branch_feeds(), everything("yes") + everything("deep")
    with ThreadPoolExecutor(2) as pool:
        executor = pool if elsewhere else None
        found = observe(ir.from_onnx_text(BRANCHES), feeds, wants, executor=executor)
    assert_as_if_fed(found, "yes", [f["x"] + f["x"] for f in feeds if f["c"]])
    assert_as_if_fed(found, "deep", [np.abs(f["x"]) for f in feeds if not f["c"] and f["d"]])


def test_a_branch_that_no_feed_takes_is_missing() -> None:
    feeds = [feed | {"c": np.array(True)} for feed in branch_feeds(3)]
    found = observe(ir.from_onnx_text(BRANCHES), feeds, [Want("yes"), Want("deep")])
    assert found.missing([Want("yes"), Want("deep")]) == [Want("deep")]


def looped(x: Floats, times: int) -> dict[str, list[Floats]]:
    found: dict[str, list[Floats]] = {"state": [], "longer": [], "next": []}
    state = x
    for i in range(times):
        found["state"].append(state)
        if i % 2:
            found["longer"].append(np.concatenate([state, x]))
            state = -found["longer"][-1]
        else:
            state = np.abs(state)
        found["next"].append(state)
    return found


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(lambda t: max(t) > 1))
def test_iterations_are_observed_one_by_one(times: list[int]) -> None:
    feeds = [{"x": floats(2, 3, seed=n), "n": np.array(t)} for n, t in enumerate(times)]
    visits = [looped(feed["x"], t) for feed, t in zip(feeds, times, strict=True)]
    names = ("state", "longer", "next")
    wants = [want for name in names for want in everything(name)]
    found = observe(ir.from_onnx_text(LOOP), feeds, wants)
    for name in names:
        assert_as_if_fed(found, name, [array for v in visits for array in v[name]])


def test_a_scan_is_observed_one_by_one() -> None:
    feeds = [{"h": floats(3, seed=n), "x": floats(n + 1, 3, seed=9)} for n in range(4)]
    sums: list[Floats] = []
    for feed in feeds:
        state = feed["h"]
        for row in feed["x"]:
            sums.append(state + row)
            state = -sums[-1]
    found = observe(ir.from_onnx_text(SCAN), feeds, everything("sum") + everything("e"))
    assert_as_if_fed(found, "sum", sums)
    assert_as_if_fed(found, "e", [row for feed in feeds for row in feed["x"]])


@pytest.mark.parametrize("text", [BRANCHES, LOOP, SCAN])
@pytest.mark.parametrize("optimization", ["none", "all"])
def test_the_function_stays(text: str, optimization: Any) -> None:
    model = ir.from_onnx_text(text)
    before = ir.to_proto(model).SerializeToString()
    inner = [v.name or "" for g in model.graph.subgraphs() for n in g for v in n.outputs]
    exposed = expose(model, inner)
    assert ir.to_proto(model).SerializeToString() == before
    assert set(exposed.depths) | set(exposed.reasons) == set(inner) and not exposed.reasons
    values = {v.name: v for v in model.graph.inputs}
    feed = {"x": floats(2, 3), "h": floats(3), "n": np.array(3)}
    feed |= {"c": np.array(False), "d": np.array(True)}
    feed = {name: array for name, array in feed.items() if name in values}
    outputs = [v.name or "" for v in model.graph.outputs]
    expected = Session(model, optimization="none").run(feed)
    found = Session(exposed.model, optimization=optimization, outputs=[*outputs, *inner]).run(feed)
    for name in outputs:
        np.testing.assert_array_equal(found[name], expected[name])


NESTED = """<ir_version: 8, opset_import: ["" : 13]>
g (float[4,2,3] x, int64 n) => (float[K,4,2,3] y) <bool on = {1}> {
  y = Loop(n, on) <body = outer (int64 i, bool go) => (bool go_on, float[4,2,3] z) {
    go_on = Identity(go)
    z = Scan<num_scan_inputs = 1, body = middle (float[2,3] e) => (float[2,3] f) {
      f = Scan<num_scan_inputs = 1, body = inner (float[3] p) => (float[3] q) {
        q = Neg(p) }>(e) }>(x) }>
}"""


def test_scans_within_a_loop_are_unstacked() -> None:
    x = floats(4, 2, 3)
    found = observe(
        ir.from_onnx_text(NESTED),
        [{"x": x, "n": np.array(2)}],
        [*everything("q"), Want("f", Kind.MEAN, 0)],
    )
    assert_as_if_fed(found, "q", [-row for row in np.concatenate([x, x]).reshape(-1, 3)])
    np.testing.assert_allclose(found.mean("f", 0), -x.mean(axis=(0, 2), dtype=np.float64))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("b (float[3] e) => (int64[2,K] inside) { inside = NonZero(e) }", "shape may change"),
        (
            """b (float[3] e) => (float[3] f) { f = If(c) <
                 then_branch = t () => (float[3] a) { inside = Neg(e)  a = Neg(inside) },
                 else_branch = u () => (float[3] o) { o = Abs(e) }> }""",
            "within a Scan",
        ),
        ("b (float[3] e) => (float[3] f) { inside = Cast<to=16>(e)  f = Abs(e) }", "of known type"),
    ],
)
def test_what_cannot_come_out_has_a_reason(body: str, reason: str) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 13]> g (float[4,3] x, bool c) => (float z) {{
      y = Scan<num_scan_inputs = 1, body = {body}>(x)
      z = ReduceSum<keepdims=0>(x) }}"""
    feeds = [{"x": floats(4, 3), "c": np.array(True)}]
    want = Want("inside")
    model = ir.from_onnx_text(text)
    if "NonZero" in body:
        feeds[0]["x"][:] = 1  # all iterations give the same shape, so that the model runs
    assert reason in observe(model, feeds, [want]).reasons[want]


def test_a_name_of_several_values_is_nobodys() -> None:
    text = BRANCHES.replace("deep", "yes")
    found = observe(ir.from_onnx_text(text), branch_feeds(), [Want("yes")])
    assert "several values" in found.reasons[Want("yes")]


def corpus() -> Iterator[tuple[ir.Model, list[Feed]]]:
    """The onnx wheel's own models with bodies, of those modules that are about them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in ("if_", "loop", "scan"):
            importlib.import_module(f"{node_tests.__name__}.{module}")
    for test in sorted(node_tests._NodeTestCases, key=lambda t: t.name):
        if any(a.HasField("g") for node in test.model.graph.node for a in node.attribute):
            names = [v.name for v in test.model.graph.input]
            feeds = [dict(zip(names, inputs, strict=True)) for inputs, _ in test.data_sets]
            yield ir.from_proto(test.model), feeds


def test_models_of_the_wheel_run_as_before() -> None:
    """With all of their inner values given out, and quantized statically."""
    ran = seen = 0
    for model, feeds in corpus():
        try:
            session = Session(model)
            expected = [session.run(feed) for feed in feeds]
        except InputError:
            continue
        ran += 1
        inner = [v.name or "" for g in model.graph.subgraphs() for n in g for v in n.outputs]
        exposed = expose(model, inner)
        seen += len(exposed.depths)
        passes = schemes.static(effort="thorough")
        watch = lambda m, wants, feeds=feeds: observe(m, feeds, wants)  # noqa: E731
        for after in (exposed.model, run(model, passes, observer=watch).model):
            again = Session(after, outputs=[*expected[0]])
            for feed, outputs in zip(feeds, expected, strict=True):
                np.testing.assert_equal(again.run(feed), outputs)
    assert ran > 5 and seen > 5
