"""The vision tower as the trainer uses it: bytes in, one call per micro-batch, patch embedding as a matrix product.

Patches cross the door as uint8 in the processor's own order (media order; channel-major inside a patch), so they are a
quarter of the floats' size on their way to the device; normalisation happens there, bit for bit as the Hugging Face
processors do it on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from train.cudnn_attention import dense_frames
from train.group_attention import scaled_queries
from train.transfer import send, send_lengths

# "flash" in the name: transformers then hands over cu_seqlens instead of one frame per call.
VISION_VARLEN = "varlen_flash_vision"
VISION_CUDNN = "cudnn_flash_vision"
FEWEST_FRAMES = 4  # of one size in a row, for which a dense call pays
# Frames of 64 patches more than a multiple of 128 are not for cuDNN: its backward pass on Hopper (9.19 and 9.20 at least) leaves
# the end of the last tile of keys unmasked, and the gradient of a query whose log-sum-exp is below -88 is nan (pytorch #196678).
TILE, UNMASKED = 128, 64
MOST_FRAMES = 64  # of one call: five numbers of frames, so that few of cuDNN's plans serve all clips


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


@dataclass(slots=True)
class FrameRuns:
    """Frames of a micro-batch in runs of one size, for dense calls; what is left goes through the kernel for variable lengths."""

    cu_seqlens: Tensor  # the tower's own: attention over other segments (Qwen2.5-VL's windows) has another one
    runs: list[tuple[int, int]]  # (frames, patches of each), in order; (0, patches) of a part that is left
    cu_left: Tensor  # (frames left + 1,) int32
    longest_left: int


def frame_runs(grid_thw: np.ndarray, cu_seqlens: Tensor) -> FrameRuns:
    """Runs of a power of two frames: a grid of 50 frames gives 32, 16 and 2 that are left. Of some sizes all are left."""
    runs, left = [], []
    for frames, height, width in np.asarray(grid_thw).reshape(-1, 3).tolist():
        patches = height * width
        while frames >= FEWEST_FRAMES and patches % TILE != UNMASKED:
            count = min(MOST_FRAMES, 1 << (frames.bit_length() - 1))
            runs.append((count, patches))
            frames -= count
        if frames:
            runs.append((0, frames * patches))
            left += [patches] * frames
    return FrameRuns(cu_seqlens, runs, *send_lengths(left, cu_seqlens.device))


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scaling: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(scaled_queries(q, scaling), k, v, cu, cu, longest, longest)


def vision_attention_varlen(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """All frames of all grids in one kernel call: (1, heads, K, d) with `cu_seq_lens_q` from the tower. CUDA only."""
    q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))  # (K, heads, d)
    return _varlen(q, k, v, kwargs["cu_seq_lens_q"], kwargs["max_length_q"], scaling)[None], None


def vision_attention_cudnn(module, query, key, value, attention_mask, scaling=None, frame_runs=None, **kwargs):
    """The same with cuDNN's dense kernels for runs of frames of one size, 1.5 to 1.7 times as fast on Hopper."""
    if frame_runs is None or kwargs["cu_seq_lens_q"] is not frame_runs.cu_seqlens:  # windows
        return vision_attention_varlen(module, query, key, value, attention_mask, scaling, **kwargs)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (K, heads, d); the kernel takes any strides
    (first, _), *more = frame_runs.runs
    if first and not more:
        return dense_frames(q, k, v, first, scaling)[None], None
    sizes = [frames * patches if frames else patches for frames, patches in frame_runs.runs]
    split = [x.split(sizes) for x in (q, k, v)]
    left = [[part for part, (frames, _) in zip(parts, frame_runs.runs) if not frames] for parts in split]
    rest = iter(())
    if left[0]:
        whole = _varlen(*map(torch.cat, left), frame_runs.cu_left, frame_runs.longest_left, scaling)
        rest = iter(whole.split([len(part) for part in left[0]]))
    out = [
        dense_frames(*each, frames, scaling) if frames else next(rest)
        for *each, (frames, _) in zip(*split, frame_runs.runs)
    ]
    return torch.cat(out)[None], None


AttentionInterface.register(VISION_VARLEN, vision_attention_varlen)
AttentionInterface.register(VISION_CUDNN, vision_attention_cudnn)


def choose_vision_attention(attention: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The tower's kernel beside a decoder with `attention`; None: the library's, one call per frame."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return VISION_CUDNN if attention == "cudnn" else VISION_VARLEN


def grid_inputs(tower: nn.Module, grid_thw: np.ndarray, device: torch.device) -> dict[str, Tensor | int | FrameRuns]:
    """What the tower derives from the grids, computed on the host and sent once: no device synchronisation inside.

    The names are those under which the tower's forward looks for precomputed values.
    """
    from transformers import vision_utils as vu

    grid = torch.as_tensor(np.ascontiguousarray(grid_thw), dtype=torch.long).view(-1, 3)
    merge = tower.spatial_merge_size
    out: dict[str, Tensor] = {"cu_seqlens": vu.get_vision_cu_seqlens(grid)}
    out["position_ids"] = vu.get_vision_position_ids(grid, merge)
    longest: dict[str, int | FrameRuns] = {"max_seqlen": int((grid[:, 1] * grid[:, 2]).max())}
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
    sent = {name: send(value, device) for name, value in out.items()}
    if tower.config._attn_implementation == VISION_CUDNN:
        longest["frame_runs"] = frame_runs(grid_thw, sent["cu_seqlens"])
    return {**sent, **longest}


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
