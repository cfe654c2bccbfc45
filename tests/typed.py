"""What the pages tell a reader to type: taken out of them, and read by the very parsers of the commands, which then do not run."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from importlib.metadata import entry_points
from pathlib import Path
from unittest import mock

import nbformat
import tyro

ROOT = Path(__file__).resolve().parents[1]
TOUR = ROOT / "docs" / "tour.ipynb"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), TOUR]


def text_of(page: Path) -> str:
    """A page's Markdown, a notebook's without its code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    return "\n\n".join(cell.source for cell in nbformat.reads(text, 4).cells if cell.cell_type == "markdown")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.M | re.S)


def typed(page: Path) -> list[list[str]]:
    """The words of each command in a page's blocks of bash."""
    lines = [line for block in blocks(page, "bash") for line in re.split(r"\n| && ", block.replace("\\\n", " "))]
    commands = [words for words in (shlex.split(line, comments=True) for line in lines) if words]
    return [[words[0].removeprefix(".venv/bin/"), *words[1:]] for words in commands]


def spans(page: Path) -> list[list[str]]:
    """The words of each piece of code within a page's text."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S)
    return [words for words in map(_words, re.findall(r"`([^`]+)`", text)) if words]


def _words(span: str) -> list[str]:
    try:
        return shlex.split(span)
    except ValueError:  # an apostrophe: nothing for a shell
        return []


class Parsed(BaseException):
    """Raised in place of running a command; no command catches it."""


def is_command(words: list[str]) -> bool:
    """Whether they call ours, or one of nerfstudio's."""
    return words[0] == "ovs3d" or words[0].startswith("ns-")


def refusal(words: list[str]) -> str:
    """What the parser of a command has against the words; nothing when it takes them."""
    (script,) = entry_points(group="console_scripts", name=words[0])
    parse = tyro.cli

    def parse_alone(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    said = io.StringIO()
    with (
        mock.patch.object(tyro, "cli", parse_alone),
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        try:
            script.load()()
        except Parsed:
            return ""
        except SystemExit:
            pass
    return said.getvalue() or f"{words} ran."


def options(text: str) -> set[str]:
    """The options that a text names, as they are typed; of a help text, those that a command has."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_.-]*[a-z0-9]", text))


def command_options(*words: str) -> set[str]:
    """All options of a command and of its subcommands."""
    told = refusal([*words, "--help"])
    found = options(told)
    for names in re.findall(r"\{([a-z0-9,\s-]+)\}", told.partition("\n\n")[0])[:1]:
        for name in re.sub(r"\s", "", names).split(","):
            found |= options(refusal([*words, name, "--help"]))
    return found
