"""Which frames of a video the model sees, at what size, and their pixels; images beside it.

Frame choice and sizes follow the Qwen-VL recipe (qwen-vl-utils `smart_nframes`, `smart_resize`, `fetch_video`; the same
arithmetic as Hugging Face's Qwen processors), with time in place of frame numbers where the frame rate varies:
  count   = duration * fps, between min_frames and max_frames, at most the frames there are, rounded down to even
  choice  = evenly spaced from the first to the last frame of the clip or window
  size    = both sides multiples of patch * merge, pixels per frame within [min_pixels, max_pixels] and, for long clips,
            within total_pixels / frames * 2
torch is imported only when something is resized.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass

import numpy as np

from data.decode import BACKENDS, MediaError, Timeline, check_file, even, probe, read_frames
from data.records import Media, StoredBytes
from data.stored import read_stored

__all__ = [
    "Frames", "ImageSettings", "MediaError", "VideoPlan", "VideoSettings", "choose_frames", "image_size", "plan_video",
    "read_image", "read_video", "smart_resize",
]  # fmt: skip

MAX_RATIO = 200  # sides beyond 200:1 are refused by every Qwen processor
RESIZE_MODES = ("exact", "native")
LIST_FPS = 2.0  # frames per second of a list of frame images that does not say (the convention of qwen-vl-utils)


@dataclass(frozen=True)
class VideoSettings:
    """How a video becomes frames. Two equal settings give equal pixels for the same file.

    `factor` = patch size * merge size of the model (28 for Qwen2-VL and Qwen2.5-VL, 32 for Qwen3-VL and Qwen3.5).
    `total_pixels` None means 0.9 * 128000 * factor**2, the recipe's default. `resize`: "exact" is bit-identical to
    torchvision's tensor bicubic with antialiasing, which computes in float32; "native" is torch's uint8 kernel, six
    times faster, within about 10 levels (mean 0.14). `backend`: "pyav", "decord" or "torchcodec".
    `sampling`: "even" spaces the frames evenly from first to last, as the recipe does; "grid" takes the frame at every
    1/fps second counted from the start of the file, so that a cache at 2 fps also holds 1 fps and every time window.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 4096
    max_pixels: int = 262144
    total_pixels: int | None = None
    factor: int = 32
    temporal_patch: int = 2
    resize: str = "exact"
    backend: str = "pyav"
    sampling: str = "even"

    def __post_init__(self):
        if not self.fps > 0:
            raise ValueError(f"--fps must be > 0, got {self.fps}")
        if self.factor < 1:
            raise ValueError(f"--factor must be patch size * merge size of the model (28 or 32), got {self.factor}")
        if self.max_frames < max(self.min_frames, self.temporal_patch):
            raise ValueError(
                f"--max_frames {self.max_frames} is below --min_frames {self.min_frames} or {self.temporal_patch}"
            )
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"--video_min_pixels {self.min_pixels} must be in 1..--video_max_pixels {self.max_pixels}")
        if self.max_pixels < self.factor**2:
            raise ValueError(f"--video_max_pixels {self.max_pixels} is below one token ({self.factor}x{self.factor})")
        if self.resize not in RESIZE_MODES:
            raise ValueError(f"--resize must be one of {RESIZE_MODES}, got {self.resize!r}")
        if self.sampling not in ("even", "grid"):
            raise ValueError(f"--sampling must be even or grid, got {self.sampling!r}")
        if self.backend != "pyav" and self.backend not in BACKENDS:
            raise ValueError(f"--decoder must be pyav, {', '.join(BACKENDS)}; got {self.backend!r}")


@dataclass(frozen=True)
class ImageSettings:
    """How an image becomes pixels: sides multiples of `factor`, pixels within [min_pixels, max_pixels]."""

    min_pixels: int = 4096
    max_pixels: int = 1_048_576
    factor: int = 32

    def __post_init__(self):
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"--image_min_pixels {self.min_pixels} must be in 1..--image_max_pixels {self.max_pixels}")


@dataclass(frozen=True)
class VideoPlan:
    """What read_video will return, known without decoding: F = len(indices) frames of height x width.

    `timestamps_s` are seconds since the first frame of the file, also inside a time window; `indices` count the file's
    frames in presentation order; `source_fps`, `duration_s` and `total_frames` describe the whole file.
    """

    indices: np.ndarray  # (F,) int64
    timestamps_s: np.ndarray  # (F,) float64
    height: int
    width: int
    source_fps: float
    duration_s: float
    total_frames: int
    source_height: int
    source_width: int
    constant_rate: bool = True


