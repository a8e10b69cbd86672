"""The variants of scripts/bench_step.py, and how each of them gets its prompts: to the rollout, and to the policy."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace

import numpy as np

from scripts.bench_models import fetch, load_floats, load_one, process_frames


@dataclass(frozen=True)
class Variant:
    source: str  # decode | float | cache | fly: where the frames come from
    layout: str  # rows | once | packed: how a group goes through the policy
    old_pass: bool
    prefetch: bool = False

    @property
    def usual(self) -> bool:
        return self.source in ("decode", "float")


VARIANTS = {
    "g": Variant("cache", "packed", False, True),
    "b": Variant("float", "rows", True),
    "a": Variant("decode", "rows", True),
    "g-fly": Variant("fly", "packed", False, True),
    "c": Variant("cache", "rows", True),
    "e": Variant("cache", "packed", True),
    "f": Variant("cache", "packed", False),
    "d": Variant("cache", "once", True),
}


class Clips:
    """The benchmark's samples, round and round."""

    def __init__(self, samples):
        self.samples = samples

    def take(self, position: int, n: int):
        return [self.samples[place % len(self.samples)] for place in range(position, position + n)], position + n


def video_flags(args: Namespace) -> dict:
    return {
        "fps": args.fps,
        "min_frames": args.min_frames,
        "max_frames": args.max_frames,
        "min_pixels": args.video_min_pixels,
        "max_pixels": args.video_max_pixels,
    }


def metadata_of(prompt) -> dict:
    return dict(prompt.vllm_prompt["multi_modal_data"]["video"][0][1])


def place_of(bench, variant: Variant, sample) -> str:
    return sample.media[0].path if variant.source == "decode" else bench.artifacts[sample.id]


def frames_of(bench, variant: Variant, sample):
    place = place_of(bench, variant, sample)
    return fetch(place, video_flags(bench.args)) if variant.source == "decode" else load_floats(place)


def take_prompts(bench, variant: Variant, step: int, n: int) -> list:
    """This rank's prompts of the step, as the variant's loader makes them."""
    from train import distributed

    world, rank = distributed.world_size(), distributed.rank()
    if not variant.usual:
        loader = bench.loaders[variant.source]
        loader.position = step * n * world
        return loader.take(n * world)
    samples = Clips(bench.samples).take(step * n * world, n * world)[0][rank::world]
    prompts = [bench.ready[sample.id] for sample in samples]
    jobs = [
        bench.pool.submit(
            load_one, variant.source, place_of(bench, variant, sample), video_flags(bench.args), bench.args.model,
            prompt.text, metadata_of(prompt),
        )
        for sample, prompt in zip(samples, prompts)
    ]  # fmt: skip
    for prompt, job in zip(prompts, jobs):
        if job.result() != len(prompt.input_ids):
            raise RuntimeError(
                f"{prompt.sample.id}: the processor makes {job.result()} ids, not {len(prompt.input_ids)}"
            )
    return prompts


def for_rollout(bench, variant: Variant, prompts: list) -> list:
    """The usual dataflow reads the frames again for vLLM and hands over floats, which it processes and hashes."""
    if not variant.usual:
        return prompts
    read = bench.threads.map(lambda prompt: frames_of(bench, variant, prompt.sample), prompts)
    wide = bench.flags.recipe_frames == "float"
    remade = []
    for prompt, frames in zip(prompts, read):
        frames = frames.numpy() if wide else np.ascontiguousarray(frames.byte().numpy().transpose(0, 2, 3, 1))
        vllm_prompt = {key: value for key, value in prompt.vllm_prompt.items() if key != "multi_modal_uuids"}
        vllm_prompt["multi_modal_data"] = {"video": [(frames, metadata_of(prompt))]}
        remade.append(replace(prompt, vllm_prompt=vllm_prompt, patches=None))  # vLLM renders it
    return remade


def for_training(bench, variant: Variant, prompts: list, check: bool) -> None:
    """The usual dataflow reads and processes once more on the rank that trains. With `check`, compares the result."""
    if not variant.usual:
        return

    def work(prompt):
        frames = frames_of(bench, variant, prompt.sample)
        return process_frames(bench.args.model, frames, prompt.text, metadata_of(prompt))

    for prompt, made in zip(prompts, bench.threads.map(work, prompts)):
        if check:
            compare_inputs(bench, prompt, made)


def compare_inputs(bench, prompt, made: dict) -> None:
    """Raises RuntimeError unless the usual recipe and ours give equal ids and, but for rounding, equal pixels."""
    import torch

    from data.normalise import normalise, read_normalisation

    if made["input_ids"][0].tolist() != prompt.input_ids.tolist():
        raise RuntimeError(f"{prompt.sample.id}: the processor's ids differ from the encoder's")
    ours = normalise(torch.from_numpy(prompt.patches), *read_normalisation(bench.args.model))
    gap = (made["pixel_values_videos"].float() - ours).abs().mean().item()
    if gap > 0.05:  # decoders may differ by a level or two in colour conversion; one level is 2 / 255 here
        raise RuntimeError(f"{prompt.sample.id}: pixel values of the two recipes differ by {gap:.3f} on average")
