"""Reading benchmark annotation files: JSON, JSON lines or parquet, plain or .xz, into samples.

Two shapes are common. The toolkit shape (one list of rows with `problem`, `options`, `solution`, `path`), which users
of EasyVideoR1 have for every benchmark, is read here for all programs. An official release has its own fields; a
program that accepts it turns each row into the toolkit shape and says so in its docstring.
"""

from __future__ import annotations

import json
import lzma
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.records import DATA_TYPES, Media, Sample, canonical_problem_type

SUFFIXES = ("", ".xz")
VIDEO_ENDINGS = (".mp4", ".MP4", ".mkv", ".webm", ".mov", ".avi")  # of one video, as people happen to have it
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL | re.IGNORECASE)
# Fields that become attributes of Sample (or are noise); all others go to `extra`.
TAKEN = {"problem", "options", "solution", "path", "problem_type", "data_type", "data_source", "image_path", "process"}


class AnnotationError(ValueError):
    """An annotation file is missing, unreadable or has a row that cannot be used; the message says the remedy."""


def find_annotations(data_dir: str | Path, names: tuple[str, ...], explicit: str | None = None, hint: str = "") -> Path:
    """The annotation file: `explicit` if given, else the first of `names` under data_dir, valid_data/ or annotations/.

    Names may hold a folder ("annotations/train.json") and are tried with and without .xz.
    Raises AnnotationError naming every place looked at and where the file comes from (`hint`).
    """
    if explicit:
        if not Path(explicit).is_file():
            raise AnnotationError(f"--annotations {explicit}: no such file")
        return Path(explicit)
    tried = []
    for folder in ("", "valid_data", "annotations"):
        for name in names:
            for suffix in SUFFIXES:
                path = Path(data_dir) / folder / f"{name}{suffix}"
                if path.is_file():
                    return path
                if not suffix:
                    tried.append(str(path))
    raise AnnotationError(
        f"no annotation file in {data_dir}: looked for {', '.join(tried)} (also with .xz){no_folder(data_dir)}. "
        f"{hint} Give its path with --annotations FILE if it lies elsewhere."
    )


def no_folder(path: str | Path | None) -> str:
    """What to add to an error about what was looked for in a folder that is not there at all."""
    return f"; there is no folder {path}" if path and not Path(path).is_dir() else ""


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a .json (list of rows, or one row), .jsonl or .parquet file, optionally .xz.

    Each row gets `_line`: its line in a .jsonl file, else its place in the list counted from 1.
    Raises AnnotationError with file and line for text that is not JSON or a row that is not an object.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise AnnotationError(f"{path} cannot be read: {error}") from error
        return [{**row, "_line": line} for line, row in enumerate(rows, 1)]
    try:
        raw = path.read_bytes()
        raw = lzma.decompress(raw) if path.suffix == ".xz" else raw
        text = raw.decode("utf-8-sig")
    except (OSError, lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path} cannot be read: {error}") from error
    rows: list[Any] = []
    if ".jsonl" in path.name:
        for line, content in enumerate(text.split("\n"), 1):  # splitlines() would cut strings that hold U+2028
            if not content.strip():
                continue
            try:
                rows.append((line, json.loads(content)))
            except json.JSONDecodeError as error:
                raise AnnotationError(f"{path}:{line}: not JSON ({error.msg}, column {error.colno})") from error
    else:
        try:
            loaded = json.loads(text)
        except json.JSONDecodeError as error:
            raise AnnotationError(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno})") from error
        if isinstance(loaded, dict):
            loaded = [loaded]
        if not isinstance(loaded, list):
            raise AnnotationError(f"{path}:1: must hold a list of rows, got {type(loaded).__name__}")
        rows = list(enumerate(loaded, 1))
    for line, row in rows:
        if not isinstance(row, dict):
            raise AnnotationError(f"{path}:{line}: a row must be an object, got {type(row).__name__}")
    return [{**row, "_line": line} for line, row in rows]


def gold_of(solution: Any) -> Any:
    """The gold inside `<answer>` (the last block), else inside `<think>` (Charades-STA), else the text itself.

    >>> gold_of("<answer>B</answer>"), gold_of('<think>{"time": [1, 2]}</think><[PLHD]>'), gold_of(4)
    ('B', '{"time": [1, 2]}', 4)
    """
    if not isinstance(solution, str):
        return solution
    blocks = ANSWER.findall(solution) or THINK.findall(solution)
    return (blocks[-1] if blocks else solution).strip()


