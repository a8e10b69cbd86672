"""scripts/real_model.sh from a GGUF written on the spot to its table, in a few steps; and the table by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.playground_clips import write_media
from scripts.real_model import sees, table

ROOT = Path(__file__).resolve().parents[2]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


RED, GREEN, BLUE, WHITE = (225, 30, 30), (30, 190, 50), (40, 70, 240), (245, 245, 245)


def write_quarters(path: Path, colours, height: int, width: int) -> None:
    """A clip of 2 s at 8 frames per second, each half second in a colour of its own."""
    frames = np.repeat(np.array(colours, np.uint8), 4, axis=0)[:, None, None]
    write_media(path, np.broadcast_to(frames, (16, height, width, 3)), 8, still=False)


def test_strip_shows_the_middles_of_a_clips_quarters_with_their_times(tmp_path):
    """48 x 32 pixels, a gap of 4: the middles of the four frames are 24, 76, 128 and 180 pixels from the left."""
    write_quarters(tmp_path / "clip.mp4", (RED, GREEN, BLUE, WHITE), 32, 48)
    picture, times_s = table.strip(tmp_path / "clip.mp4", still=False)
    assert times_s == [0.25, 0.75, 1.25, 1.75] and picture.size == (4 * 48 + 3 * 4, 32 + 14)
    for x, colour in zip((24, 76, 128, 180), (RED, GREEN, BLUE, WHITE)):
        assert np.abs(np.array(picture.getpixel((x, 16))) - colour).max() <= 6, x
    assert picture.getpixel((49, 16)) == (255, 255, 255)
    for left in (0, 52, 104, 156):  # a time stands below each
        assert np.asarray(picture.convert("L"))[33:, left : left + 40].min() < 128
    write_media(tmp_path / "still.png", np.full((1, 32, 48, 3), GREEN, np.uint8), 8, still=True)
    picture, times_s = table.strip(tmp_path / "still.png", still=True)
    assert picture.size == (48, 32) and picture.getpixel((5, 20)) == GREEN and times_s == []
    with pytest.raises(SystemExit, match=r"gone\.mp4: no such file; give --data"):
        table.strip(tmp_path / "gone.mp4", still=False)


def test_table_by_hand(tmp_path):
    """Two clips, two questions each: supervised 1/4, two seeds 2/4 and 4/4, so 75 % and +50; blind never moves. Without looking,
    three of the four questions have 0.5 and one has 0.3, which is 0.45."""
    data, run = tmp_path / "data", tmp_path / "run"
    names = [f"heldout-{i:05d}" for i in range(4)]
    rows = [
        {
            "problem_id": name,
            "problem": "Q?",
            "answer": "Yes",
            "problem_type": "boolean",
            "data_type": "video",
            "data_source": "real/rare" if i == 3 else "real/often",
            "videos": [f"clips/{i // 2}.mp4"],
        }
        for i, name in enumerate(names)
    ]
    other = {
        name: [{**row, "problem_id": row["problem_id"].replace("heldout", name)} for row in rows]
        for name in ("unseen", "ability")
    }
    for i, colour in enumerate((RED, BLUE)):
        write_quarters(data / f"clips/{i}.mp4", (colour,) * 4, 32, 32)
    write_lines(data / "heldout.jsonl", rows)
    write_lines(data / "unseen.jsonl", other["unseen"])
    write_lines(data / "text_only.jsonl", other["ability"])
    for name in ("heldout", "unseen"):
        write_lines(
            data / f"{name}_blind.jsonl",
            [{**r, "problem_id": r["problem_id"].replace("heldout", f"{name}_blind")} for r in rows],
        )
    shares = {"real/often": 0.5, "real/rare": 0.3}
    drawn = {"majority": {"heldout": 0.5, "unseen": 0.5, "text_only": 0.25}}
    drawn["best_unseeing"] = {"heldout": shares, "unseen": shares}
    (data / "complete.json").write_text(json.dumps(drawn))
    for place, scores in {
        "supervised": [1, 0, 0, 0],
        "grpo-seed0/after": [1, 1, 0, 0],
        "grpo-seed1/after": [1, 1, 1, 1],
    }.items():
        listed = [{"id": name, "score": s, "response": "r"} for name, s in zip(names, scores)]
        for part in ("unseen", "heldout_blind", "unseen_blind", "ability"):
            listed += [
                {"id": n.replace("heldout", part), "score": int(i == 0), "response": "r"} for i, n in enumerate(names)
            ]
        write_lines(run / place / "predictions.jsonl", listed)
        (run / place / "results.json").write_text("{}")
    assert table.main([str(run), "--data", str(data)]) == 0
    figures = json.loads((run / "table.json").read_text())
    held = figures["accuracy"]["held-out"]
    assert held["supervised"]["value"] == 0.25 and held["grpo, 2 seeds"]["value"] == 0.75
    assert (
        figures["difference"]["held-out"]["grpo"][0] == 0.5
        and figures["difference"]["unseen combinations"]["grpo"][0] == 0.0
    )
    assert held["supervised"]["low"] == 0.0 and held["supervised"]["high"] == 0.5  # two clips of 1/2 and 0/2
    met, missed, blind = figures["targets"]["grpo"]
    assert (
        met.endswith("met (+25.0, +75.0)")
        and "not met (+0.0, +0.0)" in missed
        and blind.startswith("blind within 3 points: met")
    )
    seeds = figures["seeds"]["grpo"]["held-out"]
    assert [(seeds[k][0]["value"], seeds[k][1][0]) for k in "01"] == [(0.5, 0.25), (1.0, 0.75)]
    text = (run / "table.md").read_text()
    # Seed 0 gains one of two questions of the first clip and none of the second's: 50 or 0 points when one clip is drawn twice.
    assert "| held-out | 0 | 50.0 (0.0 to 100.0) | +25.0 (+0.0 to +50.0) |" in text
    assert all(
        f"| {title} | 4 | {known} | 45.0 |" in text for title, known in (("held-out", "50.0"), ("held-out: video", "–"))
    )
    assert "| text-only, fixed set | 4 | 25.0 | – |" in text
    shown = (run / "examples.md").read_text()
    assert shown.count("## heldout-") == 4 and "grpo, seed 0 (score 1)" in shown
    for name, colour in zip(names, (RED, RED, BLUE, BLUE)):
        assert f"![frames at 0.25, 0.75, 1.25, 1.75 s](examples/{name}.png)" in shown
        with Image.open(run / "examples" / f"{name}.png") as picture:
            assert np.abs(np.array(picture.getpixel((16, 16))) - colour).max() <= 6


def test_an_evaluation_of_other_questions_is_named():
    questions = {f"heldout-{i}": {} for i in range(3)}
    table.check_answered(
        {"supervised": dict.fromkeys(questions, 1.0), "dapo, seed 0": dict.fromkeys(questions, 0.0)}, questions
    )
    with pytest.raises(
        SystemExit, match=r"supervised: 4 questions answered, 1 of them not in the data; supervised: 4\. "
    ):
        table.check_answered({"supervised": dict.fromkeys([*questions, "heldout-7"], 1.0)}, questions)
    with pytest.raises(SystemExit, match=r"seed 1: 2 questions answered, 0 of them not in the data; supervised: 3\."):
        table.check_answered(
            {"supervised": dict.fromkeys(questions, 1.0), "seed 1": {"heldout-0": 1, "heldout-2": 0}}, questions
        )


def test_losses_with_own_and_other_pixels_are_those_of_the_last_validation(tmp_path, capsys):
    rows = [
        {"validate/nll": 9.0},
        {"validate/nll_by_source/real/caption": 0.5, "validate/nll_by_source/real/caption_swapped": 2.0},
    ]
    write_lines(tmp_path / "validation.jsonl", rows)
    assert sees.main([str(tmp_path)]) == 0
    assert (
        "0.500 nats per token with the scene's own pixels, 2.000 with another scene's: +1.500"
        in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "sees.json").read_text()) == {"own": 0.5, "other": 2.0, "difference": 1.5}
    write_lines(tmp_path / "validation.jsonl", rows[:1])
    with pytest.raises(SystemExit, match=r"heldout_captions_swapped\.jsonl writes them"):
        sees.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("listed", "visible", "ranks", "dealt"),
    [
        (3, None, 1, ["0", "1", "2", "0"]),
        (4, None, 2, ["0,1", "2,3", "0,1", "2,3"]),
        (3, None, 2, ["none", "none", "none", "none"]),  # one set of two: nothing to deal
        (4, "3,1", 1, ["3", "1", "3", "1"]),
        (4, "2", 1, ["2", "2", "2", "2"]),
        (0, None, 1, ["none", "none", "none", "none"]),
    ],
)
def test_runs_beside_each_other_get_the_visible_gpus_in_turn(tmp_path, listed, visible, ranks, dealt):
    """torchrun and python are scripts that write down what they were given; the run of seed 2 fails, the others end."""
    programs = {
        "nvidia-smi": f"for n in $(seq 1 {listed}); do echo GPU $((n - 1)): H200 UUID: GPU-$n; done",
        "torchrun": """while [ "$1" != --output_dir ]; do [ "$1" != --seed ] || seed=$2; shift; done
            mkdir -p "$2" && echo "${CUDA_VISIBLE_DEVICES:-none}" > "$2/seen"
            [ "$seed" != 2 ] || exit 7; echo {} > $2/done.json""",
        "python": """while [ "$1" != --run_dir ]; do shift; done
            mkdir -p "$2" && echo "${CUDA_VISIBLE_DEVICES:-none}" > "$2/seen" && echo {} > $2/results.json""",
    }
    (tmp_path / "bin").mkdir()
    for name, lines in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    run = tmp_path / "run"
    settings = {"SIZE": "cpu", "RUN": str(run), "SEEDS": "0 1 2 3", "ALGORITHMS": "dapo", "TOGETHER": "1"}
    environment = {**os.environ, **settings, "REELRL_VENV": str(tmp_path), "RANKS": str(ranks)}
    environment["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    done = subprocess.run(
        ["bash", "scripts/real_model.sh", "rl"], cwd=ROOT, env=environment, timeout=60, capture_output=True, text=True
    )
    assert [(run / f"dapo-seed{seed}" / "seen").read_text().strip() for seed in range(4)] == dealt
    ended = [seed for seed in range(4) if (run / f"dapo-seed{seed}" / "after" / "results.json").exists()]
    assert (done.returncode, ended) == (7, [0, 1, 3])
    assert "an RL run ended with status 7" in done.stdout
    assert (run / "dapo-seed3" / "after" / "seen").read_text().strip() == dealt[3]  # its evaluation stays there


def test_runs_beside_each_other_that_are_not_finished_are_told_as_one_alone_is(tmp_path):
    """Both trainings end without a result: with LIMIT_S that is 75 and the command to repeat, and the logs go on."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "torchrun").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    settings = {"SIZE": "cpu", "RUN": str(tmp_path / "run"), "SEEDS": "0 1", "ALGORITHMS": "dapo", "TOGETHER": "1"}
    environment = {**os.environ, **settings, "REELRL_VENV": str(tmp_path), "LIMIT_S": "200"}
    for turn in (1, 2):
        done = subprocess.run(
            ["bash", "scripts/real_model.sh", "rl"],
            cwd=ROOT,
            env=environment,
            timeout=60,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 75
        assert "RL is not finished within LIMIT_S=200: run the same command again" in done.stdout
        assert (tmp_path / "run" / "dapo-seed1.log").read_text().count("is not finished within") == turn


def fake_programs(folder: Path, **programs: str) -> dict[str, str]:
    """An environment for the launcher in which these programs are sh scripts in folder/bin, and its own bin folder is empty."""
    (folder / "bin").mkdir()
    for name, lines in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{lines}\n")
        (folder / "bin" / name).chmod(0o755)
    settings = {
        "SIZE": "cpu",
        "RUN": str(folder / "run"),
        "SEEDS": "0",
        "ALGORITHMS": "dapo",
        "REELRL_VENV": str(folder),
    }
    own = ("LIMIT_S", "RL_SECONDS", "TOGETHER", "RANKS", "TAG", "RL_FLAGS")
    return {name: value for name, value in os.environ.items() if name not in own} | settings


def launched(environment: dict[str, str], *phases: str, **settings: str) -> subprocess.CompletedProcess:
    command = ["bash", "scripts/real_model.sh", *phases]
    return subprocess.run(command, cwd=ROOT, env=environment | settings, timeout=60, capture_output=True, text=True)


# Writes down the hours it was given, a line per call and a word per --max_hours, and ends as train/main.py does when they are
# over: with a checkpoint.
TIMED = """while [ $# -gt 0 ]; do case $1 in --output_dir) out=$2 ;; --max_hours) hours="$hours $2" ;; esac; shift; done
mkdir -p "$out/checkpoints/step-000012/hf" && echo "$hours" >> "$out/hours" && echo w > "$out/checkpoints/step-000012/hf/weights"
sleep ${SLEEP_S:-0}"""
EVALUATED = """while [ "$1" != --run_dir ]; do shift; done; mkdir -p "$2" && echo {} > $2/results.json"""


@pytest.mark.parametrize(
    ("limit_s", "spent_s", "hours"),
    [
        ("0", None, 720 / 3600),
        ("540", None, 450 / 3600),  # 90 s of LIMIT_S are for starting and saving
        ("900", None, 720 / 3600),
        ("540", 400, 320 / 3600),  # what is left of RL_SECONDS is the smaller now
        ("100", 400, 50 / 3600),
        ("540", 720, None),  # nothing left, but the launcher was killed before it said so: no training
    ],
)
def test_of_the_two_limits_of_time_the_smaller_one_holds(tmp_path, limit_s, spent_s, hours):
    """RL_SECONDS=720 in all. Where it is what ends a run, its last checkpoint is the result; else the next call goes on."""
    environment = fake_programs(tmp_path, torchrun=TIMED, python=EVALUATED)
    run = tmp_path / "run" / "dapo-seed0"
    if spent_s is not None:
        (run / "checkpoints" / "step-000012" / "hf").mkdir(parents=True)
        (run / "spent_s").write_text(f"{spent_s}\n")
    done = launched(environment, "rl", RL_SECONDS="720", LIMIT_S=limit_s)
    given = (run / "hours").read_text().split() if (run / "hours").exists() else []
    assert [float(value) for value in given] == ([] if hours is None else [pytest.approx(hours, rel=1e-5)])
    # The stand-in ends at once, long before 720 s: only where they are spent already is there a result.
    assert (done.returncode, (run / "done.json").exists()) == ((0, True) if hours is None else (75, False)), done.stdout
    if hours is not None:
        assert int((run / "spent_s").read_text()) >= (spent_s or 0)
        shown = f"not finished within LIMIT_S={limit_s}" if limit_s != "0" else "ended before"
        assert shown in done.stdout and "run the same command again" in done.stdout
    else:
        assert json.loads((run / "done.json").read_text())["step"] == 12


def test_time_spent_is_added_up_and_the_last_checkpoint_is_the_result_when_it_is_over(tmp_path):
    """RL_SECONDS=4, and at most 2 s of a call by LIMIT_S=3: two calls of at least 2 s each, 2 s and what is left in hours."""
    environment = fake_programs(tmp_path, torchrun=TIMED, python=EVALUATED)
    run, calls = tmp_path / "run" / "dapo-seed0", []
    for _ in range(2):
        calls.append(launched(environment, "rl", RL_SECONDS="4", LIMIT_S="3", SLEEP_S="2.1").returncode)
        if not (run / "done.json").exists():
            spent_s = int((run / "spent_s").read_text())
            assert spent_s >= 2
    first, second = [float(line) for line in (run / "hours").read_text().split()]
    assert calls == [75, 0] and first == pytest.approx(2 / 3600, rel=1e-5)
    assert second == pytest.approx(min(2, 4 - spent_s) / 3600, rel=1e-5)
    assert json.loads((run / "done.json").read_text()) == {
        "step": 12, "final": str(run / "final"), "stopped_by": "RL_SECONDS=4"}  # fmt: skip
    assert (run / "final" / "weights").read_text() == "w\n" and (run / "after" / "results.json").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"LIMIT_S": "9m"}, "LIMIT_S must be whole seconds, 0 for no limit; got '9m'"),
        ({"RL_SECONDS": "0"}, "RL_SECONDS must be whole seconds above 0, or empty; got '0'"),
        ({"RANKS": "two"}, "RANKS must be a number of GPUs, at least 1; got 'two'"),
        ({"TOGETHER": "yes"}, "TOGETHER must be 0 or 1, got 'yes'"),
        ({"SIZE": "big"}, "SIZE must be gpu or cpu, got 'big'"),
        ({}, "unknown phase 'tnue'; known: folder clips decode base see tune sees supervised rl table"),
    ],
)
def test_what_is_mistyped_is_said_before_any_phase_runs(tmp_path, settings, said):
    environment = fake_programs(tmp_path, python="touch $(dirname $0)/ran")
    done = launched(environment, "folder", *([] if settings else ["tnue"]), **settings)
    assert (done.returncode, said in done.stdout) == (2, True), done.stdout + done.stderr
    assert not (tmp_path / "bin" / "ran").exists() and not (tmp_path / "run").exists()


