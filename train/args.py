"""Flags of train/main.py in groups, and check_args(): every bad combination is refused before anything loads.

The algorithm's own flags (estimator, loss, KL, correction, filtering, demonstrations, optimiser) stand in
algorithm_flags.py beside the presets that set them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from train.algorithm_flags import ACCUMULATION_REMEDY, add_algorithm_flags, check_algorithm_flags
from train.presets import apply_preset

RANK_0_FIRST_S = 30.0  # what another rank leaves rank 0 to say the same
# Arguments of vllm.LLM that --vllm_args must not give -> what decides them.
OURS_IN_VLLM = {
    "model": "--model",
    "dtype": "--dtype",
    "seed": "--seed",
    "tensor_parallel_size": "--tensor_parallel",
    "pipeline_parallel_size": "the launcher: an engine is one stage on --tensor_parallel ranks",
    "data_parallel_size": "the launcher: an engine per --tensor_parallel ranks",
    "max_model_len": "--max_model_len",
    "max_num_seqs": "--max_num_seqs",
    "max_num_batched_tokens": "--max_num_batched_tokens",
    "gpu_memory_utilization": "--gpu_memory_utilization",
    "kv_cache_memory_bytes": "--kv_cache_gib",
    "enforce_eager": "--enforce_eager",
    "enable_sleep_mode": "--sleep_level",
    "trust_remote_code": "--trust_remote_code",
    "mm_processor_cache_gb": "the rollout: vLLM is given every clip ready made, once per step",
    "logprobs_mode": "the trainer, which needs those of the distribution that was sampled from",
    "distributed_executor_backend": "the launcher",
}


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. `--help` prints the groups in the order of a run: model, data, rollout, reward, update."""
    parser = argparse.ArgumentParser(
        prog="train/main.py",
        usage="torchrun --nproc_per_node N train/main.py --model DIR --data FILE ... --output_dir DIR [flags; --help]",
        description="RL post-training of a Qwen vision-language model: torchrun --nproc_per_node N train/main.py ...",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    _model_flags(parser.add_argument_group("model"))
    _data_flags(parser.add_argument_group("data"))
    add_media_flags(parser.add_argument_group("frames and pixels"))
    _rollout_flags(parser.add_argument_group("rollout"))
    _reward_flags(parser.add_argument_group("reward"))
    add_algorithm_flags(parser)
    _update_flags(parser.add_argument_group("update"))
    _validation_flags(parser.add_argument_group("validation"))
    _run_flags(parser.add_argument_group("run, checkpoints, logs"))
    return parser


def int_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _model_flags(group) -> None:
    group.add_argument("--model", required=True, help="Hugging Face folder of the policy to start from")
    group.add_argument(
        "--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 on CUDA, else fp32"
    )
    group.add_argument("--trust_remote_code", action="store_true", help="run Python code that a model folder carries")
    group.add_argument("--chat_template", default=None, help="Jinja file that replaces the folder's chat template")
    group.add_argument(
        "--attention",
        choices=("auto", "sdpa", "flex", "cudnn", "varlen", "flash2", "flash4"),
        default="auto",
        help="kernel of the packed forward; auto takes the fastest exact one found",
    )
    group.add_argument("--freeze_vision_tower", action="store_true", help="no gradient through the vision tower")
    group.add_argument("--freeze_merger", action="store_true", help="no update of the vision-to-text merger")
    group.add_argument("--freeze_language_model", action="store_true", help="train the vision side only")
    group.add_argument(
        "--fused",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compile norms, rotations and gated products into one kernel each (CUDA)",
    )
    group.add_argument(
        "--kept_layers",
        type=int_or_auto,
        default=0,
        help="last N decoder layers whose activations are kept, not recomputed; auto: as many as fit, before each update (CUDA)",
    )
    group.add_argument(
        "--kept_vision_layers", type=int, default=0, help="the same for the vision tower's last N layers"
    )
    group.add_argument("--reference_model", default=None, help="folder of the reference policy (default: --model)")
    group.add_argument("--critic_model", default=None, help="folder the critic starts from (default: --model)")
    group.add_argument("--logit_chunk", type=int, default=1024, help="response tokens whose logits exist at once")
    group.add_argument(
        "--gradient_checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="recompute activations in the backward pass",
    )


def _data_flags(group) -> None:
    group.add_argument("--data", nargs="+", required=True, help="dataset files (JSON, JSONL, Parquet), globs allowed")
    group.add_argument(
        "--media_dir", default=None, help="folder that relative media paths start from (default: the file's)"
    )
    group.add_argument(
        "--on_bad_sample",
        choices=("error", "skip"),
        default="error",
        help="error: stop with the list; skip: leave them out and write failed.jsonl",
    )
    group.add_argument("--field_names", default=None, help='JSON object, our field -> the file\'s: {"videos": "clip"}')
    group.add_argument(
        "--check_gold", action="store_true", help="also open every medium and count every prompt at start"
    )
    group.add_argument(
        "--style", choices=("think", "direct"), default="think", help="ask for reasoning, or the answer alone"
    )
    group.add_argument("--prompt_template", default=None, help="Jinja file that replaces the built-in instructions")
    group.add_argument("--max_prompt_tokens", type=int, default=20000, help="visual tokens included")
    group.add_argument(
        "--on_long_prompt",
        choices=("error", "skip", "resample"),
        default="resample",
        help="prompt over the limit: stop, leave it out, or take fewer frames; it is never cut",
    )
    group.add_argument(
        "--load_workers", type=int, default=2, help="threads per rank that read and encode prompts ahead"
    )
    group.add_argument("--shuffle", action=argparse.BooleanOptionalAction, default=True, help="random order per epoch")
    group.add_argument(
        "--data_weights",
        default=None,
        help='JSON object: data_source -> sampling weight, e.g. \'{"video": 2, "image": 1}\'',
    )
    group.add_argument(
        "--curriculum", default=None, help="column to sort by, ascending (prefix with '-' for descending)"
    )


def add_media_flags(group) -> None:
    """Flags that decide frames and pixels, with the same words in training, preprocessing and evaluation."""
    group.add_argument("--cache", choices=("prefer", "require", "off"), default="prefer", help="use of the frame cache")
    group.add_argument("--cache_dir", default=None, help="folder filled by data/preprocess.py")
    group.add_argument("--fps", type=float, default=2.0, help="frames per second taken from a video")
    group.add_argument("--min_frames", type=int, default=4, help="fewest frames of a video")
    group.add_argument("--max_frames", type=int, default=128, help="most frames of a video")
    group.add_argument("--video_min_pixels", type=int, default=4096, help="smallest area of one video frame, pixels")
    group.add_argument("--video_max_pixels", type=int, default=262144, help="largest area of one video frame, pixels")
    group.add_argument(
        "--total_pixels", type=int, default=None, help="budget of all frames of one video together, pixels"
    )
    group.add_argument(
        "--resize", choices=("exact", "native"), default="exact", help="bit-identical to the usual recipe, or faster"
    )
    group.add_argument("--sampling", choices=("even", "grid"), default="even", help="evenly, or every 1/fps second")
    group.add_argument("--decoder", choices=("pyav", "decord", "torchcodec"), default="pyav", help="video reader")
    group.add_argument("--image_min_pixels", type=int, default=4096, help="smallest area of an image, pixels")
    group.add_argument("--image_max_pixels", type=int, default=1048576, help="largest area of an image, pixels")


def _rollout_flags(group) -> None:
    group.add_argument("--group_size", type=int, default=8, help="G: responses per prompt")
    group.add_argument("--prompts_per_step", type=int, default=32, help="prompts per step over all ranks")
    group.add_argument("--max_response_tokens", type=int, default=2048, help="longest response")
    group.add_argument("--temperature", type=float, default=1.0, help="of sampling and of the trainer's log-probs")
    group.add_argument(
        "--top_p", type=float, default=1.0, help="keep 1.0 in training: truncated sampling biases the ratio"
    )
    group.add_argument("--top_k", type=int, default=-1, help="keep -1 in training, as above")
    group.add_argument(
        "--rollout_seed",
        choices=("request", "engine"),
        default=None,
        help="request: reproducible per (run, step, prompt, slot), the default on CPU; engine: vLLM's batched sampler",
    )
    group.add_argument("--tensor_parallel", type=int, default=1, help="GPUs per vLLM engine")
    group.add_argument("--gpu_memory_utilization", type=float, default=0.5, help="share of a GPU that vLLM may take")
    group.add_argument(
        "--kv_cache_gib", type=float, default=None, help="KV cache size; needed on CPU (default there 0.25)"
    )
    group.add_argument("--max_num_seqs", type=int, default=256, help="responses decoded at once per engine")
    group.add_argument("--max_num_batched_tokens", type=int, default=None, help="vLLM's tokens per scheduler step")
    group.add_argument(
        "--max_model_len",
        type=int,
        default=None,
        help="longest prompt with response that vLLM takes (default: --max_prompt_tokens + the longer response limit)",
    )
    group.add_argument("--enforce_eager", action="store_true", help="no CUDA graphs (always so on CPU)")
    group.add_argument(
        "--sleep_level", type=int, choices=(0, 1, 2), default=2, help="2 drops vLLM's weights while training"
    )
    group.add_argument(
        "--quick_decode",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="schedule responses that are only being decoded in two short loops: the same results, for many short responses",
    )
    group.add_argument(
        "--vllm_args", default=None, help="further arguments of vllm.LLM as JSON, such as '{\"block_size\": 128}'"
    )


def _reward_flags(group) -> None:
    group.add_argument("--accuracy_weight", type=float, default=0.9, help="weight of the answer's accuracy")
    group.add_argument("--format_weight", type=float, default=0.1, help="weight of the format; the two sum to 1")
    group.add_argument("--reward", default=None, help="own reward instead: path.py:function")
    group.add_argument("--reward_args", default=None, help="JSON object passed to --reward as keyword arguments")
    group.add_argument("--reward_workers", type=int, default=2, help="scoring processes per rank")
    group.add_argument(
        "--reward_timeout_s", type=float, default=20.0, help="limit per response; beyond it scores 0, counted"
    )
    group.add_argument("--judge_url", default=None, help="OpenAI-compatible endpoint that grades open-ended answers")
    group.add_argument("--judge_model", default=None, help="model name sent to --judge_url")


def _update_flags(group) -> None:
    group.add_argument(
        "--prompts_per_update", type=int, default=None, help="mini-batch, in prompts (default: one update)"
    )
    group.add_argument("--update_epochs", type=int, default=1, help="passes over a step's groups")
    for part in ("vision", "merger"):
        group.add_argument(
            f"--{part}_learning_rate", type=float, default=None, help="own peak rate (default: --learning_rate)"
        )
    group.add_argument(
        "--max_nonfinite_steps", type=int, default=5, help="stop after this many skipped updates in a row"
    )
    group.add_argument("--token_budget", type=int, default=32768, help="packed tokens per micro-batch and rank")
    group.add_argument(
        "--pack_groups",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute a group's prompt once; without, once per response: slower, for comparisons",
    )
    group.add_argument(
        "--sequence_parallel",
        type=int,
        default=1,
        help="ranks that share each packed sequence (Ulysses), for prompts that do not fit one GPU",
    )
    group.add_argument(
        "--skip_zero_advantage",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="do not compute groups whose update is exactly zero; logged policy means are then over the others",
    )
    group.add_argument("--deepspeed_config", default=None, help="JSON file merged over ReelRL's DeepSpeed settings")
    group.add_argument(
        "--offload", choices=("none", "optimizer", "all"), default="none", help="ZeRO-3 states kept on CPU"
    )
    group.add_argument(
        "--hpz_partition_size",
        type=int,
        default=1,
        help="ZeRO++ hpZ: a second copy of the weights, sharded over this many ranks (a node's), that backward gathers from",
    )
    group.add_argument(
        "--resident_parameters",
        choices=("auto", "on", "off"),
        default="auto",
        help="gather the weights once per update, not at every module: saves host time, takes 2 bytes per parameter on every "
        "rank beside its shard. auto: on one rank, where it takes none",
    )
    group.add_argument("--park", action="store_true", help="move optimiser states to CPU while vLLM samples")
    group.add_argument(
        "--sync_bucket_mib", type=int, default=512, help="bytes gathered at once in the weight sync, MiB"
    )
    group.add_argument(
        "--check_parity", action="store_true", help="compare vLLM's and the trainer's log-probs every step"
    )
    group.add_argument("--profile_steps", default=None, help="steps to trace with torch.profiler, e.g. 3 or 3-5")


def _validation_flags(group) -> None:
    group.add_argument("--validate_data", nargs="+", default=None, help="held-out dataset files")
    group.add_argument("--validate_every", type=int, default=0, help="steps between validations (0: never)")
    group.add_argument("--validate_at_start", action="store_true", help="validate before the first step")
    group.add_argument("--validate_only", action="store_true", help="validate the policy and stop")
    group.add_argument("--validate_limit", type=int, default=None, help="first N samples only")
    group.add_argument("--validate_temperature", type=float, default=0.0, help="0 is greedy")
    group.add_argument("--validate_top_p", type=float, default=1.0, help="nucleus of sampled validation")
    group.add_argument("--validate_top_k", type=int, default=-1, help="likewise; -1: all tokens")
    group.add_argument("--validate_samples", type=int, default=1, help="responses per held-out prompt")
    group.add_argument("--validate_max_response_tokens", type=int, default=None, help="default: as in training")
    for name, kind in (("fps", float), ("max_frames", int), ("video_max_pixels", int), ("total_pixels", int)):
        group.add_argument(f"--validate_{name}", type=kind, default=None, help=f"default: --{name}")


def _run_flags(group) -> None:
    group.add_argument("--output_dir", default="runs/run", help="run folder")
    group.add_argument("--max_steps", type=int, default=None, help="stop after this many steps")
    group.add_argument("--epochs", type=float, default=1.0, help="passes over the data, when --max_steps is not given")
    group.add_argument("--max_hours", type=float, default=None, help="save and stop after this time")
    group.add_argument("--seed", type=int, default=0, help="of order, sampling and initialisation")
    group.add_argument(
        "--resume", default="auto", help="auto: newest complete checkpoint; never; or a checkpoint folder"
    )
    group.add_argument("--save_every", type=int, default=50, help="steps between checkpoints (0: only at the end)")
    group.add_argument("--keep_last", type=int, default=2, help="complete checkpoints kept (0: all)")
    group.add_argument("--keep_best", default=None, help="metric whose best checkpoint is kept, e.g. validate/accuracy")
    group.add_argument(
        "--save_model_only", action="store_true", help="Hugging Face folder alone; cannot be resumed from"
    )
    group.add_argument(
        "--log_to", nargs="*", default=[], choices=("tensorboard", "wandb", "mlflow", "swanlab"), help="trackers"
    )
    group.add_argument("--log_rollouts_every", type=int, default=10, help="steps between logged rollouts")
    group.add_argument("--log_rollouts", type=int, default=4, help="groups logged each time, with frames")
    group.add_argument(
        "--phase_limit_s", type=float, default=7200.0, help="a longer phase prints every rank's stack and exits"
    )
    group.add_argument(
        "--dry_run", action="store_true", help="load data, check flags, print the plan; no model is built"
    )
    group.add_argument("--explain", action="store_true", help="print what the algorithm's flags do, and stop")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse, apply the preset of --algorithm under the explicit flags, derive defaults, check. Exits 2 on bad flags."""
    parser = build_parser()
    if "--explain" in (sys.argv[1:] if argv is None else argv):  # a question about an algorithm needs no model
        for action in parser._actions:
            action.required = False
    args = apply_preset(parser, argv)
    finish_args(args)
    problems = check_args(args, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    if problems:
        parser.error("\n  ".join(["these flags cannot run together:", *problems]))
    return args


def refuse(program: str, error: Exception) -> int:
    """Prints what a user has to correct, without a traceback, once for all ranks; -> the exit status, 2.

    Every rank finds the same mistake, and torchrun ends the others when the first one leaves: it must be rank 0, that has
    printed. No process group is there yet to wait in. A mistake that rank 0 does not see (a file of another node) is printed
    by the rank that does, later.
    """
    if int(os.environ.get("RANK", "0")):
        time.sleep(RANK_0_FIRST_S)
    print(f"{program}: {error}", file=sys.stderr, flush=True)
    return 2


def profiled_steps(args: argparse.Namespace) -> range:
    """Steps of --profile_steps: "3" or "3-5". Raises ValueError for anything else."""
    if args.profile_steps is None:
        return range(0)
    first, _, last = args.profile_steps.partition("-")
    try:
        return range(int(first), int(last or first) + 1)
    except ValueError:
        raise ValueError(f"--profile_steps must be a step or a range such as 3-5, got {args.profile_steps!r}") from None


def finish_args(args: argparse.Namespace) -> None:
    """Defaults that depend on other flags. No torch here: --help and errors must be instant."""
    if args.prompts_per_update is None:
        args.prompts_per_update = args.prompts_per_step
    # Names that the optimiser's builder reads.
    args.adam_beta1, args.adam_beta2, args.adam_epsilon = *args.adam_betas, args.adam_eps
    if args.validate_max_response_tokens is None:
        args.validate_max_response_tokens = args.max_response_tokens
    if args.max_model_len is None:
        longest = max(args.max_response_tokens, args.validate_max_response_tokens)
        args.max_model_len = args.max_prompt_tokens + longest


def check_args(args: argparse.Namespace, world_size: int) -> list[str]:
    """Every bad combination as a sentence that names flags and values; empty when the run can start."""
    problems = check_algorithm_flags(args)

    def need(condition: bool, message: str) -> None:
        if not condition:
            problems.append(message)

    for flag in ("data_weights", "field_names", "vllm_args"):
        try:
            given = json.loads(getattr(args, flag) or "{}")
            need(isinstance(given, dict), f"--{flag} must be a JSON object, got {getattr(args, flag)}")
            if flag == "vllm_args" and isinstance(given, dict):
                fixed = sorted(OURS_IN_VLLM.keys() & given.keys())
                problems += [f"--vllm_args: {name} is decided by {OURS_IN_VLLM[name]}" for name in fixed]
        except ValueError as error:
            problems.append(f"--{flag} is not JSON ({error}): {getattr(args, flag)}")
    need(args.max_hours is None or args.max_hours > 0, f"--max_hours {args.max_hours} must be above 0")
    for flag in (
        "group_size",
        "prompts_per_step",
        "max_response_tokens",
        "max_prompt_tokens",
        "token_budget",
        "update_epochs",
        "prompts_per_update",
        "tensor_parallel",
        "max_num_seqs",
        "hpz_partition_size",
        "sequence_parallel",
        "reward_workers",
        "validate_samples",
    ):
        need(getattr(args, flag) >= 1, f"--{flag} must be at least 1, got {getattr(args, flag)}")
    for flag in ("validate_every", "save_every", "keep_last", "log_rollouts", "log_rollouts_every"):
        need(getattr(args, flag) >= 0, f"--{flag} must be 0 or more, got {getattr(args, flag)}")
    need(args.temperature > 0, f"--temperature must be above 0 in training, got {args.temperature}")
    need(0 < args.top_p <= 1, f"--top_p must be in (0, 1], got {args.top_p}")
    need(0 < args.validate_top_p <= 1, f"--validate_top_p must be in (0, 1], got {args.validate_top_p}")
    for flag in ("top_k", "validate_top_k"):
        value = getattr(args, flag)
        need(value == -1 or value >= 1, f"--{flag} must be -1 (off) or at least 1, got {value}")
    need(args.fps > 0, f"--fps must be above 0, got {args.fps}")
    need(
        2 <= args.min_frames <= args.max_frames,
        f"need 2 <= --min_frames {args.min_frames} <= --max_frames {args.max_frames}",
    )
    for kind in ("video", "image"):
        low, high = getattr(args, f"{kind}_min_pixels"), getattr(args, f"{kind}_max_pixels")
        need(0 < low <= high, f"need 0 < --{kind}_min_pixels {low} <= --{kind}_max_pixels {high}")
    need(
        0 < args.gpu_memory_utilization < 1,
        f"--gpu_memory_utilization must be in (0, 1), got {args.gpu_memory_utilization}",
    )
    try:
        profiled_steps(args)
    except ValueError as error:
        need(False, str(error))
    weights = args.accuracy_weight, args.format_weight
    need(
        min(weights) >= 0 and abs(sum(weights) - 1) < 1e-9,
        f"--accuracy_weight {weights[0]} and --format_weight {weights[1]} must be non-negative and sum to 1",
    )
    need(
        world_size % args.tensor_parallel == 0,
        f"--tensor_parallel {args.tensor_parallel} must divide the number of ranks, {world_size}",
    )
    longest = max(args.max_response_tokens, args.validate_max_response_tokens)
    need(
        args.max_model_len >= args.max_prompt_tokens + longest,
        f"--max_model_len {args.max_model_len} is below --max_prompt_tokens {args.max_prompt_tokens} + {longest} response "
        "tokens: a prompt of that length would stop the run",
    )
    need(
        args.max_num_batched_tokens is None or args.max_num_batched_tokens >= args.max_num_seqs,
        f"--max_num_batched_tokens {args.max_num_batched_tokens} must be at least --max_num_seqs {args.max_num_seqs}: "
        "every running response takes one token of a step",
    )
    shared, engine = args.sequence_parallel, args.tensor_parallel
    need(
        shared < 1 or world_size % shared == 0,
        f"--sequence_parallel {shared} must divide the number of ranks, {world_size}",
    )
    need(
        shared <= 1 or engine < 1 or shared % engine == 0,
        f"--sequence_parallel {shared} must be a multiple of --tensor_parallel {engine}, whose ranks hold the same groups",
    )
    need(
        args.grad_accum_dtype == "fp32" or args.dtype != "fp32",
        f"--grad_accum_dtype {args.grad_accum_dtype} with --dtype fp32: {ACCUMULATION_REMEDY}",
    )
    hpz, local = args.hpz_partition_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    need(
        hpz < 1 or (world_size % hpz == 0 and (local % hpz == 0 or hpz % local == 0)),
        f"--hpz_partition_size {hpz} must divide the number of ranks, {world_size}, and fit the {local} ranks of a node",
    )
    need(
        hpz == 1 or args.offload == "none",
        f"--hpz_partition_size {hpz} with --offload {args.offload}: others' runs went to a loss of 0 with both "
        "(modelscope/ms-swift issue 3697); choose one of the two",
    )
    resident = args.resident_parameters == "on"
    need(
        not resident or (hpz == 1 and args.offload != "all"),
        f"--resident_parameters on with --offload {args.offload} and --hpz_partition_size {hpz}: weights that stay gathered on "
        "every GPU are neither kept on the host nor read from a second copy; drop one of them",
    )
    replicas = max(1, world_size // max(1, args.tensor_parallel))
    for flag in ("prompts_per_step", "prompts_per_update"):
        value = getattr(args, flag)
        need(value % replicas == 0, f"--{flag} {value} must be a multiple of the {replicas} data-parallel replicas")
    need(
        args.prompts_per_step % args.prompts_per_update == 0,
        f"--prompts_per_update {args.prompts_per_update} must divide --prompts_per_step {args.prompts_per_step}",
    )
    need(args.reward_args is None or args.reward is not None, "--reward_args needs --reward")
    need((args.judge_url is None) == (args.judge_model is None), "--judge_url and --judge_model go together")
    validates = args.validate_every > 0 or args.validate_at_start or args.validate_only
    need(
        not validates or args.validate_data is not None,
        "--validate_every, --validate_at_start and --validate_only need --validate_data",
    )
    need(
        args.validate_temperature > 0 or args.validate_samples == 1,
        f"--validate_samples {args.validate_samples} needs --validate_temperature above 0: greedy responses are all equal",
    )
    need(args.keep_best is None or args.save_every > 0, f"--keep_best {args.keep_best} needs --save_every above 0")
    need(args.max_steps is None or args.max_steps >= 1, f"--max_steps must be at least 1, got {args.max_steps}")
    need(args.epochs > 0, f"--epochs must be above 0, got {args.epochs}")
    need(
        not (args.freeze_vision_tower and args.freeze_merger and args.freeze_language_model),
        "--freeze_vision_tower, --freeze_merger and --freeze_language_model together leave nothing to train",
    )
    for flag in ("kept_layers", "kept_vision_layers"):
        count = getattr(args, flag)
        need(count == "auto" or count >= 0, f"--{flag} must be 0 or more, got {count}")
        need(
            args.gradient_checkpointing or (count != "auto" and count <= 0),
            f"--{flag} {count} with --no-gradient_checkpointing: then all layers are kept already; drop one of the two",
        )
    need(args.cache != "require" or args.cache_dir is not None, "--cache require needs --cache_dir")
    folders = ("model", "reference_model", "critic_model", "cache_dir", "media_dir")
    for flag in (*folders, "chat_template", "prompt_template", "deepspeed_config"):
        path = getattr(args, flag)
        need(path is None or Path(path).exists(), f"--{flag} {path}: no such file or folder")
    return problems
