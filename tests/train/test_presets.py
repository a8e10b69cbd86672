"""The preset table: every row runs, explicit flags win, values are the papers', names agree, bad flags are named."""

import subprocess
import sys
from pathlib import Path

import pytest

from data.records import Sample
from train.algorithm_flags import (
    ADVANTAGE_NAMES,
    CORRECTION_NAMES,
    KL_NAMES,
    OPTIMIZER_NAMES,
    POLICY_LOSS_NAMES,
    REDUCTION_NAMES,
    check_algorithm_flags,
    check_samples,
    parse_weights,
)
from train.args import build_parser
from train.presets import ABOUT, ALGORITHMS, apply_preset, explain, needs

ROOT = Path(__file__).resolve().parents[2]


def parse(*flags):
    args = apply_preset(build_parser(), ["--model", "m", "--data", "d", *flags])
    if args.prompts_per_update is None:
        args.prompts_per_update = args.prompts_per_step
    return args


def test_the_fourteen_presets_are_there():
    names = ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "rloo", "remax", "reinforce_pp", "gdpo", "ema_grpo"]
    names += ["luffy", "ppo", "opo"]
    assert sorted(ALGORITHMS) == sorted(ABOUT) == sorted(names)


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_preset_parses_passes_the_checks_and_is_explained(name):
    args = parse("--algorithm", name)
    assert check_algorithm_flags(args) == []
    for flag, value in ALGORITHMS[name].items():
        if flag != "overlong_buffer":
            assert getattr(args, flag) == value
    text = explain(args)
    assert text.startswith(ABOUT[name]["title"])
    for flag in ALGORITHMS[name]:
        assert f"--{flag} " in text
    assert "(explicit" not in text


