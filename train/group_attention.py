"""The packed group forward: one prompt, G responses, each token computed once, and nothing approximated.

Several groups share one sequence of length T, prompts first:

    [ prompt 0 | prompt 1 | ... | responses of group 0 | responses of group 1 | ... ]

A response token attends to its own group's prompt and to the earlier tokens of its own response; its position ids
(M-RoPE included) continue from its prompt's end, so every token sees exactly what it sees in a row of its own. The
order of the groups does not matter, since positions and visibility are explicit. Prompts first means that each of the
two kinds of query is one slice: no gather per layer.

Backends (`--attention`), all behind `packed_attention`, chosen once at start by `choose_attention`:
    sdpa    one explicit mask per group; any device and dtype; what CPU runs use
    flex    FlexAttention with a block mask; grouped heads; CUDA
    cudnn   cuDNN's dense kernels for long prompts, merged by log-sum-exps (train/cudnn_attention.py); flex for short ones; CUDA
    varlen  torch.nn.attention.varlen: prompts in one call, responses over [prompt, own response] in another; CUDA
    flash2  the same two calls on flash-attn 2; CUDA, where it is installed
    flash4  flash-attn 4 (CuTe kernels for Hopper and later), where it is installed; CUDA. Its log-sum-exps have gradients, so
            that responses attend to their prompt and to themselves in two calls whose results are merged: no key is copied
"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from data.records import Group
from train import cudnn_attention
from train.sequence_parallel import SequenceSet, attend
from train.transfer import send, send_joined, send_lengths

PACKED = "reelrl_packed"  # the name under which transformers finds packed_attention
BACKENDS = ("sdpa", "flex", "cudnn", "varlen", "flash2", "flash4")
VARLEN = ("varlen", "flash2", "flash4")  # those of kernels for variable lengths
# Module of each package: flash-attn 4 lies in the namespace flash_attn, so that name alone says nothing.
PACKAGES = {"flash2": "flash_attn.flash_attn_interface", "flash4": "flash_attn.cute.interface"}
FLEX_BLOCK = 128
FLEX_DYNAMIC = True  # one compilation for all lengths; False: one per length, until torch gives up compiling
# kernel_options of FlexAttention on CUDA. With lengths that are symbols torch 2.11 takes none for a multiple of 128, although
# all are: padded for it. Said, an update is 5 % faster (docs/gpu_results.md). ROWS_GUARANTEED_SAFE would be 3 % more and is
# wrong: a response's first block of keys may hold none that it sees, and the loss is nan.
FLEX_OPTIONS: dict[str, bool | int] | None = {"IS_DIVISIBLE": True}


@dataclass(slots=True)
class Span:
    """Where one group lies in the packed sequence; all in tokens."""

    prompt_start: int
    prompt_length: int
    responses_start: int
    response_lengths: list[int]

    @property
    def length(self) -> int:
        return self.prompt_length + sum(self.response_lengths)


@dataclass(slots=True)
class Layout:
    """Who sees whom in one packed sequence. Backends keep in `ready` what they derive from it (masks, offsets)."""

    spans: list[Span]
    prompts_length: int  # all prompts together: where the responses begin
    length: int  # T, padding for FlexAttention's blocks included
    backend: str
    ready: dict[str, object] = field(default_factory=dict)
    sequence: SequenceSet | None = None  # the ranks that share this sequence, if it is cut


@dataclass(slots=True)
class Packed:
    """Groups as one sequence. T packed tokens, N response tokens, M merged visual tokens, K patches, B rows."""

    layout: Layout
    input_ids: Tensor  # (T,)
    position_ids: Tensor  # (3, T)
    visual_positions: Tensor  # (M,) indices into T, in media order
    predictors: Tensor  # (N,) index of the token whose hidden state predicts response token n
    targets: Tensor  # (N,) the response tokens, group-major
    rows: Tensor  # (N,) row of each response token, 0 .. B - 1
    columns: Tensor  # (N,) its place in the response
    shape: tuple[int, int]  # (B, R)
    patches: Tensor | None  # (K, C*t*p*p) uint8, media order
    grid_thw: np.ndarray  # (G, 3)

    def to_rows(self, values: Tensor) -> Tensor:
        """(N,) per response token -> (B, R), zero where a row has ended. Differentiable."""
        return values.new_zeros(self.shape).index_put((self.rows, self.columns), values)


def pack(
    groups: list[Group],
    *,
    backend: str,
    device: torch.device,
    banned_ids: np.ndarray | None = None,
    sequence: SequenceSet | None = None,
) -> Packed:
    """Lay groups out as one sequence (see the module's docstring) and move it to the device.

    sequence: the ranks that will each compute a slice of it; all of them pack the same groups.
    Raises ValueError if a response holds an id that is never sampled (its log-prob would be -inf), or if a group has
    no response.
    """
    if backend == "cudnn" and all(len(group.prompt.input_ids) < cudnn_attention.LONG_PROMPT for group in groups):
        backend = "flex"
    spans, prompt_start = [], 0
    responses_start = prompts_length = sum(len(group.prompt.input_ids) for group in groups)
    ids, positions = [], []
    for group in groups:
        if not group.responses:
            raise ValueError(f"group of sample {group.prompt.sample.id!r} has no responses")
        lengths = [len(response.token_ids) for response in group.responses]
        length = len(group.prompt.input_ids)
        spans.append(Span(prompt_start, length, responses_start, lengths))
        prompt_start += length
        responses_start += sum(lengths)
        ids.append(np.asarray(group.prompt.input_ids, dtype=np.int64))
        positions.append(np.asarray(group.prompt.position_ids, dtype=np.int64))
    targets, predictors, rows, columns = [], [], [], []
    row = 0
    for group, span in zip(groups, spans):
        first = int(group.prompt.position_ids.max()) + 1
        start = span.responses_start
        for response, length in zip(group.responses, span.response_lengths):
            tokens = np.asarray(response.token_ids, dtype=np.int64)
            if banned_ids is not None and np.isin(tokens, banned_ids).any():
                bad = sorted(set(tokens.tolist()) & set(banned_ids.tolist()))
                raise ValueError(
                    f"a response to sample {group.prompt.sample.id!r} holds token ids {bad}, which are never sampled; "
                    "take visual marker tokens out of the demonstration's text"
                )
            ids.append(tokens)
            positions.append(np.broadcast_to(first + np.arange(length, dtype=np.int64), (3, length)))
            targets.append(tokens)
            # The prompt's last token predicts the first response token, each response token the next one.
            previous = np.arange(start - 1, start + length - 1)
            previous[:1] = span.prompt_start + span.prompt_length - 1
            predictors.append(previous[:length])
            rows.append(np.full(length, row))
            columns.append(np.arange(length))
            start += length
            row += 1
    length = responses_start
    padding = -length % FLEX_BLOCK if backend == "flex" else 0
    if padding:
        ids.append(np.zeros(padding, dtype=np.int64))
        positions.append(np.zeros((3, padding), dtype=np.int64))
    visual = [
        np.flatnonzero(np.asarray(group.prompt.mm_type_ids)) + span.prompt_start
        for group, span in zip(groups, spans)
        if group.prompt.patches is not None
    ]
    patches = [group.prompt.patches for group in groups if group.prompt.patches is not None]
    grids = [np.asarray(group.prompt.grid_thw).reshape(-1, 3) for group in groups if group.prompt.patches is not None]

    return Packed(
        layout=Layout(spans, prompts_length, length + padding, backend, sequence=sequence),
        input_ids=send_joined(ids, device),
        position_ids=send_joined(positions, device, axis=1),
        visual_positions=send_joined(visual, device),
        predictors=send_joined(predictors, device),
        targets=send_joined(targets, device),
        rows=send_joined(rows, device),
        columns=send_joined(columns, device),
        shape=(row, max(max(span.response_lengths) for span in spans)),
        patches=send_joined(patches, device) if patches else None,
        grid_thw=np.concatenate(grids) if grids else np.zeros((0, 3), dtype=np.int64),
    )


def group_mask(span: Span, device: torch.device) -> Tensor:
    """(S, S) bool for one group laid out as [prompt, responses]: True where query (row) may see key (column)."""
    segment = torch.zeros(span.length, dtype=torch.long)
    start = span.prompt_length
    for number, length in enumerate(span.response_lengths, start=1):
        segment[start : start + length] = number
        start += length
    order = torch.arange(span.length)
    visible = (order[:, None] >= order[None, :]) & ((segment[None, :] == 0) | (segment[None, :] == segment[:, None]))
    return visible.to(device)


def repeat_heads(x: Tensor, times: int, dim: int) -> Tensor:
    """Key / value heads repeated so that each query head has its own: head h serves queries h*times ... ."""
    return x if times == 1 else x.repeat_interleave(times, dim=dim)


def sdpa_packed(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float) -> Tensor:
    """q (1, H, T, d), k and v (1, Hkv, T, d) -> (1, T, H, d): one masked call per group."""
    if "masks" not in layout.ready:
        layout.ready["masks"] = [group_mask(span, q.device) for span in layout.spans]
    times = q.shape[1] // k.shape[1]
    k, v = repeat_heads(k, times, 1), repeat_heads(v, times, 1)
    prompts, responses = [], []
    for span, mask in zip(layout.spans, layout.ready["masks"]):
        prompt = slice(span.prompt_start, span.prompt_start + span.prompt_length)
        answer = slice(span.responses_start, span.responses_start + span.length - span.prompt_length)
        qg, kg, vg = (torch.cat([x[:, :, prompt], x[:, :, answer]], dim=2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(qg, kg, vg, attn_mask=mask, scale=scaling)
        prompts.append(out[:, :, : span.prompt_length])
        responses.append(out[:, :, span.prompt_length :])
    return torch.cat(prompts + responses, dim=2).transpose(1, 2)


@cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=FLEX_DYNAMIC)


def visible_ranges(layout: Layout) -> Tensor:
    """(3, T) int32: token q sees keys [r[0, q], r[1, q]) (its prompt, from a response) and [r[2, q], q] (its own run)."""
    ranges = torch.zeros(3, layout.length, dtype=torch.int32)
    ranges[2] = torch.arange(layout.length)  # padding sees itself, so that no row of the softmax is empty
    for span in layout.spans:
        end = span.prompt_start + span.prompt_length
        ranges[2, span.prompt_start : end] = span.prompt_start
        start = span.responses_start
        for length in span.response_lengths:
            own = slice(start, start + length)
            ranges[0, own], ranges[1, own], ranges[2, own] = span.prompt_start, end, start
            start += length
    return ranges


def flex_block_mask(layout: Layout, device: torch.device):
    """The BlockMask of a layout, without a (T, T) tensor: for every query and block of keys, how many keys it sees.

    A block pair in which no query sees a key is skipped by the kernel, one in which every query sees every key is
    computed without looking at the mask.
    """
    from torch.nn.attention.flex_attention import BlockMask

    ranges = send(visible_ranges(layout), device)
    prompt_start, prompt_end, own_start = ranges
    queries = torch.arange(layout.length, device=device, dtype=torch.int32)
    first = torch.arange(0, layout.length, FLEX_BLOCK, device=device, dtype=torch.int32)  # of each block of keys

    def overlap(start: Tensor, end: Tensor) -> Tensor:  # (T,), (T,) -> (T, blocks) keys of [start, end) in each block
        low = torch.maximum(start[:, None], first)
        high = torch.minimum(end[:, None], first + FLEX_BLOCK)
        return (high - low).clamp_(min=0)

    seen = overlap(prompt_start, prompt_end) + overlap(own_start, queries + 1)
    seen = seen.view(len(first), FLEX_BLOCK, len(first))
    full = seen.amin(dim=1) == FLEX_BLOCK
    partial = (seen.amax(dim=1) > 0) & ~full

    def in_order(wanted: Tensor) -> tuple[Tensor, Tensor]:  # how many blocks of keys, and which, wanted ones first
        order = torch.argsort(wanted.int(), dim=-1, descending=True, stable=True)
        return wanted.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    def visible(batch, head, q, k):
        return ((k >= prompt_start[q]) & (k < prompt_end[q])) | ((k >= own_start[q]) & (k <= q))

    return BlockMask.from_kv_blocks(*in_order(partial), *in_order(full), BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible)


def flex_packed(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float) -> Tensor:
    """As sdpa_packed. Grouped heads stay grouped."""
    if "block_mask" not in layout.ready:
        layout.ready["block_mask"] = flex_block_mask(layout, q.device)
    flex, options = (_compiled_flex(), FLEX_OPTIONS) if q.is_cuda else (_eager_flex(), None)
    out = flex(
        q, k, v, block_mask=layout.ready["block_mask"], scale=scaling, enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=options,
    )  # fmt: skip
    return out.transpose(1, 2)


def _eager_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def varlen_offsets(layout: Layout, device: torch.device) -> dict[str, tuple[Tensor, int]]:
    """Cumulative lengths of the two calls: prompts against themselves, responses against [prompt, own response]."""
    responses = [(span, length) for span in layout.spans for length in span.response_lengths if length]
    lengths = {
        "prompts": [span.prompt_length for span in layout.spans],
        "queries": [length for _, length in responses],
        "keys": [span.prompt_length + length for span, length in responses],
    }
    return {name: send_lengths(each, device) for name, each in lengths.items()}


def keys_of_responses(x: Tensor, layout: Layout) -> Tensor:
    """(T, H, d) -> the keys (or values) of every response: its prompt, then its own tokens, one after the other."""
    parts = []
    for span in layout.spans:
        prompt = x[span.prompt_start : span.prompt_start + span.prompt_length]
        start = span.responses_start
        for length in span.response_lengths:
            if length:
                parts += [prompt, x[start : start + length]]
            start += length
    return torch.cat(parts)


@cache
def _varlen_settings() -> tuple[dict, bool]:
    """(arguments that make torch's varlen kernel causal, whether it takes grouped heads) on this torch.

    torch 2.11 has neither `is_causal` nor `enable_gqa`; a window (-1, 0) is causal, aligned bottom-right where keys are
    longer than queries, which is what a response after its prompt needs.
    """
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    return ({"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}), "enable_gqa" in names


def scaled_queries(q: Tensor, scaling: float) -> Tensor:
    """(..., d) queries for torch's varlen kernel, which in 2.11 has no scale argument and takes d ** -0.5."""
    default = q.shape[-1] ** -0.5
    return q * (scaling / default) if abs(scaling - default) > 1e-9 * default else q


def _torch_varlen_causal(q, k, v, cu_q, cu_k, max_q, max_k, scaling):
    from torch.nn.attention.varlen import varlen_attn

    causal, grouped = _varlen_settings()
    settings = dict(causal)
    times = q.shape[1] // k.shape[1]
    if times > 1 and grouped:
        settings["enable_gqa"] = True
    elif times > 1:
        k, v = repeat_heads(k, times, 1), repeat_heads(v, times, 1)
    q = scaled_queries(q, scaling)
    return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **settings)


def _flash2_causal(q, k, v, cu_q, cu_k, max_q, max_k, scaling):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scaling, causal=True)


