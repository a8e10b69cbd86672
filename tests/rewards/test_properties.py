"""Properties that hold for every type on any text (RULES section 0)."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards import REWARDS, score
from rewards.format import MODES, format_reward
from rewards.geometry import best_matching, box_iou
from rewards.spans import span_iou
from rewards.text import lcs_length

TRACK = '{"boxes": {"1": [0, 0, 100, 100], "2": [10, 0, 110, 100]}}'
GOLDS = {
    "multiple choice": ("B", {"options": ["A. Red", "B. Blue", "C. Green"]}),
    "numerical": ("12.5", {}),
    "rec": ("4", {}),
    "regression": ("12.5", {"unit": "m"}),
    "boolean": ("yes", {}),
    "ocr": ("Exit 24", {}),
    "open-ended": ("A cat jumps onto the table", {}),
    "temporal grounding": ('{"time": [10, 20]}', {}),
    "spatial grounding": ('{"boxes": [1, 2, 30, 40]}', {}),
    "spatial-temporal grounding": ('{"time": [1, 2], "boxes": {"1": [0, 0, 9, 9], "2": [1, 0, 9, 9]}}', {}),
    "tracking": (TRACK, {}),
    "llava": ("Response 1", {}),
    "segmentation": ('{"boxes": [10, 10, 50, 50], "positive_points": [[20, 20]]}', {}),
    "segmentation_video": ('{"boxes": [10, 10, 50, 50], "time": 4}', {}),
}
KINDS = sorted(GOLDS)
WORDS = (
    "<answer> </answer> <think> </think> A B C yes no or and not maybe 1 2 10 20 12.5 % m cm [ ] { } ( ) , : . ? \" ' ` ** $ "
    '\\boxed{ \\frac{ } time boxes "time": [10,20] [1,2,30,40] from to between Response tie is the answer 猫 ½ − \u200b '
    "1e9 NaN the my final so therefore = / - + < > ^ × hundred one"
)
PIECES = st.sampled_from([*WORDS.split(" "), "\n"])
TEXTS = st.one_of(
    st.text(max_size=200), st.lists(PIECES, max_size=40).map(" ".join), st.lists(PIECES, max_size=40).map("".join)
)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def test_every_accepted_name_has_a_reward():
    from data.records import CANONICAL_TYPE

    assert set(REWARDS) == set(CANONICAL_TYPE)
    assert {"caption", "ssr", "crr", "rec", "critic", "coding", "number", "video qa", "open_ended"} <= set(REWARDS)


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(text=TEXTS, wrap=st.booleans())
def test_any_text_gives_a_finite_score_in_0_1(kind, text, wrap):
    gold, extra = GOLDS[kind]
    result = score(kind, f"<answer>{text}</answer>" if wrap else text, gold, extra)
    assert math.isfinite(result.accuracy)
    assert 0 <= result.accuracy <= 1
    assert result.format in (0.0, 1.0)
    assert result.status != "bad_ground_truth"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("response", [None, 3, 2.5, True, ["B"], {"answer": "B"}, b"B"])
def test_what_is_no_text_scores_nothing(kind, response):
    gold, extra = GOLDS[kind]
    result = score(kind, response, gold, extra)
    assert (result.accuracy, result.format, result.extracted) == (0.0, 0.0, None)


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(
    before=st.sampled_from(["", " ", "\n\n", "\t", "\u200b"]),
    after=st.sampled_from(["", " ", "\n", "<|im_end|>", "</s>\n"]),
)
def test_the_gold_scores_one_whatever_stands_around_it(kind, before, after):
    gold, extra = GOLDS[kind]
    assert score(kind, f"<think>x</think><answer>{before}{gold}{before}</answer>{after}", gold, extra).accuracy == 1
    assert score(kind, f"{before}{gold}{after}", gold, extra).accuracy == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "wrapper", ["**{}**", "```\n{}\n```", "$\\text{{{}}}$", "\\boxed{{{}}}", "`{}`", '{{"answer": {}}}']
)
def test_wrappers_change_nothing(kind, wrapper):
    gold, extra = GOLDS[kind]
    if wrapper.startswith('{{"answer"'):
        if gold[0] != "{":
            return  # a bare word there would not be JSON
    elif "{" in wrapper and gold[0] == "{":
        return  # LaTeX around JSON is none of the accepted spellings
    assert score(kind, f"<answer>{wrapper.format(gold)}</answer>", gold, extra).accuracy == 1


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"tracking", "segmentation", "segmentation_video"}))
def test_case_of_the_answer_does_not_matter(kind):
    gold, extra = GOLDS[kind]
    for text in (gold.upper(), gold.lower()) if gold[0] != "{" else (gold,):
        assert score(kind, f"<answer>{text}</answer>", gold, extra).accuracy == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "response", ["", "   ", "\n", "<answer></answer>", "<answer> </answer>", "<answer>.</answer>", "<answer>"]
)
def test_nothing_said_scores_nothing(kind, response):
    gold, extra = GOLDS[kind]
    assert score(kind, response, gold, extra).accuracy == 0


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"ocr", "open-ended"}))
def test_an_alternative_beside_the_gold_scores_nothing(kind):
    gold, extra = GOLDS[kind]
    other = {
        "multiple choice": "C",
        "boolean": "no",
        "llava": "Response 2",
        "numerical": "13",
        "rec": "5",
        "regression": "13",
        "temporal grounding": '{"time": [30, 40]}',
        "spatial grounding": '{"boxes": [50, 50, 60, 60]}',
        "spatial-temporal grounding": '{"time": [5, 6], "boxes": {}}',
        "tracking": '{"boxes": {"1": [50, 50, 60, 60]}}',
        "segmentation": '{"boxes": [60, 60, 70, 70]}',
        "segmentation_video": '{"boxes": [60, 60, 70, 70]}',
    }[kind]
    for text in (f"{gold} or {other}", f"{other} or {gold}"):
        result = score(kind, f"<answer>{text}</answer>", gold, extra)
        assert (result.accuracy, result.extracted) == (0, None)
    result = score(kind, f"<answer>{other}</answer><answer>{gold}</answer>", gold, extra)
    assert (result.accuracy, result.status) == (0, "several_answers")


@QUICK
@given(text=TEXTS, mode=st.sampled_from(MODES))
def test_format_is_0_or_1_and_auto_is_think_or_direct(text, mode):
    assert format_reward(text, mode) in (0.0, 1.0)
    either = max(format_reward(text, "think"), format_reward(text, "direct"))
    assert format_reward(text, "auto") == either


@QUICK
@given(shift=st.floats(0, 40), step=st.floats(0, 40))
def test_iou_falls_as_the_overlap_shrinks(shift, step):
    fixed = (0.0, 0.0, 30.0, 20.0)
    near, far = (shift, 0.0, shift + 30.0, 20.0), (shift + step, 0.0, shift + step + 30.0, 20.0)
    assert box_iou(fixed, near) >= box_iou(fixed, far) - 1e-12
    assert (
        span_iou(((0.0, 30.0),), ((shift, shift + 30.0),))
        >= span_iou(((0.0, 30.0),), ((shift + step, shift + step + 30.0),)) - 1e-12
    )
    assert box_iou(fixed, near) == box_iou(near, fixed)


@QUICK
@given(a=st.lists(st.sampled_from("xyz"), max_size=14), b=st.lists(st.sampled_from("xyz"), max_size=14))
def test_bit_parallel_lcs_equals_the_table(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert lcs_length(a, b) == table[-1][-1]


@QUICK
@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_matching_is_the_best_of_all_permutations(rows, columns, data):
    from itertools import permutations

    gain = [[data.draw(st.integers(0, 20)) / 20 for _ in range(columns)] for _ in range(rows)]
    if rows <= columns:
        best = max(sum(gain[i][p[i]] for i in range(rows)) for p in permutations(range(columns), rows))
    else:
        best = max(sum(gain[p[j]][j] for j in range(columns)) for p in permutations(range(rows), columns))
    assert best_matching(gain) == pytest.approx(best)