def test_runs_beside_each_other_end_with_their_launcher(tmp_path):
    """Two trainings that would go on for 30 s; SIGTERM to the launcher alone reaches both, and both end before it does."""
    waits = """while [ "$1" != --output_dir ]; do shift; done; mkdir -p "$2"; trap 'echo saved > "$3/saved"; exit 0' TERM
        set -- x "$2" "$2"; echo $$ > "$2/pid"; for turn in $(seq 300); do sleep 0.1; done"""
    environment = fake_programs(tmp_path, torchrun=waits) | {"TOGETHER": "1", "SEEDS": "0 1"}
    launcher = subprocess.Popen(
        ["bash", "scripts/real_model.sh", "rl"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    pids = [tmp_path / "run" / f"dapo-seed{seed}" / "pid" for seed in (0, 1)]
    while not all(path.exists() and path.read_text() for path in pids):
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    said, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 143 and "stopped: the same command goes on" in said
    for path in pids:
        assert (path.parent / "saved").read_text() == "saved\n"
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


@pytest.mark.slow
def test_launcher_runs_every_phase_and_a_second_run_makes_nothing_again(tmp_path):
    from tests.tiny_gguf import tiny_gguf  # needs gguf, the tests above do not

    file, _ = tiny_gguf(tmp_path / "tiny.gguf")
    run = tmp_path / "run"
    settings = {"SIZE": "cpu", "GGUF": str(file), "RUN": str(run), "SEEDS": "0", "ALGORITHMS": "grpo", "CLIPS": "8"}
    settings["TOGETHER"] = "1"
    environment = {**os.environ, **settings, "REELRL_VENV": sys.prefix, "PYTHONPATH": os.pathsep.join(sys.path)}

    def launch(*phases: str) -> str:
        done = subprocess.run(
            ["bash", "scripts/real_model.sh", *phases], cwd=ROOT, env=environment, timeout=600,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    phases = ("folder", "clips", "decode", "see", "tune", "sees", "supervised", "rl", "table")
    launch(*phases)
    asked = sum(
        sum(1 for _ in (run / "data" / f"{name}.jsonl").open())
        for name in ("heldout", "heldout_blind", "unseen", "unseen_blind", "text_only")
    )
    for place in ("supervised", "grpo-seed0/after"):
        results = json.loads((run / place / "results.json").read_text())
        assert results["n"] == asked and results["n_failed"] == 0
    (step,) = [json.loads(line) for line in (run / "grpo-seed0" / "metrics.jsonl").read_text().splitlines()]
    assert step["mismatch/abs_log_ratio"] < 1e-4  # vLLM and the trainer agree on the folder's architecture
    frozen = json.loads((run / "see" / "run.json").read_text())["starts"][0]["arguments"]["freeze_language_model"]
    assert frozen and (run / "table.md").read_text().count("| held-out") >= 3
    for stage in ("see", "tune"):
        losses = json.loads((run / stage / "sees" / "sees.json").read_text())
        assert losses["own"] > 0 and losses["other"] > 0 and not (run / stage / "sees" / "checkpoints").exists()
    before = {
        path: path.stat().st_mtime_ns
        for path in (run / "see" / "done.json", run / "supervised", run / "grpo-seed0" / "final")
    }
    again = launch(*phases) + (run / "grpo-seed0.log").read_text()  # with TOGETHER an RL run has a log of its own
    assert (
        again.count(": already there (") == 10
    )  # folder, clips, decode, see, tune and the losses after each, supervised, RL, its evaluation
    assert {path: path.stat().st_mtime_ns for path in before} == before
