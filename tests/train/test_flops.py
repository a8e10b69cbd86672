"""FLOPs by hand, and by torch's own counter on the Hugging Face models."""

import json

import pytest

from train import flops

# Qwen3-VL-8B's published configuration: 36 layers of 4096, vision 27 layers of 1152, 3 DeepStack mergers.
QWEN3_VL_8B = {
    "model_type": "qwen3_vl",
    "tie_word_embeddings": False,
    "text_config": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 36,
        "vocab_size": 151936,
    },
    "vision_config": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA H20-3e", 148),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peak_of_the_right_device(name, tflops):
    assert flops.bf16_peak_flops(name) == tflops * 1e12


def test_unknown_devices_have_no_peak():
    assert flops.bf16_peak_flops("Some New Chip 9000") is None
    assert flops.bf16_peak_flops("") is None
    assert flops.utilisation(1e12, 1.0, 1, None) is None


def test_pairs_by_hand():
    # prompt 3: 1+2+3 = 6; response of 2: (3+1) + (3+2) = 9; response of 1: 3+1 = 4
    assert flops.attended_positions(3, [2, 1]) == 19
    assert flops.attended_positions(0, [5]) == 15


def test_parameters_of_8b_by_hand():
    shape = flops.read_shape(QWEN3_VL_8B)
    found = flops.parameters(shape)
    # layer: q 4096*4096, k and v 2*4096*1024, o 4096*4096, mlp 3*4096*12288 = 192,937,984; 36 of them
    assert found["language"] == 36 * 192_937_984 == 6_945_767_424
    assert found["embeddings"] == 2 * 151_936 * 4096 == 1_244_659_712
    # patch embedding 1536*1152; layer 4*1152^2 + 2*1152*4304 = 15,224,832; merger 4608*4608 + 4608*4096, four of them
    assert found["vision"] == 1_769_472 + 27 * 15_224_832 + 4 * 40_108_032 == 573_272_064
    assert found["total"] == 8_763_699_200  # published: 8.77 billion


def test_language_forward_of_8b_by_hand():
    shape = flops.read_shape(QWEN3_VL_8B)
    # P=3, R=[2, 1]: 6 tokens, 19 pairs, 3 logits
    by_hand = 2 * 6 * 6_945_767_424 + 4 * 4096 * 19 * 36 + 2 * 3 * 4096 * 151_936
    assert flops.language_forward(shape, 3, [2, 1]) == by_hand == 87_094_394_880
    # the prompt counts once: eight responses add eight times one response
    one = flops.language_forward(shape, 1000, [50]) - flops.language_forward(shape, 1000, [])
    eight = flops.language_forward(shape, 1000, [50] * 8) - flops.language_forward(shape, 1000, [])
    assert eight == 8 * one


def test_vision_forward_of_8b_by_hand():
    shape = flops.read_shape(QWEN3_VL_8B)
    # one video of 2 temporal slices of 4 x 6 patches: 48 patches, 12 merged tokens, 2 * 24^2 pairs per layer
    by_hand = 2 * 48 * (1_769_472 + 27 * 15_224_832) + 2 * 12 * 4 * 40_108_032 + 4 * 1152 * 27 * 2 * 24**2
    assert flops.vision_forward(shape, [(2, 4, 6)]) == by_hand
    assert flops.vision_forward(shape, []) == 0


def test_windows_by_hand():
    config = json.loads(json.dumps(QWEN3_VL_8B))
    config["model_type"] = "qwen2_5_vl"
    config["vision_config"] |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23]}
    shape = flops.read_shape(config)
    assert (shape.vision_window, shape.vision_full_layers, shape.vision_mergers) == (4, 3, 1)
    products = flops.patch_embed_parameters(shape) + 27 * flops.vision_layer_parameters(shape)
    # 1 x 20 x 12 patches = 10 x 6 merged: windows of 4, 4, 2 by 4, 2 -> (16+16+4) * (16+4) * 16 pairs in patches
    pairs = 3 * 240**2 + 24 * 36 * 20 * 16
    by_hand = 2 * 240 * products + 2 * 60 * flops.merger_parameters(shape) + 4 * 1152 * pairs
    assert flops.vision_forward(shape, [(1, 20, 12)]) == by_hand


