"""Makes the files of this folder at commit 744fb30; see README.md. The tests compute figures by the same functions."""

import contextlib
import io
import json
import os
import pathlib
import shutil
import sys
import tarfile
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).parent
ARCHIVE, FIGURES = HERE / "saved.tar.xz", HERE / "figures.json"
TEXTS = ("a red circle moves left", "the blue square grows", "a green triangle")
QUESTIONS = ("what colour is the circle?", "which way does the square move?")
OPTIONS = ("red", "blue", "left", "it turns", "the circle moves up")
STEPS, STOPPED = 240, 236  # of the finished run, and of the one that was stopped


def clips() -> list[np.ndarray]:
    """Three clips of 8 frames, uint8 `[8, 48, 48, 3]`: a square of another colour and direction in each."""
    made = []
    for colour, (down, right) in (((220, 30, 40), (0, 3)), ((40, 60, 220), (4, 0)), ((30, 180, 70), (-3, -4))):
        frames = np.full((8, 48, 48, 3), 90, np.uint8)
        for time, frame in enumerate(frames):
            top, left = 18 + down * (time - 4), 18 + right * (time - 4)
            frame[top : top + 14, left : left + 14] = colour
        made.append(frames)
    return made


def model_figures(model: pathlib.Path) -> dict:
    """What a model says of `clips`, by the package's public interface."""
    from vlab_jax import Predictor

    predictor = Predictor.load(model, workers=0)
    videos = clips()
    return {
        "fingerprint": predictor.fingerprint,
        "videos": predictor.embed_videos(videos).tolist(),
        "texts": predictor.embed_texts(TEXTS).tolist(),
        "captions": [[each.text, each.score] for each in predictor.caption(videos)],
        "answers": [[[a.text, a.score] for a in each] for each in predictor.answer(videos, QUESTIONS)],
        "options": [[[a.text, a.score] for a in each] for each in predictor.answer(videos, QUESTIONS, options=OPTIONS)],
        "likelihoods": [
            sorted([text.text, text.score] for text in each.texts)
            for each in predictor.rank(videos, TEXTS, by="likelihood")
        ],
    }


def hits(index: pathlib.Path, model: pathlib.Path, media: pathlib.Path) -> list:
    """The hits of an index for each text and for one of its files: file, start, end and score."""
    from vlab_jax import predict

    found = []
    for query in ([TEXTS[0]], [f"--clip={media / '1.mp4'}"]):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert predict.main(["search", *query, f"--index={index}", f"--model={model}", "--json"]) == 0
        rows = json.loads(printed.getvalue())
        found.append([[row["file"], row["start"], row["end"], row["score"]] for row in rows])
    return found


def evaluation_figures(workdir: pathlib.Path, data_dir: str) -> dict[str, dict[str, float]]:
    """The figures of a workdir's tested checkpoint on the test split of `motion/tiny`."""
    from configs import evaluate as evaluation
    from vlab_jax.evaluation.checkpoint import evaluate

    config = evaluation.get_config()
    config.tasks = ("retrieval", "question_answering")
    config.data.directory, config.data.workers = data_dir, 0
    config.batch_size = 8
    return evaluate(config, workdir, None)


def run_config(data_dir: str):
    """The config of the demo, with narrower towers, on `motion/tiny`: of 240 steps."""
    from configs import pretrain

    config = pretrain.get_config()
    tower = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 32, "embed_width": 16}
    config.model.vision.update({"image_size": 24, "patch_size": 12, **tower})
    config.model.text.update({"vocab_size": 300, "context_length": 20, **tower})
    config.model.adapter.update({"width": 8, "heads": 2})
    config.model.unroll = 2
    config.frames, config.image_frames = 4, 2
    config.data.update({"train": ("motion/tiny",), "evaluate": "motion/tiny", "workers": 0, "directory": data_dir})
    config.stage.clip.update({"steps": 40, "batch_size": 16, "train": ("motion/tiny_still",)})
    config.stage.adapt.update({"steps": 20, "batch_size": 16})
    config.stage.blend.update({"steps": STEPS - 60, "batch_size": 16, "average_decay": 0.9})
    config.evaluation.batch_size = 8
    config.checkpoint.update({"every": 1000, "keep": 1})
    config.log_every = 20
    config.report.queries = 2
    return config


def make(folder: pathlib.Path) -> None:
    """Trains, exports and indexes, with the code of 744fb30; writes `ARCHIVE` and `FIGURES`."""
    from vlab_jax import predict
    from vlab_jax.data import builders
    from vlab_jax.data.builders.options import BuildOptions
    from vlab_jax.export import export
    from vlab_jax.training.loop import train

    data_dir = str(folder / "data")
    saved = folder / "saved"
    config = run_config(data_dir)
    config.stop_after = STOPPED
    train(config, saved / "finished")
    shutil.copytree(saved / "finished", saved / "stopped")
    config.stop_after, config.log_every = 0, 1
    train(config, saved / "finished")
    export(saved / "finished", saved / "export")
    (saved / "media").mkdir()
    source = builders.open_split("motion/tiny", "test", BuildOptions(data_dir))
    for number in range(3):
        (saved / "media" / f"{number}.mp4").write_bytes(source[number]["media"])
    index = ["index", str(saved / "media"), f"--index={saved / 'index'}", f"--model={saved / 'export'}"]
    assert predict.main([*index, "--window=1", "--workers=0"]) == 0
    figures = {
        "model": model_figures(saved / "export"),
        "hits": hits(saved / "index", saved / "export", saved / "media"),
        "evaluation": evaluation_figures(saved / "finished", data_dir),
    }
    assert model_figures(saved / "finished") == figures["model"]
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    left_out = {"report", "texts", "tensorboard"}  # which no command reads
    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        archive.add(saved, "", filter=lambda entry: None if left_out & set(entry.name.split("/")) else entry)


if __name__ == "__main__":
    from compile_options import FLAGS

    os.environ["JAX_PLATFORMS"], os.environ["XLA_FLAGS"] = "cpu", " ".join(FLAGS)
    with tempfile.TemporaryDirectory() as made:
        make(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else made))
