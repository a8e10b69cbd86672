"""Sequence parallelism (Ulysses, arXiv 2309.14509) for packed groups: N ranks hold the same groups and a slice of their tokens.

A micro-batch's T packed tokens are cut into N equal slices, one per rank of a set. Everything that works on single tokens
(embedding, norms, projections, MLP, output layer) sees a slice; around attention an all-to-all turns slices of all heads
into all tokens of H / N heads, and back. So activations and logits take 1/N of the memory, and any attention backend works
as it is. The vision tower, which attends within a frame (two frames, for temporal patches), takes the clips cut along time,
and the ranks exchange the features. Nothing is approximated.

Who counts what: every rank of a set knows the log-probs of all tokens and computes the same loss from them, but its
gradient flows into the tokens of its own slice only. The sum over the set is the gradient of one loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SequenceSet:
    """The ranks that share sequences: consecutive ones, so that a set lies within a node where it can."""

    group: dist.ProcessGroup
    host: dist.ProcessGroup  # for objects: gloo
    rank: int  # within the set
    size: int


_sets: dict[int, SequenceSet] = {}


def sequence_set(size: int) -> SequenceSet | None:
    """This rank's set of `size` ranks; None for 1. Collective at its first call. Raises ValueError if it does not divide."""
    if size == 1:
        return None
    if size not in _sets:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        if ranks % size:
            raise ValueError(f"--sequence_parallel {size} must divide the number of ranks, {ranks}")
        members = [list(range(first, first + size)) for first in range(0, ranks, size)]
        groups = [dist.new_group(some) for some in members]
        hosts = groups if dist.get_backend() == "gloo" else [dist.new_group(some, backend="gloo") for some in members]
        _sets[size] = SequenceSet(groups[rank // size], hosts[rank // size], rank % size, size)
    return _sets[size]


def head_problem(heads: int, kv_heads: int, size: int) -> str | None:
    """Why a model with that many heads cannot be cut for `size` ranks, or None.

    Key / value heads that are too few are repeated; the query heads still have to divide.
    """
    if heads % size:
        return f"--sequence_parallel {size} must divide the {heads} attention heads of the model"
    repeated = kv_heads * repeats(kv_heads, size)
    if heads % repeated:
        return (
            f"--sequence_parallel {size}: the {kv_heads} key / value heads, repeated to {repeated}, do not divide the {heads} "
            "attention heads of the model"
        )
    return None


def check_model(config, size: int) -> None:
    """Raises ValueError if a model of this Hugging Face config cannot be cut over `size` ranks."""
    text = config.get_text_config()
    if size > 1 and "linear_attention" in (getattr(text, "layer_types", None) or ()):
        raise ValueError(
            f"--sequence_parallel {size}: the linear-attention layers of {config.model_type} carry a state from token to token "
            "and cannot be cut by heads"
        )
    if problem := head_problem(text.num_attention_heads, text.num_key_value_heads, size):
        raise ValueError(problem)


def repeats(kv_heads: int, size: int) -> int:
    """How often each key / value head is repeated so that `size` divides them: (2, 4) -> 2, (8, 4) -> 1, (2, 3) -> 3."""
    return size // gcd(kv_heads, size)


# ---- exchanges, with gradients --------------------------------------------------------------------------------------


class _AllToAll(torch.autograd.Function):
    """(N, ...) -> (N, ...): piece i goes to rank i, piece i of the result came from rank i. Its own inverse."""

    @staticmethod
    def forward(ctx, pieces, group):
        ctx.group = group
        pieces = pieces.contiguous()  # empty_like keeps the strides of a transposed tensor, the exchange does not
        out = torch.empty_like(pieces)
        dist.all_to_all_single(out, pieces, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad.contiguous(), ctx.group), None


class _GatherRows(torch.autograd.Function):
    """(M_r, D) of each rank r -> (sum M_r, D) on all; backward: each rank gets the sum of all ranks' gradients of its rows."""

    @staticmethod
    def forward(ctx, rows, counts, sequence):
        ctx.counts, ctx.sequence = counts, sequence
        longest = max(counts)
        padded = F.pad(rows, (0, 0, 0, longest - len(rows))).contiguous()
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded, group=sequence.group)
        return torch.cat([part[:count] for part, count in zip(gathered, counts)])

    @staticmethod
    def backward(ctx, grad):
        counts, sequence = ctx.counts, ctx.sequence
        mine = counts[sequence.rank]
        back = grad.new_empty(sequence.size * mine, grad.shape[1])
        dist.all_to_all_single(
            back,
            grad.contiguous(),
            output_split_sizes=[mine] * sequence.size,
            input_split_sizes=counts,
            group=sequence.group,
        )
        return back.view(sequence.size, mine, grad.shape[1]).sum(0), None, None


class _Join(torch.autograd.Function):
    """Values of which each rank has its own and zeros elsewhere -> all of them on every rank.

    Backward: the gradient as it is. The loss is computed on every rank, and each sends its gradient into its own values.
    """

    @staticmethod
    def forward(ctx, values, group):
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


# ---- a slice of a packed sequence -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Slice:
    """What one rank computes of a packed sequence. `packed` has its tokens alone, with indices counted from its start."""

    packed: object  # train.group_attention.Packed
    visual_rows: Tensor  # (m,) which of the pack's M visual tokens lie here
    own: Tensor  # (n,) which of the pack's N response tokens are predicted from here


def slice_length(tokens: int, size: int) -> int:
    """Tokens per rank, padding of the last one included: (10, 4) -> 3."""
    return -(-tokens // size)


def take_slice(packed, sequence: SequenceSet) -> Slice:
    """This rank's slice: tokens [rank * t, (rank + 1) * t), t = ceil(T / N); beyond T token 0 at position 0, seen by no one."""
    tokens = packed.layout.length
    length = slice_length(tokens, sequence.size)
    start = sequence.rank * length
    missing = length * sequence.size - tokens
    ids = F.pad(packed.input_ids, (0, missing))[start : start + length]
    positions = F.pad(packed.position_ids, (0, missing))[:, start : start + length]

    def inside(places: Tensor) -> tuple[Tensor, Tensor]:
        found = ((places >= start) & (places < start + length)).nonzero()[:, 0]
        return found, places[found] - start

    visual_rows, visual_positions = inside(packed.visual_positions)
    own, predictors = inside(packed.predictors)
    part = replace(
        packed, input_ids=ids, position_ids=positions, visual_positions=visual_positions, predictors=predictors,
        targets=packed.targets[own],
    )  # fmt: skip
    return Slice(part, visual_rows, own)


def join(values: Tensor, own: Tensor, count: int, sequence: SequenceSet) -> Tensor:
    """(n,) values of this rank's response tokens -> (N,) of the whole pack, on every rank of the set."""
    spread = values.new_zeros(count).index_put((own,), values)
    return _Join.apply(spread, sequence.group)


# ---- attention ------------------------------------------------------------------------------------------------------


def attend(kernel, query: Tensor, key: Tensor, value: Tensor, layout, scaling: float) -> Tensor:
    """kernel over all tokens with H / N heads per rank: (1, H, t, d) of a slice -> (1, t, H, d).

    Raises ValueError if the heads cannot be cut.
    """
    sequence = layout.sequence
    size, heads, kv_heads = sequence.size, query.shape[1], key.shape[1]
    if problem := head_problem(heads, kv_heads, size):
        raise ValueError(problem)
    times = repeats(kv_heads, size)
    if times > 1:  # in the order in which query heads use them
        key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
    length, width = query.shape[2:]
    # Queries, keys and values in one exchange: (N, heads for that rank, t, d).
    pieces = torch.cat([x[0].view(size, -1, length, width) for x in (query, key, value)], dim=1)
    pieces = _AllToAll.apply(pieces, sequence.group)
    whole = pieces.transpose(0, 1).reshape(1, -1, size * length, width)[:, :, : layout.length]
    counts = [heads // size, kv_heads * times // size, kv_heads * times // size]
    out = kernel(*whole.split(counts, dim=1), layout, scaling)[0]  # (T, H / N, d)
    out = F.pad(out, (0, 0, 0, 0, 0, size * length - len(out))).view(size, length, counts[0], width)
    out = _AllToAll.apply(out, sequence.group)  # (N, t, H / N, d): piece i has the heads of rank i
    return out.transpose(0, 1).reshape(1, length, heads, width)


# ---- the vision tower -----------------------------------------------------------------------------------------------


def share_of_grids(grid_thw: np.ndarray, size: int) -> list[tuple[np.ndarray, int]]:
    """Per rank (its (k, 3) grids, its patches): the clips of a pack cut along time into `size` runs of about equal length.

    A temporal patch is never cut, since the tower attends within it: one grid of (5, 2, 2) over two ranks gives (2, 2, 2) and
    (3, 2, 2).
    """
    slices = [(number, int(h * w)) for number, (t, h, w) in enumerate(grid_thw) for _ in range(int(t))]
    total, passed = sum(count for _, count in slices), 0
    taken: list[dict[int, int]] = [{} for _ in range(size)]  # grid -> temporal patches
    for number, count in slices:
        rank = min(size - 1, int((passed + count / 2) * size / total))
        taken[rank][number] = taken[rank].get(number, 0) + 1
        passed += count
    shares = []
    for grids in taken:
        cut = np.array([(t, *grid_thw[number][1:]) for number, t in grids.items()], dtype=np.int64).reshape(-1, 3)
        shares.append((cut, int(cut.prod(axis=1).sum())))
    return shares


def share_features(tower_features, packed, merge: int, sequence: SequenceSet) -> list[Tensor]:
    """Features of all visual tokens of a pack, of which this rank runs the tower over its share of the clips.

    tower_features: (patches or None, grids) -> (features, whether they are real), as PackedModel.visual_features: without a
    share the tower runs on a blank patch, since under ZeRO-3 every rank has to call it equally often.
    """
    shares = share_of_grids(packed.grid_thw, sequence.size)
    start = sum(count for _, count in shares[: sequence.rank])
    grids, count = shares[sequence.rank]
    patches = packed.patches[start : start + count] if count else None
    features, real = tower_features(patches, grids)
    if not real:
        features = [feature[:0] for feature in features]
    joined = torch.cat(features, dim=1)  # one exchange for the merger's features and the deepstack's
    counts = [count // merge**2 for _, count in shares]
    gathered = _GatherRows.apply(joined, counts, sequence)
    return list(gathered.split([feature.shape[1] for feature in features], dim=1))


# ---- groups ---------------------------------------------------------------------------------------------------------


def share_groups(collected, size: int, copies: int = 1):
    """What the ranks of a set have collected, one of each in turn, on all of them: they train on the same groups.

    copies: ranks of one tensor-parallel engine, which hold the same groups already. Collective over the set. Groups travel
    over the host, patches included but not what vLLM was given.
    """
    sequence = sequence_set(size)
    if sequence is None or size == copies:
        return collected
    light = [replace(group, prompt=replace(group.prompt, vllm_prompt={})) for group in collected.groups]
    everyone: list = [None] * size
    dist.all_gather_object(everyone, (light, collected.baseline_rewards), group=sequence.host)
    everyone[sequence.rank] = (collected.groups, collected.baseline_rewards)
    groups, baselines = zip(*everyone[::copies])
    known = collected.baseline_rewards is not None
    return replace(collected, groups=in_turn(groups), baseline_rewards=in_turn(baselines) if known else None)


def in_turn(parts) -> list:
    """The first of each part, then the second of each ...: [[0, 2], [1, 3]] -> [0, 1, 2, 3].

    Ranks take prompts in turn, so a mini-batch is then made of the prompts that it has without sharing.
    """
    return [item for row in zip(*parts, strict=True) for item in row]
