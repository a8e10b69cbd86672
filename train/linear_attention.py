"""Qwen3.5's linear-attention layers over packed groups: the state after a prompt is forked to its responses.

A gated delta rule layer (arXiv 2412.06464) carries two things from token to token: a recurrent state, and the last
inputs of a short causal convolution. Both depend on the prompt alone when its last token has been read, so each response
starts from a copy: every prompt token is computed once, and the result is that of one row per response, not an
approximation. Gradients of all responses flow back into the prompt through the shared state.
"""

from __future__ import annotations

import inspect
import sys
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def has_linear_attention(config) -> bool:
    """True for Qwen3.5: some layers carry a recurrent state through the sequence instead of attending."""
    return "linear_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())


def fork_linear_attention(language_model: nn.Module) -> None:
    """Give every linear-attention layer a forward over packed groups. Raises RuntimeError on an unknown layer class."""
    for layer in language_model.layers:
        if not hasattr(layer, "linear_attn"):
            continue
        source = sys.modules[type(layer.linear_attn).__module__]
        if not (hasattr(source, "torch_chunk_gated_delta_rule") and hasattr(source, "causal_conv1d_fn")):
            raise RuntimeError(
                f"{type(layer.linear_attn).__name__} of this transformers version has no chunked gated delta rule that "
                "ReelRL knows; the versions in requirements.txt do"
            )
        layer.linear_attn.forward = MethodType(packed_linear_attention, layer.linear_attn)


def responses_as_rows(values: Tensor, lengths: list[int]) -> Tensor:
    """(sum R, ...) of one group's responses, one after the other -> (G, R, ...), zeros behind the shorter ones.

    Padding is on the right of a causal recurrence: no real token sees it. Cut and padded, not gathered by an index: that would
    name one token for all padding, and CUDA's backward pass adds rows of one index one after the other, thousands of them.
    """
    longest = max(lengths)
    beside = (0, 0) * (values.ndim - 1)
    return torch.stack([F.pad(part, (*beside, 0, longest - len(part))) for part in values.split(lengths)])


def rows_as_responses(rows: Tensor, lengths: list[int]) -> Tensor:
    """The way back: (G, R, ...) -> (sum R, ...)."""
    return torch.cat([row[:length] for row, length in zip(rows.unbind(0), lengths)])


def packed_linear_attention(self, hidden_states: Tensor, cache_params=None, attention_mask=None, layout=None, **kwargs):
    """(1, T, D) -> (1, T, D), the layer's own arithmetic, prompts first and each response from its prompt's state."""
    if layout is None:
        raise ValueError("this model is set up for packed groups; call it through train.packed_model.PackedModel")
    mixed = self.in_proj_qkv(hidden_states)
    gate = self.in_proj_z(hidden_states).view(*hidden_states.shape[:2], -1, self.head_v_dim)
    beta = self.in_proj_b(hidden_states).sigmoid()
    decay = self.in_proj_a(hidden_states)
    decay = -self.A_log.float().exp() * F.softplus(decay.float() + self.dt_bias)
    kernel, weight = self.conv_kernel_size, self.conv1d.weight.squeeze(1)
    prompts, responses = [], []
    for span in layout.spans:
        prompt, lengths = slice(span.prompt_start, span.prompt_start + span.prompt_length), span.response_lengths
        own = mixed[:, prompt]
        out, state = _delta_rule(self, own, weight, beta[:, prompt], decay[:, prompt], None)
        prompts.append(out)
        if not any(lengths):
            continue
        answer = slice(span.responses_start, span.responses_start + sum(lengths))
        rows, betas, decays = (responses_as_rows(values[0, answer], lengths) for values in (mixed, beta, decay))
        # What the convolution saw last: the prompt's last inputs, zeros where it is shorter than the kernel.
        context = F.pad(own[:, -(kernel - 1) :], (0, 0, max(0, kernel - 1 - own.shape[1]), 0))
        inputs = torch.cat([context.expand(len(lengths), -1, -1), rows], dim=1)
        state = state.expand(len(lengths), -1, -1, -1)
        out, _ = _delta_rule(self, inputs, weight, betas, decays, state, skip=kernel - 1)
        responses.append(rows_as_responses(out, lengths)[None])
    core = torch.cat(prompts + responses, dim=1)
    # FlexAttention's padding at the end: tokens of no group, nothing is predicted there.
    core = F.pad(core, (0, 0, 0, 0, 0, hidden_states.shape[1] - core.shape[1]))
    core = self.norm(core.reshape(-1, self.head_v_dim), gate.reshape(-1, self.head_v_dim))
    return self.out_proj(core.view(*hidden_states.shape[:2], -1))


def _delta_rule(layer, mixed: Tensor, weight: Tensor, beta, decay, state, *, skip: int = 0) -> tuple[Tensor, Tensor]:
    """Convolution, then the chunked rule from `state`: (b, skip + t, C) -> ((b, t, heads, d), state after the end)."""
    source = sys.modules[type(layer).__module__]
    mixed = source.causal_conv1d_fn(
        mixed.transpose(1, 2), weight, layer.conv1d.bias, activation=layer.activation
    ).transpose(1, 2)[:, skip:]
    query, key, value = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    query, key = (x.reshape(*x.shape[:2], -1, layer.head_k_dim) for x in (query, key))
    value = value.reshape(*value.shape[:2], -1, layer.head_v_dim)
    times = layer.num_v_heads // layer.num_k_heads
    if times > 1:
        query, key = query.repeat_interleave(times, dim=2), key.repeat_interleave(times, dim=2)
    rule = source.torch_chunk_gated_delta_rule
    if query.dtype not in (torch.bfloat16, torch.float16):
        rule = inspect.unwrap(rule)  # flash-linear-attention takes its place where it is installed, and refuses float32
    return rule(
        query,
        key,
        value,
        g=decay,
        beta=beta,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
