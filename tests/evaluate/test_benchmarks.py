"""Every record of every annotation file loaded, prompted and scored end to end with a fake engine."""

from __future__ import annotations

import importlib
import json
import os
import re
from argparse import Namespace
from pathlib import Path

import pytest

from evaluate._run import build_parser, load_samples, main, prompt_samples
from evaluate._scoring import Answer
from tests.evaluate.fakes import FakeEngine, fake_parts

SHARED = Path(os.environ.get("REELRL_SHARED", Path(__file__).resolve().parents[3] / "shared"))
FILES = SHARED / "benchmarks"
needs_files = pytest.mark.skipif(not FILES.is_dir(), reason="no annotation files beside the repository")
# program, flags -> records in the file, of them excluded, repaired
EXPECTED = {
    ("videomme",): (2700, 0, 0), ("mvbench",): (3586, 5, 0), ("motionbench",): (4018, 14, 0), ("lvbench",): (1492, 0, 0),
    ("longvideobench",): (1337, 0, 0), ("mlvu",): (2174, 0, 0), ("mlvu", "--split", "test"): (502, 0, 0),
    ("videoholmes",): (1837, 0, 0), ("minerva",): (1431, 0, 0), ("vcrbench",): (1034, 0, 0),
    ("videoreasonbench",): (1440, 244, 0), ("longvideoreason",): (851, 23, 133), ("mmvu",): (1000, 1, 0),
    ("mmvu", "--split", "mc"): (625, 0, 0), ("videommmu",): (900, 0, 0), ("videommmu", "--no_image"): (900, 0, 0),
    ("videomathqa",): (2100, 0, 0), ("vsibench",): (5130, 0, 0), ("charades_sta",): (3720, 0, 0), ("stvg",): (2000, 1, 0),
    ("ovobench",): (3035, 0, 0), ("livesports",): (1174, 0, 0), ("videommlu",): (1065, 0, 0),
}  # fmt: skip
PROGRAMS = [*sorted({key[0] for key in EXPECTED}), "videomme_v2", "tempcompass", "odvbench", "timelens", "custom"]
PROGRAMS.append("playground")


def gold_text(sample) -> str:
    """A response that a right model could give."""
    return f"<answer>{sample.answer}</answer>"


def run(tmp_path: Path, program: str, flags: tuple[str, ...], limit: int | None, protocol: str = "official"):
    benchmark = importlib.import_module(f"evaluate.{program}").BENCHMARK
    arguments = [
        "--model",
        "m",
        "--data_dir",
        str(FILES),
        "--output_dir",
        str(tmp_path),
        *flags,
        "--protocol",
        protocol,
    ]
    arguments += ["--limit", str(limit)] if limit else []
    args = build_parser(benchmark).parse_args(arguments)
    kept, excluded, _ = load_samples(benchmark, args)
    golds = {sample.id: gold_text(sample) for sample in kept}

    class Knows(FakeEngine):
        async def generate(self, prompt, sampling, request_id):
            got = await super().generate(prompt, {**sampling, "max_tokens": 10**6}, request_id)
            got.text = golds[request_id.split("-", 1)[1]]
            return got

    make_engine, make_encoder, _ = fake_parts(decode=False, engine=Knows(slots=64))
    fetch = benchmark.watch  # no video here: scoring goes without the source's size
    object.__setattr__(benchmark, "watch", None)
    try:
        from evaluate import _run

        original = _run.resolve_media
        _run.resolve_media = lambda samples, roots, clips=None: []
        status = main(benchmark, arguments, make_engine=make_engine, make_encoder=make_encoder)
    finally:
        object.__setattr__(benchmark, "watch", fetch)
        _run.resolve_media = original
    (path,) = list(tmp_path.rglob("results.json"))
    return status, json.loads(path.read_text()), kept, excluded


@needs_files
@pytest.mark.parametrize("key", list(EXPECTED), ids=" ".join)
def test_every_record_is_loaded_and_prompted(key):
    program, *flags = key
    benchmark = importlib.import_module(f"evaluate.{program}").BENCHMARK
    args = build_parser(benchmark).parse_args(["--data_dir", str(FILES), *flags])
    kept, excluded, absent = load_samples(benchmark, args)
    repaired = sum("repaired" in sample.extra for sample in kept)
    assert (len(kept) + len(excluded), len(excluded), repaired) == EXPECTED[key]
    assert len({sample.id for sample in kept + excluded}) == len(kept) + len(excluded)
    assert len(absent) == len({m.path for s in kept + excluded for m in s.media})  # no media here, all are noticed
    for variant in [*benchmark.prompts, "direct"]:
        prompts = prompt_samples(benchmark, Namespace(**{**vars(args), "prompt": variant}), kept)
        for sample in kept:
            text = prompts[sample.id].question
            assert text.strip() and "<image 1>" not in text
            stem = re.sub(r"\s+", " ", sample.question.strip())[:60]
            assert stem in re.sub(r"\s+", " ", text), (sample.id, text[:200])
            if variant != "direct":
                assert all(option.split(" ", 1)[-1].strip() in text for option in sample.options), sample.id


@needs_files
@pytest.mark.parametrize("key", list(EXPECTED), ids=" ".join)
def test_gold_answers_score_full_marks_end_to_end(key, tmp_path):
    check_full_marks(key, tmp_path, 40)


@needs_files
@pytest.mark.slow
@pytest.mark.parametrize("key", list(EXPECTED), ids=" ".join)
def test_gold_answers_score_full_marks_for_every_record(key, tmp_path):
    check_full_marks(key, tmp_path, None)


def check_full_marks(key, tmp_path, limit):
    program, *flags = key
    status, results, kept, excluded = run(tmp_path, program, tuple(flags), limit)
    assert status == 0 and results["n"] == len(kept) and results["n_excluded"] == len(excluded)
    assert results["n_failed"] == results["n_missing"] == 0
    scored = results["n"] - results["n_unjudged"]
    for name, estimate in results["metrics"].items():
        if estimate["n"] and name != "count_mae_of_read":
            assert estimate["value"] == pytest.approx(1.0), (name, estimate)
    if scored:
        assert results["metrics"][results["primary"]]["n"] > 0
    assert results["n_unanswered"] == 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_say_what_they_need(program, capsys):
    """--help names every flag; without annotations the message names the file and the remedy."""
    module = importlib.import_module(f"evaluate.{program}")
    assert module.__doc__.count(f"python evaluate/{program}.py --model") == 1
    with pytest.raises(SystemExit):
        main(module.BENCHMARK, ["--help"])
    assert "--score_only" in capsys.readouterr().out
    flags = ["--data", "nowhere.jsonl"] if program in ("custom", "timelens") else ["--data_dir", "nowhere"]
    assert main(module.BENCHMARK, ["--model", "m", *flags]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_clusters_are_videos():
    sample = importlib.import_module("data.records").Sample("x", "?", "A", "math", "text")
    assert Answer(sample, {}, 0.0).video == "x"
