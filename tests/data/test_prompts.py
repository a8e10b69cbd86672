"""What a sample becomes: one table for training and evaluation, user templates in a sandbox, media order."""

from __future__ import annotations

import pytest

from data.prompts import LEAD, TASKS, build_messages, build_text, order_media, render_preview, split_options
from data.records import PROBLEM_TYPES, Media, Sample
from rewards import score

VIDEO, IMAGE = Media("video", path="v.mp4"), Media("image", path="i.png")


def sample(question="What?", kind="multiple choice", media=(), options=("red", "blue"), **extra):
    return Sample("s1", question, "B", kind, "text", tuple(media), tuple(options), extra=extra)


def test_every_problem_type_has_a_task():
    assert set(TASKS) == set(PROBLEM_TYPES)


def test_text_of_a_multiple_choice_question():
    assert (
        build_text(sample(), "direct")
        == "What?\nA. red\nB. blue\nPut the letter of the correct option in <answer></answer>."
    )
    assert build_text(sample(), "think").endswith("Example: <think>…</think><answer>B</answer>")


def test_media_come_first_without_markers():
    content = build_messages(sample(media=(VIDEO, IMAGE)), "direct")[0]["content"]
    assert [item["type"] for item in content] == ["video", "image", "text"]


def test_markers_place_the_media():
    content = build_messages(sample("Compare <image> with <video> now", media=(IMAGE, VIDEO)), "direct")[0]["content"]
    assert [item.get("text", item["type"]) for item in content][:4] == ["Compare ", "image", " with ", "video"]
    assert content[4]["text"].startswith(" now\nA. red")


def test_order_media_follows_the_markers():
    second = Media("image", path="j.png")
    assert order_media("<video> <image> <image>", (IMAGE, second, VIDEO)) == (VIDEO, IMAGE, second)
    assert order_media("no marker", (IMAGE, VIDEO)) == (IMAGE, VIDEO)
    assert order_media("Write a <video> element", ()) == ()
    with pytest.raises(ValueError, match="2 <image> markers for 1 images"):
        order_media("<image><image>", (IMAGE,))
    with pytest.raises(ValueError, match="order"):
        build_messages(sample("<video> <image>", media=(IMAGE, VIDEO)), "direct")


def test_units_and_coordinates_are_stated():
    assert "one number in m " in build_text(sample(kind="regression", unit="m", options=()), "direct")
    boxed = build_text(sample(kind="spatial grounding", coord="norm1000", options=()), "direct")
    assert "coordinates scaled to 0-1000" in boxed
    sized = build_text(sample(kind="spatial grounding", coord="pixel", width=64, height=48, options=()), "direct")
    assert "pixels of the 64x48 frame" in sized
    with pytest.raises(ValueError, match="coord"):
        build_text(sample(kind="spatial grounding", coord="percent"), "direct")


def test_a_sample_may_ask_for_another_format():
    assert build_text(sample(format_mode="direct"), "think") == build_text(sample(), "direct")
    assert "step by step" in build_text(sample(format_mode="open"), "think")
    with pytest.raises(ValueError, match="style"):
        build_text(sample(), "loud")


@pytest.mark.parametrize("kind", sorted(set(TASKS) - {"code", "svg-code", "html-code", "math", "multiple choice"}))
@pytest.mark.parametrize("style", ["think", "direct", "open"])
def test_the_example_of_every_prompt_is_read_and_formatted_right(kind, style):
    example = TASKS[kind].example
    response = {"think": "<think>x</think>", "direct": "", "open": "x "}[style] + f"<answer>{example}</answer>"
    result = score(kind, response, example, {"format_mode": style})
    assert (result.accuracy, result.format) == (1.0, 1.0)
    assert style in LEAD


def test_options_keep_their_own_letters():
    assert split_options(["C. x", "A: y", "(B) z"]) == [("C", "x"), ("A", "y"), ("B", "z")]
    assert split_options(["A. x", "plain"]) == [("A", "A. x"), ("B", "plain")]


def test_template(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{{ question }} ({{ style }}){% for o in options %} [{{ o.letter }}]{% endfor %} {{ extra.topic }}\n"
    )
    assert build_text(sample(topic="hats"), "direct", str(path)) == "What? (direct) [A] [B] hats"
    assert render_preview(sample(media=(VIDEO,), topic="hats"), "direct", str(path)).startswith("[video]\nWhat?")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined|fails"),
        ("{{ unknown }}", "unknown"),
        ("{% if %}", "line 1"),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_a_bad_template_names_itself(tmp_path, text, words):
    path = tmp_path / "bad.jinja"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        build_text(sample(), "think", str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        build_text(sample(), "think", str(tmp_path / "missing.jinja"))
