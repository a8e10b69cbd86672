"""Prompts as vLLM's engine takes them, made of the ids and patches that the trainer has already.

vLLM would run the Hugging Face processor over the frames of every prompt, between two decoding steps: resize checks, floats,
patches again, half a second and more for a clip of 128 frames while the GPU waits. A Prompt holds the result as bytes. What
is made of it here goes in where vLLM's own rendering does (`LLMEngine.add_request` and `AsyncLLM.generate` take a rendered
prompt). Evaluation does the same in its loader threads, from frames: there a clip's questions share what is made of it.

Nothing is taken on trust: the first prompt with a new combination of media is rendered by vLLM too, and ours has to be the
same bit for bit, but for SECONDS, which are always ours. Where it is not (another version, a processor of one's own), vLLM
renders all prompts of that kind; that is refused where its SECONDS are wrong.
"""

from __future__ import annotations

import math
import threading
import warnings
from typing import Any

import numpy as np
import torch

from data.encode import VISION_END, VISION_START, Encoder, sampled_fps
from data.normalise import empty_pixels, look_up
from data.positions import patchify
from data.records import Prompt
from rollout import vllm_access

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}
# Qwen2.5-VL's seconds per temporal patch, from which vLLM makes positions. Its own rendering is not to be trusted with them:
# vLLM 0.26 takes no metadata for this family, so every clip counts as one of 24 frames per second and nearly all of its frames
# stand at the same time; later versions round them to bfloat16 together with the pixels (1.1 becomes 1.1016). Ours are
# data/encode.py's, in float32.
SECONDS = "second_per_grid_ts"
PART_BYTES = 5 << 19  # of a clip that are made into floats at once


