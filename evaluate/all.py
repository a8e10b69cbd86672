"""Many benchmarks in one process: vLLM is started once and answers all whose engine would get the same arguments.

    python evaluate/all.py --model DIR --data_dir benchmarks [flags of every program]
    python evaluate/all.py --benchmarks videomme mvbench mlvu --model DIR --data_parallel 8 --cache_dir cache
    torchrun --nproc_per_node 8 evaluate/all.py --model DIR

Without --benchmarks: all of BENCHMARKS. Each runs as its own program would, in the same run folder; one that fails does not
stop the others. Stopping it and running it again goes on where it was. Exit status: 0 if every benchmark ended well, else 1
(3 as a rank of several, which does not end the other ranks), 130 after Ctrl-C; the last lines say what did not end well.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import asyncio
import gc
import importlib
import os
import signal
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from evaluate._engine import Engine
from evaluate._flags import build_parser
from evaluate._predictions import model_identity
from evaluate._ranks import launch, rank_and_world
from evaluate._run import OneEngine, parse, run_benchmark
from evaluate._scoring import Benchmark

# fmt: off
BENCHMARKS = (
    "videomme", "videomme_v2", "mvbench", "tempcompass", "motionbench", "lvbench", "longvideobench", "mlvu",
    "videoholmes", "minerva", "vcrbench", "videoreasonbench", "longvideoreason", "mmvu", "videommmu", "videomathqa",
    "vsibench", "charades_sta", "stvg", "ovobench", "odvbench", "livesports", "videommlu", "timelens",
)
# fmt: on
STATUSES = "1: an error, told above; 2: flags, annotations or media; 3: failed samples; 4: not finished"


class KeptEngine(OneEngine):
    """An event loop and an engine that stay for the next benchmark, as long as that needs the same engine.

    AsyncLLM lives in the loop that it was made in, so both stay or go together. A benchmark that ends by an exception takes
    them with it: what is left of its requests is nobody's business any more. Used as a context manager, in which Ctrl-C ends the
    benchmark, and with it the program, also where its signal has reached the engine's process first.
    """

    def __init__(self, place: tuple[int, int], make_engine: Callable[..., Engine] | None = None):
        super().__init__(place, make_engine)
        self._runner: asyncio.Runner | None = None
        self._engine: Engine | None = None
        self._arguments: Any = None
        self._task: asyncio.Task | None = None
        self._interrupted = False

    def __enter__(self) -> "KeptEngine":
        self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:
            signal.signal(signal.SIGINT, self._handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """The first Ctrl-C lets the benchmark's tasks end in order, as asyncio.run does; a second one does not wait."""
        if self._interrupted or self._task is None or self._task.done():
            raise KeyboardInterrupt
        self._interrupted = True
        self._task.cancel()
        self._task.get_loop().call_soon_threadsafe(lambda: None)  # the loop may be waiting for a file descriptor

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        async def interruptible() -> Any:
            self._task = asyncio.current_task()
            return await work

        self._runner = self._runner or asyncio.Runner()
        try:
            result = self._runner.run(interruptible())
        except BaseException as error:
            self.close()
            if self._interrupted:  # an engine that the same Ctrl-C ended fails in its own way
                raise KeyboardInterrupt from error
            raise
        if self._interrupted:  # too late to cancel anything
            raise KeyboardInterrupt
        return result

    @contextmanager
    def engine(self, args: argparse.Namespace, encoder: Any) -> Iterator[Engine]:
        from evaluate._models import engine_args

        # By what the folder holds, too: a training run may have written newer weights to it meanwhile.
        arguments = (args.model, model_identity(args.model), engine_args(args))
        if self._engine is not None and (arguments != self._arguments or self._engine.dead):
            self._end_engine()
        if self._engine is None:
            self._engine, self._arguments = self.make(args, encoder), arguments
        else:
            self._engine.change_encoder(encoder)
        yield self._engine

    def _end_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def close(self) -> None:
        async def in_its_loop() -> None:
            self._end_engine()

        runner, self._runner = self._runner, None
        if runner is not None:
            with runner:
                runner.run(in_its_loop())


class Refused(Exception):
    """A benchmark's parser does not take the flags."""


