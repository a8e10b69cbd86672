"""The doctor says what is there, and fails when something needed is missing."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def doctor(**env):
    run = dict(os.environ, **env)
    return subprocess.run(["bash", ROOT / "scripts" / "doctor.sh"], capture_output=True, text=True, env=run)


def test_what_it_finds_and_what_it_objects_to():
    """One start for both: the environment is whole, and one setting in it breaks vLLM's sleep mode."""
    venv = str(Path(sys.executable).parents[1])
    done = doctor(REELRL_VENV=venv, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
    assert (
        f"torch {metadata.version('torch')}" in done.stdout
        and f"deepspeed {metadata.version('deepspeed')}" in done.stdout
    )
    assert "GiB" in done.stdout and "MISSING" not in done.stdout, done.stderr
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith(
        "to repair: PYTORCH_CUDA_ALLOC_CONF without expandable_segments:True"
    )


def test_without_an_environment(tmp_path):
    done = doctor(REELRL_VENV=str(tmp_path / "none"))
    assert done.returncode == 1 and "none is missing: run bash scripts/setup.sh" in done.stdout
