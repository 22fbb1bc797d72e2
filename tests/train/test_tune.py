"""Tuning takes back what rounding lost, never loses, and keeps grids, zeros and bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress import api
from onnxcompress.errors import InputError
from onnxcompress.session import Session
from onnxcompress.train.lesson import before_softmax
from onnxcompress.train.losses import MeanSquared
from onnxcompress.train.optimizers import AdamW
from onnxcompress.train.tune import Tuned, tune

Array = np.ndarray[Any, Any]
X = np.random.default_rng(0).standard_normal((320, 12)).astype(np.float32)


def network(end: str = "y = Gemm<transB=1>(h, w2, b2)", hidden: int = 24) -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[N,12] x) => (float[N,5] y) {{
      a = Gemm<transB=1>(x, w1, b1)
      h = Relu(a)
      {end}
    }}"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(1)
    for key, shape in {"w1": (hidden, 12), "b1": (hidden,), "w2": (5, hidden), "b2": (5,)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, key))
    return ir.from_proto(proto)


FLOATS = network()


def rounded(model: ir.Model = FLOATS, **options: Any) -> ir.Model:
    """Weights in 4 bits on one grid a row, where that costs something."""
    given: dict[str, Any] = {
        "scheme": "weights",
        "min_elements": 0,
        "target": "qnn",
        "block_size": 0,
    } | options
    return api.quantize(model, {"x": X}, **given).model


def error(model: ir.Model, floats: ir.Model = FLOATS) -> float:
    fresh = {"x": np.random.default_rng(9).standard_normal((500, 12)).astype(np.float32)}
    found, wanted = (Session(m, optimization="none").run(fresh)["y"] for m in (model, floats))
    return float(np.square(found - wanted).mean())


def tuned(model: ir.Model, **options: Any) -> Tuned:
    settings: dict[str, Any] = {"losses": [MeanSquared("y", "teacher.y")], "batch_size": 32}
    settings |= {"teacher": FLOATS, "optimizer": AdamW(1e-2, weight_decay=0), "epochs": 8}
    return tune(model, {"x": X}, **(settings | options))


def bytes_of(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


@pytest.mark.parametrize(
    ("options", "share"),
    [({}, 0.7), ({"target": "cpu", "block_size": 16}, 0.7), ({"bits": 8}, 0.9), (None, 1.0)],
    ids=["4 bits", "packed", "8 bits", "static"],
)
def test_rounding_loses_less_when_it_is_learned(options: Any, share: float) -> None:
    model = api.quantize(FLOATS, {"x": X}).model if options is None else rounded(**options)
    before = bytes_of(model)
    rate = 1e-2 if share < 0.9 else 1e-3
    found = tuned(model, epochs=15, optimizer=AdamW(rate, weight_decay=0))
    assert found.better and found.after < found.before and found.monitor == "loss"
    assert error(found.model) < share * error(model)
    assert bytes_of(model) == before and found.samples == 256
    assert [n.op_type for n in found.model.graph] == [n.op_type for n in model.graph]


def test_what_is_no_better_is_not_kept() -> None:
    model = rounded()
    found = tuned(model, optimizer=AdamW(3.0, weight_decay=0), epochs=1)
    assert not found.better and found.after > found.before
    assert bytes_of(found.model) == bytes_of(model)


def test_the_same_seed_gives_the_same_bytes_and_a_checkpoint_goes_on(tmp_path: Any) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, total: int, figures: Any) -> None:
        if done == 20:
            raise Killed

    model, file = rounded(), tmp_path / "c.npz"
    whole = tuned(model, seed=3)
    with pytest.raises(Killed):
        tuned(model, seed=3, checkpoint=file, progress=kill)
    assert bytes_of(tuned(model, seed=3, checkpoint=file).model) == bytes_of(whole.model)
    assert bytes_of(tuned(model, seed=4).model) != bytes_of(whole.model)


def test_zeros_of_a_pruned_model_stay() -> None:
    pruned = api.prune(FLOATS, 0.5).model
    model = rounded(pruned)
    found = tuned(model, keep_zeros=True)
    assert found.better
    pairs = [[constant(m, f"{n}_quantized") for m in (model, found.model)] for n in ("w1", "w2")]
    for before, after in pairs:
        assert (before == 0).mean() > 0.1 and (after[before == 0] == 0).all()
    assert any((before != after).any() for before, after in pairs)


def constant(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy().astype(int)


def test_labels_alone_are_enough() -> None:
    labels = Session(FLOATS).run({"x": X})["y"].argmax(-1)
    model = rounded()
    found = tune(model, {"x": X, "labels": labels}, epochs=8, batch_size=32)
    assert found.monitor == "accuracy"
    assert found.after > found.before if found.better else found.after <= found.before
    values = {"x": X, "target": Session(FLOATS).run({"x": X})["y"]}
    assert tune(model, values, epochs=8, batch_size=32).better


def test_a_softmax_that_is_quantized_itself_is_seen_through() -> None:
    pair = "p = Softmax(z)  q = QuantizeLinear(p, s, o)  y = DequantizeLinear(q, s, o)"
    floats = network(f"z = Gemm<transB=1>(h, w2, b2)  {pair}")
    for name, array in (("s", np.array(1 / 255, np.float32)), ("o", np.array(0, np.uint8))):
        floats.graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    assert before_softmax(floats.graph.outputs[0])[0].name == "z"


@pytest.mark.parametrize(
    ("end", "data", "sentence"),
    [
        ("y = Gemm<transB=1>(h, w2, b2)", {"x": X}, "give the float model as teacher"),
        ("c = Gemm<transB=1>(h, w2, b2)  y = Hardmax(c)", {"x": X, "target": X[:, :5]},
         "gradients cannot pass through Hardmax"),
        ("y = Gemm<transB=1>(h, w2, b2)", {"x": X[:1]}, "too few to hold some out"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_first(end: str, data: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        tune(rounded(network(end)), data)
