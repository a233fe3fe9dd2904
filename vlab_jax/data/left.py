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


def prefix_of(pid: int) -> str:
    """What the names of a process's segments begin with: eight characters, others for another process of that id."""
    try:
        started = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    return "vj" + hashlib.sha256(f"{pid} {started}".encode()).hexdigest()[:6]


def name_by_parent() -> None:
    """In a worker process: what it makes from now on is named after its parent."""
    if hasattr(shared_memory, _PREFIX):
        setattr(shared_memory, _PREFIX, f"/{prefix_of(os.getppid())}")


def folder() -> tempfile.TemporaryDirectory:
    """A folder of this process, for as long as the object lives."""
    return tempfile.TemporaryDirectory(prefix=f"{prefix_of(os.getpid())}-", ignore_cleanup_errors=True)


def take_over(file: pathlib.Path) -> int:
    """Removes what is left of the process that `file` names, and names this one there.

    Returns:
      How many segments and folders there were.

    Raises:
      OSError: the file cannot be written.
    """
    own = prefix_of(os.getpid())
    before = file.read_text().strip() if file.exists() else ""
    segments, folders = [], []
    if len(before) == len(own) and before != own and before.isalnum():
        segments = list(_SEGMENTS.glob(f"{before}*"))
        folders = list(pathlib.Path(tempfile.gettempdir()).glob(f"{before}-*"))
    for path in segments:
        path.unlink(missing_ok=True)
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)
    file.write_text(own)
    return len(segments) + len(folders)
