"""Extraction survives: kills at any instant, full and read-only disks, two runs at once, and damage to what is cached."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import children
import pytest
import torch
from PIL import Image

from ovs3d_nerfstudio.features import cache as cache_module
from ovs3d_nerfstudio.features.cache import FeatureCache

VIEWS = 6
DISK_SIZE = "40k"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    paths = []
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(VIEWS):
        pixels = torch.randint(0, 255, (9, 12, 3), generator=torch.Generator().manual_seed(i))
        paths.append(folder / f"{i}.png")
        Image.fromarray(pixels.byte().numpy()).resize((96, 72)).save(paths[-1])
    return paths


def files(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*.safetensors"))}


def identities(cache: Path) -> dict[str, tuple[int, int]]:
    stats = {path: path.stat() for path in cache.rglob("*.safetensors")}
    return {str(path.relative_to(cache)): (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


def litter(cache: Path) -> list[Path]:
    return list(cache.rglob("*.tmp"))


@pytest.fixture(scope="module")
def reference(pictures, weights, tmp_path_factory) -> dict[str, bytes]:
    """What an extraction that nothing disturbs leaves."""
    folder = tmp_path_factory.mktemp("reference")
    child = children.start(folder / "log", children.extract, pictures, weights, folder / "cache", folder / "begun")
    assert child.end() == 0, child.text
    made = files(folder / "cache")
    assert len(made) == 2 * VIEWS
    return made


class Extraction:
    """Processes that share one cache."""

    def __init__(self, folder: Path, pictures: list[Path], weights: Path):
        self.folder, self.pictures, self.weights = folder, pictures, weights
        self.cache, self.begun = folder / "cache", folder / "begun"
        self.runs = 0

    def start(self, **kwargs) -> children.Child:
        self.runs += 1
        log = self.folder / f"log {self.runs}"
        return children.start(log, children.extract, self.pictures, self.weights, self.cache, self.begun, **kwargs)

    def embedded(self) -> Counter:
        return Counter(self.begun.read_text().split() if self.begun.exists() else [])


@pytest.fixture
def extraction(tmp_path, pictures, weights, reference) -> Extraction:
    return Extraction(tmp_path, pictures, weights)


def test_kills_at_random_instants_cost_the_view_in_hand_and_nothing_else(extraction, reference, soak, tally):
    rng, total = random.Random(7), 0
    duration = measured_duration(extraction)
    while total < 4 * soak:
        shutil.rmtree(extraction.cache, ignore_errors=True)
        extraction.begun.unlink(missing_ok=True)
        kills, before = 0, {}
        while True:
            child = extraction.start()
            wait_for_first_view(extraction, child)
            if not child.kill_after(rng.uniform(0, duration) if kills < 4 else 600):
                break
            kills += 1
            with tally.of("`kill -9` while features are extracted", "views"):
                now = identities(extraction.cache)
                assert before.items() <= now.items()  # what was made is not made again
                before = now
        assert child.end() == 0, child.text
        assert files(extraction.cache) == reference and not litter(extraction.cache)
        again = sum(extraction.embedded().values()) - VIEWS
        assert 0 <= again <= kills
        total += kills
        if kills:
            tally.rows["`kill -9` while features are extracted", "views"].lost += again


def wait_for_first_view(extraction: Extraction, child: children.Child) -> None:
    while not extraction.embedded() and child.process.exitcode is None:
        child.process.join(0.01)


def measured_duration(extraction: Extraction) -> float:
    """Seconds from the first view's beginning to the end of an extraction that nothing disturbs."""
    child = extraction.start()
    wait_for_first_view(extraction, child)
    begun = time.monotonic()
    assert child.end() == 0, child.text
    return time.monotonic() - begun


def test_a_kill_before_any_file_operation_leaves_whole_files(extraction, reference, soak, tally):
    extraction.pictures = extraction.pictures[: min(VIEWS, soak)]
    wanted = None
    for operation in range(1, 200):
        shutil.rmtree(extraction.cache, ignore_errors=True)
        child = extraction.start(die=operation)
        status = child.end()
        if status == 0:
            break
        assert status == -signal.SIGKILL
        with tally.of("`kill -9` before each file operation of an extraction"):
            made = files(extraction.cache)
            assert made.items() <= reference.items()
            again = extraction.start()
            assert again.end() == 0, again.text
            wanted = wanted or files(extraction.cache)
            assert files(extraction.cache) == wanted and not litter(extraction.cache)
    assert wanted is not None and wanted.items() <= reference.items()
    assert operation > 8 * len(extraction.pictures)


def test_runs_at_the_same_time_share_the_work(extraction, reference, soak, tally):
    for _ in range(soak):
        shutil.rmtree(extraction.cache, ignore_errors=True)
        extraction.begun.unlink(missing_ok=True)
        with tally.of("three runs extract one scene at once", "views") as row:
            together = [extraction.start() for _ in range(3)]
            assert [child.end() for child in together] == [0, 0, 0], together[0].text
            assert files(extraction.cache) == reference and not litter(extraction.cache)
            row.lost += sum(extraction.embedded().values()) - VIEWS
            assert set(extraction.embedded().values()) == {1}


