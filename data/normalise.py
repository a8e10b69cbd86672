"""Bytes of patches into the floats of the Hugging Face processors, bit for bit: on the device for the policy, on the host
for an engine that takes floats."""

from __future__ import annotations

import functools
import json
import os

import numpy as np
import torch
from torch import Tensor

CPU_BLOCK = 1 << 17  # floats that normalise() works on at once


def read_normalisation(model_dir: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel from the processor files of a model folder.

    Images and videos go through one tower call, so their constants have to be equal; raises ValueError if they are
    not, or if no processor file names them.
    """
    found: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {}
    for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        path = os.path.join(model_dir, name)
        if not os.path.exists(path):
            continue
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        for key, part in (("", content), *((k, v) for k, v in content.items() if isinstance(v, dict))):
            if part.get("image_mean") and part.get("image_std"):
                found[f"{name}:{key}"] = (tuple(part["image_mean"]), tuple(part["image_std"]))
    if not found:
        raise ValueError(f"{model_dir}: no processor file there gives image_mean and image_std")
    if len(set(found.values())) > 1:
        raise ValueError(f"{model_dir}: image and video normalisation differ, but one tower call serves both: {found}")
    return next(iter(found.values()))


def normalise(
    patches: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """uint8 (K, C*...) channel-major patches -> `dtype` of the same shape: (x - 255 mean) / (255 std), made in float32.

    The order of operations is the processors' (`rescale_and_normalize` folds 1/255 into the constants), so the result
    is bit-equal to theirs.
    """
    scale = 1.0 / (1 / 255)  # as the processors write it
    mean_t = (torch.tensor(mean, device=patches.device) * scale).view(1, -1, 1)
    std_t = (torch.tensor(std, device=patches.device) * scale).view(1, -1, 1)
    out = torch.empty(patches.shape, dtype=dtype, device=patches.device)
    # On a CPU in blocks that stay in its cache: three passes over 100 MB of floats would wait for memory.
    rows = max(1, len(patches) if patches.is_cuda else CPU_BLOCK // max(1, patches.shape[1]))
    for start in range(0, len(patches), rows):
        block = out[start : start + rows]
        floats = block if dtype == torch.float32 else torch.empty(block.shape, device=patches.device)
        floats.copy_(patches[start : start + rows])
        floats.view(len(block), len(mean), -1).sub_(mean_t).div_(std_t)
        if floats is not block:
            block.copy_(floats)
    return out


@functools.cache
def _table(mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> np.ndarray:
    """(C, 256) what normalise() makes of every byte, as integers of the same size: OpenCV, which knows no bfloat16, and NumPy
    only move them."""
    every_byte = torch.arange(256, dtype=torch.uint8).repeat(1, len(mean))
    whole = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    return normalise(every_byte, mean, std, dtype).view(whole).view(len(mean), 256).numpy()


def look_up(patches: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...], out: Tensor) -> None:
    """normalise() of uint8 (K, C*...) patches into `out` of the same shape on the host, bit for bit, for threads that work
    beside each other.

    A byte has 256 values per channel. OpenCV, which vLLM brings, looks them up: one call without the interpreter's lock per
    channel, where arithmetic in blocks that stay in a core's cache asks for the lock thousands of times per clip.
    """
    import cv2

    table = _table(mean, std, out.dtype)
    values, width = out.view(getattr(torch, table.dtype.name)).numpy(), patches.shape[1] // len(mean)
    for channel, row in enumerate(table):
        columns = slice(channel * width, (channel + 1) * width)
        cv2.LUT(patches[:, columns], row[None], values[:, columns])


def empty_pixels(rows: int, values: int, dtype: torch.dtype) -> Tensor:
    """(rows, values), not set. NumPy asks the system for huge pages, torch does not: 40 page faults for 77 MB instead of
    19,000."""
    return torch.from_numpy(np.empty((rows, values * dtype.itemsize), np.uint8)).view(dtype)
