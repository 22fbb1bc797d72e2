import contextlib
import io
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from PIL import Image

from onnxcompress.data import Data, Images, Port, interface, open_data
from onnxcompress.data.sources import Once
from onnxcompress.errors import InputError

ZOO = Path(__file__).parents[2] / "shared" / "zoo"
F32, I64, U8 = (np.dtype(t) for t in (np.float32, np.int64, np.uint8))
ROW = (Port("x", F32, ("N", 3)),)
PAIR = (Port("ids", I64, ("N", "T")), Port("mask", I64, ("N", "T")))
STATEFUL = (
    Port("input", F32, (None, None)),
    Port("state", F32, (2, None, 4)),
    Port("sr", I64, ()),
)
PHOTO = (Port("image", F32, ("N", 3, 4, 6)),)


def rows(n: int, width: int = 3) -> np.ndarray:
    return np.arange(n * width, dtype=np.float32).reshape(n, width)


def values(data: Data, name: str = "x") -> np.ndarray:
    return np.concatenate([feed[name] for feed in data])


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_interface_leaves_out_initializers_that_are_inputs():
    model = ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N,3] x, int64[?] i, float[3] w = {1,2,3}) => (float[N,3] y) { y = Add(x, w) }
    """)
    w = model.graph.inputs[2]
    assert interface(model) == (Port("x", F32, ("N", 3)), Port("i", I64, (None,)))
    assert w.is_initializer()


def test_interface_refuses_what_is_no_tensor():
    model = ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (seq(float[N]) x) => (int64 y) { y = SequenceLength(x) }
    """)
    with pytest.raises(InputError, match="input 'x' is not a tensor"):
        interface(model)


# --- npz and npy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_rows_labels_and_reiteration(tmp_path: Path, save: Any):
    path = tmp_path / "d.npz"
    save(path, x=rows(5), labels=np.array([4, 3, 2, 1, 0]))
    data = open_data(path, ROW)
    assert len(data) == 5
    for _ in range(2):
        assert [f["x"].shape for f in data] == [(1, 3)] * 5
        np.testing.assert_array_equal(values(data), rows(5))
    assert data.labels is not None
    np.testing.assert_array_equal(data.labels, [4, 3, 2, 1, 0])
    np.testing.assert_array_equal(data.first(2).labels, [4, 3])


def test_npz_arrays_of_every_rank(tmp_path: Path):
    """One more axis is one feed a sample, 0-d is the same for all, as silero_vad needs it."""
    state = np.arange(5 * 8, dtype=np.float32).reshape(5, 2, 1, 4)
    path = saved(tmp_path / "d.npz", input=rows(5), state=state, sr=np.array(16000))
    data = open_data(path, STATEFUL)
    feed = list(data)[3]
    np.testing.assert_array_equal(feed["input"], rows(5)[3:4])
    np.testing.assert_array_equal(feed["state"], state[3])
    assert feed["sr"].shape == () and feed["sr"] == 16000
    assert [f["state"].shape for f in data.batches(4)] == [(2, 1, 4)] * 5


def test_a_labels_input_is_an_input_not_the_target():
    data = open_data({"labels": rows(2)}, (Port("labels", F32, ("N", 3)),))
    assert data.labels is None
    np.testing.assert_array_equal(values(data, "labels"), rows(2))


def test_stored_arrays_are_views_of_the_file_and_feeds_are_aligned(tmp_path: Path):
    np.save(tmp_path / "x.npy", rows(4))
    feed = next(iter(open_data(tmp_path / "x.npy", ROW)))["x"]
    assert not feed.flags.owndata and not feed.flags.writeable
    for pad in range(4):  # a zip puts elements at any byte
        path = saved(tmp_path / "d.npz", x=rows(4), labels=np.zeros(4))
        moved = tmp_path / f"{'p' * (pad + 1)}.npz"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(moved, "w") as new:
            new.writestr("p" * (pad + 1), b"")
            for name in old.namelist():
                new.writestr(name, old.read(name))
        data = open_data(moved, ROW)
        assert all(f["x"].flags.aligned and f["x"].flags.c_contiguous for f in data)
        np.testing.assert_array_equal(values(data), rows(4))


