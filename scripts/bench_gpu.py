"""A whole GPU session of benchmarks in one command: correctness first, then every figure of docs/gpu_results.md.

    python scripts/bench_gpu.py --list                                 # stages, what is done, what is missing here
    python scripts/bench_gpu.py --out gpu --budget_s 540               # repeat until nothing is left
    python scripts/bench_gpu.py --out gpu --stages step-4b --again tests-parity
    python scripts/bench_gpu.py --out gpu --render docs/gpu_results.md # any machine: from the results alone

Nothing is measured in here: each stage runs a program of this repository with a time limit, in a fixed order. A stage that
is done is skipped by its results under --out, one that was cut short goes on where its program stopped, and one that
failed waits for --again. A stage that would not fit what is left of --budget_s is not started, a later one that fits is.
One GPU gets the stages of one rank, a host with two or more those of several; CUDA_VISIBLE_DEVICES says which count, so
that two of these commands with an --out each share a host. With results from an earlier machine, copy that folder to --out
first. --out holds at most eight files: gpu.json (state of the stages), gpu.log, one per measurement.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from scripts.bench_models import write_json
from scripts.bench_results import package_versions
from scripts.bench_targets import print_verdicts, read_json, render, verdicts

ROOT = Path(__file__).resolve().parents[1]
LOG_BYTES = 8 << 20  # what is kept of gpu.log
MARGIN_S = 12.0  # between the end of a stage and the end of the budget
STEP_PACKAGES = ("vllm", "deepspeed", "av", "decord", "qwen_vl_utils", "xxhash")
RUN_PACKAGES = (
    "pytest",
    "vllm",
    "deepspeed",
    "av",
    "xxhash",
    "rich",
    "math_verify",
    "nltk",
    "jiwer",
    "resvg_py",
    "html5lib",
)
# What fits beside the states, for all variants alike.
TRAIN_ARGS = {
    "2b": "--kept_layers 28 --fused",
    "4b": "--kept_layers 16 --fused",
    "8b": "--kept_layers 12 --kv_cache_gib 14 --fused",
    "8b-one": "--kept_layers 4 --kv_cache_gib 14 --fused --optimizer adamw_stochastic --grad_accum_dtype bf16 --park",
}
# A group in flight has more tokens than a row: with as much memory it keeps fewer layers.
PACKED_KEPT_LAYERS = {"2b": 22, "4b": 12, "8b": 9, "8b-one": 2}


@dataclass(frozen=True)
class Stage:
    """One entry of the session. {python} {out} {work} {left} {ranks} are filled in when it starts."""

    name: str
    what: str
    commands: tuple[str, ...]
    needs_s: float  # less than this left: not started
    limit_s: float
    result: str = ""  # file under --out that the last command writes
    steps: dict[str, int] = field(default_factory=dict)  # variant -> steps wanted in a bench_step result
    ranks: tuple[int, ...] = (1,)  # numbers of GPUs it can take, best first
    memory_gib: float = 0.0  # of a GPU, by scripts/plan_memory.py
    packages: tuple[str, ...] = ()


def tests(name: str, file: str, what: str, needs_s: float, limit_s: float, ranks: int = 1) -> Stage:
    return Stage(
        name, what, (f"{{python}} -m pytest -m gpu -q -p no:cacheprovider tests/gpu/{file}",), needs_s, limit_s,
        ranks=(ranks,), packages=RUN_PACKAGES,
    )  # fmt: skip


def step(name: str, size: str, steps: dict[str, int], what: str, needs_s: float, memory_gib: float, *, more: str = "",
         result: str = "", ranks: tuple[int, ...] = (1,), layers: str = "") -> Stage:  # fmt: skip
    """A run of bench_step for these variants, each until its number of steps is there. layers: key of the flags, if not size."""
    launch = "{python}" if ranks == (1,) else "{python} -m torch.distributed.run --standalone --nproc_per_node {ranks}"
    result = result or f"step-{size}.json"
    most = max(steps.values())
    more = f"{more} --profile g".strip() if name.startswith("step-") else more  # what limits (g) is seen, not guessed
    layers = layers or size
    more = f"{more} --packed_kept_layers {PACKED_KEPT_LAYERS[layers]} --train_args '{TRAIN_ARGS[layers]}'".strip()
    levers = max((count for name, count in steps.items() if name in "cdef"), default=1)
    command = (
        f"{launch} scripts/bench_step.py --size {size} --variants {' '.join(steps)} --steps {most} --lever_steps {levers} "
        f"--budget_s {{left}} --work_dir {{work}} --out {{out}}/{result} {more}"
    ).rstrip()
    return Stage(name, what, (command,), needs_s, 3600.0, result, dict(steps), ranks, memory_gib, STEP_PACKAGES)


# needs_s: starting (clips, model, engine with CUDA graphs: two to four minutes) and the first steps. In the order of a
# session of half an hour on one GPU, and of another on several.
STAGES = (
    tests("tests-packed", "test_packed_gpu.py", "packed groups against rows, every backend", 60, 240),
    tests("tests-parity", "test_parity.py", "vLLM against the trainer, sync, sleep; four families", 90, 450),
    tests("tests-long", "test_long_run.py", "train/main.py, 20 steps with video, memory does not grow", 90, 300),
    Stage(
        "packed-2b", "the update of one group, gradients compared first",
        ("{python} scripts/bench_packed.py --size 2b --attention cudnn flex varlen --rounds 2 --out {out}/packed-2b.json",),
        130, 350, "packed-2b.json", memory_gib=40, packages=("xxhash",),
    ),
    Stage(
        "flex-2b", "the same group with all levers; options of FlexAttention",
        (
            "{python} scripts/bench_packed.py --size 2b --attention cudnn flex --no-rows --no-library --rounds 4 "
            """--kept_layers 28 --fused --profile --flex_options '{{"IS_DIVISIBLE": true}}' """
            """'{{"IS_DIVISIBLE": true, "ROWS_GUARANTEED_SAFE": true}}'""",
        ),
        70, 200, memory_gib=60, packages=("xxhash",),
    ),
    step("step-2b", "2b", {"g": 3, "b": 3}, "whole steps, everything on (g) and the baseline (b)", 260, 100),
    Stage(
        "levers-2b", "the levers one by one, with as few layers kept as (d) leaves room for",
        (
            "{python} scripts/bench_step.py --size 2b --prompts 2 --clips 2 --variants c d e f g --steps 1 --lever_steps 1 "
            "--once_rows 2 --packed_kept_layers 16 --budget_s {left} --work_dir {work} --train_args '--kept_layers 20 --fused'",
        ),
        270, 450, memory_gib=100, packages=STEP_PACKAGES,
    ),
    step("peer-2b", "2b", {"g": 2, "g-fly": 2}, "the peer's workload", 180, 100, more="--workload peer", result="peer-2b.json"),
    Stage(
        "evaluate-2b", "evaluation: cached clips of 128 frames against the loop",
        (
            "{python} scripts/bench_models.py --size 2b --work_dir {work}",
            "{python} scripts/bench_evaluate.py --model {work}/qwen3_vl_2b_bf16 --cached --frames 128 --seconds 16 "
            "--size 1280x720 --pixels 100352 --clips 64 --questions 3 --ways pipeline loop --rounds 1 --response_tokens 256 "
            "--max_num_seqs 96 --max_model_len 20000 --dtype bfloat16 --kv_cache_gib 70 --output {out}/evaluate-2b.json",
        ),
        330, 540, "evaluate-2b.json", memory_gib=100, packages=("vllm", "av", "xxhash"),
    ),
    Stage(
        "real-model", "a real language model learns to watch video (GGUF=... names its file), three seeds of RL",
        (
            # One thread per process, as the launcher has it by itself: three runs share the cores.
            "env OMP_NUM_THREADS=1 TOGETHER=1 ALGORITHMS=dapo RL_SECONDS=480 RUN={work}/real bash scripts/real_model.sh "
            "folder clips decode see tune sees supervised rl table",
            "cat {work}/real/table.md",
        ),
        1000, 1700, memory_gib=100, packages=("vllm", "av", "gguf"),
    ),
    step("step-4b", "4b", {"g": 3, "b": 3}, "whole steps", 300, 125),
    Stage(
        "kernels", "one layer's attention on every backend; one group of 8B",
        (
            "{python} scripts/bench_attention.py --shapes 2b 4b 8b",
            "{python} scripts/bench_packed.py --size 8b --attention cudnn flex --no-rows --no-library --rounds 3 "
            "--kept_layers 11 --fused",
        ),
        200, 360, memory_gib=70, packages=("xxhash",),
    ),
    step("one-8b", "8b", {"g": 3, "b": 2, "a": 2}, "whole steps of 8B on a single GPU", 330, 128, layers="8b-one",
         more="--prompts 2 --clips 4", result="one-8b.json"),
    step("more-2b", "2b", {"g": 5, "b": 5, "a": 5, "c": 3, "e": 3, "f": 3}, "all steps that the tables need", 300, 100),
    step("more-4b", "4b", {"g": 5, "b": 5, "a": 3}, "all steps that the tables need", 300, 125),
    tests("tests-ranks", "test_two_ranks.py", "two ranks with video, image and text", 90, 300, ranks=2),
    step("step-8b", "8b", {"g": 3, "b": 3}, "whole steps on several GPUs", 330, 86, ranks=(2, 4)),
    step("more-8b", "8b", {"g": 5, "b": 5, "a": 3}, "all steps that the tables need", 330, 86, ranks=(2, 4)),
)  # fmt: skip
MEMORY_GIB = {("8b", 2): 123.0}  # with fewer ranks each holds more of the states


# ---- the machine ----------------------------------------------------------------------------------------------------


def find_gpus() -> list[tuple[str, float]]:
    """(name, GiB) of each GPU that nvidia-smi sees, of those in CUDA_VISIBLE_DEVICES if it lists numbers; empty without one.
    CUDA is not touched."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line]
    visible = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if all(number.isdigit() for number in visible):
        rows = [rows[int(number)] for number in visible if int(number) < len(rows)]
    return [(name.strip(), float(mib) / 1024) for name, mib in rows] if done.returncode == 0 else []


