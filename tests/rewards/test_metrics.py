"""Metrics against independent implementations: pixel counts, rouge-score, the VSI-Bench loop, hand computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rouge_score import rouge_scorer

from rewards import score
from rewards.geometry import box_iou, score_boxes
from rewards.grounding import matched_points
from rewards.metrics import macro_mean, mean_relative_accuracy, recall_at, tube_metrics, tube_parts
from rewards.mix import check_weights, overall, overlong_penalty
from rewards.spans import span_iou
from rewards.text import rouge_l, score_ocr, tokens


def test_box_iou_counts_pixels():
    rng = np.random.default_rng(3)
    for _ in range(50):
        a, b = (np.sort(rng.integers(0, 24, (2, 2)), axis=0) for _ in range(2))
        a[1] += 1
        b[1] += 1
        grid = np.zeros((2, 26, 26), bool)
        for layer, box in enumerate((a, b)):
            grid[layer, box[0, 1] : box[1, 1], box[0, 0] : box[1, 0]] = True
        want = (grid[0] & grid[1]).sum() / (grid[0] | grid[1]).sum()
        assert box_iou((*a[0], *a[1]), (*b[0], *b[1])) == pytest.approx(want)


def test_span_iou_of_unions_counts_seconds():
    one, other = ((0, 4), (3, 10), (20, 25)), ((2, 6), (22, 40))
    seconds = [set().union(*(range(a, b) for a, b in spans)) for spans in (one, other)]
    assert span_iou(one, other) == pytest.approx(len(seconds[0] & seconds[1]) / len(seconds[0] | seconds[1]))


@pytest.mark.parametrize(
    ("predicted", "gold"),
    [
        ("cat jump onto table", "cat jump onto table big"),
        ("red box left of blue box", "blue box right of red box"),
        ("one two three four five", "five four three two one"),
    ],
)
def test_rouge_l_equals_rouge_score_where_its_tokenizer_is_right(predicted, gold):
    class Split:
        def tokenize(self, text):
            return text.split()

    want = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Split()).score(gold, predicted)["rougeL"].fmeasure
    assert rouge_l(predicted.split(), gold.split()) == pytest.approx(want)


def test_tokens():
    assert tokens("The running cats, A dog!") == ["run", "cat", "dog"]
    assert tokens("一只猫 cat") == ["一", "只", "猫", "cat"]
    assert tokens("the") == ["the"]  # nothing else is left
    assert tokens("हिन्दी भाषा") == ["हिन्दी", "भाषा"]  # combining marks stay in their word
    assert tokens("… !") == []


def test_ocr_by_hand():
    assert score_ocr("one two four", "one two three four", {}) == pytest.approx(0.75)  # one deletion of four words
    assert score_ocr("你好吗", "你好", {}) == pytest.approx(0.5)  # one insertion, two characters
    assert score_ocr("abcd", "abxd", {"ocr_metric": "cer"}) == pytest.approx(0.75)


def vsi_bench(pred: float, target: float) -> float:
    """As in the released evaluation code: a loop over the thresholds."""
    rel = abs(pred - target) / target
    thresholds = np.linspace(0.5, 0.95, int((0.95 - 0.5) / 0.05 + 2))
    return sum(rel <= 1 - t for t in thresholds) / len(thresholds)


def test_mean_relative_accuracy_equals_the_released_loop():
    pairs = [(3, 4), (5, 4), (2, 4), (10.2, 10), (8, 10), (9.5, 10), (14.9, 10), (0, 7), (61, 62), (2.5, 2.9)]
    for pred, target in pairs:
        got = score("regression", f"<answer>{pred}</answer>", str(target), {}).accuracy
        assert got == pytest.approx(vsi_bench(pred, target))
    assert mean_relative_accuracy([3, 10], [4, 10]) == pytest.approx((0.6 + 1) / 2)


def test_several_boxes():
    gold = [(0, 0, 10, 10), (20, 20, 30, 30)]
    assert score_boxes([(20, 20, 30, 25), (0, 0, 10, 10)], gold, {}) == pytest.approx(0.75)
    assert score_boxes([(0, 0, 10, 10)], gold, {}) == pytest.approx(0.5)
    assert score_boxes([(0, 0, 10, 10), (1, 1, 2, 2)], gold[:1], {}) is None


def test_points_match_one_to_one():
    assert matched_points([(0.0, 0.0), (1.0, 0.0)], [(0.5, 0.0), (0.0, 0.0)], 0.6) == 2
    assert matched_points([(0.0, 0.0)], [(0.0, 0.1), (0.1, 0.0)], 1.0) == 1


def test_coordinate_systems():
    extra = {"coord": "norm1000", "gt_coord": "pixel", "width": 200, "height": 100}
    got = score("spatial grounding", "<answer>[250, 100, 500, 600]</answer>", "[50, 10, 100, 60]", extra)
    assert got.accuracy == 1
    assert score("spatial grounding", "x", "[1, 1, 2, 2]", {**extra, "width": None}).status == "bad_ground_truth"


def test_aggregations_by_hand():
    assert recall_at([0.3, 0.5, 0.9, 0.1]) == {"mIoU": pytest.approx(0.45), "R@0.3": 0.75, "R@0.5": 0.5, "R@0.7": 0.25}
    assert tube_metrics([1.0, 0.5], [0.3, 0.6]) == {
        "m_tIoU": 0.75,
        "m_vIoU": pytest.approx(0.45),
        "vIoU@0.3": 0.5,
        "vIoU@0.5": 0.5,
    }
    assert macro_mean([1, 0, 0, 1, 1], ["a", "a", "a", "b", "b"])["mean"] == pytest.approx((1 / 3 + 1) / 2)
    gold = '{"time": [1, 3], "boxes": {"1": [0, 0, 10, 10], "2": [0, 0, 10, 10]}}'
    parts = tube_parts('{"time": [1, 5], "boxes": {"2": [0, 0, 10, 5], "9": [0, 0, 1, 1]}}', gold)
    assert parts == {"tiou": 0.5, "viou": pytest.approx(0.5 / 3)}


def test_mix_and_overlong():
    assert overall(1, 0) == pytest.approx(0.9)
    assert overall(0.5, 1, 0.8, 0.2) == pytest.approx(0.6)
    for weights in ((0.9, 0.2), (-0.1, 1.1), (math.nan, 1)):
        with pytest.raises(ValueError, match="weight"):
            check_weights(*weights)
    assert [overlong_penalty(n, 16384, 4096) for n in (12288, 14336, 16384, 16385)] == [0, -0.5, -1, -1]
    with pytest.raises(ValueError, match="overlong_buffer"):
        overlong_penalty(5, 10, 11)
