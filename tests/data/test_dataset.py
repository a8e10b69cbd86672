"""Rows to samples, what is refused and how it is named, and the order of training."""

import base64
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from data.dataset import BadDataset, SampleOrder, file_weights, load, report
from data.records import Media, Sample
from data.rows import expand_files, read_rows

ROOT = Path(__file__).parents[2]
ROW = {"problem": "How many?", "answer": "3", "problem_type": "numerical"}


def write(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.png"):
        (tmp_path / name).write_bytes(b"not empty")
    return tmp_path


def test_a_full_row(folder):
    row = {
        "problem": "Which colour? <video>", "answer": "<answer>B</answer>", "problem_type": "Multiple_Choice",
        "data_type": "video", "videos": ["a.mp4"], "options": ["A. red", "B. blue"], "problem_id": 17,
        "data_source": "star", "unit": "cm",
        "has_offline_trajectory": True, "offline_output": "<answer>B</answer>", "width": 640,
    }  # fmt: skip
    (sample,) = load([write(folder / "d.jsonl", [row])])
    assert sample == Sample(
        id="17", question="Which colour? <video>", answer="B", problem_type="multiple choice", data_type="video",
        media=(Media("video", path=str(folder / "a.mp4")),), options=("A. red", "B. blue"),
        offline_output="<answer>B</answer>", source="star",
        extra={"problem_id": 17, "data_source": "star", "unit": "cm", "width": 640},
        file=str(folder / "d.jsonl"), line=1,
    )  # fmt: skip


def test_the_other_ways_to_write_a_row(folder):
    encoded = base64.b64encode(b"picture").decode()
    rows = [
        {**ROW, "path": "a.mp4"},
        {**ROW, "path": "c.png"},
        {"problem": "q", "solution": "<answer> 4 </answer>", "problem_type": "math"},
        {**ROW, "videos": [{"path": "a.mp4", "start_s": 1, "end_s": 2.5}]},
        {**ROW, "videos": ["a.mp4"], "video_start": 3},
        {**ROW, "videos": [["c.png", "c.png"]]},
        {**ROW, "images": [f"data:image/png;base64,{encoded}", {"bytes": encoded, "path": None}]},
        {**ROW, "problem": "<image> then <video>", "videos": ["a.mp4"], "images": ["c.png"], "data_type": "video"},
        {**ROW, "has_offline_trajectory": False, "offline_output": "unused"},
        {**ROW, "problem_type": "multiple choice", "answer": "C", "options": {"A": "x", "B": "y", "C": "z"}},
        {**ROW, "answer": {"time": [1, 2]}, "problem_type": "temporal grounding"},
    ]
    samples = load([write(folder / "d.jsonl", rows)])
    video, picture = str(folder / "a.mp4"), str(folder / "c.png")
    assert [sample.media for sample in samples] == [
        (Media("video", path=video),),
        (Media("image", path=picture),),
        (),
        (Media("video", path=video, start_s=1.0, end_s=2.5),),
        (Media("video", path=video, start_s=3.0),),
        (Media("video", frames=(picture, picture)),),
        (Media("image", data=b"picture"), Media("image", data=b"picture")),
        (Media("image", path=picture), Media("video", path=video)),
        (),
        (),
        (),
    ]
    kinds = ["video", "image", "text", "video", "video", "video", "image", "mixed", "text", "text", "text"]
    assert [sample.data_type for sample in samples] == kinds
    assert samples[2].answer == "4" and samples[8].offline_output is None and samples[10].answer == {"time": [1, 2]}
    assert samples[9].options == ("A. x", "B. y", "C. z")
    assert [sample.id for sample in samples][:2] == ["d:1", "d:2"]


BAD = [
    ("{not json", "not JSON", ""),
    ("[1, 2]", "not a JSON object", ""),
    ({**ROW, "problem": " "}, "problem: missing or empty", ""),
    ({**ROW, "answer": ""}, "answer: missing or empty", ""),
    ({**ROW, "answer": None}, "answer: missing or empty", ""),
    ({**ROW, "problem_type": "riddle"}, "problem_type: unknown problem_type 'riddle'", ""),
    ({"problem": "q", "answer": "1"}, "problem_type: missing", ""),
    ({**ROW, "videos": ["gone.mp4"]}, "gone.mp4 does not exist", "gone.mp4"),
    ({**ROW, "videos": ["empty.mp4"]}, "is empty", "empty.mp4"),
    ({**ROW, "videos": ["."]}, "is a folder", "."),
    ({**ROW, "videos": ["a.mp4"], "problem": "<video> <video>"}, "2 <video> markers", ""),
    ({**ROW, "data_type": "video"}, "data_type: says video, but the row has no media", ""),
    ({**ROW, "data_type": "smell"}, "data_type: unknown 'smell'", ""),
    ({**ROW, "problem_type": "multiple choice", "answer": "D", "options": ["A. x", "B. y"]}, "gold D is none", ""),
    ({**ROW, "options": "A or B"}, "options: is not a list", ""),
    ({**ROW, "has_offline_trajectory": True}, "offline_output: missing", ""),
    ({**ROW, "videos": ["https://x.org/a.mp4"]}, "is not a local file", "https://x.org/a.mp4"),
    ({**ROW, "videos": ["a.mp4"], "video_start": 5, "video_end": 4}, r"\[5.0, 4.0\) is empty", ""),
    ({**ROW, "videos": [3]}, "videos: int is not a medium", ""),
    ({**ROW, "images": ["data:image/png;base64,%%"]}, "not valid base64", ""),
    ({**ROW, "videos": ["a\0.mp4"]}, r"videos: '.*a\\x00.mp4' holds a NUL byte", ""),
    ({**ROW, "videos": ["a\ud800.mp4"]}, "videos: holds half a UTF-16 pair", ""),
    ({**ROW, "note": [{"deep": "\udc00"}]}, "note: holds half a UTF-16 pair", ""),
]


@pytest.mark.parametrize("row, reason, path", BAD)
def test_a_bad_row_is_named_by_file_line_field_and_remedy(folder, row, reason, path):
    (folder / "empty.mp4").touch()
    file = write(folder / "d.jsonl", [ROW, "", row, ROW])
    with pytest.raises(BadDataset, match=reason) as caught:
        load([file])
    (problem,) = caught.value.problems
    assert (problem["file"], problem["line"]) == (file, 3) and problem["remedy"]
    assert problem["path"].endswith(path)
    assert f"{file}:3: " in str(caught.value)
    failed = folder / "failed.jsonl"
    with pytest.warns(UserWarning, match="1 rows skipped"):
        samples = load([file], on_bad_sample="skip", failed_file=str(failed))
    assert [sample.line for sample in samples] == [1, 4]
    assert {**problem, "schema_version": 1} == json.loads(failed.read_text())


def test_gold_checker_and_long_lists(folder):
    file = write(folder / "d.jsonl", [{**ROW, "answer": str(i)} for i in range(50)])
    seen = []

    def check(sample):
        seen.append(sample.answer)
        return "is odd" if int(sample.answer) % 2 else None

    with pytest.raises(BadDataset) as caught:
        load([file], check_gold=check)
    assert seen == [str(i) for i in range(50)] and len(caught.value.problems) == 25
    assert "answer: is odd" in str(caught.value) and "and 5 more" in str(caught.value)
    with pytest.warns(UserWarning, match="25 rows skipped"):
        assert len(load([file], check_gold=check, on_bad_sample="skip")) == 25
    with pytest.raises(ValueError, match="no usable row"), pytest.warns(UserWarning):
        load([file], check_gold=lambda _: "no", on_bad_sample="skip")


def test_media_dir_field_names_and_foreign_caches(folder, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    file = write(
        other / "d.jsonl", [{"q": "x", "gold": "1", "problem_type": "math", "clip": "a.mp4", "preprocessed_video": "z"}]
    )
    with pytest.warns(UserWarning, match="1 rows name a preprocessed_video"):
        (sample,) = load(
            [file], media_dir=str(folder), field_names={"problem": "q", "answer": "gold", "videos": "clip"}
        )
    assert (sample.question, sample.answer, sample.media[0].path) == ("x", "1", str(folder / "a.mp4"))
    assert sample.extra == {}
    with pytest.raises(ValueError, match="no such field"):
        load([file], field_names={"colour": "q"})


def test_ids_become_unique(folder):
    one = write(folder / "one.jsonl", [{**ROW, "problem_id": 0}, {**ROW, "problem_id": 0}])
    two = write(folder / "two.jsonl", [{**ROW, "problem_id": 0}])
    with pytest.warns(UserWarning, match=r"2 rows share an id with an earlier one \(first: 0\); theirs got @file:line"):
        assert [sample.id for sample in load([one, two])] == ["0", f"0@{one}:2", f"0@{two}:1"]


def test_utf_16_is_one_message_not_one_per_line(folder):
    path = folder / "wide.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW) + "\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"wide\.jsonl: is UTF-16; convert it to UTF-8"):
        load([str(path)])


def test_whole_characters_beyond_the_basic_plane_are_welcome(folder):
    """U+1F600 escaped as its UTF-16 pair, U+2028 and U+0085 as they are, in lines and in a list."""
    row = {**ROW, "problem": "\U0001f600\u2028\u0085?"}
    lines = write(folder / "d.jsonl", [json.dumps(row), json.dumps(row, ensure_ascii=False)])
    (folder / "d.json").write_text(json.dumps([row, {**row, "problem": "\ud83d"}]), encoding="utf-8")
    assert [sample.question for sample in load([lines])] == ["\U0001f600\u2028\u0085?"] * 2
    with pytest.raises(BadDataset, match="problem: holds half a UTF-16 pair") as caught:
        load([str(folder / "d.json")])
    assert len(caught.value.problems) == 1


def test_compressed_and_damaged_tables_are_one_message(folder):
    import gzip

    for name in ("d.jsonl", "d.jsonl.gz"):
        (folder / name).write_bytes(gzip.compress(json.dumps(ROW).encode()))
        with pytest.raises(ValueError, match=rf"{name}: is compressed; unpack it first"):
            load([str(folder / name)])
    head = "problem,answer,problem_type,image\n"
    (folder / "latin.csv").write_bytes(head.encode() + "caf\xe9,1,numerical,\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.csv: is not UTF-8"):
        load([str(folder / "latin.csv")])
    # An image of 150000 bytes is 200000 characters of base64, more than csv's own limit of 131072.
    (folder / "big.csv").write_text(
        head + "x,1,numerical," + base64.b64encode(b"i" * 150_000).decode() + "\ny,2,a,b,c\n"
    )
    with pytest.warns(UserWarning, match=r"big\.csv:3: more fields than the header"):
        (sample,) = load([str(folder / "big.csv")], on_bad_sample="skip")
    assert sample.media == (Media("image", data=b"i" * 150_000),)


def test_json_lists_know_their_lines(folder):
    path = folder / "d.json"
    path.write_text("[\n" + json.dumps(ROW) + ",\n\n" + json.dumps(ROW, indent=1) + ",\n" + json.dumps({}) + "\n]\n")
    lines = [line for line, _ in read_rows(str(path))]
    assert lines == [2, 4, 9]  # the second row takes lines 4 to 8
    with pytest.raises(BadDataset, match=r"d\.json:9: problem: missing"):
        load([str(path)])
    path.write_text("[\n" + json.dumps(ROW) + ",\n{broken\n" + json.dumps(ROW) + "]")
    with pytest.raises(BadDataset, match=r"d\.json:3: not JSON from here on"):
        load([str(path)])


def test_parquet_and_saved_datasets(folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{**ROW, "images": [{"bytes": b"abc", "path": None}], "unit": None}, {**ROW, "images": [], "unit": "m"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet")
    first, second = load([str(folder / "d.parquet")])
    assert first.media == (Media("image", data=b"abc"),) and first.extra == {} and second.extra == {"unit": "m"}
    assert (first.line, second.line) == (1, 2)
    (folder / "broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        load([str(folder / "broken.parquet")])
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{**ROW, "n": i} for i in range(5)]).select([0, 2, 4]).save_to_disk(folder / "saved")
    assert [sample.extra["n"] for sample in load([str(folder / "saved")])] == [0, 2, 4]
    with pytest.raises(ValueError, match=r"several splits; name one: .*saved"):
        load([str(folder)])
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="without state"):
        load([str(folder / "empty")])


BINARY = [
    ({"problem": b"How many?"}, "problem"),
    ({"problem": None, "question": b"How many?"}, "question"),
    ({"answer": b"3"}, "answer"),
    ({"problem_type": b"numerical"}, "problem_type"),
    ({"data_type": b"text"}, "data_type"),
    ({"problem_id": b"a-1"}, "problem_id"),
    ({"data_source": b"star"}, "data_source"),
    ({"problem_type": "multiple choice", "answer": "A", "options": {"A": b"one", "B": b"two"}}, "options"),
    ({"problem_type": "multiple choice", "answer": "A", "options": [b"A. one", b"B. two"]}, "options"),
]


@pytest.mark.parametrize("cells, field", BINARY)
def test_bytes_in_place_of_text_are_named_by_row_and_field(folder, cells, field):
    """What was said to be missing, or taken as the text "b'...'" in silence (ids, sources, options by letter)."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{**ROW, **cells}]), folder / "binary.parquet")
    said = rf"binary\.parquet:1: {field}: holds bytes, not text; write the column again as UTF-8 text"
    with pytest.raises(BadDataset, match=said):
        load([str(folder / "binary.parquet")])
    thumbnail = [{**ROW, "thumbnail": b"\x89PNG"}]  # no field of ours
    parquet.write_table(pyarrow.Table.from_pylist(thumbnail), folder / "more.parquet")
    assert load([str(folder / "more.parquet")])[0].extra == {"thumbnail": b"\x89PNG"}


def test_text_of_another_encoding_in_a_column_file_is_one_bad_row(folder):
    """Latin-1's e acute in the second of three rows: the others are read."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    ends = b"".join(end.to_bytes(4, "little") for end in (0, 2, 6, 8))
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, pyarrow.py_buffer(ends), pyarrow.py_buffer(b"1?caf\xe92?")]
    )
    same = {"answer": ["1", "2", "3"], "problem_type": ["numerical"] * 3}
    table = pyarrow.table({"problem": texts, **same})
    parquet.write_table(table, folder / "latin.parquet")
    saved = folder / "saved"
    saved.mkdir()
    with pyarrow.ipc.new_stream(str(saved / "data.arrow"), table.schema) as out:
        out.write_table(table)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    for file in (folder / "latin.parquet", saved):
        said = rf"{file.name}:2: problem: is not UTF-8 \('utf-8' codec can't decode byte 0xe9 in position 3"
        with pytest.warns(UserWarning, match=said):
            samples = load([str(file)], on_bad_sample="skip")
        assert [(sample.line, sample.question, sample.answer) for sample in samples] == [(1, "1?", "1"), (3, "2?", "3")]


