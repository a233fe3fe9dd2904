"""A run that is killed at random moments loses nothing that a checkpoint has, and ends with the same bits."""

import os
import pathlib

import pytest
from faults.kill_run import Length, Trial


@pytest.mark.long
def test_kills_at_the_start_and_while_saving_change_no_bit_and_leave_no_process(finished, data_dir, tmp_path):
    """In the second of two stages; `make faults` draws many more, at all moments."""
    seed = int.from_bytes(os.urandom(2))
    print(f"seed {seed}")
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    trial = Trial(tmp_path, seed, Length(steps=4, every=2), pathlib.Path(data_dir), finished, cache, 4)
    assert len(trial.run(2, aims=("the start", "saving"))) == 2
    assert trial.runs[0].kills
