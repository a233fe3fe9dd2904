"""Loads the config that a command line names, with the fields that it sets: each mistake there is one line.

`ml_collections` parses the command line, loads the file and sets the fields. `config_check.py` checks the result.
Nothing heavy is imported, so that help and mistakes are shown at once, and a command can set the environment before JAX
reads it.
"""

import contextlib
import importlib.util
import itertools
import pathlib
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from vlab_jax.config import nearest
from vlab_jax.errors import InputError

FLAG = "config"
HELP = ("--help", "-help", "-h", "--helpshort", "-helpshort", "-?")


def load(value: str) -> ConfigDict:
    """The config of `path/to/file.py` or `path/to/file.py:argument`. Raises `InputError` if there is no such file, if
    it raises an exception (reported with its line), or has no `get_config` that takes such an argument and returns a
    `ConfigDict`."""
    path, colon, argument = value.partition(":")
    file = pathlib.Path(path)
    if not path:
        raise InputError(f"--{FLAG} needs a file, as in --{FLAG}=configs/pretrain.py")
    if not file.is_file():
        near = nearest(file.name, [other.name for other in file.parent.glob("*.py")])
        hint = f"; did you mean {str(file.parent / near)!r}?" if near else ""
        raise InputError(f"there is no config file {path!r}{hint}")
    try:
        with importable(value):
            spec = importlib.util.spec_from_file_location(f"{FLAG}_file", file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            config = module.get_config(*([argument] if colon else []))
    except Exception as error:  # a config file can raise anything
        raise InputError(_locate(file, error)) from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"get_config() in {path} returns a {type(config).__name__}; it must return a ConfigDict")
    return config


@contextlib.contextmanager
def importable(value: str) -> Iterator[None]:
    """A context in which a config file can import its neighbours as `configs.<name>` from any working directory."""
    root = str(pathlib.Path(value.partition(":")[0]).absolute().parent.parent)
    sys.path.insert(0, root)
    try:
        yield
    finally:
        sys.path.remove(root)


def program_flags(config: str, texts: Mapping[str, str], switches: Mapping[str, str]) -> flags.FlagValues:
    """The flags of a program with their help: `config`, texts (None by default) and switches (off by default)."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(FLAG, None, config, flag_values=values)
    for name, text in texts.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    for name, text in switches.items():
        flags.DEFINE_bool(name, False, text, flag_values=values)
    return values


def parse(arguments: Sequence[str], values: flags.FlagValues) -> None:
    """Parses a command line, the program's name first; `ml_collections` reads fields of the config from `sys.argv`. A
    mistake there or in the config file is an `InputError`."""
    value = value_of(arguments[1:])
    try:
        with importable(value or ""):
            rest = values(list(arguments))
            config = values[FLAG].value  # loads the file
    except Exception as error:  # `ml_collections` and absl raise errors of many types
        if value is not None:
            load(value)  # raises if the file is at fault, and names the line, as `ml_collections` does not
        kind = "the config has no such field: " if isinstance(error, AttributeError | KeyError) else ""
        raise InputError(f"{kind}{_one_line(error)}") from error
    if value is not None and not isinstance(config, ConfigDict):
        load(value)  # raises
    if rest[1:]:
        raise InputError(f"unexpected argument {rest[1]!r}; a config is named as in --{FLAG}=configs/pretrain.py")
    if value is None:
        raise InputError(f"name a config, as in --{FLAG}=configs/pretrain.py (see --help)")


def value_of(arguments: Sequence[str]) -> str | None:
    """The last value of `--config` among the arguments of a command line."""
    value = None
    for place, argument in enumerate(arguments):
        name, equals, rest = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == FLAG:
            value = rest if equals else "".join(arguments[place + 1 : place + 2])
    return value


def show_help(arguments: Sequence[str], about: str, values: flags.FlagValues) -> bool:
    """Prints a program's help if its command line asks for it or is empty; returns whether it asks for it."""
    asks = any(argument in HELP for argument in arguments[1:])
    if asks or not arguments[1:]:
        print(about)
        for flag in itertools.chain.from_iterable(values.flags_by_module_dict().values()):
            text = textwrap.fill(flag.help, 118, initial_indent=" " * 6, subsequent_indent=" " * 6)
            print(f"  --{flag.name}\n{text}")
    return asks


def _one_line(error: BaseException) -> str:
    """An exception's message without line breaks; its type if it has no message."""
    inner = error.args[0] if error.args else None
    if isinstance(inner, BaseException):  # `ml_collections` wraps one exception in another
        return _one_line(inner)
    message = inner if isinstance(error, KeyError) else error  # a KeyError quotes its message
    return " ".join(str(message).split()) or type(error).__name__


def _locate(file: pathlib.Path, error: Exception) -> str:
    """An exception of a config file with the file and the line; an InputError that it raises itself stands alone."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"{file}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    names = (str(file), str(file.absolute()))
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename in names]
    if isinstance(error, InputError) and (not lines or frames[-1].filename in names):
        return _one_line(error)
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return f"{file}{f', line {lines[-1]}' if lines else ''}: {kind}{_one_line(error)}"
