"""Policy losses, KL estimators, value loss, and the one place that sums: reduce_loss().

POLICY_LOSSES[name](logprobs, old_logprobs, advantages, mask, args) -> (per-token loss (B, R), metrics), where metrics
maps a name to (numerator, denominator): sums that main adds over micro-batches and ranks before it divides.
KL_ESTIMATORS[name] (logprobs, ref_logprobs) -> (B, R). Only reduce_loss() turns (B, R) into a scalar, over a
denominator counted on the whole mini-batch and all ranks (loss_denominator), so cutting micro-batches or ranks
differently does not change the gradient.

A NaN at a response token is never hidden: it reaches the scalar, the gradient norm of every rank, and the step is
refused there. Values at padding positions never count, whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Metrics = dict[str, tuple[Tensor, Tensor]]
MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: finite in float32, far beyond every clip

# ---- reduction ----------------------------------------------------------------------------------------------------

LOSS_REDUCTIONS = ("token_mean", "sequence_mean", "fixed_length")


def reduce_loss(per_token: Tensor, mask: Tensor, *, reduction: str, denominator: Tensor | float) -> Tensor:
    """Sum (B, R) per-token losses of a micro-batch into its share of the mini-batch's loss, a scalar.

    token_mean: sum_it x_it / tokens (DAPO, arXiv 2503.14476, section 3.3). sequence_mean: sum_i mean_t x_it /
    sequences (GRPO). fixed_length: sum_it x_it / (sequences * length) (Dr. GRPO, arXiv 2503.20783). `denominator` is
    loss_denominator() summed over all micro-batches of the mini-batch and all data-parallel ranks; the shares of all
    micro-batches and ranks then add up to the loss. (An engine that averages gradients over W ranks needs W times this
    value: that factor is the caller's.)
    """
    values = torch.where(mask > 0, per_token * mask, torch.zeros_like(per_token))
    if reduction == "sequence_mean":
        total = (values.sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)).sum()
    elif reduction in ("token_mean", "fixed_length"):
        total = values.sum()
    else:
        raise ValueError(f"--loss_reduction must be one of {', '.join(LOSS_REDUCTIONS)}, got {reduction!r}")
    return total / (denominator.clamp(min=1.0) if isinstance(denominator, Tensor) else max(float(denominator), 1.0))


def loss_denominator(mask: Tensor, reduction: str, args) -> Tensor:
    """What these rows add to the denominator: float64 scalar, for the caller to sum over micro-batches and ranks.

    Rows without a response token (padding rows, masked truncated responses) count nowhere. The length of fixed_length
    is --loss_length, or --max_response_tokens when that is 0.
    """
    if reduction == "token_mean":
        return mask.double().sum()
    sequences = (mask.sum(dim=1) > 0).double().sum()
    if reduction == "sequence_mean":
        return sequences
    if reduction == "fixed_length":
        return sequences * float(args.loss_length or args.max_response_tokens)
    raise ValueError(f"--loss_reduction must be one of {', '.join(LOSS_REDUCTIONS)}, got {reduction!r}")


def loss_mask(response_mask: Tensor, truncated: Tensor, is_demonstration: Tensor, args) -> Tensor:
    """(B, R) mask of the tokens that train the policy: without cut-off responses under --mask_truncated.

    DAPO's overlong filtering (arXiv 2503.14476, section 3.4). A demonstration cut on purpose keeps its tokens.
    """
    if not args.mask_truncated:
        return response_mask
    keep = ~truncated | is_demonstration
    return response_mask * keep.view(-1, 1).to(response_mask.dtype)


# ---- pieces -------------------------------------------------------------------------------------------------------


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """Zero at padding, also for the gradient: 0 * inf would be NaN."""
    return torch.where(mask > 0, values, torch.zeros_like(values))


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    return _masked(logprobs - old_logprobs.detach(), mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _sums(mask: Tensor, **values: Tensor) -> Metrics:
    """(sum over response tokens, number of response tokens) of each value."""
    count = mask.detach().double().sum()
    return {name: (_masked(value.detach() * mask, mask).double().sum(), count) for name, value in values.items()}


def _ratio_metrics(log_ratio: Tensor, advantages: Tensor, mask: Tensor, args) -> Metrics:
    """How far the policy has moved within this step, and how often the clip bites, as shares of response tokens."""
    ratio = log_ratio.detach().exp()
    return _sums(
        mask,
        **{
            "policy/ratio": ratio,
            "policy/approx_kl": ratio - 1.0 - log_ratio.detach(),  # k3 of old against new, >= 0
            "policy/clipped_low": ((ratio < 1.0 - args.clip_low) & (advantages < 0)).double(),
            "policy/clipped_high": ((ratio > 1.0 + args.clip_high) & (advantages > 0)).double(),
        },
    )


def _clipped(log_ratio: Tensor, advantages: Tensor, args) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A); for A < 0 at most -dual * A when --clip_dual is set."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - args.clip_low, 1.0 + args.clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if args.clip_dual:
        loss = torch.where(advantages < 0, torch.minimum(loss, -args.clip_dual * advantages), loss)
    return loss


# ---- policy losses ------------------------------------------------------------------------------------------------


def ppo_clip(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, args) -> tuple[Tensor, Metrics]:
    """PPO (arXiv 1707.06347, eq. 7) with separate bounds (DAPO clip-higher, arXiv 2503.14476, eq. 10) and dual clip.

    L = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logprobs - old_logprobs); where A < 0 the loss is at
    most -clip_dual * A (arXiv 1912.09729, eq. 5; 0 is off). (B, R) all through.
    """
    advantages = _masked(advantages, mask)
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    return _clipped(log_ratio, advantages, args), _ratio_metrics(log_ratio, advantages, mask, args)


def _sequence_log_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """(B, 1): mean log ratio over the response tokens of a row."""
    return (log_ratio * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1.0)


def gspo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, args) -> tuple[Tensor, Metrics]:
    """GSPO (arXiv 2507.18071, eq. 5-7): one ratio per sequence, s = exp(mean_t log r_t), clipped as in PPO.

    Ranges are about 1e-3 of PPO's (3e-4 / 4e-4). The value stands on every token of the row; use with sequence_mean.
    """
    advantages = _masked(advantages, mask)
    log_ratio = _sequence_log_ratio(_log_ratio(logprobs, old_logprobs, mask), mask).expand_as(logprobs)
    return _clipped(log_ratio, advantages, args), _ratio_metrics(log_ratio, advantages, mask, args)


def gspo_token(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, args
) -> tuple[Tensor, Metrics]:
    """GSPO-token (arXiv 2507.18071, eq. 13-14): value of the sequence ratio, gradient through each token's own
    log-prob.

    s_t = sg(s) * pi_t / sg(pi_t). Equal to gspo when advantages are equal along the row.
    """
    advantages = _masked(advantages, mask)
    log_ratio = _sequence_log_ratio(_log_ratio(logprobs, old_logprobs, mask), mask).detach()
    log_ratio = log_ratio + _masked(logprobs - logprobs.detach(), mask)
    return _clipped(log_ratio, advantages, args), _ratio_metrics(log_ratio, advantages, mask, args)


def cispo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, args) -> tuple[Tensor, Metrics]:
    """CISPO (arXiv 2506.13585, eq. 4-5): REINFORCE with a clipped, detached ratio; no token loses its gradient.

    L = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi. --clip_low 1 leaves no lower bound, as in the paper.
    """
    advantages = _masked(advantages, mask)
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    weight = log_ratio.detach().exp().clamp(1.0 - args.clip_low, 1.0 + args.clip_high)
    return -weight * advantages * _masked(logprobs, mask), _ratio_metrics(log_ratio, advantages, mask, args)


def sapo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, args) -> tuple[Tensor, Metrics]:
    """SAPO (arXiv 2511.20347): a soft gate instead of the clip, f(r) = 4 / tau * sigmoid(tau (r - 1)), L = -f(r) A.

    tau = --sapo_tau_positive where A > 0, else --sapo_tau_negative. At r = 1 the gradient is that of r A.
    """
    advantages = _masked(advantages, mask)
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    positive = torch.full_like(log_ratio, args.sapo_tau_positive)
    tau = torch.where(advantages > 0, positive, torch.full_like(log_ratio, args.sapo_tau_negative))
    gate = torch.sigmoid(tau * (log_ratio.exp() - 1.0)) * 4.0 / tau
    return -gate * advantages, _ratio_metrics(log_ratio, advantages, mask, args)


def reinforce(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, args) -> tuple[Tensor, Metrics]:
    """REINFORCE (Williams 1992): L = -A log pi. No ratio, so exact only for the first update after sampling."""
    advantages = _masked(advantages, mask)
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    return -advantages * _masked(logprobs, mask), _ratio_metrics(log_ratio, advantages, mask, args)


POLICY_LOSSES: dict[str, Callable[..., tuple[Tensor, Metrics]]] = {
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "cispo": cispo,
    "sapo": sapo,
    "reinforce": reinforce,
}


# ---- demonstrations -----------------------------------------------------------------------------------------------


def demonstration_loss(
    per_token: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, is_demonstration: Tensor, args
) -> tuple[Tensor, Metrics]:
    """Replace the loss of demonstration rows: (B, R), rows of `is_demonstration` (B,) bool.

    --demonstration_loss luffy: L = -f(pi) A with f(pi) = pi / (pi + gamma), unclipped (LUFFY, arXiv 2504.14945,
    section 3.3; the demonstrator's probability is taken as 1, as in the paper). f'(pi) is largest for tokens the
    policy finds unlikely, which plain importance weighting would hardly move. plain: the policy loss, as if the policy
    had written them.
    """
    advantages = _masked(advantages, mask)
    rows = is_demonstration.view(-1, 1)
    demo_mask = mask * rows.to(mask.dtype)
    probability = _masked(logprobs, demo_mask).exp()
    metrics = _sums(demo_mask, **{"demonstration/probability": probability})
    if args.demonstration_loss == "plain":
        return per_token, metrics
    if args.demonstration_loss != "luffy":
        raise ValueError(f"--demonstration_loss must be luffy or plain, got {args.demonstration_loss!r}")
    shaped = -probability / (probability + args.luffy_gamma) * advantages
    return torch.where(rows, shaped, per_token), metrics


# ---- KL to the reference policy -----------------------------------------------------------------------------------


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log ref. Unbiased, noisy, can be negative; as a loss its expected gradient is 0: for the reward only."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2: biased value, on policy the gradient of the true KL (Schulman 2020)."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """ref / pi - 1 - log(ref / pi): unbiased, never negative, low variance (Schulman 2020; arXiv 2402.03300, eq. 4)."""
    log_ratio = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp() - 1.0 - log_ratio


def absolute(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """|log pi - log ref|."""
    return (logprobs - ref_logprobs).abs()


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": k1,
    "k2": k2,
    "mse": k2,
    "k3": k3,
    "abs": absolute,
}


# ---- critic -------------------------------------------------------------------------------------------------------


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, args) -> tuple[Tensor, Metrics]:
    """PPO's clipped value loss per token, (B, R): 0.5 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2), c =
    --critic_clip.

    As in the authors' baselines code (implementation detail 9 of Huang et al. 2022); c = 0 is the plain squared error.
    """
    values, old_values, returns = _masked(values, mask), _masked(old_values.detach(), mask), _masked(returns, mask)
    loss = (values - returns) ** 2
    clipped = torch.zeros_like(mask)
    if args.critic_clip:
        near = (old_values + (values - old_values).clamp(-args.critic_clip, args.critic_clip) - returns) ** 2
        clipped = (near > loss).to(mask.dtype)
        loss = torch.maximum(loss, near)
    return 0.5 * loss, _sums(
        mask, **{"critic/clipped": clipped, "critic/value": values, "critic/squared_error": (values - returns) ** 2}
    )


# ---- the whole objective of a micro-batch -------------------------------------------------------------------------


def policy_objective(
    logprobs: Tensor,
    entropy: Tensor | None,
    *,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    is_demonstration: Tensor,
    weights: Tensor | None,
    denominator: Tensor,
    kl_coef: float,
    args,
) -> tuple[Tensor, Metrics]:
    """Everything the policy descends on in one micro-batch: scalar share of the loss, and metric sums.

    loss = reduce(weights * policy_loss, demonstration rows replaced, + kl_coef * KL - entropy_coef * H). `mask` is
    loss_mask(); `weights` (B, R) come from rollout_correction; `old_logprobs` None means exactly one update per step,
    where old = logprobs.detach(). All terms share one reduction and denominator.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    per_token, metrics = POLICY_LOSSES[args.policy_loss](logprobs, old, advantages, mask, args)
    if weights is not None:
        per_token = per_token * weights
    if bool(is_demonstration.any()):
        per_token, more = demonstration_loss(per_token, logprobs, advantages, mask, is_demonstration, args)
        metrics |= more
    metrics["loss/policy"] = (
        reduce_loss(per_token.detach(), mask, reduction=args.loss_reduction, denominator=1.0).double(),
        loss_denominator(mask, args.loss_reduction, args),
    )
    if ref_logprobs is not None:
        kl = KL_ESTIMATORS[args.kl_estimator](_masked(logprobs, mask), _masked(ref_logprobs, mask))
        metrics |= _sums(mask, **{"policy/ref_kl": kl})
        if args.kl_in == "loss":
            per_token = per_token + kl_coef * kl
    if entropy is not None:
        metrics |= _sums(mask, **{"policy/entropy": _masked(entropy, mask)})
        if args.entropy_coef:
            per_token = per_token - args.entropy_coef * _masked(entropy, mask)
    return reduce_loss(per_token, mask, reduction=args.loss_reduction, denominator=denominator), metrics
