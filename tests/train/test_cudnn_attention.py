"""The parts into which the cuDNN backend cuts a packed group, with the kernels' formulas written out in their place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.train.packed_cases import float64_throughout, groups_of
from tests.train.test_packed import CPU, PACKS, compare, models  # noqa: F401 - models is a fixture
from train import cudnn_attention, group_attention
from train.cudnn_attention import cut, round_count, round_seen
from train.group_attention import pack
from train.vision import frame_runs


def scores_of(q, k, scaling: float, causal: bool) -> torch.Tensor:
    """(S, H, d), (S', Hkv, d) -> (H, S, S'); causal from the end, as the kernels with more keys than queries."""
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scaling
    if causal:
        late = torch.arange(len(k))[None, :] > torch.arange(len(q))[:, None] + len(k) - len(q)
        scores = scores.masked_fill(late, float("-inf"))
    return scores


def dense(q, k, v, scaling, *, causal):
    scores = scores_of(q, k, scaling, causal)
    values = v.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values), scores.logsumexp(-1)


def dense_backward(grad, q, k, v, out, sums, scaling, *, causal):
    """FlashAttention's backward pass (arXiv 2205.14135, algorithm 4): P from the sums, D from out, dS = P * (dP - D)."""
    times = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    weights = (scores_of(q, k, scaling, causal) - sums[..., None]).exp()
    change = weights * (torch.einsum("qhd,khd->hqk", grad, values) - (grad * out).sum(-1).T[..., None])
    grad_q = torch.einsum("hqk,khd->qhd", change, keys) * scaling
    grad_k, grad_v = torch.einsum("hqk,qhd->khd", change, q) * scaling, torch.einsum("hqk,qhd->khd", weights, grad)
    return grad_q, *(x.view(len(k), k.shape[1], times, -1).sum(2) for x in (grad_k, grad_v))


def sequences(parts):
    yield from zip(parts.cu_queries, parts.cu_queries[1:], parts.cu_keys, parts.cu_keys[1:])


def ragged(q, k, v, parts, scaling):
    assert parts.longest_query == max(parts.cu_queries.diff()) and parts.longest_key == max(parts.cu_keys.diff())
    found = [dense(q[a:b], k[c:d], v[c:d], scaling, causal=True) for a, b, c, d in sequences(parts)]
    return torch.cat([out for out, _ in found]), torch.cat([sums for _, sums in found], dim=1), ("state",)


def ragged_backward(grad, q, k, v, out, sums, state, parts, scaling):
    assert state == ("state",)
    found = [
        dense_backward(grad[a:b], q[a:b], k[c:d], v[c:d], out[a:b], sums[:, a:b], scaling, causal=True)
        for a, b, c, d in sequences(parts)
    ]
    return tuple(torch.cat(each) for each in zip(*found))


@pytest.fixture
def formulas(monkeypatch):
    """The kernels' formulas, and lengths of tests; -> calls of the dense kernel as (queries, keys, causal)."""
    calls = []

    def counted(q, k, v, scaling, *, causal):
        calls.append((len(q), len(k), causal))
        return dense(q, k, v, scaling, causal=causal)

    for function in (dense_backward, ragged, ragged_backward):
        monkeypatch.setattr(cudnn_attention, function.__name__, function)
    monkeypatch.setattr(cudnn_attention, "dense", counted)
    monkeypatch.setattr(cudnn_attention, "LONG_PROMPT", 16)
    monkeypatch.setattr(cudnn_attention, "PROMPT_STEP", 16)
    return calls


