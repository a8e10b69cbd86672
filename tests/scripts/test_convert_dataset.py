"""scripts/convert_dataset.py: rows as Video-R1 and OneThinker store them become rows that the reader accepts."""

import json
from pathlib import Path

import pytest

from data.dataset import load
from rewards import check_gold

VIDEO_R1 = [
    {
        "problem_id": 2, "problem": "What appears on the screen?", "data_type": "video",
        "problem_type": "multiple choice", "options": ["A. A star.", "B. A door."],
        "process": "<think>A door opens.</think>", "solution": "<answer>B</answer>",
        "path": "./LLaVA-Video-178K/a.mp4", "data_source": "LLaVA-Video-178K/0_30_s_academic_v0_1",
    },
    {
        "problem_id": 7, "problem": "How far is it, in metres?", "data_type": "image", "problem_type": "regression",
        "options": [], "solution": "<answer>2.5</answer>", "path": "./Spatial/b.jpg", "data_source": "Spatial",
    },
    {
        "problem_id": 8, "problem": "What does the sign say?", "data_type": "image", "problem_type": "OCR", "options": [],
        "solution": "<answer>STOP</answer>", "path": "./Spatial/b.jpg", "data_source": "Spatial",
    },
    {
        "problem_id": 9, "problem": "Describe it.", "data_type": "video", "problem_type": "free-form", "options": [],
        "solution": "<answer>A cat sleeps.</answer>", "path": "./LLaVA-Video-178K/a.mp4", "data_source": "LLaVA",
    },
]  # fmt: skip
ONE_THINKER = [
    {
        "problem_id": "tg-1", "problem": "When does the man sit down?", "data_type": "video",
        "problem_type": "temporal grounding", "options": [], "solution": '<answer>{"time": [3.0, 7.5]}</answer>',
        "path": "LLaVA-Video-178K/a.mp4", "data_source": "charades",
    },
    {
        "problem_id": "sg-1", "problem": "Where is the cup?", "data_type": "image", "problem_type": "spatial grounding",
        "options": [], "solution": '<answer>{"boxes": [10, 20, 110, 220]}</answer>', "path": "Spatial/b.jpg",
        "data_source": "refcoco", "preprocessed_video": "cache/x.pt",
    },
    {
        "problem_id": "st-1", "problem": "When and where?", "data_type": "video",
        "problem_type": "spatial-temporal grounding", "options": [],
        "solution": '<answer>{"time": [1, 2], "boxes": {"1": [1, 2, 30, 40], "2": [2, 3, 31, 41]}}</answer>',
        "path": "LLaVA-Video-178K/a.mp4", "data_source": "stvg",
    },
    {
        "problem_id": "tr-1", "problem": "Follow the ball.", "data_type": "video", "problem_type": "tracking",
        "options": [], "solution": '<answer>{"boxes": {"0": [1, 2, 30, 40]}}</answer>',
        "path": "LLaVA-Video-178K/a.mp4", "data_source": "got10k",
    },
]  # fmt: skip
BROKEN = [
    {"problem_id": "no-answer", "problem": "q", "problem_type": "math", "path": "Spatial/b.jpg"},
    {"problem_id": "no-type", "problem": "q", "problem_type": "riddle", "solution": "<answer>1</answer>"},
    {"problem_id": "no-question", "problem": " ", "problem_type": "math", "solution": "<answer>1</answer>"},
    ["not a row"],
]


@pytest.fixture(scope="module")
def program():
    from scripts import convert_dataset

    return convert_dataset


@pytest.fixture
def folder(tmp_path):
    for name in ("LLaVA-Video-178K/a.mp4", "Spatial/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not empty")
    return tmp_path


def test_both_become_valid_rows(program, folder, capsys):
    (folder / "v.json").write_text(json.dumps(VIDEO_R1))
    (folder / "o.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ONE_THINKER))
    out = folder / "train.jsonl"
    files = [str(folder / "v.json"), str(folder / "o.jsonl")]
    assert program.main([*files, "--out", str(out), "--media_dir", str(folder), "--keep_process"]) == 0
    assert "8 rows" in capsys.readouterr().out and not Path(f"{out}.failed.jsonl").exists()
    with pytest.warns(UserWarning, match="1 rows name a preprocessed_video"):
        samples = load([str(out)], check_gold=check_gold)
    video, image = str(folder / "LLaVA-Video-178K/a.mp4"), str(folder / "Spatial/b.jpg")
    seen = [
        (sample.id, sample.problem_type, sample.data_type, sample.media[0].path, sample.answer) for sample in samples
    ]
    assert seen == [
        ("2", "multiple choice", "video", video, "B"),
        ("7", "regression", "image", image, "2.5"),
        ("8", "ocr", "image", image, "STOP"),
        ("9", "open-ended", "video", video, "A cat sleeps."),
        ("tg-1", "temporal grounding", "video", video, '{"time": [3.0, 7.5]}'),
        ("sg-1", "spatial grounding", "image", image, '{"boxes": [10, 20, 110, 220]}'),
        ("st-1", "spatial-temporal grounding", "video", video, ONE_THINKER[2]["solution"][8:-9]),
        ("tr-1", "tracking", "video", video, '{"boxes": {"0": [1, 2, 30, 40]}}'),
    ]
    assert samples[0].options == ("A. A star.", "B. A door.") and samples[1].options == ()
    assert samples[0].offline_output == "<think>A door opens.</think>\n<answer>B</answer>"
    assert [sample.offline_output for sample in samples[1:]] == [None] * 7
    assert samples[0].source == "LLaVA-Video-178K/0_30_s_academic_v0_1" and samples[7].source == "got10k"


def test_the_reader_takes_such_rows_unconverted_too(program, folder):
    """Same samples either way, apart from where they stand and how their paths are written."""
    raw, out = folder / "raw.json", folder / "train.jsonl"
    raw.write_text(json.dumps(VIDEO_R1))
    assert program.main([str(raw), "--out", str(out)]) == 0
    for left, right in zip(load([str(raw)], check_gold=check_gold), load([str(out)], check_gold=check_gold)):
        assert (left.id, left.answer, left.problem_type, left.options) == (
            right.id, right.answer, right.problem_type, right.options,
        )  # fmt: skip
        assert Path(left.media[0].path).resolve() == Path(right.media[0].path).resolve()


def test_what_cannot_be_converted_is_listed(program, folder, capsys):
    (folder / "v.json").write_text(json.dumps([VIDEO_R1[0], *BROKEN], indent=0))
    out = folder / "train.jsonl"
    assert program.main([str(folder / "v.json"), "--out", str(out), "--absolute"]) == 1
    assert "4 rows could not be converted" in capsys.readouterr().out
    failed = [json.loads(line) for line in Path(f"{out}.failed.jsonl").read_text().splitlines()]
    assert [row["id"] for row in failed] == ["no-answer", "no-type", "no-question", ""]
    assert all(row["reason"] and row["remedy"] and row["line"] for row in failed)
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert Path(row["videos"][0]).is_absolute() and "offline_output" not in row
    assert program.main([str(folder / "nothing.json"), "--out", str(out)]) == 2
    assert "no such file" in capsys.readouterr().err
