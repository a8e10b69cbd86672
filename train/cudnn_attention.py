"""The packed group on cuDNN's dense kernels, which are the fastest that torch carries for long prompts on Hopper.

They know no packed sequences and no masks but the causal one, so the work is cut into parts that need none:

    prompt over itself                          dense, causal
    a group's responses over their prompt       dense, everything visible; keys only up to a multiple of a step
    each response over the prompt's last keys and itself    FlashAttention for variable lengths; short prompts likewise

A softmax over several sets of keys is the mean of the softmaxes over each, weighted with their sums (FlashAttention, arXiv
2205.14135, section 3.1). Backwards each part gets the merged output and the merged log-sum-exp, with which its kernel
computes exactly its keys' part of the gradient (section 3.2 there: dS = P * (dP - D), where P and D belong to the whole softmax).

cuDNN builds a plan for every shape that it has not met, so lengths are rounded: a prompt's queries and keys upwards (causal: no
real query sees a later key, and later queries get no gradient), the keys that responses see downwards, what is left of them
going to the third part. Nothing is approximated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train.transfer import send, send_lengths

LONG_PROMPT = 1024  # tokens from which a prompt gets kernels of its own
# Tokens to which prompts are rounded: 64 plans for all lengths up to 32k. A multiple of 128, so that no tile of keys is left
# half empty: see train.vision.UNMASKED.
PROMPT_STEP = 512
FAR = 1e30  # log-sum-exp of a query that is not there: its weights exp(score - FAR) are 0

ops = torch.ops.aten


@dataclass(slots=True)
class LongSpan:
    """One group with a long prompt; all in tokens."""

    prompt: int  # where the prompt begins
    length: int
    padded: int  # length, rounded up
    seen: int  # keys that the responses see through the dense kernel: length, rounded down
    responses: int  # where the responses begin
    count: int  # tokens of the responses
    padded_count: int
    row: int  # place of the first response token among the queries of the third part


@dataclass(slots=True)
class Parts:
    """A layout cut into parts. Q queries and K keys of the third part, S prompt tokens that are among those keys."""

    spans: list[LongSpan]
    queries: Tensor | slice  # (Q,) where the third part's queries lie; a slice if they are one run
    keys: Tensor  # (K,) where its keys lie
    cu_queries: Tensor  # (sequences + 1,) int32
    cu_keys: Tensor
    longest_query: int
    longest_key: int
    shared: Tensor  # (S,) prompt tokens that several sequences see
    sources: Tensor  # (S, most) their places among the keys; K, where there are fewer
    own: Tensor  # (R,) the response tokens' places among the keys
    responses: slice  # where they lie, the last tokens before any padding


def round_count(tokens: int) -> int:
    """Up to eight plans per doubling, 256 tokens apart at least: 1,000 -> 1,024; 3,500 -> 3,584; 5,000 -> 5,120."""
    step = max(256, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def round_seen(tokens: int) -> int:
    """Down, to 1/16 of its size or less: 16,765 -> 16,384; 1,100 -> 1,024. At least one step of a long prompt."""
    step = max(min(PROMPT_STEP, LONG_PROMPT), 1 << max(0, tokens.bit_length() - 5))
    return tokens // step * step


def cut(layout, device: torch.device) -> Parts:
    """The parts of a layout (train.group_attention.Layout)."""
    spans, sequences = [], []  # sequences: (range of queries, ranges of keys)
    for span in layout.spans:
        prompt = range(span.prompt_start, span.prompt_start + span.prompt_length)
        count, seen = sum(span.response_lengths), 0
        if span.prompt_length >= LONG_PROMPT:
            seen = round_seen(span.prompt_length)
            spans.append(
                LongSpan(
                    prompt=span.prompt_start,
                    length=span.prompt_length,
                    padded=-(-span.prompt_length // PROMPT_STEP) * PROMPT_STEP,
                    seen=seen,
                    responses=span.responses_start,
                    count=count,
                    padded_count=round_count(count),
                    row=sum(len(queries) for queries, _ in sequences),
                )
            )
        else:
            sequences.append((prompt, [prompt]))
        start = span.responses_start
        for length in span.response_lengths:
            if length:
                own = range(start, start + length)
                sequences.append((own, [prompt[seen:], own]))
            start += length
    return _tables(layout, spans, sequences, device)


def _tables(layout, spans, sequences, device) -> Parts:
    """The parts' tables, built on the host and sent once per micro-batch."""
    cu_queries, longest_query = send_lengths([len(own) for own, _ in sequences], device)
    cu_keys, longest_key = send_lengths([sum(map(len, seen)) for _, seen in sequences], device)
    first = sequences[0][0].start if sequences else 0
    queries = _positions([own for own, _ in sequences])
    keys = _positions([part for _, seen in sequences for part in seen])
    end = layout.prompts_length
    shared = np.flatnonzero(keys < end)
    order = np.argsort(keys[shared], kind="stable")
    tokens, firsts, counts = np.unique(keys[shared][order], return_index=True, return_counts=True)
    sources = np.full((len(tokens), counts.max(initial=0)), len(keys))
    copies = np.arange(len(shared)) - np.repeat(firsts, counts)  # 0, 1, ... of each token
    sources[np.repeat(np.arange(len(tokens)), counts), copies] = shared[order]
    last = layout.spans[-1]
    own = np.zeros(last.responses_start + sum(last.response_lengths) - end, dtype=np.int64)
    own[keys[keys >= end] - end] = np.flatnonzero(keys >= end)

    def sent(values: np.ndarray) -> Tensor:
        return send(torch.from_numpy(values), device)

    run = np.array_equal(queries, np.arange(first, first + len(queries)))
    return Parts(
        spans=spans,
        queries=slice(first, first + len(queries)) if run else sent(queries),
        keys=sent(keys),
        cu_queries=cu_queries,
        cu_keys=cu_keys,
        longest_query=longest_query,
        longest_key=longest_key,
        shared=sent(tokens),
        sources=sent(sources),
        own=sent(own),
        responses=slice(end, end + len(own)),
    )