LAYOUTS = {
    "one long prompt": [(37, (5, 0, 12))],
    "a multiple of the step": [(32, (3, 300, 4))],
    "long and short": [(37, (5, 0, 12)), (1, (60, 3)), (50, (1,)), (15, (2, 2, 2))],
    "no response tokens": [(40, (0, 0)), (20, (0,))],
    "a long one without, a short one with": [(40, (0,)), (3, (4, 7))],
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("padding", [0, 5])
def test_outputs_and_gradients_equal_one_masked_softmax(formulas, name, padding):
    """Against the dense mask and torch's own gradients in float64; tokens of no group come out as zero, without gradient."""
    layout, plain = (pack(groups_of(*LAYOUTS[name]), backend=one, device=CPU).layout for one in ("cudnn", "sdpa"))
    assert layout.backend == "cudnn" and layout.length == plain.length
    generator = torch.Generator().manual_seed(1)
    q, k, v, weights = (
        torch.randn(1, heads, layout.length + padding, 16, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2, 4)
    )
    for x in (q, k, v):
        x.requires_grad_()
    kernels = group_attention._KERNELS
    out = kernels["cudnn"](q, k, v, layout, 0.3).transpose(1, 2)
    got = torch.autograd.grad((out * weights).sum(), (q, k, v))
    real = [x[:, :, : plain.length] for x in (q, k, v)]
    want = kernels["sdpa"](*real, plain, 0.3).transpose(1, 2)
    assert (out[:, :, : plain.length] - want).abs().max() < 1e-13 and not out[:, :, plain.length :].any()
    wanted = torch.autograd.grad((want * weights[:, :, : plain.length]).sum(), (q, k, v))
    for a, b in zip(got, wanted):
        assert (a - b).norm() / b.norm() < 1e-13


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_model_with_it_equals_one_row_per_response(models, formulas, family, checkpointing):  # noqa: F811
    with float64_throughout():
        plain, packed, maker = models(family, torch.float64)
        cases = [maker.group(*case) for case in PACKS["mixed"]]
        logprobs, entropy, gradients = compare(plain, packed, cases, backend="cudnn", checkpointing=checkpointing)
    assert logprobs <= 1e-10 and entropy <= 1e-10 and any(not causal for *_, causal in formulas)
    assert max(gradients.values()) <= 1e-10, max(gradients, key=gradients.get)


def test_lengths_are_rounded_so_that_plans_repeat(formulas):
    """Two prompts of nearly one length use the same two shapes; what the rounding leaves goes to the third part."""
    shapes = []
    for prompt, responses in ((70, (5, 12)), (77, (20, 9, 4))):
        formulas.clear()
        layout = pack(groups_of((prompt, responses)), backend="cudnn", device=CPU).layout
        q, k, v = (torch.randn(1, heads, layout.length, 16, dtype=torch.float64) for heads in (4, 2, 2))
        group_attention._KERNELS["cudnn"](q, k, v, layout, 0.3)
        shapes.append(list(formulas))
    assert shapes[0] == shapes[1] == [(80, 80, True), (256, 64, False)]
    parts = cut(pack(groups_of((77, (20, 9, 4))), backend="cudnn", device=CPU).layout, CPU)
    assert parts.cu_keys.diff().tolist() == [33, 22, 17] and parts.cu_queries.diff().tolist() == [20, 9, 4]


def test_rounding_by_hand():
    assert [round_count(n) for n in (1, 256, 257, 2048, 3500, 5000)] == [256, 256, 512, 2048, 3584, 5120]
    assert [round_seen(n) for n in (1024, 1100, 16765, 40000)] == [1024, 1024, 16384, 38912]


def test_packs_of_short_prompts_take_flex():
    assert pack(groups_of((40, (3, 4))), backend="cudnn", device=CPU).layout.backend == "flex"
    assert pack(groups_of((40, (3,)), (1024, (4,))), backend="cudnn", device=CPU).layout.backend == "cudnn"


def test_frames_whose_last_tile_of_keys_is_half_empty_are_left():
    """16 x 28 patches are 3 x 128 + 64: cuDNN's backward pass may give nan there; 24 x 42 are 7 x 128 + 112."""
    grid = np.array([[8, 16, 28], [13, 24, 42], [1, 2, 2], [200, 8, 16]])
    found = frame_runs(grid, torch.zeros(1, dtype=torch.int32))
    assert found.runs == [(0, 3584), (8, 1008), (4, 1008), (0, 1008), (0, 4), *[(64, 128)] * 3, (8, 128)]
    assert found.cu_left.tolist() == [*range(0, 3585, 448), 4592, 4596] and found.longest_left == 1008


def test_keys_of_prompts_fill_their_tiles():
    assert cudnn_attention.PROMPT_STEP % 128 == 0
    assert all(round_seen(n) % 128 == 0 for n in range(1024, 40000, 7))
