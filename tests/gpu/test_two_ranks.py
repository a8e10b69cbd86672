"""train/main.py on two GPUs with video, image and text in one step: never a hang, sampler and trainer agree on both ranks."""

from __future__ import annotations

import json

import pytest
import torch

from tests.train import run_main

STEPS = 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_mixed_modality_on_two_ranks(tmp_path):
    playground = run_main.make_playground(tmp_path / "playground", clips=60)
    lines = [json.loads(line) for line in (playground / "train.jsonl").read_text().splitlines()]
    first = {kind: next(line for line in lines if line["data_type"] == kind) for kind in ("video", "image", "text")}
    # Uneven on purpose: of eight prompts in a row, some rank has no video, and some step no image.
    mix = ["video", "text", "text", "image", "text", "video", "video", "text"]
    rows = [{**first[kind], "problem_id": f"{kind}-{number}"} for number, kind in enumerate(mix * STEPS)]
    (playground / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_main.run(
        playground, tmp_path / "run", "--max_steps", str(STEPS), "--prompts_per_step", "8", "--dtype", "bf16",
        "--attention", "varlen", "--enforce_eager", "--kv_cache_gib", "1", "--max_num_seqs", "32", "--check_parity",
        "--save_every", "0", "--save_model_only", "--learning_rate", "1e-5", "--phase_limit_s", "120", ranks=2,
        timeout_s=270,
    )  # fmt: skip
    seen = run_main.metrics(tmp_path / "run")
    assert [row["step"] for row in seen] == list(range(1, STEPS + 1))
    assert all(row["policy/skipped_updates"] == 0 for row in seen)
