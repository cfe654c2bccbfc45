"""Promises of `metrics.py`, and of `annotations.py`, which reads the truth that they are measured against."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import binary_erosion
from sklearn.metrics import accuracy_score, jaccard_score, recall_score

from ovs3d_nerfstudio.data.annotations import AnnotationError, Annotations
from ovs3d_nerfstudio.evaluation.evaluation import Evaluator
from ovs3d_nerfstudio.evaluation.metrics import boundary_iou, match_classes, relabel, summarise, view_metrics
from ovs3d_nerfstudio.files import mask_stem
from ovs3d_nerfstudio.pictures import PictureError, view_names

CLASSES = 6


def random_labels(seed: int, noise: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """Blocky truth with unlabelled pixels and absent classes, and a prediction that agrees in part."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(-1, rng.integers(1, CLASSES + 1), size=(6, 8)).repeat(5, 0).repeat(5, 1)
    prediction = np.where(rng.random(truth.shape) < noise, rng.integers(-1, CLASSES, truth.shape), truth)
    return prediction, truth


@pytest.mark.parametrize("seed", range(20))
def test_every_figure_equals_scikit_learns_on_labelled_pixels(seed):
    prediction, truth = random_labels(seed)
    metrics = view_metrics(prediction, truth, CLASSES)
    true, predicted = truth[truth >= 0], prediction[truth >= 0]
    present = np.unique(true)
    expected = jaccard_score(true, predicted, labels=range(CLASSES), average=None, zero_division=0)
    assert np.array_equal(np.flatnonzero(~np.isnan(metrics["iou"])), present)
    assert np.array_equal(metrics["iou"][present], expected[present])
    assert metrics["miou"] == pytest.approx(expected[present].mean(), abs=1e-15)
    assert metrics["pixel_accuracy"] == pytest.approx(accuracy_score(true, predicted), abs=1e-15)
    recall = recall_score(true, predicted, labels=present, average="macro", zero_division=0)
    assert metrics["mean_accuracy"] == pytest.approx(recall, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_the_authors_figures_equal_their_computation(seed):
    prediction, truth = random_labels(seed)
    prediction = prediction.clip(0)  # their argmax always finds a class
    metrics = view_metrics(prediction, truth, CLASSES)
    masks = (truth.reshape(-1, 1) == np.arange(CLASSES)).astype(np.int8)
    one_hot = np.eye(CLASSES, dtype=np.int8)[prediction.ravel()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of absent classes, as it did for the authors
        expected = jaccard_score(masks, one_hot, average=None)
    assert metrics["authors_miou"] == pytest.approx(expected.mean(), abs=1e-15)
    assert metrics["authors_accuracy"] == pytest.approx(accuracy_score(masks, one_hot), abs=1e-15)


def test_a_perfect_prediction_scores_one_whatever_it_says_on_unlabelled_pixels():
    _, truth = random_labels(3)
    prediction = np.where(truth < 0, 2, truth)
    metrics = view_metrics(prediction, truth, CLASSES)
    for name in ("miou", "pixel_accuracy", "mean_accuracy", "boundary_iou"):
        assert metrics[name] == 1.0
    assert np.array_equal(metrics["confusion"], np.diag(np.bincount(truth[truth >= 0], minlength=CLASSES)))


def test_a_predicted_class_that_is_absent_hurts_the_present_ones_and_no_mean_holds_it():
    truth = np.zeros((4, 4), dtype=int)
    prediction = truth.copy()
    prediction[0] = 1
    metrics = view_metrics(prediction, truth, 2)
    assert metrics["miou"] == metrics["pixel_accuracy"] == 0.75
    assert math.isnan(metrics["iou"][1])
    assert metrics["authors_miou"] == 0.375


def test_the_confusion_matrix_has_truth_in_rows_and_leaves_out_predictions_of_none():
    truth = np.array([[0, 0, 1, -1]])
    prediction = np.array([[0, 1, -1, 0]])
    assert view_metrics(prediction, truth, 2)["confusion"].tolist() == [[1, 1], [0, 0]]


def test_a_view_without_labels_has_no_figures_and_no_part_in_the_means():
    unlabelled = view_metrics(np.zeros((3, 3), int), np.full((3, 3), -1), 2)
    assert math.isnan(unlabelled["miou"]) and math.isnan(unlabelled["pixel_accuracy"])
    perfect = view_metrics(np.zeros((3, 3), int), np.zeros((3, 3), int), 2)
    assert summarise({"a": unlabelled, "b": perfect}, ["x", "y"])["miou"] == 1.0


def test_tensors_and_arrays_give_the_same_metrics():
    prediction, truth = random_labels(1)
    expected = view_metrics(prediction, truth, CLASSES)
    metrics = view_metrics(torch.from_numpy(prediction), torch.from_numpy(truth), CLASSES)
    for name, value in expected.items():
        assert np.array_equal(metrics[name], value, equal_nan=True)


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), r"\(2, 3\) and the truth \(3, 2\)"),
        (np.full((2, 2), 3), np.zeros((2, 2), int), "prediction has labels from 3 to 3"),
        (np.zeros((2, 2), int), np.full((2, 2), -2), "truth has labels from -2 to -2"),
    ],
)
def test_labels_of_another_shape_or_range_are_refused(prediction, truth, message):
    with pytest.raises(ValueError, match=message):
        view_metrics(prediction, truth, 3)


