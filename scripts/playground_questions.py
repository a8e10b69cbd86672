"""Questions about the playground's scenes, with answers known from the scene, in the project's dataset format.

The scenes come from decks, so within one template every answer is equally frequent: a model that does not look gets one
multiple choice question in four right, one boolean in two. The options of a template stand in a fixed order, as in a
questionnaire: the tiny model need not learn to look letters up, it has to learn to look at the clip.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from scripts.playground_clips import COLOURS, DIRECTIONS, MAX_COUNT, SHAPES, Deck, Scene, blind_file

LETTERS = "ABCD"
COUNTS = [str(n) for n in range(1, MAX_COUNT + 1)]
WORD_KINDS: dict[str, list[str]] = {
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "direction": list(DIRECTIONS),
    "number": ["one", "two", "three", "four"],
}
# What a scene of each kind is asked.
VIDEO_TEMPLATES: dict[str, tuple[str, ...]] = {
    "move": ("direction", "sideways", "moving colour"),
    "appear": ("when", "stays"),
    "order": ("first", "never"),
    "count": ("count", "count choice", "many"),
    "change": ("end colour", "changes"),
}
STILL_TEMPLATES: dict[str, tuple[str, ...]] = {
    "one": ("still colour", "upper half"),
    "count": ("still count",),
}
TEXT_TEMPLATES = ("word kind", "colour word")
CAPTION = "Describe what happens."


def _choice(question: str, right: str, options: list[str] | tuple[str, ...]) -> dict[str, Any]:
    letter = LETTERS[list(options).index(right)]
    return {"problem": question, "answer": letter, "problem_type": "multiple choice", "options": list(options)}


def _boolean(question: str, truth: bool) -> dict[str, Any]:
    return {"problem": question, "answer": "Yes" if truth else "No", "problem_type": "boolean"}


def ask(scene: Scene, template: str) -> dict[str, Any]:
    """The row's problem, answer, problem_type and options. Raises ValueError for an unknown template."""
    things = scene.things
    match template:
        case "direction":
            return _choice("Which way does the shape move?", scene.direction, list(DIRECTIONS))
        case "sideways":
            return _boolean("Does the shape move sideways?", scene.direction in ("left", "right"))
        case "moving colour" | "still colour":
            return _choice("What colour is the shape?", things[0].colour, list(COLOURS))
        case "when":
            question = f"When is the {things[0].colour} {things[0].shape} visible?"
            answer = json.dumps({"time": [things[0].from_s, things[0].to_s]})
            return {"problem": question, "answer": answer, "problem_type": "temporal grounding"}
        case "stays":
            return _choice("Which colour is there all the time?", things[1].colour, list(COLOURS))
        case "first":
            return _choice("Which colour comes first?", things[0].colour, list(COLOURS))
        case "never":
            (missing,) = set(COLOURS) - {thing.colour for thing in things}
            return _choice("Which colour does not appear?", missing, list(COLOURS))
        case "count" | "still count":
            answer = str(len(things))
            return {"problem": "How many shapes are there?", "answer": answer, "problem_type": "numerical"}
        case "count choice":
            return _choice("How many shapes are there?", str(len(things)), COUNTS)
        case "many":
            return _boolean("Are there more than two shapes?", len(things) > 2)
        case "end colour":
            right = things[0].later_colour or things[0].colour
            return _choice("What colour is the shape at the end?", right, list(COLOURS))
        case "changes":
            return _boolean("Does the shape change its colour?", bool(things[0].later_colour))
        case "upper half":
            return _boolean("Is the shape in the upper half?", things[0].start[1] < 0.5)
    raise ValueError(f"unknown template {template!r}")


def ask_text(template: str, kind: str, rng: np.random.Generator) -> dict[str, Any]:
    """A question without media about a word of this kind (a key of WORD_KINDS)."""
    word = str(rng.choice(WORD_KINDS[kind]))
    if template == "word kind":
        return _choice(f"What kind of word is {word}?", kind, list(WORD_KINDS))
    return _boolean(f"Is {word} a colour?", kind == "colour")


