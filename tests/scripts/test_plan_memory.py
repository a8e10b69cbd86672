"""Token and memory arithmetic by hand, on the published Qwen3-VL-8B."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from scripts import plan_memory
from tests.tiny_models import tiny_model
from train import memory
from train.flops import parameters, read_shape
from train.optimizer import OPTIMIZERS, build_optimizer

ROOT = Path(__file__).resolve().parents[2]
GIB = 1024**3
SHAPE = read_shape(plan_memory.SIZES["8b"])


def arguments(*words):
    return plan_memory.flags().parse_args(["--size", "8b", *words])


def test_published_sizes():
    billions = {name: parameters(read_shape(config))["total"] / 1e9 for name, config in plan_memory.SIZES.items()}
    assert billions == {
        "2b": pytest.approx(2.13, abs=0.01),
        "4b": pytest.approx(4.44, abs=0.01),
        "8b": pytest.approx(8.76, abs=0.01),
    }


def test_tokens_by_hand():
    # 128 frames of 672x384: 64 temporal patches of 42 x 24 patches; a quarter of them tokens, 9 per timestamp
    assert plan_memory.video_tokens(SHAPE, 128, 384, 672) == (64 * 42 * 24 // 4 + 64 * 9, 64 * 42 * 24)
    assert plan_memory.video_tokens(SHAPE, 3, 32, 64) == (2 * 2 + 18, 2 * 8)  # an odd frame fills its pair


def test_keys_and_values_by_hand():
    assert plan_memory.kv_bytes_per_token(SHAPE) == 2 * 36 * 8 * 128 * 2 == 147_456


def test_states_by_hand():
    n = 8_763_699_200
    states = plan_memory.state_bytes(SHAPE, 8, optimizer_on_host=False, parameters_on_host=False)
    assert states["weights (bf16 shard)"] == n * 2 / 8
    assert states["optimiser (fp32 master, two moments)"] == n * 12 / 8
    # two language layers of 192,937,984 and the embedding of 151,936 x 4,096, in bf16
    assert states["gathered layers and embedding"] == 2 * (2 * 192_937_984 + 151_936 * 4096)
    # DeepSpeed's gradient buffer has grad_accum_dtype, fp32; one prefetch and one reduction bucket of 100 M bf16 elements
    assert states["gradients (fp32 shard)"] == n * 4 / 8
    assert states["buckets of gathers and reductions"] == 400_000_000
    assert plan_memory.step_bytes(SHAPE, 16, False) == n / 4  # a sixteenth of the parameters, 4 bytes each
    assert plan_memory.step_bytes(SHAPE, 2, False) == 4e9  # at most a sub-group of 1e9
    away = plan_memory.state_bytes(SHAPE, 8, optimizer_on_host=True, parameters_on_host=True)
    assert away["weights (bf16 shard)"] == away["optimiser (fp32 master, two moments)"] == 0
    assert away["gradients (fp32 shard)"] == plan_memory.step_bytes(SHAPE, 8, True) == 0


def test_optimisers_by_hand():
    """8B on 8 GPUs. 12 bytes per parameter: fp32 master weights and moments; 10: moments and bf16 residues; 8: moments."""
    n = 8_763_699_200
    for name, own, per_element in (("adamw", 12, 4), ("adamw_kahan", 10, 6), ("adamw_stochastic", 8, 6)):
        plan = plan_memory.make_plan(SHAPE, arguments("--optimizer", name), 128)
        sizes = {line: size for line, size in plan.update.items() if line.startswith("optimiser")}
        assert list(sizes.values()) == [n * own / 8] and sizes.items() <= plan.rollout.items()
        assert plan.update["gradients (fp32 shard)"] == n * 4 / 8 and plan.update["weights (bf16 shard)"] == n * 2 / 8
        assert plan.update[plan_memory.STEP] == 1e9 * per_element
        parked = plan_memory.make_plan(SHAPE, arguments("--optimizer", name, "--park"), 128)
        assert sum(plan.rollout.values()) - sum(parked.rollout.values()) == n * own / 8
        away = plan_memory.make_plan(SHAPE, arguments("--optimizer", name, "--offload_optimizer"), 128)
        assert away.update[next(iter(sizes))] == away.update[plan_memory.STEP] == 0
        # gradients summed in bf16: half the buffer; adamw's fp32 masters want them copied once more, the bf16 ones do not
        short = plan_memory.make_plan(SHAPE, arguments("--optimizer", name, "--grad_accum_dtype", "bf16"), 128)
        assert short.update["gradients (bf16 shard)"] == n * 2 / 8 and "gradients (fp32 shard)" not in short.update
        assert short.rollout["gradients (bf16 shard)"] == n * 2 / 8
        assert short.update[plan_memory.STEP] == 1e9 * (6 if name == "adamw" else 2)
        assert plan.peak_bytes - short.peak_bytes == n * 2 / 8
        away = plan_memory.make_plan(
            SHAPE, arguments("--optimizer", name, "--grad_accum_dtype", "bf16", "--offload_optimizer"), 128
        )
        assert away.update["gradients (bf16 shard)"] == away.update[plan_memory.STEP] == 0
    plain, least = (
        plan_memory.make_plan(SHAPE, arguments("--optimizer", name), 128).peak_bytes
        for name in ("adamw", "adamw_stochastic")
    )
    assert plain - least == n * 4 / 8  # the activations of the update are its peak, with both


def test_real_optimisers_hold_what_is_counted():
    """One update of a tiny Qwen3-VL: the states' own bytes, and the fp32 master weights that adamw works on."""
    args = Namespace(learning_rate=1e-4, weight_decay=0.1, adam_betas=(0.9, 0.999), adam_eps=1e-8)
    for name, counted in memory.OPTIMIZER_BYTES.items():
        master = torch.float32 if name == "adamw" else torch.bfloat16
        model = AutoModelForImageTextToText.from_pretrained(tiny_model("qwen3_vl"), dtype=master)
        optimizer = build_optimizer(model.named_parameters(), Namespace(**vars(args), optimizer=name))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        count = sum(parameter.numel() for parameter in model.parameters())
        tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        held = sum(value.nbytes for value in tensors if value.numel() > 1)
        assert count > 100_000 and held + (count * 4 if name == "adamw" else 0) == counted * count
    assert plan_memory.OPTIMISER.keys() == memory.OPTIMIZER_BYTES.keys() == OPTIMIZERS.keys()


