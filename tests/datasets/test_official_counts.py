"""The official annotation files, as their authors ship them: counts, splits, and what is disjoint from what."""

import collections
import functools
import json
import pathlib

import pytest
from official_folders import source_of

from vlab_jax.datasets.annotations import AnnotationEntry

# Clips, captions and questions of each split that the assets have.
COUNTS = {
    "msrvtt/captioning": {
        "train": (6513, 130_260, 0),
        "validation": (497, 9_940, 0),
        "test": (2990, 59_800, 0),
    },
    "msrvtt/retrieval_9k": {
        "train": (8503, 170_060, 0),
        "validation": (497, 9_940, 0),
        "test": (1000, 1000, 0),
    },
    "msrvtt/retrieval_9k_all": {"train": (9000, 180_000, 0), "test": (1000, 1000, 0)},
    "msvd": {"validation": (100, 4_290, 0), "test": (670, 27_763, 0)},
    "msrvtt_qa": {"validation": (497, 0, 12_278)},
    "msvd_qa": {"validation": (245, 0, 6_415), "test": (504, 0, 13_157)},
    "tgif_qa/frameqa": {"test": (7132, 0, 13_691)},
    "tgif_qa/action": {"test": (2274, 0, 2_274)},
    "tgif_qa/transition": {},
    "tgif_qa/count": {"test": (3554, 0, 3_554)},
    "didemo": {"validation": (1065, 1065, 0)},
    "didemo/moments": {"validation": (4180, 4180, 0)},
    "activitynet": {"test": (4917, 4917, 0)},
    "vatex": {"validation": (3000, 30_000, 0)},
}


NAMES = ("clips", "captions", "questions")


@functools.cache
def read(spec: str, split: str, manual_dir: pathlib.Path) -> tuple[tuple[AnnotationEntry, ...], collections.Counter]:
    """The entries of a split, and their counts; the files are large, and several tests look at them."""
    counts = collections.Counter()
    return tuple(source_of(spec, manual_dir).read(split, counts)), counts


@pytest.mark.parametrize("spec", COUNTS)
def test_the_official_files_have_the_official_counts(spec, assets):
    source = source_of(spec, assets / "annotations")
    assert source.splits == list(COUNTS[spec])
    for split in source.splits:
        some, counts = read(spec, split, assets / "annotations")
        assert tuple(counts[name] for name in NAMES) == COUNTS[spec][split]
        assert len({entry.id for entry in some}) == len(some)
    counts = {split: read(spec, split, assets / "annotations")[1] for split in source.splits}
    assert list(source.count_problems(counts)) == []


def test_msr_vtt_is_split_as_published_and_1k_a_is_disjoint_from_9k(assets):
    def ids(configuration: str, split: str) -> set[str]:
        return {entry.id for entry in read(f"msrvtt/{configuration}", split, assets / "annotations")[0]}

    official = {split: ids("captioning", split) for split in ("train", "validation", "test")}
    everything = set().union(*official.values())
    assert len(official["train"] | official["validation"]) == 7010 and len(everything) == 10_000
    nine, one_k = ids("retrieval_9k_all", "train"), ids("retrieval_9k", "test")
    assert (len(nine), len(one_k)) == (9000, 1000) and not nine & one_k and nine | one_k == everything
    assert one_k < official["test"]
    assert ids("retrieval_9k", "validation") == official["validation"] == nine - ids("retrieval_9k", "train")


def test_msvds_captions_stay_separate_texts(assets):
    known = json.loads((assets / "videos" / "msvd" / "captions.json").read_text())
    clips = {entry.id: entry for entry in read("msvd", "test", assets / "annotations")[0]}
    for name, clip in known.items():
        assert sorted(clips[name].captions) == sorted(text.strip() for text in clip["captions"])
    assert max(len(text.split()) for entry in clips.values() for text in entry.captions) < 60


def test_msvd_qas_numbers_are_the_names_that_the_clips_have(assets):
    known = json.loads((assets / "videos" / "msvd" / "captions.json").read_text())
    asked = {
        entry.video: {(question.question, question.answer) for question in entry.questions}
        for split in ("validation", "test")
        for entry in read("msvd_qa", split, assets / "annotations")[0]
    }
    assert len(known) == 4
    for name, clip in known.items():
        assert asked[name] == {tuple(each) for each in clip["qa"]}


def test_a_paragraph_joins_the_texts_of_a_video_in_the_order_of_the_file(assets):
    rows = json.loads((assets / "annotations" / "didemo" / "val_data.json").read_text())
    clips, _ = read("didemo", "validation", assets / "annotations")
    letters = sum(len(row["description"].strip()) for row in rows)
    assert sum(len(entry.captions[0]) for entry in clips) == letters + len(rows) - len(clips)
    first = [row["description"].strip() for row in rows if row["video"].split(".")[0] == clips[0].video]
    assert clips[0].captions == (" ".join(first),)
    videos = json.loads((assets / "annotations" / "activitynet" / "val_1.json").read_text())
    clips, _ = read("activitynet", "test", assets / "annotations")
    assert [entry.video for entry in clips] == list(videos)
    words = " ".join(sentence for video in videos.values() for sentence in video["sentences"]).split()
    assert " ".join(entry.captions[0] for entry in clips).split() == words


def test_moments_of_didemo_are_within_the_first_30_seconds_and_agree_with_most_annotators(assets):
    rows = json.loads((assets / "annotations" / "didemo" / "val_data.json").read_text())
    clips, _ = read("didemo/moments", "validation", assets / "annotations")
    assert all(0 <= entry.start < entry.end <= 30 for entry in clips)
    agreed = 0
    for row, entry in zip(rows, clips, strict=True):
        times = [(5.0 * first, 5.0 * (last + 1)) for first, last in row["times"]]
        assert (entry.start, entry.end) in times
        commonest = max(times.count(time) for time in times)
        agreed += times.count((entry.start, entry.end)) == commonest
    assert agreed > 0.95 * len(rows)
