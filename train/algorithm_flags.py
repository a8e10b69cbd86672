"""The algorithm's flags, and check_algorithm_flags(): every bad combination as a sentence naming flags and values.

No torch here: --help and flag errors must be instant. The names are those of the tables in advantages.py, losses.py,
rollout_correction.py and optimizer.py; a test holds them equal.
"""

from __future__ import annotations

import argparse

ADVANTAGE_NAMES = (
    "grpo", "dr_grpo", "rloo", "remax", "opo", "gdpo", "ema_grpo", "pass_at_k",
    "reinforce_pp", "reinforce_pp_baseline", "gae",
)  # fmt: skip
POLICY_LOSS_NAMES = ("ppo_clip", "gspo", "gspo_token", "cispo", "sapo", "reinforce")
REDUCTION_NAMES = ("token_mean", "sequence_mean", "fixed_length")
KL_NAMES = ("k1", "k2", "mse", "k3", "abs")
CORRECTION_NAMES = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
OPTIMIZER_NAMES = ("adamw", "adamw_stochastic", "adamw_kahan")
SCHEDULE_NAMES = ("constant", "cosine", "linear")
ACCUMULATION_REMEDY = "it would round fp32 gradients to bf16; leave --grad_accum_dtype at fp32, or give --dtype bf16"
NEEDS_GROUP = ("grpo", "dr_grpo", "rloo", "opo", "gdpo", "ema_grpo", "pass_at_k", "reinforce_pp_baseline")


def parse_weights(items: list[str]) -> dict[str, float]:
    """["accuracy=1", "format=0.5"] -> {"accuracy": 1.0, "format": 0.5}; a name alone weighs 1. Raises ValueError."""
    weights: dict[str, float] = {}
    for item in items:
        name, equals, number = item.partition("=")
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            raise ValueError(f"{item!r} is not NAME or NAME=WEIGHT") from None
        if not name or name in weights or not weight > 0 or weight == float("inf"):
            raise ValueError(f"{item!r}: every name once, with a weight above 0")
        weights[name] = weight
    if not weights:
        raise ValueError("at least one reward part is needed")
    return weights


