"""Useful FLOPs of the Qwen-VL families, their parameters, and the devices' peaks: for model-FLOPs utilisation.

Useful means: what the mathematics of one step needs, however it is computed. The prompt of a group counts once and not
G times, causal attention counts its lower triangle, logits count only where a response token is predicted, and
recomputation under gradient checkpointing counts nothing. A product of (m, k) and (k, n) is 2*m*k*n FLOPs; norms,
activations, rotary embeddings and softmax are left out (under 1 %). A backward pass is twice its forward: one product
for the gradient of the input, one for that of the weight.

Importable without torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# Dense bf16 tensor-core peak in FLOP/s, from the vendors' data sheets (half of the figure "with sparsity").
# The first row whose words all occur as whole words in the device's name counts: "H20" is no prefix of "H200" here.
BF16_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("GB300", 2500e12),
    ("B300", 2250e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("B100", 1750e12),
    ("H200 NVL", 835e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800 PCIe", 756e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L20", 119.5e12),
    ("L4", 121e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("MI325X", 1307e12),
    ("MI300X", 1307e12),
    ("MI250X", 383e12),
)


def bf16_peak_flops(device_name: str) -> float | None:
    """Peak of a device by torch.cuda.get_device_name(); None where the table has no row (then no mfu is reported)."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    for name, peak in BF16_PEAK_FLOPS:
        if set(name.lower().split()) <= words:
            return peak
    return None


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen-VL model that its FLOPs and its parameters depend on."""

    family: str  # qwen2_vl | qwen2_5_vl | qwen3_vl | qwen3_5
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    full_layers: int  # layers with softmax attention
    linear_layers: int  # Qwen3.5: layers with gated delta rule attention
    vocabulary: int
    tied: bool
    q_outputs: int  # of q_proj: heads * head_dim, twice that in Qwen3.5 (output gate)
    linear_key_heads: int
    linear_value_heads: int
    linear_key_dim: int
    linear_value_dim: int
    linear_kernel: int
    vision_hidden: int
    vision_intermediate: int
    vision_mlp_products: int  # 3 with a gate, else 2
    vision_depth: int
    vision_outputs: int  # width handed to the language model
    vision_mergers: int  # 1 + DeepStack mergers
    vision_full_layers: int  # layers that attend over the whole frame; the others attend in windows
    vision_window: int  # window edge in merged units
    patch: int
    merge: int
    temporal_patch: int
    channels: int = 3

    @property
    def layers(self) -> int:
        return self.full_layers + self.linear_layers


def _int(value: Any) -> int:
    return int(value[0]) if isinstance(value, (list, tuple)) else int(value)


def read_shape(config: Any) -> Shape:
    """Shape of a Hugging Face configuration (object, or the dict of config.json).

    Raises ValueError for another family and for mixtures of experts, which this count does not cover.
    """
    config = config if isinstance(config, dict) else config.to_dict()
    family = config["model_type"]
    if family not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"):
        raise ValueError(f"no FLOPs model for model_type {family!r}; known: qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_5")
    text = config.get("text_config") or config  # Qwen2-VL's hub files have the language model's sizes at the top
    vision = config["vision_config"]
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    n_linear = (text.get("layer_types") or []).count("linear_attention")
    if family == "qwen3_5" and not text.get("layer_types"):
        n_linear = text["num_hidden_layers"] - text["num_hidden_layers"] // text.get("full_attention_interval", 4)
    hidden = vision["embed_dim"] if family == "qwen2_vl" else vision["hidden_size"]
    depth = vision["depth"]
    patch, merge = _int(vision["patch_size"]), _int(vision.get("spatial_merge_size", 2))
    windowed = family == "qwen2_5_vl"
    q_outputs = text["num_attention_heads"] * head_dim
    return Shape(
        family=family,
        hidden=text["hidden_size"],
        intermediate=text["intermediate_size"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=head_dim,
        full_layers=text["num_hidden_layers"] - n_linear,
        linear_layers=n_linear,
        vocabulary=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        q_outputs=q_outputs * (2 if family == "qwen3_5" else 1),
        linear_key_heads=text.get("linear_num_key_heads", 0),
        linear_value_heads=text.get("linear_num_value_heads", 0),
        linear_key_dim=text.get("linear_key_head_dim", 0),
        linear_value_dim=text.get("linear_value_head_dim", 0),
        linear_kernel=text.get("linear_conv_kernel_dim", 0),
        vision_hidden=hidden,
        vision_intermediate=int(hidden * vision["mlp_ratio"]) if family == "qwen2_vl" else vision["intermediate_size"],
        vision_mlp_products=3 if family == "qwen2_5_vl" else 2,
        vision_depth=depth,
        vision_outputs=vision["hidden_size"] if family == "qwen2_vl" else vision["out_hidden_size"],
        vision_mergers=1 + (len(vision.get("deepstack_visual_indexes") or ()) if family == "qwen3_vl" else 0),
        vision_full_layers=len(set(vision["fullatt_block_indexes"])) if windowed else depth,
        vision_window=vision["window_size"] // patch // merge if windowed else 0,
        patch=patch,
        merge=merge,
        temporal_patch=_int(vision.get("temporal_patch_size", 2)),
        channels=_int(vision.get("in_channels", vision.get("in_chans", 3))),
    )


# ---- parameters of the matrix products (norms and biases, under 0.1 %, are left out) ------------------------------


def language_layer_parameters(shape: Shape) -> tuple[int, int]:
    """Weights of one layer with softmax attention and of one with linear attention."""
    mlp = 3 * shape.hidden * shape.intermediate
    full = shape.hidden * (shape.q_outputs + 2 * shape.kv_heads * shape.head_dim)
    full += shape.heads * shape.head_dim * shape.hidden
    keys = shape.linear_key_heads * shape.linear_key_dim
    values = shape.linear_value_heads * shape.linear_value_dim
    linear = shape.hidden * (2 * keys + 2 * values + 2 * shape.linear_value_heads) + values * shape.hidden
    linear += (2 * keys + values) * shape.linear_kernel
    return full + mlp, linear + mlp


def parameters(shape: Shape) -> dict[str, int]:
    """Number of weights: `language` (layers), `embeddings` (input, and output where not tied), `vision`, `total`."""
    full, linear = language_layer_parameters(shape)
    language = full * shape.full_layers + linear * shape.linear_layers
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    vision = patch_embed_parameters(shape) + shape.vision_depth * vision_layer_parameters(shape)
    vision += shape.vision_mergers * merger_parameters(shape)
    return {
        "language": language,
        "embeddings": embeddings,
        "vision": vision,
        "total": language + embeddings + vision,
    }


def patch_embed_parameters(shape: Shape) -> int:
    return shape.channels * shape.temporal_patch * shape.patch**2 * shape.vision_hidden


def vision_layer_parameters(shape: Shape) -> int:
    mlp = shape.vision_mlp_products * shape.vision_hidden * shape.vision_intermediate
    return 4 * shape.vision_hidden**2 + mlp


def merger_parameters(shape: Shape) -> int:
    """Two products on merge x merge patches joined: (4e, 4e) and (4e, width of the language model)."""
    joined = shape.vision_hidden * shape.merge**2
    return joined * joined + joined * shape.vision_outputs


# ---- forward FLOPs ------------------------------------------------------------------------------------------------


def attended_positions(prompt_tokens: int, response_tokens: Sequence[int]) -> int:
    """Query-key pairs of one group: each prompt token with the prompt up to itself, counted once; each response token
    with the whole prompt and with its own response up to itself. P=3, R=[2, 1] -> 6 + (3*2 + 3) + (3*1 + 1) = 19."""
    pairs = prompt_tokens * (prompt_tokens + 1) // 2
    return pairs + sum(prompt_tokens * n + n * (n + 1) // 2 for n in response_tokens)


def language_forward(shape: Shape, prompt_tokens: int, response_tokens: Sequence[int]) -> float:
    """FLOPs of one forward pass of the language model over one group, logits on response tokens only."""
    n_response = sum(response_tokens)
    tokens = prompt_tokens + n_response
    full, linear = language_layer_parameters(shape)
    products = 2 * tokens * (full * shape.full_layers + linear * shape.linear_layers)
    pairs = attended_positions(prompt_tokens, response_tokens)
    attention = 4 * shape.heads * shape.head_dim * pairs * shape.full_layers  # scores, and their sum over values
    state = shape.linear_value_heads * shape.linear_key_dim * shape.linear_value_dim
    recurrence = 6 * tokens * state * shape.linear_layers  # per token: read with k, write the difference, read with q
    logits = 2 * n_response * shape.hidden * shape.vocabulary
    return float(products + attention + recurrence + logits)


def vision_forward(shape: Shape, grids_thw: Iterable[Sequence[int]]) -> float:
    """FLOPs of one forward pass of the vision tower over grids (K, 3): time, height, width in patches.

    A patch attends within its own temporal slice, or in Qwen2.5-VL's windowed layers within its window.
    """
    flops = 0.0
    for t, h, w in grids_thw:
        t, h, w = int(t), int(h), int(w)
        patches = t * h * w
        flops += 2 * patches * (patch_embed_parameters(shape) + shape.vision_depth * vision_layer_parameters(shape))
        flops += 2 * (patches // shape.merge**2) * shape.vision_mergers * merger_parameters(shape)
        pairs = shape.vision_full_layers * t * (h * w) ** 2
        if shape.vision_full_layers < shape.vision_depth:
            rows, columns = (_window_squares(n // shape.merge, shape.vision_window) for n in (h, w))
            pairs += (shape.vision_depth - shape.vision_full_layers) * t * rows * columns * shape.merge**4
        flops += 4 * shape.vision_hidden * pairs
    return flops


def _window_squares(length: int, window: int) -> int:
    """Sum of squared lengths of the windows that tile `length`: 10 in windows of 4 -> 16 + 16 + 4 = 36."""
    full, rest = divmod(length, window)
    return full * window**2 + rest**2


def group_flops(
    shape: Shape,
    prompt_tokens: int,
    response_tokens: Sequence[int],
    grids_thw: Iterable[Sequence[int]] = (),
    *,
    tower: str = "trained",
) -> float:
    """Useful FLOPs of one update pass (forward and backward) over one group.

    `tower`: "trained" (forward and backward), "frozen" (forward), "cached" (features supplied: nothing).
    """
    times = {"trained": 3, "frozen": 1, "cached": 0}
    if tower not in times:
        raise ValueError(f"tower must be one of {', '.join(times)}, got {tower!r}")
    vision = vision_forward(shape, grids_thw) if times[tower] else 0.0
    return 3 * language_forward(shape, prompt_tokens, response_tokens) + times[tower] * vision


def utilisation(useful_flops: float, seconds: float, n_devices: int, peak_flops: float | None) -> float | None:
    """Model-FLOPs utilisation in [0, 1]; None without a peak or without time."""
    if not peak_flops or not seconds > 0 or not math.isfinite(useful_flops):
        return None
    return useful_flops / (seconds * n_devices * peak_flops)
