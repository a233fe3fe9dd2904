"""A config file as the command line names it, and, in one line, what is wrong with it or with the fields set behind it.

`ml_collections` reads the file and sets the fields; where it fails, `explain` looks for the reason in the file and in
the config's own tree, so that the answer does not depend on the words of a library's exception.
"""

import contextlib
import importlib.util
import inspect
import logging
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from vlab_jax.config import nearest, type_name, unknown_keys
from vlab_jax.errors import InputError

FLAG = "config"
HELP = ("--help", "-help", "-h", "--helpshort", "-helpshort", "-?")


def load(value: str) -> ConfigDict:
    """The config of `path/to/file.py` or `path/to/file.py:argument`.

    Raises:
      InputError: there is no such file, it raises an exception (named with its line), or it has no `get_config` that
        takes such an argument and returns a `ConfigDict`.
    """
    path, colon, argument = value.partition(":")
    file = pathlib.Path(path)
    if not path:
        raise InputError(f"--{FLAG} lacks a file, as in --{FLAG}=configs/pretrain.py")
    if not file.is_file():
        raise InputError(f"there is no config file {path!r}{_files_near(file)}")
    try:
        with importable(value):
            get_config = getattr(_run(file), "get_config", None)
            if not callable(get_config):
                raise InputError(f"{path} has no function get_config(); it is what a config file must define")
            arguments = [argument] if colon else []
            _check_call(path, get_config, arguments)
            config = get_config(*arguments)
    except Exception as error:
        raise InputError(_in_file(file, error)) from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"get_config() in {path} returns a {type(config).__name__}; it must return a ConfigDict")
    return config


@contextlib.contextmanager
def importable(value: str) -> Iterator[None]:
    """Within it, a config file can import its neighbours as `configs.<name>` from any working directory."""
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
      InputError: what is wrong with it.
    """
    _, *given = arguments
    value = value_of(given)
    logging.disable(logging.WARNING)  # what the libraries have to say of a config file is said below
    try:
        with importable(value or ""):
            rest = values(list(arguments))
        if value is not None and not isinstance(config.value, ConfigDict):
            load(value)  # says why there is none
    except Exception as error:  # a config file can raise anything
        raise InputError(explain(given, error)) from error
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


def explain(arguments: Sequence[str], error: Exception) -> str:
    """One line for a command line that could not be parsed.

    Args:
      arguments: the command line, without the program's name.
      error: what parsing it raised.
    """
    overrides = list(_overrides(arguments))
    value = value_of(arguments)
    first = next((place for place, argument in enumerate(arguments) if list(_overrides([argument]))), None)
    if overrides and value_of(arguments[:first]) is None:
        return f"--{FLAG}.{overrides[0][0]} sets a field of no config; put --{FLAG}=<file> before it"
    try:
        if value is not None:
            config = load(value)
            for name, text in overrides:
                check_override(config, name, text)
    except InputError as found:
        return str(found)
    return one_line(error)


def check_override(config: ConfigDict, name: str, text: str | None) -> None:
    """Raises InputError where `--config.<name>=<text>` names a field that is not there, or has another type's value."""
    parent, where = config.to_dict(), FLAG
    *groups, last = name.split(".")
    for key in groups:
        _check_key(parent, key, where, last)
        parent, where = parent[key], f"{where}.{key}"
        if not isinstance(parent, Mapping):
            raise InputError(f"{where} is a field of type {type_name(parent)}; it has no fields of its own")
    _check_key(parent, last, where, last)
    default = parent[last]
    if isinstance(default, Mapping):
        raise InputError(f"{where}.{last} is a group of fields; set one of them: {', '.join(default)}")
    if text is None and not isinstance(default, bool):
        raise InputError(f"--{where}.{last} lacks a value, as in --{where}.{last}={default!r}")
    if text is not None and not _is_spelled(text, default):
        raise InputError(f"{where}.{last} is {text!r}; it must be of type {type_name(default)}, like {default!r}")


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


def _overrides(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Name and text of each `--config.<name>=<text>`; `--config.<name> <text>` and `--noconfig.<name>` are such too."""
    for place, argument in enumerate(arguments):
        match = re.match(rf"--?(no)?{FLAG}\.([^=]*)(=)?(.*)", argument, re.DOTALL)
        if match is None:
            continue
        negated, name, equals, text = match.groups()
        following = "".join(arguments[place + 1 : place + 2])
        if equals or negated:
            yield name, text if equals else None
        else:
            yield name, following if following and not following.startswith("--") else None


def _check_key(parent: Mapping[str, Any], key: str, where: str, last: str) -> None:
    """Raises InputError for an unknown key; a field of the name `last` elsewhere in the config is nearer than none."""
    if key in parent:
        return
    elsewhere = [] if nearest(key, parent) else list(_paths(parent, last, where))
    if elsewhere:
        raise InputError(f"unknown key {key!r} in {where}; did you mean {' or '.join(elsewhere[:3])}?")
    unknown_keys({key: None}, parent, where)


def _paths(tree: Mapping[str, Any], name: str, where: str) -> Iterator[str]:
    for key, value in tree.items():
        if key == name:
            yield f"{where}.{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, name, f"{where}.{key}")


def _is_spelled(text: str, default: Any) -> bool:
    """Whether the text can be a value of the default's type; of tuples and strings, `ml_collections` takes any."""
    if isinstance(default, bool):
        return text.lower() in ("true", "false", "t", "f", "1", "0", "yes", "no", "y", "n")
    if not isinstance(default, int | float):
        return True
    try:
        type(default)(text)
    except ValueError:
        return False
    return True


def _run(file: pathlib.Path) -> ModuleType:
    """The module of a config file, not kept in `sys.modules`: the next run of the same file is a new one."""
    spec = importlib.util.spec_from_file_location(f"{FLAG}_file", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_call(path: str, get_config: Any, arguments: Sequence[str]) -> None:
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        if arguments:
            raise InputError(f"{path} takes no argument; leave out ':{arguments[0]}'") from error
        raise InputError(f"{path} needs an argument after a colon: --{FLAG}={path}:<argument>") from error


def _in_file(file: pathlib.Path, error: Exception) -> str:
    """What a config file raised, with the file and the line; what it says itself, with an InputError, stands alone."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"{file}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename in (str(file), str(file.absolute()))]
    if isinstance(error, InputError) and (
        not lines or frames[-1].filename in (str(file), str(file.absolute()), __file__)
    ):
        return one_line(error)
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return f"{file}, line {lines[-1] if lines else '?'}: {kind}{one_line(error)}"


def _files_near(file: pathlib.Path) -> str:
    """What could have been meant by a config file that is not there, or nothing."""
    folder = file if file.is_dir() else file.parent
    names = sorted(path.name for path in folder.glob("*.py"))
    near = nearest(file.name, names)
    if near:
        return f"; did you mean {str(folder / near)!r}?"
    return f"; {str(folder)!r} holds: {', '.join(names)}" if names else ""
