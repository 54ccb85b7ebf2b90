"""The few system calls that Python does not offer, through libc. Loaded only when bytes move or a tree changes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import sys

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h; macOS calls it RENAME_SWAP, with the same value
_SYNC_FILE_RANGE_WAIT_BEFORE, _SYNC_FILE_RANGE_WRITE = 1, 2
_F_SETSIG = 10  # linux/fcntl.h
_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)

_libc = ctypes.CDLL(None, use_errno=True)


def exchange(one: str, other: str) -> None:
    """Swap two paths in one step, so that both names exist at every moment.

    Raises OSError: ENOSYS or EINVAL where the kernel or file system cannot, EXDEV or EBUSY for mount points.
    Source: renameat2(2), renamex_np(2).
    """
    a, b = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        result = _libc.renamex_np(a, b, ctypes.c_uint(_RENAME_EXCHANGE))
    elif hasattr(_libc, "renameat2"):
        result = _libc.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, ctypes.c_uint(_RENAME_EXCHANGE))
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), one, None, other)
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), one, None, other)


def reflink(source_fd: int, target_fd: int) -> None:
    """Make the empty target share the source's extents (a reflink). Raises OSError where the file system cannot."""
    fcntl.ioctl(target_fd, _FICLONE, source_fd)


def can_reflink(folder: str) -> bool:
    """Whether files in *folder* can share extents. Tried on files without a name, so that nothing is left behind."""
    if not hasattr(os, "O_TMPFILE"):
        return False
    try:
        one = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC)
        try:
            other = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC)
            try:
                reflink(one, other)
            finally:
                os.close(other)
        finally:
            os.close(one)
    except OSError:
        return False
    return True


def syncfs(fd: int) -> None:
    """Make durable all that is written to the file system of *fd*. Raises OSError, also for a write-back that failed
    since *fd* was opened. Source: syncfs(2)."""
    if _libc.syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def check_written(fd: int) -> None:
    """Wait for the pages of an open file that are being written. Raises OSError where one could not be, since *fd* was
    opened. Neither metadata nor the disk's cache is synced. Source: sync_file_range(2), SYNC_FILE_RANGE_WAIT_BEFORE."""
    if _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(_SYNC_FILE_RANGE_WAIT_BEFORE)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


_LOCAL = {0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0xF2F52010}  # ext2 to ext4, xfs, btrfs, tmpfs, f2fs: linux/magic.h


def is_local(fd: int) -> bool:
    """Whether the file system of *fd* is known to be local: what ``syncfs`` writes is on the disk, and only this machine
    changes it. Network and FUSE ones are not."""
    if not sys.platform.startswith("linux") or not hasattr(_libc, "syncfs"):
        return False
    buffer = ctypes.create_string_buffer(256)  # struct statfs begins with its type, a long
    return _libc.fstatfs(fd, buffer) == 0 and ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF in _LOCAL


def start_writeback(fd: int, offset: int, count: int) -> None:
    """Ask the kernel to begin writing a range to disk, so that the fsync at the end is short. Never waits, never fails."""
    if hasattr(_libc, "sync_file_range"):
        _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(count), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


def in_use(path: str) -> bool:
    """Whether somebody has the file open or mapped: Linux refuses a write lease then. False where it cannot be told."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        # Who opens the file while we hold the lease makes the kernel send us SIGIO, which ends a process that does not
        # expect it. SIGURG is ignored by default.
        fcntl.fcntl(fd, _F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EBUSY)
    finally:
        os.close(fd)
    return False
