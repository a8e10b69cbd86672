"""Many benchmarks in one process: when an engine is started, when it is reused, what one's failure does to the others.

python tests/evaluate/test_all.py --benchmarks …      (evaluate/all.py with engines that say when they start; the tests of
                                                       several ranks and of the real model run it)
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import pytest

from evaluate import all as program
from evaluate._predictions import encode_row, read_predictions
from evaluate._run import main as run_alone
from tests.evaluate.fakes import FakeEngine, fake_parts, write_toy
from tests.run_ranks import torchrun

ROOT = Path(__file__).resolve().parents[2]
TWO = ("minerva", "lvbench")


class CountedEngine(FakeEngine):
    """`before(self)` is called before each answer, and may raise."""

    def __init__(self, log: list[str], number: int, before=lambda engine: None):
        super().__init__()
        self.log, self.number, self.before, self.dead, self.closed = log, number, before, False, False
        log.append(f"start {number}")

    async def generate(self, prompt, sampling, request_id):
        self.before(self)
        return await super().generate(prompt, sampling, request_id)

    def change_encoder(self, encoder) -> None:
        assert not self.closed
        self.log.append(f"reuse {self.number}")

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        self.log.append(f"close {self.number}")


class EngineGone(Exception):
    """As vLLM's EngineDeadError, a class of its own."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Annotation files of three benchmarks about the same six clips, two questions each."""
    folder = tmp_path_factory.mktemp("benchmarks")
    write_toy(folder, clips=6, questions=2)
    rows = json.loads((folder / "toy.json").read_text())
    for shift, name in enumerate((*TWO, "motionbench")):
        renamed = [
            {**row, "problem": f"{name}: {row['problem']}", "problem_id": f"{name}-{row['problem_id']}"} for row in rows
        ]
        (folder / f"{name}.json").write_text(json.dumps(renamed[shift:]))
    return folder


def evaluate(data: Path, out: Path, *flags: str, benchmarks=TWO, before=lambda engine: None, make_engine=None):
    """(exit status, what the engines did in order) of evaluate/all.py with engines that need no model."""
    log: list[str] = []

    def counted(args, encoder):
        return CountedEngine(log, sum(line.startswith("start") for line in log), before)

    arguments = ["--benchmarks", *benchmarks, "--model", str(data / "model"), "--data_dir", str(data)]
    arguments += ["--output_dir", str(out), *flags]
    return program.main(arguments, make_engine=make_engine or counted, make_encoder=fake_parts()[1]), log


def answers(out: Path, name: str) -> dict[str, tuple]:
    (path,) = (out / name).rglob("run.json")
    return {key: (row["response"], row["score"]) for key, row in read_predictions(path.parent).items()}


def test_one_engine_answers_both_as_their_own_programs_do(data, tmp_path, capsys):
    status, log = evaluate(data, tmp_path / "all")
    assert status == 0 and capsys.readouterr().out.endswith("[evaluate] all done\n")
    assert log == ["start 0", "reuse 0", "close 0"]
    for name, n in zip(TWO, (12, 11)):
        make_engine, make_encoder, _ = fake_parts()
        benchmark = __import__(f"evaluate.{name}", fromlist=["BENCHMARK"]).BENCHMARK
        arguments = ["--model", str(data / "model"), "--data_dir", str(data), "--output_dir", str(tmp_path / "alone")]
        assert run_alone(benchmark, arguments, make_engine=make_engine, make_encoder=make_encoder) == 0
        alone = answers(tmp_path / "alone", name)
        assert len(alone) == n and answers(tmp_path / "all", name) == alone
        folders = [next((tmp_path / run / name).rglob("run.json")).parent.name for run in ("all", "alone")]
        assert folders[0] == folders[1]  # the same key: each goes on from the other's answers


