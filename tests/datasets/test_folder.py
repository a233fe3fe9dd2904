"""The `folder` data set: what annotations may say, every error in one report, splits, reuse."""

import io
import json
import math
import os
import pathlib

import av
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlab_jax.data.schema import ClipRecord, Question, from_example
from vlab_jax.datasets.annotations import AnnotationEntry
from vlab_jax.datasets.folder import ANNOTATIONS, FOLDER, assign_splits, read_annotations
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.datasets.registry import open_split, prepare
from vlab_jax.errors import InputError


def write(directory: pathlib.Path, *lines: dict | str, videos: tuple[str, ...] = ("a.mp4", "b.mp4")) -> str:
    """Annotations of these lines, and files of these names with bytes of their own."""
    for video in videos:
        (directory / video).parent.mkdir(parents=True, exist_ok=True)
        (directory / video).write_bytes(f"bytes of {video}".encode())
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (directory / ANNOTATIONS).write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(directory)


def clip(video: str = "a.mp4", **fields) -> dict:
    return {"video": video, "captions": ["a man cuts an onion"], **fields}


def problems_of(directory: pathlib.Path) -> list[str]:
    """The lines of the report after its heading, which names the folder; a single problem is on the same line."""
    with pytest.raises(InputError) as caught:
        read_annotations(directory)
    message = str(caught.value)
    heading = f"folder {str(directory)!r}: "
    assert message.startswith(heading), message
    first, *rest = message.removeprefix(heading).split("\n")
    assert not rest or first == f"{len(rest)} problems" or rest[-1].startswith("and ")
    return rest or [first]


def test_a_clip_comes_back_as_the_line_says(tmp_path):
    question = {"question": "what is cut?", "answer": "an onion", "type": "object", "options": ["an onion", "bread"]}
    write(
        tmp_path,
        clip("in/a.mp4", start=1.5, end=4, id="mine", captions=["one", "zwei ü"], questions=[question]),
        clip("b.mp4", questions=[{"question": "who?", "answer": "a man"}], id=None),
        videos=("in/a.mp4", "b.mp4"),
    )
    source = open_split(f"folder:{tmp_path}", "train", BuildOptions(str(tmp_path / "data")))
    clips = {found.id: found for found in map(from_example, source)}
    assert clips == {
        "mine": ClipRecord(
            id="mine",
            media=b"bytes of in/a.mp4",
            captions=("one", "zwei ü"),
            questions=(Question("what is cut?", "an onion", "object", ("an onion", "bread")),),
            start=1.5,
            end=4.0,
        ),
        "b.mp4": ClipRecord(
            id="b.mp4",
            media=b"bytes of b.mp4",
            captions=("a man cuts an onion",),
            questions=(Question("who?", "a man"),),
            start=0.0,
            end=math.inf,
        ),
    }


def test_ids_are_by_default_the_video_with_its_interval(tmp_path):
    write(tmp_path, clip("./a.mp4"), clip(start=1, end=2), clip(start=2), clip(end=2.5), clip(id="x", end=2.5))
    assert [row.id for row in read_annotations(tmp_path)] == ["a.mp4", "a.mp4:1-2", "a.mp4:2-end", "a.mp4:0-2.5", "x"]


def test_byte_order_mark_carriage_returns_blank_lines_and_line_separators_are_accepted(tmp_path):
    write(tmp_path)
    odd = json.dumps(clip("b.mp4", captions=["one\u2028line"]), ensure_ascii=False)
    text = "\ufeff" + json.dumps(clip()) + "\r\n\r\n   \r\n" + odd
    (tmp_path / ANNOTATIONS).write_bytes(text.encode())
    rows = read_annotations(tmp_path)
    assert [row.video for row in rows] == ["a.mp4", "b.mp4"]
    assert rows[1].captions == ("one\u2028line",)


