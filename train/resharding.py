"""Continue a ZeRO-3 checkpoint on another number of ranks: every saved parameter cut anew, by name.

DeepSpeed refuses to load what another number of ranks saved, and its universal checkpoint (a conversion into one file per
parameter and moment) gives all parameter groups the settings of the first on loading: weight decay on norms, one learning
rate for tower, merger and language model. So the cut is done here, from the shards as they are:

A parameter of n elements on W ranks is ceil(n / W) elements per rank, the last piece padded. Of every parameter group (or a
part of it, a sub-group) a rank holds one flat tensor: its pieces of the group's parameters, one after the other; the fp32
master weights and each of Adam's moments are such tensors. A rank of the new run reads from the old ranks' files (mapped, not
loaded) just the elements that it will own. Nothing is computed, so every element keeps its bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Layout = Sequence[dict[str, int]]  # per sub-group: parameter name -> elements, in the order of the flat tensor


def piece_length(elements: int, ranks: int) -> int:
    """Elements of a parameter on one rank, padding included: (5, 2) -> 3."""
    return -(-elements // ranks)


def check_same_parameters(saved: Layout, wanted: Layout) -> None:
    """Raises ValueError naming parameters that one side trains and the other does not, or that differ in size."""
    old = {name: count for group in saved for name, count in group.items()}
    new = {name: count for group in wanted for name, count in group.items()}
    if old == new:
        return
    parts = []
    for text, names in (
        ("only the checkpoint trains", sorted(old.keys() - new.keys())),
        ("only this run trains", sorted(new.keys() - old.keys())),
        ("of another size", sorted(name for name in old.keys() & new.keys() if old[name] != new[name])),
    ):
        if names:
            parts.append(f"{text} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else ""))
    raise ValueError(
        f"the checkpoint is of other parameters: {'; '.join(parts)}. Resume with the model and the --freeze_* flags of the "
        "run that saved it"
    )


def recut(shards: Sequence[Sequence[Tensor]], saved: Layout, wanted: Layout, rank: int, ranks: int) -> list[Tensor]:
    """One flat tensor per wanted sub-group: what `rank` of `ranks` holds of it.

    shards[r][i]: the flat tensor of sub-group i on rank r of the run that saved, laid out as `saved[i]`. Both layouts hold
    the same parameters, in any order and grouping. Padding is zero.
    """
    place: dict[str, tuple[int, int]] = {}  # name -> (sub-group, offset in its flat tensor), the same on every old rank
    for index, group in enumerate(saved):
        offset = 0
        for name, elements in group.items():
            place[name] = (index, offset)
            offset += piece_length(elements, len(shards))
    result = []
    for group in wanted:
        flat = torch.zeros(sum(piece_length(n, ranks) for n in group.values()), dtype=shards[0][0].dtype)
        filled = 0
        for name, elements in group.items():
            old, new = piece_length(elements, len(shards)), piece_length(elements, ranks)
            index, offset = place[name]
            start, end = new * rank, min(new * (rank + 1), elements)
            while start < end:
                source, within = divmod(start, old)  # the old rank that holds element `start`, and where
                count = min(old - within, end - start)
                target = filled + start - new * rank
                flat[target : target + count] = shards[source][index][offset + within : offset + within + count]
                start += count
            filled += new
        result.append(flat)
    return result


def recut_optimizer(
    states: Sequence[dict[int, dict[str, Any]]], saved: Layout, wanted: Layout, rank: int, ranks: int
) -> dict[int, dict[str, Any]]:
    """The optimiser's `state` of one new rank; states[r][i]: that of sub-group i on old rank r.

    Flat tensors (moments, residues) are cut anew. What is not per element (the step) is that of the old sub-group with the
    new one's first parameter; `stream`, by which an optimiser numbers its tensors, is the number of the new sub-group.
    """
    if not states[0]:
        return {}  # saved before the first update
    home = {name: index for index, group in enumerate(saved) for name in group}
    flat = [name for name, value in states[0][0].items() if isinstance(value, Tensor) and value.dim() == 1]
    cut = {
        name: recut([[state[i][name] for i in range(len(saved))] for state in states], saved, wanted, rank, ranks)
        for name in flat
    }
    result: dict[int, dict[str, Any]] = {}
    for index, group in enumerate(wanted):
        source = states[0][home[next(iter(group))]]
        result[index] = {
            name: cut[name][index] if name in cut else index if name == "stream" else value
            for name, value in source.items()
        }
    return result


def load(engine, folder: Path, saved_ranks: int) -> None:
    """Load weights and optimiser of a DeepSpeed ZeRO-3 engine from a checkpoint that `saved_ranks` ranks wrote. Collective.

    folder: with zero_pp_rank_<r>_mp_rank_00_*.pt. Frozen parameters are not in it; they are those the engine was built with,
    as in DeepSpeed's own loading. Raises FileNotFoundError for a missing shard and ValueError if the parameters differ.
    """
    optimizer, rank, ranks = engine.optimizer, torch.distributed.get_rank(), torch.distributed.get_world_size()
    shards = []
    for old in range(saved_ranks):
        found = sorted(folder.glob(f"*zero_pp_rank_{old}_mp_rank_00_optim_states.pt"))
        if not found:
            raise FileNotFoundError(
                f"{folder}: no shard of rank {old}; the checkpoint was saved by {saved_ranks} ranks"
            )
        content = torch.load(found[0], map_location="cpu", mmap=True, weights_only=False)
        shards.append(content["optimizer_state_dict"])
    model = torch.load(
        folder / "zero_pp_rank_0_mp_rank_00_model_states.pt", map_location="cpu", mmap=True, weights_only=False
    )
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    saved = [{name: shape.numel() for name, shape in group.items()} for group in model["param_shapes"]]
    wanted = [{names[id(p)]: p.ds_numel for p in group} for group in optimizer.fp16_groups]
    check_same_parameters(saved, wanted)
    optimizer.checkpoint_event_prologue()
    state = optimizer.state_dict()
    settings = shards[0]["optimizer_state_dict"]["param_groups"]
    now = state["optimizer_state_dict"]["param_groups"]
    if len(settings) != len(now):
        raise ValueError(f"{folder}: the checkpoint has {len(settings)} parameter groups, this run {len(now)}")
    state["optimizer_state_dict"] = {
        "state": recut_optimizer([s["optimizer_state_dict"]["state"] for s in shards], saved, wanted, rank, ranks),
        "param_groups": [old | {"params": new["params"]} for old, new in zip(settings, now)],
    }
    state["fp32_flat_groups"] = recut([s["fp32_flat_groups"] for s in shards], saved, wanted, rank, ranks)
    optimizer.load_state_dict({rank: state})
    optimizer.checkpoint_event_epilogue()
    engine.global_steps, engine.skipped_steps = model["global_steps"], model["skipped_steps"]
