"""Models load as they are, bad ones are refused in a sentence, files are whole or absent."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress import model_io
from onnxcompress.errors import InputError, OnnxCompressError
from onnxcompress.model_io import atomic, wire, writing
from onnxcompress.model_io.mapped import MappedTensor
from tests.benchmarks import scale

WEIGHT = np.random.default_rng(0).normal(size=(160, 160)).astype(np.float32)  # 100 KiB


def make(
    nodes: str = "y = MatMul(x, w)",
    initializers: dict[str, np.ndarray] | None = None,
    opset: int = 17,
) -> onnx.ModelProto:
    header = f'<ir_version: 8, opset_import: ["": {opset}]>'
    text = f"{header} g (float[n,160] x) => (float[n,160] y) {{ {nodes} }}"
    model = onnx.parser.parse_model(text)
    arrays = {"w": WEIGHT} if initializers is None else initializers
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    return model


def run(path: Path) -> np.ndarray:
    x = np.linspace(-1, 1, 320, dtype=np.float32).reshape(2, 160)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.fixture
def inline(tmp_path: Path) -> Path:
    path = tmp_path / "inline.onnx"
    onnx.save(make(), path)
    return path


@pytest.fixture
def external(tmp_path: Path) -> Path:
    path = tmp_path / "external.onnx"
    onnx.save(make(), path, save_as_external_data=True, location="weights.bin")
    return path


def weight(model: ir.Model) -> ir.TensorProtocol:
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    return tensor


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        model_io.load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and "Traceback" not in message
    assert caught.value.exit_code == 2
    return message


# loading


@pytest.mark.parametrize("name", ["inline", "external"])
def test_weights_stay_in_the_file_and_survive_the_removal_of_its_name(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
):
    model = model_io.load(request.getfixturevalue(name))
    assert isinstance(weight(model), MappedTensor)
    for path in tmp_path.iterdir():
        path.unlink()
    np.testing.assert_array_equal(weight(model).numpy(), WEIGHT)
    assert weight(model).tobytes() == WEIGHT.tobytes()
    assert not weight(model).numpy().flags.writeable


@pytest.mark.parametrize("suffix", [".onnxtxt", ".textproto", ".json", ".pb"])
def test_text_forms_and_other_suffixes_load(suffix: str, tmp_path: Path):
    path, out = tmp_path / f"m{suffix}", tmp_path / "m.onnx"
    onnx.save(make("y = Relu(x)", {}), path)
    model_io.save(model_io.load(path), out)
    assert run(out).min() == 0


def test_ir_version_3_keeps_initializers_that_are_inputs(tmp_path: Path):
    model = make(opset=7)
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [160, 160]))
    onnx.save(model, tmp_path / "m.onnx")
    model_io.save(model_io.load(tmp_path / "m.onnx"), tmp_path / "n.onnx")
    saved = onnx.load(tmp_path / "n.onnx")
    assert saved.ir_version == 3 and [v.name for v in saved.graph.input] == ["x", "w"]
    np.testing.assert_array_equal(run(tmp_path / "n.onnx"), run(tmp_path / "m.onnx"))


def test_functions_metadata_and_custom_domains_stay(tmp_path: Path):
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "local": 1, "com.example": 3],
            metadata_props: ["author": "me"], producer_name: "p">
        g (float[n,160] x) => (float[n,160] y) { h = local.f(x) y = com.example.Odd<k=2>(h) }
        <opset_import: ["": 17], domain: "local"> f (a) => (b) { b = Relu(a) }"""
    )
    onnx.save(model, tmp_path / "m.onnx")
    model_io.save(model_io.load(tmp_path / "m.onnx"), tmp_path / "n.onnx")
    saved = onnx.load(tmp_path / "n.onnx")
    for kept, was in ((saved.graph, model.graph), (saved.functions[0], model.functions[0])):
        assert [(n.domain, n.op_type, n.attribute) for n in kept.node] == [
            (n.domain, n.op_type, n.attribute) for n in was.node
        ]
    assert saved.metadata_props == model.metadata_props and saved.producer_name == "p"
    assert {o.domain: o.version for o in saved.opset_import} == {
        "": 17,
        "local": 1,
        "com.example": 3,
    }


