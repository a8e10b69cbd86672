"""Memory of an update by arithmetic: activations of a micro-batch, kept layers, and how many of them fit.

scripts/plan_memory.py prints it; its peaks for 2B, 4B and 8B with 0 to 28 kept layers lie within 5 % of those measured, always
below them (tests/scripts/test_plan_memory.py). `--kept_layers auto` decides by it before every update.
"""

from __future__ import annotations

import torch

from train.flops import Shape, language_layer_parameters, vision_layer_parameters

BF16, FP32 = 2, 4
LOGIT_CHUNK = 1024  # response tokens whose logits exist at once: the default of --logit_chunk
KEPT = "kept language layers (--kept_layers)"
KEPT_VISION = "kept vision layers (--kept_vision_layers)"
INSIDES = ("one language layer", "logits chunk, output layer", "one vision layer")  # never two of them at the same time
# What each --optimizer holds per parameter, sharded, beside 2 bytes of bf16 weights and DeepSpeed's buffer of gradients, which
# never goes away: fp32 master weights or bf16 residues where there are any, two fp32 moments.
OPTIMIZER_BYTES = {"adamw": FP32 + 2 * FP32, "adamw_stochastic": 2 * FP32, "adamw_kahan": BF16 + 2 * FP32}
GRADIENT_BYTES = {"fp32": FP32, "bf16": BF16}  # --grad_accum_dtype -> bytes per parameter of that buffer
MARGIN = 0.12  # of the free memory: the arithmetic is up to 4 % low, and the allocator wastes some


def kept_bytes_per_token(shape: Shape, fused: bool) -> float:
    """What a language layer whose activations are kept (--kept_layers) holds per token beside its input, bf16.

    Both normed copies and the residual between them, queries, keys and values before and after norm and rotation, attention's
    output, and the three halves of the gated product. Without --fused a norm holds its input in fp32 and the quotient in bf16
    instead of its input, and the gated product silu's output as well.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    head_norms = queries + keys if shape.family in ("qwen3_vl", "qwen3_5") else 0
    held = 2 * shape.hidden + 2 * queries + 2 * keys + 3 * shape.intermediate
    if fused:
        return BF16 * (held + shape.hidden + head_norms)
    return BF16 * (held + shape.intermediate) + (FP32 + BF16) * (2 * shape.hidden + head_norms)


def kept_bytes_per_patch(shape: Shape) -> float:
    """The same of a vision layer (--kept_vision_layers): two normed copies, the residual, what attention reads and writes,
    and the insides of the MLP."""
    return BF16 * (7 * shape.vision_hidden + shape.vision_mlp_products * shape.vision_intermediate)


def activation_bytes(
    shape: Shape,
    tokens: int,
    response_tokens: int,
    patches: int,
    sharing: int = 1,
    *,
    kept: tuple[int, int] = (0, 0),
    fused: bool = False,
    logit_chunk: int = LOGIT_CHUNK,
) -> dict[str, float]:
    """One micro-batch under gradient checkpointing: the input of every layer is kept, one layer's insides exist at once.

    sharing: ranks that cut its tokens and its clips among them (--sequence_parallel); each has all visual features.
    kept: language and vision layers that keep all of their activations.

    Inside a language layer, per token: residual, two normed copies, queries, keys, values, attention output and its
    projection, and the three halves of the gated product; twice, for the gradients beside them. The output layer's backward
    pass has a chunk's log-probs, probabilities and gradient in fp32 and the gradient in bf16, and sums its weight's gradient in
    fp32 beside the bf16 product of a chunk.
    """
    inside = 4 * shape.hidden + 2 * shape.q_outputs + 2 * shape.kv_heads * shape.head_dim + 3 * shape.intermediate
    vision_inside = 8 * shape.vision_hidden + shape.vision_mlp_products * shape.vision_intermediate
    features = patches // shape.merge**2 * shape.hidden * shape.vision_mergers
    tokens, response_tokens, patches = (-(-count // sharing) for count in (tokens, response_tokens, patches))
    logits = min(response_tokens, logit_chunk) * shape.vocabulary * (3 * FP32 + BF16)
    logits += shape.vocabulary * shape.hidden * (FP32 + BF16)
    layers, vision_layers = min(kept[0], shape.layers), min(kept[1], shape.vision_depth)
    held = {
        KEPT: layers * tokens * kept_bytes_per_token(shape, fused),
        KEPT_VISION: vision_layers * patches * kept_bytes_per_patch(shape),
    }
    return {
        "layer inputs": tokens * shape.hidden * shape.layers * BF16,
        "one language layer": 2 * tokens * inside * BF16,
        "logits chunk, output layer": logits,
        "vision layer inputs": patches * shape.vision_hidden * shape.vision_depth * BF16,
        "one vision layer": 2 * patches * vision_inside * BF16,
        "vision features": 2 * features * BF16,
        **{name: value for name, value in held.items() if value},
    }


def gathered_bytes(shape: Shape) -> float:
    """ZeRO-3: two layers (the running one and the one fetched ahead) and the larger embedding, whole, in bf16."""
    full, linear = language_layer_parameters(shape)
    live = 2 * max(full, linear, vision_layer_parameters(shape)) + shape.vocabulary * shape.hidden
    return live * BF16


def peak_bytes(parts: dict[str, float]) -> float:
    """Of activation_bytes(): all that is there together, and the largest of the insides, which never are."""
    return sum(size for name, size in parts.items() if name not in INSIDES) + max(parts[name] for name in INSIDES)


def fitting_kept_layers(shape: Shape, micro_batches, free_bytes: float, args) -> int:
    """How many decoder layers of this rank can keep their activations in an update over these micro-batches.

    free_bytes: what the device has left before the first of them. The largest micro-batch decides. 0 for Qwen3.5, whose
    linear-attention layers hold more than is counted here (torch's rule keeps its chunks in fp32).
    """
    if shape.linear_layers:
        return 0
    fewest = shape.layers
    for micro in micro_batches:
        prompts = [group.prompt for group in micro.groups]
        responses = sum(len(response.token_ids) for group in micro.groups for response in group.responses)
        tokens = sum(len(prompt.input_ids) for prompt in prompts) + responses
        patches = sum(len(prompt.patches) for prompt in prompts if prompt.patches is not None)
        parts = activation_bytes(
            shape, tokens, responses, patches, args.sequence_parallel, kept=(0, args.kept_vision_layers),
            logit_chunk=args.logit_chunk,
        )  # fmt: skip
        needed = peak_bytes(parts) + gathered_bytes(shape)
        per_layer = kept_bytes_per_token(shape, args.fused) * -(-tokens // args.sequence_parallel)
        fewest = min(fewest, int(((1 - MARGIN) * free_bytes - needed) // per_layer))
    return max(0, fewest)


class Room:
    """Free memory of the device while vLLM sleeps, in bytes: asked once per step, then followed by what torch allocates."""

    def __init__(self):
        self._cuda = torch.cuda.is_available()
        self._free, self._held = (torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()) if self._cuda else (0, 0)

    def free_bytes(self) -> float:
        """0 on a CPU. What torch has cached since then counts as free."""
        return self._free - (torch.cuda.memory_allocated() - self._held) if self._cuda else 0
