"""One step's groups: generate, score while generation goes on, mix in demonstrations, drop groups without spread.

Pure Python: the engine, the sampler and the scorer are handed in. Every data-parallel replica calls collect() with its
own engine; the replicas agree on the number of rounds through `all_gather`, and the ranks of one tensor-parallel
engine see the same scores through `share`, so that all of them ask for the same generations and the same collectives
in the same order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

from data.records import Group, Prompt, Response, Sample
from rewards.mix import overall, overlong_penalty

EQUAL_REWARDS = 1e-6  # as in train/advantages.py: less than this is rounding


class SamplingExhausted(RuntimeError):
    """Dynamic sampling found too few groups with spread within --max_sampling_rounds."""


@dataclass
class Ready:
    """A group that can train, the step it was sampled at, and the reward of the greedy response (ReMax)."""

    group: Group
    step: int
    baseline_reward: float | None = None


@dataclass
class CarryOver:
    """Surplus groups of this replica, waiting for the next step: at most prompts_per_step / replicas - 1 of them.

    Their responses are one step old; old_logprobs are computed with the current policy and the rollout correction
    weighs the difference, as for any response.
    """

    ready: list[Ready] = field(default_factory=list)

    def state_dict(self) -> list[dict[str, Any]]:
        """Without prompts: pixels are encoded again on resume. Several replicas' lists may be joined and dealt anew."""
        return [
            {
                "sample_id": item.group.prompt.sample.id,
                "step": item.step,
                "baseline_reward": item.baseline_reward,
                "responses": [asdict(response) for response in item.group.responses],
            }
            for item in self.ready
        ]

    def load_state_dict(self, saved: list[dict[str, Any]], prompt_of: Callable[[str], Prompt]) -> None:
        """`prompt_of(sample_id)` encodes the sample again."""
        self.ready = [
            Ready(
                Group(prompt_of(row["sample_id"]), [Response(**response) for response in row["responses"]]),
                row["step"],
                row["baseline_reward"],
            )
            for row in saved
        ]


@dataclass
class Collected:
    """`groups` of this replica, prompts_per_step / replicas of them; `baseline_rewards` (ReMax): one per group.

    `metrics` maps a name to (numerator, denominator) of this replica, for main to add over replicas before it divides.
    """

    groups: list[Group]
    baseline_rewards: list[float] | None
    metrics: dict[str, tuple[float, float]]


class InlineScorer:
    """Scores at once in this process: for tests, and for rewards too cheap to send away.

    Any scorer has these methods. submit(problem_type, response_text, ground_truth, extra) -> object whose result() is a
    Score (accuracy, format, status, extracted); a pool returns before the score is there. submit_many(rows) does the
    same for the responses of one group, which a reward per batch sees together.
    """

    def __init__(self, score: Callable[..., Any]):
        self.score = score

    def submit(self, problem_type: str, response_text: str, ground_truth: Any, extra: dict) -> Future:
        future: Future = Future()
        future.set_result(self.score(problem_type, response_text, ground_truth, extra))
        return future

    def submit_many(self, rows: list[tuple[str, str, Any, dict]]) -> list[Future]:
        return [self.submit(*row) for row in rows]


