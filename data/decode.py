"""Opening one video file: which frames it holds and when they are shown, and the pixels of the frames one asks for.

A demux pass over the packets gives the exact table of presentation times for a few milliseconds per minute of video.
Frames are then decoded by plan: per wanted group of pictures one seek, packets fed only up to the last wanted one,
non-reference frames that nobody asked for skipped by the decoder. Where a plan is not safe (MPEG-TS, AVI, GIF, packets
without or with equal times, a wanted time that does not come out) the file is decoded from its beginning; where that
fails too, and not because a picture is damaged, torchcodec is asked, if it is installed.

PyAV does not apply the display rotation of phone videos; it is applied here. torch is not imported here.
"""

from __future__ import annotations

import importlib
import io
import math
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter

MAX_FRAME_PIXELS = 160_000_000  # 16k x 10k: beyond that a header is lying, and one RGB frame would take 480 MB
SEEK_AHEAD_PACKETS = 64  # nearer than this, reading on is cheaper than a seek
NO_TIME = -(2**63)  # a packet without a time of its own, in arrays of ticks
# Containers that seek badly or mark every packet as a key: decoded from the beginning.
SEQUENTIAL_FORMATS = {"mpegts", "mpegtsraw", "gif", "avi", "mpeg", "mpegvideo", "h264", "hevc", "m4v", "apng"}

av.logging.set_level(av.logging.PANIC)  # FFmpeg's own lines name no file; MediaError does


class MediaError(ValueError):
    """An image or video that cannot be used: `path`, `reason` (what is wrong) and `remedy` (what to do about it)."""

    def __init__(self, path: str, reason: str, remedy: str):
        super().__init__(path, reason, remedy)
        self.path, self.reason, self.remedy = path, reason, remedy

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; {self.remedy}"


class _PlanFailed(Exception):
    """The frames that came out are not those the packet table promised."""


class _PictureDamaged(_PlanFailed):
    """The decoder itself says that a picture is not as it was sent."""


@dataclass(frozen=True)
class Timeline:
    """What a video file shows, and when: n frames in presentation order.

    `pts` are ticks of `time_base` (n,), ascending; `times_s` are seconds since the first frame shown, which is 0
    whatever the start offset. `fps` is frames over duration, snapped to the container's rate when every frame keeps to
    it within one tick (`constant_rate`). `height` and `width` are those of the displayed picture (after rotation).
    """

    pts: np.ndarray
    time_base: Fraction
    fps: float
    constant_rate: bool
    height: int
    width: int
    rotation: int  # degrees counter-clockwise that a decoded picture must be turned
    codec: str
    container: str
    sequential: bool  # decode from the beginning; seeking is not safe
    packet_pts: np.ndarray | None = None  # (packets,) in decode order
    keys: np.ndarray | None = None  # where the key packets stand among them, ascending
    key_dts: np.ndarray | None = None  # and their decoding times, NO_TIME where one has none

    @property
    def times_s(self) -> np.ndarray:
        if self.constant_rate:  # free of the rounding of coarse time bases (Matroska counts milliseconds)
            return np.arange(len(self.pts)) / self.fps
        return (self.pts - self.pts[0]) * float(self.time_base)

    @property
    def duration_s(self) -> float:
        """Frames over rate: the last frame counts with the mean duration."""
        return len(self.pts) / self.fps


def open_video(source: str | bytes):
    """(container, video stream) of a path or of encoded bytes. Raises MediaError."""
    name = source if isinstance(source, str) else f"<{len(source)} bytes>"
    if isinstance(source, str):
        check_file(source)
    try:
        container = av.open(
            source if isinstance(source, str) else io.BytesIO(source),
            metadata_errors="ignore",
            options={"protocol_whitelist": "file"} if isinstance(source, str) else {},
        )
    except (av.FFmpegError, ValueError, OSError) as error:
        raise MediaError(name, f"cannot be opened as a video ({_words(error)})", "check or re-download it") from None
    if container.format.name in ("tty", "concat", "hls", "dash"):  # text as a film, or a list of other files
        container.close()
        raise MediaError(name, f"is a {container.format.name} text, not a video", "give the video file itself")
    # A cover picture is a video stream too; it is no film.
    streams = [s for s in container.streams.video if "attached_pic" not in str(s.disposition)]
    if not streams:
        container.close()
        raise MediaError(name, "holds no video stream (audio only?)", "check the path or re-download it")
    stream = max(streams, key=lambda s: (s.width or 0) * (s.height or 0))
    context = stream.codec_context
    if context is None:
        container.close()
        raise MediaError(name, "has a codec this FFmpeg cannot decode", "re-encode it as H.264")
    if context.width * context.height > MAX_FRAME_PIXELS:
        size = f"{context.width}x{context.height}"
        container.close()
        raise MediaError(name, f"claims frames of {size} pixels", "check it, or scale it down first")
    context.thread_count = 1  # one process per core beats threads (measured 1.85x against 0.9x on two cores)
    context.options = {"err_detect": "explode"}  # damaged pictures are errors, not concealed
    return container, stream


