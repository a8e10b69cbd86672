"""--dry_run: batch arithmetic, tokens, memory and two rendered prompts, before any model is built."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import warnings
from pathlib import Path

from data.records import Sample
from train.presets import explain

SAMPLES_COUNTED = 200


def total_steps(args, samples: int) -> int:
    """Steps of the run: --max_steps, else --epochs passes over `samples` usable rows, of which what does not fill a step is
    dropped. Raises ValueError if that is not one step; 1 then under --validate_only, which takes none."""
    if args.max_steps is not None:
        return args.max_steps
    steps = int(args.epochs * samples / args.prompts_per_step)
    if steps < 1 and not args.validate_only:
        raise ValueError(
            f"--data {' '.join(args.data)}: {samples} usable rows, {math.ceil(args.prompts_per_step / args.epochs)} are "
            f"needed for one step of --prompts_per_step {args.prompts_per_step} in --epochs {args.epochs:g}; add rows, lower "
            "--prompts_per_step, or take rows more than once: raise --epochs or give --max_steps"
        )
    return max(steps, 1)


def dry_run(args, samples: list[Sample], encoder, world_size: int) -> str:
    """What the run would do, as text. Encodes two prompts; token counts of up to 200 samples come from metadata.

    Raises ValueError if the model cannot be cut over --sequence_parallel ranks.
    """
    from train.sequence_parallel import check_model

    check_model(encoder.config, args.sequence_parallel)
    replicas = max(1, world_size // args.tensor_parallel)
    per_rank = args.prompts_per_step // replicas
    updates = args.update_epochs * (args.prompts_per_step // args.prompts_per_update)
    steps = total_steps(args, len(samples))
    chosen = random.Random(args.seed).sample(samples, min(SAMPLES_COUNTED, len(samples)))
    counts, refused = [], []
    for sample in chosen:
        try:
            counts.append(encoder.count_tokens(sample))
        except (ValueError, OSError) as error:
            refused.append(f"{sample.file}:{sample.line}: {error}")
    lines = [explain(args), "", "batch:"]
    lines += [
        f"  {len(samples)} samples, {steps} steps = {steps * args.prompts_per_step / len(samples):.2f} epochs",
        f"  {args.prompts_per_step} prompts x {args.group_size} responses = {args.prompts_per_step * args.group_size} per step; "
        f"{per_rank} prompts on each of {replicas} replicas ({world_size} ranks)",
        f"  {updates} update(s) per step of {args.prompts_per_update} prompts each",
    ]
    if counts:
        longest = max(counts)
        packed = longest + args.group_size * args.max_response_tokens
        row = longest + args.max_response_tokens
        budget = args.token_budget * args.sequence_parallel
        lines += [
            "",
            f"tokens (of {len(counts)} samples, from metadata):",
            f"  prompt: median {statistics.median(counts):.0f}, longest {longest}, limit {args.max_prompt_tokens}",
            f"  one packed group: at most {packed} (prompt once + {args.group_size} x {args.max_response_tokens}); "
            f"--token_budget {args.token_budget}{f' on {args.sequence_parallel} ranks' if budget != args.token_budget else ''} "
            f"holds {max(1, budget // packed)} such group(s) per micro-batch",
            f"  as one row per response it would be {args.group_size * row}"
            if args.pack_groups
            else f"  --no-pack_groups: not packed, one row per response, {args.group_size} x {row} = {args.group_size * row}; "
            f"--token_budget holds {max(1, budget // row)} row(s) per micro-batch",
            "",
            *memory_lines(args, encoder.config, longest, per_rank, world_size),
        ]
    lines += [f"  refused: {text}" for text in refused[:5]]
    for sample in chosen[:2]:
        prompt = encoder.encode(sample)
        lines += [
            "",
            f"prompt of {sample.id} ({sample.file}:{sample.line}), {len(prompt.input_ids)} tokens:",
            prompt.text,
        ]
        lines += [f"gold: {sample.answer!r}"]
    return "\n".join(lines)


def memory_lines(args, config, prompt_tokens: int, prompts_per_rank: int, world_size: int) -> list[str]:
    """ZeRO-3 states and KV cache in GiB per rank, by arithmetic on the configuration."""
    from train import flops
    from train.memory import BF16, GRADIENT_BYTES, OPTIMIZER_BYTES

    summed = args.grad_accum_dtype
    states = BF16 + GRADIENT_BYTES[summed] + OPTIMIZER_BYTES[args.optimizer]  # per parameter, shared by all ranks
    shape = flops.read_shape(config)
    count = flops.parameters(shape)["total"]
    kv_bytes = 2 * 2 * shape.full_layers * shape.kv_heads * shape.head_dim  # linear attention has no such cache
    rows = prompts_per_rank * args.group_size
    kv_tokens = prompts_per_rank * prompt_tokens + min(rows, args.max_num_seqs) * args.max_response_tokens
    gib = 1024**3
    return [
        f"memory per rank (about {count / 1e9:.3g} B parameters, bf16):",
        f"  ZeRO-3 states {count * states / world_size / gib:.2f} GiB ({states} bytes "
        f"per parameter: bf16 weights, {summed} gradients, master weights where the optimiser has them, two moments)",
        *resident_lines(args, count, world_size),
        f"  vLLM weights {count * 2 / args.tensor_parallel / gib:.2f} GiB while awake; KV cache of the whole step "
        f"{kv_tokens * kv_bytes / args.tensor_parallel / gib:.2f} GiB (prompts shared within a group)",
    ]


def resident_lines(args, count: int, world_size: int) -> list[str]:
    """What --resident_parameters takes per rank, of each of policy, critic and reference; nothing where it is off."""
    if args.resident_parameters == "off" or (args.resident_parameters == "auto" and world_size > 1):
        return []
    if world_size == 1:
        return ["  resident parameters (--resident_parameters): nothing more, on one rank they are the shard itself"]
    whole = f"{count * 2 / 1024**3:.2f} GiB more"
    return [
        f"  resident parameters (--resident_parameters): {whole} on every rank, the gathered weights beside the shard"
    ]


# ---- data and encoder from flags ------------------------------------------------------------------------------------


def failed_list(args, role: str) -> str:
    """The file that lists rows of --data (role "train") or --validate_data ("validate") left out of the run.

    All ranks read the same rows: rank 0 lists them, the others write nowhere.
    """
    return str(Path(args.output_dir) / f"failed-{role}.jsonl") if int(os.environ.get("RANK", "0")) == 0 else os.devnull


def load_samples(args, role: str = "train") -> list[Sample]:
    """Validated samples of --data or --validate_data, without those whose media preprocessing found unusable.

    Raises data.dataset.BadDataset, a ValueError, listing what is wrong, unless --on_bad_sample skip; then the rows are
    listed anew in failed_list(). Field names are those of --field_names.
    """
    from data.dataset import BadDataset, load, report_failures
    from rewards import check_gold

    files, listed = args.data if role == "train" else args.validate_data, failed_list(args, role)
    if listed != os.devnull:
        Path(listed).unlink(missing_ok=True)  # of an earlier start: the data may have been repaired since
    with warnings.catch_warnings():
        if listed == os.devnull:
            warnings.simplefilter("ignore")
        samples = load(
            files,
            media_dir=args.media_dir,
            check_gold=check_gold,
            on_bad_sample=args.on_bad_sample,
            failed_file=listed,
            field_names=json.loads(args.field_names) if args.field_names else None,
        )
    samples, problems = frame_cache(args).split_failed(samples)
    if problems and args.on_bad_sample == "error":
        raise BadDataset(problems)
    if problems:
        report_failures(problems, listed)
    if not samples:
        raise ValueError(f"no usable sample is left in {', '.join(files)}")
    return samples


def checked_samples(args, say) -> tuple[list[Sample], list[Sample]]:
    """The samples of --data and of --validate_data (up to --validate_limit), checked as far as the flags ask; `say` prints
    what the first are. Raises as load_samples and trackers.check do, and ValueError for what the flags need and no
    sample has."""
    from data.dataset import report
    from rewards.custom import load_reward
    from train import trackers
    from train.algorithm_flags import check_samples

    trackers.check(args.log_to)  # a tracker that is not installed is said before anything is read
    check_model_folder(args.model)
    if args.attention != "auto" and not args.dry_run:  # a plan may be made on another machine than the run's
        check_attention(args)
    if args.grad_accum_dtype != "fp32" and not args.dry_run:
        check_accumulation(args)
    if args.reward:
        load_reward(args.reward, args.reward_args)
    samples = load_samples(args)
    held_out = load_samples(args, "validate") if args.validate_data else []
    if args.check_gold:
        encoder = build_encoder(args)
        samples = without_bad_media(args, encoder, samples, "train")
        held_out = without_bad_media(args, encoder, held_out, "validate")
    sample_order(args, samples)  # a column that --curriculum does not find is said now, not after the engines are built
    missing = check_samples(args, samples)
    if missing:
        raise ValueError("\n".join(missing))
    say(report(samples), flush=True)
    return samples, held_out[: args.validate_limit]


def check_attention(args) -> None:
    """Raises ValueError if --attention cannot run on this machine: said before the data are read and the engines built."""
    import torch

    from train.group_attention import choose_attention
    from train.policy import resolve_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choose_attention(args.attention, device, resolve_dtype(args.dtype, device))


def check_accumulation(args) -> None:
    """Raises ValueError if --grad_accum_dtype bf16 would round fp32 gradients: what --dtype auto is, this machine decides."""
    import torch

    from train.algorithm_flags import ACCUMULATION_REMEDY
    from train.policy import resolve_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.grad_accum_dtype == "bf16" and resolve_dtype(args.dtype, device) == torch.float32:
        found = f"--dtype {args.dtype}, which is fp32 without a GPU"
        raise ValueError(f"--grad_accum_dtype bf16 with {found}: {ACCUMULATION_REMEDY}")


def check_model_folder(model: str) -> None:
    """Raises ValueError for a local --model that is not there or lacks what transformers and vLLM load."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith(".") or len(folder.parts) != 2:  # org/name is a name on the hub
            raise ValueError(f"--model {model}: no such folder")
        return
    needed = {"config.json": ["config.json"], "weights (*.safetensors)": ["*.safetensors"]}
    needed |= {"a tokenizer": ["tokenizer.json", "vocab.json"], "a processor": ["*processor_config.json"]}
    absent = [name for name, patterns in needed.items() if not any(any(folder.glob(one)) for one in patterns)]
    if absent:
        raise ValueError(f"--model {model} lacks {', '.join(absent)}: give a whole Hugging Face folder")


