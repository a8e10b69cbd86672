"""The packed group forward against the model's own forward over one row per response: same numbers, same gradients."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AutoModelForImageTextToText

from data.normalise import normalise, read_normalisation
from data.records import Group, Response
from tests.tiny_models import tiny_model
from tests.train.packed_cases import PromptMaker, float64_throughout, plain_row
from train import group_attention, policy
from train.batching import dummy_group
from train.group_attention import (
    choose_attention,
    group_mask,
    pack,
    sdpa_packed,
    why_missing,
)
from train.linear_attention import responses_as_rows, rows_as_responses
from train.packed_model import PackedModel
from train.policy import buffers_to, checkpoint_activations
from train.token_logprobs import chunked_logprobs
from train.vision import VISION_VARLEN, patch_embedding_as_matmul

CPU = torch.device("cpu")
PACKS = {
    "video": [("video", [5, 9, 3], 1)],
    "image": [("image", [4, 7], 2)],
    "text": [("text", [6, 1, 3], 3)],
    "mixed": [
        ("video", [5, 9, 3], 1),
        ("text", [4, 6], 2),
        ("both", [7, 2, 4], 3),
        ("image", [3], 4),
        ("video", [2], 6),
    ],
}


@pytest.fixture(scope="module")
def models():
    """family -> (folder, prompts); models are loaded per test because gradients and patches stay on them."""
    made = {}

    def get(family: str, dtype: torch.dtype, *, tied: bool = False):
        folder = tiny_model(family, tied=tied)
        plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        if family not in made:
            made[family] = PromptMaker(folder, plain.config)
        packed = PackedModel(
            copy.deepcopy(plain), normalisation=read_normalisation(folder), banned_ids=(440, 441), logit_chunk=7
        )
        return plain.train(), packed.train(), made[family]

    return get


def compare(
    plain, packed_model, cases, *, temperature: float = 0.8, checkpointing: bool = False, backend: str = "sdpa"
):
    """-> (relative error of log-probs, of entropies, {parameter: relative error of its gradient})."""
    if checkpointing:
        packed_model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    banned = packed_model.banned_array
    rows = [
        plain_row(plain, group.prompt, floats, response.token_ids, banned, temperature)
        for group, floats in cases
        for response in group.responses
    ]
    want, want_entropy = torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
    random = torch.Generator().manual_seed(3)
    weights = torch.randn(2, len(want), generator=random, dtype=torch.float64).to(want.dtype)
    (want * weights[0] + want_entropy * weights[1]).sum().backward()
    packed = pack([group for group, _ in cases], backend=backend, device=CPU, banned_ids=banned)
    got, got_entropy = packed_model(packed, temperature=temperature, entropy=True)
    (got * weights[0] + got_entropy * weights[1]).sum().backward()

    def error(a, b):
        return ((a - b).norm() / b.norm()).item()

    gradients = dict(packed_model.hf.named_parameters())
    assert set(gradients) == {name for name, _ in plain.named_parameters()}
    errors = {}
    for name, parameter in plain.named_parameters():
        if parameter.grad is None or not parameter.grad.any():  # the tower, in a pack of text
            assert "visual" in name and not gradients[name].grad.any(), name
            continue
        errors[name] = error(gradients[name].grad, parameter.grad)
    return error(got, want), error(got_entropy, want_entropy), errors


@pytest.mark.parametrize("pack_name", PACKS)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_logprobs_and_gradients_equal_one_row_per_response(models, family, pack_name):
    plain, packed, maker = models(family, torch.float32)
    logprobs, entropy, gradients = compare(plain, packed, [maker.group(*case) for case in PACKS[pack_name]])
    assert logprobs <= 1e-5 and entropy <= 1e-5
    assert max(gradients.values()) <= 1e-5, max(gradients, key=gradients.get)
    assert len(gradients) > 20


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_the_same_in_float64(models, family):
    with float64_throughout():
        plain, packed, maker = models(family, torch.float64)
        logprobs, entropy, gradients = compare(plain, packed, [maker.group(*case) for case in PACKS["mixed"]])
    assert logprobs <= 1e-10 and entropy <= 1e-10
    assert max(gradients.values()) <= 1e-10, max(gradients, key=gradients.get)
    assert any("visual" in name for name in gradients) and any("lm_head" in name for name in gradients)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_the_same_with_the_padding_of_flex(models, family, monkeypatch):
    """CUDA's packs end with tokens of no group, for FlexAttention, which has no backward pass on a CPU: SDPA stands in."""

    def padded(q, k, v, layout, scaling):
        real = sdpa_packed(q, k, v, layout, scaling)
        return torch.nn.functional.pad(real, (0, 0, 0, 0, 0, layout.length - real.shape[1]))

    monkeypatch.setitem(group_attention._KERNELS, "flex", padded)
    with float64_throughout():
        plain, packed, maker = models(family, torch.float64)
        cases = [maker.group(*case) for case in PACKS["mixed"]]
        real = pack([group for group, _ in cases], backend="sdpa", device=CPU).layout.length
        assert pack([group for group, _ in cases], backend="flex", device=CPU).layout.length > real
        logprobs, entropy, gradients = compare(plain, packed, cases, backend="flex")
    assert logprobs <= 1e-10 and entropy <= 1e-10
    assert max(gradients.values()) <= 1e-10, max(gradients, key=gradients.get)


