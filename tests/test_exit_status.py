"""Each error that ends a run has its exit status, and one line on standard error."""

import errno
import os

import pytest

from vlab_jax import config_file, main
from vlab_jax.errors import CannotRead, CannotWrite, InputError, RunPreempted, RunStopped

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/file")


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (InputError("a"), 2, "error: a"),
        (RunStopped("a"), 3, "error: a"),
        (RunPreempted(), 4, "error: stopped by SIGTERM; "),
        (CannotWrite("a"), 5, "error: a"),
        (CannotRead("a"), 6, "error: a"),
        (FULL, 5, "error: /a/file cannot be written: No space left on device ("),
    ],
)
def test_the_error_that_ends_a_run_decides_the_exit_status(monkeypatch, capsys, raised, status, line):
    def run(*_):
        raise raised

    monkeypatch.setattr(config_file, "parse", lambda arguments, values: values.mark_as_parsed())
    monkeypatch.setattr(main, "_log_plainly", lambda: None)
    monkeypatch.setattr(main, "run", run)
    assert main.main(["main", "--config=a"]) == status
    output = capsys.readouterr().err
    assert output.startswith(line) and output.count("\n") == 1
