"""What a run checks before anything is built: rows left out are listed, the model folder is whole, resumes say what changed."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from scripts.plan_memory import SIZES
from tests.tiny_models import tiny_model
from train import plan
from train.args import parse_args
from train.plan import check_accumulation, check_attention, check_model_folder, load_samples
from train.run_log import resumed_text


def flags(tmp_path, **more) -> Namespace:
    values = {"media_dir": None, "on_bad_sample": "skip", "field_names": None, "cache": "off", "cache_dir": None}
    return Namespace(output_dir=str(tmp_path / "run"), **values, **more)


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


GOOD = {"problem": "1 + 1?", "answer": "2", "problem_type": "numerical"}
BAD = {"problem": "1 + 1?", "answer": "", "problem_type": "numerical"}


def reasons(path: Path) -> list[tuple[str, int]]:
    return [(Path(row["file"]).name, row["line"]) for row in map(json.loads, path.read_text().splitlines())]


@pytest.mark.filterwarnings("ignore:.*rows skipped")
def test_both_lists_of_rows_left_out_stay_and_are_made_anew(tmp_path):
    args = flags(tmp_path)
    args.data = [write(tmp_path / "train.jsonl", GOOD, BAD, GOOD, BAD)]
    args.validate_data = [write(tmp_path / "held.jsonl", BAD, GOOD)]
    assert len(load_samples(args)) == 2 and len(load_samples(args, "validate")) == 1
    run = tmp_path / "run"
    assert reasons(run / "failed-train.jsonl") == [("train.jsonl", 2), ("train.jsonl", 4)]
    assert reasons(run / "failed-validate.jsonl") == [("held.jsonl", 1)]
    write(tmp_path / "train.jsonl", GOOD, GOOD, GOOD, BAD)  # one row repaired
    assert len(load_samples(args)) == 3
    assert reasons(run / "failed-train.jsonl") == [("train.jsonl", 4)]
    write(tmp_path / "train.jsonl", GOOD)
    load_samples(args)
    assert not (run / "failed-train.jsonl").exists()


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--pack_groups", "holds 2 such group(s) per micro-batch\n  as one row per response it would be 1200\n"),
        # 250 and 4 x (250 + 50) tokens, against a budget of 1,000
        (
            "--no-pack_groups",
            "not packed, one row per response, 4 x 300 = 1200; --token_budget holds 3 row(s) per micro-batch\n",
        ),
    ],
)
def test_dry_run_says_what_a_micro_batch_holds(tmp_path, monkeypatch, flag, told):
    monkeypatch.setattr(plan, "memory_lines", lambda *_: [])
    monkeypatch.setattr("train.sequence_parallel.check_model", lambda *_: None)
    words = [
        "--model",
        str(tmp_path),
        "--data",
        write(tmp_path / "train.jsonl", GOOD),
        "--output_dir",
        str(tmp_path),
        flag,
    ]
    words += ["--algorithm", "grpo", "--group_size", "4"]
    words += ["--max_response_tokens", "50", "--token_budget", "1000", "--prompts_per_step", "2", "--max_steps", "1"]
    prompt = SimpleNamespace(input_ids=[0] * 250, text="", sample=None)
    encoder = SimpleNamespace(config=None, count_tokens=lambda sample: 250, encode=lambda sample: prompt)
    sample = SimpleNamespace(id="a", file="f", line=1, answer="b", media=(), source="")
    assert told in plan.dry_run(parse_args(words), [sample, sample], encoder, 1)


@pytest.mark.parametrize(
    ("epochs", "rows", "needed", "steps"),
    # A step takes 32: 32 rows in one epoch, 64 in half a one, 22 in one and a half (21 would be 31.5 places).
    [(1.0, 31, 32, None), (1.0, 32, 32, 1), (0.5, 63, 64, None), (0.5, 64, 64, 1), (1.5, 21, 22, None), (1.5, 22, 22, 1),
     (3.0, 100, 11, 9)],
)  # fmt: skip
def test_steps_of_a_run_and_rows_that_are_too_few_for_one(epochs, rows, needed, steps):
    args = Namespace(data=["a.jsonl", "b/*.jsonl"], epochs=epochs, prompts_per_step=32, max_steps=None)
    args.validate_only = False
    if steps is not None:
        assert plan.total_steps(args, rows) == steps
        return
    said = f"--data a.jsonl b/*.jsonl: {rows} usable rows, {needed} are needed for one step of --prompts_per_step 32"
    with pytest.raises(ValueError, match=re.escape(said)):
        plan.total_steps(args, rows)
    assert plan.total_steps(Namespace(**vars(args) | {"max_steps": 7}), rows) == 7
    assert plan.total_steps(Namespace(**vars(args) | {"validate_only": True}), rows) == 1


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_vl"])
def test_key_value_cache_by_hand(family):
    """Per token 2 x layers x 2 heads x size x 2 bytes: 512 for one layer of four with heads of 64, for two layers of 32.

    Qwen3.5's other three layers keep a state, not a cache. 2^21 tokens are 1 GiB then.
    """
    config = AutoConfig.from_pretrained(tiny_model(family))
    args = Namespace(group_size=1, max_num_seqs=1, max_response_tokens=48, tensor_parallel=1, optimizer="adamw")
    args.resident_parameters, args.grad_accum_dtype = "auto", "fp32"
    lines = plan.memory_lines(args, config, 2**21 - 48, 1, 1)
    assert "KV cache of the whole step 1.00 GiB" in lines[-1]


def test_bytes_per_parameter_by_hand():
    """Weights, gradients and states of 8B's 8,763,699,200 parameters: 18 bytes are 146.91 GiB, 12 are 97.94."""
    args = Namespace(group_size=1, max_num_seqs=1, max_response_tokens=48, tensor_parallel=1, resident_parameters="off")
    for optimizer, summed, told in (
        ("adamw", "fp32", "146.91 GiB (18 bytes per parameter: bf16 weights, fp32 gradients, "),
        ("adamw", "bf16", "130.59 GiB (16 bytes per parameter: bf16 weights, bf16 gradients, "),
        ("adamw_kahan", "bf16", "114.27 GiB (14 bytes per parameter: bf16 weights, bf16 gradients, "),
        ("adamw_stochastic", "bf16", "97.94 GiB (12 bytes per parameter: bf16 weights, bf16 gradients, "),
    ):
        args.optimizer, args.grad_accum_dtype = optimizer, summed
        assert f"ZeRO-3 states {told}" in plan.memory_lines(args, SIZES["8b"], 1000, 1, 1)[1]


