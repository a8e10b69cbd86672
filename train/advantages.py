"""Advantage estimators: ADVANTAGES[name](batch, args) -> (advantages (B, R), returns (B, R)).

Rows are group-major, so group statistics are `rewards.view(N, G)` and need no communication: a group stays whole on one
replica. Statistics over the whole batch (std of the batch, whitening, running scale per task) go through
`all_reduce_sum(tensor) -> tensor`, summed over the data-parallel replicas, so that no result depends on how groups lie
on ranks. `state` carries what lives longer than a step. All statistics are taken in float64.

Equal rewards give exactly 0: a group whose rewards differ by no more than EQUAL_REWARDS has no signal, only rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import comb
from typing import Any

import torch
from torch import Tensor

from data.records import PROBLEM_TYPES, Batch, canonical_problem_type
from train.algorithm_flags import parse_weights
from train.losses import KL_ESTIMATORS

EQUAL_REWARDS = 1e-6  # float32 sums of the same parts in another order differ by about 1e-7


def this_rank_alone(values: Tensor) -> Tensor:
    """The `all_reduce_sum` of a run with one replica."""
    return values


@dataclass
class AlgorithmState:
    """What an algorithm remembers between steps; part of every checkpoint.

    `kl_coef` is the KL coefficient now (it moves under --kl_control adaptive: `kl_adapts`); `reward_moments` maps a
    problem type to the running (mean, mean of squares) of its rewards, used by ema_grpo.
    """

    kl_coef: float = 0.0
    reward_moments: dict[str, tuple[float, float]] = field(default_factory=dict)
    kl_adapts: bool = False

    @classmethod
    def start(cls, args) -> AlgorithmState:
        return cls(kl_coef=args.kl_coef, kl_adapts=args.kl_control == "adaptive")

    def update_kl(self, mean_kl: float, sequences: int, args) -> None:
        """Adaptive controller of Ziegler et al. 2019 (arXiv 1909.08593), once per step.

        beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * sequences / horizon). `mean_kl` is the mean per token
        over the step on all ranks, `sequences` the step's rows on all ranks. Does nothing under --kl_control fixed.
        Raises ValueError for a KL that is not finite: the coefficient would be lost for good.
        """
        if args.kl_control != "adaptive":
            return
        if mean_kl != mean_kl or abs(mean_kl) == float("inf"):
            raise ValueError(f"the mean KL of this step is {mean_kl}; the adaptive KL coefficient cannot be updated")
        error = min(max(mean_kl / args.kl_target - 1.0, -0.2), 0.2)
        self.kl_coef *= 1.0 + error * sequences / args.kl_horizon

    def state_dict(self) -> dict[str, Any]:
        moments = {name: list(pair) for name, pair in self.reward_moments.items()}
        return {"kl_coef": self.kl_coef, "kl_adapts": self.kl_adapts, "reward_moments": moments}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The coefficient comes back only where it adapts, before and now: a fixed one is what --kl_coef says."""
        if self.kl_adapts and saved["kl_adapts"]:
            self.kl_coef = float(saved["kl_coef"])
        self.reward_moments = {task: (float(m1), float(m2)) for task, (m1, m2) in saved["reward_moments"].items()}


# ---- rewards as the estimators see them ---------------------------------------------------------------------------


