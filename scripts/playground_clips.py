"""Scenes of the playground and their clips: coloured shapes on a textured ground, H.264 video or PNG stills.

A scene is drawn from a seeded generator before anything is rendered, so that the questions know the truth. Everything
that could give an answer away without looking (frame size, frame rate, length, file name, ground) is drawn
independently of what happens in the scene.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (30, 190, 50),
    "blue": (40, 70, 240),
    "yellow": (240, 220, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIZES = ((64, 64), (72, 64), (64, 72), (72, 72), (76, 60), (60, 76))  # width, height; the model sees all as 64 x 64
FRAME_RATES = (8, 10, 12)
DURATIONS_S = (2.0, 3.0, 4.0, 5.0, 6.0)
KINDS = ("move", "appear", "order", "count", "change")  # what happens in a clip
STILL_KINDS = ("one", "count")
MAX_COUNT = 4
GREY = 127


@dataclass(frozen=True)
class Thing:
    """One shape: where its centre is from `start` to `end` (shares of the frame), and when it is there.

    It moves in a straight line over the whole clip, is visible in [from_s, to_s), and changes from `colour` to
    `later_colour` (if that is set) at `change_s`.
    """

    colour: str
    shape: str
    start: tuple[float, float]
    end: tuple[float, float]
    radius: float  # share of the shorter side
    from_s: float
    to_s: float
    later_colour: str = ""
    change_s: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A clip (duration_s > 0) or a still (duration_s == 0) before it is rendered."""

    name: str
    kind: str
    width: int
    height: int
    fps: int
    duration_s: float
    things: tuple[Thing, ...]
    direction: str = ""  # of things[0] in a "move" scene
    ground_seed: int = 0

    @property
    def is_still(self) -> bool:
        return self.duration_s == 0

    @property
    def file(self) -> str:
        """Path of its media file relative to the playground's folder."""
        return f"images/{self.name}.png" if self.is_still else f"clips/{self.name}.mp4"


class Deck:
    """Deals its cards in random order, each as often as the others: a new shuffle when it is empty."""

    def __init__(self, rng: np.random.Generator, cards: Iterable) -> None:
        self.rng, self.cards, self.left = rng, list(cards), []

    def deal(self) -> Any:
        if not self.left:
            self.left = [self.cards[i] for i in self.rng.permutation(len(self.cards)).tolist()]
        return self.left.pop()


