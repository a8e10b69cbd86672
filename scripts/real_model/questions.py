"""Questions, captions and short reasoning in words about the scenes, as rows of the project's dataset format.

Every row carries `offline_output`: "<think>what is seen, and what follows</think><answer>…</answer>", the form that
data/prompts.py asks for; captions and their prompt stand without thinking. Options are shuffled, letters dealt evenly.

Nothing is to be gained without looking: what a policy could learn of a template by its answers alone, reinforcement learning
pays for. So `balanced` drops rows until every wording has its answers equally often (the idea of VQA v2's balanced pairs,
Goyal et al. 2017, arXiv 1612.00837, section 3), and the scenes are drawn so that few have to go.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from scripts.playground_clips import Deck
from scripts.real_model.scenes import COLOURS, DIRECTIONS, HELD_OUT, SHAPES, Scene, Thing

LETTERS = "ABCD"
CAPTION = "Describe what happens, in order."
STILL_CAPTION = "Describe the picture."
NUMBERS = ("no", "one", "two", "three", "four", "five")
# "Do more than … shapes appear?": the thresholds of four scenes with 1, 2 … 5 shapes. Over these twenty scenes every threshold
# is exceeded as often as not, and all are as near to the truth as that allows.
THRESHOLDS = {1: (1, 1, 1, 2), 2: (1, 1, 1, 2), 3: (2, 2, 3, 3), 4: (3, 4, 4, 4), 5: (3, 4, 4, 4)}
NAME = re.compile(rf"\b(?:an? )?(?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(SHAPES)})\b")
COLOUR = re.compile(rf"\b(?:{'|'.join(COLOURS)})\b")
Row = dict[str, Any]


class Asker:
    """Makes rows of one split: options come from its generator, letters and yes / no targets from its decks."""

    def __init__(self, seed: int, split: str, stream: int) -> None:
        self.rng = np.random.default_rng([seed, 200 + stream])
        self.unseen = split == "unseen"
        self.letters = {n: Deck(self.rng, LETTERS[:n]) for n in range(2, len(LETTERS) + 1)}  # by number of options
        self.decks: dict[str, Deck] = {}

    def deal(self, name: str, cards: Iterable) -> Any:
        return self.decks.setdefault(name, Deck(self.rng, cards)).deal()

    def choice(self, question: str, right: str, wrong: list[str], thought: str) -> Row:
        """Multiple choice with up to four options, the right one at the letter that is dealt (question_rows deals anew, once
        it is known which rows stay)."""
        wrong = [wrong[i] for i in self.rng.permutation(len(wrong))[:3].tolist()]
        listed = [f"{letter}. {text}" for letter, text in zip(LETTERS, [right, *wrong])]
        made = row(question, "A", "multiple choice", thought) | {"options": listed}
        return at_letter(made, self.letters[len(listed)].deal())

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


def option_texts(made: Row) -> dict[str, str]:
    """Letter -> text of a row's options; empty without options."""
    return dict(option.split(". ", 1) for option in made.get("options", ()))


def at_letter(made: Row, letter: str) -> Row:
    """The multiple-choice row with its right option at that letter, the wrong ones in the order they had."""
    texts = option_texts(made)
    right = texts.pop(made["answer"])
    mixed = list(texts.values())
    mixed.insert(LETTERS.index(letter), right)
    shown = made["offline_output"].removesuffix(f"<answer>{made['answer']}</answer>") + f"<answer>{letter}</answer>"
    listed = [f"{place}. {text}" for place, text in zip(LETTERS, mixed)]
    return made | {"answer": letter, "options": listed, "offline_output": shown}


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
    claimed = ask.deal(f"claimed {direction}", [direction] * len(others) + others)  # every claim as often true as false
    return [
        ("direction", ask.choice(f"Which way does the {first.name} move?", direction, others, seen)),
        ("mover", ask.choice("Which shape moves?", first.name, wrong, seen)),
        ("moves", boolean(f"Does the {first.name} move {claimed}?", claimed == direction, seen)),
    ]  # fmt: skip


def _speed(scene: Scene, ask: Asker) -> list[tuple[str, Row]]:
    fast, slow = scene.things
    seen = f"Both move {scene.facts['direction']}. The {fast.name} covers a long way and the {slow.name} a short way, "
    seen += f"so the {fast.name} is faster."
    a, b = (fast, slow) if ask.deal("compare speed", (True, False)) else (slow, fast)
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
    if (i < j) != ask.deal("before", (True, False)):
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
    some = ask.deal(f"more than, of {total}", THRESHOLDS[total])
    compared = f"{seen} {total} is {'more' if total > some else 'not more'} than {some}."
    at_end = [("count end", row("How many shapes are there at the end?", str(end), "numerical", seen + left))]
    return [
        ("count all", row("How many different shapes appear in all?", str(total), "numerical", seen)),
        *(at_end if total > 1 else []),  # one alone stays: asked about it, "1" would be the most frequent answer
        ("more than", boolean(f"Do more than {NUMBERS[some]} shapes appear in all?", total > some, compared)),
    ]


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
    # Any option could be that shape's colour, and those that are seen in the scene are among them in either case.
    wrong = [second.colour] + ([first.colour] if first.colour != last else [])
    known = [c for c in COLOURS if c not in (last, *wrong) and (ask.unseen or (c, first.shape) not in HELD_OUT)]
    wrong += [known[i] for i in ask.rng.permutation(len(known))[: 3 - len(wrong)].tolist()]
    return [
        ("end colour", ask.choice(f"What colour is the {first.shape} at the end?", last, wrong, seen)),
        ("changes", boolean("Does any shape change its colour?", scene.facts["changes"], seen)),
    ]  # fmt: skip


