"""Log-prob and entropy of chosen tokens from hidden states, without ever keeping a full-vocabulary tensor.

The output layer is called once per micro-batch (so ZeRO-3 gathers its weight once) and walks over chunks of positions.
Nothing of size (positions, V) outlives a chunk: the backward pass computes the chunk's logits again.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn


def _chunk_logits(hidden, weight, bias, temperature: float, banned: Tensor | None) -> Tensor:
    """(n, D) -> (n, V) logits / temperature in the accumulation dtype, -inf where a token must never be sampled."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        logits = logits / temperature
    if banned is not None:
        logits[:, banned] = float("-inf")
    return logits


class _ChunkedLogprobs(torch.autograd.Function):
    """(N, D) hidden, (N,) targets -> (N,) log-probs and (N,) entropies, both in float32 (float64 for float64 input)."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, banned, with_entropy, chunk):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(len(targets), dtype=wide, device=hidden.device)
        entropies = torch.zeros_like(logprobs)
        log_norms = torch.empty_like(logprobs)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = _chunk_logits(hidden[part], weight, bias, temperature, banned)
            log_norm = torch.logsumexp(logits, dim=-1)
            logprobs[part] = logits.gather(1, targets[part, None])[:, 0] - log_norm
            log_norms[part] = log_norm
            if with_entropy:  # H = log Z - sum p z; a banned token has p = 0 and z = -inf, and adds nothing
                probs = (logits - log_norm[:, None]).exp_()
                entropies[part] = log_norm - (probs * logits.nan_to_num_(neginf=0.0)).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, banned, log_norms, entropies)
        ctx.settings = (temperature, chunk)
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs nothing on the way back
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropies):
        hidden, weight, bias, targets, banned, log_norms, entropies = ctx.saved_tensors
        temperature, chunk = ctx.settings
        if grad_logprobs is None and grad_entropies is None:
            return (None,) * 8
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = log_norms.dtype
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # Summed over the chunks in the wide dtype: bf16 would lose a bit with every chunk.
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if bias is not None and need_bias else None
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = _chunk_logits(hidden[part], weight, bias, temperature, banned)
            log_probs = logits.sub_(log_norms[part, None])
            probs = log_probs.exp()
            # d log p_t / dz = 1[t] - p ;  d H / dz_i = -p_i (log p_i + H)
            if grad_logprobs is None:
                grad = torch.zeros_like(probs)
            else:
                grad = probs * -grad_logprobs[part, None]
                grad.scatter_add_(1, targets[part, None], grad_logprobs[part, None])
            if grad_entropies is not None:
                surprise = log_probs.nan_to_num_(neginf=0.0).add_(entropies[part, None])
                grad -= probs.mul_(surprise).mul_(grad_entropies[part, None])
            if temperature != 1.0:
                grad /= temperature
            narrow = grad.to(hidden.dtype)
            if need_hidden:
                grad_hidden[part] = narrow @ weight
            if need_weight:
                if wide == hidden.dtype:
                    grad_weight.addmm_(narrow.T, hidden[part])
                else:
                    grad_weight += narrow.T @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    entropy: bool = False,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """(N, D) hidden, (V, D) weight, (N,) next tokens -> (log-probs (N,), entropies (N,), zeros if not asked for).

    log p = log_softmax(z / temperature) over the tokens that may be sampled, in float32 at least; `banned` (K,) ids
    have probability zero, as they have in the sampler. The entropy is of the same distribution, in nats, with gradient.
    """
    return _ChunkedLogprobs.apply(hidden, weight, bias, targets, temperature, banned, entropy, chunk)


def output_layer_gives_logprobs(lm_head: nn.Linear) -> None:
    """Make `lm_head(hidden, targets, ...)` return log-probs and entropies.

    Only `forward` changes, so that ZeRO-3's hooks around the module gather the weight once for all chunks.
    """

    def forward(self: nn.Linear, hidden: Tensor, targets: Tensor, **settings) -> tuple[Tensor, Tensor]:
        return chunked_logprobs(hidden, self.weight, self.bias, targets, **settings)

    lm_head.forward = MethodType(forward, lm_head)
