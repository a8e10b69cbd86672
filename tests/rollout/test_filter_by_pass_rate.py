"""scripts/filter_by_pass_rate.py: selection and resume without a model; one real run marked slow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.dataset import load

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "scripts" / "filter_by_pass_rate.py"


@pytest.fixture(scope="module")
def program():
    from scripts import filter_by_pass_rate

    return filter_by_pass_rate


def write_data(folder: Path, count: int = 6) -> Path:
    path = folder / "train.jsonl"
    rows = [
        {"problem_id": f"p{i}", "problem": f"Is {i} even?", "answer": "Yes" if i % 2 == 0 else "No",
         "problem_type": "boolean", "data_type": "text", "note": {"kept": [i]}}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_selection_is_strict_and_keeps_rows_whole(program, tmp_path):
    samples = load([str(write_data(tmp_path))])
    values = [0.0, 0.125, 0.5, 0.875, 1.0, None]
    rates = {f"{s.file}:{s.line}": {"pass_rate": v} for s, v in zip(samples, values, strict=True)}
    kept = tmp_path / "kept.jsonl"
    assert program.write_kept(kept, samples, rates, 0.0, 1.0) == 3
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(row["problem_id"], row["pass_rate"], row["note"]) for row in rows] == [
        ("p1", 0.125, {"kept": [1]}),
        ("p2", 0.5, {"kept": [2]}),
        ("p3", 0.875, {"kept": [3]}),
    ]
    assert program.write_kept(kept, samples, rates, 0.125, 0.875) == 1
    assert [s.id for s in load([str(kept)])] == ["p2"]


def test_a_cut_line_is_dropped_and_other_settings_refused(program, tmp_path):
    settings = {"model": "m", "samples": 4}
    path = tmp_path / "rates.jsonl"
    program.prepare_rates(path, settings)
    whole = json.dumps({"file": "a.jsonl", "line": 3, "pass_rate": 0.5})
    with open(path, "a") as out:
        out.write(whole + "\n" + whole[:20])
    assert list(program.read_rates(tmp_path, settings)) == ["a.jsonl:3"]
    program.prepare_rates(path, settings)
    assert path.read_text().endswith(whole + "\n")
    with pytest.raises(ValueError, match=r"rates.jsonl was made with other --samples"):
        program.read_rates(tmp_path, {"model": "m", "samples": 8})
    assert program.read_shard("3/4") == (3, 4)
    for text in ("4/4", "1", "-1/2", "a/b"):
        with pytest.raises(ValueError, match="--shard must be i/n"):
            program.read_shard(text)


@pytest.mark.slow
def test_real_run_goes_on_where_it_stopped(tiny, tmp_path):
    data = write_data(tmp_path)
    out = tmp_path / "filtered"
    command = [sys.executable, str(PROGRAM), "--model", tiny("qwen3_vl"), "--data", str(data), "--output_dir", str(out)]
    command += ["--samples", "3", "--max_prompt_tokens", "300", "--max_response_tokens", "8", "--kv_cache_gib", "0.05"]

    def run(*flags):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    first = run("--shard", "0/2")
    assert "6 rows, 0 tried before, 3 to do" in first and "3 rows of other shards have no rate yet" in first
    assert not (out / "kept.jsonl").exists()
    second = run()
    assert "6 rows, 3 tried before, 3 to do" in second
    rates = [json.loads(line) for path in sorted(out.glob("rates*")) for line in path.read_text().splitlines()]
    rates = [row for row in rates if "settings" not in row]
    assert sorted(row["line"] for row in rates) == [1, 2, 3, 4, 5, 6]
    assert all(row["pass_rate"] in (0, 1 / 3, 2 / 3, 1) for row in rates)
    expected = sum(0 < row["pass_rate"] < 1 for row in rates)
    assert len((out / "kept.jsonl").read_text().splitlines()) == expected
    assert "0 to do" in run()
