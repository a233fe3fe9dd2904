"""Clips of a data set become files that are a data set again."""

import json
import pathlib

import pytest
from listed_source import ListedSource

from vlab_jax.data import schema
from vlab_jax.datasets import registry, unpack
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.errors import InputError


def test_what_is_unpacked_is_the_same_data_set_again(data_dir, tmp_path, capsys):
    out = tmp_path / "videos"
    given = ["--dataset=motion/tiny", "--split=test", "--clips=3", f"--out={out}", f"--directory={data_dir}"]
    assert unpack.main(given) == 0 and capsys.readouterr().out.endswith(f"wrote 3 clips into {out}\n")
    assert [path.suffix for path in sorted(out.iterdir())] == [".jsonl", ".mp4", ".mp4", ".mp4"]
    (out / "annotations.jsonl").write_text((out / "annotations.jsonl").read_text().replace('"test"', '"train"'))
    again = registry.open_split(f"folder:{out}", "train", BuildOptions(str(tmp_path / "data")))
    before = registry.open_split("motion/tiny", "test", BuildOptions(data_dir))
    assert sorted(map(repr, (schema.from_example(again[i]) for i in range(3)))) == sorted(
        map(repr, (schema.from_example(before[i]) for i in range(3)))
    )
    capsys.readouterr()
    assert unpack.main(given) == 2 and capsys.readouterr().err.startswith(f"error: {out} exists already;")


def test_names_cannot_lead_out_and_intervals_are_kept(tmp_path, monkeypatch):
    clip = schema.ClipRecord("../../a b", b"\x1aE\xdf\xa3", ("x",), (), 1.5, 3.0)
    monkeypatch.setattr(registry, "open_split", lambda *_: ListedSource([clip]))
    assert unpack.unpack("any", "test", 0, tmp_path / "out", BuildOptions()) == 1
    assert (tmp_path / "out" / "_a_b.mkv").is_file()
    row = json.loads((tmp_path / "out" / "annotations.jsonl").read_text())
    interval = {"start": 1.5, "end": 3.0}
    assert row == {"video": "_a_b.mkv", "id": "../../a b", **interval, "captions": ["x"], "split": "test"}


def test_ids_that_become_the_same_name_get_files_of_their_own(tmp_path, monkeypatch):
    clips = [schema.ClipRecord(name, b"GIF8" + name.encode(), ("x",)) for name in ("a.b", "a_b", "a b")]
    monkeypatch.setattr(registry, "open_split", lambda *_: ListedSource(clips))
    assert unpack.unpack("any", "train", 0, tmp_path / "out", BuildOptions()) == 3
    source = registry.find(f"folder:{tmp_path / 'out'}")[0].dataset(str(tmp_path / "out"), BuildOptions())
    media = {clip.id: pathlib.Path(clip.media).read_bytes() for clip in source.clips()["train"]}
    assert media == {clip.id: clip.media for clip in clips}


def test_frames_are_refused_and_nothing_is_left(tmp_path, monkeypatch):
    clip = schema.ClipRecord("a", (b"\xff\xd8\xff",), ("x",))
    monkeypatch.setattr(registry, "open_split", lambda *_: ListedSource([clip]))
    with pytest.raises(InputError, match="stored as frames"):
        unpack.unpack("any", "test", 0, tmp_path / "out", BuildOptions())
    assert list(tmp_path.iterdir()) == []


def test_the_extension_follows_from_the_first_bytes():
    beginnings = {
        b"\x00\x00\x00\x20ftypisom": "mp4",
        b"RIFF1234AVI ": "avi",
        b"GIF89a": "gif",
        b"\x00\x00\x01\xba": "mpg",
    }
    assert {media: unpack.extension(media) for media in beginnings} == beginnings
