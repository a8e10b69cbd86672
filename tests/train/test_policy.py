"""Policy on ZeRO-3 (real DeepSpeed, gloo): against plain torch, one rank against two, and what a step must not do."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from data.normalise import read_normalisation
from data.records import Group
from tests.run_ranks import run_ranks
from tests.tiny_models import tiny_model
from tests.train.packed_cases import PromptMaker, float64_throughout, plain_row
from tests.train.policy_run import CASES
from train.batching import build_batch, micro_batches
from train.group_attention import pack
from train.losses import loss_denominator, reduce_loss
from train.packed_model import PackedModel
from train.policy import deepspeed_config, merge_configs, part_of, resolve_dtype, trained_groups

CPU = torch.device("cpu")
PROGRAM = Path(__file__).with_name("policy_run.py")
FREQUENCIES = Path(__file__).with_name("frequency_run.py")


def launch(ranks: int, folder: Path) -> dict:
    out = folder / f"seen{ranks}.json"
    run_ranks(PROGRAM, ranks, tiny_model("qwen3_vl"), out, timeout_s=240)
    return {**json.loads(out.read_text()), "weights": torch.load(str(out) + ".weights.pt")}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch(1, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(2, tmp_path_factory.mktemp("two"))


def plain_training() -> tuple[nn.Module, list[float]]:
    """The three updates of policy_run.py by torch alone: one row per response, full logits, torch's clipping and AdamW."""
    folder = tiny_model("qwen3_vl")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
    maker = PromptMaker(folder, model.config)
    cases = [maker.group(*case) for case in CASES]
    tokens = sum(len(r.token_ids) for g, _ in cases for r in g.responses)
    rates = {"tower": 0.4, "merger": 2.0, "rest": 1.0}
    groups = {(part, decay): [] for part in rates for decay in (0.1, 0.0)}
    for name, parameter in model.named_parameters():
        part = "rest" if "visual" not in name else "merger" if "merger" in name else "tower"
        groups[part, 0.1 if parameter.ndim > 1 else 0.0].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": p, "weight_decay": decay, "part": part} for (part, decay), p in groups.items() if p],
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-4,
    )
    norms = []
    for rate in (1e-3, 1e-3, 5e-4):
        for group in optimizer.param_groups:
            group["lr"] = rate * rates[group["part"]]
        for group, floats in cases:
            for response in group.responses:
                logprobs, _ = plain_row(model, group.prompt, floats, response.token_ids, [440, 441])
                (-(logprobs * (1 + torch.arange(len(logprobs)) / 10)).sum() / tokens).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return model, norms


def relative(got: dict, want: dict) -> float:
    """Largest change-free measure per tensor: norm of the difference over norm."""
    assert set(got) == set(want)
    return max(((got[n] - want[n]).norm() / want[n].norm().clamp_min(1e-12)).item() for n in want)


def test_updates_equal_plain_torch(one):
    model, norms = plain_training()
    assert [step["grad_norm"] for step in one["steps"]] == pytest.approx(norms, rel=2e-5)
    assert relative(one["weights"], {name: p.detach() for name, p in model.named_parameters()}) < 2e-5


@pytest.mark.slow
def test_two_ranks_equal_one(one, two):
    assert [s["grad_norm"] for s in two["steps"]] == pytest.approx([s["grad_norm"] for s in one["steps"]], rel=2e-5)
    assert relative(two["weights"], one["weights"]) < 2e-5
    assert two["parameter_count"] == one["parameter_count"]


@pytest.fixture(params=["one", pytest.param("two", marks=pytest.mark.slow)])
def run(request):
    return request.getfixturevalue(request.param)


def test_tensors_carry_checkpoint_names_and_values(run):
    assert len(run["names"]) == len(set(run["names"])) == run["names_in_file"]
    assert run["same_as_file"]
    assert "lm_head.weight" in run["names"] and "model.visual.merger.linear_fc1.weight" in run["names"]


def test_reference_starts_equal_and_stays(run):
    assert run["reference_gap"] < 1e-5
    assert run["reference_moved"] == 0.0 and run["policy_moved"] > 1e-2


def test_nonfinite_gradient_skips_on_every_rank_and_gives_up_after_two(run):
    assert run["nonfinite_0"]["skipped"] == 1.0 and run["nonfinite_0"]["nonfinite_steps"] == 1.0
    assert "2 optimiser steps in a row had gradients that are not finite" in run["nonfinite_1"]
    assert run["unchanged_after_skip"] and run["recovered_after_skip"]