def test_plan_by_hand():
    plan = plan_memory.make_plan(SHAPE, arguments("--text_tokens", "150"), 128)
    assert plan.frame == (384, 672)
    assert plan.prompt_tokens == 16_128 + 576 + 150
    assert plan.group_tokens == 16_854 + 8 * 2048
    assert plan.update["layer inputs"] == 33_238 * 4096 * 36 * 2
    assert plan.update["vision layer inputs"] == 64_512 * 1152 * 27 * 2
    # log-probs, probabilities and gradient in fp32, the gradient in bf16; the weight's gradient in fp32 and a chunk's in bf16
    assert plan.update["logits chunk, output layer"] == 1024 * 151_936 * 14 + 151_936 * 4096 * 6
    # four prompts once, 32 responses of 2,048
    assert plan.rollout["KV cache of the whole step"] == (4 * 16_854 + 32 * 2048) * 147_456
    assert plan.rollout["gradients (fp32 shard)"] == 8_763_699_200 * 4 / 8  # there while vLLM samples, too
    insides = (
        "one language layer",
        "logits chunk, output layer",
        "one vision layer",
        "gradients copied in the optimiser's step",
    )
    kept = sum(value for name, value in plan.update.items() if name not in insides)
    assert plan.peak_bytes == max(kept + plan.update["one language layer"], sum(plan.rollout.values()))
    parked = plan_memory.make_plan(SHAPE, arguments("--park"), 128)
    assert sum(plan.rollout.values()) - sum(parked.rollout.values()) == 8_763_699_200 * 12 / 8


def test_the_step_can_be_the_peak():
    """Short prompts on one GPU: the step's copies are more than all activations. The output layer's gradients in fp64, for the
    norm, are more than the 4 or 2 GB of a sub-group; 6 GB, in two dtypes, are more than those."""
    norm = 151_936 * 4096 * 8
    for optimizer, summed, per_parameter, copied in (
        ("adamw", "fp32", 18, norm),
        ("adamw", "bf16", 16, 6e9),
        ("adamw_stochastic", "fp32", 14, 6e9),
        ("adamw_stochastic", "bf16", 12, norm),
    ):
        few = ["--gpus", "1", "--group_size", "2", "--max_response_tokens", "16", "--total_pixels", "1"]
        args = arguments(*few, "--optimizer", optimizer, "--grad_accum_dtype", summed)
        plan = plan_memory.make_plan(SHAPE, args, 4)
        states = sum(value for name, value in plan.update.items() if name in plan_memory.STATES)
        assert states == 8_763_699_200 * per_parameter + 400_000_000  # buckets; on one GPU the shards are the weights
        assert plan.update[plan_memory.STEP] == copied and norm == 4_978_638_848
        assert plan.peak_bytes == max(states + copied, sum(plan.rollout.values()))


