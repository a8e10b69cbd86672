"""The playground's short supervised phase, in plain torch: the tiny model learns to answer in form, and to see a little.

It learns from the train split's questions and from one caption per clip, and stops by one rule for all seeds: as soon as
STOP_AT of a slice of the train split, whose clips are left out here, is answered right. RL starts from there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from data.dataset import load
from data.encode import Encoder
from data.frame_cache import FrameCache
from data.records import Prompt
from scripts.playground_questions import answer_text

Lesson = tuple[Prompt, list[int]]  # a prompt and the tokens of its answer, the end token included
BATCH = {"question": 12, "caption": 8, "text": 2}  # lessons of each kind per update
LEARNING_RATE = 1e-3
WARM_UP_STEPS = 20
SLICE = 0.15  # share of the train split's clips and stills that only measure
STOP_AT = 0.46
MEASURE_FROM, MEASURE_EVERY = 80, 10


def collate(lessons: list[Lesson], encoder: Encoder) -> tuple[dict[str, Tensor], Tensor]:
    """Model inputs padded on the right to (B, T), and the (B, T) bool mask of answer tokens."""
    length = max(len(prompt.input_ids) + len(answer) for prompt, answer in lessons)
    ids, types, attention = (torch.zeros(len(lessons), length, dtype=torch.long) for _ in range(3))
    positions = torch.zeros(3, len(lessons), length, dtype=torch.long)
    asked = torch.zeros(len(lessons), length, dtype=torch.bool)
    pixels: dict[str, list[Tensor]] = {"video": [], "image": []}
    grids: dict[str, list[Tensor]] = {"video": [], "image": []}
    mean, std = 255 * encoder.image_mean[0], 255 * encoder.image_std[0]
    for row, (prompt, answer) in enumerate(lessons):
        start, end = len(prompt.input_ids), len(prompt.input_ids) + len(answer)
        ids[row, :start] = torch.from_numpy(prompt.input_ids)
        ids[row, start:end] = torch.tensor(answer)
        types[row, :start] = torch.from_numpy(prompt.mm_type_ids.astype(np.int64))
        attention[row, :end] = 1
        asked[row, start:end] = True
        positions[:, row, :start] = torch.from_numpy(prompt.position_ids)
        positions[:, row, start:end] = torch.arange(len(answer)) + int(prompt.position_ids.max()) + 1
        if prompt.patches is not None:
            kind = prompt.grid_kinds[0]
            pixels[kind].append((torch.from_numpy(prompt.patches).float() - mean) / std)
            grids[kind].append(torch.from_numpy(prompt.grid_thw))
    inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": positions, "mm_token_type_ids": types}
    if pixels["video"]:
        inputs |= {"pixel_values_videos": torch.cat(pixels["video"]), "video_grid_thw": torch.cat(grids["video"])}
    if pixels["image"]:
        inputs |= {"pixel_values": torch.cat(pixels["image"]), "image_grid_thw": torch.cat(grids["image"])}
    return inputs, asked


def answer_logits(model: torch.nn.Module, inputs: dict[str, Tensor], asked: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, V) that predict the answer tokens, and those tokens (n,)."""
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    predicts = asked[:, 1:]
    return model.lm_head(hidden[:, :-1][predicts]), inputs["input_ids"][:, 1:][predicts]


@torch.no_grad()
def share_right(model: torch.nn.Module, lessons: list[Lesson], encoder: Encoder) -> float:
    """Share of lessons whose every answer token is the most likely one: what greedy decoding gets exactly right."""
    right = 0
    for start in range(0, len(lessons), 64):
        inputs, asked = collate(lessons[start : start + 64], encoder)
        logits, tokens = answer_logits(model, inputs, asked)
        good = torch.ones_like(asked[:, 1:])
        good[asked[:, 1:]] = logits.argmax(dim=-1) == tokens
        right += int(good.all(dim=1).sum())
    return right / len(lessons)


def endless(lessons: list[Lesson], rng: np.random.Generator) -> Iterator[Lesson]:
    """The lessons in a new random order each time round."""
    while True:
        for i in rng.permutation(len(lessons)).tolist():
            yield lessons[i]


def read_lessons(folder: Path, encoder: Encoder) -> dict[str, list[tuple[str, Lesson]]]:
    """(path of its clip, lesson) by kind: "question" and "text" from train.jsonl, "caption" from captions.jsonl."""
    end = encoder.tokenizer.eos_token_id
    lessons: dict[str, list[tuple[str, Lesson]]] = {kind: [] for kind in BATCH}
    for name in ("train", "captions"):
        for sample in load([str(folder / f"{name}.jsonl")]):
            answer = encoder.tokenizer.encode(answer_text(sample.answer), add_special_tokens=False)
            kind = "caption" if name == "captions" else "question" if sample.media else "text"
            path = sample.media[0].path if sample.media else ""
            lessons[kind].append((path, (encoder.encode(sample), [*answer, end])))
    return lessons


def warm_start(folder: Path, model: torch.nn.Module, seed: int, max_steps: int) -> dict[str, Any]:
    """Train `model` (the one saved in folder/model) in place; -> steps, share right on the slice, seconds.

    The frames it decodes stay in folder/cache, where training and evaluation find them.
    """
    began = time.monotonic()
    (folder / "cache").mkdir(exist_ok=True)
    encoder = Encoder(str(folder / "model"), cache=FrameCache(str(folder / "cache"), "prefer"), style="direct")
    lessons = read_lessons(folder, encoder)
    rng = np.random.default_rng([seed, 20])
    paths = sorted({path for path, _ in lessons["caption"]})
    measured = {paths[i] for i in rng.permutation(len(paths))[: round(SLICE * len(paths))].tolist()}
    held = [lesson for path, lesson in lessons["question"] if path in measured]
    streams = {
        kind: endless([lesson for path, lesson in listed if path not in measured], rng)
        for kind, listed in lessons.items()
    }
    print(f"[warm start] lessons read in {time.monotonic() - began:.0f} s", flush=True)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    right = 0.0
    for step in range(1, max_steps + 1):
        inputs, asked = collate([next(streams[kind]) for kind, n in BATCH.items() for _ in range(n)], encoder)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARM_UP_STEPS)
        logits, tokens = answer_logits(model, inputs, asked)
        loss = cross_entropy(logits, tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step < MEASURE_FROM and step % MEASURE_EVERY == 0:
            print(f"[warm start] step {step}: loss {float(loss.detach()):.3f}", flush=True)
        elif step % MEASURE_EVERY == 0:
            right = share_right(model, held, encoder)
            print(
                f"[warm start] step {step}: loss {float(loss.detach()):.3f}, {right:.0%} of the slice right", flush=True
            )
            if right >= STOP_AT:
                break
    return {"steps": step, "share_right": round(right, 3), "seconds": round(time.monotonic() - began, 1)}
