"""ALGORITHMS: one row per algorithm; apply_preset() puts a row under the explicit flags, explain() says what will run.

Each value comes from the paper or its authors' configuration (the comment beside it: section or equation, or repository
and file, compared with that text); what a paper leaves open keeps the flag's default. "choice" marks what neither says.
Sizes (group, prompts, response length) and the learning rate depend on the machine and the model and are not part of a
preset; `scale` in ABOUT tells what the authors used.
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
        "clip_low": 0.2,  # eq. 3 gives no value; PPO's, arXiv 1707.06347 section 3 and table 1
        "clip_high": 0.2,
        "loss_reduction": "sequence_mean",  # eq. 3: 1/|o_i| inside, 1/G outside
        "kl_in": "loss",  # eq. 3
        "kl_estimator": "k3",  # eq. 4
        "kl_coef": 0.04,  # section 4.2
    },
    "dr_grpo": {  # Understanding R1-Zero-like training, arXiv 2503.20783
        "advantage": "dr_grpo",  # section 3.2: no division by the std
        "policy_loss": "ppo_clip",
        "clip_low": 0.2,  # table 6
        "clip_high": 0.2,
        "loss_reduction": "fixed_length",  # section 3.2: no division by the response's length
        **_NO_KL,  # table 6; --beta 0 in sail-sg/understand-r1-zero examples/qwen2.5-math-7b.sh
    },
    "dapo": {  # DAPO, arXiv 2503.14476; verl recipe/dapo/run_dapo_qwen2.5_32b.sh
        "advantage": "grpo",
        "advantage_std": "group",  # eq. 9
        "policy_loss": "ppo_clip",
        "clip_low": 0.2,  # section 4.1, recipe
        "clip_high": 0.28,  # section 4.1, recipe: clip-higher
        "loss_reduction": "token_mean",  # eq. 8 and 12
        **_NO_KL,  # section 2.3
        "dynamic_sampling": True,  # section 3.2
        "filter_by": "accuracy",  # recipe: filter_groups.metric=acc
        "overlong_buffer": 0.2,  # section 4.1: 4096 of 20480 tokens; a share is turned into tokens by apply_preset
        "overlong_penalty": 1.0,  # eq. 13; recipe: penalty_factor
        "weight_decay": 0.1,  # recipe
        "max_grad_norm": 1.0,  # recipe
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
        "advantage": "grpo",  # taken over from GRPO
        "advantage_std": "group",
        "policy_loss": "cispo",  # eq. 4
        "clip_low": 1.0,  # below eq. 5: no lower bound
        "clip_high": 4.0,  # cap of 5: ScaleRL, arXiv 2510.13786, as TRL recommends (M1 tunes it and gives no number)
        "loss_reduction": "token_mean",  # eq. 4: over all tokens
        **_NO_KL,  # "no KL penalty term"
    },
    "sapo": {  # SAPO, arXiv 2511.20347
        "advantage": "grpo",
        "advantage_std": "group",
        "policy_loss": "sapo",  # eq. 5 and 6
        "sapo_tau_positive": 1.0,  # the paper's default; also TRL's and ms-swift's
        "sapo_tau_negative": 1.05,  # likewise
        "loss_reduction": "sequence_mean",  # as in GRPO, eq. 5
        **_NO_KL,
    },
    "rloo": {  # Back to basics, arXiv 2402.14740
        "advantage": "rloo",
        "policy_loss": "reinforce",  # section 3: no ratio, no clip
        "loss_reduction": "fixed_length",  # whole responses are the actions: sum over tokens, up to a constant
        "kl_in": "reward",  # R = r - beta log(pi / ref)
        "kl_estimator": "k1",
        "kl_coef": 0.03,  # appendix C: 0.03 for TL;DR, 0.10 for Anthropic-HH
    },
    "remax": {  # ReMax, arXiv 2310.10505; verl examples/remax_trainer/run_qwen2.5-3b_seq_balance.sh
        "advantage": "remax",
        "policy_loss": "reinforce",
        "loss_reduction": "fixed_length",  # sum over tokens, up to a constant
        "kl_in": "reward",  # the script: use_kl_in_reward=True
        "kl_estimator": "k1",  # the script: kl_penalty=kl
        "kl_coef": 1e-3,  # the script
    },
    "reinforce_pp": {  # REINFORCE++, arXiv 2501.03262 v2
        "advantage": "reinforce_pp",  # eq. 10
        "gamma": 1.0,  # section 4.2.3
        "policy_loss": "ppo_clip",
        "clip_low": 0.2,  # section 4.2.3
        "clip_high": 0.2,
        "loss_reduction": "sequence_mean",  # eq. 1: mean over a sequence's tokens, then over sequences
        "kl_in": "reward",  # eq. 8: per token
        "kl_estimator": "k1",  # eq. 9
        "kl_coef": 1e-3,  # section 4.2.3 (1e-4 in OpenRLHF's train_reinforce_llama_ray_hybrid_engine.sh)
    },
    "gdpo": {  # GDPO, arXiv 2601.05242; NVlabs/GDPO
        "advantage": "gdpo",  # verl-GDPO/verl/trainer/ppo/ray_trainer.py: parts in their group, sum, whitening
        "gdpo_rewards": ["accuracy=1", "format=1"],  # likewise: correctness and format, weight 1
        "policy_loss": "ppo_clip",
        "clip_low": 0.2,  # choice: the default of both code bases
        "clip_high": 0.2,
        "loss_reduction": "token_mean",  # both code bases (verl's masked mean, TRL 0.18's "bnpo")
        **_NO_KL,  # verl-GDPO/train_gdpo.sh: use_kl_loss=False, and the raw scores are what is normalised
    },
    "ema_grpo": {  # OneThinker, arXiv 2512.03043; tulerfeng/OneThinker EasyR1/
        "advantage": "ema_grpo",  # verl/trainer/core_algos.py
        "ema_decay": 0.99,  # likewise
        "ema_guard": 5.0,  # likewise
        "policy_loss": "ppo_clip",
        "clip_low": 0.2,  # default of the code base, hiyouga/EasyR1 verl/workers/actor/config.py
        "clip_high": 0.3,  # likewise
        "clip_dual": 3.0,  # likewise
        "loss_reduction": "token_mean",  # likewise
        **_NO_KL,  # examples/config_ema_grpo_64.yaml: disable_kl
        # local_scripts/run_onethinker_rl.sh: online_filtering by accuracy (its bounds of 0.01 and 0.99 on the group's
        # mean leave out what has no spread, where accuracy is 0 or 1)
        "dynamic_sampling": True,
        "filter_by": "accuracy",
    },
    "luffy": {  # LUFFY, arXiv 2504.14945
        "advantage": "dr_grpo",  # experimental setup, RL practice: no standard error normalisation
        "policy_loss": "reinforce",  # authors' flag loss_remove_clip; with one update per step the ratio is 1
        "loss_reduction": "fixed_length",  # experimental setup, RL practice: no length normalisation
        **_NO_KL,  # experimental setup, RL practice: beta = 0
        "entropy_coef": 0.01,  # experimental setup, RL practice (0.001 in scripts built on the authors' code)
        "demonstrations": "always",  # experimental setup, RL practice: 1 of 8 responses
        "demonstration_loss": "luffy",
        "luffy_gamma": 0.1,  # experimental setup, RL practice
    },
    "ppo": {  # PPO, arXiv 1707.06347, with the settings of Open-Reasoner-Zero, arXiv 2503.24290
        "advantage": "gae",
        "gamma": 1.0,  # orz/exps/examples/ppo/ppo_base_exp.py: gamma, lambd
        "lam": 1.0,
        "whiten_gae": True,  # config.py: advantage_normalize
        "policy_loss": "ppo_clip",
        "clip_low": 0.2,  # ppo_base_exp.py: eps_clip
        "clip_high": 0.2,
        "loss_reduction": "token_mean",  # PPO, eq. 7: mean over all timesteps of the batch
        **_NO_KL,  # config.py: init_kl_coef, kl_loss_coef
        "critic_learning_rate": 5e-6,  # config.py
        "critic_clip": 0.2,  # ppo_base_exp.py: value_clip
    },
    "opo": {  # OPO, arXiv 2505.23585; verl docs/algo/opo.md
        "advantage": "opo",
        "policy_loss": "reinforce",  # exact on-policy: one update per step, no ratio
        "loss_reduction": "fixed_length",  # choice: the baseline is optimal for the gradient of whole responses
        **_NO_KL,  # docs/algo/opo.md: no KL, no entropy term
    },
}

ABOUT: dict[str, dict[str, str]] = {
    "grpo": {
        "title": "GRPO",
        "use": "the baseline everyone compares with",
        "scale": "64 responses, 16 prompts, one update per step, lr 1e-6",
    },
    "dr_grpo": {
        "title": "Dr. GRPO",
        "use": "no bias towards long wrong answers",
        "scale": "8 responses, 128 prompts, lr 1e-6",
    },
    "dapo": {
        "title": "DAPO",
        "use": "long reasoning, binary rewards, large batches",
        "scale": "16 responses, 512 prompts, 16 updates per step, lr 1e-6, 10 warm-up updates",
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
        "scale": "4 mini-batches per step (2 for vision-language models)",
    },
    "rloo": {
        "title": "RLOO",
        "use": "simple and unbiased, one update per step",
        "scale": "2 to 4 responses, 512 rows, lr 1e-6",
    },
    "remax": {
        "title": "ReMax",
        "use": "few responses per prompt: the greedy answer is the baseline",
        "scale": "1 response + greedy",
    },
    "reinforce_pp": {
        "title": "REINFORCE++",
        "use": "one response per prompt, many prompts",
        "scale": "1 response, 1024 prompts, lr 5e-7",
    },
    "gdpo": {
        "title": "GDPO",
        "use": "several rewards of different scales",
        "scale": "4 responses, 512 prompts, 4 updates per step, lr 1e-6",
    },
    "ema_grpo": {
        "title": "EMA-GRPO",
        "use": "many task types with different reward scales",
        "scale": "8 responses, 128 prompts, 4 updates per step, lr 2e-6",
    },
    "luffy": {
        "title": "LUFFY",
        "use": "the policy rarely succeeds and demonstrations exist",
        "scale": "7 responses + 1 demonstration, 128 prompts, 2 updates per step, lr 1e-6",
    },
    "ppo": {
        "title": "PPO with a critic",
        "use": "credit within a response; memory for a critic",
        "scale": "64 responses, 128 prompts, one policy and 12 critic updates per step, lr 1e-6, critic 5e-6",
    },
    "opo": {
        "title": "OPO",
        "use": "strictly on-policy, responses of very different length",
        "scale": "1024 prompts, one update per step",
    },
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
    clips = args.policy_loss not in ("reinforce", "sapo")
    lines.append(
        f"  {updates} update(s): loss {args.policy_loss}, {args.loss_reduction}"
        + (f", ratio in [{1 - args.clip_low:g}, {1 + args.clip_high:g}]" if clips else "")
        + (f", dual clip {args.clip_dual:g}" if args.clip_dual else "")
    )
    if updates == 1 and args.policy_loss != "reinforce":
        lines.append("  (with one update per step the ratio is 1 and nothing is clipped: see --prompts_per_update)")
    if args.kl_in != "none":
        moving = f", steered to {args.kl_target:g} per token" if args.kl_control == "adaptive" else ""
        lines.append(f"  KL to the reference: {args.kl_coef:g} x {args.kl_estimator} in the {args.kl_in}{moving}")
    if args.advantage == "gae":
        lines.append(
            f"  critic: learning rate {args.critic_learning_rate:g}, value clip {args.critic_clip:g}, alone for the first "
            f"{args.critic_warmup_steps} steps"
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
