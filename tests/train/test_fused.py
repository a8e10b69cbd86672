"""Compiled norms, rotations and gated products against the library's own, log-probs and every gradient."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from transformers import AutoModelForImageTextToText

from data.normalise import read_normalisation
from tests.tiny_models import tiny_model
from tests.train.packed_cases import PromptMaker
from train.fused import ROTATIONS, fuse_elementwise, gated, rms_norm
from train.group_attention import pack
from train.packed_model import PackedModel


def test_formulas_by_hand():
    x = torch.tensor([[3.0, 4.0]])  # mean square 12.5
    expected = torch.tensor([[3.0 * 2 / 12.5**0.5, 4.0 * 0.5 / 12.5**0.5]])
    assert torch.allclose(rms_norm(x, torch.tensor([2.0, 0.5]), 0.0), expected)
    # silu(1) = 1 / (1 + e^-1) = 0.7310586
    assert torch.allclose(gated(torch.tensor([1.0]), torch.tensor([3.0])), torch.tensor([2.1931758]))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_every_norm_and_mlp_is_found(family, monkeypatch):
    monkeypatch.setattr("train.fused.compiled", lambda function: function)
    hf = AutoModelForImageTextToText.from_pretrained(tiny_model(family), dtype=torch.float32)
    names = [type(module).__name__ for module in hf.modules()]
    norms = sum(name.endswith("RMSNorm") for name in names)
    gates = sum(hasattr(module, "gate_proj") for module in hf.modules())
    assert fuse_elementwise(hf) == gates + (0 if family == "qwen3_5" else norms) > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_same_log_probs_and_gradients(family, monkeypatch):
    folder = tiny_model(family)
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    library = importlib.import_module(type(plain).__module__)
    for name in ROTATIONS:
        monkeypatch.setattr(library, name, getattr(library, name))  # given back after the test
    maker = PromptMaker(folder, plain.config)
    batches = [
        [maker.group("video", [5, 9], 1)[0], maker.group("text", [4], 2)[0]],
        [maker.group("both", [7, 2], 3)[0]],
    ]
    found = []
    for fused in (False, True):
        model = PackedModel(copy.deepcopy(plain), normalisation=read_normalisation(folder), fused=fused).train()
        model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        logprobs = [model(pack(groups, backend="sdpa", device=torch.device("cpu")))[0] for groups in batches]
        sum((row * torch.arange(1, len(row) + 1)).sum() for row in logprobs).backward()
        found.append((torch.cat(logprobs).detach(), {n: p.grad for n, p in model.named_parameters()}))
    (plain_rows, plain_grads), (rows, grads) = found
    assert (rows - plain_rows).abs().max() < 1e-5
    for name, gradient in plain_grads.items():
        assert (grads[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name
