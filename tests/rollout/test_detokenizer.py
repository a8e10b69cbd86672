"""Texts of finished responses, made at once: by hand, and against the tokenizers library's own stream of single tokens."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rollout.vllm_access import Detokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny("qwen3_vl"))


def byte_id(tokenizer, value: int) -> int:
    """The token of a single byte, which byte-level vocabularies write as a printable character."""
    letter = chr(value) if 33 <= value <= 126 or 161 <= value <= 172 or 174 <= value <= 255 else None
    if letter is None:  # the others are counted up from 256: 0 to 32, 127 to 160, 173
        others = [*range(33), *range(127, 161), 173]
        letter = chr(256 + others.index(value))
    return tokenizer.convert_tokens_to_ids(letter)


def test_texts_by_hand(tokenizer):
    def ids(*parts) -> list[int]:
        return [
            tokenizer.convert_tokens_to_ids(part) if isinstance(part, str) else byte_id(tokenizer, part)
            for part in parts
        ]

    text = Detokenizer(tokenizer)
    prompt = tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert text(prompt, ids("A", "<|im_end|>")) == "A"  # end tokens stay in the ids and are no text
    assert text(prompt, ids("A", "<|vision_start|>", 0x20, "B")) == "A B"
    assert text(prompt, ids("A", 0xC3, 0xA9)) == "Aé"
    assert text(prompt, ids("A", 0xC3)) == "A"  # half a character at the end never comes out of the stream
    assert text(prompt, ids("A", 0xC3, "<|im_end|>")) == "A"
    assert text(prompt, ids("A", 0xC3, "B")) == "A\N{REPLACEMENT CHARACTER}B"
    assert text(prompt, ids(0xF0, 0x9F, 0x98, 0x80, "A", 0xF0, 0x9F)) == "\N{GRINNING FACE}A"
    assert text(prompt, []) == ""


def test_random_ids_read_as_the_stream_of_single_tokens(tokenizer):
    """Any ids, those beyond the tokenizer's own among them: a head may have more rows than there are tokens."""
    draw, text = random.Random(3), Detokenizer(tokenizer)
    prompt = tokenizer.encode("<|im_start|>assistant\n")
    whole = [i for i in range(len(tokenizer)) if "\N{REPLACEMENT CHARACTER}" not in tokenizer.decode([i])]
    broken = set()
    for round_ in range(400):
        pool = whole if round_ % 2 else range(len(tokenizer) + 9)
        tokens = draw.choices(pool, k=draw.randint(1, 60))
        stream = DecodeStream(ids=prompt, skip_special_tokens=True)
        expected = ""
        for token in tokens:
            expected += stream.step(tokenizer.backend_tokenizer, token) or ""
        assert text(prompt, tokens) == expected
        broken.add("\N{REPLACEMENT CHARACTER}" in expected)
    assert broken == {True, False}


def test_a_piece_that_depends_on_what_stands_before_it():
    """SentencePiece's first word loses its space at the start of a text, and a response does not start there."""
    vocabulary = {"▁yes": 0, "▁no": 1, "!": 2, "<unk>": 3}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.decode([1, 2]) == "no!"
    assert Detokenizer(tokenizer)([0, 2], [1, 2]) == " no!"
