"""What a kill leaves outside of the workdir, and how the next start removes it: shared memory and empty folders.

Worker processes hand batches over in shared memory. Python names the segments at random, and a process beside the run
removes those that are left. SIGKILL for the whole group takes that process too, and they stay in memory until the
machine restarts. So what belongs to a run gets a prefix that follows from its process, kept in the workdir.
"""

import hashlib
import os
import pathlib
import shutil
import tempfile
from multiprocessing import shared_memory

_SEGMENTS = pathlib.Path("/dev/shm")
_PREFIX = "_SHM_NAME_PREFIX"  # of Python's module; a version without it names as it likes, and nothing is removed
_LENGTH = "_SHM_SAFE_NAME_LENGTH"  # of a name, what is drawn for each segment included


def prefix_of(pid: int) -> str:
    """What the names of a process's segments begin with: eight characters, others for another process of that id."""
    status = _status(pid)
    started = status[19] if len(status) > 19 else ""
    return "vj" + hashlib.sha256(f"{pid} {started}".encode()).hexdigest()[:6]


def _status(pid: int) -> list[str]:
    """What the system says of a process, from its state on (proc(5), `stat`); nothing where there is none."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _lives(prefix: str) -> bool:
    """Whether the process of that prefix runs; one that has ended and that its parent has not asked about does not."""
    numbers = (int(path.name) for path in pathlib.Path("/proc").glob("[0-9]*"))
    return any(prefix_of(pid) == prefix and _status(pid)[:1] not in (["Z"], ["X"], []) for pid in numbers)


def name_by_parent() -> None:
    """In a worker process: what it makes from now on is named after its parent."""
    if hasattr(shared_memory, _PREFIX) and hasattr(shared_memory, _LENGTH):
        prefix = f"/{prefix_of(os.getppid())}"
        setattr(shared_memory, _PREFIX, prefix)
        setattr(shared_memory, _LENGTH, len(prefix) + 16)  # as many letters at random


def folder() -> tempfile.TemporaryDirectory:
    """A folder of this process, for as long as the object lives."""
    return tempfile.TemporaryDirectory(prefix=f"{prefix_of(os.getpid())}-", ignore_cleanup_errors=True)


def take_over(file: pathlib.Path) -> int:
    """Removes what is left of the process that `file` names, and names this one there.

    A process that lives keeps what it has: it may have trained here before and elsewhere now.

    Returns:
      How many segments and folders there were.

    Raises:
      OSError: the file cannot be written.
    """
    own = prefix_of(os.getpid())
    before = file.read_text().strip() if file.exists() else ""
    segments, folders = [], []
    if len(before) == len(own) and before.isalnum() and not _lives(before):
        segments = list(_SEGMENTS.glob(f"{before}*"))
        folders = list(pathlib.Path(tempfile.gettempdir()).glob(f"{before}-*"))
    for path in segments:
        path.unlink(missing_ok=True)
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)
    file.write_text(own)
    return len(segments) + len(folders)
