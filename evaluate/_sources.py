"""Golds that are measured in the source video's pixels, while the model saw the video at another size."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from data.records import Sample


def source_size(sample: Sample) -> dict[str, int]:
    """Width and height of the source video, read from the file while the pipeline has it at hand. Raises MediaError."""
    from data.decode import probe

    timeline = probe(sample.media[0].path)
    return {"source_width": timeline.width, "source_height": timeline.height}


def boxes_as_share(sample: Sample, extra: dict[str, Any]) -> tuple[Sample, dict[str, Any]]:
    """The sample and extra with gold boxes as shares of the frame (norm1), so that any system can be compared with
    them.

    Needs extra's source_width and source_height; without them (a run of an older version) gold and answer are
    compared as they stand. A gold is one box [x1, y1, x2, y2] or {"time": …, "boxes": {second: box}}.
    """
    if not extra.get("source_width"):
        plain = {name: value for name, value in extra.items() if name not in ("coord", "gt_coord")}
        return sample, plain
    width, height = extra["source_width"], extra["source_height"]
    gold = json.loads(sample.answer) if isinstance(sample.answer, str) else sample.answer

    def share(box: list[float]) -> list[float]:
        return [box[0] / width, box[1] / height, box[2] / width, box[3] / height]

    if isinstance(gold, list):
        gold = share(gold)
    else:
        gold = {**gold, "boxes": {second: share(box) for second, box in (gold.get("boxes") or {}).items()}}
    return replace(sample, answer=json.dumps(gold)), {**extra, "gt_coord": "norm1"}
