"""Bytes of patches into the floats of the Hugging Face processors, bit for bit: on the device for the policy, on the host
for an engine that takes floats."""

from __future__ import annotations

import json
import os

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
