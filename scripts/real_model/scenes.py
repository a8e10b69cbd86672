"""Scenes for a model that can read and reason: several things, occlusion, order, speed, collisions; drawn and rendered.

A scene is drawn from a seeded generator before anything is rendered, so that questions know the truth. Frame size and rate
are always the same; length, ground and words written over the picture are drawn independently of what happens. Some pairs
of colour and shape (HELD_OUT) occur in no clip of "train" and "heldout", and only they occur in "unseen".
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from scripts.playground_clips import DIRECTIONS, GREY, Deck, draw_ground, half_seconds, write_media

SIDE = 112  # pixels; 4 x 4 merged patches of 28
FPS = 8
DURATIONS_S = (4.0, 5.0, 6.0)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (30, 190, 50),
    "blue": (40, 70, 240),
    "yellow": (240, 220, 30),
    "purple": (150, 40, 200),
    "orange": (245, 130, 20),
    "white": (245, 245, 245),
    "cyan": (40, 215, 225),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
# One shape per colour that is never trained with it; every colour and every shape is trained with others.
HELD_OUT = frozenset((colour, SHAPES[i % len(SHAPES)]) for i, colour in enumerate(COLOURS))
WALL = (45, 45, 50)
CLIP_KINDS = ("move", "speed", "order", "span", "count", "hide", "change", "bump")
STILL_KINDS = ("still",)
SPLITS = ("train", "heldout", "unseen")
MAX_COUNT = 5
WORDS = (*(colour.upper() for colour in COLOURS), "LEFT", "RIGHT", "UP", "DOWN", "ONE", "TWO", "FOUR", "FIRST", "LAST")
WORD_SHARE = 0.35  # of clips and stills have a word written over them, true or not
Point = tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """A shape. `path`: (time_s, x, y) in order of time, places as shares of the frame, straight between them and still
    before and after. Visible in [from_s, to_s); of `later_colour` (if set) from change_s on."""

    colour: str
    shape: str
    path: tuple[tuple[float, float, float], ...]
    from_s: float
    to_s: float
    radius: float = 0.12
    later_colour: str = ""
    change_s: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def at(self, time_s: float) -> Point:
        """Where its centre is."""
        times, xs, ys = zip(*self.path)
        return float(np.interp(time_s, times, xs)), float(np.interp(time_s, times, ys))


@dataclass(frozen=True)
class Scene:
    """A clip (duration_s > 0) or a still (duration_s == 0). `facts`: what its kind decided, for the questions.

    Later things are drawn over earlier ones, the wall (left, top, right, bottom in shares) over all, then the word.
    """

    name: str
    kind: str
    duration_s: float
    things: tuple[Thing, ...]
    facts: dict[str, Any]
    wall: tuple[float, float, float, float] | None = None
    word: str = ""
    ground_seed: int = 0

    @property
    def is_still(self) -> bool:
        return self.duration_s == 0

    @property
    def file(self) -> str:
        return f"images/{self.name}.png" if self.is_still else f"clips/{self.name}.mp4"

    @property
    def blind_file(self) -> str:
        """Its grey twin, of the same length; one per scene, since evaluation drops questions that are exact duplicates."""
        return f"blind/{self.name}.{'png' if self.is_still else 'mp4'}"


# ---- drawing ----------------------------------------------------------------------------------------------------------


class SceneMaker:
    """Draws scenes of one split. What is asked about comes from decks, so that answers are equally frequent."""

    def __init__(self, seed: int, split: str) -> None:
        self.split = split
        self.rng = np.random.default_rng([seed, 100 + SPLITS.index(split)])
        self.decks: dict[str, Deck] = {}

    def deal(self, name: str, cards) -> Any:
        return self.decks.setdefault(name, Deck(self.rng, cards)).deal()

    def shows(self, colour: str, shape: str) -> bool:
        """Whether this split may show that pair."""
        return ((colour, shape) in HELD_OUT) == (self.split == "unseen")

    def pick(self, allowed: list[str]) -> str:
        return allowed[int(self.rng.integers(len(allowed)))]

    def shape_for(self, colour: str) -> str:
        """A shape that this split may show in that colour."""
        return self.pick([shape for shape in SHAPES if self.shows(colour, shape)])

    def names(self, n: int, first: str | None = None) -> list[tuple[str, str]]:
        """n (colour, shape) of different colours; the first colour from a deck unless given."""
        first = first or self.deal("colour", COLOURS)
        rest = [colour for colour in COLOURS if colour != first]
        colours = [first, *(rest[i] for i in self.rng.permutation(len(rest))[: n - 1].tolist())]
        return [(colour, self.shape_for(colour)) for colour in colours]

    def cells(self, n: int) -> list[Point]:
        """n different cells of a 3 x 3 grid, jittered, none nearer to the edge than a thing is wide."""
        centres = [(0.2 + 0.3 * (i % 3), 0.2 + 0.3 * (i // 3)) for i in self.rng.permutation(9)[:n].tolist()]
        return [(x + dx, y + dy) for (x, y), (dx, dy) in zip(centres, self.rng.uniform(-0.03, 0.03, (n, 2)).tolist())]

    def draw(self, name: str, kind: str) -> Scene:
        """The scene `name` of that kind. Raises ValueError for an unknown kind."""
        makers = {kind: getattr(self, f"_{kind}") for kind in CLIP_KINDS + STILL_KINDS}
        if kind not in makers:
            raise ValueError(f"unknown kind of scene {kind!r}; known: {', '.join(makers)}")
        duration_s = 0.0 if kind in STILL_KINDS else float(self.rng.choice(DURATIONS_S))
        things, facts, *wall = makers[kind](duration_s)
        word = str(self.rng.choice(WORDS)) if self.rng.random() < WORD_SHARE else ""
        seed = int(self.rng.integers(2**31))
        return Scene(name, kind, duration_s, tuple(things), facts, *wall, word=word, ground_seed=seed)

    def _move(self, duration_s: float):
        """One thing crosses the frame in its own band; up to two others stay in place beside it."""
        direction = self.deal("direction", DIRECTIONS)
        dx, dy = DIRECTIONS[direction]
        along = (0.15, 0.85) if dx + dy > 0 else (0.85, 0.15)
        bands = [0.2, 0.5, 0.8]
        band = bands[int(self.rng.integers(3))]
        others = [other for other in bands if other != band]
        names = self.names(1 + self.deal("bystanders", (0, 1, 2)))
        path = tuple((t, *((a, band) if dx else (band, a))) for t, a in zip((0.0, duration_s), along))
        things = [Thing(*names[0], path, 0.0, duration_s)]
        for named, other in zip(names[1:], others):
            place = float(self.rng.uniform(0.2, 0.8))
            things.append(still(named, (place, other) if dx else (other, place), 0.0, duration_s))
        return things, {"direction": direction}

    def _speed(self, duration_s: float):
        """Two things go the same way in two bands; one goes more than twice as far in the same time."""
        direction = self.deal("speed direction", DIRECTIONS)
        dx, dy = DIRECTIONS[direction]
        sign = dx + dy
        bands = [0.27, 0.73] if self.deal("fast band", (0, 1)) else [0.73, 0.27]
        things = []
        for named, band, way in zip(self.names(2), bands, (0.65, 0.25)):
            start = 0.5 - sign * (0.325 if way > 0.5 else float(self.rng.uniform(-0.1, 0.3)))
            path = tuple(
                (t, *((a, band) if dx else (band, a))) for t, a in ((0.0, start), (duration_s, start + sign * way))
            )
            things.append(Thing(*named, path, 0.0, duration_s))
        return things, {"direction": direction}

    def _order(self, duration_s: float):
        """Three things come one after another; either each goes when the next one comes, or all stay."""
        stay = self.deal("stay", (True, False))
        gap = round(duration_s / 3 * 2) / 2  # in half seconds
        starts = [0.0, gap, 2 * gap]
        ends = [duration_s] * 3 if stay else [gap, 2 * gap, duration_s]
        places = self.cells(3)
        things = [still(n, p, a, b) for n, p, a, b in zip(self.names(3), places, starts, ends)]
        return things, {"stay": stay}

    def _span(self, duration_s: float):
        """One thing is there for a part of the clip, another one all the time."""
        remains = self.deal("remains", (True, False))
        # From half a second to nearly all of it, a length half as often as one of half its size: were all equally frequent, one
        # long interval would be a good answer to everything. At 2 frames per second every half second is seen once.
        shares = 1 / np.arange(1, round(2 * duration_s))
        length_s = (1 + int(self.rng.choice(len(shares), p=shares / shares.sum()))) / 2
        from_s = duration_s - length_s if remains else half_seconds(self.rng, 0.0, duration_s - length_s - 0.5)
        first, second = self.names(2)
        a, b = self.cells(2)
        return [still(first, a, from_s, from_s + length_s), still(second, b, 0.0, duration_s)], {"remains": remains}

    def _count(self, duration_s: float):
        """n things in all, each from its own moment on; in half of the scenes some of several leave again, at least one
        stays."""
        n = self.deal("count", range(1, MAX_COUNT + 1))
        left = self.deal(f"left of {n}", [*range(1, n), *[0] * max(1, n - 1)])
        things = []
        for i, (named, place) in enumerate(zip(self.names(n), self.cells(n))):
            from_s = half_seconds(self.rng, 0.0, duration_s - 2.0) if i else 0.0
            to_s = half_seconds(self.rng, from_s + 1.0, duration_s - 1.0) if i < left else duration_s
            things.append(still(named, place, from_s, to_s))
        return things, {"all": n, "end": n - left}

    def _hide(self, duration_s: float):
        """A thing goes behind a wall from one side: it comes out on the other, comes back, or stays there."""
        ends = ("out", "back", "behind", "behind")  # seen again at the end: as often as not
        end, from_left = self.deal("hide", [(end, from_left) for end in ends for from_left in (True, False)])
        y = float(self.rng.uniform(0.35, 0.65))
        start, far = (0.14, 0.86) if from_left else (0.86, 0.14)
        middle = 0.4 * duration_s
        last = {"out": far, "back": start, "behind": 0.5}[end]
        path = ((0.0, start, y), (middle, 0.5, y), (0.6 * duration_s, 0.5, y), (0.95 * duration_s, last, y))
        side = {True: "left", False: "right"}
        where = {"out": side[not from_left], "back": side[from_left], "behind": "behind"}[end]
        thing = Thing(*self.names(1)[0], path, 0.0, duration_s)
        return [thing], {"end": end, "where": where, "from": side[from_left]}, (0.32, 0.12, 0.68, 0.88)

    def _change(self, duration_s: float):
        """A thing changes its colour in the middle, or does not; another one, of another shape, stays as it is."""
        changes = self.deal("changes", (True, False))
        shape, colour, later, other = self._colours_of_one_shape()
        place, elsewhere = self.cells(2)
        change_s = half_seconds(self.rng, duration_s / 2 - 0.5, duration_s / 2 + 0.5)
        new = {"later_colour": later, "change_s": change_s} if changes else {}
        thing = Thing(colour, shape, ((0.0, *place),), 0.0, duration_s, **new)
        second = (other, self.pick([s for s in SHAPES if s != shape and self.shows(other, s)]))
        return [thing, still(second, elsewhere, 0.0, duration_s)], {"changes": changes}

    def _colours_of_one_shape(self) -> tuple[str, str, str, str]:
        """(shape, its colour, a later one, another thing's): any of the three could be that shape's, so that a question about
        the shape does not tell them apart. In "unseen" a shape has one colour or two, so the other two are any that are
        not its own; the other thing's has another shape."""
        if self.split == "unseen":
            colour = self.deal("colour", COLOURS)
            shape = self.shape_for(colour)
            other = self.pick([c for c in COLOURS if not self.shows(c, shape)])
            return shape, colour, self.pick([c for c in COLOURS if c not in (colour, other)]), other
        shape = self.deal("recoloured", SHAPES)
        colours = [c for c in COLOURS if self.shows(c, shape)]
        colour, later, other = (colours[i] for i in self.rng.permutation(len(colours))[:3].tolist())
        return shape, colour, later, other

    def _bump(self, duration_s: float):
        """The first thing moves towards the second: touches it or stops short of it, and the second moves or does not, each
        as often as not whatever the other is."""
        cause = self.deal("cause", ("hit", "stands", "alone", "none"))
        to_right = self.deal("to right", (True, False))
        y = float(self.rng.uniform(0.3, 0.7))
        flip = (lambda x: x) if to_right else (lambda x: 1 - x)
        hit_s = half_seconds(self.rng, 1.5, duration_s - 2.0)
        reach = 0.32 if cause in ("hit", "stands") else 0.25
        first, second = self.names(2)
        mover = ((0.0, flip(0.12), y), (hit_s, flip(reach), y))
        rest = (flip(0.56), y)
        if cause == "hit":
            other = ((hit_s, *rest), (duration_s - 0.5, flip(0.86), y))
        elif cause == "alone":
            away = 0.14 if y > 0.5 else 0.86
            other = ((hit_s, *rest), (duration_s - 0.5, rest[0], away))
        else:
            other = ((0.0, *rest),)
        return [Thing(*first, mover, 0.0, duration_s), Thing(*second, other, 0.0, duration_s)], {"cause": cause}

    def _still(self, duration_s: float):
        n = self.deal("still count", (2, 3, 4))
        return [still(named, place, 0.0, 1.0) for named, place in zip(self.names(n), self.cells(n))], {"all": n}


def still(named: tuple[str, str], place: Point, from_s: float, to_s: float) -> Thing:
    """A thing that stays in its place."""
    return Thing(*named, ((0.0, *place),), from_s, to_s)


def draw_scenes(seed: int, split: str, n_clips: int, n_stills: int) -> list[Scene]:
    """The scenes of one split, clips first; a random order decides the names, so they carry no meaning."""
    maker = SceneMaker(seed, split)
    scenes = []
    for n, kinds, letter in ((n_clips, CLIP_KINDS, "v"), (n_stills, STILL_KINDS, "i")):
        kind_of = itertools.cycle(kinds)
        scenes += [
            maker.draw(f"{split}_{letter}{number:05d}", next(kind_of)) for number in maker.rng.permutation(n).tolist()
        ]
    return scenes


# ---- rendering --------------------------------------------------------------------------------------------------------


def covers(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """(H, W) bool: which pixels at offsets x, y from its centre the shape covers. Raises ValueError for another shape.

    The playground's shapes are its own: another cross, and a circle whose edge is rounded otherwise.
    """
    wide, high = np.abs(x), np.abs(y)
    far = np.hypot(x, y)
    match shape:
        case "circle":
            return far <= radius
        case "square":
            return np.maximum(wide, high) <= 0.88 * radius
        case "cross":
            return (np.minimum(wide, high) <= 0.33 * radius) & (np.maximum(wide, high) <= radius)
        case "triangle":
            return (y <= 0.8 * radius) & (y >= -radius + 1.9 * wide)
        case "ring":
            return (far <= radius) & (far >= 0.55 * radius)
        case "diamond":
            return wide + high <= 1.1 * radius
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def render(scene: Scene) -> np.ndarray:
    """(F, SIDE, SIDE, 3) uint8 frames of the scene at FPS; F = 1 for a still."""
    rng = np.random.default_rng(scene.ground_seed)
    base = draw_ground(rng, SIDE, SIDE, blotches=4, brightest=150, tint=12, grain=4)  # far from the colours of things
    ys, xs = (np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5) / SIDE
    n_frames = 1 if scene.is_still else round(scene.duration_s * FPS)
    frames = np.empty((n_frames, SIDE, SIDE, 3), np.uint8)
    written = _written(scene.word)
    for i in range(n_frames):
        frame, time_s = base.copy(), i / FPS
        for thing in scene.things:
            if thing.from_s <= time_s < thing.to_s:
                x, y = thing.at(time_s)
                changed = thing.later_colour and time_s >= thing.change_s
                colour = COLOURS[thing.later_colour if changed else thing.colour]
                frame[covers(thing.shape, xs - x, ys - y, thing.radius)] = colour
        if scene.wall:
            left, top, right, bottom = scene.wall
            frame[(xs >= left) & (xs < right) & (ys >= top) & (ys < bottom)] = WALL
        if written is not None:
            frame[written] = 12.0
        frames[i] = np.clip(frame, 0, 255)
    return frames


def _written(word: str) -> np.ndarray | None:
    """(SIDE, SIDE) bool: pixels of the word along the upper edge; None without a word."""
    if not word:
        return None
    page = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(page).text((3, 0), word, fill=255)
    return np.asarray(page) > 127


def write_scene(folder: Path, scene: Scene) -> None:
    """Render a scene and write its file."""
    write_media(folder / scene.file, render(scene), FPS, still=scene.is_still)


def write_blind(folder: Path, scene: Scene) -> None:
    """Write the scene's grey twin."""
    n_frames = 1 if scene.is_still else round(scene.duration_s * FPS)
    grey = np.full((n_frames, SIDE, SIDE, 3), GREY, np.uint8)
    write_media(folder / scene.blind_file, grey, FPS, still=scene.is_still)
