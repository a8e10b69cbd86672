"""ALGORITHMS: one row per algorithm; apply_preset() puts a row under the explicit flags, explain() says what will run.

Each value comes from the paper or its authors' configuration (the comment beside it); what a paper leaves open keeps
the flag's default. Sizes (group, prompts, response length) and the learning rate depend on the machine and the model
and are not part of a preset; `scale` in ABOUT tells what the authors used.
"""

from __future__ import annotations

import argparse
from typing import Any

DEFAULT_ALGORITHM = "grpo"

_NO_KL: dict[str, Any] = {"kl_in": "none", "kl_coef": 0.0}

ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {  # DeepSeekMath, arXiv 2402.03300
        "advantage": "grpo",  # section 4.1.2, outcome supervision
        "advantage_std": "group",
        "policy_loss": "ppo_clip",  # eq. 3
        "clip_low": 0.2,  # not stated there; PPO's value, arXiv 1707.06347 section 6.1
        "clip_high": 0.2,
        "loss_reduction": "sequence_mean",  # eq. 3: 1/|o_i| inside, 1/G outside
        "kl_in": "loss",  # eq. 3
        "kl_estimator": "k3",  # eq. 4
        "kl_coef": 0.04,  # section 4.2
    },
    "dr_grpo": {  # Understanding R1-Zero-like training, arXiv 2503.20783
        "advantage": "dr_grpo",  # section 3.2: no division by the std
        "policy_loss": "ppo_clip",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "loss_reduction": "fixed_length",  # section 3.2: no division by the length
        **_NO_KL,  # section 3: beta = 0
    },
    "dapo": {  # DAPO, arXiv 2503.14476
        "advantage": "grpo",
        "advantage_std": "group",  # eq. 9
        "policy_loss": "ppo_clip",
        "clip_low": 0.2,  # section 4.1
        "clip_high": 0.28,  # section 4.1, clip-higher
        "loss_reduction": "token_mean",  # eq. 8
        **_NO_KL,  # section 2.3
        "dynamic_sampling": True,  # section 3.2
        "filter_by": "accuracy",
        "overlong_buffer": 0.2,  # section 4.1: 4096 of 20480 tokens; a share is turned into tokens by apply_preset
        "overlong_penalty": 1.0,  # eq. 13
        "weight_decay": 0.1,  # authors' recipe (verl recipe/dapo)
        "max_grad_norm": 1.0,  # authors' recipe
    },
    "gspo": {  # GSPO, arXiv 2507.18071
        "advantage": "grpo",  # eq. 6
        "advantage_std": "group",
        "policy_loss": "gspo",  # eq. 5
        "clip_low": 3e-4,  # section 5.1
        "clip_high": 4e-4,  # section 5.1
        "loss_reduction": "sequence_mean",  # eq. 5
        **_NO_KL,  # omitted in eq. 5
    },
    "cispo": {  # MiniMax-M1, arXiv 2506.13585
        "advantage": "grpo",
        "advantage_std": "group",
        "policy_loss": "cispo",  # eq. 4
        "clip_low": 1.0,  # section 3.1: no lower bound
        "clip_high": 4.0,  # cap of 5: ScaleRL, arXiv 2510.13786 (the M1 paper tunes it and gives no number)
        "loss_reduction": "token_mean",  # eq. 4: over all tokens
        **_NO_KL,  # section 3.1
    },
    "sapo": {  # SAPO, arXiv 2511.20347
        "advantage": "grpo",
        "advantage_std": "group",
        "policy_loss": "sapo",
        "sapo_tau_positive": 1.0,
        "sapo_tau_negative": 1.05,
        "loss_reduction": "sequence_mean",
        **_NO_KL,
    },
    "rloo": {  # Back to basics, arXiv 2402.14740
        "advantage": "rloo",
        "policy_loss": "reinforce",  # no ratio, no clip
        "loss_reduction": "fixed_length",  # whole responses are the actions: sum over tokens, up to a constant
        "kl_in": "reward",
        "kl_estimator": "k1",
        "kl_coef": 0.05,  # default of TRL's RLOOConfig; the paper tunes it per data set
    },
    "remax": {  # ReMax, arXiv 2310.10505
        "advantage": "remax",
        "policy_loss": "reinforce",
        "loss_reduction": "fixed_length",  # sum over tokens, up to a constant
        **_NO_KL,  # authors' configuration for verifiable rewards (ReMax in verl)
    },
    "reinforce_pp": {  # REINFORCE++, arXiv 2501.03262
        "advantage": "reinforce_pp",
        "gamma": 1.0,
        "policy_loss": "ppo_clip",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "loss_reduction": "token_mean",
        "kl_in": "reward",  # token-level penalty
        "kl_estimator": "k1",
        "kl_coef": 1e-4,  # authors' example (OpenRLHF train_reinforce_llama_ray_hybrid_engine.sh)
    },
    "gdpo": {  # GDPO, arXiv 2601.05242
        "advantage": "gdpo",
        "gdpo_rewards": ["accuracy=1", "format=1"],  # all weights 1
        "policy_loss": "ppo_clip",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "loss_reduction": "sequence_mean",  # GRPO's objective
        **_NO_KL,
    },
    "ema_grpo": {  # OneThinker, arXiv 2512.03043
        "advantage": "ema_grpo",
        "ema_decay": 0.99,  # authors' code
        "ema_guard": 5.0,  # authors' code
        "policy_loss": "ppo_clip",
        "clip_low": 0.2,
        "clip_high": 0.3,  # default of the code base they build on
        "clip_dual": 3.0,  # likewise
        "loss_reduction": "token_mean",  # likewise
        **_NO_KL,
    },
    "luffy": {  # LUFFY, arXiv 2504.14945
        "advantage": "dr_grpo",  # authors' configuration: grpo_use_std false
        "policy_loss": "reinforce",  # authors' configuration: clip removed; one update, so the ratio is 1
        "loss_reduction": "fixed_length",  # authors' configuration: token mean removed
        **_NO_KL,
        "entropy_coef": 0.001,  # training scripts of the authors' code base
        "demonstrations": "always",  # one of 8 responses is the demonstration
        "demonstration_loss": "luffy",
        "luffy_gamma": 0.1,  # section 3.3
    },
    "ppo": {  # PPO, arXiv 1707.06347, with the settings of Open-Reasoner-Zero, arXiv 2503.24290
        "advantage": "gae",
        "gamma": 1.0,  # Open-Reasoner-Zero: GAE with gamma = lambda = 1
        "lam": 1.0,
        "whiten_gae": True,
        "policy_loss": "ppo_clip",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "loss_reduction": "token_mean",
        **_NO_KL,  # Open-Reasoner-Zero: no KL
        "critic_learning_rate": 5e-6,  # Open-Reasoner-Zero
        "critic_clip": 0.5,
    },
    "opo": {  # OPO, arXiv 2505.23585
        "advantage": "opo",
        "policy_loss": "reinforce",  # exact on-policy: one update per step, no ratio
        "loss_reduction": "fixed_length",  # the baseline is optimal for the gradient of whole responses
        **_NO_KL,  # the paper drops KL and entropy terms
    },
}