def ranks_of(stage: Stage, gpus: list[tuple[str, float]]) -> int | None:
    """How many ranks the stage gets on this machine; None if it cannot run here."""
    memory = min((gib for _, gib in gpus), default=0.0)
    for ranks in stage.ranks:
        needed = MEMORY_GIB.get((stage.name.rpartition("-")[2], ranks), stage.memory_gib)
        if ranks <= len(gpus) and needed <= memory:
            return ranks
    return None


def lacking(stage: Stage, gpus: list[tuple[str, float]]) -> str:
    """Why the stage cannot run here; empty if it can."""
    absent = [name for name in stage.packages if importlib.util.find_spec(name) is None]
    if absent:
        return f"lacks {', '.join(absent)}"
    if ranks_of(stage, gpus) is None:
        found = f"{len(gpus)} with {min(gib for _, gib in gpus):.0f} GiB" if gpus else "none"
        return (
            f"needs {' or '.join(map(str, stage.ranks))} GPU(s) with {stage.memory_gib:.0f} GiB and more; {found} here"
        )
    return ""


def chosen_stages(names: list[str] | None, gpus: list[tuple[str, float]], flag: str = "--stages") -> list[Stage]:
    """The stages asked for, else those for one GPU, or for several where there are several. Raises ValueError."""
    if names is None:
        return [stage for stage in STAGES if (max(stage.ranks) > 1) == (len(gpus) > 1)]
    unknown = set(names) - {stage.name for stage in STAGES}
    if unknown:
        raise ValueError(f"{flag} {' '.join(sorted(unknown))}: not among {' '.join(stage.name for stage in STAGES)}")
    return [stage for stage in STAGES if stage.name in names]


