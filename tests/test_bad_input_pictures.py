"""Odd pictures that are fine: whatever a photo is stored as, training sees what a person sees, and says what it loses."""

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from bad_input import HEIGHT, VIEWS, WIDTH, opened, small_config
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.scene_box import SceneBox
from PIL import Image

from ovs3d_nerfstudio.data.annotations import Annotations
from ovs3d_nerfstudio.data.dataset import OVS3DDataset
from ovs3d_nerfstudio.pictures import picture_header, read_picture

Y, X = np.mgrid[:HEIGHT, :WIDTH]
PHOTO = np.stack([255 * X // WIDTH, 255 * Y // HEIGHT, 255 - 255 * X // WIDTH], -1).astype(np.uint8)
GREY = PHOTO[..., :1].repeat(3, -1)
HALF = np.where(X < WIDTH // 2, 255, 0).astype(np.uint8)
"""Alpha: the left half is there, the right half is not."""


def saved(picture: Image.Image, kind: str, **options):
    return lambda path: picture.save(path, format=kind, **options)


def animated(kind: str):
    """The photo, then two black frames."""
    black = Image.new("RGB", (WIDTH, HEIGHT))
    return saved(Image.fromarray(PHOTO), kind, save_all=True, append_images=[black, black])


def deep(pixels: np.ndarray):
    """16 bits a channel, whose lower eight are all set."""

    def save(path: Path) -> None:
        values = pixels.astype(np.uint16) * 256 + 255
        path.write_bytes(cv2.imencode(".png", values[..., ::-1] if values.ndim == 3 else values)[1].tobytes())

    return save


def turned(path: Path) -> None:
    """A tag says to turn the photo; cameras were measured on the pixels as they are stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PHOTO).save(path, format="PNG", exif=exif)


photo, grey = Image.fromarray(PHOTO), Image.fromarray(GREY[..., 0])
cut_out = Image.fromarray(np.dstack([PHOTO, HALF]))

# How it is stored, what is to be seen, how far a value may be off, and whether parts are transparent.
KINDS = {
    "PNG": (saved(photo, "PNG"), PHOTO, 0, False),
    "JPEG": (saved(photo, "JPEG", quality=95), PHOTO, 12, False),
    "WebP": (saved(photo, "WEBP", lossless=True), PHOTO, 0, False),
    "TIFF": (saved(photo, "TIFF"), PHOTO, 0, False),
    "BMP": (saved(photo, "BMP"), PHOTO, 0, False),
    "CMYK": (saved(photo.convert("CMYK"), "TIFF"), PHOTO, 2, False),
    "CMYK as JPEG": (saved(photo.convert("CMYK"), "JPEG", quality=95), PHOTO, 16, False),
    "YCbCr": (saved(photo.convert("YCbCr"), "TIFF"), PHOTO, 3, False),
    "palette": (saved(photo.quantize(256), "PNG"), PHOTO, 24, False),
    "palette with a hole": (saved(cut_out.quantize(256), "PNG"), PHOTO, 40, True),
    "grey": (saved(grey, "PNG"), GREY, 0, False),
    "grey with alpha": (saved(Image.merge("LA", (grey, Image.fromarray(HALF))), "PNG"), GREY, 0, True),
    "grey of 16 bits": (deep(GREY[..., 0]), GREY, 0, False),
    "colours of 16 bits": (deep(PHOTO), PHOTO, 0, False),
    "grey of 16 bits as TIFF": (saved(Image.fromarray(GREY[..., 0].astype(np.uint16) * 257), "TIFF"), GREY, 0, False),
    "one bit": (saved(Image.fromarray(HALF).convert("1"), "PNG"), HALF[..., None].repeat(3, -1), 0, False),
    "alpha": (saved(cut_out, "PNG"), PHOTO, 0, True),
    "animated GIF": (animated("GIF"), PHOTO, 40, False),
    "animated PNG": (animated("PNG"), PHOTO, 0, False),
    "animated WebP": (animated("WEBP"), PHOTO, 40, False),
    "a phone's MPO": (animated("MPO"), PHOTO, 24, False),
    "TIFF of several pages": (animated("TIFF"), PHOTO, 0, False),
    "turned by a tag": (turned, PHOTO, 0, False),
}


def dataset(paths: list[Path]) -> OVS3DDataset:
    poses = torch.eye(4)[:3].repeat(len(paths), 1, 1)
    cameras = Cameras(poses, fx=50.0, fy=50.0, cx=24.0, cy=18.0, width=WIDTH, height=HEIGHT)
    box = SceneBox(torch.tensor([[-1.0] * 3, [1.0] * 3]))
    return OVS3DDataset(DataparserOutputs(image_filenames=paths, cameras=cameras, scene_box=box))


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_seen_as_it_looks(tmp_path, kind):
    save, expected, tolerance, transparent = KINDS[kind]
    path = tmp_path / "picture.png"
    save(path)
    pixels = dataset([path]).get_numpy_image(0)
    assert pixels.dtype == np.uint8 and pixels.shape == (HEIGHT, WIDTH, 4 if transparent else 3)
    there = np.ones((HEIGHT, WIDTH), bool)
    if transparent:
        there = HALF > 0
        assert np.array_equal(pixels[..., 3] > 127, there)
    assert np.abs(pixels[..., :3].astype(int) - expected)[there].max() <= tolerance
    embedded = read_picture(path).numpy()
    assert np.abs(embedded.astype(int) - expected)[there].max() <= tolerance
    assert (embedded[~there] == 255).all()
    header = picture_header(path)
    assert (header.width, header.height, header.alpha) == (WIDTH, HEIGHT, transparent)
    lossy = kind.startswith(("CMYK", "animated", "TIFF of several"))
    assert bool(header.remark) == lossy


def test_pictures_with_and_without_alpha_go_together(tmp_path):
    photo.save(tmp_path / "a.png")
    cut_out.save(tmp_path / "b.png")
    both = dataset([tmp_path / "a.png", tmp_path / "b.png"])
    assert (both.get_numpy_image(0)[..., 3] == 255).all() and both.get_numpy_image(1).shape[-1] == 4


def test_a_shrunk_picture_keeps_its_colours(tmp_path):
    path = tmp_path / "a.png"
    photo.quantize(256).save(path)
    whole = dataset([path])
    half = OVS3DDataset(whole._dataparser_outputs, scale_factor=0.5).get_numpy_image(0)
    assert half.shape == (HEIGHT // 2, WIDTH // 2, 3)
    assert np.abs(half.astype(int) - np.asarray(photo.resize((WIDTH // 2, HEIGHT // 2)))).max() < 24


def test_a_scene_of_every_kind_and_of_several_sizes_trains(small, checkpoints, capsys):
    content = json.loads((small / "transforms.json").read_text())
    kinds = ["CMYK", "palette with a hole", "grey of 16 bits", "animated GIF", "one bit", "JPEG"]
    for entry, kind in zip(content["frames"], kinds, strict=False):
        KINDS[kind][0](small / entry["file_path"])
    shared = {key: content.pop(key) for key in ("w", "h", "cx", "cy", "fl_x", "fl_y")}
    for i, entry in enumerate(content["frames"]):
        entry |= {key: value * (2 if i == 5 else 1) for key, value in shared.items()}
    file = io.BytesIO()
    photo.resize((2 * WIDTH, 2 * HEIGHT)).save(file, format="PNG")
    (small / content["frames"][5]["file_path"]).write_bytes(file.getvalue())
    (small / "transforms.json").write_text(json.dumps(content))
    config = small_config(small)
    for name, spec in checkpoints.items():
        setattr(config.pipeline, name, spec)
    pipeline = opened(config)
    said = " ".join(capsys.readouterr().out.split())
    assert "Warning: 1 of 6 pictures in CMYK (such as 00.png): colours" in said
    assert "Warning: 1 of 6 pictures of several frames (such as 03.png): only the first is used." in said
    pipeline.train()
    for step in range(3):
        _, losses, _ = pipeline.get_train_loss_dict(step)
        assert all(torch.isfinite(loss) for loss in losses.values())
    assert {"rgb_loss", "feature_loss", "rda_loss"} <= set(losses)


def mask_kinds() -> dict[str, Image.Image]:
    white = Image.fromarray(HALF)
    return {
        "half the size": white.resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.NEAREST),
        "grey": Image.fromarray(np.where(HALF > 0, 140, 110).astype(np.uint8)),
        "colours": white.convert("RGB"),
        "palette": white.convert("P"),
        "one bit": white.convert("1"),
        "16 bits": Image.fromarray(HALF.astype(np.uint16) * 257),
        "white cut out": Image.merge("LA", (Image.new("L", white.size, 255), white)),
    }


@pytest.mark.parametrize("kind", mask_kinds())
def test_a_mask_of_any_kind_is_white_where_it_looks_white(small, kind):
    view = f"{VIEWS - 1:02d}"
    (small / "segmentations" / view / "sheep.png").unlink()
    mask_kinds()[kind].save(small / "segmentations" / view / "grass.png")
    labels = Annotations(small).labels(view, HEIGHT, WIDTH)
    assert np.array_equal(labels == 0, HALF > 0)
