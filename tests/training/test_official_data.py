"""The few real clips of official data sets go all the way: checked, built with all others missing, evaluated."""

import json
import pathlib

import pytest

from vlab_jax import config as configuration
from vlab_jax.datasets.check import check, status_of
from vlab_jax.errors import InputError
from vlab_jax.evaluation.checkpoint import evaluate

# Of TGIF's animations in the assets, the names that the official questions have; the third's is not known.
GIFS = {
    "1.gif": "tumblr_ng2hhrvC6B1slj978o1_400.gif",  # the one cat that licks 7 times
    "2.gif": "tumblr_n97k6nnj3K1tbjfazo1_400.gif",  # the one cat that puts its head down 3 times
    "4.gif": "tumblr_nbsdx5f0Gm1rb71dxo1_400.gif",
}
# Spec, variant, tasks; clips and how many are missing; figures that must be there.
CASES = [
    ("msvd", "file", ("retrieval",), 770, 766, ("text_to_video/R@1", "video_to_text/R@1")),
    ("activitynet", "frames", ("retrieval",), 4917, 4916, ("text_to_video/R@1",)),
    ("tgif_qa/frameqa", "frames", ("question_answering",), 7132, 7129, ("QA all",)),
    ("tgif_qa/count", "frames", ("question_answering",), 3554, 3551, ("QA count", "QA count MSE")),
    ("tgif_qa/action", "frames", ("question_answering",), 2274, 2271, ("QA action",)),
]


@pytest.fixture(scope="module")
def manual_dir(assets, tmp_path_factory) -> pathlib.Path:
    """Official annotation files with the media that the assets have of them."""
    top = tmp_path_factory.mktemp("manual")
    for name in ("msvd", "activitynet", "tgif_qa"):
        (top / name / "media").mkdir(parents=True)
        for file in (assets / "annotations" / name).iterdir():
            (top / name / file.name).symlink_to(file)
    for file in (assets / "videos" / "msvd").glob("*.avi"):
        (top / "msvd" / "media" / file.name).symlink_to(file)
    clip = assets / "videos" / "misc" / "v_GGSY1Qvo990.mp4"
    (top / "activitynet" / "media" / clip.name.removeprefix("v_")).symlink_to(clip)
    for file, name in GIFS.items():
        (top / "tgif_qa" / "media" / name).symlink_to(assets / "videos" / "tgif" / file)
    return top


@pytest.mark.parametrize(("spec", "variant", "tasks", "clips", "missing", "figures"), CASES)
def test_real_clips_go_from_the_check_to_the_table(
    spec, variant, tasks, clips, missing, figures, finished, manual_dir, tmp_path
):
    findings = check(spec, str(manual_dir), tmp_path / "found.tsv", allow_missing=True, workers=1)
    (text,) = [finding.text for finding in findings if finding.kind == "missing"]
    assert text.startswith(f"{missing:,} of {clips:,} clips") and status_of(findings) == 3
    made = configuration.evaluation_config()
    made.dataset, made.tasks, made.batch_size, made.closed_list = spec, tasks, 8, 0
    made.generation.max_tokens = 3
    made.data.update({"directory": str(tmp_path / "data"), "manual_dir": str(manual_dir), "workers": 0})
    made.data.update({"variant": variant, "frame_rate": 2.0, "short_side": 32})
    with pytest.raises(InputError, match=rf"{missing:,} of {clips:,} clips .* have no media"):
        evaluate(made, finished, None)
    made.data.allow_missing = True
    (row,) = evaluate(made, finished, None).values()
    assert set(figures) <= set(row), row


def test_an_animation_whose_official_name_is_not_known_goes_the_same_way_as_a_clip_of_ones_own(
    finished, assets, tmp_path
):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "3.gif").symlink_to(assets / "videos" / "tgif" / "3.gif")
    known = json.loads((assets / "videos" / "tgif" / "qa.json").read_text())["3"]
    question = {"question": known["question"], "answer": known["answer"].lower()}
    line = {"video": "3.gif", "captions": ["a model pivots"], "questions": [question]}
    (tmp_path / "in" / "annotations.jsonl").write_text(json.dumps(line))
    spec = f"folder:{tmp_path / 'in'}"
    assert status_of(check(spec, "", tmp_path / "found.tsv", workers=1)) == 0
    made = configuration.evaluation_config()
    made.dataset, made.split, made.tasks = spec, "train", ("question_answering",)
    made.batch_size, made.closed_list = 8, 0
    made.generation.max_tokens = 3
    made.data.update({"directory": str(tmp_path / "data"), "workers": 0, "variant": "frames", "short_side": 32})
    (row,) = evaluate(made, finished, None).values()
    assert "QA all" in row, row
