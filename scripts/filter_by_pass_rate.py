"""Keep the rows that a model answers sometimes: k responses each, rows with a pass rate strictly between two bounds.

  python scripts/filter_by_pass_rate.py --model DIR --data train.jsonl --output_dir filtered --samples 8 --low 0 --high 1
  (several GPUs: one process per GPU with CUDA_VISIBLE_DEVICES and --shard 0/4, 1/4, ...)

A row that is always or never right gives a group without spread, hence no gradient. Writes in --output_dir:
rates.jsonl (pass rate of every row, or null and the reason why it could not be used; appended as it comes, run again to go
on where it stopped), kept.jsonl (the rows as they were, with `pass_rate` added, once every row has been tried) and, with
--on_bad_sample skip, failed.jsonl.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import base64
import json
import os
from collections.abc import Iterator
from typing import Any

from data.records import Sample

CHUNK = 64  # prompts given to the engine at once; rates are written after each group
FIXED = ("model", "samples", "temperature", "top_p", "max_response_tokens", "pass_at", "style", "fps", "max_frames")


def build_parser() -> argparse.ArgumentParser:
    from train.args import add_media_flags

    parser = argparse.ArgumentParser(
        description="keep rows that a model answers sometimes", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder of the model that answers")
    add("--data", nargs="+", required=True, help="dataset files, globs allowed")
    add("--media_dir", default=None, help="folder that relative media paths start from (default: the file's)")
    add("--output_dir", required=True, help="folder for rates.jsonl and kept.jsonl")
    add("--samples", type=int, default=8, help="k: responses per row")
    add("--low", type=float, default=0.0, help="keep rows with a pass rate above this")
    add("--high", type=float, default=1.0, help="keep rows with a pass rate below this")
    add("--pass_at", type=float, default=0.5, help="accuracy from which a response counts as passed")
    add("--temperature", type=float, default=1.0, help="of sampling")
    add("--top_p", type=float, default=1.0, help="of sampling")
    add("--max_response_tokens", type=int, default=2048, help="longest response")
    add("--max_prompt_tokens", type=int, default=32768, help="rows with a longer prompt are not tried")
    add("--style", choices=("think", "direct", "open"), default="think", help="what the instruction asks for")
    add("--prompt_template", default=None, help="Jinja2 file instead of the built-in prompts")
    add("--shard", default="0/1", help="i/n: this process takes every n-th row, beginning with the i-th")
    add("--on_bad_sample", choices=("error", "skip"), default="error", help="rows that cannot be read")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 on CUDA, else fp32")
    add("--tensor_parallel", type=int, default=1, help="GPUs per engine (start with torchrun)")
    add("--gpu_memory_utilization", type=float, default=0.9, help="share of the GPU")
    add("--kv_cache_gib", type=float, default=None, help="KV cache size; default on CPU 0.25")
    add("--max_num_seqs", type=int, default=256, help="responses decoded at once")
    add("--reward_workers", type=int, default=2, help="scoring processes")
    add("--reward_timeout_s", type=float, default=20.0, help="limit per response; beyond it the response fails")
    add("--seed", type=int, default=0, help="of sampling")
    add("--trust_remote_code", action="store_true", help="run Python code that a model folder carries")
    add_media_flags(parser.add_argument_group("frames and pixels"))
    return parser


def read_shard(text: str) -> tuple[int, int]:
    """ "1/4" -> (1, 4). Raises ValueError."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"--shard must be i/n with 0 <= i < n, got {text!r}")
    return int(index), int(count)


def key_of(sample: Sample) -> str:
    return f"{sample.file}:{sample.line}"