def slow_boundary(mask: np.ndarray) -> np.ndarray:
    """The definition, step by step: pad by background, erode d times by 3×3, keep what went away."""
    distance = max(1, round(0.02 * math.hypot(*mask.shape)))
    eroded = np.pad(mask, 1)
    for _ in range(distance):
        eroded = binary_erosion(eroded, np.ones((3, 3)), border_value=1)
    return mask & ~eroded[1:-1, 1:-1]


@pytest.mark.parametrize("size", [(8, 9), (60, 80), (120, 200)])
def test_boundary_iou_equals_its_definition_step_by_step(size):
    y, x = np.mgrid[: size[0], : size[1]] / max(size)
    truth = (x - 0.4) ** 2 + (y - 0.3) ** 2 < 0.06
    prediction = ((x - 0.1) ** 2 + (y - 0.2) ** 2 < 0.1) | (x > 0.9)  # cut by the picture's border
    g, p = slow_boundary(truth), slow_boundary(prediction)
    assert boundary_iou(prediction, truth) == (g & p).sum() / (g | p).sum()
    assert boundary_iou(truth, truth) == 1.0


def test_boundary_iou_punishes_a_ragged_edge_more_than_iou_does():
    truth = np.zeros((100, 100), dtype=int)
    truth[20:80, 20:80] = 1
    prediction = np.zeros_like(truth)
    prediction[18:82, 18:82] = 1
    metrics = view_metrics(prediction, truth, 2)
    assert metrics["boundary_iou"] < metrics["miou"]
    assert math.isnan(boundary_iou(truth > 5, truth > 5))


def test_predictions_in_another_order_of_prompts_are_matched_by_text():
    index = match_classes(["Wood", "lamp", "grass"], ["grass", "sheep", "wood"])
    assert index.tolist() == [2, -1, 0]
    assert relabel(np.array([[0, 1, 2, -1]]), index).tolist() == [[2, -1, 0, -1]]
    assert relabel(torch.tensor([[2, 0]]), index).tolist() == [[0, 2]]


def test_a_summary_is_the_mean_over_views_and_survives_json():
    truth = np.array([[0, 0, 1, 1]])
    views = {
        "v1": view_metrics(np.array([[0, 0, 1, 1]]), truth, 3),
        "v2": view_metrics(np.array([[0, 0, 0, 0]]), np.zeros((1, 4), int), 3),
        "v3": view_metrics(np.array([[0, 1, 1, 1]]), truth, 3),
    }
    summary = json.loads(json.dumps(summarise(views, ["a", "b", "c"]), allow_nan=False))
    assert summary["miou"] == pytest.approx((1 + 1 + (1 / 2 + 2 / 3) / 2) / 3)
    assert summary["pixel_accuracy"] == pytest.approx((1 + 1 + 0.75) / 3)
    assert summary["classes"] == {"a": pytest.approx(2.5 / 3), "b": pytest.approx((1 + 2 / 3) / 2), "c": None}
    assert list(summary["views"]) == ["v1", "v2", "v3"]
    assert summary["views"]["v2"]["classes"] == {"a": 1.0, "b": None, "c": None}


def test_a_summary_of_no_views_is_empty_not_an_error():
    summary = summarise({}, ["a"])
    assert summary["miou"] is None and summary["classes"] == {"a": None} and summary["views"] == {}


# Annotations


def write_mask(path: Path, white: np.ndarray | tuple[slice, slice], size: tuple[int, int] = (12, 16)) -> None:
    mask = np.zeros(size, dtype=np.uint8)
    mask[white] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    masks = tmp_path / "segmentations"
    write_mask(masks / "00" / "white sheep.png", np.s_[:6])
    write_mask(masks / "00" / "grass.png", np.s_[5:10])
    write_mask(masks / "02" / "grass.png", np.s_[:])
    (masks / "classes.txt").write_text("white sheep\ngrass\n")
    (tmp_path / "transforms.json").write_text("{}")
    return tmp_path


