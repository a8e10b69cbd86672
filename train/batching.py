"""Groups -> Batch -> mini-batches -> micro-batches, the same number on every rank. Pure functions, no collectives.

A micro-batch is one packed forward and backward. A group is never cut, except when it alone is over the token budget:
then its responses are dealt to several micro-batches and the prompt is computed again in each (the gradient is the
same, the work is not). Ranks call the model in step, so a rank that runs out of groups works on a dummy of two tokens
whose mask is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.records import Batch, Group, Prompt, Response, Sample
from train.flops import Shape, group_flops

DUMMY_ID = "dummy"


def build_batch(groups: list[Group]) -> Batch:
    """One rank's groups of a step as tensors on the host. Rows are group-major, R is the longest response.

    rollout_logprobs are 0 where unknown (demonstrations, padding). A reward part that a response lacks is 0. Raises
    ValueError if the groups differ in size, if there is none, or if log-probs do not line up with tokens.
    """
    if not groups:
        raise ValueError("a batch needs at least one group")
    sizes = {len(group.responses) for group in groups}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(f"all groups need the same number of responses, at least one; these have {sorted(sizes)}")
    responses = [response for group in groups for response in group.responses]
    longest = max(1, max(len(response.token_ids) for response in responses))
    mask = torch.zeros(len(responses), longest)
    logprobs = torch.zeros(len(responses), longest)
    for row, response in enumerate(responses):
        length = len(response.token_ids)
        mask[row, :length] = 1.0
        if response.rollout_logprobs:
            if len(response.rollout_logprobs) != length:
                raise ValueError(
                    f"response {row} has {length} tokens and {len(response.rollout_logprobs)} rollout log-probs"
                )
            logprobs[row, :length] = torch.tensor(response.rollout_logprobs)
    names = sorted({name for response in responses for name in response.reward_parts})
    return Batch(
        groups=groups,
        response_mask=mask,
        rewards=torch.tensor([response.reward for response in responses], dtype=torch.float32),
        rollout_logprobs=logprobs,
        is_demonstration=torch.tensor([response.is_demonstration for response in responses]),
        truncated=torch.tensor([response.finish_reason == "length" for response in responses]),
        reward_parts={
            name: torch.tensor([float(response.reward_parts.get(name, 0.0)) for response in responses])
            for name in names
        },
        problem_types=[group.prompt.sample.problem_type for group in groups for _ in group.responses],
    )


# ---- what a group costs -------------------------------------------------------------------------------------------


def packed_tokens(prompt_tokens: int, response_tokens: Sequence[int]) -> int:
    """Tokens one group puts into a micro-batch: P + sum R. P=10, R=[3, 5] -> 18."""
    return prompt_tokens + sum(response_tokens)


def group_lengths(group: Group) -> tuple[int, list[int]]:
    """(P, [R, ...]) of a group."""
    return len(group.prompt.input_ids), [len(response.token_ids) for response in group.responses]


def group_cost(group: Group, shape: Shape, *, tower: str = "trained") -> float:
    """FLOPs of one update pass over the group: products, quadratic attention, patches (train.flops.group_flops)."""
    prompt, responses = group_lengths(group)
    grids = group.prompt.grid_thw if group.prompt.patches is not None else ()
    return group_flops(shape, prompt, responses, grids, tower=tower)


def swaps_between_ranks(costs: Sequence[Sequence[float]], tolerance: float = 0.05) -> list[tuple[int, int, int, int]]:
    """Which groups should change places so that ranks take equally long: [(rank a, group i, rank b, group j), ...].

    costs[w][i]: cost of group i of rank w. Always a swap between the dearest and the cheapest rank, the one that helps
    most, until the dearest is within `tolerance` of the mean or no swap gains: ranks keep their number of groups, and
    few groups (and their videos) travel. Indices hold at the time of the swap, swaps in order.
    [[9, 8], [2, 1]] -> rank 0 gives 9 for 2: [[2, 8], [9, 1]].
    """
    held = [list(rank) for rank in costs]
    swaps: list[tuple[int, int, int, int]] = []
    mean = sum(map(sum, held)) / max(1, len(held))
    while True:
        sums = [sum(rank) for rank in held]
        high, low = int(np.argmax(sums)), int(np.argmin(sums))
        if sums[high] <= mean * (1 + tolerance):
            return swaps
        best = None
        for i, heavy in enumerate(held[high]):
            for j, light in enumerate(held[low]):
                worse = max(sums[high] - heavy + light, sums[low] + heavy - light)
                if best is None or worse < best[0]:
                    best = (worse, i, j)
        if best is None or best[0] >= sums[high] * (1 - 1e-9):
            return swaps
        _, i, j = best
        held[high][i], held[low][j] = held[low][j], held[high][i]
        swaps.append((high, i, low, j))


def swap_groups(groups: list[Group], swaps, rank: int, exchange: Callable) -> list[Group]:
    """Apply swaps_between_ranks on this rank: `exchange(peer, group) -> group` sends one group and gets one back."""
    groups = list(groups)
    for a, i, b, j in swaps:
        if rank == a:
            groups[i] = exchange(b, groups[i])
        elif rank == b:
            groups[j] = exchange(a, groups[j])
    return groups


# ---- mini-batches -------------------------------------------------------------------------------------------------


def mini_batches(n_groups: int, groups_per_update: int) -> list[list[int]]:
    """Indices of this rank's groups for each optimiser step, in order; every rank has to pass the same two numbers.

    (6, 2) -> [[0, 1], [2, 3], [4, 5]]. Raises ValueError if the groups do not divide evenly: an update with fewer
    groups than the others would weigh each of them more.
    """
    if groups_per_update < 1 or n_groups % groups_per_update:
        raise ValueError(
            f"{n_groups} groups per rank and step are not a multiple of {groups_per_update} per update; choose "
            "--prompts_per_step and --prompts_per_update so that they divide by each other and by the ranks"
        )
    return [list(range(start, start + groups_per_update)) for start in range(0, n_groups, groups_per_update)]


def groups_with_gradient(batch: Batch, indices: Sequence[int], *, other_terms: bool) -> list[int]:
    """Those of `indices` whose update is not exactly zero.

    A policy-gradient loss is a product with the advantage, so a group whose advantages are all exactly zero (all G
    rewards equal) contributes nothing and need not be computed. That holds only if no other term acts on its tokens:
    pass other_terms=True with KL in the loss, an entropy bonus, an imitation loss or a critic, and none is dropped. The
    loss denominator still counts the dropped groups' tokens: take it from the whole mini-batch's mask.
    """
    if other_terms:
        return list(indices)
    if batch.advantages is None:
        raise ValueError("advantages are not computed yet")
    group_size = len(batch.groups[0].responses)
    moving = (batch.advantages * batch.response_mask).view(len(batch.groups), group_size, -1).abs().amax(dim=(1, 2))
    # A NaN (unequal to 0) stays in: it has to reach the gradient norm, where the step is refused.
    return [index for index in indices if moving[index] != 0]


# ---- micro-batches ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class MicroBatch:
    """Groups of one packed forward, and the rows of the Batch that its output belongs to (none for a dummy)."""

    groups: list[Group]
    rows: Tensor  # (b,) long
    cost: float = 0.0

    @property
    def is_dummy(self) -> bool:
        return self.rows.numel() == 0

    def take(self, values: Tensor) -> Tensor:
        """(B, ...) of the Batch -> the rows of this micro-batch; (B, R) cut to its longest response.

        A dummy gets zeros of the shape of its own output, so its mask is zero and its loss too.
        """
        longest = max(1, max(len(response.token_ids) for group in self.groups for response in group.responses))
        if self.is_dummy:
            rows = sum(len(group.responses) for group in self.groups)
            return values.new_zeros((rows, longest) if values.ndim == 2 else (rows, *values.shape[1:]))
        taken = values[self.rows]
        return taken[:, :longest] if values.ndim == 2 else taken


def dummy_group() -> Group:
    """The smallest group there is: one prompt token, one response token, no media."""
    sample = Sample(DUMMY_ID, "", "", "open-ended", "text")
    prompt = Prompt(
        sample=sample,
        text="",
        vllm_prompt={},
        input_ids=np.zeros(1, dtype=np.int64),
        position_ids=np.zeros((3, 1), dtype=np.int64),
        mm_type_ids=np.zeros(1, dtype=np.uint8),
        patches=None,
        grid_thw=np.zeros((0, 3), dtype=np.int64),
    )
    return Group(prompt, [Response([0], [], "stop")])


def dummy_micro_batch() -> MicroBatch:
    """What a rank without groups computes while the others still have some."""
    return MicroBatch([dummy_group()], torch.zeros(0, dtype=torch.long))


def split_responses(prompt_tokens: int, response_tokens: Sequence[int], budget: int) -> list[int]:
    """Where to cut a group that is over the budget: first response of each piece, e.g. [0, 3].

    P=10, R=[4, 4, 4, 4], budget 20 -> [0, 2]: two pieces of 18 tokens. A response that does not fit even alone makes
    a piece by itself, over the budget.
    """
    starts = [0]
    for index in range(1, len(response_tokens)):
        piece = response_tokens[starts[-1] : index + 1]
        if packed_tokens(prompt_tokens, piece) > budget:
            starts.append(index)
    return starts


def fit(tokens: Sequence[int], budget: int) -> list[list[int]]:
    """First fit decreasing: indices per bin, every bin within the budget (an item over it gets a bin of its own).

    [5, 3, 4, 2, 2] under 8 -> [[0, 1], [2, 3, 4]].
    """
    bins: list[list[int]] = []
    sums: list[int] = []
    for index in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        for number, total in enumerate(sums):
            if total + tokens[index] <= budget:
                bins[number].append(index)
                sums[number] += tokens[index]
                break
        else:
            bins.append([index])
            sums.append(tokens[index])
    return bins


def spread(tokens: Sequence[int], costs: Sequence[float], count: int, budget: int) -> list[list[int]]:
    """Deal items to `count` bins of about equal cost, within the token budget; dearest bin first, empty bins last.

    Dearest item first, always to the cheapest bin that has room. Falls back to first fit decreasing if that order
    finds no room (then `count` has to be at least what fit() needs). Ranks that sort their bins alike meet in
    micro-steps of like cost.
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    load, filled = [0.0] * count, [0] * count
    for index in sorted(range(len(tokens)), key=lambda i: (-costs[i], i)):
        room = [n for n in range(count) if not bins[n] or filled[n] + tokens[index] <= budget]
        if not room:
            fitted = fit(tokens, budget)
            bins = fitted + [[] for _ in range(count - len(fitted))]
            break
        chosen = min(room, key=lambda n: (load[n], n))
        bins[chosen].append(index)
        load[chosen] += costs[index]
        filled[chosen] += tokens[index]
    return sorted((sorted(items) for items in bins), key=lambda items: -sum(costs[i] for i in items))


