"""scripts/compare_runs.py on two finished runs: the paired difference, what it says about unequal runs, the picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from evaluate._run import main
from evaluate._scoring import accuracy, macro
from scripts import compare_runs
from tests.evaluate.fakes import TOY, FakeEngine, fake_parts, write_toy


def run(toy, out, letter, *flags, benchmark=TOY):
    make_engine, make_encoder, _ = fake_parts(decode=False, engine=FakeEngine(lambda text: letter(text)))
    arguments = ["--model", "m", "--data_dir", str(toy), "--output_dir", str(out), *flags]
    assert main(benchmark, arguments, make_engine=make_engine, make_encoder=make_encoder) == 0


def test_two_runs_side_by_side(tmp_path, capsys):
    """20 clips, 2 questions; gold = (clip + question) % 4. "A" is right 10 times of 40; B also knows question 0: 20 + 5."""
    write_toy(tmp_path / "toy", clips=20, questions=2)

    def knows_first(text: str) -> str:
        clip = int(text.split("about clip ")[1].split("?")[0])
        return "ABCD"[clip % 4] if "Question 0" in text else "A"

    run(tmp_path / "toy", tmp_path / "one", lambda text: "A")
    run(tmp_path / "toy", tmp_path / "two", knows_first, "--max_frames", "8")
    capsys.readouterr()
    places = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert compare_runs.main([*places, "--plot", str(tmp_path / "p.svg"), "--json", str(tmp_path / "f.json")]) == 0
    said = capsys.readouterr().out
    assert "25.0" in said and "62.5" in said and "+37.5" in said
    assert "run with other frames" in said
    (figures,) = json.loads((tmp_path / "f.json").read_text()).values()
    assert figures["difference"] == pytest.approx(15 / 40) and (figures["wins"], figures["losses"]) == (15, 0)
    assert figures["common"] == 40 and figures["p_value"] < 0.001 and figures["low"] > 0.2
    picture = ElementTree.parse(tmp_path / "p.svg").getroot()
    bars = [float(rect.get("width")) for rect in picture if rect.tag.endswith("rect")][2:]
    assert bars == [560 * 0.25, 560 * 0.625]


def test_no_difference_is_given_between_two_protocols(tmp_path, capsys):
    """ "A" is right once of four times in both, but accuracy and mean_acc are two metrics."""
    write_toy(tmp_path / "toy", clips=4, questions=1)
    for protocol in ("official", "easyvideor1"):
        run(tmp_path / "toy", tmp_path / protocol, lambda text: "A", "--protocol", protocol)
    capsys.readouterr()
    places = [str(tmp_path / "official"), str(tmp_path / "easyvideor1")]
    assert compare_runs.main([*places, "--json", str(tmp_path / "f.json")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not compared" in said and "25.0 (" in said and " p " not in said.split("difference:")[0]
    assert "easyvideor1 was scored with protocol easyvideor1, official with official: no difference is given" in said
    assert json.loads((tmp_path / "f.json").read_text()) == {}


def test_controls_outside_the_primary_score_are_not_paired(tmp_path):
    """Clip 2 is a control: 4 of 6 questions count. "A" is right for clip 0, question 0 alone; all "B" for two of four."""

    def load(args):
        samples = TOY.load(args)
        for sample in samples:
            sample.extra["outside_primary"] = sample.id.startswith("002")
        return samples

    write_toy(tmp_path / "toy", clips=3, questions=2)
    benchmark = replace(TOY, load=load)
    for letter in "AB":
        run(tmp_path / "toy", tmp_path / letter, lambda text, letter=letter: letter, benchmark=benchmark)
    (a,), (b,) = (compare_runs.find_runs(tmp_path / letter) for letter in "AB")
    found = compare_runs.compare(a, b)
    assert found["common"] == 4 and found["paired"].difference == pytest.approx(2 / 4 - 1 / 4)


def test_a_mean_of_means_is_compared_as_one(tmp_path, capsys):
    """Clip 0 is a task of its own, clips 1 to 3 are the other. "A" is right for (0, 0) and (3, 1), "B" for (0, 1) and (1, 0):
    1/2 and 1/6 against 1/2 and 1/6; "C" for (1, 1) and (2, 0): 0 and 2/6."""

    def task(sample):
        return ("first" if sample.id.startswith("000") else "others",)

    def metrics(answers, draws):
        return {"macro": macro(answers, draws, task)} | accuracy(answers, draws, "micro")

    write_toy(tmp_path / "toy", clips=4, questions=2)
    benchmark = replace(TOY, metrics=metrics, primary="macro", groups=task)
    for letter in "ABC":
        run(tmp_path / "toy", tmp_path / letter, lambda text, letter=letter: letter, benchmark=benchmark)
    (a,), (b,), (c,) = (compare_runs.find_runs(tmp_path / letter) for letter in "ABC")
    assert a.results["metrics"]["macro"]["value"] == pytest.approx((1 / 2 + 1 / 6) / 2)
    assert compare_runs.compare(a, b)["paired"].difference == pytest.approx(0)
    assert compare_runs.compare(a, c)["paired"].difference == pytest.approx((0 + 2 / 6) / 2 - (1 / 2 + 1 / 6) / 2)
    capsys.readouterr()
    assert compare_runs.main([str(tmp_path / "A"), str(tmp_path / "C")]) == 0
    said = capsys.readouterr().out
    assert "-16.7" in said and "is not the mean score" not in said


def test_clusters_are_the_videos_of_the_rows(tmp_path):
    write_toy(tmp_path / "toy", clips=3, questions=2)
    run(tmp_path / "toy", tmp_path / "one", lambda text: "A")
    (found,) = compare_runs.find_runs(tmp_path / "one")
    assert len(found.scores) == 6 and len(set(found.videos.values())) == 3


def test_places_without_runs_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"no results\.json"):
        compare_runs.main([str(tmp_path), str(tmp_path)])


def test_damaged_runs_are_named_with_their_line(tmp_path):
    write_toy(tmp_path / "toy", clips=1, questions=2)
    run(tmp_path / "toy", tmp_path / "one", lambda text: "A")
    (found,) = compare_runs.find_runs(tmp_path / "one")
    predictions, results = found.folder / "predictions.jsonl", found.folder / "results.json"
    with open(predictions, "a") as out:
        out.write('{"half')
    with pytest.raises(SystemExit, match=r"predictions\.jsonl:3: no scored prediction"):
        compare_runs.find_runs(tmp_path / "one")
    predictions.unlink()
    with pytest.raises(SystemExit, match=r"predictions\.jsonl: no such file"):
        compare_runs.find_runs(tmp_path / "one")
    results.write_text('{"benchmark": "toy"}')
    with pytest.raises(SystemExit, match="has no metrics, primary, settings"):
        compare_runs.find_runs(tmp_path / "one")
