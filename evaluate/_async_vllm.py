"""vLLM's AsyncLLM as the pipeline's engine, given prompts that the loader threads have rendered.

vLLM would run the Hugging Face processor over every clip on one thread of this process, half a second and more for 128 frames,
while the GPU waits. Here each loader renders its own clip (rollout/vllm_inputs.py, compared with vLLM's rendering), and the
result crosses to the engine's process once, whatever the number of questions about it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import threading
from typing import Any

import cv2
import psutil
import torch

from data.encode import Encoder
from data.records import Prompt
from evaluate._engine import Completion, Engine, RequestFailed
from rollout import vllm_access
from rollout.vllm_inputs import EngineInputs


class AsyncVllm(Engine):
    """vLLM's AsyncLLM. Must be made and used inside one running event loop, because its output handler lives there.

    `encoder`: the one that makes the prompts, of the same model folder. `render` alone may be called in other threads.
    """

    def __init__(self, model: str, encoder: Encoder, **engine_args: Any):
        # Asking torch whether there is a GPU (evaluate._models.on_gpu) is enough to make CUDA unusable in a forked child.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        vllm_access.installed_version()
        from vllm import AsyncEngineArgs, SamplingParams
        from vllm.v1.engine.async_llm import AsyncLLM

        self._sampling_params, self._request_errors = SamplingParams, vllm_access.request_errors()
        before, processes = set(psutil.Process().children(recursive=True)), multiprocessing.active_children()
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **engine_args))
        self._processes = [process for process in multiprocessing.active_children() if process not in processes]
        self._guard = end_with_me([p.pid for p in psutil.Process().children(recursive=True) if p not in before])
        vllm_access.start_processor_thread(self._llm)
        cv2.setNumThreads(1)  # of data.normalise.look_up, for the reason that render() gives for torch
        self._in_thread = threading.local()
        self.change_encoder(encoder)

    @property
    def dead(self) -> bool:
        """Whether the engine's process is gone, so that no request can be answered any more."""
        return self._llm.errored

    def change_encoder(self, encoder: Encoder) -> None:
        """Takes the prompts of another encoder of the same model folder from now on, once all requests have ended.

        Whether ours is vLLM's rendering is found out anew: the answers of a benchmark must not depend on which one was first.
        The engine keeps its prefixes and media, which go by their content (token ids, Encoder's keys of pixels).
        """
        self._inputs = EngineInputs(self._llm, encoder)
        self._texts = vllm_access.Detokenizer(encoder.tokenizer)
        # A million objects of torch, transformers and vLLM that live as long as the engine: going through them took 0.4 s in
        # which no loader worked and no request was handed over. What the benchmark before has left is no part of them.
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def render(self, prompt: Prompt, shared: dict) -> dict[str, Any]:
        """Ours where it is known to be vLLM's, else vLLM's (one at a time, and kept by vLLM for the clip's other questions).
        Raises RequestFailed for what vLLM's processor refuses."""
        if not hasattr(self._in_thread, "alone"):
            # The loaders are the parallelism. With a pool of OpenMP threads each, which wait by spinning, eight of them took
            # eight times as long for a clip as one alone.
            torch.set_num_threads(1)
            self._in_thread.alone = True
        try:
            rendered = self._inputs(prompt, shared)
            if prompt.grid_kinds and "mm_kwargs" not in rendered:
                rendered = vllm_access.render(self._llm, rendered)
        except self._request_errors as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        return rendered

    def extend(self, prompt: Prompt, more: str) -> dict[str, Any]:
        if "mm_kwargs" not in prompt.vllm_prompt:
            return super().extend(prompt, more)
        return self._inputs.extended(prompt, prompt.vllm_prompt, more)

    async def generate(self, prompt: dict[str, Any], sampling: dict[str, Any], request_id: str) -> Completion:
        """Raises RequestFailed for this request alone, EngineDeadError when the engine is gone."""
        from vllm.sampling_params import RequestOutputKind

        # Without stop strings vLLM makes no text: it would, token by token, on the one thread that hands it requests, too.
        has_text = bool(sampling.get("stop"))
        params = self._sampling_params(**sampling, output_kind=RequestOutputKind.FINAL_ONLY, detokenize=has_text)
        final = None
        try:
            if "mm_kwargs" in prompt:
                await vllm_access.check_request(self._llm, request_id, prompt, params)
                prompt = vllm_access.without_known_media(self._llm, prompt)
            async for output in self._llm.generate(prompt, params, request_id):
                final = output
        except self._request_errors as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        if final is None or not final.outputs:
            raise RequestFailed("the engine returned nothing")
        answer = final.outputs[0]
        if answer.finish_reason in ("abort", "error", None):
            raise RequestFailed(f"the engine ended the answer: {answer.finish_reason}")
        tokens = list(answer.token_ids)
        if answer.finish_reason == "stop" and not has_text:
            tokens = tokens[:-1]  # the token that ended it is no text, whatever it is
        return Completion(
            text=answer.text if has_text else self._texts(final.prompt_token_ids or [], tokens),
            finish_reason=answer.finish_reason,
            prompt_tokens=len(final.prompt_token_ids or ()),
            response_tokens=len(answer.token_ids),
        )

    async def reset_caches(self) -> None:
        """Forgets prefixes and processed media, for measurements that must start equal."""
        await self._llm.reset_prefix_cache()
        await self._llm.reset_mm_cache()

    def close(self) -> None:
        gc.unfreeze()
        self._llm.shutdown()
        for process in self._processes:
            process.join(30)  # vLLM kills one that takes its time, but does not wait until its memory is free
        # Its destructor must run now: at interpreter exit the modules that it calls are gone.
        del self._inputs, self._llm
        self._guard.kill()
        self._guard.wait()


def end_with_me(pids: list[int]) -> subprocess.Popen:
    """A process that kills `pids` once this one is gone, however it went; kill it first if all ends well.

    vLLM's engine outlives a front end that died of SIGKILL and keeps its GPU memory, so that the next run, which would
    go on where this one stopped, could not start.
    """
    script = 'cat > /dev/null; kill -KILL "$@" 2> /dev/null'  # standard input ends with this process
    command = ["sh", "-c", script, "sh", *map(str, pids)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
