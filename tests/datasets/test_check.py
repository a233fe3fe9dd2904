"""The check of a data set before it is built: every kind of finding, the exit status, and what a later check opens."""

import collections
import csv
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import tracemalloc

import pytest
from official_folders import small_video, write_media, write_webvid

from vlab_jax.datasets.check import check, hash64, main, probe_file, probe_files
from vlab_jax.datasets.findings import Finding, status_of
from vlab_jax.errors import InputError


@pytest.fixture
def out(tmp_path) -> pathlib.Path:
    return tmp_path / "findings.tsv"


def listed(out: pathlib.Path) -> dict[str, list[tuple[str, ...]]]:
    """Split, clip, media and detail of each line, by kind."""
    found = collections.defaultdict(list)
    with open(out, encoding="utf-8", newline="") as file:
        for kind, *rest in csv.reader(file, delimiter="\t"):
            found[kind].append(tuple(rest))
    assert found.pop("kind") == [("split", "clip", "media", "detail")]
    return dict(found)


def severities(findings: list[Finding]) -> dict[str, str]:
    assert len({finding.kind for finding in findings}) == len(findings)
    return {finding.kind: finding.severity for finding in findings}


def text_of(findings: list[Finding], kind: str) -> str:
    (text,) = [finding.text for finding in findings if finding.kind == kind]
    return text


def test_a_good_folder_has_no_finding_and_intervals_past_the_end_of_a_video_are_reported(tmp_path, out, capsys):
    write_media(tmp_path / "in", "a.mp4", "b.mp4", "c.mp4")
    line = {"captions": ["a square"], "split": "train"}

    def write(*lines: dict) -> str:
        text = "\n".join(json.dumps({**line, **each}) for each in lines)
        (tmp_path / "in" / "annotations.jsonl").write_text(text)
        return f"folder:{tmp_path / 'in'}"

    spec = write({"video": "a.mp4"}, {"video": "b.mp4", "start": 0.5, "end": 1.9}, {"video": "c.mp4", "split": "test"})
    findings = check(spec, "", out, workers=1)
    assert severities(findings) == {"same caption": "note"} and status_of(findings) == 0
    assert listed(out) == {}
    assert "nothing is wrong" in capsys.readouterr().out
    spec = write(
        {"video": "a.mp4", "start": 1, "end": 2.5},
        {"video": "b.mp4", "start": 1, "end": 9},
        {"video": "c.mp4", "start": 2.5, "end": 4},
    )
    findings = check(spec, "", out, workers=1)
    assert severities(findings) == {"cut": "note", "short": "warning", "outside": "error"}
    assert listed(out) == {
        "cut": [("train", "a.mp4:1-2.5", f"{tmp_path}/in/a.mp4", "from 1 s to 2.5 s, of 2.00 s")],
        "short": [("train", "b.mp4:1-9", f"{tmp_path}/in/b.mp4", "from 1 s to 9 s, of 2.00 s")],
        "outside": [("train", "c.mp4:2.5-4", f"{tmp_path}/in/c.mp4", "from 2.5 s to 4 s, of 2.00 s")],
    }


