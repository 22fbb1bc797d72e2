"""Observations of small models against numpy; merging, saving, executors."""

import itertools
import json
import math
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnxcompress.contract import Kind, Want
from onnxcompress.errors import InputError
from onnxcompress.numerics.exact_sum import ExactSum
from onnxcompress.observe import Observations, observe

MODEL = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N,3,4] x, bool c) => (float[N,3,4] y) <float[3,1] w = {1, 2, 3}> {
  h = Mul(x, w)
  r = Relu(h)
  z = Cast<to=16>(r)
  i = Cast<to=7>(r)
  y = If(c) <
    then_branch = t () => (float[N,3,4] a) { inner = Neg(r)
      a = Neg(inner) },
    else_branch = e () => (float[N,3,4] b) { b = Abs(r) }>
}"""
WANTS = [
    *(Want(name) for name in ("x", "w", "h", "r", "z", "i", "y")),
    Want("h", Kind.MEAN, 1),
    Want("h", Kind.CHANNEL_RANGE, -2),
]


def model():
    return ir.from_onnx_text(MODEL)


def feeds(count=37):
    rng = np.random.default_rng(0)
    return [
        {"x": rng.standard_normal((n % 3 + 1, 3, 4), dtype=np.float32), "c": np.array(n % 2 == 0)}
        for n in range(count)
    ]


def content(observations, tmp_path):
    observations.save(tmp_path / "s.npz")
    return (tmp_path / "s.npz").read_bytes()


def test_what_is_kept_is_what_numpy_finds():
    found = observe(model(), feeds(), WANTS)
    assert not found.missing(WANTS)
    x = np.concatenate([feed["x"] for feed in feeds()])
    h = x * np.array([[1], [2], [3]], np.float32)
    for name, value in {"x": x, "h": h, "r": np.maximum(h, 0), "y": np.maximum(h, 0)}.items():
        histogram = found.histogram(name)
        assert (histogram.minimum, histogram.maximum) == (value.min(), value.max())
        assert histogram.total == value.size
    assert found.histogram("z").maximum == pytest.approx(h.max(), rel=0.01)
    assert found.histogram("i").maximum == math.floor(h.max())
    assert found.histogram("w").total == 3
    np.testing.assert_allclose(found.mean("h", 1), h.astype(float).mean((0, 2)), rtol=1e-12)
    low, high = found.channel_range("h", -2)
    np.testing.assert_array_equal(low, h.min((0, 2)))
    np.testing.assert_array_equal(high, h.max((0, 2)))


def test_order_and_sharding_change_no_bit(tmp_path):
    whole = content(observe(model(), feeds(), WANTS), tmp_path)
    assert content(observe(model(), feeds()[::-1], WANTS), tmp_path) == whole
    shards = [observe(model(), feeds()[i::3], WANTS[:1] + WANTS[2:]) for i in range(3)]
    merged = {content(a.merge(b.merge(c)), tmp_path) for a, b, c in itertools.permutations(shards)}
    merged.add(content(shards[0].merge(shards[1]).merge(shards[2]), tmp_path))
    assert len(merged) == 1


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_an_executor_changes_no_bit(kind, tmp_path):
    here = content(observe(model(), feeds(), WANTS), tmp_path)
    pool = (
        ThreadPoolExecutor(2)
        if kind == "threads"
        else ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    )
    with pool as executor:
        there = observe(model(), feeds(), WANTS, executor=executor)
    assert content(there, tmp_path) == here


def test_progress_counts_feeds():
    calls = []
    observe(model(), feeds(5), WANTS, total=5, progress=lambda *call: calls.append(call))
    assert calls == [(n, 5) for n in range(1, 6)]


def test_feeds_are_drawn_as_they_are_needed():
    drawn, done = [0], []

    def source():
        for feed in feeds(60):
            drawn[0] += 1
            yield feed

    observe(model(), source(), WANTS, progress=lambda n, _: done.append(drawn[0] - n))
    assert max(done) <= 12


def test_what_cannot_be_observed_is_missing_with_a_reason():
    unreachable = [Want("nope"), Want("x", Kind.MEAN, 0), Want("x", Kind.MEAN, 7)]
    found = observe(model(), feeds(), [*unreachable, Want("x")])
    assert found.missing([*unreachable, Want("x")]) == unreachable
    assert "not a value of the model" in found.reasons[Want("nope")]
    assert "changes from feed to feed" in found.reasons[Want("x", Kind.MEAN, 0)]
    assert "no axis 7" in found.reasons[Want("x", Kind.MEAN, 7)]
    with pytest.raises(InputError, match="not a value of the model"):
        found.histogram("nope")
    with pytest.raises(InputError, match="asked"):
        found.mean("x", 1)


def test_strings_sequences_and_infinities_are_missing_not_fatal():
    graph = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
    g (float[N] x) => (float[N] y) <float zero = {0}> {
      s = Cast<to=8>(x)
      q = SequenceConstruct(x, x)
      big = Div(x, zero)
      y = Neg(x)
    }""")
    wants = [Want(name) for name in ("s", "q", "big", "y")]
    found = observe(graph, [{"x": np.array([1, -2], np.float32)}], wants)
    assert [want.value for want in found.missing(wants)] == ["s", "q", "big"]
    assert "infinite" in found.reasons[Want("big")]


