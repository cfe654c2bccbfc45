"""Reading the config.yml of a run that somebody else may have written.

nerfstudio reads it with PyYAML's unsafe loader, which calls whatever the file names. `RunLoader` builds what the configs of
nerfstudio, of ours and of installed plugins are made of (dataclasses, paths, enumerations) and refuses the rest, so a file
that it has read is safe to be read again.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from enum import Enum
from functools import cache
from importlib.metadata import entry_points
from inspect import isfunction
from pathlib import Path, PurePath
from typing import Any, NoReturn

import yaml

from ovs3d_nerfstudio.errors import UserError, reason

FUNCTIONS = "collate"
"""How the names of the functions end that a config names: those that put photos together, of one size or of several."""


class ConfigError(UserError):
    """A config.yml cannot be read as one of a run."""


def read_config(path: Path, remedy: str) -> Any:
    """What a config.yml holds, whatever that is. Raises ConfigError, which ends with the `remedy`, when it cannot be read."""
    try:
        return yaml.load(path.read_text(), Loader=RunLoader)
    except (yaml.YAMLError, AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be opened ({reason(error, 2)}); {remedy}") from error


class RunLoader(yaml.Loader):
    """PyYAML's loader for Python objects, for those of a run's config only. Raises yaml.YAMLError for others."""

    def find_python_module(self, name: str, mark: Any) -> NoReturn:
        self._refuse(name, mark)

    def find_python_name(self, name: str, mark: Any) -> Any:
        """A class of a config, its targets and its values."""
        if name.partition(".")[0] not in packages() and not name.startswith("torch.optim."):
            self._refuse(name, mark)
        found = super().find_python_name(name, mark)
        if not isinstance(found, type) and not (isfunction(found) and name.endswith(FUNCTIONS)):
            self._refuse(name, mark)
        return found

    def make_python_instance(self, suffix: str, node: Any, args=None, kwds=None, newobj: bool = False) -> Any:
        """A config without arguments, or a path or member of an enumeration of its arguments."""
        found = self.find_python_name(suffix, node.start_mark)
        plain = isinstance(found, type) and issubclass(found, PurePath | Enum)
        if not (plain or (newobj and is_dataclass(found) and not args and not kwds)):
            self._refuse(suffix, node.start_mark)
        return super().make_python_instance(suffix, node, args, kwds, newobj)

    def _refuse(self, name: str, mark: Any) -> NoReturn:
        raise yaml.constructor.ConstructorError(None, None, f"{name} is no part of a run's config", mark)


@cache
def packages() -> frozenset[str]:
    """Top-level packages whose classes a config may name: nerfstudio, its plugins (ours among them), and pathlib."""
    groups = ("nerfstudio.method_configs", "nerfstudio.dataparser_configs")
    plugins = {entry.module.partition(".")[0] for group in groups for entry in entry_points(group=group)}
    return frozenset({"nerfstudio", "pathlib", *plugins})
