"""The run folder: keyed by everything that changes an answer, appended as answers come, read back to resume.

<output_dir>/<benchmark>/<model folder>-<key>/
    run.json                  what the key is made of, in words
    predictions.jsonl         one row per sample id; fsynced
    predictions.r-of-w.jsonl  the same while several ranks write; merged at the end
    results.json, report.html, failed.jsonl
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.records import SCHEMA_VERSION, Media, Sample, StoredBytes

ROOT = Path(__file__).resolve().parents[1]
# Sources whose change can change what the model is shown or what it answers. Scoring is redone at every run.
ANSWER_SOURCES = (
    "data/records.py",
    "data/prompts.py",
    "data/video.py",
    "data/decode.py",
    "data/frame_cache.py",
    "data/frame_file.py",
    "data/positions.py",
    "data/normalise.py",
    "data/encode.py",
    "evaluate/_engine.py",
    "evaluate/_models.py",
    "evaluate/_async_vllm.py",
    "rollout/vllm_inputs.py",
    "rollout/vllm_access.py",  # makes the texts of answers
    "evaluate/_annotations.py",
)
IDENTITY_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)


FAILURES = ("media_error", "load_timeout", "prompt_error", "prompt_too_long", "request_failed", "request_timeout")


class DamagedRow(ValueError):
    """A line of a predictions file, other than a last one cut by a kill, that is no row."""


def digest(value: Any, length: int = 16) -> str:
    """Hexadecimal SHA-256 of the canonical JSON of a value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def file_digest(path: str | Path, length: int = 16) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:length]


def source_digest() -> str:
    """One hash over ANSWER_SOURCES, so that two code versions never share a folder."""
    return digest([(name, file_digest(ROOT / name)) for name in ANSWER_SOURCES if (ROOT / name).is_file()])


