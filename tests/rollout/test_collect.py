"""Collection of a step with fakes: a scripted engine, a word tokenizer, scores read from the response's text."""

import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from data.records import Group, Prompt, Response, Sample
from rollout.collect import CarryOver, Collected, InlineScorer, SamplingExhausted, collect, filter_values

# ---- fakes --------------------------------------------------------------------------------------------------------


class Tokenizer:
    """One token per word; 99 is the turn end."""

    eos_token, eos_token_id = "<|im_end|>", 99

    def __init__(self):
        self.words = ["<|video_pad|>"]

    def encode(self, text, add_special_tokens):
        assert add_special_tokens is False
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


def encoder():
    return SimpleNamespace(tokenizer=Tokenizer(), visual_token_ids=(0,))


class Sampler:
    """Sample i of the order is named s<i>; this replica takes its turn of every request."""

    def __init__(self, replica=0, replicas=1, demonstrations=None, text="question"):
        self.replica, self.replicas, self.position, self.text = replica, replicas, 0, text
        self.demonstrations = demonstrations or {}

    def take(self, n):
        assert n % self.replicas == 0
        mine = range(self.position + self.replica, self.position + n, self.replicas)
        self.position += n
        return [self.prompt(f"s{i}") for i in mine]

    def prompt(self, name):
        sample = Sample(name, "q?", "gold", "math", "text", options=("A", "B"), file="d.jsonl", line=int(name[1:]) + 1)
        sample.offline_output = self.demonstrations.get(name)
        return Prompt(sample, self.text, {}, None, None, None, None, None)


class Engine:
    """`script(sample id, slot, greedy, salt)` gives a response's accuracy; finishes prompts in reverse order."""

    def __init__(self, script, tokens=3):
        self.script, self.tokens, self.calls = script, tokens, []

    def generate(self, prompts, *, n, sampling, step, salt=""):
        numbers = [n] * len(prompts) if isinstance(n, int) else n
        settings = [sampling] * len(prompts) if isinstance(sampling, dict) else sampling
        names = [prompt.sample.id for prompt in prompts]
        self.calls.append(SimpleNamespace(names=names, n=n, sampling=sampling, step=step, salt=salt))
        for index in reversed(range(len(prompts))):
            greedy = settings[index]["temperature"] == 0
            values = [self.script(names[index], slot, greedy, salt) for slot in range(numbers[index])]
            yield (
                index,
                [Response([1] * self.tokens, [-0.1] * self.tokens, "stop", text=f"{value}") for value in values],
            )


def score(problem_type, text, gold, extra):
    assert (problem_type, gold, extra["options"]) == ("math", "gold", ["A", "B"])
    word = text.split()[-1]
    value = {"right": 1.0, "wrong": 0.0}[word] if word in ("right", "wrong") else float(word)
    return SimpleNamespace(accuracy=value, format=1.0, status="ok", extracted=word)


def settings(**changes):
    base = {
        "prompts_per_step": 2, "group_size": 3, "max_response_tokens": 6, "temperature": 0.8, "top_p": 1.0, "top_k": -1,
        "advantage": "grpo", "accuracy_weight": 0.9, "format_weight": 0.1, "overlong_buffer": 0, "overlong_penalty": 1.0,
        "dynamic_sampling": False, "filter_by": "accuracy", "filter_low": None, "filter_high": None,
        "max_sampling_rounds": 4, "demonstrations": "off", "demonstration_threshold": 0.5,
        "demonstration_on_long": "truncate",
    }  # fmt: skip
    return SimpleNamespace(**{**base, **changes})


def names(collected):
    return [group.prompt.sample.id for group in collected.groups]


def accuracies(group):
    return [response.reward_parts["accuracy"] for response in group.responses]


def mixed(name, slot, greedy, salt):
    return float(slot == 0)


# ---- plain --------------------------------------------------------------------------------------------------------


