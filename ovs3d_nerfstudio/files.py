"""Files: written whole or not at all, named so that every file system takes the name, and never outside their folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LONGEST_STEM = 200
"""Bytes of a class's name as a file bears it: file systems take 255, and a number, a kind and a suffix come to it."""


@contextmanager
def written_beside(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """A path in the same folder, or in `folder`, that becomes `path` when the block ends well and is removed when it does
    not."""
    # Nobody can have put a link where no name can be foreseen.
    beside = (folder or path.parent) / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON beside and renames; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside:
        beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def leads_out_of(path: Path, folder: Path) -> bool:
    """Whether links take `path` to a place outside `folder`, wherever that itself may be linked from."""
    return not path.resolve().is_relative_to(folder.resolve())


def mask_stem(class_name: str) -> str:
    """The name of a class as a file can bear it: what file systems forbid (`/ \\ : * ? " < > |`) is `_`, and of a long one
    there is the beginning, and a digest of all of it."""
    stem = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", unicodedata.normalize("NFC", class_name))
    if len(stem.encode()) <= LONGEST_STEM:
        return stem
    digest = f"-{hashlib.sha256(stem.casefold().encode()).hexdigest()[:8]}"  # without case, as masks are looked for
    return stem.encode()[: LONGEST_STEM - len(digest)].decode(errors="ignore") + digest
