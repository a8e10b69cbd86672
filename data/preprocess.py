"""Decodes every video of data files once, into the frame cache, and opens every image.

  python data/preprocess.py --data train.jsonl val.jsonl --cache_dir cache --model MODEL_DIR --fps 2 --max_frames 128
  python data/preprocess.py --cache_dir cache --stats          (also --list, --verify, --prune [--yes])

Training files and benchmark annotation files alike: rows are read for the media they name. Safe to stop and start
again; several machines share a disk with --shard 0/4 ... 3/4. Media that cannot be used are listed in failed.jsonl
beside the cache, with reason and remedy; training honours that list. Use the same frame flags as for training.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import contextlib
import importlib
import json
import signal
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from data.dataset import describe_problem, duration_histogram, load, parse_field_names, resolve_field_names
from data.decode import MediaError, backend_problem
from data.decode_pool import run_jobs
from data.failures import failure_key, known_failures, list_name, note_run, read_list, suspects
from data.frame_cache import (
    DamagedCacheFile,
    FrameCache,
    cache_files,
    mark_cache,
    read_entry,
    read_pixels,
    source_identity,
    stale_temporaries,
)
from data.records import Media, StoredBytes
from data.rows import BadRow, expand_files, media_of_row, read_rows
from data.video import VideoSettings, media_name

PLAIN_LINE_EVERY_S = 10.0
SHOWN_FAILURES = 10


# ---------------------------------------------------------------------------------------------------------- what to do


def collect(files: list[str], media_dir: str | None, shard: tuple[int, int], fields) -> tuple[dict, list, Counter]:
    """({Media: rows that name it}, problems of rows, rows per kind of media they name). A row is {file, line, id}."""
    jobs: dict[Media, list[dict[str, Any]]] = {}
    problems, modality = [], Counter()
    for file in expand_files(files):
        root = media_dir if media_dir is not None else (os.path.dirname(file) if os.path.exists(file) else None)
        for line, row in read_rows(file):
            place = {"file": file, "line": line, "id": ""}
            try:
                if isinstance(row, BadRow):
                    raise row
                place["id"] = str(next((row[name] for name in ("problem_id", "id") if row.get(name) is not None), ""))
                named = media_of_row(row, root, fields, (file, line))[0]
                modality[" and ".join(sorted({media.kind for media in named})) or "text"] += 1
                for media in named:
                    name = media_name(media) if media.data is None else source_identity(media)
                    if xxhash.xxh3_64_intdigest(name.encode()) % shard[1] == shard[0]:
                        jobs.setdefault(media, []).append(place)
            except BadRow as problem:
                modality["unreadable"] += 1
                detail = {"path": problem.path, "reason": problem.reason, "remedy": problem.remedy}
                problems.append({**place, **detail})
    return jobs, problems, modality


def _size(media: Media) -> int:
    """Bytes by which the longest are done first; those in a column file come last, in its order, and are read once."""
    if isinstance(media.data, StoredBytes):
        return 0
    try:
        return os.path.getsize(media.path) if media.path else len(media.data or b"")
    except OSError:
        return 0


def preprocess(args, settings: VideoSettings) -> int:
    """Runs the whole job; returns the exit status."""
    if problem := backend_problem(settings.backend):
        raise ValueError(f"--decoder {settings.backend}: {problem}; install it or use --decoder pyav")
    if args.media_dir is not None and not os.path.isdir(args.media_dir):
        raise ValueError(f"--media_dir {args.media_dir} does not exist; correct it")
    if args.failed_file and args.shard[1] > 1:
        raise ValueError("--failed_file with --shard: shards would overwrite each other's rows in it; leave it out")
    failed_file = args.failed_file or os.path.join(args.cache_dir, list_name("failed", args.shard))
    for flag, folder in (("--cache_dir", args.cache_dir), ("--failed_file", os.path.dirname(failed_file) or ".")):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{flag} {folder}: cannot be made ({error.strerror}); give another folder") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"{flag} {folder}: cannot be written to; change its permissions or give another folder")
    identity, storage = mark_cache(args.cache_dir, args.identity, args.storage)
    for path in stale_temporaries(args.cache_dir):
        Path(path).unlink(missing_ok=True)
    fields = resolve_field_names(parse_field_names(args.field_names))[1]
    jobs, problems, modality = collect(args.data, args.media_dir, args.shard, fields)
    if not modality:
        raise ValueError(f"--data {' '.join(args.data)}: holds no row")
    if args.check_gold:
        problems += _gold_problems(args, problems)
    options = {"identity": identity, "storage": storage}
    cache = FrameCache(args.cache_dir, "prefer", **options)
    order = sorted(jobs, key=_size, reverse=True)  # long ones first, so that no core is left with one at the end
    counts, written, durations, usable = Counter(), 0, [], []
    started = time.monotonic()
    interrupted = False
    with Progress(len(order)) as progress:
        running = run_jobs(order, cache, settings, options, args.workers, args.timeout_s)
        try:
            for media, answer in running:
                if "fatal" in answer:
                    print(f"stopped: {answer['fatal']}", file=sys.stderr)
                    return 1
                if "reason" in answer:
                    counts["failed"] += 1
                    problems += [_failure(media, place, answer, cache) for place in jobs[media]]
                else:
                    counts["cached" if "cached" in answer else media.kind] += 1
                    written += answer.get("bytes", 0)
                    usable.append(media)
                    if "duration_s" in answer:
                        durations.append(answer["duration_s"])
                progress.step(written, counts["failed"])
        except KeyboardInterrupt:
            interrupted = True
        finally:
            running.close()
    cured = _cured(usable, cache)
    note_run(
        args.cache_dir, args.shard, failed_file, problems, set(expand_files(args.data)), cured, finished=not interrupted
    )
    took = time.monotonic() - started
    kinds = ", ".join(f"{name} {rows}" for name, rows in modality.most_common())
    print(
        f"{sum(modality.values())} rows ({kinds}), {len(order)} media: {counts['video']} videos decoded "
        f"({written / 1e6:.1f} MB written), {counts['cached']} already there, {counts['image']} images opened, "
        f"{counts['failed']} failed, in {took:.1f} s"
    )
    if durations:
        print(f"{sum(durations) / 3600:.2f} h of video; {duration_histogram(durations)}")
    for problem in problems[:SHOWN_FAILURES]:
        print(f"  {describe_problem(problem)}")
    if problems:
        print(f"{len(problems)} unusable rows are listed in {failed_file}")
    if interrupted:
        print("interrupted; the same command goes on from here")
        return 130
    return 1 if problems and args.on_bad_sample == "error" else 0


def _gold_problems(args, known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that the training reader would refuse, gold answers included, apart from those already known."""
    # rewards stands above data in the house; only this program, asked to, reaches up for its checker.
    check_gold = importlib.import_module("rewards").check_gold
    failed = Path(args.cache_dir, f".gold-{os.getpid()}.jsonl")
    try:
        load(
            args.data, media_dir=args.media_dir, check_gold=check_gold, on_bad_sample="skip", failed_file=str(failed),
            field_names=parse_field_names(args.field_names),
        )  # fmt: skip
    except ValueError:
        if not failed.exists():  # otherwise every row is bad, and the list says why
            raise
    if not failed.exists():
        return []
    seen = {(problem["file"], problem["line"]) for problem in known}
    found = read_list(str(failed))
    failed.unlink()
    # Missing and empty files come again from the media jobs, under their own reason.
    return [row for row in found if (row["file"], row["line"]) not in seen and not row["path"]]


