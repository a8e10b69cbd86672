"""The evaluation pipeline against the obvious loop and against whole-batch generation: same engine, same clips, one run.

    python scripts/bench_evaluate.py --model DIR [--clips 24] [--questions 3] [--frames 8] [--rounds 3] [--cached]
        [--ways loop batch engine pipeline] [--engine_cores 1]

Ways through the same questions: `loop` (load, generate, next), `batch` (load everything, then submit everything) and
`pipeline` (evaluate/_engine.py); the first two leave it to vLLM to make patches of frames, as a script of one's own would.
`engine` is the engine alone: everything was loaded and rendered by the pipeline's functions before its clock starts.
Rounds are interleaved, prefix caches are emptied between runs, medians count; figures that compare with a way left out by
--ways are left out too. The bound is the larger of the loading CPU time (decoding, prompt, patches) spread over the loaders'
cores and the time from submitting the whole batch to its last answer: of `engine` if it is run, else of `batch`, with vLLM's
own making of patches. Where the engine computes on the same cores (no GPU), that bound promises the engine a core that the
loaders take away. So there is a second one, CPU seconds of loading and of the engine's processes for the whole batch over
the cores; and --engine_cores N gives N cores to the engine alone and the others to all else, as a GPU is the engine's alone.
--cached decodes into a frame cache first, as after data/preprocess.py. With a GPU, gpu_idle_share is what NVML says of it while
the way runs: the share of samples' windows without a running kernel.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from data.records import Media, Sample
from evaluate._engine import run_pipeline
from evaluate._flags import build_parser
from evaluate._models import build_encoder, build_engine, limits_of
from evaluate._scoring import Benchmark

WAYS = ("loop", "batch", "engine", "pipeline")
USUAL_WAYS = ("loop", "batch", "pipeline")


def write_clip(path: Path, seed: int, seconds: float, width: int, height: int, fps: int = 24) -> None:
    """An H.264 clip of a textured picture that drifts."""
    import av

    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(int(seconds * fps)):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * index, axis=1), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def questions(folder: Path, clips: int, per_clip: int) -> list[Sample]:
    return [
        Sample(f"{clip}-{q}", f"What is seen in part {q} of this video?", "A", "open-ended", "video",
               (Media("video", path=str(folder / f"{clip:03d}.mp4")),))
        for clip in range(clips)
        for q in range(per_clip)
    ]  # fmt: skip


def cpu_seconds() -> float:
    """CPU seconds that this process and the engine's processes below it have used."""
    children: dict[str, list[str]] = {}
    used: dict[str, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        children.setdefault(fields[1], []).append(path.parent.name)
        used[path.parent.name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    total, open_ids = 0.0, [str(os.getpid())]
    while open_ids:
        process = open_ids.pop()
        total += used.get(process, 0.0)
        open_ids += children.get(process, [])
    return total


class GpuWatch:
    """Samples the first visible GPU's utilisation ten times a second; `idle_share` is None where NVML is not there."""

    def __init__(self):
        self._busy: list[float] = []
        self._ended, self._thread = threading.Event(), None
        try:
            import pynvml
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:  # no driver
            return
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdigit() else 0)
        self._read = lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._ended.wait(0.1):
            self._busy.append(self._read())

    def __enter__(self):
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()

    @property
    def idle_share(self) -> float | None:
        return round(1 - statistics.mean(self._busy), 3) if self._busy else None


async def loop_way(samples, encoder, engine, sampling) -> dict:
    """One question after another: decode, ask, wait."""
    for sample in samples:
        await engine.generate(encoder.encode(sample).vllm_prompt, sampling, f"loop-{time.perf_counter_ns()}")
    return {}


async def batch_way(samples, encoder, engine, sampling) -> dict:
    """Everything is loaded on one thread, then everything is submitted: two phases that never overlap."""
    began = time.perf_counter()
    prompts = [encoder.encode(sample) for sample in samples]
    loaded, used = time.perf_counter(), cpu_seconds()
    await asyncio.gather(
        *(engine.generate(p.vllm_prompt, sampling, f"b{i}-{time.perf_counter_ns()}") for i, p in enumerate(prompts))
    )
    engine_s = time.perf_counter() - loaded
    return {"load_s": loaded - began, "engine_s": engine_s, "engine_cpu_s": cpu_seconds() - used}


async def engine_way(samples, encoder, engine, sampling, frames) -> dict:
    """Everything was loaded and rendered before: what the engine takes if it never waits."""
    prompts = [prompt for prompt, _ in rendered(samples, encoder, engine, frames)]
    began, used = time.perf_counter(), cpu_seconds()
    await asyncio.gather(
        *(engine.generate(p, sampling, f"e{i}-{time.perf_counter_ns()}") for i, p in enumerate(prompts))
    )
    engine_s = time.perf_counter() - began
    return {"engine_s": engine_s, "engine_cpu_s": cpu_seconds() - used, "seconds": engine_s}


async def pipeline_way(samples, encoder, engine, sampling, limits, frames) -> dict:
    rows: list[dict] = []
    stats = await run_pipeline(
        samples, encode=encoder.encode, engine=engine, sampling=sampling, limits=limits, frames=frames,
        on_row=lambda sample, row: rows.append(row),
    )  # fmt: skip
    failed = [row for row in rows if row["status"]]
    if failed or len(rows) != len(samples):
        raise RuntimeError(f"{len(rows)} rows, {len(failed)} failed: {failed[:1]}")
    return stats.as_dict()


async def measure(args, run_args, samples) -> dict:
    encoder, frames = build_encoder(run_args, "direct", None)
    rest = take_cores(args.engine_cores) if args.engine_cores else None
    engine = build_engine(run_args, encoder)
    if rest:
        move_to(rest)
    sampling = {"temperature": 0.0, "max_tokens": args.response_tokens, "min_tokens": args.response_tokens}
    limits = limits_of(run_args)
    cores = min(args.loaders, len(rest or os.sched_getaffinity(0)))

    ways = {
        "loop": lambda: loop_way(samples, encoder, engine, sampling),
        "batch": lambda: batch_way(samples, encoder, engine, sampling),
        "engine": lambda: engine_way(samples, encoder, engine, sampling, frames),
        "pipeline": lambda: pipeline_way(samples, encoder, engine, sampling, limits, frames),
    }
    ways = {name: way for name, way in ways.items() if name in args.ways}
    times: dict[str, list[float]] = {name: [] for name in ways}
    facts: dict[str, list[dict]] = {name: [] for name in ways}
    gpu_idle: dict[str, list[float | None]] = {name: [] for name in ways}
    loading: list[float] = []
    try:
        for sample in samples[:2]:  # warm up: kernels, decoder, tokenizer
            prompt = encoder.encode(sample)
            await engine.generate(prompt.vllm_prompt, sampling, f"warm-{sample.id}")
            await engine.generate(engine.render(prompt, {}), sampling, f"warm-ours-{sample.id}")
        if args.cached:
            with ThreadPoolExecutor(limits.loaders) as pool:
                list(pool.map(lambda media: frames.frames(media, encoder.video), {s.media[0] for s in samples}))
        for _ in range(args.rounds):
            for name, way in ways.items():
                await engine.reset_caches()
                began = time.perf_counter()
                with GpuWatch() as watch:
                    facts[name].append(await way())
                times[name].append(facts[name][-1].get("seconds", time.perf_counter() - began))
                gpu_idle[name].append(watch.idle_share)
                print(f"  {name}: {times[name][-1]:.2f} s, GPU idle {watch.idle_share}", flush=True)
            if {"batch", "engine"} & ways.keys():
                loading.append(clip_load_time(samples, encoder, engine, frames))
        load_s = statistics.median(loading or [clip_load_time(samples, encoder, engine, frames)])
        machine = len(rest) + args.engine_cores if rest else len(os.sched_getaffinity(0))
    finally:
        engine.close()
    found = {
        "questions": len(samples),
        "clips": args.clips,
        "median_s": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "all_s": {name: [round(value, 3) for value in values] for name, values in times.items()},
        "gpu_idle_share": {name: statistics.median(idle) for name, idle in gpu_idle.items() if None not in idle},
        "load_all_clips_once_cpu_s": round(load_s, 3),
    }
    return found | figures(times, facts, load_s, cores, args.clips, machine)


def figures(
    times: dict[str, list[float]], facts: dict[str, list[dict]], load_s: float, cores: int, clips: int, machine: int
) -> dict[str, float]:
    """What follows from seconds and facts per way and round; without those that need a way that was not run.

    cores: of the loaders. machine: theirs and the engine's."""
    middle = {name: statistics.median(values) for name, values in times.items()}
    found: dict[str, float] = {}
    alone = next((name for name in ("engine", "batch") if name in middle), None)
    if alone:
        engine_s = statistics.median(fact["engine_s"] for fact in facts[alone])
        engine_cpu_s = statistics.median(fact["engine_cpu_s"] for fact in facts[alone])
        bound_s = max(load_s / cores, engine_s)
        cpu_bound_s = max(bound_s, (load_s + engine_cpu_s) / machine)
        found |= {
            "batched_engine_s": engine_s,
            "batched_engine_cpu_s": engine_cpu_s,
            "bound_s": bound_s,
            "bound_with_engine_on_the_same_cores_s": cpu_bound_s,
        }
        if "pipeline" in middle:
            found["share_of_bound"] = bound_s / middle["pipeline"]
            found["share_of_bound_with_engine_on_the_same_cores"] = cpu_bound_s / middle["pipeline"]
            if "batch" in middle:
                found["times_whole_batch"] = middle["batch"] / middle["pipeline"]
    if "pipeline" in middle:
        if "loop" in middle:
            found["times_the_loop"] = middle["loop"] / middle["pipeline"]
        told = facts["pipeline"]
        found |= {
            "engine_idle_share": statistics.median(fact["engine_idle_share"] for fact in told),
            "loader_thread_s_per_clip": statistics.median(fact["prepare_thread_s"] for fact in told) / clips,
            "rendering_thread_s_per_clip": statistics.median(fact["render_thread_s"] for fact in told) / clips,
            "mean_requests_in_engine": statistics.median(fact["mean_requests_in_engine"] for fact in told),
            "peak_in_flight_mib": max(fact["peak_in_flight_mib"] for fact in told),
        }
    return {name: round(value, 4) for name, value in found.items()}


def rendered(samples: list[Sample], encoder, engine, frames):
    """(what the engine is given, sample) of each question, each video read once, on this thread."""
    scope, media = {}, None
    for sample in samples:
        if sample.media != media:
            scope, media = {}, sample.media
        frames.use(scope)
        yield engine.render(encoder.encode(sample), scope), sample
    frames.use(None)


def clip_load_time(samples: list[Sample], encoder, engine, frames) -> float:
    """CPU seconds of preparing every question on one thread: what the loaders have to share."""
    began = time.process_time()
    for _ in rendered(samples, encoder, engine, frames):
        pass
    return time.process_time() - began


def take_cores(count: int) -> set[int]:
    """The first `count` of this process's cores for vLLM's CPU engine, which is made next; returns the others, for us."""
    allowed = sorted(os.sched_getaffinity(0))
    if not 0 < count < len(allowed):
        raise ValueError(
            f"--engine_cores {count}: there are {len(allowed)} cores, and one has to be left for the loaders"
        )
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, allowed[:count]))
    os.sched_setaffinity(0, allowed[:count])  # the engine's process inherits it
    return set(allowed[count:])


