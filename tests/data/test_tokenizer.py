"""Tokenizers: any text goes in and comes out, ends are marked, and CLIP's is CLIP's."""

import json
import pathlib
import pickle
import shutil
import unicodedata
import zipfile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlab_jax.data import tokenizer as tokenizers
from vlab_jax.errors import InputError

CAPTIONS = ["a red circle moves to the left", "two blue squares grow, then one vanishes", "it's a café"] * 5
SMALL = tokenizers.train_bpe(CAPTIONS, vocab_size=320, context_length=4096)
# Unassigned characters are left out: Python and the library may be of different versions of Unicode.
TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=60)


def ids_of(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    tokens, lengths = tokenizer([text])
    return tokens[0, : lengths[0]].tolist()


def letters(text: str) -> str:
    """A text modulo case and white space; each character in lower case by itself, as the library does it."""
    lower = "".join(character.lower() for character in unicodedata.normalize("NFC", text))
    return "".join(character for character in lower if not character.isspace())


# The small one


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
@example(text="<|endoftext|>")
@example(text="Σ ΑΣ e\u0301 İ 日本語 \x00 \U0001f600")
def test_any_text_comes_back_in_lower_case(text):
    ids = ids_of(SMALL, text)
    assert ids[0] == SMALL.start and ids[-1] == SMALL.end
    assert not {SMALL.start, SMALL.end} & set(ids[1:-1]) and max(ids) < SMALL.vocab_size
    assert letters(SMALL.decode(ids)) == letters(text)


def test_white_space_is_one_blank_between_words_and_none_around_them():
    ids = ids_of(SMALL, "a red circle")
    assert ids_of(SMALL, "A\tred \n\u2003Circle") == ids
    assert SMALL.decode(ids) == SMALL.decode(ids_of(SMALL, "\n a  red circle ")) == "a red circle"


def test_frequent_words_are_one_token_and_others_are_spelled():
    assert len(ids_of(SMALL, "a red circle moves")) < len(ids_of(SMALL, "q xyz qwerty zxcvb"))
    assert len(ids_of(SMALL, "red")) == 3


def test_rows_are_padded_with_zeros_behind_their_end():
    short = tokenizers.train_bpe(CAPTIONS, 320, context_length=12)
    tokens, lengths = short(["a red circle", "", "a"])
    assert tokens.dtype == lengths.dtype == np.int32 and tokens.shape == (3, 12)
    for row, length in zip(tokens, lengths, strict=True):
        assert row[0] == short.start and row[length - 1] == short.end and not row[length:].any()
    assert lengths.tolist() == [5, 2, 3]


def test_a_long_text_is_cut_and_keeps_its_end():
    short = tokenizers.train_bpe(CAPTIONS, 320, context_length=8)
    tokens, lengths = short(["a red circle " * 20])
    assert lengths.tolist() == [8] and tokens[0, 7] == short.end and tokens[0, 0] == short.start
    assert tokens[0, 1:7].tolist() == ids_of(SMALL, "a red circle " * 20)[1:7]


def test_special_tokens_spelled_out_in_a_caption_are_plain_text():
    for text in ("<|endoftext|>", "a <|startoftext|> b", "<s></s>[CLS]"):
        ids = ids_of(SMALL, text)
        assert not {SMALL.start, SMALL.end} & set(ids[1:-1]) and SMALL.decode(ids) == text.lower()


def test_decoding_ends_at_the_first_end_and_leaves_padding_out():
    tokens, _ = SMALL(["a red circle"])
    assert SMALL.decode(tokens[0]) == "a red circle"
    assert SMALL.decode([*ids_of(SMALL, "a red circle"), *ids_of(SMALL, "two")]) == "a red circle"
    assert SMALL.decode([SMALL.end]) == SMALL.decode([]) == ""


@pytest.mark.parametrize("vocab_size", [258, 265, 300, 5000])
def test_the_vocabulary_is_no_larger_than_asked(vocab_size):
    made = tokenizers.train_bpe(CAPTIONS, vocab_size, 32)
    assert 258 <= made.vocab_size <= vocab_size
    assert sorted({made.start, made.end}) == [made.vocab_size - 2, made.vocab_size - 1]
    assert vocab_size == 5000 or made.vocab_size == vocab_size  # these captions have merges enough
    assert made.decode(ids_of(made, "Ein Kreis, 日本")) == "ein kreis, 日本"


def test_a_vocabulary_without_room_for_bytes_and_ends_is_refused():
    with pytest.raises(InputError, match=r"^vocab_size is 257; a byte-level vocabulary needs at least 258$"):
        tokenizers.train_bpe(CAPTIONS, 257, 32)


def test_training_again_gives_the_same_tokenizer():
    again = tokenizers.train_bpe(iter(CAPTIONS), 320, 4096)
    assert again.backend.to_str() == SMALL.backend.to_str()


def test_saving_and_pickling_keep_every_id(tmp_path):
    SMALL.save(tmp_path)
    loaded = tokenizers.load(tmp_path, 4096)
    sent = pickle.loads(pickle.dumps(SMALL))
    for copy in (loaded, sent):
        assert (copy.start, copy.end, copy.vocab_size, copy.context_length) == (
            SMALL.start,
            SMALL.end,
            SMALL.vocab_size,
            4096,
        )
        for text in [*CAPTIONS[:3], "Über 日本", "<|endoftext|>"]:
            assert ids_of(copy, text) == ids_of(SMALL, text)


def test_a_run_without_its_tokenizer_or_with_a_torn_one_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^[^\n]*tokenizer\.json is missing; [^\n]+$"):
        tokenizers.load(tmp_path, 32)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"^[^\n]*tokenizer\.json cannot be read: [^\n]+$"):
        tokenizers.load(tmp_path, 32)


