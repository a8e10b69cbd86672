"""What a step was like: sums and counts, gathered over ranks once per step, and signs of collapse in them.

    step = StepMetrics(watchdog)
    with step.timer("rollout"): ...                 # time/rollout_s; the watchdog is told the phase
    record_groups(step, groups)                     # rewards, lengths, groups
    step.ratios(loss_metrics)                       # {"policy/entropy": (numerator, denominator)} of every micro-batch
    row = step.reduce()                             # collective; means over the whole mini-batch on all ranks
    log.write(step_number, row)                     # train/run_log.py, rank 0: metrics.jsonl

A mean is always (sum over all ranks) / (count over all ranks), never a mean of means. Values may be 0-d tensors: they
stay on the device, and reduce() fetches all of them at once.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.records import Group
from train import distributed, flops

GIB = 1024**3
Number = float | int | torch.Tensor


class StepMetrics:
    """Accumulates one step on this rank. `copies` ranks hold the same groups (tensor or sequence parallel): means are
    not changed by that, sums are divided by it."""

    def __init__(self, watchdog: distributed.Watchdog | None = None, copies: int = 1):
        self.watchdog = watchdog
        self.copies = copies
        self.sums: dict[str, Number] = {}
        self.counts: dict[str, Number] = {}
        self.totals: dict[str, Number] = {}
        self.lows: dict[str, Number] = {}
        self.highs: dict[str, Number] = {}
        self.spreads: set[str] = set()
        self.phases: list[str] = []
        self.began = time.monotonic()

    def mean(self, name: str, total: Number, count: Number = 1) -> None:
        """Add `total` over `count` items to the mean `name`."""
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def ratios(self, ratios: dict[str, tuple[Number, Number]]) -> None:
        """Means from {name: (numerator, denominator)}, as the losses return them per micro-batch."""
        for name, (numerator, denominator) in ratios.items():
            self.mean(name, _detached(numerator), _detached(denominator))

    def total(self, name: str, value: Number) -> None:
        """Add to a sum over the step and over ranks."""
        self.totals[name] = self.totals.get(name, 0.0) + value

    def low(self, name: str, value: Number) -> None:
        self.lows[name] = _extreme(min, torch.minimum, self.lows.get(name), value)

    def high(self, name: str, value: Number) -> None:
        self.highs[name] = _extreme(max, torch.maximum, self.highs.get(name), value)

    def spread(self, prefix: str, values: torch.Tensor | Iterable[float]) -> None:
        """<prefix>mean, std (of the population), min and max over all values of all ranks; prefix as "reward/"."""
        values = torch.as_tensor(values if isinstance(values, torch.Tensor) else list(values)).detach().double()
        if values.numel() == 0:
            return
        self.mean(f"{prefix}mean", values.sum(), values.numel())
        self.mean(f"{prefix}std", values.square().sum(), values.numel())
        self.spreads.add(prefix)
        self.low(f"{prefix}min", values.min())
        self.high(f"{prefix}max", values.max())

    def value(self, name: str, value: Number) -> None:
        """A value that is the same on all ranks, such as the learning rate."""
        self.mean(name, _detached(value), 1)

    @contextmanager
    def timer(self, phase: str, limit_s: float | None = None) -> Iterator[None]:
        """Add the time spent inside to time/<phase>_s; inside another timer to time/<outer>/<phase>_s.

        Waits for the GPU at the end, so that a phase pays for the kernels it started.
        """
        self.phases.append(phase)
        name = "/".join(self.phases)
        began = time.monotonic()
        try:
            with self.watchdog.phase(name, limit_s) if self.watchdog else nullcontext():
                yield
                if torch.cuda.is_available() and torch.cuda.is_initialized():
                    torch.cuda.synchronize()
        finally:
            self.phases.pop()
            self.seconds(name, time.monotonic() - began)

    def seconds(self, phase: str, duration_s: float) -> None:
        """Add time that was measured elsewhere, for example in a thread."""
        name = f"time/{phase}_s"
        self.highs[name] = self.highs.get(name, 0.0) + duration_s

    def reduce(self, peak_flops: float | None = None) -> dict[str, float]:
        """Collective: the step's row, the same on every rank. Times, memory and other highs are those of the slowest
        or fullest rank. With totals recorded by record_groups, adds perf/*; perf/mfu only with a peak (none on CPU).
        """
        self.seconds("step", time.monotonic() - self.began)
        record_memory(self)
        tables = _to_floats([self.sums, self.counts, self.totals, self.lows, self.highs])
        ranks = distributed.all_gather_objects([*tables, self.spreads])
        sums, counts, totals = (_merge([rank[i] for rank in ranks], math.fsum) for i in range(3))
        lows, highs = _merge([rank[3] for rank in ranks], min), _merge([rank[4] for rank in ranks], max)
        row = {name: sums[name] / counts[name] for name in sums if counts[name]}
        for prefix in set().union(*(rank[5] for rank in ranks)):
            row[f"{prefix}std"] = math.sqrt(max(row[f"{prefix}std"] - row[f"{prefix}mean"] ** 2, 0.0))
        row |= lows | highs
        row |= {name: value / self.copies for name, value in totals.items()}
        _add_performance(row, peak_flops)
        return dict(sorted(row.items()))


def _detached(value: Number) -> Number:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _extreme(of_numbers, of_tensors, old: Number | None, new: Number) -> Number:
    if old is None:
        return new
    if isinstance(old, torch.Tensor) or isinstance(new, torch.Tensor):
        return of_tensors(torch.as_tensor(old), torch.as_tensor(new))
    return of_numbers(old, new)


def _to_floats(tables: list[dict[str, Number]]) -> list[dict[str, float]]:
    """All tensors fetched in one copy per device instead of one wait per metric."""
    places = [(t, name) for t, table in enumerate(tables) for name in table if isinstance(table[name], torch.Tensor)]
    by_device: dict[torch.device, list[tuple[int, str]]] = {}
    for t, name in places:
        by_device.setdefault(tables[t][name].device, []).append((t, name))
    out = [dict(table) for table in tables]
    for group in by_device.values():
        numbers = torch.stack([tables[t][name].double().reshape(()) for t, name in group]).tolist()
        for (t, name), number in zip(group, numbers, strict=True):
            out[t][name] = number
    return [{name: float(value) for name, value in table.items()} for table in out]


def _merge(rows: list[dict[str, float]], join) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: join([row[name] for row in rows if name in row]) for name in names}


def _add_performance(row: dict[str, float], peak_flops: float | None) -> None:
    step_s, rollout_s, update_s = (row.get(f"time/{phase}_s", 0.0) for phase in ("step", "rollout", "update"))
    ranks = distributed.world_size()
    tokens = row.get("tokens/prompt", 0.0) + row.get("tokens/response", 0.0)
    if tokens and step_s:
        row["perf/tokens_per_s"] = tokens / step_s
        row["perf/tokens_per_s_per_rank"] = tokens / step_s / ranks
    if rollout_s and "tokens/sampled" in row:
        row["perf/sampled_tokens_per_s"] = row["tokens/sampled"] / rollout_s
    useful = row.get("perf/useful_flops", 0.0)
    if useful and update_s:
        row["perf/tflops_per_rank"] = useful / update_s / ranks / 1e12
        mfu = flops.utilisation(useful, update_s, ranks, peak_flops)
        if mfu is not None:
            row["perf/mfu"] = mfu


# ---- what is recorded -----------------------------------------------------------------------------------------------


def record_groups(step: StepMetrics, groups: list[Group], shape: flops.Shape | None = None, tower: str = "trained"):
    """Rewards, parts per problem type, lengths and group shares from this rank's scored groups.

    Reward and length means are over sampled responses: a demonstration in a group would flatter the policy. Group
    shares are over groups as they train, demonstrations included, since those shape the advantages. A `shape` adds
    perf/useful_flops of one update pass (forward and backward), with the tower as in flops.group_flops.
    status/<word> is a number of sampled responses.
    """
    for group in groups:
        sample, prompt = group.prompt.sample, group.prompt
        sampled = [response for response in group.responses if not response.is_demonstration]
        lengths = [len(response.token_ids) for response in group.responses]
        kind = sample.problem_type
        for response in sampled:
            step.mean(f"reward/mean/{kind}", response.reward)
            step.mean(f"reward/by_data_type/{sample.data_type}", response.reward)
            if sample.source:
                step.mean(f"reward/by_source/{sample.source}", response.reward)
            for part, value in response.reward_parts.items():
                step.mean(f"reward/{part}", value)
                step.mean(f"reward/{part}/{kind}", value)
        step.spread("reward/", [response.reward for response in sampled])
        step.spread("response/length_", [len(response.token_ids) for response in sampled])
        for response in sampled:
            step.mean("response/truncated_share", response.finish_reason == "length")
            if response.status:
                step.total(f"status/{response.status}", 1)
        for response in group.responses:
            step.mean("response/demonstration_share", response.is_demonstration)
            if response.is_demonstration:
                step.mean("reward/demonstration_mean", response.reward)
        rewards = [response.reward for response in group.responses]
        step.mean("group/zero_variance_share", max(rewards) == min(rewards))
        accuracies = [response.reward_parts.get("accuracy") for response in sampled]
        if accuracies and None not in accuracies:
            step.mean("group/all_right_share", min(accuracies) >= 1)
            step.mean("group/all_wrong_share", max(accuracies) <= 0)
        step.spread("prompt/length_", [len(prompt.input_ids)])
        step.mean("prompt/visual_tokens_mean", int((prompt.mm_type_ids > 0).sum()))
        step.total("tokens/prompt", len(prompt.input_ids))
        step.total("tokens/response", sum(lengths))
        step.total("tokens/sampled", sum(len(response.token_ids) for response in sampled))
        if shape is not None:
            grids = prompt.grid_thw.tolist() if prompt.grid_thw is not None else []
            useful = flops.group_flops(shape, len(prompt.input_ids), lengths, grids, tower=tower)
            step.total("perf/useful_flops", useful)


def record_tokens(step: StepMetrics, name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
    """<name>/mean, std, min, max of per-token values (B, R) over the tokens of the mask, for example "advantages"."""
    step.spread(f"{name}/", values.detach()[mask.bool()])


def record_mismatch(
    step: StepMetrics, logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, mask: torch.Tensor
) -> None:
    """How far the trainer's log-probs are from the sampler's on the same tokens, all (B, R); mask: sampled tokens.

    mismatch/mean and /max of |difference|; mismatch/k3, the estimate of KL(sampler || trainer) from the sampler's own
    tokens: r - 1 - log r with r = exp(logprobs - rollout_logprobs) (http://joschu.net/blog/kl-approx.html).
    """
    gap = (logprobs.detach().double() - rollout_logprobs.detach().double())[mask.bool()]
    if gap.numel() == 0:
        return
    step.mean("mismatch/mean", gap.abs().sum(), gap.numel())
    step.high("mismatch/max", gap.abs().max())
    step.mean("mismatch/k3", (torch.expm1(gap) - gap).sum(), gap.numel())


def device_bytes() -> int:
    """Device memory in use, by this process and any other, without what torch only keeps for later; 0 on CPU."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def record_asleep(step: StepMetrics) -> int:
    """memory/asleep_gib: device memory in use while vLLM sleeps, on the fullest rank -> this rank's bytes; 0 on CPU, unlogged.

    What is left is the trainer's, CUDA's and what vLLM does not give back: it must not grow from step to step.
    """
    used = device_bytes()
    if used:
        step.high("memory/asleep_gib", used / GIB)
    return used


def record_peak(step: StepMetrics, phase: str, sleeping_bytes: int = 0) -> None:
    """memory/<phase>_max_gib: the most that torch's tensors took at once since the last call. Nothing on CPU.

    sleeping_bytes: what vLLM gave back when it went to sleep. Its tensors live on without memory behind them, and torch
    goes on counting them.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        step.high(f"memory/{phase}_max_gib", (torch.cuda.max_memory_allocated() - sleeping_bytes) / GIB)
        torch.cuda.reset_peak_memory_stats()


def record_memory(step: StepMetrics) -> None:
    """memory/*: GiB on the fullest rank; allocated_max_gib is the higher one of the phases of record_peak, if any."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks = [step.highs[name] for name in ("memory/rollout_max_gib", "memory/update_max_gib") if name in step.highs]
        step.high("memory/allocated_max_gib", max(peaks, default=torch.cuda.max_memory_allocated() / GIB))
        step.high("memory/reserved_max_gib", torch.cuda.max_memory_reserved() / GIB)
        free, total = torch.cuda.mem_get_info()
        step.high("memory/device_used_gib", (total - free) / GIB)
        torch.cuda.reset_peak_memory_stats()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    step.high("memory/host_rss_gib", pages * os.sysconf("SC_PAGE_SIZE") / GIB)


# ---- warnings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thresholds:
    """When a run looks like collapsing. `recent` rows are compared with the first `recent` rows of the run."""

    recent: int = 5
    entropy_min: float = 0.01  # nats per token
    entropy_fall: float = 0.1  # share of the first rows' entropy that is left
    entropy_rise: float = 4.0  # times the first rows' entropy
    length_fall: float = 0.3
    length_rise: float = 4.0
    truncated_share: float = 0.3
    zero_variance_share: float = 0.85
    reward_std: float = 0.01
    mismatch_k3: float = 0.05  # the sampler and the trainer disagree: precision, templates or a stale sync


def find_warnings(rows: list[dict[str, Any]], limits: Thresholds = Thresholds()) -> dict[str, str]:
    """Signs of collapse as {short name: sentence}; a pure function of the rows so far, so a resume finds the same.

    `rows` in order of steps; needs `limits.recent` rows before it says anything.
    """

    def average(name: str, part: list[dict[str, Any]]) -> float | None:
        values = [row[name] for row in part if isinstance(row.get(name), (int, float))]
        return sum(values) / len(values) if len(values) == limits.recent else None

    found: dict[str, str] = {}
    now, start = {}, {}
    for name in (
        "policy/entropy",
        "response/length_mean",
        "response/truncated_share",
        "group/zero_variance_share",
        "reward/std",
        "mismatch/k3",
    ):
        with_name = [row for row in rows if name in row]
        now[name] = average(name, with_name[-limits.recent :])
        start[name] = average(name, with_name[: limits.recent])
    entropy, first = now["policy/entropy"], start["policy/entropy"]
    if entropy is not None and (entropy < limits.entropy_min or entropy < limits.entropy_fall * first):
        found["entropy"] = f"entropy fell from {first:.3g} to {entropy:.3g} nats: the policy stops exploring"
    elif entropy is not None and entropy > limits.entropy_rise * first and entropy > 1:
        found["entropy"] = f"entropy rose from {first:.3g} to {entropy:.3g} nats: the policy comes apart"
    length, first = now["response/length_mean"], start["response/length_mean"]
    if length is not None and not limits.length_fall * first <= length <= limits.length_rise * first:
        found["length"] = f"responses went from {first:.0f} to {length:.0f} tokens on average"
    share = now["response/truncated_share"]
    if share is not None and share > limits.truncated_share:
        found["truncated"] = f"{share:.0%} of the responses end at --max_response_tokens"
    share, std = now["group/zero_variance_share"], now["reward/std"]
    if share is not None and share > limits.zero_variance_share:
        found["reward_spread"] = f"{share:.0%} of the groups have equal rewards and teach nothing"
    elif std is not None and std < limits.reward_std:
        found["reward_spread"] = f"rewards are almost all the same (standard deviation {std:.2g})"
    gap = now["mismatch/k3"]
    if gap is not None and gap > limits.mismatch_k3:
        found["mismatch"] = f"sampler and trainer differ by {gap:.2g} nats per token (k3): see mismatch/* and docs"
    return found
