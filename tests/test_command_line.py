"""The command line: a mistake on it, or in the config file that it names, is one line; its help teaches."""

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


def parsed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> ConfigDict:
    """The config of a command line with the flags `config` and `workdir`."""
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # ml_collections' name for the file before
    monkeypatch.setattr(sys, "argv", ["program", *arguments])  # where ml_collections looks for fields
    values = config_file.program_flags("", {"workdir": ""}, {})
    config_file.parse(sys.argv, values)
    return values.config


def refusal(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The message about a command line, which is one line."""
    with pytest.raises(InputError) as raised:
        parsed(monkeypatch, *arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# The command itself


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/pretrain.py", "--config.dtype=fp8"], "config.dtype is 'fp8'; it must be one of float32, "),
        (["--config=configs/pretrain.py"], "to train, say where checkpoints and the report go: --workdir=<directory>"),
        (["--config=configs/nope.py"], "there is no config file 'configs/nope.py'; "),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments, message):
    done = call(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.seed=1", PRETRAIN], "Found --config.seed=1 in argv before a value for --config was specified"),
        ([f"{PRETRAIN}:nope"], "configs/pretrain.py takes tiny, b32, "),
        ([PRETRAIN, "--wrkdir=w"], "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
        (["configs/pretrain.py"], "unexpected argument 'configs/pretrain.py'; a config is named as in --config="),
        (["--config"], "--config needs a file, as in --config=configs/pretrain.py"),
        (["--workdir=w"], "name a config, as in --config=configs/pretrain.py (see --help)"),
        ([PRETRAIN, "--workdir"], "Missing value for flag --workdir"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_in_one_line(monkeypatch, arguments, message):
    assert refusal(monkeypatch, *arguments).startswith(message)


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
        "--replay",
        "--multihost",
        "--profile",
    ]
    assert str(ROOT) not in done.stdout


def test_no_arguments_are_answered_with_the_help_and_one_line():
    done = call()
    assert done.returncode == 2 and "Trains and evaluates VLAB" in done.stdout
    assert done.stderr == "error: name a config, as in --config=configs/pretrain.py (see --help)\n"


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
        ("foo=1", "the config has no such field: 'foo'"),
        ("model.adapter.mixr=conv", 'the config has no such field: \'mixr\' Did you mean "mixer" instead of "mixr"?'),
        (
            "modle.adapter.mixer=conv",
            'the config has no such field: \'modle\' Did you mean "model" instead of "modle"?',
        ),
        ("stage.adpat.steps=3", 'the config has no such field: \'adpat\' Did you mean "adapt" instead of "adpat"?'),
        ("seed.x=3", "the config has no such field: Attribute <class 'int'>.x does not exist "),
        ("mesh=3", "flag --config.mesh=3: Failed to parse '3' as a ConfigDict"),
        ("seed", "Missing value for flag --config.seed"),
        ("seed=1.5", "flag --config.seed=1.5: invalid literal for int() with base 10: '1.5'"),
        ("seed=", "flag --config.seed=: invalid literal for int() with base 10: ''"),
        (
            "stage.adapt.weight_decay=x",
            "flag --config.stage.adapt.weight_decay=x: could not convert string to float: 'x'",
        ),
        (
            "model.vision.pre_norm=?",
            "flag --config.model.vision.pre_norm=?: ('Non-boolean argument to boolean flag', '?')",
        ),
    ],
)
def test_a_field_that_does_not_exist_or_has_another_type_is_named_in_one_line(monkeypatch, override, message):
    assert refusal(monkeypatch, PRETRAIN, f"--config.{override}").startswith(message)


def test_flags_are_read_in_all_their_spellings(monkeypatch):
    path = str(ROOT / "configs" / "pretrain.py")
    assert parsed(monkeypatch, "--config", path, "--config.seed", "3").seed == 3
    assert parsed(monkeypatch, f"-config={path}", "-config.seed=3").seed == 3
    made = parsed(
        monkeypatch, PRETRAIN, "--noconfig.model.vision.pre_norm", "--config.evaluation.tasks=('captioning',)"
    )
    assert made.model.vision.pre_norm is False and made.evaluation.tasks == ("captioning",)
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
        ("x = 3\n", "{path}: AttributeError: module 'config_file' has no attribute 'get_config'"),
        ("def get_config(): pass\n", "get_config() in {path} returns a NoneType; it must return a ConfigDict"),
        ("def get_config(): return {}\n", "get_config() in {path} returns a dict; it must return a ConfigDict"),
        (
            "def get_config(size): pass\n",
            "{path}: TypeError: get_config() missing 1 required positional argument: 'size'",
        ),
        ("from vlab_jax.errors import InputError\nraise InputError('not\\nthis way')\n", "not this way"),
    ],
)
def test_a_file_that_gives_no_config_is_refused_in_one_line(tmp_path, monkeypatch, text, message):
    path = written(tmp_path, text)
    with pytest.raises(InputError) as raised:
        config_file.load(path)
    assert str(raised.value) == message.format(path=path)
    assert refusal(monkeypatch, f"--config={path}") == message.format(path=path)


def test_an_argument_that_a_config_file_does_not_take_is_refused(tmp_path):
    path = written(tmp_path, "def get_config(): pass\n")
    with pytest.raises(InputError) as raised:
        config_file.load(f"{path}:l14")
    assert str(raised.value) == f"{path}: TypeError: get_config() takes 0 positional arguments but 1 was given"


def test_a_config_file_that_does_not_exist_is_answered_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "")
    for value, message in {
        "": "--config needs a file, as in --config=configs/pretrain.py",
        "mime.py:x": "there is no config file 'mime.py'; did you mean 'mine.py'?",
        "other": "there is no config file 'other'",
        str(tmp_path): f"there is no config file {str(tmp_path)!r}",
        "no/folder/x.py": "there is no config file 'no/folder/x.py'",
    }.items():
        with pytest.raises(InputError) as raised:
            config_file.load(value)
        assert str(raised.value) == message
