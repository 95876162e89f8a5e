"""Memory of this process and machine."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import sys
from pathlib import Path

# How PyTorch, oneDNN, CUDA and C++ say that memory is used up, in errors of no type of their own.
_USED_UP = re.compile(
    r"not enough memory|can(no|')t allocate memory|out of memory|bad_alloc|alloc_failed"
    r"|can't start new thread|failed to map segment"
    r"|could not create a (primitive|memory object)(?! descriptor)",
    re.IGNORECASE,
)


def used_up(error: BaseException) -> bool:
    """Whether an error says that the memory of the process or of the device is used up."""
    # PyTorch's own, by its name, because it is not imported for every command.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError | ImportError) and _USED_UP.search(str(error)) is not None


# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed() -> bool:
    """Keep what is freed for the tensors to come; False where the C library is not glibc.

    By default glibc maps every tensor of over 32 MiB anew and unmaps it in the end. The kernel then
    clears the same pages at every step, which takes longer than many an operation on them. The
    process needs no more than before at its peak, but does not shrink after it. For tensors in the
    processor's memory only: PyTorch keeps that of GPUs by itself.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def physical() -> int:
    """Bytes of memory that this machine has, or that its container may use if that is less.

    2^63 - 1 where the system does not say.
    """
    found = [2**63 - 1]
    with contextlib.suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number, and no limit
            found.append(int((Path("/sys/fs/cgroup") / name).read_text()))
    return min(size for size in found if size > 0)
