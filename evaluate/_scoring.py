"""From predictions to results: the record of a benchmark, one answer's score, the tables with their intervals.

Scores come from `rewards.score`, the same code that pays rewards in training. A failure (undecodable, too long, lost
request) stays in the denominator as wrong; an answer that only a judge can grade is left out and counted apart.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from data.records import SCHEMA_VERSION, Sample
from evaluate._bootstrap import Estimate, Resampler
from evaluate._predictions import FAILURES

UNJUDGED = "unjudged"


@dataclass(slots=True)
class Answer:
    """One question with its row of predictions.jsonl. `score` is None while it waits for a judge."""

    sample: Sample
    row: dict[str, Any]
    score: float | None
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.row["status"] in FAILURES

    @property
    def answered(self) -> bool:
        return not self.failed and self.row.get("extracted") is not None

    @property
    def video(self) -> str:
        """What a bootstrap draw takes or leaves as a whole: the first medium, else the question itself."""
        return self.sample.extra.get("cluster") or video_of(self.sample)


Metrics = dict[str, Estimate]


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark program declares; `evaluate._run.main` does the rest.

    load: flags -> every sample of the annotation file, media paths relative; sets extra["excluded"] = reason on records
    that must not be answered, and extra["outside_primary"] = True on controls that the primary score leaves out.
    prompts: name -> sample -> whole text of the user turn (official wordings); "direct" and "think" of data.prompts
    always exist. score: replaces rewards.score where the official rule needs more.
    metrics: the official aggregates. groups: sample -> its path in the primary score, where that is a mean of means (see
    Resampler.macro); kept in the row, so that runs are compared by that score. breakdown: fields of `extra` with a table
    each; tables: further tables.
    """

    name: str
    title: str
    load: Callable[[Namespace], list[Sample]]
    media_roots: tuple[str, ...] = ()
    prompts: dict[str, Callable[[Sample], str]] = field(default_factory=dict)
    default_prompt: str = ""
    score: Callable[[Sample, str, dict[str, Any]], dict[str, Any]] | None = None
    metrics: Callable[[list[Answer], Resampler], Metrics] | None = None
    primary: str = "accuracy"
    groups: Callable[[Sample], tuple[str, ...]] | None = None
    breakdown: tuple[str, ...] = ()
    judged: Callable[[Sample], bool] = lambda sample: False
    judge_prompt: str = "general"
    official_n: int | dict[str, int] | None = None
    tables: Callable[[list[Answer], Resampler], dict[str, dict[str, dict[str, Any]]]] | None = None
    flags: Callable[[ArgumentParser], None] | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    variant: Callable[[Namespace], str] = lambda args: ""
    clips: Callable[[Sample], list] | None = None  # other files that show the same thing (see resolve_media)
    watch: Callable[[Sample], dict[str, Any]] | None = None  # facts about the media that scoring needs, kept in the row
    guessing: Callable[[list[Answer]], float] | None = None  # chance level of a primary score that is not linear


def video_of(sample: Sample) -> str:
    """The video (or first image) that a question is about, as an identity for grouping."""
    if not sample.media:
        return sample.id
    first = sample.media[0]
    return first.path or (first.frames[0] if first.frames else sample.id)


def chance(sample: Sample) -> float:
    """Expected score of a guess that knows only the form of the answer: 1/options, 1/2 for yes/no, else 0."""
    if sample.problem_type == "multiple choice" and sample.options:
        return 1 / len(sample.options)
    return 0.5 if sample.problem_type == "boolean" else 0.0


def chance_of_primary(benchmark: Benchmark, answers: list[Answer], metrics: Callable, primary: str) -> float | None:
    """Expected primary score of guesses: the metric of each question's chance level, which is exact for (macro) means;
    Benchmark.guessing for others. None when the metric does not exist for these answers."""
    if benchmark.guessing is not None and metrics is benchmark.metrics:
        return round(benchmark.guessing(answers), 4) if answers else None
    guesses = [Answer(a.sample, a.row, None if a.score is None else chance(a.sample)) for a in answers]
    estimate = metrics(guesses, Resampler([answer.video for answer in answers], resamples=1)).get(primary)
    return round(estimate.value, 4) if estimate is not None and estimate.n else None


