"""The bf16 AdamW variants under ZeRO-3 on two ranks, against torch's fp32 AdamW in one process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from scripts.plan_memory import SIZES, step_bytes
from tests.run_ranks import run_ranks
from tests.train.low_precision_run import COLUMNS, MICRO_BATCHES, ROWS, SETTINGS, STEPS, gradient, start
from train.flops import read_shape
from train.memory import GRADIENT_BYTES, OPTIMIZER_BYTES

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("low_precision_run.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("low_precision") / "seen.pt"
    run_ranks(PROGRAM, 2, out, timeout_s=300)
    return torch.load(out)


@pytest.fixture(scope="module")
def exact():
    """float32 weights after the same updates, by torch alone."""
    weights = torch.nn.Parameter(start())
    optimizer = torch.optim.AdamW([weights], **SETTINGS)
    for step in range(STEPS):
        weights.grad = gradient(step)
        optimizer.step()
    return weights.detach()


def test_two_tensors_are_two_sub_groups_and_fp32_is_plain_adamw(seen, exact):
    assert seen["fp32/sub_groups"] == seen["kahan/sub_groups"] == 2
    for tensor in seen["fp32"]:
        torch.testing.assert_close(tensor, exact, rtol=1e-6, atol=1e-7)
    for tensor in seen["master"]:  # bf16 weights that follow fp32 master weights
        assert torch.equal(tensor, exact.to(torch.bfloat16).float())


def test_shards_hold_the_bytes_that_plan_memory_counts(seen):
    """Per parameter, 2 x 64 x 128 of them on two ranks."""
    for name, optimizer, own in (
        ("master", "adamw", 12),
        ("kahan", "adamw_kahan", 10),
        ("stochastic", "adamw_stochastic", 8),
    ):
        assert seen[f"{name}/bytes"] == {"weights": 2, "gradients": 4, "optimiser": own}
        assert OPTIMIZER_BYTES[optimizer] == own
    assert seen["fp32/bytes"] == {"weights": 4, "gradients": 4, "optimiser": 8}  # no master copy of fp32 weights either


def test_one_micro_batch_is_summed_in_bf16_without_loss(seen):
    """Its gradient arrives in bf16, with a buffer of fp32, too: weights after four clipped updates are equal bit for bit."""
    seen = seen["summed"]
    for kind in OPTIMIZER_BYTES:
        exact, short = ([seen[f"{kind}/{summed}/weights"], seen[f"{kind}/{summed}/norm"]] for summed in GRADIENT_BYTES)
        assert exact[1] == short[1] > 100  # clipped at 1: 16,384 elements of about 1
        for one, other in zip(exact[0], short[0], strict=True):
            assert torch.equal(one, other) and not torch.equal(one, start())
        assert seen[f"{kind}/fp32/dtype"] == "torch.float32" and seen[f"{kind}/bf16/dtype"] == "torch.bfloat16"
        whole = {"weights": 2, "gradients": 4, "optimiser": OPTIMIZER_BYTES[kind]}
        assert seen[f"{kind}/fp32/bytes"] == whole and seen[f"{kind}/bf16/bytes"] == {**whole, "gradients": 2}


def test_many_micro_batches_are_rounded_at_every_sum(seen):
    """1 and 16 times 2^-9: 1.03125 in fp32, 1 in bf16, where each addend is below half a unit. Each rank holds half the rows
    of both tensors."""
    seen = seen["summed"]
    half = (2, ROWS // 2, COLUMNS)
    for kind in OPTIMIZER_BYTES:
        assert (seen[f"{kind}/fp32/small"] == 1.03125).all() and (seen[f"{kind}/bf16/small"] == 1.0).all()
        for summed, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            wanted = torch.zeros(ROWS // 2, COLUMNS, dtype=dtype)
            for one in MICRO_BATCHES["random"]:
                wanted = wanted + one[: ROWS // 2].to(dtype)
            got = seen[f"{kind}/{summed}/random"].view(half)
            assert torch.equal(got[0], wanted.float()) and torch.equal(got[1], wanted.float())
    assert not torch.equal(seen["adamw/fp32/random"], seen["adamw/bf16/random"])


def test_the_step_copies_what_plan_memory_counts(seen):
    """Bytes per element of a sub-group of two tensors: laid out flat in the dtype they were summed in, then in that of the
    master weights if it is another one. Before, each in fp64 for the norm."""
    seen = seen["summed"]
    for kind in OPTIMIZER_BYTES:
        master = {"torch.float32": 4} if kind == "adamw" else {"torch.bfloat16": 2}
        for summed, flat in (("fp32", {"torch.float32": 4}), ("bf16", {"torch.bfloat16": 2})):
            assert seen[f"{kind}/{summed}/copies"] == flat | master
            assert seen[f"{kind}/{summed}/norm copies"] == {"torch.float64": 8}
            # 8B on 8 GPUs: sub-groups of 10^9 elements
            assert sum((flat | master).values()) == step_bytes(read_shape(SIZES["8b"]), 8, False, kind, summed) / 1e9


def test_kahan_follows_fp32_where_plain_bf16_stands_still(seen, exact):
    unit = 2.0 ** (exact.abs().clamp(min=1e-3).log2().floor() - 7)  # bf16's spacing at the weight
    moved = (exact - start()).abs().mean()
    for tensor in seen["kahan"]:
        off = (tensor - exact).abs() / unit
        # Half a unit is the last rounding; the kept error, of at most half a unit, loses 2^-9 of itself per update.
        assert off.max() <= 0.5 + STEPS * 2.0**-10 and (off <= 0.51).float().mean() > 0.999
    big = start().abs() > 0.5  # half a unit is above one update there
    plain, kahan = seen["plain"][0], seen["kahan"][0]
    rounded = exact.to(torch.bfloat16).float()
    assert (rounded != start())[big].float().mean() > 0.3  # moved by half a unit or more
    assert (kahan == rounded)[big].float().mean() > 0.99
    assert (plain == start())[big].float().mean() > 0.99 and (plain - exact)[big].abs().mean() > 0.5 * moved
    assert seen["kahan/moments"] == seen["stochastic/moments"] == ["torch.float32"]


def test_stochastic_rounding_is_right_on_average(seen, exact):
    error = torch.stack(seen["stochastic"]) - exact
    moved = (exact - start()).mean()
    spread = error.std() / math.sqrt(error.numel())
    assert abs(error.mean()) < 5 * spread and spread < 0.05 * abs(moved)


def test_noise_differs_between_sub_groups_and_ranks(seen):
    """Equal weights and gradients everywhere: only the noise can tell the two tensors, and the two halves, apart."""
    first, second = seen["stochastic"]
    assert 0.2 < (first != second).float().mean() < 0.9
    upper, lower = first[: ROWS // 2], first[ROWS // 2 :]  # rank 0's shard and rank 1's
    assert upper.shape == (ROWS // 2, COLUMNS)
    assert 0.2 < (upper != lower).float().mean() < 0.9
    assert torch.equal(*seen["kahan"])  # nothing is drawn there


def test_resuming_draws_the_same_noise(seen):
    for kind in ("adamw_kahan", "adamw_stochastic"):
        assert seen[f"{kind}/resumed"] and seen[f"{kind}/moved"]
