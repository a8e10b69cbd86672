"""The flags of every benchmark program, with the sampling presets of the model cards."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from data.video import VideoSettings
from evaluate._scoring import Benchmark

PRESETS = {  # sampling of the model cards; explicit flags win
    "greedy": {"temperature": 0.0, "top_p": 1.0, "top_k": -1},
    "qwen2-vl": {"temperature": 0.01, "top_p": 0.001, "top_k": 1, "repetition_penalty": 1.0},
    "qwen2.5-vl": {"temperature": 1e-6, "top_p": 1.0, "top_k": 1, "repetition_penalty": 1.05},
    "qwen3-vl-instruct": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "presence_penalty": 1.5},
    # As in the README of the Qwen3-VL repository; copies of the model cards have temperature 1.0 for the same models.
    "qwen3-vl-thinking": {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "presence_penalty": 0.0},
    "qwen3.5-thinking": {"temperature": 1.0, "top_p": 0.95, "top_k": 20, "presence_penalty": 1.5},
    "qwen3.5-instruct": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "presence_penalty": 1.5},
}


def build_parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=benchmark.title, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("what")
    group.add_argument("--model", help="Hugging Face folder (base model or exported checkpoint)")
    group.add_argument("--data_dir", default="benchmarks", help="folder of annotation files and media")
    group.add_argument("--annotations", help="annotation file, if it lies elsewhere or has another name")
    group.add_argument("--media_dir", help="folder that relative media paths start from (tried before data_dir)")
    group.add_argument("--output_dir", default="runs/evaluate", help="parent of the run folders")
    group.add_argument("--run_dir", help="use exactly this run folder; refused if it holds a run with other settings")
    group.add_argument("--protocol", choices=("official", "easyvideor1"), default="official", help="metric definitions")
    group.add_argument(
        "--prompt",
        default=benchmark.default_prompt or ("official" if "official" in benchmark.prompts else "direct"),
        choices=[*benchmark.prompts, "direct", "think"],
        help="official wordings, or the project's own prompts as used in training",
    )
    group.add_argument("--prompt_template", help="Jinja2 file for the whole user text (with --prompt direct or think)")
    group.add_argument("--limit", type=int, help="only the first N samples (a folder of its own)")
    group.add_argument("--seed", type=int, default=0, help="of sampling and of the bootstrap")
    group.add_argument(
        "--retry_failed", action="store_true", help="try rows that failed, or whose files changed, again"
    )
    group = parser.add_argument_group("how far")
    group.add_argument("--dry_run", action="store_true", help="load, check and show two prompts; no model, no decoding")
    group.add_argument("--preprocess_only", action="store_true", help="decode every video into --cache_dir, then stop")
    group.add_argument(
        "--score_only", action="store_true", help="score the folder's predictions again, without a model"
    )
    group.add_argument("--strict", action="store_true", help="exit with 3 if any sample failed")
    group = parser.add_argument_group("frames")
    group.add_argument("--fps", type=float, default=2.0, help="frames per second to sample")
    group.add_argument("--min_frames", type=int, default=4, help="fewest frames of a video")
    group.add_argument("--max_frames", type=int, default=256, help="most frames of a video")
    group.add_argument("--video_min_pixels", type=int, default=4096, help="fewest pixels of a frame")
    group.add_argument("--video_max_pixels", type=int, default=262144, help="most pixels of a frame")
    group.add_argument("--total_pixels", type=int, default=33554432, help="most pixels of all frames of a video")
    group.add_argument(
        "--resize", choices=("exact", "native"), default="exact", help="bicubic in float32, or uint8 (fast)"
    )
    group.add_argument("--sampling", choices=("even", "grid"), default="even", help="evenly, or every 1/fps second")
    group.add_argument("--decoder", choices=("pyav", "decord", "torchcodec"), default="pyav", help="video reader")
    group.add_argument("--image_max_pixels", type=int, default=1048576, help="most pixels of an image")
    group.add_argument("--cache", choices=("prefer", "require", "off"), default="prefer", help="use of the frame cache")
    group.add_argument("--cache_dir", help="frame cache of data/preprocess.py")
    group = parser.add_argument_group("sampling")
    group.add_argument("--preset", choices=tuple(PRESETS), default="greedy", help="sampling of a model card")
    for name, kind in (("temperature", float), ("top_p", float), ("top_k", int), ("presence_penalty", float)):
        group.add_argument(f"--{name}", type=kind, help="overrides the preset")
    group.add_argument("--max_response_tokens", type=int, default=2048, help="answer budget")
    group.add_argument("--max_prompt_tokens", type=int, help="longer prompts are failures with that reason")
    group.add_argument("--thinking", choices=("on", "off", "default"), default="default", help="chat template's switch")
    group.add_argument("--thinking_budget", type=int, help="tokens of reasoning before a conclusion is forced")
    group.add_argument("--answer_budget", type=int, default=1024, help="tokens after a forced conclusion")
    group = parser.add_argument_group("engine")
    dtypes = ("auto", "half", "float16", "bfloat16", "float", "float32")
    group.add_argument("--dtype", choices=dtypes, default="auto", help="vLLM dtype")
    group.add_argument("--tensor_parallel", type=int, default=1, help="GPUs per engine")
    group.add_argument("--data_parallel", type=int, default=1, help="engines, each with its share of the videos")
    group.add_argument("--max_model_len", type=int, help="vLLM context length; the model's own if left out")
    group.add_argument("--max_num_seqs", type=int, default=32, help="requests that run together")
    group.add_argument("--max_num_batched_tokens", type=int, help="tokens per engine step (chunked prefill)")
    group.add_argument("--gpu_memory_utilization", type=float, default=0.85, help="share of GPU memory for vLLM")
    group.add_argument("--kv_cache_gib", type=float, help="KV cache size (CPU: 1 unless given)")
    group.add_argument("--enforce_eager", action="store_true", help="no CUDA graphs")
    group.add_argument("--trust_remote_code", action="store_true", help="let the model folder run its own code")
    group = parser.add_argument_group("pipeline")
    group.add_argument("--loaders", type=int, default=min(8, os.cpu_count() or 2), help="decoding threads")
    group.add_argument("--max_concurrent", type=int, help="requests in the engine; 2 * max_num_seqs if left out")
    group.add_argument("--in_flight_gib", type=float, default=8.0, help="bound on pixels between decoding and answer")
    group.add_argument("--decode_timeout_s", type=float, default=600.0, help="limit per video")
    group.add_argument("--request_timeout_s", type=float, default=3600.0, help="limit per answer")
    group = parser.add_argument_group("judge (open-ended answers)")
    group.add_argument("--judge_url", help="OpenAI-compatible endpoint")
    group.add_argument("--judge_model", help="model name at the endpoint, or a folder to load after the answers")
    group.add_argument("--judge_labels", help="labelled JSONL {question, gold, answer, label}: agreement is reported")
    if benchmark.flags is not None:
        benchmark.flags(parser)
    parser.set_defaults(**benchmark.defaults)
    return parser


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams."""
    chosen = dict(PRESETS[args.preset])
    for name in ("temperature", "top_p", "top_k", "presence_penalty"):
        if getattr(args, name) is not None:
            chosen[name] = getattr(args, name)
    return {**chosen, "max_tokens": args.max_response_tokens, "seed": args.seed}


