"""scripts/show_sample.py draws the very frames the model sees, each under its time."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.clips import make_clip, read_number


@pytest.fixture(scope="module")
def program():
    from scripts import show_sample

    return show_sample


@pytest.fixture
def data(tmp_path):
    make_clip(tmp_path / "a.mp4")  # 40 numbered frames at 20 fps, 128x96
    Image.new("RGB", (64, 96), (10, 200, 30)).save(tmp_path / "green.png")
    rows = [
        {"problem": "17 * 3 = ?", "answer": "51", "problem_type": "math"},
        {"problem": "Is <image> in <video>?", "answer": "yes", "problem_type": "boolean", "images": ["green.png"],
         "videos": ["a.mp4"], "problem_id": "mix", "video_start": 0.5, "video_end": 1.5},
    ]  # fmt: skip
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def cell(sheet: Path, column: int, top: int, width: int, height: int) -> np.ndarray:
    """(3, H, W) of the picture in a column (240 wide, 8 apart) whose row begins at `top`."""
    left = 8 + column * 248
    return np.asarray(Image.open(sheet))[top : top + height, left : left + width].transpose(2, 0, 1)


def test_frames_times_and_text(program, data, capsys):
    """Window [0.5, 1.5) s holds frames 10 to 29; 4 frames at 4 fps: linspace(10, 29, 4) = 10, 16.3, 22.7, 29."""
    out = data / "sheet.png"
    flags = ["--row", "1", "--out", str(out), "--fps", "4", "--min_frames", "4"]
    assert program.main([str(data / "d.jsonl"), *flags]) == 0
    text = capsys.readouterr().out
    assert "green.png: 64x96" in text
    assert "4 frames of 128x96, from 40 frames, 2.00 s at 20.00 fps, window [0.5, 1.5) s" in text
    assert "d.jsonl:2  id mix  boolean  mixed  gold: yes" in text and "give --model" in text
    # Rows of the sheet: title (8 + 24), image 96 tall (+ 24), title (+ 24): the frames begin at 176.
    np.testing.assert_allclose(cell(out, 0, 32, 64, 96).mean(axis=(1, 2)), [10, 200, 30], atol=1)
    assert [read_number(cell(out, column, 176, 128, 96)) for column in range(4)] == [10, 16, 23, 29]
    assert "5 pictures" in text


def test_tokens_with_a_model(program, data, tiny, capsys):
    """Qwen3-VL, factor 32: two pairs of frames of 3 x 4 tokens and an image of 3 x 2 are 30 visual tokens."""
    flags = ["--row", "1", "--out", str(data / "s.png"), "--fps", "4", "--model", tiny("qwen3_vl"), "--style", "direct"]
    assert program.main([str(data / "d.jsonl"), *flags]) == 0
    text = capsys.readouterr().out
    assert "prompt tokens, 30 of them visual" in text and "<|video_pad|>" in text and "<|image_pad|>" in text


def test_text_alone_and_a_row_that_is_not_there(program, data, capsys):
    assert program.main([str(data / "d.jsonl"), "--out", str(data / "t.png")]) == 0
    assert "0 pictures" in capsys.readouterr().out and (data / "t.png").exists()
    assert program.main([str(data / "d.jsonl"), "--row", "2"]) == 2
    assert "--row 2: " in (error := capsys.readouterr().err) and "usable rows 0 to 1" in error


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--out", "nowhere/s.png"], "--out nowhere/s.png: its folder does not exist"),
        (["--out", "s.xyz"], "--out s.xyz: cannot be written"),
        (["--model", "nowhere"], "--model nowhere is no folder"),
        (["--chat_template", "t.jinja"], "--chat_template needs --model"),
        (["--field_names", "{"], "--field_names {: is not JSON"),
    ],
)
def test_mistakes_are_errors_with_a_name(program, data, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(data)
    assert program.main(["d.jsonl", *flags]) == 2
    assert words in capsys.readouterr().err and not list(data.glob("s.*"))


def test_field_names(program, data, capsys):
    (data / "other.jsonl").write_text(json.dumps({"q": "17 * 3?", "answer": "51", "problem_type": "math"}) + "\n")
    flags = ["--out", str(data / "s.png"), "--field_names", '{"problem": "q"}', "--style", "open"]
    assert program.main([str(data / "other.jsonl"), *flags]) == 0
    assert "17 * 3?" in capsys.readouterr().out
