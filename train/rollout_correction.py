"""Correction for the gap between the sampler's probabilities and the trainer's, and the figures that show the gap.

vLLM and the trainer compute the same policy with other kernels and roundings, so a response is a little off-policy
from the start. The importance weight is w_t = exp(old_logprobs - rollout_logprobs); the policy loss is multiplied by
it (detached). Sources: truncated importance sampling, Yao et al. 2025 (fengyao.notion.site/off-policy-rl); masked
weights, IcePop, arXiv 2510.18855; rejection by the geometric mean, Liu et al. 2025 (When speed kills stability). The
denominator of the loss still counts tokens of weight 0: dropping bad responses makes the step smaller, not the others
larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.losses import MAX_LOG_RATIO, Metrics

Maxima = dict[str, Tensor]


def rollout_correction(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    is_demonstration: Tensor,
    args,
    data_types: list[str] | None = None,
) -> tuple[Tensor | None, Metrics, Maxima]:
    """Weights (B, R) for the policy loss (None when nothing is corrected), metric sums, and maxima.

    old_logprobs: (B, R) of the trainer before the step's updates (logprobs.detach() when there is one update);
    rollout_logprobs: (B, R) as vLLM sampled. --rollout_correction:
      token_truncate     min(max(w_t, correction_min), correction_max)
      token_mask         w_t, or 0 outside [correction_min, correction_max]
      sequence_truncate, sequence_mask: the same with w = prod_t w_t on every token of the row
      none               figures only
    Then whole rows get 0 when exp(mean_t log w_t) is outside [1 / reject_above, reject_above], or when a token has w_t
    < reject_token_below. Demonstrations were not sampled: their weight is 1. A token whose sampler log-prob is not
    finite weighs 1 and is counted in mismatch/unknown; a NaN of the trainer stays NaN and stops the step.

    Metrics over sampled tokens: log_ratio (mean of log w), abs_log_ratio, k3 (estimate of KL(sampler, trainer)),
    prob_diff (mean |p - q|), weight, weight_changed (share of tokens truncated or masked), rejected (share of rows).
    Maxima: mismatch/abs_log_ratio_max, mismatch/prob_diff_max. data_types: B of "text", "image", "video" ...: abs_log_ratio
    by each of them, too, since a fault in positions or frames shows on some of them alone.
    """
    old, sampled = old_logprobs.detach().float(), rollout_logprobs.detach().float()
    asked = (mask > 0) & ~is_demonstration.view(-1, 1)
    known = asked & torch.isfinite(sampled)
    log_w = torch.where(known, old - sampled, torch.zeros_like(old)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    tokens = known.double().sum()
    prob_diff = torch.where(known, (old.exp() - sampled.exp()).abs(), torch.zeros_like(old))

    def mean(values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(known, values, torch.zeros_like(values)).double().sum(), tokens

    metrics: Metrics = {
        "mismatch/log_ratio": mean(log_w),
        "mismatch/abs_log_ratio": mean(log_w.abs()),
        "mismatch/k3": mean(torch.expm1(log_w) - log_w),
        "mismatch/prob_diff": mean(prob_diff),
        "mismatch/unknown": ((asked & ~known).double().sum(), asked.double().sum()),
    }
    for kind in sorted(set(data_types or ())):
        of_kind = torch.tensor([other == kind for other in data_types or ()])
        rows = of_kind.to(known.device, non_blocking=True).view(-1, 1) & known  # without waiting for the forward pass
        total = torch.where(rows, log_w.abs(), torch.zeros_like(log_w)).double().sum()
        metrics[f"mismatch/abs_log_ratio/{kind}"] = (total, rows.double().sum())
    maxima = {"mismatch/abs_log_ratio_max": log_w.abs().amax(), "mismatch/prob_diff_max": prob_diff.amax()}
    if args.rollout_correction == "none" and not args.reject_above and not args.reject_token_below:
        return None, metrics, maxima

    weights, changed = _weights(log_w, known, args)
    keep = _kept_rows(log_w, known, args)
    metrics["mismatch/weight"] = mean(weights)
    metrics["mismatch/weight_changed"] = mean(changed.float())
    sampled_rows = asked.any(dim=1)
    metrics["mismatch/rejected"] = ((sampled_rows & ~keep).double().sum(), sampled_rows.double().sum())
    weights = torch.where(keep.view(-1, 1), weights, torch.zeros_like(weights))
    return weights.to(old_logprobs.dtype), metrics, maxima


def _weights(log_w: Tensor, known: Tensor, args) -> tuple[Tensor, Tensor]:
    """(B, R) weights before rejection, and where truncation or masking changed them. 1 where the sampler is unknown."""
    ones = torch.ones_like(log_w)
    if args.rollout_correction == "none":
        return ones, torch.zeros_like(known)
    level, _, kind = args.rollout_correction.partition("_")
    if level not in ("token", "sequence") or kind not in ("truncate", "mask"):
        raise ValueError(f"unknown --rollout_correction {args.rollout_correction!r}")
    if level == "sequence":
        log_w = log_w.sum(dim=1, keepdim=True).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).expand_as(log_w)
    raw = log_w.exp()
    outside = known & ((raw < args.correction_min) | (raw > args.correction_max))
    cut = raw.clamp(args.correction_min, args.correction_max) if kind == "truncate" else torch.zeros_like(raw)
    return torch.where(known, torch.where(outside, cut, raw), ones), outside


def _kept_rows(log_w: Tensor, known: Tensor, args) -> Tensor:
    """(B,) bool: rows that pass both rejection rules."""
    keep = torch.ones(len(log_w), dtype=torch.bool, device=log_w.device)
    if args.reject_above:
        mean = log_w.sum(dim=1) / known.sum(dim=1).clamp(min=1)
        limit = torch.tensor(args.reject_above, dtype=torch.float64).log().item()
        keep &= ~(mean.abs() > limit)  # a NaN row is kept: it must reach the loss and stop the step
    if args.reject_token_below:
        keep &= ~(known & (log_w.exp() < args.reject_token_below)).any(dim=1)
    return keep