# ---- state ----------------------------------------------------------------------------------------------------------


def read_state(out: Path) -> dict:
    return read_json(out / "gpu.json") or {"stages": {}}


def is_done(stage: Stage, out: Path, state: dict) -> bool:
    """By the results themselves where a program keeps them, else by the exit status."""
    if stage.steps:
        found = read_json(out / stage.result) or {}
        runs, failed = found.get("runs", {}), found.get("failed", {})
        return all(len(runs.get(name, [])) >= count or name in failed for name, count in stage.steps.items())
    ended = state["stages"].get(stage.name, {}).get("state") == "done"
    return ended and (not stage.result or (out / stage.result).exists())


def steps_measured(stage: Stage, out: Path) -> int:
    runs = (read_json(out / stage.result) or {}).get("runs", {}) if stage.steps else {}
    return sum(map(len, runs.values()))


def status_of(stage: Stage, out: Path, state: dict, gpus: list[tuple[str, float]]) -> str:
    if is_done(stage, out, state):
        return "done"
    kept = state["stages"].get(stage.name, {}).get("state")
    if kept == "failed":
        return "failed: --again " + stage.name
    why = lacking(stage, gpus)
    return why or ("to go on" if kept else "to do")


# ---- running --------------------------------------------------------------------------------------------------------


