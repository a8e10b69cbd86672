"""Program behind test_sequence_parallel.py: one micro-batch with and without cut sequences, on 2 or 4 ranks, no ZeRO.

torchrun --nproc_per_node 2 tests/train/sequence_run.py OUT.json FAMILY MODEL_DIR [FAMILY MODEL_DIR ...]

OUT.json: {"<family>/<pack>": {"logprobs", "entropies": largest difference, "gradients": worst norm of the difference over
norm, "worst": that parameter, "tokens", "visual", "tower": patches that each rank's tower saw}}
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import json

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForImageTextToText

from data.normalise import read_normalisation
from tests.train.packed_cases import PromptMaker
from train import distributed
from train.batching import dummy_group
from train.group_attention import pack
from train.packed_model import PackedModel
from train.sequence_parallel import sequence_set

PACKS = {
    "video": [("video", [5, 9, 1], 1)],
    "mixed": [("text", [4, 6], 2), ("both", [7, 2], 3), ("image", [3], 4), ("video", [2, 2], 5)],
    "image": [("image", [3, 8], 7)],  # one picture, one temporal patch: a rank has no share of the tower's work
    "text": [("text", [3, 8], 4)],
    "dummy": None,
}


def main() -> None:
    out, *words = sys.argv[1:]
    torch.set_num_threads(1)
    device = distributed.init(device="cpu")
    sequence = sequence_set(distributed.world_size())
    seen = {}
    for family, folder in zip(words[::2], words[1::2]):
        hf = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = PackedModel(hf, normalisation=read_normalisation(folder), banned_ids=(440, 441), logit_chunk=7).train()
        maker = PromptMaker(folder, hf.config)
        patches: list[int] = []
        hf.model.visual.register_forward_pre_hook(lambda _, inputs, into=patches: into.append(len(inputs[0])))
        for name, cases in PACKS.items():
            groups = [maker.group(*case)[0] for case in cases] if cases else [dummy_group()]
            results, gradients = [], []
            for shared in (None, sequence):
                model.zero_grad()
                patches.clear()
                packed = pack(groups, backend="sdpa", device=device, banned_ids=model.banned_array, sequence=shared)
                logprobs, entropies = model(packed, temperature=0.8, entropy=True)
                weights = torch.randn(2, len(logprobs), generator=torch.Generator().manual_seed(3))
                (logprobs * weights[0] + entropies * weights[1]).sum().backward()
                results.append((logprobs.detach(), entropies.detach()))
                missing = [n for n, p in model.hf.named_parameters() if p.grad is None]
                gradients.append({n: p.grad.clone() for n, p in model.hf.named_parameters() if p.grad is not None})
            with torch.no_grad():  # a frozen tower: features once per step, from the shares of all ranks
                stored = model(packed, features_only=True) if packed.patches is not None else []
                frozen = model(packed, temperature=0.8, features=stored)[0]
            for value in gradients[1].values():
                dist.all_reduce(value)
            total = sum(g.norm() ** 2 for g in gradients[0].values()) ** 0.5
            errors, silent = {}, []
            for n, g in gradients[0].items():
                apart = (gradients[1][n] - g).norm()
                if name == "dummy" and any(part in n for part in ("q_proj", "k_proj", "q_norm", "k_norm")):
                    # One key to attend to: the gradient of queries and keys is 0, and what both compute is rounding.
                    errors[n] = (apart / total).item()
                elif g.any():
                    errors[n] = (apart / g.norm()).item()
                elif apart > 0:
                    silent.append(n)
            worst = max(errors, key=errors.get)
            tower = distributed.all_gather_objects(patches)
            everywhere = distributed.all_gather_objects([x.tolist() for x in results[1]])
            seen[f"{family}/{name}"] = {
                "logprobs": (results[1][0] - results[0][0]).abs().max().item(),
                "frozen": (frozen - results[0][0]).abs().max().item(),
                "entropies": (results[1][1] - results[0][1]).abs().max().item(),
                "gradients": errors[worst], "worst": worst, "compared": len(errors), "silent": silent, "missing": missing,
                "tokens": packed.layout.length, "visual": len(packed.visual_positions), "tower": tower,
                "same_on_all": all(values == everywhere[0] for values in everywhere),
            }  # fmt: skip
    # A critic: values instead of log-probs.
    model.value_head = nn.Linear(hf.config.get_text_config().hidden_size, 1)
    nn.init.constant_(model.value_head.weight, 0.1)  # the same on every rank
    nn.init.constant_(model.value_head.bias, 0.2)
    groups = [maker.group(*case)[0] for case in PACKS["mixed"]]
    values = [
        model(pack(groups, backend="sdpa", device=device, sequence=shared))[0].detach() for shared in (None, sequence)
    ]
    seen["critic"] = (values[1] - values[0]).abs().max().item() / values[0].abs().max().item()
    if distributed.is_main():
        Path(out).write_text(json.dumps(seen))
    distributed.barrier("leave together")  # a rank that still writes must not lose the others
    distributed.shutdown()


if __name__ == "__main__":
    main()
