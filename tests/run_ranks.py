"""Runs a program of the tests under torchrun, on this host's CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def torchrun(program: Path | str, ranks: int) -> list[str]:
    """The command that starts a program on that many ranks of this host; its own words follow."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*start, "--nproc_per_node", str(ranks), str(program)]


def run_ranks(program: Path, ranks: int, *words: object, timeout_s: float = 600) -> None:
    """`program words` on that many ranks. Fails the test with the end of its errors if the exit status is not 0."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun(program, ranks), *map(str, words)]
    done = run_within(timeout_s, command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr[-4000:]


def run_within(timeout_s: float, command: list[str], **options) -> subprocess.CompletedProcess:
    """subprocess.run with text pipes; over its time it fails the test with what the program said until then."""
    try:
        return subprocess.run(command, text=True, timeout=timeout_s, check=False, **options)
    except subprocess.TimeoutExpired as late:
        said = [(stream or b"").decode(errors="replace")[-4000:] for stream in (late.stdout, late.stderr)]
        pytest.fail(
            f"{' '.join(command)}\nwas still running after {timeout_s:g} s; its last words:\n" + "\n".join(said)
        )
