"""One whole RL step, phase by phase: the usual video-RL dataflow against ReelRL's, every lever added one by one.

    python scripts/bench_step.py --size tiny --steps 1                               # any machine: ratios, not speed
    python scripts/bench_step.py --size 2b --budget_s 540 --out results-2b.json      # one H200, within 10 minutes
    torchrun --nproc_per_node 2 scripts/bench_step.py --size 8b --out results-8b.json
    python scripts/bench_step.py --size 2b --workload peer --variants g g-fly --out results-peer.json

A Qwen3-VL of a published size with random weights and real 720p clips, both made on the spot. One rollout engine (CUDA
graphs, TP 1, prefix cache) and one ZeRO-3 policy serve all variants, with the same kernels, the same prompts and the
same response lengths (forced). Variants:
    a      the usual dataflow: clips decoded (decord, default threads, qwen-vl-utils) and processed by the loader, again
           for the rollout, again for training; one row per response; old log-probs always
    b      a with float32 frames from a cache (torch.save): read and processed three times; the baseline
    c      b with uint8 frames cached, read and encoded once for all three
    d      c with the vision tower run once per group (per --once_rows rows), prompt tokens still once per response
    e      c with the packed group: prompt and tower once per group
    f      e without the pass for old log-probs, which one update per step does not need
    g      f with the next step's clips read while this one trains: everything on
    g-fly  g without any cache: our decoder, while the update runs
In favour of a and b: their patches for training are ready as bytes (the processor's floats are made and timed, then
dropped), loaders and decoders run in parallel, groups stay on one rank, logits exist at response tokens only.

Results go to --out after every step; the same command again measures only what is missing. With --budget_s, steps
that do not fit are skipped and listed. Useful FLOPs count a prompt once, for all variants alike (train/flops.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import cProfile
import multiprocessing
import os
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

from scripts.bench_inputs import (
    VARIANTS,
    Clips,
    Variant,
    for_rollout,
    for_training,
    metadata_of,
    take_prompts,
    video_flags,
)
from scripts.bench_models import (
    SHAPE_OF,
    ClipShape,
    load_one,
    make_clips,
    model_folder,
    save_model_folder,
    store_floats,
)
from scripts.bench_results import (
    host_facts,
    kernel_table,
    longest_calls,
    open_results,
    over_ranks,
    parse_flags,
    print_table,
    response_lengths,
    save,
    summarise,
    training_arguments,
)

REPEATED = ("g", "b", "a", "g-fly")  # --steps each; the others --lever_steps
# Guess before a variant was measured, as a share of the last step of a row variant (b).
GUESS = {"g": 0.4, "b": 3.0, "a": 1.5, "g-fly": 0.5, "c": 1.0, "e": 0.6, "f": 0.5, "d": 0.8}


@dataclass
class Bench:
    """What lives as long as the process."""

    flags: Namespace
    args: Namespace  # train/main.py's flags
    device: object
    samples: list
    artifacts: dict  # sample id -> stored float frames
    ready: dict  # sample id -> Prompt, for a and b
    loaders: dict  # source -> PromptLoader
    pool: object  # loader processes of a and b, None where they are not run
    threads: ThreadPoolExecutor
    policy: object
    engine: object
    shape: object
    seconds: dict  # phase -> seconds of the running step
    profiler: object = None  # of the running step's update, if that is asked for
    rollout_calls: str = ""  # what Python did in the rollout of that step


@contextmanager
def phase(bench: Bench, name: str):
    """Adds the time inside to bench.seconds[name]: all ranks start together, and the GPU has to be done at the end."""
    import torch

    from train import distributed

    wait = torch.cuda.synchronize if bench.device.type == "cuda" else lambda: None
    wait()
    distributed.barrier(f"before {name}")
    watching = bench.profiler if name == "update" else None
    calls = cProfile.Profile() if bench.profiler and name == "rollout" else None
    if watching:
        watching.start()
    if calls:
        calls.enable()
    began = time.perf_counter()
    yield
    if calls:
        calls.disable()
        bench.rollout_calls = longest_calls(calls)
    wait()
    distributed.barrier(f"after {name}")
    bench.seconds[name] = bench.seconds.get(name, 0.0) + time.perf_counter() - began
    if watching:
        watching.stop()


# ---- training side --------------------------------------------------------------------------------------------------


def plan_layout(bench: Bench, variant: Variant, batch, args) -> list:
    """The step's micro-batches: packed groups, or one response each, or rows whose tower runs once."""
    import torch

    from data.records import Group
    from train.batching import MicroBatch
    from train.update import plan_micro_batches

    indices = list(range(len(batch.groups)))
    if variant.layout == "packed":
        return plan_micro_batches(batch, indices, args=args, shape=bench.shape)
    together = 1 if variant.layout == "rows" else bench.flags.once_rows
    plan = []
    for index, group in enumerate(batch.groups):
        size, prompt = len(group.responses), group.prompt
        bare = replace(prompt, patches=prompt.patches[:0], grid_thw=prompt.grid_thw[:0])
        for start in range(0, size, together):
            part = group.responses[start : start + together]
            groups = [Group(bare if number else prompt, [response]) for number, response in enumerate(part)]
            rows = torch.arange(index * size + start, index * size + start + len(part))
            plan.append(MicroBatch(groups, rows))
    return plan