def add_photos(scene: Path, *names: str) -> None:
    (scene / "images").mkdir(exist_ok=True)
    for name in names:
        (scene / "images" / name).touch()


def test_labels_index_the_sorted_classes_and_unlabelled_is_minus_one(scene):
    annotations = Annotations(scene / "transforms.json")
    assert annotations.classes == ["grass", "white sheep"]
    assert annotations.views == ["00", "02"]
    labels = annotations.labels("00", 12, 16)
    assert labels.dtype == np.int64 and labels.shape == (12, 16)
    # Row 5 is claimed by both: the first class in sorted order has it.
    assert labels[:, 0].tolist() == [1] * 5 + [0] * 5 + [-1] * 2


def test_masks_are_resized_by_nearest_neighbour(scene):
    labels = Annotations(scene).labels("00", 24, 32)
    assert np.array_equal(labels, Annotations(scene).labels("00", 12, 16).repeat(2, 0).repeat(2, 1))


def test_views_are_named_by_the_stem_of_their_photo_or_else_all_by_its_index(scene):
    add_photos(scene, "00.jpg", "01.jpg", "02.jpg")
    assert Annotations(scene).views == ["00", "02"]
    photos = [Path(f"frame_{i:05d}.png") for i in (3, 2, 1)]
    annotations = Annotations(scene, photos)
    assert annotations.views == ["frame_00001", "frame_00003"]
    assert (annotations.labels("frame_00003", 12, 16) == 0).all()
    # `02` is a stem here, but `00` is not: mixing the two readings would give one photo two annotations.
    assert Annotations(scene, [Path("02.jpg"), Path("05.jpg"), Path("08.jpg")]).views == ["02", "08"]


def test_views_in_folders_are_named_by_their_paths(scene):
    photos = [Path(f"images/{name}.jpg") for name in ("a/0", "b/0", "b/00", "c/02")]
    assert Annotations(scene, photos).views == ["b/00", "c/02"]  # by stems that are one photo's alone
    (scene / "segmentations" / "00").rename(scene / "segmentations" / "0")
    with pytest.raises(AnnotationError, match=r"0 could be of a/0 or b/0; name it .* segmentations/a/0\."):
        Annotations(scene, photos)
    (scene / "segmentations" / "a").mkdir()
    (scene / "segmentations" / "0").rename(scene / "segmentations" / "a" / "0")
    annotations = Annotations(scene, photos)
    assert annotations.views == ["a/0", "c/02"]
    evaluator = Evaluator.of_scene(scene, photos[:2], photos)
    assert evaluator.views == ["a/0", "b/0"]
    assert evaluator.truth(0, 12, 16) is not None and evaluator.truth(1, 12, 16) is None


def test_views_of_one_name_are_refused():
    assert view_names([Path("/x/1/a.png"), Path("/x/2/a.png")]) == {
        Path("/x/1/a.png"): "1/a",
        Path("/x/2/a.png"): "2/a",
    }
    assert view_names([Path("/x/a.b.png")] * 2) == {Path("/x/a.b.png"): "a.b"} and view_names([]) == {}
    with pytest.raises(PictureError, match=r"a\.png and /x/a\.jpg would both be the view a"):
        view_names([Path("/x/a.png"), Path("/x/a.jpg")])


@pytest.mark.parametrize("suffix", ["bmp", "tif"])
def test_masks_may_have_any_exact_format(scene, suffix):
    before = Annotations(scene).labels("00", 12, 16)
    with Image.open(scene / "segmentations" / "00" / "grass.png") as mask:
        mask.save(scene / "segmentations" / "00" / f"grass.{suffix}")
    (scene / "segmentations" / "00" / "grass.png").unlink()
    assert np.array_equal(Annotations(scene).labels("00", 12, 16), before)


def test_a_class_name_that_no_file_can_bear_finds_its_mask_and_never_leaves_the_folder(scene):
    masks = scene / "segmentations"
    write_mask(scene / "secret.png", np.s_[:])
    write_mask(masks / "x.png", np.s_[:])
    write_mask(masks / "02" / "a_b_ c.png", np.s_[:3])
    (masks / "classes.txt").write_text("../../secret\n../x\na/b: c\ngrass\nwhite sheep\n")
    labels = Annotations(scene).labels("02", 12, 16)
    assert labels[:, 0].tolist() == [2] * 3 + [3] * 9  # `a/b: c`, then grass; neither secret nor x
    assert mask_stem("../../x") == ".._.._x"