def test_one_round_keeps_the_order_of_the_prompts_and_mixes_the_reward():
    engine = Engine(mixed)
    found = collect(Sampler(), engine, InlineScorer(score), settings(), 7)
    assert names(found) == ["s0", "s1"]
    assert [accuracies(group) for group in found.groups] == [[1, 0, 0]] * 2
    assert [response.reward for response in found.groups[0].responses] == pytest.approx([1.0, 0.1, 0.1])
    assert found.groups[0].responses[0].status == "ok" and found.groups[0].responses[0].extracted == "1.0"
    (call,) = engine.calls
    assert (call.n, call.step, call.salt) == (3, 7, "round0")
    assert call.sampling == {"temperature": 0.8, "top_p": 1.0, "top_k": -1, "max_tokens": 6}
    assert found.baseline_rewards is None
    assert found.metrics["sampling/rounds"] == (1.0, 1.0)
    assert found.metrics["generated/reward"] == (pytest.approx(2.4), 6.0)
    assert found.metrics["generated/tokens"] == (18.0, 6.0)


def test_scoring_runs_while_generation_goes_on():
    """The last prompt (finished first) is being scored before the engine gives the next one."""
    scored = threading.Event()

    class Pool:
        def __init__(self):
            self.pool = ThreadPoolExecutor(1)

        def submit(self, *question):
            def work():
                scored.set()
                return score(*question)

            return self.pool.submit(work)

        def submit_many(self, rows):
            return [self.submit(*row) for row in rows]

    class Waiting(Engine):
        def generate(self, *a, **k):
            for number, item in enumerate(super().generate(*a, **k)):
                if number == 1:
                    assert scored.wait(10), "nothing was scored while the engine still generates"
                yield item

    assert len(collect(Sampler(), Waiting(mixed), Pool(), settings(), 0).groups) == 2


def test_soft_overlong_penalty_and_truncated_status():
    """Limit 6, buffer 4, length 5: (2 - 5) / 4 = -0.75, times the weight 0.4."""
    args = settings(overlong_buffer=4, overlong_penalty=0.4)
    found = collect(Sampler(), Engine(mixed, tokens=5), InlineScorer(score), args, 0)
    first = found.groups[0].responses[0]
    assert first.reward_parts == {"accuracy": 1.0, "format": 1.0, "overlong": pytest.approx(-0.3)}
    assert first.reward == pytest.approx(0.7)
    short = collect(Sampler(), Engine(mixed, tokens=2), InlineScorer(score), args, 0)
    assert short.groups[0].responses[0].reward == pytest.approx(1.0)

    def unread(*question):
        return SimpleNamespace(accuracy=0.0, format=0.0, status="no_answer", extracted=None)

    class Cut(Engine):
        def generate(self, *a, **k):
            for index, responses in super().generate(*a, **k):
                responses[0].finish_reason = "length"
                yield index, responses

    group = collect(Sampler(), Cut(mixed), InlineScorer(unread), settings(), 0).groups[0]
    assert [response.status for response in group.responses] == ["truncated", "no_answer", "no_answer"]


def test_remax_gets_its_greedy_response_in_the_same_call():
    def script(name, slot, greedy, salt):
        return 0.5 if greedy else float(name == "s1")

    engine = Engine(script)
    found = collect(Sampler(), engine, InlineScorer(score), settings(advantage="remax", group_size=2), 0)
    assert found.baseline_rewards == pytest.approx([0.9 * 0.5 + 0.1] * 2)
    (call,) = engine.calls
    assert call.names == ["s0", "s1", "s0", "s1"] and call.n == [2, 2, 1, 1]
    assert [setting["temperature"] for setting in call.sampling] == [0.8, 0.8, 0.0, 0.0]
    assert [len(group.responses) for group in found.groups] == [2, 2]


def test_an_engine_that_loses_a_prompt_or_a_response_is_caught():
    class Losing(Engine):
        def generate(self, *a, **k):
            yield next(super().generate(*a, **k))

    with pytest.raises(RuntimeError, match=r"nothing for prompts \[0\] of 2"):
        collect(Sampler(), Losing(mixed), InlineScorer(score), settings(), 0)

    class Short(Engine):
        def generate(self, *a, **k):
            for index, responses in super().generate(*a, **k):
                yield index, responses[:2]

    with pytest.raises(RuntimeError, match="2 responses to prompt 1, asked 3"):
        collect(Sampler(), Short(mixed), InlineScorer(score), settings(), 0)