def test_tied_embeddings_and_checkpointing(models):
    plain, packed, maker = models("qwen3_vl", torch.float32, tied=True)
    assert not any("lm_head" in name for name, _ in plain.named_parameters())
    logprobs, entropy, gradients = compare(
        plain, packed, [maker.group(*case) for case in PACKS["mixed"]], checkpointing=True
    )
    assert logprobs <= 1e-5 and entropy <= 1e-5
    assert max(gradients.values()) <= 1e-5, max(gradients, key=gradients.get)


def test_linear_attention_state_is_forked_not_recomputed(models):
    """Ten responses: the tower runs once, and a linear-attention layer reads each prompt token once."""
    plain, packed, maker = models("qwen3_5", torch.float32)
    towers, tokens = [], []
    packed.hf.model.visual.register_forward_hook(lambda *_: towers.append(1))
    first = packed.hf.model.language_model.layers[0].linear_attn.in_proj_qkv
    first.register_forward_hook(lambda module, inputs, output: tokens.append(inputs[0].shape[1]))
    cases = [maker.group(*case) for case in PACKS["mixed"]]
    logprobs, entropy, _ = compare(plain, packed, cases)
    assert logprobs <= 1e-5 and entropy <= 1e-5
    assert len(towers) == 1
    assert tokens == [sum(len(g.prompt.input_ids) + sum(len(r.token_ids) for r in g.responses) for g, _ in cases)]


def test_responses_as_rows_and_back_by_hand():
    """Three responses of 2, 0 and 3 tokens, two values each. Padding sends nothing back."""
    values = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8], [9, 10]], requires_grad=True)
    rows = responses_as_rows(values, [2, 0, 3])
    assert rows.tolist() == [[[1, 2], [3, 4], [0, 0]], [[0, 0]] * 3, [[5, 6], [7, 8], [9, 10]]]
    assert rows_as_responses(rows, [2, 0, 3]).tolist() == values.tolist()
    (rows * torch.arange(18.0).view(3, 3, 2)).sum().backward()  # 4, 5 and the second row's 6 to 11 are lost
    assert values.grad.tolist() == [[0, 1], [2, 3], [12, 13], [14, 15], [16, 17]]
    scalars = torch.tensor([[1.0], [2.0], [3.0]])
    assert responses_as_rows(scalars[:, 0], [1, 2]).tolist() == [[1, 0], [2, 3]]


def test_the_kernel_of_a_package_is_for_16_bits(models, monkeypatch):
    """As transformers puts flash-linear-attention's function in the place of its own: float32 stays with torch's."""
    asked, source = [], sys.modules[type(models("qwen3_5", torch.float32)[1].hf).__module__]
    own = inspect.unwrap(source.torch_chunk_gated_delta_rule)

    @functools.wraps(own)
    def package(query, key, value, **settings):
        assert query.dtype == key.dtype == value.dtype != torch.float32 and settings["g"].dtype == torch.float32
        state = settings["initial_state"]
        asked.append(None if state is None else (state.dtype, len(state) == len(query)))
        return own(query, key, value, **settings)

    monkeypatch.setattr(source, "torch_chunk_gated_delta_rule", package)
    for dtype in (torch.float32, torch.bfloat16):
        _, packed, maker = models("qwen3_5", dtype)
        packed(pack([maker.group("video", [5, 2], 1)[0]], backend="sdpa", device=CPU))
    assert (
        asked == [None, (torch.float32, True)] * 3
    )  # three layers in bf16: the prompt, then its responses from its state


