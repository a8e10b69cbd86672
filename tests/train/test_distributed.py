"""Ranks: real gloo processes, a real hang, real signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from train import distributed

ROOT = Path(__file__).resolve().parents[2]


def start_ranks(body: str, n: int = 2, **env: str) -> list[subprocess.Popen]:
    """`body` as a program on n ranks that meet over gloo, without torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    head = f"import json, os, sys, time, torch\nsys.path[0] = {str(ROOT)!r}\nfrom train import distributed as d\n"
    common = dict(
        os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(n), OMP_NUM_THREADS="1", **env
    )
    return [
        subprocess.Popen(
            [sys.executable, "-c", head + textwrap.dedent(body)],
            env=dict(common, RANK=str(i), LOCAL_RANK=str(i)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(n)
    ]


def finish(ranks: list[subprocess.Popen], timeout_s: float = 60) -> list[tuple[int, str, str]]:
    """(exit status, stderr, stdout) of each."""
    try:
        return [(*rank.communicate(timeout=timeout_s), rank.returncode)[::-1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def test_exchanges_between_two_ranks(tmp_path):
    body = """
    d.init(timeout_s=30, device="cpu")
    mine = {"a": 0.1 + d.rank(), "only_%d" % d.rank(): 5.0}
    out = {
        "dict": d.all_reduce_sum(mine),
        "tensor": d.all_reduce_sum(torch.arange(3.0) * (d.rank() + 1)).tolist(),
        "gathered": d.all_gather_objects(["rank", d.rank()]),
        "broadcast": d.broadcast_object("from %d" % d.rank(), source=1),
        "main": d.is_main(),
    }
    d.barrier("print their results")
    d.raise_together(None, "nothing")
    try:
        d.raise_together("bad video 7.mp4" if d.rank() == 1 else None, "reading")
    except RuntimeError as error:
        out["error"] = str(error)
    if d.rank() == 0:
        try:
            d.barrier("load the model", timeout_s=0.5)
        except RuntimeError as error:
            out["barrier"] = str(error)
    else:
        time.sleep(1)
    print(json.dumps(out), flush=True)
    os._exit(0)
    """
    ranks = finish(start_ranks(body))
    assert [code for code, _, _ in ranks] == [0, 0], ranks
    first, second = (json.loads(out) for _, _, out in ranks)
    assert first["main"] and not second["main"]
    assert "rank 0 waited 0.5 s for all ranks to load the model" in first["barrier"]
    assert "Ranks 1 failed" in first["barrier"]
    for seen in (first, second):
        assert seen["dict"] == {"a": 1.2000000000000002, "only_0": 5.0, "only_1": 5.0}  # fsum(0.1, 1.1)
        assert seen["tensor"] == [0.0, 3.0, 6.0]
        assert seen["gathered"] == [["rank", 0], ["rank", 1]]
        assert seen["broadcast"] == "from 1"
        assert seen["error"] == "reading failed on 1 of 2 ranks\nrank 1: bad video 7.mp4"


def test_ranks_that_find_other_checkpoints_all_stop_with_what_each_finds(tmp_path):
    """As on two nodes whose --output_dir is not the same folder: one of them would begin anew, and both wait for ever."""
    for rank, names in enumerate((("step-000002", "step-000004"), ("step-000002",))):
        for name in names:
            folder = tmp_path / str(rank) / "checkpoints" / name
            folder.mkdir(parents=True)
            (folder / "complete.json").write_text('{"resumable": true, "files": {}}')
    body = f"""
    from train.checkpoint import find_together
    d.init(timeout_s=30, device="cpu")
    root = {str(tmp_path)!r}
    out = [find_together(root + "/0", "auto").name, find_together(root + "/nowhere", "auto")]
    named = "%s/0/checkpoints/step-00000%d" % (root, 2 + d.rank())
    for place, resume in ((str(d.rank()), "auto"), ("0", named), ("0", "absent")):
        try:
            find_together(root + "/" + place, resume)
        except (RuntimeError, FileNotFoundError) as error:
            out.append(type(error).__name__ + ": " + str(error))
    print(json.dumps(out), flush=True)
    os._exit(0)
    """
    ranks = finish(start_ranks(body))
    assert [code for code, _, _ in ranks] == [0, 0], ranks
    for rank, (_, _, out) in enumerate(ranks):
        same, none, other, named, absent = json.loads(out)
        assert (same, none) == ("step-000004", None)
        assert other.startswith(
            f"RuntimeError: the ranks do not find the same checkpoint in --output_dir {tmp_path}/{rank}"
        )
        assert other.endswith("rank 0: step-000004; rank 1: step-000002")
        assert "rank 0: step-000002; rank 1: --resume" in named and "step-000003: not a complete checkpoint" in named
        assert absent.startswith("FileNotFoundError: --resume absent: not a complete checkpoint")


def test_watchdog_prints_every_rank_and_exits():
    body = """
    d.init(timeout_s=60, device="cpu")
    dog = d.Watchdog({"rollout": 1.0}, default_limit_s=60, poll_s=0.1)
    def stuck_in_decoding():
        time.sleep(60)
    with dog.phase("step"):
        if d.rank() == 1:
            with dog.phase("rollout"):
                stuck_in_decoding()
        else:
            with dog.phase("update"):
                torch.distributed.barrier()
    """
    ranks = finish(start_ranks(body))
    assert ranks[1][0] == distributed.WATCHDOG_EXIT, ranks
    assert ranks[0][0] in (distributed.WATCHDOG_EXIT, 1)  # 1: its barrier saw the other leave before it left itself
    waiting, stuck = ranks[0][1], ranks[1][1]
    assert "rank 1 spent 1 s in phase 'rollout' (limit 1 s)" in stuck
    assert "rank 0: step (" in stuck and "> update (" in stuck  # the table of all ranks
    assert "stuck_in_decoding" in stuck and "MainThread" in stuck
    assert "rank 1 spent 1 s in phase 'rollout'" in waiting
    assert "rank 0 is in: step (" in waiting and "barrier" in waiting


def test_watchdog_fires_while_the_interpreter_is_stuck_in_c():
    body = """
    import ctypes
    dog = d.Watchdog(default_limit_s=0.2, poll_s=0.1, grace_s=0.5)
    with dog.phase("native"):
        ctypes.PyDLL(None).sleep(20)  # PyDLL keeps the interpreter lock: no Python thread runs
    """
    began = time.monotonic()
    code, err, _ = finish(start_ranks(body, n=1))[0]
    assert code != 0 and "Timeout" in err and "most recent call first" in err
    assert time.monotonic() - began < 19


def test_watchdog_lets_quick_phases_pass():
    dog = distributed.Watchdog({"free": 0}, default_limit_s=30, poll_s=0.02)
    with dog.phase("outer"):
        with dog.phase("free"):
            time.sleep(0.1)
        assert [name for name, _, _ in dog.stack] == ["outer"]
    assert dog.stack == ()
    dog.close()
    assert not dog.thread.is_alive()


def test_a_signal_to_one_rank_stops_both_with_status_0():
    body = """
    d.init(timeout_s=30, device="cpu")
    stop = d.StopSignal()
    print("ready", flush=True)
    for step in range(2000):
        reason = stop.agreed()
        if reason:
            print("step", step, reason)
            break
        time.sleep(0.01)
    d.shutdown()
    sys.exit(0 if reason else 1)
    """
    ranks = start_ranks(body)
    assert [rank.stdout.readline() for rank in ranks] == ["ready\n"] * 2
    ranks[1].send_signal(signal.SIGUSR1)
    ends = finish(ranks)
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert ends[0][2] == ends[1][2]  # the same step, the same reason
    assert "SIGUSR1 on rank 1" in ends[0][2]


def test_stop_file_and_sigterm(tmp_path):
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        (tmp_path / "stop").touch()  # left by an earlier run
        stop = distributed.StopSignal(tmp_path / "stop")
        assert stop.agreed() is None
        (tmp_path / "stop").touch()
        assert stop.agreed() == f"file {tmp_path}/stop on rank 0"
        assert not (tmp_path / "stop").exists()  # the next start is not stopped by it
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() == "SIGTERM on rank 0"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one ends the process
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def test_lock_is_exclusive_and_ends_with_a_killed_process(tmp_path):
    body = f"""
    lock = d.lock_run({str(tmp_path)!r})
    print("held", flush=True)
    time.sleep(60)
    """
    holder = start_ranks(body, n=1)[0]
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RuntimeError, match=rf"in use by another run \(pid {holder.pid}, started .*--output_dir"):
        distributed.lock_run(tmp_path)
    holder.kill()
    holder.communicate()
    distributed.lock_run(tmp_path).close()


def test_free_disk(tmp_path):
    distributed.check_free_disk(tmp_path / "not" / "yet", 1, "a save")
    with pytest.raises(OSError, match=r"a save needs 1073741824\.00 GiB .* only [0-9.]+ GiB are free.*--keep_last"):
        distributed.check_free_disk(tmp_path / "not" / "yet", 2**60, "a save")


def test_one_process_needs_no_start():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.all_reduce_sum({"a": 2}) == {"a": 2.0}
    given = torch.ones(2)
    assert distributed.all_reduce_sum(given) is not given
    assert distributed.broadcast_object("x") == "x"
    with pytest.raises(ValueError, match="auto, cpu or cuda"):
        distributed.init(device="tpu")
