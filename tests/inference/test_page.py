"""The local page: what is served and what never is, over HTTP as any client speaks it; and in a browser."""

import contextlib
import http.client
import io
import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import av
import numpy as np
import pytest
import uvicorn
from inference.colours import COLOURS, ColourEmbedder, colour_video, open_colours
from numbered_video import encode, encode_image, numbered_video, read_number
from PIL import Image

from vlab_jax import predict
from vlab_jax.data import video
from vlab_jax.errors import InputError
from vlab_jax.inference import cli
from vlab_jax.inference.web import playable, service
from vlab_jax.inference.web.app import make_app
from vlab_jax.inference.web.playable import Playable
from vlab_jax.inference.web.service import Service

PROGRAM = pathlib.Path(__file__).with_name("colours.py")
ODD_NAME = "<img src=x onerror=alert(1)> \"'&红.mp4"


class Site:
    """A server of an index, and what a client does with it."""

    def __init__(self, home: pathlib.Path, port: int) -> None:
        self.home, self.port = home, port

    def ask(self, method, url, body=None, headers=None):
        """Status, headers and body; the URL is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, url, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def post(self, url, fields, **headers):
        body = json.dumps(fields).encode()
        status, _, found = self.ask("POST", url, body, {"content-type": "application/json", **headers})
        return status, json.loads(found)

    def hits(self, text):
        status, found = self.post("/search", {"text": text})
        assert status == 200, found
        return found["hits"]

    def upload(self, name, data):
        url = f"/upload?name={urllib.parse.quote(name)}"
        status, _, found = self.ask("POST", url, data, {"content-type": "application/octet-stream"})
        return status, json.loads(found)


@contextlib.contextmanager
def running(home, scratch):
    """A server of `home`'s index on a free port."""
    scratch.mkdir()
    app = make_app(Service(home / "index", ColourEmbedder(), scratch), ("127.0.0.1",))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield Site(home, listener.getsockname()[1])
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Videos that browsers play and some that they do not, images, a secret beside them, and the index."""
    home = tmp_path_factory.mktemp("page")
    media = home / "media"
    (media / "below").mkdir(parents=True)
    (media / ODD_NAME).write_bytes(colour_video(("blue", 4), ("red", 4)))
    frames = [np.full((32, 32, 3), COLOURS["green"], np.uint8)] * 40
    (media / "below" / "green.avi").write_bytes(encode(frames, "avi", "mpeg4", rate=10))
    (media / "grey.png").write_bytes(encode_image(np.full((32, 32, 3), 128, np.uint8), "PNG"))
    (home / "secret.mp4").write_bytes(b"secret")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "open_model", open_colours)
        given = ["index", str(media), f"--index={home / 'index'}", "--model=colours"]
        assert predict.main([*given, "--window=4", "--workers=0"]) == 0
    (media / "unindexed.mp4").write_bytes(b"secret")
    (media / "notes.txt").write_bytes(b"secret")
    return home


@pytest.fixture(scope="module")
def site(home, tmp_path_factory):
    with running(home, tmp_path_factory.mktemp("scratch") / "all") as site:
        yield site


def test_hits_have_score_file_and_span_and_come_with_what_plays_them(site):
    best = site.hits("red")[0]
    assert (best["file"], best["start"], best["end"], best["span"]) == (ODD_NAME, 4, 8, "0:04.0-0:08.0")
    assert best["score"] > 0.99 and best["kind"] == "video" and (best["play_from"], best["play_to"]) == (4, 8)
    status, headers, body = site.ask("GET", f"/{best['url']}")
    assert (status, headers["content-type"]) == (200, "video/mp4")
    assert body == (site.home / "media" / ODD_NAME).read_bytes()


def test_a_part_of_a_file_is_served_where_a_part_is_asked_for(site):
    url, whole = f"/{site.hits('red')[0]['url']}", (site.home / "media" / ODD_NAME).read_bytes()
    status, headers, body = site.ask("GET", url, headers={"range": "bytes=100-199"})
    assert (status, body) == (206, whole[100:200])
    assert headers["content-range"] == f"bytes 100-199/{len(whole)}" and headers["accept-ranges"] == "bytes"
    assert site.ask("GET", url, headers={"range": "bytes=-50"})[2] == whole[-50:]
    assert site.ask("GET", url, headers={"range": f"bytes={len(whole)}-"})[0] == 416
    assert site.ask("HEAD", url)[2] == b""


def test_what_browsers_cannot_play_becomes_a_clip_of_the_moment(site):
    best = site.hits("green")[0]
    assert best["file"] == "below/green.avi" and best["kind"] == "video" and best["play_from"] == 0
    status, headers, body = site.ask("GET", f"/{best['url']}", headers={"range": "bytes=0-"})
    assert (status, headers["content-type"]) == (206, "video/mp4")
    with av.open(io.BytesIO(body)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert video.probe(body).duration == pytest.approx(best["end"] - best["start"], abs=0.1)
    frame = video.decode_clip(body, num_frames=1, size=8)[0].mean(axis=(0, 1))
    assert np.abs(frame - COLOURS["green"]).max() < 25


@pytest.mark.parametrize("name", ["mkv", "ts", "mpg", "avi-h264", "gif", "webm-vp9", "mp4"])
def test_a_clip_that_is_made_begins_with_the_frame_of_its_start_and_ends_before_its_end(tmp_path, name):
    playable.write_clip(tmp_path / "clip.mp4", numbered_video(name), 1.0, 3.0)
    shown = video.decode_clip((tmp_path / "clip.mp4").read_bytes(), num_frames=30, size=64)
    numbers = [read_number(frame) for frame in shown]
    # Two seconds of 25 frames, of which 15 a second are shown; the decoder's own tests say how exact its times are.
    assert abs(numbers[0] - 25) <= 2 and abs(numbers[-1] - 74) <= 3 and numbers == sorted(numbers)


def test_a_clip_that_is_made_is_bounded_in_length_and_size(tmp_path):
    frames = [np.full((600, 1600, 3), 99, np.uint8)] * 20
    playable.write_clip(tmp_path / "clip.mp4", encode(frames, rate=10), 0.0, float("inf"))
    found = video.probe((tmp_path / "clip.mp4").read_bytes())
    assert (found.width, found.height) == (640, 240) and found.duration == pytest.approx(2.0, abs=0.1)
    long = encode([np.full((32, 32, 3), 99, np.uint8)] * 100, rate=1)
    playable.write_clip(tmp_path / "clip.mp4", long, 10.0, float("inf"))
    assert video.probe((tmp_path / "clip.mp4").read_bytes()).duration == pytest.approx(playable.MOST_SECONDS, abs=0.1)


@pytest.mark.parametrize(
    ("name", "made"),
    [("mp4", False), ("webm-vp8", False), ("webm-vp9", False), ("mkv", True), ("avi-h264", True), ("gif", True)],
)
def test_files_are_judged_by_what_is_in_them(tmp_path, name, made):
    container = name.partition("-")[0]
    path = tmp_path / f"clip.{container}"
    path.write_bytes(numbered_video(name))
    assert Playable(tmp_path).how(path).made is made


def test_an_mp4_of_a_codec_that_browsers_lack_is_made_playable(tmp_path):
    frames = [np.full((32, 32, 3), 99, np.uint8)] * 10
    (tmp_path / "old.mp4").write_bytes(encode(frames, "mp4", "mpeg4"))
    (tmp_path / "deep.mp4").write_bytes(encode(frames, "mp4", "libx264", "yuv444p"))
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    shown = Playable(tmp_path)
    assert all(shown.how(tmp_path / name).made for name in ("old.mp4", "deep.mp4"))
    with pytest.raises(InputError, match=r"^bad.mp4: the media cannot be decoded"):
        shown.file(tmp_path / "bad.mp4", 0.0, 1.0)


def test_an_image_of_a_kind_that_browsers_lack_becomes_a_jpeg(tmp_path):
    (tmp_path / "made").mkdir()
    Image.new("RGB", (2000, 1000), (220, 30, 30)).save(tmp_path / "scan.tif")
    path, kind = Playable(tmp_path / "made").file(tmp_path / "scan.tif", 0.0, float("inf"))
    with Image.open(path) as image:
        assert (kind, image.format, image.size) == ("image/jpeg", "JPEG", (1280, 640))


def test_clips_are_made_once_and_the_cache_stays_below_its_bound(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "clip.mkv").write_bytes(numbered_video("mkv"))
    shown = Playable(tmp_path / "made", most=100_000)
    first, _ = shown.file(tmp_path / "clip.mkv", 0.0, 1.0)
    assert shown.file(tmp_path / "clip.mkv", 0.0, 1.0)[0] == first
    shown._most = 2 * first.stat().st_size
    for start in (1.0, 2.0, 3.0):
        last, _ = shown.file(tmp_path / "clip.mkv", start, start + 1)
        assert last.is_file() and sum(file.stat().st_size for file in (tmp_path / "made").iterdir()) <= shown._most
    assert not first.exists() and shown.file(tmp_path / "clip.mkv", 0.0, 1.0)[0].is_file()


UNKNOWN = [
    "../secret.mp4",
    "below/../../secret.mp4",
    "%2e%2e/secret.mp4",
    "..\\secret.mp4",
    "unindexed.mp4",
    "notes.txt",
    "below",
    ".",
    "",
    "/etc/passwd",
    "file:///etc/passwd",
    "grey.png\0.mp4",
    "grey.png/",
    "x' OR '1'='1.mp4",
]


@pytest.mark.parametrize("file", UNKNOWN)
def test_no_file_is_served_that_the_index_does_not_know(site, file):
    for name in (file, str(site.home / "media" / file)):
        status, _, body = site.ask("GET", f"/media?file={urllib.parse.quote(name)}")
        assert status == 404 and b"secret" not in body and json.loads(body)["error"] == "the index knows no such file"
    status, found = site.post("/caption", {"file": file})
    assert (status, found) == (400, {"error": "the index knows no such file"})


@pytest.mark.parametrize("path", ["/../app.py", "/%2e%2e/app.py", "/app.py", "//etc/passwd", "/media/../../etc/passwd"])
def test_no_path_of_a_url_is_a_path_of_the_disk(site, path):
    status, _, body = site.ask("GET", path)
    assert status == 404 and len(body) < 100 and "error" in json.loads(body)


def test_an_index_that_names_files_outside_its_folder_opens_none_of_them(home, tmp_path):
    """An index may come from somebody else."""
    from vlab_jax.inference.search_index import File, Indexed, open_index
    from vlab_jax.inference.windows import Window

    shutil.copytree(home / "index", tmp_path / "index")
    index = open_index(tmp_path / "index")
    index._table.delete("true")
    outside = ["../secret.mp4", str(home / "secret.mp4")]
    vectors = ColourEmbedder().embed_texts(["red"])
    index.put([Indexed(File(name, 1, 1), [Window(0, 1)], vectors) for name in outside], {})
    with running(tmp_path, tmp_path / "scratch") as site:
        assert {index.holds(name) for name in outside} == {True}
        for name in outside:
            status, _, body = site.ask("GET", f"/media?file={urllib.parse.quote(name)}")
            assert status == 404 and b"secret" not in body


def test_requests_of_other_sites_are_refused(site):
    assert site.ask("GET", "/about")[0] == 200
    assert site.ask("GET", "/about", headers={"host": "evil.example"})[0] == 400  # a name that was pointed here
    for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert site.post("/search", {"text": "red"}, **headers)[0] == 403
        assert site.ask("GET", f"/media?file={urllib.parse.quote(ODD_NAME)}", headers=headers)[0] == 403
    plain = site.ask("POST", "/search", b'{"text": "red"}', {"content-type": "text/plain"})
    assert plain[0] == 415 and site.post("/search", {"text": "red"}, origin=f"http://127.0.0.1:{site.port}")[0] == 200


def test_the_page_may_load_nothing_from_elsewhere_and_names_nothing_that_is(site):
    for url, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        status, headers, body = site.ask("GET", url)
        assert status == 200 and headers["content-type"].startswith(kind) and b"//" not in body.replace(b"// ", b"")
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"


def test_a_clip_is_described_and_asked_about(site):
    red, green = site.hits("red")[0], site.hits("green")[0]
    for hit, colour in ((red, "red"), (green, "green")):
        place = {key: hit[key] for key in ("file", "start", "end")}
        assert site.post("/caption", place)[1]["text"] == f"all is {colour}"
        assert site.post("/answer", {**place, "question": "which colour?"})[1]["text"] == colour


def test_an_upload_is_shown_and_described_and_the_oldest_is_dropped(site, monkeypatch):
    status, kept = site.upload("红 clip.avi", (site.home / "media" / "below" / "green.avi").read_bytes())
    assert status == 200 and kept["file"] == "红 clip.avi" and kept["kind"] == "video"
    assert site.post("/caption", {"upload": kept["upload"]})[1]["text"] == "all is green"
    assert site.ask("GET", f"/{kept['url']}")[1]["content-type"] == "video/mp4"
    monkeypatch.setattr(service, "UPLOADS", 1)
    site.upload("other.mp4", b"no video")
    status, found = site.post("/caption", {"upload": kept["upload"]})
    assert status == 400 and "upload it again" in found["error"]


def test_an_upload_that_is_no_video_or_too_large_is_one_line_without_a_path(site, monkeypatch):
    kept = site.upload("bad.mp4", b"no video")[1]
    status, found = site.post("/caption", {"upload": kept["upload"]})
    assert status == 400 and found["error"].startswith("bad.mp4: the media cannot be decoded")
    status, found = site.upload("../../notes.txt", b"x")
    assert status == 400 and "no video and no image" in found["error"]
    monkeypatch.setattr("vlab_jax.inference.web.app.MOST_UPLOADED", 1000)
    assert site.upload("large.mp4", b"x" * 2000)[0] == 413


@pytest.mark.parametrize(
    ("url", "fields", "message"),
    [
        ("/search", {"text": "  "}, "write what to look for"),
        ("/search", {}, "write what to look for"),
        ("/search", {"text": "x" * 2000}, "at most 1000 letters"),
        ("/search", {"text": "red", "top": 10**6}, "from 1 to 50"),
        ("/answer", {"file": ODD_NAME, "question": ""}, "write a question"),
        ("/answer", {"file": ODD_NAME, "question": "?", "start": 9, "end": 3}, "is empty or begins before 0"),
        ("/answer", {"file": ODD_NAME, "question": "?", "start": "soon"}, "start is no number"),
        ("/caption", {"file": ODD_NAME, "start": 100}, "lies outside the media"),
        ("/caption", ["red"], "no JSON object"),
    ],
)
def test_a_mistake_is_one_line(site, url, fields, message):
    status, found = site.post(url, fields)
    assert status == 400 and message in found["error"] and "\n" not in found["error"]
    assert str(site.home) not in found["error"]


def test_a_query_in_a_script_that_the_model_never_learned_is_answered_with_a_note(site):
    assert site.post("/search", {"text": "红色"})[1]["note"] == ""  # in the model's vocabulary
    status, found = site.post("/search", {"text": "蓝天"})
    assert status == 200 and found["hits"] and "has learned no words with 蓝, 天" in found["note"]


def test_what_is_indexed_while_the_page_is_open_is_found_and_another_model_is_named(home, tmp_path, monkeypatch):
    shutil.copytree(home / "index", tmp_path / "index")
    shutil.copytree(home / "media", tmp_path / "media", ignore=shutil.ignore_patterns("un*"))
    monkeypatch.setattr(cli, "open_model", open_colours)
    with running(tmp_path, tmp_path / "scratch") as site:
        (tmp_path / "media" / "new.mp4").write_bytes(colour_video(("blue", 4)))
        (tmp_path / "media" / "grey.png").unlink()
        given = ["index", str(tmp_path / "media"), f"--index={tmp_path / 'index'}", "--model=colours", "--moved"]
        assert predict.main([*given, "--workers=0"]) == 0
        assert "new.mp4" in {hit["file"] for hit in site.hits("blue")}
        assert "grey.png" not in {hit["file"] for hit in site.hits("blue")}
        (tmp_path / "media" / "new.mp4").unlink()
        gone = next(hit for hit in site.hits("blue") if hit["file"] == "new.mp4")
        assert gone["kind"] == "none" and "No such file" in gone["error"]
        about = json.loads((tmp_path / "index" / "index.json").read_text())
        (tmp_path / "index" / "index.json").write_text(json.dumps({**about, "fingerprint": "other"}))
        status, found = site.post("/search", {"text": "red"})
        assert status == 400 and "was made by the model" in found["error"]


def serve(*arguments):
    return predict.main(["serve", *arguments])


def test_mistakes_on_the_command_line_are_one_line(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "open_model", open_colours)
    index = f"--index={home / 'index'}"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        mistakes = [
            ([f"--index={tmp_path / 'none'}"], "there is no index in"),
            ([index, f"--port={port}"], f"port {port} of 127.0.0.1 cannot be had (address already in use)"),
            ([index, "--port=99999"], "--port=99999 is no port"),
            ([index, "--host=nowhere.invalid"], "--host=nowhere.invalid is no address"),
            ([index, "--port=0", "--model=other"], "was made by the model"),
        ]
        for arguments, message in mistakes:
            assert serve(*arguments) == 2
            error = capsys.readouterr().err
            assert message in error and error.startswith("error: ") and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert serve(index) == 2
    assert 'pip install -e ".[page]"' in capsys.readouterr().err


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_who_lets_others_reach_the_page_is_warned(home, host, warned, monkeypatch, capsys):
    def interrupted(self, sockets):
        assert sockets[0].getsockname()[0] == host
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "open_model", open_colours)
    monkeypatch.setattr(uvicorn.Server, "run", interrupted)
    given = () if host == "127.0.0.1" else (f"--host={host}",)
    assert serve(f"--index={home / 'index'}", "--model=colours", "--port=0", *given) == 0
    out, error = capsys.readouterr()
    assert f"http://{host}:" in out and ("warning: whoever reaches" in error) is warned


def test_the_command_serves_until_it_is_interrupted(home):
    command = [sys.executable, PROGRAM, "serve", f"--index={home / 'index'}", "--model=colours", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        site = Site(home, int(line.rpartition(":")[2].split("/")[0]))
        assert site.hits("red")[0]["file"] == ODD_NAME
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (0, "ended\n")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    """Chromium, without a window."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright to drive a browser with")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, site, **options):
    """The page in a browser; nothing may be asked of another server, and nothing may go wrong on the page."""
    context = browser.new_context(**options)
    page = context.new_page()
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.goto(f"http://127.0.0.1:{site.port}/")
    yield page
    context.close()
    assert not wrong
    assert {urllib.parse.urlsplit(url).netloc for url in asked if not url.startswith("data:")} == {
        f"127.0.0.1:{site.port}"
    }