def toolkit_sample(row: dict[str, Any], file: str | Path, *, source: str = "", sample_id: str = "") -> Sample:
    """One row of the toolkit shape as a Sample; media paths stay relative (see `resolve_media`).

    Raises AnnotationError naming file, line and field for a missing field or an unknown problem_type.
    """
    line = row.get("_line", 0)
    where = f"{file}:{line}"
    for name in ("problem", "solution", "problem_type"):
        if name not in row:
            raise AnnotationError(f"{where}: field {name!r} is missing; it has {sorted(k for k in row if k[0] != '_')}")
    try:
        problem_type = canonical_problem_type(row["problem_type"])
    except ValueError as error:
        raise AnnotationError(f"{where}: {error}") from error
    for name in ("path", "image_path"):
        if not isinstance(row.get(name) or "", str):
            raise AnnotationError(f"{where}: field {name!r} must be a path, got {row[name]!r:.80}")
    media = []
    if row.get("path"):
        media.append(Media("video", path=row["path"]))
    if row.get("image_path"):
        media.append(Media("image", path=row["image_path"]))
    options = row.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise AnnotationError(f"{where}: field 'options' must be a list of strings, got {options!r:.80}")
    data_type = row.get("data_type", "video")
    extra = {name: value for name, value in row.items() if name not in TAKEN and name[0] != "_" and value is not None}
    extra["row_problem_type"] = row["problem_type"]
    return Sample(
        id=sample_id or str(row.get("problem_id", line)),
        question=str(row["problem"]),
        answer=gold_of(row["solution"]),
        problem_type=problem_type,
        data_type=data_type if data_type in DATA_TYPES else "video",
        media=tuple(media),
        options=tuple(options),
        source=str(source or row.get("data_source") or Path(file).name.split(".")[0]),
        extra=extra,
        file=str(file),
        line=line,
    )


def unique_ids(samples: list[Sample]) -> list[Sample]:
    """Makes ids unique in place, in file order: the second "e10_q1" becomes "e10_q1#2". Returns the same list."""
    seen: dict[str, int] = {}
    given = {sample.id for sample in samples}
    for sample in samples:
        name, seen[sample.id] = sample.id, seen.get(sample.id, 0) + 1
        if seen[name] > 1:
            while f"{name}#{seen[name]}" in given:  # a row of the file may have that very id
                seen[name] += 1
            sample.id = f"{name}#{seen[name]}"
    return samples


def letter(index: int) -> str:
    return chr(ord("A") + index)


def lettered(options: list[str]) -> list[str]:
    """["cat", "dog"] and ["A. cat", "B. dog"] -> ["A. cat", "B. dog"]."""
    options = [str(option) for option in options]
    if options and all(option.startswith(f"{letter(index)}. ") for index, option in enumerate(options)):
        return options
    return [f"{letter(index)}. {option}" for index, option in enumerate(options)]


def resolve_media(
    samples: list[Sample], roots: list[Path], clips: Callable[[Sample], list[Media]] | None = None
) -> list[str]:
    """Replaces relative media paths by the first existing root/path, in place; returns those found nowhere.

    After the roots comes the path as it stands: data.dataset.load has joined it to its data file's folder already.

    clips: other files that show the same thing as a sample's first medium, best first (a clip cut beforehand, with or
    without a window of its own). A video of the same name with another ending (.mkv, .webm …) is taken too. A path that
    exists nowhere becomes roots[0]/path, so that errors name a sensible place; so it does in the result.
    """
    found: dict[str, str | None] = {}

    def look_up(relative: str) -> str | None:
        if relative not in found:
            places = [root / relative for root in roots if not Path(relative).is_absolute()] + [Path(relative)]
            if Path(relative).suffix in VIDEO_ENDINGS:
                places += [place.with_suffix(ending) for place in places for ending in VIDEO_ENDINGS]
            found[relative] = next((str(place) for place in places if place.is_file()), None)
        return found[relative]

    absent = set()
    for sample in samples:
        media = []
        for place, item in enumerate(sample.media):
            if item.path is None:
                media.append(item)
                continue
            others = clips(sample) if clips and place == 0 else []
            for candidate in (item, *others):
                if (path := look_up(candidate.path)) is not None:
                    media.append(replace(candidate, path=path))
                    break
            else:
                absent.add(str(roots[0] / item.path))
                media.append(replace(item, path=str(roots[0] / item.path)))
        sample.media = tuple(media)
    return sorted(absent)


def load_benchmark(
    args: Namespace,
    names: tuple[str, ...],
    *,
    hint: str,
    source: str,
    official: Callable[[dict[str, Any]], dict[str, Any] | list[dict[str, Any]]] | None = None,
    sample_id: Callable[[dict[str, Any]], str] | None = None,
) -> list[Sample]:
    """Samples of a benchmark's annotation file, in the toolkit shape or, through `official`, in its release's own.

    official: one row of the release -> one row (or several) of the toolkit shape (see `release_rows`).
    Raises AnnotationError naming file, line, field and remedy.
    """
    path = find_annotations(args.data_dir, names, args.annotations, hint)
    samples = []
    for row in read_rows(path):
        rows: list[dict[str, Any]] = [row]
        if not ("problem" in row and "solution" in row):
            if official is None:
                raise AnnotationError(f"{path}:{row['_line']}: needs the fields problem and solution. {hint}")
            rows = release_rows(official, row, path, hint)
        for item in rows:
            item = {"_line": row["_line"], "data_type": "video", "problem_type": "multiple choice", **item}
            samples.append(video_sample(item, path, source=source, sample_id=sample_id(item) if sample_id else ""))
    return samples


