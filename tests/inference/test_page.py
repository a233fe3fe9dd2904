"""The page: what its functions show, what its server sends and never sends, and how it works in a browser."""

import contextlib
import http.client
import io
import json
import pathlib
import re
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
from inference.colours import COLOURS, ColourEmbedder, colour_video, open_colours
from numbered_video import encode, encode_image

from vlab_jax import predict
from vlab_jax.data import video
from vlab_jax.inference import cli

gr = pytest.importorskip("gradio", reason='no Gradio: pip install -e ".[page]"')
import uvicorn  # noqa: E402
from starlette.routing import Mount  # noqa: E402

from vlab_jax.inference import page as page_module  # noqa: E402
from vlab_jax.inference.page import make_app  # noqa: E402

PROGRAM = pathlib.Path(__file__).with_name("colours.py")
ODD_NAME = "<img src=x onerror=alert(1)> \"'&红 ${1} *a*.mp4"
LOOPBACK = {"127.0.0.1", "::1", "localhost", "0.0.0.0"}


@pytest.fixture(scope="module", autouse=True)
def offline():
    """No other machine is asked for anything: by this process, which serves, nor (below) by the browser."""
    look_up, connect, asked = socket.getaddrinfo, socket.socket.connect, []

    def checked_look_up(host, *arguments, **options):
        if host not in LOOPBACK | {None, "nowhere.invalid"}:
            asked.append(host)
            raise socket.gaierror
        return look_up(host, *arguments, **options)

    def checked_connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            asked.append(address)
            raise ConnectionRefusedError
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", checked_look_up)
        patch.setattr(socket.socket, "connect", checked_connect)
        yield
    assert not asked


class Site:
    """A server of an index: its functions, called as Gradio calls them, and what a client can ask over HTTP."""

    def __init__(self, home: pathlib.Path, port: int, blocks=None) -> None:
        self.home, self.port, self.blocks = home, port, blocks
        functions = list(blocks.fns.values()) if blocks else []
        self.functions = {function.name: function.fn for function in reversed(functions)}
        self.numbers = {function.name: number for number, function in blocks.fns.items()} if blocks else {}

    def ask(self, method, url, body=None, headers=None):
        """Status, headers and body; the URL is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, url, body, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def call(self, name, *values):
        """Calls a function as a browser does; the last message of its event."""
        join = {"data": values, "fn_index": self.numbers[name], "session_hash": "test"}
        body = json.dumps(join).encode()
        assert self.ask("POST", "/gradio_api/queue/join", body, {"content-type": "application/json"})[0] == 200
        stream = self.ask("GET", "/gradio_api/queue/data?session_hash=test")[2].decode()
        messages = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line]
        return next(message for message in messages if message["msg"] == "process_completed")

    def search(self, text):
        """The moments that were found, and the HTML that shows each."""
        outputs = self.functions["search"](text)
        return outputs[0], [shown for shown in outputs[1 + page_module.MAX_HITS :] if shown]

    def upload(self, name, data):
        """Status, and the path at which the server keeps an upload."""
        body = f'--x\r\ncontent-disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        headers = {"content-type": "multipart/form-data; boundary=x"}
        status, _, found = self.ask("POST", "/gradio_api/upload", body + data + b"\r\n--x--\r\n", headers)
        return status, json.loads(found)[0] if status == 200 else found


def address(shown):
    """Where the HTML of a moment gets its media from, without the interval."""
    return "/" + re.search(r'src="([^"#]*)', shown).group(1)


@contextlib.contextmanager
def running(home, scratch):
    """A server of `home`'s index on a free port."""
    scratch.mkdir()
    app = make_app(home / "index", ColourEmbedder(), scratch)
    blocks = next(route.app for route in app.routes if isinstance(route, Mount)).get_blocks()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield Site(home, listener.getsockname()[1], blocks)
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
        arguments = ["index", str(media), f"--index={home / 'index'}", "--model=colours"]
        assert predict.main([*arguments, "--window=4", "--workers=0"]) == 0
    (media / "unindexed.mp4").write_bytes(b"secret")
    (media / "notes.txt").write_bytes(b"secret")
    return home


@pytest.fixture(scope="module")
def site(home, tmp_path_factory):
    with running(home, tmp_path_factory.mktemp("scratch") / "all") as site:
        yield site