def _bump(scene: Scene, ask: Asker) -> list[tuple[str, Row]]:
    (first, second), cause = scene.things, scene.facts["cause"]
    one, other = f"The {first.name}", f"The {second.name}"
    story = {
        "hit": f"{one} moves until it touches the {second.name}. {other} moves away then, so it was hit.",
        "stands": f"{one} moves until it touches the {second.name}. {other} does not move.",
        "alone": f"{one} stops before it touches the {second.name}. {other} moves away all the same, so it moves by itself.",
        "none": f"{one} stops before it touches the {second.name}. {other} does not move.",
    }
    hit, alone, stays = f"the {first.name} hits it", "it moves by itself", "it does not move"
    right = {"hit": hit, "alone": alone}.get(cause, stays)
    wrong = [text for text in (hit, alone, stays) if text != right]
    seen = story[cause]
    return [
        ("cause", ask.choice(f"Why does the {second.name} move?", right, wrong, seen)),
        ("touches", boolean(f"Does the {first.name} touch the {second.name}?", cause in ("hit", "stands"), seen)),
        ("moves after", boolean(f"Does the {second.name} move?", cause in ("hit", "alone"), seen)),
    ]  # fmt: skip


def _still(scene: Scene, ask: Asker) -> list[tuple[str, Row]]:
    where = ", ".join(f"the {thing.name} is {place(*thing.at(0))}" for thing in scene.things)
    seen = f"{where[0].upper()}{where[1:]}."
    names = [thing.name for thing in scene.things]
    left = min(scene.things, key=lambda thing: thing.at(0)[0])
    absent = ask.other_names(scene, 1)[0]
    there = ask.deal("present", (True, False))
    asked = str(ask.rng.choice(names)) if there else absent
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
                "stands": f"touches the {second.name}, which stays",
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


def unnamed(text: str) -> str:
    """The text with its names taken out: "Is there a red ring?" -> "Is there thing?", "blue" -> "colour"."""
    return COLOUR.sub("colour", NAME.sub("thing", text))


def answer_text(made: Row) -> str:
    """The answer without names; of multiple choice the right option's text instead of its letter."""
    return unnamed(option_texts(made).get(made["answer"], made["answer"]))


def fixed_answers(made: Row) -> tuple[str, ...]:
    """The answers, without names, that the row's question can have: Yes and No, or options that differ without their names.
    Empty where they are open."""
    if made["problem_type"] == "boolean":
        return ("No", "Yes")
    texts = {unnamed(text) for text in option_texts(made).values()}
    return tuple(sorted(texts)) if len(texts) == len(made.get("options", ())) else ()


def interleaved(lists: list[list], rng: np.random.Generator) -> list:
    """One list of all of them, in a random order that keeps the order of each."""
    turns = [n for n, listed in enumerate(lists) for _ in listed]
    taken = [iter(listed) for listed in lists]
    return [next(taken[turns[i]]) for i in rng.permutation(len(turns)).tolist()]


def balanced(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """The rows in a random order, without those that make an answer of a wording more frequent than another one.

    A wording is a question without names. The rows of a wording are put together at random, one of each fixed answer; what is
    left over goes, but for one incomplete set per template. Sets stay together: answers are equally frequent (one more or
    less) over a template, over each of its wordings, and up to any place in the order that is returned.
    """
    templates: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for i in rng.permutation(len(rows)).tolist():
        templates[rows[i]["data_source"]][unnamed(rows[i]["problem"])].append(rows[i])
    order: list[list[Row]] = []
    for wordings in templates.values():
        sets, parts = [], []
        for listed in wordings.values():
            answers = fixed_answers(listed[0])
            stacks = [[made for made in listed if answer_text(made) == answer] for answer in answers] or [listed]
            whole = min(map(len, stacks))
            sets.append(list(zip(*stacks)))
            parts += [[stack[whole] for stack in stacks if len(stack) > whole]] if answers else []
        chosen = interleaved(sets, rng) + [part for part in parts if part][:1]
        order.append([group[i] for group in chosen for i in rng.permutation(len(group)).tolist()])
    return interleaved(order, rng)


def deal_letters(rows: list[Row]) -> list[Row]:
    """The rows, the right options of multiple choice at letters dealt evenly over all, over each template, each of its wordings
    and each fixed answer (one more or less): round after round through the letters, over rows sorted by these. Within
    them the order stays, so that the first of a template have them nearly evenly, too."""
    chosen = [i for i, made in enumerate(rows) if "options" in made]
    chosen.sort(key=lambda i: (rows[i]["data_source"], unnamed(rows[i]["problem"]), answer_text(rows[i])))
    dealt, turns = list(rows), dict.fromkeys(range(2, len(LETTERS) + 1), 0)
    for i in chosen:
        n = len(rows[i]["options"])
        dealt[i] = at_letter(rows[i], LETTERS[turns[n] % n])
        turns[n] += 1
    return dealt


def question_rows(seed: int, split: str, scenes: list[Scene]) -> list[Row]:
    """The questions about the scenes, balanced, in a random order."""
    ask = Asker(seed, split, {"train": 0, "heldout": 1, "unseen": 2}[split])
    rows = [
        found | _media(scene) | {"data_source": f"real/{template.replace(' ', '_')}"}
        for scene in scenes
        for template, found in ASK[scene.kind](scene, ask)
    ]
    rows = deal_letters(balanced(rows, ask.rng))
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
