"""M-RoPE positions, patches and grids of the Qwen-VL families: arithmetic on arrays, no model and no processor.

Positions follow the rule the models were trained with, which is also vLLM's: after an image or video the text goes on
at the highest position so far + 1. transformers 5 restarts it at + max(height, width) instead for Qwen2-VL and
Qwen2.5-VL, which differs as soon as a video's time axis is the longest one; a policy left to compute its own positions
then scores other log-probs than those that were sampled.
"""

from __future__ import annotations

import numpy as np


def mrope_positions(
    mm_type_ids: np.ndarray,
    grid_thw: np.ndarray,
    merge: int,
    seconds_per_position: list[float] | None = None,
) -> np.ndarray:
    """(3, P) int64 positions of one prompt (Qwen2-VL, arXiv 2409.12191, section 2.1).

    mm_type_ids: (P,) 0 for text, anything else for visual tokens. grid_thw: (K, 3) patches of each *run* of visual
    tokens, in the order of the runs: one per medium for Qwen2-VL and Qwen2.5-VL, one (1, h, w) per temporal patch of a
    video for Qwen3-VL and Qwen3.5, whose frames stand apart with their timestamps between them.
    seconds_per_position: (K,) factor of each run's time axis, 1.0 if absent; Qwen2.5-VL (arXiv 2502.13923, section 2.1)
    uses seconds per temporal patch * tokens per second and rounds the products down.
    Raises ValueError when runs and grids disagree.
    """
    length = len(mm_type_ids)
    out = np.empty((3, length), np.int64)
    edges = np.flatnonzero(np.diff(mm_type_ids)) + 1
    starts = np.concatenate([[0], edges]).astype(int) if length else np.empty(0, int)
    stops = np.concatenate([edges, [length]]).astype(int) if length else np.empty(0, int)
    following, run = 0, 0
    for start, stop in zip(starts, stops):
        if mm_type_ids[start] == 0:
            out[:, start:stop] = np.arange(following, following + stop - start)
            following += int(stop - start)
            continue
        if run >= len(grid_thw):
            raise ValueError(f"more runs of visual tokens than the {len(grid_thw)} grids")
        t, h, w = (int(side) for side in grid_thw[run])
        block = np.indices((t, h // merge, w // merge)).reshape(3, -1)
        if block.shape[1] != stop - start:
            raise ValueError(f"grid {t}x{h}x{w} has {block.shape[1]} tokens, the prompt {stop - start} in its place")
        factor = seconds_per_position[run] if seconds_per_position else 1.0
        if factor != 1.0:
            block[0] = (block[0] * factor).astype(np.int64)
        out[:, start:stop] = block + following
        following = int(out[:, start:stop].max()) + 1
        run += 1
    if run != len(grid_thw):
        raise ValueError(f"{len(grid_thw)} grids for {run} runs of visual tokens")
    return out


def patch_grid(shape: tuple[int, ...], patch: int, merge: int, temporal_patch: int) -> tuple[int, int, int]:
    """(t, h, w): the grid of patches of frames (F, 3, H, W). Raises ValueError for sides that no merge window fills."""
    count, _, height, width = shape
    if height % (patch * merge) or width % (patch * merge):
        raise ValueError(f"frames of {width}x{height} are no multiple of {patch * merge} pixels")
    return -(-count // temporal_patch), height // patch, width // patch


def patchify(frames: np.ndarray, patch: int, merge: int, temporal_patch: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """uint8 (F, 3, H, W) -> ((t*h*w, 3*temporal_patch*patch*patch) uint8, (t, h, w)), in the processors' order.

    Rows go by temporal patch, then by merge window (row, column), then inside the window; columns by channel, time,
    row, column. A number of frames that temporal_patch does not divide is filled up with the last one; an image is one
    frame.
    """
    t, h, w = patch_grid(frames.shape, patch, merge, temporal_patch)
    if lacking := -len(frames) % temporal_patch:
        frames = np.concatenate([frames, np.repeat(frames[-1:], lacking, axis=0)])
    channels = frames.shape[1]
    split = frames.reshape(t, temporal_patch, channels, h // merge, merge, patch, w // merge, merge, patch)
    ordered = split.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return ordered.reshape(t * h * w, channels * temporal_patch * patch * patch), (t, h, w)


def patch_times(seconds: list[float], temporal_patch: int) -> tuple[float, ...]:
    """Seconds of each temporal patch: the mean of its first and last frame, the last frame standing in for missing
    ones."""
    seconds = list(seconds) + [seconds[-1]] * (-len(seconds) % temporal_patch)
    firsts, lasts = seconds[::temporal_patch], seconds[temporal_patch - 1 :: temporal_patch]
    return tuple((first + last) / 2 for first, last in zip(firsts, lasts))
