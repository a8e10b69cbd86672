"""The run around the pipeline: resume, failures, keys, re-scoring, reports. A fake engine, real video files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data.frame_cache import mark_cache
from evaluate._predictions import Writer, read_predictions
from evaluate._run import main
from tests.evaluate.fakes import TOY, FakeEngine, fake_parts, write_toy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder, clips=20, questions=3)
    return folder


def run(toy: Path, out: Path, *flags: str, engine: FakeEngine | None = None, benchmark=TOY):
    make_engine, make_encoder, record = fake_parts(engine=engine)
    arguments = ["--model", str(toy / "model"), "--data_dir", str(toy), "--output_dir", str(out), *flags]
    status = main(benchmark, arguments, make_engine=make_engine, make_encoder=make_encoder)
    folders = sorted(path.parent for path in out.rglob("run.json"))
    return status, folders, record


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_one_run_answers_each_question_once_and_decodes_each_video_once(toy, tmp_path):
    status, (folder,), record = run(toy, tmp_path)
    assert status == 0
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == [f"{clip:03d}-{q}" for clip in range(20) for q in range(3)]
    assert set(record.cache.decoded.values()) == {1} and len(record.cache.decoded) == 20
    needed = {"id", "benchmark", "response", "finish_reason", "extracted", "score", "status", "reason"}
    assert needed | {"prompt_tokens", "response_tokens", "schema_version"} <= set(lines[0])
    results = results_of(folder)
    right = sum(line["response"] == "ABCD"[(int(line["id"][:3]) + int(line["id"][4])) % 4] for line in lines)
    assert results["metrics"]["accuracy"]["value"] == pytest.approx(right / 60)
    assert results["n"] == results["n_answered"] == 60 and results["chance"] == 0.25


def test_finished_run_asks_nothing_again_and_other_settings_get_their_own_folder(toy, tmp_path):
    run(toy, tmp_path)
    _, folders, record = run(toy, tmp_path)
    assert record.engine is None and len(folders) == 1
    (tmp_path / "lossy").mkdir()
    mark_cache(str(tmp_path / "lossy"), storage="jpeg")
    frames = (["--max_frames", "8"], ["--sampling", "grid"], ["--decoder", "decord"], ["--resize", "native"])
    lossy = ["--cache_dir", str(tmp_path / "lossy")]
    for flags in (["--temperature", "0.7"], *frames, lossy, ["--prompt", "think"], ["--limit", "6"]):
        before = len(folders)
        _, folders, record = run(toy, tmp_path, *flags)
        assert len(folders) == before + 1, flags
        assert len(record.engine.asked) == (6 if "--limit" in flags else 60)


def test_run_dir_refuses_other_settings(toy, tmp_path, capsys):
    assert run(toy, tmp_path, "--run_dir", str(tmp_path / "mine"))[0] == 0
    assert run(toy, tmp_path, "--run_dir", str(tmp_path / "mine"), "--fps", "1")[0] == 2
    assert "frames" in capsys.readouterr().err


def test_broken_videos_are_rows_with_reasons_and_stay_in_the_denominator(tmp_path, capsys):
    folder = tmp_path / "toy"
    write_toy(folder, clips=10, questions=2)
    good = (folder / "clips/003.mp4").read_bytes()
    (folder / "clips/003.mp4").write_bytes(good[: len(good) // 3])
    status, (out,), record = run(folder, tmp_path / "out", engine=FakeEngine(lambda text: "A"))
    assert status == 0 and len(record.engine.asked) == 18
    results = results_of(out)
    assert (results["n"], results["n_failed"], results["failures"]) == (20, 2, {"media_error": 2})
    # (clip + question) % 4 == 0 is right: 5 of 20 with clip 3, whose second question would have been right
    assert results["metrics"]["accuracy"]["value"] == pytest.approx(4 / 20)
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert [row["id"] for row in failed] == ["003-0", "003-1"]
    assert all(row["reason"].startswith("media_error") and row["remedy"] for row in failed)
    assert "2 media_error" in capsys.readouterr().out
    # repaired file: only the failures are asked again
    (folder / "clips/003.mp4").write_bytes(good)
    status, _, record = run(folder, tmp_path / "out", "--retry_failed", engine=FakeEngine(lambda text: "A"))
    assert len(record.engine.asked) == 2 and results_of(out)["n_failed"] == 0
    assert results_of(out)["metrics"]["accuracy"]["value"] == pytest.approx(5 / 20)


def test_a_tenth_of_broken_videos_of_every_kind(tmp_path, capsys):
    """31 clips x 2 questions: one cut short, one empty, one not a video at all, one that is not there."""
    folder = tmp_path / "toy"
    write_toy(folder, clips=31, questions=2)
    good = (folder / "clips/004.mp4").read_bytes()
    (folder / "clips/004.mp4").write_bytes(good[: len(good) // 2])
    (folder / "clips/011.mp4").write_bytes(b"")
    (folder / "clips/019.mp4").write_text("<html>404 not found</html>")
    (folder / "clips/030.mp4").unlink()
    status, (out,), record = run(folder, tmp_path / "out", engine=FakeEngine(lambda text: "C"))
    results, said = results_of(out), capsys.readouterr().out
    assert status == 0 and len(record.engine.asked) == 54
    assert (results["n"], results["n_failed"], results["failures"]) == (62, 8, {"media_error": 8})
    assert "8 media_error" in said and "1 media files are missing" in said
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert {row["id"][:3] for row in failed} == {"004", "011", "019", "030"} and len(failed) == 8
    assert all(row["remedy"] and row["path"].endswith(f"{row['id'][:3]}.mp4") for row in failed)
    # (clip + question) % 4 == 2 is right: question 0 of clips 2, 6, .. 30, question 1 of 1, 5, .. 29; 30 is gone
    assert results["metrics"]["accuracy"]["value"] == pytest.approx((8 - 1 + 8) / 62)
    assert run(folder, tmp_path / "out", "--strict")[0] == 3


@pytest.mark.parametrize(("limit", "shown"), [("1", 1), ("2", 2), ("60", 2)])
def test_dry_run_shows_each_prompt_once_and_needs_no_model(limit, shown, toy, tmp_path, capsys, monkeypatch):
    command = ["--data_dir", str(toy), "--output_dir", str(tmp_path), "--dry_run", "--limit", limit]
    assert main(TOY, command) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"Toy: {limit} questions, ") and said.count("\n--- ") == shown
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")  # of several ranks the first one speaks
    assert main(TOY, command) == 0 and capsys.readouterr().out == ""


def test_missing_media_and_annotations_say_what_to_do(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", tmp_path / "out")[0] == 2
    assert "toy.json" in capsys.readouterr().err
    write_toy(tmp_path / "toy", clips=1, questions=1)
    (tmp_path / "toy/clips/000.mp4").unlink()
    assert run(tmp_path / "toy", tmp_path / "out")[0] == 2
    assert "--media_dir" in capsys.readouterr().err


def test_score_only_needs_no_model_and_follows_the_predictions(toy, tmp_path):
    _, (folder,), _ = run(toy, tmp_path)
    path = folder / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["response"] = f"<answer>{'ABCD'[(int(row['id'][:3]) + int(row['id'][4])) % 4]}</answer>"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, _, record = run(toy, tmp_path, "--score_only")
    assert record.engine is None
    assert results_of(folder)["metrics"]["accuracy"]["value"] == 1.0
    assert {json.loads(line)["score"] for line in path.read_text().splitlines()} == {1.0}


def test_old_answers_are_scored_without_their_model_and_code(toy, tmp_path, capsys):
    """A run of another code version whose model folder is gone, and of the first 6 samples only."""
    run(toy, tmp_path, "--run_dir", str(tmp_path / "mine"), "--limit", "6", engine=FakeEngine(lambda text: "B"))
    path = tmp_path / "mine/run.json"
    stored = json.loads(path.read_text())
    stored["settings"] |= {"code": "older", "model": "another", "versions": {}}
    path.write_text(json.dumps(stored))
    (tmp_path / "mine/results.json").unlink()
    command = ["--data_dir", str(toy), "--score_only", "--run_dir", str(tmp_path / "mine")]
    assert main(TOY, command) == 0
    results = results_of(tmp_path / "mine")
    # (clip + question) % 4 == 1 is right: questions 0, 1, 2 of clips 0 and 1 give 0-1 and 1-0
    assert (results["n"], results["n_missing"]) == (6, 0)
    assert results["metrics"]["accuracy"]["value"] == pytest.approx(2 / 6)
    assert main(TOY, [*command, "--protocol", "easyvideor1"]) == 2
    assert "protocol 'official', asked 'easyvideor1'" in capsys.readouterr().err
    assert main(TOY, [*command[:-1], str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_score_only_without_a_run_names_those_that_exist(toy, tmp_path, capsys):
    _, (folder,), _ = run(toy, tmp_path, "--limit", "6")
    assert run(toy, tmp_path, "--score_only", "--limit", "7")[0] == 2
    said = capsys.readouterr().err
    assert "--run_dir" in said and str(folder) in said and len(list(folder.parent.iterdir())) == 1


@pytest.mark.parametrize(
    "flags",
    ["--loaders 0", "--limit 0", "--limit -1", "--data_parallel 0", "--max_concurrent 0", "--in_flight_gib 0",
     "--decode_timeout_s 0", "--max_response_tokens 0", "--cache require", "--preprocess_only",
     "--retry_failed --data_parallel 2", "--fps 0", "--min_frames 0", "--max_frames 3", "--video_max_pixels 100",
     "--temperature -1", "--top_p 1.5", "--top_k -2", "--presence_penalty 3", "--max_model_len 0", "--kv_cache_gib 0",
     "--gpu_memory_utilization 1.2", "--dtype floaty", "--judge_model /no/such/judge"],
)  # fmt: skip
def test_flags_that_would_hang_or_be_ignored_are_usage_errors(flags, toy, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(toy, tmp_path, *flags.split())
    assert stopped.value.code == 2 and flags.split()[0] in capsys.readouterr().err
    assert not list(tmp_path.rglob("run.json"))


def test_what_cannot_be_built_is_told_in_one_line(toy, tmp_path, capsys):
    def broken(*arguments):
        raise ValueError("--cache_dir C does not exist")

    arguments = ["--model", "m", "--data_dir", str(toy), "--output_dir", str(tmp_path)]
    assert main(TOY, arguments, make_encoder=broken) == 2
    assert capsys.readouterr().err == "toy: --cache_dir C does not exist\n"


def test_rows_left_by_a_killed_run_of_several_ranks_are_merged_by_one(toy, tmp_path):
    _, (folder,), _ = run(toy, tmp_path)
    rows = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    (folder / "predictions.jsonl").unlink()
    (folder / "predictions.0-of-2.jsonl").write_text("".join(rows[:20]))
    (folder / "predictions.1-of-2.jsonl").write_text("".join(rows[15:35]))  # 5 rows twice
    _, _, record = run(toy, tmp_path)
    assert len(record.engine.asked) == 25
    assert [path.name for path in folder.glob("predictions*")] == ["predictions.jsonl"]
    ids = [json.loads(line)["id"] for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 60


def test_truncated_and_unanswered_are_counted(toy, tmp_path):
    engine = FakeEngine(
        lambda text: "word " * 50 if "Question 0" in text else "I cannot tell." if "Question 1" in text else "B"
    )
    _, (folder,), _ = run(toy, tmp_path, "--max_response_tokens", "20", engine=engine)
    results = results_of(folder)
    assert (results["n_truncated"], results["n_unanswered"]) == (20, 40)
    assert results["metrics"]["accuracy"]["value"] == pytest.approx(5 / 60)


def kill_and_compare(toy: Path, tmp_path: Path, kills: int) -> None:
    """Kills the program at random moments after it wrote a row; the rows in the end equal an uninterrupted run's."""
    _, (whole,), _ = run(toy, tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "tests/evaluate/fakes.py"), "--model", "m", "--data_dir", str(toy)]
    command += ["--output_dir", str(out), "--max_num_seqs", "1", "--max_concurrent", "1", "--loaders", "2"]
    env = {**os.environ, "FAKE_KILLS": str(kills), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"killed {kills}" in done.stdout
    (folder,) = [path.parent for path in out.rglob("run.json")]
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["id"] for line in lines}) == 60
    expected = read_predictions(whole)
    assert {line["id"]: (line["response"], line["score"]) for line in lines} == {
        name: (row["response"], row["score"]) for name, row in expected.items()
    }
    assert results_of(folder)["metrics"] == results_of(whole)["metrics"]


