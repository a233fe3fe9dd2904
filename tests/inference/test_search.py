"""Searching an index finds the right moment of the right file, for texts and clips, and shows it in every form."""

import base64
import html.parser
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import urllib.parse

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inference.colours import ColourEmbedder, colour_video, open_colours
from PIL import Image

from vlab_jax import predict
from vlab_jax.inference import cli, search_index
from vlab_jax.inference.clips import Window
from vlab_jax.inference.search_index import (
    EmbeddedFile,
    Hit,
    IndexInfo,
    MediaFile,
    SearchIndex,
    open_index,
    timestamp,
    without_overlaps,
    writable_index,
)

PROGRAM = pathlib.Path(__file__).with_name("colours.py")
ODD_NAME = '<b>&"\'红".mp4'


@pytest.fixture(scope="module")
def indexed(tmp_path_factory) -> pathlib.Path:
    """A folder `media` with halves of two colours, and its index beside it, of windows that overlap."""
    home = tmp_path_factory.mktemp("search")
    (home / "media").mkdir()
    (home / "media" / ODD_NAME).write_bytes(colour_video(("blue", 4), ("red", 4)))
    (home / "media" / "green.mp4").write_bytes(colour_video(("green", 4)))
    arguments = ["index", str(home / "media"), f"--index={home / 'index'}", "--model=colours"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "open_model", open_colours)
        assert predict.main([*arguments, "--window=2", "--stride=1", "--workers=0"]) == 0
    return home


@pytest.fixture
def search(indexed, monkeypatch, capsys):
    """Runs `search` and returns its exit status, its output and its errors."""
    monkeypatch.setattr(cli, "open_model", open_colours)

    def run(*arguments, index=indexed / "index"):
        status = predict.main(["search", *arguments, f"--index={index}"])
        return status, *capsys.readouterr()

    return run


def test_the_half_of_a_video_that_shows_the_query_comes_first_and_its_neighbours_do_not_crowd_it(search):
    status, out, _ = search("red", "--json", "--top=3")
    best, *others = json.loads(out)
    assert status == 0 and best["file"] == ODD_NAME and 4 <= best["start"] < best["end"] <= 8
    assert best["score"] > 0.99 and pathlib.Path(best["path"]).is_file()
    spans = [(hit["start"], hit["end"]) for hit in [best, *others] if hit["file"] == ODD_NAME]
    assert len(spans) >= 2 and all(a[1] <= b[0] or b[1] <= a[0] for a in spans for b in spans if a != b)
    (best, *_) = json.loads(search("blue", "--json")[1])
    assert best["file"] == ODD_NAME and 0 <= best["start"] < best["end"] <= 4


def test_a_query_in_chinese_finds_what_it_names(search):
    assert json.loads(search("红色", "--json")[1])[0]["score"] == json.loads(search("red", "--json")[1])[0]["score"]


def test_a_clip_finds_what_looks_like_it(search, tmp_path):
    (tmp_path / "example.mp4").write_bytes(colour_video(("green", 2)))
    status, out, _ = search(f"--clip={tmp_path / 'example.mp4'}", "--top=1")
    assert status == 0 and out.split()[0] == "1" and out.split()[2] == "green.mp4" and "-0:0" in out.split()[3]


