"""vLLM against transformers: prompt ids, log-probs before and after a weight sync, seeds, order, banned ids.

The scoring side here is a plain forward of the Hugging Face model, written without the trainer's code.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest
import torch
from transformers import AutoVideoProcessor

os.environ.setdefault("OMP_NUM_THREADS", "1")

from data.encode import Encoder, read_config
from data.records import Media, Sample
from rollout import vllm_access
from rollout.engine import PromptMismatch, RolloutEngine
from rollout.vllm_inputs import SECONDS, seconds_of
from rollout.weight_sync import WeightNamesError

VIDEO = {"fps": 2.0, "min_frames": 4, "max_frames": 8, "min_pixels": 4096, "max_pixels": 112 * 224}
IMAGE = {"min_pixels": 4096, "max_pixels": 128 * 128}
MIXES = {
    "video": ("wide.mp4",),
    "two videos": ("wide.mp4", "odd.mp4"),
    "image": ("still.png",),
    "image and video": ("still.png", "odd.mp4"),
    "text": (),
}
SAMPLING = {"temperature": 0.8, "top_p": 1.0, "top_k": -1, "max_tokens": 12}
TEMPERATURE = 0.8


def make_sample(folder, names, number=0) -> Sample:
    return Sample(
        id=f"q{number}",
        question="Which colour is the square?",
        answer="A",
        problem_type="multiple choice",
        data_type="mixed" if len(names) > 1 else "video" if names else "text",
        media=tuple(Media("image" if n.endswith("png") else "video", path=str(folder / n)) for n in names),
        options=("red", "green"),
    )


def make_engine(model_dir, dtype="fp32", **changes):
    encoder = Encoder(model_dir, video=VIDEO, image=IMAGE, style="direct")
    engine = RolloutEngine(
        model_dir,
        encoder=encoder,
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=16,
        kv_cache_gib=0.0625,
        seed=3,
        **changes,
    )
    return encoder, engine


def score(model, encoder, prompt, response, temperature=TEMPERATURE):
    """(R,) log-probs of a response's tokens, by one plain forward of the Hugging Face model."""
    tokens = torch.tensor([[*prompt.input_ids.tolist(), *response.token_ids]])
    length, count = len(prompt.input_ids), len(response.token_ids)
    last = int(prompt.position_ids.max())
    following = torch.arange(last + 1, last + 1 + count).expand(3, -1)
    positions = torch.cat([torch.from_numpy(prompt.position_ids), following], 1)[:, None]
    inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": torch.ones_like(tokens)}
    start = 0
    mean, std = (torch.tensor(values).view(1, 3, 1) * 255 for values in (encoder.image_mean, encoder.image_std))
    for grid, kind in zip(prompt.grid_thw, prompt.grid_kinds):
        rows = torch.from_numpy(prompt.patches[start : start + int(grid.prod())]).float()
        start += len(rows)
        pixels = ((rows.view(len(rows), 3, -1) - mean) / std).view(len(rows), -1).to(model.dtype)
        names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
        for name, value in zip(names, (pixels, torch.from_numpy(grid)[None])):
            inputs[name] = torch.cat([inputs[name], value]) if name in inputs else value
    if prompt.grid_kinds:
        types = torch.from_numpy(prompt.mm_type_ids)[None].int()
        inputs["mm_token_type_ids"] = torch.cat([types, torch.zeros(1, count, dtype=torch.int32)], 1)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0, length - 1 : -1].float() / temperature
    logits[:, list(encoder.visual_token_ids)] = float("-inf")
    return torch.log_softmax(logits, -1).gather(-1, tokens[0, length:, None])[:, 0]


def load(model_dir, dtype=torch.float32):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(model_dir, config=read_config(model_dir), dtype=dtype).eval()


def gaps(engine, model, encoder, prompts, step, greedy=False):
    """(largest, mean) distance between vLLM's log-probs of what it sampled and those of the model."""
    found = {}
    sampling = {**SAMPLING, "temperature": 0.0} if greedy else SAMPLING
    for index, responses in engine.generate(prompts, n=1 if greedy else 2, sampling=sampling, step=step):
        for response in responses:
            assert len(response.rollout_logprobs) == len(response.token_ids)
            scored = score(model, encoder, prompts[index], response, 1.0 if greedy else TEMPERATURE)
            found.setdefault(index, []).append((scored - torch.tensor(response.rollout_logprobs)).abs())
    assert sorted(found) == list(range(len(prompts)))
    every = torch.cat([gap for listed in found.values() for gap in listed])
    return float(every.max()), float(every.mean())


