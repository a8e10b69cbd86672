"""Ranks: start torch.distributed, move small things between ranks, stop together, never hang in silence.

Everything here works in one process without torch.distributed too (world size 1), so that a notebook or a test can use
the code above it. Small Python objects travel over a gloo group on the host, also on CUDA machines: they then neither
wait for the GPU nor hold it up. Large tensors use the default group (NCCL on CUDA).
"""

from __future__ import annotations

import datetime
import faulthandler
import fcntl
import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WATCHDOG_EXIT = 86  # exit status of a rank ended by the watchdog
GIB = 1024**3
_host_group: dist.ProcessGroup | None = None  # gloo, next to the NCCL default group; None where the default is gloo


def init(timeout_s: float = 1800.0, device: str = "auto") -> torch.device:
    """Start torch.distributed before DeepSpeed and vLLM do, and return this rank's device.

    gloo on "cpu", NCCL on "cuda" ("auto": CUDA if there is one). `timeout_s` is the longest a collective may wait.
    Without torchrun's variables it is one rank. No device_id is given to the process group: with it NCCL connects
    at once, and the groups that vLLM makes later are split from a communicator instead of made fresh.
    Raises ValueError for an impossible device and for more ranks on this host than GPUs.
    """
    global _host_group
    if dist.is_initialized():
        raise RuntimeError("torch.distributed is already initialised: call train.distributed.init() first")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA device on this host")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"] and sys.platform == "linux":
        # One host: gloo would otherwise look up its name, which on many machines leads nowhere, or to a slow time-out.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = datetime.timedelta(seconds=timeout_s)
    if device == "cuda":
        if local_rank() >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank()} has no GPU: this host shows {torch.cuda.device_count()}; "
                "give torchrun an --nproc_per_node of at most that"
            )
        torch.cuda.set_device(local_rank())
        dist.init_process_group("nccl", timeout=timeout)
        _host_group = dist.new_group(backend="gloo", timeout=timeout)
        return torch.device("cuda", local_rank())
    dist.init_process_group("gloo", timeout=timeout)
    return torch.device("cpu")


def init_deepspeed(device: torch.device) -> None:
    """deepspeed.init_distributed on the group that init() started.

    On CPU its shared-memory op is switched off: it would be compiled with g++ and ninja at start (70 s), and gloo does.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)


def shutdown() -> None:
    """End torch.distributed on this rank; call it last, after the engines are gone."""
    global _host_group
    _host_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """True on the one rank that writes files and the console."""
    return rank() == 0


# ---- small things between ranks ----------------------------------------------------------------------------------


def all_gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank. Pickled: for small things."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value, group=_host_group)
    return gathered


def broadcast_object(value: Any, source: int = 0) -> Any:
    """`value` of rank `source`, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, group=_host_group)
    return box[0]


def all_reduce_sum(values: dict[str, float] | torch.Tensor) -> dict[str, float] | torch.Tensor:
    """Sum over ranks. A tensor (any shape, the same on all ranks) gives a new tensor. A dict of numbers gives a dict
    over the union of the ranks' keys: a rank that lacks a key adds nothing.

    Dicts are summed by math.fsum, so the result has the same bits on every rank and does not depend on their order.
    """
    if isinstance(values, torch.Tensor):
        total = values.clone()
        if world_size() > 1:
            dist.all_reduce(total)
        return total
    rows = all_gather_objects({key: float(value) for key, value in values.items()})
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: math.fsum(row[key] for row in rows if key in row) for key in keys}


def barrier(reason: str, timeout_s: float = 1800.0) -> None:
    """Wait until every rank is here. Raises RuntimeError naming the reason and the ranks that did not come in time."""
    if world_size() == 1:
        return
    try:
        dist.monitored_barrier(_host_group, datetime.timedelta(seconds=timeout_s), wait_all_ranks=True)
    except RuntimeError as error:
        raise RuntimeError(f"rank {rank()} waited {timeout_s:g} s for all ranks to {reason}: {error}") from error


