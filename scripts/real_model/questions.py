"""Questions, captions and short reasoning in words about the scenes, as rows of the project's dataset format.

Every row carries `offline_output`: "<think>what is seen, and what follows</think><answer>…</answer>", the form that
data/prompts.py asks for; captions and their prompt stand without thinking. Options are shuffled, letters dealt evenly.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from scripts.playground_clips import Deck
from scripts.real_model.scenes import COLOURS, DIRECTIONS, HELD_OUT, SHAPES, Scene, Thing

LETTERS = "ABCD"
CAPTION = "Describe what happens, in order."
STILL_CAPTION = "Describe the picture."
NUMBERS = ("no", "one", "two", "three", "four", "five")
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
Row = dict[str, Any]


class Asker:
    """Makes rows of one split: options come from its generator, letters and yes / no targets from its decks."""

    def __init__(self, seed: int, split: str, stream: int) -> None:
        self.rng = np.random.default_rng([seed, 200 + stream])
        self.unseen = split == "unseen"
        self.letters = {n: Deck(self.rng, LETTERS[:n]) for n in range(2, len(LETTERS) + 1)}  # by number of options
        self.sides = Deck(self.rng, (True, False))

    def choice(self, question: str, right: str, wrong: list[str], thought: str) -> Row:
        """Multiple choice with up to four options, the right one at the letter that is dealt."""
        wrong = [wrong[i] for i in self.rng.permutation(len(wrong))[:3].tolist()]
        place = LETTERS.index(self.letters[len(wrong) + 1].deal())
        options = [*wrong[:place], right, *wrong[place:]]
        listed = [f"{letter}. {text}" for letter, text in zip(LETTERS, options)]
        return row(question, LETTERS[place], "multiple choice", thought) | {"options": listed}

    def other_names(self, scene: Scene, n: int) -> list[str]:
        """n names that are not in the scene, drawn as the scene's own are."""
        seen = {thing.colour for thing in scene.things} | {thing.later_colour for thing in scene.things}
        free = [c for c in COLOURS if c not in seen]
        colours = [free[i] for i in self.rng.permutation(len(free))[:n].tolist()]
        names = []
        for colour in colours:
            allowed = [shape for shape in SHAPES if ((colour, shape) in HELD_OUT) == self.unseen]
            names.append(f"{colour} {allowed[int(self.rng.integers(len(allowed)))]}")
        return names


def row(question: str, answer: str, problem_type: str, thought: str) -> Row:
    shown = f"<think>{thought}</think><answer>{answer}</answer>"
    return {"problem": question, "answer": answer, "problem_type": problem_type, "offline_output": shown}


def boolean(question: str, truth: bool, thought: str) -> Row:
    return row(question, "Yes" if truth else "No", "boolean", thought)


def place(x: float, y: float) -> str:
    """ "at the top left", "in the middle" … of the frame."""
    rows = "top" if y < 0.38 else "bottom" if y > 0.62 else ""
    columns = "left" if x < 0.38 else "right" if x > 0.62 else ""
    words = f"{rows} {columns}".strip()
    return f"at the {words}" if words else "in the middle"


def seconds(value: float) -> str:
    return f"{value:.1f}"


def listing(names: list[str]) -> str:
    """["a red ring", "a blue cross"] -> "a red ring and a blue cross"."""
    named = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def moves(thing: Thing, direction: str, until_s: float) -> str:
    return (
        f"The {thing.name} starts {place(*thing.at(0))} and ends {place(*thing.at(until_s))}, so it moves {direction}."
    )


# ---- what a scene of each kind is asked ---------------------------------------------------------------------------------


def _move(scene: Scene, ask: Asker) -> list[tuple[str, Row]]:
    first, direction = scene.things[0], scene.facts["direction"]
    seen = moves(first, direction, scene.duration_s)
    wrong = [thing.name for thing in scene.things[1:]]
    wrong += ask.other_names(scene, 3 - len(wrong))
    others = [d for d in DIRECTIONS if d != direction]
    claimed = direction if ask.sides.deal() else str(ask.rng.choice(others))
    return [
        ("direction", ask.choice(f"Which way does the {first.name} move?", direction, others, seen)),
        ("mover", ask.choice("Which shape moves?", first.name, wrong, seen)),
        ("moves", boolean(f"Does the {first.name} move {claimed}?", claimed == direction, seen)),
    ]  # fmt: skip


