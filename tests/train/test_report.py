"""The report: what it draws, and that nothing in a run's files can act on the page. html5lib reads it as a browser does."""

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import html5lib
import numpy as np
import pytest
from PIL import Image

from train import report, report_charts, report_examples
from train.report_data import read_run

ROOT = Path(__file__).resolve().parents[2]
EVIL = "</script></style></title><img src=x onerror=alert(1)><svg/onload=alert(2)>\"'&lt;\u202e\x00\ud800"
XHTML, SVG = "{http://www.w3.org/1999/xhtml}", "{http://www.w3.org/2000/svg}"


def jpeg(value: int, size=(64, 48), quality=80) -> bytes:
    rng = np.random.default_rng(value)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8)).save(out, "JPEG", quality=quality)
    return out.getvalue()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder, *, text="<think>it moves</think>\n<answer>B</answer>", steps=20, frames=4):
    """A small run folder whose every text is `text` or carries it."""
    (folder / "frames").mkdir(parents=True)
    for i in range(frames):
        (folder / "frames" / f"f{i}.jpg").write_bytes(jpeg(i))
    rows = [
        {
            "schema_version": 1,
            "step": step,
            "reward/mean": 0.2 + step / 100,
            "reward/accuracy": step / 40,
            f"reward/accuracy/{text}": 0.5,
            f"validate/accuracy/{text}": 0.25,
            text: 3.0,
            "time/step_s": 10.0,
            "time/rollout_s": 4.0,
            f"time/{text.replace('/', '')}_s": 5.0,
            "time/rollout/score_s": 3.0,
            "warnings": [text],
        }
        for step in range(1, steps + 1)
    ]
    write(folder / "metrics.jsonl", rows)
    responses = [
        {
            "text": text,
            "reward": reward,
            "reward_parts": {"accuracy": reward, text: 0.5},
            "status": text,
            "finish_reason": "length",
            "is_demonstration": True,
            "tokens": 7,
        }
        for reward in (1.0, 0.5, 0.0)
    ]
    one = {
        "id": text,
        "problem_type": text,
        "question": text,
        "options": [text, "b"],
        "answer": text,
        "frames": [{"file": f"f{i}.jpg", "time_s": i / 2} for i in range(frames)],
        "responses": responses,
    }
    write(folder / "rollouts.jsonl", [{"step": step, **one} for step in (1, 5, 10, 15, 20)])
    start = {
        "started": text,
        "command": [text],
        "arguments": {text: text, "algorithm": text, "model": [text]},
        "versions": {text: text},
        "git": text,
        "ranks": 2,
        "device": text,
    }
    (folder / "run.json").write_text(json.dumps({"starts": [start]}))
    for name, accuracy in (("before", 0.4), ("after", 0.625)):
        part = {
            "n": 80,
            "accuracy": accuracy,
            "ci95": [accuracy - 0.1, accuracy + 0.1],
            "parsed": 1.0,
            "accuracy_among_parsed": accuracy,
            "majority": 0.25,
        }
        result = {"overall": part, "per_type": {text: part}, "blind": {**part, "accuracy": 0.3, "ci95": [0.2, 0.4]}}
        (folder / f"{name}.json").write_text(json.dumps(result))
    return folder


def parse(path):
    return html5lib.parse(path.read_text(encoding="utf-8"))


def visible(tree):
    body = tree.find(f"{XHTML}body")
    return re.sub(r"\s+", " ", " ".join(body.itertext()))


