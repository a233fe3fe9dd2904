"""Data sets as frames: what is stored, what failed, by worker processes, in pieces and by Beam, and how it is read."""

import dataclasses
import functools
import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import pytest
from numbered_video import SIDE, encode, numbered, read_numbers

from vlab_jax.data import pipeline, video
from vlab_jax.data.schema import ClipRecord, Question, from_example
from vlab_jax.data.tokenizer import train_bpe
from vlab_jax.datasets import beam_build, build, records, registry
from vlab_jax.datasets.beam_build import BeamOptions
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.errors import InputError


def clips_of(spec: str, options: BuildOptions) -> dict[str, list[ClipRecord]]:
    """The clips of each split, sorted by id."""
    builder = registry.prepare(spec, options)
    sources = {split: builder.as_data_source(split) for split in builder.info.splits}
    return {
        split: sorted((from_example(source[i]) for i in range(len(source))), key=lambda clip: clip.id)
        for split, source in sources.items()
    }


def folder_of(directory: pathlib.Path, *clips: dict, **media: bytes) -> str:
    """A spec of a folder with these clips and media, all of split train."""
    for name, content in media.items():
        (directory / f"{name}.mp4").write_bytes(content)
    lines = [json.dumps({"captions": [f"clip {i}"], "split": "train", **clip}) for i, clip in enumerate(clips)]
    (directory / "annotations.jsonl").write_text("\n".join(lines))
    return f"folder:{directory}"


@pytest.fixture(scope="module")
def numbers() -> bytes:
    return encode([numbered(i) for i in range(50)], rate=25)


@pytest.fixture(scope="module")
def some(tmp_path_factory, numbers) -> str:
    """Five clips: the whole of a media, an interval, one past the end, no media at all, another whole one."""
    return folder_of(
        tmp_path_factory.mktemp("some"),
        {"video": "a.mp4", "id": "whole"},
        {"video": "a.mp4", "id": "part", "start": 0.4, "end": 1.2},
        {"video": "a.mp4", "id": "past", "start": 5, "end": 9},
        {"video": "b.mp4", "id": "damaged", "questions": [{"question": "q?", "answer": "a", "options": ["a", "b"]}]},
        {"video": "c.mp4", "id": "other"},
        a=numbers,
        b=b"no video",
        c=encode([numbered(i) for i in range(8)], rate=4),
    )


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> BuildOptions:
    return BuildOptions(str(tmp_path_factory.mktemp("prepared")), variant="frames", frame_rate=5.0, workers=1)


def test_both_variants_hold_the_same_clips_in_separate_directories(some, options, numbers):
    (stored,), (files,) = (clips_of(some, each).values() for each in (options, BuildOptions(options.directory)))
    for one, other in zip(stored, files, strict=True):
        same = (one.id, one.captions, one.questions, one.start, one.end)
        assert same == (other.id, other.captions, other.questions, other.start, other.end)
        assert isinstance(one.media, tuple) and isinstance(other.media, bytes)
    whole = next(clip for clip in stored if clip.id == "whole")
    assert read_numbers(video.decode_clip(whole.media, num_frames=10, size=SIDE)) == [*range(2, 50, 5)]
    part = next(clip for clip in stored if clip.id == "part")
    assert read_numbers(video.decode_clip(part.media, num_frames=4, size=SIDE)) == [12, 17, 22, 27]
    assert [len(clip.media) for clip in stored if clip.id == "other"] == [8]


def test_clips_that_cannot_be_decoded_are_listed_and_counted_when_they_are_read(some, options):
    builder = registry.prepare(some, options)
    lines = pathlib.Path(builder.data_dir, records.FAILURES).read_text().splitlines()
    listed = {tuple(line.split("\t")[:2]): line.split("\t")[2] for line in lines}
    assert set(listed) == {("train", "past"), ("train", "damaged")}
    assert "lies outside the media" in listed["train", "past"]
    source = builder.as_data_source("train")
    frames = pipeline.FrameOptions(num_frames=4, size=32)
    with pipeline.evaluation_batches(source, frames, batch_size=5) as batches:
        (batch,) = batches
    names = [from_example(source[int(index)]).id for index in batch["index"]]
    assert {name for name, valid in zip(names, batch["valid"], strict=True) if not valid} == {"past", "damaged"}
    assert all("could not be decoded when the data set was built" in failure for failure in batch["failures"])
    tokenizer = train_bpe(["clip"], 300, 8)
    with pipeline.training_batches([source], [1.0], frames, tokenizer, batch_size=6, seed=0) as batches:
        batch = next(batches)
    assert batch["video"].shape == (6, 4, 32, 32, 3) and batch["video"].reshape(6, -1).std(axis=1).min() > 50


