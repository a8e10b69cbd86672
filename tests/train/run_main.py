"""Runs train/main.py as a user does, on a small playground with a reward that differs between responses."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.run_ranks import run_within, torchrun

ROOT = Path(__file__).resolve().parents[2]
REWARD = '''
def spread(response, ground_truth, extra):
    """A number that differs between almost any two responses: an untrained policy learns from it, too."""
    return (sum(map(ord, response)) % 11) / 10
'''
NOT_REPRODUCIBLE = ("time/", "perf/", "memory/", "unix_s", "data/replaced")


def make_playground(folder: Path, clips: int = 60) -> Path:
    """A playground with an untrained policy, in seconds."""
    program = [sys.executable, "scripts/make_playground.py", "--output_dir", str(folder)]
    run = subprocess.run([*program, "--clips", str(clips), "--no_warm_start"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (folder / "reward.py").write_text(REWARD)
    return folder


def environment() -> dict[str, str]:
    settings = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
    }
    return {**os.environ, **settings}


def command(playground: Path, output: Path, *flags: str, ranks: int = 2) -> list[str]:
    """torchrun with small settings; later flags win over earlier ones."""
    return [
        *torchrun("train/main.py", ranks),
        *("--model", str(playground / "model"), "--data", str(playground / "train.jsonl")),
        *("--output_dir", str(output), "--style", "direct", "--fps", "4", "--max_frames", "8"),
        *("--max_prompt_tokens", "400", "--max_response_tokens", "12", "--group_size", "4", "--prompts_per_step", "4"),
        *("--token_budget", "1024", "--learning_rate", "1e-3", "--reward", f"{playground / 'reward.py'}:spread"),
        *("--reward_workers", "1", "--kl_in", "none", "--kl_coef", "0", "--dtype", "fp32", "--kv_cache_gib", "0.1"),
        *flags,
    ]


def run(playground: Path, output: Path, *flags: str, ranks: int = 2, timeout_s: float = 600) -> str:
    """Run to the end; its console output. Fails the test with the output if the exit status is not 0."""
    done = run_within(
        timeout_s, command(playground, output, *flags, ranks=ranks), cwd=ROOT, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def metrics(output: Path, *, reproducible: bool = False) -> list[dict]:
    """Rows of metrics.jsonl; with `reproducible` without times, memory and the like."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    if reproducible:
        rows = [{k: v for k, v in row.items() if not k.startswith(NOT_REPRODUCIBLE)} for row in rows]
    return rows
