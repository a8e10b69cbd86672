"""Questions without media: a stream to train on, and a fixed set that shows whether the model can still read afterwards.

The two share no fact and no sum. The fixed set (ability_rows) does not depend on a run's seed; it asks what the language
model may know from before: capitals, opposites, kinds of things, sums, comparisons.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from scripts.real_model.questions import Asker, boolean, row

ABILITY_SEED, ABILITY_SUMS = 2024, 60
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Germany": "Berlin",
    "Russia": "Moscow", "China": "Beijing", "Greece": "Athens", "Canada": "Ottawa", "Peru": "Lima", "Cuba": "Havana",
    "Norway": "Oslo", "Sweden": "Stockholm", "Poland": "Warsaw", "Austria": "Vienna", "Ireland": "Dublin",
    "Portugal": "Lisbon", "Kenya": "Nairobi", "Thailand": "Bangkok",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "up": "down", "light": "dark", "happy": "sad", "open": "closed",
    "early": "late", "high": "low", "hard": "soft", "full": "empty", "old": "young", "rich": "poor", "strong": "weak",
    "wet": "dry", "near": "far", "thick": "thin", "loud": "quiet", "clean": "dirty", "first": "last",
}  # fmt: skip
KINDS = {
    "an animal": ("dog", "horse", "rabbit", "tiger", "goat", "mouse", "sheep", "wolf"),
    "a fruit": ("apple", "banana", "grape", "pear", "peach", "lemon", "cherry", "plum"),
    "a tool": ("hammer", "saw", "drill", "wrench", "axe", "shovel", "chisel", "pliers"),
    "a country": ("France", "Brazil", "India", "Mexico", "Chile", "Nepal", "Kenya", "Norway"),
}


def _facts(ask: Asker, fixed: bool) -> list[tuple[str, dict[str, Any]]]:
    """Every second fact: the even ones to train on, the odd ones for the fixed set."""
    made = []

    def mine(items) -> list:
        return list(items)[1 if fixed else 0 :: 2]

    for country, city in mine(CAPITALS.items()):
        wrong = [other for other in CAPITALS.values() if other != city]
        made.append(
            (
                "capital",
                ask.choice(f"What is the capital of {country}?", city, wrong, f"The capital of {country} is {city}."),
            )
        )
    for word, other in mine(OPPOSITES.items()):
        wrong = [w for pair in OPPOSITES.items() for w in pair if w not in (word, other)]
        made.append(
            (
                "opposite",
                ask.choice(f'What is the opposite of "{word}"?', other, wrong, f"The opposite of {word} is {other}."),
            )
        )
    for kind, words in KINDS.items():
        for word in mine(words):
            wrong = [w for other, listed in KINDS.items() if other != kind for w in listed]
            made.append(("kind", ask.choice(f"Which of these is {kind}?", word, wrong, f"The {word} is {kind}.")))
    return made  # fmt: skip


def _sums(rng: np.random.Generator, fixed: bool, n: int) -> list[tuple[str, dict[str, Any]]]:
    """n sums, differences and comparisons, each pair of numbers once; 60 pairs are kept for the fixed set."""
    every = [(a, b) for a in range(2, 26) for b in range(a + 1, 26)]
    mixed = np.random.default_rng(ABILITY_SEED).permutation(len(every)).tolist()
    pairs = [every[i] for i in (mixed[:ABILITY_SUMS] if fixed else mixed[ABILITY_SUMS:])]
    made = []
    chosen = rng.permutation(len(pairs))[:n].tolist()
    turned = rng.permutation(len(chosen)) % 2 == 0
    for place, number in enumerate(chosen):
        a, b = pairs[number][:: -1 if turned[place] else 1]
        if place % 3 == 0:
            made.append(("sum", row(f"What is {a} + {b}?", str(a + b), "numerical", f"{a} + {b} = {a + b}.")))
        elif place % 3 == 1:
            a, b = max(a, b), min(a, b)
            made.append(("difference", row(f"What is {a} - {b}?", str(a - b), "numerical", f"{a} - {b} = {a - b}.")))
        else:
            more = "more" if a > b else "less"
            made.append(("larger", boolean(f"Is {a} larger than {b}?", a > b, f"{a} is {more} than {b}.")))
    return made


def _rows(made: list[tuple[str, dict[str, Any]]], prefix: str) -> list[dict[str, Any]]:
    return [
        {"problem_id": f"{prefix}-{i:05d}", **found, "data_type": "text", "data_source": f"text/{template}"}
        for i, (template, found) in enumerate(made)
    ]


def text_rows(seed: int, n: int) -> list[dict[str, Any]]:
    """n training rows, facts and sums mixed two to one; every fact comes once before one comes again."""
    ask = Asker(seed, "train", 10)
    made: list[tuple[str, dict[str, Any]]] = []
    while len(made) < n:
        facts = _facts(ask, fixed=False)
        turn = facts + _sums(ask.rng, False, len(facts) // 2)
        made += [turn[i] for i in ask.rng.permutation(len(turn)).tolist()]
    return _rows(made[:n], "text")


def ability_rows() -> list[dict[str, Any]]:
    """The fixed set: 36 facts and 60 sums, the same for every run."""
    ask = Asker(ABILITY_SEED, "train", 11)
    return _rows(_facts(ask, fixed=True) + _sums(ask.rng, True, ABILITY_SUMS), "ability")
