"""Norms, rotations and gated products of the library's layers, each as one compiled kernel (CUDA).

Eagerly an RMSNorm reads and writes its input about eight times, and the vision tower's rotation makes a dozen passes over
float32 copies of queries and keys: together a tenth of an update of long prompts, by arithmetic on bytes, and none of it useful.
The formulas are the library's own; inside a kernel, values stay in float32 where eager code rounds them in between.
"""

from __future__ import annotations

import sys
from functools import cache
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from train.vision import VISION_CUDNN, VISION_VARLEN

ROTATIONS = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_vision")
# Of each function: torch compiles one per rank, kind of view, gradient mode and requires_grad. A policy's update, its old
# log-probs and a reference make nine of Qwen3-VL's norm, and with torch's limit of eight the ninth, an update's, runs eagerly.
MOST_VARIANTS = 64


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As Qwen's RMSNorm modules: weight * (x / rms(x)) over the last dimension, the quotient in float32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def split_rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tower's queries, keys and values, the first two rotated: qkv (K, 3, H, d), cos and sin (K, d) -> three (K, H, d).

    In one function, so that the gradients of all three are written into one tensor, where the library's way stacks and
    then transposes them.
    """
    q, k, v = qkv.unbind(1)
    cos, sin = cos[:, None].float(), sin[:, None].float()

    def rotated(x: Tensor) -> Tensor:
        left, right = x.float().chunk(2, dim=-1)
        return (x.float() * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)

    return rotated(q), rotated(k), v.clone()


@cache
def compiled(function):
    """One compilation for all lengths: T differs in every micro-batch."""
    return torch.compile(function, dynamic=True)


@cache
def compiled_per_token(function):
    """The same with nothing but the number of tokens left open, so that indices are divided by constants: with symbols for heads
    and widths, too, the rotations take three to five times as long as their bytes need (docs/gpu_results.md)."""
    optimised = torch.compile(function)

    def call(*tensors: Tensor, **kwargs):
        tokens = tensors[-1].shape[-2]  # of sin: (K, d) or (1, T, d)
        for tensor in tensors:
            # Not the last axis, whatever its size: a rank whose first call is a dummy of 128 tokens would leave widths open.
            for axis in [axis for axis, size in enumerate(tensor.shape[:-1]) if size == tokens]:
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
        return optimised(*tensors, **kwargs)

    call.compiled = True
    return call


def tokens_first(function):
    """The decoder's rotation of (1, H, T, d), computed as (1, T, H, d), in which queries and keys lie: compiled over the other,
    its gradients come out contiguous that way and are copied back."""

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotated = compiled_per_token(function)(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
        return tuple(x.transpose(1, 2) for x in rotated)

    call.compiled = True
    return call


def tower_attention(
    self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings=None, max_seqlen=None, **kwargs
):
    """A vision block's attention with split_rotated, where all frames go through one call (train/vision.py): (K, D) -> (K, D)."""
    name = self.config._attn_implementation
    if name not in (VISION_VARLEN, VISION_CUDNN):  # one frame after the other: the library's own
        given = {"position_embeddings": position_embeddings, "max_seqlen": max_seqlen, **kwargs}
        return type(self).forward(self, hidden_states, cu_seqlens, **given)
    qkv = self.qkv(hidden_states).view(len(hidden_states), 3, self.num_heads, -1)
    states = compiled_per_token(split_rotated)(qkv, *position_embeddings)
    query, key, value = (x.transpose(0, 1)[None] for x in states)
    out, _ = ALL_ATTENTION_FUNCTIONS[name](
        self, query, key, value, None, scaling=self.scaling, cu_seq_lens_q=cu_seqlens, max_length_q=max_seqlen, **kwargs
    )
    return self.proj(out.reshape(len(hidden_states), -1))


def fuse_elementwise(hf: nn.Module) -> int:
    """Replace forwards of norms, gated MLPs and the tower's attention, and the library's rotations; -> modules changed.

    Only `forward` changes, so parameter names and ZeRO-3's hooks stay. Qwen3.5's norm has another formula and is left.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    changed = 0

    def norm(self, x: Tensor) -> Tensor:
        return compiled(rms_norm)(x, self.weight, self.variance_epsilon)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down_proj(compiled(gated)(self.gate_proj(x), self.up_proj(x)))

    for module in hf.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(norm, module)
        elif hasattr(module, "gate_proj") and isinstance(getattr(module, "act_fn", None), (nn.SiLU, _silu_class())):
            module.forward = MethodType(mlp, module)
        elif type(module).__name__.endswith("VisionAttention") and hasattr(module, "qkv"):
            module.forward = MethodType(tower_attention, module)
        else:
            continue
        changed += 1
    library = sys.modules[type(hf).__module__]
    for name in ROTATIONS:
        function = getattr(library, name, None)
        if function is not None and not hasattr(function, "compiled"):
            setattr(library, name, (tokens_first if name == ROTATIONS[0] else compiled_per_token)(function))
    return changed


def _silu_class() -> type:
    """transformers has a SiLU of its own in some versions."""
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])
