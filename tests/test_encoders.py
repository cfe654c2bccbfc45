"""The encoders: real open_clip and transformers code on tiny random weights, and the offline networks as they are."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported: no test may wait for a hub

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ovs3d_nerfstudio.encoders import base, hub
from ovs3d_nerfstudio.encoders import open_clip as open_clip_encoder
from ovs3d_nerfstudio.encoders.base import (
    EncoderError,
    ImageTextEncoder,
    cut_boxes,
    encoders,
    image_text_encoder,
    pool_boxes,
    token_encoder,
)
from ovs3d_nerfstudio.encoders.dino import DinoEncoder
from ovs3d_nerfstudio.encoders.offline import ConseEncoder, EfficientNetTokens
from ovs3d_nerfstudio.encoders.open_clip import OpenClipEncoder

NOWHERE = Path("picture.png")
TINY = "ovs3d-tiny"
TINY_CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def random_picture(height: int, width: int, seed: int = 0) -> Tensor:
    """H × W × 3 bytes of smooth noise: neighbouring pixels are alike, as in a photograph."""
    noise = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    picture = interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)[0]
    return (picture.permute(1, 2, 0) * 255).byte()


# ---------------------------------------------------------------------------------------------------- base


class MeanColour(ImageTextEncoder):
    """The smallest encoder that keeps the interface: a crop's embedding is its four quarters' mean colours."""

    input_size = 16
    batch_size = 3
    dim = 12
    fingerprint = "mean colour"

    def embed_text(self, prompts):
        return torch.zeros(len(prompts), 12)

    def embed_crops(self, crops):
        return torch.nn.functional.avg_pool2d(crops, 8).flatten(1)


def test_boxes_are_embedded_as_crops_cut_by_hand():
    picture = random_picture(90, 120)
    boxes = torch.tensor([[0, 0, 48, 48], [60, 20, 108, 68], [72, 42, 120, 90], [8, 4, 56, 52]], dtype=torch.float32)
    embeddings = MeanColour("", "cpu").embed_boxes(picture, boxes, NOWHERE)
    for (left, top, right, bottom), embedding in zip(boxes.int().tolist(), embeddings, strict=True):
        crop = picture[top:bottom, left:right].permute(2, 0, 1)[None].float() / 255
        crop = interpolate(crop, (16, 16), mode="area")
        expected = normalize(MeanColour("", "cpu").embed_crops(crop), dim=-1)[0]
        assert torch.allclose(embedding, expected, atol=1e-3)


def test_an_unknown_encoder_names_the_known_ones():
    with pytest.raises(EncoderError, match=r"no encoder 'clip'.*offline, open_clip"):
        image_text_encoder("clip:ViT-B-16")
    with pytest.raises(EncoderError, match="dino, offline"):
        token_encoder("nope")


def test_built_in_encoders_are_entry_points_and_cheap_to_construct():
    assert isinstance(image_text_encoder("open_clip"), OpenClipEncoder)
    assert isinstance(image_text_encoder("offline:crops"), ConseEncoder)
    assert isinstance(token_encoder("dino"), DinoEncoder)
    assert isinstance(token_encoder("offline"), EfficientNetTokens)


def test_a_third_party_encoder_joins_through_its_entry_point(tmp_path, monkeypatch):
    (tmp_path / "striped_encoder.py").write_text(
        "from ovs3d_nerfstudio.encoders.base import ImageTextEncoder\n"
        "class Striped(ImageTextEncoder):\n"
        "    dim = 3\n"
        "    @property\n"
        "    def fingerprint(self): return 'striped ' + self.option\n"
        "    def embed_text(self, prompts): raise NotImplementedError\n"
    )
    info = tmp_path / "striped_encoder-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: striped-encoder\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{base.IMAGE_TEXT_ENCODERS}]\nstriped = striped_encoder:Striped\n")
    monkeypatch.syspath_prepend(tmp_path)
    encoder = image_text_encoder("striped:/a/path:with colon@tag")
    assert encoder.fingerprint == "striped /a/path:with colon@tag"


# ---------------------------------------------------------------------------------------------------- open_clip


@pytest.fixture(autouse=True)
def single_precision_on_cpus(monkeypatch):
    """Values are compared with those of the models themselves; what half precision changes is tested in test_precision."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A random model of open_clip's, its weights as .pt and .safetensors."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    (folder / f"{TINY}.json").write_text(json.dumps(TINY_CONFIG))
    open_clip.add_model_config(folder / f"{TINY}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(TINY).eval()
    for parameter in model.visual.parameters():
        parameter.data *= 3  # far enough from zero that GELU and QuickGELU part
    torch.save(model.state_dict(), folder / "weights.pt")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "weights.safetensors")
    return folder, model


