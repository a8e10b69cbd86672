"""Where states and weights are kept changes no number: CPU offload, and hpZ's second copy, on four real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.run_ranks import run_ranks
from tests.tiny_models import tiny_model

PROGRAM = Path(__file__).with_name("sharding_run.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("sharding") / "seen.pt"
    run_ranks(PROGRAM, 4, tiny_model("qwen3_vl"), out)
    return torch.load(out)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["optimizer", "all", "hpz"])
def test_two_updates_are_those_without(seen, variant):
    assert seen["none"]["steps"][0]["grad_norm"] > 0 and not any(step["skipped"] for step in seen[variant]["steps"])
    norms = [[step["grad_norm"] for step in seen[name]["steps"]] for name in ("none", variant)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    for name, weights in seen["none"]["weights"].items():
        assert (seen[variant]["weights"][name] - weights).norm() <= 1e-6 * weights.norm(), name
    assert (seen[variant]["logprobs"] - seen["none"]["logprobs"]).abs().max() < 1e-5  # not of stale weights


@pytest.mark.slow
def test_each_variant_is_what_it_says(seen):
    assert {name: run["offloaded"] for name, run in seen.items()} == {
        "none": [False, False], "optimizer": [True, False], "all": [True, True], "hpz": [False, False],
    }  # fmt: skip
    # A shard over two ranks is twice one over four.
    assert seen["hpz"]["second_copy"] == {2.0} and seen["none"]["second_copy"] == set()
