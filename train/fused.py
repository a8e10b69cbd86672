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

ROTATIONS = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_vision")


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As Qwen's RMSNorm modules: weight * (x / rms(x)) over the last dimension, the quotient in float32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


@cache
def compiled(function):
    """One compilation for all lengths: T differs in every micro-batch."""
    return torch.compile(function, dynamic=True)


def fuse_elementwise(hf: nn.Module) -> int:
    """Replace forwards of the model's norms and gated MLPs, and its module's rotations; -> modules changed.

    Only `forward` changes, so parameter names and ZeRO-3's hooks stay. Qwen3.5's norm has another formula and is left.
    """
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
        else:
            continue
        changed += 1
    library = sys.modules[type(hf).__module__]
    for name in ROTATIONS:
        function = getattr(library, name, None)
        if function is not None and not hasattr(function, "_torchdynamo_orig_callable"):
            setattr(library, name, compiled(function))
    return changed


def _silu_class() -> type:
    """transformers has a SiLU of its own in some versions."""
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])