def _finite(values: Tensor, name: str, batch: Batch) -> Tensor:
    """float64 copy. Raises ValueError naming the first row whose value is NaN or infinite."""
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        row = int(bad[0][0])
        size = max(1, len(values) // max(1, len(batch.groups)))
        sample = f" (sample {batch.groups[row // size].prompt.sample.id})" if batch.groups else ""
        raise ValueError(f"{name} of row {row}{sample} is {values[tuple(bad[0])].item()}; it must be a finite number")
    return values.double()


def kl_penalty(batch: Batch, args, state: AlgorithmState | None) -> Tensor | None:
    """(B, R) float64 penalty beta * kl_t to subtract from token rewards, or None when the KL is not in the reward."""
    if args.kl_in != "reward":
        return None
    if batch.old_logprobs is None or batch.ref_logprobs is None:
        raise ValueError("--kl_in reward needs batch.old_logprobs and batch.ref_logprobs before the advantages")
    coefficient = args.kl_coef if state is None else state.kl_coef
    kl = KL_ESTIMATORS[args.kl_estimator](batch.old_logprobs.double(), batch.ref_logprobs.double())
    return coefficient * _finite(torch.where(batch.response_mask > 0, kl, 0.0), "KL", batch)


def sequence_rewards(batch: Batch, args, state: AlgorithmState | None = None) -> Tensor:
    """(B,) float64: the reward of each response, less beta * sum_t kl_t when the KL is in the reward."""
    rewards = _finite(batch.rewards, "reward", batch)
    penalty = kl_penalty(batch, args, state)
    return rewards if penalty is None else rewards - penalty.sum(dim=1)


def token_rewards(batch: Batch, args, state: AlgorithmState | None = None) -> Tensor:
    """(B, R) float64: the reward on the last response token, less beta * kl_t on every token."""
    mask = batch.response_mask
    rewards = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask > 0, positions, -1).amax(dim=1)  # (B,)
    rows = (last >= 0).nonzero().squeeze(1)
    rewards[rows, last[rows]] = _finite(batch.rewards, "reward", batch)[rows]
    penalty = kl_penalty(batch, args, state)
    return rewards if penalty is None else rewards - penalty


def _grouped(rewards: Tensor, args, smallest: int = 2) -> Tensor:
    """(B,) -> (N, G). Raises ValueError when G is too small for the estimator or does not divide B."""
    if args.group_size < smallest:
        raise ValueError(f"--group_size must be >= {smallest} for --advantage {args.advantage}, got {args.group_size}")
    if len(rewards) % args.group_size:
        raise ValueError(f"{len(rewards)} rows are no whole number of groups of --group_size {args.group_size}")
    return rewards.view(-1, args.group_size)


def _alive(grouped: Tensor) -> Tensor:
    """(N, 1) bool: the rewards of the group differ."""
    return grouped.amax(dim=1, keepdim=True) - grouped.amin(dim=1, keepdim=True) > EQUAL_REWARDS


