"""Learning-rate schedule by hand; AdamW for bf16 weights against torch's fp32 AdamW."""

import copy
import math

import pytest
import torch

from tests.train.algorithm_cases import make_args
from train.optimizer import (
    OPTIMIZERS,
    AdamWLowPrecision,
    Schedule,
    build_optimizer,
    noise_seed,
    parameter_groups,
    round_stochastically,
)

# ---- schedule -----------------------------------------------------------------------------------------------------


def rates(updates, **flags):
    schedule = Schedule.from_args(make_args(learning_rate=1.0, **flags), updates)
    found = []
    for _ in range(updates):
        found.append(schedule.value())
        schedule.advance()
    return found


def test_schedules_by_hand():
    assert rates(5, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]  # never 0
    assert rates(3) == [1.0, 1.0, 1.0]
    assert rates(6, warmup_steps=2, lr_schedule="linear", lr_min_ratio=0.2) == pytest.approx(
        [0.5, 1.0, 1.0, 0.8, 0.6, 0.4]
    )
    half = 0.5 * (1 + math.cos(math.pi / 4))
    assert rates(5, warmup_steps=1, lr_schedule="cosine") == pytest.approx([1, 1, half, 0.5, 1 - half])


def test_cosine_and_linear_stay_at_the_floor_after_the_end():
    for kind in ("cosine", "linear"):
        schedule = Schedule(1.0, 4, kind=kind, min_ratio=0.1, updates_done=9)
        assert schedule.value() == pytest.approx(0.1)


def test_a_skipped_update_does_not_advance_and_state_comes_back():
    schedule = Schedule.from_args(make_args(learning_rate=1.0, warmup_steps=4), 10)
    schedule.advance()
    assert schedule.value() == schedule.value() == 0.5  # asked twice, nothing applied
    copied = Schedule.from_args(make_args(learning_rate=1.0, warmup_steps=4), 10)
    copied.load_state_dict(schedule.state_dict())
    assert copied == schedule
    with pytest.raises(ValueError, match=r"--lr_schedule must be .* got 'step'"):
        Schedule.from_args(make_args(lr_schedule="step"), 10)


# ---- stochastic rounding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [1.0, 1.0078125])  # an even and an odd fraction: neither tie may be favoured
def test_stochastic_rounding_takes_the_two_neighbours_with_the_right_odds(below):
    """bf16 has 7 fraction bits: a quarter of the way from one number to the next goes up in a quarter of the draws."""
    values = torch.full((40000,), below + 0.25 / 128)
    rounded = round_stochastically(values, torch.Generator().manual_seed(0)).float()
    assert set(rounded.tolist()) == {below, below + 1 / 128}
    share = (rounded > below).float().mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 40000)
    negative = round_stochastically(-values, torch.Generator().manual_seed(0)).float()
    assert torch.equal(negative, -rounded)


def test_stochastic_rounding_keeps_what_bf16_holds_and_what_is_no_number():
    values = torch.tensor([0.0, 1.0, -3.5, math.inf, -math.inf, 2.0**-126])
    assert torch.equal(round_stochastically(values).float(), values)
    assert torch.isnan(round_stochastically(torch.tensor([math.nan]))).all()


# ---- AdamW --------------------------------------------------------------------------------------------------------

SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.02}
STEPS = 120


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return 0.3 + torch.randn(64, 128, generator=generator)


def trained(make, dtype):
    """Weights after STEPS updates with the same gradients, from the same bf16 start, as float32."""
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(99)).to(torch.bfloat16)
    weights = torch.nn.Parameter(start.to(dtype))
    optimizer = make([weights])
    for step in range(STEPS):
        weights.grad = gradients(step).to(torch.bfloat16).to(dtype)
        optimizer.step()
    return start.float(), weights.detach().float(), optimizer


def test_fp32_weights_get_plain_adamw():
    _, expected, _ = trained(lambda p: torch.optim.AdamW(p, **SETTINGS), torch.float32)
    for rounding in ("stochastic", "kahan"):
        _, got, _ = trained(lambda p, r=rounding: AdamWLowPrecision(p, **SETTINGS, rounding=r), torch.float32)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_kahan_follows_fp32_to_a_bf16_rounding_where_plain_bf16_stands_still():
    start, expected, _ = trained(lambda p: torch.optim.AdamW(p, **SETTINGS), torch.float32)
    _, got, optimizer = trained(lambda p: AdamWLowPrecision(p, **SETTINGS, rounding="kahan"), torch.bfloat16)
    ulp = 2.0 ** (expected.abs().clamp(min=1e-3).log2().floor() - 7)
    assert ((got - expected).abs() <= 0.51 * ulp).all()
    (state,) = optimizer.state.values()
    exact = got + state["residue"].float()
    assert (exact - expected).abs().max() < (got - expected).abs().max() / 20  # the buffer holds what bf16 cannot
    _, plain, _ = trained(lambda p: torch.optim.AdamW(p, **SETTINGS), torch.bfloat16)
    big = start.abs() > 0.5  # half a rounding unit there is above the step
    assert (plain == start)[big].float().mean() > 0.9
    assert (got != start)[big].float().mean() > 0.5


