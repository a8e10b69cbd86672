"""Lists of media that cannot be used, beside the frame cache, written by several machines that do not know of each other.

  failed.jsonl, failed-<i>of<n>.jsonl   rows of data files that name an unusable medium, with reason and remedy
  cured.jsonl, cured-<i>of<n>.jsonl     contents that another machine's list calls unusable and that work by now

A shard writes only the two lists of its own name, so no write of one shard can undo another's. Readers merge: a content
is unusable if its failure has a higher `attempt` than its cure. `attempt` counts what is known of a content in all lists
(a logical clock: machines whose clocks differ agree); of a failure and a cure found at the same time the cure wins.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data.records import Media

FAILED, CURED = "failed*.jsonl", "cured*.jsonl"


def failure_key(identity: str, media: Media) -> str:
    """What a verdict is about: a content and a time window, under whatever name."""
    return f"{identity} {media.start_s} {media.end_s}"


def list_name(kind: str, shard: tuple[int, int]) -> str:
    """kind "failed" or "cured", shard (i, n) -> the name of the list that shard i of n writes."""
    index, count = shard
    return f"{kind}.jsonl" if count == 1 else f"{kind}-{index}of{count}.jsonl"


def read_list(path: str, fields: tuple[str, ...] = ("file", "line", "path")) -> list[dict[str, Any]]:
    """The records of a list, [] if there is none. Raises ValueError naming a line that is no record with `fields`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would cut names that hold U+2028
        if line.strip():
            try:
                record = json.loads(line)
                records.append(record)
                texts = [record[name] for name in fields if name != "line"] + [record.get("media_key") or ""]
                if not all(isinstance(text, str) for text in texts) or not isinstance(record.get("attempt", 0), int):
                    raise ValueError("file, path and media_key are texts, attempt is a whole number")
                if "line" in fields and not isinstance(record["line"], int):
                    raise ValueError("line is a whole number")
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path}:{number}: is no record of a failure ({error}); delete the line") from None
    return records


def known_failures(cache_dir: str) -> dict[str, dict[str, Any]]:
    """Key of a content -> its record, for all that is unusable by all lists of the folder together."""
    failed, cured = _newest(_lists(cache_dir, FAILED)), _newest(_lists(cache_dir, CURED))
    return {key: record for key, record in failed.items() if _attempt(record) > _attempt(cured.get(key))}


def suspects(cache_dir: str) -> set[str]:
    """Bare file names of all media that some list calls unusable: only their contents need to be looked at."""
    lists = _lists(cache_dir, FAILED)
    return {os.path.basename(record["path"]) for records in lists.values() for record in records}


def note_run(
    cache_dir: str,
    shard: tuple[int, int],
    failed_file: str,
    problems: list[dict[str, Any]],
    files: set[str],
    usable: Iterable[tuple[str, str]],
    finished: bool = True,
) -> None:
    """Writes what a run of `shard` over the data files `files` found into this shard's own lists.

    problems: {file, line, id, path, reason, remedy[, media_key]}; they replace what `failed_file` has of the same data
    files; of a run that was interrupted they replace those of the same rows only. usable: (key, path) of the suspects that
    worked. An empty list is no file.
    """
    own = os.path.realpath(failed_file)
    with _alone(cache_dir):
        failed, cured = _lists(cache_dir, FAILED), _lists(cache_dir, CURED)
        newest_failed, newest_cured = _newest(failed), _newest(cured)
        works = dict(usable)

        def following(key: str) -> int:
            return 1 + max(_attempt(newest_failed.get(key)), _attempt(newest_cured.get(key)), 0)

        new = [{"schema_version": 1, **problem} for problem in problems]
        for record in new:
            if record.get("media_key"):
                record["attempt"] = following(record["media_key"])
        seen = {(problem["file"], problem["line"], problem["path"]) for problem in problems}
        kept = [
            record
            for record in read_list(failed_file)
            if (record["file"] not in files or not finished)
            and (record["file"], record["line"], record["path"]) not in seen
            and (key := record.get("media_key")) not in works
            and not (key and _attempt(record) <= _attempt(newest_cured.get(key)))
        ]
        _replace(failed_file, sorted(kept + new, key=lambda record: (record["file"], record["line"])))
        # A cure stays as long as a list of another shard, which is not ours to change, says otherwise.
        others = _newest({path: records for path, records in failed.items() if os.path.realpath(path) != own})
        own_cured = os.path.join(cache_dir, list_name("cured", shard))
        cures = _newest({own_cured: cured.get(own_cured, [])})
        for key in works.keys() & others.keys():
            cures[key] = {"schema_version": 1, "path": works[key], "media_key": key, "attempt": following(key)}
        needed = [cure for key, cure in cures.items() if key in others and _attempt(others[key]) <= _attempt(cure)]
        _replace(own_cured, sorted(needed, key=lambda record: (record["path"], record["media_key"])))


def _lists(cache_dir: str, pattern: str) -> dict[str, list[dict[str, Any]]]:
    fields = ("file", "line", "path") if pattern == FAILED else ("path", "media_key")
    return {str(path): read_list(str(path), fields) for path in sorted(Path(cache_dir).glob(pattern))}


def _newest(lists: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    newest: dict[str, dict[str, Any]] = {}
    for records in lists.values():
        for record in records:
            key = record.get("media_key")
            if key and _attempt(record) > _attempt(newest.get(key)):
                newest[key] = record
    return newest


def _attempt(record: dict[str, Any] | None) -> int:
    """-1 for none; lists of earlier versions do not count: 0."""
    return -1 if record is None else record.get("attempt", 0)


@contextlib.contextmanager
def _alone(cache_dir: str) -> Iterator[None]:
    """Two runs of the same name (both without --shard) take turns, where the disk has locks; shards need none."""
    with open(os.path.join(cache_dir, ".failed.lock"), "a") as lock:
        with contextlib.suppress(OSError):  # released with the file, also by a kill
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(path: str, records: list[dict[str, Any]]) -> None:
    if not records:
        Path(path).unlink(missing_ok=True)
        return
    temporary = f"{path}.tmp-{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)