def raise_together(error: str | None, what: str) -> None:
    """Collective: if any rank hands in an error, every rank raises RuntimeError with all of them; else nothing.

    A rank that raised alone would leave the others waiting in their next collective.
    """
    errors = [f"rank {i}: {text}" for i, text in enumerate(all_gather_objects(error)) if text]
    if errors:
        raise RuntimeError(f"{what} failed on {len(errors)} of {world_size()} ranks\n" + "\n".join(errors))


# ---- watchdog ----------------------------------------------------------------------------------------------------


class Watchdog:
    """Ends the run when a phase exceeds its limit, after every rank has printed its phase and its Python stacks.

    `with watchdog.phase("rollout"):` announces what this rank does; phases may nest, and each keeps its own limit:
    `limits_s[name]`, else `default_limit_s` (0 = no limit). A thread per rank looks once per `poll_s`. The first rank
    to exceed a limit says so in the run's key-value store, the others see it there, and each writes its stacks to
    stderr before it leaves with status WATCHDOG_EXIT. A rank whose interpreter is stuck in C code with the lock held
    cannot run that thread: for it, faulthandler's own timer fires `grace_s` later.
    """

    def __init__(
        self,
        limits_s: dict[str, float] | None = None,
        *,
        default_limit_s: float = 1800.0,
        poll_s: float = 1.0,
        grace_s: float = 30.0,
    ):
        self.limits_s = limits_s or {}
        self.default_limit_s = default_limit_s
        self.poll_s = poll_s
        self.grace_s = grace_s
        self.stack: tuple[tuple[str, float, float], ...] = ()  # (name, limit_s, monotonic start), outermost first
        self.store = self._connect()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def _connect(self) -> dist.Store | None:
        """A connection of its own: the default group's is busy while a collective waits in it."""
        if world_size() == 1:
            return None
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=30),
        )
        return dist.PrefixStore("reelrl_watchdog", store)

    @contextmanager
    def phase(self, name: str, limit_s: float | None = None) -> Iterator[None]:
        limit_s = self.limits_s.get(name, self.default_limit_s) if limit_s is None else limit_s
        outer = self.stack
        self.stack = (*outer, (name, limit_s, time.monotonic()))
        self._arm()
        try:
            yield
        finally:
            self.stack = outer
            self._arm()

    def close(self) -> None:
        """Stop watching; call it before the engines are taken down."""
        self.stack = ()
        self.stop.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        left = [start + limit - time.monotonic() for _, limit, start in self.stack if limit > 0]
        if left:
            faulthandler.dump_traceback_later(max(min(left), 0) + self.grace_s, exit=True, file=sys.__stderr__)

    def _watch(self) -> None:
        published = None
        while not self.stop.wait(self.poll_s):
            stack, now = self.stack, time.monotonic()
            overdue = [(n, lim, now - start) for n, lim, start in stack if lim > 0 and now - start > lim]
            news = ""
            try:
                if self.store is not None and stack != published:
                    since = [(n, time.time() - (now - start)) for n, _, start in stack]
                    self.store.set(f"phase/{rank()}", json.dumps(since))
                    published = stack
                if self.store is not None and self.store.check(["fired"]):
                    news = self.store.get("fired").decode()
                if overdue and not news:
                    name, limit, spent = overdue[0]
                    news = f"rank {rank()} spent {spent:.0f} s in phase {name!r} (limit {limit:g} s)"
                    if self.store is not None:
                        self.store.set("fired", news)
                        news += "\n" + self._phases()
            except RuntimeError as error:  # the store's host is gone: this rank goes on watching itself
                _to_stderr(f"watchdog on rank {rank()}: no connection to the other ranks any more ({error})")
                self.store = None
            if news:
                self._fire(news, stack, now)

    def _phases(self) -> str:
        lines = []
        for i in range(world_size()):
            key = f"phase/{i}"
            stack = json.loads(self.store.get(key)) if self.store.check([key]) else []
            text = " > ".join(f"{name} ({time.time() - start:.0f} s)" for name, start in stack) or "no phase"
            lines.append(f"  rank {i}: {text}")
        return "\n".join(lines)

    def _fire(self, news: str, stack: tuple, now: float) -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        own = " > ".join(f"{name} ({now - start:.0f} s)" for name, _, start in stack) or "no phase"
        lines = [f"watchdog: {news}", f"rank {rank()} is in: {own}; its Python stacks:"]
        for ident, frame in sys._current_frames().items():
            if ident != threading.get_ident():
                lines.append(f"--- rank {rank()}, thread {names.get(ident, ident)}")
                lines.extend(line.rstrip() for line in traceback.format_stack(frame))
        _to_stderr("\n".join(lines))
        self._wait_for_reports()
        os._exit(WATCHDOG_EXIT)

    def _wait_for_reports(self) -> None:
        """torchrun kills the other ranks once one has left: stay until all have printed, or for ten polls."""
        try:
            written = self.store.add("reports", 1) if self.store is not None else world_size()
            last = time.monotonic() + 10 * self.poll_s
            while written < world_size() and time.monotonic() < last:
                time.sleep(self.poll_s / 10)
                written = self.store.add("reports", 0)
        except RuntimeError:  # the rank that hosts the store has left already
            pass


