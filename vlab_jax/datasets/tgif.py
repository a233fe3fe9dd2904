"""TGIF and TGIF-QA: captions of animated GIFs, and questions on them."""

import csv
import re
from collections.abc import Iterator, Mapping
from functools import partial

from vlab_jax.data.schema import Question
from vlab_jax.datasets.annotations import SPLITS, AnnotationEntry, Protocol, in_split, question_entries
from vlab_jax.datasets.official import OfficialDataset
from vlab_jax.datasets.text_files import TextFile, quoted, read_lines, read_list, read_table, text_of
from vlab_jax.errors import InputError

# The tasks of TGIF-QA, and the beginnings of the `vid_id` of their questions.
TASKS = {"frameqa": "FRAMEQA", "count": "COUNT", "action": "ACTION", "transition": "TRANS"}
# The meanings of the numbers 0 to 3 in the column `type`.
FRAMEQA_TYPES = ("object", "number", "color", "location")
_OPTIONS = ("a1", "a2", "a3", "a4", "a5")
_VALIDATION_SHARE = 0.1  # of TGIF-QA's training GIFs


def read_captions(split: str, captions: TextFile, urls: TextFile) -> Iterator[AnnotationEntry]:
    """The GIFs of a split, in its order, each with all its captions."""
    of_url: dict[str, list[str]] = {url: [] for url in read_list(urls)}
    for number, line in enumerate(read_lines(captions), start=1):
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != 2 or not fields[1]:
            raise InputError(f"{captions} line {number}: is not an address, a tab and a caption; get the file anew")
        if fields[0] in of_url:
            of_url[fields[0]].append(fields[1])
    for url, texts in of_url.items():
        name = url.rsplit("/", 1)[-1].removesuffix(".gif")
        yield AnnotationEntry(name, name, split, tuple(texts))


def read_questions(split: str, file: TextFile, task: str) -> Iterator[AnnotationEntry]:
    """The GIFs of a split, each with all its questions of a task."""
    for entry in question_entries(split, read_tgif_qa(file, task)):
        if in_split(entry.video, split, _VALIDATION_SHARE):
            yield entry


def read_tgif_qa(file: TextFile, task: str) -> Iterator[tuple[str, Question]]:
    """The questions of a task with the names of their GIFs, in the file's order; texts are stripped.

    The answer of `frameqa` is open-ended, and the type of a question is one of `FRAMEQA_TYPES`. For the other tasks the
    type is the task: the answer of `count` is a number in digits; those of `action` and `transition` are one of five
    options.

    Args:
      file: a tab-separated table, despite its name `Test_action_question.csv`.
      task: one of `TASKS`, that of the file.

    Raises:
      InputError: as `read_table`; a text is empty, a number is none, or a question is of another task.
    """
    columns = {"frameqa": ("type",), "count": ()}.get(task, _OPTIONS)
    # Nothing in these files is quoted: a quotation mark is part of a text.
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    for where, row in read_table(file, ("gif_name", "question", *columns, "answer", "vid_id"), **dialect):
        if not row["vid_id"].startswith(TASKS[task]):
            found = quoted(row["vid_id"])
            raise InputError(f"{where}: vid_id {found} is of another task than {task!r}; give the file of {task!r}")
        video, question, answer = (text_of(row, column, where) for column in ("gif_name", "question", "answer"))
        if task == "frameqa":
            yield video, Question(question, answer, FRAMEQA_TYPES[_index(row, "type", 4, where)])
        elif task == "count":
            if not re.fullmatch(r"[0-9]+", answer):
                raise InputError(f"{where}: the answer {quoted(answer)} is no count; it must be a number in digits")
            yield video, Question(question, answer, task)
        else:
            options = tuple(text_of(row, column, where) for column in _OPTIONS)
            yield video, Question(question, options[_index(row, "answer", 5, where)], task, options)


def _index(row: Mapping[str, str], column: str, count: int, where: str) -> int:
    value = row[column].strip()
    if value not in map(str, range(count)):
        raise InputError(f"{where}: {column!r} is {quoted(value)}; it must be a number from 0 to {count - 1}")
    return int(value)


def _task(task: str, description: str, train: int, test: int) -> Protocol:
    parts = dict(zip(SPLITS, ("Train", "Train", "Test"), strict=True))
    return Protocol(
        task,
        description,
        {split: f"{part}_{task}_question.csv|{part}_{task}_question.tsv" for split, part in parts.items()},
        partial(read_questions, task=task),
        {"train+validation": {"questions": train}, "test": {"questions": test}},
    )


TGIF = OfficialDataset(
    name="tgif",
    description="""TGIF: 102,068 animated GIFs of Tumblr, with one caption each, and three each in the test split.

Li et al., *TGIF: A New Dataset and Benchmark on Animated GIF Description*, CVPR 2016. From the authors' repository
`raingo/TGIF-Release`: `tgif-v1.0.tsv` (address and caption) and `splits/train.txt`, `val.txt` and `test.txt`
(addresses; 80,000 / 10,708 / 11,360). Media have the names at the end of their addresses, as in
`tumblr_nd24xaX8e61qkfwvbo1_250.gif`. For approved non-commercial research.
""",
    license="approved non-commercial research purposes",
    homepage="https://github.com/raingo/TGIF-Release",
    protocols=(
        Protocol(
            "captions",
            "The authors' split, for captioning and retrieval.",
            {
                "train": "tgif-v1.0.tsv splits/train.txt|train.txt",
                "validation": "tgif-v1.0.tsv splits/val.txt|val.txt",
                "test": "tgif-v1.0.tsv splits/test.txt|test.txt",
            },
            read_captions,
            {"train": {"clips": 80_000}, "validation": {"clips": 10_708}, "test": {"clips": 11_360}},
        ),
    ),
)

TGIF_QA = OfficialDataset(
    name="tgif_qa",
    description="""TGIF-QA: 165,165 questions on the GIFs of TGIF, in four tasks.

Jang et al., *Video Question Answering with Spatio-Temporal Reasoning*, IJCV 2019 (first CVPR 2017). From the authors'
repository `YunseokJANG/tgif-qa`: `Train_<task>_question.csv` and `Test_<task>_question.csv`, tab-separated. Media are
TGIF's, and may be in its folder. Free to use for academic purposes only.

- `frameqa` (39,392 / 13,691 questions): open-ended; the metric is the share of answers that are exactly right.
- `action` (20,475 / 2,274) and `transition` (52,704 / 6,232): one of five options.
- `count` (26,843 / 3,554): a number; the metric is the mean squared error.

There is no validation split, and many published runs select on test. Here a tenth of the training GIFs, chosen by a
hash of their names, is validation, and is taken out of training.
""",
    media_of="tgif",
    license="academic purposes only",
    homepage="https://github.com/YunseokJANG/tgif-qa",
    protocols=(
        _task("frameqa", "Open-ended questions that a frame answers.", 39_392, 13_691),
        _task("action", "What is done so many times? One of five options.", 20_475, 2_274),
        _task("transition", "What is done before or after? One of five options.", 52_704, 6_232),
        _task("count", "How many times? A number.", 26_843, 3_554),
    ),
)
