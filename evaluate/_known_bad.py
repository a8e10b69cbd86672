"""Records of released annotation files that are known to be broken: repaired or excluded, always with a reason and
counted.

`RULES` is the table: benchmark -> checks in order; a check looks at one sample and returns (action, reason) or None.
"repair" checks change the sample; "exclude" keeps it out of the score. Exact duplicates and single-option records are
looked for in every benchmark.
"""

from __future__ import annotations

from collections.abc import Callable

from data.prompts import split_options
from data.records import Sample

Verdict = tuple[str, str] | None


def no_reference(sample: Sample) -> Verdict:
    """VideoReasonBench: 240 predict-operation items and 4 others carry the text "None"; officially a simulator
    decides."""
    if str(sample.answer).strip() == "None":
        return "exclude", "no reference answer (officially checked by a simulator)"
    return None


def broken_options(sample: Sample) -> Verdict:
    """LongVideo-Reason: 23 lists hold pieces of a rationale as options, 133 stand in a wrong order (gold mostly
    first)."""
    labels = [label for label, _ in split_options(sample.options)]
    if len(set(labels)) < len(labels) or len(labels) > 4:
        return "exclude", "option list broken by a split (repeated letters)"
    if labels != sorted(labels):
        sample.options = tuple(option for _, option in sorted(zip(labels, sample.options)))
        return "repair", "options put back in the order of their letters"
    return None


def single_option(sample: Sample) -> Verdict:
    if sample.problem_type == "multiple choice" and len(sample.options) == 1:
        return "exclude", "a single option"
    return None


RULES: dict[str, tuple[Callable[[Sample], Verdict], ...]] = {
    "videoreasonbench": (no_reference,),
    "longvideoreason": (broken_options,),
}


def mark_known_bad(benchmark: str, samples: list[Sample], check_gold: Callable[[Sample], str | None]) -> None:
    """Sets extra["excluded"] or extra["repaired"] to the reason, in place.

    The first of exact duplicates (same media, question, options and gold) stays. A gold answer that the scorer cannot
    read is excluded with the scorer's reason, since nobody could be right.
    """
    seen: set = set()
    for sample in samples:
        verdicts = [rule(sample) for rule in (*RULES.get(benchmark, ()), single_option)]
        key = (sample.media, sample.question, sample.options, str(sample.answer), tuple(sorted(_context(sample))))
        if key in seen:
            verdicts.append(("exclude", "exact duplicate of an earlier record"))
        seen.add(key)
        for action, reason in filter(None, verdicts):
            sample.extra.setdefault("excluded" if action == "exclude" else "repaired", reason)
        if "excluded" not in sample.extra and (reason := check_gold(sample)):
            sample.extra["excluded"] = f"gold answer cannot be read: {reason}"


def _context(sample: Sample) -> list[str]:
    """Fields that make equal rows different questions: OVO-Bench's moment in the stream, the playground's grey twins."""
    names = ("ovo_id", "ovo_test_idx", "mbinary_id", "cluster", "split")
    return [f"{name}={sample.extra[name]}" for name in names if name in sample.extra]
