"""Means with confidence intervals, where questions about the same video are not independent.

Resampling is over videos (clusters), not over questions: 2,700 questions on 900 videos carry less information than
2,700 independent ones. Percentile bootstrap (Efron and Tibshirani 1993, ch. 13), clustered as in Cameron, Gelbach and
Miller 2008; paired comparison by sign flips of the per-video differences (Fisher's randomisation test).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, the ends of its 95 % interval and how many questions it is over. NaN where there are none."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON, which has no NaN."""
        return {k: (None if isinstance(v, float) and v != v else v) for k, v in asdict(self).items()}


class Resampler:
    """One set of bootstrap draws over the videos of a run, shared by all its metrics.

    clusters: the video of each question, (n,). Every method takes per-question arrays of the same length.
    """

    def __init__(self, clusters: list[str], *, resamples: int = 1000, seed: int = 0, level: float = 0.95):
        names, self.cluster_of = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
        self.num_clusters, self.level = len(names), level
        draws = np.random.default_rng(seed)
        if self.num_clusters:
            even = np.full(self.num_clusters, 1.0 / self.num_clusters)
            self.weights = draws.multinomial(self.num_clusters, even, size=resamples).astype(np.float32)  # (draws, C)
        else:
            self.weights = np.zeros((resamples, 0), dtype=np.float32)

    def _sums(self, values: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per draw: weighted sum of the kept values and weighted number of them, both (draws,)."""
        index = self.cluster_of[keep]
        total = np.bincount(index, weights=values[keep], minlength=self.num_clusters)
        count = np.bincount(index, minlength=self.num_clusters)
        used = np.nonzero(count)[0]
        weights = self.weights[:, used].astype(np.float64)
        return weights @ total[used], weights @ count[used]

    def _interval(self, draws: np.ndarray) -> tuple[float, float]:
        draws = draws[~np.isnan(draws)]
        if not len(draws):
            return float("nan"), float("nan")
        tail = (1 - self.level) / 2
        low, high = np.quantile(draws, [tail, 1 - tail])
        return float(low), float(high)

    def mean(self, values, keep=None) -> Estimate:
        """Plain mean over the kept questions. values (n,) floats; keep (n,) booleans or None for all."""
        values = np.asarray(values, dtype=np.float64)
        keep = np.ones(len(values), dtype=bool) if keep is None else np.asarray(keep, dtype=bool)
        n = int(keep.sum())
        if n == 0:
            return Estimate(float("nan"), float("nan"), float("nan"), 0)
        total, count = self._sums(values, keep)
        with np.errstate(invalid="ignore", divide="ignore"):
            return Estimate(float(values[keep].mean()), *self._interval(total / count), n)

    def macro(self, values, paths: list[tuple[str, ...]], keep=None) -> Estimate:
        """Mean of means: questions with the same path are averaged first, then paths with the same beginning, upwards.

        paths ("backward", "EPM"), ("backward", "ASI"), ("realtime", "OCR") ...: task means, then category means, then
        their mean. A task that a draw left out does not take part in that draw.
        """
        values = np.asarray(values, dtype=np.float64)
        keep = np.ones(len(values), dtype=bool) if keep is None else np.asarray(keep, dtype=bool)
        leaves: dict[tuple[str, ...], np.ndarray] = {}
        for index in np.nonzero(keep)[0]:
            leaves.setdefault(tuple(paths[index]), []).append(index)  # type: ignore[arg-type]
        if not leaves:
            return Estimate(float("nan"), float("nan"), float("nan"), 0)
        points, draws = {}, {}
        for path, indices in leaves.items():
            chosen = np.zeros(len(values), dtype=bool)
            chosen[indices] = True
            total, count = self._sums(values, chosen)
            with np.errstate(invalid="ignore", divide="ignore"):
                draws[path] = np.where(count > 0, total / np.maximum(count, 1e-9), np.nan)
            points[path] = np.array([values[chosen].mean()])
        return Estimate(float(fold(points)[0]), *self._interval(fold(draws)), int(keep.sum()))


def fold(leaves: dict[tuple[str, ...], np.ndarray]) -> np.ndarray:
    """Averages arrays up a tree of paths: {("a","x"): 1, ("a","y"): 3, ("b",): 4} -> mean(mean(1, 3), 4) = 3."""
    if list(leaves) == [()]:
        return leaves[()]
    children: dict[str, dict[tuple[str, ...], np.ndarray]] = {}
    for path, value in leaves.items():
        children.setdefault(path[0] if path else "", {})[path[1:]] = value
    stacked = np.stack([fold(child) for child in children.values()])
    held = ~np.isnan(stacked)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(held, stacked, 0.0).sum(axis=0) / held.sum(axis=0)


def shares(paths: list[tuple[str, ...]]) -> np.ndarray:
    """(n,) weight of each question in the mean of means over `paths`; they sum to 1.

    [("a",), ("a",), ("b",)] -> [1/4, 1/4, 1/2].
    """
    counts: dict[tuple[str, ...], int] = {}
    for path in paths:
        counts[path] = counts.get(path, 0) + 1
    children: dict[tuple[str, ...], set[str]] = {}
    for path in counts:
        for depth, name in enumerate(path):
            children.setdefault(path[:depth], set()).add(name)
    of_path = {
        path: 1.0 / (count * math.prod(len(children[path[:depth]]) for depth in range(len(path))))
        for path, count in counts.items()
    }
    return np.array([of_path[path] for path in paths])


@dataclass(frozen=True, slots=True)
class Paired:
    """Model B minus model A on the same questions: difference, 95 % interval, two-sided p, wins and losses of B."""

    difference: float
    low: float
    high: float
    p_value: float
    wins: int
    losses: int
    n: int


def paired(a, b, clusters: list[str], paths=None, *, resamples: int = 5000, seed: int = 0) -> Paired:
    """Paired comparison, both the interval (bootstrap) and the p-value (sign flips) clustered by video.

    a, b: scores of the same questions in the same order, (n,). paths: of each question in a mean of means (Resampler.macro);
    None compares plain means. Raises ValueError when the lengths differ.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or len(a) != len(clusters):
        raise ValueError(f"paired scores must have equal lengths, got {len(a)}, {len(b)} and {len(clusters)} clusters")
    delta = b - a
    draws = Resampler(clusters, resamples=resamples, seed=seed)
    estimate = draws.mean(delta) if paths is None else draws.macro(delta, paths)
    names, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    parts = delta if paths is None else delta * shares(paths)  # of the difference, but for a factor
    sums = np.bincount(index, weights=parts, minlength=len(names))
    sums = sums[sums != 0]
    p_value = 1.0
    if len(sums):
        signs = np.random.default_rng(seed + 1).integers(0, 2, size=(resamples, len(sums))) * 2 - 1
        flipped = np.abs(signs @ sums)
        p_value = float((1 + np.sum(flipped >= abs(sums.sum()) - 1e-12)) / (resamples + 1))
    return Paired(
        estimate.value, estimate.low, estimate.high, p_value, int((delta > 0).sum()), int((delta < 0).sum()), len(a)
    )
