"""Names to passes and targets: the engine's own, and other packages' by entry points.

A package adds a pass with an entry point `name = module:Class` in the group `onnxcompress.passes`,
and a target with `name = module:path` (a path to its TOML file) in `onnxcompress.targets`. What is
built in wins over a plugin of the same name; a plugin is imported only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.metadata import EntryPoint, entry_points
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from onnxcompress.contract import Pass
from onnxcompress.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Registry:
    """What can be named in a recipe or on the command line.

    Attributes:
        passes: built-in passes by name, in pipeline order.
        targets: built-in targets' TOML files by name.
        pass_plugins, target_plugins: entry points by name.
    """

    passes: Mapping[str, type[Pass]]
    targets: Mapping[str, Traversable] = field(default_factory=dict[str, Traversable])
    pass_plugins: Mapping[str, EntryPoint] = field(default_factory=dict[str, EntryPoint])
    target_plugins: Mapping[str, EntryPoint] = field(default_factory=dict[str, EntryPoint])

    @classmethod
    def of(cls, passes: Iterable[type[Pass]], targets: Traversable | None = None) -> Registry:
        """A registry of these passes, the `.toml` files of a folder, and no plugins."""
        files = (
            [] if targets is None else [f for f in targets.iterdir() if f.name.endswith(".toml")]
        )
        return cls(
            {p.name: p for p in passes},
            {f.name.removesuffix(".toml"): f for f in sorted(files, key=lambda f: f.name)},
        )

    def pass_names(self) -> tuple[str, ...]:
        """All passes' names, the built-in ones first and in pipeline order."""
        return tuple(dict.fromkeys([*self.passes, *sorted(self.pass_plugins)]))

    def target_names(self) -> tuple[str, ...]:
        """All targets' names."""
        return tuple(sorted({*self.targets, *self.target_plugins}))

    def pass_class(self, name: str) -> type[Pass]:
        """The pass of that name.

        Raises:
            InputError: if there is none, or a plugin's cannot be loaded.
        """
        if name in self.passes:
            return self.passes[name]
        if name not in self.pass_plugins:
            raise InputError(f"no pass {name!r}{did_you_mean(name, self.pass_names())}")
        found = load_plugin(self.pass_plugins[name])
        if not (isinstance(found, type) and issubclass(found, Pass) and found.name == name):
            raise InputError(f"plugin pass {name!r} is not a Pass of that name: {found!r}")
        return found

    def target_file(self, name: str) -> Traversable:
        """The TOML file of the target of that name.

        Raises:
            InputError: if there is none, or a plugin's cannot be loaded.
        """
        if name in self.targets:
            return self.targets[name]
        if name not in self.target_plugins:
            raise InputError(f"no target {name!r}{did_you_mean(name, self.target_names())}")
        return Path(load_plugin(self.target_plugins[name]))


def load_plugin(point: EntryPoint) -> Any:
    """What an entry point names.

    Raises:
        InputError: if importing it fails, whatever the reason: it is another package's code.
    """
    try:
        return point.load()
    except Exception as error:
        raise InputError(
            f"plugin {point.name!r} ({point.value}) cannot be loaded: {type(error).__name__}: "
            f"{error}; reinstall or remove its package"
        ) from error


@cache
def installed() -> Registry:
    """Everything built in and installed."""
    from onnxcompress.passes import ALL

    built_in = Registry.of(ALL, resources.files("onnxcompress") / "targets")
    return Registry(
        built_in.passes,
        built_in.targets,
        {p.name: p for p in entry_points(group="onnxcompress.passes")},
        {p.name: p for p in entry_points(group="onnxcompress.targets")},
    )
