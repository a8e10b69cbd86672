"""Images and videos that lie as bytes in a column of a data file: read when they are needed, not held in memory.

Parquet files are read row group by row group, a few megabytes at a time; the Arrow files of save_to_disk are mapped.
Imports neither torch nor a decoder; pyarrow only when such a file is read.
"""

from __future__ import annotations

import base64
import json
import os
import threading
import warnings
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import xxhash

from data.records import StoredBytes

INLINE_BYTES = 1024  # a note of where they lie is no smaller
BATCH_BYTES = 4 << 20  # of rows that are in memory at a time
BATCH_ROWS = 256
STREAM_BYTES = 1 << 20  # read ahead per column; pyarrow's default is the whole column of a row group at once
SLOW_BYTES = 256 << 20  # read for the sake of one item: worth a warning


def is_column_file(file: str) -> bool:
    """Whether a row of this file can be read again by its number."""
    return file.lower().endswith(".parquet") or os.path.isdir(file)


def keep_place(data: bytes, file: str, row: int, place: tuple[str | int, ...]) -> bytes | StoredBytes:
    """What a Media holds of bytes found at `place` (column, index ...) of a row (from 0): small ones themselves."""
    if len(data) <= INLINE_BYTES:
        return data
    return StoredBytes(xxhash.xxh3_128_hexdigest(data), len(data), file, row, place)


def read_stored(stored: StoredBytes) -> bytes:
    """The bytes, compared with their digest. Raises ValueError or OSError if the file cannot be read or has changed."""
    import pyarrow

    try:
        value = _cell(stored.file, stored.row, str(stored.place[0]))
        for step in stored.place[1:]:
            value = value[step]
        if not isinstance(value, (str, bytes)):
            raise TypeError(f"{type(value).__name__} in place of bytes")
        data = from_base64(value) if isinstance(value, str) else value
    except (pyarrow.ArrowException, KeyError, IndexError, TypeError, StopIteration) as error:
        _place.of = None
        raise ValueError(f"cannot be read from {stored.file}, row {stored.row + 1} ({error})") from None
    if xxhash.xxh3_128_hexdigest(data) != stored.digest:
        _place.of = None  # the file may be put right
        raise ValueError(f"is not what {stored.file} held in row {stored.row + 1} when its rows were read")
    return data


def from_base64(text: str) -> bytes:
    """The bytes of a base64 text or data URI; lines may be broken. Raises ValueError."""
    text = text.partition("base64,")[2] if text.startswith("data:") else text
    if any(space in text for space in "\n\r\t "):
        text = "".join(text.split())
    return base64.b64decode(text, validate=True)