def test_resume_is_bit_exact(run):
    assert run["resumed_same"]


def test_frozen_vision_runs_once_and_does_not_move(run):
    assert run["frozen_gap"] < 1e-5
    # one call without features, one per micro-batch in encode_frozen, none after
    assert run["tower_calls"] == [3, 3]
    assert run["frozen_vision_moved"] == 0 and run["language_moved"] > 10


def test_critic_starts_at_zero_and_learns(run):
    assert run["critic"][0] == 0.0
    assert run["critic"][-1] < 1.0


def test_rotary_frequencies_are_not_rounded_with_the_weights(tmp_path):
    """theta ** (-2 i / d): 32 values per head and theta 10,000 give 10 ** (-i / 4), a tower's 16 per axis 10 ** (-i / 2).

    zero.Init makes them bfloat16 (0.5625 and 0.3164062). With sharp attention that took the policy 2.4 times as far from
    fp32 as the library's own bf16 is; now it is equally far.
    """
    sharp = tmp_path / "sharp"
    plain = AutoModelForImageTextToText.from_pretrained(tiny_model("qwen2_5_vl"), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "language_model" in name and name.endswith("q_proj.weight"):
                parameter.mul_(8.0)
    shutil.copytree(tiny_model("qwen2_5_vl"), sharp)
    plain.save_pretrained(sharp)
    folders = [str(sharp), *(tiny_model(family) for family in ("qwen2_vl", "qwen3_vl", "qwen3_5"))]
    out = tmp_path / "out.json"
    run_ranks(FREQUENCIES, 1, out, *folders, timeout_s=240)
    for folder, seen in json.loads(out.read_text()).items():
        assert seen["dtypes"] == ["torch.float32"]
        assert seen["frequencies"]["visual.rotary_pos_emb.inv_freq"] == pytest.approx([1.0, 10**-0.5, 0.1], rel=1e-6)
        if "qwen3_5" not in folder:  # it rotates a part of a head only
            text = seen["frequencies"]["language_model.rotary_emb.inv_freq"]
            assert text == pytest.approx([1.0, 10**-0.25, 10**-0.5], rel=1e-6)
        assert seen["prompt_tokens"] > 1000 and seen["from_fp32"] < 1.05 * seen["library_from_fp32"] + 1e-4


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 5e-6), (torch.float64, 1e-12)])
def test_cutting_does_not_change_the_gradient(dtype, tolerance):
    """1, 2 and 5 micro-batches (the last splits a group's responses): the same gradient of the same loss."""
    folder = tiny_model("qwen3_vl")
    hf = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    maker = PromptMaker(folder, hf.config)
    model = PackedModel(hf, normalisation=read_normalisation(folder)).train()
    batch = build_batch([maker.group(*case)[0] for case in CASES])
    batch.advantages = torch.randn(8, 1, generator=torch.Generator().manual_seed(0)) * batch.response_mask
    args = argparse.Namespace(loss_length=0, max_response_tokens=16)
    denominator = loss_denominator(batch.response_mask, "sequence_mean", args)

    def gradient(cut) -> dict:
        model.zero_grad()
        for micro in cut:
            packed = pack(micro.groups, backend="sdpa", device=CPU)
            logprobs = packed.to_rows(model(packed)[0])
            per_token = -logprobs * micro.take(batch.advantages).to(dtype)
            mask = micro.take(batch.response_mask).to(dtype)
            reduce_loss(per_token, mask, reduction="sequence_mean", denominator=denominator).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    settings = {"batch": batch, "indices": range(4), "cost": lambda group: float(len(group.prompt.input_ids))}
    cuts = [
        micro_batches(**settings, token_budget=10_000),
        micro_batches(**settings, token_budget=10_000, agree=lambda needed: 2),
        micro_batches(**settings, token_budget=80),
    ]
    counts = [len(cut) for cut in cuts]
    with float64_throughout():
        gradients = [gradient(cut) for cut in cuts]
    assert counts[0] == 1 and counts[1] == 2 and counts[2] >= 5
    assert relative(gradients[1], gradients[0]) <= tolerance
    assert relative(gradients[2], gradients[0]) <= tolerance