def model_identity(model: str, blocks: int = 64, block_bytes: int = 1 << 16) -> str:
    """A hash of what a model folder holds, independent of where it lies.

    Small files are hashed whole, weight files by size, header and `blocks` evenly spread blocks: another checkpoint
    saved to the same folder differs in all of them, and 16 GB of weights need not be read twice. A name that is not a
    folder (a hub name) stands for itself.
    """
    folder = Path(model)
    if not folder.is_dir():
        return f"name:{model}"
    identity = hashlib.sha256()
    for name in IDENTITY_FILES:
        if (folder / name).is_file():
            identity.update(f"{name}:{file_digest(folder / name, 64)}\n".encode())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        identity.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            for index in range(blocks):
                file.seek(index * max(0, size - block_bytes) // max(1, blocks - 1))
                identity.update(file.read(block_bytes))
    return identity.hexdigest()[:24]


def run_folder(output_dir: str | Path, benchmark: str, model: str, settings: dict[str, Any]) -> Path:
    """The folder of a run: output_dir / benchmark / <model name>-<hash of settings>."""
    path = Path(model)
    name = path.name or path.resolve().name
    if name.startswith(("checkpoint", "step", "hf")) and path.resolve().parent.name:
        name = f"{path.resolve().parent.name}-{name}"
    return Path(output_dir) / benchmark / f"{name}-{digest(settings, 12)}"


def media_name(medium: Media) -> Any:
    """What stands for a medium in a run's key: the names of its files (they may be moved), the digest of its bytes."""
    if medium.frames:
        return [Path(frame).name for frame in medium.frames], medium.fps
    if isinstance(medium.data, StoredBytes):
        return medium.data.digest
    return Path(medium.path).name if medium.path else hashlib.sha256(medium.data or b"").hexdigest()


def media_files(sample: Sample) -> list[str]:
    return [path for medium in sample.media for path in (medium.path, *(medium.frames or ())) if path]


def media_bytes(sample: Sample) -> int | None:
    """Size of all files of a sample's media; None if it has none or one is not there."""
    files = media_files(sample)
    try:
        return sum(os.stat(path).st_size for path in files) if files else None
    except OSError:
        return None


def changed_media(samples: list[Sample], rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Sample id -> "file, bytes then and now" of samples whose answer was given when their files had another size.

    A run's key knows files by name, so that a folder may be moved and a missing video brought later; but a second set of
    the same names (--media_dir with the videos at a low rate) must not be reported with the first one's answers.
    """
    changed = {}
    for sample in samples:
        row = rows.get(sample.id)
        if row is None or row["status"] in FAILURES or "media_bytes" not in row:
            continue
        size = media_bytes(sample)
        if size is not None and size != row["media_bytes"]:
            changed[sample.id] = (
                f"{media_files(sample)[0]}, {row['media_bytes']} bytes when it was answered, now {size}"
            )
    return changed


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all (temporary name, fsync, rename)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False, default=str)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_predictions(folder: Path) -> dict[str, dict[str, Any]]:
    """Sample id -> row, over predictions.jsonl and the files of all ranks.

    A last line cut by a kill is left out: its sample counts as missing. The first row of an id is kept.
    Raises DamagedRow naming file and line for damage anywhere else.
    """
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("predictions*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                if number == len(lines):
                    continue
                raise DamagedRow(f"{path}:{number}: damaged row ({error}); delete that line to redo it") from error
            if not isinstance(row, dict) or "id" not in row:
                raise DamagedRow(f"{path}:{number}: a row without an id; delete that line to redo it")
            rows.setdefault(row["id"], row)
    return rows


def drop_rows(folder: Path, ids: set[str]) -> None:
    """Removes rows (failures to be tried again) from every predictions file, atomically per file."""
    for path in sorted(folder.glob("predictions*.jsonl")):
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # without a last line cut by a kill
        kept = [line for line in whole.split(b"\n") if line.strip() and json.loads(line)["id"] not in ids]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("wb") as file:
            file.writelines(line + b"\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def merge_ranks(folder: Path) -> None:
    """Moves the rows of finished ranks into predictions.jsonl; killed in between, the next merge ends the work."""
    parts = sorted(path for path in folder.glob("predictions.*.jsonl"))
    if not parts:
        return
    rows = read_predictions(folder)
    ordered = sorted(rows.values(), key=lambda row: row["id"])
    write_lines(folder / "predictions.jsonl", ordered)
    for part in parts:
        part.unlink()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a JSON lines file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.writelines(encode_row(row) for row in rows)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def rewrite_rows(folder: Path, scored: dict[str, dict[str, Any]], rows: dict[str, dict[str, Any]]) -> None:
    """Puts newly scored rows into predictions.jsonl, in its order, if any of them changed."""
    updated = [scored.get(name, row) for name, row in rows.items()]
    if updated != list(rows.values()):
        write_lines(folder / "predictions.jsonl", updated)


def write_failed(folder: Path, failed: list[tuple[Sample, dict[str, Any]]]) -> None:
    """failed.jsonl: {file, line, id, path, reason, remedy} of every sample without an answer; absent if there is
    none."""
    path = folder / "failed.jsonl"
    if not failed:
        path.unlink(missing_ok=True)
        return
    write_lines(
        path,
        [
            {
                "file": sample.file,
                "line": sample.line,
                "id": sample.id,
                "path": sample.media[0].path if sample.media else None,
                "reason": f"{row['status']}: {row['reason']}",
                "remedy": row.get("remedy", "") or "see the reason; --retry_failed tries again",
            }
            for sample, row in failed
        ],
    )


def share(samples: list[Sample], rank: int, world: int) -> list[Sample]:
    """The samples of one rank: whole clips, dealt in turn over the full list, so that a resume deals the same way."""
    places: dict[Any, int] = {}
    mine = []
    for index, sample in enumerate(samples):
        place = places.setdefault(sample.media or index, len(places))
        if place % world == rank:
            mine.append(sample)
    return mine


def encode_row(row: dict[str, Any]) -> bytes:
    """One line of predictions.jsonl. A lone surrogate in a response becomes "?", since no UTF-8 file can hold it."""
    return (json.dumps({"schema_version": SCHEMA_VERSION, **row}, ensure_ascii=False) + "\n").encode("utf-8", "replace")


class FolderLock:
    """Keeps a second run out of a run folder while rows are written, dropped or put together there.

    A POSIX lock on `.lock`: it ends with the process however that went, and an engine process forked meanwhile does not
    inherit it. Raises BlockingIOError when another process holds it.
    """

    def __init__(self, folder: Path):
        self._file = (folder / ".lock").open("ab")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._file.close()
            raise BlockingIOError(f"{folder} is in use by another run; wait for it or stop it") from error

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Writer:
    """Appends rows to a predictions file from a thread of its own; one fsync per batch of rows that came meanwhile.

    Used as a context manager; leaving it waits for the last row. `finish_row` (scoring) runs in the writer's thread, so
    that the event loop goes on. A lock keeps a second run out of the same file: BlockingIOError when it is held.
    """

    def __init__(self, path: Path, finish_row: Callable[[dict[str, Any]], dict[str, Any]] | None = None):
        self._finish_row, self._path = finish_row or (lambda row: row), path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise BlockingIOError(f"{path} is being written by another run; wait for it or stop it") from error
        self._cut_partial_line()
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="predictions", daemon=True)
        self._thread.start()

    def _cut_partial_line(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        if content and not content.endswith(b"\n"):
            self._file.truncate(content.rfind(b"\n") + 1)
            os.fsync(self._file.fileno())
        self._file.seek(0, os.SEEK_END)

    def put(self, row: dict[str, Any]) -> None:
        """Queues a row. Raises the error of an earlier failed write (a full disk)."""
        if self._error:
            raise self._error
        self._rows.put(row)

    def _write(self) -> None:
        ended = False
        while not ended:
            batch = [self._rows.get()]
            while not self._rows.empty():
                batch.append(self._rows.get_nowait())
            ended = None in batch
            if self._error:
                continue  # the rows are not on disk and count as missing; put() and leaving raise the error
            try:
                self._file.write(b"".join(encode_row(self._finish_row(row)) for row in batch if row is not None))
                self._file.flush()
                os.fsync(self._file.fileno())
            except BaseException as error:  # handed to put() and to the end of the block, which raise it
                if isinstance(error, OSError) and error.filename is None:
                    error.filename = str(self._path)
                self._error = error

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.put(None)
        self._thread.join()
        if self._error is None:
            self._file.close()
            return
        with suppress(OSError):  # a full disk refuses the rest of the buffer a second time
            self._file.close()
        raise self._error
