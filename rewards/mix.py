"""From parts to one reward (RULES section 3), and DAPO's soft penalty for overlong responses."""

from __future__ import annotations

import math


def check_weights(accuracy_weight: float, format_weight: float) -> None:
    """Raises ValueError unless both are >= 0 and sum to 1 (within 1e-6)."""
    for name, weight in (("accuracy_weight", accuracy_weight), ("format_weight", format_weight)):
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"--{name} must be >= 0, got {weight}")
    if abs(accuracy_weight + format_weight - 1) > 1e-6:
        raise ValueError(
            f"--accuracy_weight + --format_weight must be 1, got {accuracy_weight} + {format_weight} = "
            f"{accuracy_weight + format_weight}"
        )


def overall(accuracy: float, format: float, accuracy_weight: float = 0.9, format_weight: float = 0.1) -> float:
    """accuracy_weight * accuracy + format_weight * format."""
    return accuracy_weight * accuracy + format_weight * format


def overlong_penalty(length: int, max_length: int, buffer: int) -> float:
    """DAPO's soft punishment (arXiv 2503.14476, equation 13): 0 up to L - C tokens, then linear, -1 beyond L.

    >>> [overlong_penalty(n, 100, 20) for n in (80, 90, 100, 101)]
    [0.0, -0.5, -1.0, -1.0]
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"--overlong_buffer must be between 1 and the maximum length {max_length}, got {buffer}")
    if length <= max_length - buffer:
        return 0.0
    if length > max_length:
        return -1.0
    return (max_length - buffer - length) / buffer
