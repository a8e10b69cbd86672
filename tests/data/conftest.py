"""The folder of real clips, where there is one."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def shared_media() -> Path:
    root = Path(os.environ.get("REELRL_SHARED", Path(__file__).parents[2].parent / "shared"))
    if not (root / "media").is_dir():
        pytest.skip(f"no real clips in {root / 'media'}")
    return root / "media"