ABOUT: dict[str, dict[str, str]] = {
    "grpo": {
        "title": "GRPO",
        "use": "the baseline everyone compares with",
        "scale": "64 responses, 16 prompts, lr 1e-6",
    },
    "dr_grpo": {
        "title": "Dr. GRPO",
        "use": "no bias towards long wrong answers",
        "scale": "8 responses, 128 prompts, lr 1e-6",
    },
    "dapo": {
        "title": "DAPO",
        "use": "long reasoning, binary rewards, large batches",
        "scale": "16 responses, 512 prompts, 16 updates per step, lr 1e-6",
    },
    "gspo": {
        "title": "GSPO",
        "use": "several updates per step; mixture-of-experts models",
        "scale": "4 mini-batches per step",
    },
    "cispo": {
        "title": "CISPO",
        "use": "several updates per step without losing rare tokens",
        "scale": "16 updates per step",
    },
    "sapo": {
        "title": "SAPO",
        "use": "several updates per step with a smooth trust region",
        "scale": "4 mini-batches per step",
    },
    "rloo": {"title": "RLOO", "use": "simple and unbiased, one update per step", "scale": "2 to 4 responses"},
    "remax": {
        "title": "ReMax",
        "use": "few responses per prompt: the greedy answer is the baseline",
        "scale": "1 response + greedy",
    },
    "reinforce_pp": {
        "title": "REINFORCE++",
        "use": "one response per prompt, many prompts",
        "scale": "1 to 8 responses",
    },
    "gdpo": {"title": "GDPO", "use": "several rewards of different scales", "scale": "16 responses"},
    "ema_grpo": {
        "title": "EMA-GRPO",
        "use": "many task types with different reward scales",
        "scale": "8 responses, 128 prompts",
    },
    "luffy": {
        "title": "LUFFY",
        "use": "the policy rarely succeeds and demonstrations exist",
        "scale": "7 responses + 1 demonstration, 128 prompts, lr 1e-6",
    },
    "ppo": {
        "title": "PPO with a critic",
        "use": "credit within a response; memory for a critic",
        "scale": "64 responses, 128 prompts, lr 1e-6, critic 5e-6",
    },
    "opo": {"title": "OPO", "use": "strictly on-policy, responses of very different length", "scale": "16 responses"},
}


