"""Extraction on several ranks, real processes that meet over gloo: the same files as one rank makes, and no rank waits for
a dead one."""

import os
import signal
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from rich.console import Console

from ovs3d_nerfstudio.encoders.base import image_text_encoder, token_encoder
from ovs3d_nerfstudio.engine import ranks
from ovs3d_nerfstudio.features.extraction import extract

pytestmark = pytest.mark.slow


def extract_as(rank: int, count: int, folder: Path, pictures: list[Path], dies: bool = False) -> None:
    """Extracts as one of `count` ranks; rank 1 may die in its second view."""
    if count > 1:
        ranks.join(ranks.meeting_in(folder), rank, count, "gloo")
    encoder, tokens = image_text_encoder("offline"), token_encoder("offline")
    if dies and rank == 1:
        embed = tokens.embed_picture
        seen: list[int] = []

        def embed_once(picture):
            if seen:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(1)
            return embed(picture)

        tokens.embed_picture = embed_once
    with (folder / f"log {rank}").open("w") as log:
        views = extract(pictures, encoder, tokens, (2.0,), folder / "cache", Console(file=log, width=200))
        assert all(views.pyramid.intact(key) and views.tokens.intact(key) for key in views.keys)


def cached(folder: Path) -> dict[str, bytes]:
    found = (folder / "cache").rglob("*.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_two_and_three_ranks_share_the_views_and_make_the_same_files(scene, tmp_path):
    pictures = sorted((scene / "images").iterdir())[:5]
    made = {}
    for count in (1, 2, 3):
        folder = tmp_path / f"{count} ranks"
        folder.mkdir()
        if count == 1:
            extract_as(0, 1, folder, pictures)
        else:
            mp.spawn(extract_as, args=(count, folder, pictures), nprocs=count)
        made[count] = cached(folder)
        shares = [len(pictures[rank::count]) for rank in range(count)]
        for rank, share in enumerate(shares):
            log = (folder / f"log {rank}").read_text()
            assert (
                f"0 of {share} views are cached" in log and f"{share} to make" in log and "another process" not in log
            )
            assert ("share of 5 views" in log) is (count > 1)
    assert len(made[1]) == 2 * len(pictures)
    assert made[2] == made[1] and made[3] == made[1]


def test_a_rank_that_dies_in_its_share_ends_the_others(scene, tmp_path):
    pictures = sorted((scene / "images").iterdir())[:4]
    processes = mp.spawn(extract_as, args=(2, tmp_path, pictures, True), nprocs=2, join=False)
    for process in processes.processes:
        process.join(300)
    assert [process.exitcode for process in processes.processes] == [1, -signal.SIGKILL]
    assert 5 <= len(cached(tmp_path)) < 8  # what was made is kept
