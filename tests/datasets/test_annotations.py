"""The readers of official annotation files, on small ones in the authors' formats, plain and zipped."""

import collections
import itertools
import json
import math
import pathlib
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from official_folders import entries, official, write_json, write_webvid

from vlab_jax.datasets.annotations import AnnotationEntry, AnnotationSource, Protocol, find_files, in_split
from vlab_jax.datasets.didemo import agreed_interval
from vlab_jax.datasets.registry import find
from vlab_jax.datasets.text_files import TextFile
from vlab_jax.errors import InputError


def zip_to(path: pathlib.Path, members: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)


def test_files_are_found_plain_a_folder_deeper_and_in_archives(tmp_path):
    assert find_files([tmp_path], "a.json") == []
    zip_to(tmp_path / "all.zip", {"__MACOSX/in/a.json": "?", "in/a.json": "zipped", "c.txt": ""})
    assert find_files([tmp_path], "a.json") == [TextFile(tmp_path / "all.zip", "in/a.json")]
    write_json(tmp_path / "annotations", "a.json", 1)
    assert find_files([tmp_path], "a.json") == [TextFile(tmp_path / "annotations" / "a.json")]
    write_json(tmp_path, "a.json", 1)
    assert find_files([tmp_path / "none", tmp_path], "z.json|a.json") == [TextFile(tmp_path / "a.json")]
    (tmp_path / "broken.zip").write_bytes(b"PK not")
    with pytest.raises(
        InputError, match=r"broken\.zip is no archive that can be read .*; get it anew, or move it away$"
    ):
        find_files([tmp_path], "other.json")


def test_a_split_whose_files_are_not_all_there_is_left_out(tmp_path):
    protocol = Protocol("p", "", {"train": "a.json b.txt|c.txt", "test": "a.json"}, lambda split, *files: iter(files))
    write_json(tmp_path, "a.json", 1)
    source = AnnotationSource("p", protocol, [tmp_path])
    assert source.splits == ["test"] and source.left_out == {"train": ["b.txt or c.txt"]}
    assert source.paths == [tmp_path / "a.json"]


def test_counts_that_differ_are_reported_by_name_and_joined_splits_are_added(tmp_path):
    one, two = AnnotationEntry("1", "a", "train", ("x",)), AnnotationEntry("2", "a", "train", ("x", "y"))
    entries_of = {"train": [one, two], "validation": [one], "test": [one, two, AnnotationEntry("3", "b", "", rows=3)]}
    expected = {"train+validation": {"clips": 3, "captions": 3}, "test": {"videos": 1, "rows": 5}}
    files = {split: f"{split}.json" for split in entries_of}
    for split in entries_of:
        write_json(tmp_path, f"{split}.json", 1)
    source = AnnotationSource("p", Protocol("p", "", files, lambda split, _: entries_of[split], expected), [tmp_path])
    counts = {split: collections.Counter() for split in entries_of}
    for split in entries_of:
        assert list(source.read(split, counts[split])) == entries_of[split]
    assert list(source.count_problems(counts)) == [
        "train+validation has 4 captions, and the official files have 3; get anew, as the authors ship it: "
        f"{tmp_path}/train.json, {tmp_path}/validation.json",
        f"test has 2 videos, and the official files have 1; get anew, as the authors ship it: {tmp_path}/test.json",
    ]
    # Videos are counted where they are expected; a split that was not read is not compared.
    assert "videos" not in counts["train"] and list(source.count_problems({"train": counts["train"]})) == []