# CLIP's


@pytest.fixture(scope="module")
def clip_folder(assets, tmp_path_factory) -> pathlib.Path:
    """A directory as CLIP's tokenizer is published."""
    folder = tmp_path_factory.mktemp("clip")
    shutil.copy(assets / "clip" / "clip_hf_vocab.json", folder / "vocab.json")
    shutil.copy(assets / "clip" / "clip_hf_merges.txt", folder / "merges.txt")
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder) -> tokenizers.Tokenizer:
    return tokenizers.load_clip(str(clip_folder), 77)


def test_ids_are_those_of_transformers_on_real_captions_and_at_the_cut(clip, clip_folder, assets):
    from transformers import CLIPTokenizer

    entries = json.loads((assets / "annotations" / "msvd" / "val.json").read_text())
    captions = [caption for entry in entries for caption in entry["caption"]][:1000]
    captions += [
        "",
        "  Hello,\n WORLD's   best ",
        "日本語 Café e\u0301",
        "naïve & co. 1234",
        "a dog " * 75,
        "x y " * 37 + "z",
    ]
    assert len(captions) == 1006
    reference = CLIPTokenizer.from_pretrained(clip_folder)
    expected = reference(captions, truncation=True, max_length=77).input_ids
    tokens, lengths = clip(captions)
    assert [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)] == expected
    assert lengths[-2] == 77 and tokens[-2, 76] == clip.end == 49407
    assert (clip.start, clip.vocab_size) == (49406, 49408)
    assert ids_of(clip, "a photo of a cat") == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_ids_of_msrvtt_captions_are_those_of_transformers(clip, clip_folder, assets):
    from transformers import CLIPTokenizer

    with zipfile.ZipFile(assets / "annotations" / "msrvtt" / "train_val_annotation.zip") as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("videodatainfo.json"))
        captions = [entry["caption"] for entry in json.loads(archive.read(name))["sentences"]][::28][:5000]
    assert len(set(captions)) > 4500
    tokens, lengths = clip(captions)
    expected = CLIPTokenizer.from_pretrained(clip_folder)(captions, truncation=True, max_length=77).input_ids
    assert [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)] == expected


