"""Readers of official question files: the real ones by count and content, and every fault by its line."""

import collections
import json
import pathlib

import pytest

from vlab_jax.data.schema import Question
from vlab_jax.datasets.text_files import TextFile
from vlab_jax.datasets.tgif import TASKS, read_tgif_qa
from vlab_jax.datasets.xu_qa import read_xu_qa
from vlab_jax.errors import InputError

FRAMEQA = "gif_name\tquestion\tanswer\ttype\tvid_id\tkey\tdescription"
COUNT = "gif_name\tquestion\tanswer\tvid_id\tkey"
CHOICE = "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tvid_id\tkey"
CSV = "video,width,height,question,answer,qid"


def write(folder: pathlib.Path, *lines: str, end: str = "\n", name: str = "questions.csv") -> pathlib.Path:
    path = folder / name
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def xu_qa(path: pathlib.Path) -> list[tuple[str, Question]]:
    return list(read_xu_qa(TextFile(path)))


def tgif_qa(path: pathlib.Path, task: str) -> list[tuple[str, Question]]:
    return list(read_tgif_qa(TextFile(path), task))


def refusal(read, *arguments) -> str:
    """What a reader says of a file that it refuses: one line, which begins with the file."""
    with pytest.raises(InputError) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(arguments[0]))
    return str(caught.value)


def test_msrvtt_qa_json_is_read_in_order_with_the_first_word_as_type(tmp_path):
    records = [
        {"answer": "couch", "category_id": 14, "id": 7, "question": "What are they sitting on?", "video_id": 6513},
        {"answer": " two ", "id": 8, "question": "how many are there?", "video_id": "video6514"},
        {"answer": "yes", "id": 9, "question": "is it a dog?", "video_id": 6515},
        {"answer": "man", "id": 10, "question": "who's there?", "video_id": 6515},
    ]
    path = write(tmp_path, json.dumps(records), name="val_qa.json")
    assert xu_qa(path) == [
        ("6513", Question("What are they sitting on?", "couch", "what")),
        ("video6514", Question("how many are there?", "two", "how")),
        ("6515", Question("is it a dog?", "yes", "other")),
        ("6515", Question("who's there?", "man", "who")),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"answer": "a",\n "question" "b"}]', "line 2: is not JSON"),
        ("", "line 1: is not JSON"),
        ("[" * 200_000, "is not JSON that can be read"),
        ('{"answer": "a"}', "is JSON but no list"),
        ("[]", "is a list without any entry"),
        ("[3]", "entry 1: is no object"),
        (
            '[{"answer": "a", "question": "b", "video_id": 1}, {"answer": "a", "question": "b"}]',
            "entry 2: 'video_id'",
        ),
        ('[{"answer": " ", "question": "b", "video_id": 1}]', "entry 1: 'answer' is ' '"),
        ('[{"answer": 3, "question": "b", "video_id": 1}]', "entry 1: 'answer' is 3"),
        ('[{"answer": "a", "question": "b", "video_id": true}]', "entry 1: 'video_id' is True"),
    ],
)
def test_json_that_is_no_list_of_questions_is_named_by_line_or_place(tmp_path, text, message):
    assert message in refusal(xu_qa, write(tmp_path, text, end="", name="val_qa.json"))


def test_json_that_is_not_utf8_is_named_by_its_line(tmp_path):
    path = tmp_path / "val_qa.json"
    path.write_bytes(b'[\n{"answer": "caf\xe9"}]')
    assert f"{path} line 2: is not UTF-8" in refusal(xu_qa, path)
    path.write_text('[{"answer": "\\ud83d\\ude00 \\ud83d"}]')
    assert refusal(xu_qa, path) == f"{path} holds \\ud83d, half of a surrogate pair, which is no text; mend it"


def test_a_csv_is_read_by_its_header_and_other_columns_are_ignored(tmp_path):
    path = write(tmp_path, CSV, "1201,320,240,who runs,man,5", '1202,320,240,"what, then ",dog,6', "")
    expected = [("1201", Question("who runs", "man", "who")), ("1202", Question("what, then", "dog", "what"))]
    assert xu_qa(path) == expected
    path = write(tmp_path, "question,answer,video", "who runs,man,1201", '"what, then",dog,1202')
    assert xu_qa(path) == expected


