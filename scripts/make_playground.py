"""Make the playground: real clips with known truth, questions about them, and a tiny Qwen3-VL that sees a little.

    python scripts/make_playground.py --output_dir playground/seed0 --seed 0

writes, the same for the same seed:
    clips/*.mp4  images/*.png       H.264 clips and stills of coloured shapes on a textured ground
    blind/*                         grey files of the same sizes, rates and lengths
    train.jsonl  heldout.jsonl      questions; the two share no clip
    heldout_blind.jsonl             the held-out questions about the grey files
    captions.jsonl                  one sentence per train clip, for the warm start alone
    model/                          tokenizer, processor files and weights after the warm start
    cache/                          frames of the train clips, decoded once
    complete.json                   written last: settings, counts, times
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.prompts import build_text
from data.records import Sample
from scripts.playground_clips import KINDS, blind_file, draw_scenes, write_blind, write_scene
from scripts.playground_questions import answer_text, blind_row, caption_rows, make_rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({key: value for key, value in row.items() if key != "blind"}) + "\n" for row in rows)


def tokenizer_texts(rows: list[dict[str, Any]]) -> list[str]:
    """What the tokenizer learns its words from: prompts and answers of the train split, roles, frame times."""
    texts = []
    for row in rows:
        named = [row[name] for name in ("problem_id", "problem", "answer", "problem_type", "data_type")]
        sample = Sample(*named, options=tuple(row.get("options", ())))
        texts.append(build_text(sample, style="direct") + "\n" + answer_text(row["answer"]))
    texts += [f"<{tenths / 10:.1f} seconds>" for tenths in range(60)]
    return texts + ["system\nuser\nassistant\n"] * 50


def make_data(folder: Path, seed: int, clips: int, workers: int | None) -> dict[str, list[dict[str, Any]]]:
    """Write clips, stills, grey twins and dataset files; -> rows of "train", "heldout" and "captions"."""
    counts = {  # clips, stills, text-only questions
        "train": (clips, clips // 5, clips // 15),
        "heldout": (clips // 4, clips // 20, clips // 60),
    }
    scenes = {split: draw_scenes(seed, split, n_clips, n_stills) for split, (n_clips, n_stills, _) in counts.items()}
    rows = {split: make_rows(seed, split, scenes[split], counts[split][2]) for split in counts}
    rows["captions"] = caption_rows(scenes["train"])
    folder.mkdir(parents=True, exist_ok=True)
    twins = list({blind_file(scene): scene for scene in scenes["heldout"]}.values())
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(partial(write_scene, folder), scenes["train"] + scenes["heldout"], chunksize=16))
        list(pool.map(partial(write_blind, folder), twins, chunksize=16))
    for name, listed in rows.items():
        write_rows(folder / f"{name}.jsonl", listed)
    write_rows(folder / "heldout_blind.jsonl", [blind_row(row) for row in rows["heldout"]])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description="make the playground", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", required=True, help="folder to write; it must not hold a complete playground")
    parser.add_argument("--seed", type=int, default=0, help="decides scenes, questions, weights, warm start")
    parser.add_argument("--clips", type=int, default=800, help="clips to train on; held-out: a quarter of it")
    parser.add_argument("--no_warm_start", action="store_true", help="save the randomly initialised model")
    parser.add_argument("--max_warm_start_steps", type=int, default=400, help="stop there if the policy is not ready")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that render")
    args = parser.parse_args()
    if args.clips < 12 * len(KINDS):
        parser.error(f"--clips must be at least {12 * len(KINDS)}, got {args.clips}")
    folder = Path(args.output_dir)
    if (folder / "complete.json").exists():
        parser.error(f"--output_dir {folder} already holds a playground; remove it to make another")
    started = time.monotonic()
    rows = make_data(folder, args.seed, args.clips, args.workers)
    summary: dict[str, Any] = {"seed": args.seed, "clips": args.clips}
    summary["rows"] = {name: len(listed) for name, listed in rows.items()}
    summary["data_s"] = round(time.monotonic() - started, 1)
    print(f"[playground] clips and {len(rows['train'])} train, {len(rows['heldout'])} held-out questions in "
          f"{summary['data_s']} s", flush=True)  # fmt: skip

    import torch

    from scripts.playground_model import make_model, make_processor, save_model, train_tokenizer
    from scripts.playground_warm_start import warm_start

    torch.set_num_threads(1)  # small products gain little from a second thread, and lose much when it has to wait
    tokenizer = train_tokenizer(tokenizer_texts(rows["train"] + rows["captions"]))
    processor = make_processor(tokenizer)
    model = make_model(tokenizer, args.seed)
    save_model(folder / "model", model, processor)
    if not args.no_warm_start:
        summary["warm_start"] = warm_start(folder, model, args.seed, args.max_warm_start_steps)
        save_model(folder / "model", model, processor)
    summary["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    summary["total_s"] = round(time.monotonic() - started, 1)
    (folder / "complete.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"[playground] {folder / 'model'}: {summary['parameters'] / 1e6:.2f} M parameters, {len(tokenizer)} tokens; "
          f"all in {summary['total_s']} s")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