def test_a_score_that_is_no_number_names_the_sample():
    def script(name, slot, greedy, salt):
        return float("nan") if name == "s1" else 1.0

    with pytest.raises(ValueError, match=r"d\.jsonl:2: accuracy of a response to sample s1 is nan"):
        collect(Sampler(), Engine(script), InlineScorer(score), settings(), 0)


# ---- dynamic sampling ---------------------------------------------------------------------------------------------


def spread_for(kept):
    """Groups of the named samples differ; the others are all wrong."""

    def script(name, slot, greedy, salt):
        return float(slot == 0) if name in kept else 0.0

    return script


def test_groups_without_spread_are_replaced_and_surplus_waits_for_the_next_step():
    carry = CarryOver()
    args, sampler = settings(dynamic_sampling=True), Sampler()
    engine = Engine(spread_for({"s1", "s2", "s3", "s5"}))
    first = collect(sampler, engine, InlineScorer(score), args, 0, carry=carry)
    # round 0: s0 s1 -> s1; half was kept, so one missing group asks for two: s2 s3 -> both, one too many
    assert names(first) == ["s1", "s2"] and [call.names for call in engine.calls] == [["s0", "s1"], ["s2", "s3"]]
    assert [call.salt for call in engine.calls] == ["round0", "round1"]
    assert [item.group.prompt.sample.id for item in carry.ready] == ["s3"]
    assert first.metrics["sampling/dropped_equal"] == (1.0, 4.0)
    assert first.metrics["sampling/dropped_all_zero"] == (1.0, 4.0)
    assert first.metrics["sampling/carried_out"] == (1.0, 1.0)
    second = collect(sampler, engine, InlineScorer(score), args, 1, carry=carry)
    assert names(second) == ["s3", "s5"]  # s4 was dropped
    assert second.metrics["sampling/carried_in"] == (1.0, 1.0)
    assert second.metrics["sampling/stale"] == (1.0, 2.0)
    assert carry.ready == []


def test_an_empty_round_draws_again_and_the_limit_has_a_clear_message():
    engine = Engine(spread_for({"s4", "s5"}))
    found = collect(Sampler(), engine, InlineScorer(score), settings(dynamic_sampling=True), 0)
    assert names(found) == ["s4", "s5"] and len(engine.calls) == 3
    with pytest.raises(SamplingExhausted) as caught:
        collect(Sampler(), Engine(spread_for({"s1"})), InlineScorer(score), settings(dynamic_sampling=True), 3)
    message = str(caught.value)
    assert "step 3" in message and "--max_sampling_rounds 4" in message
    assert "Of 8 groups 7 had equal values (7 all 0, 0 all 1)" in message


def test_equal_accuracy_is_dropped_although_the_reward_differs_unless_asked_otherwise():
    """The total differs through the overlong penalty alone."""

    class Growing(Engine):
        def generate(self, *a, **k):
            for index, responses in super().generate(*a, **k):
                for slot, response in enumerate(responses):
                    response.token_ids = [1] * (2 + slot)
                yield index, responses

    engine = Growing(lambda name, slot, greedy, salt: 1.0)
    args = settings(dynamic_sampling=True, overlong_buffer=5)
    with pytest.raises(SamplingExhausted, match="0 all 0, 8 all 1"):
        collect(Sampler(), engine, InlineScorer(score), args, 0)
    for name in ("reward", "overlong"):
        assert (
            len(
                collect(Sampler(), engine, InlineScorer(score), settings(**{**vars(args), "filter_by": name}), 0).groups
            )
            == 2
        )
    with pytest.raises(
        ValueError, match="--filter_by 'style': the responses carry accuracy, format, overlong, and 'rew"
    ):
        collect(Sampler(), engine, InlineScorer(score), settings(**{**vars(args), "filter_by": "style"}), 0)


