"""Captions of any kind go through the tokenizers, the schema, the files of captioning and the report unharmed."""

import html.parser
import json

import numpy as np
import pytest

from vlab_jax.data import schema
from vlab_jax.data import tokenizer as tokenizers
from vlab_jax.datasets import registry
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.errors import InputError
from vlab_jax.evaluation import captioning, report, sheets

CAPTIONS = {
    "empty": "",
    "blank": " \t ",
    "long": "word " * 10_000,
    "one long word": "x" * 50_000,
    "emoji": "😀👩\u200d👩\u200d👧 🏳️\u200d🌈",
    "right to left": "רכב נוסע ברחוב، سيارة",
    "marks that turn": "\u202egnp.exe\u202c \u2066a\u2069",
    "control": "a\0b\x07c\x1b[31md\x7f",
    "lines": "a man\nruns\r\naway\u2028now\x85then",
    "end of text": "<|endoftext|> a dog <|startoftext|>",
    "separators": "a ||| dog|||runs",
    "zero width": "a\u200bdog\ufeff\u2060",
    "combining": "e\u0301" * 50 + "\u0336" * 50,
    "markup": "<script>alert('x')</script> &amp; \"quoted\"",
    "formulas": "=cmd|' /C calc'!A0",
    "outside the plane": "\U0010ffff\ufffe\uffff",
}


@pytest.fixture(scope="module", params=["own", "clip"])
def tokenizer(request, tmp_path_factory):
    if request.param == "own":
        return tokenizers.train_bpe(["a man slices bread", "a dog runs"] * 4, 300, 16)
    assets, folder = request.getfixturevalue("assets"), tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").symlink_to(assets / "clip/clip_hf_vocab.json")
    (folder / "merges.txt").symlink_to(assets / "clip/clip_hf_merges.txt")
    return tokenizers.load_clip(str(folder), 16)


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_caption_becomes_tokens_with_one_start_and_one_end(tokenizer, name):
    tokens, (length,) = tokenizer([CAPTIONS[name]])
    ids = tokens[0, :length].tolist()
    assert ids[0] == tokenizer.start and ids[-1] == tokenizer.end and 2 <= length <= 16
    assert not {tokenizer.start, tokenizer.end} & set(ids[1:-1])
    assert all(0 <= token < tokenizer.vocab_size for token in ids) and not tokens[0, length:].any()
    tokenizer.decode(ids).encode()
    tokens, lengths, starts = tokenizer.pairs([CAPTIONS[name]], [CAPTIONS[name]])
    assert (tokens[0] == tokenizer.end).sum() == 1 and 1 <= starts[0] < lengths[0] <= 16


def test_captions_of_a_folder_come_back_as_they_were(tmp_path):
    captions = [caption for caption in CAPTIONS.values() if caption.strip()]
    question = {"question": CAPTIONS["lines"], "answer": CAPTIONS["emoji"], "options": captions}
    line = {"video": "a.mp4", "captions": captions, "split": "train", "questions": [question]}
    (tmp_path / "a.mp4").write_bytes(b"\0bytes")
    (tmp_path / "annotations.jsonl").write_text(json.dumps(line))
    (example,) = registry.open_split(f"folder:{tmp_path}", "train", BuildOptions(str(tmp_path / "data")))
    clip = schema.from_example(example)
    assert clip.captions == tuple(captions) and clip.media == b"\0bytes"
    assert clip.questions == (schema.Question(CAPTIONS["lines"], CAPTIONS["emoji"], "open", tuple(captions)),)


def test_files_of_captions_are_json_with_a_line_break_nowhere_in_a_caption(tmp_path):
    predictions = dict(CAPTIONS)
    captioning.save_coco(tmp_path, predictions, {name: ["a dog", caption] for name, caption in CAPTIONS.items()})
    saved = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    assert {each["image_id"] for each in saved} == set(CAPTIONS)
    assert not any(set("\n\r\0\u2028\x85") & set(each["caption"]) for each in saved)
    for separator in ("|||", "EVAL"):
        assert "\n" not in captioning._field(captioning._clean(f"a{separator}\nb"))


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)


def test_a_report_shows_texts_as_texts(tmp_path):
    rows = {CAPTIONS["markup"]: {"text_to_video/R@1": 50.0}}
    report.write_page(tmp_path, tmp_path / "none.jsonl", rows, title=CAPTIONS["markup"])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "script" not in Tags(page).tags and "&lt;script&gt;" in page


def test_sheets_are_drawn_with_any_text_on_them(tmp_path):
    frames = np.full((4, 32, 32, 3), 90, np.uint8)
    samples = [
        sheets.Sample(caption, frames, [(caption, sheets.INK), (caption, sheets.GREEN)])
        for caption in CAPTIONS.values()
    ]
    sheets.sample_sheet(tmp_path / "samples.png", samples)
    assert (tmp_path / "samples.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "change",
    [
        {"added_tokens": [{"id": 2**31, "content": "x"}]},
        {"truncation": {"max_length": 1, "strategy": "LongestFirst", "stride": 5, "direction": "Left"}},
        {"model": {"type": "BPE", "vocab": {"a": 7}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
        {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "u"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
        {"pre_tokenizer": {"type": "NoSuch"}},
        {"decoder": 7},
        {"version": "9.0"},
    ],
)
def test_a_tokenizer_with_something_wrong_in_it_is_refused_in_one_line_or_works(change, tmp_path):
    tokenizers.train_bpe(["a dog"] * 4, 300, 16).save(tmp_path)
    file = tmp_path / tokenizers.FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    try:
        loaded = tokenizers.load(tmp_path, 16)
    except InputError as error:
        assert str(error).startswith(f"{file} cannot be ") and "\n" not in str(error) and len(str(error)) < 500
    else:
        for caption in CAPTIONS.values():
            loaded([caption])
