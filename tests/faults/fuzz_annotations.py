"""Damages annotation files in many ways and reads them: a report must name each line that is not accepted.

    PYTHONPATH=. python tests/faults/fuzz_annotations.py --lines=10000 --files=2000 --seed=0

The lines belong to the `annotations.jsonl` of a `folder` data set; the files are small ones in the formats of the
official data sets, or, with VLAB_TEST_ASSETS, the beginnings of the real ones. All damage follows from the seed. The
exit status is 0 if there is no finding: no exception but `InputError`, and no line that is neither accepted nor named.
"""

import argparse
import collections
import copy
import functools
import itertools
import json
import os
import pathlib
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlab_jax.data import schema
from vlab_jax.datasets.annotations import AnnotationSource
from vlab_jax.datasets.folder import ANNOTATIONS, read_annotations
from vlab_jax.datasets.media_index import checked_name
from vlab_jax.datasets.registry import find
from vlab_jax.errors import InputError

LINES_PER_FILE = 40  # a report shows fifty problems at most, and a line may have more than one
TEXTS = (
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "a\nb",
        "a\rb",
        "\u2028",
        "\ufeff",
        "😀👩‍👩‍👧‍👦",
        "שלום עולם",
        "\u202egnp",
        "e\u0301" * 50,
    ),
    *("\ud800", "x\udfff", "\u200b", "<|endoftext|>", "<|startoftext|>", "a|||b", "x" * 100_000, "word " * 10_000),
    *("../a.mp4", "/etc/passwd", "a/../../b", "..\\a", "C:\\a.mp4", "\\\\host\\a", "file:a.mp4", "file:///etc/passwd"),
    *("http://127.0.0.1/a.mp4", "~/a.mp4", "$(touch x)", "-i", "|ls", "a" * 5000, "/".join("a" * 3000), "con", "."),
)
NUMBERS = (0, -1, 1, 2**31, 2**63, 10**400, -(10**400), 1e308, -0.0, 0.1, float("nan"), float("inf"), -float("inf"))
VALUES: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"a": {}}, [None], *NUMBERS, *TEXTS)
# Values as bytes, to be inserted into a line of JSON.
SPELLED = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"0x10", b"01", b"1" * 5000, b"[" * 100_000, b'{"a":' * 5000)
BYTES = (
    *(b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x00", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\x1a"),
    *(b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\t", b"\xe2\x80\xa8", b"\\ud800", b"\\u0000", b";"),
)


def choose(choices: Any, rng: np.random.Generator) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container within a value, with each of its keys or indices."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _places(inner)


def changed_value(value: Any, rng: np.random.Generator) -> Any:
    """A copy in which something is changed, removed, repeated or renamed."""
    value = copy.deepcopy(value)
    for _ in range(int(rng.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return choose(VALUES, rng)
        container, key = choose(places, rng)
        how = int(rng.integers(5))
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, dict):
            container[str(choose(TEXTS, rng))[:50]] = container.pop(key)
        elif how == 2 and isinstance(container, list):
            container.append(container[key])
        else:
            container[key] = choose(VALUES, rng)
    return value


def changed_bytes(line: bytes, rng: np.random.Generator) -> bytes:
    """The line with bytes inserted, flipped, removed or doubled, or cut off."""
    for _ in range(int(rng.integers(1, 4))):
        place, other = sorted(int(each) for each in rng.integers(0, len(line) + 1, 2))
        how = int(rng.integers(6))
        if how == 0:
            line = line[:place] + choose(BYTES, rng) + line[place:]
        elif how == 1 and line:
            line = line[: place - 1] + bytes([line[place - 1] ^ 1 << int(rng.integers(8))]) + line[place:]
        elif how == 2:
            line = line[:place] + line[other:]
        elif how == 3:
            line = line[:other] + line[place:]
        elif how == 4:
            line = line[:place]
        else:
            line = line[:place] + choose(SPELLED, rng) + line[place:]
    return line


def folder_line(rng: np.random.Generator) -> bytes:
    """A line of `annotations.jsonl`, mostly damaged."""
    clip = {"video": "a.mp4", "id": str(int(rng.integers(10**9))), "captions": ["a man slices bread", "bread"]}
    if rng.random() < 0.5:
        clip |= {"start": 1, "end": 2.5, "split": "train"}
        clip["questions"] = [{"question": "what?", "answer": "bread", "type": "what", "options": ["bread", "wood"]}]
    if rng.random() < 0.6:
        clip = changed_value(clip, rng)
    line = json.dumps(clip, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1 and isinstance(clip, dict):
        line = line[:-1] + b', "captions": ["again"]}'
    if rng.random() < 0.5:
        line = changed_bytes(line, rng)
    return line.replace(b"\n", b" ")


def check_folder_lines(lines: list[bytes], folder: pathlib.Path) -> tuple[int, int]:
    """Reads a file of these lines; returns how many were accepted and how many named.

    Raises `AssertionError` if a line is neither, and any exception of the reader but `InputError`.
    """
    (folder / "a.mp4").write_bytes(b"bytes")
    first = rb'{"video": "a.mp4", "id": "first", "captions": ["x"], "split": "train"}'
    (folder / ANNOTATIONS).write_bytes(b"\n".join([first, *lines]))
    named = set()
    try:
        rows = read_annotations(folder)
    except InputError as error:
        report = str(error)
        report.encode()
        assert "and " not in report.split("\n")[-1][:4] or len(report.split("\n")) > 50
        named = {int(number) for number in re.findall(rf"(?m)(?:^|: ){re.escape(ANNOTATIONS)} line (\d+): ", report)}
        assert named, report
        if report.split("\n")[-1].startswith("and "):  # the report is full: what it does not show, the halves do
            half = len(lines) // 2
            parts = [check_folder_lines(part, folder) for part in (lines[:half], lines[half:])]
            return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]
        kept = [line for number, line in enumerate(lines, start=2) if number not in named]
        (folder / ANNOTATIONS).write_bytes(b"\n".join([first, *kept]))
        rows = read_annotations(folder)  # what is not named is accepted
    for row in rows:
        for text in (row.id, row.video, *row.captions, *(each for q in row.questions for each in _question_texts(q))):
            text.encode()
        assert (folder / row.video).resolve().is_relative_to(folder.resolve()) and "\n" not in row.id
    return len(rows) - 1, len(named)


def _question_texts(question: schema.Question) -> tuple[str, ...]:
    return (question.question, question.answer, question.type, *question.options)


_DIDEMO = json.dumps(
    [{"video": f"{i}.mov", "description": "a dog", "times": [[0, 1], [1, 1]], "annotation_id": i} for i in range(4)]
)
_MSRVTT = json.dumps(
    {
        "videos": [{"video_id": f"video{i}", "split": "test"} for i in range(3)],
        "sentences": [{"video_id": f"video{i}", "caption": "a dog", "sen_id": i} for i in range(3)],
    }
)
# A small file of each format, by spec, split and name; and files that must be beside one.
SAMPLES = {
    ("didemo/paragraphs", "validation", "val_data.json"): _DIDEMO,
    ("didemo/moments", "validation", "val_data.json"): _DIDEMO,
    ("activitynet", "test", "val_1.json"): (
        '{"v_1": {"duration": 9.5, "timestamps": [[0, 4.5]], "sentences": ["A dog.", " A cat."]}}'
    ),
    ("msrvtt/captioning", "test", "test_videodatainfo.json"): _MSRVTT,
    ("msrvtt/retrieval_9k", "test", "MSRVTT_JSFUSION_test.csv"): (
        'key,vid_key,video_id,sentence\nret0,msr9770,video9770,a dog\nret1,msr9771,video9771,"a, b"\n'
    ),
    ("msvd", "train", "youtube_mapping.txt"): "a_1_2 vid1\nb_1_2 vid2\n",
    ("msvd_qa", "validation", "val.csv"): "video,question,answer,type\n1201,what is it,dog,1\n1202,who runs,man,2\n",
    ("msrvtt_qa", "validation", "val_qa.json"): (
        '[{"answer": "dog", "category_id": 1, "id": 1, "question": "what is it?", "video_id": 6513}]'
    ),
    ("vatex", "validation", "val.json"): '[{"videoID": "a_000001_000011", "enCap": ["a", "b"]}]',
    ("webvid", "validation", "results_2M_val.csv"): (
        'videoid,contentUrl,duration,page_dir,name\n1,https://example.org/1.mp4,PT9S,0_5,"a dog, running"\n'
    ),
    ("image_text", "train", "train.tsv"): "filepath\ttitle\na/1.jpg\ta dog\nb/2.jpg\ta cat\n",
    ("tgif", "test", "tgif-v1.0.tsv"): "https://example.org/a.gif\ta dog\nhttps://example.org/b.gif\ta cat\n",
    ("tgif_qa/frameqa", "test", "Test_frameqa_question.csv"): (
        "gif_name\tquestion\tanswer\ttype\tvid_id\tkey\na\twhat is it\tdog\t0\tFRAMEQA1\t1\n"
    ),
    ("tgif_qa/action", "test", "Test_action_question.csv"): (
        "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tvid_id\tkey\na\twhat\tb\tc\td\te\tf\t2\tACTION1\t1\n"
        "g\twhat does it\tb\tc\td\te\tf\t0\tACTION2\t2\n"
    ),
}
BESIDE = {
    "youtube_mapping.txt": ("AllVideoDescriptions.txt", "a_1_2 a dog\na_1_2 a cat\nb_1_2 a dog\n"),
    "tgif-v1.0.tsv": ("test.txt", "https://example.org/a.gif\n"),
}


@functools.cache
def sample(spec: str, split: str, name: str, assets: str) -> bytes:
    """The small file, or twenty records of the real one, if the assets have it."""
    real = pathlib.Path(assets, "annotations", spec.partition("/")[0])
    if not assets or not (path := next(real.glob(f"{name}*"), None)):
        return SAMPLES[spec, split, name].encode()
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            content = archive.read(archive.namelist()[0])
    else:
        content = path.read_bytes()
    if not name.endswith(".json"):
        return b"\n".join(content.split(b"\n")[:21]) + b"\n"
    value = json.loads(content)
    if isinstance(value, dict) and "videos" in value:
        value = {"videos": value["videos"][:20], "sentences": value["sentences"][:20]}
    elif isinstance(value, dict):
        value = dict(list(value.items())[:20])
    else:
        value = value[:20]
    return json.dumps(value).encode()


def changed_file(content: bytes, is_json: bool, rng: np.random.Generator) -> bytes:
    """An official file, damaged."""
    if is_json and rng.random() < 0.6:
        value = changed_value(json.loads(content), rng)
        return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if is_json or rng.random() < 0.5:
        return changed_bytes(content, rng)
    lines = content.split(b"\n")
    place, separator = int(rng.integers(len(lines))), b"\t" if b"\t" in content else b","
    fields = lines[place].split(separator)
    column, how = int(rng.integers(len(fields))), int(rng.integers(5))
    if how == 0:
        del fields[column]
    elif how == 1:
        fields.insert(column, b"one more")
    elif how == 2:
        lines.insert(place, lines[place])
    else:
        fields[column] = str(choose([*TEXTS, *NUMBERS], rng)).encode("utf-8", "surrogatepass")
    lines[place] = separator.join(fields)
    return (b"\r\n" if rng.random() < 0.2 else b"\n").join(lines)


def check_file(spec: str, split: str, name: str, content: bytes, folder: pathlib.Path) -> bool:
    """Whether the file was accepted. Any exception is a finding."""
    folder = folder / re.sub(r"\W", "_", f"{spec} {name}")
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    if name in BESIDE:
        other, text = BESIDE[name]
        (folder / other).write_text(text)
    dataset, config = find(spec)
    try:
        entries = list(AnnotationSource(spec, dataset.protocol(config), [folder]).read(split))
    except InputError as error:
        message = str(error)
        message.encode()
        assert name in message and len(message) < 2000, message[:2000]
        return False
    for entry in entries:
        for text in (entry.id, *entry.captions, *(each for q in entry.questions for each in _question_texts(q))):
            text.encode()
        try:
            assert ".." not in checked_name(entry.video).split("/")
        except InputError as error:  # as when the media are looked up
            assert "\n" not in str(error)
    return True


def run(lines: int, files: int, seed: int, assets: str) -> dict[str, Any]:
    """Returns counts and findings."""
    counts, findings = collections.Counter(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for number in range(0, lines, LINES_PER_FILE):
            rng = np.random.default_rng([seed, 0, number])
            batch = [folder_line(rng) for _ in range(min(LINES_PER_FILE, lines - number))]
            try:
                accepted, named = check_folder_lines(batch, folder)
                counts.update({"lines accepted": accepted, "lines named": named})
                blank = sum(not line.strip() for line in batch)
                counts["lines blank"] += blank
                assert accepted + named + blank == len(batch), "a line is neither accepted nor named"
            except Exception as error:  # the finding
                findings.append(f"lines from {number}: {type(error).__name__}: {error}"[:500])
        for number, which in zip(range(files), itertools.cycle(SAMPLES), strict=False):
            rng = np.random.default_rng([seed, 1, number])
            try:
                content = changed_file(sample(*which, assets), which[-1].endswith("json"), rng)
                counts["files accepted" if check_file(*which, content, folder) else "files refused"] += 1
            except Exception as error:  # the finding
                findings.append(f"file {number} ({which}): {type(error).__name__}: {error}"[:500])
    return {"seed": seed, **counts, "findings": findings}


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--files", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    result = run(given.lines, given.files, given.seed, os.environ.get("VLAB_TEST_ASSETS", ""))
    print(json.dumps(result, indent=1))
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
