"""A checkpoint continued on another number of ranks: the cutting by hand, then real shards against DeepSpeed's own view."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import tensor

from tests.run_ranks import run_ranks
from tests.tiny_models import tiny_model
from tests.train import run_main
from train.checkpoint import dealt
from train.resharding import check_same_parameters, piece_length, recut, recut_optimizer

PROGRAM = Path(__file__).with_name("resharding_run.py")
# Parameters a (5 elements), b (3) and c (1), elements 10 .. 14, 20 .. 22 and 30, -1 where ranks are padded.
SAVED = [{"a": 5, "b": 3}, {"c": 1}]
ON_TWO = [
    [tensor([10.0, 11, 12, 20, 21]), tensor([30.0])],
    [tensor([13.0, 14, -1, 22, -1]), tensor([-1.0])],
]


def test_by_hand_two_ranks_to_one_and_to_three():
    one = recut(ON_TWO, SAVED, SAVED, 0, 1)
    assert [flat.tolist() for flat in one] == [[10, 11, 12, 13, 14, 20, 21, 22], [30]]
    three = [[flat.tolist() for flat in recut(ON_TWO, SAVED, SAVED, rank, 3)] for rank in range(3)]
    # a: pieces of 2, the last one padded; b: pieces of 1; c: rank 0 has it, the others are padding
    assert three == [[[10, 11, 20], [30]], [[12, 13, 21], [0]], [[14, 0, 22], [0]]]


def test_back_again_and_into_other_groups():
    other = [{"c": 1, "b": 3}, {"a": 5}]  # the same parameters, grouped and ordered otherwise
    three = [recut(ON_TWO, SAVED, other, rank, 3) for rank in range(3)]
    assert [flat.tolist() for flat in three[1]] == [[0, 21], [12, 13]]
    back = [recut(three, other, SAVED, rank, 2) for rank in range(2)]
    for was, now in zip(ON_TWO, back):
        assert all(torch.equal(old.clamp(min=0), new) for old, new in zip(was, now))


def test_more_ranks_than_elements():
    # 3 elements on 5 ranks: one each, then two ranks of padding alone
    pieces = [recut(ON_TWO, SAVED, [{"b": 3}], rank, 5)[0].tolist() for rank in range(5)]
    assert pieces == [[20], [21], [22], [0], [0]]
    assert [piece_length(5, ranks) for ranks in (1, 2, 3, 5, 8)] == [5, 3, 2, 1, 1]


def test_optimizer_state_keeps_its_dtype_and_steps():
    def of_rank(rank: int, step_c: int) -> dict:
        states = {}
        for index, flat in enumerate(ON_TWO[rank]):
            step = tensor(7.0) if index == 0 else tensor(float(step_c))
            states[index] = {"step": step, "exp_avg": flat * 2, "residue": flat.to(torch.bfloat16), "stream": index}
        return states

    wanted = [{"c": 1}, {"a": 5, "b": 3}]
    state = recut_optimizer([of_rank(0, 4), of_rank(1, 4)], SAVED, wanted, 1, 3)
    assert state[1]["exp_avg"].tolist() == [24, 26, 42] and state[1]["residue"].dtype == torch.bfloat16
    assert (state[0]["step"], state[1]["step"]) == (4, 7) and (state[0]["stream"], state[1]["stream"]) == (0, 1)
    assert recut_optimizer([{}, {}], SAVED, wanted, 0, 3) == {}


def test_other_parameters_are_named():
    check_same_parameters(SAVED, [{"c": 1}, {"b": 3, "a": 5}])
    with pytest.raises(ValueError, match=r"only the checkpoint trains c; of another size b.*--freeze_\*"):
        check_same_parameters(SAVED, [{"a": 5, "b": 4}])
    with pytest.raises(ValueError, match=r"only this run trains d0, d1, d2 and 4 more"):
        check_same_parameters(SAVED, [*SAVED, {f"d{n}": 1 for n in range(7)}])


def test_waiting_groups_are_dealt_anew():
    assert [dealt([[1, 2], [3]], replica, 2) for replica in range(2)] == [[1, 2], [3]]
    assert [dealt([[1, 2], [3]], replica, 3) for replica in range(3)] == [[1], [2], [3]]
    assert dealt([[1, 2], [3]], 0, 1) == [1, 2, 3]


def launch(ranks: int, *words: str) -> dict:
    run_ranks(PROGRAM, ranks, *words)
    return torch.load(words[3])


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def bf16_spacing(weights: torch.Tensor) -> torch.Tensor:
    """Distance to the next bf16 number, which has 7 bits behind the point: 2^-7 for 1 up to 2; 0 for 0."""
    _, exponent = torch.frexp(weights.float())  # of a mantissa from 1/2 up to 1
    return torch.where(weights == 0, 0.0, torch.exp2(exponent.float() - 8))


def test_spacing_by_hand():
    assert bf16_spacing(torch.tensor([1.0, 1.99, -0.75, 3.0, 0.0])).tolist() == [2**-7, 2**-7, 2**-8, 2**-6, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "saved,wanted,optimizer", [(2, 1, "adamw"), (2, 3, "adamw"), (1, 2, "adamw"), (2, 3, "adamw_kahan")]
)
def test_real_shards_keep_every_bit(tmp_path, saved, wanted, optimizer):
    """Master weights, both moments, step, group settings and weights as DeepSpeed itself gathers them; then an update."""
    extra = [] if optimizer == "adamw" else [optimizer]
    model, folder = tiny_model("qwen3_vl"), tmp_path / "checkpoint"
    before = launch(saved, "save", model, str(folder), str(tmp_path / "before.pt"), *extra)
    after = launch(wanted, "load", model, str(folder), str(tmp_path / "after.pt"), *extra)
    assert before["steps"] == [2.0] and before["global_steps"] == 2
    moments = [name for name in before if name.endswith("exp_avg_sq")]
    assert len(moments) == len(before["weights"]) and sum(bool(before[name].any()) for name in moments) > 40
    ratios = {(group["part"], group["lr_ratio"], group["weight_decay"]) for group in before["settings"]}
    assert ("tower", 0.4, 0.1) in ratios and ("merger", 2.0, 0.0) in ratios
    # What plan_memory.py counts: a buffer of fp32 gradients, 4 bytes per parameter (and padding), in bf16 runs, too.
    assert 4.0 <= before["gradient_bytes_share"] < 4.01 and 4.0 <= after["gradient_bytes_share"] < 4.01
    moved = ("report", "after", "residue", "gradient_bytes_share")
    assert [name for name in before if name not in moved and not same(before[name], after[name])] == []
    # The next update sums the gradients of other ranks in another order: equal up to rounding. Kahan's weights are what it holds,
    # weight and residue: rounded to bf16 alone, a bias that began at 0 and is a few updates long may be two spacings away.
    tolerance = 2e-6 if optimizer == "adamw" else 1e-2
    assert after["report"]["grad_norm"] == pytest.approx(before["report"]["grad_norm"], rel=tolerance)
    assert before["residue"].keys() == (before["after"].keys() if optimizer == "adamw_kahan" else set())
    gaps = {name: after["after"][name].float() - weights.float() for name, weights in before["after"].items()}
    for name, weights in before["after"].items():
        if optimizer == "adamw_kahan":
            assert gaps[name].norm() <= 2 * bf16_spacing(weights).norm(), name
            gaps[name] += after["residue"][name].float() - before["residue"][name].float()
        assert gaps[name].norm() <= tolerance * weights.float().norm(), name
    whole = [torch.cat([part.float().flatten() for part in parts.values()]).norm() for parts in (gaps, before["after"])]
    assert whole[0] <= (2e-6 if optimizer == "adamw" else 1e-3) * whole[1]


@pytest.mark.slow
def test_a_run_goes_on_with_one_and_with_three_ranks(tmp_path):
    """2 ranks for 2 steps, then 1 or 3 ranks for the third: the figures of 2 ranks without a break."""
    playground = run_main.make_playground(tmp_path / "playground")
    flags = ("--prompts_per_step", "6", "--save_every", "2", "--keep_last", "0", "--check_parity")
    straight = tmp_path / "straight"
    run_main.run(playground, straight, *flags, "--max_steps", "3", ranks=2)
    wanted = run_main.metrics(straight, reproducible=True)[2]
    middle = straight / "checkpoints" / "step-000002"
    for ranks in (1, 3):
        said = run_main.run(
            playground,
            tmp_path / str(ranks),
            *flags,
            "--max_steps",
            "3",
            "--resume",
            str(middle),
            ranks=ranks,
        )
        assert "resumed after step 2" in said
        (row,) = run_main.metrics(tmp_path / str(ranks), reproducible=True)
        # Position, schedule, rewards and lengths are exactly those; sums of other ranks round otherwise.
        for name in (
            "step",
            "data/position",
            "data/epoch",
            "reward/mean",
            "response/length_mean",
            "policy/learning_rate",
        ):
            assert row[name] == pytest.approx(wanted[name], rel=1e-12), name
        assert row["policy/grad_norm"] == pytest.approx(wanted["policy/grad_norm"], rel=1e-4)
        assert row["mismatch/max"] < 1e-4
