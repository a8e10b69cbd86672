"""Train a Qwen vision-language model by reinforcement learning.

    torchrun --nproc_per_node 8 train/main.py --model Qwen3-VL-8B-Instruct --data train.jsonl --cache_dir cache \
        --output_dir runs/first --algorithm dapo

One RL step is rl_step() below, top to bottom: sample groups while they are scored, put vLLM to sleep, log-probs where they
are needed, advantages, updates in packed micro-batches, wake vLLM and send it the weights. `--dry_run` prints the plan
without a model; `--explain` prints what the algorithm's flags do; `--help` lists all flags in groups.
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

from train.args import parse_args, profiled_steps, refuse

SCORING_TROUBLE = ("timeout", "killed", "judge_failed", "bad_ground_truth")  # rank 0's counts so far, logged if any


@dataclass
class Run:
    """What lives as long as the run, on this rank."""

    args: Any
    device: Any
    replica: int  # the data-parallel replica this rank belongs to, of `replicas`
    replicas: int
    encoder: Any
    validation_encoder: Any
    held_out: list
    loader: Any
    scorer: Any
    policy: Any
    reference: Any  # None unless the KL needs it
    critic: Any  # None unless the advantage is gae
    engine: Any
    algorithm: Any  # AlgorithmState: KL coefficient, running scales
    schedule: Any  # learning rate
    carry: Any  # surplus groups of dynamic sampling
    watchdog: Any
    shape: Any  # of the model, for FLOPs
    planning: dict  # what plan_micro_batches needs in every step


def rl_step(run: Run, step: int):
    """One step on all ranks -> (metrics not yet reduced, this rank's groups)."""
    import torch

    from rollout.collect import collect
    from train.advantages import ADVANTAGES
    from train.batching import build_batch
    from train.distributed import all_gather_objects, all_reduce_sum
    from train.losses import loss_mask
    from train.memory import Room
    from train.metrics import StepMetrics, device_bytes, record_asleep, record_groups, record_peak, record_tokens
    from train.presets import needs
    from train.sequence_parallel import share_groups
    from train.update import (
        all_logprobs,
        all_values,
        check_parity,
        keep_what_fits,
        mean_over_ranks,
        plan_micro_batches,
        plan_updates,
        to_device,
        update_critic,
        update_policy,
    )  # fmt: skip

    args, policy, engine, needed = run.args, run.policy, run.engine, needs(run.args)
    metrics = StepMetrics(run.watchdog, copies=max(args.tensor_parallel, args.sequence_parallel))

    with metrics.timer("rollout"):
        collected = collect(
            run.loader, engine, run.scorer, args, step, encoder=run.encoder, carry=run.carry,
            all_gather=all_gather_objects, share=lambda scores: share_scores(run, scores),
        )  # fmt: skip
        metrics.ratios(collected.metrics)
        collected = share_groups(collected, args.sequence_parallel, args.tensor_parallel)
    run.loader.prefetch(args.prompts_per_step)  # the next step's frames are read while this one trains
    record_peak(metrics, "rollout")
    with metrics.timer("sleep"):
        awake = device_bytes()
        engine.sleep()
        sleeping = awake - record_asleep(metrics)
        policy.unpark()
    room = Room()

    batch = to_device(build_batch(collected.groups), run.device)
    if collected.baseline_rewards is not None:
        batch.baseline_rewards = torch.tensor(collected.baseline_rewards, device=run.device)
    record_groups(metrics, batch.groups, run.shape, tower="frozen" if args.freeze_vision_tower else "trained")
    passes = plan_micro_batches(batch, list(range(len(batch.groups))), **run.planning)
    policy.encode_frozen([micro.groups for micro in passes])
    if "old_logprobs" in needed or args.check_parity:
        with metrics.timer("old_logprobs"):
            batch.old_logprobs = all_logprobs(policy, batch, passes, args)
    if "reference" in needed:
        with metrics.timer("ref_logprobs"):
            batch.ref_logprobs = all_logprobs(run.reference, batch, passes, args)
    if "critic" in needed:
        with metrics.timer("values"):
            batch.values = all_values(run.critic, batch, passes)
    if args.check_parity:
        check_parity(batch, policy.dtype, metrics)

    batch.advantages, batch.returns = ADVANTAGES[args.advantage](
        batch, args, all_reduce_sum=all_reduce_sum, state=run.algorithm
    )
    record_tokens(metrics, "advantages", batch.advantages, batch.response_mask)
    mask = loss_mask(batch.response_mask, batch.truncated, batch.is_demonstration, args)
    with metrics.timer("update"):
        for epoch in range(args.update_epochs):
            for indices, mini in plan_updates(batch, **run.planning, replicas=run.replicas, epoch=epoch):
                if "critic" in needed:
                    whole = plan_micro_batches(batch, indices, **run.planning)
                    update_critic(run.critic, batch, indices, whole, args=args, metrics=metrics)
                if step > args.critic_warmup_steps:
                    keep_what_fits(policy, mini, room, run.shape, args, metrics)
                    update_policy(
                        policy, batch, indices, mini, mask,
                        schedule=run.schedule, kl_coef=run.algorithm.kl_coef, args=args, metrics=metrics,
                    )  # fmt: skip
    policy.forget_features()
    if args.kl_control == "adaptive":
        mean_kl = mean_over_ranks(metrics, "policy/ref_kl")
        run.algorithm.update_kl(mean_kl, args.prompts_per_step * args.group_size, args)
    metrics.value("policy/kl_coef", run.algorithm.kl_coef)

    record_peak(metrics, "update", sleeping)
    with metrics.timer("sync"):
        if args.park:
            policy.park()
        engine.wake(weights=True, kv=False)
        engine.sync(policy.named_tensors(args.sync_bucket_mib << 20))
        engine.wake(weights=False, kv=True)
    return metrics, batch.groups


def share_scores(run: Run, scores: list) -> list:
    """The scores of the first rank of this tensor-parallel engine: its ranks must not decide differently."""
    from train.distributed import all_gather_objects

    if run.args.tensor_parallel == 1:
        return scores
    return all_gather_objects(scores)[run.replica * run.args.tensor_parallel]


def build(args, steps: int, samples, held_out, device, state: dict) -> Run:
    """Everything a run of `steps` needs, in the only order that works: scorer (before CUDA and vLLM), policy, then vLLM."""
    from data.loader import PromptLoader
    from rewards.pool import ScoringPool
    from rollout.collect import CarryOver
    from train import checkpoint, distributed, flops
    from train.advantages import AlgorithmState
    from train.optimizer import Schedule
    from train.plan import (
        build_encoder,
        build_engine,
        check_cache,
        sample_order,
        validation_budgets,
    )  # fmt: skip
    from train.policy import build_critic, build_policy, build_reference
    from train.presets import needs

    ranks, rank = distributed.world_size(), distributed.rank()
    replicas, replica = ranks // args.tensor_parallel, rank // args.tensor_parallel
    scorer = ScoringPool.from_args(args)
    watchdog = distributed.Watchdog(default_limit_s=args.phase_limit_s)
    encoder = build_encoder(args)
    check_cache(encoder, samples)
    updates = steps * args.update_epochs * (args.prompts_per_step // args.prompts_per_update)
    algorithm, schedule = AlgorithmState.start(args), Schedule.from_args(args, updates)
    if state:
        algorithm.load_state_dict(state["algorithm"])
        schedule.load_state_dict(state["schedule"])
    needed, banned = needs(args), encoder.visual_token_ids
    policy = build_policy(args, device=device, banned_ids=banned)
    reference = build_reference(args, device=device, banned_ids=banned) if "reference" in needed else None
    critic = build_critic(args, device=device, banned_ids=banned) if "critic" in needed else None
    if args.park:
        policy.park()  # DeepSpeed has made them: vLLM starts and samples without them from the first step on
    engine = build_engine(args, encoder, device)
    order = sample_order(args, samples)
    loader = PromptLoader(
        order, encoder, replica=replica, replicas=replicas, seed=args.seed, position=state.get("position", 0),
        failed_file=Path(args.output_dir) / f"failed-rank{rank}.jsonl", workers=args.load_workers,
    )  # fmt: skip
    carry, shape = CarryOver(), flops.read_shape(encoder.config)
    if state:
        by_id = {sample.id: sample for sample in samples}
        waiting = checkpoint.dealt(state["carry"], replica, replicas)
        carry.load_state_dict(waiting, lambda name: encoder.encode(by_id[name]))
    planning = {"args": args, "shape": shape}
    return Run(
        args, device, replica, replicas, encoder, encoder.with_budgets(**validation_budgets(args)), held_out, loader,
        scorer, policy, reference, critic, engine, algorithm, schedule, carry, watchdog, shape, planning,
    )  # fmt: skip


def save_checkpoint(run: Run, step: int, scores: dict, *, model_only: bool) -> None:
    """All of the run's state; then prune, keeping the best by --keep_best if its score was measured at that step."""
    from train import checkpoint, distributed

    args = run.args
    state = {
        "position": run.loader.position,
        "algorithm": run.algorithm.state_dict(),
        "schedule": run.schedule.state_dict(),
        "carry": distributed.all_gather_objects(run.carry.state_dict())[:: args.tensor_parallel],
        "scores": scores,
    }
    folder = checkpoint.save(
        args.output_dir, step, state, run.policy, run.encoder, critic=run.critic, model_only=model_only
    )
    best = checkpoint.best(args.output_dir, args.keep_best) if args.keep_best else None
    checkpoint.prune(args.output_dir, args.keep_last, best)
    if distributed.is_main():
        (Path(args.output_dir) / "checkpoints" / "newest").write_text(folder.name + "\n")


def train(args, steps: int, samples, held_out) -> int:
    """The loop around rl_step(), up to `steps`: validation, checkpoints, logs, signals. Returns the process's exit status."""
    import torch

    from train import checkpoint, distributed, run_log, trackers
    from train.flops import bf16_peak_flops
    from train.plan import start_ranks
    from train.report import write_report
    from train.validation import validate

    began = time.monotonic()
    folder = Path(args.output_dir)
    device, lock, resumed, state = start_ranks(args)
    start = state.get("step", 0)
    stop = distributed.StopSignal(folder / "stop")
    console = trackers.Console(steps, start)
    console.say(f"building the policy and the rollout engine on {distributed.world_size()} rank(s), {device.type}")
    run = build(args, steps, samples, held_out, device, state)
    if resumed:
        run.policy.unpark()  # loading puts other tensors in their place
        checkpoint.load(resumed, run.policy, critic=run.critic)
        if args.park:
            run.policy.park()
        console.say(run_log.resumed_text(folder, resumed, start, steps, vars(args)))
    if distributed.is_main():
        run_log.write_run_info(folder, vars(args), resumed_from=str(resumed) if resumed else None)
    log = run_log.RunLog(folder, resume_step=start)
    tracking = trackers.start(args.log_to, trackers.Run("reelrl", folder.name, folder, vars(args), resume_step=start))
    run.engine.sync(run.policy.named_tensors(args.sync_bucket_mib << 20))  # also checks the names of all weights

    def validation(step: int) -> dict[str, float]:
        with console.phase(f"validating on {len(run.held_out)} samples"), run.watchdog.phase("validate"):
            row, groups = validate(
                run.engine, run.validation_encoder, run.held_out, run.scorer, args, step,
                replica=run.replica, replicas=run.replicas,
            )  # fmt: skip
        log.write_validation(step, row, groups)
        console.say(
            f"step {step}: held-out accuracy {row.get('validate/accuracy', 0):.3f} of {len(run.held_out)} samples"
        )
        return row

    peak = bf16_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    scores: dict[str, float] = state.get("scores", {})
    if args.validate_only or (args.validate_at_start and start == 0):
        scores = validation(start)
    step, why = start, None
    while step < steps and not args.validate_only and why is None:
        step += 1
        profiler = run_log.start_profiler() if step in profiled_steps(args) and distributed.is_main() else None
        with console.phase(f"step {step}"):
            metrics, groups = rl_step(run, step)
        if profiler:
            run_log.write_profile(profiler, folder / "profile" / f"step-{step:06d}.json")
        row = metrics.reduce(peak)
        row["data/position"], row["data/epoch"] = run.loader.position, run.loader.position / len(samples)
        row["data/replaced"] = len(run.loader.failed)
        trouble = [word for word in SCORING_TROUBLE if word in run.scorer.counts]
        row |= {f"scoring/{word}": run.scorer.counts[word] for word in trouble}
        scores = {}
        if run.held_out and args.validate_every and step % args.validate_every == 0:
            scores = validation(step)
        for text in log.write(step, row | scores):
            console.say(text)
        shown = args.log_rollouts_every and (step % args.log_rollouts_every == 0 or step in (1, steps))
        if args.log_rollouts and shown:
            log.write_rollouts(step, groups, args.log_rollouts)
        for tracker in tracking:
            tracker.log(step, trackers.numbers(row | scores))
        console.step(step, row)
        why = stop.agreed()
        hours = distributed.broadcast_object((time.monotonic() - began) / 3600)
        if why is None and args.max_hours is not None and hours >= args.max_hours:
            why = f"--max_hours {args.max_hours}"
        if why or step == steps or (args.save_every and step % args.save_every == 0):
            with console.phase(f"saving step {step}"), run.watchdog.phase("save"):
                save_checkpoint(run, step, row | scores, model_only=args.save_model_only)
    finished = step >= steps and not args.validate_only
    if finished and distributed.is_main():
        final = folder / "final"
        shutil.rmtree(final, ignore_errors=True)
        shutil.copytree(folder / "checkpoints" / f"step-{step:06d}" / "hf", final)
        (folder / "done.json").write_text(json.dumps({"step": step, "final": str(final)}))
    if distributed.is_main() and not args.validate_only:
        write_report(folder)
        console.say(f"report: {folder / 'report.html'}")
    console.say(f"stopped after step {step}: {why}" if why else f"done after step {step}")
    for closing in (*tracking, console, run.loader, run.scorer, run.watchdog):
        closing.close()
    distributed.barrier("leave together")
    run.engine.close()
    distributed.shutdown()
    if lock is not None:
        lock.close()
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from train.plan import build_encoder, checked_samples, dry_run, total_steps
    from train.presets import explain

    say = print if int(os.environ.get("RANK", "0")) == 0 else lambda *texts, **where: None
    if args.explain:
        say(explain(args))
        return 0
    try:
        samples, held_out = checked_samples(args, say)
        if args.dry_run:
            say(dry_run(args, samples, build_encoder(args), world_size=int(os.environ.get("WORLD_SIZE", "1"))))
            return 0
        steps = total_steps(args, len(samples))
    except (ValueError, OSError, ImportError) as error:  # what a user has to correct needs no traceback
        return refuse("train/main.py", error)
    return train(args, steps, samples, held_out)


if __name__ == "__main__":
    sys.exit(main())
