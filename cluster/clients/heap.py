"""Memory that one local step frees stays with the process for the next one.

glibc gives large pieces back to the kernel as they are freed and takes new ones, cleared and page by page,
for the activations of the very next step: thousands of page faults a visit.
"""

from __future__ import annotations

import ctypes

#: Larger pieces are mapped and given back one by one, bytes; before 2.35 glibc takes no more than the second.
LARGEST = (2**30, 2**25)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_NEVER = -1


def keep_freed_memory() -> None:
    """Have this process keep what it frees, up to its peak, where its C library is glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another library, or a Python that holds its own
        return
    # The first that is taken; without one glibc would go on mapping whatever has 128 KiB.
    if any(mallopt(_M_MMAP_THRESHOLD, largest) for largest in LARGEST):
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