def frame_cache(args):
    """The FrameCache of --cache and --cache_dir."""
    from data.frame_cache import FrameCache

    return FrameCache(args.cache_dir, args.cache if args.cache_dir else "off")


def check_cache(encoder, samples: list[Sample]) -> None:
    """Under --cache require raises data.frame_cache.CacheMiss listing the videos that are not there."""
    if encoder.cache.mode == "require":
        encoder.cache.check((media for sample in samples for media in sample.media), encoder.video)


def without_bad_media(args, encoder, samples: list[Sample], role: str) -> list[Sample]:
    """Under --check_gold every medium is opened and every prompt counted now, instead of when its turn comes.

    Raises BadDataset listing what cannot be read or is too long, or lists it in failed_list() under
    --on_bad_sample skip and returns the others.
    """
    from data.dataset import BadDataset, report_failures

    good, problems = [], []
    for sample in samples:
        try:
            encoder.count_tokens(sample)
            good.append(sample)
        except (ValueError, OSError) as error:
            place = {"file": sample.file, "line": sample.line, "id": sample.id, "path": None}
            problems.append({**place, "reason": str(error), "remedy": "repair or remove the row"})
    if problems and args.on_bad_sample == "error":
        raise BadDataset(problems)
    if problems:
        report_failures(problems, failed_list(args, role))
    return good


