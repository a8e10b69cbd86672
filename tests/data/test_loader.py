"""PromptLoader: replicas share the order, failures are replaced by a rule, prefetching changes nothing."""

import json

import pytest

from data.dataset import SampleOrder
from data.loader import PromptLoader
from data.records import Sample


class FakeEncoder:
    """Encodes a sample to its id; refuses the ids it is told to."""

    def __init__(self, bad=()):
        self.bad, self.calls = set(bad), []

    def encode(self, sample):
        self.calls.append(sample.id)
        if sample.id in self.bad:
            raise ValueError(f"{sample.id} is broken")
        return sample.id


def samples(n):
    return [Sample(f"s{i}", "q", "a", "ocr", "text", file="rows.jsonl", line=i + 1) for i in range(n)]


def in_order(n=10):
    return SampleOrder(samples(n), seed=0, shuffle=False)


def test_replicas_share_one_sequence():
    loaders = [PromptLoader(in_order(), FakeEncoder(), replica=r, replicas=2) for r in range(2)]
    assert [loader.take(6) for loader in loaders] == [["s0", "s2", "s4"], ["s1", "s3", "s5"]]
    assert [loader.take(4) for loader in loaders] == [["s6", "s8"], ["s7", "s9"]]
    assert [loader.position for loader in loaders] == [10, 10]
    single = PromptLoader(in_order(), FakeEncoder())
    assert single.take(6) == ["s0", "s1", "s2", "s3", "s4", "s5"]


def test_prefetch_encodes_once_and_does_not_move_the_position():
    encoder = FakeEncoder()
    loader = PromptLoader(in_order(), encoder)
    loader.prefetch(3)
    assert loader.position == 0
    assert loader.take(4) == ["s0", "s1", "s2", "s3"]
    assert sorted(encoder.calls) == ["s0", "s1", "s2", "s3"]


def test_a_start_position_continues_the_sequence():
    assert PromptLoader(in_order(4), FakeEncoder(), position=3).take(2) == ["s3", "s0"]


def test_a_bad_sample_is_replaced_by_the_same_rule_everywhere(tmp_path):
    failed = tmp_path / "failed.jsonl"
    first = PromptLoader(in_order(), FakeEncoder({"s2"}), seed=5, failed_file=failed).take(4)
    again = PromptLoader(in_order(), FakeEncoder({"s2"}), seed=5).take(4)
    assert first == again and first[2] != "s2" and first[:2] == ["s0", "s1"] and first[3] == "s3"
    rows = [json.loads(line) for line in failed.read_text().splitlines()]
    assert [(row["id"], row["file"], row["line"], row["reason"]) for row in rows] == [
        ("s2", "rows.jsonl", 3, "s2 is broken")
    ]


def test_a_known_bad_sample_is_not_tried_again(tmp_path):
    encoder = FakeEncoder({"s1"})
    loader = PromptLoader(in_order(3), encoder, failed_file=tmp_path / "failed.jsonl")
    loader.take(9)  # three epochs
    assert encoder.calls.count("s1") == 1
    assert len((tmp_path / "failed.jsonl").read_text().splitlines()) == 1


def test_nothing_usable_is_an_error_that_names_the_sample():
    loader = PromptLoader(in_order(2), FakeEncoder({"s0", "s1"}))
    try:
        loader.take(1)
    except RuntimeError as error:
        assert "rows.jsonl" in str(error) and "is broken" in str(error)
    else:
        raise AssertionError("an unusable dataset was accepted")


def test_a_prompt_too_long_stops_the_run_only_when_it_should():
    from data.encode import PromptTooLong

    class Refuses(FakeEncoder):
        def __init__(self, stops):
            super().__init__()
            self.stops = stops

        def encode(self, sample):
            if sample.id == "s1":
                error = PromptTooLong("rows.jsonl:2: the prompt has 99 tokens")
                error.stops_the_run = self.stops
                raise error
            return sample.id

    assert PromptLoader(in_order(), Refuses(stops=False)).take(2)[1] != "s1"
    with pytest.raises(PromptTooLong, match="99 tokens"):
        PromptLoader(in_order(), Refuses(stops=True)).take(2)
