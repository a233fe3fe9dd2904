"""MSVD: 1,970 short YouTube clips, with about 40 English captions each.

Chen and Dolan, *Collecting Highly Parallel Data for Paraphrase Evaluation*, ACL 2011. The authors ship
`AllVideoDescriptions.txt`, and `YouTubeClips.tar` with media such as `-4wsuPCjDBc_5_15.avi`; the split into 1,200 / 100
/ 670 clips is that of Venugopalan et al. (NAACL 2015), by the order of `youtube_mapping.txt`. Read are these two files,
or the lists `train.json`, `val.json` and `test.json` that others made of them (`[{"video": ..., "caption": [...]}]`;
48,774 / 4,290 / 27,763 captions), which are preferred. No licence is stated.

The one split serves captioning and retrieval. Every caption of a test clip is a query of its own (as in CLIP4Clip,
arXiv 2104.08860): joining them into one text gives much higher figures, which are not comparable.
"""

import re
from collections import defaultdict
from collections.abc import Iterator

from vlab_jax.datasets.annotations import AnnotationEntry, Protocol
from vlab_jax.datasets.official import OfficialDataset
from vlab_jax.datasets.text_files import TextFile, quoted, read_list, read_objects, text_of, texts_of
from vlab_jax.errors import InputError

# The first and the last clip of each split in the authors' order, and the captions that the lists have.
_SPLITS = {"train": (1, 1200, 48_774), "validation": (1201, 1300, 4_290), "test": (1301, 1970, 27_763)}


def read_captions(split: str, file: TextFile, mapping: TextFile) -> Iterator[AnnotationEntry]:
    """The clips of a split, with their captions as separate texts.

    Args:
      file: a list of captions, or the authors' descriptions of all clips.
      mapping: the authors' order of the clips; not read if `file` is a list.
    """
    first, last, expected = _SPLITS[split]
    if file.name.endswith(".json"):
        captions = _listed(file)
        found = sum(map(len, captions.values()))
        if found != expected:
            raise InputError(f"{file} has {found:,} captions, and MSVD's {split} has {expected:,}; get it anew")
    else:
        names = {name for number, name in _mapped(mapping).items() if first <= number <= last}
        captions = defaultdict(list)
        for line in read_list(file):  # a clip's name and a caption
            name, _, text = line.partition(" ")
            if name in names and text:
                captions[name].append(text.strip())
    for name, texts in captions.items():
        yield AnnotationEntry(name, name, split, tuple(texts))


def clip_names(mapping: TextFile | None, *lists: TextFile | None) -> dict[int, str]:
    """The names of clips by number, from 1 to 1970, as far as the files have them.

    Args:
      lists: those of training, validation and test, read if there is no `mapping`.
    """
    if mapping:
        return _mapped(mapping)
    names = {}
    for file, (first, _, _) in zip(lists, _SPLITS.values(), strict=True):
        names |= dict(enumerate(_listed(file), start=first)) if file else {}
    return names


def _listed(file: TextFile) -> dict[str, tuple[str, ...]]:
    """Captions by clip, of a JSON list of objects with `video` and `caption`."""
    records = read_objects(file)
    return {text_of(record, "video", where): texts_of(record, "caption", where) for where, record in records}


def _mapped(file: TextFile) -> dict[int, str]:
    """Names by number, of lines such as `-4wsuPCjDBc_5_15 vid1`."""
    names = {}
    for line in read_list(file):
        found = re.fullmatch(r"(\S+) +(?:vid)?([0-9]{1,9})", line)
        if not found:
            raise InputError(
                f"{file}: the line {quoted(line)} is not a clip's name and its number, as in '-4wsuPCjDBc_5_15 vid1'"
            )
        names[int(found[2])] = found[1]
    return names


def _files(name: str) -> str:
    return f"{name}.json|AllVideoDescriptions.txt {name}.json|youtube_mapping.txt"


MSVD = OfficialDataset(
    name="msvd",
    description=__doc__,
    license="not stated by the authors",
    homepage="https://www.cs.utexas.edu/~ml/clamp/videoDescription/",
    protocols=(
        Protocol(
            "captions",
            "1,200 / 100 / 670 clips, for captioning and retrieval.",
            {"train": _files("train"), "validation": _files("val"), "test": _files("test")},
            read_captions,
            {split: {"clips": last - first + 1} for split, (first, last, _) in _SPLITS.items()},
        ),
    ),
)