def disturb(model, amount):
    """The weights after something like a large update, the head included."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype), alpha=amount)


def check_parity(tiny, media_folder, family, dtype, check, tied=False):
    """check(engine, model, encoder, prompts, step) asserts equality; before and after two syncs, and never in between."""
    model_dir = tiny(family, tied=tied)
    encoder, engine = make_engine(model_dir, dtype)
    model = load(model_dir, torch.float32 if dtype == "fp32" else torch.bfloat16)
    prompts = [encoder.encode(make_sample(media_folder, names, i)) for i, names in enumerate(MIXES.values())]
    check(engine, model, encoder, prompts, 0)
    disturb(model, 0.01)
    assert gaps(engine, model, encoder, prompts, 1)[1] > 0.1  # the engine still has the old weights
    assert engine.sync(iter(list(model.named_parameters()))) == len(list(model.named_parameters()))
    check(engine, model, encoder, prompts, 2)
    disturb(model, 0.01)  # the second sync skips the check of names
    engine.sync((name, parameter.detach().clone()) for name, parameter in model.named_parameters())
    check(engine, model, encoder, prompts, 3)
    # Each combination was rendered by vLLM once and ours was the same; all later prompts were ours.
    assert engine.inputs.equal == {("video",): True, ("image",): True, ("image", "video"): True}


def equal_in_fp32(engine, model, encoder, prompts, step):
    assert gaps(engine, model, encoder, prompts, step)[0] < 1e-4


def close_in_bf16(engine, model, encoder, prompts, step):
    """bf16 rounds the two implementations apart; least for the tokens that are likely, so the largest gap is of those."""
    assert gaps(engine, model, encoder, prompts, step, greedy=True)[0] < 5e-2
    assert gaps(engine, model, encoder, prompts, step)[1] < 2e-2


def test_tied_embeddings(tiny, media_folder):
    """A tied head keeps a packed copy of the old embedding on CPU unless the sync packs it again."""
    check_parity(tiny, media_folder, "qwen3_vl", "fp32", equal_in_fp32, tied=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_parity(tiny, media_folder, family):
    check_parity(tiny, media_folder, family, "fp32", equal_in_fp32)


@pytest.mark.slow
@pytest.mark.skipif(
    vllm_access.installed_version() < (0, 27) and not torch.cuda.is_available(),
    reason="vLLM 0.26's linear attention dies on a CPU (illegal instruction)",
)
def test_parity_of_linear_attention(tiny, media_folder):
    check_parity(tiny, media_folder, "qwen3_5", "bf16", close_in_bf16)


@pytest.fixture(scope="module")
def qwen3(tiny):
    return make_engine(tiny("qwen3_vl"))


def collect(engine, prompts, **changes):
    arguments = {"n": 3, "sampling": SAMPLING, "step": 5, **changes}
    return dict(engine.generate(prompts, **arguments))


def test_seeds(qwen3, media_folder):
    encoder, engine = qwen3
    prompts = [encoder.encode(make_sample(media_folder, names, i)) for i, names in enumerate([("odd.mp4",), ()])]
    first = collect(engine, prompts)
    again = collect(engine, prompts[::-1])  # other company, other order
    for index in (0, 1):
        for a, b in zip(first[index], again[1 - index], strict=True):
            assert a.token_ids == b.token_ids
    texts = [tuple(response.token_ids) for response in first[0]]
    assert len(set(texts)) == 3  # slots differ
    for change in ({"step": 6}, {"salt": "round 1"}):
        other = collect(engine, prompts, **change)
        assert [r.token_ids for r in other[0]] != [r.token_ids for r in first[0]]
    twice = collect(engine, [prompts[1], prompts[1]])  # one sample twice in a step: two groups, not one copied
    assert [r.token_ids for r in twice[0]] != [r.token_ids for r in twice[1]]
    assert [r.token_ids for r in twice[0]] == [r.token_ids for r in first[1]]


def test_engine_seed_leaves_the_trainers_generator_alone(qwen3, media_folder):
    encoder, engine = qwen3
    prompts = [encoder.encode(make_sample(media_folder, (), i)) for i in range(2)]
    engine.rollout_seed = "engine"
    try:
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        first = collect(engine, prompts)
        assert torch.equal(torch.rand(3), expected)
        torch.manual_seed(2)
        assert [r.token_ids for r in collect(engine, prompts)[0]] == [r.token_ids for r in first[0]]
        assert [r.token_ids for r in collect(engine, prompts, step=6)[0]] != [r.token_ids for r in first[0]]
    finally:
        engine.rollout_seed = "request"


def test_groups_come_as_they_end(qwen3, media_folder):
    encoder, engine = qwen3
    prompts = [encoder.encode(make_sample(media_folder, (), i)) for i in range(3)]
    lengths = [24, 3, 12]
    settings = [{**SAMPLING, "max_tokens": length} for length in lengths]
    stream = engine.generate(prompts, n=[1, 2, 3], sampling=settings, step=0)
    order, sizes = [], {}
    for index, responses in stream:
        if not order:
            assert engine.llm.llm_engine.has_unfinished_requests()  # the others are still being sampled
        order.append(index)
        sizes[index] = len(responses)
        for response in responses:
            assert response.finish_reason == ("length" if len(response.token_ids) == lengths[index] else "stop")
    assert sizes == {0: 1, 1: 2, 2: 3}
    assert order[0] == 1
    abandoned = engine.generate(prompts, n=2, sampling={**SAMPLING, "max_tokens": 200}, step=0)
    next(iter(engine.generate(prompts[:1], n=1, sampling={**SAMPLING, "max_tokens": 1}, step=0)))
    abandoned.close()
    early = engine.generate(prompts, n=2, sampling=settings, step=0)
    next(early)
    early.close()
    assert not engine.llm.llm_engine.has_unfinished_requests()


def test_responses_are_what_vllm_reports_token_by_token(qwen3, media_folder, monkeypatch):
    """Log-probs in flat lists, tokens held until a response ends, text made afterwards: none of it changes a bit."""
    from vllm.sampling_params import RequestOutputKind

    encoder, engine = qwen3
    prompts = [encoder.encode(make_sample(media_folder, names, i)) for i, names in enumerate([("odd.mp4",), (), ()])]
    asked = {}
    make = vllm_access.sampling_params

    def plain(**arguments):
        """As vLLM's own users ask: text after every token, a dictionary of log-probs for each."""
        asked[len(asked)] = params = make(**arguments)
        params.detokenize, params.flat_logprobs = True, False
        params.output_kind = RequestOutputKind.CUMULATIVE
        return params

    numbers = [3, 1, 4]
    sampling = {**SAMPLING, "max_tokens": 60}
    changes = {"n": numbers, "sampling": [sampling, sampling, {**sampling, "max_tokens": 7}]}
    ours = collect(engine, prompts, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(vllm_access, "sampling_params", plain)
        engine.generate(prompts, step=5, **changes)  # makes the parameters and runs nothing
    ended = set()
    theirs = engine.llm.generate([p.vllm_prompt for p in prompts], [asked[i] for i in range(3)], use_tqdm=False)
    for index, output in enumerate(theirs):
        assert len(output.outputs) == len(ours[index]) == numbers[index]
        for item, response in zip(output.outputs, ours[index]):
            assert response.token_ids == list(item.token_ids)
            expected = [entry[token].logprob for token, entry in zip(item.token_ids, item.logprobs, strict=True)]
            assert [value.hex() for value in response.rollout_logprobs] == [value.hex() for value in expected]
            assert (response.finish_reason, response.text) == (item.finish_reason, item.text)
            ended.add(response.finish_reason)
    assert ended == {"stop", "length"}
    assert any("\N{REPLACEMENT CHARACTER}" in response.text for response in ours[0])


def test_limits_of_each_response_and_stop_strings(qwen3, media_folder):
    """Four requests at once with limits of their own; stop strings need text after every token, and keep theirs."""
    encoder, engine = qwen3
    prompts = [encoder.encode(make_sample(media_folder, (), i)) for i in range(4)]
    limits = [[5], [1, 9, 2], [12, 3], [4, 4]]
    settings = [{**SAMPLING, "max_tokens": each, "ignore_eos": True} for each in limits]
    found = collect(engine, prompts, n=[1, 3, 2, 2], sampling=settings)
    assert [[len(r.token_ids) for r in found[i]] for i in range(4)] == limits
    assert all(r.finish_reason == "length" for group in found.values() for r in group)
    long = {**SAMPLING, "max_tokens": 100}
    free = collect(engine, prompts[:1], n=4, sampling=long)[0]
    stopped = collect(engine, prompts[:1], n=4, sampling={**long, "stop": ["e"]})[0]
    assert any("e" in response.text for response in free)
    for with_stop, without in zip(stopped, free):
        assert with_stop.token_ids == without.token_ids[: len(with_stop.token_ids)]
        assert with_stop.rollout_logprobs == without.rollout_logprobs[: len(with_stop.token_ids)]
        place = without.text.find("e")
        assert with_stop.text == (without.text if place < 0 else without.text[: place + 1])


def test_visual_tokens_never_come_and_the_end_token_is_kept(qwen3, media_folder, tiny):
    """Heads that want nothing else: the visual tokens are still never sampled, <|im_end|> ends a response and stays."""
    encoder, engine = qwen3
    model = load(tiny("qwen3_vl"))
    end = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    pads = list(encoder.visual_token_ids)
    prompts = [encoder.encode(make_sample(media_folder, ("odd.mp4",)))]
    original = model.lm_head.weight.detach().clone()

    def responses(wanted, sign):
        """Logits of `wanted` are hundreds above or, with the other sign, below all others."""
        with torch.no_grad():
            model.lm_head.weight.copy_(original)
            model.lm_head.weight[wanted] = sign * 50 * original.norm(dim=1).mean()
        engine.sync((name, parameter.detach()) for name, parameter in model.named_parameters())
        return collect(engine, prompts, n=4, sampling={**SAMPLING, "max_tokens": 24})[0]

    try:
        for sign in (1, -1):
            for response in responses(pads, sign):
                assert not set(response.token_ids) & set(pads)
                assert all(logprob > -100 for logprob in response.rollout_logprobs)
                scored = score(model, encoder, prompts[0], response)
                assert torch.allclose(scored, torch.tensor(response.rollout_logprobs), atol=1e-3)
        ended = [r for sign in (1, -1) for r in responses([end], sign) if r.finish_reason == "stop"]
        assert len(ended) >= 4
        for response in ended:
            assert response.token_ids.count(end) == (response.token_ids[-1] == end)
            assert response.token_ids[-1] in encoder.eos_token_ids
            assert "<|im_end|>" not in response.text
        assert any(response.token_ids[-1] == end for response in ended)
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(original)
        engine.sync((name, parameter.detach()) for name, parameter in model.named_parameters())


def test_wrong_ids_and_bad_requests_are_refused(qwen3, media_folder):
    encoder, engine = qwen3
    prompt = encoder.encode(make_sample(media_folder, ("odd.mp4",)))
    prompt.input_ids[4] += 1
    engine.inputs.equal.clear()  # as at a start: the first prompt of a kind is compared
    with pytest.warns(UserWarning, match=r"rendered by vLLM, .* differs \(token ids\)"):
        with pytest.raises(PromptMismatch, match=r"sample q0: .* at position 4"):
            collect(engine, [prompt])
    prompt.input_ids[4] -= 1
    engine.inputs.equal.clear()
    assert not engine.llm.llm_engine.has_unfinished_requests()
    with pytest.raises(ValueError, match="exceed the engine's length 1024"):
        collect(engine, [prompt], sampling={**SAMPLING, "max_tokens": 1000})
    with pytest.raises(ValueError, match="would all be the same"):
        collect(engine, [prompt], sampling={**SAMPLING, "temperature": 0})
    with pytest.raises(ValueError, match=r"unknown sampling settings \['beams'\]"):
        collect(engine, [prompt], sampling={**SAMPLING, "beams": 4})
    greedy = [collect(engine, [prompt], n=1, step=s, sampling={**SAMPLING, "temperature": 0})[0] for s in (0, 1)]
    assert greedy[0][0].token_ids == greedy[1][0].token_ids
    engine.sleep()  # harmless on a CPU
    engine.wake()
    assert collect(engine, [prompt], n=1)[0]


def test_prompts_are_rendered_here_once_that_is_known_to_be_equal(qwen3, media_folder, monkeypatch):
    """Bytes or floats, as vLLM's own rendering has them; and vLLM's rendering for good where ours is another."""
    encoder, engine = qwen3
    rendered = []
    render = vllm_access.render
    monkeypatch.setattr(vllm_access, "render", lambda llm, prompt: rendered.append(1) or render(llm, prompt))
    prompts = [encoder.encode(make_sample(media_folder, ("odd.mp4", "wide.mp4"), number)) for number in range(3)]
    engine.inputs.equal.clear()
    expected = collect(engine, prompts)
    assert engine.inputs.equal == {("video",): True} and len(rendered) == 1

    processor = AutoVideoProcessor.from_pretrained(engine.model_dir)
    clips = [item[0] for item in prompts[0].vllm_prompt["multi_modal_data"]["video"]]
    floats = processor(videos=clips, do_resize=False, do_sample_frames=False, return_tensors="pt")[
        "pixel_values_videos"
    ]
    for dtype in (torch.float32, torch.bfloat16):
        with monkeypatch.context() as patch:
            patch.setattr(engine.inputs, "_dtype", dtype)
            items = engine.inputs.make(prompts[0])["mm_kwargs"]["video"]
        made = torch.cat([item["pixel_values_videos"].data for item in items])
        assert made.dtype == dtype and torch.equal(made, floats.to(dtype))

    named = prompts[0].vllm_prompt
    bare = replace(prompts[0], patches=None, vllm_prompt={k: v for k, v in named.items() if k != "multi_modal_uuids"})
    assert engine.inputs(bare) is bare.vllm_prompt  # media without names are vLLM's to render

    late = [replace(p, timestamps=tuple(tuple(t + 0.5 for t in times) for times in p.timestamps)) for p in prompts]
    engine.inputs.equal.clear()
    with pytest.warns(UserWarning, match=r"rendered by vLLM, .* differs \(timestamps of a video\)"):
        got = collect(engine, late)
    assert engine.inputs.equal == {("video",): False} and len(rendered) == 2
    for number in range(3):
        assert [r.token_ids for r in got[number]] == [r.token_ids for r in expected[number]]
    engine.inputs.equal.clear()


def test_seconds_of_a_video_are_the_trainers_whatever_vllm_makes_of_them(tiny, media_folder, monkeypatch):
    """vLLM 0.26 gives Qwen2.5-VL no metadata: 2 frames at 24 per second, 1/12 s, for each temporal patch of every clip."""
    model_dir = tiny("qwen2_5_vl", sharp=True)
    encoder, engine = make_engine(model_dir)
    model, render = load(model_dir), vllm_access.render
    prompts = [encoder.encode(make_sample(media_folder, ("wide.mp4", "odd.mp4"), number)) for number in range(2)]
    assert [round(value, 3) for value in seconds_of(prompts[0], encoder)] == [1.0, 1.0]

    def without_metadata(llm, prompt):
        rendered = render(llm, prompt)
        for item in rendered["mm_kwargs"]["video"]:
            item[SECONDS].data.fill_(2 / 24)
        return rendered

    monkeypatch.setattr(vllm_access, "render", without_metadata)
    with pytest.warns(UserWarning, match=r"gives a video 0\.0833\d* seconds per temporal patch where it has 1;"):
        assert gaps(engine, model, encoder, prompts, 0)[0] < 1e-4
    assert engine.inputs.equal == {("video",): True}
    monkeypatch.setattr(
        type(engine.inputs), "__call__", lambda self, prompt: without_metadata(self.llm, prompt.vllm_prompt)
    )
    assert gaps(engine, model, encoder, prompts, 0)[1] > 0.01  # what those seconds would have done
    monkeypatch.undo()

    monkeypatch.setattr(vllm_access, "render", without_metadata)
    engine.inputs.equal[("video",)] = False  # learnt of a clip that happens to be sampled at 24 frames per second
    with pytest.raises(RuntimeError, match=r"ours differs \(see the warning .*\), but this vLLM gives a video 0\.083"):
        collect(engine, prompts)
    engine.inputs.equal.clear()
    prompts[0].input_ids[4] += 1  # and if ours cannot be used either, nothing is sampled
    with pytest.raises(RuntimeError, match=r"ours differs \(token ids\), but this vLLM gives a video 0\.083"):
        collect(engine, prompts)


def test_parameter_names_are_checked_at_the_first_sync(tiny):
    for tied in (False, True):
        model_dir = tiny("qwen3_vl", tied=tied)
        _, engine = make_engine(model_dir)
        weights = [(name, parameter.detach()) for name, parameter in load(model_dir).named_parameters()]
        assert ("lm_head.weight" in dict(weights)) is not tied
        query = "model.language_model.layers.1.self_attn.q_proj.weight"
        produced = []

        def counted(pairs, produced=produced):
            for pair in pairs:
                produced.append(pair[0])
                yield pair

        extra = ("model.language_model.layers.7.self_attn.q_proj.bias", torch.zeros(3))
        wrong = [*(pair for pair in weights if pair[0] != query), extra]
        listed = (
            r"missing: model\.language_model\.layers\.1\.self_attn\.q_proj\.weight; unexpected: \S+layers\.7\S+bias"
        )
        with pytest.raises(WeightNamesError, match=listed):
            engine.sync(counted(wrong))
        assert len(produced) == len(wrong)  # other ranks are in the same collective: it has to be finished
        with pytest.raises(WeightNamesError, match=r"given twice: model\.visual"):
            engine.sync(itertools.chain(weights, [next(p for p in weights if p[0].startswith("model.visual"))]))
        engine.sync(iter(weights))
