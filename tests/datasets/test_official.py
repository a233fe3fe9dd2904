"""Official data sets from a user's folder: what is refused, what is left out, and when they are prepared anew."""

import json
import pathlib
import re
import zipfile

import pytest
from official_folders import small_video, write_media, write_webvid

from vlab_jax.data.schema import from_example
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.datasets.registry import open_split, prepare
from vlab_jax.errors import InputError

TRAIN = [("11", "a boat"), ("12", "a tree"), ("13", "a road"), ("14", "")]


@pytest.fixture
def data(tmp_path) -> pathlib.Path:
    """A `manual_dir` with WebVid, of which two of four videos are there."""
    write_webvid(tmp_path / "in" / "webvid", TRAIN, [("21", "a lake")])
    write_media(tmp_path / "in" / "webvid", "videos/000001_000050/11.mp4", "12.MKV", "other.mp4")
    return tmp_path / "in"


def options(data: pathlib.Path, **fields) -> BuildOptions:
    return BuildOptions(str(data.parent / "out"), str(data), **fields)


def refusal(spec: str, given: BuildOptions) -> str:
    with pytest.raises(InputError) as caught:
        prepare(spec, given)
    return str(caught.value)


def clips(spec: str, split: str, given: BuildOptions) -> dict:
    return {clip.id: clip for clip in map(from_example, open_split(spec, split, given))}


def test_missing_media_are_refused_with_counts_shares_names_and_the_way_out(data):
    message = refusal("webvid", options(data))
    assert message == (
        "webvid/2m: 3 of 5 clips (60.0%) have no media: train 2 of 4, validation 1 of 1 (missing: 13, 14, 21) in "
        f"{data}/webvid; put them there, or leave their clips out with data.allow_missing=True (--allow_missing); "
        f"python -m vlab_jax.datasets.check --dataset=webvid/2m --manual_dir={data} lists them all"
    )
    assert not list((data.parent / "out").rglob("*.array_record*"))


def test_clips_without_media_are_left_out_if_that_is_allowed_and_counted_in_the_log(data, caplog):
    caplog.set_level("INFO")
    found = clips("webvid", "train", options(data, allow_missing=True))
    assert {name: (clip.media, clip.captions) for name, clip in found.items()} == {
        "11": (small_video(0), ("a boat",)),
        "12": (small_video(1), ("a tree",)),
    }
    assert (
        "webvid/2m: 3 of 5 clips (60.0%) have no media: train 2 of 4, validation 1 of 1; they are left out"
        in caplog.text
    )
    with pytest.raises(InputError, match="no split 'validation'; it has: train"):
        open_split("webvid", "validation", options(data, allow_missing=True))


def test_without_any_media_nothing_is_built_even_if_that_is_allowed(data):
    for path in data.rglob("*.[mM]*"):
        path.unlink()
    write_media(data / "webvid", "other.mp4")
    message = refusal("webvid", options(data, allow_missing=True))
    assert message.startswith("webvid/2m: 5 of 5 clips (100.0%) have no media") and "allow_missing" not in message
    (data / "webvid" / "11.mp4").touch()
    assert "5 of 5" in refusal("webvid", options(data, allow_missing=True))  # a file of no bytes is no media


def test_clips_without_a_text_are_left_out(data):
    write_media(data / "webvid", "13.mp4", "14.mp4", "21.webm")
    assert set(clips("webvid", "train", options(data))) == {"11", "12", "13"}
    assert set(clips("webvid", "validation", options(data))) == {"21"}
    write_webvid(data / "webvid", [("11", "")], [("21", " ")])
    assert re.fullmatch(
        r"no clip of data set webvid/2m-\w+ has a caption or a question", refusal("webvid", options(data))
    )


def test_a_split_without_its_annotation_file_is_left_out_and_named_in_the_log(data, caplog):
    caplog.set_level("INFO")
    (data / "webvid" / "results_2M_val.csv").unlink()
    builder = prepare("webvid", options(data, allow_missing=True))
    assert list(builder.info.splits) == ["train"]
    assert f"webvid/2m: validation lacks results_2M_val.csv in {data}/webvid, and is left out" in caplog.text
    (data / "webvid" / "results_2M_train.csv").unlink()
    assert refusal("webvid", options(data)) == (
        f"webvid/2m: no annotation files in {data}/webvid: train lacks results_2M_train.csv; validation lacks "
        "results_2M_val.csv"
    )