def _speed(scene: Scene, ask: Asker) -> list[tuple[str, Row]]:
    fast, slow = scene.things
    seen = f"Both move {scene.facts['direction']}. The {fast.name} covers a long way and the {slow.name} a short way, "
    seen += f"so the {fast.name} is faster."
    a, b = (fast, slow) if ask.sides.deal() else (slow, fast)
    return [
        ("faster", ask.choice("Which shape moves faster?", fast.name, [slow.name, *ask.other_names(scene, 2)], seen)),
        ("compare speed", boolean(f"Does the {a.name} move faster than the {b.name}?", a is fast, seen)),
    ]


def _order(scene: Scene, ask: Asker) -> list[tuple[str, Row]]:
    names = [thing.name for thing in scene.things]
    seen = f"First comes the {names[0]}, then the {names[1]}, then the {names[2]}."
    which = int(ask.rng.integers(3))
    word = ("first", "second", "last")[which]
    wrong = [name for name in names if name != names[which]] + ask.other_names(scene, 1)
    i, j = ask.rng.permutation(3)[:2].tolist()
    if (i < j) != ask.sides.deal():
        i, j = j, i
    question = f"Does the {names[i]} appear before the {names[j]}?"
    return [
        ("order", ask.choice(f"Which shape appears {word}?", names[which], wrong, seen)),
        ("before", boolean(question, i < j, seen)),
    ]


def _span(scene: Scene, ask: Asker) -> list[tuple[str, Row]]:
    first, second = scene.things
    end = "is still there at the end" if scene.facts["remains"] else f"is gone after {seconds(first.to_s)} seconds"
    seen = f"The {first.name} appears at {seconds(first.from_s)} seconds and {end}."
    answer = json.dumps({"time": [first.from_s, first.to_s]})
    return [
        ("when", row(f"When is the {first.name} visible?", answer, "temporal grounding", seen)),
        ("remains", boolean(f"Is the {first.name} still visible at the end?", scene.facts["remains"], seen)),
        ("always", ask.choice("Which shape is visible all the time?", second.name, [first.name, *ask.other_names(scene, 2)],
                              f"The {second.name} is there from the start to the end. {seen}")),
    ]  # fmt: skip


def _count(scene: Scene, ask: Asker) -> list[tuple[str, Row]]:
    coming = sorted(scene.things, key=lambda thing: thing.from_s)
    gone = [thing.name for thing in scene.things if thing.to_s < scene.duration_s]
    total, end = scene.facts["all"], scene.facts["end"]
    seen = f"There {'is' if total == 1 else 'are'} {listing([thing.name for thing in coming])}. That makes {total}."
    left = f" {NUMBERS[len(gone)].capitalize()} of them {'goes' if len(gone) == 1 else 'go'} away: {total} - {len(gone)} = {end}."
    some = int(ask.rng.integers(1, 5))
    compared = f"{seen} {total} is {'more' if total > some else 'not more'} than {some}."
    return [
        ("count all", row("How many different shapes appear in all?", str(total), "numerical", seen)),
        ("count end", row("How many shapes are there at the end?", str(end), "numerical", seen + left)),
        ("more than", boolean(f"Do more than {NUMBERS[some]} shapes appear in all?", total > some, compared)),
    ]  # fmt: skip


def _hide(scene: Scene, ask: Asker) -> list[tuple[str, Row]]:
    (thing,), facts = scene.things, scene.facts
    end = {
        "out": f"comes out on the {facts['where']}",
        "back": f"comes back on the {facts['where']}",
        "behind": "does not come out again",
    }
    seen = f"The {thing.name} goes behind the wall from the {facts['from']} and {end[facts['end']]}."
    answers = {"left": "left of the wall", "right": "right of the wall", "behind": "behind the wall"}
    right = answers[facts["where"]]
    wrong = [text for text in answers.values() if text != right]
    return [
        ("where", ask.choice(f"Where is the {thing.name} at the end?", right, wrong, seen)),
        ("comes out", boolean(f"Is the {thing.name} visible again at the end?", facts["end"] != "behind", seen)),
    ]  # fmt: skip


