"""Which checkpoint is resumed, kept, or deleted; the files' own integrity. Saving and loading are in test_main.py."""

import json

import pytest
import torch

from train import checkpoint


def make(root, step, *, resumable=True, scores=None, torn=False):
    folder = root / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * 10)
    (folder / "state.json").write_text(json.dumps({"version": 1, "step": step, "world_size": 1, "scores": scores or {}}))
    sizes = {name: (folder / name).stat().st_size for name in ("weights", "state.json")}
    (folder / "complete.json").write_text(json.dumps({"step": step, "resumable": resumable, "files": sizes}))
    if torn:
        (folder / "weights").write_bytes(b"x" * 4)
    return folder


def test_auto_takes_the_newest_complete_one(tmp_path):
    good = make(tmp_path, 4)
    make(tmp_path, 6, torn=True)  # a copy that was cut off
    make(tmp_path, 8, resumable=False)  # weights only
    (tmp_path / "checkpoints" / "step-000010").mkdir()  # no complete.json
    (tmp_path / "checkpoints" / ".partial-step-000012").mkdir()
    assert checkpoint.find(tmp_path, "auto") == good
    assert checkpoint.find(tmp_path, "never") is None
    assert checkpoint.find(tmp_path / "empty", "auto") is None


def test_a_named_checkpoint_must_be_complete(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"complete\.json"):
        checkpoint.find(tmp_path, str(make(tmp_path, 6, torn=True)))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.find(tmp_path, "nowhere")


def test_steps_sort_as_numbers(tmp_path):
    for step in (999_999, 1_000_000, 5):
        make(tmp_path, step)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-000005", "step-999999", "step-1000000"]


def test_best_is_by_a_score_measured_at_that_step(tmp_path):
    make(tmp_path, 2, scores={"validate/accuracy": 0.5})
    top = make(tmp_path, 4, scores={"validate/accuracy": 0.7})
    make(tmp_path, 6)  # not validated: cannot be best
    make(tmp_path, 8, scores={"validate/accuracy": 0.6})
    assert checkpoint.best(tmp_path, "validate/accuracy") == top
    assert checkpoint.best(tmp_path, "unknown") is None


def test_prune_keeps_the_last_and_the_best(tmp_path):
    folders = {step: make(tmp_path, step) for step in (2, 4, 6, 8)}
    torn = tmp_path / "checkpoints" / "step-000003"
    torn.mkdir()
    removed = checkpoint.prune(tmp_path, keep_last=2, best=folders[2])
    assert sorted(path.name for path in removed) == ["step-000003", "step-000004"]
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-000002", "step-000006", "step-000008"]
    assert checkpoint.prune(tmp_path, keep_last=0) == []


def test_a_state_of_another_version_is_refused(tmp_path):
    folder = make(tmp_path, 2)
    (folder / "state.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(ValueError, match="99"):
        checkpoint.read_state(folder)


def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path):
    """A byte changed inside a file keeps its size: the reader finds it."""

    class Policy:
        def load_checkpoint(self, folder, tag):
            torch.load(f"{folder}/shard.pt", weights_only=False)

    folder = make(tmp_path, 3)
    (folder / "zero").mkdir(exist_ok=True)
    (folder / "zero" / "shard.pt").write_bytes(b"\xff" * 100)
    with pytest.raises(RuntimeError, match=r"step-000003 cannot be read .*remove it.*--resume"):
        checkpoint.load(folder, Policy())
