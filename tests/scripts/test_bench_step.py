"""scripts/bench_step.py: lengths and summary by hand, and one real run of it on the tiny model."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import bench_step
from scripts.bench_inputs import VARIANTS
from scripts.bench_results import (
    open_results,
    over_ranks,
    parse_flags,
    response_lengths,
    summarise,
    training_arguments,
)
from scripts.bench_step import layout_of

ROOT = Path(__file__).resolve().parents[2]


def test_lengths_have_the_asked_median_and_tail():
    lengths = sorted(n for row in response_lengths("lognormal:400:1200", 500, 8, 2048, [3, 0]) for n in row)
    assert len(lengths) == 4000 and lengths[0] >= 1 and lengths[-1] == 2048  # the cap is met now and then
    assert statistics.median(lengths) == pytest.approx(400, rel=0.05)
    assert lengths[int(0.95 * 4000)] == pytest.approx(1200, rel=0.08)
    assert response_lengths("lognormal:400:1200", 2, 3, 2048, [3, 0]) == response_lengths(
        "lognormal:400:1200", 2, 3, 2048, [3, 0]
    )
    assert response_lengths("400", 2, 3, 2048, [0]) == [[400] * 3] * 2
    assert response_lengths("400", 1, 2, 48, [0]) == [[48, 48]]


def record(step_s: float, rollout: float, update: float, useful: float) -> dict:
    seconds = {"rollout": rollout, "update": update, "load": step_s - rollout - update}
    return {
        "seconds": seconds, "step_s": step_s, "row_tokens": 3000, "response_tokens": 200, "useful_flops": useful,
        "peak_update_gib": None, "log_ratio": 0.0,
    }  # fmt: skip


def test_summary_by_hand():
    useful = 989e12 / 4  # a quarter of the device's peak for one second
    results = {
        "host": {"device": "NVIDIA H200"},
        "settings": {"ranks": 1},
        "runs": {
            "b": [record(60.0, 10.0, 40.0, useful)],
            "g": [record(21.0, 10.0, 8.0, useful), record(15.0, 9.0, 4.0, useful), record(15.0, 10.0, 5.0, useful)],
        },
    }
    found = summarise(results)["variants"]
    assert found["g"]["seconds"]["update"] == 5.0 and found["g"]["step_s"] == 15.0
    assert found["g"]["over_b"] == {"update": 8.0, "without_rollout": 50.0 / 6.0, "step": 4.0}
    assert found["g"]["mfu"] == pytest.approx(0.25 / 5)
    assert found["g"]["row_tokens_per_gpu_s"] == 200.0
    assert "over_a" not in found["g"]


def test_utilisation_is_the_median_of_the_steps_own():
    """Steps of 10, 30, 20 and 26 s with work for 2, 9, 5 and 7.8: 20, 30, 25 and 30 %. (6.4 / 23, the medians, is 27.8 %.)"""
    peak = 989e12
    steps = [(10.0, 2.0), (30.0, 9.0), (20.0, 5.0), (26.0, 7.8)]
    runs = [record(50.0, 10.0, seconds, peak * work) for seconds, work in steps]
    found = summarise({"host": {"device": "NVIDIA H200"}, "settings": {"ranks": 2}, "runs": {"g": runs}})
    assert found["variants"]["g"]["mfu"] == pytest.approx(0.275)
    assert found["variants"]["g"]["tflops"] == pytest.approx(0.275 * 989)


def test_a_step_of_several_ranks_counts_the_work_of_all_of_them():
    """8B on two GPUs, step 3 of docs/gpu_results.md: 2.871 and 3.072 PFLOP in 9.968 s are 30.1 % per GPU, not rank 0's 29.1 %."""
    first, second = record(27.0, 15.6, 9.9681, 2.870889e15), record(27.0, 15.6, 9.9681, 3.072332e15)
    first |= {"peak_update_gib": 120.5, "response_tokens": 7626}
    second |= {"peak_update_gib": 121.0, "response_tokens": 10270, "row_tokens": 5000}
    found = over_ranks([first, second])
    assert found["useful_flops"] == pytest.approx(2.9716105e15) and found["peak_update_gib"] == 121.0
    assert (found["response_tokens"], found["row_tokens"], found["step_s"]) == (8948, 4000, 27.0)
    assert found["useful_flops"] / found["seconds"]["update"] / 989e12 == pytest.approx(0.3014, abs=1e-4)
    assert over_ranks([record(2.0, 1.0, 1.0, 5.0)])["peak_update_gib"] is None


def test_a_results_file_of_other_settings_is_refused(tmp_path):
    out = str(tmp_path / "out.json")
    flags = parse_flags("", ["--size", "tiny", "--out", out])
    Path(out).write_text(json.dumps(open_results(flags) | {"runs": {"g": [1]}}))
    assert open_results(parse_flags("", ["--size", "tiny", "--out", out, "--steps", "9"]))["runs"] == {"g": [1]}
    with pytest.raises(ValueError, match=r"group_size.*take another file"):
        open_results(parse_flags("", ["--size", "tiny", "--out", out, "--group_size", "2"]))


