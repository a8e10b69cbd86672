"""What a user does wrong or a machine does badly: each ends in one clear message, and no answer on disk is lost."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.records import Media, StoredBytes
from evaluate import custom
from evaluate._flags import model_problem
from evaluate._judge import read_labels
from evaluate._predictions import Writer, media_name, read_predictions
from evaluate._report import answer_html
from evaluate._run import main
from evaluate._scoring import Answer
from scripts import compare_runs
from tests.evaluate.fakes import TOY, FakeEngine, fake_parts, load, write_clip, write_toy

ROOT = Path(__file__).resolve().parents[2]
FAKES = [sys.executable, str(ROOT / "tests/evaluate/fakes.py")]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder, clips=20, questions=3)
    return folder


def run(toy: Path, *flags: str, engine: FakeEngine | None = None, benchmark=TOY, decode=True) -> int:
    make_engine, make_encoder, _ = fake_parts(engine=engine, decode=decode)
    arguments = ["--model", "m", "--data_dir", str(toy), *flags]
    return main(benchmark, arguments, make_engine=make_engine, make_encoder=make_encoder)


ROW = {"problem": "?", "options": ["A. x", "B. y"], "solution": "A", "problem_type": "multiple choice", "path": "v.mp4"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "toy.json:1: not JSON"),
        ("5", "toy.json:1: must hold a list of rows, got int"),
        ("[]", "holds no records"),
        ('["text"]', "toy.json:1: a row must be an object, got str"),
        (json.dumps([ROW, {**ROW, "path": ""}]), "toy.json:2: field 'path' is missing or empty"),
        (json.dumps([{k: v for k, v in ROW.items() if k != "solution"}]), "needs the fields problem and solution"),
        (json.dumps([{**ROW, "problem_type": "riddle"}]), "toy.json:1: unknown problem_type 'riddle'"),
        (json.dumps([{**ROW, "options": "A. x"}]), "toy.json:1: field 'options' must be a list of strings"),
        (json.dumps([{**ROW, "solution": "F"}]), "all 1 records are excluded: gold answer cannot be read"),
    ],
)
def test_bad_annotations_are_told_with_file_and_line(content, said, tmp_path, capsys):
    (tmp_path / "toy.json").write_text(content)
    assert run(tmp_path, "--output_dir", str(tmp_path / "out")) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_line_separators_inside_strings_cut_no_line(tmp_path, capsys):
    """U+2028 and U+0085 are line ends for str.splitlines(), not for JSON lines: questions, answers and verdicts hold them."""
    rows = [
        {"id": str(n), "problem": f"Why\u2028{n}\u0085?", "answer": "so\u2028it is", "problem_type": "open-ended"}
        for n in range(3)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    places = []
    for name, words in (("one", "so\u2028it is"), ("two", "no\u2028never")):
        out = tmp_path / name
        flags = ("--data", str(tmp_path / "data.jsonl"), "--output_dir", str(out))
        assert (
            run(
                tmp_path,
                *flags,
                engine=FakeEngine(lambda text, words=words: f"<answer>{words}</answer>"),
                benchmark=custom.BENCHMARK,
            )
            == 0
        )
        (folder,) = [path.parent for path in out.rglob("run.json")]
        assert len(read_predictions(folder)) == 3
        places.append(str(folder))
    assert compare_runs.main([*places, "--json", str(tmp_path / "f.json")]) == 0
    (figures,) = json.loads((tmp_path / "f.json").read_text()).values()
    assert figures["common"] == 3 and figures["losses"] == 3
    label = {"question": "?\u2028", "gold": "a", "answer": "b", "label": 0}
    (tmp_path / "labels.jsonl").write_text(json.dumps(label, ensure_ascii=False) + "\n")
    assert len(read_labels(str(tmp_path / "labels.jsonl"))) == 1


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("{}/absent", "no such folder; correct the path"),
        ("./absent", "no such folder; correct the path"),
        ("runs/mine/final", "no such folder; correct the path"),
        ("tests/absent", "no such folder; correct the path"),  # beside folders that are there: no repository's name
        ("{}/empty", "no config.json in that folder"),
        ("{}/empty/file", "is a file"),
    ],
)
def test_a_model_that_is_none_is_told_before_a_run_folder_is_made(model, said, toy, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/file").touch()
    model, out = model.format(tmp_path), tmp_path / "out"
    assert main(TOY, ["--model", model, "--data_dir", str(toy), "--output_dir", str(out)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"toy: --model {model}: ") and said in told and told.count("\n") == 1
    assert not out.exists()


def test_the_name_of_a_repository_may_be_one():
    assert model_problem("owner/some-model_2.5") is None and model_problem("some-model") is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("{% if %}", "line 1: Expected an expression"),
        ("{{ nothing.at_all }}", "fails on sample 000-0: 'nothing' is undefined"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_a_template_that_fails_is_told_before_anything_runs(content, said, more, toy, tmp_path, capsys):
    template = tmp_path / "own.jinja"
    if content is not None:
        template.write_text(content)
    flags = ["--prompt_template", str(template), "--output_dir", str(tmp_path / "out"), *more]
    assert run(toy, *flags) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"toy: --prompt_template {template}") and said in told and not (tmp_path / "out").exists()
    (tmp_path / "good.jinja").write_text("{{ question }} Say a letter.")
    flags[1] = str(tmp_path / "good.jinja")
    assert run(toy, *flags, "--limit", "2") == 0


def test_errors_name_the_benchmark_once_and_folders_that_are_not_there(toy, tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path / "out")]
    assert run(tmp_path / "absent", *flags) == 2
    assert f"there is no folder {tmp_path / 'absent'}. " in capsys.readouterr().err
    (tmp_path / "toy.json").write_text((toy / "toy.json").read_text())
    assert run(tmp_path, *flags, "--media_dir", str(tmp_path / "films")) == 2
    said = capsys.readouterr().err
    assert said.startswith("toy: none of its 20 media files is there (first: ")
    assert f"there is no folder {tmp_path / 'films'}. " in said


def custom_rows(toy: Path, folder: Path) -> Path:
    """The toy's first ten clips, two questions each, as a file of the dataset format beside their files."""
    rows = [row for row in json.loads((toy / "toy.json").read_text()) if row["problem_id"] < "010"]
    shutil.copytree(toy / "clips", folder / "clips")
    rows = [{**row, "videos": [row["path"]]} for row in rows if not row["problem_id"].endswith("-2")]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "mine.jsonl"


