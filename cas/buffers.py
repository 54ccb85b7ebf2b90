"""Page-aligned buffers for reading files and sockets.

On AMD Zen the kernel's copy to a user address that is 1 to 31 bytes behind a page border runs at a fifth of its speed, and
a ``bytearray`` of 128 KiB or more begins 16 bytes behind one. An anonymous mapping begins at a border. See ADR 18.
"""

from __future__ import annotations

import hashlib
import mmap
import os

_LARGE = 1 << 17  # from here on malloc maps, and what it maps begins 16 bytes behind a border
STEP = 1 << 20
"""Bytes read at once where a file is hashed: they are still in the processor's cache then."""


def aligned_buffer(size: int) -> memoryview:
    """A writable, zeroed buffer of *size* bytes; a large one begins at a page border. A forked child gets a copy."""
    if size < _LARGE:
        return memoryview(bytearray(size))
    # MAP_SHARED, the default, would be shared memory, whose page faults cost more.
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def sha256_of_fd(fd: int) -> str:
    """The sha256 of an open file from its beginning, as hex. Does not move the file's offset. Raises OSError."""
    hasher, buffer, offset = hashlib.sha256(), aligned_buffer(STEP), 0
    while count := os.preadv(fd, [buffer], offset):
        hasher.update(buffer[:count])
        offset += count
    return hasher.hexdigest()
