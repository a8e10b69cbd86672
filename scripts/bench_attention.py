"""Attention alone: one layer of a packed group, and one of the vision tower, on every backend; forward and backward, medians.

    python scripts/bench_attention.py                      # one Hopper GPU: cudnn flex varlen; on a CPU a tiny shape with sdpa
    python scripts/bench_attention.py --shapes 2b 4b 8b --attention cudnn flex --out attention.json

The functions that training calls (train/group_attention.py, train/cudnn_attention.py, train/vision.py), with random inputs of
the real shape, interleaved round by round. Before any time is taken, outputs and gradients of a smaller group are compared with a
softmax over an explicit mask in fp32, and the tower's with one softmax per frame: norm of the difference over norm.
FLOPs count the pairs of query and key that see each other, 4 per pair and channel forwards (two products) and 10 backwards: five
products, of which one recomputes the scores, as every flash kernel does (train/flops.py counts the other four, 8).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train.cudnn_attention import LONG_PROMPT
from train.flops import attended_positions
from train.group_attention import _KERNELS, BACKENDS, FLEX_BLOCK, Layout, Span, choose_attention, group_mask
from train.vision import frame_runs, vision_attention_cudnn, vision_attention_varlen

# query heads, key heads, width of a head; tower: heads, width, patches of a frame
SHAPES = {
    "tiny": ((4, 2, 16), (2, 16, 24)),
    "2b": ((16, 8, 128), (16, 64, 900)),
    "4b": ((32, 8, 128), (16, 64, 900)),
    "8b": ((32, 8, 128), (16, 72, 900)),
}
TOWERS = {"varlen": vision_attention_varlen, "cudnn": vision_attention_cudnn}


def make_layout(prompt: int, lengths: list[int], backend: str) -> Layout:
    """One group's; padded as train.group_attention.pack does it."""
    tokens = prompt + sum(lengths)
    padding = -tokens % FLEX_BLOCK if backend == "flex" else 0
    return Layout([Span(0, prompt, prompt, lengths)], prompt, tokens + padding, backend)


def draw(heads: int, kv_heads: int, tokens: int, width: int, device, dtype) -> list[Tensor]:
    """q (1, heads, T, d), k and v (1, kv_heads, T, d), and a gradient of the output, (1, T, heads, d)."""
    shapes = [*((1, n, tokens, width) for n in (heads, kv_heads, kv_heads)), (1, tokens, heads, width)]
    generator = torch.Generator(device).manual_seed(0)  # on the device: a host takes seconds for a long prompt
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]