def test_a_mask_named_after_a_class_in_another_spelling_is_found(scene):
    masks = scene / "segmentations"
    (masks / "classes.txt").write_text("caf\u00e9\nGrass\nwhite sheep\n", encoding="utf-8")
    write_mask(masks / "02" / "cafe\u0301.PNG", np.s_[:])  # as macOS spells it
    annotations = Annotations(scene)
    assert annotations.classes == ["Grass", "café", "white sheep"]
    assert sorted(annotations._masks["02"]) == [0, 1]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_masks_of_any_mode_are_read_and_grey_is_white_from_half(scene, mode):
    grey = np.repeat(np.array([[0, 127, 128, 255]], dtype=np.uint8), 3, axis=0)
    path = scene / "segmentations" / "02" / "grass.png"
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif mode == "1":
        Image.fromarray(grey >= 128).save(path)
    else:
        Image.fromarray(grey).convert(mode).save(path)
    assert Annotations(scene).labels("02", 3, 4).tolist() == [[-1, -1, 0, 0]] * 3


def test_what_operating_systems_leave_behind_is_ignored(scene):
    masks = scene / "segmentations"
    (masks / ".ipynb_checkpoints").mkdir()
    (masks / "__MACOSX").mkdir()
    for name in (".DS_Store", "._grass.png", "notes.txt"):
        (masks / "00" / name).write_text("?")
    assert Annotations(scene).views == ["00", "02"]


def break_scene(scene: Path, how: str) -> None:
    masks = scene / "segmentations"
    if how == "no classes":
        (masks / "classes.txt").unlink()
    elif how == "empty classes":
        (masks / "classes.txt").write_text("\n")
    elif how == "colliding classes":
        (masks / "classes.txt").write_text("a/b\na:b\ngrass\nwhite sheep\n")
    elif how == "unknown class":
        write_mask(masks / "00" / "cow.png", np.s_[:])
    elif how == "no masks":
        (masks / "07").mkdir()
    elif how == "not a view":
        (masks / "backup").mkdir()
        add_photos(scene, "00.jpg", "02.jpg")
    elif how == "names and indices":
        write_mask(masks / "photo" / "grass.png", np.s_[:])
        add_photos(scene, "1.jpg", "2.jpg", "photo.jpg")
    elif how == "index too large":
        add_photos(scene, "a.jpg", "b.jpg")
    elif how == "one photo twice":
        write_mask(masks / "0" / "grass.png", np.s_[:])
        add_photos(scene, "a.jpg", "b.jpg", "c.jpg")
    elif how == "no views":
        for path in masks.glob("*/*.png"):
            path.unlink()
        for path in masks.glob("0*"):
            path.rmdir()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no classes", "has no segmentations/classes.txt"),
        ("empty classes", "no prompt in the prompts file"),
        ("colliding classes", r"'a/b' and 'a:b' .* a_b\.png"),
        ("unknown class", r"cow\.png is of no class"),
        ("no masks", "has no mask"),
        ("not a view", "backup is neither the name of a photo nor the index"),
        ("names and indices", "photo is the name of a photo but others beside it are not"),
        ("index too large", "02 is neither the name of a photo nor the index of one of the 2 photos"),
        ("one photo twice", "name the same photo"),
        ("no views", "has no folder of masks"),
    ],
)
def test_annotations_that_do_not_add_up_are_refused_in_a_sentence(scene, how, message):
    break_scene(scene, how)
    with pytest.raises(AnnotationError, match=message):
        Annotations(scene)


def test_an_unusable_mask_is_refused_by_name_when_it_is_read(scene):
    path = scene / "segmentations" / "02" / "grass.png"
    annotations = Annotations(scene)
    with pytest.raises(AnnotationError, match="of another shape than its photo"):
        annotations.labels("02", 16, 12)
    with pytest.raises(AnnotationError, match="'03' is not annotated; the views 00, 02 are"):
        annotations.labels("03", 12, 16)
    Image.fromarray(np.ones((12, 16), dtype=np.uint8)).save(path)
    with pytest.raises(AnnotationError, match="0 and 1 only"):
        annotations.labels("02", 12, 16)
    for content in (b"no picture", path.read_bytes()[:45]):
        path.write_bytes(content)
        with pytest.raises(AnnotationError, match=r"grass\.png cannot be read"):
            annotations.labels("02", 12, 16)