def collect(
    sampler,
    engine,
    scorer,
    args,
    step: int,
    *,
    encoder=None,
    carry: CarryOver | None = None,
    all_gather: Callable[[Any], list[Any]] = lambda value: [value],
    share: Callable[[list[Any]], list[Any]] = lambda scores: scores,
) -> Collected:
    """The groups of one step on this replica.

    sampler: take(n) gives this replica's share, n / sampler.replicas prompts, of the next n (data.loader.PromptLoader).
    engine: generate(prompts, n=, sampling=, step=, salt=) yields (index, responses) as prompts finish; n and sampling
    are lists, one entry per prompt, when they differ between prompts (demonstrations, ReMax). encoder: tokenizer and
    visual_token_ids, needed for demonstrations only. carry: kept between steps by the caller; needed for dynamic
    sampling. all_gather: value -> the values of all replicas (tensor-parallel ranks may appear more than once). share:
    scores -> the scores of the first rank of this tensor-parallel engine.

    Without --dynamic_sampling one round is drawn. With it (DAPO, arXiv 2503.14476, section 3.2) rounds go on until
    every replica has its groups: a round without any kept group draws again, a later round draws as many prompts as
    the share kept so far suggests, surplus waits in `carry`. Raises SamplingExhausted after --max_sampling_rounds on
    every rank, and ValueError on every rank if one of them got a malformed score.
    """
    replicas = sampler.replicas
    target, rest = divmod(args.prompts_per_step, replicas)
    if rest or target < 1:
        raise ValueError(f"--prompts_per_step {args.prompts_per_step} must be a multiple of the {replicas} replicas")
    carry = CarryOver() if carry is None else carry
    have, carry.ready = list(carry.ready), []
    counts: Counter[str] = Counter({"carried_in": len(have)})
    rounds, kept_anywhere, drawn_anywhere = 0, 0, 0
    shortage = max(all_gather(max(0, target - len(have))))
    while shortage > 0:
        if rounds == args.max_sampling_rounds:
            raise SamplingExhausted(_exhausted(all_gather(dict(counts)), args, step))
        share_kept = kept_anywhere / drawn_anywhere if drawn_anywhere else 1.0
        draw = min(target, math.ceil(shortage / share_kept)) if share_kept else target
        error = None
        kept: list[Ready] = []
        try:
            ready = _one_round(
                sampler.take(draw * replicas), engine, scorer, args, step, f"round{rounds}", encoder, share, counts
            )
            kept = [item for item in ready if _keep(item.group, args, counts)]
        except ValueError as problem:
            error = str(problem)
        have += kept
        rounds += 1
        news = all_gather((len(kept), draw, max(0, target - len(have)), error))
        errors = sorted({item[3] for item in news if item[3]})
        if errors:
            raise ValueError("; ".join(errors))
        kept_anywhere += sum(item[0] for item in news)
        drawn_anywhere += sum(item[1] for item in news)
        shortage = max(item[2] for item in news)
    taken, carry.ready = have[:target], have[target:]
    counts["carried_out"] = len(carry.ready)
    counts["stale"] = sum(item.step != step for item in taken)
    baselines = [item.baseline_reward for item in taken] if args.advantage == "remax" else None
    metrics = _metrics(counts, rounds, target, demonstrations=args.demonstrations != "off")
    return Collected([item.group for item in taken], baselines, metrics)


# ---- one round ----------------------------------------------------------------------------------------------------


def _one_round(prompts: list[Prompt], engine, scorer, args, step, salt, encoder, share, counts) -> list[Ready]:
    """Groups for all `prompts`, scored, in the order of the prompts."""
    demonstrations = [demonstration_response(prompt, encoder, args, counts) for prompt in prompts]
    if args.demonstrations == "own_reward":
        demonstrations = _gate_by_own_reward(prompts, demonstrations, scorer, args, share, counts)
    size = args.group_size
    numbers = [size - (demonstration is not None) for demonstration in demonstrations]
    requests, sampling = list(prompts), [sampling_of(args)] * len(prompts)
    if args.advantage == "remax":
        requests, numbers = requests + list(prompts), numbers + [1] * len(prompts)
        sampling = sampling + [{**sampling_of(args), "temperature": 0.0, "top_p": 1.0, "top_k": -1}] * len(prompts)
    answers = _generate_scored(requests, numbers, sampling, engine, scorer, args, step, salt, share)
    members, greedy = answers[: len(prompts)], answers[len(prompts) :]

    closed = []
    if args.demonstrations == "group_accuracy":
        for index, demonstration in enumerate(demonstrations):
            if demonstration is not None:
                accuracy = [response.reward_parts["accuracy"] for response in members[index]]
                if sum(accuracy) / len(accuracy) >= args.demonstration_threshold:
                    closed.append(index)
        counts["demonstrations_gated_out"] += len(closed)
    if closed:  # the policy does well without: one more response of its own takes the place
        extra = _generate_scored(
            [prompts[i] for i in closed], [1] * len(closed), [sampling_of(args)] * len(closed),
            engine, scorer, args, step, f"{salt}/fill", share,
        )  # fmt: skip
        for index, responses in zip(closed, extra, strict=True):
            members[index] += responses
            demonstrations[index] = None
    used = [index for index, demonstration in enumerate(demonstrations) if demonstration is not None]
    if args.demonstrations != "own_reward":  # else they have their score already
        _score([(prompts[i], demonstrations[i]) for i in used], scorer, args, share)
    for index in used:
        members[index].append(demonstrations[index])

    for responses in members:
        for response in responses:
            kind = "demonstration" if response.is_demonstration else "generated"
            counts[f"{kind}_responses"] += 1
            counts[f"{kind}_tokens"] += len(response.token_ids)
            counts[f"{kind}_reward"] += response.reward
            counts[f"{kind}_cut"] += response.finish_reason == "length"
    counts["groups"] += len(prompts)
    counts["groups_with_demonstration"] += len(used)
    baselines = [responses[0].reward for responses in greedy] or [None] * len(prompts)
    groups = [Group(prompt, responses) for prompt, responses in zip(prompts, members, strict=True)]
    return [Ready(group, step, baseline) for group, baseline in zip(groups, baselines, strict=True)]


