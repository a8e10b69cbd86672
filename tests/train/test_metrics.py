"""Numbers of a step, by hand; rows of a run, after a kill and a resume."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.records import Group, Prompt, Response, Sample
from train import flops, metrics, run_log

ROOT = Path(__file__).resolve().parents[2]


def group(rewards, *, kind="numerical", lengths=None, data_type="video", demonstration=False, prompt_tokens=7, **parts):
    sample = Sample("s1", "How many?", "3", kind, data_type, source="set_a")
    ids = np.arange(prompt_tokens)
    visual = (ids < 4).astype(np.uint8) * 2
    prompt = Prompt(sample, "", {}, ids, np.zeros((3, prompt_tokens)), visual, None, np.array([[1, 4, 4]]))
    responses = []
    for i, reward in enumerate(rewards):
        n = (lengths or [2] * len(rewards))[i]
        values = {name: column[i] for name, column in parts.items()}
        reason = "length" if n == 9 else "stop"
        responses.append(Response(list(range(n)), [0.0] * n, reason, reward=reward, reward_parts=values, status="ok"))
    responses[-1].is_demonstration = demonstration
    return Group(prompt, responses)


def test_groups_by_hand():
    step = metrics.StepMetrics()
    metrics.record_groups(
        step,
        [
            group([1.0, 0.0, 0.5], lengths=[2, 9, 4], accuracy=[1, 0, 1], format=[1, 0, 0]),
            group([0.2, 0.2, 0.2], kind="boolean", lengths=[1, 1, 3], data_type="text", accuracy=[0, 0, 0]),
        ],
    )
    row = step.reduce()
    assert row["reward/mean"] == pytest.approx(2.1 / 6)
    assert row["reward/std"] == pytest.approx(math.sqrt((1 + 0.25 + 3 * 0.04) / 6 - (2.1 / 6) ** 2))
    assert (row["reward/min"], row["reward/max"]) == (0.0, 1.0)
    assert row["reward/mean/numerical"] == pytest.approx(0.5)
    assert row["reward/mean/boolean"] == pytest.approx(0.2)
    assert row["reward/accuracy"] == pytest.approx(2 / 6)
    assert row["reward/accuracy/numerical"] == pytest.approx(2 / 3)
    assert row["reward/format"] == pytest.approx(1 / 3)  # only the responses that have this part
    assert row["reward/by_data_type/text"] == pytest.approx(0.2)
    assert row["reward/by_source/set_a"] == pytest.approx(0.35)
    assert row["response/length_mean"] == pytest.approx(20 / 6)
    assert (row["response/length_min"], row["response/length_max"]) == (1, 9)
    assert row["response/truncated_share"] == pytest.approx(1 / 6)
    assert row["group/zero_variance_share"] == 0.5
    assert (row["group/all_wrong_share"], row["group/all_right_share"]) == (0.5, 0.0)
    assert (row["tokens/prompt"], row["tokens/response"]) == (14, 20)
    assert row["prompt/visual_tokens_mean"] == 4
    assert row["status/ok"] == 6
    assert row["perf/tokens_per_s"] == pytest.approx(34 / row["time/step_s"])


def test_a_demonstration_does_not_flatter_the_policy():
    step = metrics.StepMetrics()
    metrics.record_groups(step, [group([0.0, 0.0, 1.0], lengths=[2, 4, 8], demonstration=True)])
    row = step.reduce()
    assert (row["reward/mean"], row["reward/demonstration_mean"], row["response/length_mean"]) == (0, 1, 3)
    assert row["group/zero_variance_share"] == 0  # the group does teach
    assert row["response/demonstration_share"] == pytest.approx(1 / 3)
    assert (row["tokens/response"], row["tokens/sampled"]) == (14, 6)


def test_tensors_ratios_and_copies():
    step = metrics.StepMetrics(copies=2)
    step.ratios({"policy/clip_fraction": (torch.tensor(3.0), torch.tensor(12.0)), "policy/entropy": (4.0, 8)})
    step.ratios({"policy/clip_fraction": (torch.tensor(1.0), 4.0)})
    step.mean("empty", 0.0, 0)
    step.total("tokens/prompt", torch.tensor(10))
    step.high("x/max", torch.tensor(2.0))
    step.high("x/max", 5)
    step.low("x/min", 5)
    step.low("x/min", 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    metrics.record_tokens(step, "advantages", torch.tensor([[1.0, -2.0, 99.0], [4.0, 99.0, 99.0]]), mask)
    row = step.reduce()
    assert row["policy/clip_fraction"] == 4 / 16  # not the mean of 3/12 and 1/4
    assert row["policy/entropy"] == 0.5
    assert "empty" not in row
    assert row["tokens/prompt"] == 5  # two ranks hold each group
    assert (row["x/max"], row["x/min"]) == (5, 2)
    assert row["advantages/mean"] == 1 and row["advantages/max"] == 4 and row["advantages/min"] == -2
    assert row["advantages/std"] == pytest.approx(math.sqrt((0 + 9 + 9) / 3))
    assert all(isinstance(value, float) for value in row.values())


def test_mismatch_by_hand():
    step = metrics.StepMetrics()
    trainer = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0]])
    sampler = torch.tensor([[-1.1, -1.8, -9.0], [-0.5, -9.0, -9.0]])
    metrics.record_mismatch(step, trainer, sampler, torch.tensor([[1, 1, 0], [1, 0, 0]]))
    row = step.reduce()
    assert row["mismatch/mean"] == pytest.approx((0.1 + 0.2 + 0) / 3, rel=1e-6)
    assert row["mismatch/max"] == pytest.approx(0.2, rel=1e-6)
    by_hand = (math.exp(0.1) - 1 - 0.1 + math.exp(-0.2) - 1 + 0.2) / 3
    assert row["mismatch/k3"] == pytest.approx(by_hand, rel=1e-5)


def test_timers_nest_and_add_up():
    told = []

    class Watch:
        def phase(self, name, limit_s):
            told.append((name, limit_s))
            return metrics.nullcontext()

    step = metrics.StepMetrics(Watch())
    for _ in range(2):
        with step.timer("rollout", limit_s=3), step.timer("score"):
            pass
    step.seconds("rollout/score", 5.0)
    step.seconds("update", 2.0)
    step.total("perf/useful_flops", 989e12)
    row = step.reduce(peak_flops=989e12)
    assert told == [("rollout", 3), ("rollout/score", None)] * 2
    assert 5 <= row["time/rollout/score_s"] < 6 and row["time/rollout_s"] < 1
    assert row["perf/mfu"] == pytest.approx(0.5) and row["perf/tflops_per_rank"] == pytest.approx(494.5)
    assert row["time/step_s"] > 0 and row["memory/host_rss_gib"] > 0.01


def test_no_mfu_without_a_peak():
    step = metrics.StepMetrics()
    step.seconds("update", 2.0)
    step.total("perf/useful_flops", 1e12)
    row = step.reduce(peak_flops=flops.bf16_peak_flops("cpu"))
    assert "perf/mfu" not in row and row["perf/tflops_per_rank"] == pytest.approx(0.5)


def test_two_ranks_with_uneven_groups():
    """3 values on one rank and 1 on the other: the mean is over 4 values, and both ranks get the same row."""
    body = f"""