def _over_tokens(per_row: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(N, G) or (B,) -> the same value on every response token, (B, R), as advantages and returns."""
    spread = per_row.reshape(-1, 1).to(batch.response_mask.dtype) * batch.response_mask
    return spread, spread


def _moments(
    values: Tensor, weight: Tensor, all_reduce_sum: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean and unbiased std of `values` over all ranks, and the total weight. Two passes: no cancellation."""
    total = all_reduce_sum(torch.stack([(values * weight).sum(), weight.sum()]))
    mean = total[0] / total[1].clamp(min=1.0)
    squares = all_reduce_sum((((values - mean) ** 2) * weight).sum().reshape(1))[0]
    return mean, (squares / (total[1] - 1.0).clamp(min=1.0)).sqrt(), total[1]


def _whiten(values: Tensor, weight: Tensor, args, all_reduce_sum) -> Tensor:
    """(values - mean) / (std + eps) over all ranks; all zero when nothing differs."""
    mean, std, _ = _moments(values, weight, all_reduce_sum)
    return torch.where(std > EQUAL_REWARDS, (values - mean) / (std + args.advantage_eps), torch.zeros_like(values))


def _scaled(centred: Tensor, grouped: Tensor, args, all_reduce_sum) -> Tensor:
    """(N, G) centred values over the std of their group, of the batch, or as they are (--advantage_std)."""
    if args.advantage_std == "group":
        centred = centred / (grouped.std(dim=1, keepdim=True) + args.advantage_eps)
    elif args.advantage_std == "batch":
        std = _moments(grouped, torch.ones_like(grouped), all_reduce_sum)[1]
        centred = centred / (std + args.advantage_eps)
    return torch.where(_alive(grouped), centred, torch.zeros_like(centred))


# ---- estimators ---------------------------------------------------------------------------------------------------


def group_norm(batch: Batch, args, *, all_reduce_sum=this_rank_alone, state=None) -> tuple[Tensor, Tensor]:
    """GRPO (arXiv 2402.03300, section 4.1.2): each reward against its own group, in units of the group's spread.

    A_i = (r_i - mean_g) / (std_g + eps), unbiased std: rewards [[1, 0, 0, 1]] -> [[0.87, -0.87, -0.87, 0.87]], the
    same on every response token -> (B, R). --advantage_std batch divides by the std of all rewards of the step instead
    (Lite PPO, arXiv 2508.08221), none by nothing (Dr. GRPO). Raises ValueError for a group of one.
    """
    grouped = _grouped(sequence_rewards(batch, args, state), args)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    return _over_tokens(_scaled(centred, grouped, args, all_reduce_sum), batch)


def mean_only(batch: Batch, args, *, all_reduce_sum=this_rank_alone, state=None) -> tuple[Tensor, Tensor]:
    """Dr. GRPO (arXiv 2503.20783, section 3.2): A_i = r_i - mean_g. Questions of every difficulty weigh alike."""
    grouped = _grouped(sequence_rewards(batch, args, state), args)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    return _over_tokens(torch.where(_alive(grouped), centred, torch.zeros_like(centred)), batch)


def leave_one_out(batch: Batch, args, *, all_reduce_sum=this_rank_alone, state=None) -> tuple[Tensor, Tensor]:
    """RLOO (arXiv 2402.14740): A_i = r_i - mean of the other G - 1 rewards = G / (G - 1) * (r_i - mean_g)."""
    grouped = _grouped(sequence_rewards(batch, args, state), args)
    others = (grouped.sum(dim=1, keepdim=True) - grouped) / (args.group_size - 1)
    return _over_tokens(torch.where(_alive(grouped), grouped - others, torch.zeros_like(grouped)), batch)


def greedy_baseline(batch: Batch, args, *, all_reduce_sum=this_rank_alone, state=None) -> tuple[Tensor, Tensor]:
    """ReMax (arXiv 2310.10505): A_i = r_i - reward of the greedy response to the same prompt.

    Works with a group of one. Raises ValueError without batch.baseline_rewards (N,), which collect() fills.
    """
    grouped = _grouped(sequence_rewards(batch, args, state), args, smallest=1)
    if batch.baseline_rewards is None or len(batch.baseline_rewards) != len(grouped):
        got = None if batch.baseline_rewards is None else len(batch.baseline_rewards)
        raise ValueError(f"--advantage remax needs one greedy reward per prompt: {len(grouped)} prompts, {got} rewards")
    baseline = _finite(batch.baseline_rewards, "greedy reward", batch).view(-1, 1)
    difference = grouped - baseline
    return _over_tokens(torch.where(difference.abs() > EQUAL_REWARDS, difference, torch.zeros_like(difference)), batch)


def optimal_baseline(batch: Batch, args, *, all_reduce_sum=this_rank_alone, state=None) -> tuple[Tensor, Tensor]:
    """OPO (arXiv 2505.23585): A_i = r_i - sum_j len_j r_j / sum_j len_j.

    The baseline of least variance when the squared gradient norm grows with the response's length.
    """
    grouped = _grouped(sequence_rewards(batch, args, state), args)
    lengths = batch.response_mask.double().sum(dim=1).view_as(grouped)
    baseline = (lengths * grouped).sum(dim=1, keepdim=True) / lengths.sum(dim=1, keepdim=True).clamp(min=1.0)
    return _over_tokens(torch.where(_alive(grouped), grouped - baseline, torch.zeros_like(grouped)), batch)


def decoupled(batch: Batch, args, *, all_reduce_sum=this_rank_alone, state=None) -> tuple[Tensor, Tensor]:
    """GDPO (arXiv 2601.05242): normalise every reward part in its group, add up, whiten over the batch.

    A_i = sum_k w_k (r_ik - mean_gk) / (std_gk + eps), then (A - mean) / (std + eps) over the sequences (not the
    tokens) of all ranks. A part that is equal in the group adds exactly 0; a group where all parts are equal stays
    exactly 0. Parts and weights: --gdpo_rewards accuracy=1 format=1. Raises ValueError for a part no response carries.
    """
    total = None
    alive = None
    for name, weight in parse_weights(args.gdpo_rewards).items():
        if name not in batch.reward_parts:
            have = ", ".join(sorted(batch.reward_parts)) or "none"
            raise ValueError(f"--gdpo_rewards names {name!r}, but the responses carry these reward parts: {have}")
        part = _grouped(_finite(batch.reward_parts[name], f"reward part {name}", batch), args)
        differs = _alive(part)
        normed = (part - part.mean(dim=1, keepdim=True)) / (part.std(dim=1, keepdim=True) + args.advantage_eps)
        normed = weight * torch.where(differs, normed, torch.zeros_like(normed))
        total = normed if total is None else total + normed
        alive = differs if alive is None else alive | differs
    whitened = _whiten(total, torch.ones_like(total), args, all_reduce_sum)
    return _over_tokens(torch.where(alive, whitened, torch.zeros_like(whitened)), batch)


def task_scaled(batch: Batch, args, *, all_reduce_sum=this_rank_alone, state=None) -> tuple[Tensor, Tensor]:
    """EMA-GRPO (OneThinker, arXiv 2512.03043): A_i = (r_i - mean_g) / sigma_task, a running scale per problem type.

    m1 <- d m1 + (1 - d) mean(r), m2 likewise of r^2, over the step's rewards of that type on all ranks (the first step
    sets them), then sigma = max(sqrt(m2 - m1^2), 1e-3). A group that would leave [-guard, guard] is divided by its own
    (population) std instead, as the authors' code does. (Theirs keeps segmentation of images and of videos apart; here a
    problem type is one task.) `state` (AlgorithmState) is updated: call once per step.
    """
    if state is None:
        raise ValueError("--advantage ema_grpo needs the AlgorithmState of the run: its running scale lives there")
    grouped = _grouped(sequence_rewards(batch, args, state), args)
    if len(batch.problem_types) != grouped.numel():
        raise ValueError(f"{len(batch.problem_types)} problem types for {grouped.numel()} rows")
    tasks = [canonical_problem_type(name) for name in batch.problem_types[:: args.group_size]]  # (N,)
    names = list(PROBLEM_TYPES)  # the same order on every rank, so that one all-reduce serves all of them
    sums = torch.zeros(len(names), 3, dtype=torch.float64, device=grouped.device)
    for task, row in zip(tasks, grouped, strict=True):
        sums[names.index(task)] += torch.stack([row.sum(), (row**2).sum(), torch.ones_like(row).sum()])
    sums = all_reduce_sum(sums)
    for name, (total, squares, count) in zip(names, sums.tolist(), strict=True):
        if count:
            now = total / count, squares / count
            old = state.reward_moments.get(name, now)
            state.reward_moments[name] = tuple(args.ema_decay * o + (1 - args.ema_decay) * n for o, n in zip(old, now))
    sigma = {name: max(m2 - m1 * m1, 1e-6) ** 0.5 for name, (m1, m2) in state.reward_moments.items()}
    scale = torch.tensor([sigma[task] for task in tasks], dtype=torch.float64, device=grouped.device).view(-1, 1)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    scaled = centred / (scale + args.advantage_eps)
    own = centred / (grouped.std(dim=1, keepdim=True, unbiased=False) + args.advantage_eps)
    scaled = torch.where(scaled.abs().amax(dim=1, keepdim=True) > args.ema_guard, own, scaled)
    return _over_tokens(torch.where(_alive(grouped), scaled, torch.zeros_like(scaled)), batch)


def pass_at_k(batch: Batch, args, *, all_reduce_sum=this_rank_alone, state=None) -> tuple[Tensor, Tensor]:
    """Pass@k: what a response adds to the best of k, averaged over all k-subsets of its group that hold it.

    A_i = mean over S with i in S, |S| = k of max(S) - max(S without i), then --advantage_std. k = --pass_k (0: the
    whole group, where only the best response is non-zero and gets best - second; arXiv 2503.19595). The closed form
    over sorted rewards is that of arXiv 2505.15201 (the "leave one out minus one" transform): with i the m-th smallest,
    sum over j < i of C(j, k - 2) (r_i - r_j) / C(G - 1, k - 1). Raises ValueError unless 2 <= k <= G.
    """
    grouped = _grouped(sequence_rewards(batch, args, state), args)
    size = args.group_size
    k = args.pass_k or size
    if not 2 <= k <= size:
        raise ValueError(f"--pass_k must be between 2 and --group_size {size}, got {k}")
    ordered, order = grouped.sort(dim=1)
    subsets = torch.tensor([comb(j, k - 2) / comb(size - 1, k - 1) for j in range(size)], dtype=torch.float64)
    below = torch.ones(size, size, dtype=torch.float64).tril(diagonal=-1) * subsets  # [i, j] weight of j < i
    below = below.to(grouped.device)
    gain = ordered * below.sum(dim=1) - ordered @ below.T
    added = torch.zeros_like(grouped).scatter(1, order, gain)
    return _over_tokens(_scaled(added, grouped, args, all_reduce_sum), batch)


def discounted_whitened(batch: Batch, args, *, all_reduce_sum=this_rank_alone, state=None) -> tuple[Tensor, Tensor]:
    """REINFORCE++ (arXiv 2501.03262): discounted return G_t = r_t + gamma G_{t+1}, whitened over all tokens.

    No groups: works with a group of one. Mean and std over the response tokens of all ranks, as in the authors' code.
    """
    mask = batch.response_mask
    rewards = token_rewards(batch, args, state)
    returns = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = torch.where(mask[:, t] > 0, rewards[:, t] + args.gamma * running, running)
        returns[:, t] = running
    whitened = _whiten(returns, mask.double(), args, all_reduce_sum)
    return (whitened * mask).to(mask.dtype), (returns * mask).to(mask.dtype)


def group_mean_whitened(batch: Batch, args, *, all_reduce_sum=this_rank_alone, state=None) -> tuple[Tensor, Tensor]:
    """REINFORCE++-baseline (arXiv 2501.03262): r_i - mean_g, then whitened over the step's sequences.

    Whitening counts sequences, not tokens: weighing by tokens would shift groups without spread by other groups'
    lengths.
    """
    grouped = _grouped(sequence_rewards(batch, args, state), args)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    centred = torch.where(_alive(grouped), centred, torch.zeros_like(centred))
    whitened = _whiten(centred, torch.ones_like(centred), args, all_reduce_sum)
    return _over_tokens(torch.where(_alive(grouped), whitened, torch.zeros_like(whitened)), batch)


def gae(batch: Batch, args, *, all_reduce_sum=this_rank_alone, state=None) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) on batch.values (B, R), for PPO with a critic.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}; V after the last token is 0 (a response
    ends). returns = A + V before whitening; advantages are whitened over the tokens of all ranks unless
    --no-whiten_gae. Raises ValueError without values.
    """
    if batch.values is None:
        raise ValueError("--advantage gae needs batch.values (B, R) from the critic")
    mask = batch.response_mask
    values = _finite(torch.where(mask > 0, batch.values, 0.0), "value", batch)
    rewards = token_rewards(batch, args, state)
    raw = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t] > 0
        delta = rewards[:, t] + args.gamma * next_value - values[:, t]
        advantage = delta + args.gamma * args.lam * next_advantage
        raw[:, t] = torch.where(here, advantage, 0.0)
        next_value = torch.where(here, values[:, t], next_value)  # carried over masked tokens
        next_advantage = torch.where(here, advantage, next_advantage)
    advantages = _whiten(raw, mask.double(), args, all_reduce_sum) if args.whiten_gae else raw
    return (advantages * mask).to(mask.dtype), ((raw + values) * mask).to(mask.dtype)


ADVANTAGES = {
    "grpo": group_norm,
    "dr_grpo": mean_only,
    "rloo": leave_one_out,
    "remax": greedy_baseline,
    "opo": optimal_baseline,
    "gdpo": decoupled,
    "ema_grpo": task_scaled,
    "pass_at_k": pass_at_k,
    "reinforce_pp": discounted_whitened,
    "reinforce_pp_baseline": group_mean_whitened,
    "gae": gae,
}
