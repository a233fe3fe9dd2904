"""MSR-VTT: 10,000 YouTube clips of 10 to 30 seconds, with 20 captions each."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from typing import ClassVar

from vlab_jax.datasets.annotations import AnnotationEntry, AnnotationFolder, Counts, Protocol
from vlab_jax.datasets.official import Official
from vlab_jax.datasets.text_files import TextFile, quoted, read_json, read_table, text_of
from vlab_jax.errors import InputError

_TRAIN_VAL = ("train_val_videodatainfo.json", "MSRVTT_data.json")
_TEST = ("test_videodatainfo.json", "MSRVTT_data.json")
_NINE = ("MSRVTT_train.9k.csv",)
_ONE_K = ("MSRVTT_JSFUSION_test.csv",)
# Our splits by the authors' names of them.
_SPLITS = {"train": "train", "validate": "validation", "test": "test"}


def read_official(folder: AnnotationFolder, split: str) -> Iterator[AnnotationEntry]:
    """The clips of an official split with all their captions, in the order of the file's list of videos."""
    return (entry for entry in _entries(folder.need(_TEST if split == "test" else _TRAIN_VAL)) if entry.split == split)


def read_seven_all(folder: AnnotationFolder, split: str) -> Iterator[AnnotationEntry]:
    """1k-A, and the 7,010 training clips: the official training and validation splits."""
    if split == "test":
        return read_one_k(folder, split)
    return (_moved(entry, split) for entry in _entries(folder.need(_TRAIN_VAL)) if entry.split != "test")


def read_seven(folder: AnnotationFolder, split: str) -> Iterator[AnnotationEntry]:
    """1k-A, and the official training and validation splits."""
    return (read_one_k if split == "test" else read_official)(folder, split)


def read_nine_all(folder: AnnotationFolder, split: str) -> Iterator[AnnotationEntry]:
    """1k-A, and the 9,000 training clips, which come from all official splits, in the order of these files."""
    if split == "test":
        return read_one_k(folder, split)
    return (_moved(entry, split) for entry in _nine(folder))


def read_nine(folder: AnnotationFolder, split: str) -> Iterator[AnnotationEntry]:
    """1k-A, the official validation split, and the other training clips of 9k."""
    if split == "test":
        return read_one_k(folder, split)
    held_out = split == "validation"
    return (_moved(entry, split) for entry in _nine(folder) if (entry.split == "validation") == held_out)


def read_one_k(folder: AnnotationFolder, split: str) -> Iterator[AnnotationEntry]:
    """1k-A: each clip with its one caption."""
    for where, row in read_table(folder.need(_ONE_K), ("video_id", "sentence")):
        name = text_of(row, "video_id", where)
        yield AnnotationEntry(name, name, split, (text_of(row, "sentence", where),))


def _nine(folder: AnnotationFolder) -> Iterator[AnnotationEntry]:
    file = folder.need(_NINE)
    listed = {text_of(row, "video_id", where) for where, row in read_table(file, ("video_id",))}
    for source in dict.fromkeys((folder.need(_TRAIN_VAL), folder.need(_TEST))):
        for entry in _entries(source):
            if entry.id in listed:
                listed.discard(entry.id)
                yield entry
    if listed:
        raise InputError(f"{file} lists {min(listed)}, which the annotations of MSR-VTT do not have; get both anew")


def _entries(file: TextFile) -> Iterator[AnnotationEntry]:
    """All clips of a file, each in its official split."""
    content = read_json(file)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ("videos", "sentences")):
        raise InputError(f"{file} is no annotation file of MSR-VTT: it must be an object with 'videos' and 'sentences'")
    captions = defaultdict(list)
    for number, sentence in enumerate(content["sentences"], start=1):
        try:
            captions[sentence["video_id"]].append(sentence["caption"].strip())
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{file} sentence {number}: lacks 'video_id' or 'caption'; get the file anew") from error
    for number, video in enumerate(content["videos"], start=1):
        where = f"{file} video {number}"
        name, split = text_of(video, "video_id", where), text_of(video, "split", where)
        if split not in _SPLITS:
            raise InputError(f"{where}: 'split' is {quoted(split)}; it must be one of {', '.join(_SPLITS)}")
        yield AnnotationEntry(name, name, _SPLITS[split], tuple(captions[name]), rows=len(captions[name]))


def _moved(entry: AnnotationEntry, split: str) -> AnnotationEntry:
    return dataclasses.replace(entry, split=split)


def _twenty(clips: int) -> Counts:
    return Counts(clips=clips, videos=clips, captions=20 * clips)


_OFFICIAL = {"train": (_TRAIN_VAL,), "validation": (_TRAIN_VAL,), "test": (_TEST,)}
_OFFICIAL_COUNTS = {"train": _twenty(6513), "validation": _twenty(497), "test": _twenty(2990)}
_PAIRS = Counts(clips=1000, videos=1000, captions=1000)


class Msrvtt(Official):
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

    FOLDERS: ClassVar = ("msrvtt",)
    LICENSE: ClassVar = "not stated by the authors"
    HOMEPAGE: ClassVar = "https://www.microsoft.com/en-us/research/publication/msr-vtt-a-large-video-description-dataset-for-bridging-video-and-language/"
    PROTOCOLS: ClassVar = (
        Protocol("captioning", "The official split, for captioning.", _OFFICIAL, read_official, _OFFICIAL_COUNTS),
        Protocol(
            "retrieval_9k",
            "1k-A as test; 9k as training, but for the official validation split.",
            {"train": (_NINE, _TRAIN_VAL, _TEST), "validation": (_NINE, _TRAIN_VAL, _TEST), "test": (_ONE_K,)},
            read_nine,
            {"train": _twenty(8503), "validation": _twenty(497), "test": _PAIRS},
        ),
        Protocol(
            "retrieval_7k",
            "1k-A as test; the official training and validation splits.",
            {"train": (_TRAIN_VAL,), "validation": (_TRAIN_VAL,), "test": (_ONE_K,)},
            read_seven,
            {"train": _twenty(6513), "validation": _twenty(497), "test": _PAIRS},
        ),
        Protocol("retrieval_full", "The official split, for retrieval.", _OFFICIAL, read_official, _OFFICIAL_COUNTS),
        Protocol(
            "retrieval_9k_all",
            "1k-A as test, 9k as training.",
            {"train": (_NINE, _TRAIN_VAL, _TEST), "test": (_ONE_K,)},
            read_nine_all,
            {"train": _twenty(9000), "test": _PAIRS},
        ),
        Protocol(
            "retrieval_7k_all",
            "1k-A as test, the official training and validation splits as training.",
            {"train": (_TRAIN_VAL,), "test": (_ONE_K,)},
            read_seven_all,
            {"train": _twenty(7010), "test": _PAIRS},
        ),
    )