def _media(scene: Scene) -> dict[str, Any]:
    key, kind = ("images", "image") if scene.is_still else ("videos", "video")
    return {"data_type": kind, key: [scene.file]}


def make_rows(seed: int, split: str, scenes: list[Scene], n_text: int) -> list[dict[str, Any]]:
    """The split's dataset rows in a random order; `videos` / `images` are paths relative to the playground folder."""
    rng = np.random.default_rng([seed, {"train": 10, "heldout": 11}[split]])
    rows = []
    for scene in scenes:
        for template in (STILL_TEMPLATES if scene.is_still else VIDEO_TEMPLATES)[scene.kind]:
            source = {"data_source": f"playground/{template.replace(' ', '_')}", "blind": blind_file(scene)}
            rows.append(ask(scene, template) | _media(scene) | source)
    others = [kind for kind in WORD_KINDS if kind != "colour"]
    decks = {"word kind": Deck(rng, WORD_KINDS), "colour word": Deck(rng, ["colour"] * len(others) + others)}
    for i in range(n_text):
        template = TEXT_TEMPLATES[i % len(TEXT_TEMPLATES)]
        row = ask_text(template, decks[template].deal(), rng)
        rows.append(row | {"data_type": "text", "data_source": f"playground/{template.replace(' ', '_')}"})
    rows = [rows[i] for i in rng.permutation(len(rows)).tolist()]
    # format_mode: the answer alone is asked for, whatever --style says; the tiny model has no words to think in.
    return [{"problem_id": f"{split}-{i:05d}", **row, "format_mode": "direct"} for i, row in enumerate(rows)]


def blind_row(row: dict[str, Any]) -> dict[str, Any]:
    """The same question about the grey twin of its clip or still (text rows stay as they are)."""
    blind = {key: value for key, value in row.items() if key != "blind"}
    for key in ("videos", "images"):
        if key in blind:
            blind[key] = [row["blind"]]
    return blind


def answer_text(answer: str) -> str:
    """The response that the direct prompt asks for."""
    return f"<answer>{answer}</answer>"


def _place(x: float, y: float) -> str:
    """ "top left", or "left", "top" … for a place in the middle of the other axis."""
    words = ["" if 0.35 < y < 0.65 else "top" if y < 0.5 else "bottom"]
    words += ["" if 0.35 < x < 0.65 else "left" if x < 0.5 else "right"]
    return " ".join(word for word in words if word)


def describe(scene: Scene) -> str:
    """One sentence that says all there is to see: what the warm start learns to look for."""
    first = scene.things[0]
    if scene.kind == "move":
        return (
            f"{first.colour} {first.shape} from {_place(*first.start)} to {_place(*first.end)}, moves {scene.direction}"
        )
    things = [f"{thing.colour} {thing.shape} {_place(*thing.start)}" for thing in scene.things]
    if scene.kind == "appear":
        return f"{things[0]} from {first.from_s} to {first.to_s}, {things[1]} all the time"
    if scene.kind == "order":
        return ", then ".join(things)
    if scene.kind == "change":
        return f"{things[0]} becomes {first.later_colour}" if first.later_colour else f"{things[0]} stays"
    pairs = zip(scene.things, things, strict=True)
    reading = sorted(pairs, key=lambda pair: (pair[0].start[1] > 0.5, pair[0].start[0]))
    return f"{len(things)}: " + ", ".join(name for _, name in reading)


def caption_rows(scenes: list[Scene]) -> list[dict[str, Any]]:
    """One open-ended row per scene: what the warm start learns to see from, beside the questions."""
    rows = []
    for scene in scenes:
        row = {"problem_id": f"caption-{scene.name}", "problem": CAPTION, "answer": describe(scene)}
        row |= {"problem_type": "open-ended", "data_source": "playground/caption", "format_mode": "direct"}
        rows.append(row | _media(scene))
    return rows
