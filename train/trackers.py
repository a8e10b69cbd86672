"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, SwanLab (--log_to), and the console.

Each tracker's package is imported only when asked for. A resumed run goes on in the same tracker run: its id is kept in
the run folder. All of this lives on rank 0; the other ranks get an empty list and a silent console.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from train import distributed


@dataclass(frozen=True)
class Tracker:
    """`log(step, row)` sends one row of numbers, `close()` ends the run there."""

    name: str
    log: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]


@dataclass(frozen=True)
class Run:
    """What a tracker is told about a run."""

    project: str
    name: str
    folder: Path
    arguments: dict[str, Any]
    resume_step: int = 0


def start(names: list[str], run: Run) -> list[Tracker]:
    """The trackers of --log_to, started. Raises ValueError for unknown names, RuntimeError for a missing package."""
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise ValueError(f"--log_to knows {', '.join(TRACKERS)}; got {', '.join(unknown)}")
    if not distributed.is_main():
        return []
    return [TRACKERS[name](run) for name in dict.fromkeys(names)]


def check(names: list[str]) -> None:
    """Raises as start() would for unknown names and missing packages, without starting anything: call it first."""
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise ValueError(f"--log_to knows {', '.join(TRACKERS)}; got {', '.join(unknown)}")
    for name in names:
        _import("torch.utils.tensorboard" if name == "tensorboard" else name, name)


def _import(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(
            f"--log_to {name} needs a package that is not installed ({error}): "
            f"pip install {name}, or leave {name} out of --log_to"
        ) from error


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numeric entries of a row: what every tracker can draw."""
    return {name: value for name, value in row.items() if isinstance(value, (int, float))}


def _run_id(run: Run, name: str, new: str | None = None) -> str | None:
    """The tracker's id of this run, kept in trackers.json; given `new`, stores it."""
    path = run.folder / "trackers.json"
    ids = json.loads(path.read_text()) if path.exists() else {}
    if new is not None:
        ids[name] = new
        path.write_text(json.dumps(ids) + "\n")
    return ids.get(name)


def tensorboard(run: Run) -> Tracker:
    module = _import("torch.utils.tensorboard", "tensorboard")
    writer = module.SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.resume_step + 1)
    writer.add_text("arguments", "\n".join(f"    {name}: {value}" for name, value in sorted(run.arguments.items())))

    def log(step: int, row: dict[str, float]) -> None:
        for name, value in numbers(row).items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker("tensorboard", log, writer.close)


def wandb(run: Run) -> Tracker:
    module = _import("wandb", "wandb")
    live = module.init(
        project=run.project,
        name=run.name,
        dir=str(run.folder),
        config=run.arguments,
        id=_run_id(run, "wandb"),
        resume="allow",
    )
    _run_id(run, "wandb", live.id)
    # Steps that are logged again after a resume would be dropped under wandb's own step: use a metric as the axis.
    live.define_metric("step")
    live.define_metric("*", step_metric="step")
    return Tracker("wandb", lambda step, row: live.log({**numbers(row), "step": step}), live.finish)


def mlflow(run: Run) -> Tracker:
    module = _import("mlflow", "mlflow")
    if "MLFLOW_TRACKING_URI" not in os.environ:
        module.set_tracking_uri((run.folder / "mlflow").resolve().as_uri())
    module.set_experiment(run.project)
    old = _run_id(run, "mlflow")
    live = module.start_run(run_id=old, run_name=None if old else run.name)
    _run_id(run, "mlflow", live.info.run_id)
    if not old:
        arguments = [(name, str(value)[:500]) for name, value in sorted(run.arguments.items())]
        for i in range(0, len(arguments), 100):  # MLflow takes at most 100 parameters per call
            module.log_params(dict(arguments[i : i + 100]))
    return Tracker("mlflow", lambda step, row: module.log_metrics(numbers(row), step=step), module.end_run)


