"""Attention backends of the packed forward on a CPU: their bookkeeping, with loops in the place of CUDA's kernels."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from tests.train.packed_cases import float64_throughout, groups_of
from tests.train.test_packed import CPU, PACKS, compare, models  # noqa: F401 - models is a fixture
from train import group_attention
from train.group_attention import flex_block_mask, group_mask, pack


def loop_kernel(
    q, k, v, cu_q, cu_k, max_q, max_k, scaling, *, causal: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """What kernels for variable lengths compute, one sequence after the other: (T, H, d), and (H, T) logarithms of the sums."""
    assert max_q == max(cu_q.diff()) and max_k == max(cu_k.diff())
    out, sums, times = [], [], q.shape[1] // k.shape[1]
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d].repeat_interleave(times, 1)) * scaling
        if causal:
            late = torch.arange(d - c)[None, :] > torch.arange(b - a)[:, None] + (d - c) - (b - a)
            scores = scores.masked_fill(late, float("-inf"))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[c:d].repeat_interleave(times, 1)))
        sums.append(scores.logsumexp(-1))
    return torch.cat(out), torch.cat(sums, dim=1)


def flash4_stand_in(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, return_lse
):
    assert return_lse
    return loop_kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal=causal)


@pytest.fixture
def kernels_as_loops(monkeypatch):
    monkeypatch.setattr(group_attention, "_torch_varlen_causal", lambda *arguments: loop_kernel(*arguments)[0])
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_varlen_func=flash4_stand_in))


@pytest.mark.parametrize("empty", [False, True])
def test_flex_and_varlen_layouts_agree_with_sdpa(kernels_as_loops, empty):
    """The other backends' bookkeeping on CPU: FlexAttention uncompiled, the kernels for variable lengths as a loop."""
    results, groups = {}, groups_of((37, (5, 0, 12)), (1, (0, 0) if empty else (60, 3)))
    for backend in ("sdpa", "flex", "varlen", "flash4"):
        layout = pack(groups, backend=backend, device=CPU).layout
        real = 37 + 1 + 17 + (0 if empty else 63)
        assert layout.length == (128 if backend == "flex" else real)
        generator = torch.Generator().manual_seed(1)
        q, k, v = (torch.randn(1, heads, 128, 16, generator=generator) for heads in (4, 2, 2))
        q, k, v = (x[:, :, : layout.length] for x in (q, k, v))
        results[backend] = group_attention._KERNELS[backend](q, k, v, layout, 0.3)[:, :real]
    for backend in ("flex", "varlen", "flash4"):
        assert torch.allclose(results[backend], results["sdpa"], atol=1e-5), backend


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_merged_calls_of_flash4_give_the_same_gradients(models, kernels_as_loops, family):  # noqa: F811
    """Their weights come from the log-sum-exps, through which gradients have to flow; no key is copied per response."""
    copied = []
    with pytest.MonkeyPatch.context() as patch, float64_throughout():
        patch.setattr(group_attention, "keys_of_responses", lambda *arguments: copied.append(1))
        plain, packed, maker = models(family, torch.float64)
        cases = [maker.group(*case) for case in PACKS["mixed"]]
        logprobs, entropy, gradients = compare(plain, packed, cases, backend="flash4")
    assert logprobs <= 1e-10 and entropy <= 1e-10 and not copied
    assert max(gradients.values()) <= 1e-10, max(gradients, key=gradients.get)


def test_flex_block_mask_against_torchs_own():
    """Blocks skipped, partial and full, for an irregular layout, against create_block_mask on the (T, T) mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    layout = pack(groups_of((600, (300, 20, 1)), (130, (260, 0, 40))), backend="flex", device=CPU).layout
    dense = torch.eye(layout.length, dtype=torch.bool)
    for span in layout.spans:
        tokens = [*range(span.prompt_start, span.prompt_start + span.prompt_length)]
        tokens += range(span.responses_start, span.responses_start + sum(span.response_lengths))
        index = torch.tensor(tokens)
        dense[index[:, None], index] = group_mask(span, CPU)
    ours = flex_block_mask(layout, CPU)
    theirs = create_block_mask(lambda b, h, q, k: dense[q, k], None, None, layout.length, layout.length, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("kv_indices", "full_kv_indices", "q_indices", "full_q_indices"):
        counts = getattr(ours, name.replace("indices", "num_blocks"))[0, 0]
        for row, count in enumerate(counts.tolist()):
            got, want = (getattr(mask, name)[0, 0, row, :count] for mask in (ours, theirs))
            assert torch.equal(got, want), (name, row)
    assert ours.full_kv_num_blocks.sum() > 0
    q, k = torch.meshgrid(torch.arange(layout.length), torch.arange(layout.length), indexing="ij")
    assert torch.equal(ours.mask_mod(0, 0, q, k), dense)
