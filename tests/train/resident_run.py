"""Program behind test_resident.py: the same updates with parameters gathered module by module and with all of them resident.

torchrun --nproc_per_node 2 tests/train/resident_run.py MODEL_DIR OUT.json
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import json
import tempfile

import torch
from deepspeed.runtime.zero.utils import apply_to_tensors_only
from transformers import AutoConfig

from tests.train.packed_cases import PromptMaker
from tests.train.policy_run import CASES, make_args, start_on_cpu, update
from train import distributed
from train.policy import build_policy, build_reference

VARIANTS = {
    "plain": {"gradient_checkpointing": False},
    "recomputed, tower frozen": {"freeze_vision_tower": True, "offload": "optimizer"},
}
NATIVE_LINEAR = torch.nn.functional.linear


class Identity(torch.autograd.Function):
    """A node of the graph that changes nothing."""

    @staticmethod
    def forward(context, tensor):
        return tensor.detach()

    @staticmethod
    def backward(context, gradient):
        return gradient


def stand_in(policy) -> None:
    """Nodes that change nothing where DeepSpeed's hooks put theirs: on what enters and on what leaves every module.

    Autograd adds up the gradients of a tensor with three readers (queries, keys and values) in the order in which its graph
    became ready, and the hooks' nodes change that order: with these the sums are rounded as they are with the hooks.
    """
    for module in policy.packed.modules():
        module.register_forward_hook(lambda module, inputs, output: apply_to_tensors_only(Identity.apply, output))
        module.register_forward_pre_hook(lambda module, inputs: apply_to_tensors_only(Identity.apply, inputs))


def train(policy, mine: list, tokens: float, steps: int = 2) -> dict:
    """Updates with the passes around them that the loop makes -> reports, log-probs after them, and the weights."""
    reports = []
    for _ in range(steps):
        policy.encode_frozen(mine)
        with torch.no_grad():
            policy.logprobs(mine[0])
        reports.append(update(policy, mine, tokens))
        weights = dict(policy.named_tensors(1 << 14))  # as the weight sync does
    with torch.no_grad():
        logprobs = policy.logprobs(mine[0])[0]
    policy.forget_features()
    return {"reports": reports, "logprobs": logprobs, "weights": weights}


def equal(one: dict, other: dict) -> bool:
    as_good = one["reports"] == other["reports"] and torch.equal(one["logprobs"], other["logprobs"])
    return as_good and same(one["weights"], other["weights"])


def same(one: dict, other: dict) -> bool:
    """Whether the tensors of two models are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def hooks_of(policy) -> int:
    """Hooks on the modules of a policy."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in policy.packed.modules())


def build(model_dir: str, choice: str, device, **changes):
    return build_policy(make_args(model_dir, resident_parameters=choice, **changes), device=device)


def main() -> None:
    model_dir, out = sys.argv[1:]
    device, rank, world = start_on_cpu()
    maker = PromptMaker(model_dir, AutoConfig.from_pretrained(model_dir))
    groups = [maker.group(*case)[0] for case in CASES]
    tokens = float(sum(len(r.token_ids) for g in groups for r in g.responses))
    mine = [[group] for group in groups[rank::world]]
    seen: dict = {"equal": {}, "hooks": {}}

    def compare(name: str, one: dict, other: dict) -> None:
        seen["equal"][name] = all(distributed.all_gather_objects(equal(one, other)))

    # ---- as they are, on the linear function that DeepSpeed has not replaced yet
    own = build(model_dir, "on", device, gradient_checkpointing=False)
    seen["linear is torch's"] = torch.nn.functional.linear is NATIVE_LINEAR
    seen["hooks"]["on"] = hooks_of(own)
    start = dict(own.named_tensors())
    with torch.no_grad():
        start_logprobs = own.logprobs(mine[0])[0]
    policy, own = own, train(own, mine, tokens)
    whole = sum(p.numel() for p in policy.resident) == policy.parameter_count
    beside = sum(p.numel() for p in policy.resident if p.data_ptr() != p.ds_tensor.data_ptr())
    seen["beside the shard"] = beside / policy.parameter_count if whole else "not all is gathered"

    # ---- with nodes in place of the hooks' nodes: bit for bit
    kept = {}
    for name, changes in VARIANTS.items():
        pair = {choice: build(model_dir, choice, device, **changes) for choice in ("off", "on")}
        stand_in(pair["on"])
        runs = {choice: train(policy, mine, tokens) for choice, policy in pair.items()}
        compare(name, runs["off"], runs["on"])
        kept[name] = pair, runs
    pair, runs = kept["plain"]
    seen["hooks"]["off"] = hooks_of(pair["off"])
    seen["grad_norm"] = runs["on"]["reports"][0]["grad_norm"]
    gaps = {n: (own["weights"][n] - w).norm() / (w - start[n]).norm() for n, w in runs["off"]["weights"].items()}
    seen["gap to the hooks, of the way"] = float(max(gaps.values()))

    # ---- a step that is skipped drops the gathered weights and brings no new ones
    for choice, policy in pair.items():
        policy.backward(policy.logprobs(mine[0])[0].sum() * float("nan"))
        seen[f"skipped/{choice}"] = policy.step(1e-3)["skipped"]
    after = {choice: train(policy, mine, tokens, steps=1) for choice, policy in pair.items()}
    compare("after a skipped step", after["off"], after["on"])

    # ---- checkpoints of either kind, read by the other; training goes on after saving
    folder = distributed.broadcast_object(tempfile.mkdtemp() if rank == 0 else None)
    for choice, policy in pair.items():
        policy.engine.save_checkpoint(f"{folder}/{choice}", tag="state", save_latest=False)
    straight = {choice: train(policy, mine, tokens, steps=1) for choice, policy in pair.items()}
    compare("after a checkpoint", straight["off"], straight["on"])
    for choice, other in (("off", "on"), ("on", "off")):
        pair[choice].load_checkpoint(f"{folder}/{other}", "state")
        compare(f"{choice}, resumed from {other}", train(pair[choice], mine, tokens, steps=1), straight["on"])

    # ---- the reference, an engine without optimiser
    reference = build_reference(make_args(model_dir, resident_parameters="on"), device=device)
    seen["hooks"]["reference"] = hooks_of(reference)
    with torch.no_grad():
        logprobs = reference.logprobs(mine[0])[0]
    found = {"reports": [], "logprobs": logprobs, "weights": dict(reference.named_tensors())}
    compare("reference", {"reports": [], "logprobs": start_logprobs, "weights": start}, found)
    if rank == 0:
        Path(out).write_text(json.dumps(seen, indent=1))
    distributed.barrier("leave together")
    distributed.shutdown()


if __name__ == "__main__":
    main()
