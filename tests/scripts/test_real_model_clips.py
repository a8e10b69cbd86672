"""Truths of the real model's questions are read back from the pixels of the files, by other means than those that drew them."""

from __future__ import annotations

import json
from collections import Counter

import av
import numpy as np
import pytest

from data.dataset import load
from rewards import check_gold, score
from scripts.real_model import make_clips
from scripts.real_model.questions import ASK, Asker, caption_rows, swapped_rows
from scripts.real_model.scenes import CLIP_KINDS, COLOURS, FPS, HELD_OUT, SHAPES, draw_scenes, write_scene
from scripts.real_model.text_questions import ability_rows, text_rows

PALETTE = np.array(list(COLOURS.values()), np.float32)
LEAST = 25  # pixels of a colour that are more than noise of the codec


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """(folder, scenes): four clips of every kind as files."""
    folder = tmp_path_factory.mktemp("clips")
    scenes = draw_scenes(5, "train", 4 * len(CLIP_KINDS), 0)
    for scene in scenes:
        write_scene(folder, scene)
    return folder, scenes


def colours_seen(path) -> list[dict[str, tuple[int, float, float]]]:
    """Per decoded frame: colour -> (pixels, mean x, mean y) of what is within 60 of that colour."""
    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            image = frame.to_ndarray(format="rgb24").astype(np.float32)
            gaps = np.linalg.norm(image[:, :, None] - PALETTE, axis=-1)  # (H, W, colours)
            nearest = np.where(gaps.min(axis=-1) < 60, gaps.argmin(axis=-1), -1)
            found = {}
            for i, colour in enumerate(COLOURS):
                ys, xs = np.nonzero(nearest == i)
                if len(xs) >= LEAST:
                    found[colour] = (len(xs), float(xs.mean()), float(ys.mean()))
            frames.append(found)
    return frames


def asked(scene) -> dict[str, dict]:
    return dict(ASK[scene.kind](scene, Asker(0, "train", 0)))


def chosen(row: dict) -> str:
    """The text of the right option."""
    return dict(option.split(". ", 1) for option in row["options"])[row["answer"]]


def of_kind(clips, kind: str):
    folder, scenes = clips
    return [(scene, colours_seen(folder / scene.file), asked(scene)) for scene in scenes if scene.kind == kind]


def test_direction_is_where_the_moving_colour_goes(clips):
    for _, frames, rows in of_kind(clips, "move"):
        shift = {
            colour: (frames[-1][colour][1] - place[1], frames[-1][colour][2] - place[2])
            for colour, place in frames[0].items()
        }
        mover = max(shift, key=lambda colour: sum(map(abs, shift[colour])))
        dx, dy = shift[mover]
        went = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
        assert chosen(rows["direction"]) == went
        assert chosen(rows["mover"]).split()[0] == mover


def test_order_is_that_of_the_first_frames_with_a_colour(clips):
    for _, frames, rows in of_kind(clips, "order"):
        first = {}
        for i, found in enumerate(frames):
            for colour in found:
                first.setdefault(colour, i)
        came = sorted(first, key=first.get)
        word = rows["order"]["problem"].split()[-1].rstrip("?")
        assert chosen(rows["order"]).split()[0] == came[("first", "second", "last").index(word)]
        a, b = (
            name.split()[0]
            for name in rows["before"]["problem"].removeprefix("Does the ").rstrip("?").split(" appear before the ")
        )
        assert rows["before"]["answer"] == ("Yes" if came.index(a) < came.index(b) else "No")


def test_span_is_that_of_the_frames_that_show_the_colour(clips):
    for scene, frames, rows in of_kind(clips, "span"):
        colour = rows["when"]["problem"].split()[3]
        there = [i for i, found in enumerate(frames) if colour in found]
        start, end = json.loads(rows["when"]["answer"])["time"]
        assert (start, end) == (there[0] / FPS, (there[-1] + 1) / FPS)
        assert rows["remains"]["answer"] == ("Yes" if there[-1] == len(frames) - 1 else "No")
        assert len(there) == there[-1] - there[0] + 1 and scene.duration_s * FPS == len(frames)


def test_counts_are_of_the_colours_seen_in_all_and_at_the_end(clips):
    for _, frames, rows in of_kind(clips, "count"):
        assert rows["count all"]["answer"] == str(len(set().union(*frames)))
        assert rows["count end"]["answer"] == str(len(frames[-1]))


def test_what_is_faster_covers_more_pixels(clips):
    for _, frames, rows in of_kind(clips, "speed"):
        ways = {c: abs(frames[-1][c][1] - p[1]) + abs(frames[-1][c][2] - p[2]) for c, p in frames[0].items()}
        assert chosen(rows["faster"]).split()[0] == max(ways, key=ways.get)