def micro_batches(
    batch: Batch,
    indices: Sequence[int],
    *,
    token_budget: int,
    cost: Callable[[Group], float],
    pack: bool = True,
    agree: Callable[[int], int] = lambda count: count,
) -> list[MicroBatch]:
    """Cut groups `indices` of this rank's batch into micro-batches, as many as every other rank has.

    cost: see group_cost. agree: the number of micro-batches a rank needs -> the largest over all ranks (a collective
    max; the identity on one rank). At least one micro-batch comes back, so that a step in which no rank has a gradient
    still runs as any other. pack=False cuts every group into its responses, each with the prompt and its media again: what
    trainers without groups compute, to compare with.
    """
    group_size = len(batch.groups[0].responses)
    pieces: list[MicroBatch] = []
    tokens: list[int] = []
    for index in indices:
        group = batch.groups[index]
        prompt, lengths = group_lengths(group)
        starts = split_responses(prompt, lengths, token_budget) if pack else list(range(len(lengths)))
        for start, end in zip(starts, [*starts[1:], len(lengths)]):
            part = group if len(starts) == 1 else Group(group.prompt, group.responses[start:end])
            rows = torch.arange(index * group_size + start, index * group_size + end)
            pieces.append(MicroBatch([part], rows, cost(part)))
            tokens.append(packed_tokens(prompt, lengths[start:end]))
    count = max(1, agree(len(fit(tokens, token_budget))))
    costs = [piece.cost for piece in pieces]
    result = []
    for items in spread(tokens, costs, count, token_budget):
        if not items:
            result.append(dummy_micro_batch())
            continue
        groups = [group for item in items for group in pieces[item].groups]
        rows = torch.cat([pieces[item].rows for item in items])
        result.append(MicroBatch(groups, rows, sum(costs[item] for item in items)))
    return result
