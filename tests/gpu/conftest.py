"""GPU tests: `python -m pytest tests/gpu -m gpu`. Without CUDA they are skipped.

Every engine runs in a process of its own (vLLM's sleep mode allows one per process), eager and small; the whole folder
takes a few minutes on one H200.
"""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:
        if "/gpu/" in str(item.path).replace("\\", "/"):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