def threads_for(ranks: int) -> dict[str, str]:
    """The environment of a stage: torchrun would give each of several ranks one thread, and vLLM one for its patches."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)), **os.environ}


def run_command(command: list[str], log: Path, limit_s: float, ranks: int = 1) -> int | None:
    """Exit status of a program whose output goes to the log; None if it was ended after limit_s, with all its children."""
    with log.open("ab") as output:
        output.write(f"\n$ {shlex.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=threads_for(ranks), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )  # fmt: skip
        try:
            return process.wait(timeout=max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                end_group(process)


def end_group(process: subprocess.Popen, grace_s: float = 8.0) -> None:
    """SIGTERM to the process and its children, SIGKILL to what is left after grace_s."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=grace_s)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def keep_end(path: Path, most: int) -> None:
    """Cut a file to its last `most` bytes, at a line's beginning."""
    if path.exists() and path.stat().st_size > most:
        path.write_bytes(path.read_bytes()[-most:].partition(b"\n")[2])


def last_lines(path: Path, count: int = 25) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-count:]) if path.exists() else ""


def run_stage(stage: Stage, ranks: int, out: Path, work: Path, state: dict, left_s: float) -> str:
    """Run a stage's commands within left_s seconds -> its state: done, to go on, failed."""
    began, before = time.monotonic(), steps_measured(stage, out)
    record = {"state": "running", "date": time.strftime("%Y-%m-%d"), "versions": package_versions(), "ranks": ranks}
    state["stages"][stage.name] = record
    shown, status = [], 0
    for template in stage.commands:
        seconds = min(stage.limit_s, left_s) - (time.monotonic() - began)
        names = {"python": shlex.quote(sys.executable), "out": out, "work": work, "ranks": ranks}
        command = template.format(**names, left=int(max(1.0, seconds - 2 * MARGIN_S)))
        shown.append(template.format(python="python", out="OUT", work="WORK", ranks=ranks, left=int(seconds)))
        record["commands"] = shown
        write_json(str(out / "gpu.json"), state)  # a session that is cut off here knows what it was doing
        status = run_command(shlex.split(command), out / "gpu.log", seconds, ranks)
        if status != 0:
            break
    keep_end(out / "gpu.log", LOG_BYTES)
    record["seconds"] = round(time.monotonic() - began, 1)
    record["status"] = status
    record["state"] = "done"
    if stage.steps and not is_done(stage, out, state):
        more = status == 0 or (status is None and steps_measured(stage, out) > before)
        record["state"] = "to go on" if more else "failed"
    elif not stage.steps and status != 0:  # what the budget cut off may have been well
        record["state"] = "to go on" if status is None and left_s < stage.limit_s else "failed"
    if record["state"] == "failed":
        record["end"] = last_lines(out / "gpu.log")
    write_json(str(out / "gpu.json"), state)
    return record["state"]


