"""train/sft.py against a plain torch loop on the same rows, and a resumed run against a straight one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from data.dataset import SampleOrder, load
from data.encode import Encoder
from scripts.playground_warm_start import answer_logits, collate
from scripts.real_model.make_clips import write_rows
from scripts.real_model.questions import caption_rows, question_rows
from scripts.real_model.scenes import draw_scenes, write_scene
from tests.run_ranks import torchrun
from train import sft_args

ROOT = Path(__file__).resolve().parents[2]
PIXELS = 12544
BATCH, STEPS = 6, 4


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """A dataset file over eight clips and two stills."""
    folder = tmp_path_factory.mktemp("sft")
    scenes = draw_scenes(1, "train", 8, 2)
    for scene in scenes:
        write_scene(folder, scene)
    write_rows(folder / "train.jsonl", caption_rows(scenes) + question_rows(1, "train", scenes)[:14])
    return folder / "train.jsonl"


def run(model: str, rows: Path, output: Path, *flags: str, ranks: int = 1) -> str:
    command = [
        *torchrun("train/sft.py", ranks),
        *("--model", model, "--data", str(rows), "--output_dir", str(output), "--dtype", "fp32", "--fps", "1"),
        *(
            "--min_frames",
            "4",
            "--max_frames",
            "4",
            "--video_min_pixels",
            str(PIXELS),
            "--video_max_pixels",
            str(PIXELS),
        ),
        *("--image_min_pixels", str(PIXELS), "--image_max_pixels", str(PIXELS), "--max_response_tokens", "400"),
        *("--prompts_per_step", str(BATCH), "--max_steps", str(STEPS), "--token_budget", "700", "--save_every", "2"),
        *(
            "--keep_last",
            "0",
            "--learning_rate",
            "1e-3",
            "--vision_learning_rate",
            "3e-3",
            "--weight_decay",
            "0.1",
            *flags,
        ),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def straight(tiny, rows, tmp_path_factory):
    """(model folder, run folder) of a straight run on two ranks, validated on its own rows."""
    model, output = tiny("qwen2_5_vl", tied=True), tmp_path_factory.mktemp("straight") / "run"
    run(model, rows, output, "--validate_data", str(rows), "--validate_at_start", "--validate_every", "4", ranks=2)
    return model, output


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def lessons(model: str, rows: Path):
    """The encoder, and (prompt, answer tokens with the end token) of every sample in the run's order."""
    video = {"fps": 1.0, "min_frames": 4, "max_frames": 4, "min_pixels": PIXELS, "max_pixels": PIXELS}
    encoder = Encoder(model, video=video, image={"min_pixels": PIXELS, "max_pixels": PIXELS}, style="think")
    order = SampleOrder(load([str(rows)]), 0)
    made = []
    for sample in order.take(0, STEPS * BATCH)[0]:
        tokens = encoder.tokenizer.encode(sample.offline_output, add_special_tokens=False)
        made.append((encoder.encode(sample), [*tokens, encoder.tokenizer.eos_token_id]))
    return encoder, made


def losses(model, made, encoder):
    """Negative log-likelihood of every answer token, ids that are never sampled left out; padded rows, no packing."""
    inputs, asked = collate(made, SimpleNamespace(image_mean=(0.0,), image_std=(1 / 255,)))  # pixels as they are
    mean, std = (
        torch.tensor(values).repeat_interleave(2 * 14 * 14) for values in (encoder.image_mean, encoder.image_std)
    )
    for name in inputs.keys() & {"pixel_values", "pixel_values_videos"}:
        inputs[name] = (inputs[name] / 255 - mean) / std
    logits, tokens = answer_logits(model, inputs, asked)
    logits[:, list(encoder.visual_token_ids)] = float("-inf")
    return torch.nn.functional.cross_entropy(logits.float(), tokens, reduction="none")