def test_bounds_on_the_mean():
    def script(name, slot, greedy, salt):
        return {"s0": [0, 0, 0.1], "s1": [0.9, 1, 1], "s2": [0, 1, 1], "s3": [0.4, 0.5, 0.6]}[name][slot]

    args = settings(dynamic_sampling=True, filter_low=0.05, filter_high=0.9, prompts_per_step=2)
    found = collect(Sampler(), Engine(script), InlineScorer(score), args, 0)
    assert names(found) == ["s2", "s3"]
    assert found.metrics["sampling/dropped_low_mean"] == (1.0, 4.0)
    assert found.metrics["sampling/dropped_high_mean"] == (1.0, 4.0)


def test_carried_groups_survive_a_checkpoint():
    sampler = Sampler()
    carry = CarryOver()
    args = settings(dynamic_sampling=True)
    collect(sampler, Engine(spread_for({"s1", "s2", "s3"})), InlineScorer(score), args, 4, carry=carry)
    saved = json.loads(json.dumps(carry.state_dict()))
    loaded = CarryOver()
    loaded.load_state_dict(saved, sampler.prompt)
    assert loaded.ready[0].step == 4 and loaded.ready[0].group.prompt.sample.id == "s3"
    assert loaded.ready[0].group.responses == carry.ready[0].group.responses


def run_ranks(count, job):
    """Run job(rank, all_gather) in threads that meet in all_gather, as ranks do; raises what they raise."""
    slots, results = [None] * count, [None] * count
    barrier = threading.Barrier(count, timeout=20)

    def gather_of(rank):
        def all_gather(value):
            slots[rank] = value
            barrier.wait()
            everything = list(slots)
            barrier.wait()
            return everything

        return all_gather

    def work(rank):
        try:
            results[rank] = job(rank, gather_of(rank))
        except (RuntimeError, ValueError) as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ({"s1", "s3", "s4", "s5", "s7", "s8"}, [["s4", "s8"], ["s1", "s3"]]),  # replica 0 (even samples) is short
        ({"s0", "s2", "s4", "s6", "s5", "s9"}, [["s0", "s2"], ["s5", "s9"]]),  # replica 1 is short
    ],
)
def test_two_replicas_run_the_same_number_of_rounds(kept, expected):
    """One replica keeps all it draws, the other needs three rounds, and so both draw three times."""
    engines = [Engine(spread_for(kept)) for _ in range(2)]
    carries = [CarryOver(), CarryOver()]
    samplers = [Sampler(rank, 2) for rank in range(2)]
    args = settings(dynamic_sampling=True, prompts_per_step=4, max_sampling_rounds=9)

    def job(rank, all_gather):
        return collect(
            samplers[rank], engines[rank], InlineScorer(score), args, 0, carry=carries[rank], all_gather=all_gather
        )

    assert [names(item) for item in run_ranks(2, job)] == expected
    assert len(engines[0].calls) == len(engines[1].calls) == 3
    assert [len(call.names) for call in engines[0].calls] == [len(call.names) for call in engines[1].calls]
    assert samplers[0].position == samplers[1].position
    waiting = {item.group.prompt.sample.id for carry in carries for item in carry.ready}
    assert waiting == kept - {name for part in expected for name in part}


def test_exhaustion_and_bad_scores_stop_every_replica():
    args = settings(dynamic_sampling=True, prompts_per_step=4)

    def starving(rank, all_gather):
        engine = Engine(spread_for({f"s{i}" for i in range(1, 99, 2)}))
        return collect(Sampler(rank, 2), engine, InlineScorer(score), args, 0, all_gather=all_gather)

    assert all(isinstance(item, SamplingExhausted) for item in run_ranks(2, starving))

    def broken(rank, all_gather):
        engine = Engine(lambda name, slot, greedy, salt: float("nan") if name == "s3" else float(slot))
        return collect(Sampler(rank, 2), engine, InlineScorer(score), args, 0, all_gather=all_gather)

    results = run_ranks(2, broken)
    assert all(isinstance(item, ValueError) and "sample s3 is nan" in str(item) for item in results)


