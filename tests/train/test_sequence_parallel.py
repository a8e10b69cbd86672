"""Sequences cut over ranks: the arithmetic by hand, and real gloo ranks against one rank that does it all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from tests.run_ranks import run_ranks
from tests.tiny_models import tiny_model
from tests.train import run_main
from train.group_attention import Layout, Packed
from train.sequence_parallel import (
    SequenceSet,
    check_model,
    head_problem,
    in_turn,
    repeats,
    share_groups,
    share_of_grids,
    take_slice,
)

PROGRAM = Path(__file__).with_name("sequence_run.py")


def test_heads_by_hand():
    assert head_problem(32, 8, 8) is None and repeats(8, 8) == 1
    assert head_problem(32, 8, 16) is None and repeats(8, 16) == 2  # 16 key / value heads for 32 query heads
    assert head_problem(28, 4, 7) is None and repeats(4, 7) == 7  # each of the four for all seven ranks
    assert "must divide the 28 attention heads" in head_problem(28, 4, 8)
    assert "repeated to 12, do not divide the 18" in head_problem(18, 4, 6)


def test_models_that_cannot_be_cut_are_refused():
    tiny = {family: AutoConfig.from_pretrained(tiny_model(family)) for family in ("qwen2_5_vl", "qwen3_5")}
    check_model(tiny["qwen3_5"], 1)
    check_model(tiny["qwen2_5_vl"], 4)  # 4 heads, 2 key / value heads
    with pytest.raises(ValueError, match="--sequence_parallel 3 must divide the 4 attention heads"):
        check_model(tiny["qwen2_5_vl"], 3)
    with pytest.raises(ValueError, match="linear-attention layers of qwen3_5"):
        check_model(tiny["qwen3_5"], 2)


def test_clips_are_cut_along_time():
    # 5 temporal patches of 2 x 2: three and two; the middle of the third lies at 10 of 20 patches, on the second half's edge
    (first, count), (second, rest) = share_of_grids(np.array([[5, 2, 2]]), 2)
    assert (first.tolist(), count) == ([[2, 2, 2]], 8) and (second.tolist(), rest) == ([[3, 2, 2]], 12)
    # a picture of 16 patches and a clip of 4 x 4: the cut lies inside the clip
    shares = share_of_grids(np.array([[1, 4, 4], [4, 2, 2]]), 2)
    assert [(grids.tolist(), count) for grids, count in shares] == [([[1, 4, 4]], 16), ([[4, 2, 2]], 16)]
    shares = share_of_grids(np.array([[6, 2, 2], [2, 2, 4]]), 4)
    assert [(grids.tolist(), count) for grids, count in shares] == [
        ([[2, 2, 2]], 8), ([[3, 2, 2]], 12), ([[1, 2, 2], [1, 2, 4]], 12), ([[1, 2, 4]], 8),
    ]  # fmt: skip
    # one picture over three ranks: two have nothing
    assert [count for _, count in share_of_grids(np.array([[1, 4, 4]]), 3)] == [0, 16, 0]


def test_a_slice_by_hand():
    """Seven tokens over three ranks: slices of three, the last with one token and two of padding."""
    packed = Packed(
        layout=Layout([], 5, 7, "sdpa"), input_ids=torch.arange(10, 17), position_ids=torch.arange(7).repeat(3, 1),
        visual_positions=torch.tensor([1, 3]), predictors=torch.tensor([4, 5, 4]), targets=torch.tensor([15, 16, 99]),
        rows=torch.zeros(3), columns=torch.zeros(3), shape=(2, 2), patches=None, grid_thw=np.zeros((0, 3)),
    )  # fmt: skip
    slices = [take_slice(packed, SequenceSet(None, None, rank, 3)) for rank in range(3)]
    assert [part.packed.input_ids.tolist() for part in slices] == [[10, 11, 12], [13, 14, 15], [16, 0, 0]]
    assert [part.packed.position_ids[2].tolist() for part in slices] == [[0, 1, 2], [3, 4, 5], [6, 0, 0]]
    assert [(p.visual_rows.tolist(), p.packed.visual_positions.tolist()) for p in slices] == [
        ([0], [1]),
        ([1], [0]),
        ([], []),
    ]
    assert [part.own.tolist() for part in slices] == [[], [0, 1, 2], []]
    assert slices[1].packed.predictors.tolist() == [1, 2, 1] and slices[1].packed.targets.tolist() == [15, 16, 99]


def test_one_rank_or_one_engine_keeps_its_groups():
    @dataclass
    class Collected:
        groups: list

    collected = Collected([1, 2])
    assert share_groups(collected, 1) is collected


def test_shared_groups_come_in_the_order_of_the_prompts():
    """Replica r of W takes prompts r, r + W ...: with two of four ranks in a set, the first update of four prompts trains on
    0 and 1 in one set and 2 and 3 in the other, as without sets."""
    assert in_turn([[0, 4], [1, 5]]) == [0, 1, 4, 5] and in_turn([[2, 6], [3, 7]]) == [2, 3, 6, 7]
    with pytest.raises(ValueError):
        in_turn([[0, 4], [1]])


def launch(ranks: int, out: Path, *families: str) -> dict:
    words = [word for family in families for word in (family, tiny_model(family))]
    run_ranks(PROGRAM, ranks, out, *words)
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("ranks,families", [(2, ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")), (4, ("qwen3_vl",))])
def test_equal_to_one_rank(tmp_path, ranks, families):
    """Log-probs, entropies and every parameter's gradient, summed over the ranks. Four ranks: two key / value heads repeated."""
    seen = launch(ranks, tmp_path / "seen.json", *families)
    assert seen.pop("critic") < 1e-5
    assert len(seen) == 5 * len(families)
    for name, result in seen.items():
        assert result["logprobs"] < 1e-5 and result["entropies"] < 1e-5 and result["frozen"] < 1e-5, name
        assert result["gradients"] <= 1e-5, (name, result["worst"])
        assert result["compared"] > 20 and result["silent"] == result["missing"] == [] and result["same_on_all"], name
        calls = {len(patches) for patches in result["tower"]}
        assert len(calls) == 1, name  # every rank calls the tower equally often
        first = [patches[0] for patches in result["tower"]]  # the last run: cut
        if name.endswith(("video", "mixed")):
            assert max(first) < 0.75 * sum(first), name  # the work is shared
    assert seen[f"{families[-1]}/video"]["tokens"] % ranks  # a slice with padding was among them


