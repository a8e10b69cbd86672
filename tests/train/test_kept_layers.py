"""--kept_layers auto: how many layers fit, by hand for the published 4B, and one number for all ranks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText

from scripts.plan_memory import SIZES
from tests.tiny_models import tiny_model
from train import memory, update
from train.flops import read_shape

GIB = 1024**3
ARGS = SimpleNamespace(kept_layers="auto", kept_vision_layers=0, sequence_parallel=1, fused=True, logit_chunk=1024)
SHAPE = read_shape(SIZES["4b"])


def micro(prompt: int, responses: list[int], patches: int) -> SimpleNamespace:
    group = SimpleNamespace(
        prompt=SimpleNamespace(input_ids=np.zeros(prompt), patches=np.zeros((patches, 0), dtype=np.uint8)),
        responses=[SimpleNamespace(token_ids=[0] * length) for length in responses],
    )
    return SimpleNamespace(groups=[group])


def test_layers_of_4b_that_fit_beside_its_states():
    """An H200 whose 139.8 GiB are 77.6 full when the update begins; the group has 16,765 + 4,342 tokens and 64,512 patches.

    12 kept layers had a peak of 112.7 GiB and 16 had 121.0 (docs/gpu_results.md): 2.07 each, 129.3 with 20.
    """
    largest = micro(16_765, [4000, 342], 64_512)
    layer_inputs, tower_inputs, features = 21_107 * 2560 * 36 * 2, 64_512 * 1024 * 24 * 2, 64_512 // 4 * 2560 * 4 * 4
    output_layer = 1024 * 151_936 * 14 + 151_936 * 2560 * 6  # the largest of the three that are never there together
    gathered = memory.gathered_bytes(SHAPE)
    assert gathered == pytest.approx(1.182e9, rel=1e-3)  # two layers of 100.9 M and the embedding of 389 M, bf16
    needed = layer_inputs + tower_inputs + features + output_layer + gathered
    one = 21_107 * 2 * (3 * 2560 + 3 * 4096 + 3 * 1024 + 3 * 9728)
    free = 62.2 * GIB
    assert int((0.88 * free - needed) // one) == 20
    assert memory.fitting_kept_layers(SHAPE, [micro(100, [5], 16), largest], free, ARGS) == 20
    assert memory.fitting_kept_layers(SHAPE, [micro(100, [5], 16)], free, ARGS) == 36  # not more than there are
    assert memory.fitting_kept_layers(SHAPE, [largest], 10 * GIB, ARGS) == 0
    halves = SimpleNamespace(**vars(ARGS) | {"sequence_parallel": 2})
    assert memory.fitting_kept_layers(SHAPE, [largest], free, halves) == 36


def test_linear_attention_layers_are_never_kept():
    shape = read_shape(AutoModelForImageTextToText.from_pretrained(tiny_model("qwen3_5")).config)
    assert shape.linear_layers and memory.fitting_kept_layers(shape, [micro(10, [5], 16)], 1e12, ARGS) == 0


def test_all_ranks_keep_as_many_as_the_fullest_one(monkeypatch):
    hf = AutoModelForImageTextToText.from_pretrained(tiny_model("qwen3_vl"))
    layers = hf.model.language_model.layers
    shape = read_shape(hf.config)
    assert len(layers) >= 2
    monkeypatch.setattr(update, "all_gather_objects", lambda own: [own, 1])  # another rank has room for one
    noted = {}
    metrics = SimpleNamespace(value=lambda name, value: noted.update({name: value}))
    policy, room = SimpleNamespace(packed=SimpleNamespace(hf=hf)), SimpleNamespace(free_bytes=lambda: 1e12)
    update.keep_what_fits(policy, [micro(100, [5], 16)], room, shape, ARGS, metrics)
    assert [layer.gradient_checkpointing for layer in layers] == [True] * (len(layers) - 1) + [False]
    assert noted == {"memory/kept_layers": 1}
    monkeypatch.setattr(update, "all_gather_objects", lambda own: [own, 0])
    update.keep_what_fits(policy, [micro(100, [5], 16)], room, shape, ARGS, metrics)
    assert all(layer.gradient_checkpointing for layer in layers)
    fixed = SimpleNamespace(**vars(ARGS) | {"kept_layers": 2})
    update.keep_what_fits(policy, [], room, shape, fixed, metrics)  # a number is set once, when the model is built
    assert all(layer.gradient_checkpointing for layer in layers)


def test_room_follows_what_torch_holds(monkeypatch):
    """50 GiB were free while vLLM slept; 8 of features since then leave 42, whatever torch has cached."""
    held = {"bytes": 30 * GIB}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (50 * GIB, 140 * GIB))
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: held["bytes"])
    room = memory.Room()
    held["bytes"] += 8 * GIB
    assert room.free_bytes() == 42 * GIB
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert memory.Room().free_bytes() == 0