def test_ranks_of_one_engine_decide_by_the_scores_of_the_first():
    """Rank 1's own scorer would drop everything (a timed-out sandbox); it must follow rank 0."""
    zero = InlineScorer(lambda *q: SimpleNamespace(accuracy=0.0, format=0.0, status="timeout", extracted=None))
    told = []
    engine = Engine(mixed)
    args = settings(dynamic_sampling=True, demonstrations="group_accuracy", demonstration_threshold=0.3)

    def tell(scores):
        told.append(scores)
        return scores

    sampler = Sampler(demonstrations={"s0": "so it is right"})
    first = collect(sampler, engine, InlineScorer(score), args, 0, encoder=encoder(), share=tell)
    follower = Engine(mixed)
    sampler = Sampler(demonstrations={"s0": "so it is right"})
    second = collect(sampler, follower, zero, args, 0, encoder=encoder(), share=lambda scores: told.pop(0))
    assert [vars(call) for call in engine.calls] == [vars(call) for call in follower.calls]
    assert names(first) == names(second) and [accuracies(g) for g in first.groups] == [
        accuracies(g) for g in second.groups
    ]


def test_prompts_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="--prompts_per_step 3 must be a multiple of the 2 replicas"):
        collect(Sampler(0, 2), Engine(mixed), InlineScorer(score), settings(prompts_per_step=3), 0)


# ---- demonstrations -----------------------------------------------------------------------------------------------

DEMO = {"s0": "<think> because </think> right"}


def mix(demos=None, engine=None, text="question", **flags):
    engine = engine or Engine(mixed)
    sampler = Sampler(demonstrations=DEMO if demos is None else demos, text=text)
    code = encoder()
    args = settings(**{"demonstrations": "always", **flags})
    return collect(sampler, engine, InlineScorer(score), args, 0, encoder=code), engine, code.tokenizer


def test_a_demonstration_takes_one_place_and_ends_with_the_turn_end():
    found, engine, tokenizer = mix()
    assert engine.calls[0].n == [2, 3] and len(engine.calls) == 1  # s0: n - 1 are generated
    last = found.groups[0].responses[-1]
    assert last.is_demonstration and not any(r.is_demonstration for r in found.groups[0].responses[:-1])
    assert last.token_ids[-1] == 99 and tokenizer.decode(last.token_ids[:-1]) == DEMO["s0"]
    assert (last.finish_reason, last.rollout_logprobs, last.reward) == ("stop", [], pytest.approx(1.0))
    assert not any(response.is_demonstration for response in found.groups[1].responses)
    assert found.metrics["demonstration/groups"] == found.metrics["demonstration/seen"] == (1.0, 2.0)
    assert found.metrics["demonstration/tokens"] == (5.0, 1.0)
    assert found.metrics["demonstration/reward"] == (pytest.approx(1.0), 1.0)
    assert found.metrics["generated/tokens"] == (15.0, 5.0)  # the demonstration is counted apart


def test_off_means_off_and_blank_ones_are_none():
    found, engine, _ = mix({"s0": "  \n"})
    assert engine.calls[0].n == 3 and found.metrics["demonstration/seen"] == (0.0, 2.0)
    engine = Engine(mixed)
    collect(Sampler(demonstrations=DEMO), engine, InlineScorer(score), settings(), 0)
    assert engine.calls[0].n == 3
    with pytest.raises(ValueError, match="--demonstrations always needs the encoder's tokenizer"):
        collect(Sampler(demonstrations=DEMO), engine, InlineScorer(score), settings(demonstrations="always"), 0)


def test_a_stored_turn_end_is_not_doubled_and_an_opened_think_block_not_repeated():
    last = mix({"s0": "right<|im_end|>\n"})[0].groups[0].responses[-1]
    assert len(last.token_ids) == 2 and last.token_ids[-1] == 99
    found, _, tokenizer = mix(text="question <think>\n")
    assert tokenizer.decode(found.groups[0].responses[-1].token_ids[:-1]) == "because </think> right"