@pytest.mark.parametrize("file", ["weights.pt", "weights.safetensors"])
def test_open_clip_embeds_as_the_model_itself(tiny_clip, file):
    import open_clip

    folder, model = tiny_clip
    encoder = OpenClipEncoder(f"{TINY}@{folder / file}", "cpu")
    assert (encoder.dim, encoder.input_size) == (24, 32)
    prompts = ["red apple", "wooden table"]
    text = encoder.embed_text(prompts)
    assert torch.allclose(text, model.encode_text(open_clip.tokenize(prompts), normalize=True), atol=1e-5)
    assert not text.is_inference(), "it becomes a buffer, which ranks write to"

    picture = random_picture(64, 80)
    boxes = torch.tensor([[0.0, 0, 32, 32], [40, 30, 72, 62]])
    embeddings = encoder.embed_boxes(picture, boxes, NOWHERE)
    crops = torch.stack([picture[:32, :32], picture[30:62, 40:72]]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    assert torch.allclose(embeddings, model.encode_image((crops - mean) / std, normalize=True), atol=1e-4)


def test_open_clip_loads_only_the_tower_that_is_used(tiny_clip):
    folder, _ = tiny_clip
    text, image = (OpenClipEncoder(f"{TINY}@{folder / 'weights.pt'}", "cpu") for _ in range(2))
    text.embed_text(["cup"])
    assert text._visual is None and text._text.visual is None
    image.embed_crops(torch.rand(1, 3, 32, 32))
    assert image._text is None and not hasattr(image._visual, "token_embedding")
    assert text.embed_text([]).shape == (0, 24)


def test_quickgelu_is_switched_on_for_weights_that_need_it(tiny_clip, monkeypatch):
    import open_clip

    folder, model = tiny_clip
    tags = {"openai": {"url": "", "hf_hub": "x/y/", "mean": (0.5,) * 3, "std": (0.5,) * 3, "quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, TINY, tags)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: str(folder / "weights.pt"))
    encoder = OpenClipEncoder(TINY, "cpu")
    assert encoder.mean == (0.5, 0.5, 0.5) and "quickgelu" in encoder.fingerprint
    crops = torch.rand(2, 3, 32, 32)
    reference = open_clip.create_model(TINY, str(folder / "weights.pt"), force_quick_gelu=True).eval()
    assert torch.allclose(encoder.embed_crops(crops), reference.visual(crops * 2 - 1), atol=1e-4)
    assert not torch.allclose(encoder.embed_crops(crops), model.visual(crops * 2 - 1), atol=1e-2)


def test_open_clip_reads_the_preprocessing_of_its_weights():
    assert OpenClipEncoder("ViT-B-16-SigLIP@webli", "cpu").mean == (0.5, 0.5, 0.5)
    default = OpenClipEncoder("", "cpu")
    assert (default.model_name, default.weights, default.dim, default.quick_gelu) == ("ViT-B-16", "openai", 512, True)


def test_open_clip_fingerprint_follows_the_weights_and_not_their_name(tiny_clip, tmp_path):
    folder, model = tiny_clip
    weights = model.state_dict() | {"logit_scale": torch.tensor(1.0)}
    torch.save(weights, tmp_path / "weights.pt")
    shutil.copy(folder / "weights.pt", tmp_path / "copy.pt")
    fingerprint = {
        path: OpenClipEncoder(f"{TINY}@{path}", "cpu").fingerprint
        for path in (folder / "weights.pt", tmp_path / "weights.pt", tmp_path / "copy.pt")
    }
    original, changed, copied = fingerprint.values()
    assert original == copied != changed
    assert OpenClipEncoder("ViT-B-16@openai", "cpu").fingerprint != OpenClipEncoder("ViT-B-32", "cpu").fingerprint


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("ViT-Q-99", "no model 'ViT-Q-99'"),
        ("ViT-B-16@opneai", "'opneai' is neither a file nor a tag.*openai, "),
        ("ViT-B-16@/no/such/file.pt", "'/no/such/file.pt' is neither a file nor a tag"),
        (TINY, "'openai' is neither.*none is published"),
    ],
)
def test_open_clip_says_what_is_wrong_with_its_option(tiny_clip, option, message):
    with pytest.raises(EncoderError, match=message):
        OpenClipEncoder(option, "cpu")


def test_open_clip_refuses_files_that_are_no_weights(tiny_clip, tmp_path):
    class Surprise:  # what weights_only=True is there for
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    (tmp_path / "text.pt").write_text("not weights")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save({"visual.proj": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save({"state_dict": Surprise()}, tmp_path / "pickle.pt")
    for name in ("text.pt", "empty.safetensors", "other.pt", "pickle.pt"):
        with pytest.raises(EncoderError, match=f"{name}' cannot be loaded as weights of {TINY}"):
            OpenClipEncoder(f"{TINY}@{tmp_path / name}", "cpu").embed_text(["cup"])
    assert not (tmp_path / "ran").exists()


def test_open_clip_says_what_to_do_without_a_hub(monkeypatch):
    import open_clip

    def unreachable(config):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    with pytest.raises(EncoderError, match=r"cannot be downloaded \(no route to host\).*open_clip:ViT-B-16@FILE"):
        OpenClipEncoder("", "cpu").embed_text(["cup"])


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A machine without weights, from which the hub cannot be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    hub.reachable.cache_clear()
    yield constants
    hub.reachable.cache_clear()


def test_without_a_hub_and_weights_one_message_says_at_once_what_needs_none(no_hub):
    start = time.perf_counter()
    with pytest.raises(
        EncoderError, match=r"Neither encoder.*ViT-B-16.*dino-vitb8.*ovs3d-lite or ovs3d-splat-lite"
    ) as said:
        encoders("open_clip", "dino")
    assert time.perf_counter() - start < 10 and str(said.value).count("hub does not answer") == 2
    assert no_hub.HF_HUB_OFFLINE  # so that nothing else waits for it either


def test_the_default_weights_lie_where_open_clip_says():
    import open_clip

    model, _, weights = open_clip_encoder.DEFAULT.partition("@")
    assert open_clip.get_pretrained_cfg(model, weights)["hf_hub"].rstrip("/") == open_clip_encoder.DEFAULT_ON_HUB


def test_what_is_on_this_disk_needs_no_hub(no_hub, tiny_clip, tmp_path):
    folder = tmp_path / "models--facebook--dino-vitb8"
    (folder / "snapshots" / "1").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1")
    (folder / "snapshots" / "1" / "model.safetensors").touch()
    DinoEncoder("", "cpu").require()
    OpenClipEncoder(f"{TINY}@{tiny_clip[0] / 'weights.pt'}", "cpu").require()
    with pytest.raises(EncoderError, match="dino-vits8"):
        DinoEncoder("facebook/dino-vits8", "cpu").require()


@pytest.mark.parametrize(("height", "width"), [(60, 100), (100, 60), (48, 48), (48, 720)])
def test_open_clip_dense_features_lie_where_the_picture_changes(tiny_clip, height, width):
    encoder = OpenClipEncoder(f"{TINY}@{tiny_clip[0] / 'weights.pt'}", "cpu")
    picture = random_picture(height, width)
    before = encoder.embed_dense(picture, NOWHERE)
    rows, cols, dim = before.shape
    # A window of this model has 4 tokens along its side, the shorter edge one and a half windows.
    assert (min(rows, cols), dim) == (6, 24) and abs(
        max(rows, cols) / 6 - max(height, width) / min(height, width)
    ) < 0.2
    assert torch.allclose(before.norm(dim=-1), torch.ones(rows, cols), atol=1e-4)
    for row, col in ((0, 0), (rows // 2, cols - 1), (rows - 1, cols // 2)):
        changed, cell = picture.clone(), (height / rows, width / cols)
        planted = changed[
            round(row * cell[0]) : round((row + 1) * cell[0]), round(col * cell[1]) : round((col + 1) * cell[1])
        ]
        planted[:] = 255 - planted
        change = (encoder.embed_dense(changed, NOWHERE) - before).norm(dim=-1)
        assert divmod(int(change.argmax()), cols) == (row, col)


def test_open_clip_dense_features_are_the_last_layers_values_seen_through_local_attention(tiny_clip):
    """The same, token by token, from the model's own layers."""
    encoder = OpenClipEncoder(f"{TINY}@{tiny_clip[0] / 'weights.pt'}", "cpu")
    visual, side = tiny_clip[1].visual, 4
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        found = open_clip_encoder.local_tokens(encoder._image_tower(), pixels, side)[0]
        x = visual.transformer.resblocks[0](visual._embeds(pixels))[0, 1:]
        block = visual.transformer.resblocks[1]
        _, keys, values = (block.ln_1(x) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).split(32, -1)
        for i in range(side * side):
            heads = []
            for head in (slice(0, 16), slice(16, 32)):
                scores = keys[:, head] @ keys[i, head] / 4
                away = torch.tensor([(i // side - j // side) ** 2 + (i % side - j % side) ** 2 for j in range(side**2)])
                heads.append((scores + (-away / 50).exp()).softmax(0) @ values[:, head])
            expected = visual.ln_post(block.attn.out_proj(torch.cat(heads))) @ visual.proj
            assert torch.allclose(found[i], expected, atol=1e-3)


def test_dense_features_are_refused_in_words_where_there_are_none(tiny_clip, tmp_path):
    import open_clip

    with pytest.raises(EncoderError, match=r"MeanColour embeds whole crops only.*clip-features patches"):
        MeanColour("", "cpu").embed_dense(random_picture(32, 32), NOWHERE)
    name = "ovs3d-tiny-resnet"
    config = TINY_CONFIG | {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}}
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    torch.save(open_clip.create_model(name).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(EncoderError, match="ovs3d-tiny-resnet is no plain vision transformer"):
        OpenClipEncoder(f"{name}@{tmp_path / 'weights.pt'}", "cpu").embed_dense(random_picture(32, 32), NOWHERE)


# ---------------------------------------------------------------------------------------------------- DINO


@pytest.fixture(scope="module")
def vit_folders(tmp_path_factory):
    """Tiny random models of every generation, as transformers saves them."""
    import transformers as t

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64}
    configs = {
        "dino": t.ViTConfig(**size, intermediate_size=64, patch_size=8),
        "dinov2": t.Dinov2Config(**size, mlp_ratio=2, patch_size=14),
        "dinov2-registers": t.Dinov2WithRegistersConfig(**size, mlp_ratio=2, patch_size=14, num_register_tokens=4),
        "dinov3": t.DINOv3ViTConfig(**size, intermediate_size=64, patch_size=16, num_register_tokens=3),
    }
    folder = tmp_path_factory.mktemp("vits")
    for name, config in configs.items():
        torch.manual_seed(1)
        t.AutoModel.from_config(config).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(("name", "patch"), [("dino", 8), ("dinov2", 14), ("dinov2-registers", 14), ("dinov3", 16)])
def test_dino_tokens_lie_where_the_picture_changes(vit_folders, name, patch):
    encoder = DinoEncoder(str(vit_folders / name), "cpu")
    assert encoder.stride == patch
    picture = random_picture(6 * patch + 3, 9 * patch - 2)  # neither square nor a multiple of the patch
    before = encoder.embed_picture(picture)
    assert before.shape == (6, 9, 32)
    picture[2 * patch : 3 * patch, 6 * patch : 7 * patch] = 255
    change = (encoder.embed_picture(picture) - before).norm(dim=-1)
    assert divmod(int(change.argmax()), 9) == (2, 6)


def test_dino_reads_the_last_block_before_the_final_normalisation(vit_folders):
    from transformers import AutoModel

    picture = random_picture(64, 64)
    model = AutoModel.from_pretrained(vit_folders / "dino").eval()
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (picture.permute(2, 0, 1)[None].float() / 255 - mean) / std
    block = model(pixels, output_hidden_states=True).hidden_states[-1][0, 1:].reshape(8, 8, 32)
    assert torch.allclose(DinoEncoder(str(vit_folders / "dino"), "cpu").embed_picture(picture), block, atol=1e-4)


def test_dino_shrinks_large_pictures_and_never_enlarges_small_ones(vit_folders):
    folder = vit_folders / "dino"
    assert DinoEncoder(f"{folder}@64", "cpu").embed_picture(random_picture(200, 300)).shape[:2] == (8, 12)
    assert DinoEncoder(str(folder), "cpu").embed_picture(random_picture(40, 60)).shape[:2] == (5, 8)


def test_dino_fingerprint_follows_weights_size_and_preprocessing(vit_folders, tmp_path):
    copy = shutil.copytree(vit_folders / "dino", tmp_path / "copy")
    original = DinoEncoder(str(vit_folders / "dino"), "cpu").fingerprint
    assert DinoEncoder(str(copy), "cpu").fingerprint == original
    assert DinoEncoder(f"{copy}@100", "cpu").fingerprint != original
    (copy / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    prepared = DinoEncoder(str(copy), "cpu")
    assert prepared._prepared == ((0.5,) * 3, (0.5,) * 3) and prepared.fingerprint != original
    assert DinoEncoder(str(vit_folders / "dinov2"), "cpu").fingerprint != original


def test_dino_says_what_is_wrong_with_its_option(tmp_path):
    from transformers import ResNetConfig

    with pytest.raises(EncoderError, match="no folder '/no/such/folder'"):
        DinoEncoder("/no/such/folder", "cpu")
    with pytest.raises(EncoderError, match="'nobody/no-such-model' cannot be loaded"):
        DinoEncoder("nobody/no-such-model", "cpu").embed_picture(random_picture(64, 64))
    with pytest.raises(EncoderError, match="cannot be loaded"):
        DinoEncoder(str(tmp_path), "cpu").stride  # noqa: B018
    ResNetConfig().save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match=r"\(resnet\) is no plain vision transformer"):
        DinoEncoder(str(tmp_path), "cpu").stride  # noqa: B018


# ---------------------------------------------------------------------------------------------------- offline


def test_pool_boxes_is_the_mean_weighted_by_overlap():
    feature_map = torch.rand(3, 5, 7)
    boxes = torch.tensor([[0, 0, 7, 5], [1.25, 0.5, 3.75, 4.25], [2, 1, 3, 2], [-2, 3.5, 0.5, 9], [4.1, 2.2, 4.3, 2.4]])
    pooled = pool_boxes(feature_map, boxes)
    for box, mean in zip(boxes.tolist(), pooled, strict=True):
        left, top, right, bottom = box
        weight = torch.zeros(5, 7)
        for i in range(5):
            for j in range(7):
                rows, columns = min(bottom, i + 1) - max(top, i), min(right, j + 1) - max(left, j)
                weight[i, j] = max(rows, 0) * max(columns, 0)
        assert torch.allclose(mean, (feature_map * weight).sum((1, 2)) / weight.sum(), atol=1e-5)
    assert torch.isfinite(pool_boxes(feature_map, torch.tensor([[9.0, 9, 12, 12], [3, 3, 3, 3]]))).all()


@pytest.mark.parametrize("samples", [1, 3])
def test_boxes_are_cut_as_roi_align_cuts_them(samples):
    generator = torch.Generator().manual_seed(0)
    pixels, corner = torch.rand(1, 3, 40, 60, generator=generator), torch.rand(5, 2, generator=generator) * 20
    boxes = torch.cat([corner, corner + 5 + 14 * torch.rand(5, 2, generator=generator)], 1)
    expected = torchvision.ops.roi_align(pixels, [boxes], 12, sampling_ratio=samples, aligned=True)
    assert torch.allclose(cut_boxes(pixels, boxes, 12, samples), expected, atol=1e-4)