def test_fortran_order_big_endian_and_half_are_read_right(tmp_path: Path):
    for array in (np.asfortranarray(rows(4)), rows(4).astype(">f4"), rows(4).astype(np.float16)):
        data = open_data(saved(tmp_path / "d.npz", x=array), ROW)
        assert all(f["x"].dtype == F32 and f["x"].dtype.isnative for f in data)
        np.testing.assert_array_equal(values(data), rows(4))


def test_conversions_without_guessing_are_noted():
    data = open_data({"x": rows(2).astype(np.float64)}, ROW)
    assert data.notes == ("dict: array 'x' is converted from float64 to float32",)
    ids = np.ones((2, 4), np.int32)
    data = open_data({"ids": ids, "mask": ids.astype(np.int64)}, PAIR)
    assert next(iter(data))["ids"].dtype == I64
    assert len(data.notes) == 1 and not open_data({"x": rows(2)}, ROW).notes


def test_a_fixed_batch_is_filled_and_the_rest_noted():
    ports = (Port("x", F32, (4, 3)), Port("y", F32, (4, 3)), Port("t", F32, ("N", 3)))
    arrays = {"x": rows(10), "y": rows(10), "t": rows(10), "labels": np.arange(10)}
    data = open_data(arrays, ports)
    assert [{k: v.shape for k, v in f.items()} for f in data] == [dict.fromkeys("xyt", (4, 3))] * 2
    np.testing.assert_array_equal(data.labels, np.arange(8))
    assert "the last 2 samples do not fill" in data.notes[0]
    with pytest.raises(InputError, match="takes 4 samples at a time, there are fewer"):
        open_data({"x": rows(3)}, ports[:1])


def unreadable(kind: str, path: Path) -> None:
    header = io.BytesIO()
    if kind == "truncated":
        saved(path, x=rows(100))
        path.write_bytes(path.read_bytes()[:400])
    elif kind == "no zip":
        path.write_bytes(b"this is not a zip file")
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "pickled":
        np.savez(path, x=np.array([{"a": 1}], dtype=object))
    elif kind == "declares too much":
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 50, 3)}
        )
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", header.getvalue() + bytes(64))
    elif kind == "huge shape, compressed":
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 28, 3)}
        )
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", header.getvalue() + bytes(1 << 10))
    elif kind == "bomb":
        bomb(path)
    elif kind == "negative":
        header.write(b"\x93NUMPY\x01\x00")
        text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3)}\n"
        header.write(struct.pack("<H", len(text)) + text)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", header.getvalue())
    elif kind == "corrupted":
        np.savez_compressed(path, x=np.random.default_rng(0).random((20000, 3), np.float32))
        raw = bytearray(path.read_bytes())
        raw[100_000:100_020] = bytes(20)
        path.write_bytes(raw)


