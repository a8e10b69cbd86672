"""The decoding of many responses with little work per token in vLLM's scheduler.

For each response and step vLLM asks its cache manager for slots, builds an output and passes it on, 20 microseconds of Python
and more; with a thousand responses and a small model the device waits for that. For a response which is only being decoded
nearly all of this comes out the same every time. Such responses are scheduled and updated here in two short loops, and
everything else (prompts, first and last tokens, full caches, preemption, aborts) by vLLM's own `schedule` and
`update_from_output`, which run in every step as ever, with the remaining responses and what is left of the budget.

What is done here is what vLLM would do, in its order: the same blocks are taken at the same time and cached in the same step, the
same batch goes to the worker. A response's tokens leave the scheduler together when it ends.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np

KNOWN = ((0, 26), (0, 32))  # versions whose scheduler was compared line by line with what is done here


class Decoding:
    """What is kept of a response from its second token on, beside vLLM's Request."""

    __slots__ = ("all_ids", "ends", "logprobs", "longest", "ranks", "request", "start", "token_ids")

    def __init__(self, request, max_model_len: int):
        params = request.sampling_params
        self.request = request
        self.token_ids, self.all_ids = request._output_token_ids, request._all_token_ids
        self.ends = frozenset([*(params.stop_token_ids or ()), params.eos_token_id])  # None is no token
        self.longest = min(max_model_len, request.num_prompt_tokens + request.max_tokens)
        self.start = len(self.token_ids)  # those before were passed on
        self.logprobs: list[float] = []  # of the tokens from start on
        self.ranks: list[int] = []

    def join(self, output) -> None:
        """Put all tokens from start on into the last output."""
        from vllm.v1.outputs import LogprobsLists

        tokens = self.token_ids[self.start :]
        if len(tokens) != len(self.logprobs):
            raise RuntimeError(f"{len(self.logprobs)} log-probs of {len(tokens)} tokens of request {output.request_id}")
        output.new_token_ids = tokens
        output.new_logprobs = LogprobsLists(
            np.asarray(tokens, np.int32)[:, None],
            np.asarray(self.logprobs, np.float32)[:, None],
            np.asarray(self.ranks, np.int32),
        )

    def take(self, output) -> None:
        """The log-probs of an output that vLLM made of it."""
        if output.new_logprobs is not None:
            self.logprobs += output.new_logprobs.logprobs[:, 0].tolist()
            self.ranks += output.new_logprobs.sampled_token_ranks.tolist()