def test_split_group_shares_its_prompt():
    folder = tiny_model("qwen3_vl")
    maker = PromptMaker(folder, AutoModelForImageTextToText.from_pretrained(folder).config)
    group, _ = maker.group("video", [5, 9, 4], 1)
    halves = [Group(group.prompt, group.responses[:1]), Group(group.prompt, group.responses[1:])]
    packed = pack(halves, backend="sdpa", device=CPU)
    assert len(packed.patches) == 2 * len(group.prompt.patches)  # the tower computes it again: documented cost
    assert packed.shape == (3, 9)


# ---- settings ---------------------------------------------------------------------------------------------------


def settings(**changes):
    values = {"max_grad_norm": 1.0, "optimizer": "adamw", "offload": "none", "deepspeed_config": None}
    return argparse.Namespace(**{**values, **changes})


def test_deepspeed_config_is_merged_deeply(tmp_path):
    user = tmp_path / "ds.json"
    user.write_text('{"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": true}')
    config = deepspeed_config(settings(deepspeed_config=str(user)), torch.float32, CPU)
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["stage"] == 3 and config["wall_clock_breakdown"] is True
    assert merge_configs({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}) == {"a": {"b": 3, "c": 2}, "d": 4}


@pytest.mark.parametrize(
    "text,message",
    [
        ('{"zero_optimization": {"stage": 2}}', "stage has to stay 3"),
        ('{"gradient_accumulation_steps": 4}', "gradient_accumulation_steps has to stay 1"),
        ('{\n"a": }', "ds.json:2: not JSON"),
    ],
)
def test_deepspeed_config_refuses_what_breaks_the_loop(tmp_path, text, message):
    user = tmp_path / "ds.json"
    user.write_text(text)
    with pytest.raises(ValueError, match=message):
        deepspeed_config(settings(deepspeed_config=str(user)), torch.float32, CPU)


def test_offload_and_low_precision_settings():
    config = deepspeed_config(settings(offload="all"), torch.bfloat16, CPU)["zero_optimization"]
    assert config["offload_optimizer"]["device"] == config["offload_param"]["device"] == "cpu"
    assert (
        "offload_param" not in deepspeed_config(settings(offload="optimizer"), torch.bfloat16, CPU)["zero_optimization"]
    )
    assert deepspeed_config(settings(), torch.bfloat16, CPU)["bf16"] == {"enabled": True}
    kahan = deepspeed_config(settings(optimizer="adamw_kahan"), torch.bfloat16, CPU)["bf16"]
    assert kahan["bf16_master_weights_and_grads"] is True


def test_what_gradients_are_summed_in(tmp_path):
    """fp32, also for settings made by hand without the flag; a file of the user's has the last word."""
    user = tmp_path / "ds.json"
    user.write_text('{"data_types": {"grad_accum_dtype": "fp32"}}')
    for changes, dtype in (
        ({}, "fp32"),
        ({"grad_accum_dtype": "bf16"}, "bf16"),
        ({"grad_accum_dtype": "bf16", "deepspeed_config": str(user)}, "fp32"),
    ):
        config = deepspeed_config(settings(**changes), torch.bfloat16, CPU)
        assert config["data_types"] == {"grad_accum_dtype": dtype}


def test_dtype():
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    with pytest.raises(ValueError, match="'fp8' is not one of"):
        resolve_dtype("fp8", CPU)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_parts_and_freezing(family):
    model = AutoModelForImageTextToText.from_pretrained(tiny_model(family))
    names = [name for name, _ in model.named_parameters()]
    parts = {part: [n for n in names if part_of(n) == part] for part in ("tower", "merger", "language_model")}
    assert all(parts.values()) and sum(map(len, parts.values())) == len(names)
    assert all("merger" in name for name in parts["merger"]) and "lm_head.weight" in parts["language_model"]
    args = argparse.Namespace(
        weight_decay=0.1,
        freeze_vision_tower=True,
        freeze_merger=False,
        freeze_language_model=True,
        merger_learning_rate=3e-6,
    )
    groups = trained_groups(model, args, 1e-6)
    assert {group["part"] for group in groups} == {"merger"}
    assert all(group["lr"] == 3e-6 and group["lr_ratio"] == pytest.approx(3.0) for group in groups)
    assert sum(len(group["params"]) for group in groups) == len(parts["merger"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(parts["merger"])
    args.freeze_merger = True
    with pytest.raises(ValueError, match="nothing to train"):
        trained_groups(model, args, 1e-6)
