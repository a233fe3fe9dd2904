"""MSR-VTT: 10,000 YouTube clips of 10 to 30 seconds, with 20 captions each.

Xu et al., *MSR-VTT: A Large Video Description Dataset for Bridging Video and Language*, CVPR 2016. The authors'
archives are `train_val_annotation.zip` (in it `train_val_videodatainfo.json`) and `test_videodatainfo.json.zip`;
copies that hold both in one file are called `MSRVTT_data.json`. Media are `video0` to `video9999`. The authors
state no licence of the data; the videos are their uploaders'.

- `captioning`: the official split, 6,513 / 497 / 2,990 clips.
- `retrieval_full`: the same; every caption of a test clip is a query (59,800).
- `retrieval_9k`, `retrieval_7k`: tested on 1k-A, 1,000 pairs of a clip and one of its captions (JSFusion, Yu et
  al., ECCV 2018: `MSRVTT_JSFUSION_test.csv`). Published runs train on all other clips (9k: the 9,000 of
  `MSRVTT_train.9k.csv`) or on the official training and validation splits (7k: 7,010), as CLIP4Clip describes it
  (arXiv 2104.08860); they have no validation split, and mostly select on 1k-A itself. Here nothing is selected on
  what it is tested on: the official validation split (497) is validation, and is taken out of training, which has
  8,503 and 6,513 clips left.
- `retrieval_9k_all`, `retrieval_7k_all`: training (9,000, 7,010) and test as published, and no validation: for runs
  that report their last checkpoint.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping

from vlab_jax.datasets.annotations import AnnotationEntry, Protocol
from vlab_jax.datasets.official import OfficialDataset
from vlab_jax.datasets.text_files import TextFile, objects_of, quoted, read_json, read_table, text_of
from vlab_jax.errors import InputError

# The authors' names of the splits, and ours.
_SPLITS = {"train": "train", "validate": "validation", "test": "test"}


def read_official(split: str, file: TextFile) -> Iterator[AnnotationEntry]:
    """The clips of an official split with all their captions, in the order of the file's list of videos."""
    return (entry for entry in _entries(file) if entry.split == split)


def read_1k_a(file: TextFile) -> Iterator[AnnotationEntry]:
    """The test clips of 1k-A, each with its one caption."""
    for where, row in read_table(file, ("video_id", "sentence")):
        name = text_of(row, "video_id", where)
        yield AnnotationEntry(name, name, "test", (text_of(row, "sentence", where),))


def read_7k(file: TextFile) -> Iterator[AnnotationEntry]:
    """The clips of the official training and validation splits."""
    return (entry for entry in _entries(file) if entry.split != "test")


def read_9k(clips: TextFile, *annotations: TextFile) -> Iterator[AnnotationEntry]:
    """The clips that a table lists, in the order of the annotation files; each is in its official split."""
    listed = {text_of(row, "video_id", where) for where, row in read_table(clips, ("video_id",))}
    for file in dict.fromkeys(annotations):
        for entry in _entries(file):
            if entry.id in listed:
                listed.discard(entry.id)
                yield entry
    if listed:
        raise InputError(f"{clips} lists {min(listed)}, which the annotations of MSR-VTT do not have; get both anew")


def _entries(file: TextFile) -> Iterator[AnnotationEntry]:
    """All clips of a file, each in its official split."""
    content = read_json(file)
    if not isinstance(content, dict) or not {"videos", "sentences"} <= set(content):
        raise InputError(f"{file} is no annotation file of MSR-VTT: it must be an object with 'videos' and 'sentences'")
    captions = defaultdict(list)
    for where, sentence in objects_of(content["sentences"], str(file), "sentence"):
        captions[text_of(sentence, "video_id", where)].append(text_of(sentence, "caption", where))
    for where, video in objects_of(content["videos"], str(file), "video"):
        name, split = text_of(video, "video_id", where), text_of(video, "split", where)
        if split not in _SPLITS:
            raise InputError(f"{where}: 'split' is {quoted(split)}; it must be one of {', '.join(_SPLITS)}")
        yield AnnotationEntry(name, name, _SPLITS[split], tuple(captions[name]))


_TRAIN_VAL = "train_val_videodatainfo.json|MSRVTT_data.json"
_TEST = "test_videodatainfo.json|MSRVTT_data.json"
_TRAINING = {"9k": (read_9k, f"MSRVTT_train.9k.csv {_TRAIN_VAL} {_TEST}"), "7k": (read_7k, _TRAIN_VAL)}


def _twenty(clips: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """The counts of splits whose clips have 20 captions each."""
    return {split: {"clips": count, "videos": count, "captions": 20 * count} for split, count in clips.items()}


def _official(name: str, description: str) -> Protocol:
    files = {"train": _TRAIN_VAL, "validation": _TRAIN_VAL, "test": _TEST}
    return Protocol(name, description, files, read_official, _twenty({"train": 6513, "validation": 497, "test": 2990}))


def _tested_on_1k_a(name: str, description: str, training: str, clips: Mapping[str, int]) -> Protocol:
    """A protocol of retrieval with the splits that `clips` counts, and 1k-A as test.

    If validation is one, it is the official split, and is taken out of training.
    """
    read_training, training_files = _TRAINING[training]

    def read(split: str, *files: TextFile) -> Iterator[AnnotationEntry]:
        if split == "test":
            yield from read_1k_a(*files)
            return
        for entry in read_training(*files):
            if "validation" not in clips or (entry.split == "validation") == (split == "validation"):
                yield dataclasses.replace(entry, split=split)

    files = {**dict.fromkeys(clips, training_files), "test": "MSRVTT_JSFUSION_test.csv"}
    pairs = {"clips": 1000, "videos": 1000, "captions": 1000}
    return Protocol(name, description, files, read, {**_twenty(clips), "test": pairs})


MSRVTT = OfficialDataset(
    name="msrvtt",
    description=__doc__,
    license="not stated by the authors",
    homepage="https://www.microsoft.com/en-us/research/publication/msr-vtt-a-large-video-description-dataset-for-bridging-video-and-language/",
    protocols=(
        _official("captioning", "The official split, for captioning."),
        _tested_on_1k_a(
            "retrieval_9k",
            "1k-A as test; 9k as training, but for the official validation split.",
            "9k",
            {"train": 8503, "validation": 497},
        ),
        _tested_on_1k_a(
            "retrieval_7k",
            "1k-A as test; the official training and validation splits.",
            "7k",
            {"train": 6513, "validation": 497},
        ),
        _official("retrieval_full", "The official split, for retrieval."),
        _tested_on_1k_a("retrieval_9k_all", "1k-A as test, 9k as training.", "9k", {"train": 9000}),
        _tested_on_1k_a(
            "retrieval_7k_all",
            "1k-A as test, the official training and validation splits as training.",
            "7k",
            {"train": 7010},
        ),
    ),
)
