"""How a training process holds memory."""

from __future__ import annotations

import ctypes
import logging
import platform

log = logging.getLogger(__name__)

# Names of glibc's mallopt, and the largest mapping threshold that it accepts (32 MiB on 64-bit machines).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD, _NEVER = 32 * 2**20, 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc keep what this process frees, for its next request; True if it agreed.

    Each step of a training on a CPU asks for the same tensors again. glibc gives large blocks back to the system as
    soon as they are freed, and every page of the next one is then cleared and mapped anew (docs/performance.md says
    what that costs). In return the process holds what it once needed for longer. On other systems than Linux with glibc
    nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        log.debug("glibc without mallopt: freed memory goes back to the system")
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