def score_extra(sample: Sample, row: dict[str, Any]) -> dict[str, Any]:
    """What `rewards.score` is told beside the answer: the row's own fields, its options, what the model really saw."""
    extra = {**sample.extra, **row.get("seen", {}), "options": list(sample.options)}
    if row.get("think_prefilled"):
        extra["think_prefilled"] = True
    return extra


def score_row(benchmark: Benchmark, sample: Sample, row: dict[str, Any], protocol: str = "official") -> dict[str, Any]:
    """The row with `extracted`, `score`, `status` and `parts` filled in; failures score 0 and keep their reason."""
    if benchmark.groups is not None and protocol == "official":
        row = {**row, "primary_group": list(benchmark.groups(sample))}
    if row["status"] in FAILURES:
        return {**row, "extracted": None, "score": 0.0, "parts": {}}
    if protocol == "easyvideor1":
        from evaluate._easyvideor1 import score_like_easyvideor1

        extracted, value = score_like_easyvideor1(sample, row["response"])
        return {**row, "extracted": extracted, "score": value, "parts": {}, "status": "ok"}
    if benchmark.score is not None:
        scored = benchmark.score(sample, row["response"], score_extra(sample, row))
    else:
        scored = plain_score(sample, row["response"], score_extra(sample, row))
    if benchmark.judged(sample):
        scored["parts"] = {**scored.get("parts", {}), "rouge_l": scored["score"]}
        scored["score"] = row.get("judged_score")
        scored["status"] = row.get("judged_status", UNJUDGED)
    return {**row, "parts": {}, **scored}


def plain_score(sample: Sample, response: str, extra: dict[str, Any]) -> dict[str, Any]:
    """rewards.score as a dictionary of row fields."""
    from rewards import score

    got = score(sample.problem_type, response, sample.answer, extra)
    extracted = got.extracted if got.extracted is None or isinstance(got.extracted, str) else str(got.extracted)
    return {"extracted": extracted, "score": float(got.accuracy), "status": got.status, "parts": {}}


def accuracy(answers: list[Answer], draws: Resampler, name: str = "accuracy") -> Metrics:
    """Mean score over everything that has one."""
    keep = [answer.score is not None for answer in answers]
    return {name: draws.mean([answer.score or 0.0 for answer in answers], keep)}


def macro(answers: list[Answer], draws: Resampler, path: Callable[[Sample], tuple[str, ...]]) -> Estimate:
    """Mean of group means, groups given by `path` (see Resampler.macro)."""
    keep = [answer.score is not None for answer in answers]
    return draws.macro([answer.score or 0.0 for answer in answers], [path(answer.sample) for answer in answers], keep)


def part_means(answers: list[Answer], draws: Resampler, names: tuple[str, ...]) -> Metrics:
    """Means of named parts over the answers that can have them (a failure counts as 0)."""
    metrics = {}
    for name in names:
        keep = [name in answer.parts or answer.failed for answer in answers]
        if any(keep):
            metrics[name] = draws.mean([answer.parts.get(name, 0.0) for answer in answers], keep)
    return metrics


def recalls(answers: list[Answer], draws: Resampler, thresholds: tuple[float, ...] = (0.3, 0.5, 0.7)) -> Metrics:
    """mIoU and R@1 at IoU thresholds (>=) of answers whose score is a temporal IoU."""
    values = [answer.score or 0.0 for answer in answers]
    found = {"mIoU": draws.mean(values)}
    return found | {f"R@{bound}": draws.mean([float(value >= bound) for value in values]) for bound in thresholds}