def run_step(bench: Bench, name: str, step: int, *, prompts: int, lengths: list[list[int]], check: bool) -> dict:
    """One step of a variant -> its record: seconds by phase, tokens, memory, useful FLOPs."""
    import torch

    from train import distributed
    from train.advantages import ADVANTAGES, AlgorithmState
    from train.batching import build_batch, group_cost
    from train.losses import loss_mask
    from train.metrics import StepMetrics
    from train.optimizer import Schedule
    from train.update import all_logprobs, to_device, update_policy

    variant, policy, engine = VARIANTS[name], bench.policy, bench.engine
    bench.seconds = {}
    size, world = len(lengths[0]), distributed.world_size()
    args = Namespace(**{**vars(bench.args), "group_size": size, "prompts_per_step": prompts * world})
    args.prompts_per_update = args.prompts_per_step
    cuda = bench.device.type == "cuda"
    metrics = StepMetrics()
    with phase(bench, "load"):
        taken = take_prompts(bench, variant, step, prompts)
    with phase(bench, "rollout"):
        groups = sample(bench, for_rollout(bench, variant, taken), taken, lengths, step)
    if variant.prefetch:
        bench.loaders[variant.source].position = (step + 1) * prompts * world
        bench.loaders[variant.source].prefetch(prompts * world)
    before = used_gib(cuda)
    with phase(bench, "sleep"):
        engine.sleep()
    asleep = used_gib(cuda)
    if args.park:
        with phase(bench, "unpark"):
            policy.unpark()
    with phase(bench, "prepare"):
        for_training(bench, variant, taken, check)
        batch = to_device(build_batch(groups), bench.device)
        plan = plan_layout(bench, variant, batch, args)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with layout_of(policy, variant, bench.flags, args):
        if variant.old_pass:
            with phase(bench, "old_logprobs"):
                batch.old_logprobs = all_logprobs(policy, batch, plan, args)
        batch.advantages, batch.returns = ADVANTAGES[args.advantage](
            batch, args, all_reduce_sum=distributed.all_reduce_sum, state=AlgorithmState.start(args)
        )
        mask = loss_mask(batch.response_mask, batch.truncated, batch.is_demonstration, args)
        with phase(bench, "update"):
            update_policy(
                policy, batch, list(range(prompts)), plan, mask,
                schedule=Schedule.from_args(args, 1), kl_coef=0.0, args=args, metrics=metrics,
            )  # fmt: skip
    # torch goes on counting vLLM's sleeping tensors, although their memory is unmapped: take it off.
    peak = torch.cuda.max_memory_allocated() / 2**30 - (before - asleep) if cuda else None
    if args.park:
        with phase(bench, "park"):
            policy.park()
    with phase(bench, "wake"):
        engine.wake(weights=True, kv=False)
    with phase(bench, "sync"):
        engine.sync(policy.named_tensors(args.sync_bucket_mib << 20))
    with phase(bench, "wake"):
        engine.wake(weights=False, kv=True)
    if variant.prefetch:  # what the update did not hide
        with phase(bench, "load"):
            wait_for_prefetch(bench.loaders[variant.source])
    responses = sum(len(response.token_ids) for group in groups for response in group.responses)
    record = {
        "seconds": {key: round(value, 4) for key, value in bench.seconds.items()},
        "step_s": round(sum(bench.seconds.values()), 4),
        "prompt_tokens": [len(group.prompt.input_ids) for group in groups],
        "response_tokens": responses,
        "row_tokens": size * sum(len(group.prompt.input_ids) for group in groups) + responses,
        "useful_flops": sum(group_cost(group, bench.shape) for group in groups),
        "peak_update_gib": peak,
        "freed_by_sleep_gib": round(before - asleep, 2),
        "used_asleep_gib": round(asleep, 2),
        "grad_norm": float(metrics.sums["policy/grad_norm"]),
        "log_ratio": abs_log_ratio(metrics),
    }
    return over_ranks(distributed.all_gather_objects(record))