@pytest.mark.parametrize("relative", [False, True])
def test_custom_data_with_missing_and_empty_videos_ends_with_their_rows_as_failures(
    relative, toy, tmp_path, capsys, monkeypatch
):
    """10 clips of two questions: one file is gone, one is empty. They fail; the others are answered; all are in the score."""
    file, out = custom_rows(toy, tmp_path), tmp_path / "out"
    good = (tmp_path / "clips/003.mp4").read_bytes()
    (tmp_path / "clips/003.mp4").unlink()
    (tmp_path / "clips/007.mp4").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    flags = ["--data", "mine.jsonl" if relative else str(file), "--output_dir", str(out)]
    engine = FakeEngine(lambda text: "<answer>A</answer>")
    assert run(tmp_path, *flags, engine=engine, benchmark=custom.BENCHMARK) == 0
    assert len(engine.asked) == 16
    (folder,) = [path.parent for path in out.rglob("run.json")]
    results = json.loads((folder / "results.json").read_text())
    assert (results["n"], results["n_failed"], results["failures"]) == (20, 4, {"media_error": 4})
    # (clip + question) % 4 == 0 is right: 0-0, 4-0, 8-0 and 3-1 (gone), 7-1 (empty)
    assert results["metrics"]["accuracy"]["value"] == pytest.approx(3 / 20)
    failed = [json.loads(line) for line in (folder / "failed.jsonl").read_text().splitlines()]
    gone, empty = str(tmp_path / "clips/003.mp4"), str(tmp_path / "clips/007.mp4")
    assert [(row["line"], row["path"]) for row in failed] == [(7, gone), (8, gone), (15, empty), (16, empty)]
    said = capsys.readouterr().out
    assert f"custom: 1 media files are missing (first: {gone})" in said
    assert (
        f"custom: 4 failed, listed in {folder / 'failed.jsonl'}; first 003-0: media_error: {gone}: does not exist"
        in said
    )

    (tmp_path / "clips/003.mp4").write_bytes(good)  # brought later: the same run goes on
    engine = FakeEngine(lambda text: "<answer>A</answer>")
    assert run(tmp_path, *flags, "--retry_failed", "--strict", engine=engine, benchmark=custom.BENCHMARK) == 3
    assert [name.split("-", 1)[1] for name in engine.asked] == ["003-0", "003-1"]
    assert [path.parent for path in out.rglob("run.json")] == [folder]
    results = json.loads((folder / "results.json").read_text())
    assert results["n_failed"] == 2 and results["metrics"]["accuracy"]["value"] == pytest.approx(4 / 20)

    shutil.rmtree(tmp_path / "clips")  # scoring again needs no videos
    assert run(tmp_path, *flags, "--score_only", benchmark=custom.BENCHMARK) == 0
    assert json.loads((folder / "results.json").read_text())["metrics"] == results["metrics"]