@pytest.mark.slow
def test_one_step_of_every_kind_of_dataflow(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "scripts/bench_step.py", "--size", "tiny", "--steps", "1", "--clips", "2"]
    command += ["--variants", "g", "b", "a", "d", "g-fly", "--work_dir", str(tmp_path / "work"), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["failed"] == {} and found["skipped"] == {} and found["notes"] == {}
    assert set(found["runs"]) == {"g", "b", "a", "d", "g-fly"}
    runs = {name: records[0] for name, records in found["runs"].items()}
    for run in runs.values():
        assert run["log_ratio"] < 1e-5  # every dataflow trains on what was sampled
        assert run["prompt_tokens"] == runs["g"]["prompt_tokens"]
        assert run["response_tokens"] == sum(
            n for row in response_lengths("lognormal:12:36", 2, 4, 48, [0, 0]) for n in row
        )
        assert run["row_tokens"] == 4 * sum(run["prompt_tokens"]) + run["response_tokens"]
        assert run["grad_norm"] == pytest.approx(runs["g"]["grad_norm"], rel=0.2)  # other weights by then, a little
    assert {name for name, run in runs.items() if "old_logprobs" in run["seconds"]} == {"b", "a", "d"}
    b, g = runs["b"], runs["g"]
    assert found["summary"]["variants"]["g"]["over_b"]["update"] == pytest.approx(
        b["seconds"]["update"] / g["seconds"]["update"]
    )
    assert "times b" in done.stdout


@pytest.fixture
def five_layers():
    """(layers, policy) of a decoder with --kept_layers 2, whose library switches recomputation on in all of them."""
    layers = [SimpleNamespace(gradient_checkpointing=number < 3) for number in range(5)]

    def enable(gradient_checkpointing_kwargs):
        for layer in layers:
            layer.gradient_checkpointing = True

    model = SimpleNamespace(language_model=SimpleNamespace(layers=layers), visual=SimpleNamespace(blocks=[]))
    return layers, SimpleNamespace(
        packed=SimpleNamespace(hf=SimpleNamespace(model=model, gradient_checkpointing_enable=enable))
    )


def recomputed(layers) -> list[bool]:
    return [layer.gradient_checkpointing for layer in layers]


def test_packed_variants_keep_their_own_layers_and_rows_the_others(five_layers):
    layers, policy = five_layers
    flags, args = SimpleNamespace(packed_kept_layers=1), SimpleNamespace(kept_layers=2, kept_vision_layers=0)
    for name, kept in (("b", 2), ("g", 1), ("a", 2), ("e", 1)):
        with layout_of(policy, VARIANTS[name], flags, args):
            assert recomputed(layers) == [True] * (5 - kept) + [False] * kept
        assert recomputed(layers) == [True] * 3 + [False] * 2


def test_a_step_that_fails_leaves_its_layers_to_nobody(five_layers):
    layers, policy = five_layers
    flags, args = SimpleNamespace(packed_kept_layers=4), SimpleNamespace(kept_layers=2, kept_vision_layers=0)
    with pytest.raises(RuntimeError, match="out of memory"), layout_of(policy, VARIANTS["g"], flags, args):
        assert recomputed(layers) == [True] + [False] * 4
        raise RuntimeError("out of memory")
    assert recomputed(layers) == [True] * 3 + [False] * 2


@pytest.mark.parametrize("park", [True, False])
def test_a_step_that_fails_parks_its_states_before_vllm_wakes(park, monkeypatch):
    """It may have failed when they were back on the device: the next rollout's memory is theirs then."""
    calls = []
    policy = SimpleNamespace(park=lambda: calls.append("park"), named_tensors=lambda size: None)
    engine = SimpleNamespace(wake=lambda weights, kv: calls.append("wake"), sync=lambda tensors: calls.append("sync"))
    bench = SimpleNamespace(
        flags=parse_flags("", []), args=SimpleNamespace(park=park, sync_bucket_mib=1), policy=policy, engine=engine
    )

    def fails(*given, **named):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench_step, "run_step", fails)
    results = {"failed": {}}
    assert bench_step.one_step(bench, "b", 0, {"b"}, results) is None
    assert results["failed"] == {"b": "RuntimeError: out of memory"}
    assert calls == ["park"] * park + ["wake", "sync", "wake"]


@pytest.mark.parametrize(
    "words,message",
    [
        (["--packed_kept_layers", "-1"], "--packed_kept_layers must be 0 or more, got -1"),
        (
            ["--packed_kept_layers", "0", "--train_args", "--fused --no-gradient_checkpointing"],
            "all variants keep all layers",
        ),
    ],
)
def test_a_number_of_layers_that_would_switch_recomputation_on_is_refused(capsys, words, message):
    assert parse_flags("", ["--train_args=--no-gradient_checkpointing"]).packed_kept_layers is None
    with pytest.raises(SystemExit) as stop:
        parse_flags("", words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_kept_layers_have_to_be_a_number(tmp_path):
    (tmp_path / "frames").mkdir()
    flags = parse_flags("", [f"--work_dir={tmp_path}", "--train_args=--kept_layers auto"])
    with pytest.raises(ValueError, match=r"--kept_layers auto is decided by train/main\.py's loop; give a number"):
        training_arguments(flags, str(tmp_path), 1)