def test_stochastic_rounding_is_right_on_average():
    start, expected, _ = trained(lambda p: torch.optim.AdamW(p, **SETTINGS), torch.float32)
    _, got, _ = trained(lambda p: AdamWLowPrecision(p, **SETTINGS, seed=3), torch.bfloat16)
    moved = (expected - start).mean()
    error = (got - expected).mean()
    spread = (got - expected).std() / math.sqrt(got.numel())
    assert abs(error) < 5 * spread and spread < 0.05 * abs(moved)


def test_noise_is_a_function_of_seed_and_update_so_that_resuming_changes_nothing():
    whole = trained(lambda p: AdamWLowPrecision(p, **SETTINGS, seed=5), torch.bfloat16)[1]
    again = trained(lambda p: AdamWLowPrecision(p, **SETTINGS, seed=5), torch.bfloat16)[1]
    other = trained(lambda p: AdamWLowPrecision(p, **SETTINGS, seed=6), torch.bfloat16)[1]
    assert torch.equal(whole, again) and not torch.equal(whole, other)
    for rounding in ("stochastic", "kahan"):
        weights = torch.nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).bfloat16())
        first = AdamWLowPrecision([weights], **SETTINGS, rounding=rounding, seed=5)

        def update(optimizer, parameter, step):
            parameter.grad = torch.full((3, 5), 0.1 * (step + 1), dtype=torch.bfloat16)
            optimizer.step()

        for step in range(3):
            update(first, weights, step)
        resumed = torch.nn.Parameter(weights.detach().clone())
        second = AdamWLowPrecision([resumed], **SETTINGS, rounding=rounding, seed=5)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert second.state[resumed]["exp_avg"].dtype == torch.float32
        for step in range(3, 6):
            update(first, weights, step)
            update(second, resumed, step)
        assert torch.equal(weights, resumed)


def test_tensors_shown_one_at_a_time_get_noise_of_their_own():
    """As ZeRO-3 steps its sub-groups: each alone in its group, one call each."""

    def after_one_update(one_by_one):
        tensors = [torch.nn.Parameter(torch.ones(512, dtype=torch.bfloat16)) for _ in range(3)]
        optimizer = AdamWLowPrecision(tensors, **{**SETTINGS, "lr": 1e-3}, seed=5)
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor)
        for shown in [[tensor] for tensor in tensors] if one_by_one else [tensors]:
            optimizer.param_groups[0]["params"] = shown
            optimizer.step()
        return tensors

    first, second, third = after_one_update(one_by_one=True)
    for one, other in ((first, second), (first, third), (second, third)):
        assert 0.1 < (one != other).float().mean() < 0.9
    for alone, together in zip((first, second, third), after_one_update(one_by_one=False), strict=True):
        assert torch.equal(alone, together)


def test_noise_seeds_differ_in_the_bits_the_cpu_generator_reads():
    """Every (seed of a rank, update, tensor) of a long run: as 32-bit numbers, about n^2 / 2^33 = 4 of 180 000 meet."""
    seeds = {noise_seed(s, u, t) & 0xFFFFFFFF for s in range(8) for u in range(1, 1501) for t in range(15)}
    assert len(seeds) > 180_000 - 20
    assert noise_seed(1, 23, 4) != noise_seed(12, 3, 4)


def test_long_flat_shards_are_worked_on_in_pieces(monkeypatch):
    import train.optimizer

    whole = trained(lambda p: AdamWLowPrecision(p, **SETTINGS, rounding="kahan"), torch.bfloat16)[1]
    monkeypatch.setattr(train.optimizer, "CHUNK", 1000)
    pieces = trained(lambda p: AdamWLowPrecision(p, **SETTINGS, rounding="kahan"), torch.bfloat16)[1]
    assert torch.equal(whole, pieces)


def test_build_optimizer_decays_matrices_only_and_leaves_frozen_ones_out():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 2))
    model[2].weight.requires_grad_(False)
    decay, plain = parameter_groups(model.named_parameters(), 0.1)
    assert [tuple(p.shape) for p in decay["params"]] == [(5, 3)] and decay["weight_decay"] == 0.1
    assert [tuple(p.shape) for p in plain["params"]] == [(5,), (5,), (5,), (2,)] and plain["weight_decay"] == 0.0
    for name in OPTIMIZERS:
        args = make_args(optimizer=name, learning_rate=3e-5, adam_betas=[0.8, 0.95], adam_eps=1e-6, weight_decay=0.1)
        group = build_optimizer(model.named_parameters(), args).param_groups[0]
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (3e-5, (0.8, 0.95), 1e-6)
    with pytest.raises(ValueError, match=r"--optimizer must be one of .* got 'sgd'"):
        build_optimizer(model.named_parameters(), make_args(optimizer="sgd"))
    with pytest.raises(ValueError, match="nothing to optimise"):
        build_optimizer([], make_args())
