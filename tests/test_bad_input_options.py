"""Values of options that cannot work: each is refused by the option's name, before anything is read, built or written."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from bad_input import assign, opened, refused, small_config

from ovs3d_nerfstudio.data.rays import OVS3DDataManagerConfig
from ovs3d_nerfstudio.models.nerf import OVS3DModelConfig

NAN, INF = math.nan, math.inf

# The option's place below `pipeline`, its value, and what the sentence must say of it.
OPTIONS = [
    ("datamanager.scales", (), "--pipeline.datamanager.scales ()"),
    ("datamanager.scales", (5.0, 0.0), "--pipeline.datamanager.scales 0.0"),
    ("datamanager.scales", (-3.0,), "scales -3.0"),
    ("datamanager.scales", (0.5,), "scales 0.5"),
    ("datamanager.scales", (NAN,), "scales nan"),
    ("datamanager.scales", (INF,), "scales inf"),
    ("datamanager.scales", ("five",), "scales five"),
    ("datamanager.scales", 5.0, "scales 5.0"),
    ("datamanager.scales", (2.0, 3.0, 1000.0), "too small for patches of 1/1000"),
    ("datamanager.finer", 0.5, ["--pipeline.datamanager.finer 0.5", "coarser", "0 for none"]),
    ("datamanager.finer", -1.0, "--pipeline.datamanager.finer -1.0"),
    ("datamanager.finer", NAN, "--pipeline.datamanager.finer nan"),
    ("datamanager.clip_features", "thick", ["--pipeline.datamanager.clip-features thick", "dense"]),
    ("datamanager.feature_cache_dir", 3, "--pipeline.datamanager.feature-cache-dir 3"),
    ("datamanager.eval_image_indices", (0, 1), ["--pipeline.datamanager.eval-image-indices 0 1", "leave it out"]),
    ("datamanager.eval_image_indices", None, ["--pipeline.datamanager.eval-image-indices None", "does nothing"]),
    ("datamanager.num_windows", -1, "--pipeline.datamanager.num-windows -1"),
    ("datamanager.num_windows", 1.5, "num-windows 1.5"),
    ("datamanager.window_size", 0, "--pipeline.datamanager.window-size 0"),
    ("datamanager.rays_a_token", 0, "--pipeline.datamanager.rays-a-token 0"),
    ("datamanager.train_num_rays_per_batch", 0, "--pipeline.datamanager.train-num-rays-per-batch 0"),
    ("datamanager.eval_num_rays_per_batch", -5, "--pipeline.datamanager.eval-num-rays-per-batch -5"),
    ("datamanager.camera_res_scale_factor", 0.0, "--pipeline.datamanager.camera-res-scale-factor 0.0"),
    ("model.eval_num_rays_per_chunk", 0, "--pipeline.model.eval-num-rays-per-chunk 0"),
    ("model.implementation", "jax", ["--pipeline.model.implementation jax", "tcnn"]),
    ("model.average_init_density", 0.0, "--pipeline.model.average-init-density 0.0"),
    ("model.basis_dim", -1, "--pipeline.model.basis-dim -1"),
    ("model.basis_dim", 12.5, "basis-dim 12.5"),
    ("model.basis_dim", "all", "basis-dim all"),
    ("model.basis_energy", 0.0, "--pipeline.model.basis-energy 0.0"),
    ("model.basis_energy", 1.01, "basis-energy 1.01"),
    ("model.semantic_samples", 0, "--pipeline.model.semantic-samples 0"),
    ("model.semantic_levels", 0, "--pipeline.model.semantic-levels 0"),
    ("model.semantic_base_res", 0, "--pipeline.model.semantic-base-res 0"),
    ("model.semantic_max_res", 8, ["semantic-max-res 8", "semantic-base-res 16"]),
    ("model.semantic_log2_hashmap_size", 64, "--pipeline.model.semantic-log2-hashmap-size 64"),
    ("model.semantic_features_per_level", 0, "--pipeline.model.semantic-features-per-level 0"),
    ("model.semantic_hidden_dim", -1, "--pipeline.model.semantic-hidden-dim -1"),
    ("model.semantics_start", -1, "--pipeline.model.semantics-start -1"),
    ("model.fda_start", None, "--pipeline.model.fda-start None"),
    ("model.detach_density", "maybe", ["--pipeline.model.detach-density maybe", "True or False"]),
    ("model.feature_loss_mult", -1.0, "--pipeline.model.feature-loss-mult -1.0"),
    ("model.patch_loss_mult", NAN, "--pipeline.model.patch-loss-mult nan"),
    ("model.unmixing_loss_mult", INF, "--pipeline.model.unmixing-loss-mult inf"),
    ("model.unmixing_temperature", 0.0, "--pipeline.model.unmixing-temperature 0.0"),
    ("model.rda_loss_mult", -0.1, "--pipeline.model.rda-loss-mult -0.1"),
    ("model.rda_range", "room", ["--pipeline.model.rda-range room", "view, scene"]),
    ("model.fda_positive_mult", -200.0, "--pipeline.model.fda-positive-mult -200.0"),
    ("model.fda_negative_mult", "0.2", "--pipeline.model.fda-negative-mult 0.2"),
    ("model.fda_temperature", 0.0, ["--pipeline.model.fda-temperature 0.0", "above 0"]),
    ("model.fda_temperature", -0.2, "fda-temperature -0.2"),
    ("model.fda_temperature", NAN, "fda-temperature nan"),
    ("model.fda_temperature_unit", "kelvin", ["--pipeline.model.fda-temperature-unit kelvin", "spread"]),
    ("model.fda_shift", 1.5, ["--pipeline.model.fda-shift 1.5", "-1 to 1"]),
    ("model.fda_divergence", "l2", ["--pipeline.model.fda-divergence l2", "js, kl"]),
    ("model.fda_rebalance", 1, "--pipeline.model.fda-rebalance 1"),
    ("model.fda_pairs", 0, "--pipeline.model.fda-pairs 0"),
    ("model.class_scores", "votes", ["--pipeline.model.class-scores votes", "relevancy"]),
    ("model.overlay_opacity", 1.1, ["--pipeline.model.overlay-opacity 1.1", "0 to 1"]),
    ("model.learned_scales", None, "--pipeline.model.learned-scales None"),
    ("model.prompt", "cat", ["--prompt", "--pipeline.prompts"]),
    ("prompts", ["cat"], "--pipeline.prompts ['cat']"),
    ("prompts", ";;", "no prompt in ';;'"),
    ("prompts", "\x00\u200b;\n", "no prompt"),
    ("prompts", "x" * 301, "301 characters"),
    ("prompts", ";".join(map(str, range(201))), "201 prompts"),
    ("prompts_file", Path("nowhere.txt"), "nowhere.txt does not exist"),
    ("prompts_file", Path("/"), "/ cannot be read"),
    ("image_text_encoder", None, "--pipeline.image-text-encoder None"),
]


@pytest.mark.parametrize("option, value, said", OPTIONS)
def test_an_option_is_refused_by_its_name(small, tmp_path, capsys, option, value, said):
    config = small_config(small)
    assign(config.pipeline, option, value)
    refused(capsys, tmp_path, lambda: opened(config), said)


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "meta?"])
def test_a_device_that_is_not_here_is_refused(small, tmp_path, capsys, device):
    config = small_config(small)
    config.machine.device_type = device
    refused(capsys, tmp_path, lambda: opened(config), [f"--machine.device-type {device}", "cpu"])


@pytest.mark.parametrize("steps", [0, -1])
def test_a_training_of_no_steps_is_refused(small, tmp_path, capsys, steps):
    from nerfstudio.scripts import train

    config = small_config(small)
    config.output_dir, config.vis, config.max_num_iterations = tmp_path / "outputs", "tensorboard", steps
    refused(capsys, tmp_path, lambda: train.main(config), f"--max-num-iterations {steps}")
    assert not [*tmp_path.glob("outputs/*")]


@pytest.mark.parametrize("kind", [OVS3DDataManagerConfig, OVS3DModelConfig])
def test_every_number_of_ours_has_its_range(kind):
    own = [base for base in kind.__mro__ if base.__module__.startswith("ovs3d_nerfstudio")]
    hints = {name: hint for base in own for name, hint in base.__annotations__.items()}
    numbers = {name for name, hint in hints.items() if hint.split(" | ")[0] in ("int", "float")}
    assert len(own) == 2 and numbers and numbers <= set(kind.RANGES)


def test_what_the_variants_have_is_allowed():
    from nerfstudio.configs.method_configs import all_methods

    from ovs3d_nerfstudio.pipeline import check_options
    from ovs3d_nerfstudio.run_files import our_methods

    assert len(our_methods()) == 5
    for name in our_methods():
        check_options(all_methods[name].pipeline)


# Words of the `ovs3d` command on the small scene, and what the sentence must say.
WORDS = [
    (["preview", "--views", 0], "--views 0"),
    (["preview", "--views", -2], "--views -2"),
    (["preview", "--method", "nerfacto"], ["--method nerfacto", "ovs3d-lite"]),
    (["preview", "--scales", 0], "--scales 0.0"),
    (["preview", "--scales", "nan"], "--scales nan"),
    (["preview", "--device", "abacus"], "--device abacus"),
    (["preview", "--output-path", "."], "--output-path ."),
    (["preview", "--output-path", "/"], "--output-path /"),
    (["preview", "--prompts", ";"], "no prompt"),
    (["preview", "--prompts", "a", "--prompts-file", "b"], "only one of them"),
    (["preview", "--prompts-file", "b"], "b does not exist"),
    (["preview", "--image-text-encoder", "clipp"], ["'clipp'", "open_clip"]),
    (["extract", "--scales", -1], "--scales -1.0"),
    (["extract", "--scales", 2, "inf"], "--scales inf"),
    (["extract", "--scales", 100], "too small for patches of 1/100"),
    (["extract", "--device", "cuda:99"], "--device cuda:99"),
    (["extract", "--token-encoder", "dino:/nowhere"], "/nowhere"),
    (["extract", "--image-text-encoder", "offline:slow"], "offline:crops"),
    (["extract", "--image-text-encoder", ":"], "no encoder ''"),
    (["extract", "--token-encoder", "offline:12"], "64 or more"),
    (["extract", "--image-text-encoder", "open_clip:ViT-Z-99"], "no model 'ViT-Z-99'"),
    (["extract", "--image-text-encoder", "open_clip:ViT-B-16@/nowhere.pt"], "/nowhere.pt"),
]


@pytest.mark.parametrize("words, said", WORDS)
def test_a_word_of_ovs3d_is_refused(small, tmp_path, capsys, monkeypatch, words, said):
    from ovs3d_nerfstudio.cli import main

    monkeypatch.chdir(tmp_path)
    method = [] if "--method" in words else ["--method", "ovs3d-lite"]
    line = [words[0], "--data", small, *method, *words[1:]]
    refused(capsys, tmp_path, lambda: main([str(word) for word in line]), said)


# What is looked at before a run is opened, which takes long.
EARLY = [
    (["eval", "--output-path", "figures"], "--output-path figures"),
    (["eval", "--output-path", "."], "--output-path ."),
    (["eval", "--prompt-classes", "cat"], "PROMPT = CLASS"),
    (["export", "pointcloud", "--num-points", 0], "--num-points 0"),
    (["export", "pointcloud", "--num-rays-per-batch", -1], "--num-rays-per-batch -1"),
    (["export", "pointcloud", "--object-gap", "nan"], "--object-gap nan"),
    (["export", "pointcloud", "--smallest-object", 2], "--smallest-object 2.0"),
    (["export", "pointcloud", "--farthest", -1], "--farthest -1.0"),
    (["export", "pointcloud", "--std-ratio", -1], "--std-ratio -1.0"),
    (["export", "pointcloud", "--obb-center", 0, 0, 0], "--obb-center alone is no box"),
    (["export", "mesh", "--object", 3], "objects.json does not exist"),
    (["export", "mesh", "--voxel", 0], "--voxel 0.0"),
    (["export", "mesh", "--downscale", 0.5], "--downscale 0.5"),
    (["export", "splat", "--least-probability", 1.5], "--least-probability 1.5"),
    (["export", "splat", "--splat", "nowhere.ply"], "nowhere.ply does not exist"),
    (["export", "splat", "--splat-config", "run"], ["--splat-config run", "--splat"]),
    (["export", "splat", "--splat", "BROKEN"], "cannot be read as a PLY"),
    (["export", "mesh", "--mesh", "nowhere.ply"], "nowhere.ply does not exist"),
    (["export", "mesh", "--mesh", "BROKEN"], "cannot be read as a mesh"),
    (["objects", "--threshold", 2], "--threshold 2.0"),
    (["render", "dataset", "--downscale-factor", 0], "--downscale-factor 0"),
    (["render", "dataset", "--jpeg-quality", 101], "--jpeg-quality 101"),
    (["render", "interpolate", "--interpolation-steps", 0], "--interpolation-steps 0"),
    (["render", "interpolate", "--frame-rate", 0], "--frame-rate 0"),
    (["render", "interpolate", "--eval-num-rays-per-chunk", -1], "--eval-num-rays-per-chunk -1"),
    (["render", "spiral", "--seconds", 0], "--seconds 0.0"),
    (["render", "spiral", "--seconds", 0.01], "--seconds 0.01 at --frame-rate 24 is no frame"),
    (["render", "spiral", "--radius", "nan"], "--radius nan"),
    (["render", "spiral", "--output-path", "v.gif"], ["--output-path v.gif", ".mp4", "--output-format images"]),
    (["render", "interpolate", "--output-path", "."], "--output-path ."),
    (["render", "camera-path", "--output-path", "v.webm"], "--output-path v.webm"),
    (["render", "dataset", "--camera-idx", -1], "--camera-idx -1"),
    (["render", "dataset", "--depth-far-plane", "inf"], "--depth-far-plane inf"),
    (["render", "dataset", "--colormap-options.colormap-max", "nan"], "--colormap-options.colormap-max nan"),
    (["render", "dataset", "--rendered-output-names", "rgba"], ["rgba is transparent", "give --image-format png."]),
    (["render", "spiral", "--rendered-output-names", "rgba", "--image-format", "png"], "--output-format images"),
    (["render", "camera-path", "--camera-path-filename", "nowhere.json"], "nowhere.json"),
    (["render", "camera-path", "--camera-path-filename", "BROKEN"], "no camera path"),
    (["render", "camera-path", "--camera-path-filename", "POSELESS"], "no camera path"),
    (["render", "camera-path", "--camera-path-filename", "NAN"], "no camera path"),
    (["render", "dataset"], "config.yml does not exist"),
    (["eval"], "config.yml does not exist"),
    (["export", "pointcloud"], "config.yml does not exist"),
]


@pytest.mark.parametrize("words, said", EARLY)
def test_a_word_is_refused_before_a_run_is_opened(tmp_path, capsys, monkeypatch, words, said):
    from ovs3d_nerfstudio.cli import main

    monkeypatch.chdir(tmp_path)
    files = {"BROKEN": "ply? no"}
    for name, matrix in (("POSELESS", [1, 2]), ("NAN", [NAN, *np.eye(4).ravel()[1:]])):
        entry = {"camera_to_world": matrix, "fov": 50}
        path = {"render_height": 9, "render_width": 9, "seconds": 1, "camera_path": [entry]}
        files[name] = json.dumps(path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    line = [*words, "--load-config", tmp_path / "config.yml"]
    refused(capsys, tmp_path, lambda: main([str(word) for word in line]), said)


@pytest.mark.parametrize("words, said", [(["--steps", 0], "--steps 0"), (["--folder", "FILE"], "FILE")])
def test_the_demo_refuses(tmp_path, capsys, monkeypatch, words, said):
    from ovs3d_nerfstudio.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("a letter")
    refused(capsys, tmp_path, lambda: main(["demo", *map(str, words)]), said)


@pytest.mark.parametrize(
    "words",
    [["preview"], ["preview", "--views", "many"], ["eval", "--split", "half"], ["render", "sideways"], ["demo", "x"]],
)
def test_what_is_no_command_line_ends_without_a_traceback(capsys, words):
    from ovs3d_nerfstudio.cli import main

    with pytest.raises(SystemExit) as end:
        main(words)
    printed = "".join(capsys.readouterr())
    assert end.value.code and "Traceback" not in printed and words[0] in printed
