"""Sample -> Prompt by one path for Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5; video, images, both, or text alone.

A medium is first only a shape (frames, height, width, times), known from metadata; the prompt's text, ids and positions
follow from shapes, so counting tokens and building a prompt are the same code, and only the pixels are read in
addition. vLLM is given the same frames at the same size and told neither to choose nor to resize; it and the trainer
therefore see equal ids, grids and pixels. The one place where they could still drift, vLLM's own expansion of the
markers, is compared for every prompt by the rollout engine.
"""

from __future__ import annotations

import copy
import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.frame_cache import FrameCache
from data.positions import mrope_positions, patch_grid, patch_times, patchify
from data.prompts import build_messages
from data.records import Media, Prompt, Sample
from data.video import ImageSettings, MediaError, VideoSettings, image_size, open_image, read_image

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
ON_LONG = ("error", "skip", "resample")
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
MARKER = re.compile(re.escape(IMAGE) + "|" + re.escape(VIDEO))
# A policy that emits one of these breaks the pairing of markers and media when its response is scored.
VISUAL_TOKENS = (VISION_START, VISION_END, "<|vision_pad|>", IMAGE, VIDEO)
# What the boxes of each family's own training data are measured in (their papers and cookbooks).
COORDINATES = {"qwen2_vl": "norm1000", "qwen2_5_vl": "pixel", "qwen3_vl": "norm1000", "qwen3_5": "norm1000"}


class PromptTooLong(ValueError):
    """A prompt over --max_prompt_tokens. It is refused whole: a cut prompt would lose its question or half a frame.

    `stops_the_run`: on_long is "error", so a loader must not replace the sample by another.
    """

    stops_the_run = False


@dataclass(frozen=True)
class VisualShape:
    """One medium as the prompt needs it, without pixels. Times are empty for an image."""

    kind: str  # "image" | "video"
    frames: int
    height: int
    width: int
    indices: tuple[float, ...] = ()  # with `fps`: time of frame i = indices[i] / fps, exactly as the processors divide
    fps: float = 1.0
    source_frames: float = 0.0  # frames of the clip or window at `fps`, chosen or not
    duration_s: float = 0.0
    source_height: int = 0
    source_width: int = 0


