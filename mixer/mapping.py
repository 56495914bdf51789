"""Files in memory, as many at a time as there is address space for.

``mmap.mmap`` keeps a descriptor of its own for every file, and a process has 1,024 by default: a mixture of twenty
domains has more shards at hand than that, where samples are long. The kernel needs the descriptor for the call alone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

__all__ = ["map_file"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


def map_file(descriptor: int, size_bytes: int) -> memoryview:
    """Return the first bytes of an open file, read-only, mapped as long as anything refers to them.

    The descriptor may be closed at once.

    Raises: OSError: if the file cannot be mapped.
    """
    if not size_bytes:
        return memoryview(b"")
    address = _libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    content = (ctypes.c_ubyte * size_bytes).from_address(address)
    # Not at exit: threads that read ahead may still look at it.
    weakref.finalize(content, _libc.munmap, address, size_bytes).atexit = False
    return memoryview(content).cast("B").toreadonly()
