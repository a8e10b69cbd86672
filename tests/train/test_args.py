"""Flags: presets under explicit flags, and every bad combination refused with the flags' names and values."""

import subprocess
import sys
from pathlib import Path

import pytest

from train import sft_args
from train.args import build_parser, check_args, parse_args, profiled_steps, refuse

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def required(tmp_path):
    (tmp_path / "model").mkdir()
    return ["--model", str(tmp_path / "model"), "--data", "train.jsonl"]


def refused(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        parse_args(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_preset_sets_and_an_explicit_flag_wins(required):
    args = parse_args([*required, "--algorithm", "dapo"])
    assert (args.clip_low, args.clip_high, args.loss_reduction) == (0.2, 0.28, "token_mean")
    args = parse_args([*required, "--algorithm", "dapo", "--clip_high", "0.4"])
    assert (args.clip_low, args.clip_high) == (0.2, 0.4)


def test_defaults_follow_other_flags(required):
    args = parse_args([*required, "--prompts_per_step", "48", "--max_response_tokens", "77"])
    assert args.prompts_per_update == 48 and args.validate_max_response_tokens == 77


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--group_size", "0"], ["--group_size", "0"]),
        (
            ["--prompts_per_step", "32", "--prompts_per_update", "12"],
            ["--prompts_per_update 12", "--prompts_per_step 32"],
        ),
        (["--min_frames", "10", "--max_frames", "4"], ["--min_frames 10", "--max_frames 4"]),
        (["--accuracy_weight", "0.9", "--format_weight", "0.3"], ["--accuracy_weight 0.9", "--format_weight 0.3"]),
        (["--validate_every", "5"], ["--validate_every", "--validate_data"]),
        (["--reward_args", "{}"], ["--reward_args", "--reward"]),
        (["--judge_url", "http://localhost"], ["--judge_url", "--judge_model"]),
        (["--temperature", "0"], ["--temperature"]),
        (["--cache", "require"], ["--cache require", "--cache_dir"]),
        (["--cache_dir", "no/such/folder"], ["--cache_dir no/such/folder"]),
        (["--tensor_parallel", "2"], ["--tensor_parallel 2"]),
        (["--hpz_partition_size", "2"], ["--hpz_partition_size 2", "ranks, 1"]),
        (["--hpz_partition_size", "0"], ["--hpz_partition_size", "0"]),
        (["--max_model_len", "21000"], ["--max_model_len 21000", "--max_prompt_tokens 20000", "2048"]),
        (["--max_num_batched_tokens", "100"], ["--max_num_batched_tokens 100", "--max_num_seqs 256"]),
        (["--sequence_parallel", "2"], ["--sequence_parallel 2", "ranks, 1"]),
        (["--sequence_parallel", "0"], ["--sequence_parallel", "0"]),
        (["--validate_top_p", "0"], ["--validate_top_p"]),
        (["--validate_top_k", "0"], ["--validate_top_k"]),
        (["--freeze_vision_tower", "--freeze_merger", "--freeze_language_model"], ["nothing to train"]),
        (["--kept_layers", "2", "--no-gradient_checkpointing"], ["--kept_layers 2", "--no-gradient_checkpointing"]),
        (["--kept_vision_layers", "1", "--no-gradient_checkpointing"], ["--kept_vision_layers 1", "all layers"]),
        (["--kept_layers", "-1"], ["--kept_layers", "-1"]),
        (["--kept_layers", "auto", "--no-gradient_checkpointing"], ["--kept_layers auto", "all layers"]),
        (["--kept_layers", "some"], ["--kept_layers", "some"]),
        (
            ["--grad_accum_dtype", "bf16", "--dtype", "fp32"],
            ["--grad_accum_dtype bf16 with --dtype fp32: it would round fp32 gradients", "or give --dtype bf16\n"],
        ),
        (["--grad_accum_dtype", "fp16"], ["--grad_accum_dtype", "fp16"]),
        (["--no_such_flag"], ["--no_such_flag"]),
        (["--max_hours", "-1"], ["--max_hours -1"]),
        (["--field_names", "{oops"], ["--field_names is not JSON", "{oops"]),
        (["--data_weights", "[1, 2]"], ["--data_weights must be a JSON object", "[1, 2]"]),
        (["--profile_steps", "three"], ["--profile_steps", "three"]),
    ],
)
def test_bad_flags_are_named(required, capsys, flags, words):
    message = refused(capsys, [*required, *flags])
    for word in words:
        assert word in message


def test_several_problems_come_in_one_message(required, capsys):
    message = refused(capsys, [*required, "--temperature", "0", "--fps", "-1"])
    assert "--temperature" in message and "--fps" in message