def test_a_killed_run_is_in_no_other_runs_way(extraction, reference, soak, tally):
    rng = random.Random(8)
    for _ in range(soak):
        shutil.rmtree(extraction.cache, ignore_errors=True)
        extraction.begun.unlink(missing_ok=True)
        with tally.of("one of two runs at once is killed", "views") as row:
            killed, other = extraction.start(), extraction.start()
            while not extraction.embedded():
                killed.process.join(0.01)
            killed.kill_after(rng.uniform(0, 0.3))
            assert other.end() == 0, other.text
            assert files(extraction.cache) == reference and not litter(extraction.cache)
            again = sum(extraction.embedded().values()) - VIEWS
            assert again <= 1
            row.lost += again


@pytest.mark.parametrize("where", ["pyramid", "tokens"])
def test_a_lock_that_a_process_holds_is_waited_for(extraction, reference, where):
    """And a lock file without a process is none."""
    assert extraction.start().end() == 0
    victim = next(extraction.cache.glob(f"{where}-*/*.safetensors"))
    lock = victim.with_name(f".{victim.stem}.lock")
    assert lock.exists()
    victim.unlink()
    with cache_module.FileLock(lock):
        waiting = extraction.start()
        while "waiting for 1 views" not in waiting.text and waiting.process.exitcode is None:
            waiting.process.join(0.05)
        assert waiting.process.exitcode is None and not victim.exists(), waiting.text
    assert waiting.end() == 0 and files(extraction.cache) == reference


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def test_a_full_disk_ends_with_a_sentence_and_is_gone_on_from(extraction, disk, reference, tally):
    extraction.cache = disk / "cache"
    with tally.of("disk full while features are extracted", "views") as row:
        child = extraction.start()
        assert child.end() == 1
        assert "No space left on device" in child.text and "feature-cache-dir" in child.text
        assert "Traceback" not in child.text and not litter(extraction.cache)
        made = files(extraction.cache)
        assert 0 < len(made) < len(reference) and made.items() <= reference.items()
        before = identities(extraction.cache)
        remount(disk, "size=10m")
        again = extraction.start()
        assert again.end() == 0, again.text
        assert files(extraction.cache) == reference and before.items() <= identities(extraction.cache).items()
        row.lost += sum(extraction.embedded().values()) - VIEWS


def test_a_read_only_cache_is_read_and_never_needed_to_be_written(extraction, disk, reference, tally):
    extraction.cache = disk / "cache"
    with tally.of("read-only cache"):
        remount(disk, "size=10m")
        assert extraction.start().end() == 0
        remount(disk, "ro")
        child = extraction.start()
        assert child.end() == 0 and f"{VIEWS} of {VIEWS} views are cached" in child.text
        remount(disk, "rw")
        next(extraction.cache.rglob("*.safetensors")).unlink()
        remount(disk, "ro")
        child = extraction.start()
        assert child.end() == 1 and "Read-only file system" in child.text and "feature-cache-dir" in child.text
        assert "Traceback" not in child.text


def test_flipped_bits_and_cuts_are_found_made_again_and_said_once(extraction, reference, tally):
    assert extraction.start().end() == 0
    rng = random.Random(9)
    damaged = rng.sample(sorted(extraction.cache.rglob("*.safetensors")), 3)
    with tally.of("cached files truncated or with flipped bits"):
        for path in damaged:
            content = bytearray(path.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content if path != damaged[0] else content[: rng.randrange(len(content))])
        child = extraction.start()
        assert child.end() == 0
        assert child.text.count("damaged") == 1 and "3 cached files are damaged" in child.text
        assert files(extraction.cache) == reference
    assert "damaged" not in extraction.start().text


def test_no_flipped_bit_and_no_cut_goes_unseen(tmp_path, soak, tally):
    cache = FeatureCache(tmp_path, "pyramid", {"a": 1})
    cache.save("key", {"patches_00": torch.randn(4, 8).half(), "patches_01": torch.randn(2, 3).half()})
    path = cache.path("key")
    good = path.read_bytes()
    bits = range(8 * len(good))
    for bit in bits if soak > 1 else random.Random(10).sample(bits, 300):
        with tally.of("a flipped bit anywhere in a cached file"):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            assert not cache.intact("key"), bit
    for length in range(0, len(good), 1 if soak > 1 else 20):
        with tally.of("a cached file cut anywhere"):
            path.write_bytes(good[:length])
            assert not cache.intact("key"), length
    path.write_bytes(good)
    assert cache.intact("key")


def test_a_cache_of_another_version_is_left_alone(tmp_path, monkeypatch, tally):
    old = FeatureCache(tmp_path, "pyramid", {"a": 1})
    old.save("key", {"x": torch.ones(2)})
    with tally.of("cache of another version"):
        monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
        new = FeatureCache(tmp_path, "pyramid", {"a": 1})
        assert not new.intact("key") and new.path("key") != old.path("key")
        # Even where somebody renames the folder: the file itself says what it is.
        shutil.copytree(old.folder, new.folder)
        assert not new.intact("key") and old.intact("key")
        assert new.fill("key", lambda: {"x": torch.zeros(2)}, wait=True)
        assert new.intact("key") and torch.equal(new.load("key")["x"], torch.zeros(2)) and old.intact("key")


def test_a_failing_encoder_leaves_no_lock_behind(tmp_path):
    cache = FeatureCache(tmp_path, "pyramid", {})
    with pytest.raises(ZeroDivisionError):
        cache.fill("key", lambda: {"x": torch.ones(1 // 0)}, wait=True)
    assert cache.fill("key", lambda: {"x": torch.ones(1)}, wait=False) and cache.intact("key")
    assert os.listdir(cache.folder) and not litter(tmp_path)
