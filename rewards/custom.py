"""A user's own reward: `--reward my_rewards.py:function --reward_args '{"scale": 2}'`.

    def function(response, ground_truth, extra, scale=1.0): ...        # one response -> float or dict
    def function(responses, ground_truths, extras, scale=1.0): ...     # a batch -> list of floats or dicts

A float is the accuracy; a dict may give accuracy, format (else the tags decide), status, extracted. `extra` holds the
sample's own fields and `problem_type`, `question`, `options`.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ONE = ("response", "ground_truth", "extra")
MANY = ("responses", "ground_truths", "extras")


@dataclass(frozen=True)
class CustomReward:
    """A checked function; `batch` says which of the two signatures it has."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    batch: bool

    def __call__(self, rows: list[tuple[Any, Any, dict[str, Any]]]) -> list[dict[str, Any]]:
        """Parts of (response, ground_truth, extra) rows in order. Raises ValueError for a wrong return value."""
        if self.batch:
            columns = [list(column) for column in zip(*rows)]
            results = self.function(*columns, **self.arguments)
            if not isinstance(results, (list, tuple)) or len(results) != len(rows):
                raise ValueError(f"--reward must return a list of {len(rows)} results, got {type(results).__name__}")
        else:
            results = [self.function(*row, **self.arguments) for row in rows]
        return [parts(result) for result in results]


def parts(result: Any) -> dict[str, Any]:
    """{"accuracy", "format" (None: not given), "status", "extracted"}. Raises ValueError for anything not finite in [0, 1]."""
    given = dict(result) if isinstance(result, dict) else {"accuracy": result}
    unknown = set(given) - {"accuracy", "format", "status", "extracted"}
    if unknown or "accuracy" not in given:
        raise ValueError(f"--reward must return a number or a dict with accuracy, got {result!r:.200}")
    for name in ("accuracy", "format"):
        value = given.get(name)
        if name == "format" and value is None:
            continue
        number = isinstance(value, (int, float)) and math.isfinite(value)
        if not number or not 0 <= value <= 1:
            raise ValueError(f"--reward returned {name} = {value!r:.100}, it must be a finite number in [0, 1]")
        given[name] = float(value)
    extracted = given.get("extracted")
    return {
        "accuracy": given["accuracy"],
        "format": given.get("format"),
        "status": str(given.get("status", "ok")),
        "extracted": None if extracted is None else str(extracted),
    }


def load_reward(spec: str, arguments: str | None = None) -> CustomReward:
    """The function of `path.py:name`, its signature checked. Raises ValueError naming the flag and the remedy."""
    path, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier():
        raise ValueError(f"--reward must be path.py:function, got {spec!r}")
    if not Path(path).is_file():
        raise ValueError(f"--reward {spec}: no file {path}")
    try:
        given = json.loads(arguments) if arguments else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"--reward_args must be a JSON object, got {arguments} ({error})") from error
    if not isinstance(given, dict):
        raise ValueError(f"--reward_args must be a JSON object, got {arguments}")
    module_spec = importlib.util.spec_from_file_location(f"custom_reward_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (SyntaxError, ImportError, NameError, AttributeError, OSError) as error:
        raise ValueError(f"--reward {spec}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--reward {spec}: {path} has no function {name}")
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"--reward {spec}: {name} must be a plain function, not async")
    names = list(inspect.signature(function).parameters)
    if tuple(names[:3]) not in (ONE, MANY):
        raise ValueError(
            f"--reward {spec}: the first parameters must be ({', '.join(ONE)}) or, for a batch, ({', '.join(MANY)}); "
            f"got ({', '.join(names[:3])})"
        )
    try:
        inspect.signature(function).bind(None, None, None, **given)
    except TypeError as error:
        raise ValueError(f"--reward_args {arguments} do not fit {spec}: {error}") from error
    return CustomReward(function, given, tuple(names[:3]) == MANY)
