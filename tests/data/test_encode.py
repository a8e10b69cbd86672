"""data/encode.py against the Hugging Face processors themselves, four families, every mix of media."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoProcessor
from transformers.video_utils import VideoMetadata

from data.encode import Encoder, PromptTooLong, read_config
from data.frame_cache import FrameCache
from data.positions import mrope_positions, patch_times, patchify
from data.records import Media, Sample
from data.video import ImageSettings, VideoSettings, read_image, read_video
from tests.tiny_models import FAMILIES

VIDEO = {"fps": 1.0, "min_frames": 4, "max_frames": 8, "min_pixels": 4096, "max_pixels": 448 * 224}
IMAGE = {"min_pixels": 4096, "max_pixels": 256 * 256}
# Known by construction of the clips in conftest.py: source fps, frames, frames chosen at 1 fps with at least 4.
CLIPS = {"wide.mp4": (12.0, 48, [0, 16, 31, 47]), "odd.mp4": (10.0, 30, [0, 10, 19, 29])}
MIXES = {
    "video": ("wide.mp4",),
    "two videos": ("wide.mp4", "odd.mp4"),
    "image": ("still.png",),
    "image and video": ("still.png", "odd.mp4"),
    "text": (),
}


def make_sample(folder, names, **changes) -> Sample:
    media = tuple(Media("image" if name.endswith("png") else "video", path=str(folder / name)) for name in names)
    fields = {
        "id": "q1",
        "question": "Which colour is the square?",
        "answer": "A",
        "problem_type": "multiple choice",
        "data_type": "mixed" if len(media) > 1 else "video" if media else "text",
        "media": media,
        "options": ("red", "green"),
        "file": "train.jsonl",
        "line": 7,
    }
    return Sample(**{**fields, **changes})


@pytest.fixture(scope="module")
def encoders(tiny):
    return {family: Encoder(tiny(family), video=VIDEO, image=IMAGE, style="direct") for family in FAMILIES}


def processor_inputs(model_dir, folder, names, text, factor):
    """What the folder's own processor makes of the same frames; their numbers and metadata are written out here."""
    processor = AutoProcessor.from_pretrained(model_dir)
    settings = VideoSettings(**VIDEO, factor=factor)
    videos, metadata, images = [], [], []
    for name in names:
        if name.endswith("png"):
            item = Media("image", path=str(folder / name))
            images.append(torch.from_numpy(read_image(item, ImageSettings(**IMAGE, factor=factor))))
            continue
        fps, total, indices = CLIPS[name]
        videos.append(torch.from_numpy(read_video(Media("video", path=str(folder / name)), settings).pixels))
        metadata.append(VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps, frames_indices=indices))
    media = {"videos": videos or None, "video_metadata": metadata or None, "images": images or None}
    kwargs = {"do_resize": False, "do_sample_frames": False} if names else {}
    inputs = processor(text=[text], return_tensors="pt", **{k: v for k, v in media.items() if v}, **kwargs)
    return inputs


