"""AdamW with fp32 master weights, two AdamW variants for bf16 weights without a master copy, and the learning rate.

Bytes per parameter (weights, master, gradient excluded, moments): adamw 2 + 4 + 8; adamw_stochastic 2 + 0 + 8;
adamw_kahan 2 + 2 + 8. At RL's learning rates (1e-6) plain bf16 weights do not move: the step is below half a rounding
unit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 24  # elements worked on at once: bounds the fp32 copies of a large flat shard to 64 MiB each


@dataclass
class Schedule:
    """Learning rate as a pure function of the number of updates done; a skipped update does not advance it.

    Warm-up: peak * (u + 1) / warmup_steps for u < warmup_steps, so the first update is not at 0. After that constant,
    cosine or linear down to peak * lr_min_ratio at `total_updates`.
    """

    peak: float
    total_updates: int
    warmup_steps: int = 0
    kind: str = "constant"
    min_ratio: float = 0.0
    updates_done: int = 0

    @classmethod
    def from_args(cls, args, total_updates: int) -> Schedule:
        if args.lr_schedule not in ("constant", "cosine", "linear"):
            raise ValueError(f"--lr_schedule must be constant, cosine or linear, got {args.lr_schedule!r}")
        return cls(args.learning_rate, total_updates, args.warmup_steps, args.lr_schedule, args.lr_min_ratio)

    def value(self) -> float:
        """Learning rate of the next update."""
        done = self.updates_done
        if done < self.warmup_steps:
            return self.peak * (done + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        progress = min(1.0, (done - self.warmup_steps) / max(1, self.total_updates - self.warmup_steps))
        fall = 0.5 * (1.0 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1.0 - progress
        return self.peak * (self.min_ratio + (1.0 - self.min_ratio) * fall)

    def advance(self) -> None:
        """Call after an update that was applied; not after one that was skipped."""
        self.updates_done += 1

    def state_dict(self) -> dict[str, Any]:
        return {"updates_done": self.updates_done}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.updates_done = int(saved["updates_done"])


class AdamWLowPrecision(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) for bf16 weights without fp32 master weights; moments and arithmetic are fp32.

    rounding "stochastic": the new weight is rounded up or down with probabilities that make it right on average; the
    noise of update u is a function of (seed, u, stream), so a resumed run draws the same. Tensors are numbered by a
    `stream` in the order of their first update, kept in their state: an engine such as ZeRO-3 shows its flat shards to
    step() one at a time, where the place in the list would be the same for all. "kahan": the rounding error is kept in
    a bf16 buffer and added to the next update (arXiv 2010.06192). Weights of another dtype than bf16 get plain AdamW.
    Ranks hold different shards and need different seeds.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        rounding: str = "stochastic",
        seed: int = 0,
    ):
        if rounding not in ("stochastic", "kahan"):
            raise ValueError(f"rounding must be stochastic or kahan, got {rounding!r}")
        if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr {lr}, betas {betas}, eps {eps}, weight_decay {weight_decay}: out of range")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.rounding = rounding
        self.seed = seed

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if parameter.grad.is_sparse:
            raise ValueError("sparse gradients are not supported")
        state = self.state[parameter]
        if not state:
            state["stream"] = len(self.state) - 1  # self.state holds this one already
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            if self.rounding == "kahan" and parameter.dtype == torch.bfloat16:
                state["residue"] = torch.zeros_like(parameter)
        state["step"] += 1
        generator = None
        if self.rounding == "stochastic" and parameter.dtype == torch.bfloat16:
            generator = torch.Generator(device=parameter.device)
            generator.manual_seed(noise_seed(self.seed, state["step"], state["stream"]))
        names = [name for name in ("exp_avg", "exp_avg_sq", "residue") if name in state]
        flat = {name: state[name].view(-1) for name in names}
        weights, gradient = parameter.view(-1), parameter.grad.reshape(-1)
        for start in range(0, weights.numel(), CHUNK):
            piece = slice(start, start + CHUNK)
            parts = {name: values[piece] for name, values in flat.items()}
            _adamw_chunk(weights[piece], gradient[piece], parts, group, state["step"], generator)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Optimizer's, but the moments stay fp32: the base class casts float states to the dtype of the weights."""
        saved = {
            index: {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
            for index, state in state_dict["state"].items()
        }
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, state in saved.items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    self.state[parameters[index]][name] = value.to(parameters[index].device)


def _adamw_chunk(
    weights: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: int, generator
) -> None:
    """One AdamW update of flat pieces, in place. All arithmetic in fp32."""
    beta1, beta2 = group["betas"]
    gradient = gradient.float()
    state["exp_avg"].lerp_(gradient, 1.0 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    root = (state["exp_avg_sq"] / (1.0 - beta2**step)).sqrt_().add_(group["eps"])
    exact = weights.float()
    if "residue" in state:
        exact = exact + state["residue"].float()
    exact = exact * (1.0 - group["lr"] * group["weight_decay"])
    exact = exact.addcdiv(state["exp_avg"], root, value=-group["lr"] / (1.0 - beta1**step))
    if "residue" in state:
        weights.copy_(exact)
        state["residue"].copy_(exact - weights.float())
    elif generator is not None:
        weights.copy_(round_stochastically(exact, generator))
    else:
        weights.copy_(exact)


def noise_seed(*numbers: int) -> int:
    """A seed below 2^63 in which every number counts. Hashed: torch's CPU generator looks at the lower 32 bits alone,
    in which sums of products of (seed, update, tensor) would meet."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1


def round_stochastically(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float32 -> bfloat16, up or down with the probability that makes the mean exact. Inf and NaN stay as they are.

    A bf16 is the upper half of a float32: a uniform 16-bit number added to the lower half carries with just that
    probability.
    """
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    bits = (values.view(torch.int32) + noise) & -65536  # clears the lower 16 bits
    return torch.where(torch.isfinite(values), bits.view(torch.float32), values).to(torch.bfloat16)


def parameter_groups(named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; biases, norms and other vectors without. Frozen ones are left out."""
    decay, plain = [], []
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 shows shards as empty vectors
            (decay if len(shape) >= 2 else plain).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(named_parameters: Iterable[tuple[str, Tensor]], args, seed: int = 0) -> torch.optim.Optimizer:
    """--optimizer with its flags. `seed` must differ between ranks that hold different shards. Raises ValueError."""
    groups = parameter_groups(named_parameters, args.weight_decay)
    if not groups:
        raise ValueError("no parameter requires a gradient: nothing to optimise")
    settings = {"lr": args.learning_rate, "betas": tuple(args.adam_betas), "eps": args.adam_eps}
    if args.optimizer not in OPTIMIZERS:
        raise ValueError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got {args.optimizer!r}")
    return OPTIMIZERS[args.optimizer](groups, settings, seed)


OPTIMIZERS = {
    "adamw": lambda groups, settings, seed: torch.optim.AdamW(groups, **settings),
    "adamw_stochastic": lambda groups, settings, seed: AdamWLowPrecision(
        groups, **settings, rounding="stochastic", seed=seed
    ),
    "adamw_kahan": lambda groups, settings, seed: AdamWLowPrecision(groups, **settings, rounding="kahan", seed=seed),
}