def _flash4(q, k, v, cu_q, cu_k, max_q, max_k, scaling, *, causal: bool) -> tuple[Tensor, Tensor]:
    """(T, H, d) of every sequence's queries over its keys, and (H, T) fp32 logarithms of the softmax's sums, with gradients."""
    from flash_attn.cute.interface import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k, softmax_scale=scaling,
        causal=causal, return_lse=True,
    )  # fmt: skip


def _flash4_causal(*arguments):
    return _flash4(*arguments, causal=True)[0]


def response_offsets(layout: Layout, device: torch.device) -> dict[str, tuple[Tensor, int]] | None:
    """Cumulative lengths of prompts, of each group's responses together and of each response. None if a group has no response
    token: no kernel then says what the gradient of that prompt's keys is."""
    groups = [sum(span.response_lengths) for span in layout.spans]
    if not all(groups):
        return None
    single = [length for span in layout.spans for length in span.response_lengths if length]
    lengths = {"prompts": [span.prompt_length for span in layout.spans], "groups": groups, "responses": single}
    return {name: send_lengths(each, device) for name, each in lengths.items()}


def flash4_packed(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float) -> Tensor:
    """As sdpa_packed: prompts over themselves, each response over itself, all responses of a group over their prompt.

    A softmax over two sets of keys is the mean of the softmaxes over each, weighted with their sums (FlashAttention,
    arXiv 2205.14135, section 3.1): with their logarithms a and b the weight of the first is sigmoid(a - b).
    """
    if "response_offsets" not in layout.ready:
        layout.ready["response_offsets"] = response_offsets(layout, q.device)
    offsets = layout.ready["response_offsets"]
    if offsets is None:
        return varlen_packed(q, k, v, layout, scaling)
    q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (q, k, v))  # (T, heads, d)
    end = layout.prompts_length
    (prompts, longest_prompt), (groups, longest_group), (responses, longest) = offsets.values()
    first = _flash4_causal(q[:end], k[:end], v[:end], prompts, prompts, longest_prompt, longest_prompt, scaling)
    own, own_sum = _flash4(q[end:], k[end:], v[end:], responses, responses, longest, longest, scaling, causal=True)
    seen, seen_sum = _flash4(
        q[end:], k[:end], v[:end], groups, prompts, longest_group, longest_prompt, scaling, causal=False
    )
    weight = torch.sigmoid(own_sum - seen_sum).transpose(0, 1)[..., None]  # (R, heads, 1) fp32
    merged = torch.lerp(seen.to(weight.dtype), own.to(weight.dtype), weight).to(q.dtype)
    return torch.cat([first, merged])[None]


