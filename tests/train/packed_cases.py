"""Prompts made by hand from the Hugging Face processors, and the plain one-row-per-response forward to compare with."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

from data.records import Group, Prompt, Response, Sample
from train.batching import dummy_group

KINDS = ("text", "image", "video")


@contextmanager
def float64_throughout():
    """transformers computes norms and rotations in float32 whatever the weights are; here they stay in float64."""
    plain_float, plain_to = torch.Tensor.float, torch.Tensor.to

    def to(self, *args, **kwargs):
        if self.dtype == torch.float64 and args and args[0] is torch.float32:
            return self
        return plain_to(self, *args, **kwargs)

    def as_float(self, *args, **kwargs):
        return self if self.dtype == torch.float64 else plain_float(self, *args, **kwargs)

    torch.Tensor.float, torch.Tensor.to = as_float, to
    try:
        yield
    finally:
        torch.Tensor.float, torch.Tensor.to = plain_float, plain_to


def positions_by_hand(type_ids, grids, kinds, merge, seconds_per_grid, tokens_per_second, frames_apart):
    """M-RoPE positions by the rule of the papers: text restarts at the largest position + 1; (3, P)."""
    pieces, position, place, number = [], 0, 0, 0
    grids = [tuple(int(x) for x in grid) for grid in grids]
    if frames_apart:  # Qwen3-VL: every temporal patch of a video stands between timestamps, a grid of its own
        grids = [
            (1, h, w) if kind == "video" else (t, h, w)
            for (t, h, w), kind in zip(grids, kinds)
            for _ in range(t if kind == "video" else 1)
        ]
    while place < len(type_ids):
        if type_ids[place] == 0:
            pieces.append(np.full((3, 1), position))
            position, place = position + 1, place + 1
            continue
        t, h, w = grids[number]
        number += 1
        h, w = h // merge, w // merge
        step = tokens_per_second * seconds_per_grid if type_ids[place] == 2 and not frames_apart else 1.0
        block = np.array([[int(a * step), b, c] for a in range(t) for b in range(h) for c in range(w)]).T + position
        pieces.append(block)
        position, place = int(block.max()) + 1, place + t * h * w
    return np.concatenate(pieces, axis=1).astype(np.int64)


def groups_of(*shapes: tuple[int, tuple[int, ...]]) -> list[Group]:
    """Groups without media, of which nothing but the lengths counts: (prompt, its responses) each."""
    made = []
    for length, responses in shapes:
        group = dummy_group()
        group.prompt.input_ids = np.zeros(length, dtype=np.int64)
        group.prompt.position_ids = np.zeros((3, length), dtype=np.int64)
        group.responses = [Response([1] * n, [], "stop") for n in responses]
        made.append(group)
    return made


class PromptMaker:
    """Prompts of one tiny model: `make(kind, seed)` with kind text, image, video or both (an image and a video)."""

    def __init__(self, folder, config):
        self.processor = AutoProcessor.from_pretrained(folder)
        self.config = config

    def make(self, kind: str, seed: int, words: str = "what colour is the square") -> tuple[Prompt, dict]:
        """-> (the prompt as records have it, the processor's float inputs for the plain forward)."""
        rng = np.random.default_rng(seed)
        content, images, videos, metadata, grid_kinds = [], [], [], [], []
        if kind in ("image", "both"):
            content.append({"type": "image"})
            images.append(torch.from_numpy(rng.integers(0, 256, (3, 70, 100), dtype=np.uint8)))
            grid_kinds.append("image")
        if kind in ("video", "both"):
            frames = 6 + 2 * (seed % 2)
            content.append({"type": "video"})
            videos.append(torch.from_numpy(rng.integers(0, 256, (frames, 3, 70, 130), dtype=np.uint8)))
            total = frames * 6
            taken = list(range(0, total, 6))
            metadata.append(VideoMetadata(total_num_frames=total, fps=12.0, duration=total / 12, frames_indices=taken))
            grid_kinds.append("video")
        content.append({"type": "text", "text": words})
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        media = {"images": images or None, "videos": videos or None}
        if videos:
            media |= {"video_metadata": metadata, "do_sample_frames": False}
        floats = dict(self.processor(text=[text], return_tensors="pt", **media))
        floats.pop("video_metadata", None)
        # The same once more without rescaling and normalisation: the bytes that ReelRL sends to the device.
        raw = dict(self.processor(text=[text], return_tensors="pt", do_rescale=False, do_normalize=False, **media))
        pixels = [raw[name] for name in ("pixel_values", "pixel_values_videos") if raw.get(name) is not None]
        grids = [floats[name] for name in ("image_grid_thw", "video_grid_thw") if floats.get(name) is not None]
        grid_thw = torch.cat(grids).numpy() if grids else np.zeros((0, 3), dtype=np.int64)
        patches = None
        if pixels:
            joined = torch.cat([x.reshape(x.shape[0], -1) for x in pixels])
            patches = joined.to(torch.uint8)
            assert torch.equal(patches.float(), joined.float())
            patches = patches.numpy()
        seconds = float(floats["second_per_grid_ts"][0]) if floats.get("second_per_grid_ts") is not None else 1.0
        type_ids = floats["mm_token_type_ids"][0].numpy().astype(np.uint8)
        vision = self.config.vision_config
        positions = positions_by_hand(
            type_ids,
            grid_thw,
            grid_kinds,
            vision.spatial_merge_size,
            seconds,
            getattr(vision, "tokens_per_second", 1.0),
            frames_apart=self.config.model_type in ("qwen3_vl", "qwen3_5"),
        )
        sample = Sample(f"{kind}{seed}", words, "red", "open-ended", kind)
        prompt = Prompt(
            sample, text, {}, floats["input_ids"][0].numpy(), positions, type_ids, patches, grid_thw, tuple(grid_kinds)
        )
        return prompt, floats

    def group(self, kind: str, lengths: list[int], seed: int) -> tuple[Group, dict]:
        prompt, floats = self.make(kind, seed)
        rng = np.random.default_rng(1000 + seed)
        responses = [Response(rng.integers(0, 400, n).tolist(), [], "stop") for n in lengths]
        return Group(prompt, responses), floats


def plain_row(model, prompt: Prompt, floats: dict, tokens: list[int], banned=None, temperature=1.0):
    """(R,) log-probs and entropies of one response: the model's own forward over one row, with full logits."""
    response = torch.tensor([tokens])
    inputs = {k: v for k, v in floats.items() if k not in ("input_ids", "attention_mask", "second_per_grid_ts")}
    inputs["input_ids"] = torch.cat([floats["input_ids"], response], dim=1)
    inputs["mm_token_type_ids"] = torch.cat([floats["mm_token_type_ids"], torch.zeros_like(response)], dim=1)
    for name in ("pixel_values", "pixel_values_videos"):
        if inputs.get(name) is not None:
            inputs[name] = inputs[name].to(model.dtype)
    tail = prompt.position_ids.max() + 1 + np.arange(len(tokens))
    positions = np.concatenate([prompt.position_ids, np.broadcast_to(tail, (3, len(tokens)))], axis=1)
    logits = model(**inputs, position_ids=torch.from_numpy(positions)[:, None], use_cache=False).logits[0]
    logits = logits[len(prompt.input_ids) - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    allowed = torch.tensor([token for token in range(logits.shape[1]) if banned is None or token not in banned])
    chosen = torch.distributions.Categorical(logits=logits[:, allowed])  # without the banned columns, not with -inf
    return chosen.log_prob(torch.searchsorted(allowed, response[0])), chosen.entropy()
