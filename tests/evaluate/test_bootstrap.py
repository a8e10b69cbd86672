"""Means, macro means and intervals against values worked out by hand or by a plain loop."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from evaluate._bootstrap import Resampler, fold, paired, shares


def test_mean_and_counts():
    draws = Resampler(["a", "a", "b", "c"], resamples=200)
    got = draws.mean([1, 0, 1, 0.5])
    assert (got.value, got.n) == (0.625, 4)
    assert got.low <= 0.625 <= got.high
    part = draws.mean([1, 0, 1, 0.5], [True, True, False, False])
    assert (part.value, part.n) == (0.5, 2)
    none = draws.mean([1, 0, 1, 0.5], [False] * 4)
    assert none.n == 0 and math.isnan(none.value) and none.as_dict()["value"] is None


def test_interval_of_independent_questions_is_the_binomial_one():
    """400 questions on 400 videos, 60 % right: the normal interval is 0.6 -+ 1.96 sqrt(0.24 / 400) = 0.6 -+ 0.048."""
    values = [1.0] * 240 + [0.0] * 160
    got = Resampler([str(n) for n in range(400)], resamples=4000).mean(values)
    assert got.low == pytest.approx(0.552, abs=0.004) and got.high == pytest.approx(0.648, abs=0.004)


def test_interval_knows_that_questions_of_a_video_go_together():
    """The same scores with 10 questions per video that agree: 40 videos, so sqrt(10) times as wide."""
    values = [1.0] * 240 + [0.0] * 160
    got = Resampler([str(n // 10) for n in range(400)], resamples=4000).mean(values)
    assert (got.high - got.low) / 2 == pytest.approx(1.96 * math.sqrt(0.24 / 40), abs=0.01)


def test_resampling_equals_a_plain_loop():
    clusters, values = ["a", "b", "b", "c", "c", "c"], np.array([1.0, 0.0, 1.0, 0.0, 0.5, 1.0])
    draws = Resampler(clusters, resamples=50, seed=3)
    names = sorted(set(clusters))
    means = []
    for weights in draws.weights:
        total = sum(w * v for w, name in zip(weights, names) for v, c in zip(values, clusters) if c == name)
        count = sum(w * clusters.count(name) for w, name in zip(weights, names))
        means.append(total / count)
    got = draws.mean(values)
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_macro_of_tasks_and_categories():
    """Tasks x: 1, 0, 0 (mean 1/3), y: 1 -> category p = 2/3; z: 0.5 -> category q = 0.5; all (2/3 + 1/2) / 2 = 7/12."""
    paths = [("p", "x")] * 3 + [("p", "y")] + [("q", "z")]
    got = Resampler(list("abcde"), resamples=50).macro([1, 0, 0, 1, 0.5], paths)
    assert got.value == pytest.approx(7 / 12) and got.n == 5


def test_fold_takes_paths_of_unequal_length():
    leaves = {("a", "x"): np.array([1.0]), ("a", "y"): np.array([3.0]), ("b",): np.array([4.0])}
    assert fold(leaves)[0] == 3.0
    gap = {("a",): np.array([1.0, np.nan]), ("b",): np.array([0.0, 0.5])}
    assert fold(gap).tolist() == [0.5, 0.5]


def test_paired_difference():
    """B wins on 12 videos, loses on 2, ties elsewhere. Sign test over 14: p = 2 * sum_{k<=2} C(14,k) / 2^14 = 0.0129."""
    a = [0.0] * 12 + [1.0] * 2 + [1.0] * 20
    b = [1.0] * 12 + [0.0] * 2 + [1.0] * 20
    got = paired(a, b, [str(n) for n in range(34)], resamples=40000)
    assert (got.wins, got.losses, got.n) == (12, 2, 34)
    assert got.difference == pytest.approx(10 / 34)
    assert got.p_value == pytest.approx(2 * (1 + 14 + 91) / 2**14, abs=0.002)
    assert got.low > 0


def test_paired_p_value_is_that_of_all_sign_flips_of_the_videos():
    """8 videos with 1 to 3 questions: all 2^8 flips of the videos' summed differences, counted one by one."""
    rng = np.random.default_rng(5)
    clusters = [f"v{n}" for n in range(8) for _ in range(1 + n % 3)]
    a, b = rng.integers(0, 2, len(clusters)).astype(float), rng.integers(0, 2, len(clusters)).astype(float)
    sums = [sum(y - x for x, y, c in zip(a, b, clusters) if c == f"v{n}") for n in range(8)]
    flips = [abs(sum(sign * s for sign, s in zip(signs, sums))) for signs in itertools.product([1, -1], repeat=8)]
    exact = sum(flip >= abs(sum(sums)) for flip in flips) / len(flips)
    got = paired(a, b, clusters, resamples=40000)
    assert 0.05 < exact < 0.95 and got.p_value == pytest.approx(exact, abs=0.01)
    assert got.difference == pytest.approx(sum(sums) / len(clusters))


def test_paired_mean_of_means():
    """Weights of {a: {x: 2 questions, y: 1}, b: 4 questions}: 1/8 each, 1/4, 1/8 each. B gains at a/y and loses at one of b:
    1/4 - 1/8. Every question is a video, so of the four flips of (1/4, -1/8) two reach 1/8 twice: all do."""
    paths = [("a", "x"), ("a", "x"), ("a", "y"), ("b",), ("b",), ("b",), ("b",)]
    assert shares(paths).tolist() == [1 / 8, 1 / 8, 1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 8]
    a, b = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    got = paired(a, b, [str(n) for n in range(7)], paths, resamples=2000)
    macro = Resampler([str(n) for n in range(7)], resamples=1).macro
    assert got.difference == pytest.approx(1 / 8) == pytest.approx(macro(b, paths).value - macro(a, paths).value)
    assert (got.wins, got.losses) == (1, 1) and got.p_value == 1.0

    rng = np.random.default_rng(7)  # 9 videos of two tasks of other sizes: all 2^9 flips of the videos' weighted sums
    clusters = [f"v{n}" for n in range(9) for _ in range(2)]
    paths = [("rare",) if n < 3 else ("common",) for n in range(9) for _ in range(2)]
    a, b = rng.integers(0, 2, 18).astype(float), rng.integers(0, 2, 18).astype(float)
    weight = {"rare": 1 / 12, "common": 1 / 24}
    sums = [sum(weight[p[0]] * (y - x) for x, y, c, p in zip(a, b, clusters, paths) if c == f"v{n}") for n in range(9)]
    flips = [abs(sum(sign * s for sign, s in zip(signs, sums))) for signs in itertools.product([1, -1], repeat=9)]
    exact = sum(flip >= abs(sum(sums)) - 1e-12 for flip in flips) / len(flips)
    got = paired(a, b, clusters, paths, resamples=40000)
    assert 0.02 < exact < 0.98 and got.p_value == pytest.approx(exact, abs=0.01)


def test_paired_without_differences_is_not_significant():
    assert paired([1.0, 0.0], [1.0, 0.0], ["a", "b"]).p_value == 1.0
    with pytest.raises(ValueError, match="equal lengths"):
        paired([1.0], [1.0, 0.0], ["a"])