def test_byte_order_mark_crlf_and_a_last_line_without_end_do_not_matter(tmp_path):
    plain = xu_qa(write(tmp_path, CSV, "1201,1,1,who runs,caf\u00e9,5"))
    assert xu_qa(write(tmp_path, "\ufeff" + CSV, "1201,1,1,who runs,caf\u00e9,5", end="\r\n")) == plain
    assert xu_qa(write(tmp_path, f"{CSV}\r\n1201,1,1,who runs,caf\u00e9,5", end="")) == plain
    record = '{"answer": "caf\u00e9", "question": "who runs", "video_id": 1201}'
    assert xu_qa(write(tmp_path, f"\ufeff[\r\n{record}]", end="\r\n", name="val_qa.json")) == plain


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "line 1: the table has no row"),
        ([CSV], "the table has no row"),
        (["video,width,question", "1,2,who"], "line 1: the header lacks answer"),
        (["video,question,answer,video", "1,who,man,1"], "line 1: the header names a column twice"),
        ([CSV, "1,1,1,who,man,5", "1,1,1,who,man"], "line 3: has 5 columns, and the header 6"),
        ([CSV, "", "1,1,1,who, ,5"], "line 3: 'answer' is ' '"),
        ([CSV, '1,1,1,"who,man,5'], "line 2: is no row of a table"),
        ([CSV, '1,1,1,"who" runs,man,5'], "line 2: is no row of a table"),
        ([CSV, f"1,1,1,{'who' * 50_000},man,5"], "line 2: is no row of a table"),
    ],
)
def test_a_line_of_a_csv_that_cannot_be_read_is_named(tmp_path, lines, message):
    assert message in refusal(xu_qa, write(tmp_path, *lines))


def test_a_table_that_is_not_utf8_is_named_by_its_line(tmp_path):
    path = tmp_path / "questions.csv"
    path.write_bytes(f"{CSV}\n1,1,1,who,man,5\n1,1,1,who,".encode() + b"caf\xe9,6\n")
    assert f"{path} line 3: is not UTF-8" in refusal(xu_qa, path)
    path.write_bytes(CSV.encode("utf-16"))
    assert f"{path} line 1: is not UTF-8" in refusal(xu_qa, path)


def test_frameqa_is_open_ended_with_its_types_by_name(tmp_path):
    rows = [f"tumblr_{kind}\twhat is it ?\tcat\t{kind}\tFRAMEQA{kind}\t5\ta cat ." for kind in range(4)]
    kinds = ["object", "number", "color", "location"]
    expected = [(f"tumblr_{i}", Question("what is it ?", "cat", kind)) for i, kind in enumerate(kinds)]
    assert tgif_qa(write(tmp_path, FRAMEQA, *rows, end="\r\n"), "frameqa") == expected


def test_count_has_a_number_as_answer(tmp_path):
    path = write(tmp_path, COUNT, "tumblr_a\tHow many times ?\t10\tCOUNT12\t52")
    assert tgif_qa(path, "count") == [("tumblr_a", Question("How many times ?", "10", "count"))]


@pytest.mark.parametrize(("task", "mark"), [("action", "ACTION"), ("transition", "TRANS")])
def test_action_and_transition_have_five_options_of_which_the_answer_counts_from_zero(tmp_path, task, mark):
    path = write(tmp_path, CHOICE, f"tumblr_a\tWhat does he do ?\trun\tsit\tfly\teat\tjump\t4\t{mark}4\t26")
    options = ("run", "sit", "fly", "eat", "jump")
    assert tgif_qa(path, task) == [("tumblr_a", Question("What does he do ?", "jump", task, options))]


def test_quotation_marks_of_a_tab_separated_file_are_text(tmp_path):
    rows = ['a\t"what" is it ?\tcat\t0\tFRAMEQA1\t5\tb', 'a\t"what is it ?\tcat\t0\tFRAMEQA2\t5\tb']
    questions = [question.question for _, question in tgif_qa(write(tmp_path, FRAMEQA, *rows), "frameqa")]
    assert questions == ['"what" is it ?', '"what is it ?']


