"""The table of scripts/compare_algorithms.sh from small run folders, by hand."""

import json

import pytest

from scripts.algorithm_table import curve_of, find_runs, main, read_scores, summary

STEPS_S = [30.0, 9.0, 1.0, 2.0, 4.0]  # the first two are warm-up: median of the others 2


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def evaluation(folder, scores):
    """Four clips of two questions each: q0 and q1 are about v0."""
    rows = [{"id": f"q{i}", "score": score, "video": f"v{i // 2}"} for i, score in enumerate(scores)]
    lines(folder / "predictions.jsonl", rows)
    (folder / "results.json").write_text("{}")


def make_run(folder, scores, steps_s=STEPS_S):
    evaluation(folder / "after", scores)
    lines(folder / "metrics.jsonl", [{"step": i + 1, "time/step_s": s} for i, s in enumerate(steps_s)])
    lines(folder / "validation.jsonl", [{"step": 3, "validate/accuracy": 0.5}, {"step": 5, "validate/accuracy": None}])


@pytest.fixture
def runs(tmp_path):
    evaluation(tmp_path / "before", [0, 0, 1, 0, 0, 1, 0, None])  # 2 of 8; what could not be scored counts 0
    make_run(tmp_path / "grpo-seed0", [1, 1, 1, 1, 1, 1, 1, 1])
    make_run(tmp_path / "grpo-seed1", [1, 1, 1, 1, 1, 1, 0, 0])
    make_run(tmp_path / "gdpo-seed0", [1, 1, 0, 0, 0, 1, 0, 0])
    evaluation(tmp_path / "opo-seed0" / "elsewhere", [1])  # never evaluated: not in the table
    return tmp_path


def test_gain_is_paired_and_its_interval_is_over_clips(runs):
    """grpo: per clip (v0 .. v3) the two seeds gain 2, 1, 1, 2 and 2, 1, 1, 0 questions of 2: mean 2, 1, 1, 1, so every
    draw of four clips gains between 0.5 and 1."""
    found = find_runs(runs)
    assert {name: sorted(seeds) for name, seeds in found.items()} == {"gdpo": [0], "grpo": [0, 1]}
    row = summary(read_scores(runs / "before"), found["grpo"])
    assert (row["seeds"], row["steps"], row["step_s"], row["before"]) == (2, 5, 2.0, 0.25)
    assert row["after"] == pytest.approx(7 / 8) and row["gain"] == pytest.approx(5 / 8)
    assert row["spread"] == pytest.approx(0.25 / 2**0.5)
    assert 0.5 <= row["low"] < row["gain"] < row["high"] <= 1.0 and row["significant"]


def test_a_gain_of_one_clip_alone_is_not_significant(runs):
    """gdpo: clips gain 2, -1, 0, 0 of 2; a draw without v0 gains nothing."""
    row = summary(read_scores(runs / "before"), find_runs(runs)["gdpo"])
    assert row["gain"] == pytest.approx(1 / 8) and row["spread"] is None
    assert row["low"] < 0 and not row["significant"]


def test_table_plot_and_curves(runs, capsys):
    assert curve_of(runs / "grpo-seed1", 0.25) == {0: 0.25, 3: 0.5, 5: 0.75}
    main(["table", str(runs), "--main", "grpo"])
    table = (runs / "table.md").read_text().splitlines()
    assert table[2].startswith("| grpo | 2 | 5 | 0.250 | 0.875 ± 0.177 | +0.625 | +0.5")
    assert table[2].endswith("| yes | 2.00 |") and table[3].endswith("| no | 2.00 |")
    assert json.loads((runs / "table.json").read_text())["gdpo"]["significant"] is False
    plot = (runs / "accuracy.svg").read_text()
    assert plot.count("<polyline") == 2 and plot.count("<polygon") == 1  # a band where there are seeds
    assert "| gdpo | 1 | 5 |" in capsys.readouterr().out


def test_other_questions_and_empty_folders_are_refused(runs, tmp_path):
    evaluation(runs / "gdpo-seed0" / "after", [1, 1])
    with pytest.raises(SystemExit, match="different questions"):
        main(["table", str(runs)])
    with pytest.raises(SystemExit, match="no <algorithm>-seed<k>/after"):
        find_runs(tmp_path / "before")


def test_demonstrations_are_the_gold_answers(tmp_path):
    source, target = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    lines(source, [{"problem": "q", "answer": "B"}])
    main(["demonstrations", str(source), str(target)])
    assert json.loads(target.read_text())["offline_output"] == "<answer>B</answer>"
    lines(source, [{"problem": "q"}])
    with pytest.raises(SystemExit, match=r"a\.jsonl:1: no field 'answer'"):
        main(["demonstrations", str(source), str(target)])