def sampling_of(args) -> dict[str, Any]:
    """Sampling settings of training responses, as the engine's `sampling` argument."""
    return {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "max_tokens": args.max_response_tokens,
    }


def _generate_scored(prompts, numbers, sampling, engine, scorer, args, step, salt, share) -> list[list[Response]]:
    """numbers[i] responses to prompts[i]; a response is handed to the scorer as soon as its prompt is finished."""
    same = len(set(numbers)) == 1 and all(item == sampling[0] for item in sampling)
    pending: dict[int, list[tuple[Response, Any]]] = {}
    for index, responses in engine.generate(
        prompts, n=numbers[0] if same else numbers, sampling=sampling[0] if same else sampling, step=step, salt=salt
    ):
        if index in pending or len(responses) != numbers[index]:
            raise RuntimeError(
                f"the engine gave {len(responses)} responses to prompt {index}, asked {numbers[index]} once"
            )
        handles = scorer.submit_many([_to_score(prompts[index], response) for response in responses])
        pending[index] = list(zip(responses, handles, strict=True))
    if len(pending) != len(prompts):
        missing = sorted(set(range(len(prompts))) - set(pending))
        raise RuntimeError(f"the engine gave nothing for prompts {missing} of {len(prompts)}")
    order = [(prompts[i], response, handle) for i in range(len(prompts)) for response, handle in pending[i]]
    scores = share([handle.result() for _, _, handle in order])
    for (prompt, response, _), score in zip(order, scores, strict=True):
        apply_score(response, score, prompt.sample, args)
    return [[response for response, _ in pending[index]] for index in range(len(prompts))]


def _to_score(prompt: Prompt, response: Response) -> tuple[str, str, Any, dict]:
    sample = prompt.sample
    extra = {"options": list(sample.options), "question": sample.question, **sample.extra}
    return sample.problem_type, response.text, sample.answer, extra


def _score(pairs: list[tuple[Prompt, Response]], scorer, args, share) -> None:
    """Score demonstrations. `share` is a collective of the tensor-parallel ranks, which all hold the same pairs."""
    if not pairs:
        return
    handles = [scorer.submit(*_to_score(prompt, response)) for prompt, response in pairs]
    for (prompt, response), score in zip(pairs, share([handle.result() for handle in handles]), strict=True):
        apply_score(response, score, prompt.sample, args)


def apply_score(response: Response, score, sample: Sample, args) -> None:
    """reward = accuracy_weight * accuracy + format_weight * format - soft overlong penalty; the parts stay beside it.

    Raises ValueError naming the sample for a score that is not a finite number.
    """
    parts = {"accuracy": float(score.accuracy), "format": float(score.format)}
    for name, value in parts.items():
        if not math.isfinite(value):
            raise ValueError(f"{sample.file}:{sample.line}: {name} of a response to sample {sample.id} is {value}")
    reward = overall(parts["accuracy"], parts["format"], args.accuracy_weight, args.format_weight)
    if args.overlong_buffer and not response.is_demonstration:
        penalty = overlong_penalty(len(response.token_ids), args.max_response_tokens, args.overlong_buffer)
        parts["overlong"] = args.overlong_penalty * penalty
        reward += parts["overlong"]
    response.reward, response.reward_parts, response.extracted = reward, parts, score.extracted
    cut = response.finish_reason == "length" and score.status == "no_answer"
    response.status = "truncated" if cut else score.status


# ---- demonstrations -----------------------------------------------------------------------------------------------


def demonstration_response(prompt: Prompt, encoder, args, counts) -> Response | None:
    """The sample's demonstration as a response that ends like the policy's own, or None. LUFFY, arXiv 2504.14945."""
    text = prompt.sample.offline_output
    if args.demonstrations == "off" or text is None or not text.strip():
        return None
    if encoder is None:
        raise ValueError(f"--demonstrations {args.demonstrations} needs the encoder's tokenizer")
    counts["demonstrations_seen"] += 1
    tokenizer = encoder.tokenizer
    text = text.strip()
    if tokenizer.eos_token and text.endswith(tokenizer.eos_token):
        text = text[: -len(tokenizer.eos_token)].rstrip()
    if prompt.text.rstrip().endswith("<think>") and text.startswith("<think>"):
        text = text[len("<think>") :].lstrip("\n")  # the chat template has opened the block already
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    if set(token_ids) & set(encoder.visual_token_ids):
        counts["demonstrations_refused_visual"] += 1  # such a token would claim pixels that are not there
        return None
    token_ids, finish_reason = [*token_ids, tokenizer.eos_token_id], "stop"
    if len(token_ids) > args.max_response_tokens:
        if args.demonstration_on_long == "refuse":
            counts["demonstrations_refused_long"] += 1
            return None
        counts["demonstrations_truncated"] += 1
        token_ids, finish_reason = token_ids[: args.max_response_tokens], "length"
        text = tokenizer.decode(token_ids)
    return Response(token_ids, [], finish_reason, text=text, is_demonstration=True)