def test_hits_have_name_interval_and_score_and_play_from_their_start(site):
    found, shown = site.search("red")
    best = found[0]
    assert (best.name, best.start, best.end) == (ODD_NAME, 4, 8) and best.note == "0:04.0-0:08.0 1.000"
    assert "#t=4.000,8.000" in shown[0] and best.note in shown[0] and ODD_NAME not in shown[0]
    status, headers, body = site.ask("GET", address(shown[0]))
    assert (status, headers["content-type"]) == (200, "video/mp4")
    assert body == (site.home / "media" / ODD_NAME).read_bytes()


def test_a_part_of_a_file_is_sent_on_request(site):
    url, whole = address(site.search("red")[1][0]), (site.home / "media" / ODD_NAME).read_bytes()
    status, headers, body = site.ask("GET", url, headers={"range": "bytes=100-199"})
    assert (status, body) == (206, whole[100:200])
    assert headers["content-range"] == f"bytes 100-199/{len(whole)}" and headers["accept-ranges"] == "bytes"
    assert site.ask("GET", url, headers={"range": f"bytes={len(whole)}-"})[0] == 416


def test_what_browsers_cannot_play_becomes_a_clip_of_the_moment(site):
    found, shown = site.search("green")
    assert found[0].name == "below/green.avi" and "#t=" not in shown[0]
    status, headers, body = site.ask("GET", address(shown[0]), headers={"range": "bytes=0-"})
    assert (status, headers["content-type"]) == (206, "video/mp4")
    with av.open(io.BytesIO(body)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
    assert video.measure_duration(body) == pytest.approx(found[0].end - found[0].start, abs=0.1)
    frame = video.decode_clip(body, num_frames=1, size=8)[0].mean(axis=(0, 1))
    assert np.abs(frame - COLOURS["green"]).max() < 25


UNKNOWN = [
    "/media/../../etc/passwd",
    "/media/%2e%2e%2fsecret.mp4",
    "/media/" + urllib.parse.quote(ODD_NAME),
    "/media/unindexed.mp4",
    "/media/" + "0" * 64,
    "/gradio_api/file={media}/grey.png",
    "/gradio_api/file={media}/unindexed.mp4",
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=http://127.0.0.1:1/",
    "/gradio_api/proxy=http://127.0.0.1:1/",
    "/file=/etc/passwd",
    "/static/../../../package.json",
    "/static/%2e%2e/%2e%2e/%2e%2e/package.json",
    "/static//etc/passwd",
    "/assets/..%5c..%5cpackage.json",
    "//etc/passwd",
    "/config",
    "/gradio_api/info",
    "/gradio_api/vibe-edit",
    "/gradio_api/runs",
    "/monitoring",
    "/docs",
]


@pytest.mark.parametrize("url", UNKNOWN)
def test_no_request_gets_a_file_by_its_path(site, url):
    for method in ("GET", "POST"):
        status, _, body = site.ask(method, url.format(media=site.home / "media"))
        assert status in (403, 404, 405) and len(body) < 100 and b"secret" not in body


@pytest.mark.parametrize(
    "path", ["{media}/unindexed.mp4", "/etc/passwd", "../secret.mp4", "http://example.invalid/x.mp4"]
)
def test_an_upload_that_names_a_file_or_an_address_is_not_taken(site, path):
    data = {"path": path.format(media=site.home / "media"), "meta": {"_type": "gradio.FileData"}}
    found = site.call("receive", data)
    shown = json.dumps(found)
    assert not found["success"] or ("No such file" in shown and "media/" not in shown)


def test_an_index_that_names_files_outside_its_folder_shows_none_of_them(home, tmp_path):
    """An index may come from somebody else."""
    from vlab_jax.inference.clips import Window
    from vlab_jax.inference.search_index import EmbeddedFile, MediaFile, open_index

    shutil.copytree(home / "index", tmp_path / "index")
    index = open_index(tmp_path / "index")
    index._table.delete("true")
    outside = ["../secret.mp4", str(home / "secret.mp4")]
    vectors = list(ColourEmbedder().embed_texts(["red"]))
    index.add([EmbeddedFile(MediaFile(name, 1, 1), [Window(0, 1)], vectors) for name in outside])
    with running(tmp_path, tmp_path / "scratch") as site:
        assert len(index) == 2 and site.search("red") == ([], [])


def test_requests_of_other_sites_are_refused(site):
    url = address(site.search("red")[1][0])
    assert site.ask("GET", url)[0] == 200
    assert site.ask("GET", "/", headers={"host": "evil.example"})[0] == 400  # a name that was pointed here
    for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert site.ask("GET", url, headers=headers)[0] == 403
        assert site.ask("POST", "/gradio_api/upload", b"", headers)[0] == 403
        assert site.ask("POST", "/gradio_api/queue/join", b"{}", headers)[0] == 403
    assert site.ask("GET", url, headers={"origin": f"http://127.0.0.1:{site.port}"})[0] == 200


def test_the_page_loads_nothing_from_elsewhere(site):
    status, headers, body = site.ask("GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'self';") and "http" not in policy and "eval" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    loaded = re.findall(rb'<(?:script|link|img|iframe)[^>]*(?:src|href)="([^"]*)"', body)
    assert loaded and not [url for url in loaded if b"//" in url]
    assert b"url(" not in body or not re.search(rb"url\([\"']?(https?:)?//", body)
    styles = site.ask("GET", "/theme.css")[2]
    assert not re.search(rb"(@import|url\([\"']?)\s*[\"']?(https?:)?//", styles)


def test_a_moment_is_described_and_asked_about(site):
    for colour in ("red", "green"):
        found, shown = site.search(colour)
        moment, _, player, *texts = site.functions["fn"](found)  # of the first button
        assert moment == found[0] and player == shown[0] and texts == [""] * 3
        assert site.functions["describe"](moment) == f"all is {colour}"
        assert site.functions["answer"](moment, "which colour?") == colour


def test_an_upload_is_shown_and_described(site):
    status, path = site.upload("红 clip.avi", (site.home / "media" / "below" / "green.avi").read_bytes())
    assert status == 200
    moment, _, shown, *_ = site.functions["receive"](path)
    assert moment.name.endswith(".avi") and site.functions["describe"](moment) == "all is green"
    assert site.ask("GET", address(shown))[1]["content-type"] == "video/mp4"


def test_an_upload_that_is_no_video_or_too_large_is_one_line_without_a_path(site, monkeypatch):
    moment = site.functions["receive"](site.upload("bad.mp4", b"no video")[1])[0]
    with pytest.raises(gr.Error) as error:
        site.functions["describe"](moment)
    assert error.value.message.startswith("bad.mp4: the media cannot be decoded")
    with pytest.raises(gr.Error, match=r"^'notes.txt is no video and no image"):
        site.functions["receive"](site.upload("../../notes.txt", b"x")[1])
    assert site.blocks.max_file_size == 512 * 2**20
    monkeypatch.setattr(site.blocks, "max_file_size", 1000)
    assert site.upload("large.mp4", b"x" * 2000)[0] == 413


def test_a_mistake_is_one_line(site):
    for text, message in ((" ", "write what to look for"), ("", "write what to look for")):
        with pytest.raises(gr.Error, match=message):
            site.search(text)
    found = site.search("red")[0]
    with pytest.raises(gr.Error, match="write a question"):
        site.functions["answer"](found[0], " ")


def test_a_query_in_letters_that_the_model_does_not_know_is_answered_with_a_warning(site, monkeypatch):
    warnings = []
    monkeypatch.setattr(gr, "Warning", warnings.append)
    assert site.search("红色")[0] and not warnings  # in the model's vocabulary
    assert site.search("蓝天")[0]
    assert "has learned no words with 蓝, 天" in warnings[0]


def test_what_is_indexed_while_the_page_is_open_is_found_and_another_model_is_named(home, tmp_path, monkeypatch):
    shutil.copytree(home / "index", tmp_path / "index")
    shutil.copytree(home / "media", tmp_path / "media", ignore=shutil.ignore_patterns("un*"))
    monkeypatch.setattr(cli, "open_model", open_colours)
    with running(tmp_path, tmp_path / "scratch") as site:
        (tmp_path / "media" / "new.mp4").write_bytes(colour_video(("blue", 4)))
        (tmp_path / "media" / "grey.png").unlink()
        arguments = ["index", str(tmp_path / "media"), f"--index={tmp_path / 'index'}", "--model=colours", "--moved"]
        assert predict.main([*arguments, "--workers=0"]) == 0
        names = [moment.name for moment in site.search("blue")[0]]
        assert "new.mp4" in names and "grey.png" not in names
        (tmp_path / "media" / "new.mp4").unlink()
        assert "No such file" in site.search("blue")[1][names.index("new.mp4")]
        info = json.loads((tmp_path / "index" / "index.json").read_text())
        (tmp_path / "index" / "index.json").write_text(json.dumps({**info, "fingerprint": "other"}))
        with pytest.raises(gr.Error, match="was made by the model"):
            site.search("red")


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
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "vlab_jax.inference.page")
    monkeypatch.delattr("vlab_jax.inference.page")
    assert serve(index) == 2
    assert 'pip install -e ".[page]"' in capsys.readouterr().err


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_who_lets_others_reach_the_page_is_warned(home, host, warned, monkeypatch, capsys):
    def interrupted(self, sockets):
        assert sockets[0].getsockname()[0] == host
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "open_model", open_colours)
    monkeypatch.setattr(uvicorn.Server, "run", interrupted)
    arguments = () if host == "127.0.0.1" else (f"--host={host}",)
    assert serve(f"--index={home / 'index'}", "--model=colours", "--port=0", *arguments) == 0
    out, error = capsys.readouterr()
    assert f"http://{host}:" in out and ("warning: whoever reaches" in error) is warned


