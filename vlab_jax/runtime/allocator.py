"""How the C library treats memory that was freed, while training on CPU."""

import ctypes
import logging

# Options of glibc's mallopt (malloc.h), and what they are set to.
_OPTIONS = {
    -4: 0,  # M_MMAP_MAX: no block gets a mapping of its own, which would be undone when it is freed
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: bytes at the heap's end that are kept
    -8: 1,  # M_ARENA_MAX: one heap for all threads
}


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed, and returns whether it could.

    XLA allocates its temporary buffers anew at each step on CPU. By default glibc hands large blocks back to the
    kernel, which clears every page again at the next step: half of the system time of a training step of the demo,
    a tenth of its whole. Elsewhere than on glibc nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        logging.debug("the C library has no mallopt; freed memory goes back to the kernel")
        return False
    taken = [mallopt(option, value) == 1 for option, value in _OPTIONS.items()]
    return all(taken)
