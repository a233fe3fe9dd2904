"""Each way in which a run ends has its exit status, and one line on standard error."""

import errno
import os
import types

import pytest

from vlab_jax import main
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
def test_what_ends_a_run_decides_the_exit_status(monkeypatch, capsys, raised, status, line):
    def run(*_):
        raise raised

    for flag in ("CONFIG", "WORKDIR", "CHECKPOINT", "MULTIHOST", "PROFILE", "REPLAY"):
        monkeypatch.setattr(main, flag, types.SimpleNamespace(value=None))
    monkeypatch.setattr(main, "_log_plainly", lambda: None)
    monkeypatch.setattr(main, "run", run)
    with pytest.raises(SystemExit) as ended:
        main._main(())
    assert ended.value.code == status
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1