class EngineInputs:
    """inputs(prompt) -> what add_request of this llm (a vllm.LLM or AsyncLLM) is given. May be called in several threads.

    What failed the comparison is returned as it is, for vLLM to render, and so are prompts whose media are not named
    (`multi_modal_uuids`). Texts have nothing to render but ids. `shared`: a dict
    in which media rendered for one prompt are kept for the next; it lives as long as the caller wants them.
    """

    def __init__(self, llm, encoder: Encoder):
        self.llm, self.encoder = llm, encoder
        self.equal: dict[tuple[str, ...], bool] = {}  # kinds of media -> ours is vLLM's
        self._dtype = torch.uint8  # of vLLM's pixel values: bytes where it normalises on the device
        self._comparing = threading.Lock()

    def __call__(self, prompt: Prompt, shared: dict | None = None) -> dict[str, Any]:
        if not prompt.grid_kinds or "multi_modal_uuids" not in prompt.vllm_prompt:  # texts; media that have no names
            return prompt.vllm_prompt
        kinds = tuple(sorted(set(prompt.grid_kinds)))
        if kinds not in self.equal:
            with self._comparing:
                if kinds not in self.equal:  # another thread has not learnt it meanwhile
                    theirs = vllm_access.render(self.llm, prompt.vllm_prompt)
                    return self._compare(kinds, prompt, theirs, shared) or theirs
        return self.make(prompt, shared) if self.equal[kinds] else self._left_to_vllm(kinds, prompt)

    def _left_to_vllm(self, kinds: tuple[str, ...], prompt: Prompt) -> dict[str, Any]:
        """A prompt that vLLM has to render: done here where its SECONDS may be wrong, which one clip of 24 frames per second
        does not show."""
        if self.encoder.family != "qwen2_5_vl" or "video" not in kinds:
            return prompt.vllm_prompt
        theirs = vllm_access.render(self.llm, prompt.vllm_prompt)
        if wrong := wrong_seconds(prompt, self.encoder, theirs):
            raise RuntimeError(refusal(kinds, "see the warning at the first of them", wrong))
        return theirs

    def make(self, prompt: Prompt, shared: dict | None = None) -> dict[str, Any]:
        """The rendered prompt: {type, prompt_token_ids, mm_kwargs, mm_hashes, mm_placeholders, prompt}."""
        shared = {} if shared is None else shared
        keys = prompt.vllm_prompt["multi_modal_uuids"]
        items: dict[str, list] = {}
        first = 0  # of the medium's rows among the prompt's patches
        for kind, grid in zip(prompt.grid_kinds, prompt.grid_thw):
            listed, rows = items.setdefault(kind, []), int(grid.prod())
            name = ("rendered", kind, keys[kind][len(listed)])
            if name not in shared:
                shared[name] = self._item(prompt, kind, len(listed), grid, first)
            listed.append(shared[name])
            first += rows
        return {
            "type": "multimodal",
            "prompt_token_ids": prompt.input_ids.tolist(),
            "prompt": prompt.text,
            "mm_kwargs": vllm_access.join_items(items),
            "mm_hashes": {kind: list(names) for kind, names in keys.items()},
            "mm_placeholders": self._placeholders(prompt),
        }

    def extended(self, prompt: Prompt, rendered: dict[str, Any], more: str) -> dict[str, Any]:
        """The rendered prompt with text after its end, with the ids that vLLM would make of the whole text.

        An added token (<|im_start|>, <think> ...) cuts the text before it is tokenised; what follows the prompt's last one is
        tokenised again, because the new text can merge with it.
        """
        tokenizer, ids = self.encoder.tokenizer, list(rendered["prompt_token_ids"])
        added = tokenizer.added_tokens_decoder
        last = max((at for at, token in enumerate(ids) if token in added), default=0)
        start = prompt.text.rfind(added[ids[last]].content) if ids[last] in added else 0
        tail = tokenizer(prompt.text[start:] + more, add_special_tokens=False)["input_ids"]
        return {**rendered, "prompt_token_ids": ids[:last] + tail, "prompt": prompt.text + more}

    def _item(self, prompt: Prompt, kind: str, number: int, grid: np.ndarray, first: int):
        """vLLM's item of one medium, the `number`th of its kind; its rows begin at `first` where the prompt has patches."""
        encoder, rows = self.encoder, int(grid.prod())
        medium = prompt.vllm_prompt["multi_modal_data"][kind][number]
        if prompt.patches is not None:
            pixels = self._pixels(prompt.patches[first : first + rows])
        else:
            frames = medium[0].transpose(0, 3, 1, 2) if kind == "video" else np.asarray(medium).transpose(2, 0, 1)[None]
            pixels = self._patches(frames, rows)
        values: dict[str, Any] = {PIXELS[kind]: pixels, GRIDS[kind]: torch.from_numpy(grid)[None]}
        if kind == "video" and encoder.frames_stand_apart:
            values["timestamps"] = [list(prompt.timestamps[number])]
        elif kind == "video" and encoder.family == "qwen2_5_vl":
            values[SECONDS] = torch.tensor([seconds_of(prompt, encoder)[number]])
        (item,) = vllm_access.media_items(self.llm, values)[kind]
        return item

    def _patches(self, frames: np.ndarray, rows: int) -> torch.Tensor:
        """(F, 3, H, W) uint8 -> (rows, values) pixels, by parts that stay in a core's cache. No smaller ones: after every call
        into a library a loader asks for the interpreter's lock again, and others do, too."""
        encoder = self.encoder
        sizes = encoder.patch, encoder.merge, encoder.temporal_patch
        if self._dtype == torch.uint8:
            return torch.from_numpy(patchify(frames, *sizes)[0])
        step = max(1, PART_BYTES // (frames[0].nbytes * encoder.temporal_patch)) * encoder.temporal_patch
        out = empty_pixels(rows, 3 * encoder.temporal_patch * encoder.patch**2, self._dtype)
        done = 0
        for start in range(0, len(frames), step):
            patches, _ = patchify(frames[start : start + step], *sizes)
            look_up(patches, encoder.image_mean, encoder.image_std, out[done : done + len(patches)])
            done += len(patches)
        return out

    def _pixels(self, patches: np.ndarray) -> torch.Tensor:
        if self._dtype == torch.uint8:
            return torch.from_numpy(patches)
        out = empty_pixels(*patches.shape, self._dtype)
        look_up(patches, self.encoder.image_mean, self.encoder.image_std, out)
        return out

    def _placeholders(self, prompt: Prompt) -> dict[str, list]:
        """Where each medium's tokens stand. A video whose frames stand apart covers its times and inner markers, too."""
        encoder, ids = self.encoder, torch.from_numpy(prompt.input_ids)
        start_id, end_id = encoder.tokenizer.convert_tokens_to_ids([VISION_START, VISION_END])
        visual = torch.from_numpy(prompt.mm_type_ids).ne(0).nonzero()[:, 0].tolist()
        starts = ids.eq(start_id).nonzero()[:, 0].tolist()
        found: dict[str, list] = {}
        place = 0
        for kind, grid in zip(prompt.grid_kinds, prompt.grid_thw):
            tokens = int(grid.prod()) // encoder.merge**2
            first, last = visual[place], visual[place + tokens - 1]
            place += tokens
            mask = None
            if kind == "video" and encoder.frames_stand_apart:
                outer = [at for at in starts if at < first][-2:]  # the video's own marker, and its first frame's
                first, last = (outer[0] if len(outer) == 2 else first) + 1, last + 1
                mask = ids[first : last + 1].eq(encoder.video_id)
                if int(ids[last]) != end_id:
                    raise ValueError(f"sample {prompt.sample.id}: its last frame is not followed by {VISION_END}")
            found.setdefault(kind, []).append(vllm_access.placeholder(first, last + 1 - first, mask))
        return found

    def _compare(
        self, kinds: tuple[str, ...], prompt: Prompt, theirs: dict[str, Any], shared: dict | None
    ) -> dict[str, Any] | None:
        """Learn from vLLM's own rendering of this prompt whether ours is the same, and say if it is not -> ours if it is."""
        ours = None
        try:
            self._dtype = next(iter(theirs["mm_kwargs"][kinds[0]]))[PIXELS[kinds[0]]].data.dtype
            ours = self.make(prompt, shared)
            why = difference(ours, theirs)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
        self.equal[kinds] = why is None
        if wrong := wrong_seconds(prompt, self.encoder, theirs):
            if why:
                raise RuntimeError(refusal(kinds, why, wrong))
            warnings.warn(f"this vLLM {wrong}; the trainer's seconds are given to it", stacklevel=2)
        if why:
            warnings.warn(
                f"prompts with {' and '.join(kinds)} are rendered by vLLM, which takes longer: ours differs ({why})",
                stacklevel=2,
            )
        return None if why else ours


def refusal(kinds: tuple[str, ...], why: str, wrong: str) -> str:
    return (
        f"prompts with {' and '.join(kinds)} have to be rendered by vLLM, because ours differs ({why}), but this vLLM {wrong}: "
        "it would sample from other positions than are trained on. Use the pinned version of vLLM"
    )


def wrong_seconds(prompt: Prompt, encoder: Encoder, theirs: dict[str, Any]) -> str | None:
    """Where vLLM's rendering has other SECONDS of a video than data/encode.py, by more than bfloat16 rounds: what it has."""
    videos = theirs["mm_kwargs"].get("video", ())
    if encoder.family != "qwen2_5_vl" or not videos:
        return None
    for item, true in zip(videos, seconds_of(prompt, encoder)):
        found = float(item[SECONDS].data) if SECONDS in item else None
        if found is None or not math.isclose(found, true, rel_tol=2**-8):
            return f"gives a video {found} seconds per temporal patch where it has {true:.4g}"
    return None


def seconds_of(prompt: Prompt, encoder: Encoder) -> list[float]:
    """Seconds that a temporal patch of each video covers."""
    clips = prompt.vllm_prompt["multi_modal_data"].get("video") or []
    rates = [sampled_fps(len(a["frames_indices"]), a["total_num_frames"], a["fps"]) for _, a in clips]
    return [encoder.temporal_patch / rate for rate in rates]


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """What two rendered prompts differ in, None if in nothing. The names by which caches know a medium may differ."""
    if ours["prompt_token_ids"] != list(theirs["prompt_token_ids"]):
        return "token ids"
    for part in ("mm_kwargs", "mm_placeholders"):
        if set(ours[part]) != set(theirs[part]):
            return f"{part}: {sorted(ours[part])} instead of {sorted(theirs[part])}"
        for kind in ours[part]:
            if len(ours[part][kind]) != len(theirs[part][kind]):
                return f"number of {kind} items in {part}"
    for kind, places in ours["mm_placeholders"].items():
        for mine, other in zip(places, theirs["mm_placeholders"][kind]):
            same = (mine.offset, mine.length) == (other.offset, other.length)
            if not same or not _same(mine.is_embed, other.is_embed):
                return f"place of a {kind}: {mine.offset}+{mine.length} instead of {other.offset}+{other.length}"
    for kind, items in ours["mm_kwargs"].items():
        for mine, other in zip(items, theirs["mm_kwargs"][kind]):
            names, others = set(mine) - {SECONDS}, set(other) - {SECONDS}
            if names != others:
                return f"fields of a {kind}: {sorted(names)} instead of {sorted(others)}"
            for name in sorted(names):
                if not _same(mine[name].data, other[name].data):
                    return f"{name} of a {kind}"
    return None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)  # times in seconds; the model does not read them
    return type(a) is type(b) and a == b
