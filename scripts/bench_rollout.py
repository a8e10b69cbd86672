"""What a rollout costs its host: prompts x responses through RolloutEngine and a tiny model, and where the time goes.

    python scripts/bench_rollout.py [--prompts 64] [--responses 8] [--tokens 40] [--rounds 5] [--json out.json]
    python scripts/bench_rollout.py --profile 30          # the functions with the most time of their own, and in all
    python scripts/bench_rollout.py --media video --prompts 8 --rollout_seed engine

The model's own work is small here, and `host` is what remains without it (without the worker's calls): vLLM's scheduler, its
output processing and rollout/engine.py, for which a fast GPU waits. All in processor seconds of this process, which a busy
machine stretches less than the clock's. "forced" responses have just their length (between half and one and a half of
--tokens), "natural" ones end when they do. `digest` is of all ids, log-probs (to the bit), finish reasons and texts: equal
digests mean that two versions of the code give equal responses. To compare two versions, run them in turns and take medians.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import cProfile
import hashlib
import io
import json
import os
import pstats
import random
import statistics
import tempfile
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the model is not what is measured
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEXT = "a man woman red blue car walks opens door kitchen table camera moves left right after scene people"
WORDS = TEXT.split()
CLIPS = 4  # different videos; prompts share them


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    work = parser.add_argument_group("work")
    work.add_argument("--prompts", type=int, default=64, help="prompts of one rollout")
    work.add_argument("--responses", type=int, default=8, help="responses per prompt")
    work.add_argument("--tokens", type=int, default=40, help="mean length of a response that is forced")
    work.add_argument("--media", choices=("text", "video"), default="text", help="what the prompts hold")
    work.add_argument("--lengths", choices=("forced", "natural"), nargs="+", default=["forced", "natural"])
    work.add_argument(
        "--any_bytes", action="store_true", help="sample pieces of characters, too, as no trained model does"
    )
    work.add_argument("--stop", nargs="*", default=None, help="stop strings, which need text after every token")
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--model", help="Hugging Face folder; default: a tiny one with random weights, made on the spot"
    )
    engine.add_argument("--rollout_seed", choices=("request", "engine"), default="request")
    engine.add_argument("--max_num_seqs", type=int, default=512, help="responses decoded at once")
    engine.add_argument("--quick_decode", action="store_true", help="as train/main.py's flag")
    engine.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32")
    output = parser.add_argument_group("output")
    output.add_argument("--rounds", type=int, default=3, help="measured rollouts of each kind, after one that warms up")
    output.add_argument(
        "--profile", type=int, default=0, metavar="N", help="print N functions by own and by total time"
    )
    output.add_argument("--json", type=Path, help="write the results here, too")
    args = parser.parse_args(argv)
    for name in ("prompts", "responses", "tokens", "max_num_seqs", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def make_model_folder(folder: Path) -> str:
    """The playground's tiny Qwen3-VL with random weights."""
    from scripts.playground_model import make_model, make_processor, save_model, train_tokenizer

    draw = random.Random(5)
    texts = [" ".join(draw.choices(WORDS, k=12)) for _ in range(200)]
    tokenizer = train_tokenizer(texts)
    save_model(folder, make_model(tokenizer, seed=5), make_processor(tokenizer))
    return str(folder)


