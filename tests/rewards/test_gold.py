"""Bad golds, options and declarations are refused at load with a reason (G13, G14)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data.records import Sample
from rewards import check_gold, clean_gold

ROOT = Path(__file__).resolve().parents[2]


def sample(kind, answer, options=(), **extra):
    return Sample("7", "Q?", answer, kind, "text", options=tuple(options), extra=extra)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (sample("multiple choice", "E", ["A. x", "B. y"]), "no option"),
        (sample("multiple choice", "A", ["A. x", "A. y"]), "repeats a label"),
        (sample("multiple choice", "green", ["red", "blue"]), "no option"),
        (sample("multiple choice", "A. y", ["A. x", "B. y"]), "no option"),
        (sample("numerical", "three or four"), "exactly one number"),
        (sample("numerical", True), "must be a number"),
        (sample("numerical", float("inf")), "not finite"),
        (sample("numerical", "3", tolerance={"rel": -1}), "tolerance"),
        (sample("rec", "2.5"), "integer"),
        (sample("boolean", "maybe"), "yes / no"),
        (sample("ocr", "..."), "empty"),
        (sample("ocr", "x", ocr_metric="bleu"), "ocr_metric"),
        (sample("open-ended", "None"), "placeholder"),
        (sample("open-ended", ["x"]), "text"),
        (sample("open-ended", "5", answer_kind="date"), "answer_kind"),
        (sample("temporal grounding", '{"time": [20, 10]}'), "no span"),
        (sample("temporal grounding", '{"time": [-1, 10]}'), "before 0"),
        (sample("spatial grounding", "[1, 1, 1, 2]"), "no box"),
        (sample("spatial grounding", "[1, 1, 2, 2]", coord="percent"), "coord must be"),
        (sample("spatial grounding", "[1, 1, 2, 2]", coord="norm1", gt_coord="pixel"), "width"),
        (sample("spatial-temporal grounding", '{"boxes": {"1": [1, 1, 2, 2]}}'), "time"),
        (sample("tracking", '{"boxes": {"1": [1, 1, 2, 2], "2": [3, 3, 1, 1]}}'), "no valid box"),
        (sample("segmentation", '{"boxes": [1, 1, 2, 2], "positive_points": [[1]]}'), "points"),
        (sample("code", "def f(): pass"), "tests"),
        (sample("llava", "Response 3"), "none of"),
        (sample("llava", "1", output="stars"), "output"),
        (sample("math", "9**9**9"), "cannot be evaluated"),
        (sample("boolean", "yes", format_mode="loose"), "format_mode"),
    ],
)
def test_refused_with_the_reason(bad, words):
    assert words in check_gold(bad)


@pytest.mark.parametrize(
    "good",
    [
        sample("multiple choice", "b) y", ["A. x", "B. y"]),
        sample("multiple choice", "Y.", ["A. x", "B. y"]),
        sample("numerical", "about 5"),
        sample("numerical", 3),
        sample("boolean", True),
        sample("math", "$\\frac{1}{2}$"),
        sample("temporal grounding", [[1, 2], [4, 5]]),
        sample("tracking", {"boxes": {"0": [0, 0, 1, 1]}}),
        sample("spatial-temporal grounding", '{"time": [1, 2], "boxes": {}}'),
    ],
)
def test_accepted(good):
    assert check_gold(good) is None


def test_gold_is_cleaned_once():
    assert clean_gold("<answer>1st: a\n2nd: b</answer>") == "1st: a\n2nd: b"
    assert clean_gold("<think>x</think><answer> $42$ </answer>") == "42"
    assert clean_gold("```\n\\boxed{7}\n```") == "7"
    assert clean_gold("$5.00") == "$5.00"


WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "vllm", "transformers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoTorch())
import rewards, rewards.pool, rewards.judge, rewards.metrics, rewards.custom, rewards.rows, data.prompts
assert rewards.score("boolean", "<answer>yes</answer>", "Yes", {}).accuracy == 1
"""


def test_rewards_import_without_torch():
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT, check=True, timeout=120)
