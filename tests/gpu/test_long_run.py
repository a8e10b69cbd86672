"""train/main.py for 20 steps on one GPU: the loss of memory per step is none."""

from __future__ import annotations

import pytest

from tests.train import run_main

STEPS = 20


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    playground = run_main.make_playground(tmp_path_factory.mktemp("playground"), clips=60)
    output = tmp_path_factory.mktemp("run") / "run"
    run_main.run(
        playground, output, "--max_steps", str(STEPS), "--dtype", "bf16", "--attention", "varlen", "--enforce_eager",
        "--kv_cache_gib", "1", "--gpu_memory_utilization", "0.1", "--max_num_seqs", "32", "--check_parity",
        "--save_every", "0", "--save_model_only", "--learning_rate", "1e-5", "--kept_layers", "auto", ranks=1, timeout_s=240,
    )  # fmt: skip
    return run_main.metrics(output)


def test_twenty_steps_ran(rows):
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["policy/skipped_updates"] == 0 for row in rows)
    assert all(row["memory/kept_layers"] >= 2 for row in rows)  # auto: a model this small keeps all of its layers


@pytest.mark.parametrize(
    ("name", "slack_gib"),
    [
        ("memory/device_used_gib", 0.25),
        ("memory/asleep_gib", 0.25),
        ("memory/allocated_max_gib", 0.1),
        ("memory/host_rss_gib", 0.25),
    ],
)
def test_memory_does_not_grow(rows, name, slack_gib):
    """The second half's highest value is that of steps 6 to 10, but for the allocator's whims."""
    middle = max(row[name] for row in rows[5:10])
    last = max(row[name] for row in rows[10:])
    assert last <= middle + slack_gib, [round(row[name], 3) for row in rows]
