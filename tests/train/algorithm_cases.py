"""Arguments and batches for the tests of advantages, losses and correction; TRL's trainer methods on a stub."""

from __future__ import annotations

import argparse
from collections import defaultdict
from functools import cache
from types import SimpleNamespace

import torch

from data.records import Batch
from train.algorithm_flags import add_algorithm_flags


def make_args(**changes) -> argparse.Namespace:
    """The flags' own defaults (no preset), with the sizes that train/args.py adds."""
    parser = argparse.ArgumentParser()
    add_algorithm_flags(parser)
    args = parser.parse_args([])
    sizes = {"group_size": 3, "max_response_tokens": 5, "update_epochs": 1}
    sizes |= {"prompts_per_step": 4, "prompts_per_update": 4, "accuracy_weight": 0.9, "format_weight": 0.1}
    for name, value in {**sizes, "temperature": 1.0, "top_p": 1.0, "top_k": -1, **changes}.items():
        setattr(args, name, value)
    return args


def mask_of(lengths: list[int], width: int | None = None, dtype=torch.float64) -> torch.Tensor:
    """(B, R): ones on the first `length` tokens of each row."""
    width = width or max(lengths)
    return (torch.arange(width) < torch.tensor(lengths).view(-1, 1)).to(dtype)


def make_batch(rewards: list[float], lengths: list[int], *, dtype=torch.float64, **fields) -> Batch:
    rewards = torch.tensor(rewards, dtype=dtype)
    rows = len(rewards)
    base = {
        "groups": [],
        "response_mask": mask_of(lengths, dtype=dtype),
        "rewards": rewards,
        "rollout_logprobs": torch.zeros(rows, max(lengths), dtype=dtype),
        "is_demonstration": torch.zeros(rows, dtype=torch.bool),
        "truncated": torch.zeros(rows, dtype=torch.bool),
    }
    return Batch(**{**base, **fields})


def random_rows(seed: int, rows: int = 6, width: int = 7, spread: float = 0.6) -> dict[str, torch.Tensor]:
    """Ragged float64 rows whose ratios leave every clip range on both sides, with rubbish at the padding."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, width + 1, (rows,), generator=generator).tolist()
    lengths[0], lengths[1] = width, 1
    mask = mask_of(lengths, width)
    old = -draw(rows, width).abs() - 0.05
    return {
        "mask": mask,
        "old": torch.where(mask > 0, old, 7.0),
        "new": torch.where(mask > 0, old + spread * draw(rows, width), -3.0),
        "ref": torch.where(mask > 0, old + 0.3 * draw(rows, width), 2.0),
        "sampled": torch.where(mask > 0, old + 0.5 * draw(rows, width), 1.0),
        "advantages": draw(rows, 1).expand(rows, width).clone(),
        "entropy": torch.where(mask > 0, draw(rows, width).abs(), 9.0),
    }


@cache
def grpo_trainer():
    """TRL's class. It is told that vLLM is absent while it is imported: that halves the time, and no loss uses it."""
    from trl import import_utils

    present, import_utils.is_vllm_available = import_utils.is_vllm_available, lambda *a, **k: False
    try:
        from trl import GRPOTrainer
    finally:
        import_utils.is_vllm_available = present
    return GRPOTrainer


def trl_loss(
    rows: dict[str, torch.Tensor],
    *,
    loss_type: str,
    low: float = 0.2,
    high: float = 0.2,
    level: str = "token",
    beta: float = 0.0,
    delta: float | None = None,
    weights: torch.Tensor | None = None,
    max_completion_length: int = 11,
    entropy_coef: float = 0.0,
    sapo: tuple[float, float] = (1.0, 1.05),
) -> torch.Tensor:
    """trl.GRPOTrainer._compute_loss on the given log-probs: TRL's own code, without its trainer."""
    trainer = grpo_trainer()
    rows = {name: value.clone() for name, value in rows.items()}
    inside = rows["mask"] > 0  # TRL multiplies by the mask: its padding must be finite
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (rows["new_leaf"], rows["entropy"], None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=low,
        epsilon_high=high,
        loss_type=loss_type,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=weights is not None,
        current_gradient_accumulation_steps=1,
        max_completion_length=max_completion_length,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(
            delta=delta,
            use_bias_correction_kl=False,
            sapo_temperature_pos=sapo[0],
            sapo_temperature_neg=sapo[1],
            steps_per_generation=1,
        ),
        aux_loss_enabled=False,
        _entropy_bonus_enabled=entropy_coef != 0.0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
        _metrics={"train": defaultdict(list)},
    )
    rows["new_leaf"] = rows["leaf"] if "leaf" in rows else rows["new"]
    ids = torch.zeros(rows["mask"].shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": rows["mask"],
        "advantages": rows["advantages"][:, 0],
        "old_per_token_logps": torch.where(inside, rows["old"], rows["new"].detach()),
        "ref_per_token_logps": torch.where(inside, rows["ref"], rows["new"].detach()),
        "importance_sampling_ratio": weights,
        "num_items_in_batch": rows["mask"].sum(),
    }
    return trainer._compute_loss(stub, stub.model, inputs)
