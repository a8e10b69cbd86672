"""Clips, stills and questions for the real model, with demonstrations that reason in words.

    python scripts/real_model/make_clips.py --output_dir runs/real/data --seed 0 --clips 4000

writes, the same for the same seed:
    clips/*.mp4  images/*.png  blind/*     H.264 clips, stills, and grey twins of the held-out ones
    captions.jsonl                         a description of every train clip and still
    train.jsonl                            questions about them, and text-only ones; every row has a demonstration
    cold_start.jsonl                       the first of them, --demonstrations of each template: all that supervision sees
    heldout.jsonl  heldout_blind.jsonl     questions about other clips, and the same about their grey twins
    unseen.jsonl  unseen_blind.jsonl       pairs of colour and shape that no train clip shows
    heldout_captions.jsonl  …_blind.jsonl  descriptions of the held-out ones: what a loss that sees is measured on
    heldout_captions_swapped.jsonl         the same descriptions, each with the media of another scene
    text_only.jsonl                        a fixed set without media, the same for every seed
    complete.json                          written last: counts, settings, and what is right without looking, per template
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from rewards.spans import span_iou
from scripts.real_model.questions import (
    answer_text,
    blind_row,
    caption_rows,
    option_texts,
    question_rows,
    swapped_rows,
    unnamed,
)
from scripts.real_model.scenes import CLIP_KINDS, DURATIONS_S, Scene, draw_scenes, write_blind, write_scene
from scripts.real_model.text_questions import ability_rows, text_rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({k: v for k, v in row.items() if k != "blind"}) + "\n" for row in rows)


def majority_share(rows: list[dict[str, Any]]) -> float:
    """Accuracy of answering every question of a template with that template's most frequent answer, text for letters."""
    counts: dict[str, Counter] = {}
    for row in rows:
        text = option_texts(row).get(row["answer"], row["answer"])
        counts.setdefault(row["data_source"], Counter())[text] += 1
    return sum(max(found.values()) for found in counts.values()) / len(rows)


def best_span(rows: list[dict[str, Any]]) -> float:
    """Mean temporal IoU over the rows of the one interval, in half seconds, that has the highest."""
    golds = [tuple(json.loads(row["answer"])["time"]) for row in rows]
    ends_s = [half / 2 for half in range(int(2 * max(DURATIONS_S)) + 1)]
    return max(sum(span_iou((span,), (gold,)) for gold in golds) for span in combinations(ends_s, 2)) / len(rows)


def best_unseeing(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Template -> mean score over its rows of the best answer that only reads the question's wording, without looking.

    Per wording (the question, names taken out) that is the most frequent letter or answer, whichever is right more often; an
    answer that is several options once their names are taken out is one of them at random. Of temporal grounding it is the best
    interval. Text-only rows are left out. The best is taken over these rows themselves: of few, some of it is chance.
    """
    wordings: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        if row["data_type"] != "text":
            wordings.setdefault(row["data_source"], {}).setdefault(unnamed(row["problem"]), []).append(row)
    shares = {}
    for template, found in sorted(wordings.items()):
        right = 0.0
        for listed in found.values():
            if listed[0]["problem_type"] == "temporal grounding":
                right += best_span(listed) * len(listed)
                continue
            answers: Counter[tuple[str, str]] = Counter()
            for row in listed:
                answers["as it stands", row["answer"]] += 1
                texts = [unnamed(text) for text in option_texts(row).values()] or [answer_text(row)]
                answers["text", answer_text(row)] += 1 / texts.count(answer_text(row))
            right += max(answers.values())
        shares[template] = right / sum(map(len, found.values()))
    return shares


def first_of_each(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first `count` rows of every template, in the order they stand in."""
    seen: Counter[str] = Counter()
    chosen = []
    for row in rows:
        seen[row["data_source"]] += 1
        if seen[row["data_source"]] <= count:
            chosen.append(row)
    return chosen


def draw_data(
    seed: int, clips: int, text: int, demonstrations: int
) -> tuple[dict[str, list[Scene]], dict[str, list[dict[str, Any]]]]:
    """(scenes by split, rows by file name); writes nothing. Held-out and unseen have an eighth of the clips each, at least
    one of every kind."""
    few = max(len(CLIP_KINDS), clips // 8)
    sizes = {"train": (clips, clips // 4), "heldout": (few, max(1, few // 4)), "unseen": (few, max(1, few // 4))}
    scenes = {split: draw_scenes(seed, split, *counts) for split, counts in sizes.items()}
    rows = {split: question_rows(seed, split, listed) for split, listed in scenes.items()}
    rows["captions"] = caption_rows(scenes["train"])
    rows["train"] += text_rows(seed, text)
    rows["cold_start"] = first_of_each(rows["train"], demonstrations)
    for split in ("heldout", "unseen"):
        rows[f"{split}_blind"] = [blind_row(row, split) for row in rows[split]]
    rows["heldout_captions"] = caption_rows(scenes["heldout"])
    rows["heldout_captions_blind"] = [blind_row(row, "caption") for row in rows["heldout_captions"]]
    rows["heldout_captions_swapped"] = swapped_rows(rows["heldout_captions"], seed)
    rows["text_only"] = ability_rows()
    return scenes, rows


def make_data(
    folder: Path, seed: int, clips: int, text: int, demonstrations: int, workers: int | None
) -> dict[str, list[dict[str, Any]]]:
    """Write media and dataset files; -> rows by file name, see draw_data."""
    scenes, rows = draw_data(seed, clips, text, demonstrations)
    folder.mkdir(parents=True, exist_ok=True)
    every = [scene for listed in scenes.values() for scene in listed]
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(partial(write_scene, folder), every, chunksize=16))
        list(pool.map(partial(write_blind, folder), scenes["heldout"] + scenes["unseen"], chunksize=16))
    for name, listed in rows.items():
        write_rows(folder / f"{name}.jsonl", listed)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="make clips and questions",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", required=True, help="folder to write; it must not hold a complete set")
    parser.add_argument("--seed", type=int, default=0, help="decides scenes and questions")
    parser.add_argument("--clips", type=int, default=4000, help="clips to train on; stills: a quarter of it")
    parser.add_argument(
        "--text", type=int, default=None, help="text-only rows to train on (default: a quarter of --clips)"
    )
    parser.add_argument("--demonstrations", type=int, default=60, help="questions of each template in cold_start.jsonl")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that render")
    args = parser.parse_args(arguments)
    if args.clips < len(CLIP_KINDS):
        parser.error(f"--clips must be at least {len(CLIP_KINDS)}, one of every kind; got {args.clips}")
    folder, text = Path(args.output_dir), args.clips // 4 if args.text is None else args.text
    if (folder / "complete.json").exists():
        parser.error(f"--output_dir {folder} already holds a complete set; remove it to make another")
    began = time.monotonic()
    rows = make_data(folder, args.seed, args.clips, text, args.demonstrations, args.workers)
    summary = {"seed": args.seed, "clips": args.clips, "rows": {name: len(listed) for name, listed in rows.items()}}
    summary["majority"] = {name: round(majority_share(rows[name]), 4) for name in ("heldout", "unseen", "text_only")}
    summary["best_unseeing"] = {
        name: {template: round(share, 4) for template, share in best_unseeing(rows[name]).items()}
        for name in ("train", "cold_start", "heldout", "unseen")
    }
    summary["seconds"] = round(time.monotonic() - began, 1)
    (folder / "complete.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"[clips] {folder}: {summary['rows']}, {summary['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