@dataclass(frozen=True)
class Frames:
    """The frames a model sees. `pixels` may be a read-only memory map; fields as in VideoPlan."""

    pixels: np.ndarray  # (F, 3, H, W) uint8 RGB
    timestamps_s: np.ndarray  # (F,) float64
    indices: np.ndarray  # (F,) int64
    source_fps: float
    duration_s: float
    total_frames: int


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: float) -> tuple[int, int]:
    """(height, width), multiples of `factor`, area within the budget, aspect kept as far as rounding allows.

    Qwen's rule (qwen-vl-utils and transformers): round each side; too large: floor(side / beta), at least one factor;
    too small: ceil(side * beta), beta = sqrt(area / budget). Raises ValueError for sides beyond 200:1.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(f"sides {width}x{height} are beyond {MAX_RATIO}:1")
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def frame_size(height: int, width: int, frames: int, settings: VideoSettings) -> tuple[int, int]:
    """(height, width) of a clip's frames: the per-frame budget, lowered for long clips by total_pixels.

    max = min(max_pixels, max(total_pixels / frames * 2, 1.05 * min_pixels)), as fetch_video of qwen-vl-utils, whose own
    ceiling of 768 tokens per frame is left to --video_max_pixels.
    """
    total = settings.total_pixels if settings.total_pixels is not None else 128_000 * settings.factor**2 * 0.9
    budget = max(total / frames * settings.temporal_patch, int(settings.min_pixels * 1.05))
    return smart_resize(height, width, settings.factor, settings.min_pixels, min(settings.max_pixels, budget))


def choose_frames(
    times_s: np.ndarray, fps: float, settings: VideoSettings, constant_rate: bool, start_s=None, end_s=None
) -> np.ndarray:
    """Indices (F,) of the frames to see, F a multiple of temporal_patch, repeated only if the clip has too few frames.

    A window [start_s, end_s) takes the frames whose time lies in it, exactly; one that falls between two frames takes
    the picture that is on screen. At a constant rate the choice is linspace over frame numbers (rounded half to
    even, as numpy and the processors do); otherwise linspace over time, each time to the nearest frame.
    Raises ValueError for a window outside the clip.
    """
    slack = 1e-6  # times are multiples of 1/fps in binary: 3.3 s may be stored as 3.3000000000000003
    first, stop = 0, len(times_s)
    if start_s is not None or end_s is not None:
        low = -math.inf if start_s is None else start_s
        high = math.inf if end_s is None else end_s
        end_of_clip = times_s[-1] + 1 / fps
        if not low < high or low >= end_of_clip - slack or high <= 0:
            raise ValueError(f"window [{start_s}, {end_s}) s lies outside the clip, which lasts {end_of_clip:.3f} s")
        first, stop = (int(np.searchsorted(times_s, edge - slack, side="left")) for edge in (low, high))
        if first >= stop:
            first = max(0, first - 1)
            stop = first + 1
    total = stop - first
    step = settings.temporal_patch
    low_count = math.ceil(settings.min_frames / step) * step
    count = min(max(total / fps * settings.fps, low_count), even(settings.max_frames, step), total)
    count = even(count, step)
    if count < step:  # fewer frames than one temporal patch: the last one is repeated, as the processors pad
        return np.minimum(first + np.arange(step), stop - 1)
    if count == total:
        return np.arange(first, stop)
    if settings.sampling == "grid":
        return _grid(times_s, settings, first, stop, count)
    if constant_rate:
        return np.linspace(first, stop - 1, count).round().astype(np.int64)
    targets = np.linspace(times_s[first], times_s[stop - 1], count)
    return np.interp(targets, times_s[first:stop], np.arange(first, stop)).round().astype(np.int64)


def _grid(times_s: np.ndarray, settings: VideoSettings, first: int, stop: int, count: int) -> np.ndarray:
    """Frames on screen at k / fps seconds, every m-th if over max_frames; evenly spaced if under min_frames."""
    low, high = (math.ceil((times_s[place] - 1e-6) * settings.fps) for place in (first, stop - 1))
    ticks = np.arange(low, high + 1)
    at = np.searchsorted(times_s, ticks / settings.fps + 1e-6, side="right") - 1
    at = at[(at >= first) & (at < stop)]
    limit = even(settings.max_frames, settings.temporal_patch)
    at = at[:: max(1, math.ceil(len(at) / limit))]
    at = at[: even(len(at), settings.temporal_patch)]
    if len(at) < min(settings.min_frames, count) or len(at) == 0:
        return np.linspace(first, stop - 1, count).round().astype(np.int64)
    return at


def make_plan(
    path: str, times_s, fps: float, constant_rate: bool, height: int, width: int, media: Media, settings: VideoSettings
) -> VideoPlan:
    """The VideoPlan for a clip whose frame times and size are known. Raises MediaError."""
    try:
        indices = choose_frames(times_s, fps, settings, constant_rate, media.start_s, media.end_s)
    except ValueError as error:
        raise MediaError(path, str(error), "correct the window's start and end") from None
    try:
        new_height, new_width = frame_size(height, width, len(indices), settings)
    except ValueError as error:
        raise MediaError(path, str(error), "crop it") from None
    return VideoPlan(
        indices=indices, timestamps_s=times_s[indices], height=new_height, width=new_width, source_fps=fps,
        duration_s=len(times_s) / fps, total_frames=len(times_s), source_height=height, source_width=width,
        constant_rate=constant_rate,
    )  # fmt: skip


def media_name(media: Media) -> str:
    """What an error calls this medium."""
    if media.path is not None:
        return media.path
    if media.frames:
        return f"{media.frames[0]} (and {len(media.frames) - 1} more frames)"
    return f"<{len(media.data or b'')} bytes>"


def media_source(media: Media) -> str | bytes:
    """The path or the encoded bytes of a medium that is not a list of frames. Raises MediaError if it has neither."""
    if media.path is not None:
        return media.path
    if isinstance(media.data, StoredBytes):
        try:
            return read_stored(media.data)
        except (ValueError, OSError) as error:
            raise MediaError(media_name(media), str(error), "keep the data file as it was, or start again") from None
    if media.data is not None:
        return media.data
    raise MediaError("<media>", "has neither a path nor bytes nor frames", "correct the row")


def _list_plan(media: Media, settings: VideoSettings) -> VideoPlan:
    fps = media.fps or LIST_FPS
    with open_image(Media("image", path=media.frames[0])) as first:
        width, height = first.size
    times_s = np.arange(len(media.frames)) / fps
    return make_plan(media_name(media), times_s, fps, True, height, width, media, settings)


def plan_video(media: Media, settings: VideoSettings) -> VideoPlan:
    """Frame choice and size of a video, from its packet table and first picture alone. Raises MediaError."""
    if media.frames:
        return _list_plan(media, settings)
    return plan_from_timeline(probe(media_source(media)), media, settings)


def plan_from_timeline(timeline: Timeline, media: Media, settings: VideoSettings) -> VideoPlan:
    return make_plan(
        media_name(media), timeline.times_s, timeline.fps, timeline.constant_rate, timeline.height, timeline.width,
        media, settings,
    )  # fmt: skip


def read_video(media: Media, settings: VideoSettings) -> Frames:
    """Decodes and resizes the frames of one video (a file, encoded bytes, or a list of frame images).

    Returns Frames with pixels uint8 (F, 3, H, W). Memory is the result plus one source frame. Raises MediaError.
    """
    return read_video_and_timeline(media, settings)[0]


def read_video_and_timeline(media: Media, settings: VideoSettings) -> tuple[Frames, VideoPlan, Timeline | None]:
    """read_video, with the plan and the file's Timeline (None for a list of frame images) for the cache header."""
    if media.frames:
        plan = _list_plan(media, settings)
        pixels = _empty(plan, media)
        for slot, index in enumerate(plan.indices):
            image = Media("image", path=media.frames[index])
            pixels[slot] = resize_frame(image_pixels(image), plan.height, plan.width, settings.resize)
        return _frames(plan, pixels), plan, None
    source = media_source(media)
    timeline = probe(source)
    plan = plan_from_timeline(timeline, media, settings)
    try:
        pixels = _decode(source, timeline, plan, media, settings)
    except MediaError:
        # Packets of these containers may announce pictures that never come out (a stream joined in its middle).
        if not (timeline.sequential and settings.backend == "pyav"):
            raise
        timeline = probe(source, by_decoding=True)
        plan = plan_from_timeline(timeline, media, settings)
        pixels = _decode(source, timeline, plan, media, settings)
    return _frames(plan, pixels), plan, timeline


