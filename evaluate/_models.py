"""The model side of a run: the encoder, the frame cache and the engine from a program's flags.

Imported only when a model is used, so that scoring again and dry runs need neither torch nor vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import Any

from data.decode import backend_problem
from data.encode import Encoder
from data.frame_cache import FrameCache
from data.records import Sample
from data.video import MediaError
from evaluate._async_vllm import AsyncVllm
from evaluate._engine import Engine, Limits, LoaderThreads, SharedFrames
from evaluate._flags import sampling_of
from rollout.vllm_access import KV_GIVEN_SHARE, set_processor_threads


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def build_encoder(args: argparse.Namespace, style: str, template: str | None) -> tuple[Encoder, SharedFrames]:
    """The encoder of the model folder with the run's budgets, and the shared frames it reads through."""
    if problem := backend_problem(args.decoder):
        raise ValueError(f"--decoder {args.decoder}: {problem}; install it or use --decoder pyav")
    if args.preprocess_only:
        os.makedirs(args.cache_dir, exist_ok=True)
    frames = SharedFrames(FrameCache(args.cache_dir, args.cache if args.cache_dir else "off"))
    encoder = Encoder(
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
        image={"max_pixels": args.image_max_pixels},
        cache=frames,
        style=style,
        prompt_template=template,
        max_prompt_tokens=args.max_prompt_tokens,
        trust_remote_code=args.trust_remote_code,
        build_patches=False,  # the engine's rendering makes them once per clip, as the floats that it needs
    )
    if args.thinking != "default":
        if "enable_thinking" not in str(encoder.chat_template):
            raise ValueError(
                f"--thinking {args.thinking}: the chat template of {args.model} has no such switch; leave the flag out"
            )
        # Hybrid models read this variable in their chat template; setting it first is the template's own switch.
        switch = "{%- set enable_thinking = " + ("true" if args.thinking == "on" else "false") + " -%}"
        encoder.chat_template = switch + encoder.chat_template
    return encoder, frames


def engine_args(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of vLLM's engine. Its media cache spares the transfer for the questions of one clip, which follow each other,
    so it is small; but a clip must have room in it."""
    room_gib = 1.25 * limits_of(args).clip_bytes * bytes_per_value(args) / 2**30
    chosen: dict[str, Any] = {
        "dtype": args.dtype,
        "tensor_parallel_size": args.tensor_parallel,
        "max_num_seqs": args.max_num_seqs,
        "seed": args.seed,
        "trust_remote_code": args.trust_remote_code,
        "limit_mm_per_prompt": {"image": 16, "video": 4},
        "enable_prefix_caching": True,  # the questions of one video share its tokens
        "mm_processor_cache_gb": max(2.0, room_gib),
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if args.max_model_len:
        chosen["max_model_len"] = args.max_model_len
    if args.max_num_batched_tokens:
        chosen["max_num_batched_tokens"] = args.max_num_batched_tokens
    if on_gpu():
        set_processor_threads(min(8, os.cpu_count() or 1))
        chosen["gpu_memory_utilization"] = KV_GIVEN_SHARE if args.kv_cache_gib else args.gpu_memory_utilization
        chosen["enforce_eager"] = args.enforce_eager
        # vLLM's encoder cache has as many places as a batch has tokens, 2,048 by default: a longer clip would be refused.
        chosen.setdefault("max_num_batched_tokens", max(16384, args.max_model_len or 0))
        if args.kv_cache_gib:
            chosen["kv_cache_memory_bytes"] = int(args.kv_cache_gib * 2**30)
    else:
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        chosen["enforce_eager"] = True
        chosen["kv_cache_memory_bytes"] = int((args.kv_cache_gib or 1) * 2**30)
        chosen["skip_mm_profiling"] = True  # memory is not what limits a CPU run
        if args.tensor_parallel == 1:
            # vLLM would put its only worker into a process of its own; the two then wait for each other by polling
            # shared memory, which keeps a second core busy that the loaders need.
            chosen["distributed_executor_backend"] = UniProcExecutor
        if sampling_of(args)["temperature"] > 0 and args.max_model_len and not args.max_num_batched_tokens:
            # A prompt computed in parts makes vLLM turn back its seeded generator, which torch's CPU one cannot do.
            chosen["enable_chunked_prefill"] = False
            chosen["max_num_batched_tokens"] = max(args.max_model_len, 8192)
    return chosen


def build_engine(args: argparse.Namespace, encoder: Encoder) -> Engine:
    """vLLM's AsyncLLM. Call inside the event loop that will use it."""
    if encoder.family == "qwen3_5" and not on_gpu() and args.dtype == "float32":
        raise SystemExit("--dtype float32: vLLM's CPU kernels run Qwen3.5 in bfloat16 only")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        return AsyncVllm(args.model, encoder, **engine_args(args))
    except ValueError as error:  # --max_model_len beyond the model's, a --tensor_parallel that divides nothing
        raise SystemExit(f"vLLM refuses these flags or this model: {error}") from error


def bytes_per_value(args: argparse.Namespace) -> int:
    """Of a pixel value on its way to the engine, at most: vLLM may take bytes and normalise them itself."""
    return 4 if args.dtype in ("float32", "float") else 2


def limits_of(args: argparse.Namespace) -> Limits:
    """Bounds of the pipeline from the flags; a clip's bytes from the largest video the settings allow."""
    pixels = min(args.max_frames * args.video_max_pixels, args.total_pixels or args.max_frames * args.video_max_pixels)
    return Limits(
        loaders=args.loaders,
        max_in_flight_bytes=int(args.in_flight_gib * 2**30),
        max_concurrent=args.max_concurrent or 2 * args.max_num_seqs,
        clip_bytes=3 * pixels,
        engine_bytes_per_value=2 * bytes_per_value(args),  # patches here, and in the engine's process
        decode_timeout_s=args.decode_timeout_s,
        request_timeout_s=args.request_timeout_s,
        thinking_budget=args.thinking_budget,
        answer_budget=args.answer_budget,
    )


def preprocess(
    encoder: Encoder, frames: SharedFrames, samples: list[Sample], args: argparse.Namespace
) -> dict[str, Any]:
    """--preprocess_only: every distinct video into the frame cache; prints how many and which failed.

    A video that is not decoded within --decode_timeout_s counts as failed; the others go on.
    """
    videos = list({medium: None for sample in samples for medium in sample.media if medium.kind == "video"})
    waiting, threads, problems = iter(videos), LoaderThreads(args.loaders), []

    async def one_loader() -> None:
        for medium in waiting:
            try:
                await threads.run(frames.frames, medium, encoder.video, timeout_s=args.decode_timeout_s)
            except TimeoutError:
                problems.append(f"{medium.path}: not decoded within {args.decode_timeout_s:g} s")
            except (MediaError, OSError) as error:
                problems.append(str(error))

    async def all_loaders() -> None:
        await asyncio.gather(*(one_loader() for _ in range(args.loaders)))

    asyncio.run(all_loaders())
    threads.close(args.loaders)
    for problem in problems:
        print(f"not cached: {problem}")
    print(f"{len(videos) - len(problems)} of {len(videos)} videos are in {args.cache_dir}")
    return {"videos": len(videos), "failed": len(problems)}
