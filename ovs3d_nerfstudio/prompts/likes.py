"""Prompts without words: what was clicked stands for itself, under a name, and is kept in a file that `--prompts` can name.

A feature lies in the space of the encoder's embeddings, so any run of the same encoder can be asked for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovs3d_nerfstudio.errors import UserError
from ovs3d_nerfstudio.files import written_beside

SUFFIX = ".json"
"""What a file of likes ends with: so `--prompts` tells it from words."""
DIGITS = 6
"""Digits behind the point of a feature's numbers in a file."""


class LikesError(UserError):
    """A file holds no likes that can be used."""


class Like(str):
    """The name of a prompt without words, and the feature that stands for it: wherever prompts go, it goes too."""

    feature: tuple[float, ...]
    """A unit vector in the space of the encoder's embeddings."""
    fingerprint: str
    """Of that encoder."""

    def __new__(cls, name: str, feature: Sequence[float], fingerprint: str) -> Like:
        like = super().__new__(cls, name)
        like.feature, like.fingerprint = tuple(feature), fingerprint
        return like

    def __getnewargs__(self) -> tuple[str, tuple[float, ...], str]:  # type: ignore[override]
        return str(self), self.feature, self.fingerprint


def write_likes(path: Path, likes: Sequence[Like]) -> None:
    """Writes likes of one encoder, one a line, beside and renames; makes the folder."""
    lines = [
        json.dumps({"name": like, "feature": [round(value, DIGITS) for value in like.feature]}, ensure_ascii=False)
        for like in likes
    ]
    text = f'{{\n"fingerprint": {json.dumps(likes[0].fingerprint)},\n"likes": [\n' + ",\n".join(lines) + "\n]\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def read_likes(path: Path) -> list[Like]:
    """The likes in a file of `write_likes`, in its order.

    Raises LikesError when it is missing, cannot be read, or holds anything else.
    """
    try:
        return _likes_of(json.loads(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError:
        raise LikesError(
            f"The file of likes {path} does not exist; check the path. 'More like this' in the viewer writes one."
        ) from None
    except OSError as error:
        raise LikesError(f"The file of likes {path} cannot be read ({error.strerror}); name a readable one.") from None
    except KeyError as error:
        told = f"{error} is missing"
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        told = str(error).splitlines()[0]
    raise LikesError(f"{path} is no file of likes ({told}); name one that 'More like this' in the viewer wrote.")


def _likes_of(content: Any) -> list[Like]:
    """Raises KeyError, TypeError, ValueError or OverflowError for what `write_likes` would not write."""
    if not isinstance(content, dict):
        raise TypeError("no object of JSON")
    fingerprint, entries = content["fingerprint"], content["likes"]
    if not (isinstance(fingerprint, str) and isinstance(entries, list) and entries):
        raise TypeError("no fingerprint, or no list of likes")
    likes = []
    for entry in entries:
        name, feature = entry["name"], entry["feature"]
        if not isinstance(name, str) or not name.isprintable() or ";" in name:
            raise TypeError("a name is no plain text")
        if not isinstance(feature, list) or not all(type(value) in (int, float) for value in feature):
            raise TypeError(f"the feature of '{name}' is no list of numbers")
        length = math.hypot(*map(float, feature))
        if not 0 < length < math.inf:
            raise ValueError(f"the feature of '{name}' is not finite, or all zeros")
        likes.append(Like(name, [value / length for value in feature], fingerprint))
    return likes
