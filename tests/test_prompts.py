"""Promises of `prompts.py`."""

from __future__ import annotations

import copy
import json
import pickle
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovs3d_nerfstudio.prompts.embedding import Embedder
from ovs3d_nerfstudio.prompts.likes import Like, LikesError, read_likes, write_likes
from ovs3d_nerfstudio.prompts.prompts import (
    MAX_PROMPT_CHARACTERS,
    MAX_PROMPTS,
    PromptError,
    choose_prompts,
    clean_prompt,
    find_classes_file,
    given_prompts,
    parse_prompts,
    prompt_key,
    read_prompts_file,
)
from ovs3d_nerfstudio.prompts.segmentation import Segmenter
from ovs3d_nerfstudio.prompts.shown import Shown, choose_shown

# Text that is dense in the characters that matter: separators, white space, case, controls, combining marks.
awkward = st.text(
    st.one_of(
        st.sampled_from("aA éÉßſİ;\n\r\t\x00\x1c\x85\u00a0\u200b\u200d\u2028\u037e\u0301\ufeff#/\ud800"),
        st.characters(),
    )
)


@settings(max_examples=300, deadline=None)
@given(awkward)
def test_parsed_prompts_are_clean_distinct_and_within_the_limits(text):
    try:
        prompts = parse_prompts(text)
    except PromptError:
        return
    assert 1 <= len(prompts) <= MAX_PROMPTS
    assert len({prompt_key(p) for p in prompts}) == len(prompts)
    for prompt in prompts:
        assert 1 <= len(prompt) <= MAX_PROMPT_CHARACTERS
        assert prompt == " ".join(prompt.split())
        assert unicodedata.is_normalized("NFC", prompt)
        assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in prompt)
        assert not set(prompt) & set(";\n\r")
        prompt.encode("utf-8")


@settings(max_examples=300, deadline=None)
@given(awkward)
def test_parsing_joined_prompts_again_changes_nothing(text):
    try:
        prompts = parse_prompts(text)
    except PromptError:
        return
    assert parse_prompts("; ".join(prompts)) == prompts
    assert parse_prompts("\n".join(prompts)) == prompts


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("abc XYZ", min_size=1, max_size=5), min_size=1), st.text(" \t;\n\x00", max_size=6))
def test_separators_and_white_space_never_change_the_prompts(words, noise):
    if not any(word.strip() for word in words):
        return
    assert parse_prompts((noise + ";" + noise).join(words)) == parse_prompts(";".join(words))


@settings(max_examples=200, deadline=None)
@given(awkward)
def test_cleaning_twice_is_cleaning_once(text):
    once = clean_prompt(text)
    assert clean_prompt(once) == once
    assert prompt_key(once) == prompt_key(text)


def test_prompts_are_split_cleaned_and_merged_with_the_first_spelling_kept():
    text = " white   sheep ; Grass;;\tgrass\nGRASS\r\ne\u0301table; \u00e9table \x07; red\u00a0 apple"
    assert parse_prompts(text) == ["white sheep", "Grass", "étable", "red apple"]


@pytest.mark.parametrize("text", ["", " ", ";;\n;", "\x00\u200b", "\u200d"])
def test_no_prompt_left_is_refused(text):
    with pytest.raises(PromptError, match="There is no prompt"):
        parse_prompts(text)


def test_the_limits_are_refused_with_the_value_one_past_them():
    assert len(parse_prompts(";".join(map(str, range(MAX_PROMPTS))))) == MAX_PROMPTS
    with pytest.raises(PromptError, match="201 prompts"):
        parse_prompts(";".join(map(str, range(MAX_PROMPTS + 1))))
    assert parse_prompts("x" * MAX_PROMPT_CHARACTERS)
    with pytest.raises(PromptError, match="301 characters"):
        parse_prompts("ok; " + "x" * (MAX_PROMPT_CHARACTERS + 1))


def test_a_prompts_file_is_one_a_line_with_comments(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# what to look for\nwhite sheep\n\n  # more\nmug #1\nMug #1\r\n桌子\n", encoding="utf-8")
    assert read_prompts_file(path) == ["white sheep", "mug #1", "桌子"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"\xff\xfeb\x00", "not UTF-8"),
        (b"", "no prompt"),
        (b"# only\n\n", "no prompt"),
        (b"x" * 301, "301 characters"),
    ],
)
def test_an_unusable_prompts_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError, match=message) as caught:
        read_prompts_file(path)
    assert str(path) in str(caught.value)


def test_a_folder_as_prompts_file_is_refused(tmp_path):
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts_file(tmp_path)


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    (tmp_path / "segmentations").mkdir()
    (tmp_path / "segmentations" / "classes.txt").write_text("wood\nbanana\nhand\n")
    (tmp_path / "transforms.json").write_text("{}")
    return tmp_path


def test_the_classes_file_is_found_beside_the_data(scene, tmp_path_factory):
    expected = scene / "segmentations" / "classes.txt"
    assert find_classes_file(scene) == expected
    assert find_classes_file(scene / "transforms.json") == expected
    assert find_classes_file(tmp_path_factory.mktemp("bare")) is None
    assert find_classes_file(scene / "missing") is None


