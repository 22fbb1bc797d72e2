from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress import options
from onnxcompress.contract import CalibratedPass, Pass
from onnxcompress.errors import InputError
from onnxcompress.gates import METRICS, Gate
from onnxcompress.recipe import Recipe
from onnxcompress.registry import Registry
from onnxcompress.train.augment import Flip, Swap
from onnxcompress.train.settings import Training


class Shape(StrEnum):
    ROUND = "round"
    SQUARE = "square"


@dataclass(frozen=True, kw_only=True)
class FoldThings(Pass):
    """Fold things."""

    name = "fold_things"


@dataclass(frozen=True, kw_only=True)
class InsertThings(CalibratedPass):
    """Insert things."""

    name = "insert_things"
    activations: Literal["uint8", "uint16"] | None = "uint8"
    bits: Literal[4, 8] = 8
    per_channel: bool = True
    percentile: float = 99.9
    count: int = 3
    exclude: tuple[str, ...] = ()
    window: tuple[int, float] = (1, 0.5)
    note: str = ""
    limit: float | None = None
    block: int | Literal["row"] = "row"
    shape: Shape = Shape.ROUND

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count must not be negative")


TOY = Registry.of([FoldThings, InsertThings])

WRITTEN = """\
target = "cpu"

[gates]
top1_agreement = ">= 0.98"
size_ratio = "< 0.6"

[[passes]]
name = "fold_things"

[[passes]]
name = "insert_things"
activations = "none"
bits = 4
per_channel = false
percentile = 1e-05
exclude = ["/head/*", "a\\"b"]
window = [2, 3.0]
limit = 7.0
block = 32
shape = "square"
"""


def read(text: str) -> Recipe:
    return Recipe.from_text(text, "r.toml", TOY)


def one(option: str) -> Recipe:
    return read(f'[[passes]]\nname = "insert_things"\n{option}\n')


def test_a_recipe_reads_into_typed_passes_and_writes_the_same_bytes(tmp_path: Path):
    (tmp_path / "r.toml").write_text(WRITTEN)
    recipe = Recipe.from_toml(tmp_path / "r.toml", TOY)
    assert recipe.passes == (
        FoldThings(),
        InsertThings(
            activations=None,
            bits=4,
            per_channel=False,
            percentile=1e-5,
            exclude=("/head/*", 'a"b'),
            window=(2, 3.0),
            limit=7.0,
            block=32,
            shape=Shape.SQUARE,
        ),
    )
    assert recipe.gates == (Gate("top1_agreement", ">=", 0.98), Gate("size_ratio", "<", 0.6))
    assert recipe.to_toml() == WRITTEN


def test_an_empty_recipe_and_defaults():
    assert read("") == Recipe()
    assert one("percentile = 1").passes == (InsertThings(percentile=1.0),)
    assert one("").to_toml().endswith('name = "insert_things"\n')
    assert "statistics" not in options.fields(InsertThings)


