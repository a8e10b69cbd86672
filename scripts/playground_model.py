"""The playground's model: a tiny Qwen3-VL with its own tokenizer, saved as an ordinary Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

PATCH, MERGE, TEMPORAL_PATCH = 16, 2, 2
MAX_LENGTH = 1024  # positions of the language model, in tokens
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
# ChatML as Qwen3-VL writes it: no system turn of its own, media in place of their markers.
CHAT_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for item in message.content -%}
{%- if item.type == 'image' or 'image' in item -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif item.type == 'video' or 'video' in item -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in item -%}{{ item.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def train_tokenizer(texts: list[str], n_tokens: int = 1024) -> Qwen2TokenizerFast:
    """A byte-level BPE with Qwen's splitting rule and special tokens, learned from `texts` (at most n_tokens in all).

    All 256 bytes are in the alphabet, so every text can be encoded.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=n_tokens - len(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
            show_progress=False,
        ),
    )
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2TokenizerFast(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = MAX_LENGTH
    return tokenizer


def make_processor(tokenizer: Qwen2TokenizerFast) -> Qwen3VLProcessor:
    """Qwen3-VL's own processors for patches of 16 pixels merged 2 x 2; sides become multiples of 32."""
    unit = (PATCH * MERGE) ** 2
    patches = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": TEMPORAL_PATCH}
    norm = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            size={"shortest_edge": 4 * unit, "longest_edge": 64 * unit}, **patches, **norm
        ),
        video_processor=Qwen3VLVideoProcessor(
            size={"shortest_edge": 4 * unit, "longest_edge": 64 * 16 * unit}, **patches, **norm
        ),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def make_config(tokenizer: Qwen2TokenizerFast) -> Qwen3VLConfig:
    """Hidden 128, 3 + 3 layers. vLLM's CPU attention wants head_dim 32, 64 …; mrope_section sums to head_dim / 2."""
    token_id = tokenizer.convert_tokens_to_ids
    hidden = 128
    return Qwen3VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": hidden,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": MAX_LENGTH,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.05,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 3,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL_PATCH,
            "out_hidden_size": hidden,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1],
            "initializer_range": 0.05,
        },
        tie_word_embeddings=False,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )


def place_code(n_places: int, width: int) -> torch.Tensor:
    """(n_places, width) sines and cosines of row and column, scaled to 0.5: where each place of the square grid is.

    The library starts these embeddings at noise ten times smaller than the patches' own; a tower that has a minute to
    learn then never finds out where things are.
    """
    side = int(n_places**0.5)
    steps = torch.linspace(0, 1, side)
    angles = torch.pi / 4 * torch.arange(1, width // 4 + 1) * steps[:, None]  # (side, width / 4)
    axis = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # (side, width / 2)
    rows, columns = axis[:, None].expand(side, side, -1), axis[None].expand(side, side, -1)
    return 0.5 * torch.cat([rows, columns], dim=-1).flatten(0, 1)


def make_model(tokenizer: Qwen2TokenizerFast, seed: int) -> torch.nn.Module:
    """Randomly initialised in float32, but for the code of places."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(make_config(tokenizer), dtype=torch.float32)
    places = model.model.visual.pos_embed.weight
    places.data.copy_(place_code(*places.shape))
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad, bos_token_id=pad)
    return model


def save_model(folder: Path, model: torch.nn.Module, processor: Qwen3VLProcessor) -> None:
    """Write weights, configuration, tokenizer and processor files."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
