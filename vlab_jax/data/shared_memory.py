"""The shared memory in which worker processes hand batches over, and what a kill leaves of it.

Python names its segments at random, and a process beside the run removes those that are left. SIGKILL for the whole
group takes that process too, and the segments stay in memory until the machine restarts. So those of a run's workers
get a prefix that follows from the process that they belong to, and it is kept in the workdir: the next start removes
them.
"""

import hashlib
import os
import pathlib
from multiprocessing import shared_memory

_FOLDER = pathlib.Path("/dev/shm")
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


def take_over(file: pathlib.Path) -> int:
    """Removes the segments of the process that `file` names, and names this one there.

    Returns:
      How many there were.

    Raises:
      OSError: the file cannot be written.
    """
    own = prefix_of(os.getpid())
    before = file.read_text().strip() if file.exists() else ""
    left = list(_FOLDER.glob(f"{before}*")) if len(before) == len(own) and before != own and before.isalnum() else []
    for path in left:
        path.unlink(missing_ok=True)
    file.write_text(own)
    return len(left)
