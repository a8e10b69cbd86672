"""Policy losses against hand-computed 3 x 5 cases and TRL's own implementation; cuts of the mini-batch."""

import math

import pytest
import torch

from tests.train.algorithm_cases import make_args, mask_of, random_rows, trl_loss
from train.losses import (
    LOSS_REDUCTIONS,
    POLICY_LOSSES,
    demonstration_loss,
    loss_denominator,
    loss_mask,
    policy_objective,
    reduce_loss,
    value_loss,
)

LENGTHS = [2, 5, 1]  # 3 x 5, ragged


def table(*rows):
    width = max(len(row) for row in rows)
    return torch.tensor([list(row) + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64)


# ---- reduce_loss --------------------------------------------------------------------------------------------------


def test_reductions_by_hand():
    mask = mask_of(LENGTHS)
    values = table([1, 3], [1, 1, 1, 1, 6], [4])
    args = make_args(max_response_tokens=5)
    expected = {"token_mean": 18 / 8, "sequence_mean": (2 + 2 + 4) / 3, "fixed_length": 18 / 15}
    for reduction, value in expected.items():
        denominator = loss_denominator(mask, reduction, args)
        assert reduce_loss(values, mask, reduction=reduction, denominator=denominator).item() == pytest.approx(value)
    assert loss_denominator(mask, "fixed_length", make_args(loss_length=9)).item() == 27.0


def test_rows_without_tokens_count_nowhere_and_an_empty_mini_batch_gives_zero():
    mask = torch.cat([mask_of([2, 5], 5), torch.zeros(1, 5, dtype=torch.float64)])
    args = make_args()
    assert [loss_denominator(mask, name, args).item() for name in LOSS_REDUCTIONS] == [7.0, 2.0, 10.0]
    nothing = torch.zeros(2, 5, dtype=torch.float64)
    values = torch.ones(2, 5, dtype=torch.float64, requires_grad=True)
    denominator = loss_denominator(nothing, "token_mean", args)
    loss = reduce_loss(values, nothing, reduction="token_mean", denominator=denominator)
    loss.backward()
    assert loss.item() == 0.0 and values.grad.abs().sum() == 0


def test_unknown_reduction_is_refused():
    mask = mask_of(LENGTHS)
    with pytest.raises(ValueError, match=r"token_mean, sequence_mean, fixed_length, got 'mean'"):
        reduce_loss(mask, mask, reduction="mean", denominator=1.0)
    with pytest.raises(ValueError, match="'mean'"):
        loss_denominator(mask, "mean", make_args())


def test_nan_at_a_response_token_reaches_the_loss_and_rubbish_at_padding_does_not():
    mask = mask_of(LENGTHS)
    for name in POLICY_LOSSES:
        args = make_args(clip_low=0.1, clip_high=0.1)
        old = torch.full((3, 5), -1.0, dtype=torch.float64)
        new = torch.where(mask > 0, -1.1, float("inf")).requires_grad_()
        advantages = torch.where(mask > 0, 1.0, float("nan")).double()
        per_token, _ = POLICY_LOSSES[name](new, old, advantages, mask, args)
        loss = reduce_loss(per_token, mask, reduction="token_mean", denominator=8.0)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(new.grad).all(), name
        bad = torch.where(mask > 0, -1.1, 0.0).double()
        bad[0, 1] = math.nan
        per_token, _ = POLICY_LOSSES[name](bad, old, torch.ones_like(old), mask, args)
        assert torch.isnan(reduce_loss(per_token, mask, reduction="token_mean", denominator=8.0)), name


# ---- hand-computed ------------------------------------------------------------------------------------------------


def ratios(*values):
    """Log-probs whose ratio to -1 has the given values."""
    return table(*[[math.log(value) - 1.0 for value in row] for row in values])


OLD = torch.full((3, 5), -1.0, dtype=torch.float64)
RATIOS = ([1.1, 1.5], [0.5, 0.9, 1.0, 1.1, 4.0], [0.5])
SIGNS = torch.tensor([[2.0], [-1.0], [3.0]], dtype=torch.float64).expand(3, 5)


def check(name, expected, **flags):
    mask = mask_of(LENGTHS)
    got, metrics = POLICY_LOSSES[name](ratios(*RATIOS), OLD, SIGNS, mask, make_args(**flags))
    torch.testing.assert_close(got * mask, table(*expected), rtol=1e-12, atol=1e-12)
    return metrics


def test_ppo_clip_by_hand():
    metrics = check("ppo_clip", ([-2.2, -2.4], [0.8, 0.9, 1.0, 1.1, 4.0], [-1.5]), clip_low=0.2, clip_high=0.2)
    # clipped: 1.5 with A > 0 (high), 0.5 with A < 0 (low); 4.0 with A < 0 and 0.5 with A > 0 are not
    assert metrics["policy/clipped_high"][0] == 1 and metrics["policy/clipped_low"][0] == 1
    assert metrics["policy/clipped_high"][1] == 8
    assert metrics["policy/ratio"][0].item() == pytest.approx(1.1 + 1.5 + 0.5 + 0.9 + 1.0 + 1.1 + 4.0 + 0.5)


def test_clip_higher_and_dual_clip_by_hand():
    check("ppo_clip", ([-2.2, -2.56], [0.7, 0.9, 1.0, 1.1, 3.0], [-1.5]), clip_low=0.3, clip_high=0.28, clip_dual=3.0)


def test_cispo_by_hand():
    expected = [[-2.0 * min(r, 1.3) * (math.log(r) - 1) for r in RATIOS[0]],
                [1.0 * min(r, 1.3) * (math.log(r) - 1) for r in RATIOS[1]],
                [-3.0 * 0.5 * (math.log(0.5) - 1)]]  # fmt: skip
    check("cispo", expected, clip_low=1.0, clip_high=0.3)


def test_sapo_by_hand():
    def gate(r, tau):
        return 4 / tau / (1 + math.exp(-tau * (r - 1)))

    negative = [gate(r, 1.05) for r in RATIOS[1]]
    check("sapo", ([-2 * gate(1.1, 1.0), -2 * gate(1.5, 1.0)], negative, [-3 * gate(0.5, 1.0)]))


def test_gspo_by_hand():
    s = [math.sqrt(1.1 * 1.5), (0.5 * 0.9 * 1.0 * 1.1 * 4.0) ** 0.2, 0.5]  # geometric means: 1.2845, 1.1464, 0.5
    expected = ([-2 * 1.05] * 2, [s[1]] * 5, [-3 * 0.5])
    for name in ("gspo", "gspo_token"):
        check(name, expected, clip_low=0.05, clip_high=0.05)


def test_reinforce_by_hand():
    check("reinforce", ([-2 * (math.log(1.1) - 1), -2 * (math.log(1.5) - 1)],
                        [math.log(r) - 1 for r in RATIOS[1]], [-3 * (math.log(0.5) - 1)]))  # fmt: skip


def test_all_losses_have_the_policy_gradient_at_ratio_one():
    """Before the first update every surrogate has the gradient -A grad log pi (times a mean for the sequence ratio)."""
    mask = mask_of(LENGTHS)
    for name in POLICY_LOSSES:
        new = OLD.clone().requires_grad_()
        per_token, _ = POLICY_LOSSES[name](new, OLD, SIGNS, mask, make_args(clip_low=0.2, clip_high=0.2))
        reduce_loss(per_token, mask, reduction="sequence_mean", denominator=3.0).backward()
        expected = -SIGNS * mask / torch.tensor(LENGTHS).view(-1, 1) / 3
        torch.testing.assert_close(new.grad, expected, rtol=1e-12, atol=1e-12, msg=name)


def test_gspo_token_equals_gspo_in_value_and_gradient_for_equal_advantages():
    rows = random_rows(3)
    args = make_args(clip_low=0.1, clip_high=0.1)
    results = []
    for name in ("gspo", "gspo_token"):
        new = rows["new"].clone().requires_grad_()
        per_token, _ = POLICY_LOSSES[name](new, rows["old"], rows["advantages"], rows["mask"], args)
        loss = reduce_loss(per_token, rows["mask"], reduction="sequence_mean", denominator=6.0)
        loss.backward()
        results.append((loss.detach(), new.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_gspo_token_with_advantages_of_its_own_for_every_token():
    """Eq. 13 and 14 as loops: value -min(s A_t, clip(s) A_t); the gradient of an unclipped token is -s A_t, else 0."""
    rows = random_rows(21)
    advantages = torch.randn(rows["mask"].shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    new = rows["new"].clone().requires_grad_()
    per_token, _ = POLICY_LOSSES["gspo_token"](
        new, rows["old"], advantages, rows["mask"], make_args(clip_low=0.1, clip_high=0.15)
    )
    (gradient,) = torch.autograd.grad((per_token * rows["mask"]).sum(), new)
    clipped = 0
    for i in range(6):
        length = int(rows["mask"][i].sum())
        s = math.exp(sum((rows["new"][i, t] - rows["old"][i, t]).item() for t in range(length)) / length)
        for t in range(length):
            a = advantages[i, t].item()
            inside = min(max(s, 0.9), 1.15)
            assert per_token[i, t].item() == pytest.approx(-min(s * a, inside * a), rel=1e-12)
            acts = s * a > inside * a
            assert gradient[i, t].item() == pytest.approx(0.0 if acts else -s * a, rel=1e-12)
            clipped += acts
    assert 0 < clipped < rows["mask"].sum()


def test_ratio_of_any_size_stays_finite():
    mask = mask_of([3])
    new = torch.tensor([[-0.1, -0.1, -0.1]], requires_grad=True)
    old = torch.tensor([[-500.0, -30.0, -0.1]])
    for name in POLICY_LOSSES:
        args = make_args(clip_low=0.2, clip_high=0.2)
        loss = POLICY_LOSSES[name](new, old, torch.full((1, 3), -1.0), mask.float(), args)[0].sum()
        (gradient,) = torch.autograd.grad(loss, new)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all(), name


# ---- TRL ----------------------------------------------------------------------------------------------------------

TRL = [
    ("ppo_clip", "sequence_mean", {"clip_low": 0.2, "clip_high": 0.28},
     {"loss_type": "grpo", "low": 0.2, "high": 0.28}),
    ("ppo_clip", "token_mean", {"clip_low": 0.2, "clip_high": 0.28}, {"loss_type": "dapo", "low": 0.2, "high": 0.28}),
    ("ppo_clip", "token_mean", {"clip_low": 0.1, "clip_high": 0.3}, {"loss_type": "bnpo", "low": 0.1, "high": 0.3}),
    ("ppo_clip", "token_mean", {"clip_low": 0.2, "clip_high": 0.28, "clip_dual": 1.5},
     {"loss_type": "dapo", "low": 0.2, "high": 0.28, "delta": 1.5}),  # dual clip is TRL's delta
    ("ppo_clip", "fixed_length", {"loss_length": 11}, {"loss_type": "dr_grpo"}),
    ("gspo", "sequence_mean", {"clip_low": 0.03, "clip_high": 0.04},
     {"loss_type": "grpo", "level": "sequence", "low": 0.03, "high": 0.04}),
    ("cispo", "token_mean", {"clip_low": 1.0, "clip_high": 0.5}, {"loss_type": "cispo", "high": 1.5}),
    # TRL keeps the temperatures in float32: values that float32 holds exactly
    ("sapo", "sequence_mean", {"sapo_tau_positive": 1.25, "sapo_tau_negative": 1.75},
     {"loss_type": "sapo", "sapo": (1.25, 1.75)}),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "reduction", "flags", "trl"), TRL)
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_equal_trl(loss, reduction, flags, trl, seed):
    """Value and gradient, with KL (k3) in the loss and sampler weights, in float64."""
    rows = random_rows(seed, rows=5, width=8)
    weights = (rows["old"] - rows["sampled"]).exp().clamp(max=1.2) * rows["mask"] + (1 - rows["mask"])
    args = make_args(policy_loss=loss, loss_reduction=reduction, kl_in="loss", kl_coef=0.07, **flags)
    ours, theirs = rows["new"].clone().requires_grad_(), rows["new"].clone().requires_grad_()
    mine, _ = policy_objective(
        ours,
        None,
        old_logprobs=rows["old"],
        ref_logprobs=rows["ref"],
        advantages=rows["advantages"],
        mask=rows["mask"],
        is_demonstration=torch.zeros(5, dtype=torch.bool),
        weights=weights,
        denominator=loss_denominator(rows["mask"], reduction, args),
        kl_coef=0.07,
        args=args,
    )
    other = trl_loss({**rows, "leaf": theirs}, beta=0.07, weights=weights, **trl)
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    gradient = torch.autograd.grad(other, theirs)[0]
    torch.testing.assert_close(torch.autograd.grad(mine, ours)[0], gradient * rows["mask"], rtol=1e-10, atol=1e-12)
    assert gradient.abs().max() > 1e-3


def test_entropy_bonus_equals_trl():
    rows = random_rows(5)
    args = make_args(loss_reduction="token_mean", entropy_coef=0.03)
    rows["advantages"] *= 0
    mine, metrics = policy_objective(
        rows["new"],
        rows["entropy"],
        old_logprobs=rows["old"],
        ref_logprobs=None,
        advantages=rows["advantages"],
        mask=rows["mask"],
        is_demonstration=torch.zeros(6, dtype=torch.bool),
        weights=None,
        denominator=rows["mask"].sum(),
        kl_coef=0.0,
        args=args,
    )
    torch.testing.assert_close(mine, trl_loss(rows, loss_type="dapo", entropy_coef=0.03), rtol=1e-12, atol=1e-12)
    total, count = metrics["policy/entropy"]
    assert mine.item() == pytest.approx(-0.03 * total.item() / count.item())


# ---- demonstrations, mask, critic ---------------------------------------------------------------------------------


def test_luffy_by_hand():
    """A = 2, gamma 0.1: pi = 0.9 -> -2 * 0.9 / 1.0, pi = 0.1 -> -1; gradient of the first -2 pi gamma / (pi + gamma)^2."""
    mask = mask_of([2, 5, 1])
    logprobs = torch.full((3, 5), -9.0, dtype=torch.float64)
    logprobs[0, :2] = torch.tensor([0.9, 0.1]).double().log()
    logprobs.requires_grad_()
    base = torch.full((3, 5), 7.0, dtype=torch.float64)
    demonstration = torch.tensor([True, False, False])
    advantages = torch.full((3, 5), 2.0, dtype=torch.float64)
    got, metrics = demonstration_loss(base, logprobs, advantages, mask, demonstration, make_args(luffy_gamma=0.1))
    assert got[0, :2].tolist() == pytest.approx([-1.8, -1.0])
    assert (got[1:] == 7.0).all()
    (gradient,) = torch.autograd.grad((got * mask).sum(), logprobs)
    assert gradient[0, :2].tolist() == pytest.approx([-2 * 0.9 * 0.1 / 1.0**2, -2 * 0.1 * 0.1 / 0.2**2])
    total, count = metrics["demonstration/probability"]
    assert (total.item(), count.item()) == (pytest.approx(1.0), 2.0)
    args = make_args(demonstration_loss="plain")
    plain, _ = demonstration_loss(base, logprobs, advantages, mask, demonstration, args)
    assert torch.equal(plain, base)


def test_mixed_policy_objective_against_the_authors_formula_as_loops():
    """Ragged rows, the last two demonstrations: sum over tokens of -A log pi, or -A pi / (pi + gamma), over B * L."""
    rows = random_rows(31, rows=5)
    demonstration = torch.tensor([False, False, False, True, True])
    args = make_args(policy_loss="reinforce", loss_reduction="fixed_length", loss_length=7, luffy_gamma=0.1)
    new = rows["new"].clone().requires_grad_()
    loss, _ = policy_objective(
        new, None, old_logprobs=None, ref_logprobs=None, advantages=rows["advantages"], mask=rows["mask"],
        is_demonstration=demonstration, weights=None,
        denominator=loss_denominator(rows["mask"], "fixed_length", args), kl_coef=0.0, args=args,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, new)
    total = 0.0
    for i in range(5):
        a = rows["advantages"][i, 0].item()
        for t in range(int(rows["mask"][i].sum())):
            log_p = rows["new"][i, t].item()
            p = math.exp(log_p)
            total += -a * (p / (p + 0.1) if i >= 3 else log_p)
            slope = -a * (0.1 * p / (p + 0.1) ** 2 if i >= 3 else 1.0)
            assert gradient[i, t].item() == pytest.approx(slope / (5 * 7), rel=1e-12)
    assert loss.item() == pytest.approx(total / (5 * 7), rel=1e-12)


def test_luffy_rows_ignore_the_sampler_weights():
    """A demonstration was never sampled; whatever weight its row carries must not scale its loss."""
    rows = random_rows(8)
    args = make_args(loss_reduction="token_mean")
    common = {
        "old_logprobs": rows["old"], "ref_logprobs": None, "advantages": rows["advantages"], "mask": rows["mask"],
        "is_demonstration": torch.tensor([True] * 6), "denominator": rows["mask"].sum(), "kl_coef": 0.0, "args": args,
    }  # fmt: skip
    first, _ = policy_objective(rows["new"], None, weights=None, **common)
    second, _ = policy_objective(rows["new"], None, weights=torch.zeros_like(rows["mask"]), **common)
    assert first.item() == second.item() != 0.0


def test_masking_truncated_responses_spares_cut_demonstrations():
    mask = mask_of([2, 5, 5])
    truncated = torch.tensor([False, True, True])
    demonstration = torch.tensor([False, False, True])
    assert torch.equal(loss_mask(mask, truncated, demonstration, make_args()), mask)
    masked = loss_mask(mask, truncated, demonstration, make_args(mask_truncated=True))
    assert masked.sum(dim=1).tolist() == [2.0, 0.0, 5.0]


def test_value_loss_by_hand():
    """c = 0.5; (v, v_old, R) = (2, 1, 3) -> max(1, (1.5 - 3)^2) / 2; (1.2, 1, 0) inside the range -> 1.44 / 2."""
    mask = mask_of([2, 1, 3])
    values = table([2.0, 1.2], [4.0], [0.0, 0.0, 1.0])
    old = table([1.0, 1.0], [1.0], [0.0, 0.0, 1.0])
    returns = table([3.0, 0.0], [0.0], [0.0, 1.0, 1.0])
    got, metrics = value_loss(values, old, returns, mask, make_args(critic_clip=0.5))
    expected = table([2.25 / 2, 1.44 / 2], [16 / 2], [0.0, 0.5, 0.0])
    torch.testing.assert_close(got, expected)
    assert metrics["critic/clipped"][0] == 1 and metrics["critic/clipped"][1] == 6
    plain, _ = value_loss(values, old, returns, mask, make_args(critic_clip=0.0))
    torch.testing.assert_close(plain, table([0.5, 0.72], [8.0], [0.0, 0.5, 0.0]))


# ---- cutting the mini-batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
@pytest.mark.parametrize("loss", list(POLICY_LOSSES))
def test_cutting_into_micro_batches_and_ranks_changes_nothing(loss, reduction):
    """A small network scores 10 ragged rows; 1, 2, 5 micro-batches and 1, 2, 3 ranks give one gradient, per tensor."""
    torch.manual_seed(0)
    rows = random_rows(11, rows=10, width=6)
    features = torch.randn(10, 6, 4, dtype=torch.float64)
    demonstration = torch.tensor([False] * 9 + [True])
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(dtype)
        torch.manual_seed(1)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        args = make_args(
            policy_loss=loss, loss_reduction=reduction, entropy_coef=0.01, kl_in="loss", kl_coef=0.1,
            clip_low=0.2, clip_high=0.28, loss_length=6,
        )  # fmt: skip
        mask = rows["mask"].to(dtype)

        def gradient(cuts, network=network, args=args, mask=mask, dtype=dtype):
            """Sum over pieces of the gradient; every piece sees only its own rows and the global denominator."""
            denominator = sum(loss_denominator(mask[piece], args.loss_reduction, args) for piece in cuts)
            network.zero_grad()
            for piece in cuts:
                width = int(mask[piece].sum(dim=1).max())  # a micro-batch is only as wide as its longest response
                piece_mask = mask[piece][:, :width]
                scores = network(features[piece][:, :width].to(dtype)).squeeze(-1)
                share, _ = policy_objective(
                    torch.nn.functional.logsigmoid(scores),
                    torch.nn.functional.softplus(-scores),
                    old_logprobs=rows["old"][piece][:, :width].to(dtype),
                    ref_logprobs=rows["ref"][piece][:, :width].to(dtype),
                    advantages=rows["advantages"][piece][:, :width].to(dtype),
                    mask=piece_mask,
                    is_demonstration=demonstration[piece],
                    weights=None,
                    denominator=denominator,
                    kl_coef=0.1,
                    args=args,
                )
                share.backward()
            return [parameter.grad.clone() for parameter in network.parameters()]

        whole = gradient([slice(0, 10)])
        for cuts in (
            [slice(0, 5), slice(5, 10)],
            [slice(i, i + 2) for i in range(0, 10, 2)],
            [slice(0, 3), slice(3, 4), slice(4, 10)],
            [slice(i, i + 1) for i in range(10)],
        ):
            for one, other in zip(whole, gradient(cuts), strict=True):
                assert (one - other).norm() / one.norm() <= limit, (dtype, len(cuts))