def test_every_kind_of_finding_is_printed_and_each_single_one_listed(tmp_path, out):
    folder = tmp_path / "webvid"
    train = [(name, f"caption {name}") for name in ("11", "12", "13", "14", "15", "16", "16", "both", "../out")]
    write_webvid(folder, [*train, ("17", " ")], [("21", "Caption  11"), ("both", "x"), ("22", "y")])
    write_media(folder, "11.mp4", "x/12.avi", "15.mp4", "16.mp4", "both.mp4", "17.mp4", "21.mp4", "spare.mp4")
    (folder / "13.mp4").touch()
    (folder / "15.mp4").write_bytes(b"no video at all")
    (folder / "22.mp4").write_bytes((folder / "11.mp4").read_bytes())
    findings = check("webvid", str(tmp_path), out, workers=1)
    assert severities(findings) == {
        **dict.fromkeys(("missing", "empty", "name", "unreadable", "duplicate", "leak"), "error"),
        **{"copy": "warning", "no text": "warning", "same caption": "note", "unused": "note"},
    }
    found = listed(out)
    decoding = found.pop("unreadable")
    assert found == {
        "missing": [("train", "14", "14", "")],
        "empty": [("train", "13", f"{folder}/13.mp4", "")],
        "name": [
            (
                "train",
                "../out",
                "../out",
                "the annotations name the media '../out', which leads out of the folder; mend them",
            )
        ],
        "no text": [("train", "17", f"{folder}/17.mp4", "")],
        "duplicate": [("train", "16", "", "another clip of the split has this id")],
        "leak": [("", "", "both", "in train and validation")],
        "copy": [("", "", f"{folder}/11.mp4", "another name has the same bytes; in train and validation")],
        "unused": [("", "", f"{folder}/spare.mp4", "")],
    }
    assert [row[:3] for row in decoding] == [("train", "15", f"{folder}/15.mp4")]
    assert "cannot be decoded" in decoding[0][3]
    assert text_of(findings, "missing").startswith("1 of 13 clips (7.69%) have no media")
    assert "train 1 of 10, validation 0 of 3" in text_of(findings, "missing")
    assert "1 texts are captions in several splits: 1 captions of train, 1 captions of valid" in text_of(
        findings, "same caption"
    )


def test_media_that_may_be_missing_are_a_warning_unless_all_are(tmp_path, out, capsys):
    write_webvid(tmp_path / "webvid", [("11", "a"), ("12", "b")])
    arguments = ["--dataset=webvid", f"--manual_dir={tmp_path}", f"--out={out}", "--allow_missing", "--probe=0"]
    assert main(arguments) == 2
    write_media(tmp_path / "webvid", "11.mp4")
    assert main(arguments) == 3
    assert main(arguments[:3] + arguments[4:]) == 2
    write_media(tmp_path / "webvid", "12.mp4")
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "validation  left out: results_2M_val.csv is missing" in printed
    assert "it can be built, with these warnings" in printed and "there are errors to mend" in printed


def test_counts_are_compared_with_the_official_ones_and_unreadable_files_are_reported(tmp_path, out):
    folder = tmp_path / "tgif_qa"
    folder.mkdir()
    header = "gif_name\tquestion\tanswer\tvid_id\tkey"
    (folder / "Test_count_question.csv").write_text(f"{header}\ntumblr_1\tHow many times ?\t3\tCOUNT1\t5\n")
    (folder / "Train_count_question.csv").write_text(f"{header}\ntumblr_2\tHow many times ?\tmany\tCOUNT2\t5\n")
    findings = check("tgif_qa/count", str(tmp_path), out, probe=0.0)
    texts = [finding.text for finding in findings if finding.kind in ("counts", "annotations")]
    assert [text.split(" ")[0] for text in texts] == ["train:", "validation:", "test"]
    assert "the answer 'many' is no count" in texts[0]
    assert texts[2].startswith("test has 1 questions, and the official files have 3,554; get anew")


def test_shares_are_those_of_the_clips_that_were_read_before_an_error(tmp_path, out):
    write_webvid(tmp_path / "webvid", [("11", "a"), ("12", "b")], [("21", "c")])
    with open(tmp_path / "webvid" / "results_2M_train.csv", "a") as file:
        file.write("13,short\n")
    findings = check("webvid", str(tmp_path), out, probe=0.0)
    assert severities(findings) == {"annotations": "error", "missing": "error"}
    assert text_of(findings, "missing").startswith("3 of 3 clips (100.00%) have no media")
    assert text_of(findings, "missing").endswith("train 2 of 2, validation 1 of 1")


