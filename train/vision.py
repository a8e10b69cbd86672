"""The vision tower as the trainer uses it: bytes in, one call per micro-batch, patch embedding as a matrix product.

Patches cross the door as uint8 in the processor's own order (media order; channel-major inside a patch), so they are a
quarter of the floats' size on their way to the device; normalisation happens there, bit for bit as the Hugging Face
processors do it on the host.
"""

from __future__ import annotations

from types import MethodType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

# "flash" in the name: transformers then hands over cu_seqlens instead of one frame per call.
VISION_VARLEN = "varlen_flash_vision"


def patch_embedding_as_matmul(tower: nn.Module) -> None:
    """Replace the tower's Conv3d call by the matrix product it is: kernel = stride = patch, so nothing overlaps.

    Only `forward` of the convolution changes, not the module: its parameter names stay, and ZeRO-3 still gathers the
    weight in the module's hooks. The convolution is 10 to 20 times slower on some cuDNN versions in bf16.
    """

    def forward(self: nn.Conv3d, x: Tensor) -> Tensor:  # (K, C, t, p, p) -> (K, D, 1, 1, 1), as the convolution gives
        out = F.linear(x.flatten(1), self.weight.flatten(1), self.bias)
        return out.view(*out.shape, 1, 1, 1)

    projection = tower.patch_embed.proj
    if tuple(projection.kernel_size) != tuple(projection.stride):
        raise ValueError(f"patch embedding overlaps: kernel {projection.kernel_size}, stride {projection.stride}")
    projection.forward = MethodType(forward, projection)


def vision_attention_varlen(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """All frames of all grids in one kernel call: (1, heads, K, d) with `cu_seq_lens_q` from the tower. CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # (K, heads, d)
    cu, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    default = q.shape[-1] ** -0.5
    if abs(scaling - default) > 1e-9 * default:
        q = q * (scaling / default)  # torch 2.11's kernel has no scale argument
    return varlen_attn(q, k, v, cu, cu, longest, longest)[None], None


AttentionInterface.register(VISION_VARLEN, vision_attention_varlen)


def grid_inputs(tower: nn.Module, grid_thw: np.ndarray, device: torch.device) -> dict[str, Tensor | int]:
    """What the tower derives from the grids, computed on the host and sent once: no device synchronisation inside.

    The names are those under which the tower's forward looks for precomputed values.
    """
    from transformers import vision_utils as vu

    grid = torch.as_tensor(np.ascontiguousarray(grid_thw), dtype=torch.long).view(-1, 3)
    merge = tower.spatial_merge_size
    out: dict[str, Tensor | int] = {"cu_seqlens": vu.get_vision_cu_seqlens(grid)}
    out["position_ids"] = vu.get_vision_position_ids(grid, merge)
    longest = {"max_seqlen": int((grid[:, 1] * grid[:, 2]).max())}
    if hasattr(tower, "window_size"):
        index, cu = vu.get_vision_window_index(grid, merge, tower.window_size, tower.patch_size)
        out["window_index"], out["cu_window_seqlens"] = index, cu
        longest["max_window_seqlen"] = int((cu[1:] - cu[:-1]).max())
    if hasattr(tower, "num_grid_per_side"):
        out["interp_indices"], out["interp_weights"] = vu.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
    return {**{name: value.to(device, non_blocking=True) for name, value in out.items()}, **longest}


def run_tower(tower: nn.Module, pixels: Tensor, grid_thw: np.ndarray) -> list[Tensor]:
    """One tower call -> [merged features (M, D), then one (M, D) per deepstack layer], M merged tokens in media order.

    pixels: (K, C*t*p*p), already normalised; cast here to the tower's dtype.
    """
    kwargs = grid_inputs(tower, grid_thw, pixels.device)
    grid = torch.as_tensor(np.ascontiguousarray(grid_thw), dtype=torch.long).view(-1, 3)
    out = tower(pixels.to(tower.dtype), grid_thw=grid, return_dict=True, **kwargs)
    return [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]


def smallest_grid(tower: nn.Module) -> tuple[np.ndarray, int]:
    """((1, 3) grid, K) of the smallest image the tower takes: what a micro-batch without media sends, weighted zero."""
    merge = tower.spatial_merge_size
    return np.array([[1, merge, merge]], dtype=np.int64), merge * merge