def test_changed_files_are_prepared_anew_and_unchanged_ones_used_again(data):
    def built() -> str:
        return str(prepare("webvid", options(data, allow_missing=True)).data_path)

    seen = [built()]
    assert built() == seen[0]
    write_media(data / "webvid", "13.mp4")
    seen.append(built())
    write_webvid(data / "webvid", TRAIN[:2], [("21", "a lake")])
    seen.append(built())
    assert len(set(seen)) == 3
    assert set(clips("webvid", "train", options(data, allow_missing=True))) == {"11", "12"}


def test_the_only_prepared_version_is_opened_without_its_sources(data):
    given = options(data, allow_missing=True)
    known = clips("webvid", "train", given)
    without = BuildOptions(given.directory)
    assert clips("webvid", "train", without) == known
    assert "say where its files lie, with data.manual_dir=<directory>" in refusal("webvid/10m", without)
    assert "(none is prepared in" in refusal("webvid", BuildOptions(given.directory, variant="frames"))
    write_media(data / "webvid", "13.mp4")
    prepare("webvid", given)
    assert re.search(r"prepare one version of it \(2m-\w{12}, 2m-\w{12} are prepared in", refusal("webvid", without))


def test_frames_are_stored_of_official_data_too(data):
    given = options(data, allow_missing=True, variant="frames", frame_rate=2.0, workers=0)
    found = clips("webvid", "train", given)
    assert {len(clip.media) for clip in found.values()} == {4}
    assert all(jpeg.startswith(b"\xff\xd8") for clip in found.values() for jpeg in clip.media)
    assert clips("webvid", "train", BuildOptions(given.directory, variant="frames", frame_rate=2.0)) == found


def test_counts_that_are_not_the_official_ones_are_refused_by_name_before_anything_is_built(tmp_path):
    folder = tmp_path / "in" / "tgif_qa"
    folder.mkdir(parents=True)
    rows = ["gif_name\tquestion\tanswer\tvid_id\tkey", "tumblr_1\tHow many times ?\t3\tCOUNT1\t5"]
    (folder / "Test_count_question.csv").write_text("\n".join(rows))
    write_media(folder, "tumblr_1.gif")
    assert refusal("tgif_qa/count", options(folder.parent)) == (
        "tgif_qa/count: test has 1 questions, and the official files have 3,554; get anew, as the authors ship it: "
        f"{folder}/Test_count_question.csv"
    )


def test_files_are_in_the_folder_of_the_data_set_or_of_a_related_one_or_directly_in_manual_dir(data, tmp_path):
    assert set(clips("webvid", "train", options(data / "webvid", allow_missing=True))) == {"11", "12"}
    assert refusal("msvd", options(data)) == (
        f"msvd: {data} holds folders of other data sets (webvid) and none of this; put its files into {data}/msvd"
    )
    assert "there is no directory" in refusal("webvid", options(tmp_path / "nowhere"))
    assert "say where its files lie" in refusal("webvid", BuildOptions(str(tmp_path)))


def test_an_annotation_that_names_media_outside_is_refused(data):
    write_webvid(data / "webvid", [("../secret", "x")])
    (data / "secret.mp4").write_bytes(small_video())
    message = refusal("webvid", options(data, allow_missing=True))
    assert message == "the annotations name the media '../secret', which leads out of the folder; mend them"


def test_two_clips_of_one_id_are_refused(data):
    write_webvid(data / "webvid", [("11", "a boat"), ("11", "a tree")])
    assert "two clips of split train have the id '11'" in refusal("webvid", options(data, allow_missing=True))


def test_a_changed_msrvtt_file_is_refused(assets, tmp_path):
    """The authors' own file, less one sentence."""
    official = assets / "annotations" / "msrvtt" / "test_videodatainfo.json.zip"
    with zipfile.ZipFile(official) as archive:
        content = json.loads(archive.read("test_videodatainfo.json"))
    content["sentences"].pop()
    (tmp_path / "in" / "msrvtt").mkdir(parents=True)
    (tmp_path / "in" / "msrvtt" / "test_videodatainfo.json").write_text(json.dumps(content))
    message = refusal("msrvtt", options(tmp_path / "in", allow_missing=True))
    assert message.startswith(
        "msrvtt/captioning: test has 59,799 captions, and the official files have 59,800; get anew"
    )
    assert message.endswith(f"{tmp_path}/in/msrvtt/test_videodatainfo.json")