def is_plain(scheduler, version: tuple[int, ...]) -> bool:
    """Whether this scheduler does nothing per response and step beyond what is done here."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    if version[:2] not in KNOWN or type(scheduler) not in (Scheduler, AsyncScheduler):
        return False
    config, cache = scheduler.scheduler_config, scheduler.kv_cache_manager
    managers = cache.coordinator.single_type_managers
    return (
        len(managers) == 1
        and type(managers[0]) is FullAttentionManager  # no window that moves, no recurrent state
        and not any(
            (
                scheduler.connector,
                scheduler.ec_connector,
                getattr(scheduler, "aux_output_connector", None),
                scheduler.lora_config,
                scheduler.log_stats,
                scheduler.enable_kv_cache_events,
                scheduler.is_encoder_decoder,
                scheduler.num_spec_tokens,
                scheduler.num_lookahead_tokens,
                getattr(scheduler, "num_prefill_lookahead", 0),
                getattr(scheduler, "prefix_replay_tokens", 0),
                getattr(scheduler, "enable_return_routed_experts", False),
                getattr(scheduler, "return_sampling_mask", False),
                scheduler.use_pp,
                scheduler.perf_metrics,
                config.long_prefill_token_threshold,
                cache.watermark_blocks,
            )
        )
        and scheduler.dcp_world_size == 1
        and scheduler.num_sampled_tokens_per_step == 1
        and scheduler.max_num_scheduled_tokens <= config.max_num_batched_tokens
        and config.policy == "fcfs"
    )


def decode_quickly(scheduler, version: tuple[int, ...]) -> bool:
    """Replace the two methods of an engine's scheduler -> whether that was done; where not, all is left to vLLM."""
    if not is_plain(scheduler, version):
        return False
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.request import RequestStatus

    schedule, update_from_output = scheduler.schedule, scheduler.update_from_output
    manager, pool = scheduler.kv_cache_manager, scheduler.kv_cache_manager.block_pool
    block_size = manager.coordinator.single_type_managers[0].block_size
    hash_block_size, max_model_len = scheduler.hash_block_size, scheduler.max_model_len
    ahead = type(scheduler) is AsyncScheduler  # a step is scheduled before the tokens of the last one are known
    limits = [name for name in ("max_num_running_reqs", "max_num_active_reqs") if hasattr(scheduler, name)]
    running_status = RequestStatus.RUNNING

    def admit(request) -> Decoding | None:
        if _only_decodes(request, scheduler):
            request.decoding = Decoding(request, max_model_len)
            return request.decoding
        return None

    def quick_schedule(throttle_prefills: bool = False):
        if throttle_prefills or scheduler._pause_state != PauseState.UNPAUSED:
            return schedule(throttle_prefills)
        chosen: list[Decoding] = []
        names: list[str] = []
        computed: list[int] = []
        at_border: list[int] = []
        passed = needed = 0
        for request in scheduler.running:  # those at the front: they have the first call on budget and blocks
            decoding = request.__dict__.get("decoding") or admit(request)
            if decoding is None or request.num_preemptions:
                break
            passed += 1
            done = request.num_computed_tokens
            known = len(decoding.all_ids)
            if ahead:
                expected = request.num_output_placeholders
                if known + expected - done != 1:
                    return schedule()  # nothing has been changed yet
                # Its last token is on the way.
                if (expected and done + 2 - expected >= decoding.longest) or done + 1 >= max_model_len:
                    continue
            if done % block_size == 0:
                needed += 1
                at_border.append(len(names))
            elif known % block_size == 0:  # a block is full now, which vLLM makes known for other prompts
                at_border.append(len(names))
            chosen.append(decoding)
            names.append(request.request_id)
            computed.append(done)
        count = len(chosen)
        if not count or count >= scheduler.max_num_scheduled_tokens or needed > pool.get_num_free_blocks():
            return schedule()
        if not (scheduler.use_v2_model_runner or scheduler.prev_step_scheduled_req_ids.issuperset(names)):
            return schedule()
        blocks: list[Any] = [None] * count
        for place in at_border:
            blocks[place] = manager.allocate_slots(chosen[place].request, 1).get_block_ids(allow_none=True)

        front, scheduler.running = scheduler.running[:passed], scheduler.running[passed:]
        before = {name: getattr(scheduler, name) for name in limits}
        budget = scheduler.max_num_scheduled_tokens
        scheduler.max_num_scheduled_tokens = budget - count
        for name, value in before.items():
            setattr(scheduler, name, value - passed)
        try:
            output = schedule()
        finally:
            scheduler.running = front + scheduler.running
            scheduler.max_num_scheduled_tokens = budget
            for name, value in before.items():
                setattr(scheduler, name, value)

        cached = output.scheduled_cached_reqs
        cached.req_ids[:0] = names
        cached.new_block_ids[:0] = blocks
        cached.num_computed_tokens[:0] = computed
        made = []
        for decoding in chosen:
            request = decoding.request
            request.num_computed_tokens += 1
            request.num_in_flight_tokens += 1
            if ahead:
                made.append(len(decoding.token_ids) + request.num_output_placeholders)
                request.num_output_placeholders += 1
            else:
                made.append(len(decoding.token_ids))
        cached.num_output_tokens[:0] = made
        output.num_scheduled_tokens = {**dict.fromkeys(names, 1), **output.num_scheduled_tokens}
        output.total_num_scheduled_tokens += count
        if not scheduler.use_v2_model_runner:
            scheduler.prev_step_scheduled_req_ids.update(names)
        if getattr(output, "num_common_prefix_blocks", None):  # later versions do not use it
            output.num_common_prefix_blocks = manager.get_num_common_prefix_blocks(front[0].request_id)
        output.chosen = chosen
        return output

    def quick_update(scheduler_output, result):
        chosen, logprobs = getattr(scheduler_output, "chosen", ()), result.logprobs
        scheduled = scheduler_output.num_scheduled_tokens
        if logprobs is None or logprobs.cu_num_generated_tokens is not None or result.num_nans_in_logits:
            chosen = ()
        rest = {}
        if chosen:
            places, sampled = result.req_id_to_index, result.sampled_token_ids
            reported, values = logprobs.logprob_token_ids[:, 0].tolist(), logprobs.logprobs[:, 0].tolist()
            ranks = logprobs.sampled_token_ranks.tolist()
            for decoding, name in zip(chosen, scheduled):
                request, row, all_ids = decoding.request, places[name], decoding.all_ids
                tokens = sampled[row]
                if (
                    len(tokens) != 1
                    or (token := tokens[0]) in decoding.ends
                    or len(all_ids) + 1 >= decoding.longest
                    or token != reported[row]
                    or request.status is not running_status  # aborted, or preempted while its token was on the way
                ):
                    rest[name] = 1
                    continue
                request.num_in_flight_tokens -= 1
                decoding.token_ids.append(token)
                all_ids.append(token)
                decoding.logprobs.append(values[row])
                decoding.ranks.append(ranks[row])
                if len(all_ids) % hash_block_size == 0:
                    request.update_block_hashes()
                if ahead:
                    request.num_output_placeholders -= 1
                    done = request.num_computed_tokens - request.num_output_placeholders
                    if done % block_size == 0:
                        manager.cache_blocks(request, done)
        rest.update(itertools.islice(scheduled.items(), len(chosen), None))
        requests = ((name, scheduler.requests.get(name)) for name in rest)
        kept = {name: request.decoding for name, request in requests if hasattr(request, "decoding")}
        remaining = copy.copy(scheduler_output)
        remaining.num_scheduled_tokens = rest
        outputs = update_from_output(remaining, result)
        if kept:
            for part in outputs.values():
                part.outputs = _joined(part.outputs, kept)
        return outputs

    scheduler.schedule, scheduler.update_from_output = quick_schedule, quick_update
    return True


def _only_decodes(request, scheduler) -> bool:
    """Whether a running response has nothing to do but to be decoded, with nobody reading it before its end."""
    from vllm.sampling_params import RequestOutputKind

    params = request.sampling_params
    return (
        bool(request._output_token_ids)
        and not request.is_prefill_chunk
        and not request.num_preemptions
        and params is not None
        and params.output_kind == RequestOutputKind.FINAL_ONLY
        and not params.detokenize
        and params.num_logprobs == 0
        and params.prompt_logprobs is None
        and not params.min_tokens
        and params.repetition_detection is None
        and request.structured_output_request is None
        and request.lora_request is None
        and request.trace_headers is None
        and not request.resumable
        and not request.events
        and not request.spec_token_ids
        and not scheduler.encoder_cache_manager.get_cached_input_ids(request)
    )


def _joined(outputs: list, kept: dict[str, Decoding]) -> list:
    """Without those of responses that go on, whose log-probs are kept; a last one gets all the tokens."""
    passed = []
    for output in outputs:
        decoding = kept.get(output.request_id)
        if decoding is not None:
            decoding.take(output)
            if output.finish_reason is None:
                continue
            decoding.join(output)
        passed.append(output)
    return passed