def sample_order(args, samples: list[Sample]):
    """The SampleOrder of --seed, --shuffle, --data_weights and --curriculum."""
    from data.dataset import SampleOrder

    weights = json.loads(args.data_weights) if args.data_weights else None
    return SampleOrder(samples, args.seed, shuffle=args.shuffle, weights=weights, curriculum=args.curriculum)


def build_encoder(args):
    """The Encoder of --model with the budgets, cache, style and templates of the flags."""
    from data.encode import Encoder

    return Encoder(
        args.model,
        video={
            "fps": args.fps,
            "min_frames": args.min_frames,
            "max_frames": args.max_frames,
            "min_pixels": args.video_min_pixels,
            "max_pixels": args.video_max_pixels,
            "total_pixels": args.total_pixels,
            "resize": args.resize,
            "sampling": args.sampling,
            "backend": args.decoder,
        },
        image={"min_pixels": args.image_min_pixels, "max_pixels": args.image_max_pixels},
        cache=frame_cache(args),
        style=args.style,
        prompt_template=args.prompt_template,
        chat_template=args.chat_template,
        max_prompt_tokens=args.max_prompt_tokens,
        on_long=args.on_long_prompt,
        trust_remote_code=args.trust_remote_code,
    )


def build_engine(args, encoder, device):
    """The RolloutEngine of --model; vLLM comes up last, since it sizes its memory by what is left."""
    from rollout.engine import RolloutEngine

    dtype = args.dtype if args.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"
    return RolloutEngine(
        args.model,
        encoder=encoder,
        dtype=dtype,
        max_model_len=args.max_model_len,
        tensor_parallel=args.tensor_parallel,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        gpu_memory_utilization=args.gpu_memory_utilization,
        kv_cache_gib=args.kv_cache_gib,
        enforce_eager=args.enforce_eager,
        seed=args.seed,
        rollout_seed=args.rollout_seed or ("request" if device.type == "cpu" else "engine"),
        sleep_level=args.sleep_level,
        trust_remote_code=args.trust_remote_code,
        engine_args=json.loads(args.vllm_args or "{}"),
        quick_decode=args.quick_decode,
    )


