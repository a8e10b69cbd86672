"""One run from plan to export: --dry_run, validation while training, a video that cannot be decoded, the exported model."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from scripts import export_hf
from tests.train import run_main


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    return run_main.make_playground(tmp_path_factory.mktemp("playground"))


@pytest.fixture(scope="module")
def finished(playground, tmp_path_factory):
    """(run folder, what it said, number of broken videos): 3 steps on 2 ranks, decoding on the fly, validated at 0, 2."""
    output = tmp_path_factory.mktemp("run") / "run"
    rows = [json.loads(line) for line in (playground / "train.jsonl").read_text().splitlines()]
    videos = sorted({row["videos"][0] for row in rows if "videos" in row})
    for name in videos[::3]:  # a third of the clips end in the middle: readable at start, not when their turn comes
        path = playground / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = run_main.run(
        playground, output, "--max_steps", "3", "--validate_data", str(playground / "heldout.jsonl"), "--validate_at_start",
        "--validate_every", "2", "--validate_limit", "12", "--on_bad_sample", "skip", "--save_every", "2",
    )  # fmt: skip
    return output, said, len(videos[::3])


def test_dry_run_plans_without_writing_or_building(playground, tmp_path):
    """Arithmetic by hand: 4 prompts a step of 4 responses on 1 rank, 40 steps: 640 responses."""
    command = run_main.command(playground, tmp_path / "none", "--max_steps", "40", "--dry_run", ranks=1)
    done = subprocess.run(command, cwd=run_main.ROOT, env=run_main.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
    for words in ("4 prompts x 4 responses = 16 per step", "40 steps = "):
        assert words in said, said
    assert said.count("<|im_start|>user") >= 2  # two prompts as the model gets them
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_video_that_fails_is_replaced_on_its_rank_and_named(finished, playground):
    output, _, _ = finished
    rows = run_main.metrics(output)
    assert [row["step"] for row in rows] == [1, 2, 3]
    replaced = sum(row["data/replaced"] for row in rows)
    assert replaced > 0
    failed = [json.loads(line) for path in output.glob("failed*.jsonl") for line in path.read_text().splitlines()]
    named = {row["id"] for row in failed}
    assert len(named) >= 1 and all(row["reason"] and row["remedy"] for row in failed)
    by_id = {row["problem_id"]: row for row in map(json.loads, (playground / "train.jsonl").read_text().splitlines())}
    sizes = {(playground / by_id[name]["videos"][0]).stat().st_size for name in named}
    whole = {path.stat().st_size for path in (playground / "clips").glob("heldout*")}
    assert max(sizes) < max(whole)  # each of them is a file that was cut


@pytest.mark.slow
def test_validation_is_logged_at_its_steps_with_what_was_answered(finished, playground):
    output, _, _ = finished
    rows = [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]
    assert sorted({row["step"] for row in rows}) == [0, 2]
    assert all(0.0 <= row["validate/accuracy"] <= 1.0 and row["validate/samples"] == 12 for row in rows)


@pytest.mark.slow
def test_export_loads_in_transformers_and_equals_the_checkpoint(finished, tmp_path, capsys):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    output, _, _ = finished
    assert export_hf.main([str(output), "--output_dir", str(tmp_path / "final")]) == 0
    assert export_hf.main([str(output), "--step", "2", "--dtype", "bf16", "--output_dir", str(tmp_path / "two")]) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "final")
    AutoProcessor.from_pretrained(tmp_path / "final")
    trained, saved = model.state_dict(), load_file(output / "final" / "model.safetensors")
    assert saved and all(torch.equal(trained[name], tensor) for name, tensor in saved.items())
    second = load_file(output / "checkpoints" / "step-000002" / "hf" / "model.safetensors")
    half = load_file(tmp_path / "two" / "model.safetensors")
    assert half.keys() == second.keys()
    assert all(torch.equal(half[name], tensor.to(torch.bfloat16)) for name, tensor in second.items())
    assert any(not torch.equal(second[name], saved[name]) for name in saved)  # step 3 trained something
    with pytest.raises(SystemExit):
        export_hf.main([str(output), "--output_dir", str(tmp_path / "final")])
    assert "exists: give another" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export_hf.main([str(output), "--step", "7", "--output_dir", str(tmp_path / "seven")])
    assert "no step 7; complete checkpoints there: step-000002, step-000003" in capsys.readouterr().err
    assert not (tmp_path / "seven").exists()


@pytest.mark.slow
def test_validate_only_scores_the_exported_model_in_vllm(finished, playground, tmp_path):
    """The run's own final folder goes back into vLLM and the trainer, and is measured, not trained: three rows of --data,
    fewer than a step's four, are enough."""
    output, _, _ = finished
    few = playground / "few.jsonl"
    few.write_text("".join((playground / "train.jsonl").read_text().splitlines(keepends=True)[:3]))
    said = run_main.run(
        playground, tmp_path / "measured", "--model", str(output / "final"), "--validate_only", "--data", str(few),
        "--validate_data", str(playground / "heldout.jsonl"), "--validate_limit", "12", "--on_bad_sample", "skip", ranks=1,
    )  # fmt: skip
    (row,) = [json.loads(line) for line in (tmp_path / "measured" / "validation.jsonl").read_text().splitlines()]
    assert row["validate/samples"] == 12 and not (tmp_path / "measured" / "final").exists(), said[-2000:]
