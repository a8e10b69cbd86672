"""Opening one video file: which frames it holds and when they are shown, and the pixels of the frames one asks for.

A demux pass over the packets gives the exact table of presentation times for a few milliseconds per minute of video.
Frames are then decoded by plan: per wanted group of pictures one seek, packets fed only up to the last wanted one,
non-reference frames that nobody asked for skipped by the decoder. Where a plan is not safe (MPEG-TS, AVI, GIF, packets
without or with equal times, a wanted time that does not come out) the file is decoded from its beginning.

PyAV does not apply the display rotation of phone videos; it is applied here. torch is not imported here.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

MAX_FRAME_PIXELS = 160_000_000  # 16k x 10k: beyond that a header is lying, and one RGB frame would take 480 MB
SEEK_AHEAD_PACKETS = 64  # nearer than this, reading on is cheaper than a seek
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
    packet_dts: np.ndarray | None = None
    packet_key: np.ndarray | None = None  # (packets,) bool

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
        rows = []
        try:
            for packet in container.demux(stream):
                if packet.size:
                    rows.append((packet.pts, packet.dts, packet.is_keyframe, packet.is_discard, packet.is_corrupt))
        except av.FFmpegError as error:
            raise MediaError(name, f"is damaged ({_words(error)} in the container)", "re-download it") from None
        if not rows:
            raise MediaError(name, "holds no video packets (truncated?)", "re-download it")
        # An MP4 lists its samples up front: fewer packets than listed means the end of the file is missing.
        if "mov" in form and (len(rows) < stream.frames or rows[-1][4]):
            raise MediaError(name, f"is truncated: {stream.frames} frames listed, {len(rows)} there", "re-download it")
        _check_end(name, container, stream, rows)
        sequential = any(part in SEQUENTIAL_FORMATS for part in form.split(","))
        first_key = next((i for i, row in enumerate(rows) if row[2]), 0)
        shown = [row[0] for row in rows[first_key:] if not row[3]]  # packets before a key show nothing
        plain = bool(shown) and None not in [row[0] for row in rows] and len(set(shown)) == len(shown)
        sequential = sequential or first_key > 0 or not plain
        rate = stream.average_rate, stream.guessed_rate
        time_base = stream.time_base
        codec = stream.codec_context.name
    first, pts = _first_picture(source, name, by_decoding or not plain)
    pts = np.sort(np.asarray(shown if pts is None else pts, dtype=np.int64))
    fps, constant_rate = _frame_rate(pts, time_base, rate)
    height, width = first.height, first.width
    if height * width > MAX_FRAME_PIXELS:
        raise MediaError(name, f"has frames of {width}x{height} pixels", "scale it down first")
    rotation = int(first.rotation) % 360
    if rotation % 180 == 90:
        height, width = width, height
    order = [np.asarray([row[i] for row in rows]) for i in range(3)] if plain and not sequential else [None] * 3
    return Timeline(
        pts=pts, time_base=time_base, fps=fps, constant_rate=constant_rate, height=height, width=width,
        rotation=rotation, codec=codec, container=form, sequential=sequential,
        packet_pts=order[0], packet_dts=order[1], packet_key=order[2],
    )  # fmt: skip


def _check_end(name: str, container, stream, rows) -> None:
    """Raises MediaError if a Matroska or FLV file ends well before the duration in its header (MP4: counted above)."""
    if not container.duration or not any(part in container.format.name for part in ("matroska", "flv")):
        return
    announced_s = container.duration / av.time_base
    slack_s = max(0.5, 0.02 * announced_s)
    times = [row[0] for row in rows if row[0] is not None]
    end_s = float(max(times) * stream.time_base) if times else announced_s
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


def _first_picture(source, name, all_times: bool):
    """The first decoded frame and, if asked for, the times of all of them (a full decode, nothing converted)."""
    container, stream = open_video(source)
    with container:
        first, times = None, []
        try:
            for frame in container.decode(stream):
                if first is None:
                    first = frame
                if not all_times:
                    return first, None
                times.append(frame.pts if frame.pts is not None else frame.dts)
        except av.FFmpegError as error:
            raise MediaError(name, f"cannot be decoded ({_words(error)})", "re-download or re-encode it") from None
        if first is None:
            raise MediaError(name, "decodes to no picture", "re-download or re-encode it")
        if None in times or len(set(times)) < len(times):
            raise MediaError(name, "has frames without a time of their own", "re-encode it (ffmpeg -i IN OUT.mp4)")
        return first, times


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

    backend: "pyav" (by plan, else from the beginning), "decord" or "torchcodec" (both by index, upright by themselves).
    Raises MediaError; nothing is concealed: a damaged picture is an error.
    """
    name = source if isinstance(source, str) else f"<{len(source)} bytes>"
    wanted = sorted(set(wanted))
    if backend != "pyav":
        yield from BACKENDS[backend](source, name, timeline, wanted)
        return
    try:
        if timeline.sequential or timeline.packet_pts is None:
            frames = _decode_sequential(source, timeline, wanted)
        else:
            frames = _decode_by_plan(source, timeline, wanted)
        done = set()
        try:
            for index, frame in frames:
                done.add(index)
                yield index, _upright(frame, timeline)
        except (_PlanFailed, av.FFmpegError):  # once more, without shortcuts
            rest = [index for index in wanted if index not in done]
            for index, frame in _decode_sequential(source, timeline, rest):
                yield index, _upright(frame, timeline)
    except _PlanFailed as error:
        raise MediaError(name, f"frames are missing or shifted ({error})", "re-encode it") from None
    except av.FFmpegError as error:
        raise MediaError(name, f"is damaged ({_words(error)} while decoding)", "re-download or re-encode it") from None