def preset_values(name: str, max_response_tokens: int) -> dict[str, Any]:
    """The row of `name` with shares turned into tokens. Raises ValueError for an unknown name."""
    if name not in ALGORITHMS:
        raise ValueError(f"--algorithm must be one of {', '.join(ALGORITHMS)}, got {name!r}")
    values = dict(ALGORITHMS[name])
    if "overlong_buffer" in values:
        values["overlong_buffer"] = int(values["overlong_buffer"] * max_response_tokens)
    return values


def apply_preset(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse argv with the preset of --algorithm as defaults: an explicit flag wins, even one equal to its default."""
    first, _ = _without_required(parser, argv)
    parser.set_defaults(**preset_values(first.algorithm, first.max_response_tokens))
    return parser.parse_args(argv)


def _without_required(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Only --algorithm and --max_response_tokens, so that --help and missing flags are left to the real parse."""
    small = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    small.add_argument("--algorithm", default=parser.get_default("algorithm"), nargs="?")
    small.add_argument("--max_response_tokens", default=parser.get_default("max_response_tokens"), nargs="?")
    first, rest = small.parse_known_args(argv)
    if first.algorithm not in ALGORITHMS:
        first.algorithm = DEFAULT_ALGORITHM  # the real parse refuses the name with the list of choices
    try:
        first.max_response_tokens = int(first.max_response_tokens)
    except (TypeError, ValueError):
        first.max_response_tokens = 1  # likewise
    return first, rest


def explain(args: argparse.Namespace) -> str:
    """Text of --explain: what will run, where each value comes from, and what it costs. One line per decision."""
    about = ABOUT[args.algorithm]
    preset = preset_values(args.algorithm, args.max_response_tokens)
    lines = [f"{about['title']}: {about['use']}. The authors ran: {about['scale']}.", "", "values of the preset:"]
    for name, value in preset.items():
        now = getattr(args, name)
        lines.append(
            f"  --{name} {_word(now)}" + ("" if now == value else f"   (explicit; the preset has {_word(value)})")
        )
    lines += ["", "one step:"]
    updates = args.update_epochs * (args.prompts_per_step // (args.prompts_per_update or args.prompts_per_step))
    generated = f"{args.group_size} responses"
    if args.demonstrations != "off":
        generated = (
            f"{args.group_size - 1} responses and the demonstration, where one passes the gate '{args.demonstrations}',"
        )
    if args.advantage == "remax":
        generated += " and one greedy response"
    lines.append(f"  {args.prompts_per_step} prompts; for each {generated} are scored")
    if args.dynamic_sampling:
        lines.append(
            f"  groups whose {args.filter_by} does not differ are dropped and replaced, at most "
            f"{args.max_sampling_rounds} rounds; surplus groups serve the next step"
        )
    if args.overlong_buffer:
        lines.append(
            f"  reward falls by up to {args.overlong_penalty:g} over the last {args.overlong_buffer} of "
            f"{args.max_response_tokens} tokens"
        )
    if args.mask_truncated:
        lines.append("  responses cut at the limit do not train")
    lines.append(
        f"  advantage {args.advantage}"
        + (
            f", divided by the std of the {args.advantage_std}"
            if args.advantage in ("grpo", "pass_at_k") and args.advantage_std != "none"
            else ""
        )
    )
    lines.append(
        f"  {updates} update(s): loss {args.policy_loss}, {args.loss_reduction}"
        + (
            ""
            if args.policy_loss in ("reinforce", "sapo")
            else f", ratio in [{1 - args.clip_low:g}, {1 + args.clip_high:g}]"
        )
        + (f", dual clip {args.clip_dual:g}" if args.clip_dual else "")
    )
    if args.rollout_correction != "none":
        bounds = f"[{args.correction_min:g}, {args.correction_max:g}]"
        lines.append(f"  rollout correction {args.rollout_correction}, weights in {bounds}")
    if args.entropy_coef:
        lines.append(f"  entropy bonus {args.entropy_coef:g}")
    lines += ["", "models and passes:"]
    lines += [f"  {line}" for line in needs(args).values()]
    return "\n".join(lines)


def needs(args: argparse.Namespace) -> dict[str, str]:
    """What the flags require beyond the policy: keys old_logprobs, reference, critic, entropy, or none."""
    updates = args.update_epochs * (args.prompts_per_step // (args.prompts_per_update or args.prompts_per_step))
    found = {}
    if updates > 1 or args.kl_in == "reward":
        found["old_logprobs"] = "one extra forward pass for old_logprobs"
    if args.kl_in != "none":
        found["reference"] = "reference policy loaded; one forward pass of it"
    if args.advantage == "gae":
        found["critic"] = "critic loaded; one forward and one backward pass of it"
    if args.entropy_coef:
        found["entropy"] = "entropy with gradient in every forward pass"
    return found or {"none": "nothing beyond the policy: no reference, no critic, no old_logprobs pass"}


def _word(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
