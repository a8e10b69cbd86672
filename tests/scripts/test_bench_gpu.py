"""scripts/bench_gpu.py without a GPU: what runs when, what is skipped, verdicts and tables from results with known answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from scripts import bench_gpu, bench_targets, plan_memory
from scripts.bench_gpu import STAGES, Stage, chosen_stages, find_gpus, is_done, lacking, ranks_of, run_stages
from scripts.bench_results import response_lengths
from train.flops import read_shape

ROOT = Path(__file__).resolve().parents[2]
H200, H100 = ("NVIDIA H200", 140.4), ("NVIDIA H100 80GB HBM3", 79.6)


def by_name(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)


def program(name: str, text: str, folder: Path, **settings) -> Stage:
    """A stage that runs a small Python program; {out} is filled in by the session."""
    path = folder / f"{name}.py"
    path.write_text(text)
    return Stage(name, "a stand-in", (f"{{python}} {path} {{out}} {{left}}",), 1, 20, **settings)


def session(stages, out: Path, **settings) -> dict:
    return run_stages(stages, [H200], out, out / "work", **{"budget_s": 60.0, **settings})


# ---- which stages, on which machine ---------------------------------------------------------------------------------


def test_correctness_comes_first_and_small_results_files_are_few():
    names = [stage.name for stage in chosen_stages(None, [H200])]
    assert names[:6] == ["tests-packed", "tests-parity", "tests-long", "packed-2b", "flex-2b", "step-2b"]
    assert names.index("step-2b") < names.index("levers-2b") < names.index("peer-2b") < names.index("step-4b")
    for several in (False, True):
        results = {stage.result for stage in STAGES if (max(stage.ranks) > 1) == several} - {""}
        assert len(results | {"gpu.json", "gpu.log"}) <= 8
    assert all(str(ROOT / part).endswith(part) and (ROOT / part).exists()
               for stage in STAGES for line in stage.commands for part in line.split()
               if part.startswith(("scripts/", "tests/")))  # fmt: skip


def test_the_gpus_that_count_are_the_visible_ones(tmp_path, monkeypatch):
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\necho 'A, 1024'\necho 'B, 2048'\necho 'C, 4096'\n")
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_gpus() == [("A", 1.0), ("B", 2.0), ("C", 4.0)]
    for visible, names in (("1", "B"), ("2,0", "CA"), ("2, 0", "CA"), ("7", ""), ("GPU-5dca70cf", "ABC")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert "".join(name for name, _ in find_gpus()) == names


def test_stages_take_the_machines_they_fit():
    assert ranks_of(by_name("packed-2b"), [H100]) == 1
    assert ranks_of(by_name("step-2b"), [H100]) is None  # its kept layers need more
    assert ranks_of(by_name("step-4b"), [H100]) is None and ranks_of(by_name("step-4b"), [H200]) == 1
    assert ranks_of(by_name("one-8b"), [H200]) == 1  # not by what two ranks of 8B hold each
    machines = ([H200], [H200] * 2, [H100] * 4, [H200] * 4)
    assert [ranks_of(by_name("step-8b"), gpus) for gpus in machines] == [None, 2, None, 2]
    roomy = ("a GPU of 100 GiB", 100.0)  # two of them do not hold the states, four do
    assert [ranks_of(by_name("step-8b"), [roomy] * count) for count in (2, 4)] == [None, 4]
    assert {stage.name for stage in chosen_stages(None, [H200] * 2)} == {"tests-ranks", "step-8b", "more-8b"}
    with pytest.raises(ValueError, match=r"--again step-3b: not among .*step-2b"):
        chosen_stages(["step-3b"], [H200], "--again")
    bare = replace(by_name("step-2b"), packages=("json", "no_such_package"))
    assert lacking(bare, [H200]) == "lacks no_such_package"


@pytest.mark.parametrize("flags,ranks", [("2b", 1), ("4b", 1), ("8b", 2), ("8b", 4), ("8b-one", 1)])
def test_a_stage_asks_for_the_memory_that_its_kept_layers_take(flags, ranks):
    """scripts/plan_memory.py on the largest group and the longest row of five steps, and 3 GiB for CUDA and a sleeping vLLM."""
    size, one = flags[:2], flags == "8b-one"
    stage, shape = by_name("one-8b" if one else f"step-{size}"), read_shape(plan_memory.SIZES[size])
    rows = bench_gpu.TRAIN_ARGS[flags].split()
    prompts = 2 if one else 4
    steps = [
        response_lengths("lognormal:400:1200", prompts, 8, 2048, [n, rank]) for n in range(5) for rank in range(ranks)
    ]
    largest = max(sum(group) for step in steps for group in step)
    longest = max(length for step in steps for group in step for length in group)
    peaks = {}
    for layout, tokens, kept in (
        ("groups", largest, str(bench_gpu.PACKED_KEPT_LAYERS[flags])),
        ("rows", longest, rows[rows.index("--kept_layers") + 1]),
    ):
        words = ["--size", size, "--gpus", str(ranks), "--fused", "--kept_layers", kept, "--group_size", "1"]
        words += ["--max_response_tokens", str(tokens), "--groups_per_rank", "0"]
        words += rows[rows.index("--optimizer") :] if one else []
        peaks[layout] = plan_memory.make_plan(shape, plan_memory.flags().parse_args(words), 128).peak_bytes / 2**30
    asked = stage.memory_gib if one else bench_gpu.MEMORY_GIB.get((size, ranks), stage.memory_gib)
    assert max(peaks.values()) + 3 < asked < 139
    assert f"--packed_kept_layers {bench_gpu.PACKED_KEPT_LAYERS[flags]}" in stage.commands[0]
    assert peaks["groups"] < 1.03 * peaks["rows"]  # the target: not above (b); the largest group is a rare one


def test_the_list_is_printed_anywhere(tmp_path):
    command = [sys.executable, "scripts/bench_gpu.py", "--list", "--out", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [stage.name for stage in STAGES]
    assert not (tmp_path / "none").exists()


# ---- running, skipping, going on ------------------------------------------------------------------------------------


COUNTS = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
(out / "ran.txt").open("a").write("x")
path = out / "step-tiny.json"
found = json.loads(path.read_text()) if path.exists() else {"runs": {"g": [], "b": []}, "failed": {}}
found["runs"]["g"].append(1)
if len(found["runs"]["g"]) == 2:
    found["failed"]["b"] = "no room"
path.write_text(json.dumps(found))
sys.exit(bool(found["failed"]))
"""