def _decode(source, timeline: Timeline, plan: VideoPlan, media: Media, settings: VideoSettings) -> np.ndarray:
    pixels = _empty(plan, media)
    slots: dict[int, list[int]] = {}
    for slot, index in enumerate(plan.indices.tolist()):
        slots.setdefault(index, []).append(slot)
    for index, frame in read_frames(source, timeline, list(slots), settings.backend):
        small = resize_frame(frame, plan.height, plan.width, settings.resize)
        for slot in slots[index]:
            pixels[slot] = small
    return pixels


def _empty(plan: VideoPlan, media: Media) -> np.ndarray:
    shape = (len(plan.indices), 3, plan.height, plan.width)
    try:
        return np.empty(shape, np.uint8)
    except MemoryError:
        gib = math.prod(shape) / 2**30
        raise MediaError(media_name(media), f"needs {gib:.1f} GiB of pixels", "lower --max_frames or pixels") from None


def _frames(plan: VideoPlan, pixels: np.ndarray) -> Frames:
    return Frames(pixels, plan.timestamps_s, plan.indices, plan.source_fps, plan.duration_s, plan.total_frames)


def resize_frame(frame: np.ndarray, height: int, width: int, mode: str) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (3, height, width), bicubic with antialiasing. See VideoSettings for the two modes."""
    if frame.shape[:2] == (height, width):
        return frame.transpose(2, 0, 1)
    import torch

    if not frame.flags.writeable:  # PIL lends its own buffer, which torch warns about
        frame = frame.copy()
    image, bicubic = torch.from_numpy(frame), {"mode": "bicubic", "align_corners": False, "antialias": True}
    if mode == "native":
        return torch.nn.functional.interpolate(image.permute(2, 0, 1)[None], (height, width), **bicubic)[0].numpy()
    # One frame and one colour at a time: the same numbers as a batch in half the time, and floats of one plane in memory.
    out = torch.empty((3, height, width), dtype=torch.uint8)
    for colour in range(3):
        plane = image[:, :, colour].float()[None, None]
        out[colour] = torch.nn.functional.interpolate(plane, (height, width), **bicubic).clamp_(0, 255).round_()[0, 0]
    return out.numpy()


def open_image(media: Media):
    """A PIL image of an image medium, not yet decoded. Raises MediaError."""
    from PIL import Image, UnidentifiedImageError

    name = media_name(media)
    if media.path is not None:
        check_file(media.path)
    source = media_source(media)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(source if isinstance(source, str) else io.BytesIO(source))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaError(name, "is too large an image (over 89 million pixels)", "scale it down first") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MediaError(name, f"cannot be opened as an image ({reason})", "check or re-download it") from None


def image_pixels(media: Media) -> np.ndarray:
    """uint8 (H, W, 3) RGB, upright by its EXIF tag, transparent parts on white. Raises MediaError."""
    from PIL import Image, ImageOps

    with open_image(media) as image:
        try:
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image)
            elif image.mode.startswith("I") or image.mode == "F":  # 16 bit: PIL's own conversion would clip to white
                values = np.asarray(image).astype(np.float32)
                peak = 65535 if values.max() > 255 else 255
                image = Image.fromarray((values * (255 / peak)).round().clip(0, 255).astype(np.uint8))
            return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise MediaError(
                media_name(media), f"is a damaged image ({str(error).splitlines()[0]})", "re-download it"
            ) from None


def image_size(media: Media, settings: ImageSettings) -> tuple[int, int]:
    """(height, width) read_image will return, from the image's header alone. Raises MediaError."""
    with open_image(media) as image:
        width, height = image.size
        try:
            if image.getexif().get(0x0112) in (5, 6, 7, 8):
                height, width = width, height
        except (OSError, ValueError, SyntaxError) as error:  # PNG may keep the tag behind the picture
            raise MediaError(media_name(media), f"is a damaged image ({error})", "re-download it") from None
    try:
        return smart_resize(height, width, settings.factor, settings.min_pixels, settings.max_pixels)
    except ValueError as error:
        raise MediaError(media_name(media), str(error), "crop it") from None


def read_image(media: Media, settings: ImageSettings) -> np.ndarray:
    """uint8 (3, H, W), resized with torch's uint8 bicubic as Qwen's fast image processor does. Raises MediaError."""
    height, width = image_size(media, settings)
    pixels = image_pixels(media)
    return np.ascontiguousarray(resize_frame(pixels, height, width, "native"))
