"""Program behind test_policy.py: rotary frequencies of a bf16 policy on ZeRO-3, and its log-probs after a long prompt.

torchrun --nproc_per_node 1 tests/train/frequency_run.py OUT.json MODEL_DIR...
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import json

import torch
from transformers import AutoModelForImageTextToText

from data.encode import Encoder
from data.records import Group, Response, Sample
from tests.rollout.test_parity import score
from tests.train.policy_run import make_args
from train import distributed
from train.policy import build_policy


def main() -> None:
    device, seen = distributed.init(), {}
    distributed.init_deepspeed(device)
    for model_dir in sys.argv[2:]:
        encoder = Encoder(model_dir, video={"fps": 2.0}, image={}, style="direct")
        sample = Sample("long", "which colour is it " * 160, "A", "open-ended", "text")
        prompt = encoder.encode(sample)
        response = Response(list(range(20, 60)), [], "length")
        made = {}
        for dtype in (torch.bfloat16, torch.float32):
            plain = AutoModelForImageTextToText.from_pretrained(
                model_dir, dtype=dtype, attn_implementation="sdpa"
            ).eval()
            made[dtype] = score(plain, encoder, prompt, response, 1.0)
        args = make_args(model_dir, dtype="bf16", vision_learning_rate=None, merger_learning_rate=None)
        policy = build_policy(args, device=device, banned_ids=encoder.visual_token_ids)
        with torch.no_grad():
            ours, _ = policy.logprobs([Group(prompt, [response])])
        buffers = {
            name.removeprefix("hf.model."): b for name, b in policy.packed.named_buffers() if name.endswith(".inv_freq")
        }
        seen[model_dir] = {
            "prompt_tokens": len(prompt.input_ids),
            "dtypes": sorted({str(buffer.dtype) for buffer in buffers.values()}),
            "frequencies": {name: buffer[:3].tolist() for name, buffer in buffers.items()},
            "from_fp32": float((ours[0].float() - made[torch.float32]).abs().mean()),
            "library_from_fp32": float((made[torch.bfloat16] - made[torch.float32]).abs().mean()),
        }
    Path(sys.argv[1]).write_text(json.dumps(seen))
    distributed.shutdown()


if __name__ == "__main__":
    main()
