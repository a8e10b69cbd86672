"""Passes over a batch and optimiser updates, in packed micro-batches: as many on every rank, one denominator for all."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from data.records import Batch
from train.batching import MicroBatch, group_cost, groups_with_gradient, micro_batches, mini_batches
from train.distributed import all_gather_objects, all_reduce_sum
from train.losses import loss_denominator, policy_objective, value_loss
from train.memory import Room, fitting_kept_layers
from train.metrics import StepMetrics, record_mismatch
from train.policy import checkpoint_activations
from train.rollout_correction import rollout_correction

PARITY_MAX = {torch.float32: 1e-3}  # per token; the same arithmetic in another order
PARITY_MEAN = {torch.bfloat16: 0.06}  # mean over a rank's tokens: single tokens differ more in bf16


def plan_micro_batches(batch: Batch, indices: list[int], *, args, shape) -> list[MicroBatch]:
    """Groups `indices` of this rank as micro-batches of like cost, as many as every other rank has. Collective."""
    tower = "frozen" if args.freeze_vision_tower else "trained"
    return micro_batches(
        batch,
        indices,
        token_budget=args.token_budget * args.sequence_parallel,
        cost=lambda group: group_cost(group, shape, tower=tower),
        pack=args.pack_groups,
        agree=lambda count: max(all_gather_objects(count)),
    )


def plan_updates(batch: Batch, *, args, shape, replicas: int, epoch: int):
    """[(indices of the mini-batch's groups, its micro-batches)] for one pass over the batch. Collective.

    replicas: that sample; the groups of those that share sequences (--sequence_parallel) are on each of their ranks.
    Groups whose update is exactly zero are not computed under --skip_zero_advantage; the loss's denominator counts them.
    Passes after the first take the groups in another order, the same for the same seed and step.
    """
    order = list(range(len(batch.groups)))
    if epoch:
        turn = epoch % len(order)
        order = order[turn:] + order[:turn]
    plan = []
    joined = max(1, args.sequence_parallel // args.tensor_parallel)
    for places in mini_batches(len(order), args.prompts_per_update // replicas * joined):
        indices = [order[place] for place in places]
        other_terms = not args.skip_zero_advantage or args.kl_in == "loss" or args.entropy_coef > 0
        other_terms = other_terms or bool(batch.is_demonstration.any())
        moving = groups_with_gradient(batch, indices, other_terms=other_terms)
        plan.append((indices, plan_micro_batches(batch, moving, args=args, shape=shape)))
    return plan


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    moved = {f.name: getattr(batch, f.name) for f in fields(batch)}
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in moved.items()}
    moved["reward_parts"] = {name: value.to(device) for name, value in batch.reward_parts.items()}
    return Batch(**moved)


def mean_over_ranks(metrics: StepMetrics, name: str) -> float:
    """A mean of the step so far, over all ranks; 0 when nothing was recorded. Collective."""
    parts = [float(table.get(name, 0.0)) for table in (metrics.sums, metrics.counts)]
    total = all_reduce_sum({"sum": parts[0], "count": parts[1]})
    return total["sum"] / total["count"] if total["count"] else 0.0


def rows_of(batch: Batch, indices: list[int]) -> Tensor:
    """Rows of the Batch that belong to groups `indices`, (len(indices) * G,) long."""
    size = len(batch.groups[0].responses)
    return torch.tensor([index * size + slot for index in indices for slot in range(size)], dtype=torch.long)


def all_logprobs(policy, batch: Batch, plan: list[MicroBatch], args) -> Tensor:
    """(B, R) log-probs of the whole batch without gradient, micro-batch by micro-batch. Collective."""
    found = torch.zeros_like(batch.response_mask)
    with torch.no_grad():
        for micro in plan:
            _put(found, micro, policy.logprobs(micro.groups, temperature=args.temperature)[0])
    return found


def all_values(critic, batch: Batch, plan: list[MicroBatch]) -> Tensor:
    """(B, R) values of the critic before each response token, without gradient. Collective."""
    found = torch.zeros_like(batch.response_mask)
    with torch.no_grad():
        for micro in plan:
            _put(found, micro, critic.values(micro.groups))
    return found


def check_parity(batch: Batch, dtype: torch.dtype, metrics: StepMetrics) -> None:
    """Compare the trainer's log-probs (batch.old_logprobs) with the sampler's. Collective; raises on every rank.

    Raises RuntimeError when they differ by more than rounding explains: a stale weight sync, other positions or pixels.
    """
    sampled = (batch.response_mask > 0) & ~batch.is_demonstration.view(-1, 1)
    record_mismatch(metrics, batch.old_logprobs, batch.rollout_logprobs, sampled)
    gap = (batch.old_logprobs - batch.rollout_logprobs).abs()[sampled]
    worst, mean = (float(gap.max()), float(gap.mean())) if gap.numel() else (0.0, 0.0)
    bad = worst > PARITY_MAX.get(dtype, float("inf")) or mean > PARITY_MEAN.get(dtype, float("inf"))
    found = [text for text in all_gather_objects(f"max {worst:.2e}, mean {mean:.2e}" if bad else None) if text]
    if found:
        raise RuntimeError(
            f"--check_parity: log-probs of vLLM and the trainer differ ({'; '.join(found)}): they do not see the same "
            "weights, positions or frames"
        )


def keep_what_fits(policy, mini: list[MicroBatch], room: Room, shape, args, metrics) -> None:
    """--kept_layers auto: before an update, as many layers as fit on the rank where the fewest do. Collective.

    All ranks keep the same number, because a recomputed layer gathers its weights once more, on all of them together.
    """
    if args.kept_layers != "auto":
        return
    kept = min(all_gather_objects(fitting_kept_layers(shape, mini, room.free_bytes(), args)))
    checkpoint_activations(policy.packed.hf, kept, args.kept_vision_layers)
    metrics.value("memory/kept_layers", kept)


def update_policy(
    policy, batch: Batch, indices, mini: list[MicroBatch], mask: Tensor, *, schedule, kl_coef: float, args, metrics
) -> None:
    """One update over a mini-batch: groups `indices`, of which `mini` computes those that move. Collective.

    mask: (B, R) of loss_mask(). The loss's denominator is counted over the mini-batch on all ranks before the first
    micro-batch, so neither the cut into micro-batches nor the number of ranks changes the gradient.
    """
    share = loss_denominator(mask[rows_of(batch, indices)], args.loss_reduction, args)
    denominator = all_reduce_sum(share.to(batch.response_mask.device))
    for number, micro in enumerate(mini):
        logprobs, entropy = policy.logprobs(micro.groups, entropy=True, temperature=args.temperature)
        old = _take(micro, batch.old_logprobs)
        part, demonstration = micro.take(mask), micro.take(batch.is_demonstration)
        kinds = [group.prompt.sample.data_type for group in micro.groups for _ in group.responses]
        weights, sums, maxima = rollout_correction(
            logprobs if old is None else old, micro.take(batch.rollout_logprobs), part, demonstration, args, kinds
        )
        loss, more = policy_objective(
            logprobs,
            entropy,
            old_logprobs=old,
            ref_logprobs=_take(micro, batch.ref_logprobs),
            advantages=micro.take(batch.advantages),
            mask=part,
            is_demonstration=demonstration,
            weights=weights,
            denominator=denominator,
            kl_coef=kl_coef,
            args=args,
        )
        policy.backward(loss, last=number == len(mini) - 1)
        if not micro.is_dummy:
            metrics.ratios(sums | more)
            for name, value in maxima.items():
                metrics.high(name, value)
    rate = schedule.value()
    report = policy.step(rate)
    if not report["skipped"]:
        schedule.advance()
    metrics.value("policy/learning_rate", rate)
    metrics.value("policy/grad_norm", report["grad_norm"])
    metrics.value("policy/skipped_updates", report["skipped"])


def update_critic(critic, batch: Batch, indices, mini: list[MicroBatch], *, args, metrics) -> None:
    """One update of the critic: clipped value loss, mean over the mini-batch's tokens on all ranks. Collective."""
    denominator = all_reduce_sum(batch.response_mask[rows_of(batch, indices)].double().sum())
    for number, micro in enumerate(mini):
        part = micro.take(batch.response_mask)
        per_token, sums = value_loss(
            critic.values(micro.groups), micro.take(batch.values), micro.take(batch.returns), part, args
        )
        critic.backward((per_token * part).sum() / denominator.clamp(min=1.0), last=number == len(mini) - 1)
        if not micro.is_dummy:
            metrics.ratios(sums)
    report = critic.step(args.critic_learning_rate)
    metrics.value("critic/grad_norm", report["grad_norm"])


def _take(micro: MicroBatch, values: Tensor | None) -> Tensor | None:
    return None if values is None else micro.take(values)


def _put(found: Tensor, micro: MicroBatch, values: Tensor) -> None:
    """Write a micro-batch's (b, r) into its rows of (B, R)."""
    if not micro.is_dummy:
        found[micro.rows.to(found.device), : values.shape[1]] = values.to(found.dtype)
