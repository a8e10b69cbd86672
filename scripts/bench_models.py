"""What scripts/bench_step.py runs on: a Qwen3-VL of a published size with random weights, and real H.264 clips.

    python scripts/bench_models.py --size 2b --work_dir DIR     # the model folder alone; prints its path

Everything is made on the spot, nothing is downloaded. Folders and clips that exist already are used again.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClipShape:
    """Size, rate and length of the benchmark's clips."""

    width: int = 1280
    height: int = 720
    fps: int = 24
    duration_s: int = 64


SHAPE_OF = {"tiny": ClipShape(160, 96, 8, 4)}  # every other size: ClipShape()


def make_tokenizer():
    """A byte-level BPE with Qwen's splitting rule: a timestamp costs as many tokens as with the published vocabulary."""
    from scripts.playground_model import train_tokenizer

    words = "which colour is the square that moves to the left or right user assistant think answer option seconds"
    return train_tokenizer([words] * 50 + [f"<{i / 4:.1f} seconds>" for i in range(400)])


def save_model_folder(size: str, folder: Path, device: str) -> str:
    """The Hugging Face folder of a Qwen3-VL of this size with random weights (bf16 on CUDA, fp32 on CPU)."""
    import torch
    from transformers import AutoModelForImageTextToText, GenerationConfig

    from scripts.bench_packed import make_config
    from scripts.playground_model import make_processor

    done = folder / "complete"
    if done.exists():
        return str(folder)
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 262144
    config = make_config(size, None)
    token_id = tokenizer.convert_tokens_to_ids
    config.image_token_id, config.video_token_id = token_id("<|image_pad|>"), token_id("<|video_pad|>")
    config.vision_start_token_id, config.vision_end_token_id = token_id("<|vision_start|>"), token_id("<|vision_end|>")
    text = config.text_config
    text.vocab_size = max(text.vocab_size, -(-len(tokenizer) // 64) * 64)
    text.bos_token_id = text.pad_token_id = tokenizer.pad_token_id
    text.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad, bos_token_id=pad)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    make_processor(tokenizer).save_pretrained(folder)
    done.write_text("")
    return str(folder)


def model_folder(work_dir: Path, size: str, device: str) -> Path:
    """Where the model of this size lies: bf16 on CUDA, fp32 on CPU."""
    return work_dir / f"qwen3_vl_{size}_{'bf16' if device.startswith('cuda') else 'fp32'}"


def write_clip(path: str, shape: ClipShape, seed: int) -> str:
    """H.264 with B-frames, a key picture every 250: a window that drifts over a noisy ground, and a moving square."""
    import av

    if os.path.exists(path):
        return path
    rng = np.random.default_rng(seed)
    height, width = shape.height, shape.width
    coarse = rng.integers(30, 220, (height // 8 + 9, width // 8 + 41, 3), dtype=np.uint8)
    ground = coarse.repeat(8, axis=0).repeat(8, axis=1)
    ground = np.clip(ground.astype(np.int16) + rng.integers(-12, 13, ground.shape[:2])[..., None], 0, 255)
    ground = ground.astype(np.uint8)
    colour, edge = rng.integers(0, 255, 3, dtype=np.uint8), height // 5
    draft = f"{path}.tmp-{os.getpid()}.mp4"
    with av.open(draft, "w") as container:
        stream = container.add_stream("libx264", rate=shape.fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "26", "bf": "3", "g": "250"}
        stream.codec_context.thread_count = 2
        total = shape.fps * shape.duration_s
        for number in range(total):
            left, top = number * 240 // total, number * 48 // total
            picture = ground[top : top + height, left : left + width].copy()
            x, y = number * 7 % (width - edge), number * 3 % (height - edge)
            picture[y : y + edge, x : x + edge] = colour
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    os.replace(draft, path)
    return path


def make_clips(folder: Path, shape: ClipShape, count: int) -> list[str]:
    """Paths of `count` clips, encoded by as many processes as there are cores. Call it before CUDA is touched."""
    folder = folder / f"{shape.width}x{shape.height}-{shape.fps}fps-{shape.duration_s}s"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"{number}.mp4") for number in range(count)]
    if all(os.path.exists(path) for path in paths):
        return paths
    workers = max(1, min(count, os.cpu_count() or 1))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(write_clip, paths, [shape] * count, range(count)))


# ---- the usual recipe, as the suite we compare with runs it ---------------------------------------------------------


def fetch(path: str, video: dict):
    """(float32 frames (F, 3, H, W) in 0..255) by qwen-vl-utils and decord at its default threads."""
    os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"
    from qwen_vl_utils import vision_process

    wanted = {key: video[key] for key in ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels")}
    frames, _ = vision_process.fetch_video({"video": path, **wanted}, image_patch_size=16, return_video_metadata=True)
    return frames[0] if isinstance(frames, tuple) else frames


def store_floats(path: str, video: dict, artifact: str) -> str:
    """What the suite's preprocessing leaves on disk: torch.save of the float32 frames."""
    import torch

    if not os.path.exists(artifact):
        draft = f"{artifact}.tmp-{os.getpid()}"
        torch.save({"frames": fetch(path, video)}, draft)
        os.replace(draft, artifact)
    return artifact


def load_floats(artifact: str):
    import torch

    return torch.load(artifact, weights_only=True)["frames"]


_processors: dict[str, object] = {}  # one per loader process


def process_frames(model_dir: str, frames, text: str, metadata: dict) -> dict:
    """The Hugging Face processor's whole output for one prompt: ids, float pixel values, grid."""
    from transformers import AutoProcessor
    from transformers.video_utils import VideoMetadata

    if model_dir not in _processors:
        _processors[model_dir] = AutoProcessor.from_pretrained(model_dir)
    known = ("fps", "duration", "total_num_frames", "frames_indices")
    return _processors[model_dir](
        text=[text],
        videos=[frames],
        video_metadata=[VideoMetadata(**{key: metadata[key] for key in known})],
        do_resize=False,
        do_sample_frames=False,
        return_tensors="pt",
    )


def load_one(source: str, place: str, video: dict, model_dir: str, text: str, metadata: dict) -> int:
    """One sample in a loader process: frames (decoded, or the stored floats), processor -> prompt tokens.

    The pixels stay behind: the suite ships paths, and reads them again where they are needed.
    """
    frames = fetch(place, video) if source == "decode" else load_floats(place)
    return int(process_frames(model_dir, frames, text, metadata)["input_ids"].shape[1])


def write_json(path: str, content: dict) -> None:
    """Whole or not at all."""
    draft = f"{path}.tmp-{os.getpid()}"
    Path(draft).write_text(json.dumps(content, indent=1))
    os.replace(draft, path)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "2b", "4b", "8b"), required=True, help="shape of the Qwen3-VL")
    parser.add_argument("--work_dir", required=True, help="folder to make it in")
    flags = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(save_model_folder(flags.size, model_folder(Path(flags.work_dir), flags.size, device), device))


if __name__ == "__main__":
    main()