def keyed_entries(file: Path, hint: str) -> list[tuple[str, Any]]:
    """(key, value) of a release file that is one JSON object. Raises AnnotationError, with the hint, if it is missing."""
    if not file.is_file():
        raise AnnotationError(f"{file} is missing. {hint}")
    return [(key, value) for key, value in read_rows(file)[0].items() if key != "_line"]


def subtitle_folder(data_dir: str, names: tuple[str, ...], what: str) -> Path:
    """The first of these folders under data_dir that exists. Raises AnnotationError naming them all."""
    folders = [Path(data_dir) / name for name in names]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise AnnotationError(f"--subtitles: none of {', '.join(map(str, folders))} exists{what}")
    return folder


def put_srt_before(samples: list[Sample], folder: Path, stem_of: Callable[[Sample], str]) -> None:
    """Puts the spoken lines of folder/<stem>.srt before each question; a video without speech has no file."""
    for sample in samples:
        file = folder / f"{stem_of(sample)}.srt"
        if file.is_file():
            text = subtitle_text(file.read_text(encoding="utf-8", errors="replace"))
            sample.extra["before"] = f"The video's subtitles:\n{text}"


def subtitle_text(srt: str) -> str:
    """The spoken lines of an .srt file, without numbers, times and markup."""
    lines = [re.sub(r"<[^>]+>", "", line).strip() for line in srt.splitlines()]
    return "\n".join(line for line in lines if line and not line.isdigit() and "-->" not in line)


def release_rows(
    official: Callable[[dict[str, Any]], dict[str, Any] | list[dict[str, Any]]],
    row: dict[str, Any],
    file: str | Path,
    hint: str,
) -> list[dict[str, Any]]:
    """A row of a release as rows of the toolkit shape. Raises AnnotationError when `official` cannot read it."""
    try:
        made = official(row)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, SyntaxError) as error:
        held = row if isinstance(row, dict) else {}
        where = f"{file}:{held['_line']}" if "_line" in held else file
        names = sorted(name for name in held if not name.startswith("_")) or type(row).__name__
        raise AnnotationError(
            f"{where}: neither the toolkit layout (problem, solution, path) nor the release's: "
            f"{type(error).__name__} {error}; it has {names}. {hint}"
        ) from error
    return made if isinstance(made, list) else [made]


def video_sample(row: dict[str, Any], file: str | Path, *, source: str, sample_id: str = "") -> Sample:
    """`toolkit_sample` of a question about a video. Raises AnnotationError for a row that names none."""
    if not row.get("path"):
        raise AnnotationError(f"{file}:{row.get('_line', 0)}: field 'path' is missing or empty: no video to ask about")
    return toolkit_sample(row, file, source=source, sample_id=str(sample_id or ""))


def field_of(sample: Sample, name: str) -> Any:
    """A field of `extra` that a program cannot do without. Raises AnnotationError naming file, line and field."""
    if sample.extra.get(name) is None:
        raise AnnotationError(f"{sample.file}:{sample.line}: field {name!r} is missing")
    return sample.extra[name]


def choice_row(
    question: str, options: list[str], gold: int | str, path: str, *, by_letter: bool = False, **fields: Any
) -> dict[str, Any]:
    """A multiple-choice row of the toolkit shape. gold is an index, an option's text or a letter.

    by_letter: gold is a letter, also where an option's text is one (options "C", "A", gold "A": the first).
    """
    if isinstance(gold, int):
        right = letter(gold)
    elif gold in options and not by_letter:
        right = letter(options.index(gold))
    else:
        right = str(gold).strip()
    return {"problem": question, "options": lettered(options), "solution": right, "path": path, **fields}


def split_lettered(text: str) -> tuple[str, list[str]]:
    """Question and options of a text whose last lines are "(A) x" / "A. x".

    >>> split_lettered("Who?\\n(A) a cat\\n(B) a dog")
    ('Who?', ['a cat', 'a dog'])
    """
    found = list(re.finditer(r"^\s*\(?([A-Z])[.):]\s*(.*)$", text, re.MULTILINE))
    if not found:
        return text.strip(), []
    return text[: found[0].start()].strip(), [match[2].strip() for match in found]
