"""Children that are killed: one response pays, the next one is scored."""

from __future__ import annotations

import os
import select
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from rewards import killable, score
from rewards.mathematics import Refused, guard, score_math
from rewards.page import score_html
from rewards.svg import score_svg

SQUARE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">'
    '<rect x="10" y="10" width="80" height="80" fill="{}"/></svg>'
)


def test_an_endless_expression_is_killed_and_the_next_is_scored():
    assert score_math("(x+y+z+w+v)^{500}", "1", limit_s=0.3) == (0.0, "timeout")
    assert score_math("\\frac{2}{4}", "0.5") == (1.0, "ok")


def test_a_kill_costs_the_worker_and_not_the_child_that_has_the_libraries():
    assert score_math("2x", "x+x") == (1.0, "ok")
    child = killable.CHILDREN["math"]
    before = child.process.pid, child.worker
    assert score_math("(x+y+z+w+v)^{400}", "1", limit_s=0.3) == (0.0, "timeout")
    assert score_math("2x", "x+x") == (1.0, "ok")
    assert child.process.pid == before[0]
    assert child.worker not in before


def test_a_waiting_worker_that_dies_costs_no_response():
    assert score_math("2x", "x+x") == (1.0, "ok")
    child = killable.CHILDREN["math"]
    os.kill(child.worker, signal.SIGKILL)
    assert select.select([child.process.stdout], [], [], 30)[0]  # the next one says that it is there
    assert score_math("3x", "x+2x") == (1.0, "ok")


def test_a_worker_that_dies_at_work_scores_nothing():
    assert score_math("2x", "x+x") == (1.0, "ok")
    with ThreadPoolExecutor(1) as threads:
        busy_s = killable.CHILDREN["math"].busy_s()
        waiting = threads.submit(score_math, "(x+y+z+w+v)^{400}", "1", 60.0)
        while killable.CHILDREN["math"].busy_s() < busy_s + 0.2:  # at work
            assert not waiting.done()
        os.kill(killable.CHILDREN["math"].worker, signal.SIGKILL)
        assert waiting.result() == (0.0, "malformed")
    assert score_math("2x", "x+x") == (1.0, "ok")


def test_a_child_killed_from_outside_is_replaced():
    assert score_math("2x", "x+x") == (1.0, "ok")
    os.kill(killable.CHILDREN["math"].process.pid, signal.SIGKILL)
    killable.CHILDREN["math"].process.wait()
    assert score_math("2x", "x+x") == (1.0, "ok")


@pytest.mark.parametrize(
    "text",
    [
        *("9**9**9", "9^{9^9}", "(9^9999)^9999", "x**(10**9)", "2^{10001}", "10001!", "factorial(20000)"),
        *("__import__('os')", "exec('x')", "\\sum_{i=1}^{10001} i", "1+" * 1001, "{" * 101),
    ],
)
def test_the_guard_refuses(text):
    with pytest.raises(Refused):
        guard(text)


@pytest.mark.parametrize(
    "text", ["e^{-x^2}", "(x^2+1)^2", "2^{10}", "100!", "\\sum_{i=1}^{\\infty} \\frac{1}{i^2}", "f(x)", "\\log(3)"]
)
def test_the_guard_lets_mathematics_through(text):
    guard(text)


def test_svg_by_hand():
    blue, black = SQUARE.format("blue"), SQUARE.format("black")
    assert score_svg(blue, blue) == (1.0, "ok")
    # Inside the square blue differs from black by 255 in one channel of three, and from white in two: 1 - 1/2.
    assert score_svg(black, blue)[0] == pytest.approx(0.5, abs=0.02)
    # On the other side black from white is 3 channels, of which blue has 1 wrong: 1 - 1/3.
    assert score_svg(blue, black)[0] == pytest.approx(2 / 3, abs=0.02)
    doubled = blue.replace("0 0 100 100", "0 0 200 200").replace('"10"', '"20"').replace('"80"', '"160"')
    assert score_svg(doubled, blue)[0] == pytest.approx(1.0, abs=0.01)


def test_html_by_hand():
    gold = "<html><head></head><body><h1>Big sale</h1><p>hats</p></body></html>"
    assert score_html(gold.upper().replace("</P>", ""), gold) == (1.0, "ok")
    # Text: 2 of 3 tokens, F1 0.8. Paths: html, head, body, h1 of html, head, body, h1, p: F1 8/9.
    assert score_html("<h1>big SALE</h1>", gold)[0] == pytest.approx(0.8 * 8 / 9)
    assert score_html("Big sale hats", gold) == (0.0, "malformed")
    hidden = "<body><h1>Big sale</h1><p hidden>hats</p></body>"
    assert score_html(hidden, gold)[0] == pytest.approx(0.8 * 10 / 11)  # one attribute too many


def test_a_letter_gold_is_read_as_an_option():
    options = {"options": ["A. 41", "B. 42"]}
    assert score("math", "<answer>(B) 42</answer>", "B", options).accuracy == 1
    assert score("math", "<answer>42</answer>", "B", options).accuracy == 1
    assert score("math", "<answer>B. 41</answer>", "B", options).accuracy == 0