def test_a_killed_check_opens_only_the_media_that_it_has_not_opened(tmp_path, out, monkeypatch):
    names = [str(number) for number in range(10, 16)]
    write_webvid(tmp_path / "webvid", [(name, f"caption {name}") for name in names])
    write_media(tmp_path / "webvid", *(f"{name}.mp4" for name in names))
    program = (
        "import os, pathlib, signal, sys\n"
        "from vlab_jax.datasets import check\n"
        "check._PROBES_PER_COMMIT = 2\n"
        "def dying(paths, *arguments):\n"
        "    for number, path in enumerate(paths):\n"
        "        if number == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield check.probe_file(path)\n"
        "check.probe_files = dying\n"
        "check.check('webvid', sys.argv[1], pathlib.Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(out)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    opened = open_in_process(monkeypatch)
    assert severities(check("webvid", str(tmp_path), out)) == {}
    assert len(opened) == 2 and set(opened) < {f"{name}.mp4" for name in names}


def open_in_process(monkeypatch) -> list[str]:
    """Lets this process open the media; returns a list that gets their names."""
    opened = []

    def probe_files(paths, workers, timeout, limits):
        for path in paths:
            opened.append(pathlib.Path(path).name)
            yield probe_file(path)

    monkeypatch.setattr("vlab_jax.datasets.check.probe_files", probe_files)
    return opened


def test_a_second_check_sees_what_has_changed_and_opens_only_that(tmp_path, out, monkeypatch):
    write_webvid(tmp_path / "webvid", [("11", "a"), ("12", "b"), ("13", "c")])
    write_media(tmp_path / "webvid", "11.mp4", "12.mp4")
    opened = open_in_process(monkeypatch)
    findings = check("webvid", str(tmp_path), out)
    assert sorted(opened) == ["11.mp4", "12.mp4"] and severities(findings) == {"missing": "error"}
    write_media(tmp_path / "webvid", "a/b/c/13.mp4")
    (tmp_path / "webvid" / "12.mp4").write_bytes(b"now broken")
    findings = check("webvid", str(tmp_path), out)
    assert sorted(opened[2:]) == ["12.mp4", "13.mp4"] and severities(findings) == {"unreadable": "error"}
    write_webvid(tmp_path / "webvid", [("11", "a"), ("13", "c")])
    findings = check("webvid", str(tmp_path), out)
    assert len(opened) == 4 and severities(findings) == {"unused": "note"}


def test_a_few_unreadable_files_are_a_warning_since_a_run_goes_on_without_them(tmp_path, out):
    rows = [(str(number), "a") for number in range(100)]
    write_webvid(tmp_path / "webvid", rows)
    (tmp_path / "webvid" / "0.mp4").write_bytes(b"broken")
    for number in range(1, 100):
        (tmp_path / "webvid" / f"{number}.mp4").symlink_to(tmp_path / "webvid" / "one.bin")
    (tmp_path / "webvid" / "one.bin").write_bytes(small_video())
    assert severities(check("webvid", str(tmp_path), out, workers=1)) == {"unreadable": "warning"}


def test_memory_does_not_grow_with_the_rows(tmp_path, out):
    peaks = []
    for rows in (300, 3_000):
        write_webvid(tmp_path / "webvid", [(str(number), f"caption {number}") for number in range(rows)])
        tracemalloc.start()
        check("webvid", str(tmp_path), out, probe=0.0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 150_000, peaks  # 2,700 rows in memory would be half a million bytes at least


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset=msrvt"], "there is no data set 'msrvt' (did you mean 'msrvtt'?)"),
        (["--dataset=msrvtt/9k"], "msrvtt has no configuration '9k'"),
        (["--dataset=msrvtt"], "say where the files of msrvtt lie: --manual_dir=<directory>"),
        (["--dataset=msrvtt", "--manual_dir=nowhere"], "msrvtt: there is no directory 'nowhere'"),
        (["--dataset=msrvtt", "--manual_dir=."], "msrvtt/captioning: no annotation files in"),
        (["--dataset=motion"], "motion is rendered by this project; there is nothing to check"),
        (["--dataset=folder:nowhere"], "there is no directory"),
        (["--dataset=msrvtt", "--probe=2"], "--probe=2.0 must be from 0 to 1"),
        (["--dataset=msrvtt", "--timeout=0"], "--timeout=0.0 must be more than 0 seconds"),
        (["--dataset=msrvtt", "--out=nowhere/x.tsv"], "--out=nowhere/x.tsv: there is no directory 'nowhere'"),
    ],
)
def test_a_command_that_cannot_be_carried_out_is_one_line_and_status_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error
    assert not list(tmp_path.iterdir())