def move_to(cores: set[int]) -> None:
    """Every thread of this process onto these cores; new ones inherit that."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


def main() -> int:
    parser = argparse.ArgumentParser(description="pipeline, loop, whole batch", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--clips", type=int, default=24, help="generated clips")
    parser.add_argument("--questions", type=int, default=3, help="questions per clip")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a clip")
    parser.add_argument("--size", default="320x192", help="width x height of the source clips")
    parser.add_argument("--frames", type=int, default=8, help="frames per clip the model sees")
    parser.add_argument("--pixels", type=int, default=16384, help="pixels per frame the model sees, at most")
    parser.add_argument("--response_tokens", type=int, default=16, help="tokens of every answer")
    parser.add_argument(
        "--loaders", type=int, default=min(8, os.cpu_count() or 2), help="loader threads of the pipeline"
    )
    parser.add_argument("--max_num_seqs", type=int, default=32, help="requests that run together")
    parser.add_argument("--max_model_len", type=int, default=4096, help="vLLM context length")
    parser.add_argument("--kv_cache_gib", type=float, help="size of vLLM's KV cache (default: the evaluation's own)")
    parser.add_argument("--dtype", default="auto", help="vLLM dtype")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(USUAL_WAYS), help="which ways are measured")
    parser.add_argument(
        "--engine_cores", type=int, default=0, help="without a GPU: cores for the engine alone (0: it shares all)"
    )
    parser.add_argument("--cached", action="store_true", help="frames from the frame cache, filled before")
    parser.add_argument("--output", help="write the figures here (JSON)")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    with tempfile.TemporaryDirectory(prefix="bench_evaluate_") as place:
        folder = Path(place)
        with ThreadPoolExecutor(min(args.clips, os.cpu_count() or 1)) as pool:
            list(pool.map(
                lambda clip: write_clip(folder / f"{clip:03d}.mp4", clip, args.seconds, width, height), range(args.clips)
            ))  # fmt: skip
        flags = ["--model", args.model, "--max_frames", str(args.frames), "--fps", str(args.frames / args.seconds)]
        flags += [
            "--video_max_pixels",
            str(args.pixels),
            "--max_num_seqs",
            str(args.max_num_seqs),
            "--dtype",
            args.dtype,
        ]
        flags += ["--max_model_len", str(args.max_model_len), "--loaders", str(args.loaders)]
        # vLLM's encoder cache has as many tokens: a clip with more of them would be refused.
        flags += ["--max_num_batched_tokens", str(max(8192, args.max_model_len))]
        if args.kv_cache_gib:
            flags += ["--kv_cache_gib", str(args.kv_cache_gib)]
        if args.cached:
            (folder / "cache").mkdir()
            flags += ["--cache_dir", str(folder / "cache")]
        run_args = build_parser(Benchmark(name="bench", title="bench", load=lambda a: [])).parse_args(flags)
        found = asyncio.run(measure(args, run_args, questions(folder, args.clips, args.questions)))
    print(json.dumps(found, indent=1))
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