def test_custom_data_with_unusable_rows_is_refused_naming_them_alone(toy, tmp_path, capsys):
    file = custom_rows(toy, tmp_path)
    (tmp_path / "clips/003.mp4").unlink()
    rows = file.read_text().splitlines()
    rows[4] = rows[4].replace("<answer>C</answer>", "<answer>Q</answer>")
    file.write_text("\n".join(rows))
    flags = ["--data", str(file), "--output_dir", str(tmp_path / "out")]
    assert run(tmp_path, *flags, benchmark=custom.BENCHMARK) == 2
    said = capsys.readouterr().err
    assert "1 unusable rows" in said and f"{file}:5: " in said and "003.mp4" not in said


def test_other_files_under_the_same_names_are_not_reported_with_the_first_ones_answers(toy, tmp_path, capsys):
    """--media_dir with the same clips cut short: prompts, names and settings are equal, the pixels are not."""
    for clip in range(20):
        write_clip(tmp_path / f"short/clips/{clip:03d}.mp4", seed=clip, seconds=0.5)
    sizes = [(folder / "clips/000.mp4").stat().st_size for folder in (toy, tmp_path / "short")]
    flags = ["--output_dir", str(tmp_path / "out")]
    assert run(toy, *flags, "--media_dir", str(toy)) == 0
    (folder,) = [path.parent for path in (tmp_path / "out").rglob("run.json")]
    rows = read_predictions(folder)
    assert rows["000-0"]["media_bytes"] == sizes[0] != sizes[1]
    assert run(toy, *flags, "--media_dir", str(tmp_path / "short")) == 2
    said = capsys.readouterr().err
    first = f"{tmp_path}/short/clips/000.mp4, {sizes[0]} bytes when it was answered, now {sizes[1]}"
    assert f"holds answers about other files: 60 questions' media have another size now (first: {first})" in said
    assert read_predictions(folder) == rows
    assert run(toy, *flags, "--media_dir", str(tmp_path / "short"), "--score_only") == 0  # scores what is there
    shutil.copytree(toy / "clips", tmp_path / "moved/clips")
    assert run(toy, *flags, "--media_dir", str(tmp_path / "moved")) == 0  # a folder may be moved
    assert run(toy, "--output_dir", str(tmp_path / "new"), "--media_dir", str(tmp_path / "short")) == 0
    shutil.copy(tmp_path / "short/clips/000.mp4", tmp_path / "moved/clips/000.mp4")  # one was downloaded again
    engine = FakeEngine()
    assert run(toy, *flags, "--media_dir", str(tmp_path / "moved"), "--retry_failed", engine=engine) == 0
    assert sorted(name.split("-", 1)[1] for name in engine.asked) == ["000-0", "000-1", "000-2"]
    sizes_now = [row["media_bytes"] for name, row in read_predictions(folder).items() if name.startswith("000")]
    assert sizes_now == [sizes[1]] * 3 and len(read_predictions(folder)) == 60


def test_media_that_are_bytes_or_lists_of_frames_are_known_by_what_they_hold():
    stored = StoredBytes("abc", 5, "f.parquet", 0, ("video",))
    # of b"frame": sha256 as the tool sha256sum prints it
    digest = "9dff50df08c635815f4b19da10f756605a34a79a48d4ba48712782502975a70e"
    names = [media_name(m) for m in (Media("video", path="/a/v.mp4"), Media("video", data=stored))]
    assert names == ["v.mp4", "abc"]
    assert media_name(Media("video", frames=("/a/1.png", "/b/2.png"), fps=2.0)) == (["1.png", "2.png"], 2.0)
    assert media_name(Media("image", data=b"frame")) == digest


