"""An error of one process ends all of them, wherever the others are."""

import sys

import pytest
from several_processes import together

PROGRAM = """
import sys, time
import jax
from jax.experimental import multihost_utils
from vlab_jax.errors import CannotRead
from vlab_jax.runtime import sharding
from vlab_jax.runtime.shared_errors import SharedErrors

def ending(error):
    return str(error), 6 if isinstance(error, CannotRead) else 1

sharding.connect()
failing, others_wait, fault = map(int, sys.argv[1:])
with SharedErrors(ending):
    multihost_utils.sync_global_devices("all are here")
    if jax.process_index() == failing:
        time.sleep(0 if others_wait else 2)
        raise ValueError("odd") if fault else CannotRead("out of reach")
    if others_wait:
        multihost_utils.sync_global_devices("in vain")
"""


@pytest.mark.parametrize(
    ("failing", "others_wait", "fault"), [(0, 1, 0), (1, 1, 1), (0, 0, 0)], ids=["first", "other", "others are done"]
)
def test_all_end_with_the_line_and_the_status_of_the_one_that_failed(tmp_path, failing, others_wait, fault):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), *map(str, (failing, others_wait, fault))]
    ended = together([command, command])
    assert [each.status for each in ended] == [1 if fault else 6] * 2, ended
    line = "error: odd" if fault else "error: out of reach"
    assert line in ended[failing].stderr.splitlines()
    other = ended[1 - failing].stderr
    assert f"{line} (process {failing} of 2, counted from 0)" in other.splitlines() and "Traceback" not in other
    assert ("ValueError: odd" in ended[failing].stderr) == bool(fault)


SAVING = """
import pathlib, resource, signal, sys
import jax, numpy as np
from vlab_jax.errors import CannotWrite
from vlab_jax.runtime import sharding
from vlab_jax.runtime.checkpoint import Checkpoints
from vlab_jax.runtime.shared_errors import SharedErrors

def ending(error):
    return str(error), 5 if isinstance(error, CannotWrite) else 1

sharding.connect()
with SharedErrors(ending), Checkpoints(pathlib.Path(sys.argv[1])) as saved:
    numbers = np.random.default_rng(0).random(2**20, np.float32)
    state = sharding.to_global({"numbers": numbers}, sharding.make_mesh())
    saved.save(1, state, {}, {})
    saved.wait()
    if jax.process_index() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
    saved.save(2, state, {}, {})
    saved.wait()
"""


def test_a_save_that_fails_in_one_process_ends_all_and_leaves_the_checkpoint_before(tmp_path):
    """Orbax's threads would wait for each other at two places, for ten minutes."""
    program = tmp_path / "program.py"
    program.write_text(SAVING)
    ended = together([[sys.executable, str(program), str(tmp_path / "saved")]] * 2)
    assert [each.status for each in ended] == [5, 5], ended
    assert all(f"error: {tmp_path / 'saved'} cannot be written: File too large" in each.stderr for each in ended)
    assert "(process 1 of 2, counted from 0)" in ended[0].stderr
    assert sorted(path.name for path in (tmp_path / "saved").iterdir() if path.name.isdigit()) == ["1"]