def _failure(media: Media, place: dict[str, Any], answer: dict[str, Any], cache: FrameCache) -> dict[str, Any]:
    try:
        key = failure_key(cache.identity(media), media)
    except MediaError:
        key = ""  # a file that is not there has no content to remember
    detail = {"path": media_name(media), "reason": answer["reason"], "remedy": answer["remedy"], "media_key": key}
    detail["reason"] = f"{media_name(media)} {detail['reason']}"
    return {**place, **detail}


def _cured(usable: list[Media], cache: FrameCache) -> list[tuple[str, str]]:
    """(key, path) of the media that worked this time and that some list may call unusable."""
    names = suspects(cache.cache_dir)
    cured = []
    for media in usable:
        if os.path.basename(media_name(media)) in names:
            with contextlib.suppress(MediaError):  # it has gone since
                cured.append((failure_key(cache.identity(media), media), media_name(media)))
    return cured


class Progress:
    """A rich bar on a terminal, a plain line every ten seconds otherwise."""

    def __init__(self, total: int):
        self.total, self.done, self.bytes, self.failed = total, 0, 0, 0
        self.start = self.last = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("decoding"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(), console=Console(stderr=True),
            )  # fmt: skip

    def __enter__(self):
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, note="")
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.stop()

    def step(self, written: int, failed: int) -> None:
        self.done += 1
        now = time.monotonic()
        rate = self.done / max(now - self.start, 1e-9)
        note = f"{rate:.1f}/s, {written / 1e6:.0f} MB, {failed} failed"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=note)
        elif now - self.last >= PLAIN_LINE_EVERY_S:
            self.last = now
            left = (self.total - self.done) / rate
            print(f"decoding {self.done}/{self.total}, {note}, about {left:.0f} s left", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------- looking after it


def list_cache(cache_dir: str) -> int:
    for path in cache_files(cache_dir):
        try:
            header = read_entry(path).header
        except DamagedCacheFile as error:
            print(f"DAMAGED {error}")
            continue
        frames, _, height, width = header["shape"]
        start, end = header["window_s"]
        window = "" if start is None and end is None else f" [{start}, {end}) s"
        storage = header["storage"] + (" (lossy)" if header["lossy"] else "")
        print(
            f"{os.path.relpath(path, cache_dir)}  {frames}x{width}x{height}  {header['duration_s']:.2f} s{window}  "
            f"{storage}  {os.path.getsize(path) / 1e6:.1f} MB  {header['source']['name']}"
        )
    return 0


def stats(cache_dir: str) -> int:
    count, size, frames, settings = 0, 0, 0, Counter()
    sources, damaged = {}, 0
    for path in cache_files(cache_dir):
        try:
            header = read_entry(path).header
        except DamagedCacheFile:
            damaged += 1
            continue
        count, size = count + 1, size + os.path.getsize(path)
        frames += header["shape"][0]
        sources[header["source"]["id"]] = header["duration_s"]
        kept = header["settings"]
        words = ", ".join(f"{name} {kept[name]}" for name in ("fps", "max_frames", "max_pixels", "resize"))
        settings[words + (f", {header['storage']} (lossy)" if header["lossy"] else "")] += 1
    hours = sum(sources.values()) / 3600
    print(f"{count} files of {len(sources)} videos, {size / 1e9:.2f} GB, {frames} frames, {hours:.2f} h of video")
    if sources:
        print(f"  {duration_histogram(list(sources.values()))}")
    for name, files in settings.most_common():
        print(f"  {files} files: {name}")
    print(f"{damaged} damaged, {len(stale_temporaries(cache_dir))} left-over temporaries")
    print(f"{len(known_failures(cache_dir))} media known to be unusable")
    return 0


def verify(cache_dir: str) -> int:
    """Reads every frame of every file against its checksum; 1 if one differs."""
    bad = 0
    paths = cache_files(cache_dir)
    for path in paths:
        try:
            read_pixels(read_entry(path))
        except DamagedCacheFile as error:
            bad += 1
            print(error)
    print(f"{len(paths)} files read, {bad} damaged" + ("; --prune --yes removes them" if bad else ""))
    return 1 if bad else 0


def prune(cache_dir: str, yes: bool) -> int:
    """Left-over temporaries, damaged files, and files whose source is gone or has changed."""
    doomed = dict.fromkeys(stale_temporaries(cache_dir), "temporary of a dead writer")
    for path in cache_files(cache_dir):
        try:
            entry = read_entry(path)
            read_pixels(entry)
            source = entry.header["source"]
            if "size" not in source:
                continue  # bytes or a list of frames: no single file to compare with
            if not os.path.isabs(source["name"]):
                continue  # an older file, whose name counts from a folder nobody knows
            if not os.path.exists(source["name"]):
                doomed[path] = f"source {source['name']} is gone"
            elif source_identity(Media("video", path=source["name"]), source["identity"] == "full") != source["id"]:
                doomed[path] = f"source {source['name']} has changed"
        except (DamagedCacheFile, MediaError) as error:
            doomed[path] = str(error)
    size = sum(os.path.getsize(path) for path in doomed)
    for path, reason in doomed.items():
        print(f"{path}: {reason}")
        if yes:
            Path(path).unlink(missing_ok=True)
    print(f"{len(doomed)} files, {size / 1e6:.1f} MB " + ("removed" if yes else "would be removed; add --yes to do it"))
    return 0


# --------------------------------------------------------------------------------------------------------- the flags


def parse_shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with 0 <= i < n")
    return int(index), int(count)


def model_factor(model_dir: str) -> int:
    """patch size * merge size from a model folder's processor files. Raises ValueError."""
    for name in ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json"):
        path = Path(model_dir, name)
        if path.exists():
            config = json.loads(path.read_text())
            config = config.get("video_processor", config)
            if "patch_size" in config:
                return int(config["patch_size"]) * int(config.get("merge_size", 2))
    raise ValueError(f"--model {model_dir}: no processor file with a patch_size; give --factor 28 or 32")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", default=[], help="data or annotation files, globs, dataset folders")
    add("--media_dir", default=None, help="folder that relative media paths start from (default: the data file's)")
    add("--cache_dir", required=True, help="folder of the frame cache; made if missing")
    add("--model", default=None, help="model folder whose processor gives patch and merge size")
    add("--factor", type=int, default=None, help="patch size * merge size, instead of --model (default 32)")
    add("--fps", type=float, default=2.0, help="frames per second taken from a video")
    add("--min_frames", type=int, default=4, help="fewest frames of a video")
    add("--max_frames", type=int, default=128, help="most frames of a video")
    add("--video_min_pixels", type=int, default=4096, help="smallest area of one video frame, pixels")
    add("--video_max_pixels", type=int, default=262144, help="largest area of one video frame, pixels")
    add("--total_pixels", type=int, default=None, help="budget of all frames of one video together, pixels")
    add("--resize", default="exact", choices=("exact", "native"), help="bit-identical to the recipe, or faster uint8")
    add("--sampling", default="even", choices=("even", "grid"), help="evenly first to last, or every 1/fps second")
    add("--decoder", default="pyav", choices=("pyav", "decord", "torchcodec"), help="video reader")
    add("--storage", choices=("raw", "jpeg"), help="raw frames (default), or JPEG q95 4:4:4: lossy, a quarter")
    add(
        "--identity", choices=("fast", "full"),
        help="a changed source is noticed by size, mtime and 192 KiB (default), or by its whole content",
    )  # fmt: skip
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one per core)")
    add("--timeout_s", type=float, default=600.0, help="time limit for one video")
    add("--shard", type=parse_shard, default=(0, 1), metavar="I/N", help="only this part of the media")
    add("--failed_file", default=None, help="list of unusable rows (default: failed.jsonl in --cache_dir)")
    add("--field_names", default=None, help='JSON object, our field -> the file\'s, e.g. \'{"videos": "clip"}\'')
    add("--check_gold", action="store_true", help="also validate rows as training does, gold answers included")
    add("--on_bad_sample", default="error", choices=("error", "skip"), help="exit status 1 if anything failed, or 0")
    for name, text in (
        ("list", "one line per cache file"),
        ("stats", "totals"),
        ("verify", "read everything against its checksums"),
        ("prune", "show temporaries, damaged and outdated files; with --yes remove them"),
    ):
        add(f"--{name}", action="store_true", help=text)
    add("--yes", action="store_true", help="let --prune remove files")
    args = parser.parse_args(argv)
    if not (args.data or args.list or args.stats or args.verify or args.prune):
        parser.error("give --data FILE ..., or one of --list --stats --verify --prune")
    if args.data and (args.list or args.stats or args.verify or args.prune):
        parser.error("--list, --stats, --verify and --prune look after a cache: give them without --data")
    if args.yes and not args.prune:
        parser.error("--yes belongs to --prune")
    if not args.data and not os.path.isdir(args.cache_dir):
        parser.error(f"--cache_dir {args.cache_dir} does not exist")
    if args.workers < 1 or not args.timeout_s > 0:
        parser.error(f"--workers {args.workers} and --timeout_s {args.timeout_s} must be positive")
    return args


def video_settings(args: argparse.Namespace) -> VideoSettings:
    factor = args.factor
    if factor is None:
        factor = model_factor(args.model) if args.model else 32
    return VideoSettings(
        fps=args.fps, min_frames=args.min_frames, max_frames=args.max_frames, min_pixels=args.video_min_pixels,
        max_pixels=args.video_max_pixels, total_pixels=args.total_pixels, factor=factor, resize=args.resize,
        backend=args.decoder, sampling=args.sampling,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        if args.data:
            settings = video_settings(args)
            status = preprocess(args, settings)
            print(f"settings: {asdict(settings)}")
            return status
        status = 0
        for asked, action in ((args.list, list_cache), (args.stats, stats), (args.verify, verify)):
            if asked:
                status = max(status, action(args.cache_dir))
        return max(status, prune(args.cache_dir, args.yes)) if args.prune else status
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