def _to_stderr(text: str) -> None:
    """One write, so that the ranks' reports do not mix; past Python's buffers, so that os._exit loses nothing."""
    os.write(2, (text + "\n").encode(errors="replace"))


# ---- stopping on request -----------------------------------------------------------------------------------------


class StopSignal:
    """SIGTERM, SIGUSR1 or a file named `stop` in the run folder: finish the step, save, exit 0.

    The handler only notes the request; `agreed()` once per step makes all ranks take the same decision, so one rank
    that got the signal is enough. A second signal of the same kind acts as it normally would (it ends the process).
    torchrun passes SIGTERM on and kills after 30 s; where a step is longer, use SIGUSR1 on a rank, or the file.
    """

    def __init__(self, stop_file: str | Path | None = None):
        self.stop_file = Path(stop_file) if stop_file else None
        self.received: str | None = None
        if self.stop_file is not None and is_main():
            self.stop_file.unlink(missing_ok=True)  # left by an earlier run, it would stop this one after a step
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def agreed(self) -> str | None:
        """Collective. Why to stop ("SIGTERM on rank 1"), or None."""
        reason = self.received
        if reason is None and self.stop_file is not None and is_main() and self.stop_file.exists():
            reason = f"file {self.stop_file}"
            self.stop_file.unlink(missing_ok=True)  # heeded: the same command goes on
        reasons = [f"{text} on rank {i}" for i, text in enumerate(all_gather_objects(reason)) if text]
        return reasons[0] if reasons else None


# ---- the run folder ----------------------------------------------------------------------------------------------


def lock_run(folder: str | Path) -> Any:
    """Collective. Hold the run folder for this run; keep the returned file, the lock ends with the process.

    Rank 0 takes a POSIX lock, which works on NFS too and goes away with a killed process. Raises RuntimeError on every
    rank, naming who holds the folder.
    """
    handle, error = None, None
    if is_main():
        path = Path(folder) / "lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+")  # noqa: SIM115 - open for as long as the run lasts
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            holder = handle.read().strip() or "an unknown process"
            error = (
                f"{folder} is in use by another run ({holder}). Wait for it, stop it, or choose another --output_dir"
            )
        else:
            handle.truncate(0)
            handle.write(f"pid {os.getpid()}, started {datetime.datetime.now().isoformat(timespec='seconds')}\n")
            handle.flush()
    raise_together(error, "locking the run folder")
    return handle


def check_free_disk(folder: str | Path, needed_bytes: int, reason: str) -> None:
    """Raises OSError if the file system of `folder` (which need not exist yet) has fewer than `needed_bytes` free."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise OSError(
            f"{reason} needs {needed_bytes / GIB:.2f} GiB in {folder}, but only {free / GIB:.2f} GiB are free: "
            "delete old checkpoints, lower --keep_last, or choose another --output_dir"
        )
