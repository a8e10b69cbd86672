"""The packed group against one row per response on the GPU's own kernels: flex (fp32 and bf16), cudnn and varlen (bf16)."""

from __future__ import annotations

import copy
import statistics
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from data.normalise import read_normalisation
from data.records import Group
from tests.tiny_models import tiny_model
from tests.train.packed_cases import PromptMaker, groups_of
from train import cudnn_attention
from train.cudnn_attention import cudnn_packed
from train.fused import ROTATIONS
from train.group_attention import PACKAGES, pack, sdpa_packed, why_missing
from train.packed_model import PackedModel
from train.vision import choose_vision_attention, frame_runs, vision_attention_cudnn

CASES = [("video", [150, 9, 40], 1), ("text", [4, 6, 130], 2), ("both", [70, 2, 4], 3)]


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def family(request):
    folder = tiny_model(request.param)
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    maker = PromptMaker(folder, plain.config)
    return folder, plain, [maker.group(*case)[0] for case in CASES]


def run(
    family, dtype, backend: str, *, rows: bool, fused: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(log-probs of all response tokens, gradients by name) on the GPU, in float32 on the host."""
    folder, plain, groups = family
    device = torch.device("cuda", 0)
    model = PackedModel(
        copy.deepcopy(plain).to(device=device, dtype=dtype),
        normalisation=read_normalisation(folder),
        vision_attention=choose_vision_attention(backend, device, dtype),
        fused=fused,
    ).train()
    parts = [[Group(g.prompt, [r])] for g in groups for r in g.responses] if rows else [groups]
    found = []
    for part in parts:
        logprobs, _ = model(pack(part, backend=backend, device=device))
        weights = 1.0 + torch.arange(len(logprobs), device=device) % 3
        if not rows:  # the same weights as row by row: they count from each response's beginning
            lengths = [len(r.token_ids) for g in groups for r in g.responses]
            weights = torch.cat([1.0 + torch.arange(n, device=device) % 3 for n in lengths])
        (logprobs * weights).sum().backward()
        found.append(logprobs.detach().float().cpu())
    return torch.cat(found), {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}


def distances(gradients: dict, reference: dict) -> list[float]:
    """Per tensor: norm of the difference over norm."""
    assert gradients.keys() == reference.keys()
    return [float((gradients[n] - reference[n]).norm() / reference[n].norm().clamp_min(1e-12)) for n in reference]


@pytest.fixture(scope="module")
def reference(family):
    return run(family, torch.float32, "sdpa", rows=True)


def test_flex_in_fp32(family, reference):
    logprobs, gradients = run(family, torch.float32, "flex", rows=False)
    assert (logprobs - reference[0]).abs().max() < 1e-4
    assert max(distances(gradients, reference[1])) < 1e-3


FLASH4 = pytest.param(
    "flash4", marks=pytest.mark.skipif(bool(why_missing(PACKAGES["flash4"])), reason="no flash-attn-4")
)


@pytest.mark.parametrize("backend", ["flex", "cudnn", "varlen", FLASH4])
def test_bf16_is_as_near_as_rows_are(family, reference, backend, monkeypatch):
    """bf16 rounds; packing must not add to it: packed and rows are equally far from fp32, on the same kernel."""
    monkeypatch.setattr(cudnn_attention, "LONG_PROMPT", 16)  # the tiny models' prompts count as long ones
    monkeypatch.setattr(cudnn_attention, "PROMPT_STEP", 16)
    packed, rows = (run(family, torch.bfloat16, backend, rows=flag) for flag in (False, True))
    far = {name: (made[0] - reference[0]).abs().mean() for name, made in (("packed", packed), ("rows", rows))}
    assert far["packed"] < 1.5 * far["rows"] + 1e-3
    errors = [statistics.median(distances(made[1], reference[1])) for made in (packed, rows)]
    assert errors[0] < 1.5 * errors[1] + 1e-3


@pytest.fixture
def library(family):
    """The library's module, with the rotations that train/fused.py replaces put back afterwards."""
    module = sys.modules[type(family[1]).__module__]
    kept = {name: getattr(module, name) for name in ROTATIONS if hasattr(module, name)}
    yield module
    for name, function in kept.items():
        setattr(module, name, function)


def test_fused_kernels_are_as_near_as_eager_ones(family, reference, library):
    """train/fused.py keeps in float32 what eager code rounds in between: it may come nearer to fp32, not farther away."""
    eager, fused = (run(family, torch.bfloat16, "flex", rows=False, fused=flag) for flag in (False, True))
    far = [(made[0] - reference[0]).abs().mean() for made in (fused, eager)]
    assert far[0] < 1.2 * far[1] + 1e-3
    errors = [statistics.median(distances(made[1], reference[1])) for made in (fused, eager)]
    assert errors[0] < 1.2 * errors[1] + 1e-3


def very_negative(length: int, heads: int, kv_heads: int, device: torch.device) -> list[torch.Tensor]:
    """q, k and v, (1, heads, length, 128) bf16, of which every query and key have a scaled score of about -120."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, length, 128, generator=generator) for n in (heads, kv_heads, kv_heads))
    q, k = 0.1 * q, 0.1 * k
    q[..., 0], k[..., 0] = 1.0, -120.0 * 128**0.5
    return [x.to(device, torch.bfloat16).requires_grad_() for x in (q, k, v)]


def check_very_negative(kernel, plain, inputs: list[torch.Tensor]) -> None:
    """Finite gradients, and outputs and gradients of v as those of the plain one in fp32. (Those of q and k are small
    differences of large numbers.) A kernel that leaves a key unmasked computes exp(0 + 120) for it, which is inf."""
    found = []
    for function, values in ((kernel, inputs), (plain, [x.detach().float().requires_grad_() for x in inputs])):
        out = function(*values)
        out.float().mul(1.0 + torch.arange(out.shape[1], device=out.device)[:, None, None] % 3).sum().backward()
        assert all(x.grad.isfinite().all() for x in values)
        found.append((out.detach().float(), values[2].grad.float()))
    for got, want in zip(*found):
        assert (got - want).norm() < 2e-2 * want.norm()


def test_very_negative_scores_of_packed_groups():
    device, scaling = torch.device("cuda", 0), 128**-0.5
    groups = groups_of((1100, (300, 0, 40)), (1024, (5,)), (70, (3, 64)))
    layout, plain = (pack(groups, backend=name, device=device).layout for name in ("cudnn", "sdpa"))
    check_very_negative(
        lambda q, k, v: cudnn_packed(q, k, v, layout, scaling),
        lambda q, k, v: sdpa_packed(q, k, v, plain, scaling),
        very_negative(layout.length, 4, 2, device),
    )


@pytest.mark.parametrize("height,width", [(16, 28), (24, 42), (8, 8), (10, 14)])
def test_very_negative_scores_of_frames(height, width):
    device, frames = torch.device("cuda", 0), 9
    cu = torch.arange(frames + 1, device=device, dtype=torch.int32) * height * width
    runs = frame_runs(np.array([[frames, height, width]]), cu)

    def kernel(q, k, v):
        known = {"cu_seq_lens_q": cu, "max_length_q": height * width}
        return vision_attention_cudnn(None, q, k, v, None, scaling=128**-0.5, frame_runs=runs, **known)[0]

    def plain(q, k, v):
        each = [x[0].view(x.shape[1], frames, -1, 128).transpose(0, 1) for x in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*each).transpose(1, 2).reshape(1, -1, q.shape[1], 128)

    check_very_negative(kernel, plain, very_negative(frames * height * width, 2, 2, device))