def test_two_columns_of_one_name_are_refused(folder):
    """The last of them was taken in silence; which one is meant, nobody can know."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = [pyarrow.array([value]) for value in (*ROW.values(), "4")]
    table = pyarrow.Table.from_arrays(columns, names=[*ROW, "answer"])
    parquet.write_table(table, folder / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice\.parquet: two columns are called answer; rename one, or leave it out"):
        load([str(folder / "twice.parquet")])
    image = pyarrow.StructArray.from_arrays([pyarrow.array([b"a"]), pyarrow.array([b"b"])], names=["bytes", "bytes"])
    images = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1]), image)
    parquet.write_table(
        pyarrow.Table.from_arrays([*columns[:3], images], names=[*ROW, "images"]), folder / "in.parquet"
    )
    with pytest.raises(ValueError, match=r"in\.parquet: two columns are called images\.bytes;"):
        load([str(folder / "in.parquet")])
    (folder / "twice.csv").write_text("problem,answer,problem_type,answer\nHow many?,3,numerical,4\n")
    with pytest.raises(ValueError, match=r"twice\.csv:1: two columns are called answer; rename one"):
        load([str(folder / "twice.csv")])


def test_images_of_parquet_reach_the_pixels(folder):
    """One picture stored in every way that data sets store it: raw bytes, {bytes, path}, base64, a data URI, a path."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    from data.video import image_pixels

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    png = buffer.getvalue()
    (folder / "p.png").write_bytes(png)
    text = base64.b64encode(png).decode()
    columns = {
        "raw.parquet": [png],
        "struct.parquet": [{"bytes": png, "path": "was/elsewhere.png"}],
        "uri.parquet": [f"data:image/png;base64,{text}"],
        "struct64.parquet": [{"bytes": text, "path": None}],
        "path.parquet": [{"bytes": None, "path": "p.png"}],
        "single.parquet": {"bytes": png, "path": None},
    }
    for name, value in columns.items():
        row = {**ROW, ("image" if name.startswith("single") else "images"): value}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / name)
        (sample,) = load([str(folder / name)])
        assert sample.data_type == "image", name
        np.testing.assert_array_equal(image_pixels(sample.media[0]), pixels)
    noise = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for form in ("PNG", "JPEG"):  # plain base64, long enough to be no path; a JPEG's begins with a slash
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, form)
        plain = base64.b64encode(buffer.getvalue()).decode()
        assert plain.startswith("/9j/") == (form == "JPEG")
        (sample,) = load([write(folder / "b.jsonl", [{**ROW, "image": plain}])])
        np.testing.assert_array_equal(image_pixels(sample.media[0]), np.asarray(Image.open(buffer)))


