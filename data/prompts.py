"""What each task asks for: one table, used by training and by evaluation.

    python data/prompts.py --data train.jsonl --line 1 --style think [--prompt_template my.jinja]

prints what a sample becomes. The text is: the question, the options with their letters, one instruction. The
instruction comes from TASKS, or the whole text from a user's Jinja2 template (rendered in a sandbox).
Importable without torch.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import jinja2
import jinja2.sandbox

from data.records import Media, Sample

STYLES = ("think", "direct", "open")
COORDINATES = {
    "pixel": "pixels",
    "norm1000": "coordinates scaled to 0-1000",
    "norm1": "coordinates scaled to 0-1",
}
MARKER = re.compile(r"<(image|video)>")
LABELLED = re.compile(r"\s*\(?([A-Za-z])(?:[.:)]|：)\s*(\S.*)?$", re.DOTALL)


@dataclass(frozen=True)
class Task:
    """`answer` completes "Put … in <answer></answer>"; {coord} and {unit} are filled in per sample."""

    answer: str
    example: str


TASKS: dict[str, Task] = {
    "multiple choice": Task("the letter of the correct option", "B"),
    "numerical": Task("one number{unit}", "42"),
    "rec": Task("the count as an integer", "3"),
    "regression": Task("one number{unit}", "2.5"),
    "boolean": Task("Yes or No", "Yes"),
    "math": Task("the final value or option letter", "\\frac{3}{4}"),
    "ocr": Task("the text exactly as it is written", "EXIT 24"),
    "open-ended": Task("the answer", "A man opens the door."),
    "temporal grounding": Task('JSON {{"time": [start, end]}} in seconds', '{"time": [12.3, 25.7]}'),
    "spatial grounding": Task('JSON {{"boxes": [x1, y1, x2, y2]}} in {coord}', '{"boxes": [35, 40, 210, 280]}'),
    "spatial-temporal grounding": Task(
        'JSON {{"time": [start, end], "boxes": {{"second": [x1, y1, x2, y2]}}}} '
        "with times in seconds and one box for every whole second of the span in {coord}",
        '{"time": [3, 5], "boxes": {"3": [10, 20, 60, 90], "4": [12, 20, 62, 90], "5": [15, 21, 65, 91]}}',
    ),
    "tracking": Task(
        'JSON {{"boxes": {{"second": [x1, y1, x2, y2]}}}} with one box for every second asked for in {coord}',
        '{"boxes": {"0": [10, 20, 60, 90], "1": [12, 20, 62, 90]}}',
    ),
    "code": Task("the complete program without a code fence", "def add(a, b):\n    return a + b"),
    "svg-code": Task(
        "the complete SVG source",
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><circle cx="4" cy="4" r="3"/></svg>',
    ),
    "html-code": Task("the complete HTML source", "<html><body><h1>Title</h1></body></html>"),
    "llava": Task("Response 1, Response 2 or Tie, whichever is better", "Response 1"),
    "segmentation": Task(
        'JSON {{"boxes": [x1, y1, x2, y2], "positive_points": [[x, y], [x, y], [x, y]], '
        '"negative_points": [[x, y], [x, y], [x, y]]}} in {coord}',
        '{"boxes": [35, 40, 210, 280], "positive_points": [[90, 99], [120, 150], [110, 200]], '
        '"negative_points": [[40, 45], [200, 50], [60, 270]]}',
    ),
    "segmentation_video": Task(
        'JSON {{"time": second, "boxes": [x1, y1, x2, y2], "positive_points": [[x, y], [x, y], [x, y]], '
        '"negative_points": [[x, y], [x, y], [x, y]]}} with the time in seconds of the clearest frame '
        "and the rest in {coord} of that frame",
        '{"time": 7, "boxes": [35, 40, 210, 280], "positive_points": [[90, 99], [120, 150], [110, 200]], '
        '"negative_points": [[40, 45], [200, 50], [60, 270]]}',
    ),
}
LEAD = {
    "think": "First think inside <think></think>, then put {answer} in <answer></answer>. "
    "Example: <think>…</think><answer>{example}</answer>",
    "direct": "Put {answer} in <answer></answer>.",
    "open": "First reason step by step, then put {answer} in <answer></answer>. Example: … <answer>{example}</answer>",
}


def split_options(options: tuple[str, ...] | list[str]) -> list[tuple[str, str]]:
    """(letter, text) of every option: its own label ("A. x", "A: x", "A) x") if all have one, else A, B, C … by place.

    >>> split_options(["B. blue", "A. red"]), split_options(["blue", "A. red"])
    ([('B', 'blue'), ('A', 'red')], [('A', 'blue'), ('B', 'A. red')])
    """
    found = [LABELLED.match(option) for option in options]
    if found and all(found):
        return [(match[1].upper(), (match[2] or "").strip()) for match in found]
    return [(chr(ord("A") + place), option.strip()) for place, option in enumerate(options)]


def instruction(sample: Sample, style: str = "think") -> str:
    """The sentence that tells the model what to return. `extra.format_mode` of the sample wins over `style`."""
    declared = sample.extra.get("format_mode")
    style = declared if declared in STYLES else style
    if style not in STYLES:
        raise ValueError(f"prompt style must be one of {', '.join(STYLES)}, got {style!r}")
    if sample.problem_type not in TASKS:
        raise ValueError(f"no prompt for problem_type {sample.problem_type!r}; known: {', '.join(TASKS)}")
    task = TASKS[sample.problem_type]
    answer = task.answer.format(coord=_coordinates(sample.extra), unit=_unit(sample.extra))
    return LEAD[style].format(answer=answer, example=task.example)


def _coordinates(extra: dict[str, Any]) -> str:
    system = extra.get("coord") or extra.get("gt_coord") or "pixel"
    if system not in COORDINATES:
        raise ValueError(f"coord must be one of {', '.join(COORDINATES)}, got {system!r}")
    if system == "pixel" and extra.get("width") and extra.get("height"):
        return f"pixels of the {extra['width']}x{extra['height']} frame"
    return COORDINATES[system]


def _unit(extra: dict[str, Any]) -> str:
    return f" in {extra['unit']}" if extra.get("unit") else ""


def build_text(sample: Sample, style: str = "think", template: str | None = None) -> str:
    """The whole text of the user turn, media markers still in it.

    `template`: path of a Jinja2 file that replaces the built-in layout; it sees question, options (list of
    {letter, text}), problem_type, data_type, style, instruction, id and extra, and cannot reach anything else.
    Raises ValueError for an unreadable template or one that uses an unknown variable.
    """
    options = split_options(sample.options)
    if template is None:
        lines = [sample.question.strip()]
        if options:
            lines += [f"{letter}. {text}" for letter, text in options]
        lines.append(instruction(sample, style))
        return "\n".join(line for line in lines if line)
    try:
        return (
            _template(template)
            .render(
                question=sample.question,
                options=[{"letter": letter, "text": text} for letter, text in options],
                problem_type=sample.problem_type,
                data_type=sample.data_type,
                style=style,
                instruction=instruction(sample, style),
                id=sample.id,
                extra=sample.extra,
            )
            .strip()
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"--prompt_template {template} fails on sample {sample.id}: {error}") from error


@lru_cache(maxsize=16)
def _template(path: str) -> jinja2.Template:
    """Compiled once per file. The sandbox refuses attributes that lead out of the values (`__class__` …)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    try:
        return environment.from_string(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt_template {path} cannot be read: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"--prompt_template {path}, line {error.lineno}: {error.message}") from error


