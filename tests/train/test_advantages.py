"""Advantage estimators: hand-computed ragged cases, plain loops written from the papers, ranks, dead groups, NaN."""

import itertools
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch

from tests.train.algorithm_cases import make_args, make_batch, mask_of
from train.advantages import ADVANTAGES, AlgorithmState, sequence_rewards, token_rewards
from train.algorithm_flags import NEEDS_GROUP

ROWS = [1.0, 0.0, 0.5, 2.0, 2.0, 0.5]  # two groups of three
LENGTHS = [2, 5, 1, 3, 4, 2]


def run(name, rewards=None, lengths=None, *, state=None, all_reduce_sum=None, fields=None, **flags):
    rewards = ROWS if rewards is None else rewards
    lengths = LENGTHS[: len(rewards)] if lengths is None else lengths
    args = make_args(advantage=name, advantage_eps=1e-12, **flags)
    batch = make_batch(rewards, lengths, **(fields or {}))
    more = {"all_reduce_sum": all_reduce_sum} if all_reduce_sum else {}
    advantages, returns = ADVANTAGES[name](batch, args, state=state, **more)
    assert advantages.shape == returns.shape == batch.response_mask.shape
    assert (advantages[batch.response_mask == 0] == 0).all()
    return advantages, returns, batch.response_mask


def per_row(name, *a, **k):
    """(B,) list: the value on the first token, after a check that it is the same on every response token."""
    advantages, returns, mask = run(name, *a, **k)
    torch.testing.assert_close(advantages, advantages[:, :1] * mask, rtol=0, atol=0)
    assert torch.equal(advantages, returns)
    return advantages[:, 0].tolist()


def close(got, expected):
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-9)


# ---- by hand and by loops -----------------------------------------------------------------------------------------


def test_grpo_by_hand():
    """Group 1: mean 0.5, std 0.5 -> 1, -1, 0. Group 2: mean 1.5, std sqrt(0.75)."""
    close(per_row("grpo"), [1, -1, 0, 0.5 / math.sqrt(0.75), 0.5 / math.sqrt(0.75), -1 / math.sqrt(0.75)])


def test_grpo_of_the_design_page():
    got = per_row("grpo", [1, 0, 0, 1], [1, 2, 3, 1], group_size=4)
    assert [round(value, 2) for value in got] == [0.87, -0.87, -0.87, 0.87]


def test_grpo_with_the_std_of_the_batch():
    std = statistics.stdev(ROWS)
    close(per_row("grpo", advantage_std="batch"), [0.5 / std, -0.5 / std, 0, 0.5 / std, 0.5 / std, -1 / std])


def test_dr_grpo_by_hand():
    for flags in ({}, {"advantage_std": "batch"}):
        close(per_row("dr_grpo", **flags), [0.5, -0.5, 0, 0.5, 0.5, -1])
    close(per_row("grpo", advantage_std="none"), [0.5, -0.5, 0, 0.5, 0.5, -1])


def test_rloo_by_hand():
    close(per_row("rloo"), [1 - 0.25, 0 - 0.75, 0, 2 - 1.25, 2 - 1.25, 0.5 - 2])


def test_remax_by_hand_also_with_one_response():
    close(per_row("remax", fields={"baseline_rewards": torch.tensor([0.5, 2.0])}), [0.5, -0.5, 0, 0, 0, -1.5])
    one = per_row("remax", [1.0, 0.25], [3, 2], group_size=1, fields={"baseline_rewards": torch.tensor([0.0, 1.0])})
    close(one, [1.0, -0.75])
    for wrong in (None, torch.tensor([1.0])):
        with pytest.raises(ValueError, match="one greedy reward per prompt: 2 prompts"):
            run("remax", fields={"baseline_rewards": wrong})


def test_opo_by_hand():
    """Baselines: (2*1 + 5*0 + 1*0.5) / 8 = 0.3125 and (3*2 + 4*2 + 2*0.5) / 9 = 5/3."""
    close(per_row("opo"), [0.6875, -0.3125, 0.1875, 1 / 3, 1 / 3, 0.5 - 5 / 3])


