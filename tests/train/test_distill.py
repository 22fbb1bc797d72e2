"""Distillation: that it helps, what it learns from, and what it says of unsuitable models."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.errors import InputError
from onnxcompress.session import Session
from onnxcompress.train.augment import Noise
from onnxcompress.train.distill import distill
from onnxcompress.train.losses import (
    CrossEntropy,
    FeatureMatch,
    KullbackLeibler,
    MeanSquared,
)
from onnxcompress.train.optimizers import AdamW

D, H, C = 8, 32, 4
RNG = np.random.default_rng(0)
X = RNG.standard_normal((640, D)).astype(np.float32)


def network(hidden=H, *, seed=0, tail="Identity", classes=C, names=("x", "y"), batch="N"):
    rng = np.random.default_rng(seed)
    x, y = names
    text = f"""<ir_version: 10, opset_import: ["" : 17]>
    g (float[{batch},{D}] {x}) => (float[{batch},{classes}] {y}) {{
      a = Gemm<transB=1>({x}, w1, b1)
      h = Relu(a)
      z = Gemm<transB=1>(h, w2, b2)
      {y} = {tail}(z)
    }}"""
    proto = onnx.parser.parse_model(text)
    shapes = {"w1": (hidden, D), "b1": (hidden,), "w2": (classes, hidden), "b2": (classes,)}
    for name, shape in shapes.items():
        array = rng.standard_normal(shape) * (1.5 if len(shape) > 1 else 0.1) / shape[-1] ** 0.5
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return ir.from_proto(proto)


def outputs(model, x=X):
    (found,) = Session(model).run({model.graph.inputs[0].name: x}).values()
    return found


def agreement(a, b):
    fresh = np.random.default_rng(9).standard_normal((2000, D)).astype(np.float32)
    return float((outputs(a, fresh).argmax(1) == outputs(b, fresh).argmax(1)).mean())


def taught(teacher, student, data, **options):
    settings = {"epochs": 12, "batch_size": 64, "optimizer": AdamW(1e-2), **options}
    return distill(teacher, student, data, **settings)


def test_a_student_learns_from_inputs_alone():
    teacher, student = network(), network(24, seed=1)
    before = agreement(teacher, student)
    found = taught(teacher, student, {"x": X}, epochs=30)
    assert before < 0.5 < 0.8 < agreement(teacher, found.model)
    assert found.losses == (KullbackLeibler("y", "teacher.z", 2.0),)
    assert (found.samples, found.labelled) == (640, 0)
    assert len(found.history.epochs) == 30


def test_unlabelled_samples_are_worth_more_than_labels_alone():
    teacher, student = network(), network(24, seed=1)
    labels = outputs(teacher).argmax(1)
    few = {"x": X[:24], "labels": labels[:24]}
    alone = taught(teacher, student, few, losses=[CrossEntropy("y")], epochs=100, batch_size=24)
    found = taught(teacher, student, few, unlabelled={"x": X[24:]}, epochs=30)
    assert (found.samples, found.labelled) == (640, 24)
    assert [type(loss) for loss in found.losses] == [KullbackLeibler, CrossEntropy]
    assert agreement(teacher, found.model) > agreement(teacher, alone.model) + 0.1


def test_the_same_seed_gives_the_same_bytes_and_nothing_is_altered():
    teacher, student = network(), network(24, seed=1)
    before = [ir.to_proto(m).SerializeToString() for m in (teacher, student)]
    first, second = (taught(teacher, student, {"x": X}, seed=3).model for _ in range(2))
    assert ir.to_proto(first).SerializeToString() == ir.to_proto(second).SerializeToString()
    assert before == [ir.to_proto(m).SerializeToString() for m in (teacher, student)]
    assert [v.name for v in first.graph.outputs] == ["y"]


@pytest.mark.parametrize("tail", ["Softmax<axis=-1>", "LogSoftmax<axis=1>"])
def test_scores_are_compared_before_a_softmax(tail):
    found = taught(network(tail=tail), network(24, tail=tail, seed=1), {"x": X}, epochs=1)
    assert found.losses == (KullbackLeibler("z", "teacher.z", 2.0),)


def test_what_is_no_score_of_classes_is_compared_by_its_distance():
    found = taught(network(tail="Sigmoid"), network(24, tail="Sigmoid", seed=1), {"x": X}, epochs=1)
    assert found.losses == (MeanSquared("z", "teacher.z"),)
    teacher, student = network(classes=1), network(24, classes=1, seed=1)
    found = taught(teacher, student, {"x": X}, epochs=40)
    assert isinstance(found.losses[0], MeanSquared)
    wanted, given = outputs(teacher), outputs(found.model)
    assert np.square(wanted - given).mean() < 0.1 * np.square(wanted - outputs(student)).mean()


def test_inner_values_are_matched_by_name():
    teacher, student = network(), network(H, seed=1)
    found = taught(teacher, student, {"x": X}, features={"h": "h"}, epochs=20)
    assert found.losses[-1] == FeatureMatch((("h", "teacher.h"),))
    inner = [Session(m, outputs=["h"]).run({"x": X})["h"] for m in (teacher, student, found.model)]
    errors = [np.square(inner[0] - each).sum() for each in inner[1:]]
    assert errors[1] < 0.5 * errors[0]
    with pytest.raises(InputError, match="shape"):
        taught(teacher, network(24), {"x": X}, features=["h"])


def test_losses_of_ones_own_name_the_teachers_values():
    teacher, student = network(), network(24, seed=1)
    found = taught(teacher, student, {"x": X}, losses=[MeanSquared("y", "teacher.z")], epochs=1)
    assert found.losses == (MeanSquared("y", "teacher.z"),)
    with pytest.raises(InputError, match="'nothing' of the teacher"):
        taught(teacher, student, {"x": X}, losses=[MeanSquared("y", "teacher.nothing")])


def test_a_batch_that_was_changed_is_asked_about(tmp_path):
    teacher, student = network(), network(24, seed=1)
    options = {"augment": [Noise(std=0.5)], "epochs": 30, "cache": tmp_path}
    free = taught(teacher, student, {"x": X[:64]}, **options)
    fixed = taught(network(batch="1"), student, {"x": X[:64]}, **options)
    assert agreement(teacher, free.model) > agreement(teacher, fixed.model)


def test_teacher_and_student_may_take_different_inputs_of_one_data_set():
    teacher, student = network(names=("big", "y")), network(24, seed=1, names=("x", "other"))
    found = taught(teacher, student, {"x": X, "big": X}, epochs=20)
    fresh = np.random.default_rng(9).standard_normal((2000, D)).astype(np.float32)
    same = outputs(teacher, fresh).argmax(1) == outputs(found.model, fresh).argmax(1)
    assert same.mean() > 0.75


def test_evaluation_chooses_the_epoch_by_accuracy_where_there_are_labels():
    teacher, student = network(), network(24, seed=1)
    labels = outputs(teacher).argmax(1)
    data = {"x": X[:500], "labels": labels[:500]}
    found = taught(
        teacher, student, data, evaluate={"x": X[500:], "labels": labels[500:]}, patience=5
    )
    assert found.history.monitor == "accuracy" and found.history.best
    found = taught(teacher, student, data, evaluate={"x": X[500:]}, epochs=2)
    assert found.history.monitor == "loss"


def test_masked_weights_stay_zero():
    teacher = network()
    mask = RNG.integers(0, 2, (H, D))
    found = taught(teacher, teacher, {"x": X}, masks={"w1": mask}, epochs=3)
    weight = found.model.graph.initializers["w1"].const_value
    assert weight is not None and (weight.numpy()[mask == 0] == 0).all()


@pytest.mark.parametrize(
    ("teacher", "student", "data", "sentence"),
    [
        (network(), network(names=("u", "y")), {"x": X}, "the student takes 'u'"),
        (network(names=("u", "y")), network(), {"x": X}, "the teacher takes 'u'"),
        (network(classes=7), network(), {"x": X}, "must be of one shape"),
    ],
)
def test_what_does_not_suit_is_said(teacher, student, data, sentence):
    with pytest.raises(InputError, match=sentence):
        taught(teacher, student, data)