def _upright(frame: av.VideoFrame, timeline: Timeline) -> np.ndarray:
    if frame.is_corrupt:
        raise _PlanFailed(f"picture at {float(frame.time or 0):.3f} s is damaged")
    pixels = frame.to_ndarray(format="rgb24")
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
    packet_pts, packet_dts = timeline.packet_pts, timeline.packet_dts
    position_of = {int(pts): position for position, pts in enumerate(packet_pts)}
    keys = np.flatnonzero(timeline.packet_key)
    groups: dict[int, list[int]] = {}
    for index in wanted:
        pts = int(timeline.pts[index])
        k = int(np.searchsorted(keys, position_of[pts], side="right")) - 1
        # Pictures shown before their key picture but sent after it (open groups) need the group before as well.
        while k > 0 and packet_pts[keys[k]] > pts:
            k -= 1
        groups.setdefault(int(keys[k]), []).append(index)
    container, stream = open_video(source)
    context = stream.codec_context
    with container:
        packets, at = container.demux(stream), 0
        for start, members in sorted(groups.items()):
            index_of = {int(timeline.pts[index]): index for index in members}
            needed = {position_of[pts] for pts in index_of}
            last = max(needed)
            if start < at or start - at > SEEK_AHEAD_PACKETS:
                dts = packet_dts[start]
                container.seek(int(packet_pts[start] if dts is None else dts), stream=stream)
                packets, at = container.demux(stream), -1
            for packet in packets:
                if packet.pts is None:
                    raise _PlanFailed("the file ended early")
                here = position_of.get(packet.pts, -1)
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


def _decode_decord(source, name, timeline: Timeline, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """decord, one thread (more fail on VP9). Never MPEG-TS: it burns minutes there and returns nothing."""
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
        reason = str(error).strip().splitlines()[0]
        raise MediaError(name, f"decord cannot decode it ({reason})", "use --decoder pyav") from None


def _decode_torchcodec(source, name, timeline: Timeline, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """torchcodec in its exact mode. Never MPEG-TS: it silently returns wrong frames there."""
    try:
        from torchcodec.decoders import VideoDecoder
    except ImportError:
        raise MediaError(name, "torchcodec is not installed", "use --decoder pyav") from None
    if "mpegts" in timeline.container:
        raise MediaError(name, "torchcodec returns wrong frames for MPEG-TS", "use --decoder pyav")
    try:
        reader = VideoDecoder(source, num_ffmpeg_threads=1, seek_mode="exact")
        if len(reader) != len(timeline.pts):
            raise MediaError(name, f"torchcodec sees {len(reader)} frames of {len(timeline.pts)}", "use --decoder pyav")
        for index in wanted:
            yield index, reader[index].permute(1, 2, 0).contiguous().numpy()
    except (RuntimeError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise MediaError(name, f"torchcodec cannot decode it ({reason})", "use --decoder pyav") from None


def _words(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
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