def test_only_rank_0_writes_lists(tmp_path, monkeypatch, recwarn):
    monkeypatch.setenv("RANK", "1")
    args = flags(tmp_path, data=[write(tmp_path / "train.jsonl", GOOD, BAD)])
    assert len(load_samples(args)) == 1
    assert not (tmp_path / "run").exists() and not recwarn.list


def test_attention_that_cannot_run_here_is_refused_before_the_data_are_read(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_attention(Namespace(attention="sdpa", dtype="auto"))
    with pytest.raises(ValueError, match="--attention flash2 needs CUDA; on a CPU use --attention sdpa"):
        check_attention(Namespace(attention="flash2", dtype="auto"))


def test_a_model_folder_that_is_not_whole_is_named(tmp_path):
    with pytest.raises(ValueError, match="--model /no/such/place: no such folder"):
        check_model_folder("/no/such/place")
    check_model_folder("Qwen/Qwen3-VL-2B-Instruct")  # a name on the hub
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lacks weights \(\*\.safetensors\), a tokenizer, a processor"):
        check_model_folder(str(tmp_path))
    for name in ("model-00001-of-00002.safetensors", "tokenizer.json", "preprocessor_config.json"):
        (tmp_path / name).write_text("")
    check_model_folder(str(tmp_path))


def test_a_resume_says_which_flags_changed_and_that_nothing_is_left(tmp_path):
    before = {"learning_rate": 1e-6, "seed": 0, "data": ["a.jsonl"]}
    (tmp_path / "run.json").write_text(json.dumps({"starts": [{"arguments": before}]}))
    said = resumed_text(tmp_path, Path("c/step-000007"), 7, 2, {"learning_rate": 1e-3, "seed": 0, "data": ["a.jsonl"]})
    assert said.splitlines() == [
        "resumed after step 7 from c/step-000007",
        "  --learning_rate is now 0.001; it was 1e-06",
        "  step 7 is the last of 2: nothing is left to train; raise --max_steps or --epochs to go on",
    ]
    assert resumed_text(tmp_path, Path("c/step-000007"), 7, 9, before) == "resumed after step 7 from c/step-000007"


def test_bf16_sums_of_fp32_gradients_are_refused_where_auto_is_fp32(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_accumulation(Namespace(grad_accum_dtype="bf16", dtype="bf16"))
    check_accumulation(Namespace(grad_accum_dtype="fp32", dtype="auto"))
    said = (
        "--grad_accum_dtype bf16 with --dtype auto, which is fp32 without a GPU: it would round fp32 gradients to bf16; leave "
        "--grad_accum_dtype at fp32, or give --dtype bf16"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        check_accumulation(Namespace(grad_accum_dtype="bf16", dtype="auto"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_accumulation(Namespace(grad_accum_dtype="bf16", dtype="auto"))
