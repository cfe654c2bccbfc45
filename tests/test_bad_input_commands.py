"""nerfstudio's own commands, as processes of their own: the sentence of the other tests is what a user of ns-train sees."""

import json
import shutil

import pytest
from conftest import command, train_words

pytestmark = pytest.mark.slow


def sentence(done, said: str) -> None:
    printed = " ".join(done.stdout.split())
    assert done.returncode == 1 and "Traceback" not in printed, printed[-2000:]
    assert said in printed.rpartition("Error: ")[2], printed[-2000:]


def test_ns_train_on_poses_that_are_no_numbers(small, tmp_path):
    path = small / "transforms.json"
    meta = json.loads(path.read_text())
    meta["frames"][3]["transform_matrix"][0][3] = float("nan")
    path.write_text(json.dumps(meta))
    done = command(*train_words(small, tmp_path / "out", 2), cwd=tmp_path, ok=False)
    sentence(done, "frame 3 (images/03.png) has no transform_matrix of 4 × 4 finite numbers")
    assert not (small / ".ovs3d-cache").exists() and not list(tmp_path.glob("out/**/*.ckpt"))


def test_ns_train_with_an_encoder_that_is_not_there(small, tmp_path):
    """Known when the first batch is asked for: the second of the two places where training is refused."""
    words = train_words(small, tmp_path / "out", 2)
    words += ["--pipeline.datamanager.scales", 2, 3, "--pipeline.token-encoder", "dino:/nowhere"]
    sentence(command(*words, cwd=tmp_path, ok=False), "There is no folder '/nowhere'")
    assert not (small / ".ovs3d-cache").exists() and not list(tmp_path.glob("out/**/*.ckpt"))


def test_ns_eval_on_data_that_lost_a_picture(trained, scene, tmp_path):
    words = ["ns-eval", "--load-config", trained[0], "--output-path", tmp_path / "m.json"]
    picture = scene / "images" / "test_01.png"
    shutil.move(picture, tmp_path)
    try:
        sentence(command(*words, cwd=tmp_path, ok=False), "test_01.png")
    finally:
        shutil.move(tmp_path / "test_01.png", picture)
    assert not (tmp_path / "m.json").exists()
