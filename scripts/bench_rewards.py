"""What scoring costs: our overhead over rouge-score and math-verify, the other readers, the pool.

    python scripts/bench_rewards.py [--responses 20000] [--json out.json]

One process, one core. Ratios are of interleaved blocks (ours, theirs, ours, theirs …), so that a busy machine slows both.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

from rewards import killable, score
from rewards.pool import ScoringPool
from rewards.text import stemmer, tokens

WORDS = (
    "the a man woman red blue car walks opens door kitchen table slowly then camera moves left right after scene people"
)
WORDS = f"{WORDS} music playing child holding cup standing near window street light morning runs jumps quickly building".split(
    " "
)
SHARE_TEXT, SHARE_MATH = 0.25, 0.1  # of the mixed set; the rest is spread over the other types


def prose(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


def thought(draw: random.Random) -> str:
    """About 1.5 kB of reasoning."""
    return f"<think>{prose(draw, 260)}</think>"


def text_rows(draw: random.Random, count: int) -> list[tuple[str, str]]:
    """(answer, gold) pairs of captions."""
    return [(prose(draw, draw.randint(20, 120)), prose(draw, draw.randint(20, 60))) for _ in range(count)]


def math_rows(draw: random.Random, count: int) -> list[tuple[str, str]]:
    """(answer, gold) pairs that are written differently, half of them equal."""
    rows = []
    for _ in range(count):
        a, b, c = draw.randint(2, 9), draw.randint(2, 9), draw.randint(2, 30)
        forms = [
            (f"\\frac{{{a * b}}}{{{b * c}}}", f"\\frac{{{a}}}{{{c}}}"),
            (f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b}}}"),
            (f"x^2+{2 * a}x+{a * a}", f"(x+{a})^2"),
            (f"{a}\\pi", f"{a + 1}\\pi"),
            (f"({a}, {b})", f"({b}, {a + 1})"),
            (f"{a / 4}", f"\\frac{{{a}}}{{4}}"),
        ]
        rows.append(draw.choice(forms))
    return rows


def other_rows(draw: random.Random) -> dict[str, tuple[str, object, dict]]:
    """Type -> (response of 1 to 2 kB, gold, extra)."""
    think = thought(draw)
    track = {str(second): [second, 10, second + 90, 120] for second in range(12)}
    tube = {"time": [0, 11], "boxes": track}
    boxes = {"boxes": [10, 20, 110, 220]}
    region = {
        **boxes,
        "positive_points": [[30, 30], [50, 60], [90, 99]],
        "negative_points": [[1, 1], [5, 200], [115, 10]],
    }
    options = {"options": ["A. Red", "B. Blue", "C. Green", "D. Yellow"]}
    answers: dict[str, tuple[object, object, dict]] = {
        "multiple choice": ("B. Blue", "B", options),
        "numerical": ("about 12.5 m", "12.5", {"unit": "m"}),
        "regression": ("12", "12.5", {}),
        "boolean": ("Yes, the man is running", "yes", {}),
        "ocr": (prose(draw, 12), prose(draw, 12), {}),
        "temporal grounding": (json.dumps({"time": [12.5, 20]}), '{"time": [10, 20]}', {}),
        "spatial grounding": (json.dumps(boxes), json.dumps(boxes), {}),
        "spatial-temporal grounding": (json.dumps(tube), json.dumps(tube), {}),
        "tracking": (json.dumps({"boxes": track}), json.dumps({"boxes": track}), {}),
        "segmentation": (json.dumps(region), json.dumps(region), {}),
        "llava": ("Response 2 is better than Response 1", "Response 2", {}),
    }
    rows = {kind: (f"{think}<answer>{given}</answer>", gold, extra) for kind, (given, gold, extra) in answers.items()}
    rows["multiple choice, untagged"] = (f"{prose(draw, 200)}.\nTherefore, the answer is B.", "B", options)
    return rows


def interleaved(
    ours: Callable[[int], object], theirs: Callable[[int], object], count: int, block: int
) -> tuple[float, float]:
    """Seconds spent in ours and theirs over `count` items, in alternating blocks."""
    spent = [0.0, 0.0]
    for start in range(0, count, block):
        for side, work in enumerate((ours, theirs)):
            begin = time.perf_counter()
            for place in range(start, min(start + block, count)):
                work(place)
            spent[side] += time.perf_counter() - begin
    return spent[0], spent[1]


def text_ratio(draw: random.Random, count: int) -> dict[str, float]:
    from rouge_score import rouge_scorer

    class Tokenizer:
        def tokenize(self, text: str) -> list[str]:
            return tokens(text)

    rows = text_rows(draw, count)
    responses = [f"<think>{prose(draw, 150)}</think><answer>{answer}</answer>" for answer, _ in rows]
    theirs = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    stemmer()
    ours_s, theirs_s = interleaved(
        lambda n: score("open-ended", responses[n], rows[n][1], {}),
        lambda n: theirs.score(rows[n][1], rows[n][0]),
        count,
        50,
    )
    same = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Tokenizer())
    for place in range(0, count, max(1, count // 50)):
        want = same.score(rows[place][1], rows[place][0])["rougeL"].fmeasure
        assert abs(score("open-ended", responses[place], rows[place][1], {}).accuracy - want) < 1e-9
    return {"ours_us": 1e6 * ours_s / count, "theirs_us": 1e6 * theirs_s / count, "ratio": ours_s / theirs_s}


def math_ratio(draw: random.Random, count: int) -> dict[str, float]:
    from math_verify import parse, verify

    rows = math_rows(draw, count)
    responses = [f"<think>{prose(draw, 150)}</think><answer>{answer}</answer>" for answer, _ in rows]

    def theirs(place: int) -> bool:
        answer, gold = rows[place]
        wanted, given = parse(f"${gold}$", parsing_timeout=None), parse(f"${answer}$", parsing_timeout=None)
        return verify(wanted, given, timeout_seconds=None)

    killable.ensure("math")
    for place in range(min(20, count)):  # both sides' caches and imports
        score("math", responses[place], rows[place][1], {})
        theirs(place)
    ours_s, theirs_s = interleaved(lambda n: score("math", responses[n], rows[n][1], {}), theirs, count, 20)
    return {"ours_us": 1e6 * ours_s / count, "theirs_us": 1e6 * theirs_s / count, "ratio": ours_s / theirs_s}


def median_us(kind: str, row: tuple[str, object, dict], count: int) -> float:
    response, gold, extra = row
    """Processor time, which a busy machine stretches less than the clock's."""
    kind, times = kind.split(",")[0], []
    for _ in range(count):
        begin = time.process_time()
        score(kind, response, gold, extra)
        times.append(time.process_time() - begin)
    return 1e6 * statistics.median(times)


