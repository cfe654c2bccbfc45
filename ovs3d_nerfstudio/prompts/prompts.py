"""Prompts: what the user types, cleaned, checked, and chosen among the places where they can be written.

A prompt reaches an encoder, the legend, mask file names and a JSON of metrics, so it is cleaned once, here:
Unicode NFC, no control characters, single spaces. Two prompts are the same prompt if `prompt_key` is equal.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from ovs3d_nerfstudio.errors import UserError
from ovs3d_nerfstudio.files import leads_out_of
from ovs3d_nerfstudio.prompts import likes
from ovs3d_nerfstudio.prompts.likes import Like

MAX_PROMPTS = 200
MAX_PROMPT_CHARACTERS = 300
CLASSES_FILE = Path("segmentations", "classes.txt")
"""Where a scene of the 3D-OVS data set lists its classes, relative to the scene's folder."""

_SEPARATORS = re.compile(r"[;\r\n\u2028\u2029]")
_JOINERS = "\u200c\u200d"  # invisible, yet they change how Persian, Indic scripts and emoji are spelled


class PromptError(UserError):
    """The prompts cannot be used as given."""


def clean_prompt(text: str) -> str:
    """One prompt in its only spelling: NFC, no control or invisible characters, single inner spaces."""
    spaced = "".join(" " if c.isspace() else c for c in text)  # first: tabs are control characters too
    # Cs are lone surrogates, which no UTF-8 file can hold.
    kept = "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs") or c in _JOINERS)
    return " ".join(unicodedata.normalize("NFC", kept).split()) if kept.strip(" " + _JOINERS) else ""


def prompt_key(text: str) -> str:
    """What two spellings of one prompt have in common: equal keys are equal prompts (case is ignored)."""
    return unicodedata.normalize("NFC", clean_prompt(text).casefold())


def parse_prompts(text: str) -> list[str]:
    """The prompts in `text`, separated by `;` or line ends, cleaned, in the order in which they first occur.

    Prompts that differ only in case are one prompt, spelled as the first of them; empty parts are dropped.

    Raises:
        PromptError: nothing is left, more than 200 prompts, or a prompt of more than 300 characters.
    """
    return _collect(_split(text), _origin(text))


def read_prompts_file(path: Path) -> list[str]:
    """The prompts in a UTF-8 text file, one a line, in the file's order (see `parse_prompts`).

    A line that starts with `#` is a comment; a `#` later in a line belongs to the prompt. A `;` separates
    here too, so that prompts joined by `;` always come apart as they were.

    Raises:
        PromptError: the file is missing, unreadable, not UTF-8, without a prompt or one of likes, or as in `parse_prompts`.
    """
    if Path(path).suffix.lower() == likes.SUFFIX:
        raise PromptError(f"{path} is no text file of prompts; name a file of likes with --prompts {path}.")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise PromptError(
            f"The prompts file {path} does not exist; check the path or write one prompt a line there."
        ) from None
    except UnicodeDecodeError as error:
        raise PromptError(
            f"The prompts file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from None
    except OSError as error:
        raise PromptError(
            f"The prompts file {path} cannot be read ({error.strerror}); name a readable text file."
        ) from None
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return _collect(_split("\n".join(lines)), f"in the prompts file {path}")


def find_classes_file(data: Path) -> Path | None:
    """The scene's `segmentations/classes.txt`, if it has one.

    Args:
        data: the scene's folder, or a file in it such as `transforms.json`.

    Raises:
        PromptError: it is a link that leads out of the scene.
    """
    folder = data.parent if data.is_file() else data
    path = folder / CLASSES_FILE
    if not path.is_file():
        return None
    if leads_out_of(path, folder):
        raise PromptError(f"{path} is a link that leads out of the scene, to {path.resolve()}; copy the file there.")
    return path


def read_classes_file(path: Path) -> list[str]:
    """The prompts in a `classes.txt`, sorted (METHOD §5: the order in the file means nothing).

    Raises:
        PromptError: as in `read_prompts_file`.
    """
    return sorted(read_prompts_file(path))


def given_prompts(prompts: str, prompts_file: Path | None) -> list[str] | None:
    """The prompts of `prompts` (blank: not given) or of `prompts_file`; None where neither is given.

    A part of `prompts` that ends with `.json` is a file of likes (see `likes`), and stands for all of them.

    Raises:
        PromptError: both are given, or the chosen one is unusable.
        LikesError: a file of likes is unusable.
    """
    if prompts.strip() and prompts_file is not None:
        raise PromptError(
            f"Both prompts ({_quote(prompts.strip())}) and a prompts file ({prompts_file}) were given; "
            "give only one of them."
        )
    if prompts.strip():
        parts: list[str] = []
        for part in _split(prompts):
            is_file = part.strip().lower().endswith(likes.SUFFIX)
            parts += likes.read_likes(Path(part.strip())) if is_file else [part]
        return _collect(parts, _origin(prompts))
    return read_prompts_file(prompts_file) if prompts_file is not None else None


def choose_prompts(prompts: str, prompts_file: Path | None, data: Path | None) -> tuple[list[str], str]:
    """The prompts that take part, and a sentence for the log saying where they came from.

    `prompts` (blank: not given) or `prompts_file`, whichever is given; else the scene's own
    `classes.txt`, where there is a scene; else none, an empty list.

    Raises:
        PromptError: both are given, or the chosen one is unusable, or holds prompts without words.
        LikesError: a file of likes is unusable.
    """
    given = given_prompts(prompts, prompts_file)
    if given is not None:
        wordless = [prompt for prompt in given if isinstance(prompt, Like)]
        if wordless:
            raise PromptError(
                f"'{wordless[0]}' is a prompt without words, which only a trained run can be asked for; give words here."
            )
        place = "as given" if prompts_file is None else f"from the prompts file {prompts_file}"
        return given, f"{_count(given)} {place}: {'; '.join(given)}."
    if data is None:
        return [], "No prompts: none were given."
    classes_file = find_classes_file(data)
    if classes_file is not None:
        chosen = read_classes_file(classes_file)
        return chosen, f"{_count(chosen)} from the scene's {classes_file}, sorted: {'; '.join(chosen)}."
    return [], f"No prompts: none were given, and {data} has no {CLASSES_FILE.as_posix()}."


def _origin(text: str) -> str:
    return f"in {text!r}" if len(text) <= 60 else "in the text given"


def _split(text: str) -> list[str]:
    # NFC first: it turns the Greek question mark U+037E into `;`, which must not end up inside a prompt.
    return _SEPARATORS.split(unicodedata.normalize("NFC", text))


def _collect(parts: Iterable[str], origin: str) -> list[str]:
    found: dict[str, str] = {}
    for part in parts:
        prompt = clean_prompt(part)
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise PromptError(
                f"A prompt {origin} has {len(prompt)} characters ({_quote(prompt)}), more than the "
                f"{MAX_PROMPT_CHARACTERS} allowed; shorten it, or separate prompts by `;` or line ends."
            )
        if isinstance(part, Like):
            prompt = Like(prompt, part.feature, part.fingerprint)
        if prompt:
            found.setdefault(prompt_key(prompt), prompt)
    if not found:
        raise PromptError(f"There is no prompt {origin}; write at least one, for example `white sheep; grass`.")
    if len(found) > MAX_PROMPTS:
        raise PromptError(f"There are {len(found)} prompts {origin}, more than the {MAX_PROMPTS} allowed; drop some.")
    return list(found.values())


def _quote(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")


def _count(prompts: list[str]) -> str:
    return "1 prompt" if len(prompts) == 1 else f"{len(prompts)} prompts"