def _change(scene: Scene, ask: Asker) -> list[tuple[str, Row]]:
    first, second = scene.things
    last = first.later_colour or first.colour
    what = f"turns {last}" if scene.facts["changes"] else f"stays {last}"
    seen = f"The {first.name} {what}. The {second.name} stays as it is."
    wrong = [c for c in COLOURS if c not in (last, first.colour)]
    mixed = [wrong[i] for i in ask.rng.permutation(len(wrong)).tolist()]
    wrong = ([first.colour] if first.colour != last else []) + mixed
    return [
        ("end colour", ask.choice(f"What colour is the {first.colour} {first.shape} at the end?", last, wrong[:3], seen)),
        ("changes", boolean("Does any shape change its colour?", scene.facts["changes"], seen)),
    ]  # fmt: skip


def _bump(scene: Scene, ask: Asker) -> list[tuple[str, Row]]:
    (first, second), cause = scene.things, scene.facts["cause"]
    one, other = f"The {first.name}", f"The {second.name}"
    story = {
        "hit": f"{one} moves until it touches the {second.name}. {other} moves away then, so it was hit.",
        "alone": f"{one} stops before it touches the {second.name}. {other} moves away all the same, so it moves by itself.",
        "none": f"{one} stops before it touches the {second.name}. {other} does not move.",
    }
    answers = {"hit": f"the {first.name} hits it", "alone": "it moves by itself", "none": "it does not move"}
    seen = story[cause]
    wrong = [text for name, text in answers.items() if name != cause]
    return [
        ("cause", ask.choice(f"Why does the {second.name} move?", answers[cause], wrong, seen)),
        ("touches", boolean(f"Does the {first.name} touch the {second.name}?", cause == "hit", seen)),
        ("moves after", boolean(f"Does the {second.name} move?", cause != "none", seen)),
    ]  # fmt: skip


def _still(scene: Scene, ask: Asker) -> list[tuple[str, Row]]:
    where = ", ".join(f"the {thing.name} is {place(*thing.at(0))}" for thing in scene.things)
    seen = f"{where[0].upper()}{where[1:]}."
    names = [thing.name for thing in scene.things]
    left = min(scene.things, key=lambda thing: thing.at(0)[0])
    absent = ask.other_names(scene, 1)[0]
    asked, there = (str(ask.rng.choice(names)), True) if ask.sides.deal() else (absent, False)
    others = [name for name in names if name != left.name]
    leftmost = f"{seen} The {left.name} is farthest to the left."
    return [
        ("still count", row("How many shapes are there?", str(len(names)), "numerical", f"{seen} That makes {len(names)}.")),
        ("leftmost", ask.choice("Which shape is farthest to the left?", left.name, [*others, absent], leftmost)),
        ("present", boolean(f"Is there {listing([asked])}?", there, seen)),
    ]  # fmt: skip


ASK: dict[str, Callable[[Scene, Asker], list[tuple[str, Row]]]] = {
    "move": _move,
    "speed": _speed,
    "order": _order,
    "span": _span,
    "count": _count,
    "hide": _hide,
    "change": _change,
    "bump": _bump,
    "still": _still,
}


