"""An index follows its folder, where files are new, changed, gone or broken; and it survives kills."""

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
from vlab_jax.inference import cli, indexing
from vlab_jax.inference.search_index import open_index
from vlab_jax.runtime.disk import exclusive_lock

PROGRAM = pathlib.Path(__file__).with_name("colours.py")


@pytest.fixture
def embedders(monkeypatch):
    """The embedders that commands have loaded, in order; --model names the fingerprint."""
    loaded = []
    monkeypatch.setattr(cli, "open_model", lambda args: loaded.append(open_colours(args)) or loaded[-1])
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


@pytest.fixture
def index(tmp_path) -> pathlib.Path:
    return tmp_path / "index"


@pytest.fixture
def update(folder, index, embedders, capsys):
    """Runs the command `index`, by default on `folder` and `index`; its exit status, output and errors."""

    def run(*more, folder=folder, index=index, model="colours"):
        status = predict.main(command(folder, index, *more, model=model))
        return status, *capsys.readouterr()

    return run


def command(folder, index, *more, model="colours"):
    return ["index", str(folder), f"--index={index}", f"--model={model}", "--window=1", "--workers=0", *more]


def rows(index):
    """What an index holds: file, start, end, vector; sorted, so that a duplicate shows."""
    table = open_index(index)._table.to_arrow()
    return sorted((r["file"], r["start"], r["end"], tuple(r["vector"])) for r in table.to_pylist())


def counts(index):
    files = [file for file, *_ in rows(index)]
    return {file: files.count(file) for file in files}


def test_every_window_of_every_file_is_indexed_once_and_unchanged_files_are_left_alone(update, index, embedders):
    status, out, _ = update()
    assert status == 0 and "files: 3 new; windows embedded: 7" in out
    assert counts(index) == {"halves.mp4": 4, "it's 红.mp4": 1, "below/grey.mp4": 2}
    before = rows(index)
    status, out, _ = update()
    assert status == 0 and "files: 3 unchanged; windows embedded: 0" in out
    assert [embedder.embedded for embedder in embedders] == [7, 0] and rows(index) == before


def test_changed_files_are_embedded_anew_deleted_ones_dropped_and_touched_ones_not_embedded(
    update, folder, index, embedders
):
    update()
    (folder / "halves.mp4").write_bytes(colour_video(("green", 3)))
    (folder / "below" / "grey.mp4").unlink()
    os.utime(folder / "it's 红.mp4", (1, 1))
    status, out, _ = update()
    assert status == 0 and "1 changed, 1 touched, 1 deleted; windows embedded: 3" in out
    assert counts(index) == {"halves.mp4": 3, "it's 红.mp4": 1} and embedders[-1].embedded == 3
    assert "2 unchanged" in update()[1]  # the touched file's time was noted


def test_a_file_that_cannot_be_decoded_is_named_recorded_and_tried_again_when_it_changes(update, folder, index):
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "empty.mkv").write_bytes(b"")
    for _ in range(2):
        status, _, err = update()
        assert status == 2 and "2 files cannot be decoded" in err
    assert len(rows(index)) == 7
    (folder / "bad.mp4").write_bytes(colour_video(("red", 1)))
    (folder / "empty.mkv").unlink()
    assert update()[0] == 0 and len(rows(index)) == 8


def test_a_failed_file_is_opened_again_only_by_retry(update, folder):
    (folder / "bad.mp4").write_bytes(b"no video")
    opened = ["bad.mp4: the media cannot be decoded" in update(*more)[2] for more in ((), (), ("--retry",))]
    assert opened == [True, False, True]


def test_a_file_that_breaks_after_it_was_indexed_has_no_rows_left(update, folder, index):
    update()
    (folder / "halves.mp4").write_bytes(b"overwritten")
    assert update()[0] == 2 and "halves.mp4" not in counts(index)


def test_a_folder_that_has_lost_all_its_media_empties_no_index(update, folder, index):
    update()
    for file in folder.rglob("*.mp4"):
        file.unlink()
    status, _, err = update()
    assert status == 2 and "holds no video and no image" in err and len(rows(index)) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other"}, "was made by the model"),
        ({"more": ["--window=2"]}, "was made with --window=1 --stride=1"),
        ({"folder": "elsewhere"}, "give --moved if it is the same folder"),
    ],
)
def test_an_index_is_extended_only_by_the_model_cut_and_folder_that_made_it(update, tmp_path, index, changes, message):
    update()
    before = rows(index)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "new.mp4").write_bytes(colour_video(("red", 1)))
    source = tmp_path / changes.get("folder", "media")
    status, _, err = update(*changes.get("more", []), folder=source, model=changes.get("model", "colours"))
    assert status == 2 and message in err and err.count("\n") == 1 and rows(index) == before


