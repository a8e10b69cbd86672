"""The doctor says what is there, and fails when something needed is missing."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("broken", [False, True])
def test_kernels_of_linear_layers(tmp_path, broken):
    """flash-linear-attention beside the environment, whole or built for another torch; causal-conv1d blocked, as if absent."""
    folder = tmp_path / "fla" / "ops" / "gated_delta_rule"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n" if broken else "")
    (tmp_path / "flash_linear_attention-0.98.dist-info").mkdir()
    about = "Metadata-Version: 2.1\nName: flash-linear-attention\nVersion: 0.98\n"
    (tmp_path / "flash_linear_attention-0.98.dist-info" / "METADATA").write_text(about)
    (tmp_path / "causal_conv1d.py").write_text("raise ImportError('blocked')\n")
    said = doctor(REELRL_VENV=str(Path(sys.executable).parents[1]), PYTHONPATH=str(tmp_path)).stdout.splitlines()
    start = said.index("Qwen3.5's linear layers on CUDA (other models need neither)")
    rule, convolution = (
        line.split(None, 1 if "convolution" in line else 2)[-1] for line in said[start + 1 : start + 3]
    )
    if broken:
        assert rule == (
            "flash-linear-attention 0.98 is installed but fails: undefined symbol: _ZN3c10; torch's own chunked rule runs: "
            "right, but over 10 times slower by transformers' own account: pip install flash-linear-attention"
        )
    else:
        assert rule == "flash-linear-attention 0.98"
    found = [
        f"causal-conv1d {d.version} is installed but fails: blocked"
        for d in metadata.distributions(name="causal-conv1d")
    ]
    assert convolution == (
        f"{found[0] if found else 'causal-conv1d not installed'}; torch's own convolution runs: right, but slower: "
        "pip install causal-conv1d --no-build-isolation  (needs nvcc)"
    )


def test_without_an_environment(tmp_path):
    done = doctor(REELRL_VENV=str(tmp_path / "none"))
    assert done.returncode == 1 and "none is missing: run bash scripts/setup.sh" in done.stdout