import json, sys
sys.path[0] = {str(ROOT)!r}
from train import distributed, metrics
distributed.init(timeout_s=30, device="cpu")
step = metrics.StepMetrics()
step.spread("reward/", [1.0, 2.0, 3.0] if distributed.rank() == 0 else [10.0])
step.seconds("rollout", 1.0 + distributed.rank())
if distributed.rank() == 1:
    step.mean("only_here", 3, 2)
row = step.reduce()
print(json.dumps({{k: row[k] for k in row if k.startswith(("reward", "time/roll", "only"))}}))
distributed.shutdown()
"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        env = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]), WORLD_SIZE="2")
    ranks = [
        subprocess.Popen([sys.executable, "-c", body], env=dict(env, RANK=str(i)), stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    rows = [json.loads(rank.communicate(timeout=60)[0]) for rank in ranks]
    assert rows[0] == rows[1]
    assert rows[0] == {
        "reward/mean": 4.0,
        "reward/std": pytest.approx(math.sqrt(114 / 4 - 16)),
        "reward/min": 1.0,
        "reward/max": 10.0,
        "time/rollout_s": 2.0,
        "only_here": 1.5,
    }


def rows_of(name, values):
    return [{name: value} for value in values]


@pytest.mark.parametrize(
    ("name", "values", "warning"),
    [
        ("policy/entropy", [1.0] * 5 + [0.05] * 5, "entropy"),
        ("policy/entropy", [0.5] * 5 + [3.0] * 5, "entropy"),
        ("policy/entropy", [1.0] * 5 + [0.5] * 5, None),
        ("response/length_mean", [100.0] * 5 + [20.0] * 5, "length"),
        ("response/length_mean", [100.0] * 5 + [500.0] * 5, "length"),
        ("response/length_mean", [100.0] * 5 + [200.0] * 5, None),
        ("response/truncated_share", [0.1] * 5 + [0.4] * 5, "truncated"),
        ("group/zero_variance_share", [0.2] * 5 + [0.9] * 5, "reward_spread"),
        ("reward/std", [0.2] * 5 + [0.001] * 5, "reward_spread"),
        ("mismatch/k3", [0.1] * 5, "mismatch"),
        ("mismatch/k3", [0.1] * 4, None),  # too few rows to say anything
        ("mismatch/k3", [None] * 5, None),
    ],
)
def test_warnings(name, values, warning):
    assert list(metrics.find_warnings(rows_of(name, values))) == ([warning] if warning else [])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_appended_and_superseded_at_resume(tmp_path):
    log = run_log.RunLog(tmp_path)
    for step in (1, 2, 3, 4):
        assert log.write(step, {"reward/mean": step / 10, "policy/kl": math.nan if step == 4 else 0.0}) == (
            ["warning at step 4: policy/kl is not finite"] if step == 4 else []
        )
    rows = read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and {row["schema_version"] for row in rows} == {1}
    assert rows[3]["policy/kl"] is None and rows[3]["non_finite"] == ["policy/kl"]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')  # torn by a kill

    log = run_log.RunLog(tmp_path, resume_step=2)
    log.write(3, {"reward/mean": 0.33})
    assert [(row["step"], row["reward/mean"]) for row in read(tmp_path / "metrics.jsonl")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.33),
    ]
    moved = (tmp_path / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in moved[:2]] == [3, 4] and moved[2] == '{"step": 5, "rew'
    run_log.RunLog(tmp_path)  # a fresh start in the same folder: nothing is lost either
    assert read(tmp_path / "metrics.jsonl") == []
    assert len((tmp_path / "metrics.superseded.jsonl").read_text().splitlines()) == 6


def test_a_warning_is_said_once_and_kept_in_the_rows(tmp_path):
    log = run_log.RunLog(tmp_path)
    said = [log.write(step, {"response/truncated_share": 0.5}) for step in range(1, 27)]
    sentence = "50% of the responses end at --max_response_tokens"
    assert [i + 1 for i, lines in enumerate(said) if lines] == [5, 25]
    assert said[4] == [f"warning at step 5: {sentence}"]
    assert read(tmp_path / "metrics.jsonl")[5]["warnings"] == [sentence]


def with_frames(one: Group, kind: str) -> Group:
    frames = np.zeros((20, 30, 400, 3), np.uint8)
    frames[:, :, :, 0] = np.arange(20)[:, None, None] * 12  # the red of frame i is 12 i
    about = {"fps": 10.0, "frames_indices": list(range(0, 40, 2))}
    media = {
        "tuple": {"video": [(frames, about)]},
        "channels_first": {"video": torch.from_numpy(frames.transpose(0, 3, 1, 2).copy())},
        "image": {"image": [Image.fromarray(frames[5])]},
        "none": {},
    }[kind]
    one.prompt.vllm_prompt = {"multi_modal_data": media}
    return one


def test_sample_rollouts(tmp_path):
    log = run_log.RunLog(tmp_path)
    one = with_frames(group([1.0, 0.0], accuracy=[1, 0]), "tuple")
    one.responses[0].text = "<answer>3</answer>"
    log.write_rollouts(1, [one])
    log.write_rollouts(2, [one])
    lines = read(tmp_path / "rollouts.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert [frame["time_s"] for frame in lines[0]["frames"]] == [0.0, 0.6, 1.0, 1.6, 2.2, 2.8, 3.2, 3.8]
    assert lines[0]["responses"][0] == {
        "text": "<answer>3</answer>",
        "reward": 1.0,
        "reward_parts": {"accuracy": 1.0},
        "status": "ok",
        "extracted": None,
        "finish_reason": "stop",
        "is_demonstration": False,
        "tokens": 2,
    }
    assert len(list((tmp_path / "frames").iterdir())) == 8  # equal frames are stored once
    image = Image.open(tmp_path / "frames" / lines[0]["frames"][-1]["file"])
    assert image.size == (224, 17) and abs(image.getpixel((9, 9))[0] - 228) < 4


def test_frames_of_every_kind():
    red = {kind: run_log.frames_seen(with_frames(group([1.0]), kind).prompt, 3) for kind in ("channels_first", "image")}
    assert [int(pixels[0, 0, 0]) for pixels, _ in red["channels_first"]] == [0, 120, 228]  # 9.5 rounds to even: 10
    assert [(int(pixels[0, 0, 0]), time_s) for pixels, time_s in red["image"]] == [(60, None)]
    assert run_log.frames_seen(with_frames(group([1.0]), "none").prompt, 3) == []


def test_groups_take_turns():
    a, b, c = (group([float(i)], kind=kind) for i, kind in enumerate(["boolean", "math", "boolean"]))
    order = {step: [g.responses[0].reward for g in run_log.choose_groups([a, b, c], step, 2)] for step in range(3)}
    assert order == {0: [0.0, 1.0], 1: [1.0, 2.0], 2: [0.0, 1.0]}
    assert run_log.choose_groups([], 4, 2) == []


def test_run_info_keeps_every_start(tmp_path):
    for _ in range(2):
        run_log.write_run_info(tmp_path, {"lr": 1e-6, "data": ["a.jsonl"], "limit": math.inf, "path": tmp_path}, note=1)
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert len(starts) == 2 and starts[1]["note"] == 1
    assert starts[0]["arguments"] == {"lr": 1e-6, "data": ["a.jsonl"], "limit": "inf", "path": str(tmp_path)}
    assert starts[0]["versions"]["torch"] == torch.__version__
    assert starts[0]["git"] == "unknown" or len(starts[0]["git"].removesuffix("-dirty")) == 40
    assert socket.gethostname() not in (tmp_path / "run.json").read_text()


def test_validation_rows(tmp_path):
    one = group([1.0], accuracy=[1])
    log = run_log.RunLog(tmp_path)
    for step in (0, 5, 10):
        log.write_validation(step, {"validate/accuracy": step / 10, "validate/x": math.inf}, [one] * 9)
    rows = read(tmp_path / "validation.jsonl")
    assert [(row["step"], row["validate/accuracy"], row["non_finite"]) for row in rows][1] == (5, 0.5, ["validate/x"])
    assert len(read(tmp_path / "validation_rollouts.jsonl")) == 9
    run_log.RunLog(tmp_path, resume_step=5)
    assert [row["step"] for row in read(tmp_path / "validation.jsonl")] == [0, 5]
    run_log.RunLog(tmp_path)  # a fresh start validates before training again
    assert read(tmp_path / "validation.jsonl") == []


def test_profile(tmp_path):
    profiler = run_log.start_profiler()
    torch.ones(3, 5) @ torch.ones(5, 3)
    run_log.write_profile(profiler, tmp_path / "profile" / "step-000001.json")
    events = json.loads((tmp_path / "profile" / "step-000001.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
