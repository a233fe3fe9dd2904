"""The picture of the local page in docs/page.png, of videos that this project renders.

    python experiments/page/screenshot.py --model=my_vlab --out=docs/page.png

The model is one that was trained on `motion`, such as `make demo` makes. Scenes whose stories no training clip tells
are rendered one after the other into a few videos, those are indexed by `predict index`, served by `predict serve`, and
Chromium searches, chooses the first hit, asks, and takes the picture. The hit, the caption and the answer are printed
beside what the clip really shows.
"""

import argparse
import contextlib
import itertools
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import av
import numpy as np
from playwright.sync_api import Page, sync_playwright

from vlab_jax.datasets.motion.dataset import CONFIGS, held_out_scenes
from vlab_jax.datasets.motion.render import FRAMES_PER_SECOND, render
from vlab_jax.datasets.motion.scene import FRAMES
from vlab_jax.datasets.motion.text import captions, questions

VIDEOS, SCENES_A_VIDEO, RESOLUTION = 6, 8, 240
SECONDS = FRAMES / FRAMES_PER_SECOND
SIZE = {"width": 1240, "height": 900}


def main() -> None:
    """Takes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--scene", type=int, default=3, help="the scene to ask about")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder, index = pathlib.Path(home) / "videos", pathlib.Path(home) / "index"
        stories = render_videos(folder)
        model = pathlib.Path(home) / "my_vlab"  # the name that the page shows
        model.symlink_to(pathlib.Path(args.model).resolve())
        program = [sys.executable, "-m", "vlab_jax.predict"]
        cut = [f"--index={index}", f"--model={model}", f"--window={SECONDS:g}"]
        subprocess.run([*program, "index", str(folder), *cut], check=True)
        with served([*program, "serve", *cut[:2], "--port=0"]) as url, opened(url) as page:
            take(page, *list(stories.values())[args.scene], stories)
            page.screenshot(path=args.out)
    smaller(args.out)


def render_videos(folder: pathlib.Path) -> dict[tuple[str, float], tuple[str, str, str]]:
    """Writes the videos; a caption, a question and its answer for each file and second at which a scene starts."""
    folder.mkdir()
    config = CONFIGS["large"]
    scenes = held_out_scenes(config)["test"]
    stories = {}
    for number in range(VIDEOS):
        name = f"shapes-{number + 1}.mp4"
        shown = scenes[number * SCENES_A_VIDEO : (number + 1) * SCENES_A_VIDEO]
        for place, scene in enumerate(shown):
            rng = np.random.default_rng(number)
            caption, question = captions(scene, rng)[0], questions(scene, rng)[-1]
            stories[name, place * SECONDS] = caption, question.question, question.answer
        write(folder / name, np.concatenate([render(scene, RESOLUTION) for scene in shown]))
    return stories


def write(path: pathlib.Path, frames: np.ndarray) -> None:
    """Writes an mp4 with a frame to seek to in each second."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"g": str(FRAMES_PER_SECOND)})
        stream.height, stream.width, stream.pix_fmt = RESOLUTION, RESOLUTION, "yuv420p"
        for pixels in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))


@contextlib.contextmanager
def served(command: list[str]) -> Iterator[str]:
    """The URL of a server that runs meanwhile."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().rpartition(": ")[2].split()[0]
        finally:
            process.terminate()


@contextlib.contextmanager
def opened(url: str) -> Iterator[Page]:
    """The page in Chromium."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_context(viewport=SIZE).new_page()
        page.set_default_timeout(240_000)  # programs are compiled
        page.goto(url)
        yield page
        browser.close()


def take(page: Page, caption: str, question: str, answer: str, stories: dict) -> None:
    """Searches for the caption, chooses the first hit, and asks."""
    page.fill("#text textarea", caption)
    page.press("#text textarea", "Enter")
    page.wait_for_selector("#hits video")
    page.locator("#hits button").first.click()
    page.wait_for_function("() => document.querySelector('#caption textarea')?.value")
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")
    page.wait_for_function("() => document.querySelector('#answer textarea').value")
    middle = f"v.currentTime += {SECONDS / 2}"  # a scene may begin with shapes that are not there yet
    page.evaluate(f"() => document.querySelectorAll('video').forEach(v => {{ {middle} }})")
    page.wait_for_function(
        "() => [...document.querySelectorAll('video')].slice(0, 6).every(v => v.readyState >= 2 && !v.seeking)"
    )
    page.evaluate("() => window.scrollTo(0, 0)")
    page.wait_for_timeout(3000)  # drawn, and the players' controls gone
    lines = [line for line in page.locator("#hits").inner_text().splitlines() if line.strip()]
    name, span = next((name, line) for name, line in itertools.pairwise(lines) if ":" in line)
    start = float(span.split("-")[0].split(":")[1])
    print(f"searched: {caption}\nfound: {name} {span}\n  shows: {stories[name, start][0]}")
    texts = {name: page.input_value(f"#{name} textarea") for name in ("caption", "answer")}
    print(f"caption: {texts['caption']}\nquestion: {question}\nanswer: {texts['answer']} ({answer})")


def smaller(path: pathlib.Path) -> None:
    """The picture in 256 colours."""
    from PIL import Image

    with Image.open(path) as image:
        image.convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main()
