"""train/main.py for real: two ranks, DeepSpeed, vLLM, video files; resume bit for bit after kill -9."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import xxhash
from safetensors.torch import load_file

from tests.run_ranks import torchrun
from tests.train import run_main
from train import checkpoint


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    return run_main.make_playground(tmp_path_factory.mktemp("playground"))


def test_two_steps_on_two_ranks(playground, tmp_path):
    output = tmp_path / "run"
    said = run_main.run(
        playground, output, "--max_steps", "2", "--check_parity", "--log_rollouts_every", "1", "--save_every", "1",
        "--keep_last", "1", "--validate_data", str(playground / "heldout.jsonl"), "--validate_limit", "5",
        "--validate_every", "2", "--kept_layers", "auto",
    )  # fmt: skip
    rows = run_main.metrics(output)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        # Sampled and recomputed log-probs agree before and after the weight sync, video input included.
        assert row["mismatch/max"] < 1e-4 and row["mismatch/k3"] < 1e-8
        assert 0 < row["reward/mean"] < 1 and row["reward/std"] > 0
        assert row["policy/ratio"] == 1.0 and row["policy/grad_norm"] > 0
        assert row["tokens/response"] <= 4 * 4 * 12
    assert rows[1]["validate/samples"] == 5 and rows[1]["validate/unusable"] == 0
    assert rows[1]["data/position"] == 8
    assert rows[0]["memory/kept_layers"] == 0  # auto: a CPU does not say what is free
    # The group advantages of GRPO, from the logged rewards of the first group: (r - mean) / (std + 1e-6).
    line = json.loads((output / "rollouts.jsonl").read_text().splitlines()[0])
    assert len(line["responses"]) == 4 and line["frames"]
    before, after = (load_file(folder / "model.safetensors") for folder in (playground / "model", output / "final"))
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("visual" in name for name in moved) and any("language_model" in name for name in moved)
    assert [path.name for path in checkpoint.list_checkpoints(output)] == ["step-000002"]
    assert checkpoint.find(output, "auto").name == "step-000002"
    saved = output / "checkpoints" / "step-000002"
    manifest = json.loads((saved / "complete.json").read_text())
    assert len(manifest["xxh3_64"]) == len(manifest["files"]) > 8
    for name, written in manifest["xxh3_64"].items():
        assert written == xxhash.xxh3_64_hexdigest((saved / name).read_bytes()), name
    assert "<script" not in (output / "report.html").read_text()
    assert "done after step 2" in said


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_resident_parameters_reach_the_engine_and_the_reference_stays(playground, tmp_path, ranks):
    run_main.run(
        playground, tmp_path / "run", "--max_steps", "2", "--check_parity", "--resident_parameters", "on",
        "--kl_in", "loss", "--kl_coef", "0.01", "--save_every", "1", ranks=ranks,
    )  # fmt: skip
    rows = run_main.metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2] and all(row["policy/grad_norm"] > 0 for row in rows)
    assert all(row["mismatch/max"] < 1e-4 for row in rows)  # after the first update and its sync, too
    assert rows[0]["policy/ref_kl"] < 1e-9 < rows[1]["policy/ref_kl"]


def test_bad_rows_are_refused_before_anything_is_built(playground, tmp_path):
    lines = (playground / "train.jsonl").read_text().splitlines()
    broken = json.loads(lines[3]) | {"videos": ["clips/absent.mp4"]}
    strange = json.loads(lines[4]) | {"problem_type": "riddle"}
    bad = playground / "bad.jsonl"
    bad.write_text("\n".join([*lines[:3], json.dumps(broken), json.dumps(strange), "{not json"]) + "\n")
    command = run_main.command(
        playground, tmp_path / "run", "--data", str(bad), "--max_steps", "1", "--dry_run", ranks=1
    )
    started = subprocess.run(command, cwd=run_main.ROOT, env=run_main.environment(), capture_output=True, text=True)
    said = started.stdout + started.stderr
    assert started.returncode != 0
    for word in ("bad.jsonl:4", "absent.mp4", "bad.jsonl:5", "riddle", "bad.jsonl:6"):
        assert word in said, said[-3000:]


def test_fewer_rows_than_a_step_are_one_line_before_anything_is_built(playground, tmp_path):
    """Two rows where a step takes four. With --max_steps, or an epoch more, they are taken again."""
    few = playground / "few.jsonl"
    few.write_text("".join((playground / "train.jsonl").read_text().splitlines(keepends=True)[:2]))
    program = [sys.executable, "train/main.py", "--model", str(playground / "model"), "--data", str(few)]
    program += ["--output_dir", str(tmp_path / "run"), "--prompts_per_step", "4"]
    options = {"cwd": run_main.ROOT, "env": run_main.environment(), "capture_output": True, "text": True}
    done = subprocess.run(program, **options)
    assert done.returncode == 2 and not (tmp_path / "run").exists(), done.stderr[-3000:]
    assert done.stderr.splitlines()[-1] == (
        f"train/main.py: --data {few}: 2 usable rows, 4 are needed for one step of --prompts_per_step 4 in --epochs 1; "
        "add rows, lower --prompts_per_step, or take rows more than once: raise --epochs or give --max_steps"
    )
    assert "Traceback" not in done.stderr
    # Two ranks, of which rank 0 is the slower one: torchrun must not end it before it has said so.
    (tmp_path / "sitecustomize.py").write_text("import os, time\ntime.sleep(4 * (os.environ.get('RANK') == '0'))\n")
    slow = {**options, "env": {**run_main.environment(), "PYTHONPATH": str(tmp_path)}}
    done = subprocess.run([*torchrun(program[1], 2), *program[2:]], **slow)
    assert done.returncode != 0 and done.stderr.count("train/main.py: --data") == 1, done.stderr[-3000:]
    done = subprocess.run([*program, "--epochs", "2", "--dry_run"], **options)
    assert done.returncode == 0 and "2 samples, 1 steps = 2.00 epochs" in done.stdout, done.stderr[-3000:]


def kill_tree(pid: int) -> None:
    """kill -9 on torchrun and all below it at once: its workers lead process groups of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def started(playground, output, *flags, ranks):
    process = subprocess.Popen(
        run_main.command(playground, output, *flags, ranks=ranks), cwd=run_main.ROOT, env=run_main.environment(),
        stdout=open(output.with_suffix(".log"), "w"), stderr=subprocess.STDOUT, start_new_session=True,  # noqa: SIM115
    )  # fmt: skip
    try:
        yield process
    finally:
        kill_tree(process.pid)
        process.wait()