def read_config(model_dir: str, trust_remote_code: bool = False):
    """The folder's transformers configuration, of transformers' own class.

    A vLLM that has read a folder of the same family in this process has put a class of its own in that one's place for
    AutoConfig (0.26 does for Qwen3.5), and transformers can build no model from that.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config = transformers.AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    own = CONFIG_MAPPING_NAMES.get(config.model_type)
    if own is None or not type(config).__module__.startswith("vllm."):
        return config
    return getattr(transformers, own).from_pretrained(model_dir)


class Encoder:
    """The input side of one model folder: tokenizer, processor constants, budgets, prompts.

    video: dict of fps, min_frames, max_frames, min_pixels, max_pixels, total_pixels, resize, backend (any subset);
    image: dict of min_pixels, max_pixels. `cache`: a data.frame_cache.FrameCache. `chat_template`: path of a Jinja file
    instead of the folder's own. on_long: what a prompt over max_prompt_tokens means: "error" and "skip" both raise
    PromptTooLong (the caller stops or drops the sample), "resample" takes fewer frames of its videos and raises only if
    that cannot help. build_patches: False leaves Prompt.patches None, for those who only feed vLLM: one copy of the
    pixels less.
    """

    def __init__(
        self,
        model_dir: str,
        video: dict[str, Any] | None = None,
        image: dict[str, Any] | None = None,
        cache: FrameCache | None = None,
        style: str = "think",
        prompt_template: str | None = None,
        chat_template: str | None = None,
        max_prompt_tokens: int | None = None,
        on_long: str = "error",
        trust_remote_code: bool = False,
        build_patches: bool = True,
    ):
        from transformers import AutoProcessor

        if on_long not in ON_LONG:
            raise ValueError(f"--on_long must be one of {', '.join(ON_LONG)}, got {on_long!r}")
        self.config = read_config(model_dir, trust_remote_code)
        self.family = self.config.model_type
        if self.family not in FAMILIES:
            raise ValueError(f"{model_dir}: model_type {self.family!r} is none of {', '.join(FAMILIES)}")
        self.model_dir, self.style, self.prompt_template = model_dir, style, prompt_template
        self.processor = AutoProcessor.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
        self.tokenizer = self.processor.tokenizer
        self.chat_template = self._read_template(chat_template)
        self.max_prompt_tokens, self.on_long, self.build_patches = max_prompt_tokens, on_long, build_patches
        self._read_constants()
        self.cache = cache or FrameCache(None, "off")
        self.video = VideoSettings(**{**(video or {}), "factor": self.factor, "temporal_patch": self.temporal_patch})
        self.image = ImageSettings(**{**(image or {}), "factor": self.factor})

    def _read_template(self, path: str | None) -> str:
        if path is not None:
            return Path(path).read_text(encoding="utf-8")
        template = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        if not template:
            raise ValueError(f"{self.model_dir} has no chat template; pass one with --chat_template")
        return template

    def _read_constants(self) -> None:
        image, video = self.processor.image_processor, self.processor.video_processor
        for name in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std"):
            first, second = getattr(image, name), getattr(video, name)
            if (tuple(first) != tuple(second)) if isinstance(first, (list, tuple)) else first != second:
                raise ValueError(f"{self.model_dir}: {name} of image ({first}) and video processor ({second}) differ")
        self.patch, self.merge = image.patch_size, image.merge_size
        self.temporal_patch, self.factor = image.temporal_patch_size, image.patch_size * image.merge_size
        # pixel value = (x - 255 * mean) / (255 * std), in float32 and in this order: bit-equal to the processors'.
        self.image_mean, self.image_std = tuple(image.image_mean), tuple(image.image_std)
        vocabulary = self.tokenizer.get_vocab()
        missing = [token for token in VISUAL_TOKENS[:2] + VISUAL_TOKENS[3:] if token not in vocabulary]
        if missing:
            raise ValueError(f"{self.model_dir}: the tokenizer lacks {', '.join(missing)}")
        self.image_id, self.video_id = vocabulary[IMAGE], vocabulary[VIDEO]
        self.visual_token_ids = tuple(sorted(vocabulary[token] for token in VISUAL_TOKENS if token in vocabulary))
        self.eos_token_ids = self._read_eos()
        self.frames_stand_apart = self.family in ("qwen3_vl", "qwen3_5")
        self.tokens_per_second = getattr(self.config.vision_config, "tokens_per_second", 1.0)

    def _read_eos(self) -> tuple[int, ...]:
        """Ids that end a response: the generation config's, and the tokenizer's own."""
        from transformers import GenerationConfig

        ids = {self.tokenizer.eos_token_id}
        if (Path(self.model_dir) / "generation_config.json").exists():
            listed = GenerationConfig.from_pretrained(self.model_dir).eos_token_id
            ids.update(listed if isinstance(listed, list) else [listed])
        return tuple(sorted(ids - {None}))

    def with_budgets(self, video: dict | None = None, image: dict | None = None, **changes) -> Encoder:
        """The same encoder with other budgets, style or limit (validation); tokenizer and cache are shared.

        Entries of `video` and `image` that are None keep their value.
        """
        other = copy.copy(self)
        other.video = replace(self.video, **{key: value for key, value in (video or {}).items() if value is not None})
        other.image = replace(self.image, **{key: value for key, value in (image or {}).items() if value is not None})
        for name, value in changes.items():
            if name not in ("style", "prompt_template", "max_prompt_tokens", "on_long", "cache"):
                raise TypeError(f"with_budgets cannot change {name!r}")
            setattr(other, name, value)
        return other

    # From a sample to a prompt.

    def encode(self, sample: Sample) -> Prompt:
        """Everything vLLM and the trainer need of one sample.

        Sets sample.extra's `coord`, `width` and `height` (see _note_frame), and `think_prefilled` when the template opens
        the thinking itself. Raises MediaError for a medium that cannot be read, PromptTooLong, and ValueError (naming id,
        file and line) when markers and media disagree.
        """
        settings, shapes, text, ids, types = self._fit(sample)
        frames, patches, grids, keys = [], [], [], []
        for media, shape in zip(sample.media, shapes):
            if media.kind == "video":
                pixels = self.cache.frames(media, settings).pixels
                key = self.cache.key(media, settings)
            else:
                pixels = read_image(media, self.image)[None]
                key = f"image-{pixels.shape[2]}x{pixels.shape[3]}-{_digest(pixels.tobytes())}"
            if pixels.shape != (shape.frames, 3, shape.height, shape.width):
                raise MediaError(
                    str(media.path),
                    f"gives pixels {pixels.shape}, its metadata {(shape.frames, 3, shape.height, shape.width)}",
                    "the file changed since the cache was made: run data/preprocess.py again",
                )
            frames.append(pixels)
            grids.append(patch_grid(pixels.shape, self.patch, self.merge, self.temporal_patch))
            if self.build_patches:
                patches.append(patchify(pixels, self.patch, self.merge, self.temporal_patch)[0])
            keys.append(key)
        grid_thw = np.array(grids, np.int64).reshape(-1, 3)
        return Prompt(
            sample=sample,
            text=text,
            vllm_prompt=self._vllm_prompt(text, shapes, frames, keys),
            input_ids=ids,
            position_ids=self._positions(types, shapes, grid_thw),
            mm_type_ids=types,
            patches=np.concatenate(patches) if patches else None,
            grid_thw=grid_thw,
            grid_kinds=tuple(shape.kind for shape in shapes),
            timestamps=tuple(self._times(shape) for shape in shapes if shape.kind == "video"),
            cache_key=_digest("\n".join(keys).encode()) if keys else "",
        )

    def count_tokens(self, sample: Sample) -> int:
        """Prompt tokens of a sample, from metadata alone. Raises as encode() does, PromptTooLong included."""
        return len(self._fit(sample)[3])

    def _fit(self, sample: Sample) -> tuple[VideoSettings, list[VisualShape], str, np.ndarray, np.ndarray]:
        """Settings, shapes, text, ids and types of a sample within the token limit."""
        settings = self.video
        shapes = [self._shape(media, settings) for media in sample.media]
        text, ids, types = self._expand(sample, shapes)
        limit = self.max_prompt_tokens
        if limit is None or len(ids) <= limit:
            return settings, shapes, text, ids, types
        needed, frames = len(ids), max((shape.frames for shape in shapes if shape.kind == "video"), default=0)
        if self.on_long == "resample" and frames > self.temporal_patch:
            # The largest number of frames that fits, by bisection over temporal patches.
            low, high, best = 1, frames // self.temporal_patch - 1, None
            while low <= high:
                middle = (low + high) // 2
                count = middle * self.temporal_patch
                smaller = replace(settings, max_frames=count, min_frames=min(settings.min_frames, count))
                shapes = [self._shape(media, smaller) for media in sample.media]
                text, ids, types = self._expand(sample, shapes)
                if len(ids) <= limit:
                    best, low = (smaller, shapes, text, ids, types), middle + 1
                else:
                    high = middle - 1
            if best:
                return best
        error = PromptTooLong(
            f"{self._where(sample)}: the prompt has {needed} tokens, more than --max_prompt_tokens {limit}; raise it, "
            "lower --max_frames, --video_max_pixels or --image_max_pixels, or choose --on_long_prompt skip or resample"
        )
        error.stops_the_run = self.on_long == "error"
        raise error

    def _shape(self, media: Media, settings: VideoSettings) -> VisualShape:
        if media.kind == "image":
            height, width = image_size(media, self.image)
            return VisualShape("image", 1, height, width)
        plan = self.cache.plan(media, settings)
        indices, times, fps = plan.indices.tolist(), plan.timestamps_s, plan.source_fps
        total, duration = float(plan.total_frames), plan.duration_s
        if media.start_s is not None or media.end_s is not None:
            end = duration if media.end_s is None else min(media.end_s, duration)
            duration = max(end - max(media.start_s or 0.0, 0.0), 1 / fps)
            total = max(duration * fps, len(indices))
        # At a constant rate the processors' own division gives the time; else the time itself is the index, at 1 fps.
        if not plan.constant_rate or np.abs(np.asarray(indices) / fps - times).max() > 1e-3:
            indices, fps, total = times.tolist(), 1.0, duration
        if total == int(total):
            total = int(total)
        return VisualShape(
            "video", len(indices), plan.height, plan.width, tuple(indices), fps, total, duration,
            plan.source_height, plan.source_width,
        )  # fmt: skip

    def _times(self, shape: VisualShape) -> tuple[float, ...]:
        return patch_times([index / shape.fps for index in shape.indices], self.temporal_patch)

    def _expand(self, sample: Sample, shapes: list[VisualShape]) -> tuple[str, np.ndarray, np.ndarray]:
        """(text with one marker per medium, ids (P,) int64, types (P,) uint8) of a sample whose media have these
        shapes."""
        text = self._render(sample, shapes)
        found = ["image" if marker == IMAGE else "video" for marker in MARKER.findall(text)]
        if found != [shape.kind for shape in shapes]:
            raise ValueError(
                f"{self._where(sample)}: the prompt marks [{', '.join(found)}] but the sample has "
                f"[{', '.join(shape.kind for shape in shapes)}]; the question must not contain {IMAGE} or {VIDEO}, "
                "and a chat template must write one of them per medium, in order"
            )
        pieces, repeats, last = [], [], 0
        for match, shape in zip(MARKER.finditer(text), shapes):
            pieces.append(text[last : match.start()])
            last = match.end()
            slots = -(-shape.frames // self.temporal_patch)
            tokens = (shape.height // self.factor) * (shape.width // self.factor)
            if shape.kind == "video" and self.frames_stand_apart:
                for seconds in self._times(shape):
                    pieces.append(f"<{seconds:.1f} seconds>{VISION_START}{VIDEO}{VISION_END}")
                repeats += [tokens] * slots
            else:
                pieces.append(match.group())
                repeats.append(tokens * slots)
        pieces.append(text[last:])
        # One pad per run goes through the tokenizer, and is repeated after it: a special token never merges.
        short = np.asarray(self.tokenizer("".join(pieces), add_special_tokens=False)["input_ids"], np.int64)
        visual = (short == self.image_id) | (short == self.video_id)
        counts = np.ones(len(short), np.int64)
        counts[visual] = repeats
        ids = np.repeat(short, counts)
        types = ((ids == self.image_id) + 2 * (ids == self.video_id)).astype(np.uint8)
        return text, ids, types

    def _render(self, sample: Sample, shapes: list[VisualShape]) -> str:
        if shapes:
            _note_frame(sample.extra, sample.media[0], shapes[0], self.family)
        try:
            messages = build_messages(sample, self.style, self.prompt_template)
        except ValueError as error:
            raise ValueError(f"{self._where(sample)}: {error}") from None
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
        )
        if text.rfind("<think>") > max(text.rfind("</think>"), text.rfind("<|im_start|>assistant")):
            sample.extra["think_prefilled"] = True
        return text

    def _positions(self, types: np.ndarray, shapes: list[VisualShape], grid_thw: np.ndarray) -> np.ndarray:
        if not self.frames_stand_apart:
            return mrope_positions(types, grid_thw, self.merge, [self._time_factor(shape) for shape in shapes])
        runs = [grid if shape.kind == "image" else (1, *grid[1:]) for shape, grid in zip(shapes, grid_thw)]
        times = [1 if shape.kind == "image" else int(grid[0]) for shape, grid in zip(shapes, grid_thw)]
        runs = np.repeat(np.array(runs, np.int64).reshape(-1, 3), np.array(times, np.int64), axis=0)
        return mrope_positions(types, runs, self.merge)

    def _time_factor(self, shape: VisualShape) -> float:
        """Positions per temporal patch. The seconds pass through float32 because vLLM carries them in such a tensor."""
        if shape.kind == "image" or self.family != "qwen2_5_vl":
            return 1.0
        fps = sampled_fps(len(shape.indices), shape.source_frames, shape.fps)
        return float(np.float32(self.temporal_patch / fps)) * self.tokens_per_second

    def _vllm_prompt(self, text: str, shapes: list[VisualShape], frames: list[np.ndarray], keys: list[str]) -> dict:
        """What LLM.generate takes: text with one marker per medium, frames, and the order not to touch them."""
        if not shapes:
            return {"prompt": text}
        from PIL import Image

        data: dict[str, list] = {}
        uuids: dict[str, list[str]] = {}
        for shape, pixels, key in zip(shapes, frames, keys):
            if shape.kind == "image":
                item: Any = Image.fromarray(np.ascontiguousarray(pixels[0].transpose(1, 2, 0)))
            else:
                item = (pixels.transpose(0, 2, 3, 1), video_metadata(shape))
            data.setdefault(shape.kind, []).append(item)
            uuids.setdefault(shape.kind, []).append(key)
        return {
            "prompt": text,
            "multi_modal_data": data,
            "multi_modal_uuids": uuids,  # vLLM's caches go by these instead of hashing the pixels
            "mm_processor_kwargs": {"do_resize": False, "do_sample_frames": False},
        }

    @staticmethod
    def _where(sample: Sample) -> str:
        place = f"{sample.file}:{sample.line}: " if sample.file else ""
        return f"{place}sample {sample.id}"


def sampled_fps(frames: int, source_frames: int, source_fps: float) -> float:
    """Frames per second of a clip sampled to `frames`, as the Hugging Face processors have it."""
    return frames / source_frames * source_fps


def _note_frame(extra: dict[str, Any], media: Media, shape: VisualShape, family: str) -> None:
    """Set `coord`, `width` and `height`, by which the prompt asks for boxes and rewards/geometry.py converts them.

    The row's `coord` wins; else the family's own system, if `gt_coord` says what the gold is measured in. Width and height
    are those of the frame whose pixels are meant: of the frame as the model sees it when only its answer is in pixels, of
    the source (the row's own, else the file's) when the gold is. Where both would be pixels of different frames, the model
    is asked for 0-1000 instead. Nothing here depends on an earlier call.
    """
    gold = extra.get("gt_coord")
    if gold in ("norm1000", "norm1"):
        extra["width"], extra["height"] = shape.width, shape.height
        extra.setdefault("coord", COORDINATES[family])
        return
    if not (extra.get("width") and extra.get("height")):
        known = shape.source_width > 0
        extra["width"], extra["height"] = (shape.source_width, shape.source_height) if known else _size(media)
    if gold == "pixel":
        same = (extra["width"], extra["height"]) == (shape.width, shape.height)
        extra.setdefault("coord", "norm1000" if COORDINATES[family] == "pixel" and not same else COORDINATES[family])


def _size(media: Media) -> tuple[int, int]:
    """(width, height) of an image file, upright, from its header."""
    with open_image(media) as image:
        turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def video_metadata(shape: VisualShape) -> dict[str, Any]:
    """The video metadata that transformers' and vLLM's processors read, as a new dict (they may change it)."""
    return {
        "fps": shape.fps,
        "duration": shape.duration_s,
        "total_num_frames": shape.source_frames,
        "frames_indices": list(shape.indices),
        "video_backend": "pyav",
        "do_sample_frames": False,
    }