def test_pass_at_k_of_the_whole_group_is_best_minus_second():
    close(per_row("pass_at_k", [0.2, 1.0, 0.7], advantage_std="none"), [0, 0.3, 0])
    close(per_row("pass_at_k", [1.0, 1.0, 0.7], advantage_std="none"), [0, 0, 0])
    std = statistics.stdev([0.2, 1.0, 0.7])
    close(per_row("pass_at_k", [0.2, 1.0, 0.7]), [0, 0.3 / std, 0])


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_pass_at_k_equals_the_mean_over_all_subsets(k):
    rewards = [0.3, 0.9, 0.3, 0.1, 0.6]
    expected = []
    for i in range(5):
        gains = []
        for others in itertools.combinations([j for j in range(5) if j != i], k - 1):
            best = max(rewards[j] for j in others)
            gains.append(max(best, rewards[i]) - best)
        expected.append(sum(gains) / len(gains))
    close(per_row("pass_at_k", rewards, [1, 2, 3, 4, 5], group_size=5, pass_k=k, advantage_std="none"), expected)


@pytest.mark.parametrize("k", [1, 4])
def test_pass_at_k_refuses_impossible_k(k):
    with pytest.raises(ValueError, match=f"--pass_k must be between 2 and --group_size 3, got {k}"):
        run("pass_at_k", pass_k=k)


def loop_gdpo(parts, weights, group):
    """From the paper: normalise each part in its group, add with weights, normalise over the batch."""
    rows = len(parts[0])
    total = [0.0] * rows
    for part, weight in zip(parts, weights, strict=True):
        for start in range(0, rows, group):
            values = part[start : start + group]
            if max(values) == min(values):
                continue
            mean, std = statistics.mean(values), statistics.stdev(values)
            for i, value in enumerate(values):
                total[start + i] += weight * (value - mean) / std
    mean, std = statistics.mean(total), statistics.stdev(total)
    return [(value - mean) / std for value in total]


def test_gdpo_against_the_loop_and_dead_groups():
    accuracy = [1, 0, 0, 1, 1, 1, 0.5, 0.5, 0.5]
    style = [0, 1, 1, 1, 0, 0, 1, 1, 1]
    parts = {"accuracy": torch.tensor(accuracy).double(), "format": torch.tensor(style).double()}
    got = per_row("gdpo", [0.0] * 9, [9, 1, 2, 3, 4, 2, 8, 1, 5], fields={"reward_parts": parts},
                  gdpo_rewards=["accuracy=2", "format=0.5"])  # fmt: skip
    close(got, loop_gdpo([accuracy, style], [2, 0.5], 3))
    assert got[6:] == [0.0, 0.0, 0.0]  # exactly: neither part differs in the third group, whatever the lengths
    with pytest.raises(ValueError, match="names 'style', but the responses carry these reward parts: accuracy, format"):
        run("gdpo", [0.0] * 9, [1] * 9, fields={"reward_parts": parts}, gdpo_rewards=["style"])