def broken_ids(tokenizer) -> tuple[int, ...]:
    """Tokens that are no whole characters by themselves. Random weights sample them all the time, and text with them in it
    costs more."""
    return tuple(i for i in range(len(tokenizer)) if "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([i]))


def make_prompts(args: argparse.Namespace, encoder, folder: Path) -> list:
    """Encoded prompts: a question of a few words, with one of CLIPS synthetic videos if asked for."""
    from data.records import Media, Sample
    from scripts.playground_clips import draw_scenes, write_scene

    media: list[tuple[Media, ...]] = [()]
    if args.media == "video":
        scenes = draw_scenes(5, "train", CLIPS, 0)
        for scene in scenes:
            write_scene(folder, scene)
        media = [(Media("video", path=str(path)),) for path in sorted(folder.rglob("*.mp4"))]
    draw = random.Random(6)
    return [
        encoder.encode(
            Sample(
                id=f"q{number}",
                question=" ".join(draw.choices(WORDS, k=draw.randint(6, 20))) + "?",
                answer="A",
                problem_type="multiple choice",
                data_type=args.media,
                media=media[number % len(media)],
                options=("red", "green"),
            )
        )
        for number in range(args.prompts)
    ]


def sampling_of(args: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    """A setting per prompt; the lengths of the forced responses are the same in every rollout."""
    draw = random.Random(7)
    common = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "stop": args.stop or None}
    if kind == "natural":
        return [{**common, "max_tokens": 4 * args.tokens} for _ in range(args.prompts)]
    low, high = max(1, args.tokens // 2), args.tokens + args.tokens // 2
    return [
        {**common, "ignore_eos": True, "max_tokens": [draw.randint(low, high) for _ in range(args.responses)]}
        for _ in range(args.prompts)
    ]


def rollout(engine, prompts: list, args: argparse.Namespace, kind: str, step: int) -> dict[str, Any]:
    """One rollout, measured from the call to the last group."""
    from rollout import vllm_access

    steps, worker_s = 0, 0.0
    original, executor = vllm_access.step, engine.llm.llm_engine.model_executor
    call = executor.collective_rpc

    def counted(llm):
        nonlocal steps
        steps += 1
        return original(llm)

    def timed(*given, **named):
        nonlocal worker_s
        called = time.process_time()
        result = call(*given, **named)
        worker_s += time.process_time() - called
        return result

    vllm_access.step, executor.collective_rpc = counted, timed
    began, began_cpu = time.perf_counter(), time.process_time()
    try:
        groups = dict(engine.generate(prompts, n=args.responses, sampling=sampling_of(args, kind), step=step))
    finally:
        vllm_access.step = original
        del executor.collective_rpc  # the class's method shows again
    cpu_s, wall_s = time.process_time() - began_cpu, time.perf_counter() - began
    digest, tokens = hashlib.blake2b(digest_size=8), 0
    for index in sorted(groups):
        for response in groups[index]:
            tokens += len(response.token_ids)
            logprobs = [float(value).hex() for value in response.rollout_logprobs]
            digest.update(repr((response.token_ids, logprobs, response.finish_reason, response.text)).encode())
    times = {"wall_s": wall_s, "cpu_s": cpu_s, "host_s": cpu_s - worker_s}
    return {**times, "steps": steps, "tokens": tokens, "digest": digest.hexdigest()}


def profiled(engine, prompts: list, args: argparse.Namespace, kind: str) -> str:
    profile = cProfile.Profile()
    profile.enable()
    rollout(engine, prompts, args, kind, step=0)
    profile.disable()
    text = io.StringIO()
    stats = pstats.Stats(profile, stream=text)
    for order in ("tottime", "cumulative"):
        stats.sort_stats(order).print_stats(args.profile)
    return text.getvalue()


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds of one kind; a digest of all rounds' digests."""
    names = ("wall_s", "cpu_s", "host_s", "steps", "tokens")
    median = {name: statistics.median(each[name] for each in rounds) for name in names}
    return {
        **median,
        "host_ms_per_step": 1e3 * median["host_s"] / median["steps"],
        "host_us_per_token": 1e6 * median["host_s"] / median["tokens"],
        "digest": hashlib.blake2b("".join(each["digest"] for each in rounds).encode(), digest_size=8).hexdigest(),
        "rounds": rounds,
    }


def main() -> None:
    args = parse()
    from data.encode import Encoder
    from rollout.engine import RolloutEngine

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model or make_model_folder(folder / "model")
        encoder = Encoder(
            model,
            video={"fps": 2.0, "min_frames": 4, "max_frames": 8, "min_pixels": 4096, "max_pixels": 128 * 128},
            image={"min_pixels": 4096, "max_pixels": 128 * 128},
            style="direct",
        )
        if not args.any_bytes:
            encoder.visual_token_ids += broken_ids(encoder.tokenizer)  # what the engine never samples
        prompts = make_prompts(args, encoder, folder / "clips")
        longest = max(len(prompt.input_ids) for prompt in prompts)
        engine = RolloutEngine(
            model,
            encoder=encoder,
            dtype=args.dtype,
            max_model_len=longest + 4 * args.tokens,
            max_num_seqs=args.max_num_seqs,
            rollout_seed=args.rollout_seed,
            seed=3,
            kv_cache_gib=0.5,
            quick_decode=args.quick_decode,
        )
        results = {}
        for kind in args.lengths:
            rollout(engine, prompts, args, kind, step=0)
            results[kind] = summary([rollout(engine, prompts, args, kind, step) for step in range(1, args.rounds + 1)])
            if args.profile:
                print(profiled(engine, prompts, args, kind))
        engine.close()
    report = {"work": {name: value for name, value in vars(args).items() if name != "json"}, "results": results}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    columns = ("wall_s", "cpu_s", "host_s", "steps", "tokens", "host_ms_per_step", "host_us_per_token")
    print(" " * 8, *(f"{name:>{max(8, len(name))}}" for name in columns), " digest")
    for kind, row in results.items():
        print(f"{kind:8}", *(f"{row[name]:{max(8, len(name))}.6g}" for name in columns), "", row["digest"])


if __name__ == "__main__":
    main()
