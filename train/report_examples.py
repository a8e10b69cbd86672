"""The report's page of example rollouts: the frames the model saw, the question, gold, all G responses, their rewards.

Chosen by rule and not by looks: the first, the middle and the last logged step, every group that was logged there.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Any

from train.report_charts import esc, short
from train.report_data import RunFiles, as_dict, as_list, number

MAX_JPEG_BYTES = 300_000
MAX_RESPONSES = 64
MAX_FRAMES = 64
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,100}\.jpe?g")
_TAGS = re.compile(r"(</?(?:think|answer)>)")


def chosen_steps(steps: list[float]) -> list[float]:
    """First, middle and last of the logged steps (each once): [1, 5, 9, 13] -> [1, 9, 13]."""
    steps = sorted(set(steps))
    return list(dict.fromkeys([steps[0], steps[len(steps) // 2], steps[-1]])) if steps else []


def examples(run: RunFiles, n_frames: int, n_characters: int, n_examples: int) -> str:
    """At most `n_examples` examples, spread evenly over the chosen steps; says what was left out for size."""
    steps = chosen_steps([line["step"] for line in run.rollouts])
    per_step = [[line for line in run.rollouts if line["step"] == step] for step in steps]
    room = max(n_examples // max(len(steps), 1), 1) if n_examples else 0
    lines = [line for group in per_step for line in group[:room]]
    if not run.rollouts:
        return ""
    logged = len({line["step"] for line in run.rollouts})
    said = [
        f"{len(lines)} of {len(run.rollouts)} logged groups, "
        f"from the first, the middle and the last of {logged} logged steps."
    ]
    if n_frames < 8:
        said.append(
            f"To keep this page small, at most {n_frames} frames are shown per example."
            if n_frames
            else "To keep this page small, frames are left out."
        )
    if n_characters < 6000:
        said.append(f"Texts are cut after {n_characters} characters.")
    cards = "".join(_example(line, run.folder / "frames", n_frames, n_characters) for line in lines)
    return f'<p class="lead">{" ".join(said)}</p>{cards}'


def _example(line: dict[str, Any], frames_dir: Path, n_frames: int, n_characters: int) -> str:
    responses = [as_dict(response) for response in as_list(line.get("responses"))]
    rewards = [number(response.get("reward")) for response in responses]
    rewards = [reward for reward in rewards if reward is not None]
    badges = [f'<span class="badge step">step {short(line["step"])}</span>']
    badges += [f'<span class="badge">{esc(str(line[key])[:80])}</span>' for key in ("problem_type",) if line.get(key)]
    told = []
    for key, word in (("prompt_tokens", "prompt tokens"), ("visual_tokens", "of them visual")):
        if number(line.get(key)) is not None:
            told.append(f"{short(line[key])} {word}")
    if rewards:
        told.append(f"mean reward {short(sum(rewards) / len(rewards))}")
    if line.get("id"):
        told.append(f"sample {esc(str(line['id'])[:80])}")
    question, options = str(line.get("question", "")), _options(line)
    gold = _cut(line.get("answer", ""), min(n_characters, 1500))
    frames, missing = _frames(as_list(line.get("frames")), frames_dir, n_frames)
    missing = f'<p class="hint">{missing} frames could not be read.</p>' if missing else ""
    cards = "".join(_response(response, n_characters) for response in responses[:MAX_RESPONSES])
    return (
        '<article class="card example"><div class="head">'
        f'<div class="badges">{"".join(badges)}<span>{" · ".join(told)}</span></div>{frames}{missing}'
        f'<p class="question"><bdi>{_cut(question, n_characters)}</bdi></p>{options}'
        f'<div class="gold">Gold answer: <b><bdi>{gold}</bdi></b></div></div>'
        f'<div class="responses">{cards}</div></article>'
    )


def _options(line: dict[str, Any]) -> str:
    """The options with their letters, unless the question has them already."""
    options = [str(option) for option in as_list(line.get("options"))[:26]]
    if not options or all(option in str(line.get("question", "")) for option in options):
        return ""
    lettered = all(re.match(r"\(?[A-Z][.):]", option) for option in options)
    items = [option if lettered else f"{chr(65 + i)}. {option}" for i, option in enumerate(options)]
    return '<ul class="options">' + "".join(f"<li>{_cut(item, 500)}</li>" for item in items) + "</ul>"


def _response(response: dict[str, Any], n_characters: int) -> str:
    reward = number(response.get("reward"))
    if reward is None:
        level, value = "none", "no reward"
    else:
        level, value = "high" if reward >= 0.75 else "middle" if reward >= 0.25 else "low", f"{reward:.2f}"
    parts = [
        f"{esc(str(name)[:40])} {number(part):.2f}"
        for name, part in list(as_dict(response.get("reward_parts")).items())[:12]
        if number(part) is not None
    ]
    more = []
    if response.get("is_demonstration") is True:
        more.append('<span class="badge">demonstration</span>')
    if response.get("finish_reason") == "length":
        more.append('<span class="badge">truncated</span>')
    if response.get("status") not in (None, "", "ok"):
        more.append(f'<span class="badge">{esc(str(response["status"])[:40])}</span>')
    tokens = number(response.get("tokens"))
    if tokens is not None:
        parts.append(f"{short(tokens)} tokens")
    return (
        f'<div class="response"><div class="rhead"><span class="reward {level}">{value}</span>{"".join(more)}'
        f'<span class="parts">{" · ".join(parts)}</span></div>'
        f'<div class="text"><bdi>{_marked(response.get("text", ""), n_characters)}</bdi></div></div>'
    )


def _cut(value: Any, n_characters: int) -> str:
    text = value if isinstance(value, str) else str(value)
    if len(text) <= n_characters:
        return esc(text)
    return f'{esc(text[:n_characters])}<span class="cutoff"> … {len(text) - n_characters:,} characters more</span>'


def _marked(value: Any, n_characters: int) -> str:
    """The text with its thinking in grey and its answer in bold; pieces are escaped one by one."""
    text = (value if isinstance(value, str) else str(value)).strip()
    rest = len(text) - n_characters
    out, kind = [], ""
    for piece in _TAGS.split(text[:n_characters]):
        if _TAGS.fullmatch(piece):
            kind = "" if piece.startswith("</") else piece[1:-1]
            out.append(f'<span class="tag">{esc(piece)}</span>')
        elif piece:
            out.append(f'<span class="{kind}">{esc(piece)}</span>' if kind else esc(piece))
    if rest > 0:
        out.append(f'<span class="cutoff"> … {rest:,} characters more</span>')
    return "".join(out) or '<span class="cutoff">empty</span>'


# ---- frames ---------------------------------------------------------------------------------------------------------


def _frames(frames: list[Any], frames_dir: Path, n: int) -> tuple[str, int]:
    """At most n frames, evenly spaced, as figures with their times; and how many of these could not be read."""
    frames = frames[:MAX_FRAMES]
    if n and len(frames) > n:
        frames = [
            frames[round(i * (len(frames) - 1) / (n - 1))] if n > 1 else frames[len(frames) // 2] for i in range(n)
        ]
    out, missing = [], 0
    for i, frame in enumerate(frames if n else []):
        jpeg = read_frame(frame, frames_dir)
        if jpeg is None:
            missing += 1
            continue
        time_s = number(as_dict(frame).get("time_s"))
        caption = f"{time_s:.1f} s" if time_s is not None else ""
        data = base64.b64encode(jpeg).decode()
        out.append(
            f'<figure><img alt="frame {i + 1}" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return (f'<div class="frames">{"".join(out)}</div>' if out else ""), missing


def read_frame(frame: Any, frames_dir: Path) -> bytes | None:
    """JPEG bytes of {"file": name in frames/} or {"jpeg": base64} (or either as a plain string); else None.

    A name may not leave the frames folder, also not through a link, and what is not a small JPEG is not shown.
    """
    if isinstance(frame, str):
        frame = {"file": frame} if _FILE.fullmatch(frame) else {"jpeg": frame}
    frame = as_dict(frame)
    name, coded = frame.get("file"), frame.get("jpeg")
    if isinstance(name, str) and _FILE.fullmatch(name):
        path = (frames_dir / name).resolve()
        if not path.is_relative_to(frames_dir.resolve()) or not path.is_file() or path.stat().st_size > MAX_JPEG_BYTES:
            return None
        jpeg = path.read_bytes()
    elif isinstance(coded, str) and len(coded) <= MAX_JPEG_BYTES * 4 // 3 + 4:
        try:
            jpeg = base64.b64decode(coded, validate=True)
        except (binascii.Error, ValueError):
            return None
    else:
        return None
    return jpeg if jpeg.startswith(b"\xff\xd8\xff") and len(jpeg) <= MAX_JPEG_BYTES else None