def test_a_measurement_goes_on_until_its_steps_are_there(tmp_path):
    """One step per run; two of g are wanted, and b ends up among the failed: then there is nothing left to do."""
    stage = program("step-tiny", COUNTS, tmp_path, result="step-tiny.json", steps={"g": 2, "b": 2})
    out = tmp_path / "out"
    assert session([stage], out)["stages"]["step-tiny"]["state"] == "to go on"
    assert not is_done(stage, out, bench_gpu.read_state(out))
    assert session([stage], out)["stages"]["step-tiny"]["state"] == "done"
    session([stage], out)
    assert (out / "ran.txt").read_text() == "xx"
    kept = json.loads((out / "gpu.json").read_text())
    assert kept["machine"]["gpus"] == ["NVIDIA H200, 140 GiB"]
    assert (
        kept["stages"]["step-tiny"]["commands"][0].startswith("python ")
        and "OUT" in kept["stages"]["step-tiny"]["commands"][0]
    )


def test_a_failure_is_kept_and_waits_for_again(tmp_path, capsys):
    text = "import pathlib, sys; pathlib.Path(sys.argv[1], 'ran.txt').open('a').write('x'); sys.exit('no kernel here')"
    bad, good = program("tests-bad", text, tmp_path), program("tests-good", "print('well')", tmp_path)
    out = tmp_path / "out"
    stages = session([bad, good], out)["stages"]
    assert (stages["tests-bad"]["state"], stages["tests-good"]["state"]) == ("failed", "done")
    assert "no kernel here" in stages["tests-bad"]["end"] and "no kernel here" in capsys.readouterr().out
    session([bad, good], out)
    assert "tests-bad: failed: --again tests-bad" in capsys.readouterr().out
    session([bad, good], out, again=["tests-bad"])
    assert (out / "ran.txt").read_text() == "xx"
    log = (out / "gpu.log").read_text()
    assert log.count("no kernel here") == 2 and log.count("well") == 1