def varlen_packed(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float) -> Tensor:
    """As sdpa_packed, in two calls of a variable-length causal kernel (torch's own, or one of flash-attn's)."""
    if "offsets" not in layout.ready:
        layout.ready["offsets"] = varlen_offsets(layout, q.device)
    offsets = layout.ready["offsets"]
    kernel = {"varlen": _torch_varlen_causal, "flash2": _flash2_causal, "flash4": _flash4_causal}[layout.backend]
    q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (q, k, v))  # (T, heads, d)
    end = layout.prompts_length
    cu, longest = offsets["prompts"]
    prompts = kernel(q[:end], k[:end], v[:end], cu, cu, longest, longest, scaling)
    (cu_q, max_q), (cu_k, max_k) = offsets["queries"], offsets["keys"]
    if max_q == 0:
        return prompts[None]
    keys, values = keys_of_responses(k, layout), keys_of_responses(v, layout)
    responses = kernel(q[end:], keys, values, cu_q, cu_k, max_q, max_k, scaling)
    return torch.cat([prompts, responses])[None]


_KERNELS = {
    "sdpa": sdpa_packed, "flex": flex_packed, "cudnn": cudnn_attention.cudnn_packed, "varlen": varlen_packed,
    "flash2": varlen_packed, "flash4": flash4_packed,
}  # fmt: skip