@pytest.mark.parametrize("kept", [0, 2])
def test_linear_attention_recomputed_and_kept(models, kept):
    """Under checkpointing each layer's recomputation forks the same state again."""
    with float64_throughout():
        plain, packed, maker = models("qwen3_5", torch.float64)
        checkpoint_activations(packed.hf, kept, 1)
        logprobs, entropy, gradients = compare(plain, packed, [maker.group(*case) for case in PACKS["mixed"]])
    assert logprobs <= 1e-10 and entropy <= 1e-10
    assert max(gradients.values()) <= 1e-10, max(gradients, key=gradients.get)


def test_linear_attention_after_a_prompt_shorter_than_its_convolution(models):
    with float64_throughout():
        plain, packed, maker = models("qwen3_5", torch.float64)
        group, floats = maker.group("text", [5, 0, 70, 1], 3)  # 70: more than one chunk of the rule
        short = 2
        group.prompt.input_ids, group.prompt.mm_type_ids = (
            group.prompt.input_ids[:short],
            np.zeros(short, dtype=np.uint8),
        )
        group.prompt.position_ids = np.broadcast_to(np.arange(short), (3, short)).copy()
        floats["input_ids"], floats["mm_token_type_ids"] = (
            floats[name][:, :short] for name in ("input_ids", "mm_token_type_ids")
        )
        rows = [r for r in group.responses if r.token_ids]
        want = torch.cat([plain_row(plain, group.prompt, floats, r.token_ids, packed.banned_array)[0] for r in rows])
        got, _ = packed(pack([group], backend="sdpa", device=CPU))
    assert torch.allclose(got, want, atol=1e-11)


def test_another_response_or_group_changes_nothing(models):
    """What a token sees: not the other responses of its group, and not the other groups of its pack."""
    _, packed, maker = models("qwen3_vl", torch.float32)
    group, _ = maker.group("video", [6, 4], 1)
    other, _ = maker.group("image", [5], 2)
    alone, _ = packed(pack([Group(group.prompt, group.responses[:1])], backend="sdpa", device=CPU))
    changed = Group(group.prompt, [group.responses[0], Response([7] * 9, [], "stop")])
    together, _ = packed(pack([other, changed], backend="sdpa", device=CPU))
    assert torch.allclose(together[5:11], alone, atol=1e-5, rtol=0)
    # ... and one earlier token of the same response does change it.
    tokens = group.responses[0].token_ids
    altered = Group(group.prompt, [Response([(tokens[0] + 1) % 400, *tokens[1:]], [], "stop")])
    moved, _ = packed(pack([altered], backend="sdpa", device=CPU))
    assert (moved[1:] - alone[1:]).abs().max() > 1e-3


def test_to_rows_and_group_mask_by_hand():
    group = dummy_group()
    group.responses = [Response([5, 6, 7], [], "stop"), Response([8], [], "stop")]
    packed = pack([group, dummy_group()], backend="sdpa", device=CPU)
    # [p0 p1 | 5 6 7 8 0]: prompts first
    assert packed.input_ids.tolist() == [0, 0, 5, 6, 7, 8, 0]
    assert packed.predictors.tolist() == [0, 2, 3, 0, 1]
    assert packed.position_ids[0].tolist() == [0, 0, 1, 2, 3, 1, 1]
    assert packed.to_rows(torch.tensor([1.0, 2, 3, 4, 5])).tolist() == [[1, 2, 3], [4, 0, 0], [5, 0, 0]]
    assert group_mask(packed.layout.spans[0], CPU).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 0, 0, 0, 1],
    ]