def wait_for_prefetch(loader) -> None:
    for future in list(loader._ahead.values()):
        future.result()


def abs_log_ratio(metrics) -> float:
    """Mean distance of the trainer's and the sampler's log-probs: shows that both see the same prompt and weights."""
    name = "mismatch/abs_log_ratio"
    return float(metrics.sums[name]) / max(1.0, float(metrics.counts[name]))


@contextmanager
def layout_of(policy, variant: Variant, flags: Namespace, args: Namespace):
    """Variant d: each micro-batch is one group's rows, and only the first carries patches; the others repeat its
    features. Packed variants keep their own number of layers."""
    from train.policy import checkpoint_activations

    if variant.layout == "packed" and flags.packed_kept_layers is not None:
        checkpoint_activations(policy.packed.hf, flags.packed_kept_layers, args.kept_vision_layers)
        try:
            yield
        finally:  # after a failed step, too: the next variant has its own
            checkpoint_activations(policy.packed.hf, args.kept_layers, args.kept_vision_layers)
        return
    if variant.layout != "once":
        yield
        return
    packed, original, forward = policy.packed, policy.packed.visual_features, policy.packed.forward
    rows = [1]

    def visual_features(patches, grid_thw):
        features, real = original(patches, grid_thw)
        return [feature.repeat(rows[0], 1) for feature in features], real

    def counted(inputs, **settings):
        rows[0] = len(inputs.layout.spans)
        return forward(inputs, **settings)

    packed.visual_features, packed.forward = visual_features, counted
    try:
        yield
    finally:
        del packed.visual_features, packed.forward


def sample(bench: Bench, asked: list, prompts: list, lengths: list[list[int]], step: int) -> list:
    """Groups with responses of exactly these lengths, and rewards 0 and 1 in turn, so that no advantage is zero."""
    from data.records import Group

    sampling = [{"temperature": bench.args.temperature, "max_tokens": limits, "ignore_eos": True} for limits in lengths]
    groups = [None] * len(prompts)
    for index, responses in bench.engine.generate(asked, n=len(lengths[0]), sampling=sampling, step=step):
        for number, response in enumerate(responses):
            if len(response.token_ids) != lengths[index][number]:
                raise RuntimeError(f"a response has {len(response.token_ids)} tokens, not {lengths[index][number]}")
            response.reward = float(number % 2)
        groups[index] = Group(prompts[index], responses)
    return groups


def used_gib(cuda: bool) -> float:
    """Memory in use on the device by anyone, GiB; 0 on a CPU."""
    import torch

    if not cuda:
        return 0.0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


# ---- setting up -----------------------------------------------------------------------------------------------------