def test_the_state_of_another_program_is_not_written_over(tmp_path, out):
    write_webvid(tmp_path / "webvid", [("11", "a")])
    out.with_name(f"{out.name}.state").write_text("these are my notes, and no database at all" * 100)
    with pytest.raises(InputError, match=r"cannot be used .*or delete it$"):
        check("webvid", str(tmp_path), out, probe=0.0)


def test_real_clips_are_checked_with_all_others_reported_missing(assets, tmp_path, out):
    """The captioned clips of MSVD; a real video in place of one of DiDeMo, shorter than its moments."""
    for name in ("msvd", "didemo"):
        (tmp_path / name).mkdir()
        for file in (assets / "annotations" / name).iterdir():
            (tmp_path / name / file.name).symlink_to(file)
    for file in (assets / "videos" / "msvd").glob("*.avi"):
        (tmp_path / "msvd" / file.name).symlink_to(file)
    findings = check("msvd", str(tmp_path), out, allow_missing=True, workers=1)
    assert severities(findings) == {"missing": "warning", "same caption": "note", "unused": "note"}
    assert text_of(findings, "missing").startswith("766 of 770 clips (99.48%) have no media; they are left out")
    assert len(listed(out)["missing"]) == 766
    rows = json.loads((assets / "annotations" / "didemo" / "val_data.json").read_text())
    late = [row for row in rows if all(time == [5, 5] for time in row["times"])]
    name = late[0]["video"].rsplit(".", 1)[0]
    (tmp_path / "didemo" / f"{name}.mp4").symlink_to(assets / "videos" / "fight" / "fight" / "fi001.mp4")
    findings = check("didemo/moments", str(tmp_path), out, allow_missing=True, workers=1)
    outside = listed(out)["outside"]
    assert f"{name}:{late[0]['annotation_id']}" in [row[1] for row in outside]
    assert all(row[3].startswith("from ") for row in outside)


def test_a_probe_has_the_duration_and_a_hash_of_the_content_or_the_error(tmp_path):
    (tmp_path / "a.mp4").write_bytes(small_video())
    (tmp_path / "b.mp4").write_bytes(b"no video")
    good = probe_file(str(tmp_path / "a.mp4"))
    assert good.duration == pytest.approx(2.0, abs=0.1) and good.error == ""
    assert good.content == hash64(small_video()) != hash64(small_video(1))
    assert probe_file(str(tmp_path / "b.mp4")).error.startswith("the media cannot be decoded")
    assert "No such file" in probe_file(str(tmp_path / "c.mp4")).error


def test_a_file_that_hangs_or_whose_worker_dies_does_not_end_the_rest(tmp_path):
    names = [str(tmp_path / f"{number}.mp4") for number in range(4)]
    for name in names:
        pathlib.Path(name).write_bytes(small_video())
    os.remove(names[1])
    os.mkfifo(names[1])  # opening it waits for a writer, who does not come
    results = probe_files(iter(names), workers=1, timeout=3.0)
    probes = [next(results)]
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)  # whichever file it opens is opened once more
    probes += results
    assert [probe.error for probe in probes] == ["", "opening it crashed the decoder, or took more than 3 s", "", ""]
    assert not multiprocessing.active_children()


def test_workers_end_with_the_iteration(tmp_path):
    (tmp_path / "a.mp4").write_bytes(small_video())
    results = probe_files(iter([str(tmp_path / "a.mp4")] * 10), workers=2, timeout=30.0)
    assert next(results).error == "" and multiprocessing.active_children()
    results.close()
    assert not multiprocessing.active_children()
