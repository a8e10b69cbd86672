"""Program behind test_parity.py: policy and engine of one family on one device, a large update, a sync, the old weights back.

python tests/gpu/parity_run.py MODEL_DIR MEDIA_FOLDER OUT.json ATTENTION

Runs on a CPU too (fp32, no sleep), so that it can be tried without a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import faulthandler
import fcntl
import json
import os
from contextlib import contextmanager

import torch
from transformers import AutoModelForImageTextToText

from data.encode import Encoder, read_config
from data.normalise import normalise
from data.records import Group, Media, Sample
from rollout import vllm_access
from rollout.engine import RolloutEngine
from tests.rollout.test_parity import score
from tests.train.policy_run import make_args
from train import distributed
from train.policy import build_policy

VIDEO = {"fps": 2.0, "min_frames": 4, "max_frames": 8, "min_pixels": 4096, "max_pixels": 112 * 224}
IMAGE = {"min_pixels": 4096, "max_pixels": 128 * 128}
MIXES = (("wide.mp4",), ("wide.mp4", "odd.mp4"), ("still.png", "odd.mp4"), ())
TEMPERATURE = 0.8
SAMPLING = {"temperature": TEMPERATURE, "max_tokens": 24}


def make_sample(folder: Path, names, number: int) -> Sample:
    media = tuple(Media("image" if n.endswith("png") else "video", path=str(folder / n)) for n in names)
    kind = "mixed" if len(names) > 1 else "video" if names else "text"
    return Sample(f"q{number}", "Which colour is the square?", "A", "multiple choice", kind, media, ("red", "green"))


def sample(engine, prompts, step: int) -> list[Group]:
    """Groups of three responses. The engine compares its prompt ids with ours and raises if they differ."""
    groups = [None] * len(prompts)
    for index, responses in engine.generate(prompts, n=3, sampling=SAMPLING, step=step):
        groups[index] = Group(prompts[index], responses)
    return groups


def gap(policy, groups) -> float:
    """Mean distance of vLLM's log-probs from the policy's, over all sampled tokens."""
    with torch.no_grad():
        scored, _ = policy.logprobs(groups, temperature=TEMPERATURE)
    sampled = [torch.tensor(response.rollout_logprobs) for group in groups for response in group.responses]
    return float(torch.cat([(scored[i, : len(row)].cpu() - row).abs() for i, row in enumerate(sampled)]).mean())


def distances(policy, plain, encoder, groups) -> dict[str, dict[str, float]]:
    """Mean distance of the policy's and of vLLM's log-probs from those of the library in fp32 on the host, per mix of media:
    where the two differ from each other, this says which of them is wrong, and on what."""
    found = {}
    for names, group in zip(MIXES, groups):
        truth = [score(plain, encoder, group.prompt, response, TEMPERATURE) for response in group.responses]
        with torch.no_grad():
            scored, _ = policy.logprobs([group], temperature=TEMPERATURE)
        ours = [row[: len(true)].float().cpu() for row, true in zip(scored, truth)]
        theirs = [torch.tensor(response.rollout_logprobs) for response in group.responses]
        found[" ".join(names) or "text"] = {
            name: float(torch.cat([(a - b).abs() for a, b in zip(rows, truth)]).mean())
            for name, rows in (("policy", ours), ("vllm", theirs))
        }
    return found


def towers(policy, plain, engine, prompts) -> dict[str, dict[str, float]]:
    """Norm of the difference over norm of merged visual features from the library's fp32 tower, per mix of media."""
    found, mean, std = {}, engine.encoder.image_mean, engine.encoder.image_std
    theirs = vllm_access.model_of(engine.llm).visual
    for names, prompt in zip(MIXES, prompts):
        if prompt.patches is None:
            continue
        pixels = normalise(torch.from_numpy(prompt.patches), mean, std)
        with torch.no_grad():
            true = plain.model.visual(
                pixels, grid_thw=torch.from_numpy(prompt.grid_thw), return_dict=True
            ).pooler_output
            patches = torch.from_numpy(prompt.patches).to(policy.device)
            (ours, *_), _ = policy.packed.visual_features(patches, prompt.grid_thw)
            # Bytes where this vLLM normalises on the device, floats of its dtype where it does not.
            given = patches if engine.inputs._dtype == torch.uint8 else pixels.to(ours.device, ours.dtype)
            made = theirs(given, grid_thw=prompt.grid_thw.tolist())[:, : true.shape[1]]
        found[" ".join(names)] = {
            name: float((features.float().cpu() - true).norm() / true.norm())
            for name, features in (("policy", ours), ("vllm", made))
        }
    return found