def plain_positions(family, ids, types, grids, seconds, config):
    """M-RoPE written as slowly as possible: one token at a time, a counter and the rule 'text goes on at maximum +
    1'."""
    columns, place, grid_number = [], 0, 0
    apart = family in ("qwen3_vl", "qwen3_5")
    grids = [g for grid in grids for g in ([(1, *grid[1:])] * grid[0] if apart else [grid])]
    while place < len(ids):
        start = max((max(column) for column in columns), default=-1) + 1
        if types[place] == 0:
            columns.append((start, start, start))
            place += 1
            continue
        t, h, w = grids[grid_number]
        speed = 1
        if family == "qwen2_5_vl" and types[place] == 2:
            speed = seconds[grid_number] * config.vision_config.tokens_per_second
        for i in range(t):
            for j in range(h // 2):
                for k in range(w // 2):
                    columns.append((start + int(i * speed), start + j, start + k))
        place += t * h * w // 4
        grid_number += 1
    return np.array(columns).T


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_processor(encoders, media_folder, family, mix):
    encoder, names = encoders[family], MIXES[mix]
    prompt = encoder.encode(make_sample(media_folder, names))
    theirs = processor_inputs(encoder.model_dir, media_folder, names, prompt.text, encoder.factor)

    assert prompt.input_ids.tolist() == theirs["input_ids"][0].tolist()
    assert prompt.mm_type_ids.tolist() == theirs["mm_token_type_ids"][0].tolist()
    for kind, key in (("image", "image_grid_thw"), ("video", "video_grid_thw")):
        ours = [grid for grid, its_kind in zip(prompt.grid_thw.tolist(), prompt.grid_kinds) if its_kind == kind]
        assert ours == (theirs[key].tolist() if key in theirs else [])
    mean = torch.tensor(encoder.image_mean).mul(255).view(3, 1)
    std = torch.tensor(encoder.image_std).mul(255).view(3, 1)
    start = 0
    seen = {"image": 0, "video": 0}
    for grid, kind in zip(prompt.grid_thw, prompt.grid_kinds):
        rows = int(grid.prod())
        ours = torch.from_numpy(prompt.patches[start : start + rows])
        ours = ((ours.view(rows, 3, -1).float() - mean) / std).view(rows, -1)
        key = "pixel_values" if kind == "image" else "pixel_values_videos"
        assert torch.equal(ours, theirs[key][seen[kind] : seen[kind] + rows])  # bit-equal
        start, seen[kind] = start + rows, seen[kind] + rows
    if not names:
        assert prompt.patches is None and prompt.cache_key == ""

    # clips of 4 s and 3 s seen in two temporal patches of two frames each: 2 s and 1.5 s per patch
    seconds = [{"wide.mp4": 2.0, "odd.mp4": 1.5}.get(name, 1.0) for name in names]
    config = AutoConfig.from_pretrained(encoder.model_dir)
    expected = plain_positions(family, prompt.input_ids, prompt.mm_type_ids, prompt.grid_thw.tolist(), seconds, config)
    assert prompt.position_ids.tolist() == expected.tolist()
    assert encoder.count_tokens(make_sample(media_folder, names)) == len(prompt.input_ids)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_positions_equal_the_models_own(encoders, media_folder, family):
    """transformers computes these two families' positions by the same rule (it differs for the older two, see
    positions.py)."""
    from transformers import AutoModelForImageTextToText

    encoder, names = encoders[family], ("still.png", "odd.mp4", "wide.mp4")
    prompt = encoder.encode(make_sample(media_folder, names))
    theirs = processor_inputs(encoder.model_dir, media_folder, names, prompt.text, encoder.factor)
    model = AutoModelForImageTextToText.from_pretrained(encoder.model_dir).model
    positions, _ = model.get_rope_index(
        theirs["input_ids"], theirs["mm_token_type_ids"], theirs["image_grid_thw"], theirs["video_grid_thw"]
    )
    assert prompt.position_ids.tolist() == positions[:, 0].tolist()


def test_frame_choice_is_the_processors(encoders, media_folder):
    """Qwen3-VL's own video processor, given the whole clip, picks and keeps the same frames (448x224 needs no
    resize)."""
    encoder = encoders["qwen3_vl"]
    everything = read_video(
        Media("video", path=str(media_folder / "wide.mp4")),
        VideoSettings(fps=12, min_frames=48, max_frames=48, max_pixels=448 * 224, factor=32),
    )
    prompt = encoder.encode(make_sample(media_folder, ["wide.mp4"]))
    theirs = encoder.processor(
        text=[prompt.text],
        videos=[torch.from_numpy(everything.pixels)],
        video_metadata=[VideoMetadata(total_num_frames=48, fps=12.0, duration=4.0)],
        fps=1.0,
        return_tensors="pt",
    )
    assert prompt.input_ids.tolist() == theirs["input_ids"][0].tolist()
    values = (torch.from_numpy(prompt.patches).float() - 127.5) / 127.5
    assert torch.equal(values, theirs["pixel_values_videos"])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_cached_equals_decoded(encoders, media_folder, tmp_path, family):
    direct = encoders[family]
    cache = FrameCache(str(tmp_path), "prefer")
    for name in ("wide.mp4", "odd.mp4"):
        cache.store(Media("video", path=str(media_folder / name)), direct.video)
    cached = direct.with_budgets(cache=FrameCache(str(tmp_path), "require"))
    names = ("odd.mp4", "still.png", "wide.mp4")
    first, second = (encoder.encode(make_sample(media_folder, names)) for encoder in (direct, cached))
    assert np.array_equal(first.patches, second.patches)
    assert first.input_ids.tolist() == second.input_ids.tolist()
    assert first.position_ids.tolist() == second.position_ids.tolist()
    assert first.timestamps == second.timestamps
    assert first.cache_key == second.cache_key


def test_without_patches_everything_else_is_the_same(encoders, tiny, media_folder):
    lean = Encoder(tiny("qwen2_5_vl"), video=VIDEO, image=IMAGE, style="direct", build_patches=False)
    sample = make_sample(media_folder, ("odd.mp4", "still.png"))
    full, bare = encoders["qwen2_5_vl"].encode(sample), lean.encode(sample)
    assert bare.patches is None and len(full.patches) == full.grid_thw.prod(axis=1).sum()
    assert bare.grid_thw.tolist() == full.grid_thw.tolist() and bare.cache_key == full.cache_key
    assert bare.input_ids.tolist() == full.input_ids.tolist()
    assert bare.position_ids.tolist() == full.position_ids.tolist()
    frames = [prompt.vllm_prompt["multi_modal_data"]["video"][0][0] for prompt in (full, bare)]
    assert np.array_equal(*frames)


def test_keys_tell_content_apart(encoders, media_folder):
    encoder = encoders["qwen3_vl"]
    keys = [encoder.encode(make_sample(media_folder, names)).cache_key for names in MIXES.values()]
    fewer = encoder.with_budgets(video={"max_frames": 4, "max_pixels": 112 * 224})
    keys.append(fewer.encode(make_sample(media_folder, ["wide.mp4"])).cache_key)
    assert len(set(keys)) == len(keys)


def test_timestamps_by_hand(encoders, media_folder):
    """Frames 0, 16, 31, 47 at 12 fps are at 0, 1.333, 2.583, 3.917 s: patches at their pairs' means 0.667 and 3.25
    s."""
    prompt = encoders["qwen3_vl"].encode(make_sample(media_folder, ["wide.mp4"]))
    assert prompt.timestamps == (pytest.approx((0.6667, 3.25), abs=1e-4),)
    text = encoders["qwen3_vl"].tokenizer.decode(prompt.input_ids.tolist())
    assert "<0.7 seconds><|vision_start|>" in text and "<3.2 seconds><|vision_start|>" in text


def test_time_window_counts_from_the_files_start(encoders, media_folder):
    sample = make_sample(media_folder, ["wide.mp4"])
    window = replace(sample, media=(replace(sample.media[0], start_s=2.0, end_s=4.0),))
    prompt = encoders["qwen3_vl"].encode(window)
    # frames 24 ... 47, four of them: 24, 31.67 -> 32, 39.33 -> 39, 47
    assert prompt.timestamps == (pytest.approx(((24 + 32) / 24, (39 + 47) / 24)),)
    older = encoders["qwen2_5_vl"].encode(window)
    # two temporal patches over 2 s: 1 s each, 2 positions per second
    times = older.position_ids[0][older.mm_type_ids == 2]
    assert sorted(set((times - times[0]).tolist())) == [0, 2]


def test_mrope_by_hand():
    # 2 text tokens, a video of 3 x 4 x 6 patches (merged 3 x 2 x 3), 1 text token; time axis counted in steps of 2.5
    types = np.array([0, 0] + [2] * 18 + [0])
    positions = mrope_positions(types, np.array([[3, 4, 6]]), 2, [2.5])
    assert positions[:, :2].tolist() == [[0, 1]] * 3
    assert positions[0, 2:20].tolist() == [2] * 6 + [4] * 6 + [7] * 6  # 2 + floor(0, 2.5, 5.0)
    assert positions[1, 2:8].tolist() == [2, 2, 2, 3, 3, 3]
    assert positions[2, 2:8].tolist() == [2, 3, 4, 2, 3, 4]
    assert positions[:, 20].tolist() == [8, 8, 8]  # 7 + 1; transformers 5 would say 2 + 3
    with pytest.raises(ValueError, match="has 18 tokens, the prompt 17"):
        mrope_positions(types[:-2], np.array([[3, 4, 6]]), 2)
    with pytest.raises(ValueError, match="2 grids for 1 runs"):
        mrope_positions(types, np.array([[3, 4, 6], [1, 2, 2]]), 2)


def test_patchify_by_hand():
    frames = np.arange(3 * 3 * 4 * 8, dtype=np.uint8).reshape(3, 3, 4, 8)  # odd number of frames: the last one twice
    rows, grid = patchify(frames, patch=2, merge=2, temporal_patch=2)
    assert grid == (2, 2, 4) and rows.shape == (16, 24)
    # row 1 is the patch right of the first one, within the first merge window: columns 2 and 3 of lines 0 and 1
    assert rows[1].reshape(3, 2, 2, 2)[1, 1].tolist() == frames[1, 1, 0:2, 2:4].tolist()
    # row 4 starts the second window: columns 4 and 5; row 2 is the second line of patches of the first window
    assert rows[4].reshape(3, 2, 2, 2)[2, 0].tolist() == frames[0, 2, 0:2, 4:6].tolist()
    assert rows[2].reshape(3, 2, 2, 2)[0, 0].tolist() == frames[0, 0, 2:4, 0:2].tolist()
    assert rows[8].reshape(3, 2, 2, 2)[0].tolist() == [frames[2, 0, 0:2, 0:2].tolist()] * 2
    with pytest.raises(ValueError, match="no multiple of 4 pixels"):
        patchify(frames[..., :6], patch=2, merge=2, temporal_patch=2)
    assert patch_times([0.0, 1.0, 4.0], 2) == (0.5, 4.0)


def test_too_long_is_refused_or_resampled_never_cut(encoders, media_folder):
    # a sample of 4 s at 2 fps: 8 frames = 4 temporal patches of 7 x 14 tokens on Qwen3-VL
    encoder = encoders["qwen3_vl"].with_budgets(video={"fps": 2.0})
    sample = make_sample(media_folder, ["wide.mp4"])
    full = encoder.count_tokens(sample)
    per_patch = 7 * 14
    limit = full - 1
    for mode in ("error", "skip"):
        strict = encoder.with_budgets(max_prompt_tokens=limit, on_long=mode)
        with pytest.raises(PromptTooLong, match=rf"train.jsonl:7: sample q1: the prompt has {full} tokens.*{limit}"):
            strict.encode(sample)
        with pytest.raises(PromptTooLong):
            strict.count_tokens(sample)
    fewer = encoder.with_budgets(max_prompt_tokens=limit, on_long="resample").encode(sample)
    assert fewer.grid_thw.tolist() == [[3, 14, 28]]
    assert full - per_patch - 20 < len(fewer.input_ids) <= limit
    assert fewer.text == encoder.encode(sample).text  # the question is whole
    fewest = encoder.with_budgets(max_prompt_tokens=full - 3 * per_patch, on_long="resample").encode(sample)
    assert fewest.grid_thw.tolist() == [[1, 14, 28]]
    with pytest.raises(PromptTooLong):
        encoder.with_budgets(max_prompt_tokens=50, on_long="resample").encode(sample)
    with pytest.raises(PromptTooLong):  # nothing to take fewer of
        encoder.with_budgets(max_prompt_tokens=5, on_long="resample").encode(make_sample(media_folder, []))


def test_marker_in_the_question_is_an_error_with_its_place(encoders, media_folder):
    sample = make_sample(media_folder, ["still.png"], question="What is <|video_pad|> here?")
    with pytest.raises(ValueError, match=r"train.jsonl:7: sample q1: the prompt marks \[image, video\].*\[image\]"):
        encoders["qwen2_vl"].encode(sample)
    with pytest.raises(ValueError, match=r"train.jsonl:7: sample q1: .*markers for 1 image"):
        encoders["qwen2_vl"].encode(make_sample(media_folder, ["still.png"], question="<image><image> What?"))


def test_own_chat_template_and_prefilled_thinking(tiny, media_folder, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'video' %}<|vision_start|><|video_pad|>"
        "<|vision_end|>{% else %}Q: {{ c.text }}{% endif %}{% endfor %}{% endfor %}<|im_start|>assistant\n<think>\n"
    )
    encoder = Encoder(tiny("qwen3_vl"), video=VIDEO, style="direct", chat_template=str(template))
    sample = make_sample(media_folder, ["odd.mp4"])
    prompt = encoder.encode(sample)
    assert prompt.text.startswith("<|vision_start|><|video_pad|><|vision_end|>Q: Which colour")
    assert sample.extra["think_prefilled"] is True
    assert prompt.vllm_prompt["prompt"] == prompt.text
    blind = tmp_path / "blind.jinja"
    blind.write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(ValueError, match=r"marks \[\] but the sample has \[video\]"):
        Encoder(tiny("qwen3_vl"), video=VIDEO, chat_template=str(blind)).encode(sample)


@pytest.mark.parametrize(
    ("family", "row", "coord", "size"),
    [
        # only the answer is in pixels: of the frame as the model sees it, 112x84 (122x90 rounded to multiples of 28)
        ("qwen2_5_vl", {"gt_coord": "norm1000"}, "pixel", (112, 84)),
        ("qwen3_vl", {"gt_coord": "norm1"}, "norm1000", (128, 96)),
        # the gold is in pixels of the source: of the row's size, or of the file's
        ("qwen3_vl", {"gt_coord": "pixel", "width": 1280, "height": 944}, "norm1000", (1280, 944)),
        ("qwen3_vl", {"gt_coord": "pixel"}, "norm1000", (122, 90)),
        ("qwen2_5_vl", {"gt_coord": "pixel"}, "norm1000", (122, 90)),  # two pixel systems could not be told apart
        ("qwen2_5_vl", {"gt_coord": "pixel", "width": 112, "height": 84}, "pixel", (112, 84)),
        ("qwen2_5_vl", {"gt_coord": "norm1000", "coord": "norm1"}, "norm1", (112, 84)),  # the row decides
        ("qwen2_5_vl", {}, None, (122, 90)),  # nobody said what the gold is measured in
    ],
)
def test_frame_size_and_coordinates_reach_prompt_and_rewards(encoders, media_folder, family, row, coord, size):
    sample = make_sample(media_folder, ["odd.mp4"], problem_type="spatial grounding", options=())
    sample.extra.update(row)
    for _ in range(2):  # the second time must not take our own size for the row's
        encoders[family].encode(sample)
        assert sample.extra.get("coord") == coord
        assert (sample.extra["width"], sample.extra["height"]) == size


def test_boxes_meet_in_one_system(encoders, media_folder):
    """A box over the frame's right half, as each family answers it, is worth 1 against gold in any system."""
    from rewards import score

    answers = {"pixel": [56, 0, 112, 84], "norm1000": [500, 0, 1000, 1000], "norm1": [0.5, 0, 1, 1]}
    golds = {"pixel": [61, 0, 122, 90], "norm1000": [500, 0, 1000, 1000], "norm1": [0.5, 0, 1, 1]}
    for family in ("qwen2_5_vl", "qwen3_vl"):
        for system, gold in golds.items():
            sample = make_sample(
                media_folder, ["odd.mp4"], problem_type="spatial grounding", options=(), answer={"boxes": gold}
            )
            sample.extra["gt_coord"] = system
            encoders[family].encode(sample)
            response = f'<answer>{{"boxes": {answers[sample.extra["coord"]]}}}</answer>'
            extra = {"question": sample.question, **sample.extra}
            assert score("spatial grounding", response, sample.answer, extra).accuracy == pytest.approx(1.0)


def test_special_ids(encoders):
    for encoder in encoders.values():
        tokens = encoder.tokenizer.convert_ids_to_tokens(list(encoder.visual_token_ids))
        names = ("image_pad", "video_pad", "vision_end", "vision_pad", "vision_start")
        assert sorted(tokens) == [f"<|{name}|>" for name in names]
        ends = encoder.tokenizer.convert_ids_to_tokens(list(encoder.eos_token_ids))
        assert sorted(ends) == ["<|endoftext|>", "<|im_end|>"]


def test_a_config_that_vllm_has_put_in_transformers_place(tiny):
    """vLLM 0.26 registers a Qwen3.5 configuration of its own with AutoConfig; no transformers model can be built from it."""
    from transformers import AutoModelForImageTextToText, PretrainedConfig, Qwen3_5Config
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    folder = tiny("qwen3_5")
    fields = {"model_type": "qwen3_5", "__module__": "vllm.transformers_utils.configs.qwen3_5"}
    AutoConfig.register("qwen3_5", type("Qwen3_5Config", (PretrainedConfig,), fields), exist_ok=True)
    try:
        assert type(AutoConfig.from_pretrained(folder)) is not Qwen3_5Config
        config = read_config(folder)
    finally:
        del CONFIG_MAPPING._extra_content["qwen3_5"]
    assert type(config) is Qwen3_5Config
    assert config.to_diff_dict() == Qwen3_5Config.from_pretrained(folder).to_diff_dict()
    with torch.device("meta"):
        assert (
            AutoModelForImageTextToText.from_config(config).config.vision_config.num_heads
            == config.vision_config.num_heads
        )
