"""Advisory file locks between threads, processes and, if the file system supports it, hosts.

Order: tree before blob before store; never wait against it. A lock file is never unlinked, and after locking its inode is
compared with the path, because another process may have replaced it. Locks only save work: where file locks are unreliable
(Lustre, some NFS) work is done twice, but nothing that this package publishes becomes wrong.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from .cancellation import CancellationToken
from .errors import FULL, Cancelled, Cause, LockTimeoutError

_MIN_PAUSE_S, _MAX_PAUSE_S = 0.005, 0.1
_NOTE_BYTES = 65_536
_PROGRESS_S = 0.05  # least time between two records of progress


@functools.cache
def boot_id() -> str:
    """Identifier of this boot of the machine; empty if the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def _start_ticks(pid: int) -> str:
    """Start time of a process, in clock ticks since boot; empty if it is gone or the system has no /proc."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field is the command in parentheses, and may itself contain spaces and parentheses.
            return file.read().rpartition(b") ")[2].split()[19].decode("ascii")
    except (OSError, IndexError):
        return ""


def _pid_exists(pid: int) -> bool:
    """Whether any process has this number."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return pid > 0


_cached_start_ticks = functools.cache(_start_ticks)  # for this process; a forked child has another pid


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The process that holds a lock or a lease. Its pid alone does not identify it: pids are reused, hosts differ."""

    pid: int
    host: str
    boot: str  # boot_id
    started: str  # clock ticks since boot
    since: int  # seconds since 1970, for display
    doing: str  # what for, for display

    @classmethod
    def me(cls, doing: str) -> Holder:
        """This process as a holder, from now on."""
        pid = os.getpid()
        host = os.uname().nodename
        return cls(
            pid=pid, host=host, boot=boot_id(), started=_cached_start_ticks(pid), since=int(time.time()), doing=doing
        )

    @classmethod
    def read(cls, raw: bytes) -> Holder | None:
        """The holder in a file's content; None if there is none."""
        try:
            return cls.parse(json.loads(raw))
        except (ValueError, RecursionError):
            return None

    @classmethod
    def parse(cls, value: object) -> Holder | None:
        """The holder in JSON data; None if there is none (an empty or torn file)."""
        if not isinstance(value, dict):
            return None
        try:
            return cls(
                pid=int(value["pid"]),
                host=str(value["host"]),
                boot=str(value["boot"]),
                started=str(value["started"]),
                since=int(value["since"]),
                doing=str(value["doing"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            return None

    def to_json(self) -> dict[str, object]:
        """JSON data for ``parse``."""
        return {name: getattr(self, name) for name in self.__slots__}

    @property
    def mine(self) -> bool:
        """Whether it is this process."""
        return self.pid == os.getpid() and self.alive

    @property
    def alive(self) -> bool:
        """Whether this process still runs on this host, as far as can be seen without its lock."""
        if self.host != os.uname().nodename or self.boot != boot_id():
            return False
        if not _cached_start_ticks(os.getpid()):  # a system without /proc
            return _pid_exists(self.pid)
        return bool(self.started) and _start_ticks(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.doing})"


class Lock:
    """A held lock; a context manager. Close it to release.

    Its file names the holder, if the lock is exclusive, and its mtime is the holder's last progress.
    """

    def __init__(self, path: Path, fd: int, note: dict[str, object]) -> None:
        self.path, self.fd, self.note = path, fd, note
        self._reported_at = 0.0

    def progress(self) -> None:
        """Record progress, which extends the time that others wait. Cheap enough for every buffer. Raises OSError."""
        now = time.monotonic()
        if now - self._reported_at >= _PROGRESS_S:
            self._reported_at = now
            os.utime(self.fd)

    def write_note(self, **fields: object) -> None:
        """Write *fields* into the lock file, for processes that wait for it or take it next. Not synced. Raises OSError."""
        self.note.update(fields)
        found = os.fstat(self.fd)
        if found.st_nlink == 1:  # else it may be a file of the user's, linked here
            # One write over the whole old note: a reader without the lock sees the old note or the new.
            os.pwrite(self.fd, json.dumps(self.note).encode().ljust(min(found.st_size, _NOTE_BYTES)), 0)

    def is_current(self) -> bool:
        """Whether the path still names the locked file; if not, there may be another holder. Raises OSError."""
        return _is_at(os.fstat(self.fd), self.path)

    def close(self) -> None:
        """Release the lock; may be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def acquire(
    path: Path,
    *,
    doing: str,
    shared: bool = False,
    timeout_s: float = 300.0,
    token: CancellationToken | None = None,
    mode: int = 0o600,
    on_wait: Callable[[Holder | None], None] | None = None,
) -> Lock:
    """Acquire the lock whose file is *path*, exclusive unless *shared*.

    Tries without blocking, in short steps, until *timeout_s* seconds after the holder's last progress (0: one attempt).
    *on_wait* is called at most once, with the holder that is waited for, or None if it is unknown.
    Raises LockTimeoutError with the holder, Cancelled if *token* is cancelled meanwhile, OSError.
    """
    waited_from = time.monotonic()
    seen_progress: int | None = None
    pause = _MIN_PAUSE_S
    while True:
        fd = _open(path, mode)
        try:
            found = os.fstat(fd)
            # Whatever the umask. A second link may be another's name for a file of the user's.
            if stat.S_IMODE(found.st_mode) != mode and found.st_uid == os.geteuid() and found.st_nlink == 1:
                os.fchmod(fd, mode)
            if try_lock(fd, shared=shared) and _is_at(found, path):
                lock = Lock(path, fd, _read_note(fd))
                if not shared:
                    _write_holder(lock, doing)
                return lock
            progress = os.fstat(fd).st_mtime_ns
            holder = Holder.parse(_read_note(fd).get("holder"))
            if holder is not None and holder.host == os.uname().nodename and not holder.alive:
                holder = None  # the note of a holder that is gone: shared ones write none
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if progress != seen_progress:
            seen_progress, waited_from = progress, time.monotonic()
        if on_wait is not None and pause > _MIN_PAUSE_S:  # by now, a new holder has written its note
            on_wait(holder)
            on_wait = None
        if time.monotonic() - waited_from >= timeout_s:
            raise LockTimeoutError(
                f"{doing}: {holder or 'another process'} has held {path.name} without progress for {timeout_s:g} s",
                cause=Cause.LOCK_HELD,
                holder=holder.to_json() if holder else None,
                timeout=timeout_s,
            )
        if token is not None and token.wait(pause):
            raise Cancelled(f"{doing}: cancelled while waiting for {path.name}")
        if token is None:
            time.sleep(pause)
        pause = min(pause * 2, _MAX_PAUSE_S)


def _open(path: Path, mode: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a lock file", str(path))
    return fd


STRANGE = (errno.EINVAL, errno.ELOOP, errno.ENXIO)
"""The errors of ``acquire`` where a pipe, symlink or socket has the name of a lock file."""


def remove_strange(path: Path) -> None:
    """Remove what is no lock file: no process holds a lock on it. One process at a time, or a new lock file could go.

    Raises OSError.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if try_lock(folder, shared=False):
            if not stat.S_ISREG(os.lstat(path).st_mode):
                os.unlink(path)
        else:
            time.sleep(_MIN_PAUSE_S)
    except FileNotFoundError:
        pass
    finally:
        os.close(folder)


def _write_holder(lock: Lock, doing: str) -> None:
    """Name this process in the lock file. Not on a full disk: the lock may be needed to free space."""
    try:
        lock.write_note(holder=Holder.me(doing).to_json())
    except OSError as error:
        if error.errno not in FULL:
            raise


def peek(path: Path) -> dict[str, object]:
    """The note in a lock file, read without the lock; empty if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return {}
    try:
        return _read_note(fd)
    finally:
        os.close(fd)


def is_held(path: Path) -> bool:
    """Whether any process holds the lock of *path* exclusively. Raises OSError if that cannot be tested."""
    try:  # enough for a shared lock, also on a read-only disk
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):  # nothing, or what cannot be locked
            return False
        raise
    try:
        return not try_lock(fd, shared=True)
    finally:
        os.close(fd)


def try_lock(fd: int, *, shared: bool) -> bool:
    """Lock an open file without waiting; False if another process holds it. Raises OSError."""
    import portalocker  # 60 ms that a command without locks does not pay

    kind = portalocker.LockFlags.SHARED if shared else portalocker.LockFlags.EXCLUSIVE
    try:
        portalocker.lock(fd, kind | portalocker.LockFlags.NON_BLOCKING)
    except portalocker.AlreadyLocked:
        return False
    except portalocker.LockException as error:
        raise OSError(f"the file system refuses locks: {error}") from error
    return True


def _is_at(file: os.stat_result, path: Path) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (file.st_dev, file.st_ino) == (there.st_dev, there.st_ino)


def _read_note(fd: int) -> dict[str, object]:
    try:
        note = json.loads(os.pread(fd, _NOTE_BYTES, 0) or b"{}")
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}
