"""Prompts rendered by the loader threads: vLLM's AsyncLLM on the CPU answers as it does to prompts that it renders itself, and
a clip's patches cross to its process once."""

from __future__ import annotations

import asyncio
import gc
import os
import random

import numpy as np
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from data.encode import Encoder
from data.frame_cache import FrameCache
from data.positions import patchify
from data.records import Media, Sample
from evaluate import _async_vllm
from evaluate._async_vllm import AsyncVllm
from evaluate._engine import Limits, RequestFailed, SharedFrames, patch_bytes, run_pipeline
from evaluate._flags import build_parser
from evaluate._models import engine_args
from evaluate._scoring import Benchmark
from rollout import vllm_access, vllm_inputs

VIDEO = {"fps": 2.0, "min_frames": 4, "max_frames": 8, "min_pixels": 4096, "max_pixels": 112 * 224}
IMAGE = {"min_pixels": 4096, "max_pixels": 128 * 128}
MIXES = (("wide.mp4",), ("odd.mp4",), ("still.png",), ("wide.mp4", "odd.mp4"), ("odd.mp4", "still.png", "wide.mp4"), ())
QUESTIONS = ("Which colour is the square?", "Where does it move?", "How many frames?")
GREEDY = {"temperature": 0.0, "max_tokens": 8, "min_tokens": 8}
FLAGS = ["--max_num_seqs=8", "--max_model_len=2048", "--kv_cache_gib=0.25", "--max_num_batched_tokens=8192"]
FLAGS += ["--max_frames=8", "--video_max_pixels=25088"]
# The GPU set's vLLM takes floats where later ones normalise bytes, and has Qwen2.5-VL's seconds wrong.
OLD = vllm_access.installed_version() < (0, 27)
ON_OLD_CPU = pytest.mark.skipif(
    OLD and not torch.cuda.is_available(), reason="vLLM 0.26's linear attention dies on this CPU"
)


def samples_of(folder, mixes=MIXES, questions=QUESTIONS) -> list[Sample]:
    return [
        Sample(
            f"{number}-{place}", question, "A", "open-ended", "mixed" if names else "text",
            tuple(Media("image" if name.endswith("png") else "video", path=str(folder / name)) for name in names),
        )
        for number, names in enumerate(mixes)
        for place, question in enumerate(questions)
    ]  # fmt: skip


def with_engine(model_dir, dtype, work, **changes):
    """work(engine, encoder, frames) in an event loop with an AsyncVllm of the evaluation's own settings."""
    frames = SharedFrames(FrameCache(None, "off"))
    encoder = Encoder(model_dir, video=VIDEO, image=IMAGE, cache=frames, style="direct", build_patches=False)
    parser = build_parser(Benchmark(name="test", title="test", load=lambda args: []))
    arguments = {**engine_args(parser.parse_args(["--model", model_dir, "--dtype", dtype, *FLAGS])), **changes}

    async def run():
        engine = AsyncVllm(model_dir, encoder, **arguments)
        assert gc.get_freeze_count() > 100_000  # what was loaded is no work for the garbage collector
        try:
            return await work(engine, encoder, frames)
        finally:
            engine.close()
            assert gc.get_freeze_count() == 0

    return asyncio.run(run())


async def through_the_pipeline(engine, encoder, frames, samples, **limits) -> dict[str, tuple]:
    rows: dict[str, tuple] = {}

    def on_row(sample, row):
        rows[sample.id] = (row["status"], row["response"], row["prompt_tokens"])

    bounds = Limits(loaders=3, max_in_flight_bytes=1 << 30, clip_bytes=4 << 20, **limits)
    await run_pipeline(
        samples, encode=encoder.encode, engine=engine, sampling=GREEDY, limits=bounds, on_row=on_row, frames=frames
    )
    return rows