def assert_harmless(tree):
    allowed_tags = (
        {"html", "head", "body", "meta", "title", "style", "header", "main", "nav", "section", "footer"}
        | {"div", "span", "p", "a", "h1", "h2", "h3", "ul", "li", "b", "bdi", "small", "code", "article", "figure"}
        | {"figcaption", "img", "table", "thead", "tbody", "tfoot", "tr", "th", "td", "details", "summary"}
    )
    allowed_svg = {"svg", "path", "line", "rect", "circle", "text", "title", "g"}
    for node in tree.iter():
        if not isinstance(node.tag, str):
            raise AssertionError(f"a comment: {node.text}")
        space, _, tag = node.tag.rpartition("}")
        assert tag in (allowed_svg if space == SVG[:-1] else allowed_tags), node.tag
        for name, value in node.attrib.items():
            assert not name.lower().startswith("on") and name not in ("style", "srcset", "action", "formaction"), name
            if name == "src":
                assert tag == "img" and re.fullmatch(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", value)
            if name == "href":
                assert re.fullmatch(r"#[a-z]+", value)


def test_hostile_text_stays_text(tmp_path):
    folder = make_run(tmp_path / "<img src=x onerror=alert(3)>", text=EVIL)
    tree = parse(report.write_report(folder))
    assert_harmless(tree)
    text = visible(tree)
    shown = "</script></style></title><img src=x onerror=alert(1)><svg/onload=alert(2)>\"'&lt;[U+202E][U+0000][U+D800]"
    assert text.count(shown) >= 20
    assert len(list(tree.iter(f"{XHTML}img"))) == 3 * 4  # the frames of three steps, and nothing from the texts
    assert [node.text for node in tree.iter(f"{XHTML}title")] == ["<img src=x onerror=alert(3)> · ReelRL"]


def test_policy_allows_only_this_style_sheet_and_data_images(tmp_path):
    tree = parse(report.write_report(make_run(tmp_path / "run")))
    (style,) = tree.iter(f"{XHTML}style")
    digest = base64.b64encode(hashlib.sha256(style.text.encode()).digest()).decode()
    policies = [m.get("content") for m in tree.iter(f"{XHTML}meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    ]
    head = list(tree.find(f"{XHTML}head"))
    assert head.index(style) > 1  # the policy stands before what it governs
    assert "url(" not in style.text and "@import" not in style.text


def test_what_it_shows(tmp_path):
    text = visible(parse(report.write_report(make_run(tmp_path / "first_run"))))
    assert "first_run" in text
    assert "40.0 → 62.5 %" in text and "+22.5 points" in text  # held out
    assert (
        "0.22" in text and "0.39" in text
    )  # reward: mean of the first and of the last two of twenty steps, 0.215, 0.395
    assert "blind run: frames replaced by grey" in text
    assert "62.5 % 52.5–72.5" in text
    assert "rollout 4 s 40%" in text and "other 1 s 10%" in text
    assert "3 of 5 logged groups, from the first, the middle and the last of 5 logged steps." in text
    assert "0.50" in text and "accuracy 0.50" in text and "demonstration" in text and "truncated" in text
    assert "Gold answer:" in text and "7 tokens" in text


def test_an_empty_and_a_torn_run(tmp_path):
    (tmp_path / "new").mkdir()
    tree = parse(report.write_report(tmp_path / "new"))
    assert "metrics.jsonl is missing" in visible(tree)
    folder = make_run(tmp_path / "torn")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(
            '[1]\n{"step": "x"}\n{"step": 21, "reward/mean": NaN, "reward/accuracy": "high", "time/step_s": null}\n'
            '{"step": 22, "x": 1' + "0" * 400 + '}\n{"ste'
        )
    (folder / "run.json").write_text("[")
    (folder / "after.json").write_text('{"overall": {"accuracy": "good", "ci95": 3}, "per_type": [1]}')
    lines = [{"step": 30, "responses": [None, {"text": 5, "reward": "x", "reward_parts": [1]}], "frames": {"a": 1}}]
    with open(folder / "rollouts.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    tree = parse(report.write_report(folder))
    assert_harmless(tree)
    assert "3 lines of metrics.jsonl could not be read" in visible(tree)
    assert "run.json could not be read" in visible(tree)
    with pytest.raises(FileNotFoundError, match="no run folder"):
        report.write_report(tmp_path / "none")


def test_size_limit_drops_frames_first_and_says_so(tmp_path):
    folder = make_run(tmp_path / "run", frames=8)
    for i in range(8):
        (folder / "frames" / f"f{i}.jpg").write_bytes(jpeg(i, size=(200, 150), quality=95))
    full = report.write_report(folder).stat().st_size
    small = report.write_report(folder, max_bytes=full // 2)
    text = visible(parse(small))
    assert small.stat().st_size <= full // 2
    assert "at most 2 frames are shown per example" in text or "at most 4 frames" in text
    assert "<think>" in text and "Texts are cut" not in text
    bare = report.write_report(folder, max_bytes=120_000)
    assert "frames are left out" in visible(parse(bare)) and not list(parse(bare).iter(f"{XHTML}img"))
    with pytest.raises(ValueError, match="even without examples; allowed: 1000"):
        report.write_report(folder, max_bytes=1000)


def test_long_texts_and_many_metrics_stay_bounded(tmp_path):
    folder = make_run(tmp_path / "run", text="x" * 100_000)
    rows = [{"step": s, **{f"metric/{i}": s * i for i in range(700)}} for s in range(1, 100)]
    write(folder / "metrics.jsonl", rows)
    path = report.write_report(folder)
    assert path.stat().st_size < 3_000_000
    text = path.read_text()
    assert "94,000 characters more" in text and "are in metrics.jsonl" in text


def test_only_small_jpegs_from_the_frames_folder(tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    good = jpeg(1)
    (frames / "a.jpg").write_bytes(good)
    (frames / "text.jpg").write_bytes(b"<svg onload=alert(1)>")
    (frames / "big.jpg").write_bytes(b"\xff\xd8\xff" + bytes(300_000))
    (tmp_path / "secret.jpg").write_bytes(good)
    (frames / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    read = report_examples.read_frame
    assert read({"file": "a.jpg"}, frames) == read("a.jpg", frames) == good
    assert read({"jpeg": base64.b64encode(good).decode()}, frames) == good
    for bad in ("text.jpg", "big.jpg", "link.jpg", "../secret.jpg", "gone.jpg", "!!", 7, None, {"jpeg": "a b"}, {}):
        assert read(bad, frames) is None


def test_charts_by_hand():
    assert report_charts.nice_ticks(0.13, 0.87) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert report_charts.nice_ticks(1, 1) == [0.5, 0.75, 1.0, 1.25, 1.5]
    assert [report_charts.short(v) for v in (0, 0.53124, 12345.6, 123.4, 0.00004, -2.0)] == [
        "0",
        "0.531",
        "12,346",
        "123",
        "4.0e-05",
        "-2",
    ]
    assert report_charts.thin([(1, 2.0), (2, 4.0), (3, 9.0)], 2) == [(2, 3.0), (3, 9.0)]
    constant = report_charts.smooth([(i, 7.0) for i in range(50)])
    assert [y for _, y in constant] == pytest.approx([7.0] * 50)  # the start is not pulled towards zero
    # one line from (0, 0) to (10, 1) on an axis of 0 to 1: the plot spans x 46..388 and y 12..194
    svg = report_charts.line_chart([("a", [(0, 0.0), (10, 1.0)])])
    assert 'd="M46 194L388 12"' in svg
    # a bar of 3 + 1 seconds on an axis of 0 to 4: blocks of 151.5 and 50.5 in a plot of 202
    bars = report_charts.stacked_bars([1], [("a", [3.0]), ("b", [1.0])], label="")
    assert re.findall(r' y="([\d.]+)" width="56" height="([\d.]+)"', bars) == [("62.50", "151.50"), ("12.00", "50.50")]


def test_chosen_steps():
    assert report_examples.chosen_steps([1, 5, 9, 13, 5]) == [1, 9, 13]
    assert report_examples.chosen_steps([4]) == [4] and report_examples.chosen_steps([]) == []


def test_program(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "after.json").rename(tmp_path / "later.json")
    program = [sys.executable, ROOT / "scripts" / "make_report.py"]
    done = subprocess.run([*program, folder, "--after", tmp_path / "later.json"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"{folder}/report.html ("), done.stderr
    assert "62.5 %" in visible(parse(folder / "report.html"))
    for wrong in ([tmp_path / "none"], [folder, "--before", "none.json"]):
        done = subprocess.run([*program, *wrong], capture_output=True, text=True, env=dict(os.environ, COLUMNS="200"))
        assert done.returncode == 2 and "no " in done.stderr and "Traceback" not in done.stderr


def test_reading_sorts_by_step(tmp_path):
    write(tmp_path / "metrics.jsonl", [{"step": 3}, {"step": 1}, {"step": 2}])
    run = read_run(tmp_path, tmp_path / "before.json", tmp_path / "after.json")
    assert [row["step"] for row in run.rows] == [1, 2, 3]


def test_results_of_the_playground_evaluation(tmp_path):
    """The table of evaluate/playground.py, as it writes it."""
    folder = make_run(tmp_path / "run")
    (folder / "after.json").unlink()
    (folder / "after").mkdir()
    line = {"value": 0.75, "low": 0.6, "high": 0.9, "n": 30, "parsed": 0.9, "among_parsed": 0.8, "majority": 0.5}
    result = {
        "metrics": {
            "accuracy": {"value": 0.6, "low": 0.5, "high": 0.7, "n": 40},
            "accuracy_blind": {"value": 0.3, "low": 0.2, "high": 0.4, "n": 40},
        },
        "breakdown": {"problem_type": {"boolean": line, "math": {**line, "value": 0.15, "n": 10, "parsed": 0.5}}},
    }
    (folder / "after" / "results.json").write_text(json.dumps(result))
    run = read_run(folder, folder / "before.json", folder / "after" / "results.json")
    assert run.after["overall"] == {
        "n": 40,
        "accuracy": 0.6,
        "ci95": [0.5, 0.7],
        "parsed": pytest.approx((30 * 0.9 + 10 * 0.5) / 40),
        "accuracy_among_parsed": pytest.approx(0.6 / 0.8),
        "majority": 0.5,
    }
    text = visible(parse(report.write_report(folder)))
    assert "40.0 → 60.0 %" in text and "100.0 → 80.0" in text and "30.0 % 20.0–40.0" in text


def test_ticks_of_tiny_and_of_constant_values():
    assert report_charts.nice_ticks(1e-13, 4e-13, 3) == [1e-13, 2e-13, 3e-13, 4e-13]
    assert report_charts.nice_ticks(2.0, 2.0) == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert report_charts.line_chart([("k3", [(1, 2.1e-13), (2, 2.2e-13)])])