def _gate_by_own_reward(prompts, demonstrations, scorer, args, share, counts) -> list[Response | None]:
    """Keep the demonstrations whose own reward reaches --demonstration_threshold."""
    found = [i for i, demonstration in enumerate(demonstrations) if demonstration is not None]
    _score([(prompts[i], demonstrations[i]) for i in found], scorer, args, share)
    passed = list(demonstrations)
    for index in found:
        if demonstrations[index].reward < args.demonstration_threshold:
            passed[index] = None
            counts["demonstrations_gated_out"] += 1
    return passed


# ---- filter -------------------------------------------------------------------------------------------------------


def filter_values(group: Group, name: str) -> list[float]:
    """The value of every response that --filter_by names. Raises ValueError listing the parts there are."""
    if name == "reward":
        return [response.reward for response in group.responses]
    if any(name not in response.reward_parts for response in group.responses):
        have = sorted(set.intersection(*(set(response.reward_parts) for response in group.responses)))
        raise ValueError(f"--filter_by {name!r}: the responses carry {', '.join(have) or 'no parts'}, and 'reward'")
    return [response.reward_parts[name] for response in group.responses]


def _keep(group: Group, args, counts) -> bool:
    """Whether the group trains; counts why not."""
    if not args.dynamic_sampling:
        return True
    values = filter_values(group, args.filter_by)
    mean = sum(values) / len(values)
    if max(values) - min(values) <= EQUAL_REWARDS:
        counts["dropped_equal"] += 1
        counts["dropped_all_zero"] += max(values) <= EQUAL_REWARDS
        counts["dropped_all_one"] += min(values) >= 1.0 - EQUAL_REWARDS
        return False
    low = args.filter_low is not None and mean <= args.filter_low
    high = args.filter_high is not None and mean >= args.filter_high
    counts["dropped_low_mean"] += low
    counts["dropped_high_mean"] += high
    return not (low or high)


def _exhausted(all_counts: list[dict[str, int]], args, step: int) -> str:
    total: Counter[str] = Counter()
    for counts in all_counts:
        total.update(counts)
    return (
        f"step {step}: too few groups differ in {args.filter_by} after --max_sampling_rounds "
        f"{args.max_sampling_rounds}. Of {total['groups']} groups {total['dropped_equal']} had equal values "
        f"({total['dropped_all_zero']} all 0, {total['dropped_all_one']} all 1), {total['dropped_low_mean']} a mean "
        f"not above --filter_low, {total['dropped_high_mean']} one not below --filter_high. If most are all 0 the data "
        f"is too hard (or the answer cannot be read: see the logged rollouts), if most are all 1 too easy; a larger "
        f"--group_size, a higher --temperature, another --filter_by or --no-dynamic_sampling also help"
    )


def _metrics(counts: Counter, rounds: int, target: int, *, demonstrations: bool) -> dict[str, tuple[float, float]]:
    groups, made = float(counts["groups"]), float(counts["generated_responses"])
    metrics = {
        "sampling/rounds": (float(rounds), 1.0),
        "sampling/groups": (groups, 1.0),
        "sampling/carried_in": (float(counts["carried_in"]), 1.0),
        "sampling/carried_out": (float(counts["carried_out"]), 1.0),
        "sampling/stale": (float(counts["stale"]), float(target)),
        "generated/reward": (float(counts["generated_reward"]), made),  # all that was sampled, dropped groups included
        "generated/tokens": (float(counts["generated_tokens"]), made),
        "generated/cut": (float(counts["generated_cut"]), made),
    }
    for name in ("equal", "all_zero", "all_one", "low_mean", "high_mean"):
        metrics[f"sampling/dropped_{name}"] = (float(counts[f"dropped_{name}"]), groups)
    if demonstrations:
        shown, seen = float(counts["demonstration_responses"]), float(counts["demonstrations_seen"])
        metrics["demonstration/seen"] = (seen, groups)  # 0 says that the data carries none
        metrics["demonstration/groups"] = (float(counts["groups_with_demonstration"]), groups)
        metrics["demonstration/reward"] = (float(counts["demonstration_reward"]), shown)
        metrics["demonstration/tokens"] = (float(counts["demonstration_tokens"]), shown)
        for name in ("truncated", "refused_long", "refused_visual", "gated_out"):
            metrics[f"demonstration/{name}"] = (float(counts[f"demonstrations_{name}"]), seen)
    return metrics