async def rendered_by_vllm(engine, encoder, samples) -> dict[str, tuple]:
    rows = {}
    for sample in samples:
        got = await engine.generate(encoder.encode(sample).vllm_prompt, GREEDY, sample.id)
        rows[sample.id] = ("", got.text, got.prompt_tokens)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("qwen2_vl", "float32"),
        ("qwen2_5_vl", "float32"),
        ("qwen3_vl", "float32"),
        pytest.param("qwen3_5", "bfloat16", marks=ON_OLD_CPU),
    ],
)
def test_answers_are_those_to_prompts_rendered_by_vllm(tiny, media_folder, monkeypatch, family, dtype):
    """Videos, images, both and text, three questions each; then the same again where ours is made to differ."""
    sent = []
    lean = vllm_access.without_known_media

    def listening(llm, prompt):
        given = lean(llm, prompt)
        sent.extend(
            (name, item is not None)
            for kind, names in prompt["mm_hashes"].items()
            for name, item in zip(names, given["mm_kwargs"][kind], strict=True)
        )
        return given

    monkeypatch.setattr(_async_vllm.vllm_access, "without_known_media", listening)
    samples = samples_of(media_folder)

    async def work(engine, encoder, frames):
        expected = await rendered_by_vllm(engine, encoder, samples)
        await engine.reset_caches()
        got = await through_the_pipeline(engine, encoder, frames, samples)
        assert got == expected and len({text for _, text, _ in got.values()}) > 6
        assert engine._inputs.equal == {("video",): True, ("image",): True, ("image", "video"): True}
        # Eight media in the mixes, three questions each; three files, each of which crossed once.
        assert len(sent) == 3 * 8 and sorted(crossed for _, crossed in sent) == [False] * 21 + [True] * 3

        # The way back: ours differs, so vLLM renders, and the answers are the same.
        engine._inputs.equal.clear()
        await engine.reset_caches()
        monkeypatch.setattr(type(engine._inputs), "_placeholders", lambda self, prompt: {})
        if OLD and family == "qwen2_5_vl":  # the way back would be a wrong one
            with pytest.raises(RuntimeError, match="it would sample from other positions than are trained on"):
                await through_the_pipeline(engine, encoder, frames, samples)
            return
        with pytest.warns(UserWarning, match="are rendered by vLLM, which takes longer: ours differs"):
            got = await through_the_pipeline(engine, encoder, frames, samples)
        assert got == expected and not any(engine._inputs.equal.values())

    with_engine(tiny(family), dtype, work)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("frames", [5, 8])
def test_floats_made_in_parts_are_the_processors(tiny, monkeypatch, family, frames):
    """For a vLLM that takes floats: parts of two temporal patches, of which 5 frames leave one that is not full."""
    from transformers import AutoVideoProcessor

    height, width = 4 * 28 if family == "qwen2_vl" else 4 * 32, 64 * 7 if family == "qwen3_vl" else 2 * 28
    clip = np.random.default_rng(frames).integers(0, 256, (frames, 3, height, width), dtype=np.uint8)
    processor = AutoVideoProcessor.from_pretrained(tiny(family))
    theirs = processor([torch.from_numpy(clip)], do_resize=False, do_sample_frames=False, return_tensors="pt")
    want = theirs["pixel_values_videos"].to(torch.bfloat16)

    inputs = vllm_inputs.EngineInputs(None, Encoder(tiny(family), video=VIDEO, image=IMAGE))
    inputs._dtype = torch.bfloat16
    monkeypatch.setattr(vllm_inputs, "PART_BYTES", 2 * clip[:2].nbytes + 1)
    got = inputs._patches(clip, len(want))
    assert got.dtype == want.dtype and torch.equal(got, want)
    assert torch.equal(inputs._pixels(patchify(clip, inputs.encoder.patch, inputs.encoder.merge, 2)[0]), want)