def test_hidden_thing_is_where_its_colour_is_last_seen(clips):
    for _, frames, rows in of_kind(clips, "hide"):
        assert any(not found for found in frames[len(frames) // 4 :])  # it is behind the wall for a while
        last = frames[-1]
        where = (
            "behind the wall"
            if not last
            else "left of the wall"
            if next(iter(last.values()))[1] < 56
            else "right of the wall"
        )
        assert chosen(rows["where"]) == where
        assert rows["comes out"]["answer"] == ("Yes" if last else "No")


def test_colour_at_the_end_and_the_cause_of_a_move(clips):
    for scene, frames, rows in of_kind(clips, "change"):
        other = scene.things[1].colour
        (colour,) = set(frames[-1]) - {other}
        assert chosen(rows["end colour"]) == colour
        assert rows["changes"]["answer"] == ("Yes" if colour not in frames[0] else "No")
    for scene, frames, rows in of_kind(clips, "bump"):
        a, b = scene.things[0].colour, scene.things[1].colour
        place = np.array([found[b][1:] for found in frames])
        moved = np.abs(place - place[0]).max(axis=1) > 4
        gaps = [np.hypot(f[a][1] - f[b][1], f[a][2] - f[b][2]) for f in frames]
        near = min(gaps) < 0.27 * 112
        want = (
            "it does not move"
            if not moved.any()
            else f"the {scene.things[0].name} hits it"
            if near
            else "it moves by itself"
        )
        assert chosen(rows["cause"]) == want


def test_combinations_that_are_held_out_are_in_no_other_split():
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS) and {shape for _, shape in HELD_OUT} == set(SHAPES)
    for split in ("train", "heldout", "unseen"):
        shown = set()
        for scene in draw_scenes(0, split, 400, 60):
            for thing in scene.things:
                shown.add((thing.colour, thing.shape))
                if thing.later_colour and split != "unseen":
                    shown.add((thing.later_colour, thing.shape))
        assert shown == HELD_OUT if split == "unseen" else shown == {(c, s) for c in COLOURS for s in SHAPES} - HELD_OUT


def test_files_are_the_same_for_a_seed_and_their_golds_and_demonstrations_score_one(tmp_path):
    for name in ("a", "b"):
        assert (
            make_clips.main(["--output_dir", str(tmp_path / name), "--clips", "16", "--text", "40", "--workers", "1"])
            == 0
        )
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert (
        len([file for file in files if file.suffix == ".mp4"]) == 16 + 8 + 8 + 16
    )  # train, two held-out splits, their grey twins
    for file in files:
        if file.name != "complete.json":
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    for name in ("train", "heldout", "unseen", "text_only"):
        samples = load([str(tmp_path / "a" / f"{name}.jsonl")], check_gold=check_gold)
        assert samples
        for sample in samples:
            extra = {**sample.extra, "options": list(sample.options)}
            found = score(sample.problem_type, sample.offline_output, sample.answer, extra)
            assert (found.accuracy, found.format) == (1.0, 1.0), (sample.question, sample.offline_output, found)


def test_cold_start_holds_the_first_questions_of_every_template(tmp_path):
    folder = tmp_path / "data"
    flags = ["--clips", "24", "--text", "40", "--workers", "1", "--demonstrations", "2"]
    assert make_clips.main(["--output_dir", str(folder), *flags]) == 0
    every, few = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "cold_start")
    )
    wanted = {}
    for row in every:
        wanted.setdefault(row["data_source"], []).append(row["problem_id"])
    assert len(wanted) > 20 and max(map(len, wanted.values())) > 2
    chosen = {name for ids in wanted.values() for name in ids[:2]}
    assert [row for row in every if row["problem_id"] in chosen] == few


def test_swapped_captions_have_another_scenes_media_of_the_same_kind(tmp_path):
    folder = tmp_path / "data"
    assert make_clips.main(["--output_dir", str(folder), "--clips", "8", "--text", "8", "--workers", "1"]) == 0
    own, swapped = (
        [json.loads(line) for line in (folder / f"heldout_captions{end}.jsonl").read_text().splitlines()]
        for end in ("", "_swapped")
    )
    assert len(own) == len(swapped) == 10  # eight clips and two stills
    for key, n in (("videos", 8), ("images", 2)):
        pairs = [(a[key], b[key]) for a, b in zip(own, swapped) if key in a]
        assert len(pairs) == n and all(len(b) == 1 and (folder / b[0]).is_file() for _, b in pairs)
        assert all((folder / a[0]).read_bytes() != (folder / b[0]).read_bytes() for a, b in pairs)
        assert sorted(a for a, _ in pairs) == sorted(b for _, b in pairs)  # nobody's is used twice
    changed = ("videos", "images", "problem_id", "data_source")
    for a, b in zip(own, swapped):
        assert a.keys() == b.keys() and all(a[key] == b[key] for key in a if key not in changed)
        assert (a["data_source"], b["data_source"]) == ("real/caption", "real/caption_swapped")
        assert b["problem_id"] == a["problem_id"].replace("caption-", "caption_swapped-")
    scenes = draw_scenes(0, "heldout", 40, 3)
    assert swapped_rows(caption_rows(scenes), 0) == swapped_rows(caption_rows(scenes), 0)
    with pytest.raises(ValueError, match="caption-heldout_i00000: no other row has images"):
        swapped_rows(caption_rows(draw_scenes(0, "heldout", 8, 1)), 0)


def test_letters_and_verdicts_are_dealt_evenly():
    scenes = draw_scenes(2, "train", 800, 0)
    ask = Asker(2, "train", 0)
    letters: dict[int, Counter] = {}
    for scene in scenes:
        for _, row in ASK[scene.kind](scene, ask):
            if row["problem_type"] == "multiple choice":
                letters.setdefault(len(row["options"]), Counter())[row["answer"]] += 1
    for count in letters.values():
        assert max(count.values()) - min(count.values()) <= 1, letters
    assert set(letters) == {3, 4}


def test_the_fixed_text_set_shares_nothing_with_what_is_trained_on():
    fixed = {(row["problem"], row["answer"] if "options" not in row else chosen(row)) for row in ability_rows()}
    trained = {(row["problem"], row["answer"] if "options" not in row else chosen(row)) for row in text_rows(0, 3000)}
    assert len(fixed) == 96 and not fixed & trained
    assert ability_rows() == ability_rows()