def test_update_counts_the_tower_as_it_is_used():
    shape = flops.read_shape(QWEN3_VL_8B)
    language, vision = flops.language_forward(shape, 10, [4, 3]), flops.vision_forward(shape, [(1, 4, 4)])
    for tower, times in {"trained": 3, "frozen": 1, "cached": 0}.items():
        assert flops.group_flops(shape, 10, [4, 3], [(1, 4, 4)], tower=tower) == 3 * language + times * vision
    with pytest.raises(ValueError, match="trained, frozen, cached, got 'eager'"):
        flops.group_flops(shape, 1, [1], tower="eager")


def test_utilisation():
    assert flops.utilisation(989e12 * 3, seconds=4.0, n_devices=2, peak_flops=989e12) == pytest.approx(3 / 8)
    assert flops.utilisation(1.0, seconds=0.0, n_devices=2, peak_flops=989e12) is None


def test_other_families_are_refused():
    with pytest.raises(ValueError, match="no FLOPs model for model_type 'llama'"):
        flops.read_shape({"model_type": "llama"})


TEXT = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "head_dim": 16,
}


def tiny_model(family):
    import transformers as hf

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    ids = {"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303}
    text = {**TEXT, "rope_parameters": rope}
    vision = {
        "depth": 4,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_heads": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 96,
    }
    if family == "qwen2_vl":
        vision = {"depth": 4, "embed_dim": 48, "hidden_size": 96, "num_heads": 3, "mlp_ratio": 2, "patch_size": 14}
        return hf.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    if family == "qwen2_5_vl":
        return hf.Qwen2_5_VLConfig(
            text_config=text, vision_config={**vision, "window_size": 56, "fullatt_block_indexes": [1]}, **ids
        )
    vision |= {"patch_size": 16, "num_position_embeddings": 64}
    if family == "qwen3_vl":
        return hf.Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0, 2]}, **ids)
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    linear = {
        "layer_types": kinds,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    return hf.Qwen3_5Config(text_config={**text, **linear}, vision_config=vision, **ids)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_against_torchs_counter(family):
    """torch counts the products of the real modules; its attention is the full square, so ours is scaled to that."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForImageTextToText

    config = tiny_model(family)
    shape = flops.read_shape(config)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    counted = sum(p.numel() for p in model.parameters())
    assert flops.parameters(shape)["total"] == pytest.approx(counted, rel=0.05)  # biases, norms, positions: 1 to 5 %

    tokens = torch.arange(24).view(1, 24)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False)
    attention = 4 * 6 * 16 * 24 * 24 * shape.full_layers  # the full square
    ours = flops.language_forward(shape, 0, [24])
    ours += attention - 4 * 6 * 16 * flops.attended_positions(0, [24]) * shape.full_layers
    if family == "qwen3_5":  # its recurrence runs in padded chunks there: compare the linear layers instead
        linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
        counts = counter.get_flop_counts()
        counted = sum(sum(counts[key].values()) for key in counts if key.split(".", 1)[-1] in linear)
        convolution = 2 * 24 * 2 * (2 * 2 * 8 + 4 * 12) * 4  # two layers: keys twice and values, kernel of 4
        recurrence = 6 * 24 * 2 * 4 * 8 * 12
        assert ours - attention - convolution - recurrence == counted > 0
    else:
        assert ours == counter.get_total_flops()

    grid = torch.tensor([[2, 4, 6], [1, 10, 6]])
    patches = torch.randn(2 * 24 + 60, 3 * 2 * shape.patch**2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.visual(patches, grid_thw=grid)
    assert flops.vision_forward(shape, grid.tolist()) == pytest.approx(counter.get_total_flops(), rel=0.01)