BAD_LINES = [
    ("{'video': 'a.mp4'}", ["is not JSON (Expecting property name", "column 2", '"captions": [']),
    ('{"video": "a.mp4", "start": NaN}', ["NaN is no number"]),
    ("[1, 2]", ["is [1, 2] and must be an object"]),
    (clip(caption=["x"]), ["unknown key 'caption' (did you mean 'captions'?)", "known: video, id, start"]),
    ({"captions": ["x"]}, ["'video' is missing"]),
    (clip(video=7), ["'video' is 7 and must be the path"]),
    (clip("c.mp4"), ["video 'c.mp4' is not in the folder"]),
    (clip("empty.mp4"), ["video 'empty.mp4' is an empty file"]),
    (clip("../a.mp4"), ["video '../a.mp4' leaves the folder"]),
    (clip("in/../../a.mp4"), ["leaves the folder"]),
    (clip("/etc/hostname"), ["leaves the folder"]),
    ({"video": "a.mp4"}, ["'captions' is missing"]),
    (clip(captions=None), ["'captions' is missing"]),
    (clip(captions=[]), ["'captions' is empty"]),
    (clip(captions="x"), ["'captions' is \"x\" and must be a list"]),
    (clip(captions=["x", " "]), ["number 2 of 'captions' is \" \""]),
    (clip(captions=["x", 5]), ["number 2 of 'captions' is 5"]),
    (clip(start="1"), ["'start' is \"1\" and must be a number of seconds"]),
    (clip(start=True), ["'start' is true and must be"]),
    (clip(start=-1), ["'start' is -1 and must be"]),
    ('{"video": "a.mp4", "captions": ["x"], "end": 1e999}', ["'end' is Infinity and must be"]),
    (clip(start=2, end=2), ["'start' 2 is not before 'end' 2"]),
    (clip(end=0), ["'start' 0 is not before 'end' 0"]),
    (clip(id=""), ["'id' is \"\" and must be a text"]),
    (clip(split="val"), ["'split' is \"val\" and must be one of train, validation, test", "'validation'?"]),
    (clip(questions={}), ["'questions' is {} and must be a list"]),
    (clip(questions=[3]), ["question 1: is 3 and must be an object"]),
    (clip(questions=[{"question": "q", "answer": "a"}, {"question": "q"}]), ["question 2: 'answer' is missing"]),
    (clip(questions=[{"question": "q", "answer": 1}]), ["question 1: 'answer' is 1 and must be a text"]),
    (clip(questions=[{"question": "q", "answer": "a", "kind": "x"}]), ["unknown key 'kind'"]),
    (clip(questions=[{"question": "q", "answer": "a", "options": ["b"]}]), ["'answer' is not among 'options'"]),
    (clip(questions=[{"question": "q", "answer": "a", "options": []}]), ["question 1: 'options' is empty"]),
]


# Names that are no paths in the folder, texts that cannot be written down, and JSON that is a trap.
HOSTILE_LINES = [
    (clip("file:a.mp4"), ["video 'file:a.mp4' is not in the folder"]),
    (clip("file:///etc/hostname"), ["is not in the folder"]),
    (clip("http://127.0.0.1/a.mp4"), ["is not in the folder"]),
    (clip("C:\\a.mp4"), ["is not in the folder"]),
    (clip("..\\a.mp4"), ["is not in the folder"]),
    (clip("~/a.mp4"), ["is not in the folder"]),
    (clip("$(touch x).mp4"), ["is not in the folder"]),
    (clip("a" * 5000), ["is not in the folder"]),
    (clip("a.mp4\0"), ["'video' is \"a.mp4\\u0000\" and must be", "without control characters"]),
    (clip("\ud800.mp4"), ["'video' is \"\\ud800.mp4\" and must be"]),
    (clip(captions=["\udfff"]), ["number 1 of 'captions' is \"\\udfff\" and must be a text"]),
    (clip(id="a\nb"), ["'id' is \"a\\nb\" and must be a text", "without control characters"]),
    ('{"video": "a.mp4", "captions": ["x"], "captions": ["y"]}', ['the key "captions" is given twice']),
    ('{"video": ' + "[" * 100_000, ["is not JSON"]),
    ('{"video": "a.mp4", "captions": ["x"], "start": ' + "1" * 5000 + "}", ["is not JSON"]),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES + HOSTILE_LINES)
