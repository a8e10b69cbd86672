"""Scoring in processes of its own, while generation goes on: each response has a time limit, a killed worker costs
that response its score and nothing else.

    pool = ScoringPool.from_args(args)                   # before CUDA and before vLLM
    future = pool.submit("math", text, "42", {})
    future.result()                                      # Score

Workers are fresh interpreters (no fork, no re-import of the program) without torch and without a GPU. Results do not
depend on which worker takes which response.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from collections import Counter
from concurrent.futures import Future
from typing import Any

from data.records import canonical_problem_type
from rewards import Score
from rewards.custom import load_reward
from rewards.judge import Judge
from rewards.killable import Child, Killed

JUDGED = ("open-ended",)


class ScoringPool:
    """`workers` processes; `timeout_s` per response. `counts` has statuses, timeouts and crashes so far."""

    def __init__(
        self,
        workers: int = 2,
        timeout_s: float = 20.0,
        mode: str = "auto",
        reward: str | None = None,
        reward_args: str | None = None,
        judge_url: str | None = None,
        judge_model: str | None = None,
    ):
        if workers < 1 or timeout_s <= 0:
            raise ValueError(f"--reward_workers must be >= 1 and --reward_timeout_s > 0, got {workers}, {timeout_s}")
        if reward:
            load_reward(reward, reward_args)  # a wrong path or signature is an error here, not in a worker
        self.timeout_s, self.counts, self.lock = timeout_s, Counter(), threading.Lock()
        self.judge = Judge(url=judge_url, model=judge_model) if judge_url else None
        self.settings = {"mode": mode, "reward": reward, "reward_args": reward_args}
        self.tasks: queue.SimpleQueue = queue.SimpleQueue()
        self.children = [Child("score") for _ in range(workers)]
        self.judging: queue.SimpleQueue = queue.SimpleQueue()
        self._start(self.children[0])  # a missing library is an error now
        self.threads = [threading.Thread(target=self._serve, args=(child,), daemon=True) for child in self.children]
        if self.judge:
            self.threads += [threading.Thread(target=self._grade, daemon=True) for _ in range(self.judge.concurrency)]
        for thread in self.threads:
            thread.start()

    @classmethod
    def from_args(cls, args: Any) -> ScoringPool:
        """From the flags of train/args.py; the format asked for is the prompt's style."""
        return cls(
            workers=args.reward_workers,
            timeout_s=args.reward_timeout_s,
            mode=args.style,
            reward=args.reward,
            reward_args=args.reward_args,
            judge_url=args.judge_url,
            judge_model=args.judge_model,
        )

    def submit(self, problem_type: str, response_text: Any, ground_truth: Any, extra: dict[str, Any]) -> Future:
        """A future whose result() is the Score. Never blocks."""
        return self.submit_many([(problem_type, response_text, ground_truth, extra)])[0]

    def submit_many(self, rows: list[tuple[str, Any, Any, dict[str, Any]]]) -> list[Future]:
        """The rows go to one worker together: a reward per batch sees exactly these."""
        jobs = [
            {"problem_type": kind, "response": response, "gold": gold, "extra": extra}
            for kind, response, gold, extra in rows
        ]
        return self.submit_jobs(jobs)

    def submit_jobs(self, jobs: list[dict[str, Any]], reasons: bool = False) -> list[Future]:
        """As submit_many, for jobs of rewards.rows; with `reasons` a result is (Score, why the gold is bad)."""
        futures = [Future() for _ in jobs]
        self.tasks.put((jobs, futures, reasons))
        return futures

    def close(self) -> None:
        """Ends workers and threads. Responses still waiting are scored as crashed."""
        for _ in self.children:
            self.tasks.put(None)
        for _ in range(self.judge.concurrency if self.judge else 0):
            self.judging.put(None)
        for thread in self.threads:
            thread.join(timeout=self.timeout_s + 5)
        for child in self.children:
            child.kill()

    def __enter__(self) -> ScoringPool:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _start(self, child: Child) -> None:
        child.start()
        child.wait_ready()
        child.send(self.settings)

    def _serve(self, child: Child) -> None:
        while (task := self.tasks.get()) is not None:
            jobs, futures, reasons = task
            done = 0
            while done < len(jobs):
                # A reward per batch is called once: a kill costs the whole batch.
                done += self._run(child, jobs[done:], futures[done:], reasons)

    def _run(self, child: Child, jobs: list[dict[str, Any]], futures: list[Future], reasons: bool) -> int:
        """How many of the jobs have a result now: all, or those up to and including the one that killed the worker."""
        reason = "crash"
        done = 0
        try:
            if child.process is None or child.process.poll() is not None:
                self._start(child)
            child.send(jobs)
            while done < len(jobs):
                line = child.read(self.timeout_s)
                if line == "begin":
                    continue
                if line is None:
                    raise Killed("crash")
                if "error" in line:
                    futures[done].set_exception(ValueError(line["error"]))
                    done += 1
                    continue
                bad = line.pop("bad_gold")
                self._finish(jobs[done], futures[done], Score(**line), (bad,) if reasons else None)
                done += 1
            return done
        except Killed as error:
            reason = error.reason
        except BrokenPipeError:
            pass
        child.kill()
        status = "timeout" if reason == "timeout" else "killed"
        print(f"scoring worker {status} on a {jobs[done]['problem_type']} response: it scores 0", file=sys.stderr)
        self._finish(jobs[done], futures[done], Score(0.0, 0.0, status), (None,) if reasons else None)
        return done + 1

    def _finish(self, job: dict[str, Any], future: Future, score: Score, extra: tuple | None) -> None:
        if self.judge and score.extracted is not None and self._judged(job):
            self.judging.put((job, future, score, extra))
            return
        with self.lock:
            self.counts[score.status] += 1
        future.set_result((score, *extra) if extra else score)

    def _judged(self, job: dict[str, Any]) -> bool:
        kind = canonical_problem_type(job["problem_type"])
        return kind in JUDGED and job["extra"].get("answer_kind") in (None, "text")

    def _grade(self) -> None:
        while (task := self.judging.get()) is not None:
            job, future, score, extra = task
            question = str(job["extra"].get("question") or job["extra"].get("problem") or "")
            verdict = self.judge.grade(question, str(job["gold"]), score.extracted)
            failed = verdict == "failed"
            score = Score(
                0.0 if failed else float(verdict), score.format, "judge_failed" if failed else "ok", score.extracted
            )
            with self.lock:
                self.counts[score.status] += 1
            future.set_result((score, *extra) if extra else score)