def test_an_output_folder_that_cannot_be_made(toy, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(toy, "--output_dir", str(tmp_path / "file")) == 2
    said = capsys.readouterr().err
    assert "toy: " in said and str(tmp_path / "file") in said and "Traceback" not in said


def test_a_full_disk_ends_the_run_and_the_next_goes_on(toy, tmp_path):
    """A limit of 8 KiB per file stands for the disk: the run stops with its first answers kept; without it, it ends."""
    command = [*FAKES, "--model", "m", "--data_dir", str(toy), "--run_dir", str(tmp_path / "run")]
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *command]
    done = subprocess.run(limited, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("toy: [Errno"), done.stderr
    assert "predictions.jsonl" in done.stderr and "the same command goes on" in done.stderr
    kept = read_predictions(tmp_path / "run")
    assert 0 < len(kept) < 60
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().split("\n") if line]
    assert len(lines) == len({line["id"] for line in lines}) == 60
    assert {line["id"]: line["response"] for line in lines}.items() >= {
        n: row["response"] for n, row in kept.items()
    }.items()


def test_a_second_process_on_the_same_folder_is_refused_and_loses_nothing(toy, tmp_path, capsys):
    """Also one that only scores: it would put a new predictions.jsonl under the writer's hand."""
    folder = tmp_path / "run"
    command = [*FAKES, "--model", "m", "--data_dir", str(toy), "--run_dir", str(folder), "--max_concurrent", "1"]
    first = subprocess.Popen([*command, "--loaders", "1"], env={**ENV, "FAKE_DELAY_S": "0.15"})
    try:
        deadline = time.monotonic() + 60
        while not (folder / "predictions.jsonl").is_file() or not (folder / "predictions.jsonl").stat().st_size:
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        for flags in (["--score_only"], ["--retry_failed"], []):
            assert run(toy, "--run_dir", str(folder), *flags) == 2
            assert f"{folder} is in use by another run" in capsys.readouterr().err
        assert first.wait(timeout=120) == 0
    finally:
        first.kill()
    assert len(read_predictions(folder)) == 60
    assert run(toy, "--run_dir", str(folder), "--score_only") == 0


def test_an_error_of_any_kind_while_scoring_is_raised_not_swallowed(tmp_path):
    """A thread that died of it would let a run go on for hours without writing a row."""

    def broken(row):
        raise AttributeError("no such thing")

    with pytest.raises(AttributeError, match="no such thing"), Writer(tmp_path / "predictions.jsonl", broken) as writer:
        writer.put({"id": "a"})
    assert (tmp_path / "predictions.jsonl").read_bytes() == b""


