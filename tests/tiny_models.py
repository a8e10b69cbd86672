"""Tiny random models of the four families, as ordinary Hugging Face folders with tokenizer and processor files.

`tiny_model("qwen3_vl", root)` builds (or finds) the folder. Sizes are the smallest that transformers and vLLM's CPU
kernels take: attention heads of 32 or 64, and linear-attention heads of 64 for Qwen3.5. The weights are spread wider
than the library default so that the logits of a random model are not nearly uniform.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
# In the order of the real Qwen vocabulary.
SPECIAL_NAMES = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad"
)
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in SPECIAL_NAMES.split())
TEXT = (
    "the a video image shows red green blue square circle triangle moving left right up down fast slow what colour is "
    "object how many frames first last before after think answer yes no option when does appear reason step by user"
)
WORDS = TEXT.split()
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for item in message.content -%}
{%- if item.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif item.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ item.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
HIDDEN = 128


def build_tokenizer() -> Qwen2TokenizerFast:
    """A byte-level BPE trained on the spot, with the Qwen special tokens behind its own vocabulary."""
    rng = random.Random(7)
    corpus = [" ".join(rng.choice(WORDS) for _ in range(24)) for _ in range(300)]
    corpus += ["<think>\nThe square moves left.\n</think>\n<answer>B</answer>"] * 20
    corpus += [f"<{i / 4:.1f} seconds>" for i in range(80)]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet))
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2TokenizerFast(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 4096
    return tokenizer


def build_config(family: str, tokenizer: Qwen2TokenizerFast, tied: bool):
    """The family's configuration at toy size. `mrope_section` sums to half of the rotated head dimensions."""
    ident = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": (len(tokenizer) + 63) // 64 * 64,
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.05,
        "bos_token_id": ident("<|endoftext|>"),
        "eos_token_id": ident("<|im_end|>"),
        "pad_token_id": ident("<|endoftext|>"),
        "tie_word_embeddings": tied,
    }
    common = {
        "image_token_id": ident("<|image_pad|>"),
        "video_token_id": ident("<|video_pad|>"),
        "vision_start_token_id": ident("<|vision_start|>"),
        "vision_end_token_id": ident("<|vision_end|>"),
        "tie_word_embeddings": tied,
    }
    old_rope = {"rope_type": "default", "type": "mrope", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "initializer_range": 0.05,
    }
    vision3 = {
        **vision,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
    }
    if family == "qwen2_vl":
        tower = {
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": HIDDEN,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
            "initializer_range": 0.05,
        }
        return Qwen2VLConfig(text_config={**text, "rope_parameters": old_rope}, vision_config=tower, **common)
    if family == "qwen2_5_vl":
        tower = {
            **vision,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        }
        return Qwen2_5_VLConfig(text_config={**text, "rope_parameters": old_rope}, vision_config=tower, **common)
    if family == "qwen3_vl":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
        return Qwen3VLConfig(
            text_config={**text, "head_dim": 32, "rope_parameters": rope},
            vision_config={**vision3, "deepstack_visual_indexes": [0]},
            **common,
        )
    if family == "qwen3_5":
        linear = {
            "num_hidden_layers": 4,
            "head_dim": 64,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,
            },
        }
        return Qwen3_5Config(text_config={**text, **linear}, vision_config=vision3, **common)
    raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")


def build(family: str, folder: Path, tied: bool, seed: int) -> None:
    """Write model, tokenizer and processor files of one family into `folder`."""
    tokenizer = build_tokenizer()
    config = build_config(family, tokenizer, tied)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    ident = tokenizer.convert_tokens_to_ids
    model.generation_config = GenerationConfig(
        eos_token_id=[ident("<|im_end|>"), ident("<|endoftext|>")],
        pad_token_id=ident("<|endoftext|>"),
        bos_token_id=ident("<|endoftext|>"),
    )
    model.save_pretrained(folder)
    patch = 16 if family in ("qwen3_vl", "qwen3_5") else 14
    unit = (2 * patch) ** 2
    # Mean and std as the real processors of the family have them: CLIP's for the older two, one half for the newer.
    mean = [0.5] * 3 if patch == 16 else [0.48145466, 0.4578275, 0.40821073]
    std = [0.5] * 3 if patch == 16 else [0.26862954, 0.26130258, 0.27577711]
    shared = {
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": mean,
        "image_std": std,
    }
    image = Qwen2VLImageProcessor(size={"shortest_edge": 4 * unit, "longest_edge": 64 * unit}, **shared)
    if patch == 16:
        video = Qwen3VLVideoProcessor(size={"shortest_edge": 4 * unit, "longest_edge": 16 * 64 * unit}, **shared)
    else:
        video = Qwen2VLVideoProcessor(size={"shortest_edge": 4 * unit, "longest_edge": 64 * unit}, **shared)
    processor = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}.get(family, Qwen3VLProcessor)
    processor(
        image_processor=image, tokenizer=tokenizer, video_processor=video, chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)


def sharpen(folder: Path, family: str) -> None:
    """Larger queries in the language model, so that where a token stands changes what follows it: plain positions in place
    of M-RoPE then move log-probs by 0.25 and more, bf16 by about 0.01. In the ordinary models that is 0.03 and 0.005."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" not in name:
                continue
            if family == "qwen3_5" and name.endswith("q_norm.weight"):  # it counts from 1
                parameter.add_(3.0)
            elif family == "qwen3_vl" and name.endswith("q_norm.weight"):
                parameter.mul_(4.0)
            elif family in ("qwen2_vl", "qwen2_5_vl") and ".q_proj." in name:
                parameter.mul_(8.0)
    model.save_pretrained(folder)


def tiny_model(
    family: str, root: str | Path | None = None, *, tied: bool = False, sharp: bool = False, seed: int = 0
) -> str:
    """Path of the tiny model of `family`, built once per machine and per version of this file; `sharp`: see sharpen().

    `root` is where folders are kept, by default `reelrl_tiny` in the system's temporary folder. Safe when several
    processes ask at once: the folder appears under its name only when it is complete.
    """
    root = Path(root) if root else Path(tempfile.gettempdir()) / "reelrl_tiny"
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:10]
    folder = root / version / f"{family}{'_tied' if tied else ''}{'_sharp' if sharp else ''}_{seed}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".draft-"))
        build(family, draft, tied, seed)
        if sharp:
            sharpen(draft, family)
        try:
            draft.rename(folder)
        except OSError:  # another process finished first
            shutil.rmtree(draft)
    return str(folder)


if __name__ == "__main__":
    for family in FAMILIES:
        print(tiny_model(family))
    print(tiny_model("qwen3_vl", tied=True))
