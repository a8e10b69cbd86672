"""Reading and validating training and evaluation rows, and the order in which training sees them.

`load` checks every row before any heavy work starts: schema, problem type, options against gold, media files
present and not empty. It imports neither torch nor a video library. A row looks like
  {"problem": "What is shown? <video>", "answer": "B", "problem_type": "multiple choice", "options": ["A. ..", "B. .."],
   "videos": ["clips/1.mp4"], "data_type": "video"}
Fields it does not know are kept, flat, in Sample.extra.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data.prompts import order_media
from data.records import DATA_TYPES, Media, Sample, canonical_problem_type
from data.rows import MEDIA_FIELDS, BadRow, expand_files, media_of_row, read_rows, refuse_bytes

SHOWN_PROBLEMS = 20  # of a long list; the count is always given
ANSWER_TAGS = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)
# What --field_names may rename: our field -> the names looked for, first found wins.
FIELDS = {
    "problem": ("problem", "question", "prompt"),
    "answer": ("answer", "solution"),
    "problem_type": ("problem_type",),
    "data_type": ("data_type",),
    "options": ("options",),
    "problem_id": ("problem_id", "id"),
    "data_source": ("data_source",),
}
CONSUMED = {"has_offline_trajectory", "offline_output", "preprocessed_video"}


class BadDataset(ValueError):
    """Rows that cannot be used. `problems` are dicts {file, line, id, path, reason, remedy}, one per row."""

    def __init__(self, problems: list[dict[str, Any]]):
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        shown = [describe_problem(problem) for problem in self.problems[:SHOWN_PROBLEMS]]
        rest = len(self.problems) - len(shown)
        if rest:
            shown.append(f"... and {rest} more; --on_bad_sample skip goes on without them and lists them")
        return f"{len(self.problems)} unusable rows:\n  " + "\n  ".join(shown)


def describe_problem(problem: dict[str, Any]) -> str:
    return f"{problem['file']}:{problem['line']}: {problem['reason']}; {problem['remedy']}"


def load(
    files: list[str],
    *,
    media_dir: str | None = None,
    check_gold: Callable[[Sample], str | None] | None = None,
    on_bad_sample: str = "error",
    failed_file: str | None = None,
    field_names: dict[str, str] | None = None,
) -> list[Sample]:
    """Every usable row of `files` as a Sample, in file order; ids are unique.

    files: paths, globs, save_to_disk folders or `org/name@split`, each with an optional `::WEIGHT` (see file_weights).
    media_dir: root of relative media paths; without it they are relative to the folder of their data file.
    check_gold: returns None, or why the gold answer of a sample cannot be read (rewards.check_gold).
    on_bad_sample: "error" raises BadDataset naming every bad row; "skip" leaves them out and lists them in
    `failed_file` (one JSON object per line, added to what is there; without a file they are printed as warnings).
    field_names: our field -> the file's, e.g. {"problem": "question", "videos": "clip"}.
    Raises BadDataset, or ValueError for a file that cannot be read at all or for wrong arguments.
    """
    if on_bad_sample not in ("error", "skip"):
        raise ValueError(f"--on_bad_sample must be error or skip, got {on_bad_sample!r}")
    names, media_fields = resolve_field_names(field_names or {})
    samples: list[Sample] = []
    problems: list[dict[str, Any]] = []
    ignored_artifacts = 0
    for file in expand_files(files):
        root = media_dir if media_dir is not None else (os.path.dirname(file) if os.path.exists(file) else None)
        for line, row in read_rows(file):
            try:
                if isinstance(row, BadRow):
                    raise row
                ignored_artifacts += "preprocessed_video" in row
                sample = _sample(row, file, line, root, names, media_fields)
                reason = check_gold(sample) if check_gold else None
                if reason:
                    raise BadRow(f"{names['answer'][0]}: {reason}", "correct the answer or its problem_type")
                samples.append(sample)
            except BadRow as problem:
                row_id = "" if isinstance(row, BadRow) else str(_first(row, names["problem_id"], ("", ""))[1])
                problems.append(_problem(file, line, row_id, problem))
    if ignored_artifacts:
        warnings.warn(
            f"{ignored_artifacts} rows name a preprocessed_video of another suite: ignored; "
            "data/preprocess.py makes a cache that knows its settings",
            stacklevel=2,
        )
    samples, missing = _check_media_files(samples)
    problems += missing
    if problems:
        places = {file: place for place, file in enumerate(expand_files(files))}
        problems.sort(key=lambda problem: (places[problem["file"]], problem["line"]))
        if on_bad_sample == "error":
            raise BadDataset(problems)
        report_failures(problems, failed_file)
    if not samples:
        raise ValueError(f"--data {' '.join(files)}: no usable row")
    _make_ids_unique(samples)
    return samples


def parse_field_names(text: str | None) -> dict[str, str]:
    """The JSON object of --field_names. Raises ValueError."""
    try:
        renamed = json.loads(text) if text else {}
    except ValueError as error:
        raise ValueError(f'--field_names {text}: is not JSON ({error}); write \'{{"videos": "clip"}}\'') from None
    if not isinstance(renamed, dict) or not all(isinstance(name, str) for name in renamed.values()):
        raise ValueError(f'--field_names {text}: must be an object of names; write \'{{"videos": "clip"}}\'')
    return renamed


def resolve_field_names(renamed: dict[str, str]) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """(our field -> the names looked for in a row, media field of a row -> kind), with --field_names applied.

    Raises ValueError for a field that does not exist.
    """
    known = {**FIELDS, **dict.fromkeys(MEDIA_FIELDS, ())}
    for name in renamed:
        if name not in known:
            raise ValueError(f"--field_names {name}: no such field; known: {', '.join(known)}")
    names = {name: ((renamed[name],) if name in renamed else choices) for name, choices in FIELDS.items()}
    media_fields = {renamed.get(name, name): kind for name, kind in MEDIA_FIELDS.items()}
    return names, media_fields


def _first(row: dict[str, Any], names: tuple[str, ...], default=("", None)) -> tuple[str, Any]:
    """(name, value) of the first of `names` the row has with a value."""
    for name in names:
        if row.get(name) is not None:
            return name, row[name]
    return default


def _sample(row, file: str, line: int, root: str | None, names, media_fields) -> Sample:
    """One row -> Sample. Raises BadRow."""
    refuse_bytes(row, *(_first(row, choices)[0] for choices in names.values()))
    field, question = _first(row, names["problem"])
    if not isinstance(question, str) or not question.strip():
        raise BadRow(f"{names['problem'][0]}: missing or empty", "give the question as text")
    used = {field}
    field, answer = _first(row, names["answer"])
    used.add(field)
    if isinstance(answer, str):
        tagged = ANSWER_TAGS.fullmatch(answer)
        answer = tagged.group(1).strip() if tagged else answer
    if answer is None or (isinstance(answer, (str, list, dict)) and not answer) or str(answer).strip() == "":
        raise BadRow(f"{names['answer'][0]}: missing or empty", "give the gold answer")
    field, name = _first(row, names["problem_type"])
    if name is None:
        raise BadRow("problem_type: missing", "add it, e.g. 'multiple choice', 'numerical', 'temporal grounding'")
    used.add(field)
    try:
        problem_type = canonical_problem_type(name)
    except ValueError as error:
        raise BadRow(f"problem_type: {error}", "use one of the known names") from None
    media, media_used = media_of_row(row, root, media_fields, (file, line))
    try:
        media = order_media(question, media)
    except ValueError as error:
        raise BadRow(f"{names['problem'][0]}: {error}", "correct the question or the media lists") from None
    field, data_type = _first(row, names["data_type"])
    used.add(field)
    data_type = _data_type(data_type, media)
    field, options = _first(row, names["options"])
    used.add(field)
    options = _options(options, answer, problem_type)
    field, row_id = _first(row, names["problem_id"])
    _, source = _first(row, names["data_source"])
    demonstration = row.get("offline_output") if row.get("has_offline_trajectory", True) else None
    if row.get("has_offline_trajectory") and not demonstration:
        raise BadRow("offline_output: missing, but has_offline_trajectory is set", "give it or clear the flag")
    if demonstration is not None and not isinstance(demonstration, str):
        raise BadRow("offline_output: is not text", "give the response as one string")
    used |= media_used | CONSUMED
    return Sample(
        id=str(row_id) if row_id is not None else f"{Path(file).stem}:{line}",
        question=question,
        answer=answer,
        problem_type=problem_type,
        data_type=data_type,
        media=media,
        options=options,
        offline_output=demonstration or None,
        source=str(source) if source is not None else Path(file).stem,
        extra={name: value for name, value in row.items() if name not in used},
        file=file,
        line=line,
    )


def _data_type(given: Any, media: tuple[Media, ...]) -> str:
    kinds = {item.kind for item in media}
    actual = "mixed" if len(kinds) == 2 else (kinds.pop() if kinds else "text")
    if given is None:
        return actual
    name = str(given).strip().lower()
    if name not in DATA_TYPES:
        raise BadRow(f"data_type: unknown {given!r}", f"use one of {', '.join(DATA_TYPES)}")
    if name != actual and not (actual == "mixed" and name in ("video", "image")):
        have = f"{actual} media" if media else "no media"
        raise BadRow(f"data_type: says {name}, but the row has {have}", "correct it, or the videos / images lists")
    return actual


def _options(options: Any, answer: Any, problem_type: str) -> tuple[str, ...]:
    """Options as texts; with a gold letter it must be the letter of one of them."""
    if options is None:
        return ()
    if isinstance(options, dict):
        options = [f"{letter}. {text}" for letter, text in options.items() if text is not None]
    if not isinstance(options, (list, tuple)) or not all(isinstance(text, (str, int, float)) for text in options):
        raise BadRow("options: is not a list of texts", 'write ["A. ...", "B. ..."]')
    options = tuple(str(text) for text in options)
    if problem_type == "multiple choice" and options and isinstance(answer, str):
        letter = answer.strip().strip("().").upper()
        if len(letter) == 1 and letter.isalpha():
            own = [match.group(1).upper() for text in options if (match := re.match(r"\s*\(?([A-Za-z])[.):]", text))]
            letters = own if len(own) == len(options) else [chr(ord("A") + place) for place in range(len(options))]
            if letter not in letters:
                raise BadRow(f"answer: gold {letter} is none of the options {', '.join(letters)}", "correct either")
    return options


def _check_media_files(samples: list[Sample]) -> tuple[list[Sample], list[dict[str, Any]]]:
    """Splits off the samples with a media file that is missing or empty; each distinct file is looked at once."""
    listed = sorted({path for sample in samples for path in _paths(sample)})
    with ThreadPoolExecutor(16) as pool:  # on a network disk a look costs a round trip, not work
        found = dict(zip(listed, pool.map(_file_problem, listed)))
    good, problems = [], []
    for sample in samples:
        bad = next((path for path in _paths(sample) if found[path]), None)
        if bad is None:
            good.append(sample)
        else:
            field = "videos / images"
            row = BadRow(f"{field}: {bad} {found[bad]}", "correct the path, or --media_dir", bad)
            problems.append(_problem(sample.file, sample.line, sample.id, row))
    return good, problems


def _paths(sample: Sample) -> list[str]:
    return [path for media in sample.media for path in (media.path, *(media.frames or ())) if path]


def _file_problem(path: str) -> str | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be reached ({error.strerror})"
    except ValueError as error:  # a NUL byte in the path
        return f"is not a path ({error})"
    if os.path.isdir(path):
        return "is a folder"
    return None if status.st_size else "is empty (0 bytes)"


def _problem(file: str, line: int, row_id: str, row: BadRow) -> dict[str, Any]:
    return {"file": file, "line": line, "id": row_id, "path": row.path, "reason": row.reason, "remedy": row.remedy}


def report_failures(problems: list[dict[str, Any]], failed_file: str | None) -> None:
    """Adds skipped rows to `failed_file` (JSON lines), or prints them as one warning if there is no file."""
    if failed_file is None:
        shown = "\n  ".join(describe_problem(problem) for problem in problems)
        warnings.warn(f"{len(problems)} rows skipped (--failed_file FILE keeps the list):\n  {shown}", stacklevel=3)
        return
    Path(failed_file).parent.mkdir(parents=True, exist_ok=True)
    with open(failed_file, "a", encoding="utf-8") as out:
        for problem in problems:
            out.write(json.dumps({"schema_version": 1, **problem}, ensure_ascii=False) + "\n")
    warnings.warn(f"{len(problems)} rows skipped, listed in {failed_file}", stacklevel=3)


def _make_ids_unique(samples: list[Sample]) -> None:
    """A second sample of the same id gets its file and line appended (data sets number their rows from 0 each)."""
    seen: set[str] = set()
    again: list[str] = []
    for sample in samples:
        if sample.id in seen:
            again.append(sample.id)
            sample.id = f"{sample.id}@{sample.file}:{sample.line}"
        seen.add(sample.id)
    if again:
        text = f"{len(again)} rows share an id with an earlier one (first: {again[0]}); theirs got @file:line"
        warnings.warn(text, stacklevel=3)


def file_weights(files: list[str]) -> dict[str, float] | None:
    """File -> sampling weight as written in `--data a.jsonl::3 b.jsonl::1`; None if no entry has one.

    Raises ValueError when only some have one: a default would silently mean something.
    """
    weights = expand_files(files)
    given = [weight for weight in weights.values() if weight is not None]
    if not given:
        return None
    if len(given) < len(weights):
        bare = ", ".join(file for file, weight in weights.items() if weight is None)
        raise ValueError(f"--data: no ::WEIGHT for {bare}; give every entry one, or none")
    return dict(weights)


class SampleOrder:
    """An endless order over samples that is a pure function of the position, so that resuming means keeping an int.

    One epoch has len(samples) places. Without weights every sample comes once per epoch. weights: file (or source) ->
    the share of places it gets, however many rows it has; each file goes round its own shuffled rows without repeating
    one before all were seen. curriculum: a field of the samples (extra) to sort each epoch by, ascending, "-field"
    descending, equal values shuffled. Raises ValueError for weights or fields the samples do not have.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        seed: int,
        shuffle: bool = True,
        weights: dict[str, float] | None = None,
        curriculum: str | None = None,
    ):
        if not samples:
            raise ValueError("SampleOrder needs at least one sample")
        self.samples, self.seed, self.shuffle = samples, seed, shuffle
        self.groups = self._weighted_groups(weights) if weights else None
        self.levels = self._levels(curriculum) if curriculum else None
        self.descending = bool(curriculum) and curriculum.startswith("-")
        self._epoch: tuple[int, list[int]] = (-1, [])
        self._rounds: dict[tuple[int, int], list[int]] = {}

    def __len__(self) -> int:
        """Places in one epoch."""
        return len(self.samples)

    def take(self, position: int, n: int) -> tuple[list[Sample], int]:
        """(the n samples from `position` on, the position after them)."""
        if position < 0:
            raise ValueError(f"position must be >= 0, got {position}")
        taken = []
        for place in range(position, position + n):
            epoch, offset = divmod(place, len(self.samples))
            if self._epoch[0] != epoch:
                self._epoch = (epoch, self._order(epoch))
            taken.append(self.samples[self._epoch[1][offset]])
        return taken, position + n

    def _order(self, epoch: int) -> list[int]:
        order = self._weighted_epoch(epoch) if self.groups else list(range(len(self.samples)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)  # the same on every platform and Python version
        if self.levels is not None:
            order.sort(key=self.levels.__getitem__, reverse=self.descending)
        return order

    def _levels(self, curriculum: str) -> list[float]:
        field = curriculum.lstrip("-")
        levels = []
        for sample in self.samples:
            value = sample.extra.get(field)
            try:
                level = math.nan if isinstance(value, bool) else float(value)  # a CSV file has its numbers as text
            except (TypeError, ValueError):
                level = math.nan
            if not math.isfinite(level):  # NaN, which Parquet may hold, has no place in an order
                raise ValueError(f"--curriculum {field}: {sample.file}:{sample.line} has {value!r}; give it a number")
            levels.append(level)
        return levels

    def _weighted_groups(self, weights: dict[str, float]) -> list[tuple[list[int], float]]:
        members: dict[str, list[int]] = {name: [] for name in weights}
        for index, sample in enumerate(self.samples):
            name = sample.file if sample.file in weights else sample.source
            if name not in weights:
                raise ValueError(f"no weight for {sample.file} (source {sample.source}); give every file one")
            members[name].append(index)
        empty = [name for name, indices in members.items() if not indices]
        if empty:
            raise ValueError(f"weights name {', '.join(empty)}, of which there are no samples")
        if not all(weight > 0 for weight in weights.values()):
            raise ValueError("weights must be > 0")
        total = sum(weights.values())
        return [(members[name], weight / total) for name, weight in weights.items()]

    def _weighted_epoch(self, epoch: int) -> list[int]:
        """Each group's places of this epoch: cumulative shares, rounded, so that none is gained or lost."""
        order: list[int] = []
        size = len(self.samples)
        edges = [0.0, *itertools.accumulate(share for _, share in self.groups)]
        edges[-1] = 1.0
        bounds = [round(edge * size) for edge in edges]
        for number, (members, _) in enumerate(self.groups):
            quota = bounds[number + 1] - bounds[number]
            for place in range(epoch * quota, (epoch + 1) * quota):
                turn, offset = divmod(place, len(members))
                if (number, turn) not in self._rounds:
                    rows = list(members)
                    if self.shuffle:
                        random.Random(f"{self.seed}/{number}/{turn}").shuffle(rows)
                    self._rounds = {key: kept for key, kept in self._rounds.items() if key[0] != number}
                    self._rounds[number, turn] = rows
                order.append(self._rounds[number, turn][offset])
        return order


def report(samples: Sequence[Sample], durations_s: Sequence[float] = ()) -> str:
    """Counts per problem type, modality and source, and a duration histogram if durations are known (seconds)."""
    lines = [f"{len(samples)} samples, {sum(len(sample.media) for sample in samples)} media"]
    for title, counts in (
        ("problem type", Counter(sample.problem_type for sample in samples)),
        ("modality", Counter(sample.data_type for sample in samples)),
        ("source", Counter(sample.source for sample in samples)),
    ):
        lines.append(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    demonstrations = sum(sample.offline_output is not None for sample in samples)
    if demonstrations:
        lines.append(f"demonstrations: {demonstrations}")
    if not durations_s:
        durations_s = [
            float(value)
            for sample in samples
            if isinstance(value := sample.extra.get("duration"), (int, float)) and not isinstance(value, bool)
        ]
    if durations_s:
        lines.append(duration_histogram(durations_s))
    return "\n".join(lines)


def duration_histogram(durations_s: Sequence[float]) -> str:
    """How many durations (seconds) lie in each of the usual ranges, on one line."""
    edges = [10, 30, 60, 120, 300, 900, 3600]
    counts = Counter(bisect.bisect_right(edges, seconds) for seconds in durations_s)
    names = [f"< {edges[0]} s", *(f"{a}-{b} s" for a, b in itertools.pairwise(edges)), f">= {edges[-1]} s"]
    return "duration: " + ", ".join(f"{names[place]} {counts[place]}" for place in sorted(counts))
