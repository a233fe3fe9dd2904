"""The errors that end a program with one line, and the exit status of each (`vlab_jax.main`)."""


class InputError(ValueError):
    """Something that the user can correct: a config, a file, a command line. Exit status 2.

    The message is one line: what is wrong, where, and what to do about it.
    """


class RunStopped(RuntimeError):
    """The run cannot go on. Exit status 3. The message says what happened, at which step, and what is kept."""


class RunPreempted(RuntimeError):
    """SIGTERM came, and the run has saved where it is. Exit status 4; started again, the run goes on."""


class CannotWrite(RunStopped):
    """A file of the run could not be written: no room, no permission, a failing disk. The checkpoints before it are
    whole. Exit status 5."""


class CannotRead(RunStopped):
    """The data was out of reach for longer than `data.retry_seconds`; the training so far is saved. Exit status 6."""
