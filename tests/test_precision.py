"""What is set up, extracted or drawn has single precision, whatever precision the trainer computes a step in."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.scene_box import SceneBox
from rich.console import Console

from ovs3d_nerfstudio.encoders.base import image_text_encoder, token_encoder
from ovs3d_nerfstudio.features.extraction import extract
from ovs3d_nerfstudio.pictures import read_picture
from ovs3d_nerfstudio.precision import tower_precision


@pytest.fixture(scope="module")
def pictures(scene) -> list[Path]:
    return sorted((scene / "images").iterdir())[:1]


def test_one_fingerprint_is_one_set_of_numbers_whatever_the_caller_computes_in(checkpoints, pictures, tmp_path):
    for name, clip, dino in (("offline", "offline", "offline"), ("weights", *checkpoints.values())):
        files = {}
        for half in (False, True):
            folder = tmp_path / f"{name} {half}"
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                encoder = image_text_encoder(clip)
                extract(pictures, encoder, token_encoder(dino), (2.0,), folder, Console(quiet=True))
            files[half] = {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}
        assert files[True] == files[False] and files[True], name


@pytest.mark.parametrize(
    ("told", "on_the_cpu"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_a_tower_computes_in_half_precision_where_a_device_is_quick_at_it(told, on_the_cpu, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    found = {device: tower_precision(torch.device(device)) for device in ("cpu", "cuda", "mps")}
    assert found == {"cpu": on_the_cpu, "cuda": torch.float16, "mps": torch.float32}
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch
    assert tower_precision(torch.device("cpu")) is torch.float32


def test_half_precision_changes_what_towers_say_of_pictures_little_and_of_prompts_nothing(
    checkpoints, pictures, monkeypatch
):
    picture, found = read_picture(pictures[0]), []
    boxes = torch.tensor([[0.0, 0, 48, 48], [60, 20, 108, 68]])
    for half in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda half=half: {"amx_bf16": half}, raising=False)
        clip, dino = image_text_encoder(checkpoints["image_text_encoder"]), token_encoder(checkpoints["token_encoder"])
        text = clip.embed_text(["a cat"])
        found.append(
            [
                clip.embed_boxes(picture, boxes, pictures[0]),
                clip.embed_dense(picture, pictures[0]),
                dino.embed_picture(picture),
            ]
        )
        found[-1].append(text)
    *single, text = found[0]
    *halved, same = found[1]
    assert torch.equal(text, same)
    for one, other in zip(single, halved, strict=True):
        assert one.dtype == other.dtype == torch.float32 and not torch.equal(one, other)
        assert F.cosine_similarity(one, other, dim=-1).min() > 0.999


def test_rays_that_the_camera_optimizer_corrects_keep_their_directions():
    config = copy.deepcopy(all_methods["ovs3d-lite"].pipeline.model)
    config.camera_optimizer.mode = "SO3xR3"
    box = SceneBox(torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
    model = config.setup(scene_box=box, num_train_data=2, metadata={}, device="cpu")
    torch.nn.init.normal_(model.camera_optimizer.pose_adjustment, std=0.01)
    directions = F.normalize(torch.randn(50, 3), dim=-1)
    corrected = []
    for half in (False, True):
        indices = torch.arange(50)[:, None] % 2
        rays = RayBundle(torch.zeros(50, 3), directions.clone(), torch.full((50, 1), 1e-4), indices)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model.camera_optimizer.apply_to_raybundle(rays)
        corrected.append(rays.directions)
    assert not torch.equal(corrected[0], directions) and torch.equal(*corrected)