def test_rank_0_speaks_first_and_the_others_only_if_nobody_ended_them(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr("time.sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    for rank, expected in ((None, []), ("0", []), ("3", [(30.0, "")])):
        monkeypatch.delenv("RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        assert refuse("train/sft.py", ValueError("a.jsonl: 2 rows")) == 2 and waited == expected
        assert capsys.readouterr().err == "train/sft.py: a.jsonl: 2 rows\n"


@pytest.mark.parametrize("program,parse", [("train/main.py", parse_args), ("train/sft.py", sft_args.parse_args)])
def test_a_mistake_is_two_lines_not_all_flags(required, capsys, program, parse):
    """How to start it and where the flags are, then the message; status 2."""
    usage = f"usage: torchrun --nproc_per_node N {program} --model DIR --data FILE ... --output_dir DIR [flags; --help]"
    for words, told in (
        ([], "the following arguments are required: --model, --data"),
        ([*required, "--epoch", "2"], "unrecognized arguments: --epoch 2"),
        ([*required, "--epochs", "two"], "argument --epochs: invalid float value: 'two'"),
        ([*required, "--dtype", "bf8"], "argument --dtype: invalid choice: 'bf8' (choose from "),
        ([*required, "--epochs", "0"], "these flags cannot run together:\n  --epochs must be above 0, got 0.0\n"),
    ):
        with pytest.raises(SystemExit) as stop:
            parse(words)
        said = capsys.readouterr()
        assert stop.value.code == 2 and said.out == "" and said.err.startswith(f"{usage}\n{program}: error: {told}")
        assert said.err.count("\n") == 2 + told.count("\n  ")


@pytest.mark.parametrize("parse", [parse_args, sft_args.parse_args])
def test_gradients_are_summed_in_fp32_unless_asked(required, parse):
    """In supervised training, too. What --dtype auto is, the machine decides: train.plan.check_accumulation."""
    assert parse(required).grad_accum_dtype == "fp32"
    for dtype in ("auto", "bf16"):
        assert parse([*required, "--grad_accum_dtype", "bf16", "--dtype", dtype]).grad_accum_dtype == "bf16"


def test_prompts_must_divide_over_replicas(required):
    args = parse_args([*required, "--prompts_per_step", "6"])
    assert check_args(args, world_size=3) == []
    assert any("4 data-parallel replicas" in text for text in check_args(args, world_size=4))


def test_the_second_copy_of_weights_fits_the_nodes(required, monkeypatch):
    args = parse_args(required)
    args.hpz_partition_size = 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    args.prompts_per_step = args.prompts_per_update = 96
    assert check_args(args, world_size=32) == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")  # groups of 8 would lie across nodes of 6
    assert any("--hpz_partition_size 8" in text for text in check_args(args, world_size=24))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    args.offload = "all"
    assert any("--offload all" in text for text in check_args(args, world_size=32))


def test_sets_that_share_sequences_hold_whole_engines(required):
    args = parse_args(required)
    args.sequence_parallel, args.tensor_parallel = 4, 2
    assert check_args(args, world_size=8) == []
    args.tensor_parallel = 8
    assert any(
        "--sequence_parallel 4 must be a multiple of --tensor_parallel 8" in text for text in check_args(args, 8)
    )


def test_vllm_takes_the_longer_of_the_two_response_limits(required):
    args = parse_args([*required, "--max_prompt_tokens", "1000", "--max_response_tokens", "100"])
    assert args.max_model_len == 1100
    longer = ["--max_prompt_tokens", "1000", "--max_response_tokens", "100", "--validate_max_response_tokens", "300"]
    assert parse_args([*required, *longer]).max_model_len == 1300
    assert parse_args([*required, *longer, "--max_model_len", "4096"]).max_model_len == 4096


def test_limits_of_vllm_reach_the_engine(required, monkeypatch):
    import torch

    from rollout import engine
    from train.plan import build_engine

    monkeypatch.setattr(engine, "RolloutEngine", lambda model, **settings: settings)
    flags = ["--gpu_memory_utilization", "0.7", "--max_num_batched_tokens", "25000", "--max_num_seqs", "64"]
    flags += ["--kv_cache_gib", "12", "--max_model_len", "30000", "--tensor_parallel", "1", "--sleep_level", "1"]
    made = build_engine(parse_args([*required, *flags]), None, torch.device("cpu"))
    wanted = {"gpu_memory_utilization": 0.7, "max_num_batched_tokens": 25000, "max_num_seqs": 64, "kv_cache_gib": 12.0}
    wanted |= {"max_model_len": 30000, "tensor_parallel": 1, "sleep_level": 1}
    assert {name: made[name] for name in wanted} == wanted
    assert made["engine_args"] == {}


def test_further_arguments_of_vllm(required, monkeypatch):
    import torch

    from rollout import engine
    from train.plan import build_engine

    monkeypatch.setattr(engine, "RolloutEngine", lambda model, **settings: settings)
    args = parse_args([*required, "--vllm_args", '{"block_size": 128, "cpu_offload_gb": 2}'])
    assert check_args(args, world_size=1) == []
    assert build_engine(args, None, torch.device("cpu"))["engine_args"] == {"block_size": 128, "cpu_offload_gb": 2}
    args.vllm_args = '{"seed": 3, "logprobs_mode": "raw_logprobs"}'
    assert [text.split(":")[1].split()[0] for text in check_args(args, 1)] == ["logprobs_mode", "seed"]
    args.vllm_args = '{"mm_processor_cache_gb": 1, "pipeline_parallel_size": 2}'
    assert [text.split(":")[1].split()[0] for text in check_args(args, 1)] == [
        "mm_processor_cache_gb",
        "pipeline_parallel_size",
    ]
    args.vllm_args = "[1]"
    assert check_args(args, 1) == ["--vllm_args must be a JSON object, got [1]"]


def test_profiled_steps(required):
    assert list(profiled_steps(parse_args([*required, "--profile_steps", "3-5"]))) == [3, 4, 5]
    assert list(profiled_steps(parse_args([*required, "--profile_steps", "7"]))) == [7]
    assert list(profiled_steps(parse_args(required))) == []


def test_explain_needs_neither_model_nor_data():
    assert parse_args(["--explain", "--algorithm", "dapo"]).algorithm == "dapo"


def test_every_flag_has_help():
    for action in build_parser()._actions:
        assert action.help, action.option_strings


def test_help_and_errors_do_not_import_torch():
    code = "import sys; sys.argv = ['main.py', '--help']\nsys.path.insert(0, '.')\n"
    code += "from train.args import parse_args\ntry:\n    parse_args()\nexcept SystemExit:\n    pass\n"
    code += "print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("False") and "--group_size" in out
