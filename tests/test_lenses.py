"""Gaussians through the lenses that people have: distorted photos and fisheyes, without a photo being changed."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.configs.method_configs import all_methods
from plyfile import PlyData, PlyElement
from test_data import LENSES, SOLIDS, shots, write_scene
from training import train_steps

from ovs3d_nerfstudio.demo.raycast import cast, render
from ovs3d_nerfstudio.gaussians.lenses import WIDEST, LensError, lens_of, tangents_of
from ovs3d_nerfstudio.prompts.answers import unpacked


def camera(lens: str | None, width=64, height=48, focal=45.0) -> Cameras:
    kind, k = LENSES[lens] if lens else (CameraType.PERSPECTIVE, {})
    bends = torch.tensor([[k.get(name, 0.0) for name in ("k1", "k2", "k3", "k4", "p1", "p2")]])
    pose = torch.eye(3, 4)[None]
    return Cameras(pose, focal, focal, width / 2 + 3, height / 2 - 2, width, height, bends, kind)


@pytest.mark.parametrize("lens", [None, *LENSES])
def test_each_pixel_looks_where_nerfstudios_rays_do(lens):
    one = camera(lens)
    rays = one.generate_rays(0, keep_shape=True).directions
    tangents = rays[..., :2] * torch.tensor([1.0, -1]) / -rays[..., 2:]
    # Of nerfstudio's own, which stop a little before they are exact.
    assert (tangents_of(one[0:1]) - tangents).abs().max() < 0.01
    assert (lens_of(one[0:1]) is None) == (lens is None)


def test_a_picture_of_its_own_coordinates_is_seen_where_they_lie():
    lens = lens_of(camera("OPENCV")[0:1])
    width, height = lens.size
    rows, cols = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    inner = (lens.places > 1).all(-1) & (lens.places < torch.tensor(lens.size) - 1.0).all(-1)
    assert inner.float().mean() > 0.9
    assert torch.allclose(lens.seen_through(torch.stack([cols, rows], -1))[inner], lens.places[inner], atol=1e-3)


def test_a_wide_fisheye_is_rendered_as_far_as_a_pinhole_can():
    one = camera("OPENCV_FISHEYE", focal=20.0)[0:1]
    one.distortion_params = None
    lens = lens_of(one)
    places = torch.stack(torch.meshgrid(torch.arange(64) + 0.5, torch.arange(48) + 0.5, indexing="xy"), -1)
    angle = (places - torch.tensor([35.0, 22.0])).norm(dim=-1) / 20
    assert torch.equal(lens.covered, angle <= WIDEST) and not lens.covered.all()
    assert (lens.places[lens.covered] > 0).all() and (lens.places[lens.covered] < torch.tensor(lens.size)).all()
    assert not lens.seen_through(torch.ones(*lens.size[::-1], 1))[~lens.covered].any()


def test_panoramas_are_refused_by_name():
    one = camera(None)[0:1]
    one.camera_type[:] = CameraType.EQUIRECTANGULAR.value
    with pytest.raises(LensError, match=r"not with EQUIRECTANGULAR.*ovs3d"):
        lens_of(one)


@pytest.fixture(scope="module", params=["OPENCV", "OPENCV_FISHEYE"])
def trained(request, tmp_path_factory):
    """A short training on photos with a lens, begun at every third pixel's true place, and the scene's cameras."""
    cameras = shots(9, lens=request.param)
    folder = write_scene(tmp_path_factory.mktemp("lens") / "scene", cameras)
    rows = []
    for shot in cameras[:-1]:
        depth = cast(SOLIDS, shot)[1].ravel()[::3]
        origin, directions = shot.rays(1)
        points = (origin + depth * directions[:, ::3]).T[np.isfinite(depth)]
        colors = render(SOLIDS, shot).reshape(-1, 3)[::3][np.isfinite(depth)]
        rows += [(*point, *color) for point, color in zip(points, colors, strict=True)]
    kinds = [*((name, "f4") for name in "xyz"), *((name, "u1") for name in ("red", "green", "blue"))]
    PlyData([PlyElement.describe(np.array(rows, kinds), "vertex")]).write(folder / "sparse_pc.ply")
    path = folder / "transforms.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ply_file_path": "sparse_pc.ply"}))
    config = copy.deepcopy(all_methods["ovs3d-splat-lite"])
    config.pipeline.datamanager.data = folder
    config.pipeline.model.semantics_start, config.pipeline.model.fda_start = 120, 125
    return train_steps(config, 140), cameras


@pytest.mark.slow
def test_photos_with_a_lens_are_learned_and_rendered_as_they_are(trained):
    """Held out, where wrong rays would end below 20 dB; and the field's classes lie where their pixels do."""
    run, cameras = trained
    run.pipeline.eval()
    model, datamanager = run.pipeline.model, run.pipeline.datamanager
    assert len(datamanager.cached_train[0]["image"]) == cameras[0].height
    outputs = model.get_outputs_for_camera(datamanager.eval_dataset.cameras[:1])
    assert outputs["segmentation"].shape == (cameras[-1].height, cameras[-1].width, 3)
    photo = datamanager.eval_dataset.get_image_float32(0)
    psnr = -10 * math.log10((outputs["rgb"] - photo).square().mean())
    assert psnr > 21, psnr
    metrics, _ = run.pipeline.get_eval_image_metrics_and_images(0)
    assert 0 <= metrics["miou"] <= 1


@pytest.mark.slow
def test_windows_are_asked_where_the_lens_puts_their_pixels(trained):
    """What a window is told of a pixel is what the whole picture shows there."""
    run, _ = trained
    model, datamanager = run.pipeline.model, run.pipeline.datamanager
    run.pipeline.eval()
    drawn = datamanager.draw_windows()
    views = drawn.pixels[:: drawn.side**2, 0]
    with torch.no_grad():
        asked = model._outputs_of(drawn, datamanager.train_dataset.cameras[views])["window_semantics"].coefficients
        with model.features_wanted():
            for view, pixels, found in zip(
                views.tolist(), drawn.pixels.split(drawn.side**2), asked.split(drawn.side**2), strict=True
            ):
                rendered = model.get_outputs_for_camera(datamanager.train_dataset.cameras[view : view + 1])
                directions = unpacked(rendered["directions"])[pixels[:, 1], pixels[:, 2]]
                agree = torch.nn.functional.cosine_similarity(found, directions, dim=-1)
                assert agree.median() > 0.97, (view, agree.median())