def test_a_bad_line_alone_is_one_line_with_its_number(line, words, tmp_path):
    (tmp_path / "empty.mp4").touch()
    write(tmp_path, clip("b.mp4"), "", line)
    (problem,) = problems_of(tmp_path)
    assert problem.startswith(f"{ANNOTATIONS} line 3: ") and all(word in problem for word in words), problem


def test_all_bad_lines_stand_in_one_report_and_nothing_is_built(tmp_path):
    (tmp_path / "empty.mp4").touch()
    write(tmp_path, clip("b.mp4"), *(line for line, _ in BAD_LINES))
    found = problems_of(tmp_path)
    for number, (_, words) in enumerate(BAD_LINES, start=2):
        mine = [problem for problem in found if problem.startswith(f"{ANNOTATIONS} line {number}: ")]
        assert any(all(word in problem for word in words) for problem in mine), (number, found)
    with pytest.raises(InputError):
        prepare(f"folder:{tmp_path}", BuildOptions(str(tmp_path / "data")))
    assert not (tmp_path / "data").exists()


def test_all_problems_of_one_line_are_reported(tmp_path):
    write(tmp_path, {"vidoe": "a.mp4", "start": -1, "captions": []})
    found = problems_of(tmp_path)
    assert len(found) == 4 and all(problem.startswith(f"{ANNOTATIONS} line 1: ") for problem in found)


def test_bytes_that_are_not_utf8_are_reported_with_their_line(tmp_path):
    write(tmp_path, clip())
    with open(tmp_path / ANNOTATIONS, "ab") as file:
        file.write(b'{"video": "\xff"}\n')
    (problem,) = problems_of(tmp_path)
    assert problem.startswith(f"{ANNOTATIONS} line 2: is not UTF-8")


def test_a_repeated_id_names_both_lines(tmp_path):
    write(tmp_path, clip(), clip("b.mp4"), clip("b.mp4", id="a.mp4"), clip("./b.mp4"))
    same, default = problems_of(tmp_path)
    assert same == f"{ANNOTATIONS} line 3: id 'a.mp4' is already that of line 1"
    assert default.startswith(f"{ANNOTATIONS} line 4: id 'b.mp4' is already that of line 2; give each")


def test_a_long_report_is_cut_after_fifty(tmp_path):
    write(tmp_path, *(clip(f"{i}.mp4") for i in range(73)))
    with pytest.raises(InputError) as caught:
        read_annotations(tmp_path)
    lines = str(caught.value).split("\n")
    assert lines[0].endswith(": 73 problems") and len(lines) == 52 and lines[-1] == "and 23 more"
    assert "line 50: video '49.mp4'" in lines[50]


def test_no_train_split_is_an_error(tmp_path):
    write(tmp_path, clip(split="test"), clip("b.mp4", split="validation"))
    assert "no line is in the split 'train'" in problems_of(tmp_path)[0]


def test_an_empty_file_is_an_error(tmp_path):
    write(tmp_path, "", "  ")
    assert "has no line" in problems_of(tmp_path)[0]


@pytest.mark.parametrize("there", [True, False])
def test_a_missing_directory_or_file_is_one_line_with_what_to_do(there, tmp_path):
    directory = tmp_path / "clips"
    if there:
        directory.mkdir()
    with pytest.raises(InputError) as caught:
        prepare(f"folder:{directory}", BuildOptions(str(tmp_path / "data")))
    message = str(caught.value)
    assert "\n" not in message and str(directory) in message and ANNOTATIONS in message
    assert ('{"video": ' in message) == there


