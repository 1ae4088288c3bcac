"""How much memory this process has used, and what it has no more use for."""

import contextlib
import ctypes
import resource
import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """The most resident memory so far, in bytes.

    Linux says so itself; `getrusage`, asked elsewhere, can carry over the parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release() -> None:
    """Gives freed memory back to the system, where the C library keeps it (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