@given(
    st.builds(
        InsertThings,
        activations=st.sampled_from(["uint8", "uint16", None]),
        per_channel=st.booleans(),
        percentile=st.floats(allow_nan=False, allow_infinity=False),
        count=st.integers(0),
        exclude=st.lists(st.text()).map(tuple),
        note=st.text(),
        limit=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        block=st.integers() | st.just("row"),
    ),
    st.lists(
        st.builds(
            Gate, st.sampled_from(list(METRICS)), st.sampled_from([">=", "<"]), st.floats(0, 1)
        ),
        unique_by=lambda g: g.metric,
    ),
)
def test_every_recipe_reads_back_equal(pass_: InsertThings, gates: list[Gate]):
    gates = [Gate.parse(str(g)) for g in gates]
    recipe = Recipe((pass_, FoldThings()), "cpu", tuple(gates))
    again = read(recipe.to_toml())
    assert again == recipe
    assert again.to_toml() == recipe.to_toml()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("targit = 'cpu'", r"^r\.toml: no key 'targit', did you mean 'target'\?$"),
        ("target = 'cup'", r"^r\.toml: no target 'cup', did you mean 'cpu'\?$"),
        ("target = 3", r"target must be a string, not 3"),
        ("target = ", r"r\.toml is not valid TOML: Invalid value"),
        ("passes = 'fold_things'", r"write each pass as a table \[\[passes\]\]"),
        ("[[passes]]\nbits = 4", r"r\.toml: pass 1 has no name"),
        ("passes = ['fold_things']", r"pass 1 has no name"),
        ("[[passes]]\nname = 'fold_thing'", r"pass 1: no pass 'fold_thing', did you mean 'fold_th"),
        ("[[passes]]\nname = 'zzz'", r"no pass 'zzz'; there are: 'fold_things', 'insert_things'$"),
        ("[gates]\nsnqr = '>= 30'", r"r\.toml: gate 'snqr >= 30': no metric 'snqr', did you mean"),
        ("[gates]\nsqnr = 30", r"gate 'sqnr' must be a string such as"),
        ("gates = 'sqnr>=30'", r"write gates as a table \[gates\]"),
    ],
)
def test_what_is_unknown_is_named_with_its_nearest(text: str, complaint: str):
    with pytest.raises(InputError, match=complaint):
        read(text)


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("activation = 'uint8'", r"\(insert_things\): no option 'activation', did you mean"),
        ("statistics = 1", r"no option 'statistics'"),
        (
            "activations = 'unit8'",
            r"must be one of 'uint8', 'uint16', 'none', .*did you mean 'uint8'",
        ),
        ("bits = 5", r"option 'bits' must be one of 4, 8, not 5$"),
        ("bits = true", r"option 'bits' must be one of 4, 8, not True$"),
        ("per_channel = 1", r"'per_channel' must be true or false, not 1"),
        ("percentile = 'high'", r"'percentile' must be a number, not 'high'"),
        ("percentile = nan", r"'percentile' must be a number, not nan"),
        ("count = 2.5", r"'count' must be a whole number, not 2\.5"),
        ("count = true", r"'count' must be a whole number, not True"),
        ("count = -1", r"r\.toml: pass 1 \(insert_things\): count must not be negative"),
        ("exclude = 'head'", r"'exclude' must be a list \(a string, …\), not 'head'"),
        ("exclude = [1]", r"'exclude' must be a string, not 1"),
        ("window = [1]", r"'window' must be a list of 2, not of 1"),
        ("block = 1.5", r"'block' must be a whole number or 'row', not 1\.5"),
        ("shape = 'squre'", r"must be one of 'round', 'square', .*did you mean 'square'"),
    ],
)
def test_wrong_options_are_one_sentence(option: str, complaint: str):
    with pytest.raises(InputError, match=complaint) as caught:
        one(option)
    assert str(caught.value).startswith("r.toml: pass 1")


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read as a recipe"):
        Recipe.from_toml(tmp_path / "none.toml", TOY)
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read as a recipe"):
        Recipe.from_toml(tmp_path / "r.toml", TOY)
    with (tmp_path / "r.toml").open("wb") as file:
        file.truncate(2 << 20)
    with pytest.raises(InputError, match="over 1 MiB"):
        Recipe.from_toml(tmp_path / "r.toml", TOY)


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("sqnr>=30", Gate("sqnr", ">=", 30)),
        (" top1_agreement >= .98 ", Gate("top1_agreement", ">=", 0.98)),
        ("accuracy_drop<=5e-3", Gate("accuracy_drop", "<=", 0.005)),
        ("latency_ratio < 1", Gate("latency_ratio", "<", 1)),
        ("max_error > -1", Gate("max_error", ">", -1)),
    ],
)
def test_gates(text: str, gate: Gate):
    assert Gate.parse(text) == gate
    assert Gate.parse(str(gate)) == gate


def test_a_gate_is_met_within_its_bound_and_never_by_nan():
    for op, below, at, above in (
        (">=", False, True, True),
        (">", False, False, True),
        ("<=", True, True, False),
        ("<", True, False, False),
    ):
        gate = Gate.parse(f"sqnr {op} 30")
        assert [gate.met(v) for v in (29.0, 30.0, 31.0)] == [below, at, above]
        assert not gate.met(float("nan"))


@pytest.mark.parametrize("text", ["", "sqnr", "sqnr = 30", "sqnr >= ", "sqnr >= nan", "sqnr>=1 2"])
def test_what_is_no_gate(text: str):
    with pytest.raises(InputError, match=f"^gate '{text}': "):
        Gate.parse(text)


def test_how_to_train_is_a_table_that_reads_back():
    text = (
        '[train]\nepochs = 5\nlr = 0.01\nfeatures = ["h"]\n\n[[passes]]\nname = "fold_batchnorm"\n'
    )
    recipe = Recipe.from_text(text)
    assert recipe.training == Training(epochs=5, lr=0.01, features=("h",))
    assert Recipe.from_text(recipe.to_toml()) == recipe
    steps = '[train]\naugment = [{swap = {probability = 0.4, inputs = ["ids"]}}, "flip"]\n'
    recipe = Recipe.from_text(steps)
    assert recipe.training == Training(augment=(Swap(0.4, inputs=("ids",)), Flip()))
    assert Recipe.from_text(recipe.to_toml()) == recipe
    assert Recipe.from_text("").training is None


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("epoch = 5", "did you mean 'epochs'"),
        ('augment = ["flop"]', "train: augment: no step 'flop', did you mean 'flip'"),
        ("epochs = 0", "1 or more"),
        ('optimizer = "adam"', "did you mean 'adamw'"),
        ("lr = -1.0", "above 0"),
        ("temperature = 0.0", "above 0"),
    ],
)
def test_what_is_wrong_with_a_training_table_is_said(line, sentence):
    with pytest.raises(InputError, match=sentence):
        Recipe.from_text(f"[train]\n{line}\n")