def validation_budgets(args) -> dict:
    """What Encoder.with_budgets takes for validation; None keeps the training value."""
    return {
        "video": {
            "fps": args.validate_fps,
            "max_frames": args.validate_max_frames,
            "max_pixels": args.validate_video_max_pixels,
            "total_pixels": args.validate_total_pixels,
        }
    }


def start_ranks(args):
    """Collective. What a training does before it builds a model -> (this rank's device, the lock of --output_dir, the
    checkpoint that --resume names or None, its state or {}).

    The lock is a file on rank 0 and None on the others: keep it as long as the run, close it at the end. Raises RuntimeError
    when another run holds --output_dir, when a file of the checkpoint is damaged or not all ranks find the same one,
    FileNotFoundError when --resume is not a complete checkpoint.
    """
    from train import checkpoint, distributed

    device = distributed.init(timeout_s=args.phase_limit_s)
    lock = distributed.lock_run(args.output_dir)
    distributed.init_deepspeed(device)
    seed_everything(args.seed)
    resumed = checkpoint.find_together(args.output_dir, args.resume)
    if resumed is None:
        return device, lock, None, {}
    if distributed.is_main():
        print(f"checking the files of {resumed}", flush=True)
    checkpoint.verify(resumed)
    return device, lock, resumed, checkpoint.read_state(resumed)


def seed_everything(seed: int) -> None:
    """Python, NumPy and torch, different on every rank (dropout and the like); the sampler has seeds of its own."""
    import numpy as np
    import torch

    from train import distributed

    own = seed * 10007 + distributed.rank()
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)
