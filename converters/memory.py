"""How much memory this process holds, and giving back what it no longer needs, where glibc would keep it."""

from __future__ import annotations

import contextlib
import ctypes
import os

__all__ = ["resident_bytes", "return_large_blocks", "return_memory"]


def resident_bytes() -> int:
    """Return the memory that this process has now; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def return_memory() -> None:
    """Give what was freed back to the system, which glibc does not do by itself."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def return_large_blocks(top: int = 4 << 20) -> None:
    """Have blocks of megabytes given back as soon as they are freed, and the top of the heap only from ``top`` bytes.

    After the first such block glibc would keep them, between others, which takes some 40 MB where texts are large. With
    that settled it would shrink the heap by every 128 KiB that become free at its end, and grow it again: page faults
    of 5 per cent of the time.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, top)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