def add_algorithm_flags(parser: argparse.ArgumentParser) -> None:
    """Add the groups: algorithm, critic, kl, rollout correction, dynamic sampling, demonstrations, optimiser."""
    from train.presets import ALGORITHMS, DEFAULT_ALGORITHM  # presets.py imports this module's names

    group = parser.add_argument_group("algorithm", "a preset sets these; a flag given explicitly always wins")
    add = group.add_argument
    add(
        "--algorithm",
        choices=tuple(ALGORITHMS),
        default=DEFAULT_ALGORITHM,
        help="row of the preset table (train/presets.py)",
    )
    add("--advantage", choices=ADVANTAGE_NAMES, default="grpo", help="advantage estimator")
    add(
        "--advantage_std", choices=("group", "batch", "none"), default="group", help="what grpo and pass_at_k divide by"
    )
    add("--advantage_eps", type=float, default=1e-6, help="added to every std that is divided by")
    add("--policy_loss", choices=POLICY_LOSS_NAMES, default="ppo_clip", help="per-token policy loss")
    add(
        "--loss_reduction",
        choices=REDUCTION_NAMES,
        default="token_mean",
        help="mean over all tokens, over sequences, or the sum over a fixed length; always over the whole mini-batch",
    )
    add("--loss_length", type=int, default=0, help="length of fixed_length, tokens (0: --max_response_tokens)")
    add(
        "--clip_low", type=float, default=0.2, help="ratio is clipped below at 1 - this (cispo: 1 means no lower bound)"
    )
    add("--clip_high", type=float, default=0.2, help="ratio is clipped above at 1 + this")
    add("--clip_dual", type=float, default=0.0, help="dual clip: loss at most this times -A where A < 0 (0: off)")
    add("--sapo_tau_positive", type=float, default=1.0, help="SAPO's temperature where the advantage is positive")
    add("--sapo_tau_negative", type=float, default=1.05, help="SAPO's temperature elsewhere")
    add(
        "--entropy_coef", type=float, default=0.0, help="weight of the entropy bonus (true entropy over the vocabulary)"
    )
    add(
        "--mask_truncated",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="responses cut at the limit do not train",
    )
    add("--gamma", type=float, default=1.0, help="discount per token (reinforce_pp, gae)")
    add("--lam", type=float, default=1.0, help="lambda of gae")
    add("--pass_k", type=int, default=0, help="k of pass_at_k (0: the group size)")
    add(
        "--gdpo_rewards",
        nargs="+",
        default=["accuracy=1", "format=1"],
        metavar="NAME=WEIGHT",
        help="reward parts of gdpo",
    )
    add("--ema_decay", type=float, default=0.99, help="decay of ema_grpo's running scale per problem type")
    add(
        "--ema_guard", type=float, default=5.0, help="a group beyond this many running scales is divided by its own std"
    )

    add = parser.add_argument_group("critic", "only with --advantage gae").add_argument
    add("--critic_learning_rate", type=float, default=5e-6, help="learning rate of the critic")
    add("--critic_warmup_steps", type=int, default=0, help="steps in which only the critic learns")
    add("--critic_clip", type=float, default=0.5, help="range of the clipped value loss (0: not clipped)")
    add(
        "--whiten_gae",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whiten gae's advantages over all tokens",
    )

    add = parser.add_argument_group(
        "kl", "divergence from the reference policy, which is loaded only when used"
    ).add_argument
    add("--kl_in", choices=("none", "loss", "reward"), default="none", help="where the KL term stands")
    add("--kl_estimator", choices=KL_NAMES, default="k3", help="estimator per token; k1 has no use in the loss")
    add("--kl_coef", type=float, default=0.0, help="weight of the KL term (its start, when adaptive)")
    add(
        "--kl_control",
        choices=("fixed", "adaptive"),
        default="fixed",
        help="adaptive: steer the weight towards --kl_target",
    )
    add("--kl_target", type=float, default=0.1, help="mean KL per token that adaptive control steers to")
    add("--kl_horizon", type=float, default=10000.0, help="sequences over which adaptive control acts")

    add = parser.add_argument_group(
        "rollout correction", "weights for the gap between vLLM's and the trainer's probabilities"
    ).add_argument
    add(
        "--rollout_correction",
        choices=CORRECTION_NAMES,
        default="token_truncate",
        help="importance weight per token or sequence, cut at --correction_max or zero outside [min, max]",
    )
    add("--correction_max", type=float, default=2.0, help="largest weight")
    add(
        "--correction_min",
        type=float,
        default=0.0,
        help="smallest weight: a floor under truncation, a limit for masking",
    )
    add(
        "--reject_above",
        type=float,
        default=0.0,
        help="drop a response whose geometric mean weight is above this, or below its inverse (0: off), e.g. 1.01",
    )
    add(
        "--reject_token_below",
        type=float,
        default=0.0,
        help="drop a response with any token weight below this (0: off), e.g. 1e-4",
    )

    add = parser.add_argument_group("dynamic sampling").add_argument
    add(
        "--dynamic_sampling",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="drop groups without spread and draw others; surplus groups serve the next step",
    )
    add(
        "--filter_by", default="accuracy", help="reward part that must differ within a group, or 'reward' for the total"
    )
    add("--filter_low", type=float, default=None, help="also drop groups whose mean is not above this")
    add("--filter_high", type=float, default=None, help="also drop groups whose mean is not below this")
    add("--max_sampling_rounds", type=int, default=20, help="stop with an error after this many rounds in one step")
    add(
        "--overlong_buffer",
        type=int,
        default=0,
        help="soft overlong penalty over the last this many tokens before --max_response_tokens (0: off)",
    )
    add("--overlong_penalty", type=float, default=1.0, help="penalty at the limit, subtracted from the reward")

    add = parser.add_argument_group("demonstrations", "rows that carry offline_output").add_argument
    add(
        "--demonstrations",
        choices=("off", "always", "group_accuracy", "own_reward"),
        default="off",
        help="a demonstration takes one place of the group: always; if the mean accuracy of the others is below "
        "--demonstration_threshold; or if its own reward is at least that",
    )
    add("--demonstration_threshold", type=float, default=0.5, help="threshold of the two gates")
    add(
        "--demonstration_loss",
        choices=("luffy", "plain"),
        default="luffy",
        help="shaped off-policy loss, or the policy loss",
    )
    add("--luffy_gamma", type=float, default=0.1, help="gamma of f(pi) = pi / (pi + gamma)")
    add(
        "--demonstration_on_long",
        choices=("truncate", "refuse"),
        default="truncate",
        help="longer than --max_response_tokens: cut, or leave out (counted)",
    )

    add = parser.add_argument_group("optimiser").add_argument
    add(
        "--optimizer",
        choices=OPTIMIZER_NAMES,
        default="adamw",
        help="adamw keeps fp32 master weights; the two bf16 variants keep none: stochastic rounding or Kahan summation",
    )
    add(
        "--grad_accum_dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="dtype that micro-batches' gradients are summed in, held all the time: bf16 takes 2 bytes per parameter instead "
        "of 4, loses nothing with one micro-batch per update, and with many what is below half a rounding unit of the sum",
    )
    add("--learning_rate", type=float, default=1e-6, help="peak learning rate")
    add("--adam_betas", type=float, nargs=2, default=[0.9, 0.999], metavar=("B1", "B2"), help="decay of the moments")
    add("--adam_eps", type=float, default=1e-8, help="added to the root of the second moment")
    add("--weight_decay", type=float, default=0.01, help="decoupled weight decay")
    add("--max_grad_norm", type=float, default=1.0, help="gradient norm is clipped here")
    add("--lr_schedule", choices=SCHEDULE_NAMES, default="constant", help="after the warm-up")
    add(
        "--warmup_steps",
        type=int,
        default=0,
        help="updates from peak / warmup_steps up to the peak: the first is not 0",
    )
    add("--lr_min_ratio", type=float, default=0.0, help="end of cosine and linear, as a share of the peak")


