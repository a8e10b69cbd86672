"""One row of a data file as the model sees it: its frames with their times as one picture, its text and its size.

  python scripts/show_sample.py train.jsonl --row 3 --out sample.png [--model MODEL_DIR] [--fps 2 --max_frames 64]

With --model the text is the whole prompt of that model, and tokens are counted; without, frames are sized for Qwen3-VL.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import math
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.dataset import load, parse_field_names
from data.frame_cache import FrameCache
from data.prompts import render_preview
from data.records import Sample
from data.video import ImageSettings, VideoSettings, media_name, read_image

CELL, GAP, LINE, COLUMNS = 240, 8, 16, 4  # pixels
TEXT_COLUMNS = 120  # characters


def pictures(sample: Sample, cache: FrameCache, video: VideoSettings, image: ImageSettings):
    """[(title, [(caption, (3, H, W) uint8)])], one entry per medium."""
    sections = []
    for media in sample.media:
        if media.kind == "image":
            pixels = read_image(media, image)
            sections.append((f"image {media_name(media)}: {pixels.shape[2]}x{pixels.shape[1]}", [("", pixels)]))
            continue
        frames = cache.frames(media, video)
        count, _, height, width = frames.pixels.shape
        window = "" if media.start_s is None and media.end_s is None else f", window [{media.start_s}, {media.end_s}) s"
        title = (
            f"video {media_name(media)}: {count} frames of {width}x{height}, from {frames.total_frames} frames, "
            f"{frames.duration_s:.2f} s at {frames.source_fps:.2f} fps{window}"
        )
        captions = [f"{t:.2f} s  (frame {i})" for t, i in zip(frames.timestamps_s, frames.indices)]
        sections.append((title, list(zip(captions, np.asarray(frames.pixels)))))
    return sections


def contact_sheet(sections, text: str) -> Image.Image:
    """All pictures in rows of four with their captions, the text under them."""
    font = ImageFont.load_default(12)
    lines = [part for line in text.splitlines() for part in (textwrap.wrap(line, TEXT_COLUMNS) or [""])]
    rows: list[tuple[int, list]] = []
    for title, cells in sections:
        rows.append((0, [title]))
        for start in range(0, len(cells), COLUMNS):
            row = []
            for caption, pixels in cells[start : start + COLUMNS]:
                picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
                picture.thumbnail((CELL, CELL))
                row.append((caption, picture))
            rows.append((max(picture.height for _, picture in row), row))
    width = COLUMNS * (CELL + GAP) + GAP
    height = GAP + sum(tall + LINE + GAP for tall, _ in rows) + LINE * len(lines) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    y = GAP
    for tall, row in rows:
        for column, cell in enumerate(row):
            x = GAP + column * (CELL + GAP)
            if isinstance(cell, str):
                draw.text((x, y), cell, fill="black", font=font)
            else:
                sheet.paste(cell[1], (x, y))
                draw.text((x, y + tall + 1), cell[0], fill="black", font=font)
        y += tall + LINE + GAP
    for line in lines:
        draw.text((GAP, y), line, fill="black", font=font)
        y += LINE
    return sheet


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", help="data file")
    add("--row", type=int, default=0, help="which usable row, counted from 0")
    add("--out", default="sample.png", help="picture to write")
    add("--media_dir", default=None, help="folder that relative media paths start from (default: the file's)")
    add("--field_names", default=None, help='JSON object, our field -> the file\'s, e.g. \'{"videos": "clip"}\'')
    add("--model", default=None, help="model folder: its prompt, its frame sizes, token counts")
    add("--style", default="think", choices=("think", "direct", "open"), help="prompt style")
    add("--prompt_template", default=None, help="Jinja file instead of the built-in prompts")
    add("--chat_template", default=None, help="Jinja file instead of the model's own; with --model")
    add("--fps", type=float, default=2.0, help="frames per second taken from a video")
    add("--min_frames", type=int, default=4, help="fewest frames of a video")
    add("--max_frames", type=int, default=128, help="most frames of a video")
    add("--video_min_pixels", type=int, default=4096, help="smallest area of one video frame, pixels")
    add("--video_max_pixels", type=int, default=262144, help="largest area of one video frame, pixels")
    add("--total_pixels", type=int, default=None, help="budget of all frames of one video together, pixels")
    add("--resize", default="exact", choices=("exact", "native"), help="bit-identical to the recipe, or faster uint8")
    add("--sampling", default="even", choices=("even", "grid"), help="evenly first to last, or every 1/fps second")
    add("--decoder", default="pyav", choices=("pyav", "decord", "torchcodec"), help="video reader")
    add("--image_min_pixels", type=int, default=4096, help="smallest area of an image, pixels")
    add("--image_max_pixels", type=int, default=1048576, help="largest area of an image, pixels")
    add("--cache_dir", default=None, help="frame cache to read from")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.chat_template and not args.model:
            raise ValueError("--chat_template needs --model")
        if args.model and not os.path.isdir(args.model):
            raise ValueError(f"--model {args.model} is no folder; give the model's folder")
        if not os.path.isdir(os.path.dirname(args.out) or "."):
            raise ValueError(f"--out {args.out}: its folder does not exist")
        names = parse_field_names(args.field_names)
        samples = load([args.file], media_dir=args.media_dir, on_bad_sample="skip", field_names=names)
        if not 0 <= args.row < len(samples):
            raise ValueError(f"--row {args.row}: {args.file} has usable rows 0 to {len(samples) - 1}")
        sample = samples[args.row]
        budget = {
            "fps": args.fps, "min_frames": args.min_frames, "max_frames": args.max_frames,
            "min_pixels": args.video_min_pixels, "max_pixels": args.video_max_pixels, "total_pixels": args.total_pixels,
            "resize": args.resize, "sampling": args.sampling, "backend": args.decoder,
        }  # fmt: skip
        image = {"min_pixels": args.image_min_pixels, "max_pixels": args.image_max_pixels}
        cache = FrameCache(args.cache_dir, "prefer" if args.cache_dir else "off", write=False)
        if args.model:
            from data.encode import Encoder

            encoder = Encoder(
                args.model, budget, image, cache, args.style, args.prompt_template, chat_template=args.chat_template
            )
            prompt = encoder.encode(sample)
            video_settings, image_settings, text = encoder.video, encoder.image, prompt.text
            visual = int((prompt.mm_type_ids > 0).sum())
            tokens = f"{len(prompt.input_ids)} prompt tokens, {visual} of them visual"
        else:
            video_settings, image_settings = VideoSettings(**budget), ImageSettings(**image)
            text = render_preview(sample, args.style, args.prompt_template)
            tokens = "tokens: give --model"
        sections = pictures(sample, cache, video_settings, image_settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    facts = (
        f"{sample.file}:{sample.line}  id {sample.id}  {sample.problem_type}  {sample.data_type}  gold: {sample.answer}"
    )
    cells = sum(len(cells) for _, cells in sections)
    sheet = contact_sheet(sections, f"{facts}\n{tokens}\n\n{text}")
    try:
        sheet.save(args.out)
    except (ValueError, OSError) as error:
        print(f"error: --out {args.out}: cannot be written ({error}); name a .png", file=sys.stderr)
        return 2
    for title, _ in sections:
        print(title)
    print(f"{facts}\n{tokens}\n\n{text}\n")
    print(f"{args.out}: {cells} pictures in {math.ceil(cells / COLUMNS)} rows, {sheet.width}x{sheet.height}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
