"""Data sets by name: preparing, opening, refusing; without TensorFlow, and in two processes at once."""

import collections
import os
import pathlib
import pickle
import subprocess
import sys

import pytest

from vlab_jax.data.schema import from_example
from vlab_jax.datasets import build, registry
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.datasets.registry import open_split, prepare
from vlab_jax.errors import InputError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    """A directory in which `motion/tiny` is prepared."""
    path = str(tmp_path_factory.mktemp("data"))
    prepare("motion/tiny", BuildOptions(path))
    return path


def test_a_prepared_data_set_has_its_splits_and_is_read_in_the_schema(data_dir):
    counts = {"train": 48, "validation": 16, "test": 16}
    for split, count in counts.items():
        source = open_split("motion/tiny", split, BuildOptions(data_dir))
        clips = [from_example(source[i]) for i in range(len(source))]
        assert len({clip.id for clip in clips}) == len(clips) == count
        types = [collections.Counter(q.type for q in clip.questions) for clip in clips]
        assert {each["twin"] for each in types} == {0 if split == "train" else 1}
        # Of training clips all is asked: the count, and of each shape the colour and the kind.
        assert {each["appearance"] for each in types} == ({3, 5} if split == "train" else {1})
        assert sum(types, collections.Counter()).keys() >= {"motion", "order"}
        assert all(len(set(clip.questions)) == len(clip.questions) for clip in clips)
        assert all(len(clip.captions) == 4 and clip.media[4:8] == b"ftyp" for clip in clips)


def test_stills_prepare_with_their_own_splits(data_dir):
    source = open_split("motion/tiny_still", "validation", BuildOptions(data_dir))
    clips = [from_example(source[i]) for i in range(len(source))]
    assert len(clips) == 16 and all(clip.media.startswith(b"\xff\xd8") for clip in clips)


def test_preparing_again_reuses_the_files(data_dir, capfd):
    builder = prepare("motion/tiny", BuildOptions(data_dir))
    files = {path: path.stat().st_mtime_ns for path in pathlib.Path(builder.data_dir).iterdir()}
    capfd.readouterr()
    again = prepare("motion/tiny", BuildOptions(data_dir))
    assert again.data_dir == builder.data_dir
    assert {path: path.stat().st_mtime_ns for path in pathlib.Path(again.data_dir).iterdir()} == files
    assert sum(path.name.count(".array_record") for path in files) == 3
    assert capfd.readouterr() == ("", "")


def test_preparing_shows_one_bar_and_nothing_else(tmp_path, capfd):
    prepare("motion/tiny_still", BuildOptions(str(tmp_path)))
    out, err = capfd.readouterr()
    assert out == ""
    assert "80/80" in err and all("preparing motion/tiny_still" in line for line in err.splitlines() if line)


def test_leftovers_of_a_killed_build_are_removed(tmp_path):
    left = tmp_path / "motion" / "tiny_still" / "incomplete.ABCDEF_2.1.0"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"0")
    assert len(open_split("motion/tiny_still", "train", BuildOptions(str(tmp_path)))) == 48
    assert not left.exists()


def test_a_data_source_survives_pickling(data_dir):
    source = open_split("motion/tiny", "test", BuildOptions(data_dir))
    first = from_example(source[0])
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == len(source) and from_example(copy[0]) == first


def test_the_directory_may_be_relative(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = open_split("motion/tiny", "test", BuildOptions(os.path.relpath(data_dir)))
    monkeypatch.chdir("/")
    assert from_example(pickle.loads(pickle.dumps(source))[3]).captions


def test_no_directory_means_the_default_of_tfds(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    assert len(open_split("motion/tiny", "test", BuildOptions(""))) == 16
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tensorflow_datasets").symlink_to(data_dir)
    found = pathlib.Path(prepare("motion/tiny", BuildOptions("")).data_dir)
    assert found.is_relative_to(pathlib.Path(data_dir).resolve())
    assert [path.name for path in tmp_path.iterdir()] == ["tensorflow_datasets"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("moton", ["'moton'", "did you mean 'motion'", "folder:path/to/directory"]),
        ("", ["no data set ''", "known: motion"]),
        ("nothing/alike", ["no data set 'nothing'", "known: motion"]),
        ("motion/stil", ["'stil'", "did you mean 'still'", "video, large, still, glyphs, glyphs_still, tiny"]),
        ("motion/", ["no configuration ''", "video, large, still"]),
        ("motion:/somewhere", ["no configuration", "video, large, still"]),
        ("folder", ["lacks its directory", "folder:path/to/directory"]),
        ("folder:", ["lacks its directory"]),
        ("folder/clips", ["lacks its directory"]),
    ],
)
def test_a_name_that_is_not_known_is_refused_in_one_line(spec, words, tmp_path):
    with pytest.raises(InputError) as caught:
        prepare(spec, BuildOptions(str(tmp_path)))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not list(tmp_path.iterdir())


def test_the_documentation_and_the_help_name_every_data_set():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
    for family in registry.DATASETS.values():
        specs = [f"{family.name}/{config}" for config in family.configs]
        documented = [spec for spec in specs if f"`{spec}`" in page]
        # The default may be documented by the name alone; `motion` has more configurations, for tests.
        assert documented or f"`{family.name}" in page
        assert len(documented) >= len(specs) - 1 or family.name == "motion", specs
    help_text = build.make_parser().format_help()
    assert all(spec in help_text for spec in registry.known_specs())


def test_an_unknown_split_is_refused_and_the_known_ones_are_named(data_dir):
    with pytest.raises(InputError, match=r"'motion/tiny' has no split 'dev'; it has: .*train.*"):
        open_split("motion/tiny", "dev", BuildOptions(data_dir))


def test_two_processes_prepare_the_same_data_at_once_and_import_no_tensorflow(tmp_path):
    # A package of that name that can be imported, so that an attempt would be seen.
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("")
    program = (
        "import importlib.util, sys\n"
        "from vlab_jax.datasets.registry import open_split\n"
        "from vlab_jax.datasets.records import BuildOptions\n"
        "assert importlib.util.find_spec('tensorflow')\n"
        "examples = list(open_split('motion/tiny', 'test', BuildOptions(sys.argv[1])))\n"
        "assert 'tensorflow' not in sys.modules, 'TensorFlow was imported'\n"
        "print(sum(len(example['media']) for example in examples))\n"
    )
    path = os.pathsep.join([str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", program, str(tmp_path / "data")]
    environment = {**os.environ, "PYTHONPATH": path}
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    assert printed[0][0] == printed[1][0] and int(printed[0][0]) > 16 * 1000
    # One of them built, the other waited.
    assert sum("preparing" in err for _, err in printed) == 1