# Read off the papers and the authors' configurations again, beside the table: (preset, flags).
NUMBERS = [
    ("grpo", {"clip_low": 0.2, "clip_high": 0.2, "kl_in": "loss", "kl_estimator": "k3", "kl_coef": 0.04}),
    ("dr_grpo", {"clip_low": 0.2, "clip_high": 0.2, "loss_reduction": "fixed_length", "kl_in": "none"}),
    ("dapo", {"clip_low": 0.2, "clip_high": 0.28, "overlong_buffer": 4096, "overlong_penalty": 1.0, "kl_in": "none"}),
    ("dapo", {"dynamic_sampling": True, "filter_by": "accuracy", "loss_reduction": "token_mean", "weight_decay": 0.1}),
    ("gspo", {"clip_low": 3e-4, "clip_high": 4e-4, "loss_reduction": "sequence_mean", "kl_in": "none"}),
    ("cispo", {"clip_low": 1.0, "clip_high": 4.0, "loss_reduction": "token_mean", "kl_in": "none"}),
    ("sapo", {"sapo_tau_positive": 1.0, "sapo_tau_negative": 1.05, "kl_in": "none"}),
    ("rloo", {"kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.03, "policy_loss": "reinforce"}),
    ("remax", {"kl_in": "reward", "kl_estimator": "k1", "kl_coef": 1e-3, "policy_loss": "reinforce"}),
    ("reinforce_pp", {"kl_in": "reward", "kl_estimator": "k1", "kl_coef": 1e-3, "gamma": 1.0, "clip_high": 0.2}),
    ("gdpo", {"gdpo_rewards": ["accuracy=1", "format=1"], "kl_in": "none"}),
    ("ema_grpo", {"ema_decay": 0.99, "ema_guard": 5.0, "clip_low": 0.2, "clip_high": 0.3, "clip_dual": 3.0}),
    ("ema_grpo", {"dynamic_sampling": True, "kl_in": "none", "loss_reduction": "token_mean"}),
    ("luffy", {"luffy_gamma": 0.1, "demonstrations": "always", "advantage": "dr_grpo", "entropy_coef": 0.01}),
    ("ppo", {"gamma": 1.0, "lam": 1.0, "critic_clip": 0.2, "critic_learning_rate": 5e-6, "clip_high": 0.2}),
    ("opo", {"kl_in": "none", "entropy_coef": 0.0, "policy_loss": "reinforce"}),
]


@pytest.mark.parametrize(("name", "flags"), NUMBERS)
def test_the_papers_numbers(name, flags):
    args = parse("--algorithm", name, "--max_response_tokens", "20480")
    assert {flag: getattr(args, flag) for flag in flags} == flags
    assert parse().algorithm == "grpo"


def test_an_explicit_flag_wins_even_when_it_is_the_flags_own_default():
    args = parse("--clip_high", "0.2", "--algorithm", "dapo", "--no-dynamic_sampling", "--overlong_buffer=0")
    assert (args.clip_high, args.dynamic_sampling, args.overlong_buffer) == (0.2, False, 0)
    assert args.weight_decay == 0.1
    text = explain(args)
    assert "--clip_high 0.2   (explicit; the preset has 0.28)" in text
    assert "--dynamic_sampling False   (explicit; the preset has True)" in text


def test_explain_tells_the_kl_the_critic_and_that_one_update_clips_nothing():
    text = explain(parse("--algorithm", "grpo"))
    assert "KL to the reference: 0.04 x k3 in the loss\n" in text
    assert "the ratio is 1 and nothing is clipped" in text and "ratio in [0.8, 1.2]" in text
    text = explain(parse("--algorithm", "grpo", "--prompts_per_update", "8", "--kl_control", "adaptive"))
    assert "in the loss, steered to 0.1 per token" in text and "nothing is clipped" not in text
    text = explain(parse("--algorithm", "ppo", "--critic_warmup_steps", "3"))
    assert "critic: learning rate 5e-06, value clip 0.2, alone for the first 3 steps" in text


def test_the_default_of_one_preset_does_not_leak_into_the_next():
    parse("--algorithm", "dapo")
    assert parse("--algorithm", "gspo").dynamic_sampling is False


def test_unknown_algorithm_is_refused_at_parsing(capsys):
    with pytest.raises(SystemExit):
        parse("--algorithm", "grp0")
    assert "invalid choice: 'grp0'" in capsys.readouterr().err


def test_what_a_run_needs():
    assert list(needs(parse("--algorithm", "dapo"))) == ["none"]
    assert list(needs(parse("--algorithm", "grpo"))) == ["reference"]
    assert list(needs(parse("--algorithm", "reinforce_pp"))) == ["old_logprobs", "reference"]
    assert list(needs(parse("--algorithm", "ppo", "--update_epochs", "2"))) == ["old_logprobs", "critic"]
    assert list(needs(parse("--algorithm", "luffy"))) == ["entropy"]
    assert list(needs(parse("--algorithm", "gspo", "--prompts_per_update", "8"))) == ["old_logprobs"]


def test_names_agree_with_the_tables():
    from train.advantages import ADVANTAGES
    from train.losses import KL_ESTIMATORS, LOSS_REDUCTIONS, POLICY_LOSSES
    from train.optimizer import OPTIMIZERS

    assert set(ADVANTAGE_NAMES) == set(ADVANTAGES)
    assert set(POLICY_LOSS_NAMES) == set(POLICY_LOSSES)
    assert set(KL_NAMES) == set(KL_ESTIMATORS)
    assert set(REDUCTION_NAMES) == set(LOSS_REDUCTIONS)
    assert set(OPTIMIZER_NAMES) == set(OPTIMIZERS)
    assert CORRECTION_NAMES[0] == "none"


BAD = [
    (["--algorithm", "rloo", "--group_size", "1"], "--group_size must be at least 2, got 1"),
    (["--advantage", "pass_at_k", "--pass_k", "9", "--algorithm", "dapo"], "between 2 and --group_size 8, got 9"),
    (["--algorithm", "dapo", "--pass_k", "4"], "--pass_k 4 has no meaning for --advantage grpo"),
    (["--algorithm", "opo", "--advantage_std", "batch"], "--advantage_std batch has no meaning for --advantage opo"),
    (["--algorithm", "dapo", "--gamma", "0.9"], "--gamma 0.9 has no meaning for --advantage grpo"),
    (["--algorithm", "reinforce_pp", "--lam", "0.9"], "--lam 0.9 has no meaning for --advantage reinforce_pp"),
    (["--algorithm", "gdpo", "--gdpo_rewards", "accuracy=x"], "'accuracy=x' is not NAME or NAME=WEIGHT"),
    (["--algorithm", "gdpo", "--kl_in", "reward", "--kl_coef", "0.1"], "--kl_in reward would be ignored"),
    (["--algorithm", "gdpo", "--overlong_buffer", "100"], "--advantage gdpo ignores --overlong_buffer 100"),
    (["--algorithm", "gspo", "--clip_high", "0.28"], "--clip_high 0.28 would never act"),
    (["--algorithm", "gspo", "--loss_reduction", "token_mean"], "must be sequence_mean, got token_mean"),
    (["--algorithm", "dapo", "--clip_low", "1"], "--clip_low must be below 1 for --policy_loss ppo_clip"),
    (["--algorithm", "dapo", "--clip_dual", "0.5"], "--clip_dual must be 0 (off) or above 1, got 0.5"),
    (["--algorithm", "cispo", "--clip_dual", "3"], "--clip_dual 3.0 has no meaning for --policy_loss cispo"),
    (["--algorithm", "opo", "--update_epochs", "2"], "exact for one update per step, got 2"),
    (["--algorithm", "opo", "--prompts_per_update", "8"], "exact for one update per step, got 4"),
    (["--algorithm", "grpo", "--kl_coef", "0"], "--kl_in loss needs --kl_coef above 0"),
    (["--algorithm", "dapo", "--kl_coef", "0.1"], "--kl_coef 0.1 acts nowhere with --kl_in none"),
    (["--algorithm", "grpo", "--kl_estimator", "k1"], "expected gradient of zero"),
    (["--algorithm", "dapo", "--kl_control", "adaptive"], "--kl_control adaptive needs --kl_in"),
    (["--algorithm", "dapo", "--correction_min", "3"], "--correction_min 3.0 must be below --correction_max 2.0"),
    (["--algorithm", "dapo", "--reject_above", "0.9"], "--reject_above must be 0 (off) or above 1, got 0.9"),
    (["--algorithm", "dapo", "--filter_low", "0.9", "--filter_high", "0.1"], "--filter_low 0.9 must be below"),
    (["--algorithm", "gspo", "--filter_low", "0.1"], "--filter_low and --filter_high need --dynamic_sampling"),
    (["--algorithm", "dapo", "--overlong_buffer", "5000"], "must be below --max_response_tokens 2048"),
    (["--algorithm", "luffy", "--demonstration_loss", "plain"], "use luffy or another policy loss"),
    (["--algorithm", "dapo", "--critic_warmup_steps", "5"], "needs --advantage gae, got grpo"),
    (["--algorithm", "dapo", "--learning_rate", "0"], "--learning_rate must be above 0, got 0.0"),
    (["--algorithm", "dapo", "--gamma", "1.5"], "--gamma must be between 0 and 1, got 1.5"),
    (["--algorithm", "dapo", "--ema_decay", "1"], "--ema_decay must be in [0, 1), got 1.0"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_combinations_are_named(flags, message):
    problems = check_algorithm_flags(parse(*flags))
    assert len(problems) >= 1 and message in "\n".join(problems)


def test_demonstrations_asked_for_and_not_there_are_named():
    bare, shown = Sample("a", "q", "A", "math", "text"), Sample("b", "q", "A", "math", "text", offline_output="A")
    luffy = parse("--algorithm", "luffy")
    (problem,) = check_samples(luffy, [bare, bare])
    assert "--demonstrations always (--algorithm luffy), but none of the 2 samples carries offline_output" in problem
    assert check_samples(luffy, [bare, shown]) == check_samples(parse(), [bare]) == []


def test_weights():
    assert parse_weights(["accuracy=2", "format"]) == {"accuracy": 2.0, "format": 1.0}
    for bad in (["a=-1"], ["a=nan"], ["a=inf"], ["=1"], ["a", "a=2"], []):
        with pytest.raises(ValueError, match=r".+"):
            parse_weights(bad)


def test_flags_and_presets_need_no_torch():
    code = "import sys, train.args; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
