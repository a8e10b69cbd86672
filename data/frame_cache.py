"""The frame cache: decoded and resized frames of a video, one file per video and setting, memory-mapped when read.

  <cache_dir>/<id[:2]>/<id>/<settings>.frames      id = identity of the source's content, 32 hex digits
data/frame_file.py holds the format of one file.

Files are written under a temporary name, synced, then renamed: a name that exists is complete. Every frame read is
compared with its checksum; a damaged file is made again or refused, never used.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.decode import MediaError, Timeline, check_file, decoder_version
from data.failures import failure_key, known_failures
from data.frame_file import (
    JPEG_QUALITY,
    VERSION,
    DamagedCacheFile,
    Entry,
    read_entry,
    read_pixels,
    write_entry,
)
from data.records import Media, Sample, StoredBytes
from data.video import (
    LIST_FPS,
    Frames,
    VideoPlan,
    VideoSettings,
    make_plan,
    media_name,
    plan_video,
    read_video,
    read_video_and_timeline,
)

SAMPLE_BYTES = 65536  # hashed at the head, middle and tail of a source
MODES = ("prefer", "require", "off")
STORAGES = ("raw", "jpeg")
MARKER = "cache.json"  # {"identity", "storage"} that a folder was made with, if not the usual ones
TEMPORARY = re.compile(r"\.frames\.tmp-(?P<host>.+)-(?P<pid>\d+)$")
SHOWN_MISSING = 20
UNMARKED = {"identity": "fast", "storage": "raw"}


class CacheMiss(MediaError):
    """--cache require, and the cache does not hold these frames."""


# ------------------------------------------------------------------------------------------------ identity and names


def source_identity(media: Media, full: bool = False) -> str:
    """32 hex digits that change when the video changes.

    Fast: size, mtime and the xxh3 of 64 KiB at head, middle and tail. Full: the xxh3 of everything, without mtime, so
    that a copy has the same identity. Bytes are always hashed in full; a list of frame images by its files and rate.
    Raises MediaError for a file that cannot be read.
    """
    if isinstance(media.data, StoredBytes):
        return media.data.digest
    digest = xxhash.xxh3_128()
    if media.data is not None:
        digest.update(media.data)
    elif media.frames:
        digest.update(f"{media.fps or LIST_FPS}".encode())
        for frame in media.frames:
            digest.update(source_identity(Media("image", path=frame), full).encode())
    else:
        check_file(media.path)
        try:
            with open(media.path, "rb") as file:
                status = os.fstat(file.fileno())
                if full:
                    while block := file.read(1 << 22):
                        digest.update(block)
                else:
                    digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
                    middle, tail = status.st_size // 2, max(0, status.st_size - SAMPLE_BYTES)
                    for start in (0, middle, tail):
                        file.seek(start)
                        digest.update(file.read(SAMPLE_BYTES))
        except OSError as error:
            raise MediaError(media.path, f"cannot be read ({error.strerror})", "check the disk") from None
    return digest.hexdigest()


def settings_name(media: Media, settings: VideoSettings, storage: str = "raw") -> str:
    """File name (without suffix) of a setting and time window: readable, and a hash of every parameter."""
    window = "" if media.start_s is None and media.end_s is None else f"-w{media.start_s or 0:g}_{_end(media)}"
    full = json.dumps([VERSION, asdict(settings), media.start_s, media.end_s, storage], sort_keys=True)
    short = xxhash.xxh3_64_hexdigest(full.encode())
    tier = "" if storage == "raw" else f"-{storage}{JPEG_QUALITY}"
    return f"fps{settings.fps:g}-n{settings.max_frames}-px{settings.max_pixels}-{settings.resize}{window}{tier}-{short}"


def _end(media: Media) -> str:
    return "end" if media.end_s is None else f"{media.end_s:g}"


def _header_of_source(
    media: Media, identity: str, full: bool, settings: VideoSettings, plan: VideoPlan, timeline: Timeline | None
) -> dict[str, Any]:
    table = None
    if timeline is not None and not timeline.constant_rate:
        deltas = np.diff(timeline.pts, prepend=timeline.pts[0]).astype("<i8").tobytes()
        base = timeline.time_base
        packed = base64.b64encode(zlib.compress(deltas)).decode()
        table = {"time_base": [base.numerator, base.denominator], "pts_deltas": packed}
    source: dict[str, Any] = {
        "id": identity,
        "identity": "full" if full else "fast",
        # Absolute: --prune asks for this file later, from whatever folder it is started in.
        "name": media_name(media) if media.path is None else os.path.abspath(media.path),
        "height": plan.source_height,
        "width": plan.source_width,
    }
    if media.path is not None:
        status = os.stat(media.path)
        source |= {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if timeline is not None:
        source |= {"codec": timeline.codec, "container": timeline.container, "rotation": timeline.rotation}
    decoder = decoder_version(settings.backend) if timeline is not None else "pillow"
    return {
        "timeline": table,
        "constant_rate": plan.constant_rate,
        "window_s": [media.start_s, media.end_s],
        "source": source,
        "settings": asdict(settings),
        "decoder": decoder,
    }


# ------------------------------------------------------------------------------------------------------------ the door


class FrameCache:
    """Frames of a video from the cache, or decoded.

    mode "prefer": from the cache; on a miss decode and, with `write`, keep the result. "require": only from the
    cache; a miss raises CacheMiss. "off": always decode; cache_dir may be None. cache_dir must exist: a mistyped one is
    an error.
    identity: "fast" or "full" (source_identity); storage: "raw" or "jpeg", what is written and read. None means what
    the folder was made with (its cache.json, see mark_cache), else "fast" and "raw". on_damaged: "remake" decodes and
    writes again, "refuse" raises. verify: compare checksums when reading. Raises ValueError for a wrong mode or directory.
    """

    def __init__(
        self,
        cache_dir: str | None,
        mode: str = "prefer",
        *,
        identity: str | None = None,
        on_damaged: str = "remake",
        storage: str | None = None,
        verify: bool = True,
        write: bool = True,
    ):
        if mode not in MODES:
            raise ValueError(f"--cache must be one of {', '.join(MODES)}, got {mode!r}")
        marked = _read_marker(cache_dir) if mode != "off" and cache_dir is not None else UNMARKED
        identity, storage = identity or marked["identity"], storage or marked["storage"]
        if storage not in STORAGES or identity not in ("fast", "full") or on_damaged not in ("remake", "refuse"):
            raise ValueError(f"--storage {storage}, --identity {identity} or --on_damaged {on_damaged} is unknown")
        if mode != "off" and cache_dir is None:
            raise ValueError(f"--cache {mode} needs --cache_dir (or --cache off)")
        if mode != "off" and not os.path.isdir(cache_dir):
            raise ValueError(f"--cache_dir {cache_dir} does not exist; correct it, or make it with data/preprocess.py")
        self.cache_dir, self.mode, self.verify, self.write = cache_dir, mode, verify, write
        self.full = identity == "full"
        self.on_damaged, self.storage = on_damaged, storage
        self._identities: dict[str, tuple[int, int, str]] = {}
        self._failures = known_failures(cache_dir) if mode != "off" else {}
        self._failed_names = {os.path.basename(record["path"]) for record in self._failures.values()}

    def identity(self, media: Media) -> str:
        """source_identity, remembered per path until its size or mtime changes."""
        if media.path is None:
            return source_identity(media, self.full)
        check_file(media.path)
        status = os.stat(media.path)
        known = self._identities.get(media.path)
        if known is None or known[:2] != (status.st_size, status.st_mtime_ns):
            known = (status.st_size, status.st_mtime_ns, source_identity(media, self.full))
            self._identities[media.path] = known
        return known[2]

    def key(self, media: Media, settings: VideoSettings) -> str:
        """Identity of the visual content: equal keys mean equal pixels."""
        storage = self.storage if self.mode != "off" else "raw"
        return f"{self.identity(media)}/{settings_name(media, settings, storage)}"

    def path(self, media: Media, settings: VideoSettings) -> str:
        """Where the frames of this medium and setting are, or would be."""
        identity = self.identity(media)
        name = settings_name(media, settings, self.storage)
        return os.path.join(self.cache_dir, identity[:2], identity, name + ".frames")

    def find(self, media: Media, settings: VideoSettings) -> tuple[Entry, np.ndarray | None, VideoPlan] | None:
        """(entry, rows of it or None for all, plan), or None. Looks for the setting itself, then for a finer one.

        A file of another setting serves if it holds every wanted frame at the wanted size, resized in the same way.
        Raises DamagedCacheFile for the setting's own file; other damaged files are passed over.
        """
        path = self.path(media, settings)
        if os.path.exists(path):
            entry = read_entry(path)
            return entry, None, _stored_plan(entry)
        try:
            names = sorted(os.listdir(os.path.dirname(path)))
        except FileNotFoundError:
            return None
        for name in names:
            if not name.endswith(".frames"):
                continue
            try:
                entry = read_entry(os.path.join(os.path.dirname(path), name))
            except (DamagedCacheFile, FileNotFoundError):
                continue
            stored = entry.header["settings"]
            same_kind = stored["resize"] == settings.resize and stored["backend"] == settings.backend
            if not same_kind or entry.header["lossy"] != (self.storage != "raw"):
                continue
            rows = _rows_of(entry, plan := _replan(entry, media, settings))
            if rows is not None:
                return entry, rows, plan
        return None

    def plan(self, media: Media, settings: VideoSettings) -> VideoPlan:
        """Frame count, times and size, from a cache header if there is one, else from the file's packets. No pixels.

        Raises MediaError; CacheMiss in mode "require".
        """
        if self.mode != "off":
            try:
                found = self.find(media, settings)
            except DamagedCacheFile as error:
                found = self._damaged(error, media)
            if found is not None:
                return found[2]
            self._raise_known_failure(media)
            if self.mode == "require":
                raise self._miss(media)
        return plan_video(media, settings)

    def frames(self, media: Media, settings: VideoSettings) -> Frames:
        """The frames of one video; `pixels` is a read-only memory map when they come whole from the cache.

        Raises MediaError (CacheMiss in mode "require").
        """
        if self.mode == "off":
            return read_video(media, settings)
        try:
            found = self.find(media, settings)
            if found is not None:
                entry, rows, plan = found
                pixels = read_pixels(entry, rows, self.verify)
                return Frames(
                    pixels, plan.timestamps_s, plan.indices, plan.source_fps, plan.duration_s, plan.total_frames
                )
        except DamagedCacheFile as error:
            self._damaged(error, media)
        self._raise_known_failure(media)
        if self.mode == "require":
            raise self._miss(media)
        if not self.write:
            return read_video(media, settings)
        frames, _ = self.store(media, settings, best_effort=True)
        return frames

    def store(self, media: Media, settings: VideoSettings, best_effort: bool = False) -> tuple[Frames, int]:
        """Decodes a video and writes its cache file; returns (frames, bytes written). Raises MediaError.

        A disk that cannot be written raises OSError, or with `best_effort` only ends the writing, with one warning.
        """
        identity = self.identity(media)
        frames, plan, timeline = read_video_and_timeline(media, settings)
        if self.identity(media) != identity:  # frames of the old content must not be filed under the new one
            raise MediaError(media_name(media), "changed while it was decoded", "run again when it is complete")
        header = _header_of_source(media, identity, self.full, settings, plan, timeline)
        try:
            size = write_entry(self.path(media, settings), frames, header, self.storage)
        except OSError as error:
            if not best_effort:
                raise
            warnings.warn(f"--cache_dir {self.cache_dir}: {error}; decoding goes on without writing", stacklevel=3)
            self.write = False
            return frames, 0
        if self.storage != "raw":  # what the cache will return from now on, not what was decoded
            frames = replace(frames, pixels=read_pixels(read_entry(self.path(media, settings))))
        return frames, size

    def check(self, media: Iterable[Media], settings: VideoSettings) -> list[str]:
        """Names of the videos whose frames are not cached; in mode "require" raises CacheMiss listing them.

        Videos that preprocessing found unusable count as missing too, with its reason.
        """
        missing: dict[str, None] = {}
        for item in media:
            if item.kind != "video":
                continue
            try:
                if self.mode == "off" or self.find(item, settings) is None:
                    failure = self.known_failure(item) if self.mode != "off" else None
                    missing[media_name(item) if failure is None else str(failure)] = None
            except (DamagedCacheFile, MediaError) as error:
                missing[str(error)] = None
        if missing and self.mode == "require":
            shown = "\n  ".join(list(missing)[:SHOWN_MISSING])
            rest = f"\n  ... and {len(missing) - SHOWN_MISSING} more" if len(missing) > SHOWN_MISSING else ""
            raise CacheMiss(
                str(self.cache_dir),
                f"--cache require, but {len(missing)} videos are not in it with these settings:\n  {shown}{rest}\n",
                "run data/preprocess.py with the same settings, or use --cache prefer",
            )
        return list(missing)

    def known_failure(self, media: Media) -> MediaError | None:
        """The verdict of an earlier preprocessing run on this very content and window, if it was a failure."""
        # Most media: no need to look at the file. Only its own name, as the folder may be written in several ways.
        if os.path.basename(media_name(media)) not in self._failed_names:
            return None
        failure = self._failures.get(failure_key(self.identity(media), media))
        return None if failure is None else MediaError(media_name(media), failure["reason"], failure["remedy"])

    def split_failed(self, samples: Iterable[Sample]) -> tuple[list[Sample], list[dict[str, Any]]]:
        """(samples without, problems of those with) a video that preprocessing found unusable, for the start of a run.

        Problems are {file, line, id, path, reason, remedy}, as data.dataset.report_failures takes them.
        """
        good, problems = [], []
        for sample in samples:
            failures = [self.known_failure(media) for media in sample.media] if self._failures else []
            failure = next((failure for failure in failures if failure is not None), None)
            if failure is None:
                good.append(sample)
                continue
            place = {"file": sample.file, "line": sample.line, "id": sample.id, "path": failure.path}
            problems.append({**place, "reason": failure.reason, "remedy": failure.remedy})
        return good, problems

    def _raise_known_failure(self, media: Media) -> None:
        failure = self.known_failure(media)
        if failure is not None:
            raise failure

    def _damaged(self, error: DamagedCacheFile, media: Media) -> None:
        if self.on_damaged == "refuse" or self.mode == "require":
            raise MediaError(media_name(media), str(error), "make it again: data/preprocess.py") from None
        warnings.warn(f"{error}; decoding {media_name(media)} again", stacklevel=4)

    def _miss(self, media: Media) -> CacheMiss:
        return CacheMiss(
            media_name(media),
            f"is not in --cache_dir {self.cache_dir} with these settings",
            "run data/preprocess.py with the same settings, or use --cache prefer",
        )


def _read_marker(cache_dir: str) -> dict[str, str]:
    path = Path(cache_dir, MARKER)
    if not path.exists():
        return UNMARKED
    try:
        return {**UNMARKED, **json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: is damaged ({error}); write {UNMARKED} or what the cache was made with") from None


def mark_cache(cache_dir: str, identity: str | None = None, storage: str | None = None) -> tuple[str, str]:
    """Notes how a folder's files are made, so that all who read it later need no flag; returns (identity, storage).

    None takes what the folder has. Raises ValueError when it has files made otherwise: those would never be found.
    """
    marked = _read_marker(cache_dir)
    asked = {"identity": identity or marked["identity"], "storage": storage or marked["storage"]}
    if asked != marked:
        if Path(cache_dir, MARKER).exists() or next(Path(cache_dir).glob("??/*/*.frames"), None) is not None:
            flags = " ".join(f"--{name} {value}" for name, value in marked.items())
            raise ValueError(f"--cache_dir {cache_dir} was made with {flags}; use another folder or the same flags")
        temporary = Path(cache_dir, f"{MARKER}.tmp-{os.getpid()}")
        temporary.write_text(json.dumps(asked) + "\n", encoding="utf-8")
        os.replace(temporary, Path(cache_dir, MARKER))
    return asked["identity"], asked["storage"]


def _stored_plan(entry: Entry) -> VideoPlan:
    header = entry.header
    _, _, height, width = entry.shape
    return VideoPlan(
        np.asarray(header["indices"]), np.asarray(header["timestamps_s"]), height, width, header["source_fps"],
        header["duration_s"], header["total_frames"], header["source"]["height"], header["source"]["width"],
        header["constant_rate"],
    )  # fmt: skip


def _replan(entry: Entry, media: Media, settings: VideoSettings) -> VideoPlan:
    header = entry.header
    source = header["source"]
    return make_plan(
        media_name(media), entry.times_s, header["source_fps"], header["constant_rate"], source["height"],
        source["width"], media, settings,
    )  # fmt: skip


def _rows_of(entry: Entry, plan: VideoPlan) -> np.ndarray | None:
    """Rows of the entry that are the plan's frames, or None if it lacks one or has another size."""
    if entry.shape[2:] != (plan.height, plan.width):
        return None
    row_of = {index: row for row, index in enumerate(entry.header["indices"])}
    rows = [row_of.get(index) for index in plan.indices.tolist()]
    return None if None in rows else np.asarray(rows)


def cache_files(cache_dir: str) -> list[str]:
    """Paths of all finished cache files, sorted."""
    return sorted(str(path) for path in Path(cache_dir).glob("??/*/*.frames"))


def stale_temporaries(cache_dir: str, all_hosts: bool = False) -> list[str]:
    """Temporary files whose writer is gone: a dead process of this host, or, with `all_hosts`, of any."""
    stale = []
    for path in Path(cache_dir).glob("??/*/*.frames.tmp-*"):
        match = TEMPORARY.search(path.name)
        if match is None:
            continue
        if match["host"] == socket.gethostname():
            if not _runs(match["pid"]):
                stale.append(str(path))
        elif all_hosts:
            stale.append(str(path))
    return stale


def _runs(pid: str) -> bool:
    """Whether a process of this host is there and more than a zombie: a killed one may wait long for its parent."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"