@pytest.mark.parametrize(
    ("task", "lines", "message"),
    [
        ("frameqa", [COUNT], "line 1: the header lacks type; it must have gif_name, question, type, answer, vid_id"),
        ("frameqa", [FRAMEQA, "a\tb\tc\t4\tFRAMEQA1\t5\td"], "line 2: 'type' is '4'; it must be a number from 0 to 3"),
        ("frameqa", [FRAMEQA, "a\tb\t\t1\tFRAMEQA1\t5\td"], "line 2: 'answer' is ''"),
        ("count", [COUNT, "a\tb\ttwo\tCOUNT1\t5"], "line 2: the answer 'two' is no count"),
        ("count", [CHOICE, "a\tb\t1\t2\t3\t4\t5\t4\tACTION1\t5"], "line 2: vid_id 'ACTION1' is of another task"),
        ("transition", [CHOICE, "a\tb\t1\t2\t3\t4\t5\t4\tACTION1\t5"], "line 2: vid_id 'ACTION1' is of another task"),
        (
            "action",
            [CHOICE, "a\tb\t1\t2\t3\t4\t5\t5\tACTION1\t5"],
            "line 2: 'answer' is '5'; it must be a number from 0",
        ),
        ("action", [CHOICE, "a\tb\t1\t\t3\t4\t5\t1\tACTION1\t5"], "line 2: 'a2' is ''"),
        ("action", [CHOICE, "a\tb\t1\t2\t3\t4\t5\t1\tACTION1"], "line 2: has 9 columns, and the header 10"),
        ("action", [CHOICE.replace("\t", ",")], "line 1: the header lacks gif_name"),
    ],
)
def test_a_line_of_tgif_qa_that_cannot_be_read_is_named(tmp_path, task, lines, message):
    assert message in refusal(tgif_qa, write(tmp_path, *lines), task)


def test_a_file_that_is_missing_or_a_folder_is_named(tmp_path):
    for path in (tmp_path / "missing.csv", tmp_path / "missing.json", tmp_path):
        assert f"{path} cannot be read" in refusal(xu_qa, path)
        assert f"{path} cannot be read" in refusal(tgif_qa, path, "count")


def test_the_official_msrvtt_qa_validation_file_is_read_whole(assets):
    questions = xu_qa(assets / "annotations" / "msrvtt_qa" / "val_qa.json")
    types = collections.Counter(question.type for _, question in questions)
    assert len(questions) == 12_278
    assert types == {"what": 8337, "who": 3439, "how": 344, "when": 106, "where": 52}
    assert questions[0] == ("6513", Question("what are three people sitting on?", "couch", "what"))
    # MSR-VTT's validation videos.
    assert {int(video) for video, _ in questions} <= set(range(6513, 7010))


@pytest.mark.parametrize(("split", "count", "videos"), [("val", 6415, (1201, 1450)), ("test", 13_157, (1451, 1970))])
def test_the_msvd_qa_files_are_read_whole_and_name_videos_of_their_split(assets, split, count, videos):
    path = assets / "annotations" / "msvd_qa" / f"{split}.csv"
    questions = xu_qa(path)
    assert len(questions) == count == path.read_bytes().count(b"\n") - 1
    numbers = {int(video) for video, _ in questions}
    assert videos[0] <= min(numbers) and max(numbers) <= videos[1]
    assert {question.type for _, question in questions} == {"what", "who", "how", "when", "where"}


@pytest.mark.parametrize(("task", "count"), [("action", 2274), ("count", 3554), ("frameqa", 13_691)])
def test_the_official_tgif_qa_test_files_are_read_whole(assets, task, count):
    path = assets / "annotations" / "tgif_qa" / f"Test_{task}_question.csv"
    questions = tgif_qa(path, task)
    assert len(questions) == count
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    assert [video for video, _ in questions] == [line.split("\t")[0] for line in lines]
    assert all(len(question.options) == (5 if task == "action" else 0) for _, question in questions)
    assert all(question.answer in question.options for _, question in questions if question.options)


def test_the_types_of_frameqa_fit_their_answers(assets):
    questions = tgif_qa(assets / "annotations" / "tgif_qa" / "Test_frameqa_question.csv", "frameqa")
    by_type = collections.defaultdict(collections.Counter)
    for _, question in questions:
        by_type[question.type][question.answer] += 1
    assert by_type["number"].most_common(1)[0][0] == "two"
    assert by_type["color"].most_common(1)[0][0] == "black"
    assert "two" not in by_type["object"] and "black" not in by_type["location"]


def test_a_file_of_another_task_is_refused_whichever_it_is(assets):
    for of_file in ("action", "count", "frameqa"):
        path = assets / "annotations" / "tgif_qa" / f"Test_{of_file}_question.csv"
        for task in set(TASKS) - {of_file}:
            refusal(tgif_qa, path, task)