def both_ways(function: Callable, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of a function of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def group_function(prompt: int, lengths: list[int], backend: str, scaling: float) -> tuple[Callable, int]:
    """(q (1, H, T, d), k, v (1, Hkv, T, d) -> (1, T, H, d)), and T, padding included."""
    layout = make_layout(prompt, lengths, backend)
    return (lambda q, k, v: _KERNELS[backend](q, k, v, layout, scaling)), layout.length


def tower_function(name: str, frames: int, patches: int, scaling: float, device) -> Callable:
    """(q, k, v (1, H, frames * patches, d) -> (1, frames * patches, H, d)): each frame over itself."""
    grid = np.array([[frames, 1, patches]])
    cu = torch.arange(frames + 1, device=device, dtype=torch.int32) * patches
    given = {"cu_seq_lens_q": cu, "max_length_q": patches, "frame_runs": frame_runs(grid, cu)}
    return lambda q, k, v: TOWERS[name](SimpleNamespace(), q, k, v, None, scaling, **given)[0]


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """The plain softmax: (1, H, T, d) -> (1, T, H, d)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def distances(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> list[float]:
    """Of output and gradients: norm of the difference over norm."""
    return [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]


def check_group(names: list[str], heads, prompt: int, lengths: list[int], device, dtype) -> dict[str, list[float]]:
    """Backend -> distances from fp32 of output, dq, dk, dv."""
    q_heads, kv_heads, width = heads
    tokens, scaling = prompt + sum(lengths), width**-0.5
    exact = draw(q_heads, kv_heads, tokens, width, device, dtype)
    mask = group_mask(make_layout(prompt, lengths, "sdpa").spans[0], device)
    *inputs, grad = [x.float() for x in exact]
    wanted = both_ways(lambda q, k, v: masked(q, k, v, mask, scaling), inputs, grad)
    found = {}
    for name in names:
        function, length = group_function(prompt, lengths, name, scaling)
        padded = [F.pad(x, (0, 0, 0, length - tokens)) for x in exact[:3]]
        grad = F.pad(exact[3], (0, 0, 0, 0, 0, length - tokens))
        out, *grads = both_ways(function, padded, grad)
        found[name] = distances((out[:, :tokens], *(x[:, :, :tokens] for x in grads)), wanted)
    return found


def check_tower(names: list[str], tower, frames: int, device, dtype) -> dict[str, list[float]]:
    heads, width, patches = tower
    tokens, scaling = frames * patches, width**-0.5
    exact = draw(heads, heads, tokens, width, device, dtype)
    frame = torch.arange(tokens, device=device) // patches
    *inputs, grad = [x.float() for x in exact]
    wanted = both_ways(lambda q, k, v: masked(q, k, v, frame[:, None] == frame, scaling), inputs, grad)
    return {
        name: distances(both_ways(tower_function(name, frames, patches, scaling, device), exact[:3], exact[3]), wanted)
        for name in names
    }


def clock(run: Callable, device, repeats: int) -> float:
    """Milliseconds of one call, of `repeats` in a row."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - began) * 1e3 / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def measure(functions: dict[str, tuple[Callable, list[Tensor], Tensor]], device, rounds: int, repeats: int) -> dict:
    """Name -> medians in ms: forward without gradient, forward and backward."""
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "both": []} for name in functions}
    for number in range(rounds + 1):  # the first one compiles and plans
        for name, (function, inputs, grad) in functions.items():

            def forward(function=function, inputs=inputs) -> None:
                with torch.no_grad():
                    function(*inputs)

            milliseconds = {
                "forward": clock(forward, device, repeats),
                "both": clock(lambda: both_ways(function, inputs, grad), device, repeats),  # noqa: B023
            }
            if number:
                for kind, value in milliseconds.items():
                    times[name][kind].append(value)
    return {name: {kind: statistics.median(values) for kind, values in kinds.items()} for name, kinds in times.items()}