@pytest.mark.slow
def test_a_run_with_cut_sequences_equals_one_without(tmp_path):
    """train/main.py on two ranks: same groups sampled, same rewards and denominators, weights equal up to rounding."""
    playground = run_main.make_playground(tmp_path / "playground")
    flags = ("--max_steps", "1", "--check_parity", "--save_every", "0")
    runs = {size: tmp_path / f"cut{size}" for size in (1, 2)}
    for size, output in runs.items():
        run_main.run(playground, output, *flags, "--sequence_parallel", str(size))
    plain, cut = (run_main.metrics(output, reproducible=True) for output in runs.values())
    for one, other in zip(plain, cut):
        assert one.keys() == other.keys()
        for name in ("reward/mean", "tokens/prompt", "tokens/response", "advantages/std", "data/position"):
            assert other[name] == pytest.approx(one[name], rel=1e-6), name
        assert other["policy/grad_norm"] == pytest.approx(one["policy/grad_norm"], rel=1e-4)
        assert other["policy/entropy"] == pytest.approx(one["policy/entropy"], rel=1e-5)
        assert other["mismatch/max"] < 1e-4
    before = load_file(playground / "model" / "model.safetensors")
    one, other = (load_file(output / "final" / "model.safetensors") for output in runs.values())
    moved = sum((one[name] - before[name]).norm() ** 2 for name in before) ** 0.5
    apart = sum((other[name] - one[name]).norm() ** 2 for name in before) ** 0.5
    assert moved > 0 and apart < 0.02 * moved  # Adam's first steps turn rounding of tiny gradients into whole steps