def _quarters(rng: np.random.Generator, n: int) -> list[tuple[float, float]]:
    """n different quarters of the frame, as jittered places in it (shares of width and height)."""
    jitter = rng.uniform(-0.05, 0.05, (n, 2)).tolist()
    corners = [(0.25 + 0.5 * (i % 2), 0.25 + 0.5 * (i // 2)) for i in rng.permutation(4)[:n].tolist()]
    return [(x + dx, y + dy) for (x, y), (dx, dy) in zip(corners, jitter, strict=True)]


def half_seconds(rng: np.random.Generator, low_s: float, high_s: float) -> float:
    """A multiple of half a second in [low_s, high_s]."""
    return float(rng.integers(round(low_s * 2), round(high_s * 2) + 1)) / 2


class SceneMaker:
    """Draws scenes. What is asked about comes from decks, so every answer is equally frequent; the rest is random."""

    def __init__(self, seed: int, split: str) -> None:
        self.rng = np.random.default_rng([seed, {"train": 0, "heldout": 1}[split]])
        self.decks: dict[str, Deck] = {}

    def deal(self, name: str, cards: Iterable) -> Any:
        return self.decks.setdefault(name, Deck(self.rng, cards)).deal()

    def draw(self, name: str, kind: str, *, still: bool) -> Scene:
        """The scene `name` of this kind. Raises ValueError for an unknown kind."""
        rng = self.rng
        width, height = SIZES[int(rng.integers(len(SIZES)))]
        fps = int(rng.choice(FRAME_RATES))
        duration_s = 0.0 if still else float(rng.choice(DURATIONS_S))
        colours = list(COLOURS)
        pairs = list(itertools.permutations(colours, 2))
        direction = ""

        def thing(colour, start, end=None, from_s=0.0, to_s=duration_s, **change) -> Thing:
            shape, radius = self.deal(f"{kind} shape", SHAPES), float(rng.uniform(0.17, 0.22))
            return Thing(colour, shape, start, end or start, radius, from_s, to_s, **change)

        if kind == "move":
            direction = self.deal("direction", DIRECTIONS)
            dx, dy = DIRECTIONS[direction]
            near, far = float(rng.uniform(0.15, 0.25)), float(rng.uniform(0.75, 0.85))
            across = float(rng.uniform(0.4, 0.6))
            along = (near, far) if dx + dy > 0 else (far, near)
            start, end = (((a, across) if dx else (across, a)) for a in along)
            things = [thing(self.deal("move colour", colours), start, end)]
        elif kind == "appear":
            comes, stays = self.deal("appear colours", pairs)
            place, other = _quarters(rng, 2)
            length_s = half_seconds(rng, max(0.5, 0.25 * duration_s), 0.5 * duration_s)
            from_s = half_seconds(rng, 0.0, duration_s - length_s)
            things = [thing(comes, place, None, from_s, from_s + length_s), thing(stays, other)]
        elif kind == "order":
            first, missing = self.deal("order colours", pairs)
            rest = [c for c in colours if c not in (first, missing)]
            places, share = _quarters(rng, 3), duration_s / 3  # each goes when the next one comes
            trio = enumerate(zip((first, *(rest[i] for i in rng.permutation(2))), places, strict=True))
            things = [thing(colour, place, None, i * share, (i + 1) * share) for i, (colour, place) in trio]
        elif kind == "count":
            places = _quarters(rng, self.deal("still count" if still else "count", range(1, MAX_COUNT + 1)))
            mixed = [colours[i] for i in rng.permutation(len(colours)).tolist()]
            things = [thing(colour, place) for colour, place in zip(mixed, places, strict=False)]
        elif kind == "change":
            colour, later = self.deal("change colours", pairs + [(c, c) for c in colours for _ in range(3)])
            change = {"later_colour": later, "change_s": float(rng.uniform(0.4, 0.6)) * duration_s}
            things = [thing(colour, _quarters(rng, 1)[0], **(change if later != colour else {}))]
        elif kind == "one":
            y = float(rng.uniform(0.2, 0.3)) + 0.5 * self.deal("lower half", (0, 1))
            things = [thing(self.deal("one colour", colours), (float(rng.uniform(0.25, 0.75)), y))]
        else:
            raise ValueError(f"unknown kind of scene {kind!r}; known: {', '.join(KINDS + STILL_KINDS)}")
        return Scene(name, kind, width, height, fps, duration_s, tuple(things), direction, int(rng.integers(2**31)))


def draw_scenes(seed: int, split: str, n_clips: int, n_stills: int) -> list[Scene]:
    """The scenes of one split, clips first; names carry no meaning (a random order decides them)."""
    maker = SceneMaker(seed, split)
    scenes = []
    for n, kinds, letter in ((n_clips, KINDS, "v"), (n_stills, STILL_KINDS, "i")):
        for i, number in enumerate(maker.rng.permutation(n).tolist()):
            name = f"{split}_{letter}{number:04d}"
            scenes.append(maker.draw(name, kinds[i % len(kinds)], still=letter == "i"))
    return scenes


def draw_ground(
    rng: np.random.Generator, width: int, height: int, *, blotches: int, brightest: float, tint: float, grain: float
) -> np.ndarray:
    """(H, W, 3) float32 ground: blotches x blotches of muted colour, grey levels from 85 to `brightest` give or take `tint` in
    each channel, with a fine grain of standard deviation `grain`."""
    coarse = rng.uniform(85, brightest, (blotches, blotches, 1)) + rng.uniform(-tint, tint, (blotches, blotches, 3))
    image = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32) + rng.normal(0, grain, (height, width, 1)).astype(np.float32)


def _inside(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """(H, W) bool: which pixels at offsets x, y from its centre the shape covers."""
    if shape == "circle":
        return x * x + y * y <= radius * radius
    if shape == "square":
        return (np.abs(x) <= 0.88 * radius) & (np.abs(y) <= 0.88 * radius)
    if shape == "cross":
        return (np.minimum(np.abs(x), np.abs(y)) <= 0.35 * radius) & (np.maximum(np.abs(x), np.abs(y)) <= radius)
    return (y <= 0.8 * radius) & (y >= -radius + 1.9 * np.abs(x))  # triangle, point up


def render(scene: Scene) -> np.ndarray:
    """(F, H, W, 3) uint8 frames of the scene; F = 1 for a still."""
    rng = np.random.default_rng(scene.ground_seed)
    ground = draw_ground(rng, scene.width, scene.height, blotches=5, brightest=165, tint=15, grain=5)
    ys, xs = np.mgrid[0 : scene.height, 0 : scene.width].astype(np.float32) + 0.5
    n_frames = 1 if scene.is_still else round(scene.duration_s * scene.fps)
    frames = np.empty((n_frames, scene.height, scene.width, 3), np.uint8)
    for i in range(n_frames):
        frame = ground.copy()
        time_s, progress = i / scene.fps, i / max(1, n_frames - 1)
        for thing in scene.things:
            if not scene.is_still and not thing.from_s <= time_s < thing.to_s:
                continue
            centre = [a + (b - a) * progress for a, b in zip(thing.start, thing.end, strict=True)]
            mask = _inside(
                thing.shape,
                xs - centre[0] * scene.width,
                ys - centre[1] * scene.height,
                thing.radius * min(scene.width, scene.height),
            )
            changed = thing.later_colour and time_s >= thing.change_s
            frame[mask] = COLOURS[thing.later_colour if changed else thing.colour]
        frames[i] = np.clip(frame, 0, 255)
    return frames


def write_media(path: Path, frames: np.ndarray, fps: int, *, still: bool) -> None:
    """Write (F, H, W, 3) uint8 as H.264 in mp4, or its first frame as PNG. One thread: the same bytes every time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if still:
        Image.fromarray(frames[0]).save(path)
        return
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # With its vector code x264 writes other bytes for the same frames now and then; without it, never seen.
        stream.options = {"crf": "16", "preset": "veryfast", "threads": "1", "x264-params": "asm=0"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_scene(folder: Path, scene: Scene) -> None:
    """Render a scene and write its file."""
    write_media(folder / scene.file, render(scene), scene.fps, still=scene.is_still)


def blind_file(scene: Scene) -> str:
    """Path of the grey file with the same size, rate and length; scenes that agree in all three share it."""
    if scene.is_still:
        return f"blind/{scene.width}x{scene.height}.png"
    return f"blind/{scene.width}x{scene.height}_{scene.fps}fps_{scene.duration_s:g}s.mp4"


def write_blind(folder: Path, scene: Scene) -> None:
    """Write the scene's grey twin: every pixel of every frame mid grey."""
    n_frames = 1 if scene.is_still else round(scene.duration_s * scene.fps)
    grey = np.full((n_frames, scene.height, scene.width, 3), GREY, np.uint8)
    write_media(folder / blind_file(scene), grey, scene.fps, still=scene.is_still)