def run_stages(stages: list[Stage], gpus, out: Path, work: Path, *, budget_s: float, again: Sequence[str] = ()) -> dict:
    """Every stage that is not done, fits and can run here; -> the state. Results are on disk after each."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    state = read_state(out)
    state["machine"] = {"gpus": [f"{name}, {gib:.0f} GiB" for name, gib in gpus], "cores": os.cpu_count()}
    for name in again:
        state["stages"].pop(name, None)
    write_json(str(out / "gpu.json"), state)

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)

    for stage in stages:
        status = status_of(stage, out, state, gpus)
        left_s = budget_s - (time.monotonic() - began) - MARGIN_S
        if status not in ("to do", "to go on"):
            say(f"{stage.name}: {status}")
        elif left_s < stage.needs_s:
            say(f"{stage.name}: {status}; needs about {stage.needs_s:.0f} s, {max(0.0, left_s):.0f} s left")
        else:
            say(f"{stage.name}: {stage.what}")
            ended = run_stage(stage, ranks_of(stage, gpus) or 1, out, work, state, left_s)
            say(f"{stage.name}: {ended} after {state['stages'][stage.name]['seconds']:.0f} s")
            if ended == "failed":
                print(state["stages"][stage.name]["end"], flush=True)
    return state


# ---- the program ----------------------------------------------------------------------------------------------------


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu_results", help="folder of results and logs; continued if it exists")
    parser.add_argument("--budget_s", type=float, default=540.0, help="seconds after which nothing runs any more")
    parser.add_argument("--stages", nargs="+", default=None, help="only these (default: all for this machine)")
    parser.add_argument("--again", nargs="+", default=[], help="failed stages to run once more")
    parser.add_argument("--work_dir", default=None, help="models, clips and caches (default: in the temporary folder)")
    parser.add_argument("--list", action="store_true", help="print the stages and their state, run nothing")
    parser.add_argument(
        "--render", default=None, help="write the results as sections of this markdown file, run nothing"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    flags = parse_flags(argv)
    out = Path(flags.out).resolve()
    work = Path(flags.work_dir or os.path.join(tempfile.gettempdir(), "reelrl_bench_step")).resolve()
    if flags.render:
        if not Path(flags.render).resolve().parent.is_dir():
            folder = Path(flags.render).parent
            print(
                f"scripts/bench_gpu.py: --render {flags.render}: there is no folder {folder}; make it first",
                file=sys.stderr,
            )
            return 2
        titles = render(out, Path(flags.render))
        print("\n".join(f"{flags.render}: {title}" for title in titles) or f"{out}: no results yet")
        return 0 if titles else 1
    gpus = find_gpus()
    try:
        stages = chosen_stages(flags.stages, gpus)
        chosen_stages(flags.again, gpus, "--again")
    except ValueError as error:
        print(f"scripts/bench_gpu.py: {error}", file=sys.stderr)
        return 2
    if flags.list:
        state = read_state(out)
        for stage in STAGES if flags.stages is None else stages:
            print(f"{stage.name:13} {status_of(stage, out, state, gpus):40} {stage.what}")
        return 0
    if not gpus:
        print("scripts/bench_gpu.py: nvidia-smi sees no GPU; --list and --render work without one", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stage's programs are ended with us
    state = run_stages(stages, gpus, out, work, budget_s=flags.budget_s, again=flags.again)
    print_verdicts(verdicts(out))
    return 1 if any(record["state"] == "failed" for record in state["stages"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
