"""Training from beginning to end: order, validation, stopping, checkpoints, and being killed."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.errors import InputError
from onnxcompress.session import Session
from onnxcompress.train.augment import Mixup, Noise
from onnxcompress.train.history import Epoch, History
from onnxcompress.train.loop import train
from onnxcompress.train.losses import CrossEntropy, FeatureMatch, KullbackLeibler, MeanSquared
from onnxcompress.train.optimizers import SGD, AdamW
from onnxcompress.train.schedules import constant
from onnxcompress.train.step import Step

D, H, C, N = 6, 16, 4, 150
TEXT = """<ir_version: 10, opset_import: ["" : 20]>
g (float[{batch},6] x) => (float[{batch},4] y) {{
  a = Gemm<transB=1>(x, w1, b1)
  h = Relu(a)
  y = Gemm<transB=1>(h, w2, b2)
}}"""


def make(batch: object = "N"):
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(TEXT.format(batch=batch))
    for name, shape in {"w1": (H, D), "b1": (H,), "w2": (C, H), "b2": (C,)}.items():
        array = (0.5 * rng.standard_normal(shape)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def draw(n, seed):
    x = np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)
    return {"x": x, "labels": x[:, :C].argmax(1)}


DATA, HELD = draw(N, 1), draw(300, 2)


def fit(model=None, data=DATA, **options):
    settings = {"losses": [CrossEntropy("y")], "optimizer": AdamW(0.02), "epochs": 6}
    return train(model or make(), data, **{**settings, **options})


def weights(trained):
    values = trained.model.graph.initializers.items()
    return {n: v.const_value.numpy() for n, v in values if v.const_value is not None}


def same(one, other):
    return all((array == weights(other)[name]).all() for name, array in weights(one).items())


def test_a_model_learns_and_says_how():
    calls = []
    trained = fit(epochs=30, evaluate=HELD, progress=lambda *call: calls.append(call))
    y = Session(trained.model).run({"x": HELD["x"]})["y"]
    history = trained.history
    assert (y.argmax(1) == HELD["labels"]).mean() > 0.85
    assert history.best is not None
    best = history.epochs[history.best - 1].validation
    assert best["loss"] == min(epoch.validation["loss"] for epoch in history.epochs)
    assert best["accuracy"] == pytest.approx((y.argmax(1) == HELD["labels"]).mean())
    assert len(calls) == 30 * 5
    assert calls[-1][:2] == (150, 150)
    assert calls[-1][2] == history.epochs[-1].training
    plain = json.loads(json.dumps(asdict(history)))
    assert History.of(plain) == history


def test_the_seed_decides_and_nothing_else_does():
    assert same(fit(seed=3), fit(seed=3))
    assert not same(fit(seed=3), fit(seed=4))


def test_every_sample_is_seen_once_an_epoch():
    seen = []

    def look(batch, rng):
        seen.append(batch["x"].copy())
        return batch

    fit(epochs=2, augment=[look], batch_size=32)
    assert [len(x) for x in seen] == [32, 32, 32, 32, 22] * 2
    for epoch in (seen[:5], seen[5:]):
        rows = np.concatenate(epoch)
        np.testing.assert_array_equal(np.unique(rows, axis=0), np.unique(DATA["x"], axis=0))
    assert (seen[0] != seen[5]).any()


def test_an_epoch_is_steps_along_its_batches():
    order = np.random.default_rng([7, 0]).permutation(N)
    step = Step(make(), [CrossEntropy("y")], SGD(0.1), trainable=["w1", "b1", "w2", "b2"])
    for start in range(0, N, 40):
        step.run({name: array[order[start : start + 40]] for name, array in DATA.items()})
    trained = fit(optimizer=SGD(0.1), schedule=constant, epochs=1, batch_size=40, seed=7)
    for name, array in weights(trained).items():
        np.testing.assert_array_equal(array, step.weights()[name])


def test_a_model_of_a_fixed_batch_trains_in_pieces():
    free, fixed = fit(batch_size=30), fit(make(batch=10), batch_size=30)
    for name, array in weights(fixed).items():
        np.testing.assert_allclose(array, weights(free)[name], rtol=1e-3, atol=1e-4)
    held = {name: array[:45] for name, array in HELD.items()}
    trained = fit(make(batch=10), batch_size=20, evaluate=held)
    assert trained.history.epochs[-1].validation["accuracy"] > 0.5
    with pytest.raises(InputError, match=r"takes 10 samples at a time: make batch_size \(32\)"):
        fit(make(batch=10))


def test_training_stops_when_nothing_improves_and_the_best_weights_are_kept():
    wrong = {**HELD, "labels": (HELD["labels"] + 1) % C}
    trained = fit(epochs=50, evaluate=wrong, patience=3)
    assert trained.history.stopped
    assert trained.history.best == 1
    assert len(trained.history.epochs) == 4
    assert same(trained, fit(epochs=50, evaluate=wrong, patience=1))
    by_accuracy = fit(epochs=8, evaluate=HELD, monitor="accuracy").history
    scores = [epoch.validation["accuracy"] for epoch in by_accuracy.epochs]
    assert by_accuracy.best == 1 + int(np.argmax(scores))


def test_an_epoch_without_a_figure_is_never_better():
    history = History()
    for number, loss in enumerate([np.nan, 2.0, np.nan, 1.0, 3.0], 1):
        epoch = Epoch(number=number, rate=1.0, training={}, validation={"loss": loss})
        history = history.with_epoch(epoch)
    assert (history.best, history.waited) == (4, 1)


def test_only_what_is_named_is_trained_and_masks_hold():
    mask = np.random.default_rng(0).integers(0, 2, (H, D))
    trained = weights(fit(trainable=["*", "!b?"], masks={"w1": mask}))
    before = {n: v.const_value.numpy() for n, v in make().graph.initializers.items()
              if v.const_value}  # fmt: skip
    assert (trained["b1"] == before["b1"]).all()
    assert (trained["w2"] != before["w2"]).all()
    assert (trained["w1"][mask == 0] == 0).all()


def test_what_a_loss_does_not_depend_on_is_left_alone():
    hidden = np.random.default_rng(0).standard_normal((N, H)).astype(np.float32)
    match = FeatureMatch([("h", "hidden")])
    trained = weights(fit(data={"x": DATA["x"], "hidden": hidden}, losses=[match]))
    assert (trained["w2"] == make().graph.initializers["w2"].const_value).all()
    assert (trained["w1"] != make().graph.initializers["w1"].const_value).all()
    with pytest.raises(InputError, match="'w2' has no effect on the loss"):
        fit(data={"x": DATA["x"], "hidden": hidden}, losses=[match], trainable=["w2"])


def test_data_comes_from_files_and_lists(tmp_path):
    expected = fit()
    np.savez(tmp_path / "plain.npz", **DATA)
    np.savez_compressed(tmp_path / "packed.npz", **{n: DATA[n] for n in DATA})
    feeds = [{"x": x[None], "labels": label} for x, label in zip(*DATA.values(), strict=True)]
    for source in (tmp_path / "plain.npz", str(tmp_path / "packed.npz"), feeds):
        assert same(fit(data=source), expected)


def test_augmentations_draw_by_seed_and_mix_labels():
    steps = [Noise(std=0.1), Mixup(alpha=0.4)]
    one = fit(augment=steps, epochs=30, evaluate=HELD)
    assert same(one, fit(augment=steps, epochs=30, evaluate=HELD))
    assert not same(one, fit(epochs=30, evaluate=HELD))
    assert max(epoch.validation["accuracy"] for epoch in one.history.epochs) > 0.85


def test_a_teacher_s_outputs_are_one_more_array():
    teacher = {"x": DATA["x"], "teacher": 5 * np.eye(C, dtype=np.float32)[DATA["labels"]]}
    trained = fit(data=teacher, losses=[KullbackLeibler("y", "teacher")], epochs=30)
    y = Session(trained.model).run({"x": HELD["x"]})["y"]
    assert (y.argmax(1) == HELD["labels"]).mean() > 0.85
    assert "accuracy" not in trained.history.epochs[0].training


OPTIONS = {
    "optimizer": AdamW(0.02), "augment": [Noise(std=0.1)], "evaluate": HELD, "clip_norm": 1.0,
    "batch_size": 16,
}  # fmt: skip


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 9, 10, 37, 60])
def test_going_on_gives_the_same_bits_as_never_having_stopped(tmp_path, after):
    def stop(done, total, figures):
        if done == after:
            raise Killed

    path, whole = tmp_path / "run.npz", fit(**OPTIONS)
    with pytest.raises(Killed):
        fit(**OPTIONS, checkpoint=path, checkpoint_seconds=0, progress=stop)
    calls = []
    again = fit(**OPTIONS, checkpoint=path, progress=lambda done, *_: calls.append(done))
    assert calls == list(range(max(after, 1), 61))
    assert same(again, whole)
    assert again.history == whole.history


def test_a_run_that_is_done_is_not_run_again(tmp_path):
    calls = []
    one = fit(**OPTIONS, checkpoint=tmp_path / "run.npz")
    other = fit(**OPTIONS, checkpoint=tmp_path / "run.npz", progress=lambda *c: calls.append(c))
    assert same(one, other) and one.history == other.history
    assert not calls


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_loop
def pace(done, total, figures):
    print(done, flush=True)
    time.sleep(0.002)
found = test_loop.fit(**test_loop.OPTIONS, checkpoint=Path(sys.argv[2]), checkpoint_seconds=0.01,
                      progress=pace)
"""


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path):
    path, rng = tmp_path / "run.npz", np.random.default_rng(int(time.time()))
    command = [sys.executable, "-c", SCRIPT, str(__file__).rpartition("/")[0], str(path)]
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(rng.integers(5, 30)):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert same(fit(**OPTIONS, checkpoint=path), fit(**OPTIONS))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": 1}, "settings were"),
        ({"optimizer": AdamW(0.01)}, "settings were"),
        ({"schedule": constant}, "settings were"),
        ({"augment": []}, "settings were"),
        ({"trainable": ["w*"]}, "settings were"),
        ({"data": draw(N, 9)}, "data was"),
        ({"evaluate": draw(20, 9)}, "data was"),
        ({"data": draw(N, 9), "epochs": 5}, "data and settings were"),
    ],
)
def test_another_run_s_checkpoint_is_refused(tmp_path, change, what):
    fit(**OPTIONS, checkpoint=tmp_path / "run.npz")
    with pytest.raises(InputError, match=f"another run, whose {what} not the same: remove it"):
        fit(**{**OPTIONS, **change}, checkpoint=tmp_path / "run.npz")