def order_media(question: str, media: tuple[Media, ...]) -> tuple[Media, ...]:
    """Media in the order of the question's <image> / <video> markers; unchanged when it has none.

    A marker of a kind that the sample has no media of is plain text (a question about HTML may say <video>).
    Raises ValueError when a kind is marked more or less often than the sample has media of it.
    """
    queues = {kind: [item for item in media if item.kind == kind] for kind in ("image", "video")}
    marked = [kind for kind in MARKER.findall(question) if queues[kind]]
    if not marked:
        return media
    for kind, queue in queues.items():
        if marked.count(kind) != len(queue):
            raise ValueError(
                f"the question has {marked.count(kind)} <{kind}> markers for {len(queue)} {kind}s; "
                "mark every medium, or none to have all of them placed first"
            )
    return tuple(queues[kind].pop(0) for kind in marked)


def build_messages(sample: Sample, style: str = "think", template: str | None = None) -> list[dict[str, Any]]:
    """Chat messages of a sample: one user turn, no system turn.

    Without markers: one {"type": "video"} / {"type": "image"} per medium, in media order, then one text item.
    With markers in the text each medium stands where its marker was, text items between them; the media must
    already be in that order (`order_media`). Raises ValueError when markers and media disagree.
    """
    text = build_text(sample, style, template)
    ordered = order_media(text, sample.media)
    if any(a is not b for a, b in zip(ordered, sample.media)):
        raise ValueError(f"sample {sample.id}: media are not in the order of the question's markers (order_media)")
    kinds = {item.kind for item in sample.media}
    parts = re.split("(" + "|".join(f"<{kind}>" for kind in sorted(kinds)) + ")", text) if kinds else [text]
    if len(parts) == 1:
        content = [{"type": item.kind} for item in sample.media] + [{"type": "text", "text": text}]
    else:
        content = [
            {"type": part[1:-1]} if place % 2 else {"type": "text", "text": part}
            for place, part in enumerate(parts)
            if part.strip()
        ]
    return [{"role": "user", "content": content}]


def render_preview(sample: Sample, style: str = "think", template: str | None = None) -> str:
    """The messages as readable text: media as [video], [image], text as the model gets it."""
    messages = build_messages(sample, style, template)
    items = [item.get("text", f"[{item['type']}]") for message in messages for item in message["content"]]
    return "\n".join(items)


def main(arguments: list[str] | None = None) -> int:
    import argparse

    from data.dataset import BadDataset, load

    parser = argparse.ArgumentParser(description="print what a sample becomes")
    parser.add_argument("--data", required=True, help="dataset file (JSONL or JSON)")
    parser.add_argument("--line", type=int, default=1, help="which sample, counted from 1")
    parser.add_argument("--style", choices=STYLES, default="think", help="what the instruction asks for")
    parser.add_argument("--prompt_template", help="Jinja2 file instead of the built-in table")
    parser.add_argument("--media_dir", help="folder that relative media paths start from")
    args = parser.parse_args(arguments)
    try:
        samples = load([args.data], media_dir=args.media_dir)
        if not 1 <= args.line <= len(samples):
            raise ValueError(f"--line must be between 1 and {len(samples)}, got {args.line}")
        print(render_preview(samples[args.line - 1], args.style, args.prompt_template))
    except (BadDataset, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
