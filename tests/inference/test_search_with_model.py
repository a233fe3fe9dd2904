"""Indexing and searching with a real model, small and untrained: the index holds its embedding of each window."""

import json

import numpy as np
import pytest
import tiny_trained
from inference.colours import colour_video
from tiny_models import random_like
from tiny_trained import save_run

from vlab_jax import Clip, Predictor, predict
from vlab_jax.inference.search_index import open_index


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run's workdir, and the index that it has made of three windows of two files."""
    home = tmp_path_factory.mktemp("home")
    save_run(home / "workdir")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_trained, "random_like", lambda shapes, *_: random_like(shapes, seed=7))
        save_run(home / "other")
    (home / "media").mkdir()
    (home / "media" / "halves.mp4").write_bytes(colour_video(("red", 2), ("blue", 2)))
    (home / "media" / "green.mp4").write_bytes(colour_video(("green", 2)))
    command = ["index", str(home / "media"), f"--index={home / 'index'}", f"--model={home / 'workdir'}"]
    assert predict.main([*command, "--window=2", "--workers=0"]) == 0
    return home


def test_the_index_holds_the_models_embedding_of_each_window_and_a_clip_finds_itself(home, capsys):
    rows = open_index(home / "index")._table.to_arrow().to_pylist()
    assert sorted((row["file"], row["start"], row["end"]) for row in rows) == [
        ("green.mp4", 0, 2),
        ("halves.mp4", 0, 2),
        ("halves.mp4", 2, 4),
    ]
    clips = [Clip(home / "media" / row["file"], row["start"], row["end"]) for row in rows]
    expected = Predictor.load(home / "workdir").embed_videos(clips)
    np.testing.assert_allclose([row["vector"] for row in rows], expected, atol=1e-5)
    capsys.readouterr()
    clip = f"--clip={home / 'media' / 'green.mp4'}"
    assert predict.main(["search", clip, f"--index={home / 'index'}", "--json"]) == 0  # the model is found by the index
    best = json.loads(capsys.readouterr().out)[0]
    assert best["file"] == "green.mp4" and best["score"] == pytest.approx(1, abs=1e-5)


def test_a_text_is_ranked_by_the_models_cosines(home, capsys):
    assert predict.main(["search", "一个红色的圆", f"--index={home / 'index'}", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    clips = [Clip(hit["path"], hit["start"], hit["end"]) for hit in hits]
    expected = Predictor.load(home / "workdir").similarity(clips, ["一个红色的圆"])[:, 0]
    np.testing.assert_allclose([hit["score"] for hit in hits], expected, atol=1e-5)
    assert len(hits) == 3 and sorted(expected, reverse=True) == expected.tolist()


def test_other_parameters_are_refused(home, capsys):
    assert predict.main(["search", "red", f"--index={home / 'index'}", f"--model={home / 'other'}"]) == 2
    error = capsys.readouterr().err
    assert "was made by the model" in error and error.count("\n") == 1