def test_other_engine_arguments_start_another_engine_after_the_first_has_ended(data, tmp_path, monkeypatch):
    from evaluate import lvbench

    longer = replace(lvbench.BENCHMARK, defaults={"max_model_len": 2048})
    monkeypatch.setattr(lvbench, "BENCHMARK", longer)
    status, log = evaluate(data, tmp_path)
    assert status == 0 and log == ["start 0", "close 0", "start 1", "close 1"]
    other_frames = replace(lvbench.BENCHMARK, defaults={"fps": 1.0})
    monkeypatch.setattr(lvbench, "BENCHMARK", other_frames)  # the encoder's business
    assert evaluate(data, tmp_path / "frames")[1] == ["start 0", "reuse 0", "close 0"]


def test_other_weights_in_the_same_folder_start_another_engine(data, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    weights = model / "model.safetensors"
    weights.write_bytes(b"old weights")

    def trained_meanwhile(engine):
        weights.write_bytes(b"new weights")

    status, log = evaluate(data, tmp_path / "out", "--model", str(model), before=trained_meanwhile)
    assert status == 0 and log == ["start 0", "close 0", "start 1", "close 1"]


def test_an_engine_that_died_is_closed_and_the_next_benchmark_starts_one(data, tmp_path, capsys):
    def die(engine):
        if engine.number == 0 and len(engine.asked) == 5:
            raise EngineGone("EngineCore encountered an issue")

    status, log = evaluate(data, tmp_path, before=die)
    said = capsys.readouterr()
    assert status == 1 and log == ["start 0", "close 0", "start 1", "close 1"]
    assert "EngineGone: EngineCore encountered an issue" in said.err
    assert "did not end well: minerva (1) (" in said.out.splitlines()[-1]
    assert 0 < len(answers(tmp_path, "minerva")) < 12 and len(answers(tmp_path, "lvbench")) == 11
    status, log = evaluate(data, tmp_path)  # goes on with minerva alone
    assert status == 0 and log == ["start 0", "close 0"] and len(answers(tmp_path, "minerva")) == 12


def test_an_engine_that_died_between_two_benchmarks_is_not_asked(data, tmp_path):
    def mark(engine):
        engine.dead = engine.number == 0

    assert evaluate(data, tmp_path, before=mark) == (0, ["start 0", "close 0", "start 1", "close 1"])


def test_what_is_answered_already_starts_no_engine(data, tmp_path):
    assert evaluate(data, tmp_path)[0] == 0
    assert evaluate(data, tmp_path) == (0, [])
    assert evaluate(data, tmp_path, "--score_only") == (0, [])
    assert evaluate(data, tmp_path / "none", "--dry_run") == (0, [])


def test_bad_annotations_of_one_do_not_stop_the_others(data, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "clips").symlink_to(data / "clips")
    for name in ("minerva", "motionbench"):
        (folder / f"{name}.json").symlink_to(data / f"{name}.json")
    (folder / "lvbench.json").write_text('[{"problem": "?"')
    status, log = evaluate(folder, tmp_path / "out", benchmarks=("minerva", "lvbench", "nothing", "all", "motionbench"))
    said = capsys.readouterr()
    assert status == 1 and log == ["start 0", "reuse 0", "close 0"]
    assert "lvbench.json:1: not JSON" in said.err
    assert "refused by nothing, all: there is no such benchmark" in said.err
    assert "did not end well: lvbench (2) nothing (2) all (2) (" in said.out.splitlines()[-1]
    assert len(answers(tmp_path / "out", "minerva")) == 12 and len(answers(tmp_path / "out", "motionbench")) == 10


def test_flags_that_a_benchmark_does_not_know_are_told_by_its_name_before_anything_runs(data, tmp_path, capsys):
    status, log = evaluate(data, tmp_path, "--split", "mc", benchmarks=("minerva", "mmvu", "lvbench"))
    said = capsys.readouterr()
    assert status == 1 and log == []
    assert said.err.splitlines()[0] == "[evaluate] refused by minerva, lvbench: unrecognized arguments: --split mc"
    assert "no annotation file" in said.err  # mmvu knows the flag and got as far as that
    status, _ = evaluate(data, tmp_path, "--prompt", "official", "--limit", "0")
    assert status == 1 and "refused by minerva, lvbench: --limit must be >= 1, got 0" in capsys.readouterr().err
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize("flag", ["--annotations", "--run_dir"])
def test_flags_that_name_one_benchmarks_files_are_refused_for_several(flag, data, tmp_path, capsys):
    """minerva.json would be read, answered and reported as LVBench, too: all programs read the toolkit's layout."""
    value = str(data / "minerva.json" if flag == "--annotations" else tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        evaluate(data, tmp_path / "out", flag, value)
    assert stopped.value.code == 2 and f"{flag} names one benchmark's" in capsys.readouterr().err
    assert not list(tmp_path.rglob("run.json"))
    assert evaluate(data, tmp_path / "out", flag, value, benchmarks=("minerva",)) == (0, ["start 0", "close 0"])
    assert len(list(tmp_path.rglob("run.json"))) == 1


def test_a_program_that_ends_itself_ends_only_its_benchmark(data, tmp_path, capsys):
    def cannot(args, encoder):
        raise SystemExit("--dtype float32: vLLM's CPU kernels run Qwen3.5 in bfloat16 only")

    assert evaluate(data, tmp_path, make_engine=cannot)[0] == 1
    said = capsys.readouterr()
    assert "minerva: --dtype float32: vLLM's CPU" in said.err and "lvbench: --dtype float32: vLLM's CPU" in said.err
    assert "did not end well: minerva (1) lvbench (1) (" in said.out


@pytest.mark.parametrize("engine_too", [False, True])
def test_ctrl_c_ends_all(engine_too, data, tmp_path, capsys):
    """Also where the signal ends the engine first, whose error is then no reason to go on with the next benchmark."""

    def interrupted(engine):
        if len(engine.asked) == 5:
            os.kill(os.getpid(), signal.SIGINT)
            if engine_too:
                raise EngineGone("EngineCore got SIGINT")

    before = signal.getsignal(signal.SIGINT)
    status, log = evaluate(data, tmp_path, before=interrupted)
    assert status == 130 and log == ["start 0", "close 0"] and signal.getsignal(signal.SIGINT) is before
    said = capsys.readouterr()
    assert "the same command goes on" in said.err and "[evaluate] lvbench" not in said.out
    assert 0 < len(answers(tmp_path, "minerva")) < 12
    assert evaluate(data, tmp_path)[0] == 0 and len(answers(tmp_path, "minerva")) == 12


def test_a_judge_in_this_process_finds_the_engine_closed(data, tmp_path, monkeypatch):
    from evaluate import _judge, minerva

    seen: list[str] = []

    def judge_rows(benchmark, args, folder, judged, rows):
        seen.append(log[-1])
        return {"asked": len(judged)}

    log: list[str] = []

    def make_engine(args, encoder):
        return CountedEngine(log, len(log))

    monkeypatch.setattr(_judge, "judge_rows", judge_rows)
    monkeypatch.setattr(minerva, "BENCHMARK", replace(minerva.BENCHMARK, judged=lambda sample: True))
    status, _ = evaluate(data, tmp_path, "--judge_model", "folder", make_engine=make_engine)
    assert status == 0 and seen == ["close 0"] and log == ["start 0", "close 0", "start 2", "close 2"]


def test_what_a_benchmark_left_is_collected_though_the_engine_is_exempt():
    """AsyncVllm takes its libraries' objects from the garbage collector; those of the benchmark before must not stay."""
    from evaluate._async_vllm import AsyncVllm

    class Left:
        pass

    engine = object.__new__(AsyncVllm)
    engine._llm = SimpleNamespace(shutdown=lambda: None, errored=False)
    engine._processes = []
    engine._guard = SimpleNamespace(kill=lambda: None, wait=lambda: None)
    encoder = SimpleNamespace(tokenizer=SimpleNamespace())
    was = gc.get_freeze_count()
    left = Left()
    left.me, gone = left, weakref.ref(left)
    engine.change_encoder(encoder)
    try:
        assert gc.get_freeze_count() > was + 1000
        del left
        gc.collect()
        assert gone() is not None  # the state that the next benchmark finds
        engine.change_encoder(encoder)
        assert gone() is None and gc.get_freeze_count() > was + 1000
    finally:
        engine.close()
    assert gc.get_freeze_count() == 0


def start_ranks(data: Path, out: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, __file__, "--benchmarks", *TWO, "--model", str(data / "model"), "--data_dir", str(data)]
    command += ["--output_dir", str(out), "--data_parallel", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def test_each_rank_keeps_one_engine_and_rank_0_reports(data, tmp_path):
    done = start_ranks(data, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("start 0") == done.stderr.count("reuse 0") == done.stderr.count("close 0") == 2
    assert done.stdout.count("[evaluate] all done") == 1
    for name, n in zip(TWO, (12, 11)):
        assert len(answers(tmp_path, name)) == n
        assert [path.name for path in tmp_path.rglob(f"{name}/*/predictions*")] == ["predictions.jsonl"]


def test_rank_0_does_not_wait_for_a_rank_that_went_on_to_the_next_benchmark(data, tmp_path):
    done = start_ranks(data, tmp_path, FAILING="1 minerva")
    assert done.returncode == 1 and "did not end well: minerva (4) (" in done.stdout, done.stdout + done.stderr
    assert len(answers(tmp_path, "minerva")) == 6 and len(answers(tmp_path, "lvbench")) == 11
    assert not list(tmp_path.rglob("given_up*"))
    assert start_ranks(data, tmp_path).returncode == 0 and len(answers(tmp_path, "minerva")) == 12


def test_a_mark_of_an_earlier_launch_says_nothing_about_this_one(data, tmp_path):
    from evaluate._ranks import mark_of, wait_for_ranks

    samples = [SimpleNamespace(id=name, media=()) for name in "abcd"]  # a and c are rank 0's
    (tmp_path / "predictions.0-of-2.jsonl").write_bytes(b"".join(encode_row({"id": name}) for name in "ac"))
    mark = mark_of(tmp_path, 1, 2)
    mark.touch()
    os.utime(mark, (1e9, 1e9))

    def rank_1() -> None:
        time.sleep(0.3)
        (tmp_path / "predictions.1-of-2.jsonl").write_bytes(b"".join(encode_row({"id": name}) for name in "bd"))

    thread = threading.Thread(target=rank_1)
    thread.start()
    wait_for_ranks(tmp_path, samples, 2)
    assert read_predictions(tmp_path).keys() == set("abcd") and not mark.exists()
    thread.join()
    (tmp_path / "predictions.1-of-2.jsonl").unlink()
    mark.touch()  # now it has given up
    wait_for_ranks(tmp_path, samples, 2)
    assert read_predictions(tmp_path).keys() == set("ac")


@pytest.mark.parametrize(
    ("chosen", "given"), [(None, []), ("minerva  lvbench", ["--benchmarks", "minerva", "lvbench"])]
)
def test_launcher_gives_the_program_its_flags_and_ends_with_its_status(chosen, given, tmp_path):
    stub = tmp_path / "venv/bin/python"
    stub.parent.mkdir(parents=True)
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"$NOTED"\nexit 1\n')
    stub.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "REELRL_VENV": str(tmp_path / "venv"), "NOTED": str(tmp_path / "noted")}
    env |= {"MODEL": "some model", **({"BENCHMARKS": chosen} if chosen else {})}
    command = ["bash", str(ROOT / "scripts/evaluate_all.sh"), "--limit", "5"]
    assert subprocess.run(command, env=env, timeout=60).returncode == 1
    expected = ["evaluate/all.py", *given, "--model", "some model", "--data_dir", "benchmarks", "--limit", "5"]
    assert (tmp_path / "noted").read_text().split("\0")[:-1] == expected
    del env["MODEL"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "MODEL=FOLDER is needed" in done.stderr
    (tmp_path / "noted").unlink()
    done = subprocess.run([*command, "--help"], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("Evaluates a model on many benchmarks in one process (evaluate/all.py)")
    assert all(f"{name}: " in done.stdout for name in ("MODEL", "DATA_DIR", "BENCHMARKS", "REELRL_VENV"))
    assert "set -euo" not in done.stdout and (tmp_path / "noted").read_text().split("\0")[-2] == "--help"


def test_the_default_list_names_programs_that_exist_once_each():
    every = {path.stem for path in (ROOT / "evaluate").glob("[a-z]*.py")} - {"all", "custom", "playground"}
    assert sorted(program.BENCHMARKS) == sorted(every)


SMALL = "--dtype float32 --max_frames 4 --video_max_pixels 4096 --max_response_tokens 12 --max_num_seqs 8 --max_model_len 4096"


def run_really(
    model: Path, data: Path, out: Path, file: str, *words: str, ranks: int | None = None
) -> subprocess.CompletedProcess:
    """A program with vLLM and a tiny model, in a process of its own, or by torchrun on so many ranks."""
    start = torchrun(file, ranks) if ranks else [sys.executable, file]
    command = [*start, *words, "--model", str(model), "--data_dir", str(data), "--output_dir", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "REAL": "1"}
    done = subprocess.run([*command, *SMALL.split()], env=env, capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_a_real_engine_answers_both_as_their_own_programs_do(data, tiny, tmp_path):
    model = tiny("qwen3_vl")
    done = run_really(model, data, tmp_path / "all", "tests/evaluate/test_all.py", "--benchmarks", *TWO)
    assert done.stderr.count("engine started") == 1
    for name, n in zip(TWO, (12, 11)):
        run_really(model, data, tmp_path / "alone", f"evaluate/{name}.py")
        alone = answers(tmp_path / "alone", name)
        assert len(alone) == n and any(response for response, _ in alone.values())
        assert answers(tmp_path / "all", name) == alone


@pytest.mark.slow
def test_torchrun_starts_a_real_engine_per_rank_and_their_answers_are_those_of_one_process(data, tiny, tmp_path):
    """Two ranks: 6 + 6 questions of minerva, 5 + 6 of lvbench, whose answers are compared with its own program's."""
    model = tiny("qwen3_vl")
    done = run_really(model, data, tmp_path / "two", "tests/evaluate/test_all.py", "--benchmarks", *TWO, ranks=2)
    assert done.stderr.count("engine started") == 2 and done.stdout.count("[evaluate] all done") == 1
    said = [f"[{name} rank {rank}] {n}/{n}, 0 failed" for name, rank, n in (
        ("minerva", 0, 6), ("minerva", 1, 6), ("lvbench", 0, 5), ("lvbench", 1, 6)
    )]  # fmt: skip
    assert all(done.stdout.count(line) == 1 for line in said), done.stdout
    for name, n in zip(TWO, (12, 11)):
        assert len(answers(tmp_path / "two", name)) == n
        left = {path.name for path in next((tmp_path / "two" / name).iterdir()).iterdir()}
        assert left == {".lock", "predictions.jsonl", "report.html", "results.json", "run.json"}
    run_really(model, data, tmp_path / "alone", "evaluate/lvbench.py")
    assert answers(tmp_path / "two", "lvbench") == answers(tmp_path / "alone", "lvbench")


def run_as_program() -> int:
    rank, failing = os.environ.get("RANK", "0"), os.environ.get("FAILING", " ").split(" ")

    class Told(list):
        def append(self, line: str) -> None:
            super().append(line)
            print(line, file=sys.stderr)

    log = Told()

    def fail(engine) -> None:
        if [rank, "minerva"] == failing and len(engine.log) == 1:
            raise EngineGone("the rank's engine is gone")

    def counted(args, encoder):
        return CountedEngine(log, sum(line.startswith("start") for line in log), fail)

    def real(args, encoder):
        from evaluate._models import build_engine

        print("engine started", file=sys.stderr)
        return build_engine(args, encoder)

    if os.environ.get("REAL"):
        return program.main(make_engine=real)
    from evaluate import _models

    _models.engine_args = lambda args: {}  # the same for both; the real ones need vLLM, ten seconds of imports per rank
    return program.main(make_engine=counted, make_encoder=fake_parts()[1])


if __name__ == "__main__":
    sys.exit(run_as_program())
