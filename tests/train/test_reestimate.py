"""Statistics of batch normalizations counted anew, and exactly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.errors import InputError
from onnxcompress.session import Session
from onnxcompress.train.exact import to_train
from onnxcompress.train.reestimate import reestimate

X = 3 * np.random.default_rng(1).standard_normal((70, 3, 6, 6)).astype(np.float32) + 1
TEXT = """<ir_version: 10, opset_import: ["" : 17]>
g (float[N,3,6,6] x) => (float[N,4,4,4] y) {
  a = Conv<pads=[1,1,1,1]>(x, w1)
  n = BatchNormalization(a, s1, t1, m1, v1)
  r = Relu(n)
  b = Conv(r, w2)
  c = Conv(x, w3)
  p = BatchNormalization(b, s2, t2, m2, v2)
  q = BatchNormalization(c, s3, t3, m3, v3)
  y = Add(p, q)
}"""


def build(*, offset: float = 0.0) -> ir.Model:
    """Two normalizations one behind the other, and one beside them; statistics are arbitrary."""
    draw = np.random.default_rng(0).standard_normal
    arrays = {"w1": draw((8, 3, 3, 3)), "w2": draw((4, 8, 3, 3)), "w3": draw((4, 3, 3, 3))}
    for i, channels in enumerate((8, 4, 4), 1):
        arrays |= {f"{kind}{i}": draw(channels) for kind in "stm"}
        arrays |= {f"v{i}": 1 + draw(channels) ** 2, f"m{i}": draw(channels) + offset}
    proto = onnx.parser.parse_model(TEXT)
    for name, array in arrays.items():
        tensor = onnx.numpy_helper.from_array(array.astype(np.float32), name)
        proto.graph.initializer.append(tensor)
    return ir.from_proto(proto)


def statistics(model: ir.Model) -> dict[str, np.ndarray]:
    found = {n: v.const_value for n, v in model.graph.initializers.items() if n[0] in "mv"}
    return {name: tensor.numpy() for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_they_are_those_of_what_comes_in(offset):
    model = build(offset=offset)
    found = reestimate(model, {"x": X})
    values = Session(found.model, outputs=list("abc")).run({"x": X})
    for i, name in enumerate("abc", 1):
        value = values[name].astype(np.float64)
        kept = statistics(found.model)
        np.testing.assert_allclose(kept[f"m{i}"], value.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(kept[f"v{i}"], value.var((0, 2, 3)), rtol=1e-4)
    assert found.figures == {"reestimated": 3} and not found.skips
    assert (statistics(model)["m1"] != statistics(found.model)["m1"]).all()


def test_what_is_set_stays_when_it_is_set_again():
    once = reestimate(build(), {"x": X}).model
    for name, array in statistics(reestimate(once, {"x": X}).model).items():
        np.testing.assert_allclose(array, statistics(once)[name], rtol=1e-5, atol=1e-5)


def test_neither_batches_nor_executors_change_a_bit():
    calls = list[tuple[int, int]]()
    feeds = [{"x": X[i : i + 7]} for i in range(0, 70, 7)]
    whole = statistics(reestimate(build(), feeds).model)
    with ThreadPoolExecutor(2) as pool:
        other = reestimate(
            build(), feeds, executor=pool, progress=lambda *call: calls.append(call)
        ).model
    for name, array in statistics(other).items():
        np.testing.assert_array_equal(array, whole[name])
    assert calls == [(1, 2), (2, 2)]


def test_what_cannot_be_set_is_named():
    shared = build()
    second = shared.graph.node(5)
    second.replace_input_with(3, second.inputs[2])
    found = reestimate(shared, {"x": X})
    assert [skip.op for skip in found.skips] == ["BatchNormalization"]
    assert found.figures == {"reestimated": 2}
    with pytest.raises(InputError, match="folded into weights"):
        reestimate(to_train(build()), {"x": X})
