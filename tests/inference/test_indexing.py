"""An index follows its folder: what is new, changed, gone or broken; and it survives being killed."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from inference.colours import ColourEmbedder, colour_video, open_colours

from vlab_jax import predict
from vlab_jax.inference import cli
from vlab_jax.inference import cli as index_command
from vlab_jax.inference.search_index import open_index
from vlab_jax.runtime.disk import only_holder

PROGRAM = pathlib.Path(__file__).with_name("colours.py")


@pytest.fixture
def embedders(monkeypatch):
    """The embedders that commands have loaded, in order; --model names the fingerprint."""
    loaded = []

    def load(given):
        loaded.append(open_colours(given))
        return loaded[-1]

    monkeypatch.setattr(cli, "open_model", load)
    return loaded


@pytest.fixture
def folder(tmp_path):
    """Three videos of a second to four, one in a folder below."""
    folder = tmp_path / "media"
    (folder / "below").mkdir(parents=True)
    (folder / "halves.mp4").write_bytes(colour_video(("red", 2), ("blue", 2)))
    (folder / "it's 红.mp4").write_bytes(colour_video(("green", 1)))
    (folder / "below" / "grey.mp4").write_bytes(colour_video(("grey", 2)))
    (folder / "notes.txt").write_text("no media")
    return folder


def command(folder, index, *more, model="colours"):
    return ["index", str(folder), f"--index={index}", f"--model={model}", "--window=1", "--workers=0", *more]


def rows(index):
    """What an index holds: file, start, end, vector; sorted, so that a duplicate shows."""
    table = open_index(index)._table.to_arrow()
    return sorted((r["file"], r["start"], r["end"], tuple(r["vector"])) for r in table.to_pylist())


def counts(index):
    files = [file for file, *_ in rows(index)]
    return {file: files.count(file) for file in files}


def test_every_window_of_every_file_is_indexed_once_and_unchanged_files_are_left_alone(
    folder, tmp_path, embedders, capsys
):
    assert predict.main(command(folder, tmp_path / "index")) == 0
    assert counts(tmp_path / "index") == {"halves.mp4": 4, "it's 红.mp4": 1, "below/grey.mp4": 2}
    assert "files: 3 new; windows embedded: 7" in capsys.readouterr().out
    before = rows(tmp_path / "index")
    assert predict.main(command(folder, tmp_path / "index")) == 0
    assert "files: 3 unchanged; windows embedded: 0" in capsys.readouterr().out
    assert [embedder.embedded for embedder in embedders] == [7, 0] and rows(tmp_path / "index") == before


def test_changed_files_are_embedded_anew_deleted_ones_dropped_and_touched_ones_not_embedded(
    folder, tmp_path, embedders, capsys
):
    predict.main(command(folder, tmp_path / "index"))
    (folder / "halves.mp4").write_bytes(colour_video(("green", 3)))
    (folder / "below" / "grey.mp4").unlink()
    os.utime(folder / "it's 红.mp4", (1, 1))
    assert predict.main(command(folder, tmp_path / "index")) == 0
    assert counts(tmp_path / "index") == {"halves.mp4": 3, "it's 红.mp4": 1} and embedders[-1].embedded == 3
    assert "1 changed, 1 touched, 1 deleted; windows embedded: 3" in capsys.readouterr().out
    assert predict.main(command(folder, tmp_path / "index")) == 0
    assert "2 unchanged" in capsys.readouterr().out  # the touched file's time was noted


def test_a_file_that_cannot_be_decoded_is_named_remembered_and_tried_again_when_it_changes(
    folder, tmp_path, embedders, capsys
):
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "empty.mkv").write_bytes(b"")
    for _ in range(2):
        assert predict.main(command(folder, tmp_path / "index")) == 2
        assert "2 files cannot be decoded" in capsys.readouterr().err
    assert len(rows(tmp_path / "index")) == 7
    (folder / "bad.mp4").write_bytes(colour_video(("red", 1)))
    (folder / "empty.mkv").unlink()
    assert predict.main(command(folder, tmp_path / "index")) == 0 and len(rows(tmp_path / "index")) == 8


def test_a_remembered_file_is_opened_again_only_by_retry(folder, tmp_path, embedders, capsys):
    (folder / "bad.mp4").write_bytes(b"no video")
    predict.main(command(folder, tmp_path / "index"))
    first = capsys.readouterr().err
    predict.main(command(folder, tmp_path / "index"))
    again = capsys.readouterr().err
    predict.main(command(folder, tmp_path / "index", "--retry"))
    retried = capsys.readouterr().err
    opened = "bad.mp4: the media cannot be decoded"
    assert opened in first and opened not in again and opened in retried


def test_a_file_that_breaks_after_it_was_indexed_has_no_rows_left(folder, tmp_path, embedders):
    predict.main(command(folder, tmp_path / "index"))
    (folder / "halves.mp4").write_bytes(b"overwritten")
    assert predict.main(command(folder, tmp_path / "index")) == 2
    assert "halves.mp4" not in counts(tmp_path / "index")


def test_a_folder_that_has_lost_all_its_media_empties_no_index(folder, tmp_path, embedders, capsys):
    predict.main(command(folder, tmp_path / "index"))
    for file in folder.rglob("*.mp4"):
        file.unlink()
    assert predict.main(command(folder, tmp_path / "index")) == 2
    assert "holds no video and no image" in capsys.readouterr().err and len(rows(tmp_path / "index")) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other"}, "was made by the model"),
        ({"more": ["--window=2"]}, "was made with --window=1 --stride=1"),
        ({"folder": "elsewhere"}, "give --moved if it is the same folder"),
    ],
)
def test_an_index_is_extended_only_by_what_made_it(folder, tmp_path, embedders, capsys, changes, message):
    predict.main(command(folder, tmp_path / "index"))
    before = rows(tmp_path / "index")
    capsys.readouterr()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "new.mp4").write_bytes(colour_video(("red", 1)))
    source = tmp_path / changes.get("folder", "media")
    given = command(source, tmp_path / "index", *changes.get("more", []), model=changes.get("model", "colours"))
    assert predict.main(given) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and rows(tmp_path / "index") == before


def test_a_folder_that_was_moved_keeps_its_index(folder, tmp_path, embedders):
    predict.main(command(folder, tmp_path / "index"))
    folder.rename(tmp_path / "moved")
    assert predict.main(command(tmp_path / "moved", tmp_path / "index", "--moved")) == 0
    assert embedders[-1].embedded == 0 and open_index(tmp_path / "index").about.folder == str(tmp_path / "moved")


def test_two_processes_do_not_write_to_one_index(folder, tmp_path, embedders, capsys):
    predict.main(command(folder, tmp_path / "index"))
    capsys.readouterr()
    with only_holder(tmp_path / "index" / "index.lock", "taken"):
        assert predict.main(command(folder, tmp_path / "index")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: another process is writing to the index") and error.count("\n") == 1


def test_a_directory_of_other_things_is_not_made_an_index(folder, tmp_path, embedders, capsys):
    assert predict.main(command(folder, folder)) == 2
    assert "holds other things than an index" in capsys.readouterr().err
    assert not (folder / "windows.lance").exists()


def test_worker_processes_index_what_one_process_does(folder, tmp_path, embedders):
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "long.mp4").write_bytes(colour_video(("red", 10), ("green", 10)))  # more windows than a task holds
    predict.main(command(folder, tmp_path / "one"))
    given = [each for each in command(folder, tmp_path / "two") if not each.startswith("--workers")]
    assert predict.main([*given, "--workers=1", "--batch=3"]) == 2
    assert rows(tmp_path / "one") == rows(tmp_path / "two") and counts(tmp_path / "two")["long.mp4"] == 20


def run(folder, index, killed):
    return subprocess.Popen(
        [sys.executable, PROGRAM, *command(folder, index)],
        env={**os.environ, "INDEX_KILLED": killed},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_bar_fills_while_a_long_file_is_read(folder, tmp_path, embedders, monkeypatch):
    (folder / "long.mp4").write_bytes(colour_video(("red", 20)))
    seen, totals = [], []

    def watched(shares, total):
        totals.append(total)
        for share in shares:
            seen.append(share)
            yield share

    monkeypatch.setattr(index_command, "_bar", watched)
    assert predict.main(command(folder, tmp_path / "index")) == 0
    assert sum(seen) == pytest.approx(4) and len(seen) == 3 + 3  # 20 windows are three tasks of eight
    assert predict.main(command(folder, tmp_path / "index")) == 0
    assert totals == [4, 0]


def test_after_kills_at_any_moment_the_next_run_goes_on_without_a_loss_or_a_duplicate(folder, tmp_path, embedders):
    for number in range(12):
        (folder / f"{number}.mp4").write_bytes(colour_video(("red", 1), ("green", number % 3)))
    with run(folder, tmp_path / "index", "when told") as process:
        for _ in range(3):
            assert process.stdout.readline() == "written\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    written = rows(tmp_path / "index")
    assert 0 < len(counts(tmp_path / "index")) < 15
    (folder / "0.mp4").write_bytes(colour_video(("blue", 2)))  # was written, and is to be written anew
    with run(folder, tmp_path / "index", "between delete and add") as process:
        process.wait(60)
    assert process.returncode == -signal.SIGKILL and "0.mp4" not in counts(tmp_path / "index")
    assert predict.main(command(folder, tmp_path / "index")) == 0
    assert predict.main(command(folder, tmp_path / "whole")) == 0
    assert rows(tmp_path / "index") == rows(tmp_path / "whole") and set(written) - set(rows(tmp_path / "whole"))
    assert embedders[0].embedded < embedders[1].embedded  # it went on


def test_what_is_embedded_as_no_number_is_not_written(folder, tmp_path, embedders, monkeypatch, capsys):
    monkeypatch.setattr(ColourEmbedder, "embed_videos", lambda self, videos: np.full((len(videos), 4), np.nan))
    assert predict.main(command(folder, tmp_path / "index")) == 3
    assert "not finite" in capsys.readouterr().err and not len(open_index(tmp_path / "index"))


def test_a_damaged_index_is_one_line(folder, tmp_path, embedders, capsys):
    predict.main(command(folder, tmp_path / "index"))
    (tmp_path / "index" / "index.json").write_text("{")
    assert predict.main(command(folder, tmp_path / "index")) == 2
    (tmp_path / "index" / "index.json").write_text(json.dumps({"format": 99}))
    assert predict.main(command(folder, tmp_path / "index")) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "index.json cannot be read" in errors[-2] and "is of another version (format 99" in errors[-1]


def test_a_file_whose_name_cannot_be_written_down_is_left_out_and_named(folder, tmp_path, embedders, capsys):
    with open(os.fsencode(folder) + b"/caf\xe9.mp4", "wb") as file:
        file.write(colour_video(("red", 1)))
    assert predict.main(command(folder, tmp_path / "index")) == 2
    assert "its name is not UTF-8; rename it" in capsys.readouterr().err and len(rows(tmp_path / "index")) == 7
