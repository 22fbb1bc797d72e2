"""Students of a teacher: what goes, what stays the same function, and what is left alone."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.errors import InputError
from onnxcompress.graph.inference import infer
from onnxcompress.session import Session
from onnxcompress.train.drop_layers import blocks, drop_layers
from onnxcompress.train.narrow import narrow
from onnxcompress.train.students import derive, is_spec

RNG = np.random.default_rng(0)
IMAGE = RNG.standard_normal((3, 3, 8, 8)).astype(np.float32)
ROWS = RNG.standard_normal((4, 5, 8)).astype(np.float32)


def build(text, shapes, **given):
    """Its weights follow from their shapes alone, whatever ran before."""
    random = np.random.default_rng(0)
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    for name, shape in shapes.items():
        array = random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)
        given.setdefault(name, array.astype(np.float32))
    for name, array in given.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    model = ir.from_proto(proto)
    assert infer(model)[1] == ""
    return model


def run(model, *feeds):
    names = [v.name for v in model.graph.inputs]
    return next(iter(Session(model).run(dict(zip(names, feeds, strict=True))).values()))


def shape(model, name):
    return tuple(model.graph.initializers[name].const_value.shape.numpy())


CONVOLUTIONS = """g (float[N,3,8,8] x) => (float[N,4] y) {
  a = Conv<pads=[1,1,1,1]>(x, w1, b1)
  r = Clip(a, zero, six)
  d = Conv<pads=[1,1,1,1], group=24>(r, w2, b2)
  n = BatchNormalization(d, s, t, m, v)
  q = Sigmoid(n)
  u = Mul(n, q)
  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(u)
  e = Conv(p, w3, b3)
  g = GlobalAveragePool(e)
  f = Flatten(g)
  y = Gemm<transB=1>(f, w4, b4)
}"""
SHAPES = {
    "w1": (24, 3, 3, 3), "b1": (24,), "w2": (24, 1, 3, 3), "b2": (24,), "s": (24,), "t": (24,),
    "m": (24,), "w3": (10, 24, 1, 1), "b3": (10,), "w4": (4, 10), "b4": (4,),
}  # fmt: skip
CONSTANTS = {"zero": np.float32(-9), "six": np.float32(9), "v": np.ones(24, np.float32)}


def test_narrowing_takes_the_same_channels_out_of_everything_between():
    model = build(CONVOLUTIONS, SHAPES, **CONSTANTS)
    result = narrow(model, 0.5)
    assert {n: shape(model, n) for n in SHAPES} == {
        "w1": (16, 3, 3, 3), "b1": (16,), "w2": (16, 1, 3, 3), "b2": (16,), "s": (16,),
        "t": (16,), "m": (16,), "w3": (5, 16, 1, 1), "b3": (5,), "w4": (4, 5), "b4": (4,),
    }  # fmt: skip
    channels = result.figures["channels"]
    assert isinstance(channels, dict) and list(channels.values()) == [16, 5]
    assert run(model, IMAGE).shape == (3, 4)


def test_channels_that_do_nothing_can_go_without_a_change():
    random = np.random.default_rng(1)
    given = {n: random.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    dead = np.arange(24) % 3 == 1
    given["w3"][:, dead] = 0
    given["w4"][:, ::2] = 0
    model = build(CONVOLUTIONS, SHAPES, **given, **CONSTANTS)
    before = run(model, IMAGE)
    narrow(model, 0.67)  # 16 of 24, 7 of 10
    np.testing.assert_allclose(run(model, IMAGE), before, rtol=1e-4, atol=1e-4)


def test_gelu_in_its_parts_is_followed_and_a_shared_bias_is_not_cut_for_others():
    text = """g (float[N,L,8] x) => (float[N,L,8] y) {
      a = MatMul(x, w1)
      b = Add(shared, a)
      c = Div(b, root)
      d = Erf(c)
      e = Add(d, one)
      f = Mul(b, e)
      z = MatMul(f, w2)
      w = Add(shared, wide)
      s = ReduceSum<keepdims=0>(w)
      y = Add(z, s)
    }"""
    given = {"root": np.float32(2**0.5), "one": np.float32(1), "wide": np.zeros(32, np.float32)}
    model = build(text, {"w1": (8, 32), "w2": (32, 8), "shared": (32,)}, **given)
    narrow(model, 0.25)
    assert shape(model, "w1") == (8, 8) and shape(model, "w2") == (8, 8)
    assert shape(model, "shared") == (32,)
    assert run(model, ROWS).shape == (4, 5, 8)


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        ("r = Softmax(a)", "needs all"),
        ("k = Relu(x) r = Add(a, k)", "joins it with other channels"),
        ("r = LayerNormalization(a, scale)", "needs all"),
        ("r = Transpose(a)", "needs all"),
        ("r = Conv<group=4>(a, grouped)", "needs all"),
    ],
)
def test_what_needs_all_channels_is_left_with_a_reason(middle, reason):
    text = f"g (float[8,8] x) => (float[8,8] y) {{ a = MatMul(x, w1) {middle} y = MatMul(r, w2) }}"
    if "Conv" in middle:
        text = text.replace("r = Conv<group=4>(a, grouped)", "r = Unsqueeze(a, one)").replace(
            "y = MatMul(r, w2)", "q = Conv<group=4>(r, grouped) y = Squeeze(q, one)"
        )
    shapes = {"w1": (8, 8), "w2": (8, 8), "scale": (8,), "grouped": (8, 2, 1)}
    model = build(text, shapes, one=np.array([2]))
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(InputError, match=reason):
        narrow(model, 0.5)
    assert ir.to_proto(model).SerializeToString() == before


RESIDUAL = "g (float[N,8] x0, float[N,8] mask) => (float[N,8] y) {" + "".join(
    f"""
  a{i} = Gemm(x{i - 1}, w{i}, b{i})
  r{i} = Relu(a{i})
  m{i} = Mul(r{i}, mask)
  h{i} = Gemm(m{i}, v{i})
  x{i} = Add(x{i - 1}, h{i})
