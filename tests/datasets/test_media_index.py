"""Media found by name below a user's folders, whatever they are sharded into; names lead nowhere else."""

import os
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlab_jax.datasets.media_index import MediaIndex, checked_name, without_extension
from vlab_jax.errors import InputError


def write(folder: pathlib.Path, *names: str) -> pathlib.Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def found(index: MediaIndex, *names: str) -> str | None:
    """Where the media is, from the folder."""
    media_index = index.find(*names)
    return media_index and os.path.relpath(media_index.path, index.folders[0])


@pytest.mark.parametrize("name", ["a.mp4", "a.MP4", "a.mov.mp4", "a.gif", "a.jpeg", "x/a.avi", "x/y/z/a.webm", "a."])
def test_media_are_found_flat_or_sharded_and_of_any_extension(name, tmp_path):
    index = MediaIndex([write(tmp_path, name, "b.mp4", "a.txt", "a.json", "aa.mp4", ".a.mp4")]).scan()
    assert found(index, "a") == name
    assert index.files == 3
    assert found(index, "c") is None


def test_names_with_folders_stand_at_the_end_of_the_path(tmp_path):
    index = MediaIndex([write(tmp_path, "images/00017/1.jpg", "images/00018/1.jpg", "100018/1.jpg")]).scan()
    assert found(index, "00017/1") == "images/00017/1.jpg"
    assert found(index, "00018/1") == "images/00018/1.jpg"
    assert found(index, "00019/1") is None
    assert found(index, "./images//00018/1") == "images/00018/1.jpg"


def test_of_several_media_of_a_name_the_choice_is_told_and_does_not_hang_on_the_order_of_listing(tmp_path):
    write(tmp_path, "deep/er/a.mp4", "z/a.mp4", "y/a.jpg", "b/c.mp4", "c.mp4", "d.avi", "d.mp4")
    (tmp_path / "a.mp4").touch()
    index = MediaIndex([tmp_path]).scan()
    assert found(index, "a") == "z/a.mp4"  # not the empty one, not the image, not the deeper one
    assert found(index, "c") == "c.mp4"
    assert found(index, "d") == "d.avi"
    assert found(index, "d.mp4") == "d.mp4"
    assert found(index, "missing", "c") == "c.mp4"
    (tmp_path / "z" / "a.mp4").unlink()
    (tmp_path / "deep" / "er" / "a.mp4").unlink()
    (tmp_path / "y" / "a.jpg").unlink()
    assert MediaIndex([tmp_path]).scan().find("a").size == 0


def test_the_first_folder_counts_first(tmp_path):
    write(tmp_path, "one/x/a.mp4", "two/a.mp4", "two/b.mp4")
    index = MediaIndex([tmp_path / "one", tmp_path / "two"]).scan()
    assert index.find("a").path == str(tmp_path / "one" / "x" / "a.mp4")
    assert index.find("b").path == str(tmp_path / "two" / "b.mp4")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "x/../../a", "..\\a", "", ".", ".."])
def test_a_name_that_leads_out_of_the_folder_is_refused(name, tmp_path):
    index = MediaIndex([write(tmp_path / "in", "b.mp4")]).scan()
    write(tmp_path, "a.mp4")
    with pytest.raises(InputError, match="which leads out of the folder; mend them"):
        index.find(name)


@pytest.mark.parametrize("name", ["a\0", "a\nb", "\ud800"])
def test_a_name_that_no_file_can_have_in_a_list_is_refused(name):
    with pytest.raises(InputError, match="characters that no name has; mend them"):
        checked_name(name)


@settings(deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"])))
def test_no_name_is_ever_made_into_a_path_outside(name):
    try:
        made = checked_name(name)
    except InputError:
        return
    assert not os.path.isabs(made) and ".." not in made.split("/")


@settings(deadline=None)
@given(st.text(st.characters(codec="ascii", exclude_characters=".")), st.sampled_from(["mp4", "AVI", "gif", "jpg"]))
def test_only_the_extension_of_media_is_taken_off_a_name(name, extension):
    assert without_extension(f"{name}.x1") == f"{name}.x1"
    if name:
        assert without_extension(f"{name}.{extension}") == without_extension(f"{name}.mov.{extension}") == name


def test_links_of_the_user_are_followed_once_and_never_to_what_holds_the_folder(tmp_path):
    write(tmp_path, "disk/a.mp4", "disk/more/b.mp4", "outside.mp4")
    folder = write(tmp_path / "in", "c.mp4")
    (folder / "videos").symlink_to(tmp_path / "disk")
    (folder / "again").symlink_to(tmp_path / "disk")
    (folder / "up").symlink_to(tmp_path)
    (folder / "root").symlink_to("/")
    (folder / "self").symlink_to(folder)
    (tmp_path / "disk" / "loop").symlink_to(tmp_path / "disk")
    (folder / "one.mp4").symlink_to(tmp_path / "outside.mp4")
    (folder / "gone.mp4").symlink_to(tmp_path / "nothing.mp4")
    os.mkfifo(folder / "pipe.mp4")
    index = MediaIndex([folder]).scan()
    assert index.files == 4
    assert all(index.find(name) for name in ("a", "b", "c", "one"))
    assert not any(index.find(name) for name in ("gone", "pipe", "outside"))


def test_the_fingerprint_changes_with_every_file_and_not_with_the_order(tmp_path):
    folder = write(tmp_path / "in", "a.mp4", "b/c.mp4")

    def fingerprint() -> str:
        return MediaIndex([folder]).scan().fingerprint()

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    write(folder, "notes.txt")
    assert fingerprint() == seen[0]
    write(folder, "d.mp4")
    seen.append(fingerprint())
    os.utime(folder / "a.mp4", ns=(1, 1))
    seen.append(fingerprint())
    (folder / "b" / "c.mp4").rename(folder / "b" / "e.mp4")
    seen.append(fingerprint())
    assert len(set(seen)) == 4


def test_a_directory_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere cannot be listed"):
        MediaIndex([tmp_path / "nowhere"]).scan()


def test_a_name_that_cannot_be_written_down_is_one_line(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.mp4", "wb"):
        pass
    with pytest.raises(InputError, match=r"caf\\udce9\.mp4' is not UTF-8; rename it"):
        MediaIndex([tmp_path]).scan()
