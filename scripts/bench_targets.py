"""What a session of scripts/bench_gpu.py found: each target with PASS or SHORT, and the sections of docs/gpu_results.md."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from scripts.bench_results import PHASES, summarise

# One step of the peer's workload in ms-swift 4.6.0 on one H200, clips decoded on the fly, measured 2026-11-22.
PEER_STEP_S = 260.5
UTILISATION = {"2b": 0.25, "4b": 0.30, "8b": 0.30}
STRETCH = 0.35
ROLLOUT_SHARE = 0.35  # above it, a step's speed-up is bounded by the rollout
# Title of whole steps, which begins with the size -> results
STEPS = {
    "2b": "step-2b.json",
    "4b": "step-4b.json",
    "8b": "step-8b.json",
    "8b on one GPU": "one-8b.json",
}


@dataclass(frozen=True)
class Verdict:
    """One target. `passed` is None where the measurement has no such figure, or the target is a stretch that was missed."""

    target: str
    measured: str
    passed: bool | None

    @property
    def word(self) -> str:
        return {True: "PASS", False: "SHORT", None: "-"}[self.passed]


def read_json(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def at_least(target: str, value: float | None, wanted: float, unit: str = "x") -> Verdict:
    if value is None:
        return Verdict(f"{target} >= {shown(wanted, unit)}", "no figure", None)
    return Verdict(f"{target} >= {shown(wanted, unit)}", shown(value, unit), value >= wanted)


def below(target: str, value: float | None, limit: float, unit: str) -> Verdict:
    if value is None:
        return Verdict(f"{target} <= {shown(limit, unit)}", "no figure", None)
    return Verdict(f"{target} <= {shown(limit, unit)}", shown(value, unit), value <= limit)


def shown(value: float, unit: str) -> str:
    return {"x": f"{value:.2f}x", "%": f"{value:.1%}"}.get(unit, f"{value:.2f} {unit}")


# ---- targets --------------------------------------------------------------------------------------------------------


def verdicts(out: Path) -> list[Verdict]:
    """Every target that the results under `out` say something about, correctness first."""
    found = []
    stages = (read_json(out / "gpu.json") or {"stages": {}})["stages"]
    for name, record in stages.items():
        if name.startswith("tests-"):
            passed = {"done": True, "failed": False}.get(record["state"])
            found.append(Verdict(f"{name} passes", record["state"], passed))
    if packed := read_json(out / "packed-2b.json"):
        found += packed_verdicts(packed)
    for title, file in STEPS.items():
        if results := read_json(out / file):
            found += step_verdicts(title, results)
    if results := read_json(out / "peer-2b.json"):
        found += peer_verdicts(results)
    if figures := read_json(out / "evaluate-2b.json"):
        idle = (figures.get("gpu_idle_share") or {}).get("pipeline")
        found += [
            below("evaluation 2b: GPU idle share of the pipeline", idle, 0.10, "%"),
            at_least("evaluation 2b: pipeline over the loop", figures["times_the_loop"], 6.0),
        ]
    return found


def packed_verdicts(packed: dict) -> list[Verdict]:
    seconds = {row["variant"]: row["median_s"] for row in packed["variants"]}
    ours = [value for name, value in seconds.items() if name.startswith("packed/")]
    if not ours or "rows/hf" not in seconds:
        return []
    return [at_least("update of one group 2b over the library's rows", seconds["rows/hf"] / min(ours), 5.0)]


def step_verdicts(size: str, results: dict) -> list[Verdict]:
    """Targets of whole steps, from a results file of bench_step that holds g, and b and a where they were measured. size: the
    title, which begins with it."""
    variants = summarise(results)["variants"]
    if "g" not in variants:
        return []
    g, b, a = (variants.get(name) for name in ("g", "b", "a"))
    seconds, found = g["seconds"], []
    if b:
        over = g["over_b"]
        found += [at_least(f"{size}: update over (b)", over["update"], 5.0)]
        found += [at_least(f"{size}: all but the rollout over (b)", over["without_rollout"], 4.0)]
        share = b["seconds"]["rollout"] / b["step_s"]
        if share <= ROLLOUT_SHARE:
            found.append(at_least(f"{size}: whole step over (b)", over["step"], 2.5))
        else:  # were all else free, a step would still be (g)'s rollout long
            bound = b["step_s"] / seconds["rollout"]
            text = (
                f"{size}: whole step over (b), 85 % of the rollout's bound {bound:.2f}x (rollout is {share:.0%} of (b))"
            )
            found.append(at_least(text, over["step"], 0.85 * bound))
    if a:
        found.append(at_least(f"{size}: whole step over (a)", g["over_a"]["step"], 3.5))
    found.append(at_least(f"{size}: utilisation of the update, useful FLOPs", g["mfu"], UTILISATION[size[:2]], "%"))
    stretch = at_least(f"{size}: the same, stretch", g["mfu"], STRETCH, "%")
    found.append(stretch if stretch.passed else Verdict(stretch.target, stretch.measured, None))
    if size.startswith("8b"):
        found.append(below(f"{size}: weight sync", seconds["sync"], 1.5, "s"))
    found.append(below(f"{size}: sleep plus wake", seconds["sleep"] + seconds["wake"], 1.0, "s"))
    if b and g["peak_update_gib"] and b["peak_update_gib"]:
        peaks = g["peak_update_gib"], b["peak_update_gib"]
        found.append(below(f"{size}: peak memory of the update, not above (b)", *peaks, "GiB"))
    return found


def peer_verdicts(results: dict) -> list[Verdict]:
    variants = summarise(results)["variants"]
    wanted = {"g": ("clips cached", 10.0), "g-fly": ("clips decoded on the fly", 5.0)}
    return [
        at_least(f"peer's workload, {words}: over its {PEER_STEP_S} s", PEER_STEP_S / variants[name]["step_s"], times)
        for name, (words, times) in wanted.items()
        if name in variants
    ]


def print_verdicts(found: list[Verdict]) -> None:
    for verdict in found:
        print(f"{verdict.word:6} {verdict.measured:>12}  {verdict.target}")
    count = sum(verdict.passed is True for verdict in found)
    print(f"{count} of {len(found)} targets pass" if found else "no results yet")


# ---- markdown -------------------------------------------------------------------------------------------------------


def render(out: Path, document: Path) -> list[str]:
    """Write the results as sections of `document`, in place of those with the same titles; -> the titles written."""
    stages = (read_json(out / "gpu.json") or {"stages": {}})["stages"]
    sections: dict[str, str] = {}
    for title, file in STEPS.items():
        if results := read_json(out / file):
            where = f"{results['settings']['ranks']} x {results['host']['device']}"
            sections[f"Whole steps, {title[:2].upper()} on {where}"] = step_section(results, commands_of(stages, file))
    if results := read_json(out / "peer-2b.json"):
        sections["The peer's workload, 2B"] = step_section(results, commands_of(stages, "peer-2b.json"))
    if packed := read_json(out / "packed-2b.json"):
        sections["The update of one group, packed against rows"] = packed_section(packed, stages.get("packed-2b", {}))
    if figures := read_json(out / "evaluate-2b.json"):
        sections["Evaluation, 2B, cached clips of 128 frames"] = evaluate_section(
            figures, stages.get("evaluate-2b", {})
        )
    if found := verdicts(out):
        rows = [f"| {verdict.target} | {verdict.measured} | {verdict.word} |" for verdict in found]
        sections["Targets"] = "\n".join(["| target | measured | |", "|---|---|---|", *rows])
    text = document.read_text(encoding="utf-8") if document.exists() else "# Measured on GPUs\n"
    for title, body in sections.items():
        text = replace_section(text, title, body)
    if sections:
        document.write_text(text, encoding="utf-8")
    return list(sections)


def replace_section(text: str, title: str, body: str) -> str:
    """The document with "## title" and this body in place of the section of that title, or at the end."""
    section = f"## {title}\n\n{body.strip()}\n"
    found = re.search(rf"^## {re.escape(title)}$.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        return f"{text.rstrip()}\n\n{section}"
    rest = text[found.end() :]
    return text[: found.start()] + section + (f"\n{rest}" if rest else "")


def commands_of(stages: dict, result: str) -> list[str]:
    """Commands that wrote to this results file, each once."""
    listed = [line for record in stages.values() for line in record.get("commands", [])]
    return list(dict.fromkeys(line for line in listed if f"/{result}" in line))


def heading(date: str, device: str, versions: dict[str, str], commands: list[str], sentence: str) -> list[str]:
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    code = [f"    {command}" for command in commands]
    return [f"{device}, {date}, {packages}.", sentence, "", *code, *([""] if code else [])]


def step_section(results: dict, commands: list[str]) -> str:
    settings, host, summary = results["settings"], results["host"], summarise(results)["variants"]
    sentence = (
        f"{settings['prompts']} prompts per GPU and step, clips of {settings['frames']} frames, {settings['group_size']} "
        f"responses ({settings['response_tokens']}, at most {settings['max_response_tokens']} tokens). Seconds are medians; the "
        "last three columns are times faster than (b): the update, all but the rollout, the step."
    )
    device = f"{settings['ranks']} x {host['device']}"
    lines = heading(host["date"], device, host["versions"], commands, sentence)
    phases = [phase for phase in PHASES if any(row["seconds"][phase] for row in summary.values())]
    names = " | ".join(phases)
    lines.append(f"| variant | steps | {names} | step | tokens/s | utilisation | peak, GiB | update | rest | step |")
    lines.append("|---" * (len(phases) + 9) + "|")
    for name, row in sorted(summary.items()):
        over = row.get("over_b")
        gains = [shown(over[key], "x") for key in ("update", "without_rollout", "step")] if over else [""] * 3
        cells = [
            name, str(row["steps"]), *(f"{row['seconds'][phase]:.2f}" for phase in phases), f"{row['step_s']:.2f}",
            f"{row['row_tokens_per_gpu_s']:.0f}", shown(row["mfu"], "%") if row["mfu"] else "",
            f"{row['peak_update_gib']:.1f}" if row["peak_update_gib"] else "", *gains,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    for kind in ("failed", "notes"):
        lines += [f"\n{kind} {name}: {why}" for name, why in results.get(kind, {}).items()]
    return "\n".join(lines)


def packed_section(packed: dict, record: dict) -> str:
    lines = heading(
        record.get("date", ""), packed.get("device", "one GPU"), record.get("versions", {}), record.get("commands", []),
        "One group, forward and backward, everything trained, gradient checkpointing, no ZeRO; medians of interleaved rounds.",
    )  # fmt: skip
    slowest = max(row["median_s"] for row in packed["variants"])
    lines += ["| variant | seconds | against the slowest | useful TFLOP/s | peak, GiB |", "|---|---|---|---|---|"]
    for row in packed["variants"]:
        rate, peak = packed["flops"] / row["median_s"] / 1e12, row["peak_gib"]
        times = shown(slowest / row["median_s"], "x")
        lines.append(
            f"| {row['variant']} | {row['median_s']:.3f} | {times} | {rate:.1f} | {f'{peak:.1f}' if peak else ''} |"
        )
    gaps = [f"{name} {gap['median']:.1e}" for name, gap in packed.get("gradients", {}).items()]
    if gaps:
        lines.append(
            "\nGradients were compared first, with those of the library's forward (median over parameters of norm of the "
            f"difference over norm): {', '.join(gaps)}."
        )
    return "\n".join(lines)


def evaluate_section(figures: dict, record: dict) -> str:
    sentence = f"{figures['questions']} questions about {figures['clips']} clips; a way's median time counts."
    lines = heading(record.get("date", ""), "One GPU", record.get("versions", {}), record.get("commands", []), sentence)
    idle = figures.get("gpu_idle_share") or {}
    shown = {way: f"{idle[way]:.1%}" if way in idle else "an unknown share" for way in ("loop", "pipeline")}
    lines += ["| way | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in figures["median_s"].items()]
    lines.append(
        f"\nThe pipeline takes {figures['times_the_loop']:.2f} times less than the loop; its engine is without a request for "
        f"{figures['engine_idle_share']:.1%} of the time, "
        f"the GPU without a kernel for {shown['pipeline']} (loop: {shown['loop']})."
    )
    return "\n".join(lines)