SLEEPS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(90)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(90)
"""


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_ranks_share_the_cores_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(bench_gpu.os, "cpu_count", lambda: 32)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [bench_gpu.threads_for(ranks)["OMP_NUM_THREADS"] for ranks in (1, 4, 64)] == ["32", "8", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert bench_gpu.threads_for(4)["OMP_NUM_THREADS"] == "3"


def test_a_program_ends_with_its_children(tmp_path):
    (tmp_path / "sleeps.py").write_text(SLEEPS)
    command = [sys.executable, str(tmp_path / "sleeps.py"), str(tmp_path / "child.txt")]
    assert bench_gpu.run_command(command, tmp_path / "log", 8.0) is None
    child = int((tmp_path / "child.txt").read_text())
    end = time.monotonic() + 10
    while alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(child)


@pytest.mark.parametrize(
    ("name", "limit_s", "measures", "state"),
    [
        ("step-tiny", 20, True, "to go on"),  # what was measured stays
        ("step-tiny", 20, False, "failed"),  # it hung before its first step
        ("tests-cut", 90, False, "to go on"),  # cut by the budget: it may be well
        ("tests-hang", 20, False, "failed"),  # cut by its own limit
    ],
)
def test_what_a_stage_that_was_cut_short_is(tmp_path, monkeypatch, name, limit_s, measures, state):
    measured = {"result": "slow.json", "steps": {"g": 3}} if name == "step-tiny" else {}
    stage = replace(program(name, "", tmp_path, **measured), limit_s=limit_s)
    out, given = tmp_path / "out", []

    def cut(command, log, seconds, ranks):
        given.append(seconds)
        if measures:
            (out / "slow.json").write_text(json.dumps({"runs": {"g": [1]}}))

    monkeypatch.setattr(bench_gpu, "run_command", cut)
    assert session([stage], out, budget_s=60.0)["stages"][name]["state"] == state
    assert given[0] == pytest.approx(min(limit_s, 60.0 - bench_gpu.MARGIN_S), abs=1.0)
    assert bench_gpu.steps_measured(stage, out) == measures


def test_what_does_not_fit_the_budget_is_not_started(tmp_path, capsys):
    long = replace(program("tests-long", "raise SystemExit(1)", tmp_path), needs_s=100)
    short = program("tests-short", "print('well')", tmp_path)
    out = tmp_path / "out"
    stages = session([long, short], out, budget_s=60.0)["stages"]
    assert set(stages) == {"tests-short"} and stages["tests-short"]["state"] == "done"
    assert "tests-long: to do; needs about 100 s" in capsys.readouterr().out


def test_the_log_keeps_its_end(tmp_path):
    path = tmp_path / "gpu.log"
    path.write_bytes(b"".join(b"line %03d\n" % number for number in range(100)))
    bench_gpu.keep_end(path, 50)  # five lines of nine bytes, and a piece of one more
    assert path.read_text() == "".join(f"line {number:03d}\n" for number in range(95, 100))


# ---- verdicts and tables by hand ------------------------------------------------------------------------------------


def record(step_s: float, rollout: float, update: float, useful: float, peak: float, **more: float) -> dict:
    seconds = {"rollout": rollout, "update": update, **more}
    seconds["load"] = step_s - sum(seconds.values())
    return {
        "seconds": seconds, "step_s": step_s, "row_tokens": 3000, "response_tokens": 200, "useful_flops": useful,
        "peak_update_gib": peak, "log_ratio": 0.0,
    }  # fmt: skip


def results(runs: dict, device: str = "NVIDIA H200", ranks: int = 1) -> dict:
    settings = {
        "size": "2b", "workload": "default", "frames": 128, "prompts": 4, "group_size": 8, "response_tokens": "400",
        "max_response_tokens": 2048, "ranks": ranks,
    }  # fmt: skip
    host = {"device": device, "cores": 16, "versions": {"torch": "2.11.0"}, "date": "2026-11-28"}
    return {"settings": settings, "host": host, "runs": runs, "failed": {}, "notes": {}}


USEFUL = 989e12 * 1.5  # one and a half seconds of an H200's dense bf16 peak


def found(out: Path) -> dict[str, tuple[str, str]]:
    return {verdict.target: (verdict.measured, verdict.word) for verdict in bench_targets.verdicts(out)}


def test_verdicts_by_hand(tmp_path):
    """b: 100 s, of which 20 rollout and 50 update. g: 24 s, 16 rollout, 5 update; so 10x, 80 / 8 = 10x, 4.17x, 30 %."""
    runs = {
        "b": [record(100.0, 20.0, 50.0, USEFUL, 40.0, sleep=0.2, wake=0.3)],
        "g": [record(24.0, 16.0, 5.0, USEFUL, 44.0, sleep=0.5, wake=0.7)],
        "a": [record(72.0, 20.0, 50.0, USEFUL, 40.0)],
    }
    (tmp_path / "step-2b.json").write_text(json.dumps(results(runs)))
    assert found(tmp_path) == {
        "2b: update over (b) >= 5.00x": ("10.00x", "PASS"),
        "2b: all but the rollout over (b) >= 4.00x": ("10.00x", "PASS"),
        "2b: whole step over (b) >= 2.50x": ("4.17x", "PASS"),
        "2b: whole step over (a) >= 3.50x": ("3.00x", "SHORT"),
        "2b: utilisation of the update, useful FLOPs >= 25.0%": ("30.0%", "PASS"),
        "2b: the same, stretch >= 35.0%": ("30.0%", "-"),
        "2b: sleep plus wake <= 1.00 s": ("1.20 s", "SHORT"),
        "2b: peak memory of the update, not above (b) <= 40.00 GiB": ("44.00 GiB", "SHORT"),
    }


def test_8b_on_one_gpu_has_a_title_of_its_own_and_the_targets_of_8b(tmp_path):
    runs = {"g": [record(24.0, 16.0, 5.0, USEFUL, 44.0, sync=1.6)]}
    (tmp_path / "one-8b.json").write_text(json.dumps(results(runs)))
    verdict = found(tmp_path)
    assert verdict["8b on one GPU: weight sync <= 1.50 s"] == ("1.60 s", "SHORT")
    assert verdict["8b on one GPU: utilisation of the update, useful FLOPs >= 30.0%"] == ("30.0%", "PASS")
    assert bench_targets.render(tmp_path, tmp_path / "table.md")[0] == "Whole steps, 8B on 1 x NVIDIA H200"


def test_render_wants_a_folder_that_is_there(tmp_path, capsys):
    assert bench_gpu.main(["--out", str(tmp_path), "--render", str(tmp_path / "no" / "table.md")]) == 2
    assert capsys.readouterr().err.endswith(f"there is no folder {tmp_path / 'no'}; make it first\n")


def test_where_the_rollout_is_long_its_bound_counts(tmp_path):
    """8b: the rollout is 40 of (b)'s 100 s, more than 35 %. (g) samples 40 s, so 2.5x is the most; 85 % of it is 2.125."""
    runs = {
        "b": [record(100.0, 40.0, 50.0, USEFUL, 40.0)],
        "g": [record(50.0, 40.0, 5.0, USEFUL, 39.0, sync=1.4, sleep=0.1)],
    }
    (tmp_path / "step-8b.json").write_text(json.dumps(results(runs, ranks=2)))
    seen = found(tmp_path)
    text = "8b: whole step over (b), 85 % of the rollout's bound 2.50x (rollout is 40% of (b)) >= 2.12x"
    assert seen[text] == ("2.00x", "SHORT")
    assert seen["8b: weight sync <= 1.50 s"] == ("1.40 s", "PASS")
    assert seen["8b: utilisation of the update, useful FLOPs >= 30.0%"] == ("30.0%", "PASS")
    assert seen["8b: peak memory of the update, not above (b) <= 40.00 GiB"] == ("39.00 GiB", "PASS")


