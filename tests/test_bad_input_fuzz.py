"""Whatever lies in a file that we parse, it is read or refused in words: no other exception, nothing half-read."""

import copy
import io
import json
import math

import numpy as np
import pytest
import torch
from bad_input import HEIGHT, VIEWS, WIDTH, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image

from ovs3d_nerfstudio.cli.comparing import parse_mapping
from ovs3d_nerfstudio.data.annotations import AnnotationError, Annotations
from ovs3d_nerfstudio.data.dataparser import read_poses_bounds
from ovs3d_nerfstudio.data.frames import Frame, FrameError
from ovs3d_nerfstudio.data.scene_checks import SceneError, check_cameras, readable_scene
from ovs3d_nerfstudio.engine.option_checks import OptionError
from ovs3d_nerfstudio.errors import CommandError
from ovs3d_nerfstudio.features.cache import FeatureCache
from ovs3d_nerfstudio.pictures import PictureError, picture_header, read_picture
from ovs3d_nerfstudio.pipeline import check_options
from ovs3d_nerfstudio.prompts.prompts import PromptError, read_classes_file

quick = settings(max_examples=60, deadline=None)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner), max_leaves=8
)


@st.composite
def damage(draw, content: bytes) -> bytes:
    """A file after bytes were changed, cut off or put in."""
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(damaged) - 1)))
        kind = draw(st.sampled_from(["change", "cut", "insert", "double"]))
        if kind == "change" and damaged:
            damaged[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del damaged[place:]
        elif kind == "insert":
            damaged[place:place] = draw(st.binary(max_size=8))
        else:
            damaged += damaged[place : place + 64]
    return bytes(damaged)


def read_scene(scene) -> None:
    """As training reads it, up to the pictures. What comes through is finite."""
    try:
        with readable_scene(NerfstudioDataParserConfig(data=scene), scene):
            parsed = NerfstudioDataParserConfig(data=scene).setup().get_dataparser_outputs("train")
            check_cameras(parsed.cameras, str(scene))
    except (SceneError, PictureError) as error:
        assert ";" in str(error)
        return
    except OSError as error:
        assert error.filename is not None  # `user_errors` has a sentence for it
        return
    assert parsed.cameras.camera_to_worlds.isfinite().all() and (parsed.cameras.fx > 0).all()


@pytest.fixture(scope="module")
def scene(pristine, tmp_path_factory):
    """A scene with no picture but links, whose transforms.json is written again and again."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "images").symlink_to(pristine / "images")
    (folder / "segmentations").mkdir()
    return folder


@given(data=st.data())
@quick
def test_transforms_of_any_bytes(scene, pristine, data):
    original = (pristine / "transforms.json").read_bytes()
    (scene / "transforms.json").write_bytes(data.draw(st.binary(max_size=40) | damage(original)))
    read_scene(scene)


@given(data=st.data())
@quick
def test_transforms_with_anything_in_an_entry(scene, pristine, data):
    meta = json.loads((pristine / "transforms.json").read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from([meta, meta["frames"][0], meta["frames"][3]]))
        key = data.draw(st.sampled_from([*place, "k1", "mask_path", "applied_scale", "orientation_override"]))
        if key != "frames":
            place[key] = data.draw(anything)
    (scene / "transforms.json").write_text(json.dumps(meta))
    read_scene(scene)


@given(data=st.data())
@quick
def test_transforms_with_anything_in_a_pose(scene, pristine, data):
    meta = json.loads((pristine / "transforms.json").read_text())
    for _ in range(data.draw(st.integers(1, 6))):
        pose = meta["frames"][data.draw(st.integers(0, VIEWS - 1))]["transform_matrix"]
        row = data.draw(st.integers(0, 3))
        pose[row][data.draw(st.integers(0, 3))] = data.draw(st.floats(width=32) | scalars)
    (scene / "transforms.json").write_text(json.dumps(meta))
    read_scene(scene)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_poses_bounds_of_any_bytes(scene, pristine, data):
    path = scene / "poses_bounds.npy"
    path.write_bytes(data.draw(st.binary(max_size=40) | damage((pristine / "poses_bounds.npy").read_bytes())))
    try:
        poses, sizes, focals = read_poses_bounds(path, VIEWS)
    except CommandError as error:
        assert str(path) in str(error)
        return
    assert poses.isfinite().all() and (sizes > 0).all() and (focals > 0).all()


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(file, format=kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
@given(data=st.data())
@quick
def test_pictures_of_any_bytes(tmp_path_factory, kind, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.png"
    path.write_bytes(data.draw(damage(encoded(kind))))
    for read in (picture_header, read_picture):
        try:
            found = read(path)
        except PictureError as error:
            assert str(path) in str(error)
            continue
        if isinstance(found, torch.Tensor):
            assert found.dtype == torch.uint8 and found.shape[-1] == 3


@given(content=st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
@quick
def test_classes_of_any_bytes(scene, content):
    path = scene / "segmentations" / "classes.txt"
    path.write_bytes(content)
    try:
        classes = read_classes_file(path)
    except PromptError as error:
        assert str(path) in str(error)
        return
    assert classes == sorted(classes) and all(classes)
    try:
        Annotations(scene)
    except AnnotationError as error:
        assert ";" in str(error)


@given(text=st.text(st.sampled_from("ab =;\n\x00é") | st.characters(), max_size=20))
@quick
def test_mappings_of_any_text(text):
    try:
        mapping = parse_mapping(text)
    except CommandError as error:
        assert "PROMPT = CLASS" in str(error)
        return
    assert all(prompt and name for prompt, name in mapping.items())


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_config(tmp_path_factory.mktemp("options")).pipeline


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_options_of_any_value(config, data):
    changed = copy.copy(config)
    changed.datamanager, changed.model = copy.copy(config.datamanager), copy.copy(config.model)
    part = data.draw(st.sampled_from([changed.datamanager, changed.model]))
    ranges, own = part.RANGES, [kind for kind in type(part).__mro__ if kind.__module__.startswith("ovs3d_nerfstudio")]
    name = data.draw(st.sampled_from([*ranges, *(name for kind in own for name in kind.__annotations__)]))
    value = data.draw(anything | st.tuples(st.floats()))
    if name in ("_target", "RANGES"):
        return
    setattr(part, name, value)
    try:
        check_options(changed)
    except OptionError as error:
        assert name.replace("_", "-") in str(error) and "; give" in str(error)
        return
    if name in ranges and value is not None:
        assert -math.inf < value < math.inf and value in ranges[name]


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_cache_files_of_any_bytes(tmp_path_factory, data):
    cache = FeatureCache(tmp_path_factory.getbasetemp() / "fuzzed cache", "pyramid", {"encoder": "fuzz"})
    tensors = {"patches_00": torch.arange(12.0).view(3, 4).half(), "patches_01": torch.ones(2, 4).half()}
    cache.save("key", tensors)
    content = cache.path("key").read_bytes()
    assert cache.intact("key")
    damaged = data.draw(damage(content))
    cache.path("key").write_bytes(damaged)
    # What is taken for intact is what was written: blanks in the header may differ, values may not.
    if cache.intact("key"):
        loaded = cache.load("key")
        assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@given(content=anything | st.fixed_dictionaries({"transform": anything, "scale": scalars}))
@quick
def test_frames_of_any_json(scene, content):
    (scene / "dataparser_transforms.json").write_text(json.dumps(content))
    try:
        frame = Frame.of_run(scene)
    except FrameError as error:
        assert "missing or broken" in str(error)
        return
    assert np.isfinite(frame.transform).all() and frame.scale != 0
