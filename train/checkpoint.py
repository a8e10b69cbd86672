"""Save and resume everything a run needs to go on, export Hugging Face folders, prune.

    <output_dir>/checkpoints/step-000010/   zero/        DeepSpeed's shards (weights, optimiser, one file per rank)
                                            critic/      the same for the critic, if there is one
                                            rank-0.pt    random states of that rank
                                            state.json   step, data position, controllers, scores
                                            hf/          the policy as a Hugging Face folder
                                            complete.json   written last: size and checksum of every other file

A checkpoint is written under a temporary name, fsynced, renamed, and only then are older ones pruned: a kill at any moment
leaves the newest complete one in place. Folders without a matching complete.json are never resumed from; a file with other
contents than were written ends the start of a run, by its name.
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
import xxhash

from train import distributed, resharding

STATE_VERSION = 1
_NAME = re.compile(r"step-(\d{6,})")
_RANK = re.compile(r"rank[_-](\d+)")  # in the names of files that every rank writes for itself
BLOCK_BYTES = 8 << 20  # read at once for a checksum


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
    sizes = None
    if distributed.rank() == 0:
        state = {"version": STATE_VERSION, "step": step, "world_size": distributed.world_size(), **state}
        (partial / "state.json").write_text(json.dumps(state, indent=1))
    distributed.barrier("checkpoint shards written")
    if distributed.rank() == 0:
        sizes = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
    sizes = distributed.broadcast_object(sizes)
    sums = checksums(partial, sizes)
    unread = [name for name, value in sums.items() if value is None]
    if unread:
        raise RuntimeError(f"{partial}: cannot read back {', '.join(unread)}: is --output_dir one folder on all hosts?")
    if distributed.rank() == 0:
        manifest = {"step": step, "resumable": not model_only, "files": sizes, "xxh3_64": sums, "time": time.time()}
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


def find_together(output_dir: str | Path, resume: str) -> Path | None:
    """find() on every rank. Collective: raises on every rank, FileNotFoundError where all find nothing of that name, RuntimeError
    where they do not see the same: a rank that began anew would wait for the others in another collective than they.
    """
    found, error = None, None
    try:
        found = find(output_dir, resume)
    except FileNotFoundError as missing:
        error = str(missing)
    seen = distributed.all_gather_objects((found.name if found else None, error))
    if all(text for _, text in seen):
        raise FileNotFoundError(error)
    if len(set(seen)) > 1:
        listed = "; ".join(f"rank {rank}: {text or name or 'none'}" for rank, (name, text) in enumerate(seen))
        raise RuntimeError(
            f"the ranks do not find the same checkpoint in --output_dir {output_dir}, which has to be one folder that all nodes "
            f"see: {listed}"
        )
    return found


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


def checksums(folder: Path, sizes: dict[str, int]) -> dict[str, str | None]:
    """Collective: xxh3_64 of every file in `sizes` (name: bytes, the same on all ranks), in hexadecimal, on every rank; None
    where it cannot be read. Each rank reads its share of the files.
    """
    found: dict[str, str | None] = {}
    near = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
    for name in shares(sizes, distributed.world_size(), near)[distributed.rank()]:
        digest = xxhash.xxh3_64()
        try:
            with open(folder / name, "rb", buffering=0) as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
            found[name] = digest.hexdigest()
        except OSError:
            found[name] = None
    return dict(sorted(pair for one in distributed.all_gather_objects(found) for pair in one.items()))


def shares(sizes: dict[str, int], ranks: int, near: int) -> list[list[str]]:
    """Which rank reads which file: a rank's own files (by the number in the name) itself, since it wrote them and its host
    may still hold them in memory; those of rank 0 alone are dealt to the `near` ranks of its host, the largest first.
    """
    lists: list[list[str]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for name in sorted(sizes, key=lambda name: (_RANK.search(name) is None, -sizes[name], name)):
        own = _RANK.search(name)
        reader = int(own[1]) % ranks if own else min(range(min(near, ranks)), key=load.__getitem__)
        lists[reader].append(name)
        load[reader] += sizes[name]
    return lists


def verify(folder: Path) -> None:
    """Collective: raises RuntimeError on every rank, naming the files of a checkpoint whose contents are not those that were
    written, and the way out. One written before there were checksums passes: its sizes are all that is known.
    """
    manifest = distributed.broadcast_object(
        json.loads((folder / "complete.json").read_text()) if distributed.is_main() else None
    )
    written = manifest.get("xxh3_64", {})
    found = checksums(folder, {name: manifest["files"][name] for name in written})
    damaged = [
        f"{folder / name} (xxh3_64 is {found[name] or 'unknown, it cannot be read'}, was {written[name]})"
        for name in written
        if found[name] != written[name]
    ]
    if damaged:
        raise RuntimeError(f"damaged since it was written: {'; '.join(damaged)}\n{_way_out(folder)}")


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
            f"checkpoint {folder} cannot be read ({type(error).__name__}: {error}): {_way_out(folder)}"
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
    """Delete all but the `keep_last` complete checkpoints that were written last and `best` (rank 0 only). Returns what was
    deleted. By time, not step: after a way back with --resume the later steps left over are old.
    """
    if keep_last == 0 or distributed.rank() != 0:
        return []
    folders = list_checkpoints(output_dir)
    complete = [path for path in folders if (path / "complete.json").exists()]
    complete.sort(key=lambda path: json.loads((path / "complete.json").read_text()).get("time", 0.0))
    keep = {path.name for path in complete[-keep_last:]}
    if best is not None:
        keep.add(best.name)
    removed = [path for path in folders if path.name not in keep]
    for path in removed:
        # Renamed first: a kill during the deletion must not leave something that looks like a checkpoint.
        doomed = path.with_name(f".partial-delete-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
    return removed


def _way_out(folder: Path) -> str:
    """What to do about a damaged checkpoint: the complete one before it, if there is one."""
    before = [path for path in list_checkpoints(folder.parent.parent) if path == folder or is_complete(path)]
    place = before.index(folder) if folder in before else 0
    if place == 0:
        return f"there is no complete one before {folder}: remove it and start anew (--resume never), or restore it from a copy"
    return f"go back to the one before: remove {folder}, and the same command does; or name it: --resume {before[place - 1]}"


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
