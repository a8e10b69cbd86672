"""Parameters that stay gathered (real DeepSpeed, gloo): every number is the one that module-by-module gathers give."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from scripts import plan_memory
from tests.run_ranks import run_ranks
from tests.tiny_models import tiny_model
from train.args import check_args, parse_args
from train.flops import read_shape
from train.plan import resident_lines
from train.resident import is_resident, obstacles

PROGRAM = Path(__file__).with_name("resident_run.py")


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2])
def seen(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("resident") / "seen.json"
    run_ranks(PROGRAM, request.param, tiny_model("qwen3_vl"), out)
    return {**json.loads(out.read_text()), "ranks": request.param}


def test_updates_logprobs_weights_and_checkpoints_are_equal_bit_for_bit(seen):
    assert seen["grad_norm"] > 1 and [seen["skipped/off"], seen["skipped/on"]] == [1.0, 1.0]
    assert all(seen["equal"].values()), seen["equal"]
    assert len(seen["equal"]) == 7


def test_without_nodes_in_the_hooks_place_sums_are_rounded_in_another_order_and_nothing_else(seen):
    # Of what two updates of fp32 weights changed: 2^-24 times the sum over the tokens of a few layers.
    assert 0 < seen["gap to the hooks, of the way"] < 1e-4
    assert seen["linear is torch's"]


def test_hooks_are_gone_from_policy_and_reference(seen):
    hooks = seen["hooks"]
    assert hooks["on"] == hooks["reference"] == 0
    assert hooks["off"] > 300


def test_whole_weights_lie_beside_the_shards_but_on_one_rank_where_they_are_the_shard(seen):
    assert seen["beside the shard"] == {1: 0.0, 2: 1.0}[seen["ranks"]]


def test_the_plan_says_what_they_take():
    args = argparse.Namespace(resident_parameters="on")
    (line,) = resident_lines(args, 3 * 2**29, world_size=2)  # 1.6e9 parameters of 2 bytes
    assert "3.00 GiB more on every rank" in line
    args.resident_parameters = "auto"
    assert resident_lines(args, 3 * 2**29, world_size=2) == []
    (line,) = resident_lines(args, 3 * 2**29, world_size=1)
    assert "nothing more" in line


def test_memory_planning_counts_the_whole_weights_once_more_and_nothing_on_one_gpu():
    words = ["--size", "8b", "--resident_parameters", "on"]
    plan = {n: plan_memory.flags().parse_args([*words, "--gpus", str(n)]) for n in (1, 8)}
    shape, n = read_shape(plan_memory.SIZES["8b"]), 8_763_699_200
    update = plan_memory.make_plan(shape, plan[8], 128).update
    assert update["resident weights (bf16, whole)"] == 2 * n and update["weights (bf16 shard)"] == 2 * n / 8
    assert plan_memory.make_plan(shape, plan[8], 128).rollout["resident weights (bf16, whole)"] == 2 * n
    assert plan_memory.make_plan(shape, plan[1], 128).update["resident weights (bf16, whole)"] == 0
    assert "gathered layers and embedding" not in update


def config(**zero) -> dict:
    return {"zero_optimization": {"stage": 3, **zero}}


def test_auto_is_one_rank_without_anything_that_speaks_against_it():
    assert [is_resident("auto", config(), ranks) for ranks in (1, 2, 8)] == [True, False, False]
    assert [is_resident("on", config(), 8), is_resident("off", config(), 1)] == [True, False]
    assert is_resident("auto", config(offload_optimizer={"device": "cpu"}), 1)
    assert not is_resident("auto", config(offload_param={"device": "cpu"}), 1)
    with pytest.raises(ValueError, match="'yes'"):
        is_resident("yes", config(), 1)


@pytest.mark.parametrize(
    "settings,word",
    [
        (config(offload_param={"device": "cpu"}), "--offload all"),
        (config(zero_hpz_partition_size=2), "--hpz_partition_size"),
        (config(zero_quantized_weights=True), "zero_quantized_weights"),
        (config(zenflow={"topk_ratio": 0.1}), "ZenFlow"),
        ({**config(), "compile": {"deepcompile": True}}, "DeepCompile"),
        ({**config(), "flops_profiler": {"enabled": True}}, "flops_profiler"),
        ({**config(), "wall_clock_breakdown": True}, "wall_clock_breakdown"),
    ],
)
def test_what_cannot_go_with_it_is_named(settings, word):
    assert len(obstacles(settings)) == 1
    with pytest.raises(ValueError, match=f"--resident_parameters on: .*{word}"):
        is_resident("on", settings, 2)


def test_flags_that_cannot_go_together_are_refused_at_the_start(tmp_path):
    words = ["--model", str(tmp_path), "--data", "x.jsonl", "--prompts_per_step", "4"]
    args = parse_args([*words, "--resident_parameters", "on"])
    assert not check_args(args, world_size=2)
    for flag, value in (("offload", "all"), ("hpz_partition_size", 2)):
        args = parse_args([*words, "--resident_parameters", "on"])
        setattr(args, flag, value)
        problems = check_args(args, world_size=2)
        assert len(problems) == 1 and f"--{flag} {value}" in problems[0] and "--resident_parameters on" in problems[0]
