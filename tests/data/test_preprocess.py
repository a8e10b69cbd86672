"""The preprocessing program: bad media among good, duplicates, resume, kills, time limits, shards, care of the cache."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data import failures, preprocess
from data.decode_pool import run_jobs
from data.frame_cache import FrameCache, cache_files, read_entry, read_pixels
from data.records import Media, Sample
from data.video import MediaError, VideoSettings, read_video
from tests.data.clips import make_clip
from tests.data.test_decode import bad_files

ROOT = Path(__file__).parents[2]
FLAGS = ["--video_max_pixels", "9216", "--fps", "4", "--max_frames", "32"]
SETTINGS = VideoSettings(fps=4, max_frames=32, max_pixels=9216)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def clips(folder: Path, n: int, frames: int = 20) -> list[str]:
    return [make_clip(folder / f"{i}.mp4", frames=frames + i, height=90, width=122) for i in range(n)]


def capture_workers(monkeypatch) -> list:
    """The workers that run_jobs starts from now on, as they come."""
    import data.decode_pool as pool

    started, start = [], pool.start_worker
    monkeypatch.setattr(pool, "start_worker", lambda arguments: started.append(start(arguments)) or started[-1])
    return started


def test_mixed_rows_bad_media_and_resume(tmp_path, capsys):
    from PIL import Image

    good = clips(tmp_path, 3)
    (tmp_path / "bad").mkdir()
    bad = bad_files(tmp_path / "bad")
    Image.new("RGB", (50, 40)).save(tmp_path / "p.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "p.png").read_bytes()[:60])
    rows = [{"videos": good[:2], "id": 0}, {"video": good[2], "start_s": 0.2, "end_s": 0.7}, {"problem": "text only"}]
    rows += [{"videos": [good[0]]}, {"images": ["p.png"]}, {"images": ["torn.png"], "id": "torn"}]
    rows += [{"videos": [path], "id": name} for name, (path, _) in bad.items()]
    file, cache_dir = write(tmp_path / "d.jsonl", rows), str(tmp_path / "cache")
    assert preprocess.main(["--data", file, "--cache_dir", cache_dir, "--workers", "2", *FLAGS]) == 1
    assert "3 videos decoded" in capsys.readouterr().out
    failed = [json.loads(line) for line in Path(cache_dir, "failed.jsonl").read_text().splitlines()]
    assert [row["id"] for row in failed] == ["torn", *bad]
    for row in failed:
        assert row["reason"] and row["remedy"] and row["line"] and row["file"] == file
    # Everything good is there, the window too; nothing temporary is left.
    require = FrameCache(cache_dir, "require")
    wanted = [Media("video", path=path) for path in good[:2]] + [Media("video", path=good[2], start_s=0.2, end_s=0.7)]
    assert require.check(wanted, SETTINGS) == []
    for media in wanted:
        np.testing.assert_array_equal(require.frames(media, SETTINGS).pixels, read_video(media, SETTINGS).pixels)
    assert not list(Path(cache_dir).rglob("*.tmp-*"))
    # The verdict on a content is honoured without trying again.
    media = Media("video", path=bad["truncated.mp4"][0])
    with pytest.raises(MediaError, match="truncated"):
        FrameCache(cache_dir, "prefer").frames(media, SETTINGS)
    assert FrameCache(cache_dir).known_failure(media) is not None
    samples = [
        Sample(name, "q", "a", "math", "video", media=(item,), file="d", line=line)
        for line, (name, item) in enumerate({"good": wanted[0], "cut": media}.items())
    ]
    kept, problems = FrameCache(cache_dir).split_failed(samples)
    assert [sample.id for sample in kept] == ["good"]
    assert (problems[0]["id"], problems[0]["line"]) == ("cut", 1) and "truncated" in problems[0]["reason"]
    # Again: nothing is decoded twice, a repaired file is found and leaves the list.
    make_clip(bad["truncated.mp4"][0], frames=10)
    command = ["--data", file, "--cache_dir", cache_dir, "--on_bad_sample", "skip", *FLAGS]
    assert preprocess.main(command) == 0
    assert "1 videos decoded" in (text := capsys.readouterr().out) and "3 already there" in text
    assert "truncated.mp4" not in Path(cache_dir, "failed.jsonl").read_text()


def test_same_content_is_decoded_once(tmp_path):
    """Four names, one content (identity full ignores mtime): the second waits for the first, then finds its file."""
    path = make_clip(tmp_path / "a.mp4", frames=100, height=90, width=122)
    copies = []
    for i in range(4):
        copies.append(str(tmp_path / f"copy{i}.mp4"))
        Path(copies[-1]).write_bytes(Path(path).read_bytes())
    (tmp_path / "cache").mkdir()
    cache = FrameCache(str(tmp_path / "cache"), identity="full")
    jobs = [Media("video", path=copy) for copy in copies]
    answers = [answer for _, answer in run_jobs(jobs, cache, SETTINGS, {"identity": "full"}, 2, 60)]
    assert sum("cached" in answer for answer in answers) == 3 and len(cache_files(cache.cache_dir)) == 1


def test_time_limit_kills_and_the_rest_goes_on(tmp_path, monkeypatch):
    """A decoder that hangs in the middle of a video (it is stopped there: no machine is too fast for that); small clips
    before and after it are done."""
    slow = make_clip(tmp_path / "slow.mp4", frames=60, height=720, width=1280, options={"preset": "ultrafast"})
    small = clips(tmp_path, 2)
    (tmp_path / "cache").mkdir()
    cache = FrameCache(str(tmp_path / "cache"))
    settings = VideoSettings(fps=20, max_frames=60, max_pixels=2_000_000)
    list(run_jobs([Media("video", path=small[0])], cache, settings, {}, 1, 60))
    started, done = capture_workers(monkeypatch), threading.Event()

    def hang() -> None:
        while not done.wait(0.001):
            if list(Path(cache.cache_dir).glob("??/*/*.tmp-*")):
                os.kill(started[0].process.pid, signal.SIGSTOP)
                return

    watcher = threading.Thread(target=hang)
    watcher.start()
    jobs = [Media("video", path=path) for path in (small[0], slow, small[1])]
    answers = {media.path: answer for media, answer in run_jobs(jobs, cache, settings, {}, 1, 6)}
    done.set()
    watcher.join()
    assert "took over 6 s" in answers[slow]["reason"]
    assert answers[small[0]] == {"cached": True, "duration_s": 1.0} and answers[small[1]]["frames"] > 0
    assert not list(Path(cache.cache_dir).rglob("*.tmp-*"))


def test_a_dying_decoder_is_a_failure_of_its_video_only(tmp_path, monkeypatch):
    small = clips(tmp_path, 3)
    (tmp_path / "cache").mkdir()
    cache = FrameCache(str(tmp_path / "cache"))
    started = capture_workers(monkeypatch)
    running = run_jobs([Media("video", path=path) for path in small], cache, SETTINGS, {}, 1, 60)
    first = next(running)
    started[0].process.kill()
    rest = dict(running)
    assert "frames" in first[1] and len(started) == 2
    assert ["decoder died (SIGKILL)" in answer.get("reason", "") for answer in rest.values()].count(True) == 1


def test_failures_of_other_files_stay_and_cured_ones_go(tmp_path):
    """The list of train.jsonl outlives a run over val.jsonl; a medium that works leaves the lists of all shards."""
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(Path(clips(tmp_path, 1)[0]).read_bytes()[:700])
    late = make_clip(tmp_path / "late.mp4", frames=9)
    train = write(tmp_path / "train.jsonl", [{"video": str(torn), "id": "torn"}])
    val = write(tmp_path / "val.jsonl", [{"video": late, "id": "fine"}, {"video": "gone.mp4", "id": "gone"}])
    cache_dir = tmp_path / "cache"
    command = ["--cache_dir", str(cache_dir), "--workers", "1", "--on_bad_sample", "skip", *FLAGS]
    assert preprocess.main(["--data", train, *command]) == 0
    key = f"{FrameCache(str(cache_dir)).identity(Media('video', path=late))} None None"
    timed_out = {"file": val, "line": 1, "id": "fine", "path": late, "reason": "took over 1 s", "media_key": key}
    (cache_dir / "failed-0of2.jsonl").write_text(json.dumps({**timed_out, "remedy": "raise --timeout_s"}) + "\n")
    with pytest.raises(MediaError, match="took over 1 s"):
        FrameCache(str(cache_dir), "require").frames(Media("video", path=late), SETTINGS)
    assert preprocess.main(["--data", val, *command]) == 0
    listed = [json.loads(line)["id"] for line in (cache_dir / "failed.jsonl").read_text().splitlines()]
    assert listed == ["torn", "gone"]
    assert len(FrameCache(str(cache_dir), "require").frames(Media("video", path=late), SETTINGS).indices) == 4
    # The other shard's list is its own: it forgets when it runs again, and then the cure is no longer needed.
    assert json.loads((cache_dir / "failed-0of2.jsonl").read_text())["id"] == "fine"
    assert json.loads((cache_dir / "cured.jsonl").read_text())["media_key"] == key
    assert preprocess.main(["--data", train, "--shard", "0/2", *command]) == 0
    assert '"fine"' not in "".join(path.read_text() for path in cache_dir.glob("failed*.jsonl"))
    assert preprocess.main(["--data", train, *command]) == 0 and not (cache_dir / "cured.jsonl").exists()


def test_the_way_a_cache_was_made_is_found_without_flags(tmp_path, capsys):
    """--identity full and --storage jpeg are noted in the folder: training reads such a cache as it is."""
    path = clips(tmp_path, 1)[0]
    file, cache_dir = write(tmp_path / "d.jsonl", [{"video": path}]), str(tmp_path / "cache")
    command = ["--data", file, "--cache_dir", cache_dir, "--workers", "1", *FLAGS]
    assert preprocess.main([*command, "--identity", "full", "--storage", "jpeg"]) == 0
    assert json.loads(Path(cache_dir, "cache.json").read_text()) == {"identity": "full", "storage": "jpeg"}
    os.utime(path, (1, 1))  # a copy: full identity does not mind
    reader = FrameCache(cache_dir, "require")
    assert (reader.full, reader.storage) == (True, "jpeg")
    assert len(reader.frames(Media("video", path=path), SETTINGS).indices) == 4
    assert preprocess.main(command) == 0 and "1 already there" in capsys.readouterr().out
    assert preprocess.main([*command, "--storage", "raw"]) == 2
    assert "was made with --identity full --storage jpeg" in capsys.readouterr().err
    assert preprocess.main(["--cache_dir", cache_dir, "--list", "--stats"]) == 0
    assert capsys.readouterr().out.count("jpeg95 (lossy)") == 2
    # A folder that already has files of the usual kind does not become another.
    other = tmp_path / "other"
    other.mkdir()
    FrameCache(str(other)).frames(Media("video", path=path), SETTINGS)
    assert preprocess.main(["--data", file, "--cache_dir", str(other), "--identity", "full"]) == 2


def test_progress_line_and_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preprocess, "PLAIN_LINE_EVERY_S", 0.0)
    paths = clips(tmp_path, 2)
    rows = [
        {"video": paths[0]},
        {"videos": paths},
        {"problem": "text"},
        "no row",
        {"path": paths[1], "video": "1.webm"},
    ]
    file = write(tmp_path / "d.jsonl", rows)
    command = ["--data", file, "--cache_dir", str(tmp_path / "cache"), "--workers", "1", *FLAGS]
    assert preprocess.main(command) == 1
    out, err = capsys.readouterr()
    first, last = err.splitlines()
    assert first.startswith("decoding 1/2, ") and "MB, 0 failed, about " in first and first.endswith(" s left")
    assert last.startswith("decoding 2/2, ") and "about 0 s left" in last
    assert "5 rows (video 3, text 1, unreadable 1), 2 media: 2 videos decoded" in out
    assert "duration: < 10 s 2" in out and f"{file}:4: the row is not a JSON object" in out


def test_a_decoder_that_is_not_there_is_refused_at_start(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    file = write(tmp_path / "d.jsonl", [{"video": "a.mp4"}])
    assert preprocess.main(["--data", file, "--cache_dir", str(tmp_path / "c"), "--decoder", "torchcodec"]) == 2
    assert "--decoder torchcodec: torchcodec is not installed; install it or use" in capsys.readouterr().err


def test_shards_part_the_work(tmp_path):
    file = write(tmp_path / "d.jsonl", [{"videos": [path]} for path in clips(tmp_path, 9, frames=6)])
    parts = [set(preprocess.collect([file], None, (i, 3), None)[0]) for i in range(3)]
    assert sum(len(part) for part in parts) == len(set().union(*parts)) == 9
    assert sum(bool(part) for part in parts) >= 2
    cache_dir = str(tmp_path / "cache")
    for i in range(3):
        command = ["--data", file, "--cache_dir", cache_dir, "--shard", f"{i}/3", "--workers", "1", *FLAGS]
        assert preprocess.main(command) == 0
    assert len(cache_files(cache_dir)) == 9


WAIT_BEFORE_WRITING = """
import pathlib, sys, time
from data import failures, preprocess
write, here = failures._replace, pathlib.Path(sys.argv[1])
def wait_for_the_other(path, records):
    (here / f"read-{sys.argv[2]}").touch()
    while len(list(here.glob("read-*"))) < 2:
        time.sleep(0.002)
    write(path, records)
