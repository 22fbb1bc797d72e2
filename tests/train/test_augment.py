"""Augmentation: what each step does to a batch, that it repeats, and that it leaves its input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.contract import Array
from onnxcompress.errors import InputError
from onnxcompress.train.augment import (
    Augmentation,
    Batch,
    Compose,
    Crop,
    CutMix,
    Flip,
    Mixup,
    Noise,
    RandomErase,
    Shift,
    Swap,
    bound,
    one_hot,
    read_steps,
    softens,
    write_steps,
)

STEPS: list[Augmentation] = [
    *(Noise(0.3), Shift(2), Shift(3, mode="edge"), Shift(2, mode="reflect"), Shift(9, mode="wrap")),
    *(Flip(), Flip(2, probability=1.0), Crop(), RandomErase(probability=1.0), Swap(0.5)),
    *(Mixup(classes=4), CutMix(classes=4), Compose((Noise(), Mixup(0.4, classes=4)))),
]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def images(n: int = 6, dtype: str = "float32", shape: tuple[int, ...] = (2, 8, 7)) -> Batch:
    x = rng(5).random((n, *shape)).astype(dtype)
    return {"x": x, "labels": np.arange(n, dtype=np.int64) % 4}


@pytest.mark.parametrize("step", STEPS, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("shape", [(2, 8, 7), (9, 3), (1, 5, 4, 6)])
def test_a_step_repeats_keeps_dtypes_and_leaves_what_it_was_given(
    step: Augmentation, dtype: str, shape: tuple[int, ...]
) -> None:
    batch = images(dtype=dtype, shape=shape)
    before = {name: array.copy() for name, array in batch.items()}
    found, again = step(batch, rng(1)), step(batch, rng(1))
    for name, array in batch.items():
        np.testing.assert_array_equal(array, before[name])
        np.testing.assert_array_equal(found[name], again[name])
    assert found["x"].dtype == dtype
    assert found["x"].shape == batch["x"].shape
    assert np.isfinite(found["x"]).all()
    assert (found["x"] != batch["x"]).any()


def test_noise_has_the_spread_that_was_asked_for() -> None:
    found = Noise(0.5)({"x": np.zeros((50, 1000), np.float32)}, rng())["x"]
    assert found.std() == pytest.approx(0.5, rel=0.02)
    assert abs(found.mean()) < 0.01


def test_shifted_samples_are_windows_of_the_padded_input() -> None:
    x = images(40)["x"]
    found = Shift(2)({"x": x}, rng())["x"]
    padded = np.pad(x, [(0, 0), (0, 0), (2, 2), (2, 2)])
    moves = set[tuple[int, int]]()
    for i in range(len(x)):
        fits = [
            (a, b)
            for a in range(5)
            for b in range(5)
            if np.array_equal(found[i], padded[i, :, a : a + 8, b : b + 7])
        ]
        assert len(fits) == 1
        moves.add(fits[0])
    assert len(moves) > 12
    assert {a for a, _ in moves} == {b for _, b in moves} == set(range(5))


@pytest.mark.parametrize(("mode", "pad"), [("edge", "edge"), ("reflect", "reflect"),
                                           ("wrap", "wrap")])  # fmt: skip
def test_what_comes_in_at_the_border(mode: str, pad: str) -> None:
    x = images(20, shape=(8, 3))["x"]
    found = Shift(3, mode=mode)({"x": x}, rng())["x"]  # pyright: ignore[reportArgumentType]
    padded = np.pad(x, [(0, 0), (3, 3), (0, 0)], mode=pad)  # pyright: ignore[reportCallIssue, reportArgumentType]
    for i in range(len(x)):
        assert any(np.array_equal(found[i], padded[i, a : a + 8]) for a in range(7))


def test_flips_about_the_share_that_was_asked_for() -> None:
    x = images(400)["x"]
    found = Flip(-1, probability=0.25)({"x": x}, rng())["x"]
    flipped = (found == x[..., ::-1]).all((1, 2, 3))
    same = (found == x).all((1, 2, 3))
    assert (flipped ^ same).all()
    assert 70 <= flipped.sum() <= 130


def test_inputs_of_a_sample_turn_alike() -> None:
    batch = {"left": images(30)["x"], "right": images(30)["x"]}
    for step in (Flip(), Shift(2), Crop()):
        found = step(batch, rng())
        np.testing.assert_array_equal(found["left"], found["right"])


def test_a_crop_is_linear_between_what_it_cuts() -> None:
    ramp = np.broadcast_to(np.linspace(0, 1, 9)[:, None], (50, 9, 1)).astype(np.float32)
    found = Crop(0.5)({"x": ramp}, rng())["x"][:, :, 0]
    steps = np.diff(found, axis=1)
    np.testing.assert_allclose(steps, steps[:, :1] * np.ones(8), atol=1e-6)  # still a ramp
    assert steps.min() >= 0.0625 - 1e-6
    assert steps.max() <= 0.125 + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    np.testing.assert_array_equal(Crop(1.0)({"x": ramp}, rng())["x"], ramp)


def test_an_erased_box_is_filled_and_the_rest_stays() -> None:
    x = np.ones((200, 3, 20, 20), np.float32)
    found = RandomErase(share=(0.1, 0.2), probability=1.0, fill=7)({"x": x}, rng())["x"]
    gone = found == 7
    assert (gone | (found == 1)).all()
    assert (gone == gone[:, :1]).all()  # all channels alike
    for mask in gone[:, 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert (mask == np.outer(rows, columns)).all()
        assert mask.mean() <= 0.23
    assert gone.any((1, 2, 3)).all()
    spared = RandomErase(probability=0.0)({"x": x}, rng())["x"]
    np.testing.assert_array_equal(spared, x)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.floats(0.05, 4), st.integers(0, 2**32 - 1), st.booleans())
def test_targets_are_mixed_in_the_shares_of_the_inputs(
    n: int, alpha: float, seed: int, cut: bool
) -> None:
    # Samples that are constant, each of its own one-hot channel: channel means are the shares.
    labels = np.arange(n, dtype=np.int64)
    x = np.zeros((n, n, 6, 5), np.float32)
    x[labels, labels] = 1
    logits = one_hot(labels, n) * 3
    step = CutMix(alpha, classes=n, inputs=("x",)) if cut else Mixup(alpha, classes=n)
    found = step({"x": x, "labels": labels, "teacher": logits}, rng(seed))
    shares = found["x"].mean((2, 3))
    np.testing.assert_allclose(found["labels"], shares, atol=1e-6)
    np.testing.assert_allclose(found["teacher"], 3 * shares, atol=1e-5)
    np.testing.assert_allclose(found["labels"].sum(1), 1, atol=1e-6)
    assert found["labels"].dtype == np.float32


def test_what_is_swapped_stays_at_its_place_and_goes_with_its_mask() -> None:
    ids = np.arange(600).reshape(60, 10)
    batch = {"ids": ids, "mask": ids * 2, "x": ids[:, :4].astype(np.float32), "n": ids[:, 0]}
    found = Swap(0.3, inputs=("ids", "mask", "x", "n"))(batch, rng())
    assert (found["ids"] % 10 == np.arange(10)).all()
    np.testing.assert_array_equal(found["mask"], 2 * found["ids"])
    np.testing.assert_array_equal(found["n"], batch["n"])
    assert 0.25 < (found["ids"] != ids).mean() < 0.35
    assert ((found["x"] != ids[:, :4]).mean(1) > 0).any()
    bound_ = bound([Swap(0.3), Noise()], ["x"], others=["ids"])(batch, rng())
    assert (bound_["ids"] != ids).any() and bound_["mask"] is batch["mask"]


def test_mixing_mixes() -> None:
    batch = images(64)
    mixed = Mixup(1.0, classes=4)(batch, rng())["labels"]
    assert ((mixed > 0.05).sum(1) == 2).mean() > 0.4


def test_what_has_no_label_adds_no_target() -> None:
    batch = {"x": images(4)["x"], "labels": np.full(4, -1)}
    assert not Mixup(classes=3)(batch, rng())["labels"].any()


def test_arrays_without_samples_stay_as_they_are() -> None:
    batch = images() | {"scale": np.array(2.0, np.float32)}
    for step in STEPS:
        assert step(batch, rng())["scale"] == 2


def test_binding_keeps_teacher_outputs_out_and_fills_in_classes() -> None:
    teacher: Array = rng().random((6, 4)).astype(np.float32)
    batch = images() | {"teacher": teacher}
    steps = bound([Noise(), Compose((Shift(1),)), lambda b, _: {**b, "seen": b["x"]}], ["x"])
    found = steps(batch, rng())
    np.testing.assert_array_equal(found["teacher"], teacher)
    np.testing.assert_array_equal(found["seen"], found["x"])
    mixed = bound([Mixup()], ["x"], classes=4)(batch, rng())
    assert mixed["labels"].shape == (6, 4)
    kept = bound([Noise(inputs=("teacher",))], ["x"])(batch, rng())
    np.testing.assert_array_equal(kept["x"], batch["x"])
    assert (kept["teacher"] != teacher).all()


def test_which_steps_soften_labels() -> None:
    assert softens([Noise(), Compose((CutMix(),))])
    assert not softens([Noise(), Flip(), lambda b, _: dict(b)])


def test_recipes_read_and_write_steps() -> None:
    items = [{"noise": {"std": 0.2, "inputs": ["x"]}}, "flip", {"cut_mix": {"classes": 10}}]
    steps = read_steps(items)
    assert steps == (Noise(0.2, inputs=("x",)), Flip(), CutMix(classes=10))
    assert read_steps(write_steps(steps)) == steps
    with pytest.raises(InputError, match="no step that a recipe has a name for"):
        write_steps([lambda b, _: dict(b)])


@pytest.mark.parametrize(
    ("items", "sentence"),
    [
        ("flip", "must be a list"),
        (["flop"], "no step 'flop', did you mean 'flip'"),
        ([{"noise": {"sdt": 1.0}}], "no option 'sdt', did you mean 'std'"),
        ([{"noise": {"std": -1.0}}], "std must be above 0"),
        ([{"noise": 3}], "must be a table of options"),
        ([{"noise": {}, "flip": {}}], "a step is a name or"),
        ([7], "a step is a name or"),
        ([{"shift": {"axes": [0]}}], "must differ and not be 0"),
        ([{"shift": {"mode": "warp"}}], "did you mean 'wrap'"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(items: object, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_steps(items)


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (Noise(inputs=("y",)), "no array 'y'"),
        (Noise(inputs=("labels",)), "int64, not floats"),
        (Shift(axes=(4,)), "no axis 4"),
        (Mixup(), "how many classes"),
        (Mixup(classes=2), "labels name class 3 but there are 2"),
    ],
)
def test_a_step_that_does_not_suit_the_batch_is_refused(step: Augmentation, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        step(images(), rng())


def test_positions_and_whole_numbers_are_not_guessed_at() -> None:
    with pytest.raises(InputError, match="2 axes has no positions"):
        Shift()({"x": np.zeros((3, 5), np.float32)}, rng())
    with pytest.raises(InputError, match="'ids' holds whole numbers"):
        Mixup(classes=4)(images() | {"ids": np.zeros((6, 3), np.int64)}, rng())
    with pytest.raises(InputError, match="pastes into one input"):
        CutMix(classes=4)(images() | {"y": np.zeros((6, 3), np.float32)}, rng())
