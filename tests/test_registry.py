"""Passes and targets by name: what is built in, and what installed packages add."""

from dataclasses import dataclass
from importlib import resources
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from onnxcompress import targets
from onnxcompress.contract import Pass
from onnxcompress.errors import InputError, did_you_mean
from onnxcompress.passes import ALL
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.recipe import Recipe
from onnxcompress.registry import Registry, installed


@dataclass(frozen=True, kw_only=True)
class Toy(Pass):
    """A toy."""

    name = "toy"


@dataclass(frozen=True, kw_only=True)
class Late(Pass):
    """A toy from elsewhere."""

    name = "late"


POINTS = {
    "late": f"{__name__}:Late",
    "toy": "no_such_module:Toy",
    "broken": "no_such_module:Pass",
    "wrong": f"{__name__}:Late",
    "nothing": f"{__name__}:POINTS",
}
KNOWN = Registry.of(
    [Toy], {name: EntryPoint(name, value, "onnxcompress.passes") for name, value in POINTS.items()}
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that adds targets: one as it should be, others that are broken."""
    cpu = (resources.files("onnxcompress.targets") / "cpu.toml").read_text("utf-8")
    (tmp_path / "far.toml").write_text(cpu.replace("opset = 13", "opset = 19"), encoding="utf-8")
    (tmp_path / "bad.toml").write_bytes(b"\xff = [")
    (tmp_path / "short.toml").write_text("opset = 13", encoding="utf-8")
    (tmp_path / "far_targets.py").write_text(
        "from pathlib import Path\n"
        "far, bad, short, gone = (Path(__file__).with_name(f'{n}.toml')"
        " for n in ('far', 'bad', 'short', 'gone'))\n"
        "cpu = far\n"
        "number = 3\n",
        encoding="utf-8",
    )
    info = tmp_path / "far_targets-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: far-targets\nVersion: 1\n", encoding="utf-8")
    names = ("cpu", "far", "bad", "short", "gone", "number", "absent")
    lines = "\n".join(f"{name} = far_targets:{name}" for name in names)
    (info / "entry_points.txt").write_text(f"[onnxcompress.targets]\n{lines}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    targets.load.cache_clear()
    return tmp_path


def test_built_in_passes():
    assert KNOWN.pass_class("toy") is Toy  # the built-in one, though a plugin has its name
    assert KNOWN.names()[:2] == ("toy", "broken")


def test_plugins_are_loaded_when_asked_for(monkeypatch: pytest.MonkeyPatch):
    loaded = {f"{__name__}:Late": Late, f"{__name__}:POINTS": POINTS}

    def load(self: EntryPoint) -> object:
        if self.value not in loaded:
            raise ModuleNotFoundError("No module named 'no_such_module'")
        return loaded[self.value]

    monkeypatch.setattr(EntryPoint, "load", load)
    assert KNOWN.pass_class("late") is Late
    with pytest.raises(InputError, match=r"plugin 'broken' .* cannot be loaded: ModuleNotFound"):
        KNOWN.pass_class("broken")
    for name in ("wrong", "nothing"):
        with pytest.raises(InputError, match=f"plugin pass '{name}' is not a Pass of that name"):
            KNOWN.pass_class(name)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"no pass 'tooy', did you mean 'toy'\?"):
        KNOWN.pass_class("tooy")
    with pytest.raises(InputError, match=r"no target 'cup', did you mean 'cpu'\?"):
        targets.load("cup")
    assert did_you_mean("x", []) == "; there are: none"
    assert did_you_mean("x", map(str, range(9))).endswith("'7', …")


def test_installed_holds_what_is_built_in():
    known = installed()
    assert tuple(known.built_in.values()) == ALL
    for name, kind in known.built_in.items():
        assert known.pass_class(name) is kind and kind.__doc__


@pytest.mark.usefixtures("package")
def test_a_target_of_another_package_is_one_of_ours_everywhere():
    assert {"cpu", "far"} <= set(targets.names())
    assert targets.load("far").opset == 19 and targets.load("far").name == "far"
    assert targets.load("cpu").opset == 13  # what ships wins
    recipe = Recipe.from_text("target = 'far'\n[[passes]]\nname = 'insert_qdq'\ntarget = 'far'")
    assert recipe.target == "far" and recipe.passes == (InsertQdq(target="far"),)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bad", "bad.toml cannot be read as TOML"),
        ("gone", "gone.toml cannot be read as TOML"),
        ("short", "target 'short': 'description'"),
        ("number", "is no path of a TOML file: 3"),
        ("absent", "plugin 'absent' .* cannot be loaded: AttributeError"),
    ],
)
def test_a_broken_target_of_another_package_is_an_input_error(name: str, words: str):
    with pytest.raises(InputError, match=words):
        targets.load(name)
