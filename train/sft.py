"""Supervised training on demonstrations: the cold start before RL.

    torchrun --nproc_per_node 8 train/sft.py --model DIR --data train.jsonl --cache_dir cache --output_dir runs/sft \
        --learning_rate 1e-5

A row's `offline_output` is the single response of a group of one, encoded, packed and cut into micro-batches exactly as
train/main.py does it; the loss is the mean negative log-likelihood of its tokens (the end token included) over the whole
mini-batch on all ranks. --prompts_per_step is the mini-batch. --validate_data measures the same on held-out rows,
--validate_only nothing else.
"""

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # torchrun puts train/ there

from train.args import refuse
from train.sft_args import check_demonstrations, parse_args


@dataclass
class Run:
    """What lives as long as the run, on this rank."""

    args: Any
    device: Any
    encoder: Any
    held_out: list
    loader: Any
    policy: Any
    schedule: Any
    watchdog: Any
    shape: Any


def lesson(prompt, encoder, args):
    """The prompt's demonstration as a group of one."""
    from collections import Counter

    from data.records import Group
    from rollout.collect import demonstration_response

    response = demonstration_response(prompt, encoder, args, Counter())
    if response is None:  # check_demonstrations has looked; a prompt that opens <think> itself changes it by little
        sample = prompt.sample
        raise ValueError(
            f"{sample.file}:{sample.line}: its offline_output is over --max_response_tokens or has a marker"
        )
    return Group(prompt, [response])


def losses(run: Run, groups: list, metrics, name: str, *, real: int | None = None, train: bool = False) -> None:
    """Forward over this rank's groups in micro-batches, `train` with the backward pass. Collective.

    Only the first `real` groups count. Records <name> and <name>/<problem type>, nats per response token; when not training
    <name>_by_source/<source> too.
    """
    import torch

    from train.batching import build_batch
    from train.distributed import all_reduce_sum
    from train.update import plan_micro_batches, to_device

    batch = to_device(build_batch(groups), run.device)
    mask = batch.response_mask
    mask[len(groups) if real is None else real :] = 0.0
    denominator = all_reduce_sum(mask.double().sum()).clamp(min=1.0)
    plan = plan_micro_batches(batch, list(range(len(groups))), args=run.args, shape=run.shape)
    for number, micro in enumerate(plan):
        with torch.set_grad_enabled(train):
            logprobs, _ = run.policy.logprobs(micro.groups)
            part = micro.take(mask)
            nll = -(logprobs * part)  # (b, r)
        if train:
            run.policy.backward((nll.sum() / denominator).float(), last=number == len(plan) - 1)
        for row, total, tokens in zip(micro.rows.tolist(), nll.detach().sum(dim=1), part.sum(dim=1)):
            metrics.mean(name, total, tokens)
            metrics.mean(f"{name}/{batch.problem_types[row]}", total, tokens)
            if not train:
                metrics.mean(f"{name}_by_source/{groups[row].prompt.sample.source}", total, tokens)


def sft_step(run: Run):
    """One update on all ranks -> metrics not yet reduced."""
    from train.metrics import StepMetrics, record_peak

    args, metrics = run.args, StepMetrics(run.watchdog)
    with metrics.timer("load"):
        groups = [lesson(prompt, run.encoder, args) for prompt in run.loader.take(args.prompts_per_step)]
    run.loader.prefetch(args.prompts_per_step)
    for group in groups:
        metrics.spread("prompt/length_", [len(group.prompt.input_ids)])
        metrics.spread("response/length_", [len(group.responses[0].token_ids)])
        metrics.total("tokens/prompt", len(group.prompt.input_ids))
        metrics.total("tokens/response", len(group.responses[0].token_ids))
    with metrics.timer("update"):
        losses(run, groups, metrics, "sft/nll", train=True)
        rate = run.schedule.value()
        report = run.policy.step(rate)
        if not report["skipped"]:
            run.schedule.advance()
    record_peak(metrics, "update")
    for name, value in {
        "learning_rate": rate,
        "grad_norm": report["grad_norm"],
        "skipped_updates": report["skipped"],
    }.items():
        metrics.value(f"policy/{name}", value)
    return metrics