def by_field(answers: list[Answer], draws: Resampler, name: str) -> Metrics:
    """Mean score per value of a field of `extra`, as metrics named after the values."""
    keep = [answer.score is not None for answer in answers]
    values = [answer.score or 0.0 for answer in answers]
    names = sorted({str(answer.sample.extra[name]) for answer in answers if name in answer.sample.extra})
    return {
        value: draws.mean(values, [k and str(a.sample.extra.get(name)) == value for k, a in zip(keep, answers)])
        for value in names
    }


def table(answers: list[Answer], draws: Resampler, label: Callable[[Answer], str | None]) -> dict[str, dict[str, Any]]:
    """One line per label: score with interval, n, chance, share with a readable answer, score among those."""
    labels = [label(answer) for answer in answers]
    values = [answer.score or 0.0 for answer in answers]
    lines = {}
    for name in sorted({name for name in labels if name is not None}):
        keep = [got == name and answer.score is not None for got, answer in zip(labels, answers)]
        group = [answer for got, answer in zip(labels, answers) if got == name]
        if not any(keep):
            continue
        readable = [answer.score for answer in group if answer.answered and answer.score is not None]
        lines[name] = {
            **draws.mean(values, keep).as_dict(),
            "chance": round(sum(chance(answer.sample) for answer in group) / len(group), 4),
            "parsed": round(sum(answer.answered for answer in group) / len(group), 4),
            "among_parsed": round(sum(readable) / len(readable), 4) if readable else None,
        }
    return lines


def label_of(name: str) -> Callable[[Answer], str | None]:
    """Reads a breakdown field, e.g. "duration" or the pseudo field "problem_type"."""

    def read(answer: Answer) -> str | None:
        value = answer.sample.problem_type if name == "problem_type" else answer.sample.extra.get(name)
        return None if value is None else str(value)

    return read


def summarize(
    benchmark: Benchmark,
    answers: list[Answer],
    *,
    excluded: list[Sample],
    missing: int,
    protocol: str,
    seed: int = 0,
    variant: str = "",
) -> dict[str, Any]:
    """results.json without the run's settings: metrics, tables, and every count a reader needs to trust them."""
    draws = Resampler([answer.video for answer in answers], seed=seed)
    measure, primary = benchmark.metrics or accuracy, benchmark.primary
    listed = answers
    if protocol == "easyvideor1":
        from evaluate._easyvideor1 import aggregates

        measure, primary = aggregates, "mean_acc"
        # Its tables, too, are over finished samples alone.
        listed = [Answer(a.sample, a.row, None if a.failed else a.score, a.parts) for a in answers]
    metrics = measure(answers, draws)
    primary = primary if primary in metrics else next(iter(metrics), "")
    failures = Counter(answer.row["status"] for answer in answers if answer.failed)
    official_n = benchmark.official_n
    if isinstance(official_n, dict):
        official_n = official_n.get(variant)
    fields = dict.fromkeys(("problem_type", *benchmark.breakdown))
    tables = {name: table(listed, draws, label_of(name)) for name in fields}
    tables = {name: lines for name, lines in tables.items() if len(lines) > 1}
    if benchmark.tables is not None:
        tables |= benchmark.tables(listed, draws)
    n = len(answers)
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark.name,
        "protocol": protocol,
        "primary": primary,
        "metrics": {name: estimate.as_dict() for name, estimate in metrics.items()},
        "chance": chance_of_primary(benchmark, answers, measure, primary),
        "n": n,
        "n_official": official_n,
        "n_missing": missing,
        "n_answered": sum(answer.answered for answer in answers),
        "n_unanswered": sum(not answer.answered for answer in answers),
        "n_failed": sum(failures.values()),
        "failures": dict(failures),
        "n_truncated": sum(answer.row.get("finish_reason") == "length" for answer in answers),
        "n_unjudged": sum(answer.score is None for answer in answers),
        "n_excluded": len(excluded),
        "excluded": dict(Counter(sample.extra["excluded"] for sample in excluded)),
        "repaired": dict(Counter(a.sample.extra["repaired"] for a in answers if "repaired" in a.sample.extra)),
        "statuses": dict(Counter(answer.row["status"] for answer in answers)),
        "breakdown": tables,
    }