def check_file(path: str) -> None:
    """Raises MediaError unless `path` is a readable, non-empty regular file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise MediaError(path, "does not exist", "correct the path or --media_dir") from None
    except OSError as error:
        raise MediaError(path, f"cannot be reached ({error.strerror})", "correct the path or its permissions") from None
    if not os.path.isfile(path):
        raise MediaError(path, "is not a regular file", "correct the path")
    if status.st_size == 0:
        raise MediaError(path, "is empty (0 bytes)", "re-download it")
    if not os.access(path, os.R_OK):
        raise MediaError(path, "cannot be read (permission denied)", "change its permissions")


def probe(source: str | bytes, by_decoding: bool = False) -> Timeline:
    """The Timeline of a video: packets are read, only the first picture is decoded.

    `by_decoding` takes the table from decoded frames instead of packets: slow, right for files whose packets lie.
    Raises MediaError.
    """
    name = source if isinstance(source, str) else f"<{len(source)} bytes>"
    container, stream = open_video(source)
    with container:
        form = container.format.name
        packets, first, failure = _packet_table(name, container, stream)
        if not len(packets.pts):
            raise MediaError(name, "holds no video packets (truncated?)", "re-download it")
        # An MP4 lists its samples up front: fewer packets than listed means the end of the file is missing.
        if "mov" in form and (len(packets.pts) < stream.frames or packets.corrupt[-1]):
            there = f"{stream.frames} frames listed, {len(packets.pts)} there"
            raise MediaError(name, f"is truncated: {there}", "re-download it")
        _check_end(name, container, stream, packets.pts)
        if first is None:
            words = f"cannot be decoded ({_words(failure)})" if failure else "decodes to no picture"
            raise MediaError(name, words, "re-download or re-encode it")
        rate = stream.average_rate, stream.guessed_rate
        time_base = stream.time_base
        codec = stream.codec_context.name
    first_key = int(packets.keys[0]) if len(packets.keys) else 0
    pts = np.sort(packets.pts[first_key:][~packets.discard[first_key:]])  # packets before a key show nothing
    plain = len(pts) > 0 and bool((packets.pts != NO_TIME).all()) and bool((np.diff(pts) > 0).all())
    seeks = plain and len(packets.keys) > 0 and first_key == 0
    sequential = not seeks or any(part in SEQUENTIAL_FORMATS for part in form.split(","))
    if by_decoding or not plain:
        pts = _decoded_times(source, name)
    fps, constant_rate = _frame_rate(pts, time_base, rate)
    height, width = first.height, first.width
    if height * width > MAX_FRAME_PIXELS:
        raise MediaError(name, f"has frames of {width}x{height} pixels", "scale it down first")
    rotation = int(first.rotation) % 360
    if rotation % 180 == 90:
        height, width = width, height
    seekable = {"packet_pts": _compact(packets.pts), "keys": packets.keys, "key_dts": packets.key_dts}
    return Timeline(
        pts=_compact(pts), time_base=time_base, fps=fps, constant_rate=constant_rate, height=height, width=width,
        rotation=rotation, codec=codec, container=form, sequential=sequential,
        **({} if sequential else seekable),
    )  # fmt: skip


@dataclass(frozen=True)
class _Packets:
    """What a demux pass finds, in decode order. Ten bytes per packet, so that hours stay small."""

    pts: np.ndarray  # (packets,)
    keys: np.ndarray  # positions of key packets
    key_dts: np.ndarray  # (keys,)
    discard: np.ndarray  # (packets,) bool
    corrupt: np.ndarray  # (packets,) bool


def _packet_table(name: str, container, stream) -> tuple[_Packets, av.VideoFrame | None, av.FFmpegError | None]:
    """Every packet's times and flags; the first picture, decoded on the way, or why there is none. Raises MediaError."""
    context = stream.codec_context
    pts, keys, key_dts, flags, first, failure = array("q"), [], [], bytearray(), None, None
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            pts.append(NO_TIME if packet.pts is None else packet.pts)
            if packet.is_keyframe:
                keys.append(len(pts) - 1)
                key_dts.append(NO_TIME if packet.dts is None else packet.dts)
            flags.append(packet.is_discard + 2 * packet.is_corrupt)
            if first is None and failure is None:
                first, failure = _picture(context, packet)
    except av.FFmpegError as error:
        raise MediaError(name, f"is damaged ({_words(error)} in the container)", "re-download it") from None
    if first is None and failure is None and len(pts):
        first, failure = _picture(context, None)
    bits = np.frombuffer(bytes(flags), np.uint8)
    columns = (np.array(column, np.int64) for column in (pts, keys, key_dts))
    return _Packets(*columns, (bits & 1) > 0, (bits & 2) > 0), first, failure