def test_empty_response_and_wrong_ids(models):
    _, packed, maker = models("qwen3_vl", torch.float32)
    group, _ = maker.group("text", [3, 2], 1)
    with_empty = Group(group.prompt, [group.responses[0], Response([], [], "stop"), group.responses[1]])
    pack_of_three = pack([with_empty], backend="sdpa", device=CPU)
    rows = pack_of_three.to_rows(packed(pack_of_three)[0])
    two = pack([group], backend="sdpa", device=CPU)
    expected = two.to_rows(packed(two)[0])
    assert torch.allclose(rows[[0, 2]], expected, atol=1e-6) and not rows[1].any()
    group.responses[1].token_ids[0] = 441
    with pytest.raises(ValueError, match=r"'text1' holds token ids \[441\]"):
        pack([group], backend="sdpa", device=CPU, banned_ids=np.array([440, 441]))


def test_normalisation_is_bit_equal_to_the_processors(models):
    for family in ("qwen2_vl", "qwen3_vl"):
        folder = tiny_model(family)
        _, _, maker = models(family, torch.float32)
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            prompt, floats = maker.make(kind, 5)
            ours = normalise(torch.from_numpy(prompt.patches), *read_normalisation(folder))
            assert torch.equal(ours, floats[name].reshape(ours.shape))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_patch_embedding_equals_the_convolution(models, family):
    plain, _, maker = models(family, torch.float64)
    _, floats = maker.make("video", 1)
    embed = plain.model.visual.patch_embed
    pixels = floats["pixel_values_videos"].double()
    want = embed(pixels)
    patch_embedding_as_matmul(plain.model.visual)
    got = embed(pixels)
    assert got.shape == want.shape
    assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_vision_varlen_is_given_every_frame_at_once(models, family, monkeypatch):
    """The CUDA path of the tower with its kernel written out: one call per block, the same features and gradients."""
    plain, packed, maker = models(family, torch.float32)
    calls = []

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k):
        calls.append(len(cu_q) - 1)
        assert cu_q.dtype == torch.int32 and max_q == max(cu_q.diff()) and isinstance(max_q, int)
        parts = []
        for a, b in pairwise(cu_q):
            scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * q.shape[-1] ** -0.5
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[a:b]))
        return torch.cat(parts)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    settings = {"normalisation": packed.normalisation, "banned_ids": (440, 441)}
    varlen = PackedModel(plain, **settings, vision_attention=VISION_VARLEN)
    group, _ = maker.group("both", [5, 3], 3)
    results = []
    for model in (packed, varlen):
        logprobs, _ = model(pack([group], backend="sdpa", device=CPU))
        (logprobs * torch.arange(8)).sum().backward()
        results.append((logprobs.detach(), model.hf.model.visual.patch_embed.proj.weight.grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert (results[0][1] - results[1][1]).norm() <= 1e-4 * results[0][1].norm()
    assert len(calls) == len(plain.model.visual.blocks) and max(calls) >= 4  # an image and at least 3 temporal patches


def test_text_pack_calls_the_tower_with_weight_zero(models):
    _, packed, maker = models("qwen3_vl", torch.float32)
    calls = []
    packed.hf.model.visual.register_forward_hook(lambda *_: calls.append(1))
    group, _ = maker.group("text", [3], 1)
    logprobs, _ = packed(pack([group], backend="sdpa", device=CPU))
    logprobs.sum().backward()
    assert len(calls) == 1
    towers = [parameter.grad for name, parameter in packed.hf.named_parameters() if "visual" in name]
    assert towers and all(grad is not None and not grad.any() for grad in towers)


def test_chunked_logprobs_against_distributions():
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(13, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 9, (11,))
    banned = torch.tensor([10, 12])

    def ours(h, w, b):
        return chunked_logprobs(h, w, b, targets, temperature=0.7, banned=banned, entropy=True, chunk=4)

    got, got_entropy = ours(hidden, weight, bias)
    logits = (hidden @ weight.T + bias) / 0.7
    allowed = torch.distributions.Categorical(logits=logits[:, [*range(10), 11]])
    assert torch.allclose(got, allowed.log_prob(targets)) and torch.allclose(got_entropy, allowed.entropy())
    for outputs in (slice(0, 2), slice(0, 1), slice(1, 2)):  # both in the loss, or only one of them
        assert torch.autograd.gradcheck(lambda *inputs: ours(*inputs)[outputs], (hidden, weight, bias))  # noqa: B023


def test_bf16_logprobs_are_float32_and_near(models):
    plain, packed, maker = models("qwen3_vl", torch.bfloat16)
    group, floats = maker.group("video", [8, 5], 1)
    got, entropy = packed(pack([group], backend="sdpa", device=CPU), entropy=True)
    assert got.dtype == entropy.dtype == torch.float32
    rows = [plain_row(plain, group.prompt, floats, r.token_ids, packed.banned_array) for r in group.responses]
    want = torch.cat([logprobs for logprobs, _ in rows])
    assert (got - want).abs().max() < 0.05


def test_mismatched_grid_is_named(models):
    _, packed, maker = models("qwen3_vl", torch.float32)
    group, _ = maker.group("image", [3], 1)
    group.prompt.mm_type_ids[np.flatnonzero(group.prompt.mm_type_ids)[-1]] = 0
    with pytest.raises(ValueError, match="visual features for"):
        packed(pack([group], backend="sdpa", device=CPU))


def test_auto_takes_cudnn_on_hopper_in_16_bits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    chosen = {}
    for capability in ((8, 0), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        chosen[capability] = [
            choose_attention("auto", torch.device("cuda"), dtype)
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
        ]
    assert chosen == {(8, 0): ["flex"] * 3, (9, 0): ["cudnn", "cudnn", "flex"], (10, 0): ["flex"] * 3}
    for head_dim, backend in ((64, "cudnn"), (128, "cudnn"), (256, "flex")):  # 256: Qwen3.5
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert choose_attention("auto", torch.device("cuda"), torch.bfloat16, head_dim=head_dim) == backend
    with monkeypatch.context() as rocm:  # an MI300: cuDNN's name and Hopper's number, and neither
        rocm.setattr(torch.version, "hip", "7.1")
        rocm.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
        assert choose_attention("auto", torch.device("cuda"), torch.bfloat16) == "flex"
        with pytest.raises(ValueError, match="this torch has no cuDNN"):
            choose_attention("cudnn", torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert choose_attention("auto", torch.device("cuda"), torch.bfloat16) == "flex"
    with pytest.raises(ValueError, match="this torch has no cuDNN; use --attention flex"):
        choose_attention("cudnn", torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("family,head_dim", [("qwen2_vl", 32), ("qwen3_vl", 32), ("qwen3_5", 64)])
def test_the_heads_of_the_folder_decide(monkeypatch, family, head_dim):
    monkeypatch.setattr(policy, "choose_attention", lambda *arguments, head_dim: (*arguments, head_dim))
    args = SimpleNamespace(attention="auto")
    found = policy._attention(tiny_model(family), args, CPU, torch.float32)
    assert found == ("auto", CPU, torch.float32, head_dim)


def test_backends_that_cannot_run_are_refused():
    assert choose_attention("auto", CPU, torch.float32) == "sdpa"
    assert choose_attention("auto", torch.device("cuda"), torch.bfloat16) == "flex"
    for name in ("varlen", "cudnn"):
        with pytest.raises(ValueError, match=f"{name} needs CUDA"):
            choose_attention(name, CPU, torch.bfloat16)
    with pytest.raises(ValueError, match="flex has no backward pass on a CPU; use --attention sdpa"):
        choose_attention("flex", CPU, torch.float32)
    with pytest.raises(ValueError, match=r"no torch\.float32 kernel"):
        choose_attention("varlen", torch.device("cuda"), torch.float32)
    for name, package in (("flash2", "flash-attn"), ("flash4", "flash-attn-4")):
        with pytest.raises(
            ValueError, match=rf"needs the package {package} \(.*flash_attn.*\); use --attention flex or varlen"
        ):
            choose_attention(name, torch.device("cuda"), torch.bfloat16)
    with pytest.raises(ValueError, match="'xformers' is not one of"):
        choose_attention("xformers", CPU, torch.float32)


def test_a_package_that_lacks_one_of_its_own_is_told_from_one_that_is_not_there(tmp_path, monkeypatch):
    inner = tmp_path / "half_installed" / "kernels"
    inner.mkdir(parents=True)
    (inner / "__init__.py").write_text("import a_compiler_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert why_missing("half_installed.kernels.interface") == "No module named 'a_compiler_nobody_has'"
    assert "nowhere_at_all" in why_missing("nowhere_at_all.interface")
    assert why_missing("json.decoder") is None


def test_buffers_go_where_the_model_runs_and_parameters_stay():
    """Under ZeRO-3 nobody else moves them: the ids that are never sampled would stay on the host."""
    inner = torch.nn.Linear(3, 5)
    inner.register_buffer("banned", torch.tensor([4, 2]), persistent=False)
    inner.register_buffer("nothing", None)
    outer = torch.nn.Sequential(inner, torch.nn.BatchNorm1d(5))
    buffers_to(outer, torch.device("meta"))
    assert {name: buffer.device.type for name, buffer in outer.named_buffers()} == {
        "0.banned": "meta", "1.running_mean": "meta", "1.running_var": "meta", "1.num_batches_tracked": "meta",
    }  # fmt: skip
    assert {parameter.device.type for parameter in outer.parameters()} == {"cpu"}
    assert inner.banned.shape == (2,) and inner.banned.dtype == torch.int64 and inner.nothing is None


def count_calls(modules) -> list[int]:
    """A list whose one element is how often the modules' forwards have run since."""
    calls = [0]

    def count(*_) -> None:
        calls[0] += 1

    for module in modules:
        module.register_forward_pre_hook(count)
    return calls


def test_kept_layers_are_not_computed_again(models):
    """A layer's products run twice where they are recomputed and once where activations are kept. The gradient is that of
    plain checkpointing, bit for bit."""
    gradients = []
    for kept, kept_vision in ((0, 0), (1, 2)):
        _, packed, maker = models("qwen3_vl", torch.float32)
        checkpoint_activations(packed.hf, kept, kept_vision)
        layers, blocks = packed.hf.model.language_model.layers, packed.hf.model.visual.blocks
        decoder = count_calls(layer.self_attn.q_proj for layer in layers)
        tower = count_calls(block.attn.qkv for block in blocks)
        logprobs, _ = packed(pack([maker.group("video", [4, 9], 1)[0]], backend="sdpa", device=CPU))
        (logprobs * torch.arange(1, len(logprobs) + 1)).sum().backward()
        assert (decoder, tower) == ([2 * len(layers) - kept], [2 * len(blocks) - kept_vision])
        gradients.append({name: parameter.grad for name, parameter in packed.hf.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def without_waiting(packed, maker, cases) -> None:
    """Forward and backward on the meta device, where there is no value that a host could ask for: it raises if one is."""
    meta = torch.device("meta")
    buffers_to(packed.to(meta), meta)
    groups = [maker.group(*case)[0] for case in cases]
    logprobs, entropy = packed(pack(groups, backend="sdpa", device=meta), temperature=0.8, entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == (sum(len(response.token_ids) for group in groups for response in group.responses),)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_the_host_waits_for_no_value_of_the_device(models, family, monkeypatch):
    """In no layer of tower and decoder, as CUDA runs them: frames of all clips in one call. The library does, in DeepStack."""

    def one_call(module, query, key, value, attention_mask, scaling=None, **kwargs):
        assert type(kwargs["max_length_q"]) is int
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, VISION_VARLEN, one_call)
    _, packed, maker = models(family, torch.bfloat16)
    packed.hf.model.visual.config._attn_implementation = VISION_VARLEN
    checkpoint_activations(packed.hf, kept_layers=1)
    for cases in PACKS.values():
        without_waiting(packed, maker, cases)
    if family == "qwen3_vl":  # what is asked for is noticed: the library looks for the places in a mask
        hidden, features = torch.zeros(1, 6, 4, device="meta"), torch.zeros(3, 4, device="meta")
        mask = torch.zeros(1, 6, dtype=torch.bool, device="meta")
        with pytest.raises(NotImplementedError, match="nonzero"):
            type(packed.hf.model.language_model)._deepstack_process(None, hidden, mask, features)