def validate(run: Run) -> dict[str, float]:
    """validate/nll, validate/nll/<problem type> and validate/nll_by_source/<source> over the held-out rows, each counted once.
    Collective."""
    from train import distributed
    from train.metrics import StepMetrics

    metrics, ranks, size = StepMetrics(run.watchdog), distributed.world_size(), run.args.prompts_per_step
    with metrics.timer("validate"):
        for start in range(0, len(run.held_out), size):
            mine = run.held_out[start : start + size][distributed.rank() :: ranks]
            full = -(-min(size, len(run.held_out) - start) // ranks)  # groups of the fullest rank: all make as many
            samples = [*mine, *[run.held_out[0]] * (full - len(mine))]
            groups = [lesson(run.encoder.encode(sample), run.encoder, run.args) for sample in samples]
            losses(run, groups, metrics, "validate/nll", real=len(mine))
    row = metrics.reduce()
    return {name: value for name, value in row.items() if name.startswith(("validate/", "time/validate"))}


def train(args, steps: int, samples: list, held_out: list, encoder) -> int:
    """The loop: updates up to `steps`, validation, checkpoints, signals. Returns the process's exit status."""
    from data.loader import PromptLoader
    from train import checkpoint, distributed, flops, run_log, trackers
    from train.optimizer import Schedule
    from train.plan import check_cache, sample_order, start_ranks
    from train.policy import build_policy

    began = time.monotonic()
    folder = Path(args.output_dir)
    device, lock, resumed, state = start_ranks(args)
    start, stop = state.get("step", 0), distributed.StopSignal(folder / "stop")
    console = trackers.Console(steps, start)
    check_cache(encoder, samples + held_out)
    schedule = Schedule.from_args(args, steps)
    if state:
        schedule.load_state_dict(state["schedule"])
    policy = build_policy(args, device=device, banned_ids=encoder.visual_token_ids)
    if resumed:
        checkpoint.load(resumed, policy)
        console.say(run_log.resumed_text(folder, resumed, start, steps, vars(args)))
    loader = PromptLoader(
        sample_order(args, samples), encoder, replica=distributed.rank(), replicas=distributed.world_size(),
        seed=args.seed, position=state.get("position", 0), workers=args.load_workers,
        failed_file=folder / f"failed-rank{distributed.rank()}.jsonl",
    )  # fmt: skip
    run = Run(args, device, encoder, held_out, loader, policy, schedule,
              distributed.Watchdog(default_limit_s=args.phase_limit_s), flops.read_shape(encoder.config))  # fmt: skip
    run_log.write_run_info(folder, vars(args), resumed_from=str(resumed) if resumed else None)
    log = run_log.RunLog(folder, resume_step=start)
    tracking = trackers.start(args.log_to, trackers.Run("reelrl", folder.name, folder, vars(args), resume_step=start))

    def measured(step: int) -> dict[str, float]:
        scores = validate(run)
        log.write_validation(step, scores, [])
        console.say(f"step {step}: held-out loss {scores['validate/nll']:.4f} of {len(held_out)} samples")
        return scores

    step, why = start, None
    if args.validate_only or (args.validate_at_start and start == 0):
        measured(start)
    while step < steps and not args.validate_only and why is None:
        step += 1
        row = sft_step(run).reduce()
        row["data/position"], row["data/epoch"] = loader.position, loader.position / len(samples)
        row["data/replaced"] = len(loader.failed)
        if args.validate_every and (step % args.validate_every == 0 or step == steps):
            row |= measured(step)
        for text in log.write(step, row):
            console.say(text)
        for tracker in tracking:
            tracker.log(step, trackers.numbers(row))
        console.step(step, row)
        console.say(f"  loss {row['sft/nll']:.4f}")
        why = stop.agreed()
        hours = distributed.broadcast_object((time.monotonic() - began) / 3600)
        if why is None and args.max_hours is not None and hours >= args.max_hours:
            why = f"--max_hours {args.max_hours}"
        if why or step == steps or (args.save_every and step % args.save_every == 0):
            saved = {"position": loader.position, "schedule": schedule.state_dict(), "scores": row}
            checkpoint.save(folder, step, saved, policy, encoder, model_only=args.save_model_only)
            checkpoint.prune(folder, args.keep_last)
    if step >= steps and not args.validate_only and distributed.is_main():
        final = folder / "final"
        shutil.rmtree(final, ignore_errors=True)
        shutil.copytree(folder / "checkpoints" / f"step-{step:06d}" / "hf", final)
        (folder / "done.json").write_text(json.dumps({"step": step, "final": str(final)}))
    console.say(f"stopped after step {step}: {why}" if why else f"done after step {step}")
    for closing in (*tracking, console, loader, run.watchdog):
        closing.close()
    distributed.barrier("leave together")
    distributed.shutdown()
    if lock is not None:
        lock.close()
    return 0


def plan_text(args, samples: list, encoder) -> str:
    """--dry_run: batch arithmetic, token counts, and two samples as they are trained on."""
    from train.plan import total_steps

    steps, tokens = total_steps(args, len(samples)), [encoder.count_tokens(sample) for sample in samples[:200]]
    epochs = steps * args.prompts_per_step / len(samples)
    frozen = [part for part in ("vision_tower", "merger", "language_model") if getattr(args, f"freeze_{part}")]
    lines = [
        f"{len(samples)} samples, {steps} steps of {args.prompts_per_step} = {epochs:.2f} epochs",
        f"frozen: {', '.join(frozen) or 'nothing'}; learning rate {args.learning_rate:g}, vision {args.vision_learning_rate}, "
        f"merger {args.merger_learning_rate}",
        f"prompt tokens of the first {len(tokens)}: longest {max(tokens)}, mean {sum(tokens) / len(tokens):.0f}",
    ]
    for sample in samples[:2]:
        lines += ["", encoder.encode(sample).text + (sample.offline_output or "")]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from train.plan import build_encoder, checked_samples, total_steps

    say = print if int(os.environ.get("RANK", "0")) == 0 else lambda *texts, **where: None
    try:
        samples, held_out = checked_samples(args, say)
        encoder = build_encoder(args)
        samples = check_demonstrations(args, samples, encoder, "train")
        held_out = check_demonstrations(args, held_out, encoder, "validate") if held_out else []
        if args.dry_run:
            say(plan_text(args, samples, encoder))
            return 0
        steps = total_steps(args, len(samples))
    except (ValueError, OSError, ImportError) as error:  # what a user has to correct needs no traceback
        return refuse("train/sft.py", error)
    return train(args, steps, samples, held_out, encoder)


if __name__ == "__main__":
    sys.exit(main())
