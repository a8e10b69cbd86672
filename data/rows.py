"""Rows of data files, whatever they are stored as, with the place each came from; and the media a row names.

JSON lines, JSON (a list, or an object holding one), CSV/TSV, Parquet, folders written by Hugging Face's save_to_disk,
and `org/name@split` of the Hugging Face hub (`ms://org/name@split`: ModelScope). Only the last needs another package.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.records import Media, StoredBytes
from data.stored import from_base64, is_column_file, keep_place, parquet_rows, saved_rows

AS_TEXT = 'write the column again as UTF-8 text (in pandas: column.str.decode("utf-8"), or what it is encoded in)'
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


class BadRow(ValueError):
    """One thing wrong with one row: `reason` (names the field), `remedy`, and `path` if it is about one medium."""

    def __init__(self, reason: str, remedy: str, path: str = ""):
        super().__init__(reason, remedy, path)
        self.reason, self.remedy, self.path = reason, remedy, path

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


def expand_files(entries: list[str]) -> dict[str, float | None]:
    """File -> weight, in order: each entry a file, a glob, a save_to_disk folder, or a hub name, `::WEIGHT` at its end.

    The weight of a glob is shared by its files in equal parts. Raises ValueError for what matches nothing.
    """
    weights: dict[str, float | None] = {}
    for entry in entries:
        name, mark, weight_text = entry.rpartition("::")
        weight = None
        if mark:
            try:
                weight = float(weight_text)
            except ValueError:
                name = entry
            if weight is not None and not weight > 0:
                raise ValueError(f"--data {entry}: the weight must be > 0")
        else:
            name = entry
        if os.path.exists(name) or _is_hub_name(name):
            matches = [name]
        else:
            matches = sorted(glob.glob(name, recursive=True))
        if not matches:
            raise ValueError(f"--data {name}: no such file, folder or match; correct the path")
        for match in matches:
            if match in weights:
                raise ValueError(f"--data names {match} twice; name it once, with ::WEIGHT to see it more often")
            weights[match] = None if weight is None else weight / len(matches)
    return weights


def _is_hub_name(name: str) -> bool:
    return name.startswith("ms://") or ("@" in name and name.count("/") == 1 and not name.startswith((".", "/")))


def read_rows(file: str) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Yields (line, row) of one file; a row that cannot be read comes as a BadRow in its place.

    `line` is the line of a JSON / JSONL / CSV file where the row begins, otherwise the row's number from 1.
    Raises ValueError if the file as a whole cannot be read.
    """
    if os.path.isdir(file):
        yield from _read_saved_dataset(file)
    elif not os.path.exists(file) and _is_hub_name(file):
        yield from _read_hub(file)
    else:
        suffix = Path(file).suffix.lower()
        if os.path.isfile(file):
            with open(file, "rb") as start:
                if start.read(2) == b"\x1f\x8b":
                    raise ValueError(f"{file}: is compressed; unpack it first (gunzip)")
        if suffix not in READERS:
            raise ValueError(f"{file}: unknown kind of data file; known: {', '.join(SUFFIXES)} or a dataset folder")
        yield from READERS[suffix](file)


def _object(value: Any, escaped: bool = False) -> dict[str, Any] | BadRow:
    """`escaped`: the text held \\ud..., which may be half a character: no path, no tokenizer and no report takes it."""
    if not isinstance(value, dict):
        return BadRow("the row is not a JSON object", "write {...} per row")
    for name, item in value.items() if escaped else ():
        try:
            json.dumps([name, item], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            field = name.encode("ascii", "backslashreplace").decode()
            return BadRow(f"{field}: holds half a UTF-16 pair (\\ud...)", "write the whole character")
    return value


def refuse_bytes(row: dict[str, Any], *names: str) -> None:
    """Raises BadRow for a field that is bytes, or a list or object with bytes in it, where text is expected: a binary
    column of Parquet or Arrow, whose str() would be "b'...'"."""
    for name in names:
        if _holds_bytes(row.get(name)):
            raise BadRow(f"{name}: holds bytes, not text", AS_TEXT)


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_bytes, value))
    if isinstance(value, dict):
        return any(map(_holds_bytes, value.values()))
    return isinstance(value, (bytes, bytearray))