def caption(scene: Scene) -> str:
    """All there is to see, in order; words written over the picture are not part of it."""
    things, facts = scene.things, scene.facts
    match scene.kind:
        case "move":
            text = moves(things[0], facts["direction"], scene.duration_s)
            return " ".join([text, *(f"The {t.name} stays {place(*t.at(0))}." for t in things[1:])])
        case "speed":
            fast, slow = things
            return (
                f"The {fast.name} moves {facts['direction']} fast. The {slow.name} moves {facts['direction']} slowly."
            )
        case "order":
            come = ", then ".join(f"{listing([t.name])} {place(*t.at(0))}" for t in things)
            return (
                f"{come[0].upper()}{come[1:]}. {'All stay.' if facts['stay'] else 'Each goes when the next one comes.'}"
            )
        case "span":
            first, second = things
            span = f"from {seconds(first.from_s)} to {seconds(first.to_s)} seconds"
            text = f"The {first.name} {place(*first.at(0))} is there {span}."
            return f"{text} The {second.name} {place(*second.at(0))} is there all the time."
        case "count":
            come = sorted(things, key=lambda t: t.from_s)
            gone = [t.name for t in come if t.to_s < scene.duration_s]
            text = f"{listing([t.name for t in come])} {'appears' if len(come) == 1 else 'appear'}."
            return f"{text[0].upper()}{text[1:]}" + (
                f" The {' and the '.join(gone)} {'goes' if len(gone) == 1 else 'go'} away." if gone else ""
            )
        case "hide":
            end = {"out": f"comes out on the {facts['where']}", "back": f"comes back on the {facts['where']}"}
            last = end.get(facts["end"], "stays there")
            return f"The {things[0].name} goes behind the wall from the {facts['from']} and {last}."
        case "change":
            first, second = things
            what = f"turns {first.later_colour}" if facts["changes"] else "keeps its colour"
            return f"The {first.name} {place(*first.at(0))} {what}. The {second.name} stays {place(*second.at(0))}."
        case "bump":
            first, second = things
            ends = {
                "hit": f"hits the {second.name}, which moves away",
                "none": f"stops before the {second.name}, which stays",
            }
            ends["alone"] = f"stops before the {second.name}, which moves away by itself"
            return f"The {first.name} {ends[facts['cause']]}."
    text = ", ".join(f"{listing([t.name])} {place(*t.at(0))}" for t in things)
    return f"{text[0].upper()}{text[1:]}."


# ---- rows of a split ----------------------------------------------------------------------------------------------------


def _media(scene: Scene) -> Row:
    key, kind = ("images", "image") if scene.is_still else ("videos", "video")
    return {"data_type": kind, key: [scene.file], "blind": scene.blind_file}


def question_rows(seed: int, split: str, scenes: list[Scene]) -> list[Row]:
    """All questions about the scenes, in a random order."""
    ask = Asker(seed, split, {"train": 0, "heldout": 1, "unseen": 2}[split])
    rows = [
        found | _media(scene) | {"data_source": f"real/{template.replace(' ', '_')}"}
        for scene in scenes
        for template, found in ASK[scene.kind](scene, ask)
    ]
    rows = [rows[i] for i in ask.rng.permutation(len(rows)).tolist()]
    return [{"problem_id": f"{split}-{i:05d}", **found} for i, found in enumerate(rows)]


def caption_rows(scenes: list[Scene]) -> list[Row]:
    """One open-ended row per scene, answered without thinking."""
    rows = []
    for scene in scenes:
        text = caption(scene)
        made = row(STILL_CAPTION if scene.is_still else CAPTION, text, "open-ended", "")
        made |= {"offline_output": f"<answer>{text}</answer>", "format_mode": "direct", "data_source": "real/caption"}
        rows.append({"problem_id": f"caption-{scene.name}", **made, **_media(scene)})
    return rows


def blind_row(made: Row, split: str) -> Row:
    """The same question about the grey file, under an id of its own: heldout-00012 -> heldout_blind-00012."""
    blind = made | {"problem_id": made["problem_id"].replace(split, f"{split}_blind", 1)}
    for key in ("videos", "images"):
        if key in blind:
            blind[key] = [made["blind"]]
    return blind


def swapped_rows(rows: list[Row], seed: int) -> list[Row]:
    """The rows (of a scene each), everyone with another scene's media of the same kind: how well they are answered without
    seeing what they are about. The same for the same seed. Raises ValueError when a kind has one scene alone.

    The videos go round one cycle through all of them in a random order, and so do the stills.
    """
    rng = np.random.default_rng([seed, 300])
    swapped = list(rows)
    for key in ("videos", "images"):
        cycle = rng.permutation([i for i, made in enumerate(rows) if key in made]).tolist()
        if len(cycle) == 1:
            raise ValueError(f"{rows[cycle[0]]['problem_id']}: no other row has {key} to swap with")
        for here, there in zip(cycle, [*cycle[1:], *cycle[:1]]):
            made = rows[here]
            name = made["problem_id"].replace("caption", "caption_swapped", 1)
            source = f"{made['data_source']}_swapped"
            swapped[here] = made | {"problem_id": name, "data_source": source, key: rows[there][key]}
    return swapped
