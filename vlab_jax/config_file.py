"""Loads the config file that a command line names; what is wrong with either is one line.

`ml_collections` parses the command line, loads the file and sets the fields.
"""

import contextlib
import importlib.util
import logging
import pathlib
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from vlab_jax.config import nearest
from vlab_jax.errors import InputError

FLAG = "config"
HELP = ("--help", "-help", "-h", "--helpshort", "-helpshort", "-?")


def load(value: str) -> ConfigDict:
    """The config of `path/to/file.py` or `path/to/file.py:argument`.

    Raises:
      InputError: there is no such file, it raises an exception (named with its line), or it has no function
        `get_config` that takes such an argument and returns a `ConfigDict`.
    """
    path, colon, argument = value.partition(":")
    file = pathlib.Path(path)
    if not path:
        raise InputError(f"--{FLAG} lacks a file, as in --{FLAG}=configs/pretrain.py")
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
        raise InputError(_in_file(file, error)) from error
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


def value_of(arguments: Sequence[str]) -> str | None:
    """The last value of `--config` among a command line's arguments."""
    value = None
    for place, argument in enumerate(arguments):
        name, equals, rest = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == FLAG:
            value = rest if equals else "".join(arguments[place + 1 : place + 2])
    return value


def parse(arguments: Sequence[str], values: flags.FlagValues, config: flags.FlagHolder) -> None:
    """Parses a command line that names a config, and sets fields of it.

    Args:
      arguments: the command line, the program's name first; fields are looked for in `sys.argv`.
      values: its flags, `config` among them.

    Raises:
      InputError: what is wrong with the command line or the config file.
    """
    value = value_of(arguments[1:])
    logging.disable(logging.WARNING)  # ml_collections logs its own account of a config file's errors
    try:
        with importable(value or ""):
            rest = values(list(arguments))
        if value is not None and not isinstance(config.value, ConfigDict):
            load(value)
    except InputError:
        raise
    except Exception as error:  # a config file can raise anything
        if value is not None:
            load(value)  # where the file is at fault, it says so with the line
        kind = "the config has no such field: " if isinstance(error, AttributeError | KeyError) else ""
        raise InputError(f"{kind}{one_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
    if rest[1:]:
        raise InputError(f"unexpected argument {rest[1]!r}; a config is named as in --{FLAG}=configs/pretrain.py")
    if value is None:
        raise InputError(f"say what to run, as in --{FLAG}=configs/pretrain.py (see --help)")


def described(about: str, listed: Sequence[flags.FlagHolder], values: flags.FlagValues) -> str:
    """What `--help` prints: what a program does, and its flags."""
    lines = [about]
    for flag in listed:
        text = textwrap.fill(values[flag.name].help, 118, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append(f"  --{flag.name}\n{text}")
    return "\n".join(lines)


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks; its type where it has no message.

    Of a KeyError, and of one within another exception, as `ml_collections` raises them, the quotes are left out.
    """
    message: Any = error
    while isinstance(message, BaseException) and message.args:
        if not isinstance(message, KeyError) and not isinstance(message.args[0], BaseException):
            break
        message = message.args[0]
    return " ".join(str(message).split()) or type(error).__name__


def _in_file(file: pathlib.Path, error: Exception) -> str:
    """An exception of a config file, with the file and the line; an InputError of what it calls stands alone."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"{file}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename in (str(file), str(file.absolute()))]
    if isinstance(error, InputError) and (not lines or frames[-1].filename in (str(file), str(file.absolute()))):
        return one_line(error)
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return f"{file}{f', line {lines[-1]}' if lines else ''}: {kind}{one_line(error)}"
