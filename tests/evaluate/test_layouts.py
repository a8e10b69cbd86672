"""Release layouts and the protocols that go with them, on small rows in the shape of each release; values by hand."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from data.records import Media, Sample
from evaluate import (
    livesports,
    longvideobench,
    minerva,
    mvbench,
    odvbench,
    ovobench,
    stvg,
    tempcompass,
    timelens,
    vcrbench,
    videomathqa,
    videomme_v2,
    videommlu,
    videommmu,
    videoreasonbench,
)
from evaluate._annotations import AnnotationError, choice_row, lettered, resolve_media, unique_ids
from evaluate._bootstrap import Resampler
from evaluate._easyvideor1 import aggregates
from evaluate._run import build_parser, load_samples
from evaluate._scoring import Answer, Benchmark, macro, summarize


def answer(name: str, score: float | None, options: int = 4, status: str = "ok", parts=None, **extra) -> Answer:
    letters = tuple(f"{'ABCDEFGH'[place]}. x{place}" for place in range(options))
    sample = Sample(
        name, "?", "A", "multiple choice", "video", (Media("video", path=f"{name}.mp4"),), letters, extra=extra
    )
    return Answer(sample, {"id": name, "status": status, "extracted": "A", "response": "A"}, score, parts or {})


def values_of(metrics, answers) -> dict[str, float]:
    found = metrics(answers, Resampler([a.video for a in answers], resamples=20))
    return {name: estimate.value for name, estimate in found.items()}


def asked(folder: Path, **more) -> Namespace:
    base = {"data_dir": str(folder), "annotations": None, "media_dir": None, "protocol": "official", "subtitles": False}
    return Namespace(**{**base, **more})


def test_vcrbench_release_rows():
    """An open row of the release carries four empty choices: it is an open question, not one of four empty options."""
    row = {"id": 0, "video_path": "video/a.mp4", "duration": 179, "dimension": "Plot", "question": "Which room?"}
    row |= {"multiple-choice": False, "choices": dict.fromkeys("ABCD", ""), "answer": "Kitchen"}
    made = vcrbench.official_row(row)
    assert (made["options"], made["problem_type"], made["problem"]) == ([], "open-ended", "Which room?")
    five = {"A": "rain", "B": "snow", "C": "hail", "D": "fog", "E": "sun"}
    question = "What falls?A. rain\nB. snow\nC. hail\nD. fog\nE. sun\n"
    made = vcrbench.official_row({**row, "multiple-choice": True, "choices": five, "question": question, "answer": "E"})
    assert made["problem"] == "What falls?" and made["solution"] == "E"
    assert made["options"] == ["A. rain", "B. snow", "C. hail", "D. fog", "E. sun"]
    groups = [vcrbench.duration_group(seconds) for seconds in (60, 61, 300, 300.5)]
    assert groups == ["0-60 s", "60-300 s", "60-300 s", "over 300 s"]


def test_videoreasonbench_release_folder(tmp_path):
    folder = tmp_path / "questions"
    folder.mkdir()
    row = {"video": "videos/card/state2_op12_end.mp4", "question": "What cards?", "answer": "Ace", "dim": "order_state"}
    nothing = {**row, "answer": "", "dim": "prediction_operation"}
    for name in videoreasonbench.DEMONSTRATIONS:
        held = {"one": row, "two": nothing} if name == "card" else {}
        (folder / f"{name}.json").write_text(json.dumps(held))
    hrd = {**row, "video": "videos/hrd/state3_op5_start.mp4", "dim": "counting_operation"}
    (folder / "hrd.json").write_text(json.dumps({"three": hrd}))
    args = build_parser(videoreasonbench.BENCHMARK).parse_args(["--data_dir", str(tmp_path)])
    kept, excluded, _ = load_samples(videoreasonbench.BENCHMARK, args)
    assert [sample.id for sample in kept] == ["card/one", "hrd/three"]
    assert [sample.id for sample in excluded] == ["card/two"] and "no reference" in excluded[0].extra["excluded"]
    wanted = {"dimension": "infer_state", "operations": "10-14", "state_size": "2", "state_given_at": "end"}
    assert wanted.items() <= kept[0].extra.items() and kept[0].answer == "Ace"
    assert kept[1].extra["state_size"] == "1" and kept[1].extra["operations"] == "5-9"  # a 3 x 3 board
    (folder / "cup.json").unlink()
    with pytest.raises(AnnotationError, match=r"cup\.json is missing"):
        videoreasonbench.load(asked(tmp_path))


@pytest.mark.parametrize(
    ("response", "shown"),
    [
        ("It is 5.\nFinal Answer:\n1st: Queen\n2nd: Ace", "1st: Queen\n2nd: Ace"),
        ("**Final Answer:** 4 cards", "4 cards"),
        ("<think>Final Answer: 9</think>Final Answer: 3 of Hearts", "3 of Hearts"),
        ("no summary at all, 5 cards", None),
        ("Final Answer:", None),
        ("<answer>4 cards</answer>", "4 cards"),
    ],
)
def test_videoreasonbench_shows_the_judge_the_summary_alone(response, shown):
    sample = Sample("x", "What cards?", "Ace", "open-ended", "video")
    assert videoreasonbench.score(sample, response, {})["extracted"] == shown


def test_timelens_release_files(tmp_path):
    video = {"duration": 20.0, "spans": [[1.5, 4], [10, 12]], "queries": ["A  dog jumps.", "it rests"]}
    (tmp_path / "charades-timelens.json").write_text(json.dumps({"AB1": video}))
    (tmp_path / "qvhighlights-timelens.json").write_text(
        json.dumps({"q": {**video, "spans": [[0, 1]], "queries": ["z"]}})
    )
    samples = timelens.load(asked(tmp_path, data=None))
    assert [(s.id, s.question, s.answer) for s in samples] == [
        ("charades/AB1/0", "A dog jumps", '{"time": [1.5, 4.0]}'),
        ("charades/AB1/1", "it rests", '{"time": [10.0, 12.0]}'),
        ("qvhighlights/q/0", "z", '{"time": [0.0, 1.0]}'),
    ]
    assert samples[0].media[0].path == "videos/charades/AB1.mp4" and samples[0].source == "Charades-TimeLens"
    (tmp_path / "charades-timelens.json").write_text(json.dumps({"AB1": {**video, "spans": [[1, 2]]}}))
    with pytest.raises(AnnotationError, match=r"charades-timelens\.json:AB1.*1 spans for 2 queries"):
        timelens.load(asked(tmp_path, data=None))
    with pytest.raises(AnnotationError, match=r"--data"):
        timelens.load(asked(tmp_path / "none", data=None))


def test_videommlu_reads_the_quiz_not_the_caption_questions():
    row = {"video_id": "v", "caption": "A lecture.", "captions_qa": [{"question": "no", "answer": "no"}]}
    row["reasoning_qa"] = [{"question": "Why?", "answer": "so"}, {"question": "How?", "answer": "thus"}]
    made = videommlu.official_row(row)
    assert [(item["problem_id"], item["part"], item["solution"]) for item in made] == [
        ("v", "caption", "A lecture."), ("v/0", "quiz", "so"), ("v/1", "quiz", "thus"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["question_type", "question type"])
def test_minerva_question_type_under_both_names(name):
    row = {f"answer_choice_{place}": f"t{place}" for place in range(5)}
    row |= {"key": "k", "video_id": "v", "question": "?", "answer_id": "3", name: "Counting", "split": "sports"}
    made = minerva.official_row(row)
    assert (made["solution"], made["question_type"], made["split"]) == ("D", "Counting", "sports")


def test_livesports_and_odvbench_rows():
    row = {"video_id": "v", "video_start": 1.5, "video_end": 9, "question_id": "q", "question": "?", "OCR": 1}
    made = livesports.official_row({**row, "options": ["A. a", "B. b", "C. c", "D. d"], "answer": "C", "q_type": "Who"})
    assert (made["path"], made["ocr_livesports"], made["solution"]) == ("v_1.5_9.mp4", 1, "C")
    assert made["options"] == ["A. a", "B. b", "C. c", "D. d"]
    row = {"question": "?", "candidates": ["stop", "go"], "answer": "go", "video": "v.mp4", "task": "t", "subtask": "s"}
    whole, window = odvbench.official_row(row), odvbench.official_row({**row, "start": "2", "end": 4})
    assert "start" not in whole and (window["start"], window["end"], window["solution"]) == (2.0, 4.0, "B")


def test_gold_letters_are_not_taken_for_option_texts():
    """Notes of a scale as options: the gold letter A is the first option, C, not the one whose text is "A"."""
    assert choice_row("Which note?", ["C", "A"], "A", "v.mp4", by_letter=True)["solution"] == "A"
    assert choice_row("Which note?", ["C", "A"], "A", "v.mp4")["solution"] == "B"  # a gold given as text
    row = {"id": "dev_Music_3", "question": "Which?", "options": ["A. C", "B. A"], "answer": "A"}
    made = videommmu.release_row(row)
    assert made["options"] == ["A. C", "B. A"] and made["solution"] == "A"  # letters that are there are not doubled
    assert lettered(["A. x", "C. y"]) == ["A. A. x", "B. C. y"]


def test_videomathqa_release_rows_tables_and_chance(tmp_path):
    """Two MCQ of five options; two questions of two pairs each, one with all pairs right. Chance 1/5, and (1/2)^2."""
    rows = []
    for name, options, gold in (
        ("q1", "ABCDE", "B"),
        ("q2", "ABCDE", "A"),
        *[(q, "AB", "A") for q in ("q1", "q1", "q2", "q2")],
    ):
        row = {
            "question_id": name,
            "videoID": f"v{name}",
            "question": "?",
            "options": [f"{x}. {len(rows)}{x}" for x in options],
        }
        rows.append({**row, "answer": gold, "category": "Chart" if name == "q1" else "Puzzle", "length": "short"})
    (tmp_path / "videomathqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "subtitles").mkdir()
    srt = "1\n00:00:01,000 --> 00:00:02,000\n<i>two plus two</i>\n"
    (tmp_path / "subtitles/vq1.srt").write_text(srt)
    samples = videomathqa.load(asked(tmp_path, split="both", subtitles=True))
    assert [sample.id for sample in samples] == ["q1", "q2", "q1/pair3", "q1/pair4", "q2/pair5", "q2/pair6"]
    assert samples[0].extra["before"].endswith("two plus two") and "before" not in samples[1].extra
    scores = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    answers = [Answer(s, {"status": "ok", "extracted": "A"}, score) for s, score in zip(samples, scores)]
    assert values_of(videomathqa.metrics, answers) == {"MCQ": 0.5, "MBin": 0.5, "MBin_pairs": 0.75}
    results = summarize(videomathqa.BENCHMARK, answers, excluded=[], missing=0, protocol="official", variant="both")
    assert results["chance"] == 0.2 and results["primary"] == "MCQ"
    lines = {
        name: {key: (line["value"], line["n"]) for key, line in table.items()}
        for name, table in results["breakdown"].items()
    }
    assert lines["category (mcq)"] == {"Chart": (1.0, 1), "Puzzle": (0.0, 1)}
    assert lines["category (mbin)"] == {"Chart": (1.0, 1), "Puzzle": (0.0, 1)} and lines["length (mbin)"] == {
        "short": (0.5, 2)
    }
    assert [sample.extra["outside_primary"] for sample in samples] == [False, False, True, True, True, True]
    assert videomathqa.guessing(answers[2:]) == 0.25


def test_videomme_v2_chance_of_the_group_score():
    """Eight options, p = 1/8. Relevance: E[k^2] / 16 = (4 p (1-p) + (4p)^2) / 16. Logic [1,2,3,4]: a prefix of k right has
    probability p^k (1-p), of four p^4: ((p + 4 p^2 + 9 p^3) (1-p)) / 16 + p^4."""
    answers = []
    for video, kind in (("1", "relevance"), ("2", "logic")):
        for place in range(4):
            more = {"video_id": video, "question_id": f"{video}-{place}", "group_type": kind}
            answers.append(answer(f"{video}-{place}", 0.0, 8, group_structure="[1, 2, 3, 4]", level=1, **more))
    relevance = (4 * (1 / 8) * (7 / 8) + (4 / 8) ** 2) / 16
    logic = (1 / 8 + 4 / 64 + 9 / 512) * (7 / 8) / 16 + 1 / 4096
    assert videomme_v2.guessing(answers) == pytest.approx((relevance + logic) / 2)
    results = summarize(videomme_v2.BENCHMARK, answers, excluded=[], missing=0, protocol="official")
    assert results["chance"] == round((relevance + logic) / 2, 4)


def test_videomme_v2_refuses_a_group_that_it_cannot_score(tmp_path):
    row = {"video_id": "1", "question_id": "1-1", "question": "?", "options": "A. x\nB. y", "answer": "A", "level": 1}
    row |= {"group_type": "logic", "group_structure": "[1,3,2,4]", "second_head": None, "third_head": None}
    (tmp_path / "videomme_v2.json").write_text(json.dumps([row]))
    with pytest.raises(AnnotationError, match=r"videomme_v2\.json:1: group_type 'logic' with group_structure"):
        videomme_v2.load(asked(tmp_path))


def test_chance_of_a_mean_of_tasks_is_the_mean_over_tasks():
    """Task a: three questions of four options, task b: one of two. Mean of tasks (1/4 + 1/2) / 2, not over questions."""
    answers = [answer(str(n), 1.0, 4, task="a") for n in range(3)] + [answer("3", 0.0, 2, task="b")]
    results = summarize(mvbench.BENCHMARK, answers, excluded=[], missing=0, protocol="official")
    assert results["chance"] == 0.375 and results["metrics"]["macro_accuracy"]["value"] == 0.5
    older = summarize(mvbench.BENCHMARK, answers, excluded=[], missing=0, protocol="easyvideor1")
    assert older["chance"] == pytest.approx((3 / 4 + 1 / 2) / 4, abs=1e-4) and older["primary"] == "mean_acc"


def test_stvg_thresholds_include_their_bound_and_need_boxes():
    """vIoU 0.5 counts at 0.5 (LLaVA-ST has >=); a record without boxes, also a failed one, counts for time alone."""
    answers = [answer("a", 0.5, parts={"tIoU": 0.5, "sIoU": 1.0, "vIoU": 0.5}, boxed="boxes")]
    answers += [
        answer("b", 0.0, status="media_error", boxed="time only"),
        answer("c", 1.0, parts={"tIoU": 1.0}, boxed="time only"),
    ]
    got = values_of(stvg.metrics, answers)
    assert (got["vIoU@0.5"], got["vIoU@0.7"], got["m_vIoU"], got["m_sIoU"]) == (1.0, 0.0, 0.5, 1.0)
    assert got["m_tIoU"] == 0.5 and got["tIoU@0.5"] == pytest.approx(2 / 3)


def test_ovobench_mean_over_tasks_beside_the_mean_of_categories():
    rows = [("backward", "EPM", 1), ("backward", "ASI", 0), ("realtime", "OCR", 1), ("forward", "REC", 0)]
    answers = [answer(str(n), s, ovo_category=c, ovo_task=t) for n, (c, t, s) in enumerate(rows)]
    got = values_of(ovobench.metrics, answers)
    assert got["total"] == 0.5 and got["task_mean"] == 0.5
    answers.append(answer("4", 1.0, ovo_category="backward", ovo_task="HLD"))
    got = values_of(ovobench.metrics, answers)
    assert got["total"] == pytest.approx((2 / 3 + 1 + 0) / 3) and got["task_mean"] == pytest.approx(3 / 5)


def test_longvideobench_subtitles_are_those_of_the_clip(tmp_path):
    rows = [{"timestamp": [4.0, 5.0], "text": "before"}, {"timestamp": [11.5, 12.0], "text": "in"}]
    rows += [{"start": "00:00:19.0", "end": "00:00:21.0", "line": "end"}, {"timestamp": [20.0, None], "text": "after"}]
    (tmp_path / "s.json").write_text(json.dumps(rows))
    assert longvideobench.subtitle_lines(tmp_path / "s.json", 10.0, 10.0) == "[1.5 s] in\n[9.0 s] end"


def test_mvbench_and_tempcompass_name_the_row_that_is_wrong(tmp_path):
    (tmp_path / "json").mkdir()
    row = {"question": "?", "candidates": ["x", "y"], "answer": "y", "video": "1.mp4", "start": 2, "end": 5.5}
    (tmp_path / "json/action_sequence.json").write_text(json.dumps([row, {"question": "?"}]))
    with pytest.raises(AnnotationError, match=r"action_sequence\.json:2: neither"):
        mvbench.load(asked(tmp_path))
    (tmp_path / "json/action_sequence.json").write_text(json.dumps([row]))
    (sample,) = mvbench.load(asked(tmp_path))
    assert sample.media == (Media("video", path="star/Charades_v1_480/1.mp4", start_s=2.0, end_s=5.5),)
    assert sample.answer == "B" and sample.extra["task"] == "action_sequence"
    (tmp_path / "questions").mkdir()
    for task in tempcompass.TASKS:
        (tmp_path / f"questions/{task}.json").write_text(
            json.dumps({"7": {"speed": [{"question": "Fast?", "answer": "yes"}]}})
        )
    with pytest.raises(AnnotationError, match=r"multi-choice\.json:7"):  # no options in the question
        tempcompass.load(asked(tmp_path, tasks=None))


def test_easyvideor1_counts_broken_records_and_names_ovo_categories():
    """That toolkit asks duplicates and single-option records too; a failed sample leaves its means and tables."""
    one = Sample("a", "?", "A", "multiple choice", "video", (Media("video", path="v.mp4"),), ("A. x",))
    twin = Sample("b", "?", "A", "multiple choice", "video", (Media("video", path="v.mp4"),), ("A. x",))
    benchmark = Benchmark(name="longvideoreason", title="L", load=lambda args: [one, twin])
    parser = build_parser(benchmark)
    kept, excluded, _ = load_samples(benchmark, parser.parse_args(["--protocol", "easyvideor1"]))
    assert (len(kept), len(excluded)) == (2, 0)
    with pytest.raises(AnnotationError, match=r"all 2 records are excluded: .*a single option"):
        load_samples(benchmark, parser.parse_args([]))
    rows = [("backward", "EPM", 1.0, "ok"), ("realtime", "OCR", 0.0, "ok"), ("forward", "REC", 1.0, "ok")]
    rows += [("forward", "REC", 0.0, "media_error")]
    answers = [answer(str(n), s, status=status, ovo_category=c, ovo_task=t) for n, (c, t, s, status) in enumerate(rows)]
    got = values_of(aggregates, answers)
    assert got == {"mean_acc": pytest.approx(2 / 3), "ovo_total": pytest.approx(2 / 3), "ovo_backward": 1.0, "ovo_realtime": 0.0,
                   "ovo_forward": 1.0}  # fmt: skip
    results = summarize(ovobench.BENCHMARK, answers, excluded=[], missing=0, protocol="easyvideor1")
    assert results["breakdown"]["ovo_task"]["REC"]["value"] == 1.0
    assert (
        summarize(ovobench.BENCHMARK, answers, excluded=[], missing=0, protocol="official")["breakdown"]["ovo_task"][
            "REC"
        ]["value"]
        == 0.5
    )


def test_ids_stay_unique_where_a_row_is_called_like_a_renamed_one():
    samples = [Sample(name, "?", "A", "math", "text") for name in ("x", "x", "x#2", "x")]
    assert [sample.id for sample in unique_ids(samples)] == ["x", "x#3", "x#2", "x#4"]


def test_a_video_with_another_ending_is_taken(tmp_path):
    (tmp_path / "v.webm").write_bytes(b"")
    sample = Sample("x", "?", "A", "multiple choice", "video", (Media("video", path="v.mp4"),))
    assert resolve_media([sample], [tmp_path]) == [] and sample.media[0].path == str(tmp_path / "v.webm")


def test_macro_over_two_levels_is_weighted_by_place_not_by_count():
    answers = [answer("0", 1.0), answer("1", 0.0), answer("2", 0.0)]
    got = macro(
        answers, Resampler(["0", "1", "2"], resamples=5), lambda sample: ("p", "x") if sample.id == "0" else ("p", "y")
    )
    assert got.value == 0.5