def test_kill_nine_three_times(toy, tmp_path):
    kill_and_compare(toy, tmp_path, 3)


@pytest.mark.slow
def test_kill_nine_twenty_times(toy, tmp_path):
    kill_and_compare(toy, tmp_path, 20)


def test_a_line_cut_by_a_kill_is_dropped_and_damage_elsewhere_is_named(tmp_path):
    path = tmp_path / "predictions.jsonl"
    with Writer(path) as writer:
        writer.put({"id": "a", "status": ""})
        writer.put({"id": "b", "status": ""})
    path.write_bytes(path.read_bytes() + b'{"id": "c", "resp')
    assert list(read_predictions(tmp_path)) == ["a", "b"]
    with Writer(path) as writer:
        writer.put({"id": "d", "status": ""})
    assert list(read_predictions(tmp_path)) == ["a", "b", "d"]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0][:-4], *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"predictions.jsonl:1: damaged"):
        read_predictions(tmp_path)


def test_two_writers_cannot_share_a_file(tmp_path):
    with Writer(tmp_path / "predictions.jsonl"), pytest.raises(BlockingIOError, match="another run"):
        Writer(tmp_path / "predictions.jsonl")


@pytest.fixture
def listening():
    """A shell's background job ignores Ctrl-C, and so do the programs that it starts; here Python listens again."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_told_in_one_line_and_the_same_command_goes_on(toy, tmp_path, capsys, listening):
    class Interrupted(FakeEngine):
        async def generate(self, prompt, sampling, request_id):
            if len(self.asked) == 20:
                os.kill(os.getpid(), signal.SIGINT)
            return await super().generate(prompt, sampling, request_id)

    status, (folder,), _ = run(toy, tmp_path, engine=Interrupted(slots=1))
    told = capsys.readouterr().err
    assert status == 130 and told == "toy: interrupted; the same command goes on from the answers on disk\n"
    kept = len(read_predictions(folder))
    assert 15 <= kept < 60 and not (folder / "results.json").exists()
    status, _, record = run(toy, tmp_path)
    assert status == 0 and len(record.engine.asked) == 60 - kept and results_of(folder)["n"] == 60


def test_data_parallel_ranks_share_the_videos_and_merge(toy, tmp_path):
    command = [sys.executable, str(ROOT / "tests/evaluate/fakes.py"), "--model", "m", "--data_dir", str(toy)]
    command += ["--output_dir", str(tmp_path), "--data_parallel", "2"]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (folder,) = [path.parent for path in tmp_path.rglob("run.json")]
    assert [path.name for path in folder.glob("predictions*")] == ["predictions.jsonl"]
    assert len(read_predictions(folder)) == 60 == results_of(folder)["n_answered"]


def test_report_escapes_model_output(toy, tmp_path):
    attack = "</script><img src=x onerror=alert(1)><script>alert(2)</script> B"
    _, (folder,), _ = run(toy, tmp_path, "--limit", "6", engine=FakeEngine(lambda text: attack))
    page = (folder / "report.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and "&lt;img src=x" in page
    assert "default-src 'none'" in page and "data:image/jpeg" in page
    assert "http" not in page.replace("http-equiv", "")