def test_reinforce_pp_against_the_loop():
    gamma = 0.9
    args = make_args(advantage="reinforce_pp", gamma=gamma, kl_in="reward", kl_coef=0.1, kl_estimator="k1")
    generator = torch.Generator().manual_seed(0)
    old, ref = (-torch.rand(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    batch = make_batch(ROWS, LENGTHS, old_logprobs=old, ref_logprobs=ref)
    advantages, returns = ADVANTAGES["reinforce_pp"](batch, args)
    expected, flat = [], []
    for i, length in enumerate(LENGTHS):
        rewards = [-0.1 * (old[i, t] - ref[i, t]).item() for t in range(length)]
        rewards[-1] += ROWS[i]
        row = [sum(gamma ** (s - t) * rewards[s] for s in range(t, length)) for t in range(length)]
        expected.append(row)
        flat += row
    mean, std = statistics.mean(flat), statistics.stdev(flat)
    for i, row in enumerate(expected):
        close(returns[i, : len(row)].tolist(), row)
        close(advantages[i, : len(row)].tolist(), [(value - mean) / (std + 1e-6) for value in row])


def test_reinforce_pp_baseline_by_hand_and_dead_groups():
    centred = [0.5, -0.5, 0, 0.5, 0.5, -1]
    std = statistics.stdev(centred)
    close(per_row("reinforce_pp_baseline"), [value / std for value in centred])
    got = per_row("reinforce_pp_baseline", [1, 0, 0, 0.9, 0.9, 0.9], [1, 1, 5, 5, 5, 1])
    assert got[3:] == [0.0, 0.0, 0.0]


def loop_gae(rewards, values, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, written as the double sum."""
    n = len(rewards)
    following = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("whiten", [False, True])
def test_gae_against_the_double_sum(whiten):
    gamma, lam = 0.95, 0.8
    values = torch.randn(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values[mask_of(LENGTHS) == 0] = 99.0  # padding never counts
    advantages, returns, _ = run("gae", fields={"values": values}, gamma=gamma, lam=lam, whiten_gae=whiten)
    rows = []
    for i, length in enumerate(LENGTHS):
        rewards = [0.0] * (length - 1) + [ROWS[i]]
        rows.append(loop_gae(rewards, values[i, :length].tolist(), gamma, lam))
        close(returns[i, :length].tolist(), [a + v for a, v in zip(rows[-1], values[i, :length].tolist(), strict=True)])
    flat = list(itertools.chain(*rows))
    mean, std = (statistics.mean(flat), statistics.stdev(flat)) if whiten else (0.0, 1.0)
    for i, row in enumerate(rows):
        close(advantages[i, : len(row)].tolist(), [(value - mean) / std for value in row])
    with pytest.raises(ValueError, match=r"batch\.values"):
        run("gae")


def test_gae_passes_over_holes_in_the_mask():
    """Tokens masked inside a response (tool output) carry the value and the advantage of the next real token back."""
    mask = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    batch = make_batch([1.0], [3], values=torch.tensor([[0.5, 7.0, 0.25]]))
    batch.response_mask = mask
    args = make_args(advantage="gae", gamma=0.9, lam=0.5, whiten_gae=False, group_size=1)
    advantages, _ = ADVANTAGES["gae"](batch, args)
    close(advantages[0].tolist(), [0.9 * 0.25 - 0.5 + 0.45 * 0.75, 0.0, 0.75])


def test_ema_grpo_over_two_steps_by_hand():
    state = AlgorithmState()
    types = ["math"] * 3 + ["ocr"] * 3
    first = per_row("ema_grpo", state=state, fields={"problem_types": types}, ema_decay=0.9, ema_guard=50.0)
    sigma = {"math": statistics.pstdev(ROWS[:3]), "ocr": statistics.pstdev(ROWS[3:])}
    close(first, [0.5 / sigma["math"], -0.5 / sigma["math"], 0,
                  0.5 / sigma["ocr"], 0.5 / sigma["ocr"], -1 / sigma["ocr"]])  # fmt: skip
    again = per_row("ema_grpo", [0, 0, 1], state=state, fields={"problem_types": ["math"] * 3}, ema_decay=0.9)
    m1, m2 = 0.9 * 0.5 + 0.1 / 3, 0.9 * (1.25 / 3) + 0.1 / 3
    scale = math.sqrt(m2 - m1**2)
    close(again, [-1 / 3 / scale, -1 / 3 / scale, 2 / 3 / scale])
    copy = AlgorithmState()
    copy.load_state_dict(state.state_dict())
    assert copy == state and state.reward_moments["ocr"] == pytest.approx((1.5, 8.25 / 3))


def test_ema_grpo_guard_falls_back_to_the_groups_own_std():
    state = AlgorithmState(reward_moments={"math": (0.0, 1e-8)})
    got = per_row("ema_grpo", [1, 0, 0], state=state, fields={"problem_types": ["math"] * 3}, ema_decay=0.999999)
    std = statistics.pstdev([1, 0, 0])
    close(got, [2 / 3 / std, -1 / 3 / std, -1 / 3 / std])
    with pytest.raises(ValueError, match="AlgorithmState"):
        run("ema_grpo", fields={"problem_types": ["math"] * 6})


# ---- what holds for all -------------------------------------------------------------------------------------------


def fields_for(name, rows, group_size, generator=None):
    draw = (
        torch.rand(rows, generator=generator, dtype=torch.float64) if generator else torch.full((rows,), 0.5).double()
    )
    return {
        "remax": {"baseline_rewards": draw[::group_size]},
        "gdpo": {"reward_parts": {"accuracy": draw, "format": draw.flip(0)}},
        "gae": {"values": draw.view(-1, 1).expand(rows, 5).clone()},
        "ema_grpo": {"problem_types": [["math", "ocr"][(i // group_size) % 2] for i in range(rows)]},
    }.get(name, {})


@pytest.mark.parametrize("value", [0.1, 0.3, 0.9, 0.95, 1 / 3])
@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name not in ("reinforce_pp", "gae")])
@pytest.mark.parametrize("size", [2, 8, 12])
def test_equal_rewards_give_exactly_zero(name, value, size):
    """In float32, where the seed of rounding noise is: 8 x 0.9 has a mean that is not 0.9."""
    rewards = [value] * size + [float(i) for i in range(size)]
    lengths = [1 + i % 5 for i in range(2 * size)]
    fields = fields_for(name, 2 * size, size)
    if name == "remax":
        fields = {"baseline_rewards": torch.tensor([value, 0.0])}
    if name == "gdpo":
        column = torch.tensor(rewards, dtype=torch.float32)
        fields = {"reward_parts": {"accuracy": column, "format": column}}
    args = make_args(advantage=name, group_size=size)
    batch = make_batch(rewards, lengths, dtype=torch.float32, **fields)
    advantages, _ = ADVANTAGES[name](batch, args, state=AlgorithmState())
    assert (advantages[:size] == 0).all()
    assert advantages[size:].abs().max() > 0.1


@pytest.mark.parametrize("name", ["reinforce_pp", "gdpo", "reinforce_pp_baseline", "grpo"])
def test_a_batch_of_equal_rewards_gives_exactly_zero(name):
    rows = [0.9] * 6
    fields = {"reward_parts": {"accuracy": torch.tensor(rows), "format": torch.tensor(rows)}}
    advantages, _, _ = run(name, rows, fields=fields)
    assert (advantages == 0).all()


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_results_do_not_depend_on_the_number_of_ranks(name):
    """12 rows in 6 groups of 2 on one rank, or 2 + 4 groups on two ranks: the sums of both go into every statistic."""
    generator = torch.Generator().manual_seed(4)
    rewards = torch.rand(12, generator=generator, dtype=torch.float64).tolist()
    rewards[4] = rewards[5]
    lengths = [1 + i % 5 for i in range(12)]
    fields = fields_for(name, 12, 2, generator)
    args = make_args(advantage=name, group_size=2, advantage_std="batch", pass_k=2)
    whole, _ = ADVANTAGES[name](make_batch(rewards, lengths, **fields), args, state=AlgorithmState())

    def part(rows):
        def cut(value):
            if isinstance(value, dict):
                return {key: cut(item) for key, item in value.items()}
            groups = slice(rows.start // 2, rows.stop // 2)
            return value[groups] if len(value) == 6 else value[rows]

        batch = make_batch(rewards[rows], lengths[rows], **{key: cut(value) for key, value in fields.items()})
        batch.response_mask = mask_of(lengths[rows], 5)
        return batch

    batches = [part(slice(0, 4)), part(slice(4, 12))]
    sums: list[list[torch.Tensor]] = [[], []]

    def run_all(known):
        """Each rank runs; its n-th reduction returns the known total, or its own part while totals are being found."""
        results = []
        for rank, batch in enumerate(batches):
            sums[rank] = []

            def reduce(values, rank=rank):
                sums[rank].append(values.clone())
                place = len(sums[rank]) - 1
                return known[place] if place < len(known) else values

            results.append(ADVANTAGES[name](batch, args, state=AlgorithmState(), all_reduce_sum=reduce)[0])
        return results

    known: list[torch.Tensor] = []
    results = run_all(known)
    while len(sums[0]) > len(known):
        known.append(sums[0][len(known)] + sums[1][len(known)])
        results = run_all(known)
    assert len(sums[0]) == len(sums[1])
    torch.testing.assert_close(torch.cat(results), whole, rtol=1e-12, atol=1e-12)
    if name in ("gdpo", "reinforce_pp", "reinforce_pp_baseline", "gae", "ema_grpo", "grpo"):
        assert known  # these look at the whole batch


@pytest.mark.parametrize("name", NEEDS_GROUP)
def test_a_group_of_one_is_refused(name):
    batch = make_batch([1.0, 0.0], [2, 3], reward_parts={"accuracy": torch.ones(2), "format": torch.ones(2)})
    with pytest.raises(ValueError, match=f"--group_size must be >= 2 for --advantage {name}, got 1"):
        ADVANTAGES[name](batch, make_args(advantage=name, group_size=1), state=AlgorithmState())


def test_rows_that_are_no_whole_groups_are_refused():
    with pytest.raises(ValueError, match="5 rows are no whole number of groups of --group_size 3"):
        run("grpo", [1.0] * 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_a_reward_that_is_no_number_is_named(name, bad):
    rewards = [1.0, 0.0, bad, 1.0, 1.0, 0.0]
    fields = fields_for(name, 6, 3)
    if name == "gdpo":
        fields = {"reward_parts": {"accuracy": torch.tensor(rewards), "format": torch.ones(6)}}
    sample = SimpleNamespace(prompt=SimpleNamespace(sample=SimpleNamespace(id="clip-7")))
    batch = make_batch(rewards, LENGTHS, groups=[sample, sample], **fields)
    with pytest.raises(ValueError, match=r"row 2 \(sample clip-7\) is (nan|inf); it must be a finite number"):
        ADVANTAGES[name](batch, make_args(advantage=name), state=AlgorithmState())


# ---- KL in the reward, adaptive coefficient -----------------------------------------------------------------------


def test_kl_in_the_reward_by_hand():
    old = torch.tensor([[-1.0, -2.0, 5.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)
    ref = torch.tensor([[-1.5, -1.0, 9.0], [-1.0, -3.0, -1.5]], dtype=torch.float64)
    batch = make_batch([1.0, 0.5], [2, 3], old_logprobs=old, ref_logprobs=ref)
    args = make_args(kl_in="reward", kl_coef=0.1, kl_estimator="k1")
    close(token_rewards(batch, args)[0].tolist(), [-0.05, 1.1, 0.0])
    close(token_rewards(batch, args)[1].tolist(), [0.0, -0.2, 0.5 - 0.05])
    close(sequence_rewards(batch, args).tolist(), [1.05, 0.25])
    close(sequence_rewards(batch, args, AlgorithmState(kl_coef=1.0)).tolist(), [1.5, -2.0])
    batch.ref_logprobs = None
    with pytest.raises(ValueError, match="--kl_in reward needs"):
        sequence_rewards(batch, args)


def test_adaptive_kl_by_hand_and_through_a_checkpoint():
    args = make_args(kl_in="loss", kl_coef=0.2, kl_control="adaptive", kl_target=0.1, kl_horizon=1000.0)
    state = AlgorithmState.start(args)
    state.update_kl(0.11, 100, args)  # error +0.1
    assert state.kl_coef == pytest.approx(0.2 * 1.01)
    state.update_kl(5.0, 100, args)  # clipped at +0.2
    assert state.kl_coef == pytest.approx(0.2 * 1.01 * 1.02)
    state.update_kl(0.0, 100, args)  # clipped at -0.2
    assert state.kl_coef == pytest.approx(0.2 * 1.01 * 1.02 * 0.98)
    copy = AlgorithmState.start(args)
    copy.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert copy == state
    with pytest.raises(ValueError, match="nan"):
        state.update_kl(math.nan, 100, args)
    fixed = make_args(kl_in="loss", kl_coef=0.2)
    state = AlgorithmState.start(fixed)
    state.update_kl(5.0, 100, fixed)
    assert state.kl_coef == 0.2


def test_a_fixed_coefficient_is_what_the_flag_says_also_after_a_resume():
    """0.2 was saved by a fixed run, 0.5 by an adaptive one; a new flag of 0.3 wins over both unless it adapts too."""
    moments = {"math": (0.5, 0.3)}
    fixed = AlgorithmState(0.2, moments).state_dict()
    adaptive = AlgorithmState(0.5, moments, kl_adapts=True).state_dict()
    for control, saved, expected in (("fixed", fixed, 0.3), ("fixed", adaptive, 0.3), ("adaptive", fixed, 0.3),
                                     ("adaptive", adaptive, 0.5)):  # fmt: skip
        state = AlgorithmState.start(make_args(kl_in="loss", kl_coef=0.3, kl_control=control))
        state.load_state_dict(saved)
        assert (state.kl_coef, state.reward_moments) == (expected, moments)


def test_a_kl_or_value_that_is_no_number_is_named_and_padding_never_counts():
    fields = {"old_logprobs": torch.zeros(2, 3), "ref_logprobs": torch.zeros(2, 3)}
    args = make_args(advantage="rloo", kl_in="reward", kl_coef=0.1, kl_estimator="k1", group_size=2)
    batch = make_batch([1.0, 0.5], [2, 3], **fields)
    batch.ref_logprobs[0, 2] = -math.inf  # padding of the first row
    close(ADVANTAGES["rloo"](batch, args)[0][:, 0].tolist(), [0.5, -0.5])
    batch.ref_logprobs[1, 1] = math.nan
    with pytest.raises(ValueError, match="KL of row 1 is nan"):
        ADVANTAGES["rloo"](batch, args)
    batch = make_batch([1.0, 0.5], [2, 3], values=torch.tensor([[0.0, 0.0, math.nan], [0.0, math.inf, 0.0]]))
    with pytest.raises(ValueError, match="value of row 1 is inf"):
        ADVANTAGES["gae"](batch, make_args(advantage="gae"))


def test_reinforce_pp_passes_over_holes_in_the_mask():
    """A masked token inside a response neither discounts nor counts: gamma 0.5, reward 1 -> returns 0.5, -, 1."""
    batch = make_batch([1.0], [3])
    batch.response_mask = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    _, returns = ADVANTAGES["reinforce_pp"](batch, make_args(advantage="reinforce_pp", gamma=0.5, group_size=1))
    assert returns.tolist() == [[0.5, 0.0, 1.0]]