def test_damaged_run_json_is_named(toy, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"model": ')
    assert run(toy, "--run_dir", str(folder)) == 2
    assert f"{folder} is not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", ["--judge_url http://x", "--judge_labels nowhere.jsonl --judge_model m", "--judge_labels nowhere.jsonl"]
)
def test_judge_flags_that_cannot_work_are_usage_errors(flags, toy, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(toy, "--output_dir", str(tmp_path), *flags.split())
    assert stopped.value.code == 2 and "--judge" in capsys.readouterr().err


def test_a_template_that_an_official_prompt_would_ignore_is_a_usage_error(toy, tmp_path, capsys):
    from evaluate import videomme

    with pytest.raises(SystemExit):
        run(toy, "--output_dir", str(tmp_path), "--prompt_template", "t.jinja", benchmark=videomme.BENCHMARK)
    assert "--prompt direct or think" in capsys.readouterr().err


def test_labels_name_the_line_and_field(tmp_path):
    good = {"question": "?", "gold": "a", "answer": "b", "label": 1}
    (tmp_path / "l.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({**good, "label": "yes"}) + "\n")
    with pytest.raises(ValueError, match=r"l\.jsonl:2: label must be 0 or 1, got 'yes'"):
        read_labels(str(tmp_path / "l.jsonl"))


def open_data(tmp_path: Path, gold: str = "blue") -> list[str]:
    rows = [{"id": str(n), "problem": f"Colour {n}?", "answer": gold, "problem_type": "open-ended"} for n in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data", str(tmp_path / "data.jsonl"), "--run_dir", str(tmp_path / "run"), "--judge_open"]


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_judge_that_cannot_be_reached_gives_no_score(tmp_path, capsys, monkeypatch):
    """Port 9 of this machine has no server: three answers wait, none is 0; engine figures of the answering run stay."""
    from rewards import judge

    monkeypatch.setattr(judge, "Judge", functools.partial(judge.Judge, backoff_s=0.001))
    flags = open_data(tmp_path)
    assert (
        run(tmp_path, *flags, engine=FakeEngine(lambda text: "<answer>blue</answer>"), benchmark=custom.BENCHMARK) == 0
    )
    before = results_of(tmp_path / "run")["engine"]
    judging = ["--judge_url", "http://127.0.0.1:9/v1", "--judge_model", "m"]
    assert run(tmp_path, *flags, *judging, benchmark=custom.BENCHMARK) == 0
    assert "gave no reply for 3 of 3 answers" in capsys.readouterr().out
    results = results_of(tmp_path / "run")
    assert (results["n_unjudged"], results["metrics"]["accuracy"]["n"]) == (3, 0)
    assert results["engine"]["judge"]["without_reply"] == 3 and before.items() <= results["engine"].items()
    assert (tmp_path / "run/judgements.jsonl").read_bytes() == b""


def test_verdicts_are_not_reused_for_another_gold(tmp_path, monkeypatch):
    from evaluate import _judge

    monkeypatch.setattr(_judge, "local_judge", lambda args: lambda prompts: ["Judgement: 1"] * len(prompts))
    flags = open_data(tmp_path)
    assert (
        run(
            tmp_path,
            *flags,
            "--judge_model",
            "m",
            engine=FakeEngine(lambda text: "<answer>blue</answer>"),
            benchmark=custom.BENCHMARK,
        )
        == 0
    )
    assert results_of(tmp_path / "run")["metrics"]["accuracy"]["value"] == 1.0
    assert run(tmp_path, *open_data(tmp_path, gold="red"), "--score_only", benchmark=custom.BENCHMARK) == 0
    assert results_of(tmp_path / "run")["n_unjudged"] == 3


def test_the_report_does_not_decode_what_never_decoded(toy, monkeypatch):
    from evaluate import _report

    monkeypatch.setattr(_report, "thumbnails", lambda sample: pytest.fail("decoded"))
    (sample, *_) = load(type("Args", (), {"data_dir": str(toy), "annotations": None}))
    row = {"status": "load_timeout", "reason": "not decoded within 9 s", "response": ""}
    page = answer_html(Answer(sample, row, 0.0), with_frames=True)
    assert "not decoded within 9 s" in page and len(page) < 2000


def test_labels_that_look_like_markup_are_printed_as_they_are(tmp_path, capsys):
    rows = [
        {"id": name, "problem": f"{name}?", "answer": "4", "problem_type": "numerical", "data_source": f"[/{name}]"}
        for name in "ab"
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", str(tmp_path / "data.jsonl"), "--output_dir", str(tmp_path / "out")]
    assert run(tmp_path, *flags, engine=FakeEngine(lambda text: "<answer>4</answer>"), benchmark=custom.BENCHMARK) == 0
    assert "[/a]" in capsys.readouterr().out


@pytest.mark.parametrize(("thinking", "value"), [("on", "True"), ("off", "False")])
def test_thinking_sets_the_switch_of_a_template_that_has_one(thinking, value, monkeypatch):
    """A template without it would take the flag and do nothing."""
    import jinja2

    from evaluate import _models

    class Encoder:
        def __init__(self, *_, **__):
            self.chat_template = "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"

    monkeypatch.setattr(_models, "Encoder", Encoder)
    from evaluate._flags import build_parser

    args = build_parser(TOY).parse_args(["--model", "m", "--thinking", thinking, "--cache", "off"])
    encoder, _ = _models.build_encoder(args, "direct", None)
    assert jinja2.Template(encoder.chat_template).render() == value
    monkeypatch.setattr(Encoder, "__init__", lambda self, *_, **__: setattr(self, "chat_template", "{{ messages }}"))
    with pytest.raises(ValueError, match=f"--thinking {thinking}: .* has no such switch"):
        _models.build_encoder(args, "direct", None)