def test_msvd_is_read_as_its_authors_ship_it_by_the_mapping(tmp_path):
    names = {1: "a_1_2", 1200: "b_1_2", 1201: "c_1_2", 1300: "d_1_2", 1301: "e_1_2", 1970: "f_1_2"}
    mapping = "\n".join(f"{name} vid{number}" for number, name in names.items())
    texts = [f"{name} text {number} of {name}" for number in (1, 2) for name in names.values()]
    zip_to(tmp_path / "msvd.zip", {"AllVideoDescriptions.txt": "# comment\n\n" + "\n".join(texts)})
    with pytest.raises(InputError, match="no annotation files in"):
        find("msvd")[0].annotation_source("", str(tmp_path))
    for line in ("a_1_2", "a_1_2 clip1", "a_1_2 vid\u00b2", "a_1_2 vid" + "1" * 5000):
        (tmp_path / "youtube_mapping.txt").write_text(f"{mapping}\n{line}", encoding="utf-8")
        with pytest.raises(InputError, match=r"mapping\.txt: the line 'a_1_2.* is not a clip's name and its number"):
            next(entries("msvd", tmp_path, "train"))
    (tmp_path / "youtube_mapping.txt").write_text(mapping)
    for split, numbers in {"train": (1, 1200), "validation": (1201, 1300), "test": (1301, 1970)}.items():
        expected = [(names[number], (f"text 1 of {names[number]}", f"text 2 of {names[number]}")) for number in numbers]
        assert [(entry.id, entry.captions) for entry in entries("msvd", tmp_path, split)] == expected


def test_msvds_captions_joined_into_one_text_are_refused(tmp_path):
    clips = [{"video": f"v{number}", "caption": " ".join(["a man runs"] * 40)} for number in range(670)]
    write_json(tmp_path, "test.json", clips)
    with pytest.raises(InputError, match=r"test\.json has 670 captions, and MSVD's test has 27,763; get it anew$"):
        list(entries("msvd", tmp_path, "test"))


def test_msvd_qa_names_clips_by_the_mapping_or_by_the_lists_of_captions_and_always_by_number(tmp_path):
    asked = [{"video_id": number, "question": "who runs?", "answer": "man"} for number in (1201, 1450, 1202, 1201)]
    write_json(tmp_path / "msvd_qa", "val_qa.json", asked)
    (entry, *_) = entries("msvd_qa", tmp_path, "validation")
    assert (entry.id, entry.video, entry.aliases, len(entry.questions)) == ("vid1201", "vid1201", ("vid1201",), 2)
    write_json(tmp_path / "msvd", "val.json", [{"video": f"v{i}", "caption": ["x"]} for i in range(100)])
    found = list(entries("msvd_qa", tmp_path, "validation"))
    assert [(entry.id, entry.video) for entry in found] == [
        ("vid1201", "v0"),
        ("vid1450", "vid1450"),
        ("vid1202", "v1"),
    ]
    (tmp_path / "msvd_qa" / "youtube_mapping.txt").write_text("zz_1_2 vid1450\n")
    assert [entry.video for entry in entries("msvd_qa", tmp_path, "validation")] == ["vid1201", "zz_1_2", "vid1202"]


def test_tgif_groups_the_captions_of_a_gif_in_the_order_of_its_split(tmp_path):
    urls = [f"https://38.media.tumblr.com/{number:032x}/tumblr_n{number}_500.gif" for number in range(3)]
    rows = [f'{urls[0]}\ta man says "hi".', f"{urls[1]}\ta cat", f"{urls[2]}\tother", f"{urls[0]}\ta man waves"]
    zip_to(tmp_path / "TGIF-Release-master.zip", {"TGIF-Release-master/data/tgif-v1.0.tsv": "\n".join(rows)})
    (tmp_path / "data" / "splits").mkdir(parents=True)
    (tmp_path / "data" / "splits" / "test.txt").write_text(f"{urls[1]}\n{urls[0]}\n")
    found = [(entry.video, entry.captions) for entry in entries("tgif", tmp_path, "test")]
    assert found == [("tumblr_n1_500", ("a cat",)), ("tumblr_n0_500", ('a man says "hi".', "a man waves"))]
    for line in (f"{urls[0]} a man", f"{urls[0]}\t ", f"{urls[0]}\ta\rb\tc"):
        (tmp_path / "tgif-v1.0.tsv").write_text(f"{rows[0]}\n{line}\n", newline="")
        with pytest.raises(InputError, match=r"tgif-v1\.0\.tsv line 2: is not an address, a tab and a caption"):
            list(entries("tgif", tmp_path, "test"))


