"""Weights for the sampler's gap: by hand, against TRL's formulas in plain loops, rejection, unknowns, NaN."""

import math

import pytest
import torch

from tests.train.algorithm_cases import make_args, mask_of, random_rows
from train.rollout_correction import rollout_correction

LENGTHS = [2, 5, 1]
RATIOS = [[3.0, 0.5], [1.0, 1.0, 0.1, 1.0, 1.0], [1.5]]
NONE = torch.tensor([False, False, False])


def correct(ratios=RATIOS, demonstration=NONE, data_types=None, **flags):
    mask = mask_of([len(row) for row in ratios])
    sampled = torch.full(mask.shape, -2.0, dtype=torch.float64)
    old = torch.full(mask.shape, 5.0, dtype=torch.float64)
    for i, row in enumerate(ratios):
        for t, ratio in enumerate(row):
            old[i, t] = -2.0 + math.log(ratio)
    weights, metrics, maxima = rollout_correction(old, sampled, mask, demonstration, make_args(**flags), data_types)
    rows = None if weights is None else [weights[i, : len(row)].tolist() for i, row in enumerate(ratios)]
    return rows, {name: (a.item(), b.item()) for name, (a, b) in metrics.items()}, maxima


def same(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_the_default_truncates_per_token():
    rows, metrics, _ = correct()
    same(rows, [[2.0, 0.5], [1, 1, 0.1, 1, 1], [1.5]])
    assert metrics["mismatch/weight_changed"] == (1.0, 8.0)


def test_modes_by_hand():
    same(correct(rollout_correction="token_truncate", correction_min=0.4)[0], [[2, 0.5], [1, 1, 0.4, 1, 1], [1.5]])
    same(correct(rollout_correction="token_mask", correction_min=0.4)[0], [[0, 0.5], [1, 1, 0, 1, 1], [1.5]])
    same(correct(rollout_correction="sequence_truncate", correction_max=1.4)[0], [[1.4] * 2, [0.1] * 5, [1.4]])
    same(correct(rollout_correction="sequence_mask", correction_min=0.2)[0], [[1.5] * 2, [0] * 5, [1.5]])
    rows, metrics, _ = correct(rollout_correction="none")
    assert rows is None and metrics["mismatch/k3"][1] == 8.0
    with pytest.raises(ValueError, match="token_cut"):
        correct(rollout_correction="token_cut")


def test_rejection_by_hand():
    """Geometric means: sqrt(1.5) = 1.2247, 0.1^(1/5) = 0.631, 1.5."""
    rows, metrics, _ = correct(rollout_correction="none", reject_above=1.3)
    same(rows, [[1, 1], [0] * 5, [0]])
    assert metrics["mismatch/rejected"] == (2.0, 3.0)
    rows, metrics, _ = correct(rollout_correction="token_truncate", reject_token_below=0.2)
    same(rows, [[2, 0.5], [0] * 5, [1.5]])
    assert metrics["mismatch/rejected"] == (1.0, 3.0)


def test_figures_by_hand():
    _, metrics, maxima = correct()
    flat = [ratio for row in RATIOS for ratio in row]
    q = math.exp(-2.0)
    expected = {
        "mismatch/log_ratio": sum(map(math.log, flat)),
        "mismatch/abs_log_ratio": sum(abs(math.log(r)) for r in flat),
        "mismatch/k3": sum(r - 1 - math.log(r) for r in flat),
        "mismatch/prob_diff": sum(abs(r * q - q) for r in flat),
    }
    for name, value in expected.items():
        assert metrics[name] == (pytest.approx(value, rel=1e-5), 8.0)
    assert maxima["mismatch/abs_log_ratio_max"].item() == pytest.approx(math.log(10))
    assert maxima["mismatch/prob_diff_max"].item() == pytest.approx(2 * q)


def test_the_gap_by_kind_of_media():
    """|log| of 3, 0.5 and 1.5 belongs to videos, of 0.1 (and four times 1) to the image; a demonstration to nothing."""
    _, metrics, _ = correct(data_types=["video", "image", "video"])
    by_hand = {"video": (math.log(3) + math.log(2) + math.log(1.5), 3.0), "image": (math.log(10), 5.0)}
    for kind, (total, tokens) in by_hand.items():
        assert metrics[f"mismatch/abs_log_ratio/{kind}"] == (pytest.approx(total, rel=1e-6), tokens)
    demonstration = torch.tensor([False, True, False])
    _, metrics, _ = correct(data_types=["video", "image", "video"], demonstration=demonstration)
    assert metrics["mismatch/abs_log_ratio/image"] == (0.0, 0.0)


def test_demonstrations_weigh_one_and_are_not_measured():
    rows, metrics, _ = correct(demonstration=torch.tensor([False, True, False]), reject_token_below=0.2)
    same(rows, [[2, 0.5], [1] * 5, [1.5]])
    assert metrics["mismatch/k3"][1] == 3.0 and metrics["mismatch/rejected"][1] == 2.0


def test_equal_probabilities_change_nothing():
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        rows, metrics, _ = correct([[1.0] * 4, [1.0] * 2, [1.0]], rollout_correction=mode, reject_above=1.001)
        assert rows == [[1.0] * 4, [1.0] * 2, [1.0]]
        assert (
            metrics["mismatch/k3"][0] == metrics["mismatch/weight_changed"][0] == metrics["mismatch/rejected"][0] == 0
        )


def test_unknown_sampler_tokens_are_counted_and_a_nan_of_the_trainer_stays():
    rows = random_rows(1)
    sampled, old = rows["sampled"].clone(), rows["old"].clone()
    sampled[0, 0] = math.nan
    sampled[0, 1] = -math.inf
    old[0, 2] = math.nan
    args = make_args(reject_above=5.0)
    weights, metrics, _ = rollout_correction(old, sampled, rows["mask"], torch.zeros(6, dtype=torch.bool), args)
    assert weights[0, :2].tolist() == [1.0, 1.0]
    assert torch.isnan(weights[0, 2])
    unknown, asked = metrics["mismatch/unknown"]
    assert (unknown.item(), asked.item()) == (2.0, rows["mask"].sum().item())


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_against_a_plain_loop(mode):
    rows = random_rows(2)
    args = make_args(rollout_correction=mode, correction_min=0.5, correction_max=1.6)
    none = torch.zeros(6, dtype=torch.bool)
    weights, _, _ = rollout_correction(rows["old"], rows["sampled"], rows["mask"], none, args)
    assert not weights.requires_grad
    for i in range(6):
        length = int(rows["mask"][i].sum())
        logs = [(rows["old"][i, t] - rows["sampled"][i, t]).item() for t in range(length)]
        for t in range(length):
            w = math.exp(sum(logs) if mode.startswith("sequence") else logs[t])
            if mode.endswith("truncate"):
                w = min(max(w, 0.5), 1.6)
            elif not 0.5 <= w <= 1.6:
                w = 0.0
            assert weights[i, t].item() == pytest.approx(w, rel=1e-5)
