"""nerfstudio's own commands on a run of ours, without feature cache and without the encoders' packages."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open3d
import pytest
import yaml
from conftest import camera_path, command, frames, ns_viewer
from PIL import Image

pytestmark = pytest.mark.slow


def test_training_says_what_it_takes_and_makes(trained):
    config, printed = trained
    assert "Captured from the front" in printed
    # What was chosen by the capture is the run's from then on.
    chosen = yaml.load(config.read_text(), yaml.Loader).pipeline.model
    assert (chosen.average_init_density, chosen.near_plane) == (0.3, 0.05)
    assert "prompts from the scene's" in printed.replace("\n", " ")
    assert "0 of 8 views are cached" in printed and "MB a view" in printed and "dimensions hold" in printed
    assert "Training Finished" in printed


def test_other_methods_still_train_and_import_nothing_of_our_encoders(tmp_path):
    code = (
        "import sys; import nerfstudio.configs.method_configs as m; "
        "heavy = {'open_clip', 'transformers', 'numba'} & set(sys.modules); "
        "print(sorted(heavy), 'ovs3d-lite' in m.all_methods)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert out.strip().endswith("[] True")


def test_the_bare_environment_really_lacks_the_encoders(bare, tmp_path):
    config, env = bare
    done = command("python", "-c", "import open_clip", cwd=tmp_path, env=env, ok=False)
    assert done.returncode != 0 and "made unavailable" in done.stdout
    assert not list(Path(config).parents[3].glob("**/.ovs3d-cache"))


def test_ns_eval_reports_segmentation_beside_psnr(bare, tmp_path):
    config, env = bare
    done = command("ns-eval", "--load-config", config, "--output-path", tmp_path / "m.json", cwd=tmp_path, env=env)
    assert "PSNR" in done.stdout and "mIoU" in done.stdout and "IoU: " in done.stdout
    results = json.loads((tmp_path / "m.json").read_text())["results"]
    assert {"psnr", "ssim", "miou", "pixel_accuracy", "mean_accuracy", "boundary_iou"} <= set(results)
    assert "lpips" not in results and 0 <= results["miou"] <= 1
    assert sum(name.startswith("iou_") for name in results) >= 5


def test_ns_render_dataset_writes_every_output(bare, tmp_path):
    config, env = bare
    names = ["rgb", "segmentation", "segmentation_overlay", "scale", "features_pca"]
    words = ["ns-render", "dataset", "--load-config", config, "--output-path", tmp_path, "--image-format", "png"]
    command(*words, "--split", "test", "--rendered-output-names", *names, cwd=tmp_path, env=env)
    for name in names:
        pictures = sorted((tmp_path / "test" / name).glob("*.png"))
        assert len(pictures) == 3 and Image.open(pictures[0]).size == (96, 72)


def test_ns_render_camera_path_shows_a_relevancy(bare, tmp_path, scene):
    config, env = bare
    prompt = (scene / "segmentations" / "classes.txt").read_text().split("\n")[0]
    output = "relevancy_" + "_".join(prompt.split())
    words = ["--camera-path-filename", camera_path(tmp_path / "path.json"), "--output-path", tmp_path / "out.mp4"]
    command(
        "ns-render",
        "camera-path",
        "--load-config",
        config,
        *words,
        "--rendered-output-names",
        output,
        cwd=tmp_path,
        env=env,
    )
    assert frames(tmp_path / "out.mp4")[0].shape == (36, 48, 3)


@pytest.mark.parametrize("mode", ["interpolate", "spiral"])
def test_ns_render_makes_videos_of_the_segmentation(bare, tmp_path, mode):
    config, env = bare
    steps = ["--interpolation-steps", 1] if mode == "interpolate" else ["--seconds", 1, "--frame-rate", 3]
    words = ["ns-render", mode, "--load-config", config, "--output-path", tmp_path / "out.mp4", *steps]
    command(*words, "--rendered-output-names", "segmentation", cwd=tmp_path, env=env)
    video = frames(tmp_path / "out.mp4")
    assert len(video) >= 2 and video[0].shape == (72, 96, 3)


def test_ns_export_pointcloud_carries_the_segmentation(bare, tmp_path):
    config, env = bare
    words = ["ns-export", "pointcloud", "--load-config", config, "--output-dir", tmp_path, "--num-points", 3000]
    words += ["--normal-method", "open3d", "--rgb-output-name", "segmentation", "--num-rays-per-batch", 1024]
    command(*words, cwd=tmp_path, env=env)
    cloud = open3d.io.read_point_cloud(str(tmp_path / "point_cloud.ply"))
    assert len(cloud.points) > 1000
    # The palette's colours, but for the few rays that end nowhere and keep the photo's.
    _, counts = np.unique((np.asarray(cloud.colors) * 255).round(), axis=0, return_counts=True)
    assert np.sort(counts)[-10:].sum() > 0.95 * counts.sum()


def test_ns_viewer_opens(bare, tmp_path):
    config, env = bare
    with ns_viewer(config, tmp_path / "log", env=env):
        time.sleep(3)