failures._replace = wait_for_the_other
failures.fcntl.flock = lambda *_: None  # a disk without locks
sys.exit(preprocess.main(sys.argv[3:]))
"""


def test_shards_that_run_at_the_same_time_keep_each_others_lists(tmp_path):
    """Two shards have both read all lists before either writes. Each cures a medium of the other's list and finds a
    failure of its own; an earlier layout's list belongs to nobody who runs. Nothing may be lost, whoever writes last."""
    paths = clips(tmp_path, 24, frames=6)  # by a hash of their paths: three and more each
    place = {path: shard for shard in (0, 1) for path in shard_of(tmp_path, paths, shard)}
    mine = [[path for path in paths if place[path] == shard] for shard in (0, 1)]
    assert min(map(len, mine)) >= 3
    cache_dir = tmp_path / "cache"
    cache_dir.mkdir()
    cache = FrameCache(str(cache_dir))

    def listed(path: str) -> str:
        key = f"{cache.identity(Media('video', path=path))} None None"
        record = {"file": "other.jsonl", "line": 1, "id": "x", "path": path, "reason": "took over 1 s", "remedy": "y"}
        return json.dumps({**record, "media_key": key}) + "\n"

    for shard in (0, 1):
        Path(mine[shard][0]).write_bytes(Path(mine[shard][0]).read_bytes()[:700])  # now truncated
        (cache_dir / f"failed-{shard}of2.jsonl").write_text(listed(mine[1 - shard][1]))
    (cache_dir / "failed-2of3.jsonl").write_text(listed(mine[0][2]) + listed(mine[1][2]))
    file = write(tmp_path / "d.jsonl", [{"videos": [path]} for path in paths])
    (tmp_path / "both").mkdir()
    command = ["--data", file, "--cache_dir", str(cache_dir), "--workers", "1", *FLAGS]
    program = tmp_path / "program.py"
    program.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nif __name__ == '__main__':\n" + "".join(
        f"    {line}\n" for line in WAIT_BEFORE_WRITING.strip().splitlines()
    ))  # fmt: skip
    both = [
        subprocess.Popen(
            [sys.executable, str(program), str(tmp_path / "both"), str(shard), *command, "--shard", f"{shard}/2"],
            stdout=subprocess.DEVNULL,
        )
        for shard in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in both] == [1, 1]
    cache = FrameCache(str(cache_dir))
    unusable = [path for path in paths if cache.known_failure(Media("video", path=path))]
    assert sorted(unusable) == sorted([mine[0][0], mine[1][0]])
    for shard in (0, 1):  # each list holds its own shard's failure beside the row of a data file it did not see
        text = (cache_dir / f"failed-{shard}of2.jsonl").read_text()
        assert [json.loads(row)["path"] for row in text.splitlines()] == [mine[shard][0], mine[1 - shard][1]]
    assert not list(cache_dir.glob("*.tmp-*"))
    # The next runs tidy their own lists; the failure found later than a cure counts again.
    assert preprocess.main([*command, "--shard", "0/2"]) == 1
    assert mine[1][1] not in (cache_dir / "failed-0of2.jsonl").read_text()