def test_tests_peer_packed_and_evaluation(tmp_path):
    state = {
        name: {"state": kept}
        for name, kept in (("tests-packed", "done"), ("tests-parity", "failed"), ("tests-long", "to go on"))
    }
    (tmp_path / "gpu.json").write_text(json.dumps({"stages": state | {"step-2b": {"state": "failed"}}}))
    runs = {"g": [record(26.05, 10.0, 5.0, USEFUL, 1.0)], "g-fly": [record(65.125, 10.0, 5.0, USEFUL, 1.0)]}
    (tmp_path / "peer-2b.json").write_text(json.dumps(results(runs)))
    rows = [("packed/flex", 1.9), ("packed/varlen", 2.0), ("rows/flex", 12.0), ("rows/hf", 13.3)]
    packed = {"flops": 4e14, "variants": [{"variant": name, "median_s": s, "peak_gib": 14.6} for name, s in rows]}
    (tmp_path / "packed-2b.json").write_text(json.dumps(packed))
    figures = {
        "engine_idle_share": 0.05,
        "gpu_idle_share": {"loop": 0.7, "pipeline": 0.12},
        "times_the_loop": 6.1,
        "questions": 24,
        "clips": 8,
        "median_s": {"loop": 61.0, "pipeline": 10.0},
    }
    (tmp_path / "evaluate-2b.json").write_text(json.dumps(figures))
    assert found(tmp_path) == {
        "tests-packed passes": ("done", "PASS"),
        "tests-parity passes": ("failed", "SHORT"),
        "tests-long passes": ("to go on", "-"),
        "update of one group 2b over the library's rows >= 5.00x": ("7.00x", "PASS"),
        "peer's workload, clips cached: over its 260.5 s >= 10.00x": ("10.00x", "PASS"),
        "peer's workload, clips decoded on the fly: over its 260.5 s >= 5.00x": ("4.00x", "SHORT"),
        "evaluation 2b: GPU idle share of the pipeline <= 10.0%": ("12.0%", "SHORT"),
        "evaluation 2b: pipeline over the loop >= 6.00x": ("6.10x", "PASS"),
    }


