"""Runs a program of the tests under torchrun, on this host's CPU."""

import os
import subprocess
import sys
from pathlib import Path


def run_ranks(program: Path, ranks: int, *words: object) -> None:
    """`program words` on that many ranks. Fails the test with the end of its errors if the exit status is not 0."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), str(program)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += [str(word) for word in words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
