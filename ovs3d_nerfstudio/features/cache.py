"""The feature cache: one safetensors file a picture, found by content, never trusted blindly.

A folder holds one *recipe* (encoder fingerprint and every setting that changes a value) and is named by its hash; a
file in it is named by the hash of the picture's bytes. So a changed picture, setting or encoder has another name and
can never be mistaken for a cached one. Files are written beside their place and renamed; a checksum in the header finds
those that were damaged since. A file is made under a lock of its own, which the operating system drops with the process
that holds it: several runs share a cache and its making, and one that is killed is in nobody's way.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ovs3d_nerfstudio.errors import UserError
from ovs3d_nerfstudio.files import written_beside

FORMAT = 2
"""Raised when the meaning of a file changes; older files are then simply not found. Those of 1 may hold what was computed in half
precision, under the trainer's autocast."""


HEADER = "ovs3d"
"""Name of our entry in a file's metadata."""


class CacheError(UserError):
    """The cache cannot be written."""


def picture_key(path: Path) -> str:
    """Hash of a picture's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


class FeatureCache:
    """The files of one recipe below `folder`."""

    def __init__(self, folder: Path, name: str, recipe: dict):
        """`name` starts the sub-folder's name, for people who look; `recipe` must be JSON and decides its hash."""
        self.recipe = json.dumps({"format": FORMAT, **recipe}, sort_keys=True)
        digest = hashlib.sha256(self.recipe.encode()).hexdigest()[:16]
        safe_name = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:40]
        self.folder = folder / f"{safe_name}-{digest}"

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def intact(self, key: str) -> bool:
        """Whether a picture's file is there, of this recipe, and undamaged."""
        return self._read(key, checked=True) is not None

    def load(self, key: str) -> dict[str, Tensor]:
        """The tensors of a picture that is `intact`, memory-mapped and not checked again.

        Raises CacheError when the file went away or lost its form since.
        """
        tensors = self._read(key, checked=False)
        if tensors is None:
            raise CacheError(f"{self.path(key)} vanished or was damaged during the run; start again.")
        return tensors

    def _read(self, key: str, checked: bool) -> dict[str, Tensor] | None:
        try:
            with safe_open(self.path(key), framework="pt") as file:
                header = (file.metadata() or {}).get(HEADER)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError, ValueError):
            return None
        return tensors if not checked or header == self._header(tensors) else None

    def fill(self, key: str, make: Callable[[], dict[str, Tensor]], wait: bool) -> bool:
        """Save what `make` returns unless the picture's file is intact: in one process at a time, so that none repeats
        what another has in hand.

        Args:
            wait: until the other process is done or dead; otherwise return False where there is one.

        Raises CacheError when the folder cannot be written.
        """
        with self._writing():
            if self.folder.is_symlink():
                raise OSError(errno.ELOOP, "it is a link, and features are written through none")
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f".{key}.lock")
            try:
                lock.acquire(blocking=wait)
            except Timeout:
                return False
        try:
            if not self.intact(key):
                # Nobody else writes this file now: what lies beside it was left by a process that was killed.
                for leftover in self.folder.glob(f".{key}.*.tmp"):
                    leftover.unlink(missing_ok=True)
                self.save(key, make())
        finally:
            lock.release()
        return True

    def save(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Write beside and rename. Raises CacheError when the folder cannot be written."""
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        content = to_safetensors(tensors, {HEADER: self._header(tensors)})
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_beside(self.path(key)) as beside:
                beside.write_bytes(content)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"The feature cache {self.folder} cannot be written ({error.strerror or error}); make room or name another "
                "folder with --pipeline.datamanager.feature-cache-dir."
            ) from error

    def _header(self, tensors: dict[str, Tensor]) -> str:
        # One entry: safetensors writes several in any order, and equal features should be equal files.
        return json.dumps({"recipe": self.recipe, "checksum": _checksum(tensors)})

    def size(self, keys: list[str]) -> int:
        """Bytes on disk of the given pictures."""
        return sum(self.path(key).stat().st_size for key in keys if self.path(key).exists())


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()