def test_sparse_initializers_and_constants_become_dense(tmp_path: Path):
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("s", TensorProto.FLOAT, [2], [1.0, 2.0]),
        helper.make_tensor("i", TensorProto.INT64, [2, 2], [0, 1, 0, 3]),
        [1, 160],
    )
    model = make("a = Add(x, s) y = Add(a, c)", {})
    model.graph.sparse_initializer.append(sparse)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], sparse_value=sparse))
    onnx.save(model, tmp_path / "m.onnx")
    loaded = model_io.load(tmp_path / "m.onnx")
    model_io.save(loaded, tmp_path / "n.onnx")
    x = np.linspace(-1, 1, 320, dtype=np.float32).reshape(2, 160)
    x[:, 1] += 2
    x[:, 3] += 4
    np.testing.assert_allclose(run(tmp_path / "n.onnx"), x, rtol=1e-6)


def test_map_types_survive(tmp_path: Path):
    entry = onnx.TypeProto.Map(
        key_type=TensorProto.INT64, value_type=helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    )
    kind = helper.make_sequence_type_proto(onnx.TypeProto(map_type=entry))
    model = make("z = ai.onnx.ml.ZipMap<classlabels_int64s=[3]>(x)", {})
    del model.graph.output[:]
    model.graph.output.append(helper.make_value_info("z", kind))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    onnx.save(model, tmp_path / "m.onnx")
    model_io.save(model_io.load(tmp_path / "m.onnx").clone(), tmp_path / "n.onnx")
    assert onnx.load(tmp_path / "n.onnx").graph.output[0].type == kind


def test_large_constants_and_weights_in_subgraphs_are_mapped_and_saved(tmp_path: Path):
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "v"], ["o"])],
        "body",
        [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(WEIGHT, "v")],
    )
    model = make("", {"c": np.array(True)})
    model.graph.node.extend(
        [
            helper.make_node("If", ["c"], ["h"], then_branch=body, else_branch=body),
            helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(WEIGHT)),
            helper.make_node("MatMul", ["h", "k"], ["y"]),
        ]
    )
    onnx.save(model, tmp_path / "m.onnx")
    loaded = model_io.load(tmp_path / "m.onnx")
    constant = loaded.graph[1].attributes["value"].as_tensor()
    assert isinstance(constant, MappedTensor)
    model_io.save(loaded, tmp_path / "n.onnx")
    np.testing.assert_array_equal(run(tmp_path / "n.onnx"), run(tmp_path / "m.onnx"))
    assert loaded.graph[1].attributes["value"].as_tensor() is constant
    names = [v.name for g in loaded.graph.subgraphs() for v in g.initializers.values()]
    assert names == ["v", "v_1"]


