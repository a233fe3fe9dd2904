"""MSVD: 1,970 short YouTube clips, with about 40 captions each; and the names that its files go by."""

from collections import defaultdict
from collections.abc import Iterator
from typing import ClassVar

from vlab_jax.datasets.annotations import AnnotationEntry, AnnotationFolder, Counts, Protocol
from vlab_jax.datasets.official import Official
from vlab_jax.datasets.text_files import TextFile, quoted, read_json_list, read_list, text_of, texts_of
from vlab_jax.errors import InputError

_LISTS = {"train": "train.json", "validation": "val.json", "test": "test.json"}
_DESCRIPTIONS = "AllVideoDescriptions.txt"
# The authors' order of all clips, of which the first 1,200 train, and the next 100 validate.
MAPPING = ("youtube_mapping.txt",)
_FIRST = {"train": 1, "validation": 1201, "test": 1301}
_LAST = 1970
_CAPTIONS = {"train": 48_774, "validation": 4_290, "test": 27_763}


def read_captions(folder: AnnotationFolder, split: str) -> Iterator[AnnotationEntry]:
    """The clips of a split; each caption is a text of its own."""
    file = folder.need((_LISTS[split], _DESCRIPTIONS))
    captions = _listed(file) if file.name.endswith(".json") else _described(file, folder, split)
    found = sum(map(len, captions.values()))
    if file.name.endswith(".json") and found != _CAPTIONS[split]:
        raise InputError(f"{file} has {found:,} captions, and MSVD's {split} has {_CAPTIONS[split]:,}; get it anew")
    for name, texts in captions.items():
        yield AnnotationEntry(name, name, split, tuple(texts), rows=len(texts))


def clip_names(folder: AnnotationFolder) -> dict[int, str]:
    """The name of each clip by its number from 1 to 1970, as far as the files that are there tell it."""
    mapping = folder.find(MAPPING)
    if mapping is not None:
        return _mapped(mapping)
    names = {}
    for split, file in _LISTS.items():
        found = folder.find((file,))
        if found is not None:
            names |= dict(enumerate(_listed(found), start=_FIRST[split]))
    return names


def _listed(file: TextFile) -> dict[str, tuple[str, ...]]:
    """Captions by clip, of a JSON list of objects with `video` and `caption`."""
    records = read_json_list(file, ("video", "caption"))
    return {text_of(record, "video", where): texts_of(record, "caption", where) for where, record in records}


def _described(file: TextFile, folder: AnnotationFolder, split: str) -> dict[str, list[str]]:
    """Captions by clip, of the authors' list of a clip's name and a caption in each line."""
    after = {"train": _FIRST["validation"], "validation": _FIRST["test"], "test": _LAST + 1}[split]
    names = {name for number, name in _mapped(folder.need(MAPPING)).items() if _FIRST[split] <= number < after}
    captions = defaultdict(list)
    for line in read_list(file):
        name, _, text = line.partition(" ")
        if name in names and text:
            captions[name].append(text.strip())
    return captions


def _mapped(file: TextFile) -> dict[int, str]:
    """Names by number, of lines such as `-4wsuPCjDBc_5_15 vid1`."""
    names = {}
    for line in read_list(file):
        name, _, number = line.partition(" ")
        if not number.removeprefix("vid").strip().isdigit():
            raise InputError(
                f"{file}: the line {quoted(line)} is not a clip's name and its number, as in '-4wsuPCjDBc_5_15 vid1'"
            )
        names[int(number.removeprefix("vid"))] = name
    return names


class Msvd(Official):
    """MSVD: 1,970 short YouTube clips, with about 40 English captions each.

    Chen and Dolan, *Collecting Highly Parallel Data for Paraphrase Evaluation*, ACL 2011. The authors ship
    `AllVideoDescriptions.txt`, and `YouTubeClips.tar` with media such as `-4wsuPCjDBc_5_15.avi`; the split into 1,200
    / 100 / 670 clips is that of Venugopalan et al. (NAACL 2015), by the order of `youtube_mapping.txt`. Read are
    these two files, or, where they are there, the lists `train.json`, `val.json` and `test.json` that others made of
    them (`[{"video": ..., "caption": [...]}]`; 48,774 / 4,290 / 27,763 captions). No licence is stated.

    The one split serves captioning and retrieval. Every caption of a test clip is a query of its own (as in CLIP4Clip,
    arXiv 2104.08860): joining them into one text gives much higher figures, which are not comparable.
    """

    FOLDERS: ClassVar = ("msvd",)
    LICENSE: ClassVar = "not stated by the authors"
    HOMEPAGE: ClassVar = "https://www.cs.utexas.edu/~ml/clamp/videoDescription/"
    PROTOCOLS: ClassVar = (
        Protocol(
            "captions",
            "1,200 / 100 / 670 clips, for captioning and retrieval.",
            {split: ((name, _DESCRIPTIONS), (name, *MAPPING)) for split, name in _LISTS.items()},
            read_captions,
            {
                "train": Counts(clips=1200, videos=1200),
                "validation": Counts(clips=100, videos=100),
                "test": Counts(clips=670, videos=670),
            },
        ),
    )