def test_hub_names_and_the_modelscope_switch(folder, monkeypatch):
    """A local table stands in for both hubs: what is asked of them, and that image columns stay encoded."""
    datasets = pytest.importorskip("datasets")
    rows = [{**ROW, "n": i, "unit": None, "image": {"bytes": b"png%d" % i, "path": None}} for i in range(300)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if split == "nothing":
            raise ValueError(f'Unknown split "{split}"')
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    samples = load(["some/set@validation"])
    assert asked == [("some/set", "validation")] and len(samples) == 300
    assert samples[299].media == (Media("image", data=b"png299"),) and samples[299].extra == {"n": 299}
    assert (samples[299].file, samples[299].line, samples[299].source) == ("some/set@validation", 300, "set@validation")
    assert len(load(["some/set@"])) == 300 and asked[-1] == ("some/set", "train")
    assert file_weights(["some/set@train::2"]) == {"some/set@train": 2.0}
    with pytest.raises(ValueError, match="--data some/set@nothing: cannot be loaded"):
        load(["some/set@nothing"])
    with pytest.raises(ValueError, match=r"ms://some/set@test: needs the package modelscope"):
        monkeypatch.setitem(sys.modules, "modelscope", None)
        load(["ms://some/set@test"])

    class MsDataset:
        @staticmethod
        def load(name, split):
            asked.append(("modelscope", name, split))
            return type("Set", (), {"to_hf_dataset": staticmethod(lambda: table)})

    package, module = ModuleType("modelscope"), ModuleType("modelscope.msdatasets")
    module.MsDataset = MsDataset
    monkeypatch.setitem(sys.modules, "modelscope", package)
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", module)
    assert len(load(["ms://some/set@test"])) == 300 and asked[-1] == ("modelscope", "some/set", "test")


def test_beside_path_other_names_of_the_medium_are_leftovers(folder):
    """Converted benchmark rows carry the source's bare file name in `video`; `image_path` is a second medium."""
    file = write(folder / "d.jsonl", [{**ROW, "video": "1665.webm", "path": "a.mp4", "image_path": "p.png"}])
    (folder / "p.png").write_bytes(b"x")
    (sample,) = load([file])
    assert [(media.kind, Path(media.path).name) for media in sample.media] == [("video", "a.mp4"), ("image", "p.png")]
    assert sample.extra == {"video": "1665.webm"}


def test_files_globs_and_weights(folder):
    for name in ("x1", "x2", "y"):
        write(folder / f"{name}.jsonl", [ROW])
    assert list(expand_files([f"{folder}/x*.jsonl"])) == [f"{folder}/x1.jsonl", f"{folder}/x2.jsonl"]
    assert file_weights([f"{folder}/*.jsonl"]) is None
    weights = file_weights([f"{folder}/x*.jsonl::3", f"{folder}/y.jsonl::1"])
    assert weights == {f"{folder}/x1.jsonl": 1.5, f"{folder}/x2.jsonl": 1.5, f"{folder}/y.jsonl": 1.0}
    for wrong, reason in (
        (["nothing*.jsonl"], "no such file"),
        ([f"{folder}/y.jsonl", f"{folder}/y.jsonl"], "twice"),
        ([f"{folder}/y.jsonl::0"], "must be > 0"),
    ):
        with pytest.raises(ValueError, match=reason):
            load(wrong)
    with pytest.raises(ValueError, match="every entry"):
        file_weights([f"{folder}/x1.jsonl::2", f"{folder}/y.jsonl"])


def samples(n: int, file: str = "f", **columns) -> list[Sample]:
    return [
        Sample(f"{file}{i}", "q", "a", "math", "text", file=file, line=i, extra={k: v(i) for k, v in columns.items()})
        for i in range(n)
    ]


def ids(order: SampleOrder, position: int, n: int) -> list[str]:
    return [sample.id for sample in order.take(position, n)[0]]


def test_order_is_a_function_of_the_position():
    rows = samples(7)
    straight = ids(SampleOrder(rows, 3), 0, 35)
    for epoch in range(5):
        assert sorted(straight[7 * epoch : 7 * epoch + 7]) == [f"f{i}" for i in range(7)]
    assert len({tuple(straight[7 * epoch : 7 * epoch + 7]) for epoch in range(5)}) > 1
    for cut in range(35):  # a new process that only knows the position
        order = SampleOrder(rows, 3)
        taken, position = order.take(cut, 35 - cut)
        assert [sample.id for sample in taken] == straight[cut:] and position == 35
    assert ids(SampleOrder(rows, 4), 0, 35) != straight
    assert ids(SampleOrder(rows, 3, shuffle=False), 5, 4) == ["f5", "f6", "f0", "f1"]
    # Pinned: an order that changes between versions breaks every resume.
    assert ids(SampleOrder(rows, 0), 0, 7) == PINNED


PINNED = ["f0", "f6", "f1", "f4", "f5", "f3", "f2"]


def test_weights_are_shares_and_no_row_starves():
    rows = samples(10, "big") + samples(4, "small")
    order = SampleOrder(rows, 1, weights={"big": 1, "small": 1})
    taken = ids(order, 0, 14 * 10)
    for epoch in range(10):
        assert sum(name.startswith("big") for name in taken[14 * epoch : 14 * epoch + 14]) == 7
    big, small = (Counter(name for name in taken if name.startswith(kind)) for kind in ("big", "small"))
    assert set(big.values()) == {7} and set(small.values()) <= {17, 18} and len(small) == 4
    for cut in (1, 13, 14, 77):
        assert ids(SampleOrder(rows, 1, weights={"big": 1, "small": 1}), cut, 140 - cut) == taken[cut:]
    for wrong in ({"big": 1}, {"big": 1, "small": 1, "none": 1}, {"big": 1, "small": 0}):
        with pytest.raises(ValueError):
            SampleOrder(rows, 1, weights=wrong)


def test_curriculum_sorts_each_epoch():
    rows = samples(9, level=lambda i: i % 3)
    for sign, wanted in (("", [0, 0, 0, 1, 1, 1, 2, 2, 2]), ("-", [2, 2, 2, 1, 1, 1, 0, 0, 0])):
        order = SampleOrder(rows, 5, curriculum=f"{sign}level")
        taken = order.take(0, 18)[0]
        assert [sample.extra["level"] for sample in taken] == wanted * 2
        assert [sample.id for sample in taken[:9]] != [sample.id for sample in taken[9:]]  # equals are shuffled anew
    with pytest.raises(ValueError, match="--curriculum speed: f:0 has None"):
        SampleOrder(rows, 5, curriculum="speed")
    texts = samples(3, level=lambda i: ["10", "9.5", "-1"][i])  # as CSV has them: by number, not by letter
    assert [s.extra["level"] for s in SampleOrder(texts, 5, curriculum="level").take(0, 3)[0]] == ["-1", "9.5", "10"]
    for bad in (float("nan"), True, "easy"):
        with pytest.raises(ValueError, match="--curriculum level: f:1 has"):
            SampleOrder(samples(3, level=[0, bad, 2].__getitem__), 5, curriculum="level")


def test_report_counts():
    rows = samples(3, duration=lambda i: [5, 45, 50][i])
    text = report(rows)
    assert "math 3" in text and "text 3" in text and "< 10 s 1, 30-60 s 2" in text


def test_100k_rows_are_read_whole(folder):
    rows = [{**ROW, "videos": [("a.mp4", "b.mp4")[i % 2]], "problem_id": i} for i in range(100_000)]
    loaded = load([write(folder / "d.jsonl", rows)])
    assert len(loaded) == 100_000 and loaded[99_999].id == "99999" and loaded[99_999].line == 100_000


def test_reading_needs_neither_torch_nor_a_decoder(folder):
    file = write(folder / "d.jsonl", [{**ROW, "videos": ["a.mp4"]}])
    code = (
        f"import sys; from data.dataset import load; load([{file!r}]);"
        "print([name for name in ('torch', 'av', 'decord', 'transformers', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