def _positions(ranges: list[range]) -> np.ndarray:
    parts = [np.arange(one.start, one.stop) for one in ranges]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


# ---- kernels --------------------------------------------------------------------------------------------------------


def _heads_first(x: Tensor) -> Tensor:  # (S, H, d) -> (1, H, S, d), a view whose strides depend on the shape alone
    return x.transpose(0, 1)[None]


def dense(q: Tensor, k: Tensor, v: Tensor, scaling: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """q (S, H, d), k and v (S', Hkv, d) -> (S, H, d), and (H, S) fp32 logarithms of the softmax's sums."""
    out, sums, *_ = ops._scaled_dot_product_cudnn_attention(
        *map(_heads_first, (q, k, v)), None, True, 0.0, causal, False, scale=scaling
    )
    return out.squeeze(0).transpose(0, 1), sums.reshape(q.shape[1], len(q))


def dense_backward(grad, q, k, v, out, sums, scaling: float, *, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from those of out; out and sums may be those of a softmax over more keys than k."""
    unused = torch.zeros((), dtype=torch.long, device=q.device)  # seed and offset of a dropout that is none
    grads = ops._scaled_dot_product_cudnn_attention_backward(
        *map(_heads_first, (grad, q, k, v, out)), sums.reshape(1, q.shape[1], len(q), 1), unused, unused, None, None, None,
        len(q), len(k), 0.0, causal, scale=scaling,
    )  # fmt: skip
    return tuple(each.squeeze(0).transpose(0, 1) for each in grads)


def dense_frames(q: Tensor, k: Tensor, v: Tensor, frames: int, scaling: float) -> Tensor:
    """(frames * n, H, d) each: every frame's n patches over themselves -> (frames * n, H, d). Differentiable."""
    each = (x.view(frames, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # (frames, H, n, d)
    out = ops._scaled_dot_product_cudnn_attention(
        *each, None, torch.is_grad_enabled(), 0.0, False, False, scale=scaling
    )[0]
    return out.transpose(1, 2).reshape(q.shape)


def ragged(q, k, v, parts: Parts, scaling: float) -> tuple[Tensor, Tensor, tuple]:
    """The third part: each sequence's queries over its keys, causal from the end: (Q, H, d), (H, Q) sums, the kernel's state."""
    out, sums, *state = ops._flash_attention_forward(
        q, k, v, parts.cu_queries, parts.cu_keys, parts.longest_query, parts.longest_key, 0.0, True, False, scale=scaling
    )[:4]  # fmt: skip
    return out, sums.view(q.shape[1], len(q)), tuple(state)


def ragged_backward(grad, q, k, v, out, sums, state, parts: Parts, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """As dense_backward, for `ragged`."""
    return ops._flash_attention_backward(
        grad, q, k, v, out, sums, parts.cu_queries, parts.cu_keys, parts.longest_query, parts.longest_key, 0.0, True, *state,
        scale=scaling,
    )  # fmt: skip


# ---- the packed group -----------------------------------------------------------------------------------------------


def window(x: Tensor, start: int, length: int, padded: int, *, zero: bool = False) -> Tensor:
    """x[start : start + padded] of (T, ...), or its first `length` with zeros behind: if `zero`, or where x ends before."""
    if padded == length or (not zero and start + padded <= len(x)):
        return x[start : start + padded]
    return F.pad(x[start : start + length], (0, 0, 0, 0, 0, padded - length))


class _Attention(torch.autograd.Function):
    """q (T, H, d), k and v (T, Hkv, d), contiguous -> (T, H, d)."""

    @staticmethod
    def forward(ctx, q, k, v, parts: Parts, scaling: float):
        out = torch.empty_like(q) if parts.responses.stop == len(q) else torch.zeros_like(q)
        sums, state = q.new_empty(0), ()
        if parts.longest_query:
            rest, sums, state = ragged(q[parts.queries], k[parts.keys], v[parts.keys], parts, scaling)
            out[parts.queries] = rest
        prompt_sums = []
        for span in parts.spans:
            where = (span.prompt, span.length, span.padded)
            own, own_sums = dense(*(window(x, *where) for x in (q, k, v)), scaling, causal=True)
            out[span.prompt : span.prompt + span.length] = own[: span.length]
            prompt_sums.append(own_sums)
            if not span.count:
                continue
            seen = slice(span.prompt, span.prompt + span.seen)
            queries = window(q, span.responses, span.count, span.padded_count)
            far, far_sums = dense(queries, k[seen], v[seen], scaling, causal=False)
            far, far_sums = far[: span.count], far_sums[:, : span.count]
            near_sums = sums[:, span.row : span.row + span.count]
            responses = slice(span.responses, span.responses + span.count)
            weight = torch.sigmoid(near_sums - far_sums).transpose(0, 1)[..., None]  # (count, H, 1) fp32
            out[responses] = torch.lerp(far.to(weight.dtype), out[responses].to(weight.dtype), weight).to(q.dtype)
            near_sums.copy_(torch.logaddexp(near_sums, far_sums))
        ctx.save_for_backward(q, k, v, out, sums, *prompt_sums)
        ctx.parts, ctx.state, ctx.scaling = parts, state, scaling
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, sums, *prompt_sums = ctx.saved_tensors
        parts, scaling = ctx.parts, ctx.scaling
        grad = grad.contiguous()
        dq = torch.empty_like(q) if parts.responses.stop == len(q) else torch.zeros_like(q)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        if parts.longest_query:
            rest = (grad[parts.queries], q[parts.queries], k[parts.keys], v[parts.keys], out[parts.queries])
            near_q, near_k, near_v = ragged_backward(*rest, sums, ctx.state, parts, scaling)
            dq[parts.queries] = near_q
            for total, near in ((dk, near_k), (dv, near_v)):
                total[parts.responses] = near[parts.own]
        for span, own_sums in zip(parts.spans, prompt_sums, strict=True):
            where, prompt = (span.prompt, span.length, span.padded), slice(span.prompt, span.prompt + span.length)
            given = (window(grad, *where, zero=True), *(window(x, *where) for x in (q, k, v, out)))
            found = dense_backward(*given, own_sums, scaling, causal=True)
            for total, own in zip((dq, dk, dv), found):
                total[prompt] = own[: span.length]
            if not span.count:
                continue
            where = (span.responses, span.count, span.padded_count)
            seen = slice(span.prompt, span.prompt + span.seen)
            far_sums = F.pad(sums[:, span.row : span.row + span.count], (0, span.padded_count - span.count), value=FAR)
            far_q, far_k, far_v = dense_backward(
                window(grad, *where, zero=True), window(q, *where), k[seen], v[seen], window(out, *where), far_sums, scaling,
                causal=False,
            )  # fmt: skip
            dq[span.responses : span.responses + span.count] += far_q[: span.count]
            dk[seen] += far_k
            dv[seen] += far_v
        if len(parts.shared):
            for total, near in ((dk, near_k), (dv, near_v)):
                # Behind the keys a row of zeros, for tokens that fewer sequences see.
                near = F.pad(near, (0, 0, 0, 0, 0, 1))[parts.sources].sum(1)  # 16-bit sums are accumulated in 32 bits
                total.index_add_(0, parts.shared, near)
        return dq, dk, dv, None, None


def cudnn_packed(q: Tensor, k: Tensor, v: Tensor, layout, scaling: float) -> Tensor:
    """q (1, H, T, d), k and v (1, Hkv, T, d) -> (1, T, H, d), as train.group_attention.sdpa_packed."""
    if "parts" not in layout.ready:
        layout.ready["parts"] = cut(layout, q.device)
    q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (q, k, v))  # (T, heads, d); [0] would copy backwards
    return _Attention.apply(q, k, v, layout.ready["parts"], scaling)[None]
