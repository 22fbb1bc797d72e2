"""Names to passes: the engine's own, and other packages' by entry points.

A package adds a pass with an entry point `name = module:Class` in the group `onnxcompress.passes`.
What is built in wins over a plugin of the same name. Targets are named in `onnxcompress.targets`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint

from onnxcompress.contract import Pass
from onnxcompress.errors import InputError, did_you_mean
from onnxcompress.plugins import load_plugin, plugins


@dataclass(frozen=True)
class Registry:
    """The passes that can be named in a recipe or on the command line.

    Attributes:
        built_in: passes by name, in pipeline order.
        plugins: entry points by name.
    """

    built_in: Mapping[str, type[Pass]]
    plugins: Mapping[str, EntryPoint] = field(default_factory=dict[str, EntryPoint])

    @classmethod
    def of(
        cls, passes: Iterable[type[Pass]], plugins: Mapping[str, EntryPoint] | None = None
    ) -> Registry:
        """A registry of these passes by the names that they have."""
        return cls({p.name: p for p in passes}, plugins or {})

    def names(self) -> tuple[str, ...]:
        """All passes' names, the built-in ones first and in pipeline order."""
        return tuple(dict.fromkeys([*self.built_in, *sorted(self.plugins)]))

    def pass_class(self, name: str) -> type[Pass]:
        """The pass of that name.

        Raises:
            InputError: if there is none, or a plugin's cannot be loaded.
        """
        if name in self.built_in:
            return self.built_in[name]
        if name not in self.plugins:
            raise InputError(f"no pass {name!r}{did_you_mean(name, self.names())}")
        found = load_plugin(self.plugins[name])
        if not (isinstance(found, type) and issubclass(found, Pass) and found.name == name):
            raise InputError(f"plugin pass {name!r} is not a Pass of that name: {found!r}")
        return found


@cache
def installed() -> Registry:
    """Everything built in and installed."""
    from onnxcompress.passes import ALL

    return Registry.of(ALL, plugins("onnxcompress.passes"))
