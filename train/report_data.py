"""What the training report reads: rows, sample rollouts, run.json and held-out results of a run folder.

Files may be torn by a kill, edited, or hold what a model wrote: nothing about their values is taken for granted.
Importable without torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Points = list[tuple[float, float]]  # (step, value), finite


@dataclass
class RunFiles:
    """What was found in a run folder; `notes` says what could not be read."""

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_run(folder: Path, before: Path, after: Path) -> RunFiles:
    run = RunFiles(folder)
    run.rows = _read_lines(folder / "metrics.jsonl", run.notes)
    run.rollouts = _read_lines(folder / "rollouts.jsonl", run.notes)
    if (folder / "validation.jsonl").exists():
        run.validation = _read_lines(folder / "validation.jsonl", run.notes)
    run.info = _read_object(folder / "run.json", run.notes)
    run.before, run.after = (read_result(path, run.notes) for path in (before, after))
    return run


def result_file(folder: Path, name: str) -> Path:
    """Where a run keeps the result "before" or "after": <name>.json, else what evaluate/playground.py wrote below it."""
    plain = folder / f"{name}.json"
    return plain if plain.exists() else folder / name / "results.json"


def read_result(path: Path, notes: list[str]) -> dict[str, Any]:
    """A held-out result as {"overall": line, "per_type": {type: line}, "blind": line}, a line being {"n", "accuracy",
    "ci95": [low, high], "parsed", "accuracy_among_parsed", "majority"}; such a file itself, or a results.json of
    evaluate/playground.py. What the latter has per type only is averaged over its questions for the whole."""
    found = _read_object(path, notes)
    if "metrics" not in found:
        return found
    types = {name: _line(value) for name, value in as_dict(as_dict(found.get("breakdown")).get("problem_type")).items()}
    whole = _line(as_dict(found["metrics"]).get("accuracy"))
    for key in ("parsed", "majority"):
        if types and all(number(line.get(key)) is not None and number(line.get("n")) for line in types.values()):
            n = sum(line["n"] for line in types.values())
            whole[key] = sum(line["n"] * line[key] for line in types.values()) / n
    if whole.get("parsed") and number(whole.get("accuracy")) is not None:
        whole["accuracy_among_parsed"] = whole["accuracy"] / whole["parsed"]
    blind = _line(as_dict(found["metrics"]).get("accuracy_blind"))
    return {"overall": whole, "per_type": types, "blind": blind if number(blind["accuracy"]) is not None else {}}


def _line(value: Any) -> dict[str, Any]:
    value = as_dict(value)
    return {
        "n": value.get("n"),
        "accuracy": value.get("value"),
        "ci95": [value.get("low"), value.get("high")],
        "parsed": value.get("parsed"),
        "accuracy_among_parsed": value.get("among_parsed"),
        "majority": value.get("majority"),
    }


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Rows that are objects with a step, in order of steps."""
    if not path.exists():
        notes.append(f"{path.name} is missing")
        return []
    rows, bad = [], 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and number(row.get("step")) is not None:
                rows.append(row)
            else:
                bad += 1
    if bad:
        notes.append(f"{bad} line{'s' * (bad > 1)} of {path.name} could not be read")
    return sorted(rows, key=lambda row: row["step"])


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name} could not be read")
        return {}
    return value


def number(value: Any) -> float | None:
    """A finite number, or None for anything else that a file may hold in its place."""
    if isinstance(value, (int, float)) and abs(value) < 1e300:
        return value
    return None


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def points(rows: list[dict[str, Any]], name: str) -> Points:
    return [(row["step"], row[name]) for row in rows if number(row.get(name)) is not None]
