from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from onnxcompress.contract import Pass
from onnxcompress.errors import InputError, did_you_mean
from onnxcompress.passes import ALL
from onnxcompress.registry import Registry, installed


@dataclass(frozen=True, kw_only=True)
class Toy(Pass):
    """A toy."""

    name = "toy"


@dataclass(frozen=True, kw_only=True)
class Late(Pass):
    """A toy from elsewhere."""

    name = "late"


TARGET = Path("elsewhere.toml")


def point(name: str, value: str, group: str = "onnxcompress.passes") -> tuple[str, EntryPoint]:
    return name, EntryPoint(name, value, group)


def registry(tmp_path: Path) -> Registry:
    (tmp_path / "b.toml").write_text("")
    (tmp_path / "a.toml").write_text("")
    (tmp_path / "notes.txt").write_text("")
    built_in = Registry.of([Toy], tmp_path)
    return Registry(
        built_in.passes,
        built_in.targets,
        dict(
            [
                point("late", f"{__name__}:Late"),
                point("toy", "no_such_module:Toy"),
                point("broken", "no_such_module:Pass"),
                point("wrong", f"{__name__}:Late"),
                point("nothing", f"{__name__}:TARGET"),
            ]
        ),
        dict([point("far", f"{__name__}:TARGET", "onnxcompress.targets")]),
    )


def test_built_in_passes_and_targets(tmp_path: Path):
    known = registry(tmp_path)
    assert known.pass_class("toy") is Toy  # the built-in one, though a plugin has its name
    assert known.pass_names()[:2] == ("toy", "broken")
    assert known.target_names() == ("a", "b", "far")
    assert known.target_file("a").name == "a.toml"


def test_plugins_are_loaded_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = {f"{__name__}:Late": Late, f"{__name__}:TARGET": TARGET}

    def load(self: EntryPoint) -> object:
        if self.value not in loaded:
            raise ModuleNotFoundError("No module named 'no_such_module'")
        return loaded[self.value]

    monkeypatch.setattr(EntryPoint, "load", load)
    known = registry(tmp_path)
    assert known.pass_class("late") is Late
    assert known.target_file("far") == TARGET
    with pytest.raises(InputError, match=r"plugin 'broken' .* cannot be loaded: ModuleNotFound"):
        known.pass_class("broken")
    for name in ("wrong", "nothing"):
        with pytest.raises(InputError, match=f"plugin pass '{name}' is not a Pass of that name"):
            known.pass_class(name)


def test_unknown_names_are_answered_with_the_nearest(tmp_path: Path):
    known = registry(tmp_path)
    with pytest.raises(InputError, match=r"no pass 'tooy', did you mean 'toy'\?"):
        known.pass_class("tooy")
    with pytest.raises(InputError, match="no target 'zzz'; there are: 'a', 'b', 'far'"):
        known.target_file("zzz")
    assert did_you_mean("x", []) == "; there are: none"
    assert did_you_mean("x", map(str, range(9))).endswith("'7', …")


def test_installed_holds_what_is_built_in():
    known = installed()
    assert tuple(known.passes.values()) == ALL
    assert "cpu" in known.target_names()
    assert known.target_file("cpu").is_file()
    for name, kind in known.passes.items():
        assert known.pass_class(name) is kind and kind.__doc__