def test_what_is_held_out_of_training_is_validation_and_nothing_else_is(tmp_path):
    header = "gif_name\tquestion\tanswer\ttype\tvid_id\tkey\tdescription"
    rows = [f"tumblr_{i % 300}\twhat ?\tcat\t0\tFRAMEQA{i}\t1\tx" for i in range(400)]
    (tmp_path / "Train_frameqa_question.csv").write_text("\n".join([header, *rows]))
    write_json(tmp_path, "train.json", {f"v_{i}": {"sentences": ["a", "b"]} for i in range(300)})
    for spec, share in (("tgif_qa", 0.1), ("activitynet", 0.05)):
        train, validation = (list(entries(spec, tmp_path, split)) for split in ("train", "validation"))
        names = [{entry.video for entry in some} for some in (train, validation)]
        assert len(names[0] | names[1]) == 300 and not names[0] & names[1]
        assert 300 * share / 2 < len(names[1]) < 300 * share * 2
    whole = [entry.video for entry in entries("activitynet/paragraphs_all", tmp_path, "train")]
    assert whole == [f"v_{i}" for i in range(300)]
    assert sum(in_split(f"v_{i}", "validation", 0.05) for i in range(20_000)) == pytest.approx(1000, abs=100)


INTERVALS = st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2).map(lambda t: tuple(sorted(t))), min_size=1)


@settings(deadline=None)
@given(INTERVALS)
def test_the_agreed_interval_is_an_annotators_and_that_of_most_if_they_agree(times):
    start, end = agreed_interval(times)
    assert (start / 5, end / 5 - 1) in times
    for time in set(times):
        if 2 * times.count(time) > len(times):
            assert (start, end) == (5.0 * time[0], 5.0 * (time[1] + 1))
    assert agreed_interval(times[::-1]) == (start, end)


def test_didemo_moments_and_paragraphs_are_those_of_the_file(tmp_path):
    rows = [
        {"annotation_id": 1, "video": "a_1.mov", "description": "first ", "times": [[1, 1], [1, 1], [1, 2], [0, 0]]},
        {"annotation_id": 2, "video": "b_2.avi", "description": "other", "times": [[5, 5]] * 4},
        {"annotation_id": 3, "video": "a_1.mp4", "description": "second", "times": [[0, 5]] * 4},
    ]
    write_json(tmp_path, "val_data.json", rows)
    assert list(entries("didemo", tmp_path, "validation")) == [
        AnnotationEntry("a_1", "a_1", "validation", ("first second",), end=30.0, rows=2),
        AnnotationEntry("b_2", "b_2", "validation", ("other",), end=30.0, rows=1),
    ]
    moments = [(entry.id, entry.start, entry.end) for entry in entries("didemo/moments", tmp_path, "validation")]
    assert moments == [("a_1:1", 5.0, 10.0), ("b_2:2", 25.0, 30.0), ("a_1:3", 0.0, 30.0)]
    write_json(tmp_path, "val_data.json", [{**rows[0], "times": [[2, 1]]}])
    with pytest.raises(
        InputError, match=r"val_data\.json entry 1: 'times' is \[\[2, 1\]\]; it must be a list of first"
    ):
        list(entries("didemo/moments", tmp_path, "validation"))


def test_vatex_is_read_as_its_authors_ship_it_and_as_a_plain_list(tmp_path):
    write_json(tmp_path, "vatex_training_v1.0.json", [{"videoID": "x_1_2", "enCap": ["a", "b"], "chCap": ["c"]}])
    write_json(tmp_path, "val.json", [{"video": "y_1_2", "caption": ["a", "b "]}])
    assert next(entries("vatex", tmp_path, "train")).captions == ("a", "b")
    assert next(entries("vatex", tmp_path, "validation")).captions == ("a", "b")