def build(flags: Namespace) -> Bench:
    """Clips, processes, model, caches, policy, engine, in the order that works."""
    from data.frame_cache import FrameCache
    from data.loader import PromptLoader
    from data.records import Media, Sample
    from train import distributed
    from train.flops import read_shape
    from train.plan import build_encoder, build_engine, seed_everything
    from train.policy import build_policy

    local = int(os.environ.get("LOCAL_RANK", "0"))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    folder = Path(flags.work_dir)
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    variants = [VARIANTS[name] for name in flags.variants]
    usual = any(variant.usual for variant in variants)
    workers = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    pool = None
    if usual:  # started before CUDA is; a process imports for seconds, so it works once before the clock does
        pool = ProcessPoolExecutor(min(workers, flags.prompts), mp_context=multiprocessing.get_context("spawn"))
        list(pool.map(len, ["start"] * min(workers, flags.prompts)))
    shape = SHAPE_OF.get(flags.size, ClipShape())
    say("making clips")
    clips = make_clips(folder / "clips", shape, flags.clips) if local == 0 else None
    device = distributed.init()
    distributed.init_deepspeed(device)
    clips = distributed.broadcast_object(clips)
    say("making the model")
    model_dir = str(model_folder(folder, flags.size, device.type))
    if local == 0:
        save_model_folder(flags.size, Path(model_dir), str(device))
        free_memory()
    distributed.barrier("model made")
    args = training_arguments(flags, model_dir, ranks)
    samples = [
        Sample(f"clip{number}", "Which colour is the square?", "A", "multiple choice", "video",
               media=(Media("video", path=clip),), options=("red", "green"))
        for number, clip in enumerate(clips)
    ]  # fmt: skip
    encoder = build_encoder(args)
    say("filling the frame cache")
    threads = ThreadPoolExecutor(max(2, min(workers, flags.clips)))
    if local == 0:
        cache = FrameCache(args.cache_dir, "prefer")
        list(threads.map(lambda sample: cache.frames(sample.media[0], encoder.video), samples))
    distributed.barrier("cache filled")
    ready = {sample.id: encoder.encode(sample) for sample in samples} if usual else {}
    artifacts = {}
    if any(variant.source == "float" for variant in variants):
        artifacts = {sample.id: str(folder / f"{flags.size}-{flags.frames}-{sample.id}.pt") for sample in samples}
        if local == 0:
            say("storing float frames")
            store = lambda sample: store_floats(  # noqa: E731
                sample.media[0].path, video_flags(args), artifacts[sample.id]
            )
            list(threads.map(store, samples))
        distributed.barrier("float frames stored")
    if pool is not None:  # every loader process imports and builds its processor before the clock runs
        source = "float" if artifacts else "decode"
        jobs = [
            pool.submit(
                load_one, source, artifacts.get(sample.id, sample.media[0].path), video_flags(args), model_dir,
                ready[sample.id].text, metadata_of(ready[sample.id]),
            )
            for sample in samples * 2
        ]  # fmt: skip
        for job in jobs:
            job.result()
    loaders = {
        source: PromptLoader(
            Clips(samples), encoder if source == "cache" else encoder.with_budgets(cache=FrameCache(None, "off")),
            replica=distributed.rank(), replicas=ranks, workers=args.load_workers,
        )
        for source in ("cache", "fly")
    }  # fmt: skip
    seed_everything(args.seed)
    say("building the policy")
    policy = build_policy(args, device=device, banned_ids=encoder.visual_token_ids)
    if args.park:
        policy.park()
    say("starting vLLM")
    engine = build_engine(args, encoder, device)
    engine.sync(policy.named_tensors(args.sync_bucket_mib << 20))
    return Bench(
        flags, args, device, samples, artifacts, ready, loaders, pool, threads, policy, engine,
        read_shape(encoder.config), {},
    )  # fmt: skip


def free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


BEGAN = time.monotonic()


def say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


def measure(bench: Bench, results: dict) -> None:
    """Round by round, so that what matters most is there when the budget ends. Rank 0 decides, all ranks follow."""
    from train import distributed

    flags, warm = bench.flags, set()
    last = {name: max(run["step_s"] for run in runs) for name, runs in results["runs"].items() if runs}
    for number in range(flags.steps):
        for name in flags.variants:
            done = len(results["runs"].get(name, []))
            wanted = flags.steps if name in REPEATED else min(flags.lever_steps, flags.steps)
            if done > number or number >= wanted or name in results["failed"]:
                continue
            guess = 1.1 * last[name] if name in last else GUESS[name] * last.get("b", last.get("g", 0.0))
            left = float("inf") if flags.budget_s is None else flags.budget_s - (time.monotonic() - BEGAN)
            if distributed.broadcast_object(left < guess):
                results["skipped"][name] = f"step {number + 1}: about {guess:.0f} s, {left:.0f} s of --budget_s left"
                continue
            record = one_step(bench, name, number, warm, results)
            if record is None:
                continue
            last[name] = record["step_s"]
            results["runs"].setdefault(name, []).append(record)
            results["summary"] = summarise(results)
            text = " ".join(f"{key} {value:.2f}" for key, value in record["seconds"].items())
            say(f"{name} step {number + 1}: {record['step_s']:.2f} s ({text})")
            save(flags, results)