def shard_of(folder: Path, paths: list[str], shard: int) -> list[str]:
    file = write(folder / "all.jsonl", [{"videos": [path]} for path in paths])
    return [media.path for media in preprocess.collect([file], None, (shard, 2), None)[0]]


def test_a_later_failure_outlives_an_earlier_cure(tmp_path):
    """attempt is a logical clock: failed 1, cured 2, failed 3; the cure wins a tie; rows of old lists count 0."""

    def note(shard, problems, usable):
        own = tmp_path / failures.list_name("failed", shard)
        failures.note_run(str(tmp_path), shard, str(own), problems, {"d"}, usable)
        return set(failures.known_failures(str(tmp_path)))

    bad = {"file": "d", "line": 1, "id": "", "path": "a.mp4", "reason": "r", "remedy": "m", "media_key": "k"}
    (tmp_path / "failed-4of9.jsonl").write_text(json.dumps(bad) + "\n")
    assert failures.known_failures(str(tmp_path)).keys() == {"k"}
    assert note((0, 2), [], [("k", "a.mp4")]) == set()
    assert json.loads((tmp_path / "cured-0of2.jsonl").read_text())["attempt"] == 1
    assert note((1, 2), [bad], []) == {"k"}
    assert json.loads((tmp_path / "failed-1of2.jsonl").read_text())["attempt"] == 2
    assert note((0, 2), [], [("k", "a.mp4")]) == set()
    assert note((2, 3), [bad], []) == {"k"}
    (tmp_path / "cured-7of9.jsonl").write_text(json.dumps({"path": "a.mp4", "media_key": "k", "attempt": 4}) + "\n")
    assert set(failures.known_failures(str(tmp_path))) == set()
    (tmp_path / "cured-7of9.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"cured-7of9\.jsonl:1: is no record"):
        failures.known_failures(str(tmp_path))


def test_care_of_the_cache(tmp_path, capsys):
    paths = clips(tmp_path, 3)
    cache_dir = tmp_path / "cache"
    cache_dir.mkdir()
    cache = FrameCache(str(cache_dir))
    for path in paths:
        cache.frames(Media("video", path=path), SETTINGS)
    command = ["--cache_dir", str(cache_dir)]
    assert preprocess.main([*command, "--list", "--stats", "--verify"]) == 0
    text = capsys.readouterr().out
    assert all(path in text for path in paths) and "3 files of 3 videos" in text and "3 files read, 0 damaged" in text
    broken = cache.path(Media("video", path=paths[0]), SETTINGS)
    data = bytearray(Path(broken).read_bytes())
    data[-5] ^= 1
    Path(broken).write_bytes(data)
    os.unlink(paths[1])
    assert preprocess.main([*command, "--verify"]) == 1
    assert preprocess.main([*command, "--prune"]) == 0
    assert len(cache_files(str(cache_dir))) == 3  # only shown
    assert preprocess.main([*command, "--prune", "--yes"]) == 0
    assert cache_files(str(cache_dir)) == [cache.path(Media("video", path=paths[2]), SETTINGS)]


def test_prune_and_failures_do_not_depend_on_the_current_folder(tmp_path, monkeypatch, capsys):
    """Preprocessed as `--data d.jsonl` in the data's folder, looked after and trained on from another one."""
    clips(tmp_path, 2)
    write(tmp_path / "d.jsonl", [{"videos": [name]} for name in ("0.mp4", "1.mp4", "bad.mp4")])
    (tmp_path / "bad.mp4").write_bytes(b"garbage")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert preprocess.main(["--data", "d.jsonl", "--cache_dir", "cache", *FLAGS]) == 1
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert preprocess.main(["--cache_dir", "../cache", "--prune", "--yes"]) == 0
    assert len(cache_files("../cache")) == 2
    bad = Media("video", path=str(tmp_path / "bad.mp4"))
    assert "cannot be opened as a video" in str(FrameCache("../cache").known_failure(bad))
    os.unlink(tmp_path / "0.mp4")
    assert preprocess.main(["--cache_dir", "../cache", "--prune", "--yes"]) == 0
    assert [read_entry(path).header["source"]["name"] for path in cache_files("../cache")] == [str(tmp_path / "1.mp4")]


def test_names_with_line_separators_do_not_poison_the_cache(tmp_path):
    """U+2028 and U+0085 are line ends to str.splitlines, not to JSON lines: the list must be read back, by all."""
    names = ["a\u2028b.mp4", "a\u0085b.mp4"]
    for name in names:
        (tmp_path / name).write_bytes(b"garbage")
    file = write(tmp_path / "d.jsonl", [{"videos": [name], "id": "\u2028"} for name in names])
    command = ["--data", file, "--cache_dir", str(tmp_path / "cache"), *FLAGS]
    assert preprocess.main(command) == 1 and preprocess.main(command) == 1
    cache = FrameCache(str(tmp_path / "cache"))
    assert all(cache.known_failure(Media("video", path=str(tmp_path / name))) for name in names)
    with open(tmp_path / "cache" / "failed.jsonl", "a") as out:
        out.write('{"file": "x"}\n')
    with pytest.raises(ValueError, match=r"failed\.jsonl:3: is no record of a failure"):
        FrameCache(str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--field_names", "clip"], "--field_names clip: is not JSON"),
        (["--field_names", "[1]"], r"--field_names \[1\]: must be an object of names"),
        (["--field_names", '{"vidoe": "clip"}'], "--field_names vidoe: no such field"),
        (["--media_dir", "nowhere"], "--media_dir nowhere does not exist"),
        (["--cache_dir", "d.jsonl"], r"--cache_dir d.jsonl: cannot be made \(File exists\)"),
        (["--failed_file", "d.jsonl/f.jsonl"], r"--failed_file d.jsonl: cannot be made"),
        (["--factor", "0"], "--factor must be patch size"),
        (["--data", "empty.jsonl"], "--data empty.jsonl: holds no row"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.jsonl", [{"problem": "q"}])
    (tmp_path / "empty.jsonl").touch()
    assert preprocess.main(["--data", "d.jsonl", "--cache_dir", "cache", *flags]) == 2
    said = capsys.readouterr().err
    assert re.match(f"error: .*{words}", said) and said.count("\n") == 1


def test_gold_is_checked_on_request(tmp_path):
    if not hasattr(pytest.importorskip("rewards"), "check_gold"):
        pytest.skip("rewards has no gold checker yet")
    rows = [
        {"problem": "q", "answer": "blue", "problem_type": "numerical", "id": 5},
        {"problem": "q", "answer": "7", "problem_type": "numerical", "id": 6},
    ]
    file, cache_dir = write(tmp_path / "d.jsonl", rows), tmp_path / "cache"
    command = ["--data", file, "--cache_dir", str(cache_dir)]
    assert preprocess.main(command) == 0 and not (cache_dir / "failed.jsonl").exists()
    with pytest.warns(UserWarning, match="1 rows skipped"):
        assert preprocess.main([*command, "--check_gold"]) == 1
    (failed,) = [json.loads(line) for line in (cache_dir / "failed.jsonl").read_text().splitlines()]
    assert (failed["id"], failed["line"]) == ("5", 1) and "answer" in failed["reason"]


@pytest.mark.parametrize(
    "flags",
    [["--shard", "3/3"], [], ["--stats"], ["--data", "x", "--workers", "0"], ["--data", "x", "--verify"],
     ["--data", "x", "--yes"]],
)  # fmt: skip
def test_wrong_flags_are_refused(tmp_path, flags):
    with pytest.raises(SystemExit):
        preprocess.parse_args(["--cache_dir", str(tmp_path / "none"), *flags])


def contents(cache_dir: Path) -> dict[str, bytes]:
    return {str(Path(path).relative_to(cache_dir)): Path(path).read_bytes() for path in cache_files(str(cache_dir))}


@pytest.mark.parametrize("kills, clips_made", [(1, 4), pytest.param(20, 30, marks=pytest.mark.slow)])
def test_kill_at_random_moments_then_resume(tmp_path, kills, clips_made):
    """kill -9 of the whole process group, again and again: the cache ends equal to an uninterrupted one.

    Every second kill waits until a file is being written, so that half of them leave a temporary.
    """
    paths = [
        make_clip(tmp_path / f"{i}.mp4", frames=100, height=360, width=640, options={"preset": "ultrafast"})
        for i in range(clips_made)
    ]
    file = write(tmp_path / "d.jsonl", [{"videos": [path]} for path in paths])
    flags = ["--data", file, "--fps", "10", "--video_max_pixels", "65536"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert preprocess.main([*flags, "--cache_dir", str(straight)]) == 0
    command = [sys.executable, str(ROOT / "data/preprocess.py"), *flags, "--cache_dir", str(broken), "--workers", "2"]
    chance, left_behind = random.Random(0), 0
    for kill in range(kills):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        stop = time.monotonic() + (chance.uniform(0.5, 3.0) if kill % 2 else 60.0)
        while time.monotonic() < stop and process.poll() is None:
            if kill % 2 == 0 and any(broken.glob("??/*/*.tmp-*")):
                break
            time.sleep(0.001)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left_behind += any(broken.glob("??/*/*.tmp-*"))
        for path in cache_files(str(broken)):  # a name that exists is complete, at any moment
            read_pixels(read_entry(path))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert contents(broken) == contents(straight)
    assert not list(broken.rglob("*.tmp-*"))
    assert kills == 1 or left_behind >= 3  # the kills did hit writers


@pytest.mark.slow
def test_two_thousand_files_a_tenth_of_them_bad(tmp_path):
    good = Path(make_clip(tmp_path / "good.mp4", frames=12, height=48, width=64)).read_bytes()
    rows = []
    for i in range(2000):
        path = tmp_path / f"{i}.mp4"
        path.write_bytes(good[: len(good) // 2] if i % 10 == 0 else good)
        rows.append({"videos": [str(path)], "id": i})
    file, cache_dir = write(tmp_path / "d.jsonl", rows), str(tmp_path / "cache")
    assert preprocess.main(["--data", file, "--cache_dir", cache_dir, "--on_bad_sample", "skip", *FLAGS]) == 0
    failed = [json.loads(line) for line in Path(cache_dir, "failed.jsonl").read_text().splitlines()]
    assert [row["id"] for row in failed] == [str(i) for i in range(0, 2000, 10)]
    assert len(cache_files(cache_dir)) == 1800


def test_an_interrupted_run_keeps_what_it_did_not_look_at(tmp_path):
    """Rows 1 and 2 failed before; a run that ended after row 2 says something else of it and nothing of row 1."""
    path, shard = tmp_path / "failed.jsonl", (0, 1)
    row = {"file": "d.jsonl", "id": "x", "remedy": "", "reason": "old"}
    first = [{**row, "line": n, "path": f"{n}.mp4", "media_key": f"k{n}"} for n in (1, 2)]
    failures.note_run(str(tmp_path), shard, str(path), first, {"d.jsonl"}, [])
    again = [{**first[1], "reason": "new"}]
    failures.note_run(str(tmp_path), shard, str(path), again, {"d.jsonl"}, [], finished=False)
    assert [(r["line"], r["reason"]) for r in failures.read_list(str(path))] == [(1, "old"), (2, "new")]
    failures.note_run(str(tmp_path), shard, str(path), [], {"d.jsonl"}, [("k2", "2.mp4")], finished=False)
    assert [r["line"] for r in failures.read_list(str(path))] == [1]
    failures.note_run(str(tmp_path), shard, str(path), [], {"d.jsonl"}, [])
    assert not path.exists()


@pytest.mark.parametrize(
    "more", [{"attempt": "3"}, {"attempt": 1.5}, {"media_key": ["k"]}, {"path": None}, {"line": "1"}]
)
def test_a_damaged_list_names_its_line(tmp_path, more):
    path = tmp_path / "failed.jsonl"
    path.write_text(json.dumps({"file": "a", "line": 1, "path": "v.mp4", "media_key": "k", **more}) + "\n")
    with pytest.raises(ValueError, match=r"failed\.jsonl:1: is no record of a failure .*delete the line"):
        failures.known_failures(str(tmp_path))
