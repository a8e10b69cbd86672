"""Save and resume everything a run needs to go on, export Hugging Face folders, prune.

    <output_dir>/checkpoints/step-000010/   zero/        DeepSpeed's shards (weights, optimiser, one file per rank)
                                            critic/      the same for the critic, if there is one
                                            rank-0.pt    random states of that rank
                                            state.json   step, data position, controllers, scores
                                            hf/          the policy as a Hugging Face folder
                                            complete.json   written last: the size of every other file

A checkpoint is written under a temporary name, fsynced, renamed, and only then are older ones pruned: a kill at any moment
leaves the newest complete one in place. Folders without a matching complete.json are never resumed from.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train import distributed, resharding

STATE_VERSION = 1
_NAME = re.compile(r"step-(\d{6,})")


def save(
    output_dir: str | Path, step: int, state: dict[str, Any], policy, encoder, *, critic=None, model_only=False
) -> Path:
    """Write checkpoint `step` on all ranks (collective) and return its folder.

    state: JSON-serialisable; read back by `load`. Raises RuntimeError before anything is written when the disk is too full.
    """
    folder = Path(output_dir) / "checkpoints"
    final, partial = folder / f"step-{step:06d}", folder / f".partial-step-{step:06d}"
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_partials(folder)
        partial.mkdir()
    error = None
    try:
        distributed.check_free_disk(output_dir, _needed_bytes(policy, critic, model_only), "a checkpoint")
    except OSError as full:
        error = str(full)
    distributed.raise_together(error, "saving a checkpoint")
    if not model_only:
        policy.engine.save_checkpoint(str(partial / "zero"), tag="state", save_latest=False)
        if critic is not None:
            critic.engine.save_checkpoint(str(partial / "critic"), tag="state", save_latest=False)
        torch.save(_random_states(), partial / f"rank-{distributed.rank()}.pt")
    export_hf(policy, encoder, partial / "hf")
    distributed.barrier("checkpoint shards written")
    if distributed.rank() == 0:
        state = {"version": STATE_VERSION, "step": step, "world_size": distributed.world_size(), **state}
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        sizes = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
        manifest = {"step": step, "resumable": not model_only, "files": sizes, "time": time.time()}
        (partial / "complete.json").write_text(json.dumps(manifest))
        for path in [*partial.rglob("*"), partial]:
            _fsync(path)
        if final.exists():  # the same step saved twice: a signal right after a scheduled save
            shutil.rmtree(final)
        partial.rename(final)
        _fsync(folder)
    distributed.barrier("checkpoint renamed")
    return final


def find(output_dir: str | Path, resume: str) -> Path | None:
    """The checkpoint to resume from: `auto` is the newest complete one (None if there is none), `never` is None.

    Raises FileNotFoundError for a folder that is not a complete checkpoint: a mistyped path never starts from scratch.
    """
    if resume == "never":
        return None
    if resume != "auto":
        if not is_complete(Path(resume)):
            raise FileNotFoundError(
                f"--resume {resume}: not a complete checkpoint (complete.json missing or sizes differ)"
            )
        return Path(resume)
    complete = [path for path in list_checkpoints(output_dir) if is_complete(path)]
    return complete[-1] if complete else None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """All checkpoint folders by step, complete or not."""
    found = [path for path in (Path(output_dir) / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))


def is_complete(folder: Path) -> bool:
    """True if every file that complete.json lists is there with its size, and the checkpoint can be resumed from."""
    try:
        manifest = json.loads((folder / "complete.json").read_text())
    except (OSError, ValueError):
        return False
    if not manifest.get("resumable"):
        return False
    sizes = manifest["files"]
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, before any model is built. Raises ValueError when it is of another version."""
    state = json.loads((folder / "state.json").read_text())
    if state.get("version") != STATE_VERSION:
        raise ValueError(f"{folder}/state.json has version {state.get('version')}, this ReelRL reads {STATE_VERSION}")
    return state


def load(folder: Path, policy, *, critic=None) -> None:
    """Load weights, optimiser and random states on all ranks (collective).

    Another number of ranks than saved: weights, moments and step are cut anew (train.resharding), bit for bit; the random
    states are those of this run's start, since a rank of the old run has no one successor. Raises RuntimeError naming the
    checkpoint and the way out when a file of it is damaged.
    """
    try:
        _load(folder, policy, critic)
    except (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise RuntimeError(
            f"checkpoint {folder} cannot be read ({type(error).__name__}: {error}): remove it, and the same command takes the "
            "one before; or name another with --resume"
        ) from error


def _load(folder: Path, policy, critic) -> None:
    saved = read_state(folder)["world_size"]
    for model, name in ((policy, "zero"), (critic, "critic")):
        if model is None:
            continue
        if saved == distributed.world_size():
            model.load_checkpoint(str(folder / name), tag="state")
        else:
            resharding.load(model.engine, folder / name / "state", saved)
    if saved != distributed.world_size():
        return
    states = torch.load(folder / f"rank-{distributed.rank()}.pt", weights_only=False)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])


def dealt(lists: list[list], replica: int, replicas: int) -> list:
    """What `replica` takes over of lists saved by as many replicas or another number of them: then all joined and dealt
    one by one. [[1, 2], [3]] for two -> [1, 2] and [3]; for three -> [1], [2], [3]."""
    if len(lists) == replicas:
        return lists[replica]
    return [item for one in lists for item in one][replica::replicas]


def export_hf(policy, encoder, folder: Path) -> None:
    """Write the policy as a Hugging Face folder that transformers and vLLM load (collective; rank 0 writes)."""
    tensors = policy.full_state_dict()  # on every rank: gathering is collective; only rank 0 keeps tensors
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        policy.model.save_pretrained(folder, state_dict=tensors)
        encoder.processor.save_pretrained(folder)
        encoder.tokenizer.save_pretrained(folder)
    distributed.barrier("policy exported")


def best(output_dir: str | Path, metric: str) -> Path | None:
    """The checkpoint with the highest `metric` among those that measured it at their own step; the newest of equals."""
    scored = []
    for folder in list_checkpoints(output_dir):
        if (folder / "complete.json").exists():
            value = json.loads((folder / "state.json").read_text()).get("scores", {}).get(metric)
            if isinstance(value, (int, float)):
                scored.append((value, folder.name, folder))
    return max(scored)[2] if scored else None


def prune(output_dir: str | Path, keep_last: int, best: Path | None = None) -> list[Path]:
    """Delete all but the newest `keep_last` complete checkpoints and `best` (rank 0 only). Returns what was deleted."""
    if keep_last == 0 or distributed.rank() != 0:
        return []
    folders = list_checkpoints(output_dir)
    keep = {path.name for path in [p for p in folders if (p / "complete.json").exists()][-keep_last:]}
    if best is not None:
        keep.add(best.name)
    removed = [path for path in folders if path.name not in keep]
    for path in removed:
        # Renamed first: a kill during the deletion must not leave something that looks like a checkpoint.
        doomed = path.with_name(f".partial-delete-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
    return removed


def _needed_bytes(policy, critic, model_only: bool) -> int:
    """Disk for one checkpoint: the exported weights, and fp32 weights with two Adam moments when it can be resumed from."""
    total = 0
    for model in (policy, critic):
        if model is not None:
            count = model.parameter_count
            total += count * (2 if model is policy else 0) * 2 + (0 if model_only else count * 14)
    return total


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _remove_partials(folder: Path) -> None:
    for path in folder.glob(".partial-*"):
        shutil.rmtree(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