def test_a_folder_that_was_moved_keeps_its_index(update, folder, tmp_path, index, embedders):
    update()
    folder.rename(tmp_path / "moved")
    assert update("--moved", folder=tmp_path / "moved")[0] == 0
    assert embedders[-1].embedded == 0 and open_index(index).info.folder == str(tmp_path / "moved")


def test_two_processes_do_not_write_to_one_index(update, index):
    update()
    with exclusive_lock(index / "index.lock", "taken"):
        status, _, err = update()
    assert status == 2 and err.startswith("error: another process is writing to the index") and err.count("\n") == 1


def test_a_directory_of_other_things_is_not_made_an_index(update, folder):
    status, _, err = update(index=folder)
    assert status == 2 and "holds other things than an index" in err and not (folder / "windows.lance").exists()


def test_worker_processes_index_what_one_process_does(update, folder, tmp_path):
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "long.mp4").write_bytes(colour_video(("red", 10), ("green", 10)))  # more windows than a task holds
    update(index=tmp_path / "one")
    assert update("--workers=1", "--batch=3", index=tmp_path / "two")[0] == 2
    assert rows(tmp_path / "one") == rows(tmp_path / "two") and counts(tmp_path / "two")["long.mp4"] == 20


def test_the_bar_fills_while_a_long_file_is_read(update, folder, monkeypatch):
    (folder / "long.mp4").write_bytes(colour_video(("red", 20)))
    shares, totals = [], []

    class Watched(indexing.tqdm):
        def __init__(self, **options):
            totals.append(options["total"])
            super().__init__(**options)

        def update(self, share):
            shares.append(share)
            super().update(share)

    monkeypatch.setattr(indexing, "tqdm", Watched)
    assert update()[0] == 0
    assert sum(shares) == pytest.approx(4) and len(shares) == 3 + 3  # 20 windows are three tasks of eight
    assert update()[0] == 0 and totals == [4, 0]


def run(folder, index, killed):
    environment = {**os.environ, "INDEX_KILLED": killed}
    program = [sys.executable, PROGRAM, *command(folder, index)]
    return subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True)


def test_after_kills_at_any_moment_the_next_run_goes_on_without_a_loss_or_a_duplicate(
    update, folder, index, tmp_path, embedders
):
    for number in range(12):
        (folder / f"{number}.mp4").write_bytes(colour_video(("red", 1), ("green", number % 3)))
    with run(folder, index, "from outside") as process:
        for _ in range(3):
            assert process.stdout.readline() == "written\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    written = rows(index)
    assert 0 < len(counts(index)) < 15
    (folder / "0.mp4").write_bytes(colour_video(("blue", 2)))  # was written, and is to be written anew
    with run(folder, index, "between delete and add") as process:
        process.wait(60)
    assert process.returncode == -signal.SIGKILL and "0.mp4" not in counts(index)
    assert update()[0] == 0 and update(index=tmp_path / "whole")[0] == 0
    assert rows(index) == rows(tmp_path / "whole") and set(written) - set(rows(tmp_path / "whole"))
    assert embedders[0].embedded < embedders[1].embedded  # it went on


def test_embeddings_that_are_not_finite_are_not_written(update, index, monkeypatch):
    monkeypatch.setattr(ColourEmbedder, "embed_videos", lambda self, videos: np.full((len(videos), 4), np.nan))
    status, _, err = update()
    assert status == 3 and "not finite" in err and not len(open_index(index))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "index.json cannot be read"),
        ("7", "index.json cannot be read"),
        (json.dumps({"format": 99}), "is of another version (format 99"),
    ],
)
def test_a_damaged_index_is_one_line(update, index, content, message):
    update()
    (index / "index.json").write_text(content)
    status, _, err = update()
    assert status == 2 and message in err and err.count("\n") == 1


def test_a_file_whose_name_is_not_utf8_is_left_out_and_named(update, folder, index):
    with open(os.fsencode(folder) + b"/caf\xe9.mp4", "wb") as file:
        file.write(colour_video(("red", 1)))
    status, _, err = update()
    assert status == 2 and "its name is not UTF-8; rename it" in err and len(rows(index)) == 7
