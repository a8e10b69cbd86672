"""Program behind test_policy.py: drives a Policy on ZeRO-3 with 1 or 2 ranks and writes what it saw as JSON.

torchrun --nproc_per_node 2 tests/train/policy_run.py MODEL_DIR OUT.json
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import tempfile

import torch
from safetensors.torch import load_file

from tests.train.packed_cases import PromptMaker
from train import distributed
from train.batching import dummy_group
from train.policy import build_critic, build_policy, build_reference

CASES = [("video", [5, 9], 1), ("text", [4, 6], 2), ("both", [7, 2], 3), ("text", [3, 8], 4)]


def make_args(model: str, **changes) -> argparse.Namespace:
    values = {
        "model": model,
        "dtype": "fp32",
        "attention": "auto",
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-2,
        "vision_learning_rate": 4e-4,
        "merger_learning_rate": 2e-3,
        "weight_decay": 0.1,
        "adam_betas": (0.9, 0.95),
        "adam_eps": 1e-4,
        "max_grad_norm": 0.5,
        "gradient_checkpointing": True,
        "max_nonfinite_steps": 2,
        "seed": 0,
    }
    return argparse.Namespace(**{**values, **changes})


def start_on_cpu() -> tuple[torch.device, int, int]:
    """What the programs of Policy on a CPU do first -> (device, rank, ranks)."""
    torch.set_num_threads(1)
    device = distributed.init(device="cpu")
    distributed.init_deepspeed(device)
    return device, distributed.rank(), distributed.world_size()


def weighted(logprobs, denominator: float):
    """A loss whose weight of a token depends on its place, so that rows and columns cannot be mixed up unseen."""
    places = 1.0 + torch.arange(logprobs.shape[1])[None, :] / 10
    return -(logprobs * places).sum() / denominator


def update(policy, micro_batches, denominator: float, lr: float = 1e-3) -> dict:
    for number, groups in enumerate(micro_batches):
        logprobs, _ = policy.logprobs(groups)
        weight = 0.0 if groups[0].prompt.sample.id == "dummy" else 1.0
        policy.backward(weighted(logprobs, denominator) * weight, last=number == len(micro_batches) - 1)
    return policy.step(lr)


def main() -> None:
    model_dir, out = sys.argv[1:3]
    device, rank, world = start_on_cpu()
    policy = build_policy(make_args(model_dir), device=device, banned_ids=(440, 441))
    maker = PromptMaker(model_dir, policy.model.config)
    groups = [maker.group(*case)[0] for case in CASES]
    tokens = float(sum(len(r.token_ids) for g in groups for r in g.responses))
    # Two ranks: rank 0 gets the two with media, rank 1 the two of text: the tower is still called equally often.
    mine = [[groups[0]], [groups[2]]] if rank == 0 else [[groups[1]], [groups[3]]]
    if world == 1:
        mine = [[groups[0], groups[1]], [groups[2], groups[3]]]
    seen: dict = {"parameter_count": policy.parameter_count}

    # ---- names and buckets
    names = [name for name, _ in policy.named_tensors(1 << 30)]
    small = dict(policy.named_tensors(1 << 14))
    saved = load_file(f"{model_dir}/model.safetensors")
    seen["names"] = names
    seen["same_as_file"] = all(torch.equal(small[name], saved[name]) for name in names if name in saved)
    seen["names_in_file"] = sum(name in saved for name in names)

    # ---- reference, and log-probs without gradient
    reference = build_reference(make_args(model_dir), device=device, banned_ids=(440, 441))
    with torch.no_grad():
        before, entropy = policy.logprobs(mine[0], entropy=True)
        reference_before, _ = reference.logprobs(mine[0])
    seen["rows"] = [list(before.shape), list(entropy.shape)]
    seen["reference_gap"] = (before - reference_before).abs().max().item()

    # ---- three updates, the last with a rank that has nothing to do
    seen["steps"] = [update(policy, mine, tokens) for _ in range(2)]
    last = [groups] if rank == 0 else [[dummy_group()]]
    seen["steps"].append(update(policy, last, tokens, lr=5e-4))
    state = policy.full_state_dict(1 << 16)
    if rank == 0:
        torch.save(state, out + ".weights.pt")
    with torch.no_grad():
        reference_after, _ = reference.logprobs(mine[0])
        seen["policy_moved"] = (policy.logprobs(mine[0])[0] - before).abs().max().item()
    seen["reference_moved"] = (reference_after - reference_before).abs().max().item()

    # ---- a gradient that is not finite on one rank only
    weights = dict(policy.named_tensors())
    for attempt in range(2):
        logprobs, _ = policy.logprobs(mine[0])
        policy.backward(logprobs.sum() * (float("nan") if rank == world - 1 else 1.0))
        try:
            seen[f"nonfinite_{attempt}"] = policy.step(1e-3)
        except FloatingPointError as error:
            seen[f"nonfinite_{attempt}"] = str(error)
    seen["unchanged_after_skip"] = all(torch.equal(weights[n], t) for n, t in policy.named_tensors())

    # ---- save, move on, come back: the next step is the same bit for bit
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    torch.distributed.broadcast_object_list(folder)
    policy.engine.save_checkpoint(folder[0], tag="state", save_latest=False)
    first = update(policy, mine, tokens)
    straight = dict(policy.named_tensors())
    policy.load_checkpoint(folder[0], tag="state")
    second = update(policy, mine, tokens)
    seen["resumed_same"] = first == second and all(torch.equal(straight[n], t) for n, t in policy.named_tensors())
    seen["recovered_after_skip"] = second["skipped"] == 0.0

    # ---- frozen vision: features once per step
    settings = {"freeze_vision_tower": True, "freeze_merger": True}
    frozen = build_policy(make_args(model_dir, **settings), device=device)
    calls = []
    frozen.model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    at_start = dict(frozen.named_tensors())
    with torch.no_grad():
        without, _ = frozen.logprobs(mine[0])
    frozen.encode_frozen(mine)
    after_encoding = len(calls)
    with torch.no_grad():
        stored, _ = frozen.logprobs(mine[0])
    seen["frozen_gap"] = (without - stored).abs().max().item()
    update(frozen, [*mine, [dummy_group()]], tokens)
    seen["tower_calls"] = [after_encoding, len(calls)]
    frozen.forget_features()
    moved = {n: not torch.equal(at_start[n], t) for n, t in frozen.named_tensors()}
    seen["frozen_vision_moved"] = sum(m for n, m in moved.items() if "visual" in n)
    seen["language_moved"] = sum(m for n, m in moved.items() if "visual" not in n)

    # ---- critic: learns the value 2 for every token
    critic = build_critic(make_args(model_dir, max_grad_norm=100.0), device=device)
    errors = []
    for _ in range(4):
        values = critic.values(mine[0])
        errors.append(values.abs().max().item() if not errors else (values[values != 0] - 2).abs().mean().item())
        mask = values.new_zeros(values.shape)
        for row, response in enumerate(r for g in mine[0] for r in g.responses):
            mask[row, : len(response.token_ids)] = 1.0
        critic.backward((((values - 2) * mask) ** 2).sum() / mask.sum() / world)
        critic.step(1e-2)
    seen["critic"] = errors
    if rank == 0:
        Path(out).write_text(json.dumps(seen))
    distributed.shutdown()


if __name__ == "__main__":
    main()
