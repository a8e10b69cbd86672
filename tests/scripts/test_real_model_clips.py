"""Truths of the real model's questions are read back from the pixels of the files, by other means than those that drew them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import av
import numpy as np
import pytest

from data.dataset import load
from rewards import check_gold, score
from scripts.real_model import make_clips
from scripts.real_model.questions import ASK, Asker, at_letter, balanced, caption_rows, swapped_rows, unnamed
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


@pytest.fixture(scope="module")
def drawn():
    """(scenes by split, rows by file) of the set that the launcher makes on a GPU; nothing is written."""
    return make_clips.draw_data(0, clips=4000, text=1000, demonstrations=60)


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
        if len(set().union(*frames)) == 1:
            assert "count end" not in rows
        else:
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
    stories = set()
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
        assert rows["touches"]["answer"] == ("Yes" if near else "No")
        assert rows["moves after"]["answer"] == ("Yes" if moved.any() else "No")
        stories.add((near, bool(moved.any())))
    assert len(stories) == 4  # whether it is touched says nothing about whether it moves


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


SPLITS = ("train", "heldout", "unseen")
# What a question of a template can be about beside the things that it names: a word at that place of it.
VARIANT = {"more_than": 3, "moves": -1, "order": -1}
FIXED = {
    "direction": {"left", "right", "up", "down"},
    "where": {"left of the wall", "right of the wall", "behind the wall"},
    "cause": {"hits it", "it moves by itself", "it does not move"},
}


def by_template(rows: list[dict]) -> dict[str, list[dict]]:
    found = defaultdict(list)
    for row in rows:
        if row["data_source"].startswith("real/"):
            found[row["data_source"].removeprefix("real/")].append(row)
    return found


def variant(row: dict) -> str:
    place = VARIANT.get(row["data_source"].removeprefix("real/"))
    return "" if place is None else row["problem"].rstrip("?").split()[place]


def spread(counts: Counter, answers) -> int:
    return max(counts[a] for a in answers) - min(counts[a] for a in answers)


@pytest.mark.parametrize("split", [*SPLITS, "cold_start"])
def test_answers_are_equally_frequent_in_every_template_and_wording(drawn, split):
    """Counted over all questions; of the cold start each template has 60."""
    booleans = 0
    for template, rows in by_template(drawn[1][split]).items():
        wordings = defaultdict(Counter)
        for row in rows:
            text = chosen(row) if "options" in row else row["answer"]
            wordings[variant(row)]["hits it" if text.endswith("hits it") else text] += 1
        if rows[0]["problem_type"] == "boolean":
            answers = {"Yes", "No"}
            booleans += 1
            assert all(row["answer"] in answers for row in rows)
        elif template in FIXED:
            answers = FIXED[template]
        else:
            continue
        assert set().union(*wordings.values()) == answers
        total = sum(wordings.values(), Counter())
        assert spread(total, answers) <= 1 and total.total() == len(rows), (template, total)
        assert all(spread(counts, answers) <= 1 for counts in wordings.values()), (template, wordings)
        if split == "cold_start":
            assert len(rows) == 60 and spread(total, answers) == 0
    assert booleans == 10
    assert {variant(row) for row in by_template(drawn[1][split])["more_than"]} == {"one", "two", "three", "four"}


def test_few_questions_are_lost_and_those_that_stay_keep_ids_of_their_own(drawn):
    """Of 500 clips of a kind: the wall's and the cause's answers are drawn 1:1:2, so that a quarter of each has to go; one thing
    alone, a fifth of the counted, is not asked about its end."""
    templates = by_template(drawn[1]["train"])
    assert len(templates) == 23
    counts = {template: len(rows) for template, rows in templates.items()}
    for template, count in counts.items():
        n = {"still_count": 1000, "leftmost": 1000, "present": 1000, "where": 376, "cause": 376, "count_end": 400}
        assert n.get(template, 500) - 4 <= count <= n.get(template, 500), (template, count)
    for split in SPLITS:
        ids = [row["problem_id"] for row in drawn[1][split] if row["data_source"].startswith("real/")]
        assert ids == [f"{split}-{i:05d}" for i in range(len(ids))]


def test_colour_at_the_end_is_not_told_by_the_question_nor_by_what_is_offered(drawn):
    scenes = {scene.file: scene for listed in drawn[0].values() for scene in listed}
    for split in SPLITS:
        rows = by_template(drawn[1][split])["end_colour"]
        right, offered, changed = Counter(), Counter(), 0
        for row in rows:
            first, second = scenes[row["videos"][0]].things
            texts = [option.split(". ")[1] for option in row["options"]]
            assert row["problem"] == f"What colour is the {first.shape} at the end?" and first.shape != second.shape
            assert len(set(texts)) == 4 and {first.colour, second.colour, chosen(row)} <= set(texts) <= set(COLOURS)
            assert chosen(row) == (first.later_colour or first.colour)
            if split != "unseen":  # no option is ruled out by its pair never being shown
                assert not {(colour, first.shape) for colour in texts} & HELD_OUT
            right[chosen(row)] += 1
            offered.update(texts)
            changed += bool(first.later_colour)
        assert abs(2 * changed - len(rows)) <= 1
        if (
            split == "train"
        ):  # a colour that is offered is right in a quarter of the cases: 4 standard errors of 250 are 0.11
            assert all(abs(right[colour] / offered[colour] - 0.25) < 0.11 for colour in COLOURS), (right, offered)


def test_counts_at_the_end_and_lengths_vary(drawn):
    for split, slack in (("train", 0.02), ("heldout", 0.06), ("unseen", 0.06)):
        templates = by_template(drawn[1][split])
        ends = Counter(row["answer"] for row in templates["count_end"])
        n = len(templates["count_end"])
        # n of 2 .. 5 things: all stay in half of the scenes, else 1 .. n-1 equally; for 5, 1/4 * 1/2
        for answer, share in (("5", 1 / 8), ("4", 5 / 32), ("3", 19 / 96), ("2", 25 / 96), ("1", 25 / 96)):
            assert abs(ends[answer] / n - share) <= slack, (split, ends)
    spans = [json.loads(row["answer"])["time"] for row in by_template(drawn[1]["train"])["when"]]
    lengths = Counter(end - start for start, end in spans)
    assert min(lengths) == 0.5 and max(lengths) >= 5.0 and lengths[0.5] > 1.5 * lengths[1.0] > 1.5 * lengths[2.0]


@pytest.mark.parametrize("split", SPLITS)
def test_nothing_is_to_be_gained_by_reading_alone(drawn, split):
    rows = drawn[1][split]
    shares = make_clips.best_unseeing(rows)
    templates = by_template(rows)
    assert set(shares) == {f"real/{template}" for template in templates}
    for template, listed in templates.items():
        k = 2 if listed[0]["problem_type"] == "boolean" else len(FIXED.get(template, ()))
        if k:
            assert shares[f"real/{template}"] <= 1 / k + 1 / len(listed), template
        elif "options" in listed[0] and template != "leftmost":  # with two things, that has three options
            assert shares[f"real/{template}"] <= 1 / 4 + 3 / len(listed), template  # three wordings at most
    assert shares["real/count_end"] < 0.3 and shares["real/when"] < 0.33


def test_names_are_taken_out_of_a_question():
    assert unnamed("Is there an orange ring?") == "Is there thing?"
    assert unnamed("Does the red ring move faster than the blue cross?") == "Does the thing move faster than the thing?"
    assert unnamed("What colour is the ring at the end?") == "What colour is the thing at the end?"
    assert unnamed("Which shape moves?") == "Which shape moves?" and unnamed("blue") == "colour"


def test_right_option_goes_to_the_letter_and_the_demonstration_says_so():
    made = {
        "answer": "B",
        "options": ["A. up", "B. down", "C. left", "D. right"],
        "offline_output": "<think>It moves down.</think><answer>B</answer>",
    }
    assert at_letter(made, "D") == {
        "answer": "D",
        "options": ["A. up", "B. left", "C. right", "D. down"],
        "offline_output": "<think>It moves down.</think><answer>D</answer>",
    }


def test_surplus_answers_are_dropped_by_wording():
    """more than one: 5 Yes and 2 No, four stay and a fifth; more than two: 1 and 4, two stay and none in addition."""

    def rows(word: str, yes: int, no: int) -> list[dict]:
        question = {
            "problem": f"Do more than {word} shapes appear in all?",
            "problem_type": "boolean",
            "data_source": "m",
        }
        return [question | {"answer": answer, "n": i} for i, answer in enumerate(["Yes"] * yes + ["No"] * no)]

    given = rows("one", 5, 2) + rows("two", 1, 4)
    kept = balanced(given, np.random.default_rng(0))
    counts = Counter((row["problem"].split()[3], row["answer"]) for row in kept)
    assert len(kept) == 7 and all(row in given for row in kept)
    rest = counts - Counter({("one", "Yes"): 2, ("one", "No"): 2, ("two", "Yes"): 1, ("two", "No"): 1})
    assert rest in (Counter({("one", "Yes"): 1}), Counter({("two", "No"): 1}))
    for i in range(0, 6, 2):  # a pair of one wording after the other
        assert {row["answer"] for row in kept[i : i + 2]} == {"Yes", "No"}
        assert kept[i]["problem"] == kept[i + 1]["problem"]


def test_best_answer_that_only_reads_by_hand():
    def ask(question: str, answer: str, kind: str, *options: str) -> dict:
        found = {"problem": question, "answer": answer, "problem_type": kind, "data_type": "video"}
        return found | {"data_source": f"real/{kind}"} | ({"options": list(options)} if options else {})

    booleans = [ask(f"Does the {c} ring move {d}?", a, "boolean") for c, d, a in (
        ("red", "up", "Yes"), ("blue", "up", "Yes"), ("cyan", "up", "No"), ("red", "left", "No"))]  # fmt: skip
    names = ("A. red ring", "B. blue ring", "C. cyan cross")
    named = [ask("Which shape moves?", letter, "multiple choice", *names) for letter in "AAB"]
    spans = [ask("When?", json.dumps({"time": [0, end]}), "temporal grounding") for end in (1, 2)]
    text = [ask("Is 3 larger than 2?", "Yes", "boolean") | {"data_type": "text", "data_source": "text/larger"}]
    assert make_clips.best_unseeing(booleans + named + spans + text) == {
        "real/boolean": 3 / 4,  # up: Yes, two of three; left: No, one of one
        "real/multiple choice": 2 / 3,  # always A; by text any of three alike, 1/3
        "real/temporal grounding": 3 / 4,  # [0, 1]: 1 and 1/2
    }


def test_letters_are_dealt_evenly_over_all_and_over_every_template(drawn):
    for split in SPLITS:
        overall = defaultdict(Counter)
        for template, rows in by_template(drawn[1][split]).items():
            letters = defaultdict(Counter)
            for row in rows:
                if "options" in row:
                    n = len(row["options"])
                    for counts in (overall[n], letters[n], letters[n, variant(row)]):
                        counts[row["answer"]] += 1
            for key, counts in letters.items():
                assert spread(counts, "ABCD"[: key if isinstance(key, int) else key[0]]) <= 1, (template, key, counts)
        assert set(overall) == {3, 4} and all(spread(counts, "ABCD"[:n]) <= 1 for n, counts in overall.items())


def test_the_fixed_text_set_shares_nothing_with_what_is_trained_on():
    fixed = {(row["problem"], row["answer"] if "options" not in row else chosen(row)) for row in ability_rows()}
    trained = {(row["problem"], row["answer"] if "options" not in row else chosen(row)) for row in text_rows(0, 3000)}
    assert len(fixed) == 96 and not fixed & trained
    assert ability_rows() == ability_rows()
