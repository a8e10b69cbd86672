"""scripts/bench_attention.py on a CPU: what it counts, and that its comparison notices a kernel that is wrong."""

from __future__ import annotations

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scripts import bench_attention
from scripts.bench_attention import check_group, check_tower, main
from train.flops import attended_positions
from train.group_attention import visible_ranges

CPU = torch.device("cpu")


def test_pairs_by_hand_and_by_the_mask():
    # Prompt of 3: 1 + 2 + 3; responses of 2 and 1: 2 x 3 + (1 + 2), 1 x 3 + 1.
    assert attended_positions(3, [2, 1]) == 6 + 9 + 4
    first, end, own = visible_ranges(bench_attention.make_layout(70, [9, 1, 33], "sdpa")).long().numpy()
    assert attended_positions(70, [9, 1, 33]) == int((end - first).sum() + (np.arange(113) + 1 - own).sum())


def test_the_comparison_finds_what_is_wrong(monkeypatch):
    right = check_group(["sdpa"], (4, 2, 16), 30, [5, 3, 40], CPU, torch.float32)["sdpa"]
    assert max(right) < 2e-6

    def causal(q, k, v, layout, scaling):  # responses see each other
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)

    monkeypatch.setitem(bench_attention._KERNELS, "sdpa", causal)
    wrong = check_group(["sdpa"], (4, 2, 16), 30, [5, 3, 40], CPU, torch.float32)["sdpa"]
    assert len(wrong) == 4 and min(wrong) > 0.05


def test_frames_see_themselves_alone(monkeypatch):
    def by_frame(module, q, k, v, mask, scaling, *, frames=None, **given):
        size = frames or given["max_length_q"]
        parts = (
            F.scaled_dot_product_attention(*each, scale=scaling) for each in zip(*(x.split(size, 2) for x in (q, k, v)))
        )
        return torch.cat(list(parts), dim=2).transpose(1, 2), None

    monkeypatch.setitem(bench_attention.TOWERS, "varlen", by_frame)
    monkeypatch.setitem(bench_attention.TOWERS, "cudnn", lambda *given, **named: by_frame(*given, frames=48, **named))
    far = check_tower(["varlen", "cudnn"], (2, 16, 24), 4, CPU, torch.float32)
    assert max(far["varlen"]) < 2e-6 and min(far["cudnn"]) > 0.05


def test_the_program_prints_and_writes_its_rows(tmp_path, capsys):
    rows = main(["--rounds", "1", "--repeats", "1", "--out", str(tmp_path / "rows.json")])
    assert [(row["shape"], row["where"], row["backend"]) for row in rows] == [("tiny", "group", "sdpa")]
    flops = 4 * 16 * 4 * attended_positions(300, [20] * 8)
    assert np.isclose(rows[0]["forward_tflops"] * rows[0]["forward_ms"] * 1e9, flops)
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows
    assert "from fp32: out, dq, dk, dv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--prompt_tokens", "0"], "--prompt_tokens must be 1 or more, got 0"),
        (["--rounds", "0"], "--rounds must be 1 or more, got 0"),
        (["--check_tokens", "3"], "--check_tokens must be 4 or more, got 3"),
        (["--attention", "flex"], "--attention flex has no backward pass on a CPU; use --attention sdpa"),
        (["--attention", "sdpa", "varlen"], "--attention varlen needs CUDA; on a CPU use --attention sdpa"),
        (["--out", "no_such/rows.json"], "--out no_such/rows.json: there is no folder no_such; make it first"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(words, told, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(words)
    said = capsys.readouterr()
    assert said.err.endswith(f"error: {told}\n") and not said.out


def test_cudnn_is_not_timed_where_training_takes_flex(monkeypatch):
    monkeypatch.setattr("train.group_attention.has_cudnn", lambda: True)
    sizes = dict.fromkeys(("response_tokens", "group_size", "frames", "rounds", "repeats"), 1)
    for prompt, check, told in ((1023, 2000, "1023"), (16765, 100, "100"), (1024, 1024, "")):
        args = Namespace(**sizes, prompt_tokens=prompt, check_tokens=check, attention=["cudnn"], out=None)
        why = bench_attention.why_not(args, torch.device("cuda"), torch.bfloat16)
        assert (
            why.startswith(f"--attention cudnn takes flex for prompts below 1024 tokens, got {told}")
            if told
            else not why
        )
