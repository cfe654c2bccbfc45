"""Which classes are looked at: all of them, only some, or all but some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ovs3d_nerfstudio.prompts.prompts import PromptError, parse_prompts, prompt_key


@dataclass(frozen=True)
class Shown:
    """What of a scene is shown; what is not is as if it were not there, and what stood behind it is seen."""

    only: tuple[str, ...] = ()
    """Prompts that alone are shown; empty for all."""
    without: tuple[str, ...] = ()
    """Prompts that are left out."""

    def flags(self, prompts: Sequence[str]) -> list[bool]:
        """Whether what belongs to each of `prompts` is shown, and last, where label −1 finds it, what belongs to none."""
        only, without = (set(map(prompt_key, names)) for names in (self.only, self.without))
        shown = [(not only or key in only) and key not in without for key in map(prompt_key, prompts)]
        return [*shown, not only]

    def among(self, prompts: Sequence[str]) -> Shown:
        """The same without what it says of others than `prompts`."""
        known = set(map(prompt_key, prompts))
        return Shown(
            *(tuple(name for name in names if prompt_key(name) in known) for names in (self.only, self.without))
        )


EVERYTHING = Shown()


def choose_shown(only: str, without: str, prompts: Sequence[str]) -> Shown:
    """What the options `--only` and `--without`, both prompts separated by semicolons, leave of `prompts`.

    Raises PromptError for a name that is no prompt, and where nothing would be left.
    """
    chosen = []
    for option, text in (("--only", only), ("--without", without)):
        names = parse_prompts(text) if text.strip() else []
        known = set(map(prompt_key, prompts))
        unknown = [name for name in names if prompt_key(name) not in known]
        if unknown:
            raise PromptError(
                f"{option} names '{unknown[0]}', which is not among the prompts; they are: {'; '.join(prompts)}."
            )
        chosen.append(tuple(names))
    shown = Shown(*chosen)
    if not any(shown.flags(prompts)[:-1]):
        raise PromptError("--only and --without leave no prompt to show; name fewer of them.")
    return shown
