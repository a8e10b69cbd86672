"""One file of the frame cache: its bytes, written so that a name only ever stands for a complete file, read with checks.

A file is 24 bytes (magic "REELFRM1", uint32 offset of the payload, uint32 length of the JSON, uint64 xxh3 of the JSON;
all little-endian), the JSON header, zeros up to a multiple of 4096, then the payload: uint8 (F, 3, H, W) RGB, or F JPEG
pictures one after the other for the lossy tier. docs/data.md describes the header's fields.
"""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.video import Frames

VERSION = 1
MAGIC = b"REELFRM1"
FIXED = struct.Struct("<8sIIQ")
PAGE = 4096
JPEG_QUALITY = 95


class DamagedCacheFile(ValueError):
    """A cache file whose bytes are not what was written. The message names the file and what differs."""


@dataclass(frozen=True)
class Entry:
    """One cache file, header read and checked, payload not yet touched."""

    path: str
    header: dict[str, Any]
    offset: int  # of the payload, in bytes

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return tuple(self.header["shape"])

    @property
    def times_s(self) -> np.ndarray:
        """(total_frames,) presentation times of the whole source, seconds since its first frame."""
        table = self.header["timeline"]
        if table is None:
            return np.arange(self.header["total_frames"]) / self.header["source_fps"]
        deltas = np.frombuffer(zlib.decompress(base64.b64decode(table["pts_deltas"])), dtype="<i8")
        return np.cumsum(deltas) * (table["time_base"][0] / table["time_base"][1])


def read_entry(path: str) -> Entry:
    """Reads and checks a header and the file's length. Raises DamagedCacheFile, or FileNotFoundError."""
    with open(path, "rb") as file:
        fixed = file.read(FIXED.size)
        if len(fixed) < FIXED.size or fixed[:8] != MAGIC:
            raise DamagedCacheFile(f"{path}: is not a frame-cache file")
        _, offset, length, checksum = FIXED.unpack(fixed)
        text = file.read(length)
        size = os.fstat(file.fileno()).st_size
    if len(text) < length or xxhash.xxh3_64_intdigest(text) != checksum:
        raise DamagedCacheFile(f"{path}: its header is damaged")
    header = json.loads(text)
    if header["version"] != VERSION:
        raise DamagedCacheFile(f"{path}: has format version {header['version']}, this program reads {VERSION}")
    payload = sum(header["frame_bytes"]) if header["frame_bytes"] else int(np.prod(header["shape"]))
    if size != offset + payload:
        raise DamagedCacheFile(f"{path}: has {size} bytes, its header says {offset + payload}")
    return Entry(path, header, offset)


def read_pixels(entry: Entry, rows: np.ndarray | None = None, verify: bool = True) -> np.ndarray:
    """uint8 (F, 3, H, W): a read-only memory map, or the given rows of it (copied unless they are all, in order).

    Only the frames asked for are read from disk and compared with their checksums. Raises DamagedCacheFile.
    """
    wanted = range(entry.shape[0]) if rows is None else rows.tolist()
    sums = entry.header["checksums"]
    if entry.header["frame_bytes"]:
        return _read_jpeg(entry, wanted, verify)
    pixels = np.memmap(entry.path, np.uint8, "r", entry.offset, entry.shape)
    if verify:
        for row in wanted:
            if xxhash.xxh3_64_hexdigest(pixels[row]) != sums[row]:
                raise DamagedCacheFile(f"{entry.path}: frame {row} differs from its checksum")
    return pixels if rows is None or len(wanted) == entry.shape[0] else pixels[rows]


def _read_jpeg(entry: Entry, wanted, verify: bool) -> np.ndarray:
    from PIL import Image

    ends = np.cumsum(entry.header["frame_bytes"])
    payload = np.memmap(entry.path, np.uint8, "r", entry.offset)
    pixels = np.empty((len(wanted), *entry.shape[1:]), np.uint8)
    for slot, row in enumerate(wanted):
        picture = payload[ends[row] - entry.header["frame_bytes"][row] : ends[row]].tobytes()
        if verify and xxhash.xxh3_64_hexdigest(picture) != entry.header["checksums"][row]:
            raise DamagedCacheFile(f"{entry.path}: frame {row} differs from its checksum")
        pixels[slot] = np.asarray(Image.open(io.BytesIO(picture))).transpose(2, 0, 1)
    return pixels


def write_entry(path: str, frames: Frames, header: dict[str, Any], storage: str = "raw") -> int:
    """Writes one cache file so that its name only ever stands for a complete file. Returns its size in bytes."""
    pixels = np.ascontiguousarray(frames.pixels)
    payload = [picture.data for picture in pixels] if storage == "raw" else [_jpeg(picture) for picture in pixels]
    header = {
        "format": "reelrl-frames",
        "version": VERSION,
        "shape": list(pixels.shape),
        "dtype": "uint8",
        "layout": "TCHW",
        "color": "RGB",
        "storage": storage if storage == "raw" else f"jpeg{JPEG_QUALITY}",
        "lossy": storage != "raw",
        "frame_bytes": None if storage == "raw" else [len(picture) for picture in payload],
        "checksums": [xxhash.xxh3_64_hexdigest(picture) for picture in payload],
        "indices": frames.indices.tolist(),
        "timestamps_s": frames.timestamps_s.tolist(),
        "source_fps": frames.source_fps,
        "duration_s": frames.duration_s,
        "total_frames": frames.total_frames,
        **header,
    }
    text = json.dumps(header, ensure_ascii=False).encode()
    offset = -(-(FIXED.size + len(text)) // PAGE) * PAGE
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = temporary_name(path, os.getpid())
    try:
        with open(temporary, "wb") as file:
            file.write(FIXED.pack(MAGIC, offset, len(text), xxhash.xxh3_64_intdigest(text)))
            file.write(text)
            file.write(bytes(offset - FIXED.size - len(text)))
            for picture in payload:
                file.write(picture)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return size  # the folder is not synced: a rename lost with the power only leaves the temporary, and work to repeat


def temporary_name(path: str, pid: int) -> str:
    """What a file is called while process `pid` of this host writes it."""
    return f"{path}.tmp-{socket.gethostname()}-{pid}"


def _jpeg(picture: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture.transpose(1, 2, 0)).save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return out.getvalue()
