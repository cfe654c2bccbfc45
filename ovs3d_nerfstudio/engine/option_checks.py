"""Values of our options that cannot work, told by the option's name before anything is read or built.

A command line has been checked for types already; a config that was edited by hand has not, so types are looked at too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import get_annotations
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ovs3d_nerfstudio.errors import UserError, reason


class OptionError(UserError):
    """An option has a value that cannot work."""


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have: finite ones from `low` to `high`, `low` itself only where it is `closed`."""

    low: float
    high: float = math.inf
    closed: bool = True

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.closed else value > self.low
        return above and value <= self.high and value < math.inf

    def __str__(self) -> str:
        lower = f"from {self.low:g}" if self.closed else f"above {self.low:g}"
        if self.high == math.inf:
            return f"{self.low:g} or more" if self.closed else lower
        return f"{lower} to {self.high:g}" if self.closed else f"{lower}, at most {self.high:g}"


FINE = 7.0
"""Patches along the shorter side of a picture from which on their scale is fine: 7 alone cost 0.005 mIoU, 10 alone nothing."""
COUNT, SIZE, POSITIVE, SHARE = Range(0), Range(1), Range(0, closed=False), Range(0, 1)

EXPECTED: dict[Any, tuple[Any, str]] = {
    bool: (bool, "True or False"),
    str: (str, "text"),
    Path: ((str, Path), "a path"),
}
"""What is taken for a value of a type, and what to ask for instead of any other."""


def check_config(prefix: str, config: Any) -> None:
    """As `check_fields`, with the ranges that the config's class brings along as `RANGES`."""
    check_fields(prefix, config, type(config).RANGES)


def check_fields(prefix: str, config: Any, ranges: Mapping[str, Range]) -> None:
    """Raises OptionError for the first field of a dataclass that is not of its type, or lies outside its range.

    The fields that classes outside of nerfstudio declare are looked at, and those in `ranges`.
    """
    hints = get_type_hints(type(config))
    own = [name for kind in type(config).__mro__ if not _foreign(kind) for name in get_annotations(kind)]
    for name in [*own, *ranges]:
        check_value(prefix + name.replace("_", "-"), getattr(config, name), hints[name], ranges.get(name))


def _foreign(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("nerfstudio", "builtins")


def check_value(option: str, value: Any, kind: Any, allowed: Range | None = None) -> None:
    """Raises OptionError when `value` is not of the type `kind`, or lies outside `allowed`. Other types are let through."""
    if get_origin(kind) in (Union, UnionType) and NoneType in get_args(kind):
        if value is None:
            return
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is Literal:
        fine, expected = value in get_args(kind), f"one of: {', '.join(get_args(kind))}"
    elif kind in (int, float):
        types: Any = Integral if kind is int else Real  # NumPy's among them, from Python
        fine = isinstance(value, types) and not isinstance(value, bool) and (allowed is None or value in allowed)
        expected = ("a whole number" if kind is int else "a number") + (f", {allowed}" if allowed else "")
    elif kind in EXPECTED:
        types, expected = EXPECTED[kind]
        fine = isinstance(value, types)
    else:
        return
    if not fine:
        raise OptionError(f"{option} {value} is not possible; give {expected}.")


def check_scales(option: str, scales: Sequence[float]) -> None:
    """Raises OptionError unless `scales` are numbers of patches along a picture's shorter side, at least one of them."""
    if not isinstance(scales, tuple | list) or not scales:
        raise OptionError(f"{option} {scales} is not possible; give one number or more, such as 5 7 10.")
    for scale in scales:
        check_value(option, scale, float, SIZE)


def check_finer(option: str, finer: float) -> None:
    """Raises OptionError unless patches `finer` times finer than the finest scale are finer, or there are none."""
    check_value(option, finer, float, COUNT)
    if 0 < finer < 1:
        raise OptionError(
            f"{option} {finer:g} would cut patches that are coarser than the finest scale; give 1 or more, or 0 for none."
        )


def coarse_scales(option: str, scales: Sequence[float]) -> list[str]:
    """What speaks against patches that are all coarse, in a sentence."""
    if max(scales) >= FINE:
        return []
    return [
        f"{option} {' '.join(f'{scale:g}' for scale in scales)} has coarse patches only, in which things drown that are small in "
        "the pictures: 5 alone cost 0.01 to 0.64 mIoU. Include 10, or leave it out."
    ]


def check_file(option: str, path: Path) -> None:
    """Raises OptionError when `path` cannot be the name of a file to write."""
    if not path.name or path.is_dir():
        raise OptionError(f"{option} {path} is no name of a file; give one, such as {Path(path, 'result')}.")


def check_device(option: str, name: str) -> None:
    """Raises OptionError when `name` is no device of this machine."""
    import torch  # here: whoever reads the options of a command waits for this file

    try:
        torch.zeros(0, device=name)
    except (RuntimeError, AssertionError) as error:
        known = (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()), ("cpu", True))
        here = [kind for kind, there in known if there]
        raise OptionError(
            f"{option} {name} cannot be used ({reason(error)}); this machine has: {', '.join(here)}."
        ) from None
