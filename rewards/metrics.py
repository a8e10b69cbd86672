"""Benchmark aggregations: lists of per-sample numbers in, a dictionary of figures out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rewards.extraction import find_answer
from rewards.geometry import box_iou, scale_of, scaled
from rewards.grounding import TUBE_TASK, Tube, read_gold_tube
from rewards.numeric import relative_accuracy
from rewards.spans import span_iou

THRESHOLDS = (0.3, 0.5, 0.7)


def mean(values: Sequence[float]) -> float:
    """0.0 for no values."""
    return sum(values) / len(values) if values else 0.0


def recall_at(ious: Sequence[float], thresholds: Sequence[float] = THRESHOLDS) -> dict[str, float]:
    """mIoU and R@1 with >= (Charades-STA, Gao et al. 2017): {"mIoU": …, "R@0.3": …, "R@0.5": …, "R@0.7": …}."""
    return {"mIoU": mean(ious)} | {f"R@{bound}": mean([float(iou >= bound) for iou in ious]) for bound in thresholds}


def tube_metrics(tious: Sequence[float], vious: Sequence[float]) -> dict[str, float]:
    """m_tIoU, m_vIoU and vIoU@0.3 / 0.5 with > (VidSTG, Zhang et al. 2020, section 5.1)."""
    shares = {f"vIoU@{bound}": mean([float(viou > bound) for viou in vious]) for bound in (0.3, 0.5)}
    return {"m_tIoU": mean(tious), "m_vIoU": mean(vious), **shares}


def tube_parts(response: object, gold: Any, extra: dict[str, Any] | None = None) -> dict[str, float]:
    """{"tiou", "viou"} of one spatial-temporal answer; viou is over the union of both sides' frames.

    Frames of a side are the seconds of its boxes: a box where the other side has none counts 0 and lengthens the union.
    """
    wanted = read_gold_tube(gold)
    given = find_answer(response, TUBE_TASK).value or Tube(None, None)
    ours, theirs = scale_of(extra or {})
    track, target = given.track or {}, wanted.track or {}
    union = set(track) | set(target)
    overlap = sum(box_iou(scaled(track[s], ours), scaled(target[s], theirs)) for s in set(track) & set(target))
    return {
        "tiou": span_iou(given.spans, wanted.spans) if given.spans else 0.0,
        "viou": overlap / len(union) if union else 0.0,
    }


def mean_relative_accuracy(predictions: Sequence[float], targets: Sequence[float]) -> float:
    """Mean over pairs of VSI-Bench's relative accuracy."""
    return mean([relative_accuracy(value, target) for value, target in zip(predictions, targets, strict=True)])


def macro_mean(values: Sequence[float], groups: Sequence[str]) -> dict[str, Any]:
    """{"mean": mean of the groups' means, "groups": {name: mean}}."""
    held: dict[str, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        held[group].append(value)
    means = {group: mean(held[group]) for group in sorted(held)}
    return {"mean": mean(list(means.values())), "groups": means}
