"""The playground: deterministic, balanced, without shortcuts, and its answers are what the files show.

The answers are read a second time from the decoded pixels, by code that shares nothing with the renderer.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
import pytest

from scripts.make_playground import make_data
from scripts.playground_clips import draw_scenes
from scripts.playground_questions import answer_text, make_rows

CLIPS = 60
PURE = {"red": (225, 30, 30), "green": (30, 190, 50), "blue": (40, 70, 240), "yellow": (240, 220, 30)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("playground")
    make_data(path, seed=3, clips=CLIPS, workers=2)
    return path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes_and_other_seed_other_clips(folder, tmp_path):
    make_data(tmp_path / "again", seed=3, clips=CLIPS, workers=1)
    assert digests(tmp_path / "again") == digests(folder)
    other = draw_scenes(4, "train", CLIPS, 0)
    assert not {scene.things for scene in other} & {scene.things for scene in draw_scenes(3, "train", CLIPS, 0)}


def test_splits_share_no_clip_and_no_scene(folder):
    asked = {name: rows_of(folder / f"{name}.jsonl") for name in ("train", "heldout", "captions")}
    media = {
        name: {p for row in rows for p in row.get("videos", row.get("images", []))} for name, rows in asked.items()
    }
    assert not media["train"] & media["heldout"] and media["captions"] == media["train"]
    found = digests(folder)
    content = {name: {found[path] for path in paths} for name, paths in media.items()}
    assert not content["train"] & content["heldout"]
    assert len(content["train"]) == len(media["train"])


def seen_colours(image: np.ndarray, least: int = 25) -> dict[str, np.ndarray]:
    """Colour -> (n, 2) x, y of the pixels that are clearly that colour, for colours with enough of them."""
    found = {}
    for name, pure in PURE.items():
        near = np.abs(image.astype(int) - np.array(pure)).max(axis=-1) < 45
        if near.sum() >= least:
            ys, xs = np.nonzero(near)
            found[name] = np.stack([xs, ys], axis=1)
    return found


def read_answer(template: str, row: dict, frames: np.ndarray, times_s: list[float]) -> object:
    """The answer to one question from the (F, H, W, 3) frames alone; None for a template that is not read here."""
    by_frame = [seen_colours(frame) for frame in frames]
    height, width = frames.shape[1:3]
    options = row.get("options")

    def letter(answer: str) -> str:
        return "ABCD"[options.index(answer)]

    if template in ("direction", "sideways"):
        (colour,) = {name for found in by_frame for name in found}
        shift = (by_frame[-1][colour].mean(axis=0) - by_frame[0][colour].mean(axis=0)) / [width, height]
        sideways = abs(shift[0]) > abs(shift[1])
        if template == "sideways":
            return "Yes" if sideways else "No"
        return letter(("right" if shift[0] > 0 else "left") if sideways else ("down" if shift[1] > 0 else "up"))
    if template in ("moving_colour", "still_colour"):
        return letter(next(iter(by_frame[0])))
    if template == "stays":
        return letter((set(by_frame[0]) & set(by_frame[-1]) & set(by_frame[len(frames) // 2])).pop())
    if template == "first":
        return letter(next(iter(by_frame[0])))
    if template == "never":
        return letter((set(PURE) - {name for found in by_frame for name in found}).pop())
    if template in ("count", "still_count"):
        return str(len(by_frame[0]))
    if template == "count_choice":
        return letter(str(len(by_frame[0])))
    if template == "many":
        return "Yes" if len(by_frame[0]) > 2 else "No"
    if template == "end_colour":
        return letter(next(iter(by_frame[-1])))
    if template == "changes":
        return "Yes" if set(by_frame[0]) != set(by_frame[-1]) else "No"
    if template == "upper_half":
        (places,) = by_frame[0].values()
        return "Yes" if places[:, 1].mean() < height / 2 else "No"
    if template == "when":
        colour = row["problem"].split()[3]
        times = [time for time, found in zip(times_s, by_frame, strict=True) if colour in found]
        return times[0], times[-1] + times_s[1]
    return None


def test_answers_are_what_the_files_show(folder):
    read = Counter()
    for row in rows_of(folder / "train.jsonl") + rows_of(folder / "heldout.jsonl"):
        if row["data_type"] == "text":
            continue
        (path,) = row.get("videos", row.get("images"))
        with av.open(str(folder / path)) as container:
            decoded = list(container.decode(video=0))
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
        times = [frame.time for frame in decoded] if "videos" in row else [0.0]
        template = row["data_source"].split("/")[1]
        answer = read_answer(template, row, frames, times)
        if template == "when":
            # 1 / fps is exact up to rounding; half a second falls between two frames at 8, 10 or 12 per second at most
            assert answer == pytest.approx(json.loads(row["answer"])["time"], abs=0.126), row
        else:
            assert answer == row["answer"], (row, answer)
        read[template] += 1
    assert len(read) == 15 and min(read.values()) >= 6, read


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_of_a_template_are_balanced(split):
    rows = make_rows(0, split, draw_scenes(0, split, 800, 160), 52)
    answers = defaultdict(Counter)
    for row in rows:
        answers[row["data_source"]][row["answer"]] += 1
    for source, found in answers.items():
        if source.endswith("/when"):
            continue
        n, classes = (
            sum(found.values()),
            {"boolean": 2}.get(next(r for r in rows if r["data_source"] == source)["problem_type"], 4),
        )
        # the decks deal every answer equally often; a deck that is cut short leaves a few over
        assert len(found) == classes and max(found.values()) - min(found.values()) <= max(3, 0.04 * n), (source, found)


def test_nothing_but_the_pixels_tells_the_answer():
    """The best guess from size, frame rate, length and place in the file, learned on one split, is chance on another."""
    tables: dict[tuple, Counter] = defaultdict(Counter)
    splits = {}
    for split in ("train", "heldout"):
        scenes = draw_scenes(1, split, 2000, 400)
        facts = {scene.file: (scene.width, scene.height, scene.fps, scene.duration_s) for scene in scenes}
        splits[split] = [
            (row["data_source"], facts[row.get("videos", row.get("images"))[0]], row["answer"], i % 5)
            for i, row in enumerate(make_rows(1, split, scenes, 0))
            if not row["data_source"].endswith("/when")  # its answer lies within the clip's length: no secret
        ]
    for source, fact, answer, place in splits["train"]:
        for k, part in enumerate((*fact, place)):
            tables[source, k, part][answer] += 1
    for k in range(5):
        right, chance = [], []
        for source, fact, answer, place in splits["heldout"]:
            guesses = tables[source, k, (*fact, place)[k]]
            right.append(guesses.most_common(1)[0][0] == answer if guesses else False)
            chance.append(0.5 if answer in ("Yes", "No") else 0.25)
        error = (np.var(right) / len(right)) ** 0.5
        assert np.mean(right) < np.mean(chance) + 3.5 * error, (k, np.mean(right), np.mean(chance))


def test_gold_answers_score_one_and_rows_load(folder):
    from data.dataset import load
    from rewards import check_gold, score

    for name in ("train", "heldout", "heldout_blind"):
        samples = load([str(folder / f"{name}.jsonl")], check_gold=check_gold)
        for sample in samples:
            extra = {**sample.extra, "options": list(sample.options)}
            got = score(sample.problem_type, answer_text(sample.answer), sample.answer, extra)
            assert got.accuracy == 1.0 and got.format == 1.0, sample


def test_blind_questions_are_the_same_about_grey_files(folder):
    for seeing, blind in zip(rows_of(folder / "heldout.jsonl"), rows_of(folder / "heldout_blind.jsonl"), strict=True):
        assert {k: v for k, v in seeing.items() if k not in ("videos", "images")} == {
            k: v for k, v in blind.items() if k not in ("videos", "images")
        }
    for path in (folder / "blind").iterdir():
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - 127).max() <= 2