@pytest.mark.slow
def test_losses_norms_and_weights_are_those_of_a_plain_loop(straight, rows):
    """Four updates: mean over the mini-batch's tokens, clipped at 1, AdamW with a rate for the tower and merger apart."""
    folder, output = straight
    encoder, made = lessons(folder, rows)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    named = list(model.named_parameters())
    groups = [
        {
            "params": [p for n, p in named if part(n) and (p.ndim > 1) == decays],
            "lr": rate,
            "weight_decay": 0.1 * decays,
        }
        for part, rate in ((lambda n: is_tower(n), 3e-3), (lambda n: not is_tower(n), 1e-3))
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    for step, row in enumerate(metrics(output)):
        loss = losses(model, made[step * BATCH : (step + 1) * BATCH], encoder).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert row["sft/nll"] == pytest.approx(loss.item(), abs=2e-5)
        assert row["policy/grad_norm"] == pytest.approx(float(norm), rel=2e-3)
    trained = AutoModelForImageTextToText.from_pretrained(output / "final", dtype=torch.float32).state_dict()
    start = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
    gap = max(float((trained[name] - value).abs().max()) for name, value in model.state_dict().items())
    moved = max(float((trained[name] - start[name]).abs().max()) for name in start)
    assert gap < 0.02 * moved, (gap, moved)


def is_tower(name: str) -> bool:
    return "visual" in name and "merger" not in name


@pytest.fixture(scope="module")
def untrained(tiny, rows):
    """(sample, losses of its answer tokens) of every row by the untrained model, one row at a time."""
    folder = tiny("qwen2_5_vl", tied=True)
    encoder, _ = lessons(folder, rows)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    found = []
    for sample in load([str(rows)]):
        tokens = encoder.tokenizer.encode(sample.offline_output, add_special_tokens=False)
        with torch.no_grad():
            one = losses(model, [(encoder.encode(sample), [*tokens, encoder.tokenizer.eos_token_id])], encoder)
        found.append((sample, one))
    return found


def mean_loss(found, field: str = "", value: str = "") -> float:
    """Over the tokens of all samples, or of those with `value` in `field`."""
    return float(torch.cat([each for sample, each in found if not field or getattr(sample, field) == value]).mean())


@pytest.mark.slow
def test_validation_counts_every_held_out_row_once_on_two_ranks(straight, untrained):
    """24 rows in batches of 6; the mean over tokens of the untrained model, row by row."""
    _, output = straight
    first = json.loads((output / "validation.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first["validate/nll"] == pytest.approx(mean_loss(untrained), abs=2e-5)


def test_validate_only_measures_all_rows_types_and_sources_and_trains_nothing(tiny, rows, untrained, tmp_path):
    output = tmp_path / "run"
    run(tiny("qwen2_5_vl", tied=True), rows, output, "--validate_data", str(rows), "--validate_only")
    (row,) = [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]
    assert row["validate/nll"] == pytest.approx(mean_loss(untrained), abs=2e-5)
    for name, field in (("nll", "problem_type"), ("nll_by_source", "source")):
        values = {getattr(sample, field) for sample, _ in untrained}
        assert len(values) > 2 and len([key for key in row if key.startswith(f"validate/{name}/")]) == len(values)
        for value in values:
            mean = mean_loss(untrained, field, value)
            assert row[f"validate/{name}/{value}"] == pytest.approx(mean, abs=2e-5)
    assert not any((output / name).exists() for name in ("metrics.jsonl", "checkpoints", "final", "done.json"))


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_straight_runs_weights(straight, rows, tmp_path):
    folder, output = straight
    again = tmp_path / "run"
    shutil.copytree(output, again, ignore=shutil.ignore_patterns("final", "done.json", "step-000004", "lock"))
    said = run(folder, rows, again, "--validate_data", str(rows), "--validate_every", "4", ranks=2)
    assert "resumed after step 2" in said
    first, second = (load_file(place / "final" / "model.safetensors") for place in (output, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert [row["sft/nll"] for row in metrics(again)] == [row["sft/nll"] for row in metrics(output)]


def test_a_row_without_demonstration_and_one_too_long_are_named(tiny, rows, tmp_path):
    listed = [json.loads(line) for line in rows.read_text().splitlines()][:4]
    listed[1].pop("offline_output")
    listed[3]["offline_output"] = "red blue " * 300
    bad = rows.with_name("bad.jsonl")
    write_rows(bad, listed)
    arguments = ["--model", tiny("qwen2_5_vl"), "--data", str(bad), "--output_dir", str(tmp_path / "out"), "--dry_run"]
    command = [sys.executable, "train/sft.py", *arguments, "--max_response_tokens", "400"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and f"{bad}:2: offline_output: missing or empty" in done.stderr, done.stderr[-2000:]
    assert f"{bad}:4: offline_output: " in done.stderr and "more than --max_response_tokens 400" in done.stderr
    assert f"{bad}:1:" not in done.stderr


@pytest.mark.slow
def test_fewer_rows_than_a_step_are_one_line_and_enough_to_measure(tiny, rows, untrained, tmp_path):
    """Four rows, six per step: nothing to train on, said without a traceback; their loss is that of the untrained model."""
    few = rows.with_name("few.jsonl")
    write_rows(few, [json.loads(line) for line in rows.read_text().splitlines()][:4])
    command = torchrun("train/sft.py", 1)
    command += [
        "--model",
        tiny("qwen2_5_vl", tied=True),
        "--data",
        str(few),
        "--output_dir",
        str(tmp_path / "run"),
        "--dtype",
        "fp32",
    ]
    command += [
        "--prompts_per_step",
        "6",
        "--max_response_tokens",
        "400",
        "--fps",
        "1",
        "--min_frames",
        "4",
        "--max_frames",
        "4",
    ]
    for kind in ("video", "image"):
        command += [f"--{kind}_min_pixels", str(PIXELS), f"--{kind}_max_pixels", str(PIXELS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300).stderr
    assert f"train/sft.py: --data {few}: 4 usable rows, 6 are needed for one step of --prompts_per_step 6" in said
    assert "ValueError" not in said and not (tmp_path / "run" / "run.json").exists()
    command += ["--validate_only", "--validate_data", str(few)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads((tmp_path / "run" / "validation.jsonl").read_text())["validate/nll"]
    assert measured == pytest.approx(mean_loss(untrained[:4]), abs=2e-5)


def test_flags_of_rl_are_refused(capsys, tiny):
    with pytest.raises(SystemExit):
        sft_args.parse_args(["--model", tiny("qwen2_5_vl"), "--data", "x.jsonl", "--group_size", "4", "--clip_low=0.1"])
    assert "--group_size, --clip_low: of RL alone" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sft_args.parse_args(["--model", tiny("qwen2_5_vl"), "--data", "x.jsonl", "--kept_layers", "auto"])
    assert "give train/sft.py a number" in capsys.readouterr().err
