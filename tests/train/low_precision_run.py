"""Program behind test_low_precision.py: the AdamW variants on ZeRO-3 (real DeepSpeed, gloo), weights written to a file.

torchrun --nproc_per_node 2 tests/train/low_precision_run.py OUT.pt
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import tempfile

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from train import distributed
from train.optimizer import parameter_groups
from train.policy import build_trained_optimizer, deepspeed_config, start_engine

ROWS, COLUMNS, STEPS = 64, 128, 80
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.02}


def start() -> torch.Tensor:
    """(ROWS, COLUMNS) bf16 values as float32; the lower half, which the second rank holds, equals the upper one."""
    half = torch.randn(ROWS // 2, COLUMNS, generator=torch.Generator().manual_seed(99))
    return torch.cat([half, half]).to(torch.bfloat16).float()


def gradient(step: int) -> torch.Tensor:
    """The gradient of every tensor at this step, exact in bf16; the lower half equals the upper one."""
    half = 0.3 + torch.randn(ROWS // 2, COLUMNS, generator=torch.Generator().manual_seed(step))
    return torch.cat([half, half]).to(torch.bfloat16).float()


MICRO_BATCHES = {  # name -> the gradients of one update's micro-batches
    # Half a unit of bf16 at 1 is 2^-8: each addend alone is rounded away, all 16 together are 2^-5.
    "small": [torch.ones(ROWS, COLUMNS)] + 16 * [torch.full((ROWS, COLUMNS), 2.0**-9)],
    "random": [gradient(step) for step in range(100, 105)],
}


class Linear(nn.Module):
    """loss = sum(weight * coefficients): a gradient that does not depend on the weights."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(start().to(dtype))

    def forward(self, coefficients):
        return (self.weight.float() * coefficients).sum()