def test_8b_trains_on_one_gpu_with_12_bytes_per_parameter():
    """8.76e9 x 12 bytes are 97.9 GiB, and nine tenths of 139 GiB 125.1; with 14 they are 114.3."""
    flags = ["--gpus", "1", "--optimizer", "adamw_stochastic", "--park"]
    assert plan_memory.most_frames(SHAPE, arguments(*flags, "--grad_accum_dtype", "bf16")) >= 128
    assert ": fits" in plan_memory.describe(SHAPE, arguments(*flags, "--grad_accum_dtype", "bf16"))
    assert "does NOT fit" in plan_memory.describe(SHAPE, arguments(*flags))


def test_what_to_do_when_nothing_fits():
    for words, told in (
        ([], "more GPUs, --optimizer adamw_stochastic, --grad_accum_dtype bf16, --offload_optimizer,"),
        (["--optimizer", "adamw_stochastic"], "more GPUs, --grad_accum_dtype bf16, --offload_optimizer,"),
        (["--grad_accum_dtype", "bf16"], "more GPUs, --optimizer adamw_stochastic, --offload_optimizer,"),
        (
            ["--offload_optimizer"],
            "more GPUs, --optimizer adamw_stochastic, --offload_optimizer,",
        ),  # gradients are there, too
    ):
        text = plan_memory.describe(SHAPE, arguments("--gpus", "1", "--gpu_memory_gib", "40", *words))
        assert f"no number of frames fits: {told} or a smaller model" in text


def test_cut_sequences_and_a_second_copy():
    whole = plan_memory.make_plan(SHAPE, arguments(), 128).update
    cut = plan_memory.make_plan(SHAPE, arguments("--sequence_parallel", "4", "--hpz_partition_size", "8"), 128).update
    assert cut["layer inputs"] == 8310 * 4096 * 36 * 2  # a quarter of 33,238, rounded up
    assert cut["vision layer inputs"] == whole["vision layer inputs"] / 4
    assert cut["vision features"] == whole["vision features"]  # all of them on every rank
    assert cut["second copy of the weights (hpZ)"] == 8_763_699_200 * 2 / 8
    assert "second copy of the weights (hpZ)" not in whole


def test_what_fits():
    fixed = ["--total_pixels", "1000000000"]  # frames keep their size
    args = arguments("--gpus", "4", "--gpu_memory_gib", "100", *fixed)
    most = plan_memory.most_frames(SHAPE, args)
    assert 128 < most < 2048 and most % 2 == 0
    room = 0.9 * 100 * GIB
    assert plan_memory.make_plan(SHAPE, args, most).peak_bytes <= room
    assert plan_memory.make_plan(SHAPE, args, most + 2).peak_bytes > room
    assert plan_memory.most_frames(SHAPE, arguments("--gpus", "1", "--gpu_memory_gib", "80")) == 0


def test_kept_layers_by_hand():
    """8B: hidden 4,096, queries 4,096, keys 1,024, gated product 12,288; the tower 1,152 and 4,304."""
    fused = 2 * (3 * 4096 + 3 * 4096 + 3 * 1024 + 3 * 12_288)
    eager = 2 * (2 * 4096 + 2 * 4096 + 2 * 1024 + 4 * 12_288) + 6 * (2 * 4096 + 4096 + 1024)
    assert memory.kept_bytes_per_token(SHAPE, True) == fused == 129_024
    assert memory.kept_bytes_per_token(SHAPE, False) == eager == 215_040
    plain = plan_memory.make_plan(SHAPE, arguments(), 128).update
    assert memory.KEPT not in plain
    few = plan_memory.make_plan(SHAPE, arguments("--kept_layers", "5", "--kept_vision_layers", "2", "--fused"), 128)
    assert few.update[memory.KEPT] == 5 * 33_238 * fused
    assert few.update[memory.KEPT_VISION] == 2 * 64_512 * 2 * (7 * 1152 + 2 * 4304)
    all_of_them = arguments("--kept_layers", "99", "--sequence_parallel", "2")
    assert plan_memory.make_plan(SHAPE, all_of_them, 128).update[memory.KEPT] == 36 * 16_619 * eager