def serve_scores(lines: Any, answer: Any) -> None:
    """The worker's loop, in rewards/child.py: settings first, then lists of jobs; one JSON line per job."""
    from rewards.rows import score_job, warm

    settings = json.loads(next(lines))
    own = load_reward(settings["reward"], settings["reward_args"]) if settings["reward"] else None
    for line in lines:
        jobs = json.loads(line)
        if own:
            for row in _own_scores(own, jobs, settings["mode"]):
                answer(row)
            continue
        for job in jobs:
            if warm(job["problem_type"]):
                answer("begin")
            score, bad = score_job(job, settings["mode"])
            answer({**score.__dict__, "bad_gold": bad})


def _own_scores(own: Any, jobs: list[dict[str, Any]], mode: str) -> Any:
    from rewards.format import format_mode, format_reward

    rows = [(job["response"], job["gold"], {**job["extra"], "problem_type": job["problem_type"]}) for job in jobs]
    groups = [rows] if own.batch else [[row] for row in rows]
    place = 0
    for group in groups:
        failure = None
        try:
            results = own(group)
        # The user's own code may raise anything: it ends the run by name, and never scores 0.
        except Exception as error:
            failure = error
        if failure is not None:
            text, last = str(failure), traceback.extract_tb(failure.__traceback__)[-1]
            if not text.startswith("--reward"):
                text = f"--reward raised {type(failure).__name__}: {text} ({last.filename}:{last.lineno})"
            results = [{"error": text}] * len(group)
        for result in results:
            if "error" not in result and result["format"] is None:
                extra = jobs[place]["extra"]
                asked, prefilled = format_mode(extra, mode), extra.get("think_prefilled") is True
                result["format"] = format_reward(jobs[place]["response"], asked, prefilled)
            place += 1
            yield result if "error" in result else {**result, "bad_gold": None}


def workers_for_all_cores() -> int:
    """One worker per core this process may use."""
    return max(1, len(os.sched_getaffinity(0)))
