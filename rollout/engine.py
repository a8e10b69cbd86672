"""RolloutEngine: vLLM in this process, sampling groups of responses and taking new weights every step.

One request per prompt with n = G, so that prompt and video are processed once per group. Groups come out as they end.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from data.encode import Encoder
from data.records import Prompt, Response
from rollout import vllm_access
from rollout.vllm_inputs import EngineInputs
from rollout.weight_sync import expected_names, sync_weights

# Logit bias of an id that is never sampled. (Requests over HTTP clamp a bias at -100, which a sharp head can outweigh.)
NEVER = float("-inf")
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "max_tokens", "stop", "ignore_eos")
GIB = 1 << 30


class PromptMismatch(RuntimeError):
    """vLLM made other ids of a prompt than data/encode.py did: whatever was trained on them would be wrong."""


class RolloutEngine:
    """vLLM for one data-parallel replica. Under torchrun every rank builds one, in the same order as everything else.

    model_dir: Hugging Face folder. encoder: of the same folder; its visual tokens are never sampled, its eos tokens
    end a response. dtype: "bf16" or "fp32". tensor_parallel: ranks per engine; these ranks must call everything with
    the same arguments. max_model_len: prompt and response tokens. kv_cache_gib: needed on CPU (0.25 if None); on CUDA
    it replaces gpu_memory_utilization's arithmetic. seed: of the run. rollout_seed: "request" makes every response a
    function of (seed, step, sample id, slot); "engine" seeds the sampler once per call, which keeps it batched in vLLM's
    older model runner (the newer one, which dense models get on CUDA, is batched either way).
    sleep_level: 0 never sleeps, 1 keeps vLLM's weights in host memory, 2 drops them (a sync must follow).
    `limit_media`: most images and videos of one prompt. `engine_args`: passed to vllm.LLM as they are.

    Log-probs are those of the distribution that was sampled from: after division by the temperature, after top-p and
    top-k, and with the visual tokens' probability at zero. A trainer that masks the same ids to -inf and divides by the
    same temperature computes equal ones when top_p is 1 and top_k off. Greedy responses report temperature 1.
    """

    def __init__(
        self,
        model_dir: str,
        *,
        encoder: Encoder,
        dtype: str,
        max_model_len: int,
        tensor_parallel: int = 1,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float = 0.5,
        kv_cache_gib: float | None = None,
        enforce_eager: bool = False,
        seed: int = 0,
        rollout_seed: str = "request",
        sleep_level: int = 2,
        limit_media: dict[str, int] | None = None,
        trust_remote_code: bool = False,
        engine_args: dict[str, Any] | None = None,
        quick_decode: bool = False,
    ):
        if rollout_seed not in ("request", "engine"):
            raise ValueError(f"--rollout_seed must be request or engine, got {rollout_seed!r}")
        if dtype not in ("bf16", "fp32"):
            raise ValueError(f"dtype of the rollout engine must be bf16 or fp32, got {dtype!r}")
        on_cuda = torch.cuda.is_available()
        if not on_cuda and dtype == "fp32" and encoder.family == "qwen3_5":
            raise ValueError("vLLM's CPU kernels run Qwen3.5 in bf16 only: choose --dtype bf16")
        self.encoder, self.model_dir = encoder, model_dir
        self.seed, self.rollout_seed = seed, rollout_seed
        self.sleep_level = sleep_level if on_cuda else 0
        if self.sleep_level:
            check_allocator_settings()
        rank = int(os.environ.get("RANK", "0"))
        self.replica = rank // tensor_parallel
        launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        if tensor_parallel > 1 and not launched:
            raise ValueError(f"--tensor_parallel {tensor_parallel} needs torchrun with a multiple of as many ranks")
        kv_bytes = int((kv_cache_gib or 0.25) * GIB) if kv_cache_gib or not on_cuda else None
        arguments: dict[str, Any] = {
            "model": model_dir,
            "dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "tensor_parallel_size": tensor_parallel,
            "distributed_executor_backend": "external_launcher" if launched else None,
            "enforce_eager": enforce_eager or not on_cuda,
            # Equal within a tensor-parallel set: its ranks would sample different tokens otherwise.
            "seed": _hash(seed, self.replica) % 2**31,
            "logprobs_mode": "processed_logprobs",
            # One prefill per group; vLLM has no such cache for linear attention.
            "enable_prefix_caching": encoder.family != "qwen3_5",
            "mm_processor_cache_gb": 0,  # a clip comes back an epoch later at the earliest
            "limit_mm_per_prompt": limit_media or {"image": 16, "video": 4},
            "trust_remote_code": trust_remote_code,
            "enable_sleep_mode": self.sleep_level > 0,
        }
        if kv_bytes is not None:
            arguments["kv_cache_memory_bytes"] = kv_bytes
        if on_cuda:
            # vLLM refuses to start where this share of the device is not free, even if the cache's size is given: the
            # trainer's states are there already, so a given size must not depend on it.
            arguments["gpu_memory_utilization"] = (
                gpu_memory_utilization if kv_bytes is None else vllm_access.KV_GIVEN_SHARE
            )
            # vLLM's encoder cache has as many tokens, and a video with more of them is refused at its first request.
            arguments["max_num_batched_tokens"] = max(max_model_len, 16384)
            if encoder.family == "qwen3_5":
                arguments["gdn_prefill_backend"] = "triton"  # Hopper's default is compiled by nvcc at the first prompt
        else:
            arguments["skip_mm_profiling"] = True  # memory is not what limits a CPU run, start-up time is
            # A prompt that is processed in two parts makes vLLM turn back its seeded generator, which torch's CPU
            # generator cannot do: prompts are taken whole.
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(max_model_len, 8192)
        if max_num_batched_tokens is not None:
            arguments["max_num_batched_tokens"] = max_num_batched_tokens
        shared = range(self.replica * tensor_parallel, (self.replica + 1) * tensor_parallel)

        def remove_shared_memory() -> None:
            if not on_cuda and tensor_parallel > 1:
                vllm_access.remove_shared_memory(shared, rank - shared.start)

        remove_shared_memory()  # of a run that was killed
        if engine_args:
            vllm_access.check_arguments(engine_args)
        self.llm = vllm_access.build_llm(quick_decode=quick_decode, **{**arguments, **(engine_args or {})})
        remove_shared_memory()  # all ranks have it; nothing is left at the end
        self.inputs = EngineInputs(self.llm, encoder)
        self._detokenizer = vllm_access.Detokenizer(encoder.tokenizer)
        self.max_model_len, self.max_num_seqs = max_model_len, max_num_seqs
        self._names = expected_names(encoder.config, trust_remote_code)  # emptied after the first sync
        self._asleep = {"weights": False, "kv_cache": False}
        self._stale = False  # weights were dropped by sleep and not yet replaced
        self._calls = 0

    def generate(
        self,
        prompts: list[Prompt],
        *,
        n: int | list[int],
        sampling: dict[str, Any] | list[dict[str, Any]],
        step: int,
        salt: str = "",
    ) -> Iterator[tuple[int, list[Response]]]:
        """Yields (index of the prompt, its n responses in slot order) as soon as the prompt's last response has ended.

        n and sampling (temperature, top_p, top_k, max_tokens, stop, ignore_eos) hold for all prompts, or are lists with
        an entry for each. max_tokens may be a list, one limit per response; with ignore_eos (for measurements) every
        response has just that length. step and salt enter the seeds. A response keeps its end token (or stop string's tokens);
        finish_reason is "stop" or "length". Raises ValueError for a prompt that with its response exceeds
        max_model_len or for bad sampling, and PromptMismatch. Closing the iterator early aborts what is still running.
        """
        if any(self._asleep.values()) or self._stale:
            raise RuntimeError("generate() on a sleeping engine: call wake() and, after sleep level 2, sync() first")
        numbers = [n] * len(prompts) if isinstance(n, int) else list(n)
        settings = [sampling] * len(prompts) if isinstance(sampling, dict) else list(sampling)
        if not len(prompts) == len(numbers) == len(settings):
            raise ValueError(f"{len(prompts)} prompts need as many n ({len(numbers)}) and sampling ({len(settings)})")
        waiting = []
        seen: Counter[str] = Counter()
        for index, (prompt, number, setting) in enumerate(zip(prompts, numbers, settings)):
            seed = self._request_seed(prompt, step, f"{salt}#{seen[prompt.sample.id]}")
            seen[prompt.sample.id] += 1
            waiting.append((index, prompt, self._params(prompt, number, setting, seed)))
        return self._run(prompts, waiting, settings, step, salt)

    def _run(self, prompts, waiting, settings, step, salt) -> Iterator[tuple[int, list[Response]]]:
        self._calls += 1
        running: dict[str, int] = {}
        waiting.reverse()
        restore = self._seed_engine(step, salt)
        try:
            while waiting or running:
                # Prompts are handed over while there is room: their media are processed between decoding steps.
                while waiting and vllm_access.unfinished_responses(self.llm) < self.max_num_seqs:
                    index, prompt, params = waiting.pop()
                    request_id, rendered = f"{self._calls}-{index}", self.inputs(prompt)
                    # Before it is added: one of which vLLM has taken a part when it raises has to be aborted, too.
                    running[request_id] = index
                    vllm_access.add_request(self.llm, request_id, rendered, params)
                    if isinstance(limits := settings[index]["max_tokens"], list):
                        vllm_access.limit_responses(self.llm, request_id, limits)
                for output in vllm_access.step(self.llm):
                    index = running.pop(_our_id(output.request_id, running))
                    self._compare(prompts[index], list(output.prompt_token_ids))
                    yield index, self._responses(output, bool(settings[index].get("stop")))
        finally:
            if running:
                vllm_access.abort(self.llm, list(running))
            restore()

    def _params(self, prompt: Prompt, n: int, sampling: dict[str, Any], seed: int | None):
        if unknown := set(sampling) - set(SAMPLING_KEYS):
            raise ValueError(f"unknown sampling settings {sorted(unknown)}; known: {', '.join(SAMPLING_KEYS)}")
        greedy = sampling.get("temperature", 1.0) == 0
        if greedy and n > 1:
            raise ValueError(f"{n} greedy responses to one prompt would all be the same: use temperature > 0, or n 1")
        longest = sampling["max_tokens"]
        if isinstance(longest, list):
            if len(longest) != n:
                raise ValueError(f"sample {prompt.sample.id}: {len(longest)} limits max_tokens for {n} responses")
            longest = max(longest)
        ignore_eos = bool(sampling.get("ignore_eos"))
        if len(prompt.input_ids) + longest > self.max_model_len:
            raise ValueError(
                f"sample {prompt.sample.id}: {len(prompt.input_ids)} prompt and up to {longest} response tokens exceed "
                f"the engine's length {self.max_model_len} (--max_prompt_tokens + --max_response_tokens)"
            )
        return vllm_access.sampling_params(
            n=n,
            temperature=sampling.get("temperature", 1.0),
            top_p=sampling.get("top_p", 1.0),
            top_k=sampling.get("top_k", -1),
            max_tokens=longest,
            stop=sampling.get("stop"),
            include_stop_str_in_output=True,
            stop_token_ids=None if ignore_eos else list(self.encoder.eos_token_ids),
            ignore_eos=ignore_eos,
            logit_bias=dict.fromkeys(self.encoder.visual_token_ids, NEVER),
            logprobs=0,
            seed=None if greedy else seed,
            skip_clone=True,  # made for this request alone
        )

    def _request_seed(self, prompt: Prompt, step: int, salt: str) -> int | None:
        """Seed of slot 0; vLLM gives slot i this seed + i."""
        if self.rollout_seed == "engine":
            return None
        return _hash(self.seed, step, prompt.sample.id, salt) % 2**48

    def _seed_engine(self, step: int, salt: str):
        """rollout_seed "engine": seed the generators that vLLM samples from; returns what gives them back to the
        trainer. Its older model runner draws from torch's, the newer one (dense models on CUDA) takes a seed per request
        from NumPy's."""
        if self.rollout_seed == "request":
            return lambda: None
        state, numpy_state = torch.get_rng_state(), np.random.get_state()
        cuda_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        seed = _hash(self.seed, step, f"replica {self.replica}", salt) % 2**48
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)

        def restore() -> None:
            torch.set_rng_state(state)
            np.random.set_state(numpy_state)
            if cuda_state is not None:
                torch.cuda.set_rng_state(cuda_state)

        return restore

    def _compare(self, prompt: Prompt, theirs: list[int]) -> None:
        ours = prompt.input_ids
        if len(ours) == len(theirs) and np.array_equal(ours, theirs):
            return
        raise PromptMismatch(describe_mismatch(prompt.sample.id, ours.tolist(), theirs, self.encoder.tokenizer))

    def _responses(self, output, has_text: bool) -> list[Response]:
        """A finished request's responses, in slot order. has_text: vLLM made their texts, to look for stop strings."""
        responses = []
        for item in sorted(output.outputs, key=lambda item: item.index):
            if item.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended a response with {item.finish_reason!r}")
            tokens = list(item.token_ids)
            text = item.text if has_text else self._detokenizer(output.prompt_token_ids, tokens)
            responses.append(Response(tokens, vllm_access.sampled_logprobs(item), item.finish_reason, text=text))
        return responses

    def sync(self, named_tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
        """New weights under Hugging Face names, then empty caches -> number of tensors. Collective if the iterator is.

        The first sync of an engine checks every name and raises WeightNamesError. The weights have to be awake.
        """
        if self._asleep["weights"]:
            raise RuntimeError("sync() needs the weights' memory: call wake(weights=True, kv=False) first")
        count = sync_weights(self.llm, named_tensors, self._names)
        self._names, self._stale = None, False
        return count

    def sleep(self) -> None:
        """Give the GPU memory back: KV cache and weights (level 1: to the host, 2: dropped). Nothing on CPU or level
        0."""
        if not self.sleep_level or self._asleep["weights"]:
            return
        self.llm.sleep(level=self.sleep_level)
        self._asleep = {"weights": True, "kv_cache": True}
        self._stale = self.sleep_level == 2
        torch.cuda.empty_cache()

    def wake(self, weights: bool = True, kv: bool = True) -> None:
        """Take GPU memory again. Weights first and the KV cache after the sync keeps the peak low."""
        tags = [tag for tag, wanted in (("weights", weights), ("kv_cache", kv)) if wanted and self._asleep[tag]]
        if not tags:
            return
        torch.cuda.empty_cache()
        self.llm.wake_up(tags=tags)
        if "weights" in tags and self.sleep_level == 2:
            vllm_access.clear_deepstack(self.llm)
        for tag in tags:
            self._asleep[tag] = False

    def close(self) -> None:
        """End the engine and its process groups; collective, and the last thing done with it."""
        vllm_access.shut_down(self.llm)


def check_allocator_settings() -> None:
    """Raises ValueError where sleep mode cannot work: its memory pool and expandable segments exclude each other."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in os.environ.get(name, "").lower().replace(" ", ""):
            raise ValueError(
                f"{name} has expandable_segments:True, which vLLM's sleep mode cannot work with: remove it, "
                "or choose --sleep_level 0"
            )


def describe_mismatch(sample_id: str, ours: list[int], theirs: list[int], tokenizer) -> str:
    """Where two id lists part, with a few tokens of each side as text."""
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    around = slice(max(0, place - 8), place + 8)
    return (
        f"sample {sample_id}: vLLM's prompt ({len(theirs)} ids) differs from the trainer's ({len(ours)} ids) at position "
        f"{place}\n  trainer: {ours[around]} {tokenizer.decode(ours[around])!r}\n"
        f"  vLLM:    {theirs[around]} {tokenizer.decode(theirs[around])!r}\n"
        "  The two read the same text and frames, so their processors differ: check that transformers and vLLM are the "
        "pinned versions"
    )


def _our_id(reported: str, running: dict[str, int]) -> str:
    """vLLM may append a random part to a request's id; the caller's id stays its beginning."""
    if reported in running:
        return reported
    return next(ours for ours in running if reported.startswith(f"{ours}-"))


def _hash(*parts: object) -> int:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
