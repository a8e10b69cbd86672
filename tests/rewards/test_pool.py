"""The scoring pool: same scores as in process, in order, and a killed worker costs one response."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest

from rewards import score
from rewards.custom import load_reward
from rewards.pool import ScoringPool

ROWS = [
    ("multiple choice", f"<answer>{letter}</answer>", "B", {"options": ["A. x", "B. y", "C. z"]}) for letter in "ABCAB"
] + [("numerical", f"<answer>{n}</answer>", 3, {}) for n in range(5)]


@pytest.fixture(scope="module")
def pool():
    with ScoringPool(workers=2, timeout_s=30) as made:
        yield made


def test_same_scores_as_in_process_and_in_order(pool):
    want = [score(*row) for row in ROWS]
    futures = [pool.submit(*row) for row in ROWS] + pool.submit_many(ROWS)
    assert [future.result(60) for future in futures] == want + want


def test_bad_gold_and_odd_inputs_are_scores_too(pool):
    assert pool.submit("numerical", "<answer>3</answer>", "abc", {}).result(60).status == "bad_ground_truth"
    assert pool.submit("numerical", None, "3", {}).result(60).accuracy == 0
    assert pool.submit("no such type", "x", "3", {}).result(60).status == "bad_ground_truth"
    assert pool.submit("math", "<answer>1/2</answer>", "0.5", {}).result(120).accuracy == 1


CUSTOM = """
import os, time

def one(response, ground_truth, extra, bonus=0.0):
    if response == "die":
        os._exit(3)
    if response == "sleep":
        time.sleep(60)
    if response == "nan":
        return float("nan")
    return {"accuracy": float(response == ground_truth) * 0.5 + bonus, "extracted": extra["problem_type"]}

def many(responses, ground_truths, extras):
    best = max(len(response) for response in responses)
    return [float(len(response) == best) for response in responses]

def wrong(text, gold):
    return 1.0

async def later(response, ground_truth, extra):
    return 1.0
"""


@pytest.fixture(scope="module")
def rewards_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "my_rewards.py"
    path.write_text(CUSTOM)
    return str(path)


def test_a_killed_worker_costs_only_its_response(rewards_file, capfd):
    with ScoringPool(workers=2, timeout_s=2, reward=f"{rewards_file}:one", reward_args='{"bonus": 0.25}') as pool:
        texts = ["a", "die", "b", "sleep", "a", "a"]
        got = [future.result(90) for future in pool.submit_many([("ocr", text, "a", {}) for text in texts])]
        assert [item.accuracy for item in got] == [0.75, 0, 0.25, 0, 0.75, 0.75]
        assert [item.status for item in got] == ["ok", "killed", "ok", "timeout", "ok", "ok"]
        assert pool.counts == {"ok": 4, "killed": 1, "timeout": 1}
        assert got[0].extracted == "ocr"
        with pytest.raises(ValueError, match="finite"):
            pool.submit("ocr", "nan", "a", {}).result(60)
    assert capfd.readouterr().err.count("it scores 0") == 2


def test_a_worker_killed_from_outside_is_replaced():
    with ScoringPool(workers=1, timeout_s=30) as pool:
        assert pool.submit(*ROWS[1]).result(60).accuracy == 1
        os.kill(pool.children[0].process.pid, signal.SIGKILL)
        time.sleep(0.2)
        results = [pool.submit(*ROWS[1]).result(60) for _ in range(2)]
        assert results[-1].accuracy == 1


def test_a_batch_reward_sees_the_batch(rewards_file):
    with ScoringPool(workers=2, timeout_s=30, reward=f"{rewards_file}:many") as pool:
        rows = [("ocr", text, "x", {}) for text in ("a", "abc", "ab")]
        assert [future.result(60).accuracy for future in pool.submit_many(rows)] == [0, 1, 0]
        assert pool.submit(*rows[0]).result(60).accuracy == 1


@pytest.mark.parametrize(
    ("spec", "arguments", "words"),
    [
        ("missing.py:one", None, "no file"),
        ("{}:none", None, "no function"),
        ("{}:wrong", None, "first parameters"),
        ("{}:one", '{"nope": 1}', "do not fit"),
        ("{}:one", "[1]", "JSON object"),
        ("{}:one", "{bonus: 1}", "JSON object"),
        ("{}:later", None, "not async"),
        ("{}", None, "path.py:function"),
    ],
)
def test_own_rewards_are_checked_at_start(rewards_file, spec, arguments, words):
    with pytest.raises(ValueError, match=words):
        load_reward(spec.format(rewards_file), arguments)


def test_an_own_reward_that_raises_is_an_error_with_its_place_and_never_a_zero(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def mine(response, ground_truth, extra):\n"
        "    if response == 'bad':\n"
        "        return {}['missing']\n"
        "    return float(response)\n"
    )
    with ScoringPool(workers=1, timeout_s=30, reward=f"{tmp_path}/mine.py:mine") as pool:
        good, bad, odd, after = (pool.submit("ocr", text, "x", {}) for text in ("0.25", "bad", "nan", "1"))
        assert good.result().accuracy == 0.25
        with pytest.raises(ValueError, match=r"--reward raised KeyError: 'missing' \(.*mine\.py:3\)"):
            bad.result()
        with pytest.raises(ValueError, match="--reward returned accuracy = nan"):
            odd.result()
        assert after.result().accuracy == 1.0 and pool.counts["killed"] == 0


def test_a_file_that_cannot_be_imported_names_itself(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module_here\n")
    with pytest.raises(ValueError, match=r"broken\.py cannot be imported: ModuleNotFoundError"):
        load_reward(f"{tmp_path}/broken.py:one")


def test_from_args_and_wrong_settings():
    args = SimpleNamespace(
        reward_workers=0,
        reward_timeout_s=20.0,
        reward=None,
        reward_args=None,
        judge_url=None,
        judge_model=None,
        style="think",
    )
    with pytest.raises(ValueError, match="reward_workers"):
        ScoringPool.from_args(args)


def test_judge_replaces_rouge_for_open_answers():
    from tests.rewards.test_judge import Endpoint

    with Endpoint(lambda prompt: "Judgement: 1" if "tabby" in prompt else "no idea") as server:
        with ScoringPool(workers=1, timeout_s=30, judge_url=server.url, judge_model="m") as pool:
            pool.judge.backoff_s = 0.01
            good = pool.submit("open-ended", "<answer>a tabby</answer>", "a cat", {"question": "What?"}).result(60)
            lost = pool.submit("open-ended", "<answer>a dog</answer>", "a cat", {"question": "What?"}).result(60)
            assert (good.accuracy, good.status, good.format) == (1.0, "ok", 1.0)
            assert (lost.accuracy, lost.status) == (0.0, "judge_failed")
            assert pool.submit("open-ended", "", "a cat", {}).result(60).status == "empty"
            assert pool.submit("numerical", "<answer>3</answer>", "3", {}).result(60).accuracy == 1
            assert pool.counts["judge_failed"] == 1