def warm_up(bench: Bench, name: str, results: dict) -> None:
    """One group of two short responses. A vLLM that takes no float frames gets bytes from a and b, and a note says so."""
    from train import distributed

    usual = VARIANTS[name].usual
    try:
        run_step(bench, name, 0, prompts=1, lengths=[[9, 17]], check=usual)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        awake = not any(bench.engine._asleep.values())
        if not (usual and awake and bench.flags.recipe_frames == "float" and distributed.world_size() == 1):
            raise
        bench.flags.recipe_frames = "uint8"
        results["notes"]["recipe_frames"] = f"vLLM got uint8 frames in a and b: {type(error).__name__}: {error}"[:400]
        say(results["notes"]["recipe_frames"])
        run_step(bench, name, 0, prompts=1, lengths=[[9, 17]], check=usual)


def one_step(bench: Bench, name: str, number: int, warm: set[str], results: dict) -> dict | None:
    """A warm-up where the variant is new (one group of two short responses), then the step; None if it failed."""
    from train import distributed

    flags, rank = bench.flags, distributed.rank()
    try:
        if name not in warm:
            say(f"{name}: warm-up")
            warm_up(bench, name, results)
            warm.add(name)
        if VARIANTS[name].prefetch:  # as the step before would have done; what it could not hide, it has paid for
            loader = bench.loaders[VARIANTS[name].source]
            loader.position = number * flags.prompts * distributed.world_size()
            loader.prefetch(flags.prompts * distributed.world_size())
            wait_for_prefetch(loader)
        lengths = response_lengths(
            flags.response_tokens, flags.prompts, flags.group_size, flags.max_response_tokens, [number, rank]
        )
        return run_step(bench, name, number, prompts=flags.prompts, lengths=lengths, check=False)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError, AssertionError) as error:
        if distributed.world_size() > 1:
            raise  # the other ranks are inside a collective
        import traceback

        traceback.print_exc()
        results["failed"][name] = f"{type(error).__name__}: {str(error)[:400]}"
    # Not before the handler is left: until then the error's frames hold every tensor of the failed step.
    save(flags, results)
    if bench.args.park:  # it may have failed between bringing the states back and parking them
        bench.policy.park()
    free_memory()
    bench.engine.wake(weights=True, kv=False)
    bench.engine.sync(bench.policy.named_tensors(bench.args.sync_bucket_mib << 20))
    bench.engine.wake(weights=False, kv=True)
    return None


def profile_updates(bench: Bench, results: dict) -> None:
    """--profile: one more step of these variants: the longest kernels of its update (on a CPU: operators), the longest
    Python functions of its rollout."""
    from torch.profiler import ProfilerActivity, profile

    from train import distributed

    flags, cuda = bench.flags, bench.device.type == "cuda"
    for name in flags.profile:
        if name not in results["runs"] or name in results["failed"] or name in results["profile"]:
            continue
        left = float("inf") if flags.budget_s is None else flags.budget_s - (time.monotonic() - BEGAN)
        if distributed.broadcast_object(left < 2 * results["runs"][name][-1]["step_s"]):
            results["skipped"][f"profile of {name}"] = f"{left:.0f} s of --budget_s left"
            continue
        bench.profiler = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])
        record, profiler = one_step(bench, name, 0, {name}, results), bench.profiler
        bench.profiler = None
        if record is None:  # the variant's own steps are measured
            results["notes"][f"profile of {name}"] = results["failed"].pop(name)
            continue
        results["profile"][name] = kernel_table(profiler, cuda)
        say(f"update of {name}:\n{results['profile'][name]}")
        results["profile"][f"rollout of {name}"] = bench.rollout_calls
        say(f"rollout of {name}, Python's functions:\n{bench.rollout_calls}")
        save(flags, results)


def main() -> None:
    flags = parse_flags(__doc__)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    results = open_results(flags)
    bench = build(flags)
    results["host"] = host_facts()
    measure(bench, results)
    profile_updates(bench, results)
    results["summary"] = summarise(results)
    save(flags, results)
    if os.environ.get("RANK", "0") == "0":
        print_table(results)
    sys.stdout.flush()
    if bench.pool is not None:
        bench.pool.shutdown(wait=True, cancel_futures=True)  # left alone they outlive us and hold our output open
    os._exit(1 if results["failed"] else 0)  # threads of vLLM and NCCL can hold an ordinary exit for minutes


if __name__ == "__main__":
    main()
