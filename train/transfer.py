"""Host arrays on their way to the device, without the host waiting for what the device does before."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


def send(values: Tensor, device: torch.device) -> Tensor:
    """values on `device`. For CUDA through page-locked memory: a copy from any other waits until the stream has come to it, so
    that nothing is queued behind it meanwhile. The locked memory is torch's and used again."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def send_joined(arrays: list[np.ndarray], device: torch.device, axis: int = 0) -> Tensor:
    """np.concatenate(arrays, axis) on `device`, written into page-locked memory at once; no array: an empty one of int64."""
    if not arrays:
        return torch.zeros(0, dtype=torch.long, device=device)
    shape = list(arrays[0].shape)
    shape[axis] = sum(array.shape[axis] for array in arrays)
    dtype = torch.from_numpy(np.empty(0, dtype=arrays[0].dtype)).dtype
    host = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
    np.concatenate(arrays, axis=axis, out=host.numpy())
    return host.to(device, non_blocking=True)


def send_lengths(lengths: list[int], device: torch.device) -> tuple[Tensor, int]:
    """What kernels for variable lengths ask for: ((sequences + 1,) int32 offsets of the sequences, the longest one)."""
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return send(offsets, device), max(lengths, default=0)


class Pace:
    """Lets the host run one micro-batch ahead of a CUDA device, and no further: what is on its way there lies in page-locked
    memory, which torch keeps for good."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.before: torch.cuda.Event | None = None  # when the last micro-batch but one is done

    def wait(self) -> None:
        """Called before each micro-batch is packed."""
        if not self.cuda:
            return
        if self.before is not None:
            self.before.synchronize()
        self.before = torch.cuda.Event()
        self.before.record()
