"""Bytes of patches looked up in a table, against the formula written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.normalise import empty_pixels, look_up

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, as in Qwen2-VL


def rounded_to_bf16(floats: np.ndarray) -> np.ndarray:
    """The upper 16 bits of float32, rounded to nearest, ties to even, as float32."""
    bits = floats.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize(
    ("dtype", "rounded"),
    [
        (torch.float32, lambda x: x),
        (torch.bfloat16, rounded_to_bf16),
        (torch.float16, lambda x: x.astype(np.float16).astype(np.float32)),
    ],
)
def test_looked_up_is_computed(dtype, rounded):
    """Every byte in every channel, in rows of (channel, 512 values), of which a part is filled in."""
    patches = np.random.default_rng(0).permuted(np.arange(5 * 3 * 512) % 256).astype(np.uint8).reshape(5, 3 * 512)
    assert all(len(np.unique(patches.reshape(5, 3, 512)[:, channel])) == 256 for channel in range(3))
    scale = np.float32(255)
    centre, spread = (np.array(values, np.float32)[None, :, None] * scale for values in (MEAN, STD))
    want = rounded((patches.reshape(5, 3, 512).astype(np.float32) - centre) / spread).reshape(5, -1)
    out = empty_pixels(7, 3 * 512, dtype)
    out.zero_()
    look_up(patches, MEAN, STD, out[1:6])
    assert out.dtype == dtype and np.array_equal(out[1:6].float().numpy(), want)
    assert not out[0].any() and not out[6].any()


def test_by_hand():
    """Mean and deviation one half: 0, 51, 102 and 255 are -1, -0.6, -0.2 and 1; two channels, two rows of four."""
    out = empty_pixels(2, 4, torch.float32)
    look_up(np.array([[0, 51, 102, 255], [255, 102, 51, 0]], np.uint8), (0.5, 0.5), (0.5, 0.5), out)
    want = [[-1, -0.6, -0.2, 1], [1, -0.2, -0.6, -1]]
    assert np.array_equal(out.numpy(), np.array(want, np.float32))