def read_rates(folder: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """ "file:line" -> row of every rates*.jsonl. A last line cut off by a kill is dropped, from the file too.

    Raises ValueError when a file was made with other settings.
    """
    rates: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("rates*.jsonl")):
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        rows = [json.loads(line) for line in whole.splitlines()]
        if rows and rows[0]["settings"] != settings:
            differ = [name for name in settings if rows[0]["settings"].get(name) != settings[name]]
            raise ValueError(
                f"{path} was made with other {', '.join('--' + name for name in differ)}; use another --output_dir or delete it"
            )
        rates.update({f"{row['file']}:{row['line']}": row for row in rows[1:]})
    return rates


def prepare_rates(path: Path, settings: dict[str, Any]) -> None:
    """Give the file its first line, or cut a half line off its end, so that rows can be appended."""
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    if not whole:
        path.write_text(json.dumps({"schema_version": 1, "settings": settings}) + "\n", encoding="utf-8")


def pass_rates(samples: list[Sample], encoder, engine, scorer, args) -> Iterator[dict[str, Any]]:
    """A rates.jsonl row per sample."""
    sampling = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": -1,
        "max_tokens": args.max_response_tokens,
    }
    for start in range(0, len(samples), CHUNK):
        prompts = []
        for sample in samples[start : start + CHUNK]:
            try:
                prompts.append(encoder.encode(sample))
            except (ValueError, OSError) as error:
                yield {
                    "file": sample.file,
                    "line": sample.line,
                    "id": sample.id,
                    "pass_rate": None,
                    "reason": str(error),
                }
        pending = []
        for index, responses in engine.generate(prompts, n=args.samples, sampling=sampling, step=0, salt="pass rate"):
            sample = prompts[index].sample
            extra = {"options": list(sample.options), "question": sample.question, **sample.extra}
            jobs = [scorer.submit(sample.problem_type, r.text, sample.answer, extra) for r in responses]
            pending.append((sample, responses, jobs))
        for sample, responses, jobs in pending:
            accuracies = [job.result().accuracy for job in jobs]
            passed = sum(accuracy >= args.pass_at for accuracy in accuracies)
            yield {
                "file": sample.file,
                "line": sample.line,
                "id": sample.id,
                "problem_type": sample.problem_type,
                "pass_rate": passed / len(accuracies),
                "mean_accuracy": sum(accuracies) / len(accuracies),
                "truncated_share": sum(r.finish_reason == "length" for r in responses) / len(responses),
                "response_tokens_mean": sum(len(r.token_ids) for r in responses) / len(responses),
            }


def write_kept(path: Path, samples: list[Sample], rates: dict[str, dict], low: float, high: float) -> int:
    """Rows of the data files whose rate is strictly between the bounds, in their order -> how many."""
    from data.rows import read_rows

    wanted: dict[str, dict[int, float]] = {}
    for sample in samples:
        rate = rates.get(key_of(sample))
        if rate and rate["pass_rate"] is not None and low < rate["pass_rate"] < high:
            wanted.setdefault(sample.file, {})[sample.line] = rate["pass_rate"]
    draft = path.with_suffix(".tmp")
    with open(draft, "w", encoding="utf-8") as out:
        for file, lines in wanted.items():
            for line, row in read_rows(file):
                if line in lines:
                    row = {**row, "pass_rate": lines[line]}
                    out.write(json.dumps(row, ensure_ascii=False, default=encode_bytes) + "\n")
    os.replace(draft, path)
    return sum(map(len, wanted.values()))


def encode_bytes(value: Any) -> str:
    """Images that a Parquet file stores as bytes, in the base64 form that data files may have."""
    if isinstance(value, bytes):
        return "data:application/octet-stream;base64," + base64.b64encode(value).decode()
    raise TypeError(f"a row has a {type(value).__name__}, which JSON cannot store")


