"""A run that is killed at random moments loses nothing that a checkpoint held, and ends with the same bits."""

import os
import pathlib

from kill_run import Trial


def test_two_kills_at_random_moments_change_no_bit_of_the_end_and_leave_no_process(data_dir, tmp_path):
    seed = int.from_bytes(os.urandom(2))
    print(f"seed {seed}")
    trial = Trial(tmp_path, seed, pathlib.Path(data_dir))
    kills = trial.run(2)
    assert len(kills) == 2