def wait_for(condition, process, log: Path, timeout_s=400):
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_equals_uninterrupted(playground, tmp_path, ranks):
    """4 steps straight equal 2 steps, kill -9, 2 steps: every logged figure that is not a time, and the weights."""
    flags = ("--save_every", "1", "--max_steps", "4")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run_main.run(playground, straight, *flags, ranks=ranks)
    with started(playground, broken, *flags, ranks=ranks) as process:
        second = broken / "checkpoints" / "step-000002"
        wait_for(lambda: checkpoint.is_complete(second), process, broken.with_suffix(".log"))
    said = run_main.run(playground, broken, *flags, ranks=ranks)
    assert "resumed after step" in said
    assert run_main.metrics(broken, reproducible=True) == run_main.metrics(straight, reproducible=True)
    one, other = (load_file(folder / "final" / "model.safetensors") for folder in (straight, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_kill_during_a_save_falls_back_to_the_one_before(playground, tmp_path):
    output = tmp_path / "run"
    flags = ("--save_every", "1", "--max_steps", "3")
    with started(playground, output, *flags, ranks=1) as process:
        partial = output / "checkpoints" / ".partial-step-000002"
        wait_for(partial.exists, process, output.with_suffix(".log"))
    assert not (output / "checkpoints" / "step-000002").exists()
    said = run_main.run(playground, output, *flags, ranks=1)
    assert "resumed after step 1" in said
    assert not list((output / "checkpoints").glob(".partial*"))
    assert [row["step"] for row in run_main.metrics(output)] == [1, 2, 3]


@pytest.mark.slow
def test_sigusr1_saves_and_exits_0(playground, tmp_path):
    output = tmp_path / "run"
    with started(playground, output, "--max_steps", "500", "--save_every", "0", ranks=1) as process:
        log = output / "metrics.jsonl"
        wait_for(lambda: log.exists() and log.read_text().count("\n") >= 1, process, output.with_suffix(".log"))
        child = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()[0]
        os.kill(int(child), signal.SIGUSR1)
        assert process.wait(timeout=200) == 0
    steps = [row["step"] for row in run_main.metrics(output)]
    assert checkpoint.find(output, "auto").name == f"step-{steps[-1]:06d}"
    assert not (output / "done.json").exists()
