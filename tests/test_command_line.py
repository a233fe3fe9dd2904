"""The command line: what is wrong with it, or with the config file that it names, is one line; its help teaches."""

import os
import pathlib
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from vlab_jax import config_file
from vlab_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]
PRETRAIN = f"--config={ROOT / 'configs' / 'pretrain.py'}"


def call(*arguments: str, cwd: pathlib.Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m vlab_jax.main`."""
    return subprocess.run(
        [sys.executable, "-m", "vlab_jax.main", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def explained(*arguments: str) -> str:
    """What is said of a command line that could not be parsed, for a reason that its text does not tell."""
    message = config_file.explain(arguments, RuntimeError("some\n  reason"))
    assert "\n" not in message
    return message


# The command itself


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/pretrain.py", "--config.foo=1"], "unknown key 'foo' in config; known: "),
        (
            ["--config=configs/pretrain.py", "--workdir=w", "--config.stage.adapt.stepz=5"],
            "unknown key 'stepz' in config.stage.adapt; did you mean 'steps'?",
        ),
        (["--config=configs/pretrain.py", "--config.seed=abc"], "config.seed is 'abc'; it must be of type int, like 0"),
        (["--config=configs/pretrain.py", "--config.dtype=fp8"], "config.dtype is 'fp8'; it must be one of float32, "),
        (["--config.seed=1", "--config=configs/pretrain.py"], "--config.seed sets a field of no config; put --config="),
        (["--config=configs/nope.py"], "there is no config file 'configs/nope.py'; "),
        (["--config=configs/pretrain.py:nope"], "configs/pretrain.py takes tiny, b32, "),
        (["--config=configs/pretrain.py"], "to train, say where checkpoints and the report go: --workdir=<directory>"),
        (["--config=configs/pretrain.py", "--wrkdir=w"], "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
        (["configs/pretrain.py"], "unexpected argument 'configs/pretrain.py'; a config is named as in --config="),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments, message):
    done = call(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1, done.stderr


def test_a_fault_in_a_worker_process_reaches_the_user_as_one_line(tmp_path):
    """No clip has 30 frames, and the iterator that says so lives in another process."""
    done = call(
        f"--config={ROOT / 'tests' / 'tiny_run.py'}",
        f"--workdir={tmp_path}",
        f"--config.data.directory={tmp_path / 'data'}",
        "--config.data.workers=1",
        "--config.frames=30",
        "--config.data.short=fail",
        XLA_FLAGS="--xla_backend_optimization_level=0",  # compiles faster, and for one device
    )
    assert done.returncode == 2 and done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower() or "traceback" in line.lower()]
    assert len(errors) == 1 and done.stderr.endswith(f"{errors[0]}\n")
    assert errors[0].startswith("error: 10 clips in a row cannot be decoded; the last: train-")


def test_help_teaches():
    done = call("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert "python -m vlab_jax.main --config=configs/pretrain.py --workdir=workdir" in done.stdout
    assert "--config.stage.blend.steps=200" in done.stdout and "Exit status: 0 done" in done.stdout
    assert [line.strip() for line in done.stdout.splitlines() if line.startswith("  --")] == [
        "--config",
        "--workdir",
        "--checkpoint",
        "--multihost",
        "--profile",
        "--replay",
    ]
    assert str(ROOT) not in done.stdout


def test_no_arguments_are_answered_with_the_help_and_one_line():
    done = call()
    assert done.returncode == 2 and "Trains and evaluates VLAB" in done.stdout
    assert done.stderr == "error: say what to run, as in --config=configs/pretrain.py (see --help)\n"


def test_a_config_is_found_by_its_absolute_path_from_any_directory(tmp_path):
    """`configs/pretrain.py` imports `configs.sizes`; a folder of that name in the working directory is not taken."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sizes.py").write_text("SIZES = {}\n")
    done = call(f"{PRETRAIN}:l14", "--config.seed=3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: to train, say where checkpoints and the report go: --workdir=<directory>\n"


# Fields set on the command line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.adapter.mixr=conv", "unknown key 'mixr' in config.model.adapter; did you mean 'mixer'?"),
        ("modle.adapter.mixer=conv", "unknown key 'modle' in config; did you mean 'model'?"),
        ("stage.adpat.steps=3", "unknown key 'adpat' in config.stage; did you mean 'adapt'?"),
        ("mixer=conv", "unknown key 'mixer' in config; did you mean config.model.adapter.mixer?"),
        ("seed.x=3", "config.seed is a field of type int; it has no fields of its own"),
        ("mesh=3", "config.mesh is a group of fields; set one of them: data, fsdp, tensor"),
        ("seed", "--config.seed lacks a value, as in --config.seed=0"),
        ("seed=1.5", "config.seed is '1.5'; it must be of type int, like 0"),
        ("seed=", "config.seed is ''; it must be of type int, like 0"),
        ("stage.adapt.weight_decay=x", "config.stage.adapt.weight_decay is 'x'; it must be of type float, like 0.05"),
        ("checkpoint.keep=two", "config.checkpoint.keep is 'two'; it must be of type int, like 3"),
        ("model.vision.pre_norm=?", "config.model.vision.pre_norm is '?'; it must be of type bool, like True"),
        ("seed=3", "some reason"),
        ("stages=adapt", "some reason"),
        ("model.vision.pre_norm", "some reason"),
    ],
)
def test_a_field_that_is_not_there_or_of_another_type_is_answered_with_what_is(override, message):
    assert explained(PRETRAIN, f"--config.{override}") == message


def test_flags_are_read_in_all_their_spellings():
    path = str(ROOT / "configs" / "pretrain.py")
    seed = "config.seed is 'abc'; it must be of type int, like 0"
    assert explained("--config", path, "--config.seed", "abc") == seed
    assert explained("-config", path, "-config.seed=abc") == seed
    assert explained(PRETRAIN, "--noconfig.model.vision.pre_nrm").endswith("did you mean 'pre_norm'?")
    assert explained("--config.seed=1").startswith("--config.seed sets a field of no config; put --config=<file>")
    assert explained("--workdir=w") == "some reason"
    assert config_file.value_of(["--config=a", "--config", "b:c", "--config.x=3"]) == "b:c"
    assert config_file.value_of(["--workdir=a"]) is None


# Config files


def written(folder: pathlib.Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return str(path)


def test_a_config_file_of_ones_own_is_loaded_with_its_argument(tmp_path):
    text = "from ml_collections import ConfigDict\ndef get_config(a='x'): return ConfigDict({'a': a})\n"
    path = written(tmp_path, text)
    assert config_file.load(path) == ConfigDict({"a": "x"})
    assert config_file.load(f"{path}:data=folder:/a") == ConfigDict({"a": "data=folder:/a"})


def test_a_config_file_imports_its_neighbours_and_leaves_the_path_as_it_was(tmp_path):
    folder = tmp_path / "my_configs"
    folder.mkdir()
    (folder / "shared_fields.py").write_text("SEED = 7\n")
    text = (
        "from my_configs.shared_fields import SEED\nfrom ml_collections import ConfigDict\n"
        "def get_config(): return ConfigDict({'seed': SEED})\n"
    )
    before = list(sys.path)
    assert config_file.load(written(folder, text)).seed == 7
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(\n", "line 1: SyntaxError: '(' was never closed"),
        ("\nimport no_such_module\n", "line 2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config():\n  x = 1\n  return undefined\n", "line 3: NameError: name 'undefined' is not defined"),
        ("def get_config():\n  return {}['key']\n", "line 2: KeyError: key"),
        ("def get_config():\n  raise TypeError\n", "line 2: TypeError: TypeError"),
        (
            "from vlab_jax.config import stage_config\ndef get_config():\n  return stage_config(stepz=3)\n",
            "line 3: unknown key 'stepz' in stage_config; did you mean 'steps'?",
        ),
        (
            "from vlab_jax.config import training_config as fields\ndef get_config():\n  fields().modle.x = 3\n",
            'line 3: AttributeError: \'modle\' Did you mean "model" instead of "modle"?',
        ),
    ],
)
def test_what_a_config_file_raises_is_one_line_with_its_place(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(InputError) as raised:
        config_file.load(path)
    assert str(raised.value) == f"{path}, {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 3\n", "{path} has no function get_config(); it is what a config file must define"),
        ("def get_config(): pass\n", "get_config() in {path} returns a NoneType; it must return a ConfigDict"),
        ("def get_config(): return {}\n", "get_config() in {path} returns a dict; it must return a ConfigDict"),
        ("def get_config(size): pass\n", "{path} needs an argument after a colon: --config={path}:<argument>"),
        ("from vlab_jax.errors import InputError\nraise InputError('not\\nthis way')\n", "not this way"),
    ],
)
def test_a_file_that_gives_no_config_is_refused_in_one_line(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(InputError) as raised:
        config_file.load(path)
    assert str(raised.value) == message.format(path=path)


def test_an_argument_that_a_config_file_does_not_take_is_refused(tmp_path):
    path = written(tmp_path, "def get_config(): pass\n")
    with pytest.raises(InputError) as raised:
        config_file.load(f"{path}:l14")
    assert str(raised.value) == f"{path} takes no argument; leave out ':l14'"


def test_a_config_file_that_is_not_there_is_answered_with_those_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "")
    for value, message in {
        "": "--config lacks a file, as in --config=configs/pretrain.py",
        "mime.py:x": "there is no config file 'mime.py'; did you mean 'mine.py'?",
        "other": "there is no config file 'other'; '.' holds: mine.py",
        str(tmp_path): f"there is no config file {str(tmp_path)!r}; {str(tmp_path)!r} holds: mine.py",
        "no/folder/x.py": "there is no config file 'no/folder/x.py'",
    }.items():
        with pytest.raises(InputError) as raised:
            config_file.load(value)
        assert str(raised.value) == message
