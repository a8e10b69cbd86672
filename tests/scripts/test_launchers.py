"""The experiment launchers: published settings in the flags, one node and several, and real steps of the small twins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run_ranks import run_within
from tests.tiny_models import tiny_model
from tests.train import run_main
from train.args import parse_args

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("video_rl_qwen3_vl_8b", "unified_rl_qwen3_vl_8b", "hybrid_luffy")


@pytest.fixture
def launch(tmp_path):
    """launch(script, *flags, **environment) -> (torchrun's arguments, the program's), from a torchrun that only notes them."""
    stub = tmp_path / "venv" / "bin" / "torchrun"
    stub.parent.mkdir(parents=True)
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"$NOTED"\n')
    stub.chmod(0o755)
    for name in ("model", "cache"):
        (tmp_path / name).mkdir()
    rows = [{"problem": f"{n} + 1 = ?", "answer": str(n + 1), "problem_type": "numerical"} for n in range(600)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(script: str, *flags: str, code: int = 0, **settings: str):
        paths = {"MODEL": tmp_path / "model", "DATA": tmp_path / "train.jsonl", "CACHE_DIR": tmp_path / "cache"}
        environment = {"PATH": os.environ["PATH"], "REELRL_VENV": stub.parents[1], "NOTED": tmp_path / "noted", **paths}
        done = subprocess.run(
            ["bash", f"scripts/{script}.sh", *flags], cwd=ROOT, capture_output=True, text=True,
            env={name: str(value) for name, value in (environment | settings).items()},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        if code:
            return done.stderr
        words = (tmp_path / "noted").read_text().split("\0")[:-1]
        program = words.index("train/main.py")
        return words[:program], words[program + 1 :]

    return run


@pytest.mark.parametrize("script", LAUNCHERS)
def test_full_size_flags_make_a_plan_for_32_ranks(launch, script, monkeypatch, tmp_path):
    from train.plan import build_encoder, dry_run, load_samples

    monkeypatch.setenv("WORLD_SIZE", "32")
    tiny = tiny_model("qwen3_vl")
    _, flags = launch(script, "--output_dir", str(tmp_path / "run"), MODEL=tiny)
    args = parse_args(flags)  # exits if a combination is refused
    text = dry_run(args, load_samples(args), build_encoder(args), world_size=32)
    per_rank = {"video_rl_qwen3_vl_8b": 8, "unified_rl_qwen3_vl_8b": 16, "hybrid_luffy": 4}[script]
    assert f"{per_rank} prompts on each of 32 replicas (32 ranks)" in text


def test_published_settings(launch):
    """The values of the report's section on its runs and of its two example configurations."""
    shared = {
        "group_size": 8, "temperature": 1.0, "top_p": 1.0, "learning_rate": 1e-6, "adam_betas": [0.9, 0.999],
        "weight_decay": 0.01, "max_grad_norm": 1.0, "fps": 2.0, "max_frames": 128, "video_max_pixels": 262144,
        "image_max_pixels": 1048576, "kl_in": "none", "lr_schedule": "constant", "warmup_steps": 0,
    }  # fmt: skip
    grpo = {"advantage": "grpo", "clip_low": 0.2, "clip_high": 0.28, "clip_dual": 3.0, "loss_reduction": "token_mean"}
    video = {
        "prompts_per_step": 256, "prompts_per_update": 256, "max_prompt_tokens": 20000, "max_response_tokens": 4096,
        "max_steps": 200, "validate_every": 10, "save_every": 20, "seed": 42, "validate_top_p": 0.95,
    }  # fmt: skip
    unified = {
        "prompts_per_step": 512, "prompts_per_update": 256, "max_prompt_tokens": 16384, "max_response_tokens": 16384,
        "video_min_pixels": 262144, "validate_every": 5, "validate_top_k": 20, "park": True, "seed": 1,
    }  # fmt: skip
    luffy = {"demonstrations": "always", "luffy_gamma": 0.1, "prompts_per_step": 128, "entropy_coef": 0.01}
    wanted = dict(zip(LAUNCHERS, (shared | grpo | video, shared | grpo | unified, shared | luffy)))
    for script, values in wanted.items():
        args = parse_args(launch(script)[1])
        assert {name: getattr(args, name) for name in values} == values


def test_later_flags_win_and_files_may_be_several(launch, tmp_path):
    files = [f"{tmp_path}/a.jsonl::2", f"{tmp_path}/b.jsonl::1"]
    args = parse_args(launch("unified_rl_qwen3_vl_8b", "--group_size", "16", DATA=" ".join(files))[1])
    assert args.group_size == 16 and args.data == files
    assert parse_args(launch("hybrid_luffy", DEMONSTRATIONS="group_accuracy")[1]).demonstrations == "group_accuracy"


def test_one_node_and_several(launch):
    script = "video_rl_qwen3_vl_8b"
    assert launch(script, RANKS="8")[0] == ["--standalone", "--nproc_per_node", "8"]
    place = {"NNODES": "4", "NODE_RANK": "2", "MASTER_ADDR": "10.0.0.1"}
    assert " ".join(launch(script, RANKS="8", **place)[0]) == (
        "--nnodes 4 --node_rank 2 --master_addr 10.0.0.1 --master_port 29500 --rdzv_conf timeout=1800 --nproc_per_node 8"
    )
    for name in ("NODE_RANK", "MASTER_ADDR"):
        message = launch(script, code=1, **{key: value for key, value in place.items() if key != name})
        assert name in message


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    return run_main.make_playground(tmp_path_factory.mktemp("playground"))


@pytest.mark.slow
@pytest.mark.parametrize("script", LAUNCHERS)
def test_playground_twin_takes_two_steps(playground, tmp_path, script):
    output = tmp_path / "run"
    settings = {"PLAYGROUND": str(playground), "RUN": str(output), "REELRL_VENV": sys.prefix}
    small = ["--prompts_per_step", "4", "--prompts_per_update", "2" if script.startswith("unified") else "4"]
    small += ["--max_response_tokens", "12", "--max_steps", "2", "--validate_limit", "4", "--save_every", "2"]
    done = run_within(
        800, ["bash", f"scripts/{script}.sh", *small, "--reward", f"{playground / 'reward.py'}:spread"],
        cwd=ROOT, env=run_main.environment() | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    rows = run_main.metrics(output)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["policy/grad_norm"] > 0 and row["policy/skipped_updates"] == 0
        assert row["policy/learning_rate"] == 5e-4
        assert ("time/old_logprobs_s" in row) == script.startswith("unified")  # two updates per step
        share = row["response/demonstration_share"]
        assert share == (1 / 8 if script == "hybrid_luffy" else 0)
    assert (output / "final" / "model.safetensors").exists()
    assert "held-out accuracy" in done.stdout  # of --validate_at_start