def parquet_rows(file: str) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file in order. What is in memory is some pages (pyarrow writes 1024 values in one) of a row
    group, whatever the size of the file and its row groups. A text that is not UTF-8 comes as its UnicodeDecodeError.

    Raises ValueError for two columns of one name."""
    import pyarrow

    layout = _layout(*_version(file))
    repeated = repeated_column(layout.metadata.schema.to_arrow_schema())
    if repeated:
        raise ValueError(f"{file}: two columns are called {repeated}; rename one, or leave it out")
    for group in range(layout.groups):
        for batch in _group_batches(file, group, None):
            yield from _rows(batch)
    pyarrow.default_memory_pool().release_unused()  # its allocator would keep what it once had


def saved_rows(folder: str) -> Iterator[dict[str, Any]]:
    """The rows of a folder written by save_to_disk, as they lie: images stay {bytes, path}, nothing is decoded. A text that
    is not UTF-8 comes as its UnicodeDecodeError."""
    for batch in _saved_batches(folder):
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield from _rows(batch.slice(start, BATCH_ROWS))


def repeated_column(fields: Any) -> str | None:
    """The name that two columns of an Arrow schema share, or two fields inside a column ("images.bytes"); None if none do."""
    import pyarrow

    names = [field.name for field in fields]
    for place, field in enumerate(fields):
        if field.name in names[:place]:
            return field.name
        inner = field.type
        while (
            pyarrow.types.is_list(inner)
            or pyarrow.types.is_large_list(inner)
            or pyarrow.types.is_fixed_size_list(inner)
        ):
            inner = inner.value_type
        if pyarrow.types.is_struct(inner) and (found := repeated_column(list(inner))):
            return f"{field.name}.{found}"
    return None


def _rows(batch: Any) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # says neither the row nor the column: they are looked for one by one
        columns = zip(batch.schema.names, batch.columns)
        cells = {name: [_text_or_error(cell) for cell in column] for name, column in columns}
        return [{name: values[row] for name, values in cells.items()} for row in range(batch.num_rows)]


def _text_or_error(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return error


def _saved_batches(folder: str) -> Iterator[Any]:
    import pyarrow

    for part in json.loads(Path(folder, "state.json").read_text(encoding="utf-8"))["_data_files"]:
        with pyarrow.memory_map(str(Path(folder, part["filename"]))) as source:
            yield from pyarrow.ipc.open_stream(source)


class _Layout:
    """Metadata of a Parquet file, and where its row groups begin."""

    def __init__(self, file: str):
        import pyarrow.parquet

        self.metadata = pyarrow.parquet.read_metadata(file)
        self.groups = self.metadata.num_row_groups
        rows = [self.metadata.row_group(group).num_rows for group in range(self.groups)]
        self.starts = [0, *accumulate(rows)]
        sizes = [self.metadata.row_group(group).total_byte_size for group in range(self.groups)]
        self.row_bytes = [size / max(count, 1) for size, count in zip(sizes, rows)]


@lru_cache(maxsize=64)
def _layout(file: str, size: int, mtime_ns: int) -> _Layout:
    return _Layout(file)


def _version(file: str) -> tuple[str, int, int]:
    status = os.stat(file)
    return file, status.st_size, status.st_mtime_ns


def _group_batches(file: str, group: int, column: str | None) -> Iterator[Any]:
    import pyarrow.parquet

    layout = _layout(*_version(file))
    rows = max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(layout.row_bytes[group], 1))))
    options = {"buffer_size": STREAM_BYTES, "pre_buffer": False}
    with pyarrow.parquet.ParquetFile(file, metadata=layout.metadata, **options) as table:
        columns = None if column is None else [column]
        yield from table.iter_batches(batch_size=rows, row_groups=[group], columns=columns, use_threads=False)


class _Place(threading.local):
    """Where this thread read last: the next row of the same row group is read on from there, not from its beginning."""

    of: tuple[str, str] | None = None  # file, column
    stamp: tuple[tuple[str, int, int], ...] = ()  # of the file when it was opened
    first = end = 0  # rows of the batch in hand
    last = 0  # end of its row group
    batch: Any = None
    batches: Iterator[Any] = iter(())


_place = _Place()


def _stamp(file: str) -> tuple[tuple[str, int, int], ...]:
    """What a file, or the parts of a saved folder, were when they were opened: a mapped part that was written again since then
    must not be touched, which would end the process."""
    parts = sorted(Path(file).glob("*.arrow")) if os.path.isdir(file) else [file]
    return tuple(_version(str(part)) for part in parts)


def _cell(file: str, row: int, column: str) -> Any:
    """The value of one column in one row (from 0)."""
    stamp = _stamp(file)
    if (_place.of, _place.stamp) != ((file, column), stamp) or not _place.first <= row < _place.last:
        _place.of, _place.stamp, _place.batch = None, stamp, None  # not half moved, if opening fails
        open_at = _open_saved if os.path.isdir(file) else _open_parquet
        _place.first, _place.last, _place.batches = open_at(file, row, column)
        _place.end, _place.batch, _place.of = _place.first, None, (file, column)
    while row >= _place.end:
        _place.batch = None  # one batch in memory, not two
        _place.batch = next(_place.batches)
        _place.first, _place.end = _place.end, _place.end + _place.batch.num_rows
    return _place.batch.column(column)[row - _place.first].as_py()


def _open_parquet(file: str, row: int, column: str) -> tuple[int, int, Iterator[Any]]:
    layout = _layout(*_version(file))
    group = next(group for group in range(layout.groups) if row < layout.starts[group + 1])
    if (row - layout.starts[group]) * layout.row_bytes[group] > SLOW_BYTES:
        size = layout.metadata.row_group(group).total_byte_size / 1e6
        text = f"{file}: row group {group} of {size:.0f} MB is read from its beginning for single rows; write the file "
        warnings.warn(text + "again with pyarrow.parquet.write_table(table, FILE, row_group_size=100)", stacklevel=5)
    return layout.starts[group], layout.starts[group + 1], _group_batches(file, group, column)


def _open_saved(folder: str, row: int, column: str) -> tuple[int, int, Iterator[Any]]:
    first = 0
    for batch in _saved_batches(folder):
        if row < first + batch.num_rows:
            return first, first + batch.num_rows, iter([batch])
        first += batch.num_rows
    raise IndexError(f"{first} rows")