def test_overlong_ones_are_cut_or_refused_and_counted():
    long = {"s0": "a b c d e f right"}
    found, _, _ = mix({"s0": "1 2 3 4 5 0.5 right"})
    last = found.groups[0].responses[-1]
    assert (len(last.token_ids), last.finish_reason, last.text) == (6, "length", "1 2 3 4 5 0.5")
    assert last.reward_parts["accuracy"] == 0.5  # scored as cut
    assert found.metrics["demonstration/truncated"] == (1.0, 1.0)
    found, engine, _ = mix(long, demonstration_on_long="refuse")
    assert engine.calls[0].n == 3 and not any(r.is_demonstration for r in found.groups[0].responses)
    assert found.metrics["demonstration/refused_long"] == (1.0, 1.0)
    exact = mix({"s0": "1 2 3 4 right"}, demonstration_on_long="refuse")[0]
    assert len(exact.groups[0].responses[-1].token_ids) == 6  # five words and the turn end just fit


def test_visual_tokens_in_a_demonstration_are_refused():
    found, engine, _ = mix({"s0": "<|video_pad|> right"})
    assert engine.calls[0].n == 3 and found.metrics["demonstration/refused_visual"] == (1.0, 1.0)


def test_gate_by_group_accuracy_fills_up_with_the_policys_own():
    """s0 succeeds in half of its two tries, s1 never: at threshold 0.5 only s1 keeps the demonstration."""
    demos = {"s0": "x right", "s1": "y right"}

    def script(name, slot, greedy, salt):
        return 0.25 if salt.endswith("fill") else float(name == "s0" and slot == 0)

    found, engine, _ = mix(demos, Engine(script), demonstrations="group_accuracy")
    assert [call.n for call in engine.calls] == [2, 1]
    assert engine.calls[1].names == ["s0"] and engine.calls[1].salt == "round0/fill"
    assert [accuracies(group) for group in found.groups] == [[1, 0, 0.25], [0, 0, 1]]
    assert [response.is_demonstration for response in found.groups[1].responses] == [False, False, True]
    assert found.metrics["demonstration/gated_out"] == (1.0, 2.0)


def test_gate_by_own_reward_is_decided_before_generation():
    demos = {"s0": "x wrong", "s1": "y right"}
    found, engine, _ = mix(demos, demonstrations="own_reward")
    assert [call.n for call in engine.calls] == [[3, 2]]
    assert [group.responses[-1].is_demonstration for group in found.groups] == [False, True]
    assert found.groups[1].responses[-1].reward == pytest.approx(1.0)
    assert found.metrics["demonstration/gated_out"] == (1.0, 2.0)


def test_a_demonstration_gives_a_failed_group_its_spread():
    demos = {f"s{i}": "right" for i in range(9)}
    found, engine, _ = mix(demos, Engine(lambda *a: 0.0), dynamic_sampling=True)
    assert len(engine.calls) == 1 and [accuracies(group) for group in found.groups] == [[0, 0, 1]] * 2


def test_no_overlong_penalty_for_demonstrations():
    found, _, _ = mix({"s0": "1 2 3 4 right"}, overlong_buffer=5)
    last = found.groups[0].responses[-1]
    assert "overlong" not in last.reward_parts and last.reward == pytest.approx(1.0)


def test_filter_values_names_what_there_is():
    group = Group(None, [Response([1], [], "stop", reward=0.4, reward_parts={"accuracy": 1.0})])
    assert filter_values(group, "reward") == [0.4] and filter_values(group, "accuracy") == [1.0]


def test_the_inline_scorer_speaks_the_pools_language():
    future = InlineScorer(score).submit("math", "right", "gold", {"options": ["A", "B"]})
    assert isinstance(future, Future) and future.result().accuracy == 1.0
    assert isinstance(collect(Sampler(), Engine(mixed), InlineScorer(score), settings(), 0), Collected)