@pytest.mark.slow
def test_what_the_engine_has_and_what_it_forgot_is_known_here(tiny, media_folder):
    """Six clips through a media cache with room for two, in mixed order; refused and cancelled requests in between.

    A clip that this process wrongly believed to be in the engine's process would be a request that fails.
    """
    clip = str(media_folder / "wide.mp4")
    windows = [Media("video", path=clip, start_s=0.3 * number, end_s=0.3 * number + 2) for number in range(6)]
    samples = [
        Sample(f"{number}-{place}", question, "A", "open-ended", "video", (window,))
        for number, window in enumerate(windows)
        for place, question in enumerate(QUESTIONS)
    ]

    async def work(engine, encoder, frames):
        expected = await rendered_by_vllm(engine, encoder, samples)
        await engine.reset_caches()
        rendered = {sample.id: engine.render(encoder.encode(sample), {}) for sample in samples}
        size = patch_bytes(rendered["0-0"])
        assert (
            size == width * 4 * 3 * 96 * 224 + 3 * 8
        )  # 4 frames (vLLM normalises bytes itself), and a grid of three int64
        cache = engine._llm.renderer.mm_processor_cache
        names = [rendered[f"{number}-0"]["mm_hashes"]["video"][0] for number in range(6)]
        assert len(set(names)) == 6

        too_long = {**rendered["5-0"], "prompt_token_ids": rendered["5-0"]["prompt_token_ids"] * 40}
        with pytest.raises(RequestFailed, match="longer than the maximum model length of 2048"):
            await engine.generate(too_long, GREEDY, "too long")
        assert not cache.is_cached_item(names[5])  # what was refused was not sent
        with pytest.raises(RequestFailed, match="maximum context length is 2048"):
            await engine.generate({"prompt": "red " * 3000}, GREEDY, "too long a text")
        began = asyncio.create_task(engine.generate(rendered["4-0"], GREEDY, "cancelled"))
        for _ in range(3):
            await asyncio.sleep(0)
        began.cancel()
        with pytest.raises(asyncio.CancelledError):
            await began

        order = list(samples)
        random.Random(5).shuffle(order)
        answers = await asyncio.gather(
            *(
                engine.generate(rendered[sample.id], GREEDY, f"{sample.id}-{turn}")
                for turn in range(3)
                for sample in order
            )
        )
        for answer, sample in zip(answers, order * 3, strict=True):
            assert ("", answer.text, answer.prompt_tokens) == expected[sample.id]
        assert sum(map(cache.is_cached_item, names)) == 2

        large = encoder.with_budgets(video={"fps": 8.0, "max_frames": 16})
        with pytest.raises(RequestFailed, match="is more than its media cache"):
            whole = Sample("whole", "What?", "A", "open-ended", "video", (Media("video", path=clip),))
            await engine.generate(engine.render(large.encode(whole), {}), GREEDY, "large")
        assert ("", (await engine.generate(rendered["0-0"], GREEDY, "after")).text) == expected["0-0"][:2]

    width = 4 if OLD else 1  # bytes of a value
    # 4 frames are 0.26 MB of bytes, so that two clips fit into 0.6 MB and a third does not; nor do 16 frames.
    with_engine(tiny("qwen3_vl"), "float32", work, mm_processor_cache_gb=width * 0.6e6 / 2**30)


@pytest.mark.slow
def test_a_longer_text_has_the_ids_that_vllm_gives_it(tiny, media_folder):
    """The conclusion that is forced after a thought goes to the engine as ids; vLLM's own rendering is the reference."""
    thoughts = (
        "\n\nThe square moves.\n</think>\n\n",
        " red",
        "green\n",
        "\u00e9\u4e2d\U0001f600 2<3\n</think>\n\n",
        "",
    )

    async def work(engine, encoder, frames):
        for sample in samples_of(media_folder, (("odd.mp4",), ("odd.mp4", "still.png")), QUESTIONS[:1]):
            prompt = encoder.encode(sample)
            raw = prompt.vllm_prompt
            prompt.vllm_prompt = engine.render(prompt, {})
            for more in thoughts:
                longer = engine.extend(prompt, more)
                theirs = vllm_access.render(engine._llm, {**raw, "prompt": prompt.text + more})
                assert longer["prompt_token_ids"] == list(theirs["prompt_token_ids"])
                assert longer["mm_placeholders"] is prompt.vllm_prompt["mm_placeholders"]
        (text,) = samples_of(media_folder, ((),), QUESTIONS[:1])
        prompt = encoder.encode(text)
        prompt.vllm_prompt = engine.render(prompt, {})
        assert engine.extend(prompt, " red") == {"prompt": prompt.text + " red"}

    with_engine(tiny("qwen3_vl"), "float32", work)