def check_algorithm_flags(args: argparse.Namespace) -> list[str]:
    """Every bad combination as a sentence that names flags and values; empty when all is well."""
    problems: list[str] = []

    def need(condition: bool, message: str) -> None:
        if not condition:
            problems.append(message)

    advantage, loss = args.advantage, args.policy_loss
    need(
        advantage not in NEEDS_GROUP or args.group_size >= 2,
        f"--advantage {advantage} compares a group's responses: --group_size must be at least 2, got {args.group_size}",
    )
    if advantage == "pass_at_k":
        need(
            args.pass_k == 0 or 2 <= args.pass_k <= args.group_size,
            f"--pass_k must be 0 or between 2 and --group_size {args.group_size}, got {args.pass_k}",
        )
    need(
        args.pass_k == 0 or advantage == "pass_at_k",
        f"--pass_k {args.pass_k} has no meaning for --advantage {advantage}",
    )
    need(
        args.advantage_std == "group" or advantage in ("grpo", "pass_at_k"),
        f"--advantage_std {args.advantage_std} has no meaning for --advantage {advantage}",
    )
    need(
        args.gamma == 1 or advantage in ("reinforce_pp", "gae"),
        f"--gamma {args.gamma} has no meaning for --advantage {advantage}: it discounts nothing",
    )
    need(args.lam == 1 or advantage == "gae", f"--lam {args.lam} has no meaning for --advantage {advantage}")
    if advantage == "gdpo":
        try:
            names = parse_weights(args.gdpo_rewards)
        except ValueError as error:
            need(False, f"--gdpo_rewards: {error}")
        else:
            need(
                "reward" not in names,
                "--gdpo_rewards takes reward parts (accuracy, format, ...), not the total 'reward'",
            )
        need(
            args.kl_in != "reward",
            "--advantage gdpo reads the raw reward parts: --kl_in reward would be ignored, use loss",
        )
        need(
            args.overlong_buffer == 0 or any(item.partition("=")[0] == "overlong" for item in args.gdpo_rewards),
            f"--advantage gdpo ignores --overlong_buffer {args.overlong_buffer} unless --gdpo_rewards names overlong",
        )
    need(
        loss in ("gspo", "gspo_token") or args.clip_low < 1 or loss == "cispo",
        f"--clip_low must be below 1 for --policy_loss {loss}, got {args.clip_low}",
    )
    need(0 <= args.clip_low <= 1, f"--clip_low must be between 0 and 1, got {args.clip_low}")
    need(args.clip_high > 0, f"--clip_high must be above 0, got {args.clip_high}")
    if loss in ("gspo", "gspo_token"):
        need(
            max(args.clip_low, args.clip_high) <= 0.05,
            f"--policy_loss {loss} clips a length-normalised ratio: --clip_low {args.clip_low} and "
            f"--clip_high {args.clip_high} would never act; the paper has 3e-4 and 4e-4",
        )
        need(
            args.loss_reduction == "sequence_mean",
            f"--policy_loss {loss} weighs sequences: --loss_reduction must be sequence_mean, got {args.loss_reduction}",
        )
    need(args.clip_dual == 0 or args.clip_dual > 1, f"--clip_dual must be 0 (off) or above 1, got {args.clip_dual}")
    need(
        args.clip_dual == 0 or loss in ("ppo_clip", "gspo", "gspo_token"),
        f"--clip_dual {args.clip_dual} has no meaning for --policy_loss {loss}",
    )
    updates = args.update_epochs * (
        args.prompts_per_step // max(1, getattr(args, "prompts_per_update", None) or args.prompts_per_step)
    )
    need(
        loss != "reinforce" or updates <= 1,
        f"--policy_loss reinforce is exact for one update per step, got {updates}; use ppo_clip, or --update_epochs 1 "
        f"with --prompts_per_update {args.prompts_per_step}",
    )
    need(args.loss_length >= 0, f"--loss_length must be 0 or more, got {args.loss_length}")
    for flag in (
        "advantage_eps",
        "sapo_tau_positive",
        "sapo_tau_negative",
        "kl_target",
        "kl_horizon",
        "luffy_gamma",
        "correction_max",
        "learning_rate",
        "adam_eps",
        "max_grad_norm",
        "critic_learning_rate",
        "ema_guard",
    ):
        need(getattr(args, flag) > 0, f"--{flag} must be above 0, got {getattr(args, flag)}")
    for flag in (
        "clip_dual",
        "kl_coef",
        "correction_min",
        "reject_above",
        "reject_token_below",
        "overlong_penalty",
        "critic_clip",
        "critic_warmup_steps",
        "weight_decay",
        "warmup_steps",
        "overlong_buffer",
        "entropy_coef",
    ):
        need(getattr(args, flag) >= 0, f"--{flag} must be 0 or more, got {getattr(args, flag)}")
    for flag in ("gamma", "lam", "lr_min_ratio"):
        need(0 <= getattr(args, flag) <= 1, f"--{flag} must be between 0 and 1, got {getattr(args, flag)}")
    need(0 <= args.ema_decay < 1, f"--ema_decay must be in [0, 1), got {args.ema_decay}")
    need(all(0 <= beta < 1 for beta in args.adam_betas), f"--adam_betas must be in [0, 1), got {args.adam_betas}")
    # KL
    need(args.kl_in == "none" or args.kl_coef > 0, f"--kl_in {args.kl_in} needs --kl_coef above 0, got {args.kl_coef}")
    need(args.kl_in != "none" or args.kl_coef == 0, f"--kl_coef {args.kl_coef} acts nowhere with --kl_in none")
    need(args.kl_in != "none" or args.kl_control == "fixed", "--kl_control adaptive needs --kl_in loss or reward")
    need(
        args.kl_in != "loss" or args.kl_estimator != "k1",
        "--kl_estimator k1 in the loss has an expected gradient of zero; use k2 or k3, or --kl_in reward",
    )
    # correction
    if args.rollout_correction != "none":
        need(
            args.correction_min < args.correction_max,
            f"--correction_min {args.correction_min} must be below --correction_max {args.correction_max}",
        )
        need(
            args.correction_min <= 1 <= args.correction_max,
            f"--correction_min {args.correction_min} and --correction_max {args.correction_max} must enclose 1",
        )
    need(
        args.reject_above == 0 or args.reject_above > 1,
        f"--reject_above must be 0 (off) or above 1, got {args.reject_above}",
    )
    need(args.reject_token_below < 1, f"--reject_token_below must be below 1, got {args.reject_token_below}")
    # sampling
    if args.dynamic_sampling:
        need(args.group_size >= 2, f"--dynamic_sampling needs --group_size of at least 2, got {args.group_size}")
        low = float("-inf") if args.filter_low is None else args.filter_low
        high = float("inf") if args.filter_high is None else args.filter_high
        need(low < high, f"--filter_low {args.filter_low} must be below --filter_high {args.filter_high}")
    else:
        need(
            args.filter_low is None and args.filter_high is None,
            "--filter_low and --filter_high need --dynamic_sampling",
        )
    need(args.max_sampling_rounds >= 1, f"--max_sampling_rounds must be at least 1, got {args.max_sampling_rounds}")
    need(
        args.overlong_buffer < args.max_response_tokens,
        f"--overlong_buffer {args.overlong_buffer} must be below --max_response_tokens {args.max_response_tokens}",
    )
    # demonstrations
    if args.demonstrations != "off":
        need(
            args.group_size >= 2,
            f"--demonstrations {args.demonstrations} needs --group_size of at least 2, got {args.group_size}",
        )
        need(
            args.demonstration_loss == "luffy" or loss != "reinforce",
            "--demonstration_loss plain with --policy_loss reinforce is imitation weighted by the advantage, without a "
            "bound; use luffy or another policy loss",
        )
    # critic
    need(
        advantage == "gae" or args.critic_warmup_steps == 0,
        f"--critic_warmup_steps {args.critic_warmup_steps} needs --advantage gae, got {advantage}",
    )
    return problems


def check_samples(args: argparse.Namespace, samples: list) -> list[str]:
    """What the flags ask of the data and the data does not have, as sentences; empty when all is well."""
    if args.demonstrations != "off" and not any(sample.offline_output for sample in samples):
        return [
            f"--demonstrations {args.demonstrations} (--algorithm {args.algorithm}), but none of the {len(samples)} samples "
            "carries offline_output: nothing would be mixed in; give demonstrations, or --demonstrations off"
        ]
    return []
