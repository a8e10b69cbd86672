"""The policy's weights into the live vLLM engine: ZeRO-3 shards, gathered in buckets by the caller's iterator.

A wrong name is the quiet failure here: vLLM keeps the old values of a parameter it was not given (or, worse, fills
half a fused one) and only logs it. So the names that arrive are compared with the model folder's own, and what vLLM
says it loaded with what it has, at the first sync of an engine; after that names cannot change.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from rollout import vllm_access


class WeightNamesError(ValueError):
    """The tensors given are not the model's parameters. The message lists missing and unexpected names."""


def expected_names(config, trust_remote_code: bool = False) -> set[str]:
    """Names of model.named_parameters() for a transformers configuration, without weights. Tied weights appear once.

    The configuration is data.encode.read_config's.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    return {name for name, _ in model.named_parameters()}


def sync_weights(llm, named_tensors: Iterator[tuple[str, torch.Tensor]], names: set[str] | None) -> int:
    """One reload of all weights -> number of tensors. `names`: what must arrive, None to skip the check.

    The iterator is always exhausted: producing it is a collective, and a rank that stopped early would leave the others
    waiting. Raises WeightNamesError listing names; vLLM's state is then undefined.
    """
    seen: list[str] = []
    unexpected: list[str] = []

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named_tensors:
            if names is not None and name not in names:
                unexpected.append(name)  # vLLM would stop at it, in the middle of a collective
                continue
            seen.append(name)
            yield name, tensor

    source = counted()
    try:
        expected, loaded = vllm_access.reload_weights(llm, source)
    finally:
        for _ in source:
            pass
    if names is not None:
        tied = {name for name in expected - loaded if name.endswith("lm_head.weight") and "lm_head.weight" not in names}
        problems = {
            "missing": sorted(names - set(seen)),
            "unexpected": sorted(unexpected),
            "given twice": sorted({name for name in seen if seen.count(name) > 1}) if len(seen) > len(names) else [],
            "left at their old values by vLLM": sorted(expected - loaded - tied),
        }
        if any(problems.values()):
            listed = "; ".join(f"{word}: {', '.join(items)}" for word, items in problems.items() if items)
            raise WeightNamesError(f"weight sync does not match the model's parameters: {listed}")
    vllm_access.reset_caches(llm)
    return len(seen)
