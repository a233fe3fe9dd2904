"""The commands on one's own videos: what they print, what they say is wrong, and with which exit status."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from numbered_video import encode, encode_image, numbered
from tiny_trained import save_run

from vlab_jax.export import export
from vlab_jax.predict import main

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    save_run(folder / "workdir")
    export(folder / "workdir", folder / "my_vlab")
    return f"--model={folder / 'my_vlab'}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Two videos and an image, in a folder and one in it; files that are none of these beside them."""
    made = tmp_path_factory.mktemp("videos")
    (made / "more").mkdir()
    (made / "b.mp4").write_bytes(encode([numbered(number) for number in range(6)]))
    (made / "more" / "c.GIF").write_bytes(encode_image(np.zeros((20, 20, 3), np.uint8), "GIF"))
    (made / "a.jpg").write_bytes(encode_image(np.full((20, 20, 3), 99, np.uint8), "JPEG"))
    (made / "notes.txt").write_text("words")
    (made / ".hidden.mp4").write_bytes(b"")
    return made


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m vlab_jax.predict`."""
    return subprocess.run(
        [sys.executable, "-m", "vlab_jax.predict", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_files_of_folders_are_captioned_each_on_a_line(model, folder, capsys):
    assert main(["caption", str(folder), str(folder / "b.mp4"), "--beams=1", model]) == 0
    printed = capsys.readouterr()
    names = [folder / "a.jpg", folder / "b.mp4", folder / "more" / "c.GIF", folder / "b.mp4"]
    lines = printed.out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == list(map(str, names)) and lines[1] == lines[3]
    assert "4/4" in printed.err
    assert main(["caption", str(folder / "b.mp4"), "--beams=1", model]) == 0
    alone = capsys.readouterr()
    assert alone.out == f"{lines[1].partition(': ')[2]}\n" and alone.err == ""


def test_json_is_an_object_a_line_and_what_cannot_be_read_is_named_in_its_place(model, folder, capsys):
    videos = [str(folder / name) for name in ("b.mp4", "notes.txt", "none.mp4")]
    status = main(["answer", *videos, "--question=那是什么?", "--option=red", "--option=一只狗", "--json", model])
    printed = capsys.readouterr()
    answer, notes, none = map(json.loads, printed.out.splitlines())
    assert status == 2
    assert (answer["video"], answer["question"]) == (videos[0], "那是什么?")
    assert answer["text"] in ("red", "一只狗") and answer["score"] < 0 and len(answer) == 4
    assert notes["error"].startswith(f"{videos[1]}: the media cannot be decoded") and set(notes) == {"video", "error"}
    assert none == {"video": videos[2], "error": f"{videos[2]}: there is no such file"}
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {notes['error']}", f"error: {none['error']}"]


def test_texts_are_ranked_from_the_command_line_and_from_a_file(model, folder, capsys, tmp_path):
    (tmp_path / "labels.txt").write_text("\ufeffa red circle\n\n  left  \n", encoding="utf-8")
    given = [
        "rank",
        str(folder / "a.jpg"),
        str(folder / "b.mp4"),
        "--text=a",
        f"--texts={tmp_path / 'labels.txt'}",
        model,
    ]
    assert main([*given, "--json"]) == 0
    ranked = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all({text["text"] for text in each["texts"]} == {"a", "a red circle", "left"} for each in ranked)
    scores = [text["score"] for text in ranked[0]["texts"]]
    assert scores == sorted(scores, reverse=True) and ranked[0]["by"] == "similarity"
    assert main([*given, "--top=1", "--start=0", "--end=0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    best = ranked[0]["texts"][0]
    assert lines[0] == f"{folder / 'a.jpg'}: {best['score']:.3f}  {best['text']}" and len(lines) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption", "{folder}/a.jpg", "--model=/nowhere"], "there is no model at '/nowhere'; name a run's workdir"),
        (["caption", "{empty}", "{model}"], "{empty} holds no video and no image"),
        (
            ["caption", "{folder}", "--start=3", "--end=2", "{model}"],
            "{folder}/a.jpg: the interval [3 s, 2 s) is empty",
        ),
        (["caption", "{folder}", "--frames=0", "{model}"], "frames is 0; it must be at least 1"),
        (["rank", "{folder}", "{model}"], "there is nothing to rank; give texts"),
        (["rank", "{folder}", "--texts={empty}/none", "{model}"], "--texts={empty}/none cannot be read: No such file"),
        (["rank", "{folder}", "--text=a", "--top=-1", "{model}"], "--top=-1 must be at least 1, or 0 for all"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(model, folder, capsys, tmp_path, arguments, message):
    places = {"folder": folder, "empty": tmp_path, "model": model}
    assert main([argument.format(**places) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"error: {message.format(**places)}")
    assert printed.err.count("\n") == 1


def test_help_teaches_at_once(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "python -m vlab_jax.predict caption clip.mp4 --model=my_vlab" in text
    for command in ("caption", "answer", "rank"):
        assert f"\n    {command}  " in text
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"python -m vlab_jax.predict {command} " in capsys.readouterr().out
    program = (
        "import sys\nfrom vlab_jax.predict import main\n"
        "try: main(['--help'])\nexcept SystemExit: assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_as_a_program_it_leaves_no_traceback():
    done = call("caption", "clip.mp4", "--model=/nowhere")
    assert done.returncode == 2 and done.stderr.startswith("error: there is no model at '/nowhere';")
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert call().returncode == 2
