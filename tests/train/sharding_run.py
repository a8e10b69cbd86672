"""Program behind test_sharding.py: the same two updates with states and weights kept in other places.

torchrun --nproc_per_node 4 tests/train/sharding_run.py MODEL_DIR OUT.pt

OUT.pt: {"none" | "optimizer" | "all" | "hpz": {"steps": reports, "logprobs": without gradient after the updates, "weights"}}
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from tests.train.packed_cases import PromptMaker
from tests.train.policy_run import CASES, make_args, start_on_cpu, update
from train import distributed
from train.policy import build_policy

VARIANTS = {
    "none": {},
    "optimizer": {"offload": "optimizer"},
    "all": {"offload": "all"},
    "hpz": {"hpz_partition_size": 2},
}


def main() -> None:
    model_dir, out = sys.argv[1:]
    device, rank, world = start_on_cpu()
    seen: dict = {}
    for name, changes in VARIANTS.items():
        policy = build_policy(make_args(model_dir, **changes), device=device)
        maker = PromptMaker(model_dir, policy.model.config)
        groups = [maker.group(*case)[0] for case in CASES]
        tokens = float(sum(len(r.token_ids) for g in groups for r in g.responses))
        mine = [[group] for group in groups[rank::world]] * 2  # two micro-batches: the second adds to the first
        steps, weights = [], {}
        for _ in range(2):
            with torch.no_grad():  # as the pass for old log-probs does, before every update
                policy.logprobs(mine[0])
            steps.append(update(policy, mine, 2 * tokens))
            weights = {tensor: value.cpu() for tensor, value in policy.named_tensors()}  # as the weight sync does
        with torch.no_grad():
            logprobs = policy.logprobs(mine[0])[0]
        zero = policy.engine.optimizer
        second = {p.ds_secondary_tensor.numel() / p.ds_tensor.numel() for p in policy.model.parameters()
                  if p.ds_secondary_tensor is not None}  # fmt: skip
        seen[name] = {"steps": steps, "logprobs": logprobs, "weights": weights, "second_copy": second}
        seen[name]["offloaded"] = [bool(zero.offload_optimizer), bool(zero.offload_param)]
    if rank == 0:
        torch.save(seen, out)
    distributed.barrier("leave together")  # a rank that still writes must not lose the others
    distributed.shutdown()


if __name__ == "__main__":
    main()