def run(args, samples: list[Sample], todo: list[Sample], rates_file: Path, settings: dict) -> None:
    """Sample, score and append the rates of `todo`."""
    from rich.progress import track

    from rewards.pool import ScoringPool

    scorer = ScoringPool(workers=args.reward_workers, timeout_s=args.reward_timeout_s, mode=args.style)
    import torch

    from data.encode import Encoder
    from data.frame_cache import FrameCache
    from rollout.engine import RolloutEngine

    names = ("min_pixels", "max_pixels")
    video = {
        "fps": args.fps,
        "min_frames": args.min_frames,
        "max_frames": args.max_frames,
        "total_pixels": args.total_pixels,
    }
    encoder = Encoder(
        args.model,
        video={
            **video,
            **{name: getattr(args, f"video_{name}") for name in names},
            "resize": args.resize,
            "sampling": args.sampling,
            "backend": args.decoder,
        },
        image={name: getattr(args, f"image_{name}") for name in names},
        cache=FrameCache(args.cache_dir, args.cache if args.cache_dir else "off"),
        style=args.style,
        prompt_template=args.prompt_template,
        max_prompt_tokens=args.max_prompt_tokens,
        trust_remote_code=args.trust_remote_code,
        build_patches=False,
    )
    engine = RolloutEngine(
        args.model,
        encoder=encoder,
        dtype=args.dtype if args.dtype != "auto" else "bf16" if torch.cuda.is_available() else "fp32",
        max_model_len=args.max_prompt_tokens + args.max_response_tokens,
        tensor_parallel=args.tensor_parallel,
        max_num_seqs=args.max_num_seqs,
        gpu_memory_utilization=args.gpu_memory_utilization,
        kv_cache_gib=args.kv_cache_gib,
        seed=args.seed,
        sleep_level=0,
        trust_remote_code=args.trust_remote_code,
    )
    writes = int(os.environ.get("RANK", "0")) % args.tensor_parallel == 0
    if writes:
        prepare_rates(rates_file, settings)
    rows = pass_rates(todo, encoder, engine, scorer, args)
    with open(rates_file if writes else os.devnull, "a", encoding="utf-8") as out:
        for row in track(rows, total=len(todo), disable=not sys.stdout.isatty()):
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()


def main(arguments: list[str] | None = None) -> int:
    from data.dataset import BadDataset, load
    from rewards import check_gold

    args = build_parser().parse_args(arguments)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        shard, shards = read_shard(args.shard)
        if not (args.samples >= 2 and 0 <= args.low < args.high <= 1):
            raise ValueError(f"need --samples {args.samples} >= 2 and 0 <= --low {args.low} < --high {args.high} <= 1")
        (folder / "failed.jsonl").unlink(missing_ok=True)  # listed anew at each start
        samples = load(
            args.data,
            media_dir=args.media_dir,
            check_gold=check_gold,
            on_bad_sample=args.on_bad_sample,
            failed_file=str(folder / "failed.jsonl"),
        )
        settings = {name: getattr(args, name) for name in FIXED}
        rates = read_rates(folder, settings)
    except (BadDataset, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    todo = [sample for sample in samples[shard::shards] if key_of(sample) not in rates]
    print(f"{len(samples)} rows, {len(rates)} tried before, {len(todo)} to do in shard {args.shard}", flush=True)
    if todo:
        name = "rates.jsonl" if shards == 1 else f"rates-{shard}-of-{shards}.jsonl"
        run(args, samples, todo, folder / name, settings)
        rates = read_rates(folder, settings)
    open_rows = sum(key_of(sample) not in rates for sample in samples)
    if open_rows:
        print(f"{open_rows} rows of other shards have no rate yet: the last shard to end writes kept.jsonl")
        return 0
    unusable = sum(rate["pass_rate"] is None for rate in rates.values())
    if unusable:
        print(f"{unusable} rows could not be used; rates.jsonl has the reasons")
    count = write_kept(folder / "kept.jsonl", samples, rates, args.low, args.high)
    print(f"kept {count} of {len(samples)} rows with {args.low} < pass rate < {args.high}: {folder / 'kept.jsonl'}")
    if args.media_dir is None and any(Path(file).resolve().parent != folder.resolve() for file in args.data):
        print(
            f"relative media paths in it start from the data file's folder: train with --media_dir {Path(args.data[0]).parent}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