def _compact(ticks: np.ndarray) -> np.ndarray:
    """The same ticks in half the memory where they and all their differences fit: they last as long as the decoding."""
    fits = len(ticks) > 0 and ticks.min() >= -(2**30) and ticks.max() < 2**30
    return ticks.astype(np.int32) if fits else ticks


def _picture(context, packet) -> tuple[av.VideoFrame | None, av.FFmpegError | None]:
    try:
        return next(iter(context.decode(packet)), None), None
    except av.FFmpegError as error:
        return None, error


def _check_end(name: str, container, stream, pts: np.ndarray) -> None:
    """Raises MediaError if a Matroska or FLV file ends well before the duration in its header (MP4: counted above)."""
    if not container.duration or not any(part in container.format.name for part in ("matroska", "flv")):
        return
    announced_s = container.duration / av.time_base
    slack_s = max(0.5, 0.02 * announced_s)
    timed = pts[pts != NO_TIME]
    end_s = float(int(timed.max()) * stream.time_base) if len(timed) else announced_s
    if end_s >= announced_s - slack_s:
        return
    try:
        container.seek(0)
        for packet in container.demux():  # sound may outlast the pictures
            if packet.pts is not None:
                end_s = max(end_s, float(packet.pts * packet.time_base))
    except av.FFmpegError:
        pass
    if end_s < announced_s - slack_s:
        reason = f"is truncated or its header lies: {announced_s:.1f} s announced, {end_s:.1f} s there"
        raise MediaError(name, reason, "re-download it")


def _decoded_times(source: str | bytes, name: str) -> np.ndarray:
    """The times of all pictures, ascending, by decoding them (nothing is converted). Raises MediaError."""
    container, stream = open_video(source)
    with container:
        try:
            times = [frame.pts if frame.pts is not None else frame.dts for frame in container.decode(stream)]
        except av.FFmpegError as error:
            raise MediaError(name, f"cannot be decoded ({_words(error)})", "re-download or re-encode it") from None
    if not times:
        raise MediaError(name, "decodes to no picture", "re-download or re-encode it")
    if None in times or len(set(times)) < len(times):
        raise MediaError(name, "has frames without a time of their own", "re-encode it (ffmpeg -i IN OUT.mp4)")
    return np.sort(np.asarray(times, dtype=np.int64))


def _frame_rate(pts: np.ndarray, time_base: Fraction, candidates) -> tuple[float, bool]:
    """(frames per second, whether every frame keeps to it within one tick)."""
    if len(pts) == 1:
        rate = next((c for c in candidates if c), None)
        return (float(rate) if rate else 1.0), True
    measured = (len(pts) - 1) / (int(pts[-1] - pts[0]) * time_base)
    for rate in (*candidates, measured):
        if not rate:
            continue
        line = pts[0] + np.arange(len(pts)) * float(1 / (rate * time_base))
        if np.abs(pts - line).max() <= 1.01:
            return float(rate), True
    return float(measured), False