class Two(nn.Module):
    """Two equal tensors, each a sub-group of its own, so that nothing but rounding can tell them apart."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.first, self.second = Linear(dtype), Linear(dtype)

    def forward(self, coefficients):
        return self.first(coefficients) + self.second(coefficients)


def build(kind: str, dtype: torch.dtype, device, summed: str = "fp32", clip: float = 1e9, sub_group: int = 4096):
    """DeepSpeed's engine. summed: --grad_accum_dtype. sub_group: elements, of a tensor's shard that two ranks hold: 4096."""
    args = argparse.Namespace(
        optimizer="adamw" if kind == "plain" else kind, max_grad_norm=clip, adam_betas=SETTINGS["betas"],
        adam_eps=SETTINGS["eps"], seed=7, grad_accum_dtype=summed,
    )  # fmt: skip
    asked = argparse.Namespace(**{**vars(args), "optimizer": "adamw_kahan" if kind == "plain" else kind})
    config = deepspeed_config(asked, dtype, device)  # plain: bf16 weights without a master copy, and torch's AdamW
    config["zero_optimization"] |= {"sub_group_size": sub_group, "stage3_param_persistence_threshold": 0}
    model = Two(dtype)
    groups = parameter_groups(model.named_parameters(), SETTINGS["weight_decay"])
    optimizer = build_trained_optimizer(groups, args, SETTINGS["lr"], offload=False)
    return start_engine(model, config, optimizer)


def bytes_per_parameter(engine) -> dict[str, float]:
    """What this rank's ZeRO-3 holds, over its share of the parameters: weights, gradients, and what the optimiser has of its
    own (a master copy that is not the weights themselves, and states; not its counters)."""
    zero = engine.optimizer
    kept = {flat.data_ptr() for flat in zero.fp16_partitioned_groups_flat}
    own = [flat for flat in zero.fp32_partitioned_groups_flat if flat.data_ptr() not in kept]
    for state in zero.optimizer.state.values():
        own += [value for value in state.values() if isinstance(value, torch.Tensor) and value.numel() > 1]
    share = sum(parameter.ds_numel for parameter in engine.module.parameters()) / torch.distributed.get_world_size()
    return {
        "weights": sum(flat.nbytes for flat in zero.fp16_partitioned_groups_flat) / share,
        "gradients": zero.grad_partitions_flat_buffer.nbytes / share,
        "optimiser": sum(tensor.nbytes for tensor in own) / share,
    }


def backward(engine, micro_batches: list[torch.Tensor]) -> None:
    """As Policy.backward: the boundary is set by hand; every rank has the same gradient, and ZeRO divides by the ranks."""
    for number, coefficients in enumerate(micro_batches, 1):
        engine.set_gradient_accumulation_boundary(number == len(micro_batches))
        engine.backward(engine(coefficients))


class Made(TorchDispatchMode):
    """Bytes of the new tensors that operators make: `dtype -> bytes` in all."""

    def __init__(self):
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.cat.default, torch.ops.aten._to_copy.default):
            self.bytes[str(out.dtype)] = self.bytes.get(str(out.dtype), 0) + out.nbytes
        return out


def summed_gradients(device) -> dict[str, object]:
    """--grad_accum_dtype under every optimiser: weights after clipped updates of one micro-batch each, what one with many has
    summed, and bytes per element of what the step copies (both tensors are one sub-group here)."""
    seen = {}
    for kind in ("adamw", "adamw_kahan", "adamw_stochastic"):
        for summed in ("fp32", "bf16"):
            engine = build(kind, torch.bfloat16, device, summed, clip=1.0, sub_group=10**9)
            zero, name = engine.optimizer, f"{kind}/{summed}"
            seen[f"{name}/dtype"] = str(zero.grad_partitions_flat_buffer.dtype)
            train(engine, range(4))
            seen[f"{name}/weights"], seen[f"{name}/norm"] = weights(engine), float(engine.get_global_grad_norm())
            for case, micro_batches in MICRO_BATCHES.items():
                backward(engine, micro_batches)
                seen[f"{name}/{case}"] = zero.grad_partitions_flat_buffer.float().clone()
                engine.step()
            backward(engine, [gradient(0)])
            for made, run in (
                ("norm copies", lambda zero=zero: zero._get_norm_groups()),
                ("copies", lambda zero=zero: zero._prepare_fp32_grad_for_sub_group(0)),
            ):
                with Made() as mode:
                    run()
                elements = zero.grad_partitions_flat_buffer.numel()
                seen[f"{name}/{made}"] = {dtype: size / elements for dtype, size in mode.bytes.items()}
            seen[f"{name}/bytes"] = bytes_per_parameter(engine)
    return seen


def train(engine, steps: range) -> None:
    for step in steps:
        engine.backward(engine(gradient(step)))
        engine.step()


def weights(engine) -> list[torch.Tensor]:
    import deepspeed

    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return [parameter.detach().float().clone() for parameter in parameters]


def main() -> None:
    torch.set_num_threads(1)
    device = distributed.init(device="cpu")
    distributed.init_deepspeed(device)
    seen: dict[str, object] = {}
    for name, kind, dtype in (
        ("fp32", "adamw", torch.float32),
        ("master", "adamw", torch.bfloat16),
        ("plain", "plain", torch.bfloat16),
        ("kahan", "adamw_kahan", torch.bfloat16),
        ("stochastic", "adamw_stochastic", torch.bfloat16),
    ):
        engine = build(kind, dtype, device)
        seen[f"{name}/sub_groups"] = len(engine.optimizer.fp16_groups)
        train(engine, range(STEPS))
        seen[name] = weights(engine)
        seen[f"{name}/bytes"] = bytes_per_parameter(engine)
        seen[f"{name}/moments"] = sorted(
            {str(value.dtype) for state in engine.optimizer.optimizer.state.values()
             for key, value in state.items() if key.startswith("exp_avg")}
        )  # fmt: skip
    seen["summed"] = summed_gradients(device)
    folder = distributed.broadcast_object(tempfile.mkdtemp())
    for kind in ("adamw_kahan", "adamw_stochastic"):
        engine = build(kind, torch.bfloat16, device)
        train(engine, range(4))
        engine.save_checkpoint(folder, tag=kind, save_latest=False)
        train(engine, range(4, 8))
        resumed = build(kind, torch.bfloat16, device)
        resumed.load_checkpoint(folder, tag=kind)
        train(resumed, range(4, 8))
        whole, again = weights(engine), weights(resumed)
        seen[f"{kind}/resumed"] = all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
        seen[f"{kind}/moved"] = not torch.equal(whole[0], start())
    if distributed.is_main():
        torch.save(seen, sys.argv[1])
    distributed.barrier("written")
    distributed.shutdown()


if __name__ == "__main__":
    main()