def test_given_prompts_come_before_the_scenes_classes_which_are_sorted(scene, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("z\na\n")
    prompts, origin = choose_prompts("b; a", None, scene)
    assert prompts == ["b", "a"] and "as given" in origin
    prompts, origin = choose_prompts(" ", file, scene)
    assert prompts == ["z", "a"] and str(file) in origin
    prompts, origin = choose_prompts("", None, scene)
    assert prompts == ["banana", "hand", "wood"] and "classes.txt" in origin


def test_without_any_prompts_the_list_is_empty_and_the_log_says_so(tmp_path):
    prompts, origin = choose_prompts("", None, tmp_path)
    assert prompts == [] and origin.startswith("No prompts")


def test_prompts_and_a_prompts_file_together_are_refused(scene):
    with pytest.raises(PromptError, match="give only one of them"):
        choose_prompts("a", scene / "segmentations" / "classes.txt", scene)


@pytest.fixture
def likes_file(tmp_path: Path) -> Path:
    path = tmp_path / "a run" / "likes.json"
    write_likes(path, [Like("like 1", [0.6, 0.8, 0.0], "tiny"), Like("like 2", [0.0, 0.0, 1.0], "tiny")])
    return path


def test_prompts_without_words_are_read_from_the_file_that_the_prompts_name(likes_file):
    prompts = given_prompts(f"red mug; {likes_file}; LIKE 1; table", None)
    assert prompts == ["red mug", "like 1", "like 2", "table"]
    like = prompts[1]
    assert isinstance(like, Like) and like.feature == pytest.approx((0.6, 0.8, 0)) and like.fingerprint == "tiny"
    assert not isinstance(prompts[0], Like)
    for same in (copy.deepcopy(like), pickle.loads(pickle.dumps(like))):
        assert (same, same.feature, same.fingerprint) == (like, like.feature, "tiny") and isinstance(same, Like)
    assert len(likes_file.read_text().splitlines()) == 7, "a like is a line, which people can read and take out"
    assert parse_prompts(str(likes_file)) == [str(likes_file)], "what is typed into a page names no file"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("", "no file of likes"),
        ("[]", "no object"),
        ("{}", "'fingerprint' is missing"),
        ('{"fingerprint": 3, "likes": []}', "no fingerprint, or no list"),
        ({"likes": []}, "no list of likes"),
        ({"likes": [{"name": "a"}]}, "'feature' is missing"),
        ({"likes": [3]}, "no file of likes"),
        ({"likes": [{"name": "a; b", "feature": [1]}]}, "no plain text"),
        ({"likes": [{"name": "a", "feature": ["1"]}]}, "no list of numbers"),
        ({"likes": [{"name": "a", "feature": [True]}]}, "no list of numbers"),
        ({"likes": [{"name": "a", "feature": [float("nan"), 1]}]}, "not finite"),
        ({"likes": [{"name": "a", "feature": [float("inf"), 1]}]}, "not finite"),
        ({"likes": [{"name": "a", "feature": [10**400]}]}, "no file of likes"),
        ({"likes": [{"name": "a", "feature": [0, 0]}]}, "all zeros"),
        ({"likes": [{"name": "a", "feature": []}]}, "all zeros"),
        ("[" * 100_000, "no file of likes"),
    ],
)
def test_what_is_no_file_of_likes_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "likes.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps({"fingerprint": "tiny", **content}))
    with pytest.raises(LikesError, match=message) as caught:
        read_likes(path)
    assert str(path) in str(caught.value)


def test_a_file_of_likes_is_no_text_of_prompts_and_teaches_nothing(likes_file):
    with pytest.raises(PromptError, match=f"with --prompts {likes_file}"):
        read_prompts_file(likes_file)
    for data in (likes_file.parent, None):
        with pytest.raises(PromptError, match="'like 1' is a prompt without words, which only a trained run"):
            choose_prompts(f"a cat; {likes_file}", None, data)


def test_likes_of_another_encoder_are_refused_and_its_own_need_no_encoder(likes_file):
    segmenter = Segmenter()
    segmenter.configure(["a cat"], torch.eye(3)[:1], torch.eye(3), torch.eye(3), "nobody's", "tiny")
    prompts = given_prompts(f"A cat; {likes_file}", None)
    assert torch.allclose(
        Embedder("cpu")(segmenter, prompts), torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 1]]), atol=1e-6
    )
    segmenter.fingerprint = "huge"
    with pytest.raises(LikesError, match=r"'like 1' was clicked in features of tiny .* the run's come from huge"):
        Embedder("cpu")(segmenter, prompts)
    with pytest.raises(LikesError, match=r"\(4 numbers\)"):
        Embedder("cpu")(segmenter, [Like("wide", [1, 0, 0, 0], "huge")])


def test_only_some_prompts_or_all_but_some_are_shown():
    prompts = ["red mug", "Plate", "table"]
    assert choose_shown("", "", prompts).flags(prompts) == [True] * 4
    assert choose_shown("plate; Red mug", "", prompts).flags(prompts) == [True, True, False, False]
    assert choose_shown("", "TABLE", prompts).flags(prompts) == [True, True, False, True], "what is none stays"
    assert choose_shown("plate; table", "table", prompts).flags(prompts) == [False, True, False, False]
    with pytest.raises(PromptError, match=r"--only names 'fork', which is not among .*: red mug; Plate; table"):
        choose_shown("plate; fork", "", prompts)
    with pytest.raises(PromptError, match="leave no prompt to show"):
        choose_shown("table", "table", prompts)
    assert Shown(("plate",), ("fork", "table")).among(["Plate", "fork"]) == Shown(("plate",), ("fork",))