def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout=None, **kwargs):
    """What transformers' decoder layers call: (1, H, T, d) -> (1, T, H, d); `layout` is among the model's kwargs."""
    if layout is None:
        raise ValueError("this model is set up for packed groups; call it through train.packed_model.PackedModel")
    if dropout:
        raise ValueError(f"attention dropout is {dropout}; log-probs must be a function of weights and tokens alone")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = _KERNELS[layout.backend]
    if layout.sequence is not None:
        return attend(kernel, query, key, value, layout, scaling), None
    return kernel(query, key, value, layout, scaling), None


AttentionInterface.register(PACKED, packed_attention)


def why_missing(module: str) -> str | None:
    """None if the module is there, else what is missing: it, or a package that it needs itself."""
    try:
        return None if importlib.util.find_spec(module) is not None else f"no module {module}"
    except ImportError as error:  # of a package above it, which is imported to look inside
        return str(error)


def has_cudnn() -> bool:
    """Whether this torch carries cuDNN: one for ROCm calls MIOpen so, and an MI300 has the capability 9.4."""
    return torch.version.hip is None and torch.backends.cudnn.is_available()


def choose_attention(name: str, device: torch.device, dtype: torch.dtype, *, head_dim: int = 128) -> str:
    """The backend that `--attention name` means here. Raises ValueError with the reason if it cannot run.

    auto: sdpa on CPU; on Hopper in 16 bits cudnn, which was the fastest measured there (docs/gpu_results.md); flex on other GPUs,
    where it has not been measured, in fp32, and for heads wider than 128 (Qwen3.5's have 256): torch itself gives those to cuDNN
    from 9.23 on alone, and they have not run here.
    """
    if name == "auto":
        fast = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and has_cudnn() and head_dim <= 128
        hopper = fast and torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9
        return "cudnn" if hopper else "flex" if device.type == "cuda" else "sdpa"
    if name not in BACKENDS:
        raise ValueError(f"--attention {name!r} is not one of auto, {', '.join(BACKENDS)}")
    if name in (*VARLEN, "cudnn"):
        if device.type != "cuda":
            raise ValueError(f"--attention {name} needs CUDA; on a CPU use --attention sdpa")
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"--attention {name} has no {dtype} kernel; use flex or sdpa, or --dtype bf16")
    if name == "flex" and device.type == "cpu":
        raise ValueError("--attention flex has no backward pass on a CPU; use --attention sdpa")
    if name == "cudnn" and not has_cudnn():
        raise ValueError("--attention cudnn: this torch has no cuDNN; use --attention flex")
    if name in PACKAGES and (missing := why_missing(PACKAGES[name])):
        package = "flash-attn" if name == "flash2" else "flash-attn-4"
        raise ValueError(
            f"--attention {name} needs the package {package} ({missing}); use --attention flex or varlen without it"
        )
    return name
