"""Compiled norms, rotations and gated products against the library's own, log-probs and every gradient."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForImageTextToText

from data.normalise import read_normalisation
from tests.tiny_models import tiny_model
from tests.train.packed_cases import PromptMaker, float64_throughout
from tests.train.test_attention_backends import loop_kernel
from tests.train.test_packed import compare, models  # noqa: F401 - models is a fixture
from train.fused import ROTATIONS, compiled_per_token, fuse_elementwise, gated, rms_norm
from train.group_attention import pack
from train.packed_model import PackedModel
from train.vision import VISION_CUDNN, VISION_VARLEN


def keep_rotations(monkeypatch, hf) -> None:
    """The library's rotations come back after the test."""
    library = importlib.import_module(type(hf).__module__)
    for name in ROTATIONS:
        monkeypatch.setattr(library, name, getattr(library, name))


def compile_with(monkeypatch, compiler) -> None:
    """compiler(function) in the place of both ways in which train/fused.py compiles."""
    for name in ("compiled", "compiled_per_token"):
        monkeypatch.setattr(f"train.fused.{name}", compiler)


def test_formulas_by_hand():
    x = torch.tensor([[3.0, 4.0]])  # mean square 12.5
    expected = torch.tensor([[3.0 * 2 / 12.5**0.5, 4.0 * 0.5 / 12.5**0.5]])
    assert torch.allclose(rms_norm(x, torch.tensor([2.0, 0.5]), 0.0), expected)
    # silu(1) = 1 / (1 + e^-1) = 0.7310586
    assert torch.allclose(gated(torch.tensor([1.0]), torch.tensor([3.0])), torch.tensor([2.1931758]))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_every_norm_and_mlp_is_found(family, monkeypatch):
    compile_with(monkeypatch, lambda function: function)
    hf = AutoModelForImageTextToText.from_pretrained(tiny_model(family), dtype=torch.float32)
    keep_rotations(monkeypatch, hf)
    names = [type(module).__name__ for module in hf.modules()]
    norms = sum(name.endswith("RMSNorm") for name in names)
    gates = sum(hasattr(module, "gate_proj") for module in hf.modules())
    blocks = len(hf.model.visual.blocks)
    assert fuse_elementwise(hf) == blocks + gates + (0 if family == "qwen3_5" else norms) > blocks


def test_policy_and_reference_stay_within_what_torch_compiles(models, monkeypatch):  # noqa: F811
    """Reference, old log-probs and update: nine variants of a norm, one more than torch compiles by itself.

    The guards are torch's, whatever compiles behind them: nothing does here.
    """
    from torch._dynamo.utils import counters

    variants = {}
    compile_with(
        monkeypatch,
        lambda function: variants.setdefault(function, torch.compile(function, dynamic=True, backend="eager")),
    )
    torch._dynamo.reset()
    counters.clear()
    plain, packed, maker = models("qwen3_vl", torch.float32)
    keep_rotations(monkeypatch, plain)
    text = pack([maker.group("text", [3, 2], 1)[0]], backend="sdpa", device=torch.device("cpu"))
    with torch._dynamo.config.patch(recompile_limit=8):
        policy, reference = (
            PackedModel(copy.deepcopy(plain), normalisation=packed.normalisation, fused=True) for _ in range(2)
        )
        reference.requires_grad_(False)
        with torch.no_grad():
            old = [model(text)[0] for model in (reference, policy)]
        logprobs, _ = policy(text)
        logprobs.sum().backward()
    assert all((each - logprobs).abs().max() < 1e-5 for each in old)
    assert counters["stats"]["unique_graphs"] > 8 and not counters["unimplemented"], counters["unimplemented"]


def test_the_number_of_tokens_alone_is_left_open(monkeypatch):
    """A dummy's 128 tokens and a head's 128 values: nothing but the tokens may become a symbol, or every later call is slow."""
    marked = []
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", lambda tensor, axis: marked.append((tensor.dim(), axis)))
    call = compiled_per_token.__wrapped__(lambda *tensors: tensors)
    query, cos = torch.zeros(1, 16, 128, 128), torch.zeros(1, 128, 128)
    call(query, cos, cos)
    call(torch.zeros(72, 3, 16, 72), torch.zeros(72, 72), torch.zeros(72, 72))  # the tower's (K, 3, H, d)
    assert marked == [(4, 2), (3, 1), (3, 1), (4, 0), (2, 0), (2, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_same_log_probs_and_gradients(family, monkeypatch):
    folder = tiny_model(family)
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    keep_rotations(monkeypatch, plain)
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


@pytest.mark.parametrize("vision", [VISION_VARLEN, VISION_CUDNN])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_towers_attention_with_all_frames_in_one_call(models, monkeypatch, family, vision):  # noqa: F811
    """Split, rotation and frame calls of CUDA's path, eager in float64 and with loops for kernels, against the plain tower."""
    calls = []

    def dense_frames(q, k, v, frames, scaling):
        calls.append((frames, len(q) // frames))
        each = [x.view(frames, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
        return scaled_dot_product_attention(*each, scale=scaling).transpose(1, 2).reshape(q.shape)

    def varlen(q, k, v, cu, longest, scaling):
        return loop_kernel(q, k, v, cu, cu, longest, longest, scaling, causal=False)[0]

    compile_with(monkeypatch, lambda function: function)
    monkeypatch.setattr("train.vision.dense_frames", dense_frames)
    monkeypatch.setattr("train.vision._varlen", varlen)
    with float64_throughout():
        plain, packed, maker = models(family, torch.float64)
        keep_rotations(monkeypatch, plain)
        made = PackedModel(
            copy.deepcopy(plain), normalisation=packed.normalisation, banned_ids=(440, 441), vision_attention=vision,
            fused=True,
        ).train()  # fmt: skip
        cases = [maker.group("both", [5, 9], 1), maker.group("video", [3], 2)]
        logprobs, entropy, gradients = compare(plain, made, cases)
    assert logprobs <= 1e-10 and entropy <= 1e-10
    assert max(gradients.values()) <= 1e-10, max(gradients, key=gradients.get)
    assert bool(calls) == (vision == VISION_CUDNN)