def rows_of(videos: list[str], splits: list[str] | None = None) -> list[AnnotationEntry]:
    splits = splits or [""] * len(videos)
    return [
        AnnotationEntry(id=str(i), video=video, captions=("x",), split=split)
        for i, (video, split) in enumerate(zip(videos, splits, strict=True))
    ]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("abcdef/", min_size=1, max_size=4), min_size=1, max_size=30))
def test_hashed_splits_keep_videos_whole_and_leave_none_out(videos):
    rows = rows_of(videos)
    splits = assign_splits(rows)
    assert sorted(int(row.id) for some in splits.values() for row in some) == list(range(len(rows)))
    homes = {(row.video, split) for split, some in splits.items() for row in some}
    assert len(homes) == len(set(videos))
    assert set(splits) == ({"train", "validation", "test"} if len(set(videos)) >= 3 else {"train"})


def test_hashed_splits_are_about_80_10_10_and_hold_when_videos_are_added():
    few, many = (assign_splits(rows_of([f"{i}.mp4" for i in range(n)])) for n in (900, 1000))
    assert 760 < len(many["train"]) < 840 and 70 < len(many["validation"]) < 130
    for split, some in few.items():
        assert {row.video for row in some} <= {row.video for row in many[split]}


def test_lines_without_a_split_go_to_train_if_others_name_one():
    splits = assign_splits(rows_of(["a", "b", "c", "d"], ["", "test", "", "train"]))
    assert {split: [int(row.id) for row in rows] for split, rows in splits.items()} == {"train": [0, 2, 3], "test": [1]}


def test_a_split_that_no_clip_is_in_is_refused_by_name(tmp_path):
    write(tmp_path, clip(), clip("b.mp4"))
    with pytest.raises(InputError, match="no split 'test'; it has: train"):
        open_split(f"folder:{tmp_path}", "test", BuildOptions(str(tmp_path / "data")))


def test_changed_data_is_prepared_anew_and_unchanged_data_used_again(tmp_path):
    write(tmp_path / "clips", clip())
    spec, data = f"folder:{tmp_path / 'clips'}", str(tmp_path / "data")
    first = prepare(spec, BuildOptions(data)).data_path
    again = prepare(spec + "/", BuildOptions(data)).data_path
    assert first == again and first.exists()
    names = {first}
    os.utime(tmp_path / "clips" / "a.mp4", ns=(1, 1))
    names.add(prepare(spec, BuildOptions(data)).data_path)
    (tmp_path / "clips" / "a.mp4").write_bytes(b"other")
    names.add(prepare(spec, BuildOptions(data)).data_path)
    write(tmp_path / "clips", clip(captions=["new words"]))
    names.add(prepare(spec, BuildOptions(data)).data_path)
    assert len(names) == 4
    (example,) = open_split(spec, "train", BuildOptions(data))
    assert from_example(example).captions == ("new words",)
    # What no clip uses may change.
    (tmp_path / "clips" / "b.mp4").write_bytes(b"unused")
    assert FOLDER.dataset(str(tmp_path / "clips"), BuildOptions(data)).config in {path.parent.name for path in names}


def test_real_files_are_stored_as_they_are(assets, tmp_path):
    files = sorted((assets / "videos" / "fight").glob("*/*.*"))[:5]
    for file in files:
        (tmp_path / file.name).symlink_to(file)
    write(tmp_path, *(clip(file.name) for file in files), videos=())
    builder = prepare(f"folder:{tmp_path}", BuildOptions(str(tmp_path / "data")))
    clips = [
        from_example(example)
        for split in builder.info.splits
        for example in open_split(f"folder:{tmp_path}", split, BuildOptions(str(tmp_path / "data")))
    ]
    assert {found.id: found.media for found in clips} == {file.name: file.read_bytes() for file in files}
    with av.open(io.BytesIO(clips[0].media)) as container:
        assert next(container.decode(video=0)).width > 0
