"""Outputs of pruned layers brought back to the moments that they had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

import onnxcompress as oc
from onnxcompress.session import Session
from onnxcompress.train.renormalize import renormalize

TEXT = """<ir_version: 10, opset_import: ["" : 17]>
g (float[N,3,6,6] x) => (float[N,5] y) {
  a = Conv<pads=[1,1,1,1]>(x, w1, b1)
  r = Relu(a)
  c = Conv(r, w2)
  s = Sigmoid(c)
  f = Reshape(s, shape)
  p = MatMul(f, w3)
  q = Add(b3, p)
  t = Tanh(q)
  m = ReduceMean<axes=[1], keepdims=0>(t)
  h = Gemm<transB=1>(m, w4, b4)
  k = Relu(h)
  y = Gemm<transB=1>(k, w5)
}"""
SHAPES = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 3, 3), "w3": (16, 12), "b3": (12,),
          "w4": (20, 12), "b4": (20,), "w5": (5, 20)}  # fmt: skip
LAYERS = {"a": (0, 2, 3), "c": (0, 2, 3), "q": (0, 1), "h": (0,)}
X = np.random.default_rng(1).standard_normal((60, 3, 6, 6)).astype(np.float32)


def build() -> ir.Model:
    draw = np.random.default_rng(0).standard_normal
    proto = onnx.parser.parse_model(TEXT)
    for name, shape in SHAPES.items():
        array = draw(shape) / np.sqrt(np.prod(shape[1:]) or 1)
        tensor = onnx.numpy_helper.from_array(array.astype(np.float32), name)
        proto.graph.initializer.append(tensor)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 8, 16]), "shape"))
    return ir.from_proto(proto)


def values(model: ir.Model, *names: str) -> dict[str, np.ndarray]:
    return Session(model, outputs=names).run({"x": X})


def close(one: np.ndarray, other: np.ndarray, axes: tuple[int, ...]) -> None:
    np.testing.assert_allclose(one.mean(axes), other.mean(axes), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(one.std(axes), other.std(axes), rtol=1e-3, atol=1e-5)


def test_each_layer_gives_the_moments_of_the_whole_model_s():
    whole = build()
    pruned = oc.prune(whole, 0.6, min_elements=0).model
    found = renormalize(pruned, whole, {"x": X})
    assert found.figures == {"renormalized": 4}
    assert [n.op_type for n in found.model.graph if n.op_type != "Add"] == [
        n.op_type for n in pruned.graph if n.op_type != "Add"
    ]
    # What feeds the next layer is what tells, since folding gives the outputs other names.
    inner = values(whole, "r", "s", "t", "k")
    mended, hurt = values(found.model, "r", "s", "t", "k"), values(pruned, "r", "s", "t", "k")
    for name, axes in zip("rstk", LAYERS.values(), strict=True):
        far, near = (
            np.abs(v[name].mean(axes) - inner[name].mean(axes)).mean() for v in (hurt, mended)
        )
        assert near < far, name
    error, before = (np.square(v["y"] - values(whole, "y")["y"]).mean()
                     for v in (values(found.model, "y"), values(pruned, "y")))  # fmt: skip
    assert error < 0.8 * before


def test_zeros_stay_zeros():
    whole = build()
    pruned = oc.prune(whole, 0.6, min_elements=0).model
    mended = renormalize(pruned, whole, {"x": X}).model
    for name in ("w1", "w2", "w3", "w4"):
        before, after = (_weight(m, name) for m in (pruned, mended))
        np.testing.assert_array_equal(before == 0, after == 0)
        assert (before != after).any()


def test_a_model_is_like_itself():
    mended = renormalize(build(), build(), {"x": X}).model
    np.testing.assert_allclose(values(mended, "y")["y"], values(build(), "y")["y"], atol=1e-4)


def test_channels_that_have_died_are_set_and_not_blown_up():
    whole, dead = build(), build()
    weight = _weight(dead, "w1").copy()
    weight[2] = 0
    dead.graph.initializers["w1"].const_value = ir.Tensor(weight, name="w1")
    mended = renormalize(dead, whole, {"x": X}).model
    assert not _weight(mended, "w1")[2].any()
    found = Session(mended, outputs=["r"]).run({"x": X})["r"][:, 2]
    a = values(whole, "a")["a"][:, 2]
    np.testing.assert_allclose(found, max(a.mean(), 0), atol=1e-4)


def test_models_that_share_no_layer_are_left_alone():
    other = build()
    for node in other.graph:
        for value in node.outputs:
            value.name = f"other_{value.name}"
    found = renormalize(build(), other, {"x": X})
    assert not found.modified and "no layer" in found.skips[0].reason


def test_pruning_with_data_does_it(tmp_path: Path):
    whole, path = build(), tmp_path / "inputs.npz"
    np.savez(path, x=X)
    plain = oc.prune(whole, 0.6, min_elements=0).model
    found = oc.prune(whole, 0.6, min_elements=0, calibrate=path)
    assert found.records[-1].name == "renormalize" and found.records[-1].modified
    wanted = values(whole, "y")["y"]
    errors = [np.square(values(m, "y")["y"] - wanted).mean() for m in (plain, found.model)]
    assert errors[1] < errors[0]
    np.testing.assert_array_equal(_weight(whole, "w1"), _weight(build(), "w1"))


def _weight(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()
