"""What scoring costs: our overhead over rouge-score and math-verify, the other readers, the pool, hostile texts.

    python scripts/bench_rewards.py [--responses 20000] [--json out.json]
    python scripts/bench_rewards.py --hostile tests/rewards/hostile.jsonl     # the slowest text of every type

One process, one core, and the child that does the mathematics. Times are processor seconds of both, which a busy machine
stretches less than the clock's. A ratio is the median over interleaved blocks (ours, theirs, ours, theirs …).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import logging
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
    """Type -> (response of 1 to 2 kB, gold, extra); every draw gives other numbers and words."""
    think, start = thought(draw), draw.randint(0, 400)
    track = {str(start + second): [start + second, 10, start + second + 90, 120] for second in range(12)}
    tube = {"time": [start, start + 11], "boxes": track}
    boxes = {"boxes": [start, 20, start + 110, 220]}
    region = {
        **boxes,
        "positive_points": [[start + 30, 30], [start + 50, 60], [start + 90, 99]],
        "negative_points": [[start + 1, 21], [start + 5, 200], [start + 105, 30]],
    }
    options = {"options": ["A. Red", "B. Blue", "C. Green", f"D. {prose(draw, 3)}"]}
    answers: dict[str, tuple[object, object, dict]] = {
        "multiple choice": ("B. Blue", "B", options),
        "numerical": (f"about {start}.5 m", f"{start}.5", {"unit": "m"}),
        "regression": (f"{start}", f"{start}.5", {}),
        "boolean": (f"Yes, {prose(draw, 5)}", "yes", {}),
        "ocr": (prose(draw, 12), prose(draw, 12), {}),
        "temporal grounding": (json.dumps({"time": [start, start + 20]}), f'{{"time": [{start}, {start + 9}]}}', {}),
        "spatial grounding": (json.dumps(boxes), json.dumps(boxes), {}),
        "spatial-temporal grounding": (json.dumps(tube), json.dumps(tube), {}),
        "tracking": (json.dumps({"boxes": track}), json.dumps({"boxes": track}), {}),
        "segmentation": (json.dumps(region), json.dumps(region), {}),
        "llava": ("Response 2 is better than Response 1", "Response 2", {}),
    }
    rows = {kind: (f"{think}<answer>{given}</answer>", gold, extra) for kind, (given, gold, extra) in answers.items()}
    rows["multiple choice, untagged"] = (f"{prose(draw, 200)}.\nTherefore, the answer is B.", "B", options)
    return rows


def child_s(kind: str) -> float:
    """Processor seconds of the worker behind a kind so far (Linux counts them in nanoseconds)."""
    return int(Path(f"/proc/{killable.CHILDREN[kind].worker}/schedstat").read_text().split()[0]) / 1e9


def interleaved(
    ours: Callable[[int], object], theirs: Callable[[int], object], count: int, block: int, kind: str = ""
) -> dict[str, float]:
    """Medians over alternating blocks: microseconds per item, their ratio, and what of ours is not in the child."""
    blocks = []
    for start in range(0, count, block):
        spent = []
        for work in (ours, theirs):
            begin, inside = time.process_time(), child_s(kind) if kind else 0.0
            for place in range(start, min(start + block, count)):
                work(place)
            here = time.process_time() - begin
            spent.append((here, (child_s(kind) - inside) if kind else 0.0))
        (own, child), (alone, _) = spent
        size = 1e6 / (min(start + block, count) - start)
        blocks.append((size * (own + child), size * alone, (own + child) / alone, size * own, own / alone))
    names = ("ours_us", "alone_us", "ratio", "own_us", "own_share")
    return dict(zip(names, (statistics.median(column) for column in zip(*blocks))))


def text_ratio(draw: random.Random, count: int) -> dict[str, float]:
    from rouge_score import rouge_scorer

    class Tokenizer:
        def tokenize(self, text: str) -> list[str]:
            return tokens(text)

    rows = text_rows(draw, count)
    responses = [f"<think>{prose(draw, 150)}</think><answer>{answer}</answer>" for answer, _ in rows]
    theirs = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    stemmer()
    result = interleaved(
        lambda n: score("open-ended", responses[n], rows[n][1], {}),
        lambda n: theirs.score(rows[n][1], rows[n][0]),
        count,
        50,
    )
    same = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Tokenizer())
    for place in range(0, count, max(1, count // 50)):
        want = same.score(rows[place][1], rows[place][0])["rougeL"].fmeasure
        assert abs(score("open-ended", responses[place], rows[place][1], {}).accuracy - want) < 1e-9
    return result


def math_ratio(draw: random.Random, count: int, group: int) -> dict[str, float]:
    """The calls of math-verify's own documentation, in this process, beside ours; `group` responses share a gold."""
    from math_verify import parse, verify

    rows = []
    for answer, gold in math_rows(draw, max(1, count // group)):
        others = [answer for answer, _ in math_rows(draw, group - 1)]
        rows += [(given, gold) for given in (answer, *others)]
    responses = [f"<think>{prose(draw, 150)}</think><answer>{answer}</answer>" for answer, _ in rows]

    def theirs(place: int) -> bool:
        answer, gold = rows[place]
        return verify(parse(f"${gold}$"), parse(f"${answer}$"))

    killable.ensure("math")
    for answer, gold in math_rows(random.Random(1), 20):  # both sides' caches and imports
        score("math", answer, gold, {})
        verify(parse(f"${gold}$"), parse(f"${answer}$"))
    for place in range(min(100, len(rows))):
        assert score("math", responses[place], rows[place][1], {}).accuracy == theirs(place), rows[place]
    rows, responses = rows[100:] or rows, responses[100:] or responses
    return interleaved(lambda n: score("math", responses[n], rows[n][1], {}), theirs, len(rows), 24, "math")


def median_us(draw: random.Random, count: int, group: int) -> dict[str, float]:
    """Median processor microseconds per type in process; `group` responses share a gold, as in training."""
    drawn = [other_rows(draw) for _ in range(count + 16)]  # the first 16 warm the caches
    medians = {}
    for kind in drawn[0]:
        name, times = kind.split(",")[0], []
        for place, rows in enumerate(drawn):
            response, (_, gold, extra) = rows[kind][0], drawn[place - place % group][kind]
            begin = time.process_time()
            score(name, response, gold, extra)
            times.append(time.process_time() - begin)
        medians[kind] = 1e6 * statistics.median(times[16:])
    return medians


def apart_us(count: int) -> dict[str, float]:
    """Median microseconds on the clock of the types that need a child or a sandbox, warm."""
    square = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100"><rect x="{}" width="50" height="50"/></svg>'
    html = "<html><body><h1>Sale</h1><ul>" + "<li class='item'>one hat</li>" * 30 + "</ul><p>{}</p></body></html>"
    tests = {"tests": [{"args": [1, 2], "want": 3}, {"args": [5, -5], "want": 0}], "entry": "add"}
    rows = {
        "svg-code": (square.format(9), square.format(0), {}),
        "html-code": (html.format("two"), html.format("three"), {}),
        "code": ("def add(a, b):\n    return b + a", "def add(a, b):\n    return a + b", tests),
    }
    medians = {}
    for kind, (answer, gold, extra) in rows.items():
        score(kind, answer, gold, extra)
        times = []
        for _ in range(count if kind != "code" else min(count, 20)):
            begin = time.perf_counter()
            score(kind, f"<answer>{answer}</answer>", gold, extra)
            times.append(time.perf_counter() - begin)
        medians[kind] = 1e6 * statistics.median(times)
    return medians


def hostile(path: str) -> dict[str, dict[str, object]]:
    """Type -> its slowest hostile text: processor seconds here, seconds on the clock, status."""
    from rewards.rows import job_of_row, warm

    worst: dict[str, dict[str, object]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        job = job_of_row(row)
        warm(job["problem_type"])
        begin, clock = time.process_time(), time.perf_counter()
        got = score(job["problem_type"], job["response"], job["gold"], job["extra"])
        figures = {"cpu_s": time.process_time() - begin, "wall_s": time.perf_counter() - clock}
        known = worst.setdefault(row["problem_type"], {"texts": 0, "wall_s": -1.0})
        texts = known["texts"] + 1
        if figures["wall_s"] > known["wall_s"]:
            known = {**figures, "id": row["id"], "status": got.status}
        worst[row["problem_type"]] = {**known, "texts": texts}
    return worst


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
    parser.add_argument("--hostile", help="time these texts instead: rows of a case file")
    args = parser.parse_args(given)
    logging.disable(logging.WARNING)  # math-verify's word on every expression it cannot read
    result: dict[str, object] = {"hostile": hostile(args.hostile)} if args.hostile else measured(args.responses)
    print("\n".join(table(result)))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def measured(responses: int) -> dict[str, object]:
    draw = random.Random(0)
    result: dict[str, object] = {"responses": responses}
    result["rouge-score"] = text_ratio(draw, int(responses * SHARE_TEXT))
    count = int(responses * SHARE_MATH)
    result["math-verify, each gold once"] = math_ratio(draw, count // 2, 1)
    result["math-verify, 8 responses per gold"] = math_ratio(draw, count // 2, 8)
    rows = other_rows(draw)
    each = max(50, int(responses * (1 - SHARE_TEXT - SHARE_MATH)) // len(rows))
    result["median_us, each gold once"] = median_us(draw, each // 2, 1)
    result["median_us, 8 responses per gold"] = median_us(draw, each // 2, 8)
    result["apart_us"] = apart_us(min(each, 200))
    result["pool"] = pool_cost(rows["multiple choice"], max(320, each))
    return result


def table(result: dict[str, object]) -> list[str]:
    lines = []
    for name, figures in result.items():
        if name == "hostile":
            for kind, row in figures.items():
                lines.append(
                    f"{kind:28} {row['texts']:4} texts, slowest {row['wall_s']:6.2f} s ({row['cpu_s']:.2f} s of processor "
                    f"here), {row['status']}, {row['id']}"
                )
        elif isinstance(figures, dict) and "ratio" in figures:
            lines.append(
                f"{name}: ours {figures['ours_us']:.0f} us, alone {figures['alone_us']:.0f} us, ratio {figures['ratio']:.3f}; "
                f"outside the library {figures['own_us']:.0f} us, {figures['own_share']:.3f} of theirs"
            )
        elif name.startswith("median_us"):
            lines.append(f"median in process{name.removeprefix('median_us')}")
            lines += [f"    {kind:32} {value:7.0f} us" for kind, value in figures.items()]
        elif name == "apart_us":
            lines.append("median with a warm child, on the clock")
            lines += [f"    {kind:32} {value:7.0f} us" for kind, value in figures.items()]
        elif name == "pool":
            lines.append("pool: " + ", ".join(f"{key} {value:.0f} us" for key, value in figures.items()))
    return lines


if __name__ == "__main__":
    sys.exit(main())