def test_a_data_set_of_which_nothing_can_be_decoded_is_refused(tmp_path, monkeypatch):
    spec = folder_of(tmp_path, *[{"video": "a.mp4", "id": str(i)} for i in range(8)], a=b"no video")
    made = BuildOptions(str(tmp_path / "made"), variant="frames", workers=0)
    with pytest.raises(InputError, match=r"^none of 8 clips has media that can be decoded; the last, .*: [^\n]*$"):
        registry.prepare(spec, made)
    monkeypatch.setattr(records, "_ENOUGH_TO_JUDGE", 3)
    with pytest.raises(InputError, match="none of 3 clips"):  # without going through all
        registry.prepare(spec, made)
    assert not list(pathlib.Path(made.directory).rglob("*record*"))


def test_a_large_split_is_written_shard_by_shard(some, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SHARD_BYTES", 1000)
    sharded = BuildOptions(str(tmp_path), variant="frames", frame_rate=5.0, workers=0)
    assert registry.prepare(some, sharded).info.splits["train"].num_shards > 2
    assert len(clips_of(some, sharded)["train"]) == 5


def test_two_clips_of_one_id_are_refused(tmp_path):
    stored = [records.EncodedClip("a", b"1"), records.EncodedClip("b", b"2"), records.EncodedClip("a", b"3")]
    with pytest.raises(InputError, match=r"^data set sets: two clips of split test have the id 'a'"):
        records.write_split(stored, tmp_path, "sets", "test")


# in pieces


def in_pieces(dataset, files, options, most=99):
    """What the pipeline does, without Beam; after so many pieces it is killed."""
    pieces = beam_build.plan_pieces(dataset, files, 2, lambda path: path)
    for piece in pieces["train"][:most]:
        beam_build.do_piece(piece, options)
    if most < len(pieces["train"]):
        raise KeyboardInterrupt
    beam_build.join_pieces(dataset, files, options, pieces)


def test_in_pieces_the_same_data_set_is_made(some, options, tmp_path):
    made = BuildOptions(str(tmp_path), variant="frames", frame_rate=5.0)
    builder = registry.prepare(some, made, in_pieces)
    assert clips_of(some, made) == clips_of(some, options)
    assert builder.info.splits["train"].shard_lengths == [2, 2, 1]
    shards = {f"folder-train.array_record-0000{i}-of-00003" for i in range(3)}
    names = {path.name for path in pathlib.Path(builder.data_dir).iterdir()}
    assert names == shards | {"dataset_info.json", "features.json", records.FAILURES}
    failed, here = (pathlib.Path(registry.prepare(some, each).data_dir, records.FAILURES) for each in (made, options))
    assert failed.read_text() == here.read_text()


def test_a_build_in_pieces_continues_after_an_interruption(some, tmp_path):
    made = BuildOptions(str(tmp_path), variant="frames", frame_rate=5.0)
    with pytest.raises(KeyboardInterrupt):
        registry.prepare(some, made, functools.partial(in_pieces, most=2))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record-*")}
    assert len(times) == 2
    with pytest.raises(InputError, match="holds an unfinished data set, begun with --beam"):
        registry.prepare(some, made)
    registry.prepare(some, made, in_pieces)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(clips_of(some, made)["train"]) == 5


def test_a_piece_is_done_again_if_its_list_or_its_options_have_changed(tmp_path):
    clip = ClipRecord("a", encode([numbered(1)] * 2), ("one",))

    def do(clip: ClipRecord, side: int) -> int:
        (tmp_path / "clips").write_text(beam_build._clip_to_line(clip, str))
        piece = beam_build.Piece(*(str(tmp_path / name) for name in ("clips", "shard", "done")))
        beam_build.do_piece(piece, BuildOptions(variant="frames", short_side=side))
        return (tmp_path / "shard").stat().st_mtime_ns

    times = [do(clip, 32), do(clip, 32), do(clip, 16), do(dataclasses.replace(clip, captions=("two",)), 16)]
    assert times[0] == times[1] < times[2] < times[3]


texts = st.text(max_size=5)
several = st.lists(texts, max_size=3).map(tuple)
questions = st.lists(st.builds(Question, texts, texts, texts, several), max_size=2).map(tuple)


@hypothesis.given(st.builds(ClipRecord, texts, st.binary() | texts, several, questions, st.floats(0, 9), st.floats(0)))
@hypothesis.settings(max_examples=30)
def test_a_clip_survives_its_line_in_a_list(clip):
    line = beam_build._clip_to_line(clip, str)
    assert "\n" not in line and beam_build._clip_from_line(line.encode()) == clip


def test_workers_may_see_files_by_other_paths():
    worker_path = BeamOptions(paths="/mnt/bucket/=gs://bucket").worker_path
    assert worker_path("/mnt/bucket/a/b.mp4") == "gs://bucket/a/b.mp4"
    assert worker_path("/mnt/buckets/b.mp4") == "/mnt/buckets/b.mp4" and BeamOptions().worker_path("/a") == "/a"
    for wrong in ("/mnt", "mnt=gs://b", "/mnt="):
        with pytest.raises(InputError, match="must be here=there"):
            BeamOptions(paths=wrong)


def test_the_pipeline_makes_the_same_data_set(some, options, tmp_path):
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install 'apache-beam>=2.77,<3'")
    seen = tmp_path / "seen"  # workers see the directory by another name
    seen.symlink_to(tmp_path / "here")
    (tmp_path / "here").mkdir()
    made = dataclasses.replace(options, directory=str(tmp_path / "here"))
    beam = BeamOptions(clips_per_shard=2, paths=f"{tmp_path / 'here'}={seen}")
    builder = registry.prepare(some, made, functools.partial(beam_build.build, beam=beam))
    assert clips_of(some, made) == clips_of(some, options)
    assert builder.info.splits["train"].shard_lengths == [2, 2, 1]


# the command line


def test_the_command_prepares_what_a_run_then_finds(some, options, tmp_path, capsys, caplog):
    flags = [f"--dataset={some}", f"--directory={tmp_path}", "--variant=frames", "--frame_rate=5", "--workers=0"]
    assert build.main(flags) == 0
    assert "train: 5 clips" in capsys.readouterr().out
    assert "2 of 5 clips are stored without media; listed in" in caplog.text
    made = dataclasses.replace(options, directory=str(tmp_path))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*record*")}
    assert clips_of(some, made) == clips_of(some, options)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*record*")} == files


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset=moton"], "no data set 'moton'"),
        (["--dataset=motion", "--short_side=8"], "short_side is 8; it must be from 16 to 65500"),
        (["--dataset=motion", "--frame_rate=nan"], "frame_rate is nan; it must be"),
        (["--dataset=motion", "--clips_per_shard=9"], "are for --beam; add it"),
        (["--dataset=motion", "--beam", "--beam_paths=x"], "must be here=there"),
    ],
)
def test_a_wrong_command_is_answered_in_one_line(flags, words, tmp_path, capsys):
    assert build.main([*flags, f"--directory={tmp_path}"]) == 2
    printed = capsys.readouterr()
    assert (
        printed.out == ""
        and printed.err.startswith("error: ")
        and words in printed.err
        and printed.err.count("\n") == 1
    )


def test_flags_of_the_runner_are_split_at_the_commas_between_them():
    assert build._split_flags("--runner=X,--hosts=a,b,--n=1") == ("--runner=X", "--hosts=a,b", "--n=1")
    assert build._split_flags("") == ()