def test_no_figure_is_no_verdict(tmp_path):
    """An unknown device has no peak: utilisation is neither passed nor missed."""
    runs = {"g": [record(24.0, 16.0, 5.0, USEFUL, 44.0)]}
    (tmp_path / "step-4b.json").write_text(json.dumps(results(runs, device="a new GPU")))
    assert found(tmp_path)["4b: utilisation of the update, useful FLOPs >= 30.0%"] == ("no figure", "-")


DOCUMENT = """# Measured on GPUs

How to read them.

## The update of one group, packed against rows

an old table

## Something else

stays
"""


def test_sections_are_replaced_or_appended(tmp_path):
    runs = {"b": [record(100.0, 20.0, 50.0, USEFUL, 40.0)], "g": [record(24.0, 16.0, 5.0, USEFUL, 44.0)]}
    (tmp_path / "step-2b.json").write_text(json.dumps(results(runs)))
    packed = {
        "flops": 4e14, "device": "NVIDIA H200", "gradients": {"packed/flex": {"median": 9.7e-3, "max": 0.1}},
        "variants": [
            {"variant": "packed/flex", "median_s": 2.0, "peak_gib": 14.6},
            {"variant": "rows/hf", "median_s": 13.0, "peak_gib": None},
        ],
    }  # fmt: skip
    (tmp_path / "packed-2b.json").write_text(json.dumps(packed))
    commands = ["python scripts/bench_step.py --size 2b --out OUT/step-2b.json"]
    stages = {
        "packed-2b": {"state": "done", "date": "2026-11-28", "versions": {"torch": "2.11.0"}, "commands": ["python x.py"]},
        "step-2b": {"state": "done", "commands": commands}, "more-2b": {"state": "done", "commands": commands},
    }  # fmt: skip
    (tmp_path / "gpu.json").write_text(json.dumps({"stages": stages}))
    document = tmp_path / "gpu_results.md"
    document.write_text(DOCUMENT)
    titles = bench_targets.render(tmp_path, document)
    first = document.read_text()
    bench_targets.render(tmp_path, document)
    assert document.read_text() == first  # a second time changes nothing
    assert titles == ["Whole steps, 2B on 1 x NVIDIA H200", "The update of one group, packed against rows", "Targets"]
    heads = [line for line in first.splitlines() if line.startswith("## ")]
    assert heads == [
        "## The update of one group, packed against rows",
        "## Something else",
        f"## {titles[0]}",
        "## Targets",
    ]
    assert "an old table" not in first and "\n## Something else\n\nstays\n" in first
    # by hand: 4e14 FLOP in 2 s are 200 TFLOP/s, in 13 s 30.8; 13 / 2 = 6.5 times
    assert (
        "| packed/flex | 2.000 | 6.50x | 200.0 | 14.6 |" in first and "| rows/hf | 13.000 | 1.00x | 30.8 |  |" in first
    )
    assert "packed/flex 9.7e-03" in first
    assert first.count("    " + commands[0]) == 1
    assert "1 x NVIDIA H200, 2026-11-28, torch 2.11.0." in first
    assert (
        "| variant | steps | load | rollout | update | step | tokens/s | utilisation | peak, GiB | update | rest | step |"
        in first
    )
    # 3,000 row tokens in 24 s; 1.5 s of the peak in 5; b over g: 50 / 5, 80 / 8, 100 / 24
    assert "| g | 1 | 3.00 | 16.00 | 5.00 | 24.00 | 125 | 30.0% | 44.0 | 10.00x | 10.00x | 4.17x |" in first
    assert "| 2b: update over (b) >= 5.00x | 10.00x | PASS |" in first