def weighted(logprobs, tokens: float):
    """A loss whose weight of a token depends on its place."""
    places = 1.0 + torch.arange(logprobs.shape[1], device=logprobs.device)[None, :] / 10
    return -(logprobs * places).sum() / tokens


@contextmanager
def alone(folder: Path):
    """One program at a time in here: vLLM's sleep ends the process if the device's free memory falls meanwhile."""
    with (folder / "device.lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def used_gib() -> float:
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def main() -> None:
    faulthandler.dump_traceback_later(45, repeat=True)  # where it is, if it takes that long
    model_dir, media_folder, out, attention = sys.argv[1:5]
    device = distributed.init()
    distributed.init_deepspeed(device)
    cuda = device.type == "cuda"
    encoder = Encoder(model_dir, video=VIDEO, image=IMAGE, style="direct")
    args = make_args(model_dir, dtype="auto", attention=attention, vision_learning_rate=None, merger_learning_rate=None)
    policy = build_policy(args, device=device, banned_ids=encoder.visual_token_ids)
    vllm_access.prepare_environment()
    from vllm import LLM  # noqa: F401 - most of an engine's start is this import, which need not be alone

    turn = Path(out).parent
    with alone(turn):
        engine = RolloutEngine(
            model_dir, encoder=encoder, dtype="bf16" if cuda or encoder.family == "qwen3_5" else "fp32",
            max_model_len=1024, max_num_seqs=16, kv_cache_gib=2.0 if cuda else 0.0625, enforce_eager=True, seed=3,
        )  # fmt: skip
    engine.sync(policy.named_tensors())
    first = {name: tensor.cpu() for name, tensor in policy.named_tensors()}
    prompts = [encoder.encode(make_sample(Path(media_folder), names, i)) for i, names in enumerate(MIXES)]
    seen: dict = {"names": len(first)}

    groups = sample(engine, prompts, 0)
    seen["gap_at_start"] = gap(policy, groups)
    start = [(r.token_ids, r.rollout_logprobs) for group in groups for r in group.responses]
    plain = AutoModelForImageTextToText.from_pretrained(
        model_dir, config=read_config(model_dir), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    seen["from_fp32"] = distances(policy, plain, encoder, groups)
    seen["towers_from_fp32"] = towers(policy, plain, engine, prompts)
    Path(out).with_suffix(".first.json").write_text(json.dumps(seen))  # for one who looks before the end
    del plain

    with alone(turn):
        awake = used_gib()
        engine.sleep()
        asleep = used_gib()
    tokens = float(sum(len(r.token_ids) for group in groups for r in group.responses))
    for _ in range(3):
        logprobs, _ = policy.logprobs(groups, temperature=TEMPERATURE)
        policy.backward(weighted(logprobs, tokens))
        policy.step(1e-2)
    seen["gap_of_old_responses"] = gap(policy, groups)  # the policy has moved away from what was sampled
    engine.wake(weights=True, kv=False)
    seen["synced"] = engine.sync(policy.named_tensors(1 << 16))
    with alone(turn):
        engine.wake(weights=False, kv=True)
    seen["awake_gib"], seen["asleep_gib"], seen["awake_again_gib"] = awake, asleep, used_gib()
    seen["gap_after_sync"] = gap(policy, sample(engine, prompts, 1))

    # The first weights again: the engine must be what it was, to the last bit of what it computes.
    engine.sync((name, tensor.to(device)) for name, tensor in first.items())
    again = [(r.token_ids, r.rollout_logprobs) for group in sample(engine, prompts, 0) for r in group.responses]
    seen["same_tokens"] = sum(a[0] == b[0] for a, b in zip(start, again)) / len(start)
    seen["same_logprobs_gap"] = max(
        abs(x - y) for a, b in zip(start, again) if a[0] == b[0] for x, y in zip(a[1], b[1])
    )
    seen["rendered_here"] = {" and ".join(kinds): equal for kinds, equal in engine.inputs.equal.items()}
    Path(out).write_text(json.dumps(seen))
    sys.stdout.flush()
    os._exit(0)  # threads of vLLM can hold an ordinary exit


if __name__ == "__main__":
    main()