def test_paragraphs_of_activitynet_that_are_longer_than_the_context_keep_their_end(clip, clip_folder, assets):
    """CLIP pools a text at its end: cut off with the rest, it would be pooled somewhere else."""
    from transformers import CLIPTokenizer

    entries = json.loads((assets / "annotations" / "activitynet" / "val_1.json").read_text()).values()
    paragraphs = [" ".join(sentence.strip() for sentence in entry["sentences"]) for entry in entries][:1500]
    uncut = CLIPTokenizer.from_pretrained(clip_folder)(paragraphs).input_ids
    tokens, lengths = clip(paragraphs)
    longer = np.array([len(ids) > 77 for ids in uncut])
    assert longer.sum() > 200 and (lengths[longer] == 77).all()
    for row, length, ids in zip(tokens, lengths, uncut, strict=True):
        assert row[:length].tolist() == [*ids[:-1][: length - 1], clip.end] and row.argmax() == length - 1


def test_clips_special_tokens_spelled_out_stay_text(clip):
    for text in ("a <|endoftext|> b", "<|startoftext|>"):
        ids = ids_of(clip, text)
        assert not {clip.start, clip.end} & set(ids[1:-1]) and len(ids) > 5
        assert clip.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_clips_tokenizer_survives_pickling(clip):
    assert ids_of(pickle.loads(pickle.dumps(clip)), "a <|endoftext|> b") == ids_of(clip, "a <|endoftext|> b")


@pytest.mark.parametrize("path", ["", "/no/such/directory", "no such name", "./a/b", "~/nothing/here/either", "a/b/c"])
def test_a_path_that_is_no_tokenizer_is_refused_in_one_line_without_asking_a_network(path):
    with pytest.raises(
        InputError, match=r"^there is no CLIP tokenizer at '[^\n]*'; tokenizer\.path must be a directory[^\n]+$"
    ):
        tokenizers.load_clip(path, 77)


def test_a_model_name_that_cannot_be_fetched_is_refused_in_one_line(monkeypatch):
    import huggingface_hub

    def offline(*_: object) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        InputError, match=r"^there is no directory 'openai/nothing', and no model of that name can be fetched; "
    ):
        tokenizers.load_clip("openai/nothing", 77)


def test_a_directory_that_lacks_files_or_holds_broken_ones_is_refused_in_one_line(tmp_path):
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(InputError, match=r"^the CLIP tokenizer directory '[^\n]+' lacks merges\.txt; put them there$"):
        tokenizers.load_clip(str(tmp_path), 77)
    (tmp_path / "merges.txt").write_text("#version\na b\n")
    with pytest.raises(InputError, match=r"^the CLIP tokenizer in '[^\n]+' cannot be read: [^\n]+$"):
        tokenizers.load_clip(str(tmp_path), 77)


def test_a_question_is_cut_the_same_with_its_answer_and_without():
    tokenizer = tokenizers.train_bpe(iter(CAPTIONS), 300, 24)
    questions = ["", "which way?", "a red circle moves to the left, and then what happens to it? " * 3]
    answers = ["left", "", "two blue squares grow, then one vanishes, then it is a café"]
    alone, lengths, ends = tokenizer.pairs(questions)
    both, totals, starts = tokenizer.pairs(questions, answers)
    assert (lengths == ends).all() and (lengths == starts).all() and totals.max() == 24 == lengths[2] + 6
    for row, (start, total) in enumerate(zip(starts, totals, strict=True)):
        assert both[row, :start].tolist() == alone[row, :start].tolist() and both[row, 0] == tokenizer.start
        assert both[row, total - 1] == tokenizer.end and not both[row, total:].any()
    assert tokenizer.decode(both[0, starts[0] :]) == "left"
    assert tokenizer.decode(both[1, starts[1] :]) == ""


def test_letters_that_no_caption_has_taught_are_told_from_those_that_were():
    learned = tokenizers.train_bpe(["ein größerer Kreis", "红色的圆"] * 20, 400, 16)
    assert learned.unknown_letters("A größere red circle, 红圆? 42!") == ""
    assert learned.unknown_letters("蓝色 ö Ж蓝 x") == "蓝ж"