@pytest.mark.parametrize("want", [Want("x"), Want("h"), Want("h", Kind.MEAN, 1)])
def test_nan_names_the_value_and_the_feed(want):
    bad = feeds(6)
    bad[4]["x"][0, 1, 2] = np.nan
    with pytest.raises(InputError, match=f"'{want.value}' holds NaN in feed 4"):
        observe(model(), bad, [want])


def test_no_data_is_refused():
    with pytest.raises(InputError, match="no data"):
        observe(model(), [], WANTS)


def test_a_channel_statistic_needs_an_axis():
    with pytest.raises(InputError, match="axis"):
        observe(model(), feeds(1), [Want("x", Kind.MEAN)])


def test_saving_and_loading_changes_nothing(tmp_path):
    found = observe(model(), feeds(), [*WANTS, Want("inner")])
    before = content(found, tmp_path)
    loaded = Observations.load(tmp_path / "s.npz")
    assert loaded.reasons == found.reasons
    assert content(loaded, tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.npz"]


def test_a_file_that_is_no_statistics_is_one_sentence(tmp_path):
    path = tmp_path / "s.npz"
    observe(model(), feeds(3), WANTS).save(path)
    whole = path.read_bytes()
    with np.load(path) as arrays_:
        good = dict(arrays_)
    manifest = json.loads(str(good["manifest"]))

    def fails():
        with pytest.raises(InputError, match=r"s\.npz"):
            Observations.load(path)

    for size in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        fails()
    for change in (
        {"counts": good["counts"][:-1]},
        {"counts": good["counts"].astype(np.int32)},
        {"counts": -good["counts"]},
        {"buckets": good["buckets"][::-1]},
        {"extremes": np.full_like(good["extremes"], np.nan)},
        {"manifest": np.array(json.dumps(manifest | {"schema": 2}))},
        {"manifest": np.array("{}")},
        {"manifest": np.array({"a": 1}, dtype=object)},
    ):
        np.savez(path, allow_pickle=True, **(good | change))
        fails()
    np.savez_compressed(path, **good)
    fails()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'")
    fails()
    path.unlink()
    fails()


def test_statistics_that_cannot_be_written_are_one_sentence(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        observe(model(), feeds(1), WANTS).save(tmp_path / "nowhere" / "s.npz")


terms = st.lists(
    arrays(
        np.float32,
        (2, 3, 4),
        elements=st.floats(
            width=32,
            allow_nan=False,
            allow_infinity=False,
            max_value=2.0**100,
            min_value=-(2.0**100),
        ),
    ),
    min_size=1,
    max_size=6,
)


@given(terms, st.randoms())
def test_sums_are_exact_in_any_order(parts, random):
    sums = [ExactSum.of(part) for part in parts]
    exact = [math.fsum(float(part.sum((0, 2), np.float64)[c]) for part in parts) for c in range(3)]
    whole = sums[0]
    for each in sums[1:]:
        whole = whole.merge(each)
    random.shuffle(sums)
    shuffled = sums[0]
    for each in sums[1:]:
        shuffled = each.merge(shuffled)
    np.testing.assert_array_equal(whole.words, shuffled.words)
    np.testing.assert_allclose(
        whole.mean() * whole.count, exact, rtol=1e-14, atol=len(parts) * 2.0**-101
    )
