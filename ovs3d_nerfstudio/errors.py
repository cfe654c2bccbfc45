"""What a user can mend: one sentence and exit status 1, never a traceback. Imports nothing of ours, and nothing that takes seconds."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NoReturn

from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape


class UserError(Exception):
    """What a user can mend; the message is a sentence for them. Each module raises a class of its own that derives from it."""


class CommandError(UserError):
    """A command cannot do what it was asked to."""


_raised: ContextVar[bool] = ContextVar("raised", default=False)


@contextmanager
def errors_raised() -> Iterator[None]:
    """Inside, `user_errors` lets errors through to whoever opened this, who may be a program that goes on."""
    token = _raised.set(True)
    try:
        yield
    finally:
        _raised.reset(token)


@contextmanager
def user_errors() -> Iterator[None]:
    """What a user can mend ends the command with its sentence and status 1, not with a traceback; see `errors_raised`."""
    try:
        yield
    except UserError as error:
        if _raised.get():
            raise
        _end(str(error))
    except OSError as error:
        if _raised.get():
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # a write that fails names no file
            _end(f"There is no room to write ({error.strerror or ''}); make room, or write elsewhere.")
        if error.filename is None:
            raise
        _end(
            f"{error.filename} cannot be read or written ({error.strerror or error}); check the path and its permissions, or "
            "make room."
        )


INTERRUPTED = 130
"""Exit status of a command that was ended by Ctrl-C, as a shell has it."""


def say_stopped(said: str) -> None:
    """The one line that Ctrl-C leaves."""
    CONSOLE.quiet = False
    CONSOLE.print(f"\n{escape(said)}", soft_wrap=True)


def reason(error: Exception, lines: int = 1) -> str:
    """The first line or lines of another package's message, cut to stand inside a sentence of ours."""
    given = str(error).strip().splitlines()[:lines] or [type(error).__name__]
    line = " ".join(part.strip() for part in given).rstrip(" .:")
    return line if len(line) <= 200 else line[:200] + "…"


def _end(sentence: str) -> NoReturn:
    CONSOLE.quiet = False  # a rank but the first is quiet otherwise
    CONSOLE.print(f"[bold red]Error:[/bold red] {escape(sentence)}")
    raise SystemExit(1) from None