def refuse(message: str) -> NoReturn:
    raise Refused(message)


def read_flags(names: list[str], flags: list[str]) -> tuple[dict[str, tuple[Benchmark, Any]], dict[str, str]]:
    """(benchmark and flags of each that takes them, the reason of each that does not), before anything is done."""
    accepted, refused = {}, {}
    for name in names:
        if name == "all" or name.startswith("_") or not Path(__file__).with_name(f"{name}.py").is_file():
            refused[name] = "there is no such benchmark in evaluate/"
            continue
        benchmark = importlib.import_module(f"evaluate.{name}").BENCHMARK
        parser = build_parser(benchmark)
        parser.error = refuse
        try:
            accepted[name] = benchmark, parse(benchmark, parser, flags)
        except Refused as error:
            refused[name] = str(error)
    return accepted, refused


def tell_refused(refused: dict[str, str]) -> None:
    """One line per reason: a misspelt flag is refused by all."""
    for reason in dict.fromkeys(refused.values()):
        names = ", ".join(name for name in refused if refused[name] == reason)
        print(f"[evaluate] refused by {names}: {reason}", file=sys.stderr)


def run_one(benchmark: Benchmark, args: argparse.Namespace, engines: KeptEngine, make_encoder: Any) -> int:
    """The exit status that the benchmark's own program would have ended with."""
    try:
        return run_benchmark(benchmark, args, engines, make_encoder)
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(f"{benchmark.name}: {stopped.code}", file=sys.stderr)
        return stopped.code if isinstance(stopped.code, int) else 1
    except Exception:  # what ended its program would not have ended the others'
        traceback.print_exc()
        return 1
    finally:
        gc.collect()  # a judge that was loaded in this process, whose parts know each other, would keep its memory


def main(
    arguments: list[str] | None = None,
    *,
    make_engine: Callable[..., Engine] | None = None,
    make_encoder: Callable[..., Any] | None = None,
) -> int:
    """Runs the benchmarks; the exit status. Tests bring their own engine and encoder."""
    parser = argparse.ArgumentParser(
        description="Many benchmarks in one process, with one start of vLLM.",
        epilog="All other flags are those of every program (python evaluate/videomme.py --help) and are given to each. "
        "A flag that only some know (--subtitles) is refused by the others: name those that do with --benchmarks.",
        allow_abbrev=False,
    )
    parser.add_argument("--benchmarks", nargs="+", default=BENCHMARKS, help=f"default: {' '.join(BENCHMARKS)}")
    parser.add_argument("--data_parallel", type=int, default=1, help="engines, each with its share of the videos")
    arguments = sys.argv[1:] if arguments is None else arguments
    own, flags = parser.parse_known_args(arguments)
    try:
        if own.data_parallel > 1 and "RANK" not in os.environ:
            return int(launch(own, arguments) != 0)
        names = list(dict.fromkeys(own.benchmarks))
        accepted, refused = read_flags(names, [*flags, "--data_parallel", str(own.data_parallel)])
        rank, world = place = rank_and_world()
        for flag, holds in (("annotations", "one benchmark's questions"), ("run_dir", "one benchmark's run")):
            if len(names) > 1 and any(getattr(args, flag) for _, args in accepted.values()):
                parser.error(f"--{flag} names {holds}: give one name with --benchmarks, or leave it out")
        statuses = dict.fromkeys(refused, 2)
        if rank == 0:
            tell_refused(refused)
        with KeptEngine(place, make_engine) as engines:
            for name, (benchmark, args) in accepted.items():
                if rank == 0:
                    print(f"[evaluate] {name}", flush=True)
                statuses[name] = run_one(benchmark, args, engines, make_encoder)
    except KeyboardInterrupt:
        print("[evaluate] interrupted; the same command goes on from the answers on disk", file=sys.stderr)
        return 130
    if rank:
        return 0  # rank 0 has seen what is missing, and torchrun would end the others
    failed = [f"{name} ({statuses[name]})" for name in names if statuses[name]]
    if failed:
        print(f"[evaluate] did not end well: {' '.join(failed)} ({STATUSES})")
        return 1 if world == 1 else 3
    print("[evaluate] all done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