def test_the_command_serves_until_it_is_interrupted(home):
    command = [sys.executable, PROGRAM, "serve", f"--index={home / 'index'}", "--model=colours", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        site = Site(home, int(line.rpartition(":")[2].split("/")[0]))
        assert b"Search in videos" in site.ask("GET", "/")[2]
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
def opened(browser, site):
    """The page in a browser; it may ask no other server for anything, and nothing may go wrong on it."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(60_000)
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.goto(f"http://127.0.0.1:{site.port}/")
    yield page
    context.close()
    assert not wrong
    servers = {urllib.parse.urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))}
    assert servers == {f"127.0.0.1:{site.port}"}


def test_in_a_browser_a_hit_stands_at_its_start_and_a_question_is_answered(browser, site):
    with opened(browser, site) as page:
        page.wait_for_selector("text=4 windows of media, by colours")
        page.fill("#text textarea", "red")
        page.press("#text textarea", "Enter")
        page.wait_for_selector("#hits video")
        assert "0:04.0-0:08.0" in page.inner_text("#hits") and ODD_NAME in page.inner_text("#hits")
        assert page.locator("#hits img[src=x]").count() == 0  # the name is text
        ready = "() => { const v = document.querySelector('#hits video'); return v.readyState >= 2 && !v.seeking }"
        page.wait_for_function(ready)
        first = page.locator("#hits video").first
        assert first.evaluate("v => v.currentTime") == pytest.approx(4, abs=0.01)
        drawn = first.evaluate(
            "v => { const c = document.createElement('canvas').getContext('2d'); c.drawImage(v, 0, 0, 8, 8);"
            " return [...c.getImageData(4, 4, 1, 1).data] }"
        )
        assert drawn[0] > 150 > 100 > max(drawn[1:3])  # what is red
        page.locator("#hits button").first.click()
        page.wait_for_function("() => document.querySelector('#caption textarea')?.value === 'all is red'")
        page.fill("#question textarea", "which colour?")
        page.press("#question textarea", "Enter")
        page.wait_for_function("() => document.querySelector('#answer textarea').value === 'red'")
        page.fill("#question textarea", " ")
        page.click("#ask")
        page.wait_for_selector("text=write a question")


def test_in_a_browser_a_clip_plays_to_its_end_and_an_upload_is_described(browser, site):
    with opened(browser, site) as page:
        page.fill("#text textarea", "blue")
        page.click("#search")
        page.wait_for_selector("#hits video")
        ready = "() => [...document.querySelectorAll('#hits video')].every(v => v.readyState >= 2)"
        page.wait_for_function(ready)  # of the AVI file, too
        page.locator("#hits video").first.evaluate("v => { v.play() }")
        page.wait_for_function(
            "() => { const v = document.querySelector('#hits video'); return v.paused && v.currentTime > 3.5 }"
        )
        assert page.locator("#hits video").first.evaluate("v => v.currentTime") < 5  # of 8 seconds
        page.set_input_files("input[type=file]", site.home / "media" / "below" / "green.avi")
        page.wait_for_function("() => document.querySelector('#caption textarea')?.value === 'all is green'")
        page.wait_for_function("() => document.querySelector('#player video').readyState >= 2")
