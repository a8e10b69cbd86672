"""Decoding in short loops against vLLM's own scheduler: the same batches, blocks and outputs in every step."""

from __future__ import annotations

import copy
import hashlib
from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from rollout import vllm_access
from rollout.vllm_scheduler import decode_quickly
from tests.rollout.test_parity import MIXES, make_engine, make_sample

END, BLOCK = 7, 4


def draw(name: str, position: int) -> tuple[int, float, int]:
    """The token that the model which is not there samples: id, log-prob, rank; one in 25 is END."""
    number = int.from_bytes(hashlib.blake2b(f"{name}/{position}".encode(), digest_size=6).digest(), "little")
    return END if number % 25 == 0 else 8 + number % 40, -float(np.float32(number % 9973 / 1e3)), 1 + number % 5


class Runner:
    """Knows of each request what a worker knows, and samples when its last token has been computed."""

    def __init__(self):
        self.lengths: dict[str, int] = {}
        self.prompts: dict[str, int] = {}
        self.computed: dict[str, int] = {}

    def __call__(self, output):
        from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

        for new in output.scheduled_new_reqs:
            self.prompts.setdefault(new.req_id, len(new.prompt_token_ids))
            self.lengths.setdefault(new.req_id, len(new.prompt_token_ids))
            self.computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        self.computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        names = sorted(output.num_scheduled_tokens, reverse=True)  # a worker's order is its own
        rows = np.zeros((len(names), 3))
        tokens = []
        for row, name in enumerate(names):
            self.computed[name] += output.num_scheduled_tokens[name]
            if self.computed[name] < self.lengths[name]:
                tokens.append([])
                continue
            assert self.computed[name] == self.lengths[name]
            rows[row] = draw(name, self.lengths[name] - self.prompts[name])
            self.lengths[name] += 1
            tokens.append([int(rows[row, 0])])
        ids, logprobs, ranks = (
            rows[:, :1].astype(np.int32),
            rows[:, 1:2].astype(np.float32),
            rows[:, 2].astype(np.int32),
        )
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: row for row, name in enumerate(names)},
            sampled_token_ids=tokens,
            logprobs=LogprobsLists(ids, logprobs, ranks),
            prompt_logprobs_dict={},
        )


@pytest.fixture(scope="module")
def core(tiny):
    _, engine = make_engine(tiny("qwen3_vl"))
    yield engine.llm.llm_engine.engine_core.engine_core
    engine.close()


def make_scheduler(core, *, ahead: bool, newer_runner: bool, blocks: int):
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    (group,) = core.scheduler.kv_cache_config.kv_cache_groups
    group = replace(group, kv_cache_spec=replace(group.kv_cache_spec, block_size=BLOCK))
    config = copy.copy(core.vllm_config)
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.enable_chunked_prefill = True
    config.scheduler_config.async_scheduling = ahead
    config.scheduler_config.max_num_seqs = 24
    scheduler = (AsyncScheduler if ahead else Scheduler)(
        vllm_config=config,
        kv_cache_config=replace(core.scheduler.kv_cache_config, kv_cache_groups=[group], num_blocks=blocks),
        structured_output_manager=core.structured_output_manager,
        block_size=BLOCK,
        hash_block_size=BLOCK,
    )
    scheduler.max_num_scheduled_tokens = 40  # prompts are taken in parts beside the decoding
    scheduler.use_v2_model_runner = newer_runner
    return scheduler


def make_requests() -> list:
    """Twelve groups of four; one wants its tokens as they come, which is nothing for short loops."""
    from vllm.sampling_params import RequestOutputKind
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    hasher = get_request_block_hasher(BLOCK, get_hash_fn_by_name("sha256"))
    requests = []
    for group in range(12):
        prompt = [8 + (group * 31 + place * place) % 40 for place in range(5 + 3 * group)]
        for number in range(4):
            params = vllm_access.sampling_params(max_tokens=3 + 7 * number, stop_token_ids=[END], logprobs=0)
            if group == 6:
                params.output_kind = RequestOutputKind.CUMULATIVE
            requests.append(Request(f"{number}_{group}", list(prompt), params, None, 0, 1.0, block_hasher=hasher))
    return requests


def told(output) -> dict:
    """What a worker is told in one step."""
    cached = output.scheduled_cached_reqs
    return {
        "new": [(new.req_id, new.block_ids, new.num_computed_tokens) for new in output.scheduled_new_reqs],
        "cached": [getattr(cached, name) for name in sorted(vars(cached)) if not name.startswith("_")],
        "tokens": list(output.num_scheduled_tokens.items()),
        "total": output.total_num_scheduled_tokens,
        "finished": output.finished_req_ids,
        "preempted": output.preempted_req_ids,
        "common": getattr(output, "num_common_prefix_blocks", None),
        "zeroed": output.new_block_ids_to_zero,
    }


