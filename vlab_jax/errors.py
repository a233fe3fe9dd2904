"""The one exception for what a user can mend: a config, a file, a command line."""


class InputError(ValueError):
    """Bad input, said in one line: what is wrong, where, and what to do about it.

    `vlab_jax.main` prints the message alone, without a traceback, and exits with status 2.
    """


class RunStopped(RuntimeError):
    """A run that cannot go on, said in one line: what happened, at which step, and what is kept.

    `vlab_jax.main` prints the message alone and exits with status 3.
    """


class RunPreempted(RuntimeError):
    """A run that was asked to end (SIGTERM) and has saved where it is.

    `vlab_jax.main` exits with status 4; started again, the run goes on.
    """


class CannotWrite(RunStopped):
    """What a run leaves behind could not be written: no room, no permission, a disk that fails.

    The checkpoints before are as they were. `vlab_jax.main` prints the message alone and exits with status 5.
    """


class CannotRead(RunStopped):
    """The data was out of reach for longer than `data.retry_seconds`; what was trained is saved.

    `vlab_jax.main` prints the message alone and exits with status 6.
    """