class Page(html.parser.HTMLParser):
    """The tags, links, images and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.images, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name == "href"]
        self.images += [value for name, value in attrs if name == "src"]

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_its_frames_and_nothing_in_a_query_or_a_name_becomes_html(search, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules[ColourEmbedder.__module__].NAMES, "<script>alert(1)</script>", (220, 30, 30))
    status, _, err = search("<script>alert(1)</script>", "--top=2", f"--html={tmp_path / 'page.html'}")
    assert status == 0 and "page.html" in err
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and "b" not in page.tags
    assert "<script>alert(1)</script>" in page.text and ODD_NAME in page.text
    link = urllib.parse.urlsplit(page.links[0])
    assert pathlib.Path(urllib.parse.unquote(link.path)).name == ODD_NAME and link.fragment.startswith("t=")
    assert pathlib.Path(urllib.parse.unquote(link.path)).is_file()
    kind, data = page.images[0].split(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    red, green, blue = np.asarray(image).mean(axis=(0, 1))
    assert kind == "data:image/jpeg;base64" and image.format == "JPEG" and red > 180 > 80 > max(green, blue)


def test_a_hit_whose_file_is_gone_is_shown_without_frames(indexed, search, tmp_path):
    shutil.copytree(indexed / "index", tmp_path / "index")
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps({**about, "folder": str(tmp_path)}))
    status, *_ = search("red", f"--html={tmp_path / 'page.html'}", index=tmp_path / "index")
    page = Page((tmp_path / "page.html").read_text())
    assert status == 0 and not page.images and "no frames: No such file" in page.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to look for"),
        (["red", "--clip=x.mp4"], "say what to look for"),
        ([" "], "the text to look for is empty"),
        (["red", "--top=0"], "--top=0 must be at least 1"),
        (["--clip=nowhere.mp4"], "there is no file nowhere.mp4"),
        (["red", "--model=other"], "was made by the model"),
        (["red", "--html=/nowhere/page.html"], "--html=/nowhere/page.html cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(search, arguments, message):
    status, _, err = search(*arguments)
    assert status == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_clip_that_cannot_be_decoded_is_one_line(search, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    status, _, err = search(f"--clip={tmp_path / 'bad.mp4'}")
    assert status == 2 and "bad.mp4: the media cannot be decoded" in err and err.count("\n") == 1


def test_no_index_is_one_line_and_none_is_made(search, tmp_path):
    status, _, err = search("red", index=tmp_path / "none")
    assert status == 2 and "there is no index in" in err and not (tmp_path / "none").exists()


def test_an_index_that_cannot_be_written_to_is_searched_and_not_extended(indexed, tmp_path):
    """Root may write everywhere, so it gives that right up."""
    home = shutil.copytree(indexed, tmp_path / "copy")
    drop = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []
    if drop and not shutil.which("setpriv"):
        pytest.skip("root, without setpriv to give rights up")
    try:
        for path in [*home.rglob("*"), home]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        commands = (
            ["search", "green", f"--index={home / 'index'}"],
            ["index", str(indexed / "media"), f"--index={home / 'index'}", "--model=colours"],
        )
        both = [*drop, sys.executable, PROGRAM, *commands[0], "then", *commands[1]]
        done = subprocess.run(both, capture_output=True, text=True, timeout=60)
    finally:
        for path in [home, *home.rglob("*")]:
            path.chmod(0o755)
    assert done.stdout.split()[2] == "green.mp4", done.stderr
    assert done.returncode == 2 and done.stderr.startswith("error: the index in "), done.stderr
    assert "cannot be written to" in done.stderr and done.stderr.count("\n") == 1


def filled(directory: pathlib.Path, vectors: np.ndarray) -> SearchIndex:
    """An index of these vectors, ten windows a file, tidied."""
    info = IndexInfo("model", "fingerprint", str(directory), 2, 8, vectors.shape[1], 1.0, 1.0)
    with writable_index(directory / "index", info) as index:
        files = [
            EmbeddedFile(MediaFile(f"{number}.mp4", 1, 1, ""), [Window(i, i + 1) for i in range(10)], list(rows))
            for number, rows in enumerate(vectors.reshape(-1, 10, vectors.shape[1]))
        ]
        index.add(files)
        index.optimize()
    return open_index(directory / "index")


def test_partitioned_vectors_are_found_as_comparing_all_finds_them(tmp_path, monkeypatch):
    monkeypatch.setattr(search_index, "ROWS_TO_PARTITION", 1000)
    monkeypatch.setattr(search_index, "ROWS_PER_PARTITION", 50)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2000, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = filled(tmp_path, vectors)
    assert index.info.partitioned == 2000 and len(index) == 2000
    found = 0
    for query in vectors[::40]:
        scores = vectors @ query
        best = {(f"{i // 10}.mp4", float(i % 10)) for i in np.argsort(-scores)[:10]}
        hits = index.nearest(query, 10)
        found += len(best & {(hit.file, hit.start) for hit in hits})
        assert hits[0].score == pytest.approx(1.0, abs=1e-5)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert found / 500 > 0.9 and "ANNIvfPartition" in index._query(vectors[0], 10).explain_plan()


def test_more_is_fetched_until_enough_hits_are_apart(tmp_path):
    """A file whose windows all overlap fills the first places, and leaves room for others."""
    vectors = np.tile(np.float32([1, 0]), (60, 1))
    vectors[40:] = np.float32([0.6, 0.8])
    info = IndexInfo("model", "fingerprint", str(tmp_path), 2, 8, 2, 10.0, 0.1)
    with writable_index(tmp_path / "index", info) as index:
        windows = [Window(i / 10, i / 10 + 10) for i in range(40)]
        index.add([EmbeddedFile(MediaFile("one.mp4", 1, 1), windows, list(vectors[:40]))])
        index.add([EmbeddedFile(MediaFile(f"{i}.mp4", 1, 1), [Window(0, 10)], [vectors[40 + i]]) for i in range(20)])
    hits = open_index(tmp_path / "index").search(np.float32([1, 0]), 5)
    assert len(hits) == 5 and hits[0].file == "one.mp4" and len({hit.file for hit in hits}) == 5


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 20), st.integers(1, 10)), max_size=30))
def test_of_overlapping_hits_the_best_stays_and_each_dropped_hit_overlaps_a_better_one(found):
    hits = [Hit(file, float(start), float(start + length), 0.0) for file, start, length in found]
    kept = without_overlaps(hits)

    def overlap(one, other):
        return one.file == other.file and one.start < other.end and other.start < one.end

    assert not any(overlap(hit, other) for number, hit in enumerate(kept) for other in kept[:number])
    assert all(any(overlap(hit, other) for other in kept) for hit in hits)
    assert kept[:1] == hits[:1]


def test_times_are_written_as_a_clock_shows_them():
    assert [timestamp(s) for s in (0.0, 7.46, 59.96, 723.0, 3723.04)] == [
        "0:00.0",
        "0:07.5",
        "1:00.0",
        "12:03.0",
        "1:02:03.0",
    ]