def pool_cost(row: tuple[str, object, dict], count: int) -> dict[str, float]:
    """Microseconds per response that one worker's round trip adds, sent one by one and sixteen at a time."""
    response, gold, extra = row
    begin = time.perf_counter()
    for _ in range(count):
        score("multiple choice", response, gold, extra)
    inside = time.perf_counter() - begin
    cost = {}
    with ScoringPool(workers=1) as pool:
        pool.submit("multiple choice", response, gold, extra).result()
        for size in (1, 16):
            begin = time.perf_counter()
            task = [("multiple choice", response, gold, extra)] * size
            for future in [future for _ in range(count // size) for future in pool.submit_many(task)]:
                future.result()
            cost[f"added_us_in_{size}s"] = 1e6 * (time.perf_counter() - begin - inside) / count
    return cost


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="cost of scoring, as ratios to the libraries and in microseconds")
    parser.add_argument("--responses", type=int, default=20_000, help="size of the mixed set")
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args(given)
    draw = random.Random(0)
    result: dict[str, object] = {"responses": args.responses}
    result["rouge-score"] = text_ratio(draw, int(args.responses * SHARE_TEXT))
    result["math-verify"] = math_ratio(draw, int(args.responses * SHARE_MATH))
    rows = other_rows(draw)
    each = max(50, int(args.responses * (1 - SHARE_TEXT - SHARE_MATH)) // len(rows))
    result["median_us"] = {kind: median_us(kind, row, each) for kind, row in rows.items()}
    result["pool"] = pool_cost(rows["multiple choice"], max(320, each))
    for name in ("rouge-score", "math-verify"):
        figures = result[name]
        print(
            f"{name}: ours {figures['ours_us']:.0f} us, alone {figures['theirs_us']:.0f} us, ratio {figures['ratio']:.3f}"
        )
    for kind, value in result["median_us"].items():
        print(f"{kind:32} {value:7.0f} us (median)")
    print("pool: " + ", ".join(f"{name} {value:.0f} us" for name, value in result["pool"].items()))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
