"""Memory is bounded where it need not grow; where it runs out, less is done at once, and at last a sentence says what to lower."""

from __future__ import annotations

import io
import resource
import sys
import threading
from pathlib import Path

import children
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nerfstudio.viewer.viewer_elements import ViewerClick
from PIL import Image
from rich.console import Console
from test_answers import plain_question
from test_features import ColorEncoder, PixelTokens
from test_hash_grid_torch import Allocated
from test_viewer import live, seen, viewer  # noqa: F401 (fixtures)
from torch import Tensor

from ovs3d_nerfstudio.encoders import base
from ovs3d_nerfstudio.encoders.base import cut_boxes
from ovs3d_nerfstudio.features.extraction import extract
from ovs3d_nerfstudio.memory import (
    LEAST_RAYS,
    MemoryShortage,
    filled_in_chunks,
    in_batches,
    is_out_of_memory,
    told_what_to_lower,
)
from ovs3d_nerfstudio.prompts.answers import Answers, packed, unpacked
from ovs3d_nerfstudio.viewer.live import LiveModel, LivePrompts

MORE_THAN_ANY_MACHINE_HAS = 1 << 58


def too_much(kind: str) -> object:
    return np.empty(MORE_THAN_ANY_MACHINE_HAS) if kind == "numpy" else torch.empty(MORE_THAN_ANY_MACHINE_HAS)


# ---------------------------------------------------------------------------------- how it is known and told


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_real_shortage_is_known_and_names_what_to_lower(kind):
    with pytest.raises((RuntimeError, MemoryError)) as bare:
        too_much(kind)
    assert is_out_of_memory(bare.value)
    with pytest.raises(MemoryShortage, match=r"^Memory ran out while training \(.*num-windows .*num-rays-per-batch"):  # noqa: SIM117
        with told_what_to_lower("training"):
            too_much(kind)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_devices_words_for_it_are_known_also_inside_another_error(error):
    assert is_out_of_memory(error)
    wrapped = OSError("the weights cannot be loaded")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


def test_other_errors_stay_what_they_are_and_a_sentence_is_not_told_twice():
    for error in (RuntimeError("shapes differ"), OSError("no such file"), KeyError("rgb")):
        with pytest.raises(type(error)) as same, told_what_to_lower("rendering"):
            raise error
        assert same.value is error
    with pytest.raises(MemoryShortage, match="Max res"), told_what_to_lower("training"):  # noqa: SIM117
        with told_what_to_lower("showing a view"):
            raise MemoryError


# ---------------------------------------------------------------------------------- going on with less


@pytest.mark.parametrize(("fits", "asked", "left"), [(100, 8, 8), (5, 8, 4), (1, 8, 1)])
def test_batches_are_halved_until_they_fit_and_cover_everything_once(fits, asked, left):
    done: list[int] = []

    def work(start, stop):
        if stop - start > fits:
            raise torch.OutOfMemoryError
        done.extend(range(start, stop))

    assert in_batches(21, asked, work) == left
    assert done == list(range(21))


def test_what_does_not_fit_alone_and_what_is_no_shortage_comes_through():
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        in_batches(4, 4, lambda start, stop: too_much("torch"))
    tried = []
    with pytest.raises(ZeroDivisionError):
        in_batches(4, 4, lambda start, stop: tried.append(stop) or 1 / 0)
    assert tried == [4]


def test_a_picture_is_filled_chunk_by_chunk_and_never_held_twice():
    total, chunk = 100_000, 5_000

    def render(start, stop):
        return {"rgb": torch.arange(start, stop)[:, None].expand(-1, 3).float(), "names": ["no tensor"]}

    with Allocated() as allocated:
        outputs = filled_in_chunks(total, chunk, render, "cpu")
    assert set(outputs) == {"rgb"} and torch.equal(outputs["rgb"][:, 1], torch.arange(total).float())
    assert allocated.peak < 1.2 * outputs["rgb"].nbytes


def test_a_picture_that_does_not_fit_ends_with_a_sentence_and_smaller_chunks_are_tried_first():
    sizes = []

    def render(start, stop):
        sizes.append(stop - start)
        return {"rgb": torch.zeros(stop - start, 3)}

    with pytest.raises(MemoryShortage, match=f"a picture of {MORE_THAN_ANY_MACHINE_HAS} pixels .*eval-num-rays"):
        filled_in_chunks(MORE_THAN_ANY_MACHINE_HAS, 1024, render, "cpu")
    assert sizes == [1024, 512, LEAST_RAYS]