def bomb(path: Path) -> None:
    """64 MiB of zeros whose archive says that they are 1 TiB, as the header does."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 38,)}
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(1 << 26))
        archive.getinfo("x.npy").file_size = 1 << 40


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("truncated", "cannot be read as NumPy data, write it again"),
        ("no zip", "cannot be read as NumPy data"),
        ("empty file", "cannot be read as NumPy data"),
        ("pickled", "'x' holds pickled Python objects: save numbers"),
        ("declares too much", "declares .* bytes but the file holds 64: write it again"),
        ("huge shape, compressed", "declares .* bytes but the file holds 1024"),
        ("bomb", "array 'x' expands .* bytes to .*: save it with np.savez"),
        ("negative", "its header declares shape"),
        ("corrupted", "array 'x' cannot be read as NumPy data"),
    ],
)
def test_broken_and_hostile_files_are_one_sentence(tmp_path: Path, kind: str, complaint: str):
    path = tmp_path / "d.npz"
    unreadable(kind, path)
    with pytest.raises(InputError, match=complaint) as caught:
        list(open_data(path, ROW))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_read_or_refused(tmp_path_factory: Any, junk: bytes, npy: bool):
    folder = tmp_path_factory.getbasetemp()
    path = folder / ("junk.npy" if npy else "junk.npz")
    good = io.BytesIO()
    (np.save if npy else lambda f, a: np.savez(f, x=a))(good, rows(4))
    content = bytearray(good.getvalue())
    at = len(junk) * 7 % len(content)
    content[at : at + len(junk)] = junk
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        list(open_data(path, ROW))


@pytest.mark.zoo
@pytest.mark.skipif(not ZOO.is_dir(), reason="no zoo beside the checkout")
@pytest.mark.parametrize("name", ["silero_vad", "magika"])
def test_feeds_of_real_models_run(tmp_path: Path, name: str):
    with np.load(ZOO / name / "calib.npz") as stored:
        arrays = {k: stored[k] for k in stored.files if k in ("input", "state", "bytes")}
    if name == "magika":
        arrays["bytes"] = arrays["bytes"].astype(np.int32)
    else:
        arrays = {k: v.astype(np.float32) for k, v in arrays.items()}
        arrays["sr"] = np.array(16000)
    model = ir.load(ZOO / name / "model.onnx")
    data = open_data(saved(tmp_path / "d.npz", **arrays), interface(model))
    session = onnxruntime.InferenceSession(ZOO / name / "model.onnx")
    for feed in data.first(2):
        assert all(np.isfinite(np.asarray(out)).all() for out in session.run(None, feed))
    joined = next(data.batches(4))
    assert len(np.asarray(session.run(None, joined)[0])) == (4 if name == "magika" else 1)


# --- checks against the model --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "ports", "complaint"),
    [
        ({"y": rows(2)}, ROW, r"d.npz has no array 'x', there is 'y': the model's inputs are 'x'"),
        ({"x": rows(2), "xx": rows(2)}, ROW, r"'xx' is no input of the model, did you mean 'x'\?"),
        ({"x": rows(2, 4)}, ROW, r"'x' has shape \[2, 4\] .* float32\[\?,3\]: make dimension 1 3"),
        ({"x": np.zeros(3, np.float32)}, ROW, r"shape \[3\] .*give it 2 axes with the samples on"),
        ({"x": np.float32(3)}, ROW, r"shape \[\] .*give it 2 axes with the samples on"),
        ({"x": np.zeros((4, 1, 5), np.float32)}, ROW, r"each sample: array 'x' has shape \[1, 5\]"),
        ({"x": np.zeros((2, 3), np.uint8)}, ROW, r"is uint8 .* float32: convert and scale it"),
        ({"x": np.zeros((2, 3), bool)}, ROW, r"is bool but the model takes float32: convert"),
        ({"x": rows(0)}, ROW, r"'x' is empty: give it at least one sample"),
        ({"x": rows(2) + np.float32(np.inf)}, ROW, r"sample 0: array 'x' holds NaN or infinity"),
        ({"x": rows(2).astype(float) + 1e300}, ROW, r"'x' holds NaN or infinity as float32"),
        (
            {"ids": np.ones((3, 4), np.int64), "mask": np.ones((2, 4), np.int64)},
            PAIR,
            r"arrays do not have equally many samples: 'ids' 3, 'mask' 2",
        ),
        (
            {"x": rows(4), "labels": np.zeros(3)},
            ROW,
            r"equally many samples: 'x' 4, 'labels' 3",
        ),
        (
            {"i": np.array([[1 << 40]])},
            (Port("i", np.dtype(np.int32), (None, 1)),),
            r"'i' has values outside int32",
        ),
    ],
)
def test_what_does_not_suit_the_model_is_named(
    tmp_path: Path, arrays: dict[str, Any], ports: tuple[Port, ...], complaint: str
):
    with np.errstate(all="ignore"), pytest.raises(InputError, match=complaint) as caught:
        open_data(saved(tmp_path / "d.npz", **arrays), ports)
    assert "d.npz" in str(caught.value)


def test_nan_later_in_the_data_is_found_when_it_is_reached():
    x = rows(3)
    x[2, 1] = np.nan
    data = open_data({"x": x}, ROW)
    with pytest.raises(InputError, match="dict, sample 2: array 'x' holds NaN"):
        list(data)
    with pytest.raises(InputError, match="dict, sample 0 to 2: array 'x' holds NaN"):
        list(data.batches(3))


def test_a_bad_feed_anywhere_in_a_list_or_folder_is_found_on_opening(tmp_path: Path):
    feeds = [{"x": rows(1)}, {"x": rows(1, 4)}]
    with pytest.raises(InputError, match="list, feed 1: array 'x' has shape"):
        open_data(feeds, ROW)
    for i, feed in enumerate(feeds):
        saved(tmp_path / f"{i}.npz", **feed)
    with pytest.raises(InputError, match=r"1\.npz: array 'x' has shape"):
        open_data(tmp_path, ROW)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("nowhere.npz", "nowhere.npz does not exist"),
        ("x" * 5000, "xxx does not exist"),
        ([], "list is empty"),
        (3, "int is no data"),
        ([3], "list, feed 0 is of type int: give a dict"),
        ("no_such_module_at_all:f", "No module named"),
        ("math:no_such", "math has no 'no_such'"),
        ("nowhere.py:f", r"nowhere\.py does not exist"),
    ],
)
def test_sources_that_are_none(source: Any, complaint: str):
    with pytest.raises(InputError, match=complaint):
        open_data(source, ROW)


def test_files_that_are_no_data(tmp_path: Path):
    (tmp_path / "d.csv").write_text("1,2,3")
    with pytest.raises(InputError, match=r"d\.csv is neither \.npz, \.npy nor a folder"):
        open_data(tmp_path / "d.csv", ROW)
    with pytest.raises(InputError, match=r"holds no \.npz, images or test_data_set"):
        open_data(tmp_path, ROW)
    np.save(tmp_path / "x.npy", rows(2))
    with pytest.raises(InputError, match=r"x\.npy is one array but the model has 2 inputs"):
        open_data(tmp_path / "x.npy", PAIR)


# --- batches, parts, runs ------------------------------------------------------------------------


@given(st.integers(1, 20), st.integers(1, 9), st.sampled_from(["rows", "own axis", "list"]))
def test_batches_hold_all_rows_in_order(count: int, n: int, kind: str):
    x = rows(count)
    sources: dict[str, Any] = {"rows": {"x": x}, "own axis": {"x": x[:, None]}}
    source = sources.get(kind) or [{"x": x[i : i + 1]} for i in range(count)]
    batches = [b["x"] for b in open_data(source, ROW).batches(n)]
    np.testing.assert_array_equal(np.concatenate(batches), x)
    assert [len(b) for b in batches[:-1]] == [n] * (len(batches) - 1) and len(batches[-1]) <= n


def test_feeds_of_other_lengths_are_not_joined():
    feeds = [{"ids": np.ones((1, t), np.int64), "mask": np.ones((1, t), np.int64)} for t in
             (4, 4, 5, 5, 5, 4)]  # fmt: skip
    shapes = [b["ids"].shape for b in open_data(feeds, PAIR).batches(2)]
    assert shapes == [(2, 4), (2, 5), (1, 5), (1, 4)]


@pytest.mark.parametrize(
    "ports",
    [
        (Port("x", F32, (1, 3)),),
        (Port("x", F32, ("N", "N")),),
        (Port("x", F32, ("N", 3)), Port("y", F32, ("M", 3))),
        (Port("x", F32, None),),
    ],
)
def test_what_may_be_no_batch_axis_is_not_joined(ports: tuple[Port, ...]):
    feeds = [{p.name: rows(1) for p in ports} for _ in range(3)]
    assert [len(b["x"]) for b in open_data(feeds, ports).batches(3)] == [1, 1, 1]


@given(st.integers(2, 50), st.floats(0, 1))
def test_split_holds_the_end_out(count: int, fraction: float):
    x = rows(count)
    calibrate, evaluate = open_data({"x": x, "labels": np.arange(count)}, ROW).split(fraction)
    assert len(calibrate) > 0 and len(evaluate) > 0
    np.testing.assert_array_equal(np.concatenate([values(calibrate), values(evaluate)]), x)
    np.testing.assert_array_equal(evaluate.labels, np.arange(len(calibrate), count))


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 5))
def test_spread_takes_feeds_evenly(count: int, n: int, start: int):
    x = rows(count + start)
    data = replace(open_data({"x": x, "labels": np.arange(count + start)}, ROW), start=start)
    some = data.spread(n)
    assert len(some) == min(n, count)
    assert some.labels is not None
    np.testing.assert_array_equal(values(some), x[some.labels])
    gaps = np.diff([start, *some.labels, count + start])
    assert gaps[0] == 0 and gaps[1:].max() - gaps[1:].min() <= 1


def test_spread_takes_the_first_of_a_stream():
    data = open_data(lambda: ({"x": row} for row in rows(9)[:, None]), ROW)
    np.testing.assert_array_equal(values(data.spread(4)), rows(9)[:4])


def test_parts_of_parts():
    data = open_data({"x": rows(10)}, ROW)
    calibrate, evaluate = data.first(5).split()
    np.testing.assert_array_equal(values(evaluate), rows(10)[4:5])
    np.testing.assert_array_equal(values(calibrate.first(2)), rows(10)[:2])
    assert len(data.first(0)) == 0 and len(data.first(99)) == 10
    with pytest.raises(InputError, match="one feed, none can be held out"):
        data.first(1).split()


def test_a_generator_is_kept_while_it_is_read_and_can_be_read_again():
    def feeds():
        buffer = np.empty((1, 3), np.float32)
        for i in range(4):
            buffer[:] = rows(4)[i]
            yield {"x": buffer, "labels": i}  # the same buffer again: it must be copied

    data = open_data(feeds(), ROW)
    with pytest.raises(TypeError):
        len(data)
    assert data and data.size is None
    for _ in range(2):
        np.testing.assert_array_equal(values(data), rows(4))
    np.testing.assert_array_equal(data.labels, np.arange(4))
    once = open_data(feeds(), ROW)
    assert [(int(a["x"][0, 0]), int(b["x"][0, 0])) for a, b in zip(once, once, strict=True)] == [
        (i, i) for i in (0, 3, 6, 9)
    ]
    calibrate, evaluate = data.split(0.5)
    np.testing.assert_array_equal(values(evaluate), rows(4)[2:])
    np.testing.assert_array_equal(next(calibrate.batches(8))["x"], rows(4)[:2])


def test_an_iterator_too_large_to_keep_is_refused_a_second_time():
    source = Once(lambda: iter([{"x": rows(1)}] * 3), "reader", ROW, budget=20)
    assert len(list(source.items(0, None))) == 3
    with pytest.raises(InputError, match=r"reader can be read only once .*: pass a callable"):
        next(source.items(0, None))


def test_calibration_data_reader():
    class Reader:
        left = 3

        def get_next(self):
            self.left -= 1
            return {"x": rows(1)} if self.left >= 0 else None

    data = open_data(Reader(), ROW)
    assert [len(list(data)) for _ in range(2)] == [3, 3]


def test_callables_from_files_start_anew(tmp_path: Path):
    (tmp_path / "feeds.py").write_text(
        "import numpy as np\n"
        "def stream():\n"
        "    for i in range(3):\n"
        "        yield {'x': np.full((1, 3), i, np.float32)}\n"
        "def columns():\n"
        "    return {'x': np.ones((4, 3), np.float32), 'labels': np.arange(4)}\n"
        "def late():\n"
        "    yield {'x': np.ones((1, 3), np.float32)}\n"
        "    raise KeyError('photo')\n"
        "def early():\n"
        "    return 1 / 0\n"
    )
    name = f"{tmp_path / 'feeds.py'}:"
    data = open_data(name + "stream", ROW)
    assert [values(data)[:, 0].tolist() for _ in range(2)] == [[0, 1, 2]] * 2
    assert len(open_data(name + "columns", ROW)) == 4
    with pytest.raises(InputError, match="late failed after feed 0: KeyError: 'photo'"):
        list(open_data(name + "late", ROW))
    with pytest.raises(InputError, match="early failed: ZeroDivisionError"):
        open_data(name + "early", ROW)


def test_any_iterable_and_single_arrays():
    class Loader:
        def __iter__(self):
            return iter([rows(1), rows(1)])

    data = open_data(Loader(), ROW)
    assert [len(list(data)) for _ in range(2)] == [2, 2]
    assert open_data(data, ROW) is data


def test_plugins_open_their_own_names(monkeypatch: pytest.MonkeyPatch):
    class Point:
        name = value = "store"

        def load(self):
            return lambda rest, ports: [{ports[0].name: rows(int(rest))}]

    points = {"onnxcompress.data": {"store": Point()}}
    monkeypatch.setattr("onnxcompress.data.plugins", points.__getitem__)
    np.testing.assert_array_equal(values(open_data("store:7", ROW)), rows(7))


# --- folders -------------------------------------------------------------------------------------


def test_folder_of_npz_feeds(tmp_path: Path):
    for i, n in enumerate((1, 2)):
        saved(tmp_path / f"{i}.npz", x=rows(n), labels=np.full(n, i))
    data = open_data(tmp_path, ROW)
    assert [len(f["x"]) for f in data] == [1, 2]
    np.testing.assert_array_equal(data.labels, [0, 1, 1])
    saved(tmp_path / "2.npz", x=rows(1))
    with pytest.raises(InputError, match=r"2\.npz has no 'labels'"):
        _ = open_data(tmp_path, ROW).labels


def test_onnx_test_data_sets(tmp_path: Path):
    for i in (0, 1, 10, 2):
        folder = tmp_path / f"test_data_set_{i}"
        folder.mkdir()
        for k, array in enumerate((np.full((1, 2), i), np.ones((1, 2), np.int64))):
            tensor = numpy_helper.from_array(array.astype(np.int64))
            (folder / f"input_{k}.pb").write_bytes(tensor.SerializeToString())
        (folder / "output_0.pb").write_bytes(b"")
    data = open_data(tmp_path, PAIR)
    assert [int(f["ids"][0, 0]) for f in data] == [0, 1, 2, 10]
    assert len(open_data(tmp_path / "test_data_set_10", PAIR)) == 1
    with pytest.raises(InputError, match="'input_1' is no input of the model"):
        open_data(tmp_path, PAIR[:1])
    (tmp_path / "test_data_set_1" / "input_1.pb").write_bytes(b"\xff\xff\xff")
    with pytest.raises(InputError, match=r"input_1\.pb is not a tensor in ONNX form"):
        open_data(tmp_path, PAIR)


def test_a_test_tensor_may_not_point_to_another_file(tmp_path: Path):
    (tmp_path / "secret").write_bytes(bytes(12))
    tensor = onnx.TensorProto(data_type=1, dims=[1, 3], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=str(tmp_path / "secret"))
    (tmp_path / "input_0.pb").write_bytes(tensor.SerializeToString())
    with pytest.raises(InputError, match=r"input_0\.pb points to another file"):
        open_data(tmp_path, ROW)


def photo(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_images_are_scaled_normalized_and_laid_out(tmp_path: Path):
    photo(tmp_path / "cat" / "a.png", (255, 128, 0))
    photo(tmp_path / "dog" / "b.png", (0, 0, 255), (60, 40))
    how = Images(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.4), crop=1.0)
    data = open_data(tmp_path, PHOTO, images=how)
    np.testing.assert_array_equal(data.labels, [0, 1])
    first, second = (f["image"] for f in data)
    assert first.shape == (1, 3, 4, 6)
    want = (np.array([1, 128 / 255, 0]) - [0.5, 0.4, 0.3]) / [0.1, 0.2, 0.4]
    np.testing.assert_allclose(first[0].reshape(3, -1), np.tile(want[:, None], 24), rtol=1e-5)
    assert [b["image"].shape[0] for b in data.batches(8)] == [2]
    nhwc = (Port("image", F32, ("N", "H", "W", 3)),)
    bgr = Images(size=(4, 6), channels="BGR", scale=1.0)
    feeds = list(open_data(tmp_path, nhwc, images=bgr))
    assert feeds[1]["image"].shape == (1, 4, 6, 3)
    np.testing.assert_array_equal(feeds[1]["image"][0, 2, 3], [255, 0, 0])
    assert second.dtype == F32


def test_images_resize_crop_stretch_and_pad(tmp_path: Path):
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200  # the middle square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    ports = (Port("image", U8, ("N", 8, 8, 3)),)

    def pixels(**how: Any) -> np.ndarray:
        data = open_data(tmp_path, ports, images=Images(interpolation="nearest", **how))
        return next(iter(data))["image"][0, :, :, 0]

    np.testing.assert_array_equal(pixels(crop=1.0), np.full((8, 8), 200))
    np.testing.assert_array_equal(pixels(resize="stretch")[0], [0, 0, 200, 200, 200, 200, 0, 0])
    np.testing.assert_array_equal(pixels(resize="pad", fill=7)[:, 4], [7, 7] + [200] * 4 + [7, 7])


def test_gray_images_numeric_folders_label_files_and_fixed_batches(tmp_path: Path):
    for i, name in enumerate(("10", "9", "9")):
        photo(tmp_path / name / f"{i}.png", (90, 90, 90))
    ports = (Port("image", F32, (2, 1, 4, 6)),)
    data = open_data(tmp_path, ports, images=Images(channels="GRAY", scale=1.0))
    assert len(data) == 1 and "the last 1 images do not fill" in data.notes[0]
    np.testing.assert_array_equal(next(iter(data))["image"], np.full((2, 1, 4, 6), 90))
    np.testing.assert_array_equal(data.labels, [10, 9])
    labels = tmp_path / "labels.csv"
    labels.write_text("10/0.png,3\n9/1.png,4\n")
    with pytest.raises(InputError, match=r"labels\.csv has no label for 9/2\.png: add its line"):
        open_data(tmp_path, ports, images=Images(channels="GRAY", labels=str(labels)))
    labels.write_text("10/0.png,3\n9/1.png,4\n9/2.png,5\n")
    data = open_data(tmp_path, ports, images=Images(channels="GRAY", labels=str(labels)))
    np.testing.assert_array_equal(data.labels, [3, 4])


def test_images_that_cannot_be_used(tmp_path: Path):
    photo(tmp_path / "a.png", (1, 2, 3))
    how = Images()
    free = Port("image", F32, ("N", "C", "H", "W"))
    for ports, options, complaint in [
        (PHOTO, None, "tell how pixels become the input"),
        (PAIR, how, "holds images but the model has 2 inputs"),
        (ROW, how, "images need an input of 4 axes"),
        ((free,), how, "tell the images' layout"),
        ((free,), Images(layout="NCHW"), "tell the images' size"),
        (PHOTO, Images(size=(9, 9)), r"images of shape \[3, 9, 9\] do not fit input 'image'"),
        ((Port("image", U8, (1, 3, 4, 6)),), Images(std=(2.0,)), "leave out scale, mean and std"),
    ]:
        with pytest.raises(InputError, match=complaint):
            open_data(tmp_path, ports, images=options)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"b\.png cannot be decoded, remove it"):
        list(open_data(tmp_path, PHOTO, images=how))


def test_image_options_from_text():
    text = "size=[224, 224], mean=[0.485, 0.456, 0.406], channels='BGR', resize='stretch'"
    assert Images.from_text(text) == Images(
        size=(224, 224), mean=(0.485, 0.456, 0.406), channels="BGR", resize="stretch"
    )
    for wrong, complaint in [
        ("meen=[1.0]", "no option 'meen', did you mean 'mean'"),
        ("mean=1", "'mean' must be a list"),
        ("mean=[0.1, 0.2]", "mean must have 1 or 3 numbers for RGB"),
        ("channels='RBG'", "must be one of 'RGB', 'BGR', 'GRAY', not 'RBG', did you mean 'RGB'"),
        ("std=[0]", "std must not be 0"),
        ("crop=0", "crop must be over 0"),
        ("size=", "write them as"),
    ]:
        with pytest.raises(InputError, match=complaint):
            Images.from_text(wrong)
