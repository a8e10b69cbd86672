"""Which checkpoint is resumed, kept, or deleted; the files' own integrity. Saving and loading are in test_main.py."""

import json

import pytest
import torch
import xxhash

from train import checkpoint


def make(root, step, *, resumable=True, scores=None, torn=False, sums=True, time_s=0.0):
    folder = root / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * 10)
    (folder / "state.json").write_text(
        json.dumps({"version": 1, "step": step, "world_size": 1, "scores": scores or {}})
    )
    sizes = {name: (folder / name).stat().st_size for name in ("weights", "state.json")}
    manifest = {"step": step, "resumable": resumable, "files": sizes, "time": time_s}
    if sums:
        manifest["xxh3_64"] = {name: xxhash.xxh3_64_hexdigest((folder / name).read_bytes()) for name in sizes}
    (folder / "complete.json").write_text(json.dumps(manifest))
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
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == [
        "step-000005",
        "step-999999",
        "step-1000000",
    ]


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
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == [
        "step-000002",
        "step-000006",
        "step-000008",
    ]
    assert checkpoint.prune(tmp_path, keep_last=0) == []


def test_after_a_way_back_the_steps_left_over_are_the_old_ones(tmp_path):
    """From step 4 on again: step 5 is what was written last, step 8 is of the course that was left."""
    for step, time_s in ((2, 20.0), (4, 40.0), (8, 80.0), (5, 90.0)):
        make(tmp_path, step, time_s=time_s)
    removed = checkpoint.prune(tmp_path, keep_last=1)
    assert sorted(path.name for path in removed) == ["step-000002", "step-000004", "step-000008"]


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_is_found_and_the_checkpoint_before_is_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 3)  # 10 bytes are read in four parts
    older, newest = make(tmp_path, 4), make(tmp_path, 10)
    checkpoint.verify(newest)
    flip(newest / "weights", 9)
    assert checkpoint.find(tmp_path, "auto") == newest  # its sizes are right: no older one is taken in silence
    with pytest.raises(RuntimeError) as caught:
        checkpoint.verify(newest)
    text = str(caught.value)
    assert f"{newest / 'weights'} (xxh3_64 is " in text and "state.json" not in text
    assert f"was {xxhash.xxh3_64_hexdigest(b'x' * 10)}" in text and text.endswith(f"--resume {older}")
    assert checkpoint.find(tmp_path, str(older)) == older
    checkpoint.verify(older)
    flip(older / "state.json", 0)
    with pytest.raises(RuntimeError, match=r"step-000004/state\.json .*\n.*no complete one before .*--resume never"):
        checkpoint.verify(older)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    folder = make(tmp_path, 4)
    (folder / "weights").unlink()
    (folder / "weights").mkdir()
    with pytest.raises(RuntimeError, match=r"step-000004/weights \(xxh3_64 is unknown, it cannot be read"):
        checkpoint.verify(folder)


def test_checkpoints_from_before_checksums_are_resumed(tmp_path):
    folder = make(tmp_path, 4, sums=False)
    flip(folder / "weights", 0)
    checkpoint.verify(folder)
    assert checkpoint.find(tmp_path, "auto") == folder


def test_every_rank_reads_its_own_files_and_rank_0s_are_dealt_on_its_host():
    """Four ranks on two hosts: 100 bytes of each rank; of rank 0 alone 50, 30, 30 and 4 bytes for ranks 0 and 1."""
    own = {f"zero/state/bf16_zero_pp_rank_{i}_mp_rank_00_optim_states.pt": 100 for i in range(4)}
    sizes = {**own, "rank-3.pt": 7, "hf/a": 30, "hf/b": 30, "hf/model": 50, "state.json": 4}
    first, second, third, fourth = checkpoint.shares(sizes, 4, 2)
    names = list(own)
    assert first == [names[0], "hf/model", "state.json"]
    assert second == [names[1], "hf/a", "hf/b"]
    assert third == [names[2]] and fourth == [names[3], "rank-3.pt"]
    one, two, three = checkpoint.shares(own, 3, 3)  # resumed on three ranks: rank 3's file is read by rank 0
    assert (one, two, three) == ([names[0], names[3]], [names[1]], [names[2]])


def test_a_state_of_another_version_is_refused(tmp_path):
    folder = make(tmp_path, 2)
    (folder / "state.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(ValueError, match="99"):
        checkpoint.read_state(folder)


def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path):
    """Of a checkpoint without checksums: the reader finds it."""

    class Policy:
        def load_checkpoint(self, folder, tag):
            torch.load(f"{folder}/shard.pt", weights_only=False)

    folder = make(tmp_path, 3)
    (folder / "zero").mkdir(exist_ok=True)
    (folder / "zero" / "shard.pt").write_bytes(b"\xff" * 100)
    with pytest.raises(RuntimeError, match=r"step-000003 cannot be read .*remove it.*--resume"):
        checkpoint.load(folder, Policy())