def check_sampling(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Values that vLLM would refuse for every request, once the model is loaded; its own bounds (SamplingParams)."""
    if args.temperature is not None and not args.temperature >= 0:
        parser.error(f"--temperature must be >= 0, got {args.temperature:g}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error(f"--top_p must be in (0, 1], got {args.top_p:g}")
    if args.top_k is not None and args.top_k < -1:
        parser.error(f"--top_k must be >= 1, or -1 or 0 for all tokens, got {args.top_k}")
    if args.presence_penalty is not None and not -2 <= args.presence_penalty <= 2:
        parser.error(f"--presence_penalty must be in [-2, 2], got {args.presence_penalty:g}")


def model_problem(model: str, flag: str = "--model") -> str | None:
    """Why a model cannot be a Hugging Face folder nor the name of a repository ("owner/name"); None if it may be one."""
    folder = Path(model)
    if folder.is_dir():
        held = (folder / "config.json").is_file()
        return None if held else f"{flag} {model}: no config.json in that folder; give the Hugging Face folder itself"
    if folder.exists():
        return f"{flag} {model}: is a file; give the Hugging Face folder"
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model) and not (folder.parent.name and folder.parent.is_dir()):
        return None
    return f"{flag} {model}: no such folder; correct the path"


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a usage error for values that would hang or be silently ignored."""
    least = {"limit": 1, "loaders": 1, "max_concurrent": 1, "data_parallel": 1, "tensor_parallel": 1, "max_num_seqs": 1}
    least |= {"max_response_tokens": 1, "thinking_budget": 1, "answer_budget": 1, "max_prompt_tokens": 1}
    least |= {"max_model_len": 1, "max_num_batched_tokens": 1, "image_max_pixels": 1, "total_pixels": 1}
    least["min_frames"] = 1
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            parser.error(f"--{name} must be >= {smallest}, got {value}")
    for name in ("in_flight_gib", "decode_timeout_s", "request_timeout_s", "kv_cache_gib"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} must be > 0, got {value:g}")
    if not 0 < args.gpu_memory_utilization <= 1:
        parser.error(f"--gpu_memory_utilization must be in (0, 1], got {args.gpu_memory_utilization:g}")
    check_sampling(parser, args)
    try:  # what is wrong whatever the model; the encoder, which knows its tokens' size, looks again
        VideoSettings(
            args.fps, args.min_frames, args.max_frames, args.video_min_pixels, args.video_max_pixels, factor=1
        )
    except ValueError as error:
        parser.error(str(error))
    if args.model is None and not (args.dry_run or (args.score_only and args.run_dir)):
        parser.error("--model is needed (a Hugging Face folder); only --dry_run and --score_only --run_dir do without")
    if args.retry_failed and (args.data_parallel > 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        parser.error("--retry_failed runs in one process: leave out --data_parallel (and torchrun); failures are few")
    if args.judge_url and not args.judge_model:
        parser.error("--judge_url needs --judge_model, the name of the model at that endpoint")
    if args.judge_model and not args.judge_url and (problem := model_problem(args.judge_model, "--judge_model")):
        parser.error(f"{problem}, or name its endpoint with --judge_url")
    if args.judge_labels and not args.judge_model:
        parser.error("--judge_labels needs a judge: --judge_model, and --judge_url for an endpoint")
    if args.judge_labels and not os.path.isfile(args.judge_labels):
        parser.error(f"--judge_labels {args.judge_labels}: no such file")
    if args.cache == "require" and not args.cache_dir:
        parser.error("--cache require needs --cache_dir")
    if args.preprocess_only and not args.cache_dir:
        parser.error("--preprocess_only needs --cache_dir")