def test_msrvtt_in_one_file_is_read_by_its_splits(tmp_path):
    parts = {"video0": "train", "video1": "validate", "video2": "test", "video3": "test"}
    content = {
        "videos": [{"video_id": name, "split": split} for name, split in parts.items()],
        "sentences": [{"video_id": name, "caption": f"{name} {i}"} for i in range(2) for name in parts],
    }
    write_json(tmp_path, "MSRVTT_data.json", content)
    (tmp_path / "MSRVTT_train.9k.csv").write_text("video_id\nvideo3\nvideo0\nvideo1\n")
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_text("key,vid_key,video_id,sentence\nret0,msr2,video2,a man\n")

    def read(configuration: str, split: str) -> list[tuple[str, int]]:
        spec = f"msrvtt/{configuration}"
        return [(entry.id, len(entry.captions)) for entry in entries(spec, tmp_path, split) if entry.split == split]

    assert read("captioning", "test") == [("video2", 2), ("video3", 2)]
    assert read("retrieval_9k", "train") == [("video0", 2), ("video3", 2)]
    assert read("retrieval_9k", "validation") == read("retrieval_7k", "validation") == [("video1", 2)]
    assert read("retrieval_9k_all", "train") == [("video0", 2), ("video1", 2), ("video3", 2)]
    assert read("retrieval_7k_all", "train") == [("video0", 2), ("video1", 2)]
    assert read("retrieval_9k", "test") == read("retrieval_7k_all", "test") == [("video2", 1)]
    (tmp_path / "MSRVTT_train.9k.csv").write_text("video_id\nvideo7\n")
    with pytest.raises(InputError, match=r"9k\.csv lists video7, which the annotations of MSR-VTT do not have"):
        read("retrieval_9k", "train")


def test_webvid_is_read_line_by_line(tmp_path):
    write_webvid(tmp_path, [("11", "a boat, at sea"), ("12", " ")], [("13", "x")])
    found = entries("webvid", tmp_path, "train")
    assert next(found) == AnnotationEntry("11", "11", "train", ("a boat, at sea",))
    with open(tmp_path / "results_2M_train.csv", "a") as file:
        file.write("14,short\n")
    assert [(entry.id, entry.captions) for entry in itertools.islice(found, 1)] == [("12", ())]
    with pytest.raises(InputError, match=r"train\.csv line 4: has 2 columns, and the header 5; mend the line"):
        list(entries("webvid", tmp_path, "train"))


def test_images_are_named_from_the_folder_of_their_list(tmp_path):
    (tmp_path / "train").mkdir()
    for number in range(2):
        keys = [f"{number:05d}{place:04d}" for place in range(3)]
        columns = {"url": keys, "key": keys, "caption": ["a cat", None, f"dog {number}"], "status": ["success"] * 3}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train" / f"{number:05d}.parquet")
    found = list(entries("image_text", tmp_path, "train"))
    assert [entry.video for entry in found][2:4] == ["train/00000/000000002", "train/00001/000010000"]
    assert [entry.captions for entry in found] == [("a cat",), (), ("dog 0",), ("a cat",), (), ("dog 1",)]
    (tmp_path / "cc").mkdir()
    table = 'title\tfilepath\na "red" cat\tcc_data/val/00/7.jpg\n'
    (tmp_path / "cc" / "Validation_GCC-1.1.0-Validation_output.csv").write_text(table)
    (entry,) = entries("cc3m", tmp_path, "validation")
    assert (entry.video, entry.captions) == ("cc/cc_data/val/00/7", ('a "red" cat',))
    (tmp_path / "train" / "00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"00002\.parquet cannot be read"):
        list(entries("image_text", tmp_path, "train"))
    pyarrow.parquet.write_table(pyarrow.table({"key": ["1"]}), tmp_path / "train" / "00002.parquet")
    with pytest.raises(InputError, match="there is no column title or caption or text or TEXT; the columns are key"):
        list(entries("image_text", tmp_path, "train"))


@pytest.mark.parametrize("spec", official())
def test_every_protocol_has_a_description_and_test_is_never_validation(spec):
    dataset, config = find(spec)
    protocol = dataset.protocol(config)
    assert protocol.description and dataset.license
    assert len(dataset.description) > 300
    counted = {split for joined in protocol.expected for split in joined.split("+")}
    assert counted <= set(protocol.files) <= {"train", "validation", "test"}
    for split in protocol.expected:
        assert split == "test" or "test" not in split
    assert json.dumps(protocol.name) and math.inf == AnnotationEntry("", "", "").end


def test_an_archive_that_unpacks_to_more_than_any_text_is_refused_before_it_is(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("val_1.json", b" " * 2**20 * 120)
    with pytest.raises(InputError, match=r"val_1\.json is said to unpack from [\d,]+ to 125,829,120 bytes"):
        list(entries("activitynet", tmp_path, "test"))
