"""Promises of `prompts.py`."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovs3d_nerfstudio.prompts.prompts import (
    MAX_PROMPT_CHARACTERS,
    MAX_PROMPTS,
    PromptError,
    choose_prompts,
    clean_prompt,
    find_classes_file,
    parse_prompts,
    prompt_key,
    read_prompts_file,
)

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
