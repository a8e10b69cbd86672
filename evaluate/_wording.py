"""Pieces of the official prompts' content: which letters to name, where the question and its options stand.

Benchmarks differ in what they ask for (a letter alone, a reasoned answer), in what precedes the question (a note on the
frames, subtitles) and in the cue that ends the text; their programs put these pieces together.
"""

from __future__ import annotations

from data.prompts import split_options
from data.records import Sample


def letters(sample: Sample) -> str:
    """The letters that this sample really has: "A, B, C or D", "A or B"."""
    names = [label for label, _ in split_options(sample.options)]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def option_lines(sample: Sample, form: str = "{}. {}") -> str:
    return "\n".join(form.format(label, text) for label, text in split_options(sample.options))


def joined(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def letter_prompt(sample: Sample, *, before: str = "", cue: str = "The best answer is:") -> str:
    """The direct prompt of Video-MME and its many followers: instruction, question, options, a cue that awaits a
    letter.

    What the sample itself wants said first (`extra["before"]`: subtitles, a note) stands at the very beginning.
    """
    before = joined(sample.extra.get("before", ""), before)
    if not sample.options:
        return joined(before, sample.question, "Answer from the video in a few words.")
    return joined(
        before,
        "Pick the option that answers this multiple-choice question best, going by the video. "
        f"Reply with the letter alone ({letters(sample)}).",
        sample.question,
        option_lines(sample),
        cue,
    )


def reasoned_prompt(sample: Sample, *, before: str = "") -> str:
    """The reasoning prompt: think step by step, then one line `Final Answer: …`."""
    before = joined(sample.extra.get("before", ""), before)
    last = f"the letter ({letters(sample)})" if sample.options else "the answer"
    return joined(
        before,
        sample.question,
        option_lines(sample),
        f'Reason step by step from the video. End with one line of the form "Final Answer: X", where X is {last}.',
    )


CHOICE_PROMPTS = {"official": letter_prompt, "official_cot": reasoned_prompt}
