"""Where the answer is found, and that nested text costs linear time."""

from __future__ import annotations

import pytest

from rewards.extraction import answer_blocks, boxes, final_part, peel, statements
from rewards.loose_json import NotJson, Num, Obj, find_values, read_value
from rewards.verdict import TASK


def test_final_part():
    assert final_part("a</think>b</ THINK >c<|im_end|>\n") == "c"
    assert final_part("<think>a") is None
    assert final_part("a</think>b<think>c") is None
    assert final_part("a", prefilled=True) is None
    assert final_part("a</think>b", prefilled=True) == "b"


def test_answer_blocks_are_innermost_and_complete():
    assert answer_blocks("<answer>a<answer>b</answer></answer>") == (["b"], False)
    assert answer_blocks("<ANSWER>a</ Answer>< answer >b") == (["a"], True)
    assert answer_blocks("<answer x=1>a</answer>") == ([], False)


def test_boxes_are_balanced():
    text = "\\boxed{\\frac{1}{2}} \\boxed{a \\} \\boxed{b"
    assert [content for _, _, content in boxes(text)] == ["\\frac{1}{2}"]
    assert [content for _, _, content in boxes("\\boxed{\\boxed{x}}")] == ["\\boxed{x}"]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("```json\n{}\n```", "{}"),
        ("**`$\\text{B}$`**", "B"),
        ("「“B”」", "B"),
        ("$a$ and $b$", "$a$ and $b$"),
        ('{"final_answer": {"time": [1, 2]}}', '{"time": [1, 2]}'),
        ('{"other": 1}', '{"other": 1}'),
        ("\\boxed{a} b}", "\\boxed{a} b}"),
    ],
)
def test_peel(text, want):
    assert peel(text) == want


def test_statements_have_rank_and_end_at_the_next():
    found = statements("The answer is A. So the answer is B? Therefore, my final answer is: C.", TASK)
    assert [(high, sentence) for high, sentence, _ in found] == [(False, "A."), (True, "C.")]


def test_loose_json():
    assert read_value("{'a': (1, 2,), b: 24.3s, \"c\": NaN") == Obj(
        (("a", [Num("1"), Num("2")]), ("b", "24.3s"), ("c", "NaN"))
    )
    assert read_value('{"a": 1, "a": 2}').repeats()
    assert Num("1" + "0" * 500).value == float("inf")
    assert read_value("[" * 64 + "1" + "]" * 64)
    for hostile in ("[" * 65 + "1" + "]" * 65, '{"a":' * 100_000, "[" * 100_000):
        with pytest.raises(NotJson):
            find_values(hostile)
