"""scripts/real_model.sh from a GGUF written on the spot to its table, in a few steps; and the table by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
    """Two clips, two questions each: supervised 1/4, two seeds 2/4 and 4/4, so 75 % and +50; blind never moves."""
    data, run = tmp_path / "data", tmp_path / "run"
    names = [f"heldout-{i:05d}" for i in range(4)]
    rows = [
        {
            "problem_id": name,
            "problem": "Q?",
            "answer": "Yes",
            "problem_type": "boolean",
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
    (data / "complete.json").write_text(json.dumps({"majority": {"heldout": 0.5, "unseen": 0.5, "text_only": 0.25}}))
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
    shown = (run / "examples.md").read_text()
    assert shown.count("## heldout-") == 4 and "grpo, seed 0 (score 1)" in shown
    for name, colour in zip(names, (RED, RED, BLUE, BLUE)):
        assert f"![frames at 0.25, 0.75, 1.25, 1.75 s](examples/{name}.png)" in shown
        with Image.open(run / "examples" / f"{name}.png") as picture:
            assert np.abs(np.array(picture.getpixel((16, 16))) - colour).max() <= 6


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
