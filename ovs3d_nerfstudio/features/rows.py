"""Rows of numbers that lie on disk and are read through a memory map: as many as a scene has, and no memory of their own."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor

from ovs3d_nerfstudio.features.cache import CacheError


class DiskRows:
    """Appended one block after another, then read.

    The file has no name and goes with the process, however that ends. What is mapped is the system's page cache: kept in
    memory while there is room, and given back when something else needs it.
    """

    def __init__(self, folder: Path, dtype: torch.dtype):
        """`folder` holds the file if it can be written, else the system's folder for temporary files does."""
        self._folder = folder if os.access(folder, os.W_OK) else None
        self._file = TemporaryFile(dir=self._folder)  # noqa: SIM115 (open until it is mapped)
        self._empty = torch.empty(0, dtype=dtype)

    def append(self, rows: Tensor) -> None:
        """Raises CacheError when the disk is full. Written, not mapped: a full disk would end a mapping with a signal."""
        try:
            self._file.write(rows.to(self._empty).numpy().tobytes())
            self._file.flush()
        except OSError as error:
            raise CacheError(
                f"The features of training cannot be written beside the cache, in {self._folder or 'the temporary folder'} "
                f"({error.strerror or error}); make room or name another folder with "
                "--pipeline.datamanager.feature-cache-dir."
            ) from error

    def mapped(self, width: int) -> Tensor:
        """All rows, n × `width`, on the CPU; nothing may be appended any more."""
        with self._file as file:
            if not file.tell():
                return self._empty.reshape(0, width)
            return torch.from_numpy(np.memmap(file, self._empty.numpy().dtype, "c").reshape(-1, width))