# docs/gpu_results.md: prompts of 16,765 tokens; response tokens of the largest group that was run, or of the longest row.
GROUP = ["--group_size", "1", "--max_response_tokens", "4342"]
ONE = ["--optimizer", "adamw_stochastic", "--grad_accum_dtype", "bf16", "--park"]  # 8B on one GPU
MEASURED = [
    ("2b", 1, 28, GROUP, 84.8),
    ("2b", 1, 0, GROUP, 47.3),
    ("2b", 1, 28, ["--group_size", "1", "--max_response_tokens", "996"], 78.1),
    ("4b", 1, 12, GROUP, 112.7),
    ("4b", 1, 16, ["--group_size", "1", "--max_response_tokens", "1646"], 116.0),
    ("8b", 2, 8, GROUP, 112.8),
    ("8b", 2, 11, GROUP, 120.5),
    ("8b", 2, 8, ["--group_size", "1", "--max_response_tokens", "956"], 108.8),
    ("8b", 1, 2, [*GROUP, *ONE], 120.1),
    ("8b", 1, 4, ["--group_size", "1", "--max_response_tokens", "956", *ONE], 122.4),
]


@pytest.mark.parametrize("size,gpus,kept,responses,measured_gib", MEASURED)
def test_peaks_of_updates_that_were_measured(size, gpus, kept, responses, measured_gib):
    words = [
        "--size",
        size,
        "--gpus",
        str(gpus),
        "--text_tokens",
        "61",
        "--kept_layers",
        str(kept),
        "--fused",
        *responses,
    ]
    args = plan_memory.flags().parse_args([*words, "--groups_per_rank", "0"])  # vLLM sleeps: the update alone
    plan = plan_memory.make_plan(read_shape(plan_memory.SIZES[size]), args, 128)
    assert plan.prompt_tokens == 16_765
    assert plan.peak_bytes / GIB == pytest.approx(measured_gib, rel=0.05)


def test_a_kept_layer_of_2b_as_measured():
    """bench_packed.py, one group of 15,026 + 8 x 400 tokens: 47.1 (fused) and 66.9 GiB with all 28 layers kept, 14.6 without."""
    shape = read_shape(plan_memory.SIZES["2b"])
    for fused, peak in ((True, 47.1), (False, 66.9)):
        kept = 28 * 18_226 * memory.kept_bytes_per_token(shape, fused) / GIB
        assert kept == pytest.approx(peak - 14.6, rel=0.03)


def test_how_many_kept_layers_fit():
    args = arguments("--gpus", "4", "--fused")
    most = plan_memory.most_kept_layers(SHAPE, args)
    peaks = [
        plan_memory.make_plan(
            SHAPE, arguments("--gpus", "4", "--fused", "--kept_layers", str(most + more)), 128
        ).peak_bytes
        for more in (0, 1)
    ]
    assert 0 < most < 36 and peaks[0] <= 0.9 * 139 * GIB < peaks[1]
    # 8 GPUs: 42.3 GiB without, 33,238 x 129,024 bytes = 3.99 GiB for each, 125.1 GiB there: 20.7
    text = plan_memory.describe(SHAPE, arguments("--fused"))
    assert "most --kept_layers with these flags: 20 of 36, with --fused" in text
    assert plan_memory.most_kept_layers(SHAPE, arguments("--gpus", "1", "--gpu_memory_gib", "80")) is None


def test_auto_keeps_weights_gathered_on_one_gpu_as_training_does():
    names = [
        set(plan_memory.make_plan(SHAPE, arguments("--gpus", *words), 128).update)
        for words in (["1"], ["8"], ["1", "--resident_parameters", "off"], ["1", "--offload_parameters"])
    ]
    assert [plan_memory.RESIDENT in found for found in names] == [True, False, False, False]
    assert ["gathered layers and embedding" in found for found in names] == [False, True, True, True]


def test_program():
    program = [sys.executable, ROOT / "scripts" / "plan_memory.py"]
    done = subprocess.run([*program, "--size", "8b"], capture_output=True, text=True)
    assert done.returncode == 0 and "prompt                 16,854 tokens" in done.stdout and ": fits" in done.stdout
    done = subprocess.run([*program, "--model", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere/config.json" in done.stderr