def drive(scheduler, *, ahead: bool, quickly: bool):
    """All requests to their end, two of them aborted on the way -> steps, responses, the number of short decodings."""
    from vllm.v1.request import RequestStatus

    if quickly:
        assert decode_quickly(scheduler, vllm_access.installed_version())
    runner, requests, steps, responses, short, updated = Runner(), make_requests(), [], {}, 0, 0
    for request in requests[:30]:
        scheduler.add_request(request)
    late, waiting = deque(requests[30:]), deque()
    while scheduler.has_requests() or waiting or late:
        if scheduler.has_requests():
            output = scheduler.schedule()
            steps.append(told(output))
            short += len(getattr(output, "chosen", ()))
            waiting.append((output, runner(output)))
            if ahead and len(waiting) < 2:
                continue
        updated += 1
        if updated in (9, 14):
            aborted = scheduler.running[1 if updated == 9 else -1].request_id
            scheduler.finish_requests([aborted], RequestStatus.FINISHED_ABORTED)
        made = scheduler.update_from_output(*waiting.popleft())
        for part in made.values():
            for item in part.outputs:
                tokens, logprobs, ranks, reasons = responses.setdefault(item.request_id, ([], [], [], []))
                tokens += item.new_token_ids
                assert item.new_logprobs.logprob_token_ids[:, 0].tolist() == item.new_token_ids
                assert item.new_logprobs.logprobs.dtype == np.float32
                logprobs += item.new_logprobs.logprobs[:, 0].tolist()
                ranks += item.new_logprobs.sampled_token_ranks.tolist()
                reasons += [item.finish_reason] if item.finish_reason is not None else []
        pool = scheduler.kv_cache_manager.block_pool
        held = {n: (r.num_computed_tokens, r.num_in_flight_tokens, r.status) for n, r in scheduler.requests.items()}
        known = {n: (list(r.all_token_ids), len(r.block_hashes)) for n, r in scheduler.requests.items()}
        free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
        hashes = [str(block.block_hash) for block in pool.blocks]
        steps.append({"held": held, "known": known, "free": free, "hashes": hashes, "order": [*scheduler.requests]})
        if late:
            scheduler.add_request(late.popleft())
    return steps, responses, short


@pytest.mark.parametrize("blocks", [600, 80])
@pytest.mark.parametrize("newer_runner", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_steps_are_those_of_vllms_scheduler(core, ahead, newer_runner, blocks):
    kinds = {"ahead": ahead, "newer_runner": newer_runner, "blocks": blocks}
    theirs, their_responses, none = drive(make_scheduler(core, **kinds), ahead=ahead, quickly=False)
    ours, responses, short = drive(make_scheduler(core, **kinds), ahead=ahead, quickly=True)
    assert none == 0
    assert short > 150
    assert any(step.get("preempted") for step in theirs) == (blocks == 80)
    for number, (mine, other) in enumerate(zip(ours, theirs)):
        differing = [name for name in other if mine.get(name) != other[name]]
        assert differing == [], number  # the whole would take minutes to print
    assert len(ours) == len(theirs)
    ended = {name: each for name, each in responses.items() if each[3]}
    assert len(ended) == 46  # of 48: two were aborted
    assert (ended == {name: each for name, each in their_responses.items() if each[3]}) is True
    for name, (tokens, logprobs, ranks, _) in ended.items():
        assert list(zip(tokens, logprobs, ranks)) == [draw(name, place) for place in range(len(tokens))]
        assert (tokens[-1] == END) or len(tokens) == 3 + 7 * int(name[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_real_rollouts_are_the_same(tiny, media_folder, family):
    """Every mix of media, 4 responses each, more than run at once; some end by themselves, most at their limit."""
    found = []
    for quickly in (False, True):
        encoder, engine = make_engine(tiny(family), quick_decode=quickly)
        prompts = [encoder.encode(make_sample(media_folder, names, i)) for i, names in enumerate([*MIXES.values()] * 2)]
        sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_tokens": 60}
        groups = dict(engine.generate(prompts, n=4, sampling=sampling, step=1))
        schedule = engine.llm.llm_engine.engine_core.engine_core.scheduler.schedule
        assert (schedule.__name__ == "quick_schedule") is quickly
        found.append({
            index: [(r.token_ids, r.rollout_logprobs, r.finish_reason, r.text) for r in responses]
            for index, responses in groups.items()
        })  # fmt: skip
        engine.close()
    assert sorted(found[0]) == list(range(10)) and found[0] == found[1]
    assert {reason for group in found[1].values() for _, _, reason, _ in group} >= {"length"}