# ---------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("budget", [200_000, 10_000, 1])
def test_crops_are_the_same_bit_for_bit_however_few_are_cut_at_once(monkeypatch, samples, budget):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 301, 407, generator=generator)
    corner, side = torch.rand(9, 2, generator=generator) * 200, 60 + torch.rand(9, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + side], 1)
    at_once = cut_boxes(pixels, boxes, 31, samples)
    monkeypatch.setattr(base, "CUT_BYTES", budget)
    assert torch.equal(cut_boxes(pixels, boxes, 31, samples), at_once)


def test_what_cutting_takes_does_not_grow_with_the_photo_nor_with_the_number_of_crops(monkeypatch):
    monkeypatch.setattr(base, "CUT_BYTES", 1 << 21)
    peaks = []
    for edge, count in ((400, 4), (1600, 4), (1600, 32)):
        pixels = torch.rand(1, 3, edge, edge)
        boxes = torch.tensor([[0.0, 0.0, edge, edge]]).repeat(count, 1)
        with Allocated() as allocated:
            crops = cut_boxes(pixels, boxes, 40, edge // 40)
        peaks.append(allocated.peak - crops.nbytes - pixels.nbytes)
    assert max(peaks) < 3 * base.CUT_BYTES  # at once: 20 bytes for each of 82 million samples


class Narrow(ColorEncoder):
    """Has room for so many crops at once."""

    fits = 3
    batch_size = cpu_batch_size = 16

    def embed_crops(self, crops):
        if len(crops) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return super().embed_crops(crops)


@pytest.fixture
def photo(tmp_path) -> Path:
    pixels = torch.randint(0, 255, (60, 80, 3), generator=torch.Generator().manual_seed(1))
    Image.fromarray(pixels.byte().numpy()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(photos: list[Path], cache: Path, encoder, tokens=None) -> tuple[Tensor, str]:
    out = io.StringIO()
    views = extract(photos, encoder, tokens or PixelTokens("", "cpu"), (2.0,), cache, Console(file=out, width=300))
    return views.patches(0)[0], out.getvalue()


def test_extraction_goes_on_with_smaller_batches_and_says_so_once(photo, tmp_path):
    encoder, other = Narrow("", "cpu"), tmp_path / "other.png"
    other.write_bytes(photo.read_bytes() + b" ")
    embedded, said = run([photo, other], tmp_path / "narrow", encoder)
    assert torch.equal(embedded, run([photo], tmp_path / "wide", ColorEncoder("", "cpu"))[0])
    assert said.count("2 crops are embedded at once from here on, not 16") == 1 and encoder.batch_size == 2


class Greedy(ColorEncoder):
    """Takes 64 MiB for each crop."""

    batch_size = cpu_batch_size = 16

    def embed_crops(self, crops):
        taken = torch.ones(len(crops), 1 << 24)
        return super().embed_crops(crops) * taken[:, :1]


def limit_memory(megabytes: int) -> None:
    """This process gets no more than so much beside what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def extract_in(megabytes: int, photo: Path, cache: Path) -> None:
    encoder = Greedy("", "cpu")
    limit_memory(megabytes)
    embedded, _ = run([photo], cache, encoder)
    print(f"{len(embedded)} crops, {encoder.batch_size} at once")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_extraction_lives_with_the_memory_that_a_process_may_have(photo, tmp_path):
    child = children.start(tmp_path / "log", extract_in, 400, photo, tmp_path / "cache")
    assert child.end() == 0, child.text
    whole = len(run([photo], tmp_path / "whole", ColorEncoder("", "cpu"))[0])
    assert whole > 16 and any(f"{whole} crops, {fits} at once" in child.text for fits in (1, 2, 4)), child.text


class NoRoom(PixelTokens):
    fingerprint = "no room"

    def embed_picture(self, picture):
        return torch.empty(MORE_THAN_ANY_MACHINE_HAS)


@pytest.mark.parametrize("which", ["crops", "tokens"])
def test_what_does_not_fit_one_by_one_names_the_photo_and_what_to_lower(photo, tmp_path, which):
    encoder = Narrow("", "cpu")
    encoder.fits = 0 if which == "crops" else 100
    sentence = r"while extracting features of .*photo\.png \(80 × 60 pixels\) .*--downscale-factor.*dino:MODEL@EDGE"
    with pytest.raises(MemoryShortage, match=sentence):
        run([photo], tmp_path / "cache", encoder, NoRoom("", "cpu") if which == "tokens" else None)


def load_in(megabytes: int, name: str, folder: Path) -> None:
    """Loads an encoder with so much memory left, and prints what came of it."""
    import open_clip

    from ovs3d_nerfstudio.encoders.dino import DinoEncoder
    from ovs3d_nerfstudio.encoders.open_clip import OpenClipEncoder

    text = children.TINY_CLIP["text_cfg"] | {"width": 512}  # 100 MB of word embeddings
    open_clip.factory._MODEL_CONFIGS["wide-ovs3d"] = children.TINY_CLIP | {"text_cfg": text}
    if name == "open_clip":
        encoder = OpenClipEncoder(f"wide-ovs3d@{folder / 'clip.pt'}", "cpu")
    else:
        encoder = DinoEncoder(str(folder / "dino"), "cpu")
    limit_memory(megabytes)
    try:
        encoder.embed_text(["a cat"]) if name == "open_clip" else encoder.embed_picture(torch.zeros(64, 64, 3).byte())
    except MemoryShortage as error:
        print("shortage:", error)


@pytest.fixture(scope="module")
def wide_dino(tmp_path_factory) -> Path:
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("wide")
    size = {"hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12_000}
    ViTModel(ViTConfig(**size, patch_size=8, image_size=64)).save_pretrained(folder / "dino")
    (folder / "clip.pt").touch()
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["open_clip", "dino"])
def test_a_shortage_while_an_encoder_loads_is_not_taken_for_bad_weights(wide_dino, tmp_path, name):
    child = children.start(tmp_path / "log", load_in, 60, name, wide_dino)
    assert child.end() == 0, child.text
    assert "shortage: Memory ran out while loading the encoder" in child.text, child.text
    assert "close what else uses the device" in child.text


def test_dino_holds_nothing_of_tokens_times_tokens(tmp_path):
    from transformers import ViTConfig, ViTModel

    from ovs3d_nerfstudio.encoders.dino import DinoEncoder

    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    ViTModel(ViTConfig(**size, patch_size=8, image_size=64)).save_pretrained(tmp_path)
    encoder = DinoEncoder(str(tmp_path), "cpu")
    encoder.embed_picture(torch.zeros(64, 64, 3).byte())  # loads it
    with Allocated() as allocated:
        tokens = encoder.embed_picture(torch.zeros(400, 400, 3).byte())
    assert tokens.shape[:2] == (50, 50) and allocated.largest < 2500 * 2500 * 4


# ---------------------------------------------------------------------------------- what is looked at


def test_labels_are_read_off_colours_a_part_at_a_time(monkeypatch):
    segmenter = plain_question(100).segmenter
    labels = torch.randint(0, 100, (300, 400), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("ovs3d_nerfstudio.prompts.segmentation.RAYS_AT_ONCE", 1000)
    with Allocated() as allocated:
        found = segmenter.labels_of(segmenter.colors[labels])
    assert torch.equal(found, labels)
    assert allocated.peak < 12 * labels.nbytes  # at once: 100 distances of 4 bytes a pixel


def test_packed_features_take_half_and_show_the_same_pictures():
    question = plain_question(5, normalise=True)
    segmenter = question.segmenter
    directions = F.normalize(torch.randn(20_000, 5, generator=torch.Generator().manual_seed(2)), dim=-1)
    segmenter.range = torch.stack([segmenter.range.mean(0), segmenter.range.mean(0) + 0.02])  # as narrow as CLIP's
    small = packed(directions)
    assert small.nbytes * 2 == directions.nbytes
    assert (unpacked(small) - directions).abs().max() < 2e-5 and unpacked(directions) is directions
    rest = torch.rand(20_000, 2), torch.rand(20_000, 3)
    before, after = Answers(question, directions, *rest), Answers(question, small, *rest)
    for name in before:
        if "segmentation" not in name:
            assert (after[name] - before[name]).abs().max() < 1 / 255, name
    assert (after.labels != before.labels).float().mean() < 2e-4


class Tight:
    """A model that has no memory for views of more than so many pixels."""

    def __init__(self, model, pixels: int):
        self._model, self.pixels, self.tried = model, pixels, []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def get_features_for_camera(self, camera, obb_box=None):
        self.tried.append(int(camera.height * camera.width))
        if self.tried[-1] > self.pixels:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self._model.get_features_for_camera(camera, obb_box)

    def features_along(self, origins, directions, box=None):
        if len(origins) > self.pixels:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self._model.features_along(origins, directions, box)


def tight(seen, pixels: int) -> tuple[LiveModel, Tight, list]:  # noqa: F811
    model, looked = Tight(seen[0].model, pixels), []
    prompts = LivePrompts(model)
    prompts.follow_training()
    return LiveModel(prompts, threading.Lock(), looked.append), model, looked


def test_a_view_that_does_not_fit_is_rendered_smaller_and_said_so(seen):  # noqa: F811
    camera = seen[1]
    height, width = int(camera.height), int(camera.width)
    view, model, looked = tight(seen, height * width // 3)
    outputs = view.get_outputs_for_camera(camera)
    assert model.tried == [height * width] * 2 + [(height // 2) * (width // 2)]
    assert looked[0] is None and looked[-1] is outputs
    assert outputs.note.startswith(
        f"Memory is short: the view is rendered with {width // 2} × {height // 2} pixels, not"
    )
    for name in outputs:
        assert outputs[name].shape[:2] == (height, width)
    assert torch.equal(outputs["rgb"][0, 0], outputs["rgb"][1, 1]) and len(outputs.shares()) == 3
    again = view.get_outputs_for_camera(camera)
    assert len(model.tried) == 3 and torch.equal(again["segmentation"], outputs["segmentation"])
    view._until = 0.0  # half a minute later, and now there is room
    model.pixels = height * width
    assert view.get_outputs_for_camera(camera).note == "" and model.tried[-1] == height * width


def test_a_viewer_without_any_room_shows_black_and_lives(seen):  # noqa: F811
    view, _, _ = tight(seen, 0)
    outputs = view.get_outputs_for_camera(seen[1])
    assert "no view can be rendered" in outputs.note and not outputs["rgb"].any()
    assert outputs["rgb"].shape[:2] == outputs["depth"].shape[:2] == (int(seen[1].height), int(seen[1].width))


def test_a_picture_that_does_not_fit_leaves_the_colours(seen, live, monkeypatch):  # noqa: F811
    prompts, model = live
    outputs = model.get_outputs_for_camera(seen[1])
    monkeypatch.setattr(type(prompts.question), "labels", lambda *_: too_much("torch"))
    assert torch.equal(outputs["segmentation"], outputs["rgb"]) and outputs.shares() == []
    monkeypatch.undo()
    assert not torch.equal(outputs["segmentation"], outputs["rgb"])


def test_the_panel_says_that_memory_is_short_and_the_log_once(seen, viewer, capsys):  # noqa: F811
    panel = viewer.pipeline.prompt_panel
    said = lambda control: bytes(control.content, "ascii").decode("unicode_escape")  # noqa: E731
    panel._view._model = Tight(seen[0].model, int(seen[1].height * seen[1].width) // 3)
    for _ in range(2):
        viewer.get_model().get_outputs_for_camera(seen[1])
        panel._show()
    assert "Memory is short: the view is rendered with" in said(panel._status) and "Max res" in said(panel._status)
    assert " ".join(capsys.readouterr().out.split()).count("Memory is short") == 1


def test_a_click_and_a_prompt_that_find_no_memory_are_answered_with_a_sentence(seen, viewer):  # noqa: F811
    panel = viewer.pipeline.prompt_panel
    said = lambda control: bytes(control.content, "ascii").decode("unicode_escape")  # noqa: E731
    panel._view._model = Tight(seen[0].model, 0)
    panel._clicked(ViewerClick((0.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.5)))
    assert "Memory ran out while showing a view" in said(panel._point)
    before = panel.live.asked
    panel._change(lambda: str(too_much("torch")))
    assert "Memory ran out while loading the encoder" in said(panel._status) and panel.live.asked == before
