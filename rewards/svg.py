"""svg-code (RULES section 16): both pictures rendered by resvg on the gold's canvas and compared pixel by pixel."""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ElementTree
from functools import lru_cache
from xml.parsers import expat

import numpy as np

from rewards import killable

LIMIT_S = 1.2  # of processor time, 1.5 on the clock
GOLD_LIMIT_S = 5.0
MAX_SIDE = 256
MAX_DEPTH = 100
MAX_ELEMENTS = 20_000
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
LENGTH = re.compile(r"\s*([+]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?)\s*(px|pt|pc|mm|cm|in)?\s*", re.IGNORECASE)
PIXELS = {None: 1.0, "px": 1.0, "pt": 4 / 3, "pc": 16.0, "mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96.0}
EXTERNAL = re.compile(r"url\(\s*['\"]?\s*[^#'\"\s)]")
DROPPED = {"script", "foreignObject", "image", "iframe"}


class NotAPicture(ValueError):
    """The text is no well-formed svg, or one with entities, scripts or too many elements."""


def parse(source: str) -> ElementTree.Element:
    """The root, without scripts and external references. Raises NotAPicture."""
    if re.search(r"<!\s*(?:DOCTYPE|ENTITY)", source, re.IGNORECASE):
        raise NotAPicture("document type or entity declaration")
    source = re.sub(r"\A\s*<\?xml[^>]*\?>", "", source).strip()
    head = re.match(r"<svg\b[^>]*>", source)
    if head and not re.search(r"\sxmlns\s*=", head[0]):
        source = f'<svg xmlns="{SVG}"' + source[4:]
    if "xlink:" in source and "xmlns:xlink" not in source:
        source = source.replace("<svg", f'<svg xmlns:xlink="{XLINK}"', 1)
    _check_depth(source)
    try:
        root = ElementTree.fromstring(source)
    except (ElementTree.ParseError, ValueError) as error:
        raise NotAPicture(f"not well-formed: {error}") from error
    if root.tag not in ("svg", f"{{{SVG}}}svg"):
        raise NotAPicture("the root is not svg")
    for parent in list(root.iter()):
        for child in list(parent):
            name = child.tag.rsplit("}", 1)[-1] if isinstance(child.tag, str) else ""
            if name in DROPPED:
                parent.remove(child)
        for name in list(parent.attrib):
            value = parent.attrib[name]
            local = name.rsplit("}", 1)[-1]
            leads_out = local == "href" and not value.strip().startswith("#")
            if leads_out or local.startswith("on") or EXTERNAL.search(value):
                del parent.attrib[name]
        if parent.text and "url(" in parent.text and parent.tag.rsplit("}", 1)[-1] == "style":
            parent.text = re.sub(r"@import[^;]*;?|url\(\s*['\"]?[^#)][^)]*\)", "none", parent.text)
    return root


def _check_depth(source: str) -> None:
    depth = count = 0

    def opened(name: str, attributes: dict) -> None:
        nonlocal depth, count
        depth, count = depth + 1, count + 1
        if depth > MAX_DEPTH or count > MAX_ELEMENTS:
            raise NotAPicture("too many elements")

    def closed(name: str) -> None:
        nonlocal depth
        depth -= 1

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = opened, closed
    try:
        parser.Parse(source.encode(), True)
    except (expat.ExpatError, ValueError) as error:
        if isinstance(error, NotAPicture):
            raise
        raise NotAPicture(f"not well-formed: {error}") from error


def _length(text: str | None) -> float | None:
    found = LENGTH.fullmatch(text or "")
    if not found:
        return None
    value = float(found[1]) * PIXELS[found[2].lower() if found[2] else None]
    return value if 0 < value < 1e6 else None


def canvas(root: ElementTree.Element) -> tuple[float, float, float, float] | None:
    """(x, y, width, height) in user units: viewBox, else width and height, else None."""
    parts = re.split(r"[\s,]+", root.get("viewBox", "").strip())
    if len(parts) == 4:
        try:
            box = tuple(float(part) for part in parts)
        except ValueError:
            box = (0.0, 0.0, 0.0, 0.0)
        if all(math.isfinite(value) for value in box) and 0 < box[2] < 1e6 and 0 < box[3] < 1e6:
            return box
    width, height = _length(root.get("width")), _length(root.get("height"))
    return (0.0, 0.0, width, height) if width and height else None


def render(root: ElementTree.Element, own: tuple[float, ...], size: tuple[int, int]) -> np.ndarray:
    """(height, width, 3) float32 in 0..255: the picture's canvas `own` fitted into `size` pixels, on white."""
    import resvg_py
    from PIL import Image

    root.set("viewBox", " ".join(repr(value) for value in own))
    root.set("width", str(size[0]))
    root.set("height", str(size[1]))
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    text = ElementTree.tostring(root, encoding="unicode")
    try:
        png = bytes(resvg_py.svg_to_bytes(svg_string=text, background="#ffffff", skip_system_fonts=True))
    except ValueError as error:
        raise NotAPicture(str(error)) from error
    with Image.open(io.BytesIO(png)) as image:
        if image.size != size:
            raise NotAPicture(f"rendered at {image.size}, not {size}")
        return np.asarray(image.convert("RGB"), dtype=np.float32)


@lru_cache(maxsize=64)
def target_of(gold: str) -> tuple[tuple[float, ...], np.ndarray, float]:
    """(canvas, picture, mean distance from white) of a gold, once for all its responses. Raises NotAPicture."""
    root = parse(gold)
    own = canvas(root) or (0.0, 0.0, 300.0, 150.0)
    zoom = min(1.0, MAX_SIDE / max(own[2], own[3]))
    picture = render(root, own, (max(1, round(own[2] * zoom)), max(1, round(own[3] * zoom))))
    return own, picture, float(np.abs(picture - 255.0).mean())


def compare_in_child(gold: str, answer: str | None) -> dict[str, float]:
    """{"accuracy"} of an answer, {"ink"} of a gold alone (answer None); {"bad": reason} for what is no picture."""
    try:
        own, target, ink = target_of(gold)
    except NotAPicture as error:
        return {"bad": str(error)}
    if answer is None:
        return {"ink": ink}
    try:
        given = parse(answer)
        picture = render(given, canvas(given) or own, (target.shape[1], target.shape[0]))
    except NotAPicture as error:
        return {"accuracy": 0.0, "reason": str(error)}
    if ink == 0:
        return {"bad": "the gold is blank"}
    return {"accuracy": max(0.0, 1.0 - float(np.abs(picture - target).mean()) / ink)}


def score_svg(answer: str, gold: str, limit_s: float = LIMIT_S) -> tuple[float, str]:
    """(accuracy, status): max(0, 1 - D(answer, gold) / D(blank, gold)), D the mean absolute RGB difference."""
    try:
        result = killable.call("svg", [gold, answer], limit_s)
    except killable.Killed as error:
        return 0.0, "timeout" if error.reason == "timeout" else "malformed"
    if "accuracy" not in result:
        return 0.0, "bad_ground_truth" if "bad" in result else "malformed"
    return min(1.0, max(0.0, result["accuracy"])), "malformed" if "reason" in result else "ok"


def read_gold(gold: object) -> str:
    """The gold's source. Raises ValueError when it does not render or renders blank."""
    from rewards.source import unwrapped

    if not isinstance(gold, str) or not gold.strip():
        raise ValueError(f"an svg answer must be svg source, got {gold!r:.100}")
    return _checked(unwrapped(gold, "svg"))


@lru_cache(maxsize=4096)
def _checked(source: str) -> str:
    try:
        result = killable.call("svg", [source, None], GOLD_LIMIT_S)
    except killable.Killed as error:
        raise ValueError(f"the svg answer does not render: {error}") from error
    if result.get("ink", 0) == 0:
        raise ValueError(f"the svg answer does not render or is blank: {result.get('bad', 'blank')}")
    return source