def test_in_a_browser_a_hit_stands_at_its_start_and_a_question_is_answered(browser, site):
    with opened(browser, site, reduced_motion="reduce") as page:  # nothing plays by itself
        page.fill("#text", "red")
        page.press("#text", "Enter")
        page.wait_for_selector("#hits li")
        first = page.locator("#hits li").first
        assert ODD_NAME in first.inner_text() and "0:04.0-0:08.0" in first.inner_text()
        assert page.locator("#hits li img[src=x]").count() == 0  # the name is text
        ready = "() => { const v = document.querySelector('#hits video'); return v.readyState >= 2 && !v.seeking }"
        page.wait_for_function(ready)
        assert first.locator("video").evaluate("v => v.currentTime") == 4
        drawn = first.locator("video").evaluate(
            "v => { const c = document.createElement('canvas').getContext('2d'); c.drawImage(v, 0, 0, 8, 8);"
            " return [...c.getImageData(4, 4, 1, 1).data] }"
        )
        assert drawn[0] > 150 > 100 > max(drawn[1:3])  # what is red
        first.locator("button").click()
        page.wait_for_function("() => document.querySelector('#caption').textContent === 'all is red'")
        page.fill("#question", "which colour?")
        page.press("#question", "Enter")
        page.wait_for_selector("#answers dd")
        assert page.inner_text("#answers dd") == "red" and page.inner_text("#answers dt") == "which colour?"
        page.fill("#question", " ")
        page.press("#question", "Enter")
        page.wait_for_function("() => document.querySelector('#message').textContent === 'write a question'")


def test_in_a_browser_clips_play_between_their_start_and_end_and_an_upload_is_described(browser, site):
    with opened(browser, site) as page:
        page.fill("#text", "blue")
        page.click("#search button")
        first = "const v = document.querySelector('#hits video');"
        page.wait_for_function(f"() => {{ {first} return v && v.currentTime > 0.2 }}")
        later = "v.currentTime = 3.9; return new Promise(done => setTimeout(() => done(v.currentTime), 900))"
        assert page.evaluate(f"() => {{ {first} {later} }}") < 3.9  # the clip began again
        others = "() => [...document.querySelectorAll('#hits video')].every(v => v.readyState >= 2)"
        page.wait_for_function(others)  # of the AVI file, too
        page.set_input_files("#file", site.home / "media" / "below" / "green.avi")
        page.wait_for_function("() => document.querySelector('#caption').textContent === 'all is green'")
        page.wait_for_function("() => document.querySelector('#shown video').readyState >= 2")
