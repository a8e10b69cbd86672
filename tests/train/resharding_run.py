"""Program behind test_resharding.py: two updates and a checkpoint, or a checkpoint that another number of ranks saved.

torchrun --nproc_per_node 2 tests/train/resharding_run.py save MODEL_DIR FOLDER OUT.pt [OPTIMIZER]
torchrun --nproc_per_node 3 tests/train/resharding_run.py load MODEL_DIR FOLDER OUT.pt [OPTIMIZER]

OUT.pt: every parameter's master weights and moments at the checkpoint, gathered by DeepSpeed's own functions, and the
weights after one more update, with the residues that Kahan's summation holds beside them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from tests.train.packed_cases import PromptMaker
from tests.train.policy_run import CASES, make_args, start_on_cpu, update
from train import distributed, resharding
from train.batching import dummy_group
from train.policy import build_policy


def snapshot(policy) -> dict:
    """Everything that is to survive, whole: collective."""
    found = {}
    for name, parameter in policy.model.named_parameters():
        found[name] = safe_get_full_fp32_param(parameter).cpu().clone()
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"{name}/{key}"] = safe_get_full_optimizer_state(parameter, key).cpu().clone()
    optimizer = policy.engine.optimizer.optimizer
    found["steps"] = sorted({float(state["step"]) for state in optimizer.state.values()})
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    found["settings"] = [
        {k: group[k] for k in ("lr_ratio", "weight_decay", "part", "betas", "eps")} for group in settings
    ]
    gradients = policy.engine.optimizer.grad_partitions_flat_buffer
    found["gradient_bytes_share"] = (
        gradients.element_size() * gradients.numel() * torch.distributed.get_world_size() / (policy.parameter_count)
    )
    found["weights"] = dict(policy.named_tensors())
    found["skipped"], found["global_steps"] = policy.engine.skipped_steps, policy.engine.global_steps
    return found


def main() -> None:
    what, model_dir, folder, out, *rest = sys.argv[1:]
    device, rank, world = start_on_cpu()
    policy = build_policy(
        make_args(model_dir, dtype="bf16" if rest else "fp32", optimizer=(rest or ["adamw"])[0]), device=device
    )
    maker = PromptMaker(model_dir, policy.model.config)
    groups = [maker.group(*case)[0] for case in CASES]
    tokens = float(sum(len(r.token_ids) for g in groups for r in g.responses))
    count = -(-len(groups) // world)
    mine = [[group] for group in groups[rank::world]]
    mine += [[dummy_group()]] * (count - len(mine))
    if what == "save":
        for _ in range(2):
            update(policy, mine, tokens)
        policy.engine.save_checkpoint(folder, tag="state", save_latest=False)
    else:
        resharding.load(policy.engine, Path(folder) / "state", len(list(Path(folder).glob("state/*optim_states.pt"))))
    found = snapshot(policy)
    found["report"] = update(policy, mine, tokens)
    found["after"] = dict(policy.named_tensors())
    kahan = rest == ["adamw_kahan"]
    found["residue"] = {
        name: safe_get_full_optimizer_state(parameter, "residue").cpu().clone()
        for name, parameter in (policy.model.named_parameters() if kahan else ())
    }
    if rank == 0:
        torch.save(found, out)
    distributed.barrier("leave together")  # a rank that still writes must not lose the others
    distributed.shutdown()


if __name__ == "__main__":
    main()
