"""train/batching.py against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.records import Group, Prompt, Response, Sample
from train.batching import (
    build_batch,
    dummy_micro_batch,
    fit,
    group_cost,
    groups_with_gradient,
    micro_batches,
    mini_batches,
    packed_tokens,
    split_responses,
    spread,
    swap_groups,
    swaps_between_ranks,
)
from train.flops import Shape


def make_group(prompt_tokens: int, lengths: list[int], rewards=None, **fields) -> Group:
    sample = Sample(f"s{prompt_tokens}", "q", "a", "numerical", "text")
    prompt = Prompt(
        sample,
        "",
        {},
        np.arange(prompt_tokens),
        np.zeros((3, prompt_tokens), dtype=np.int64),
        np.zeros(prompt_tokens, dtype=np.uint8),
        fields.get("patches"),
        fields.get("grid_thw", np.zeros((0, 3), dtype=np.int64)),
    )
    rewards = rewards or [0.0] * len(lengths)
    responses = [
        Response(list(range(n)), [-0.5 * (i + 1)] * n, "stop", reward=reward)
        for i, (n, reward) in enumerate(zip(lengths, rewards))
    ]
    return Group(prompt, responses)


def test_build_batch_lines_everything_up():
    first, second = make_group(3, [2, 4], [1.0, 0.25]), make_group(5, [1, 3], [0.0, 0.5])
    first.responses[1].finish_reason = "length"
    second.responses[0].is_demonstration = True
    second.responses[0].rollout_logprobs = []
    second.responses[1].reward_parts = {"accuracy": 0.5}
    batch = build_batch([first, second])
    assert batch.response_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert batch.rollout_logprobs.tolist() == [[-0.5, -0.5, 0, 0], [-1.0] * 4, [0.0] * 4, [-1.0, -1.0, -1.0, 0]]
    assert batch.rewards.tolist() == [1.0, 0.25, 0.0, 0.5]
    assert batch.truncated.tolist() == [False, True, False, False]
    assert batch.is_demonstration.tolist() == [False, False, True, False]
    assert batch.reward_parts["accuracy"].tolist() == [0.0, 0.0, 0.0, 0.5]
    assert batch.problem_types == ["numerical"] * 4


def test_build_batch_refuses_what_does_not_line_up():
    with pytest.raises(ValueError, match=r"these have \[1, 2\]"):
        build_batch([make_group(3, [2, 4]), make_group(3, [2])])
    with pytest.raises(ValueError, match="at least one group"):
        build_batch([])
    group = make_group(3, [2, 4])
    group.responses[1].rollout_logprobs.pop()
    with pytest.raises(ValueError, match="response 1 has 4 tokens and 3 rollout log-probs"):
        build_batch([group])


def test_packed_tokens():
    assert packed_tokens(10, [3, 5]) == 18


def test_cost_counts_attention_and_patches():
    # One layer, hidden 2, one head of 2, no MLP to speak of: every term by hand.
    shape = Shape(
        family="qwen3_vl", hidden=2, intermediate=0, heads=1, kv_heads=1, head_dim=2, full_layers=1, linear_layers=0,
        vocabulary=10, tied=False, q_outputs=2, linear_key_heads=0, linear_value_heads=0, linear_key_dim=0,
        linear_value_dim=0, linear_kernel=0, vision_hidden=2, vision_intermediate=0, vision_mlp_products=2,
        vision_depth=1, vision_outputs=2, vision_mergers=1, vision_full_layers=1, vision_window=0, patch=1, merge=1,
        temporal_patch=1, channels=1,
    )  # fmt: skip
    text = group_cost(make_group(3, [2, 1]), shape)
    # 16 weights x 2 x 6 tokens; 4 x 2 x 19 pairs; logits 2 x 3 x 2 x 10; three passes
    assert text == 3 * (192 + 152 + 120)
    with_image = make_group(3, [2, 1], patches=np.zeros((6, 1), dtype=np.uint8), grid_thw=np.array([[1, 2, 3]]))
    # 6 patches: embed 2 + attention 16 weights; merger 4 + 4 weights; 4 x 2 x 36 pairs
    assert group_cost(with_image, shape) == text + 3 * (2 * 6 * 18 + 2 * 6 * 8 + 8 * 36)
    assert group_cost(with_image, shape, tower="cached") == text


def test_first_fit_decreasing():
    assert fit([5, 3, 4, 2, 2], 8) == [[0, 1], [2, 3, 4]]
    assert fit([9, 3], 8) == [[0], [1]]  # an item over the budget stands alone
    assert fit([], 8) == []


def test_spread_balances_cost_under_the_budget():
    # Costs 7, 5, 4, 4: 7 -> bin 0; 5 -> bin 1; 4 -> bin 1 (5 < 7); 4 -> bin 0: 11 and 9.
    assert spread([1, 1, 1, 1], [7, 5, 4, 4], 2, 10) == [[0, 3], [1, 2]]
    # The same with room for only two tokens per bin and the second item two tokens long: 4s cannot join it.
    assert spread([1, 2, 1, 1], [7, 5, 4, 4], 3, 2) == [[2, 3], [0], [1]]
    assert spread([1], [1.0], 3, 2) == [[0], [], []]


def test_spread_falls_back_when_dearest_first_leaves_no_room():
    # Budget 6: only {3, 3} and {2, 2, 2} fit. Dearest first: 3 | 2, then 3 beside the 2; the last 2 has no room.
    assert spread([3, 3, 2, 2, 2], [10.0, 8.0, 9.0, 1.0, 1.0], 2, 6) == [[0, 1], [2, 3, 4]]


def test_split_responses_only_over_the_budget():
    assert split_responses(10, [4, 4, 4, 4], 26) == [0]
    assert split_responses(10, [4, 4, 4, 4], 20) == [0, 2]
    assert split_responses(10, [4, 20, 4], 20) == [0, 1, 2]


def test_micro_batches_cover_every_row_once_and_agree_with_other_ranks():
    groups = [make_group(10, [2, 3]), make_group(4, [1, 1]), make_group(6, [5, 2]), make_group(30, [8, 9])]
    batch = build_batch(groups)
    # Tokens 15, 6, 13, and 47 > 40: split into 38 and 39. First fit under 40: 39 | 38 | 15 + 13 + 6.
    cut = micro_batches(batch, [0, 1, 2, 3], token_budget=40, cost=lambda g: float(len(g.prompt.input_ids)))
    assert [sorted(m.rows.tolist()) for m in cut] == [[6], [7], [0, 1, 2, 3, 4, 5]]
    assert [len(m.groups) for m in cut] == [1, 1, 3]
    assert cut[0].groups[0].prompt is groups[3].prompt
    padded = micro_batches(
        batch, [0, 1], token_budget=40, cost=lambda g: float(len(g.prompt.input_ids)), agree=lambda n: max(n, 3)
    )
    assert [sorted(m.rows.tolist()) for m in padded] == [[0, 1], [2, 3], []]
    assert [m.is_dummy for m in padded] == [False, False, True]
    nothing = micro_batches(batch, [], token_budget=40, cost=lambda g: 1.0)
    assert len(nothing) == 1 and nothing[0].is_dummy


def test_without_packing_every_response_has_its_prompt_to_itself():
    groups = [make_group(10, [2, 3]), make_group(4, [1, 1]), make_group(6, [5, 2])]
    # Tokens 12, 13, 5, 5, 11, 8 (54 instead of 34): three micro-batches of at most 25.
    cut = micro_batches(
        build_batch(groups), [0, 1, 2], token_budget=25, cost=lambda g: float(len(g.prompt.input_ids)), pack=False
    )
    assert sorted(row for m in cut for row in m.rows.tolist()) == [0, 1, 2, 3, 4, 5]
    assert len(cut) == 3 and all(len(g.responses) == 1 for m in cut for g in m.groups)
    for micro in cut:
        for group, row in zip(micro.groups, micro.rows.tolist()):
            assert group.prompt is groups[row // 2].prompt and group.responses[0] is groups[row // 2].responses[row % 2]
        assert sum(len(g.prompt.input_ids) + len(g.responses[0].token_ids) for g in micro.groups) <= 25


def test_rows_follow_the_groups_of_a_micro_batch():
    batch = build_batch([make_group(10, [2, 3]), make_group(4, [1, 7])])
    (micro,) = micro_batches(batch, [1, 0], token_budget=100, cost=lambda g: float(len(g.prompt.input_ids)))
    lengths = [len(r.token_ids) for g in micro.groups for r in g.responses]
    assert micro.take(batch.response_mask).sum(dim=1).tolist() == lengths
    assert micro.take(batch.response_mask).shape == (4, 7)
    assert micro.take(batch.rewards).shape == (4,)


def test_dummy_takes_zeros_of_its_own_shape():
    dummy = dummy_micro_batch()
    assert dummy.take(torch.ones(5, 9)).tolist() == [[0.0]]
    assert dummy.take(torch.ones(5)).tolist() == [0.0]


def test_zero_advantage_groups_are_dropped_only_where_exact():
    batch = build_batch([make_group(3, [2, 1]), make_group(3, [1, 2]), make_group(3, [2, 2])])
    batch.advantages = torch.zeros(6, 2)
    batch.advantages[3, 1] = -0.3
    batch.advantages[1, 1] = 5.0  # past the end of a response: no token there
    assert groups_with_gradient(batch, [0, 1, 2], other_terms=False) == [1]
    assert groups_with_gradient(batch, [0, 2], other_terms=False) == []
    assert groups_with_gradient(batch, [0, 2], other_terms=True) == [0, 2]
    batch.advantages[4, 0] = float("nan")
    assert groups_with_gradient(batch, [0, 1, 2], other_terms=False) == [1, 2]


def test_mini_batches():
    assert mini_batches(6, 2) == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="6 groups per rank and step are not a multiple of 4"):
        mini_batches(6, 4)


def test_swaps_bring_ranks_together():
    assert swaps_between_ranks([[9, 8], [2, 1]]) == [(0, 0, 1, 0)]  # 2 + 8 and 9 + 1: both 10
    assert swaps_between_ranks([[5, 5], [5, 5.2]]) == []  # within 5 %
    assert swaps_between_ranks([[10], [1]]) == []  # swapping one for one only mirrors it
    held = [["a9", "a8"], ["b2", "b1"]]
    swaps = swaps_between_ranks([[9, 8], [2, 1]])
    assert swap_groups(held[0], swaps, 0, lambda peer, group: held[1][0]) == ["b2", "a8"]
    assert swap_groups(held[1], swaps, 1, lambda peer, group: held[0][0]) == ["a9", "b1"]
