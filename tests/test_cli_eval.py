"""`ovs3d eval`: its figures are scikit-learn's, its files can be read back, its errors are sentences."""

import json
import re
from html import escape

import numpy as np
import pytest
from conftest import command, read_labels
from PIL import Image
from sklearn.metrics import jaccard_score

from ovs3d_nerfstudio import __version__
from ovs3d_nerfstudio.cli.comparing import ComparedView, class_index, panel, parse_mapping
from ovs3d_nerfstudio.cli.labels import write_labels
from ovs3d_nerfstudio.data.annotations import Annotations
from ovs3d_nerfstudio.errors import CommandError
from ovs3d_nerfstudio.prompts.palette import palette


def test_a_mapping_is_read_part_by_part():
    assert parse_mapping("Crimson  fruit = red apple; a = b=table;") == {"crimson fruit": "red apple", "a = b": "table"}


@pytest.mark.parametrize("text", ["apple", "= table", "desk =", "a = b; c"])
def test_a_mapping_of_another_form_is_refused(text):
    with pytest.raises(CommandError, match="PROMPT = CLASS"):
        parse_mapping(text)


def test_several_prompts_may_stand_for_one_class():
    index = class_index(["fruit", "desk", "bench"], ["table", "Fruit"], {"desk": "Table", "bench": "table"})
    assert index.tolist() == [1, 0, 0]


@pytest.mark.parametrize("mapping, said", [({"lamp": "table"}, "not among"), ({"desk": "lamp"}, "no class")])
def test_a_mapping_of_what_is_not_there_is_refused(mapping, said):
    with pytest.raises(CommandError, match=said):
        class_index(["desk"], ["table"], mapping)


@pytest.mark.parametrize("classes, mode", [(4, "L"), (300, "I;16")])
def test_label_images_come_back_as_written(tmp_path, classes, mode):
    labels = np.random.default_rng(0).integers(-1, classes, (7, 5))
    write_labels(tmp_path / "new" / "a.png", labels, classes)
    assert np.array_equal(read_labels(tmp_path / "new" / "a.png"), labels)
    assert Image.open(tmp_path / "new" / "a.png").mode == mode


def test_errors_are_red_and_the_unknown_black():
    photo = np.full((1, 3, 3), 90, np.uint8)
    view = ComparedView("v", "test", photo, np.array([[0, 1, 1]]), np.array([[0, 0, -1]]), 20.0)
    errors = panel(view, palette(2))[:, -3:]
    assert errors[0].tolist() == [[90, 90, 90], [220, 30, 30], [0, 0, 0]]


@pytest.mark.slow
def test_eval_equals_scikit_learn_in_both_protocols(trained, scene, tmp_path):
    words = ["ovs3d", "eval", "--load-config", trained[0], "--output-path", tmp_path / "m.json", "--split", "all"]
    printed = command(*words, cwd=tmp_path).stdout
    figures = json.loads((tmp_path / "m.json").read_text())
    assert "mIoU" in printed and len(figures["views"]) == 3 + 4
    report = (tmp_path / "m" / "report.html").read_text()
    assert figures["scene"] == str(scene) and figures["run"] == str(trained[0]) and figures["version"] == __version__
    assert all(escape(text) in report for text in (str(scene), str(trained[0]), __version__, *figures["prompts"]))
    assert {view["split"] for view in figures["views"].values()} == {"test", "train"}
    annotations = Annotations(scene)
    means, answered = [], 0
    for name, view in figures["views"].items():
        prediction = read_labels(tmp_path / "m" / "labels" / f"{name}.png")
        truth = annotations.labels(name, *prediction.shape)
        known = truth >= 0
        present = np.unique(truth[known])
        answered += np.bincount(truth[known & (prediction >= 0)], minlength=len(annotations.classes))
        iou = jaccard_score(
            truth[known], prediction[known], labels=range(len(annotations.classes)), average=None, zero_division=0
        )
        for label in present:
            assert abs(view["classes"][annotations.classes[label]] - iou[label]) < 1e-6
        means.append(iou[present].mean())
        assert abs(view["miou"] - means[-1]) < 1e-6
        assert abs(view["pixel_accuracy"] - (prediction == truth)[known].mean()) < 1e-6
        assert Image.open(tmp_path / "m" / "pictures" / f"{name}.png").size == (4 * 96 + 3 * 4, 72)
    assert abs(figures["miou"] - np.mean(means)) < 1e-6
    confusion = figures["confusion"]
    assert np.sum(confusion["truth_by_prediction"], 1).tolist() == answered.tolist()
    assert (answered <= confusion["truth_pixels"]).all()
    report = (tmp_path / "m" / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 7 and not re.search(r'(src|href)="(?!data:)', report)


@pytest.mark.slow
def test_eval_takes_other_prompts_for_the_classes(trained, tmp_path, ovs3d):
    words = ["eval", "--load-config", trained[0].parent, "--output-path", tmp_path / "m.json", "--no-pictures"]
    words += ["--prompts", "kitten; books; espresso; boat", "--prompt-classes", "kitten = cat"]
    status, printed = ovs3d(*words)
    assert status == 0
    figures = json.loads((tmp_path / "m.json").read_text())
    assert figures["prompts"] == {"kitten": "cat", "books": "books", "espresso": "espresso", "boat": None}
    assert figures["classes"]["palace"] == 0.0 and "No prompt stands for" in printed and "1 of the prompts" in printed
    assert not (tmp_path / "m" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, said",
    [
        (["--load-config", "nowhere.yml"], "does not exist"),
        (["--load-config", "RUN", "--prompt-classes", "x"], "PROMPT = CLASS"),
        (["--load-config", "RUN", "--data", "elsewhere"], "elsewhere, is not there"),
    ],
)
def test_eval_ends_a_users_mistake_with_a_sentence(trained, ovs3d, words, said):
    status, printed = ovs3d("eval", *(trained[0] if word == "RUN" else word for word in words))
    assert status == 1 and said in printed


def test_ovs3d_lists_its_subcommands_and_refuses_others(ovs3d):
    assert "eval" in ovs3d("--help")[1]
    status, printed = ovs3d("evaluate")
    assert status == 1 and "no subcommand 'evaluate'" in printed
    status, printed = ovs3d("eval", "--help")
    assert status == 0 and "--prompt-classes" in printed
