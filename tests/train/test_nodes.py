"""Two "nodes" on one host: two torchrun agents that meet at an address, each with one rank, as on two machines."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train import run_main


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_agents_equal_one_agent_with_two_ranks(tmp_path):
    """Every figure of two real steps that is not a time, and the weights; text, image and video, two updates per step."""
    playground = run_main.make_playground(tmp_path / "playground")
    flags = ("--max_steps", "2", "--prompts_per_update", "2", "--check_parity")
    one, two = tmp_path / "one", tmp_path / "two"
    run_main.run(playground, one, *flags)
    command = run_main.command(playground, two, *flags)
    program = command[command.index("train/main.py") :]
    place = {"NNODES": "2", "RANKS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place |= {"REELRL_VENV": sys.prefix, "JOIN_TIMEOUT_S": "300"}
    agents, logs = [], []
    try:
        for node in range(2):
            log = tmp_path / f"node{node}.log"
            settings = {**run_main.environment(), **place, "NODE_RANK": str(node)}
            launch = ["bash", "scripts/torchrun_nodes.sh", *program]
            out = {"stdout": log.open("w"), "stderr": subprocess.STDOUT, "start_new_session": True}
            agents.append(subprocess.Popen(launch, cwd=run_main.ROOT, env=settings, **out))
            logs.append(log)
        for agent, log in zip(agents, logs):
            assert agent.wait(timeout=800) == 0, log.read_text()[-4000:]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, 9)
                agent.wait()
    assert "done after step 2" in logs[0].read_text() and "done after step" not in logs[1].read_text()  # rank 0 speaks
    assert run_main.metrics(two, reproducible=True) == run_main.metrics(one, reproducible=True)
    weights = [load_file(Path(run) / "final" / "model.safetensors") for run in (one, two)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    shards = sorted(path.name for path in (two / "checkpoints" / "step-000002" / "zero" / "state").glob("*optim*"))
    assert [name.split("_mp")[0][-1] for name in shards] == ["0", "1"]
