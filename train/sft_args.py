"""Flags of train/sft.py: those of train/main.py that supervised training uses; and which rows it can train on."""

from __future__ import annotations

import argparse
import os
import sys

from data.dataset import BadDataset, report_failures
from train.args import build_parser, check_args, finish_args
from train.plan import failed_list

# Groups of train/main.py's flags that mean nothing here, but for KEPT; and single flags of the other groups.
UNUSED_GROUPS = (
    "rollout", "reward", "algorithm", "critic", "kl", "rollout correction", "dynamic sampling", "demonstrations",
)  # fmt: skip
UNUSED = (
    "reference_model", "critic_model", "prompts_per_update", "update_epochs", "skip_zero_advantage", "pack_groups",
    "park",
    "sync_bucket_mib", "check_parity", "profile_steps", "sequence_parallel", "keep_best", "log_rollouts", "explain",
    "log_rollouts_every", "validate_samples", "validate_temperature", "validate_top_p",
    "validate_top_k", "validate_max_response_tokens",
)  # fmt: skip
KEPT = ("prompts_per_step", "max_response_tokens")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """train/main.py's flags that supervised training uses; one of the others is refused. Exits 2 on bad flags."""
    parser = build_parser()
    parser.prog, parser.description = "train/sft.py", "supervised training on demonstrations (offline_output)"
    parser.usage = (
        "torchrun --nproc_per_node N train/sft.py --model DIR --data FILE ... --output_dir DIR [flags; --help]"
    )
    parser.set_defaults(learning_rate=1e-5)
    words = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    refused = []
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.dest in UNUSED or (group.title in UNUSED_GROUPS and action.dest not in KEPT):
                action.help = argparse.SUPPRESS
                refused += [word for word in action.option_strings if word in words]
    if refused:
        parser.error(f"{', '.join(refused)}: of RL alone; train/sft.py samples nothing")
    args = parser.parse_args(argv)
    if args.kept_layers == "auto":
        parser.error("--kept_layers auto is decided before train/main.py's updates; give train/sft.py a number")
    finish_args(args)
    problems = check_args(args, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    if problems:
        parser.error("\n  ".join(["these flags cannot run together:", *problems]))
    # What rollout.collect takes a demonstration by.
    args.demonstrations, args.demonstration_on_long, args.group_size = "always", "refuse", 1
    return args


def check_demonstrations(args, samples: list, encoder, role: str) -> list:
    """The samples whose demonstration can be trained on; raises BadDataset for the others, or lists them under
    --on_bad_sample skip."""
    good, problems = [], []
    for sample in samples:
        text = (sample.offline_output or "").strip()
        ids = encoder.tokenizer.encode(text, add_special_tokens=False)
        reason = None if text else "offline_output: missing or empty"
        if len(ids) >= args.max_response_tokens:
            reason = (
                f"offline_output: {len(ids) + 1} tokens, more than --max_response_tokens {args.max_response_tokens}"
            )
        if set(ids) & set(encoder.visual_token_ids):
            reason = "offline_output: holds a marker of media"
        if reason is None:
            good.append(sample)
        else:
            place = {"file": sample.file, "line": sample.line, "id": sample.id, "path": None}
            problems.append(
                {**place, "reason": reason, "remedy": "correct the row or the flag, or --on_bad_sample skip"}
            )
    if problems and (args.on_bad_sample == "error" or not good):
        raise BadDataset(problems)
    if problems:
        report_failures(problems, failed_list(args, role))
    return good
