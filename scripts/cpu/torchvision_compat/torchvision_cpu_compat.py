"""Lets a CUDA-built torchvision import beside a CPU-only torch.

Its compiled extension cannot load there, and torchvision then fails while registering fake kernels for `nms` and `qnms`.
Declaring the two schemas before torchvision is imported is enough for everything but those two operators. It has to be a
start-up hook, because vLLM inspects model classes in a child process where the trainer's code never runs.
Costs nothing until torchvision is imported; does nothing beside a CUDA or ROCm torch.
"""

import importlib.abc
import sys


class _DeclareOperators(importlib.abc.MetaPathFinder):
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            try:
                import torch
            except ImportError:
                return None
            if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
                self.library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _DeclareOperators())