""" for i in (1, 2, 3)
) + "y = Gemm(x3, w4) }"  # fmt: skip
WEIGHTS = dict.fromkeys(("w1", "v1", "w2", "v2", "w3", "v3", "w4"), (8, 8))
WEIGHTS |= dict.fromkeys(("b1", "b2", "b3"), (8,))


def residual(**given):
    return build(RESIDUAL, WEIGHTS, **given)


def test_residual_blocks_are_found_and_the_idle_one_goes_first():
    one = np.eye(8, dtype=np.float32)
    large = {"w1": 9 * one, "v1": one, "w3": 9 * one, "v3": one}
    model = residual(v2=np.zeros((8, 8), np.float32), **large)
    found = blocks(model.graph)
    assert [(b.entry.name, b.exit.name) for b in found][:3] == [
        ("x0", "x1"),
        ("x1", "x2"),
        ("x2", "x3"),
    ]
    feeds = [{"x0": ROWS[:, 0], "mask": ROWS[:, 1]}]
    before = ir.to_proto(model).SerializeToString()
    dropped = drop_layers(model, 1, feeds)
    assert dropped.changes == (0.0,)
    assert ir.to_proto(model).SerializeToString() == before
    assert "w2" not in dropped.model.graph.initializers
    np.testing.assert_array_equal(
        run(dropped.model, ROWS[:, 0], ROWS[:, 1]), run(model, ROWS[:, 0], ROWS[:, 1])
    )
    rest = drop_layers(model, 3, feeds)
    assert rest.changes[0] == 0.0 < rest.changes[1] <= rest.changes[2]
    # Of the block left last, large beside what it is added to, the sum goes before the rest.
    with pytest.raises(InputError, match=r"4 of 5 layers"):
        drop_layers(model, 5, feeds)


def test_a_block_that_something_else_looks_into_stays():
    text = RESIDUAL.replace("y = Gemm(x3, w4)", "y0 = Gemm(x3, w4) y = Add(y0, r2)")
    model = build(text, WEIGHTS)
    ends = [(b.entry.name, b.exit.name) for b in blocks(model.graph)]
    assert ("x0", "x1") in ends and ("x1", "x2") not in ends


def test_a_spec_is_read_step_by_step():
    model = residual()
    data = {"x0": ROWS[:, 0], "mask": ROWS[:, 1]}
    found = derive(model, "drop:1+fresh", data)
    assert len(found.notes) == 2 and "without" in found.notes[0]
    left = [n for n in found.model.graph.initializers if n.startswith("v")]
    assert len(left) == 2
    again = derive(model, "drop:1+fresh", data)
    both = [ir.to_proto(s.model).SerializeToString() for s in (found, again)]
    assert both[0] == both[1]


def test_fresh_weights_follow_from_the_seed_and_keep_signals_in_size():
    first, second, other = (derive(residual(), "fresh", seed=s).model for s in (1, 1, 2))
    a, b, c = (run(m, ROWS[:, 0], np.ones_like(ROWS[:, 0])) for m in (first, second, other))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert 0.1 < a.std() < 20
    bias = first.graph.initializers["b1"].const_value
    assert bias is not None and not bias.numpy().any()


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("shrink:2", "no step 'shrink'"),
        ("drop", "takes a number"),
        ("drop:0", "1 or more"),
        ("drop:1.5", "whole number"),
        ("narrow:x", "not a number"),
        ("narrow:1.5", "between 0 and 1"),
        ("fresh:1", "no number"),
        ("drop:1", "needs data"),
    ],
)
def test_a_spec_that_makes_no_sense_is_said_so(spec, sentence):
    with pytest.raises(InputError, match=sentence):
        derive(residual(), spec)


def test_specs_are_told_from_files():
    assert all(map(is_spec, ("drop:2", "narrow:0.5", "fresh", "drop:1+narrow:0.5+fresh")))
    assert not any(map(is_spec, ("drop/x.onnx", "student.onnx", "narrow.onnx", "models:x")))