def run_shape(name: str, args, device, dtype) -> list[dict]:
    """Rows of one size: where, backend, milliseconds, TFLOP/s, distances."""
    heads, tower = SHAPES[name]
    q_heads, kv_heads, width = heads
    lengths = [args.response_tokens] * args.group_size
    rows = []
    checks = check_group(args.attention, heads, args.check_tokens, [args.check_tokens // 4, 3, 40], device, dtype)
    functions = {}
    for backend in args.attention:
        function, tokens = group_function(args.prompt_tokens, lengths, backend, width**-0.5)
        *inputs, grad = draw(q_heads, kv_heads, tokens, width, device, dtype)
        functions[backend] = (function, inputs, grad)
    flops = 4 * width * q_heads * attended_positions(args.prompt_tokens, lengths)
    rows += as_rows(name, "group", measure(functions, device, args.rounds, args.repeats), checks, flops)
    names = [each for each in TOWERS if each in args.attention]
    if names:
        count, width, patches = tower
        checks = check_tower(names, tower, 5, device, dtype)
        *inputs, grad = draw(count, count, args.frames * patches, width, device, dtype)
        functions = {}
        for backend in names:
            functions[backend] = (tower_function(backend, args.frames, patches, width**-0.5, device), inputs, grad)
        flops = 4 * width * count * args.frames * patches**2
        rows += as_rows(name, "tower", measure(functions, device, args.rounds, args.repeats), checks, flops)
    return rows


def as_rows(shape: str, where: str, medians: dict, checks: dict, flops: float) -> list[dict]:
    return [
        {
            "shape": shape, "where": where, "backend": backend, "forward_ms": times["forward"], "both_ms": times["both"],
            "forward_tflops": flops / times["forward"] / 1e9, "both_tflops": 3.5 * flops / times["both"] / 1e9,
            "distances": checks[backend],
        }
        for backend, times in medians.items()
    ]  # fmt: skip


def print_rows(rows: list[dict], head: bool) -> None:
    """One line each, below a head if it is asked for; the distances are those of output, dq, dk, dv."""
    if head:
        print(
            f"{'shape':6} {'where':6} {'backend':8} {'forward ms':>10} {'both ms':>9} {'TFLOP/s':>14}   "
            "from fp32: out, dq, dk, dv"
        )
    for row in rows:
        speeds = f"{row['forward_tflops']:.0f}, {row['both_tflops']:.0f}"
        far = " ".join(f"{value:.1e}" for value in row["distances"])
        print(
            f"{row['shape']:6} {row['where']:6} {row['backend']:8} {row['forward_ms']:10.3f} {row['both_ms']:9.3f} "
            f"{speeds:>14}   {far}", flush=True,
        )  # fmt: skip


def why_not(args, device, dtype) -> str:
    """Why these flags cannot be measured here and what to do; empty if they can."""
    for name in ("prompt_tokens", "response_tokens", "group_size", "frames", "check_tokens", "rounds", "repeats"):
        least = 4 if name == "check_tokens" else 1  # its first response is a quarter as long
        if getattr(args, name) < least:
            return f"--{name} must be {least} or more, got {getattr(args, name)}"
    shortest = min(args.prompt_tokens, args.check_tokens)
    for backend in args.attention:
        try:
            choose_attention(backend, device, dtype)
        except ValueError as error:
            return str(error)
        if backend == "cudnn" and shortest < LONG_PROMPT:
            return (
                f"--attention cudnn takes flex for prompts below {LONG_PROMPT} tokens, got {shortest}; raise --prompt_tokens and "
                "--check_tokens, or use --attention flex"
            )
    if args.out and not Path(args.out).resolve().parent.is_dir():
        return f"--out {args.out}: there is no folder {Path(args.out).parent}; make it first"
    return ""


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=None, help="sizes of Qwen3-VL; default 2b 8b, on a CPU tiny"
    )
    parser.add_argument(
        "--attention", nargs="+", choices=BACKENDS, default=None, help="default cudnn flex varlen, on a CPU sdpa"
    )
    parser.add_argument("--prompt_tokens", type=int, default=None, help="default 16765, tiny 300")
    parser.add_argument("--response_tokens", type=int, default=None, help="of each; default 491, tiny 20")
    parser.add_argument("--group_size", type=int, default=8, help="responses")
    parser.add_argument("--frames", type=int, default=None, help="of the tower; default 64, tiny 4")
    parser.add_argument(
        "--check_tokens", type=int, default=None, help="prompt of the comparison; default 2000, tiny 100"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that compiles")
    parser.add_argument("--repeats", type=int, default=5, help="calls per timing")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=None, help="default bf16, on a CPU fp32")
    parser.add_argument("--out", default=None, help="write the rows here as JSON")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    args.shapes = args.shapes or (["2b", "8b"] if cuda else ["tiny"])
    args.attention = args.attention or (["cudnn", "flex", "varlen"] if cuda else ["sdpa"])
    tiny = args.shapes == ["tiny"]
    for name, small, real in (
        ("prompt_tokens", 300, 16765), ("response_tokens", 20, 491), ("frames", 4, 64), ("check_tokens", 100, 2000),
    ):  # fmt: skip
        if getattr(args, name) is None:
            setattr(args, name, small if tiny else real)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype or ("bf16" if cuda else "fp32")]
    if why := why_not(args, device, dtype):
        parser.error(why)
    where = torch.cuda.get_device_name() if cuda else "CPU"
    print(
        f"{where}, torch {torch.__version__}, {dtype}: a prompt of {args.prompt_tokens} tokens, {args.group_size} responses of "
        f"{args.response_tokens}; tower: {args.frames} frames; medians of {args.rounds} x {args.repeats}",
        flush=True,
    )
    rows = []
    for shape in args.shapes:  # what is measured stays, should time end before the last one
        found = run_shape(shape, args, device, dtype)
        print_rows(found, head=not rows)
        rows += found
        if args.out:
            Path(args.out).write_text(json.dumps({"device": where, "args": vars(args), "rows": rows}, indent=1))
    return rows


if __name__ == "__main__":
    main()
