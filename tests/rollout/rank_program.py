"""One rank of test_ranks.py: builds an engine under torchrun, samples, syncs, samples again, writes what it got.

torchrun --nproc_per_node 2 tests/rollout/rank_program.py --model DIR --out DIR [--tensor_parallel 2]
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--out", required=True, help="folder for rank<r>.json")
    parser.add_argument("--tensor_parallel", type=int, default=1, help="ranks per engine")
    args = parser.parse_args()

    import torch
    import torch.distributed as dist
    from transformers import AutoModelForImageTextToText

    from data.encode import Encoder
    from data.records import Sample
    from rollout.engine import RolloutEngine

    dist.init_process_group("gloo")
    encoder = Encoder(args.model, style="direct")
    engine = RolloutEngine(
        args.model,
        encoder=encoder,
        dtype="fp32",
        max_model_len=256,
        max_num_seqs=8,
        kv_cache_gib=0.03125,
        seed=3,
        tensor_parallel=args.tensor_parallel,
    )
    samples = [
        Sample(id=f"q{i}", question=text, answer="A", problem_type="open-ended", data_type="text")
        for i, text in enumerate(["Which colour?", "How many?"])
    ]
    # Data-parallel replicas start with different prompts; the ranks of one engine must not.
    order = [0, 1] if args.tensor_parallel > 1 or dist.get_rank() == 0 else [1, 0]
    prompts = [encoder.encode(samples[i]) for i in order]
    sampling = {"temperature": 1.0, "max_tokens": 10}
    result = []
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32)
    for step in range(2):
        found = {}
        for index, responses in engine.generate(prompts, n=2, sampling=sampling, step=step):
            found[prompts[index].sample.id] = [[r.token_ids, r.rollout_logprobs] for r in responses]
        result.append(found)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        engine.sync((name, parameter.detach()) for name, parameter in model.named_parameters())
    result.append(engine.replica)
    (Path(args.out) / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # vLLM and gloo tear each other down in no fixed order


if __name__ == "__main__":
    main()
