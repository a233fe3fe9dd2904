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
from multiprocessing import resource_tracker, shared_memory

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


def name_by_parent(tag: str = "") -> None:
    """In a worker process: what it makes from now on is named after its parent, and then by the tag."""
    if hasattr(shared_memory, _PREFIX) and hasattr(shared_memory, _LENGTH):
        prefix = f"/{prefix_of(os.getppid())}{tag}"
        setattr(shared_memory, _PREFIX, prefix)
        setattr(shared_memory, _LENGTH, len(prefix) + 16)  # as many letters at random


def tag_of(folder: str) -> str:
    """Four characters that tell one group of a process's workers from another, by a folder that is the group's own."""
    return hashlib.sha256(folder.encode()).hexdigest()[:4]


def remove_undelivered(tag: str) -> int:
    """Removes segments that worker processes of that tag, which have ended, made and this process has not opened.

    A worker that is ended while it hands a batch over leaves them; Python would remove them when this process ends, and
    warn.

    Returns:
      How many there were.
    """
    count, opened = 0, _opened_segments()
    for path in _SEGMENTS.glob(f"{prefix_of(os.getpid())}{tag}*"):
        if path.name in opened:  # whoever has opened it removes it
            continue
        try:
            path.unlink()
        except FileNotFoundError:  # it was being removed
            continue
        resource_tracker.unregister(f"/{path.name}", "shared_memory")
        count += 1
    return count


def _opened_segments() -> set[str]:
    """The names of the segments that this process has mapped (proc(5), `maps`)."""
    try:
        lines = pathlib.Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return set()
    return {line.rpartition("/")[2] for line in lines if f" {_SEGMENTS}/" in line}


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