def test_inner_names_become_unique_and_outer_ones_stay(tmp_path: Path):
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (bool c, float[n] x) => (float[n] y, float[n] h_1) {
            h = Relu(x) h_1 = Neg(h)
            y = If (c) <then_branch = a () => (float[n] t) { u = Abs(h) t = Neg(u) },
                        else_branch = b () => (float[n] t) { u = Neg(h_1) t = Exp(u) }> }"""
    )
    onnx.save(model, tmp_path / "m.onnx")
    loaded = model_io.load(tmp_path / "m.onnx")
    inner = [v.name for g in loaded.graph.subgraphs() for node in g for v in node.outputs]
    assert len(set(inner)) == 4
    assert [o.name for node in loaded.graph for o in node.outputs] == ["h", "h_1", "y"]
    model_io.save(loaded, tmp_path / "n.onnx")
    onnx.checker.check_model(str(tmp_path / "n.onnx"))


@pytest.mark.parametrize("dtype", ["INT4", "UINT4", "FLOAT8E4M3FN", "BFLOAT16", "FLOAT16", "INT64"])
def test_every_dtype_reads_the_same_from_the_file(dtype: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(wire, "STREAMED", 16)
    kind = ir.DataType[dtype]
    tensor = ir.tensor(np.arange(-8, 8).astype(kind.numpy()).reshape(4, 4), dtype=kind, name="w")
    model = make("y = Relu(x)", {})
    model.graph.initializer.append(ir.to_proto(tensor))
    model.graph.initializer.append(helper.make_tensor("pad", TensorProto.INT8, [3], [1, 2, 3]))
    onnx.save(model, tmp_path / "m.onnx")
    found = weight(model_io.load(tmp_path / "m.onnx"))
    assert found.dtype == kind and found.tobytes() == tensor.tobytes()
    assert (found.numpy() == tensor.numpy()).all()


def test_a_link_to_a_model_finds_the_data_beside_the_real_one(external: Path, tmp_path: Path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "m.onnx"
    link.symlink_to(external)
    data = tmp_path / "links" / "weights.bin"
    data.symlink_to(external.parent / "weights.bin")  # as the caches of model hubs are laid out
    np.testing.assert_array_equal(weight(model_io.load(link)).numpy(), WEIGHT)


def test_size_counts_each_data_file_once(external: Path, inline: Path):
    data = external.parent / "weights.bin"
    assert model_io.size_on_disk(external) == external.stat().st_size + data.stat().st_size
    assert model_io.size_on_disk(inline) == inline.stat().st_size


# bad input


def test_a_missing_file_a_folder_and_an_empty_file(tmp_path: Path):
    assert "does not exist" in refusal(tmp_path / "none.onnx")
    assert "folder" in refusal(tmp_path)
    (tmp_path / "empty.onnx").touch()
    assert "empty" in refusal(tmp_path / "empty.onnx")


def test_a_pipe_does_not_hang(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "regular file" in refusal(tmp_path / "pipe.onnx")


@pytest.mark.parametrize(
    "content",
    [
        np.random.default_rng(1).bytes(5000),
        b"import torch\n" * 100,
        numpy_helper.from_array(WEIGHT, "w").SerializeToString(),
        make().graph.SerializeToString(),
        b"\x08\x08" * 50,
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        make().SerializeToString() + b"\x00",
    ],
    ids=["random", "text", "tensor", "graph", "numbers", "huge length", "tail"],
)
def test_what_is_not_a_model(content: bytes, tmp_path: Path):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    assert "not a whole ONNX model" in refusal(path)


def test_a_model_cut_off_anywhere(tmp_path: Path):
    whole = make().SerializeToString()
    path = tmp_path / "m.onnx"
    for length in {1, 2, 5, 20, 40, 1000, *range(len(whole) - 80, len(whole))}:
        path.write_bytes(whole[:length])
        refusal(path)


@pytest.mark.parametrize("suffix", [".onnxtxt", ".textproto", ".json"])
def test_broken_text(suffix: str, tmp_path: Path):
    (tmp_path / f"m{suffix}").write_text("g (float x => {")
    refusal(tmp_path / f"m{suffix}")


def test_an_old_ir_version(tmp_path: Path):
    model = make()
    model.ir_version = 2
    onnx.save(model, tmp_path / "m.onnx")
    assert "IR version 2" in refusal(tmp_path / "m.onnx")


def declare(path: Path, change: Callable[[onnx.TensorProto], object]) -> Path:
    model = onnx.load(path, load_external_data=False)
    change(model.graph.initializer[0])
    path.write_bytes(model.SerializeToString())
    return path


def entry(key: str, value: str) -> Callable[[onnx.TensorProto], object]:
    def change(tensor: onnx.TensorProto) -> None:
        kept = [(e.key, e.value) for e in tensor.external_data if e.key != key]
        del tensor.external_data[:]
        for k, v in [*kept, (key, value)]:
            tensor.external_data.add(key=k, value=v)

    return change


@pytest.mark.parametrize("location", ["/etc/passwd", "../weights.bin", "a/../../x", ""])
def test_data_outside_the_folder(location: str, external: Path):
    assert "not in its folder" in refusal(declare(external, entry("location", location)))


def test_a_link_that_leads_outside(external: Path, tmp_path_factory: pytest.TempPathFactory):
    data = external.parent / "weights.bin"
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "w"
    data.rename(elsewhere)
    data.symlink_to(elsewhere)
    assert "not in its folder" in refusal(external)


def test_data_that_is_missing_a_folder_or_too_short(external: Path):
    data = external.parent / "weights.bin"
    data.write_bytes(data.read_bytes()[:-1])
    message = refusal(external)
    assert "'w'" in message and "102399 bytes" in message
    data.unlink()
    assert str(data) in refusal(external)
    data.mkdir()
    assert str(data) in refusal(external)


@pytest.mark.parametrize(
    "change",
    [
        entry("offset", "8"),
        entry("offset", "-8"),
        entry("offset", str(1 << 62)),
        entry("length", "8"),
        entry("length", "many"),
        lambda t: t.dims.append(1 << 40),
        lambda t: t.dims.extend([-1]),
        lambda t: setattr(t, "data_type", TensorProto.DOUBLE),
        lambda t: setattr(t, "data_type", TensorProto.STRING),
        lambda t: setattr(t, "data_type", 0),
        lambda t: setattr(t, "data_type", 99),
    ],
)
def test_external_data_that_is_not_what_it_declares(change, external: Path):
    refusal(declare(external, change))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.dims.append(1 << 40),
        lambda t: t.dims.extend([-1]),
        lambda t: setattr(t, "data_type", TensorProto.DOUBLE),
        lambda t: setattr(t, "data_type", 0),
        lambda t: setattr(t, "data_type", 99),
    ],
)
@pytest.mark.parametrize("array", [WEIGHT, WEIGHT[:2]], ids=["mapped", "parsed"])
def test_inline_data_that_is_not_what_it_declares(change, array: np.ndarray, tmp_path: Path):
    onnx.save(make(initializers={"w": array}), tmp_path / "m.onnx")
    message = refusal(declare(tmp_path / "m.onnx", change))
    assert "'w'" in message or "99 is not a valid DataType" in message


def test_typed_data_of_the_wrong_count(tmp_path: Path):
    model = make(initializers={})
    model.graph.initializer.append(
        onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 40], float_data=[1.0])
    )
    onnx.save(model, tmp_path / "m.onnx")
    assert "'w'" in refusal(tmp_path / "m.onnx")


def test_external_data_of_constants_in_functions_is_checked_too(tmp_path: Path):
    tensor = numpy_helper.from_array(WEIGHT, "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "l": 1]>
        g (float[n] x) => (float[n] y) { y = l.f(x) }
        <opset_import: ["": 17], domain: "l"> f (a) => (b) { b = Relu(a) }"""
    )
    model.functions[0].node.append(helper.make_node("Constant", [], ["k"], value=tensor))
    onnx.save(model, tmp_path / "m.onnx")
    assert "../secret" in refusal(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("dims", "indices"), [([1 << 20, 1 << 20], [0]), ([160], [160]), ([160], [-1]), ([-1], [0])]
)
def test_sparse_tensors_are_checked_before_they_are_made(dims, indices, tmp_path: Path):
    values = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0])
    index = helper.make_tensor("i", TensorProto.INT64, [1], indices)
    model = make("y = Add(x, s)", {})
    sparse = onnx.SparseTensorProto(values=values, indices=index, dims=dims)
    model.graph.sparse_initializer.append(sparse)
    onnx.save(model, tmp_path / "m.onnx")
    assert "'s'" in refusal(tmp_path / "m.onnx")


