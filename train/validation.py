"""Held-out accuracy of the live policy, through the same engine, prompts and scorer as training."""

from __future__ import annotations

from collections import defaultdict

from data.records import Group, Prompt, Sample
from rollout.collect import apply_score
from train import distributed

CHUNK = 64  # prompts encoded and in the engine at once, per replica: bounds host memory


def validate(
    engine, encoder, samples: list[Sample], scorer, args, step: int, *, replica=0, replicas=1
) -> tuple[dict[str, float], list[Group]]:
    """(metrics over all replicas, this replica's scored groups without pixels of all but the first chunk). Collective.

    validate/accuracy, /format, /parsed, /reward, /length_mean, /truncated_share over all held-out samples and
    validate/accuracy/<problem type>, validate/accuracy_by_source/<source>. A sample that cannot be read or is too long
    counts as wrong and in validate/unusable. With --validate_samples k above 1, accuracy is the mean over the k
    responses and validate/pass_at_k the share of samples with a right one.
    """
    sampling = {
        "temperature": args.validate_temperature,
        "top_p": args.validate_top_p,
        "top_k": args.validate_top_k,
        "max_tokens": args.validate_max_response_tokens,
    }
    rows, shown = [], []
    mine = samples[replica::replicas]
    for start in range(0, len(mine), CHUNK):
        prompts, kept = [], mine[start : start + CHUNK]
        for sample in kept:
            try:
                prompts.append(encoder.encode(sample))
            except (ValueError, OSError):
                rows.append((sample.problem_type, sample.source, None))
        groups = _generate(engine, prompts, scorer, args, sampling, step, salt=f"validate/{start}")
        rows += [(g.prompt.sample.problem_type, g.prompt.sample.source, _summary(g)) for g in groups]
        if not shown:
            shown = groups
    everywhere = distributed.all_gather_objects(rows)
    copies = max(1, distributed.world_size() // replicas)  # ranks of one tensor-parallel engine hold the same rows
    return summarise([row for rank in everywhere[::copies] for row in rank]), shown


def _generate(engine, prompts: list[Prompt], scorer, args, sampling, step, salt) -> list[Group]:
    groups: list[Group | None] = [None] * len(prompts)
    handles = []
    for index, responses in engine.generate(prompts, n=args.validate_samples, sampling=sampling, step=step, salt=salt):
        sample = prompts[index].sample
        groups[index] = Group(prompts[index], responses)
        extra = {"options": list(sample.options), "question": sample.question, **sample.extra}
        for response in responses:
            handle = scorer.submit(sample.problem_type, response.text, sample.answer, extra)
            handles.append((response, sample, handle))
    for response, sample, handle in handles:
        apply_score(response, handle.result(), sample, args)
    return groups


def _summary(group: Group) -> dict[str, float]:
    responses = group.responses
    accuracy = [response.reward_parts["accuracy"] for response in responses]
    return {
        "accuracy": sum(accuracy) / len(accuracy),
        "pass_at_k": float(max(accuracy) >= 1),
        "format": sum(response.reward_parts["format"] for response in responses) / len(responses),
        "reward": sum(response.reward for response in responses) / len(responses),
        "parsed": sum(response.extracted is not None for response in responses) / len(responses),
        "length_mean": sum(len(response.token_ids) for response in responses) / len(responses),
        "truncated_share": sum(response.finish_reason == "length" for response in responses) / len(responses),
    }


def summarise(rows: list[tuple[str, str, dict[str, float] | None]]) -> dict[str, float]:
    """Means over samples, per problem type and source; a row without a summary was unusable and counts as wrong."""
    metrics: dict[str, float] = {"validate/samples": float(len(rows)), "validate/unusable": 0.0}
    if not rows:
        return metrics
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for problem_type, source, summary in rows:
        metrics["validate/unusable"] += summary is None
        accuracy = summary["accuracy"] if summary else 0.0
        for name in (f"accuracy/{problem_type}", f"accuracy_by_source/{source}"):
            sums[name] += accuracy
            counts[name] += 1
        for name, value in (summary or {}).items():
            sums[name] += value
    for name, total in sums.items():
        metrics[f"validate/{name}"] = total / counts.get(name, len(rows))
    return dict(sorted(metrics.items()))
