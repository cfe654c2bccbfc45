"""What a user can mend: one sentence and exit status 1, never a traceback. Imports nothing that takes seconds."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape

from ovs3d_nerfstudio.annotations import AnnotationError
from ovs3d_nerfstudio.anomaly import AnomalyError
from ovs3d_nerfstudio.checkpoints import CheckpointError
from ovs3d_nerfstudio.demo.scene import DemoError
from ovs3d_nerfstudio.encoders.base import EncoderError
from ovs3d_nerfstudio.features.cache import CacheError
from ovs3d_nerfstudio.option_checks import OptionError
from ovs3d_nerfstudio.pictures import PictureError
from ovs3d_nerfstudio.prompts import PromptError
from ovs3d_nerfstudio.scene_checks import SceneError


class CommandError(ValueError):
    """A subcommand cannot do what it was asked to; the message is a sentence for the user."""


@contextmanager
def user_errors() -> Iterator[None]:
    """What a user can mend ends the command with its sentence and status 1, not with a traceback."""
    try:
        yield
    except (
        CommandError,
        OptionError,
        SceneError,
        PromptError,
        AnnotationError,
        AnomalyError,
        EncoderError,
        PictureError,
        CacheError,
        CheckpointError,
        DemoError,
    ) as error:
        _end(str(error))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # a write that fails names no file
            _end(f"There is no room to write ({error.strerror or ''}); make room, or write elsewhere.")
        if error.filename is None:
            raise
        _end(
            f"{error.filename} cannot be read or written ({error.strerror or error}); check the path and its permissions, or "
            "make room."
        )


def _end(sentence: str) -> NoReturn:
    CONSOLE.quiet = False  # a rank but the first is quiet otherwise
    CONSOLE.print(f"[bold red]Error:[/bold red] {escape(sentence)}")
    raise SystemExit(1) from None