# saving


@pytest.fixture
def small_inline_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writing, "INLINE_LIMIT", 1000)


def double(model: ir.Model) -> ir.Model:
    tensor = weight(model)

    def doubled() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy() * 2)

    lazy = ir.LazyTensor(doubled, dtype=tensor.dtype, shape=ir.Shape([160, 160]), name="w")
    model.graph.initializers["w"].const_value = lazy
    return model


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_saved_inline_from_external_and_equal_models_give_equal_bytes(external: Path):
    first, second = (external.parent / name for name in ("1.onnx", "2.onnx"))
    saved = model_io.save(model_io.load(external), first)
    assert saved.data is None and saved.size == first.stat().st_size
    model_io.save(model_io.load(first), second)
    assert first.read_bytes() == second.read_bytes()
    onnx.checker.check_model(str(first), full_check=True)
    np.testing.assert_array_equal(run(first), run(external))


@pytest.mark.usefixtures("small_inline_limit")
def test_large_models_get_one_data_file(inline: Path):
    out = inline.parent / "out.onnx"
    saved = model_io.save(model_io.load(inline), out)
    assert saved.data is not None and re.fullmatch(r"out\.[0-9a-f]{16}\.data", saved.data.name)
    assert model_io.size_on_disk(out) == saved.size
    assert names(inline.parent) == sorted(["inline.onnx", "out.onnx", saved.data.name])
    onnx.checker.check_model(str(out), full_check=True)
    np.testing.assert_array_equal(run(out), run(inline))