def read_frames(
    source: str | bytes, timeline: Timeline, wanted: list[int], backend: str = "pyav"
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (presentation index, RGB uint8 (H, W, 3) turned upright) once for each index of `wanted`, in any order.

    backend: "pyav" (by plan, else from the beginning, else torchcodec), "decord" or "torchcodec" (both by index, upright
    by themselves). Raises MediaError; nothing is concealed: a damaged picture is an error.
    """
    name = source if isinstance(source, str) else f"<{len(source)} bytes>"
    wanted = sorted(set(wanted))
    if backend != "pyav":
        yield from BACKENDS[backend](source, name, timeline, wanted)
        return
    done: set[int] = set()
    for decode in (decode_wanted, _decode_sequential):  # the second time without shortcuts
        convert = VideoReformatter()  # one for all frames: a converter per frame costs as much as small frames do
        try:
            for index, frame in decode(source, timeline, [index for index in wanted if index not in done]):
                pixels = _upright(frame, timeline, convert)
                done.add(index)
                yield index, pixels
            return
        except _PictureDamaged as error:
            damaged, verdict = True, MediaError(name, f"is damaged ({error})", "re-download or re-encode it")
        except _PlanFailed as error:
            damaged, verdict = False, MediaError(name, f"frames are missing or shifted ({error})", "re-encode it")
        except av.FFmpegError as error:
            damaged = isinstance(error, av.InvalidDataError)
            verdict = MediaError(name, f"is damaged ({_words(error)} while decoding)", "re-download or re-encode it")
    # Another FFmpeg may know the codec better. A damaged picture is not its business: it would invent the content.
    if damaged or backend_problem("torchcodec"):
        raise verdict
    try:
        yield from _decode_torchcodec(source, name, timeline, [index for index in wanted if index not in done])
    except MediaError:
        raise verdict from None


def decode_wanted(source: str | bytes, timeline: Timeline, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields (index, picture as decoded, not converted): by plan, or from the beginning where seeking is not safe."""
    first = _decode_sequential if timeline.sequential or timeline.packet_pts is None else _decode_by_plan
    return first(source, timeline, wanted)


def _upright(frame: av.VideoFrame, timeline: Timeline, convert: VideoReformatter) -> np.ndarray:
    if frame.is_corrupt:
        raise _PictureDamaged(f"picture at {float(frame.time or 0):.3f} s is damaged")
    # Without threads=1 swscale starts one thread per core for every picture, in every worker.
    pixels = convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, timeline.rotation // 90)) if timeline.rotation else pixels


def _decode_sequential(source, timeline: Timeline, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    index_of = {int(timeline.pts[index]): index for index in wanted}
    container, stream = open_video(source)
    with container:
        for frame in container.decode(stream):
            time = frame.pts if frame.pts is not None else frame.dts
            index = index_of.pop(time, None)
            if index is not None:
                yield index, frame
            if not index_of:
                return
    raise _PlanFailed(f"{len(index_of)} of {len(wanted)} wanted frames did not come out")


def _decode_by_plan(source, timeline: Timeline, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    packet_pts, keys = timeline.packet_pts, timeline.keys

    def position_of(pts: int) -> int:
        """Where the packet of this time stands in decode order, or -1. Asked for wanted packets and after a seek only."""
        found = np.flatnonzero(packet_pts == pts)
        return int(found[0]) if len(found) else -1

    groups: dict[int, list[int]] = {}
    for index in wanted:
        pts = int(timeline.pts[index])
        k = int(np.searchsorted(keys, position_of(pts), side="right")) - 1
        # Pictures shown before their key picture but sent after it (open groups) need the group before as well.
        while k > 0 and packet_pts[keys[k]] > pts:
            k -= 1
        groups.setdefault(k, []).append(index)
    container, stream = open_video(source)
    context = stream.codec_context
    with container:
        packets, at = container.demux(stream), 0
        for k, members in sorted(groups.items()):
            start, dts = int(keys[k]), int(timeline.key_dts[k])
            index_of = {int(timeline.pts[index]): index for index in members}
            needed = {position_of(pts) for pts in index_of}
            last = max(needed)
            if start < at or start - at > SEEK_AHEAD_PACKETS:
                container.seek(int(packet_pts[start] if dts == NO_TIME else dts), stream=stream)
                packets, at = container.demux(stream), -1
            for packet in packets:
                if packet.pts is None:
                    raise _PlanFailed("the file ended early")
                follows = 0 <= at < len(packet_pts) and packet_pts[at] == packet.pts
                here = at if follows else position_of(packet.pts)
                if at < 0 and not 0 <= here <= start:
                    raise _PlanFailed("a seek went too far")
                at = here + 1
                # Pictures sent after the key but shown before it lean on the group before: not asked for, not fed.
                if here < start or packet.pts < packet_pts[start]:
                    continue
                skip = "DEFAULT" if here in needed else "NONREF"
                if context.skip_frame != skip:
                    context.skip_frame = skip
                for frame in context.decode(packet):
                    index = index_of.pop(frame.pts, None)
                    if index is not None:
                        yield index, frame
                if here >= last:
                    break
            for frame in context.decode(None):
                index = index_of.pop(frame.pts, None)
                if index is not None:
                    yield index, frame
            context.flush_buffers()
            if index_of:
                raise _PlanFailed(f"{len(index_of)} wanted frames did not come out")


def backend_problem(backend: str) -> str | None:
    """Why a decoding backend cannot be used here, or None. Importing is the only way to know: libraries may be missing."""
    if backend == "pyav":
        return None
    try:
        importlib.import_module({"torchcodec": "torchcodec.decoders"}.get(backend, backend))
    except ImportError:
        return f"{backend} is not installed"
    except (OSError, RuntimeError) as error:
        return f"{backend} does not load ({_words(error)})"
    return None


def _decode_decord(source, name, timeline: Timeline, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """decord, one thread (more fail on VP9). Never MPEG-TS: it burns minutes there and returns nothing."""
    if problem := backend_problem("decord"):
        raise MediaError(name, problem, "use --decoder pyav")
    import decord

    if "mpegts" in timeline.container:
        raise MediaError(name, "MPEG-TS cannot be read with decord", "use --decoder pyav")
    try:
        reader = decord.VideoReader(source if isinstance(source, str) else io.BytesIO(source), num_threads=1)
        if len(reader) != len(timeline.pts):
            raise MediaError(name, f"decord sees {len(reader)} frames of {len(timeline.pts)}", "use --decoder pyav")
        for index in wanted:
            yield index, reader[index].asnumpy()
    except (decord.DECORDError, decord.DECORDLimitReachedError) as error:
        reason = f"decord cannot decode it ({_words(error)})"
        raise MediaError(name, reason, "use --decoder pyav") from None


def _decode_torchcodec(source, name, timeline: Timeline, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """torchcodec in its exact mode, every frame's time compared with the packet table.

    Never MPEG-TS: it returns other frames than asked for there, without a word.
    """
    if problem := backend_problem("torchcodec"):
        raise MediaError(name, problem, "use --decoder pyav")
    from torchcodec.decoders import VideoDecoder

    if "mpegts" in timeline.container:
        raise MediaError(name, "torchcodec returns wrong frames for MPEG-TS", "use --decoder pyav")
    tick_s = float(timeline.time_base)
    try:
        reader = VideoDecoder(source, num_ffmpeg_threads=1, seek_mode="exact")
        if len(reader) != len(timeline.pts):
            raise MediaError(name, f"torchcodec sees {len(reader)} frames of {len(timeline.pts)}", "use --decoder pyav")
        for index in wanted:
            frame = reader.get_frame_at(index)
            time_s = int(timeline.pts[index]) * tick_s
            if abs(frame.pts_seconds - time_s) > 0.5 * tick_s + 1e-6:
                reason = f"torchcodec gives the frame at {frame.pts_seconds:.3f} s for the one at {time_s:.3f} s"
                raise MediaError(name, reason, "use --decoder pyav")
            yield index, frame.data.permute(1, 2, 0).contiguous().numpy()
    except (RuntimeError, IndexError) as error:
        reason = f"torchcodec cannot decode it ({_words(error)})"
        raise MediaError(name, reason, "use --decoder pyav") from None


def _words(error: BaseException) -> str:
    text = (getattr(error, "strerror", None) or str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__


def decoder_version(backend: str) -> str:
    """Name and versions of what decodes, for the cache header."""
    if backend == "pyav":
        return f"pyav {av.__version__} libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"
    module = __import__(backend)
    return f"{backend} {getattr(module, '__version__', '?')}"


def even(number: float, multiple: int = 2) -> int:
    """The largest multiple of `multiple` that is at most `number` (noise below 1e-6 does not take a frame away)."""
    return math.floor((number + 1e-6) / multiple) * multiple


BACKENDS = {"decord": _decode_decord, "torchcodec": _decode_torchcodec}