def _not_a_number(name: str):
    raise ValueError(f"{name} is not JSON")


def _read_jsonl(file: str):
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise ValueError(f"{file}: is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield (
                    number,
                    _object(json.loads(line.decode("utf-8"), parse_constant=_not_a_number), rb"\ud" in line.lower()),
                )
            except (ValueError, RecursionError) as error:
                yield number, BadRow(f"the line is not JSON ({error})", "correct the line; one object per line")


def _read_json(file: str):
    """A JSON list element by element, so that each row knows its line and one damaged row is named by it."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8 ({error}); convert it") from None
    decoder = json.JSONDecoder(parse_constant=_not_a_number)
    start = len(text) - len(text.lstrip())
    escaped = r"\ud" in text.lower()
    if text[start : start + 1] == "{":
        try:
            whole = decoder.decode(text)
        except ValueError as error:
            if "\n{" in text[start:]:  # JSON lines under a .json name
                yield from _read_jsonl(file)
                return
            raise ValueError(f"{file}: is not JSON ({error})") from None
        lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if len(lists) != 1:
            raise ValueError(f"{file}: holds one object; a list of rows is needed")
        for number, row in enumerate(lists[0], start=1):
            yield number, _object(row, escaped)
        return
    if text[start : start + 1] != "[":
        raise ValueError(f"{file}: is not a JSON list of rows")
    at, line, counted = start + 1, 1, 0
    while True:
        while text[at : at + 1] in (" ", "\n", "\r", "\t", ","):
            at += 1
        line += text.count("\n", counted, at)
        counted = at
        if text[at : at + 1] == "]":
            return
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield line, BadRow(f"not JSON from here on ({error})", "correct the file; the rows after it were not read")
            return
        yield line, _object(row, escaped)


def _read_csv(file: str):
    csv.field_size_limit(2**31 - 1)  # an image in base64 is longer than the usual 131072
    before = 1
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, delimiter="\t" if file.lower().endswith(".tsv") else ",")
            names = [name for name in reader.fieldnames or () if name]
            if repeated := next((name for place, name in enumerate(names) if name in names[:place]), None):
                raise ValueError(f"{file}:1: two columns are called {repeated}; rename one, or leave it out")
            for row in reader:
                if None in row:
                    yield before + 1, BadRow("more fields than the header", "quote the field that holds a comma")
                else:
                    yield before + 1, {name: value for name, value in row.items() if name and value not in (None, "")}
                before = reader.line_num
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8 ({error}); convert it") from None
    except csv.Error as error:
        raise ValueError(f"{file}:{before + 1}: is not CSV ({error})") from None


def _read_parquet(file: str):
    import pyarrow

    try:
        for number, row in enumerate(parquet_rows(file), start=1):
            yield number, _without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: cannot be read as Parquet ({error}); re-download it") from None


def _read_saved_dataset(folder: str):
    import pyarrow

    state = Path(folder, "state.json")
    if not state.exists():
        splits = sorted(path.name for path in Path(folder).iterdir() if (path / "state.json").exists())
        if splits:
            raise ValueError(f"{folder}: holds several splits; name one: {', '.join(f'{folder}/{s}' for s in splits)}")
        raise ValueError(f"{folder}: is a folder without state.json; give files, a glob, or a save_to_disk folder")
    try:
        for number, row in enumerate(saved_rows(folder), start=1):
            yield number, _without_nulls(row)
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{folder}: cannot be read as a saved dataset ({error})") from None


def _read_hub(name: str):
    """Rows of a hub dataset; media columns are not decoded."""
    plain, _, split = name.removeprefix("ms://").partition("@")
    try:
        if name.startswith("ms://"):
            from modelscope.msdatasets import MsDataset

            table = MsDataset.load(plain, split=split or "train").to_hf_dataset()
        else:
            import datasets

            table = datasets.load_dataset(plain, split=split or "train")
    except ImportError as error:
        raise ValueError(f"--data {name}: needs the package {error.name}: pip install {error.name}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {name}: cannot be loaded ({error})") from None
    rows = table.with_format("arrow")
    for start in range(0, len(rows), 256):
        for offset, row in enumerate(rows[start : start + 256].to_pylist(), start=1):
            yield start + offset, _without_nulls(row)


def _without_nulls(row: dict[str, Any]) -> dict[str, Any] | BadRow:
    """A column store gives every row every column; a null is a field the row does not have."""
    for name, value in row.items():
        if isinstance(value, UnicodeDecodeError):
            return BadRow(f"{name}: is not UTF-8 ({value})", AS_TEXT)
    return {name: value for name, value in row.items() if value is not None}


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}

# Field of a row -> (kind of medium, whether the row's own data_type or the name of the file says the kind)
MEDIA_FIELDS = {
    "videos": "video",
    "images": "image",
    "video": "video",
    "image": "image",
    "video_path": "video",
    "image_path": "image",
    "path": "",
}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+")  # every JPEG begins with "/9j/": a slash says nothing
WINDOW_FIELDS = (("video_start", "video_end"), ("start_s", "end_s"))


def media_of_row(
    row: dict[str, Any],
    media_dir: str | None = None,
    fields: dict[str, str] | None = None,
    origin: tuple[str, int] | None = None,
) -> tuple[tuple[Media, ...], set[str]]:
    """(media, names of the fields used): every video and image a row names, in the order of its fields.

    An item is a path (relative: to media_dir), bytes, {"bytes", "path"}, {"path" or "video" or "image", "start_s",
    "end_s", "fps"}, base64, or, for a video, a list of frame images. `video_start` / `video_end` of the row cut its
    only video. Beside `path`, `video` and `image` name nothing more. origin: (file, line) as read_rows gave them; then
    bytes that can be read there again are noted (StoredBytes) and not held. Raises BadRow.
    """
    media: list[Media] = []
    used: set[str] = set()
    known = dict(fields or MEDIA_FIELDS)
    if row.get("path") and "path" in known:  # converted rows keep the bare file name of their source beside it
        for name in ("video", "image"):
            known.pop(name, None)
    for name, value in row.items():
        kind = known.get(name)
        if kind is None or value is None:
            continue
        used.add(name)
        items = value if isinstance(value, (list, tuple)) else [value]
        if name == "video" and isinstance(value, (list, tuple)) and value and all(_is_image(item) for item in value):
            items = [list(value)]  # one video given as its frames
        for number, item in enumerate(items):
            if item is None or (isinstance(item, (str, list)) and not item):
                raise BadRow(f"{name}: empty entry", "give a path, or leave the field out")
            place = (name, number) if isinstance(value, (list, tuple)) else (name,)
            media.append(_medium(kind or _kind(row, item), item, name, media_dir, _keeper(origin, place)))
    for start_name, end_name in WINDOW_FIELDS:
        if row.get(start_name) is None and row.get(end_name) is None:
            continue
        videos = [place for place, item in enumerate(media) if item.kind == "video"]
        if len(videos) != 1:
            continue  # not about our media: the fields stay in extra
        used |= {start_name, end_name} & row.keys()
        start, end = _seconds(row.get(start_name), start_name), _seconds(row.get(end_name), end_name)
        media[videos[0]] = _cut(media[videos[0]], start, end, start_name)
    return tuple(media), used


def _is_image(item: Any) -> bool:
    return isinstance(item, str) and Path(item).suffix.lower() in IMAGE_SUFFIXES


def _kind(row: dict[str, Any], item: Any) -> str:
    if row.get("data_type") in ("video", "image"):
        return row["data_type"]
    return "image" if _is_image(item) else "video"


def _seconds(value: Any, name: str) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise BadRow(f"{name}: {value!r} is not a number of seconds", "write seconds, e.g. 12.5") from None
    if not 0 <= seconds < float("inf"):
        raise BadRow(f"{name}: {seconds} must be at least 0 and finite", "write seconds from the start of the video")
    return seconds


def _cut(media: Media, start: float | None, end: float | None, name: str) -> Media:
    if start is not None and end is not None and end <= start:
        raise BadRow(f"{name}: the window [{start}, {end}) is empty", "the end must come after the start")
    return Media(media.kind, media.path, media.data, media.frames, start, end, media.fps)


Keep = Callable[..., bytes | StoredBytes]  # (bytes, names and indices that lead from the item to them)


def _keeper(origin: tuple[str, int] | None, place: tuple[str | int, ...]) -> Keep:
    """What becomes of bytes found in the item at `place` of the row at `origin`."""

    def keep(data: bytes, *further: str | int) -> bytes | StoredBytes:
        if origin is None or not is_column_file(origin[0]):
            return data
        return keep_place(data, origin[0], origin[1] - 1, (*place, *further))

    return keep


def _medium(kind: str, item: Any, name: str, media_dir: str | None, keep: Keep) -> Media:
    if isinstance(item, (bytes, bytearray)):
        return Media(kind, data=keep(bytes(item)))
    if isinstance(item, str):
        if item.startswith("data:"):
            return Media(kind, data=keep(_base64(item, name)))
        if len(item) > 1024 and BASE64.fullmatch(item, 0, 1024):
            return Media(kind, data=keep(_base64(item, name)))
        return Media(kind, path=_full_path(item, media_dir, name))
    if isinstance(item, (list, tuple)):
        if kind != "video" or not all(isinstance(frame, str) for frame in item):
            raise BadRow(f"{name}: a list inside the list must be the frame images of a video", "give paths")
        return Media(kind, frames=tuple(_full_path(frame, media_dir, name) for frame in item))
    if isinstance(item, dict):
        if item.get("bytes"):
            data = item["bytes"]
            if not isinstance(data, (str, bytes, bytearray)):
                raise BadRow(f"{name}: bytes is {type(data).__name__}", "write the file's bytes, or their base64")
            return Media(kind, data=keep(_base64(data, name) if isinstance(data, str) else bytes(data), "bytes"))
        inner = next((key for key in ("path", "video", "image", "frames") if item.get(key)), None)
        if inner is None:
            raise BadRow(f"{name}: an entry has neither path nor bytes", 'write {"path": ...}')
        base = _medium(kind, item[inner], name, media_dir, lambda data, *further: keep(data, inner, *further))
        fps = _seconds(item.get("fps"), f"{name}.fps")
        start, end = _seconds(item.get("start_s"), f"{name}.start_s"), _seconds(item.get("end_s"), f"{name}.end_s")
        return _cut(Media(kind, base.path, base.data, base.frames, None, None, fps), start, end, name)
    raise BadRow(f"{name}: {type(item).__name__} is not a medium", "give a path, bytes, or {path} or {bytes}")


def _base64(text: str, name: str) -> bytes:
    try:
        return from_base64(text)
    except ValueError:
        raise BadRow(f"{name}: is not valid base64", "write the file's bytes in base64, or a path") from None


def _full_path(path: str, media_dir: str | None, name: str) -> str:
    path = path.removeprefix("file://")
    if "://" in path:
        raise BadRow(f"{name}: {path} is not a local file", "download it and give its path", path)
    if "\0" in path:
        raise BadRow(f"{name}: {path!r} holds a NUL byte", "correct the path")
    return path if os.path.isabs(path) or media_dir is None else os.path.join(media_dir, path)