@pytest.mark.usefixtures("small_inline_limit")
def test_weights_that_share_a_tensor_are_written_once(inline: Path):
    model = model_io.load(inline)
    twin = ir.Value(name="twin", const_value=weight(model))
    model.graph.register_initializer(twin)
    saved = model_io.save(model, inline.parent / "out.onnx")
    assert saved.data is not None and saved.data.stat().st_size == WEIGHT.nbytes


@pytest.mark.parametrize("source", ["inline", "external"])
@pytest.mark.parametrize("limit", [1000, 1 << 30])
def test_saving_over_the_source_leaves_the_model_in_memory_usable(
    source: str, limit: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(writing, "INLINE_LIMIT", limit)
    path = request.getfixturevalue(source)
    expected = run(path) * 2
    model = double(model_io.load(path))
    for _ in range(2):
        model_io.save(model, path)
        np.testing.assert_allclose(run(path), expected, rtol=1e-5)
    np.testing.assert_array_equal(weight(model).numpy(), WEIGHT * 2)


def test_saving_over_the_data_of_the_source(external: Path):
    data = external.parent / "weights.bin"
    model = model_io.load(external)
    model_io.save(model, data)
    np.testing.assert_array_equal(weight(model).numpy(), WEIGHT)
    assert run(data).shape == (2, 160)


@pytest.mark.usefixtures("small_inline_limit")
def test_an_earlier_generations_data_goes_unless_something_refers_to_it(inline: Path):
    folder, out = inline.parent, inline.parent / "out.onnx"
    model = model_io.load(inline)
    first = model_io.save(model, out)
    assert first.data is not None
    (folder / "copy.onnx").write_bytes(out.read_bytes())
    foreign = folder / "out.weights.data"
    foreign.touch()
    second = model_io.save(double(model), out)
    assert first.data.exists() and foreign.exists()
    (folder / "copy.onnx").unlink()
    third = model_io.save(double(model), out)
    assert not first.data.exists() and second.data and not second.data.exists()
    assert third.data and third.data.exists() and foreign.exists()
    np.testing.assert_allclose(run(out), run(inline) * 4, rtol=1e-5)


def test_mode_and_link_of_the_target_are_respected(inline: Path, tmp_path: Path):
    target, link = tmp_path / "target.onnx", tmp_path / "link.onnx"
    target.touch()
    target.chmod(0o640)
    link.symlink_to(target)
    model_io.save(model_io.load(inline), link)
    assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o640
    fresh = tmp_path / "fresh.onnx"
    mask = os.umask(0o027)
    try:
        model_io.save(model_io.load(inline), fresh)
    finally:
        os.umask(mask)
    assert fresh.stat().st_mode & 0o777 == 0o640


def unwritable(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        model_io.check_writable(path)
    with pytest.raises(InputError):
        model_io.save(ir.from_proto(make()), path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_unwritable_outputs(inline: Path, tmp_path: Path):
    model_io.check_writable(inline)
    model_io.check_writable(tmp_path / "new.onnx")
    assert "no folder" in unwritable(tmp_path / "none" / "m.onnx")
    assert "it is a folder" in unwritable(tmp_path)
    assert "no folder" in unwritable(inline / "m.onnx")
    assert "not a regular file" in unwritable(Path("/dev/null"))
    assert "text forms" in unwritable(tmp_path / "m.json")
    assert names(tmp_path) == ["inline.onnx"]


def test_read_only_file_and_folder(inline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "closed"
    folder.mkdir()
    real = os.access
    closed = {str(folder), str(inline)}  # by hand: the superuser may write anywhere

    def access(path: str | Path, mode: int) -> bool:
        return str(path) not in closed and real(path, mode)

    monkeypatch.setattr(os, "access", access)
    assert "read-only" in unwritable(folder / "m.onnx")
    assert "read-only" in unwritable(inline)


@pytest.fixture(params=["nameless", "named"])
def naming(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the system's nameless files, and without."""
    if request.param == "named":
        monkeypatch.setattr(atomic, "_NAMELESS", False)
    elif not atomic._NAMELESS:
        pytest.skip("this system has no nameless files")
    return request.param


@pytest.mark.parametrize("limit", [1000, 1 << 30])
@pytest.mark.usefixtures("naming")
def test_a_full_disk_at_any_byte_changes_nothing(
    limit: int, inline: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(writing, "INLINE_LIMIT", limit)
    out = inline.parent / "out.onnx"
    model_io.save(model_io.load(inline), out)
    before = {p: p.read_bytes() for p in inline.parent.iterdir()}
    real = os.write
    for room in (0, 10, 50_000, WEIGHT.nbytes, WEIGHT.nbytes + 20):
        left = room

        def write(fd: int, data: memoryview) -> int:
            nonlocal left
            if not left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = real(fd, data[: min(left, 4096)])
            left -= written
            return written

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            with pytest.raises(InputError, match="no space left"):
                model_io.save(double(model_io.load(inline)), out)
        assert {p: p.read_bytes() for p in inline.parent.iterdir()} == before


def test_a_tensor_that_evaluates_to_another_size_is_not_written(inline: Path):
    model = model_io.load(inline)
    short = ir.LazyTensor(
        lambda: ir.tensor(WEIGHT[:-1]), ir.DataType.FLOAT, ir.Shape([160, 160]), name="w"
    )
    model.graph.initializers["w"].const_value = short
    with pytest.raises(OnnxCompressError, match="'w'"):
        model_io.save(model, inline.parent / "out.onnx")
    assert names(inline.parent) == ["inline.onnx"]
    assert weight(model) is short


_SAVE_AND_KILL = """
import itertools, os, random, signal, sys, time
from pathlib import Path
import numpy as np, onnx_ir as ir
from onnxcompress import model_io
from onnxcompress.model_io import atomic, writing

folder, source = Path(sys.argv[1]), sys.argv[2]
weight = model_io.load(source).graph.initializers["w"].const_value.numpy()

def save_for_ever(out):
    for generation in itertools.count(1):
        model = model_io.load(source)
        model.graph.initializers["w"].const_value = ir.tensor(weight * generation, name="w")
        model_io.save(model, out)

def check(out):
    left = model_io.load(out).graph.initializers["w"].const_value.numpy()
    generation = round(float(left[0, 0] / weight[0, 0]))
    np.testing.assert_array_equal(left, weight * np.float32(generation))

rng = random.Random(0)
for nameless, limit in itertools.product({False, atomic._NAMELESS}, (1000, 1 << 30)):
    atomic._NAMELESS, writing.INLINE_LIMIT = nameless, limit
    out = folder / f"{nameless}{limit}" / "out.onnx"
    out.parent.mkdir()
    for _ in range(12):
        child = os.fork()
        if not child:
            save_for_ever(out)
        time.sleep(rng.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if out.exists():
            check(out)
    assert out.exists()
    saved = model_io.save(model_io.load(source), out)
    left = sorted(p.name for p in out.parent.iterdir())
    assert left == sorted(p.name for p in (saved.model, saved.data) if p), left
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment(inline: Path, tmp_path: Path):
    command = [sys.executable, "-c", _SAVE_AND_KILL, str(tmp_path), str(inline)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


@pytest.mark.parametrize("inline_limit", [1 << 30, 1 << 20], ids=["one file", "with data file"])
def test_memory_does_not_grow_with_the_weights(inline_limit: int, tmp_path: Path):
    source = scale.weights_of(tmp_path, mebibytes=96, each=4)
    extra, _ = scale.extra_memory(source, tmp_path / "out.onnx", "double", inline_limit)
    assert extra < 24
    last = model_io.load(tmp_path / "out.onnx").graph.initializers["w23"].const_value
    assert last is not None and last.numpy()[0, :2].tolist() == [48.0, 0.0]