def test_another_model_s_checkpoint_and_other_files_are_refused(tmp_path):
    path, other = tmp_path / "run.npz", make()
    fit(checkpoint=path, epochs=1)
    other.graph.initializers["b1"].const_value = ir.tensor(np.ones(H, np.float32), name="b1")
    with pytest.raises(InputError, match="whose model was not the same"):
        fit(other, checkpoint=path, epochs=1)
    np.savez(path, x=np.ones(3))
    with pytest.raises(InputError, match="is no checkpoint"):
        fit(checkpoint=path, epochs=1)
    with pytest.raises(InputError, match="cannot be written"):
        fit(checkpoint=tmp_path / "absent" / "run.npz", epochs=1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"patience": 2}, "patience needs data to evaluate on"),
        ({"patience": 0, "evaluate": HELD}, "patience is 0"),
        ({"monitor": "acuracy", "evaluate": HELD}, "no figure of the validation, did you mean"),
        ({"losses": [MeanSquared("y", "wanted")]}, "no array 'wanted', which a loss reads"),
        ({"data": {**DATA, "labels": DATA["labels"][1:]}}, "equally many samples"),
        ({"data": {**DATA, "labels": DATA["labels"] + 1}}, "'labels' holds 4 but the model tells"),
        ({"data": {"labels": DATA["labels"]}}, "no array 'x'"),
        ({"data": {**DATA, "x": DATA["x"][:, 1:]}}, "make dimension 1 6, it is 5"),
        ({"optimizer": SGD(1e9), "schedule": constant}, "training stopped in step"),
    ],
)
def test_what_cannot_work_is_told_in_one_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence):
        fit(**options)
