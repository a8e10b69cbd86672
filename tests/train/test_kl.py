"""KL estimators: values by hand, the exact KL of a small vocabulary, gradients, extremes."""

import math

import pytest
import torch

from tests.train.algorithm_cases import make_args, random_rows, trl_loss
from train.losses import KL_ESTIMATORS, loss_denominator, policy_objective

LOGITS = torch.tensor([0.3, -0.4, 1.1, 0.0], dtype=torch.float64)
REF = torch.tensor([0.1, 0.5, 0.9, -0.7], dtype=torch.float64).log_softmax(0)


def test_values_by_hand():
    """d = log pi - log ref = 0.5."""
    policy, ref = torch.tensor([[-1.0]]).double(), torch.tensor([[-1.5]]).double()
    expected = {"k1": 0.5, "k2": 0.125, "mse": 0.125, "k3": math.exp(-0.5) - 1 + 0.5, "abs": 0.5}
    assert set(expected) == set(KL_ESTIMATORS)
    for name, value in expected.items():
        assert KL_ESTIMATORS[name](policy, ref).item() == pytest.approx(value, rel=1e-12)
        assert KL_ESTIMATORS[name](policy, policy).item() == 0.0


def test_k1_and_k3_are_unbiased_and_k3_never_negative():
    """Expectation over the whole vocabulary of 4, token by token."""
    policy = LOGITS.log_softmax(0)
    exact = (policy.exp() * (policy - REF)).sum().item()
    for name in ("k1", "k3"):
        assert (policy.exp() * KL_ESTIMATORS[name](policy, REF)).sum().item() == pytest.approx(exact, rel=1e-12)
    assert (KL_ESTIMATORS["k3"](policy, REF) >= 0).all()
    assert (KL_ESTIMATORS["k1"](policy, REF) < 0).any()


def test_expected_gradients():
    """As a loss under samples of the policy: k2 has the gradient of the KL, k1 has gradient 0, k3 that of KL(ref, pi)."""
    logits = LOGITS.clone().requires_grad_()
    policy = logits.log_softmax(0)
    weights = policy.detach().exp()

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    forward = gradient((policy.exp() * (policy - REF)).sum())
    backward = gradient((REF.exp() * (REF - policy)).sum())
    torch.testing.assert_close(gradient((weights * KL_ESTIMATORS["k2"](policy, REF)).sum()), forward)
    torch.testing.assert_close(gradient((weights * KL_ESTIMATORS["k3"](policy, REF)).sum()), backward)
    zero = gradient((weights * KL_ESTIMATORS["k1"](policy, REF)).sum())
    torch.testing.assert_close(zero, torch.zeros_like(zero), atol=1e-15, rtol=0)


@pytest.mark.parametrize("name", list(KL_ESTIMATORS))
def test_extremes_are_finite_and_nan_shows(name):
    policy = torch.tensor([[-1000.0, -0.1]], requires_grad=True)
    ref = torch.tensor([[-0.1, -1000.0]])
    value = KL_ESTIMATORS[name](policy, ref)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(policy.grad).all()
    assert torch.isnan(KL_ESTIMATORS[name](torch.tensor([math.nan]), torch.tensor([0.0]))).all()


def test_kl_in_the_loss_alone_equals_trl_and_its_metric_is_the_token_mean():
    rows = random_rows(9)
    rows["advantages"] *= 0
    args = make_args(loss_reduction="sequence_mean", kl_in="loss", kl_coef=0.3)
    loss, metrics = policy_objective(
        rows["new"],
        None,
        old_logprobs=rows["old"],
        ref_logprobs=rows["ref"],
        advantages=rows["advantages"],
        mask=rows["mask"],
        is_demonstration=torch.zeros(6, dtype=torch.bool),
        weights=None,
        denominator=loss_denominator(rows["mask"], "sequence_mean", args),
        kl_coef=0.3,
        args=args,
    )
    torch.testing.assert_close(loss, trl_loss(rows, loss_type="grpo", beta=0.3), rtol=1e-12, atol=1e-12)
    by_hand = [
        math.exp(ref - new) - 1 - (ref - new)
        for row_new, row_ref, row_mask in zip(rows["new"], rows["ref"], rows["mask"], strict=True)
        for new, ref, inside in zip(row_new.tolist(), row_ref.tolist(), row_mask.tolist(), strict=True)
        if inside
    ]
    total, count = metrics["policy/ref_kl"]
    assert (total / count).item() == pytest.approx(sum(by_hand) / len(by_hand))