def swanlab(run: Run) -> Tracker:
    module = _import("swanlab", "swanlab")
    live = module.init(
        project=run.project,
        experiment_name=run.name,
        config=run.arguments,
        logdir=str(run.folder / "swanlab"),
        id=_run_id(run, "swanlab"),
        resume="allow",
    )
    if getattr(live, "id", None):
        _run_id(run, "swanlab", str(live.id))
    return Tracker("swanlab", lambda step, row: module.log(numbers(row), step=step), module.finish)


TRACKERS: dict[str, Callable[[Run], Tracker]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
    "swanlab": swanlab,
}


# ---- console --------------------------------------------------------------------------------------------------------


class Console:
    """What is happening, on rank 0: a rich progress bar on a terminal, plain lines (one per step, and one per phase
    per `plain_every_s`) where there is none, nothing on other ranks.

    `start_step` of `total_steps` are already done, on resume.
    """

    def __init__(self, total_steps: int, start_step: int = 0, plain_every_s: float = 10.0, file: Any = None):
        self.file = file or sys.stdout
        self.main = distributed.is_main()
        self.total_steps = total_steps
        self.plain_every_s = plain_every_s
        self.progress: Progress | None = None
        terminal = RichConsole(file=self.file, highlight=False)
        if self.main and terminal.is_terminal:
            self.progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=terminal,
                transient=True,
            )
            self.progress.start()
            self.steps = self.progress.add_task("steps", total=total_steps, completed=start_step)

    def say(self, text: str) -> None:
        """One line; above the bar where there is one."""
        if not self.main:
            return
        if self.progress:
            self.progress.console.print(text, markup=False)
        else:
            print(text, file=self.file, flush=True)

    @contextmanager
    def phase(self, text: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """A line of its own while the block runs; it gets a function `advance(n)` to call as work is done."""
        if not self.main:
            yield lambda n=1: None
        elif self.progress:
            task = self.progress.add_task(text, total=total)
            try:
                yield lambda n=1: self.progress.advance(task, n)
            finally:
                self.progress.remove_task(task)
        else:
            done, said = 0, time.monotonic()

            def advance(n: int = 1) -> None:
                nonlocal done, said
                done += n
                if time.monotonic() - said >= self.plain_every_s:
                    said = time.monotonic()
                    self.say(f"{text}: {done}" + (f" of {total}" if total else ""))

            yield advance

    def step(self, step: int, row: dict[str, float]) -> None:
        """One line about a finished step."""
        self.say(step_line(step, self.total_steps, row))
        if self.main and self.progress:
            self.progress.update(self.steps, completed=step)

    def close(self) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None


# name in the row, word on the console, format
LINE = (
    ("reward/mean", "reward", "{:.3f}"),
    ("reward/accuracy", "accuracy", "{:.3f}"),
    ("response/length_mean", "length", "{:.0f}"),
    ("response/truncated_share", "truncated", "{:.0%}"),
    ("group/zero_variance_share", "equal groups", "{:.0%}"),
    ("policy/entropy", "entropy", "{:.3f}"),
    ("policy/ref_kl", "kl", "{:.4f}"),
    ("policy/grad_norm", "grad", "{:.3g}"),
    ("mismatch/k3", "mismatch", "{:.1e}"),
    ("validate/accuracy", "held out", "{:.3f}"),
    ("perf/tokens_per_s", "tokens/s", "{:,.0f}"),
    ("perf/mfu", "mfu", "{:.1%}"),
)


def step_line(step: int, total_steps: int, row: dict[str, float]) -> str:
    """ "step 12/200  reward 0.531  ...  34.2 s (rollout 12.0, update 18.3)": what is in the row, in a fixed order."""
    parts = [f"{word} {form.format(row[name])}" for name, word, form in LINE if isinstance(row.get(name), (int, float))]
    text = f"step {step}/{total_steps}  " + "  ".join(parts)
    if "time/step_s" in row:
        phases = {name[5:-2]: value for name, value in row.items() if name.startswith("time/") and name.count("/") == 1}
        whole = phases.pop("step")
        longest = sorted(phases.items(), key=lambda item: -item[1])[:3]
        inside = ", ".join(f"{name} {value:.1f}" for name, value in longest)
        text += f"  {whole:.1f} s" + (f" ({inside})" if inside else "")
    return text
