"""Every command in the documentation is accepted by its program, and every link leads somewhere."""

import argparse
import importlib
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib

import pytest
from absl import flags
from documentation import PAGES, ROOT, anchors, commands, local_links
from ml_collections import config_flags
from packaging.requirements import Requirement
from saved_clip import save_clip

from vlab_jax import config_check, config_file

LINES = list(dict.fromkeys(line for page in PAGES for line in commands(page)))
# The name of a reader's own weights in the pages.
WEIGHTS = re.compile(r"(?<=pretrained=)[^,\s]+")


class Parsed(Exception):
    """A program has parsed its command line."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    save_clip(folder)
    return str(folder)


def train_or_evaluate(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses the flags as `vlab_jax.main` does, and checks the config."""
    monkeypatch.setattr(sys, "argv", ["vlab_jax.main", *arguments])  # config_flags looks for fields of the config there
    given = flags.FlagValues()
    config = config_flags.DEFINE_config_file(config_file.FLAG, None, flag_values=given)
    for name in ("workdir", "checkpoint", "replay"):
        flags.DEFINE_string(name, None, "", flag_values=given)
    for name in ("multihost", "profile"):
        flags.DEFINE_bool(name, False, "", flag_values=given)
    with config_file.importable(config_file.value_of(arguments)):
        rest = given(sys.argv)
    assert rest[1:] == []
    config_check.check(config.value)
    assert (given.checkpoint is not None) if config.value.task == "evaluate" else given.workdir


def compile_for_a_machine(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses the flags as `vlab_jax.compile` does, and the machine that they name."""
    monkeypatch.setattr(sys, "argv", ["vlab_jax.compile", *arguments])
    monkeypatch.delitem(sys.modules, "vlab_jax.compile", raising=False)  # a second import defines its flags again
    assert importlib.import_module("vlab_jax.compile").parse(sys.argv).count


def program(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a module or a file until it has parsed its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *given: object) -> None:
        raise Parsed(parse(parser, *given))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    name, *rest = arguments[1:] if arguments[0] == "-m" else arguments
    monkeypatch.setattr(sys, "argv", [name, *rest])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(Parsed):
        if arguments[0] == "-m":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / name), run_name="__main__")


def installed(arguments: list[str]) -> None:
    """Checks the arguments of `pip install`: requirements, files of them, or extras of the project."""
    while arguments:
        first, *arguments = arguments
        if first == "-r":
            assert (ROOT / arguments.pop(0)).is_file()
        elif first == "-e":
            (extra,) = re.fullmatch(r"\.\[([\w-]+)\]", arguments.pop(0)).groups()
            assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        else:
            Requirement(first)


@pytest.mark.parametrize("line", LINES)
def test_every_shell_line_is_accepted_by_its_program(line, weights, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(WEIGHTS.sub(weights, line), comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # an environment variable
        words.pop(0)
    match words:
        case ["python", "-m", "vlab_jax.main", *arguments]:
            train_or_evaluate(arguments, monkeypatch)
        case ["python", "-m", "vlab_jax.compile", *arguments]:
            compile_for_a_machine(arguments, monkeypatch)
        case ["python", *arguments]:
            program(arguments, monkeypatch)
        case ["pip", "install", *arguments]:
            installed(arguments)
        case ["make", *arguments]:
            subprocess.run(["make", "--dry-run", *arguments], check=True, capture_output=True)
        case _:
            pytest.fail(f"no check for this command: {line}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_project_leads_somewhere(page):
    for target in local_links(page):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_pages_have_commands_and_links():
    assert len(LINES) > 60 and sum(len(list(local_links(page))) for page in PAGES) > 10
    assert pathlib.Path(PAGES[0]).name == "README.md"
