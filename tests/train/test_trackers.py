"""Trackers get what they are told, against stand-ins that keep it; the console speaks plainly without a terminal."""

import io
import json
import sys
import types

import pytest

from train import trackers

ROW = {"reward/mean": 0.5, "policy/kl": None, "warnings": ["x"], "time/step_s": 4.0, "time/update_s": 3.0}


def run(tmp_path, resume_step=0):
    return trackers.Run("videos", "first", tmp_path, {"lr": 1e-6}, resume_step)


def stand_in(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_unknown_and_missing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--log_to knows tensorboard, wandb, mlflow, swanlab; got visdom"):
        trackers.start(["visdom"], run(tmp_path))
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    for ask in (lambda: trackers.start(["wandb"], run(tmp_path)), lambda: trackers.check(["wandb"])):
        with pytest.raises(RuntimeError, match=r"--log_to wandb needs .*pip install wandb, or leave wandb out"):
            ask()
    assert trackers.start([], run(tmp_path)) == []


def test_only_rank_0_starts_trackers(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert trackers.start(["wandb"], run(tmp_path)) == []


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    calls = []

    class Live:
        id = "abc123"

        def log(self, row):
            calls.append(("log", row))

        def define_metric(self, name, step_metric=None):
            calls.append(("axis", name, step_metric))

        def finish(self):
            calls.append(("finish",))

    stand_in(monkeypatch, "wandb", init=lambda **given: calls.append(("init", given)) or Live())
    for _ in range(2):
        (tracker,) = trackers.start(["wandb", "wandb"], run(tmp_path))
        tracker.log(3, ROW)
        tracker.close()
    starts = [call[1] for call in calls if call[0] == "init"]
    assert [start["id"] for start in starts] == [None, "abc123"]
    assert starts[0]["config"] == {"lr": 1e-6} and starts[0]["project"] == "videos"
    assert ("axis", "*", "step") in calls
    assert ("log", {"reward/mean": 0.5, "time/step_s": 4.0, "time/update_s": 3.0, "step": 3}) in calls
    assert calls[-1] == ("finish",)


def test_mlflow(tmp_path, monkeypatch):
    calls = []
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    stand_in(
        monkeypatch,
        "mlflow",
        set_tracking_uri=lambda uri: calls.append(("uri", uri)),
        set_experiment=lambda name: calls.append(("experiment", name)),
        start_run=lambda run_id, run_name: (
            calls.append(("start", run_id, run_name)) or types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
        ),
        log_params=lambda params: calls.append(("params", params)),
        log_metrics=lambda row, step: calls.append(("metrics", row, step)),
        end_run=lambda: calls.append(("end",)),
    )
    for _ in range(2):
        (tracker,) = trackers.start(["mlflow"], run(tmp_path))
        tracker.log(7, {"reward/mean": 0.25})
        tracker.close()
    assert calls[0] == ("uri", (tmp_path / "mlflow").resolve().as_uri())  # a folder, no server
    assert [call for call in calls if call[0] == "start"] == [("start", None, "first"), ("start", "r1", None)]
    assert [call for call in calls if call[0] == "params"] == [("params", {"lr": "1e-06"})]
    assert ("metrics", {"reward/mean": 0.25}, 7) in calls


def test_swanlab_and_tensorboard(tmp_path, monkeypatch):
    calls = []
    stand_in(
        monkeypatch,
        "swanlab",
        init=lambda **given: calls.append(given) or types.SimpleNamespace(id="s9"),
        log=lambda row, step: calls.append((row, step)),
        finish=lambda: None,
    )
    (tracker,) = trackers.start(["swanlab"], run(tmp_path))
    tracker.log(2, {"reward/mean": 1.0})
    assert calls[0]["experiment_name"] == "first" and calls[1] == ({"reward/mean": 1.0}, 2)
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"swanlab": "s9"}

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_text(self, name, text):
            calls.append((name, text))

        def add_scalar(self, *given):
            calls.append(given)

        def flush(self):
            pass

        def close(self):
            calls.append("closed")

    stand_in(monkeypatch, "torch.utils.tensorboard", SummaryWriter=Writer)
    (tracker,) = trackers.start(["tensorboard"], run(tmp_path, resume_step=4))
    tracker.log(5, {"reward/mean": 1.0})
    tracker.close()
    assert calls[2:] == [
        (str(tmp_path / "tensorboard"), 5),  # steps of the superseded part are purged
        ("arguments", "    lr: 1e-06"),
        ("reward/mean", 1.0, 5),
        "closed",
    ]


def test_plain_lines_without_a_terminal():
    out = io.StringIO()
    console = trackers.Console(total_steps=20, plain_every_s=0, file=out)
    with console.phase("rollout", total=8) as advance:
        advance(3)
        advance()
    console.step(2, ROW | {"perf/tokens_per_s": 12345.6})
    console.say("[done]")
    console.close()
    assert out.getvalue().splitlines() == [
        "rollout: 3 of 8",
        "rollout: 4 of 8",
        "step 2/20  reward 0.500  tokens/s 12,346  4.0 s (update 3.0)",
        "[done]",
    ]


def test_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    console = trackers.Console(total_steps=20, start_step=5, file=out)
    assert console.progress.tasks[0].completed == 5
    with console.phase("rollout", total=8) as advance:
        advance(3)
        assert console.progress.tasks[1].completed == 3
    console.step(6, ROW)
    assert console.progress.tasks[0].completed == 6 and len(console.progress.tasks) == 1
    console.close()
    assert "step 6/20  reward 0.500" in out.getvalue()


def test_other_ranks_are_silent(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    out = io.StringIO()
    console = trackers.Console(total_steps=20, plain_every_s=0, file=out)
    with console.phase("rollout") as advance:
        advance()
    console.step(1, ROW)
    console.close()
    assert out.getvalue() == ""
