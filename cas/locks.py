"""Locks between threads, processes and, where the file system is honest, hosts.

Order: tree before blob before store; never wait against it. Each lock is a file that is never unlinked; after locking,
inode and path are compared, because somebody may have replaced it. A lock is a courtesy that saves work: nothing that
this package publishes becomes wrong where locks lie (Lustre, some NFS), it is only done twice.
"""

from __future__ import annotations

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

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.1
_TELL_S = 0.05  # how often progress is told


@functools.cache
def boot_id() -> str:
    """Another each time this machine starts; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty where it is gone or the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field is the command in brackets and may itself hold spaces and brackets.
            return file.read().rpartition(b") ")[2].split()[19].decode("ascii")
    except (OSError, IndexError):
        return ""


def _answers(pid: int) -> bool:
    """Whether some process has this number."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return pid > 0


_own_start = functools.cache(_started)  # of this process, and of one that was forked from it


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lock or a lease. A pid alone proves nothing: pids are used again, hosts differ."""

    pid: int
    host: str
    boot: str
    started: str
    since: int  # seconds since 1970, for people
    doing: str

    @classmethod
    def me(cls, doing: str) -> Holder:
        pid = os.getpid()
        host = os.uname().nodename
        return cls(pid=pid, host=host, boot=boot_id(), started=_own_start(pid), since=int(time.time()), doing=doing)

    @classmethod
    def parse(cls, value: object) -> Holder | None:
        """From JSON data; None where it is not a holder (an empty or torn file)."""
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
        except (KeyError, TypeError, ValueError):
            return None

    def to_json(self) -> dict[str, object]:
        """What ``parse`` reads."""
        return {name: getattr(self, name) for name in self.__slots__}

    @property
    def mine(self) -> bool:
        """Whether it is this very process."""
        return self.pid == os.getpid() and self.alive

    @property
    def alive(self) -> bool:
        """Whether this very process runs on this host, as far as can be told without its lock."""
        if self.host != os.uname().nodename or self.boot != boot_id():
            return False
        if not _own_start(os.getpid()):  # a system without /proc
            return _answers(self.pid)
        return bool(self.started) and _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.doing})"


class Lock:
    """A held lock; close it to let go. Its file tells others who holds it and, by its mtime, that work goes on."""

    def __init__(self, path: Path, fd: int, note: dict[str, object]) -> None:
        self.path, self.fd, self.note = path, fd, note
        self._told = 0.0

    def progress(self) -> None:
        """Tell those who wait that this lock's holder is getting on; may be called for every byte."""
        now = time.monotonic()
        if now - self._told >= _TELL_S:
            self._told = now
            os.utime(self.fd)

    def write_note(self, **fields: object) -> None:
        """Leave *fields* in the lock file for whoever takes or waits for it next."""
        self.note.update(fields)
        # In one write, over all that stood there: who reads without the lock finds the old note or the new.
        os.pwrite(self.fd, json.dumps(self.note).encode().ljust(os.fstat(self.fd).st_size), 0)

    def is_current(self) -> bool:
        """Whether the path still names the locked file; if not, another holder may exist."""
        return _stands_at(os.fstat(self.fd), self.path)

    def close(self) -> None:
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
    """Take the lock whose file is *path*, exclusive unless *shared*.

    Tries without blocking, in short steps, until *timeout_s* seconds after the holder's last sign of progress
    (0: one try). *on_wait* is told once whose work is waited for, None where nobody can tell.
    Raises LockTimeoutError naming the holder, Cancelled when *token* is cancelled meanwhile, OSError.
    """
    waited_from = time.monotonic()
    seen_progress: int | None = None
    pause = _FIRST_PAUSE_S
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            found = os.fstat(fd)
            if stat.S_IMODE(found.st_mode) != mode and found.st_uid == os.geteuid():  # whatever the umask
                os.fchmod(fd, mode)
            if try_lock(fd, shared=shared) and _stands_at(found, path):
                lock = Lock(path, fd, _read_note(fd))
                if not shared:
                    _sign(lock, doing)
                return lock
            progress = os.fstat(fd).st_mtime_ns
            holder = Holder.parse(_read_note(fd).get("holder"))
            if holder is not None and holder.host == os.uname().nodename and not holder.alive:
                holder = None  # the note of one who is gone: shared holders leave none
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if progress != seen_progress:
            seen_progress, waited_from = progress, time.monotonic()
        if on_wait is not None and pause > _FIRST_PAUSE_S:  # by now, who had just taken it has left its name
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
        pause = min(pause * 2, _LONGEST_PAUSE_S)


def _sign(lock: Lock, doing: str) -> None:
    """Tell others who holds it; on a full disk they are told nothing, since what is locked may be there to make room."""
    try:
        lock.write_note(holder=Holder.me(doing).to_json())
    except OSError as error:
        if error.errno not in FULL:
            raise


def peek(path: Path) -> dict[str, object]:
    """The note in a lock file, without taking it; empty where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return {}
    try:
        return _read_note(fd)
    finally:
        os.close(fd)


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock of *path* exclusively just now. Raises OSError where that cannot be asked."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)  # a shared lock needs no more, nor a writable disk
    except FileNotFoundError:
        return False
    try:
        return not try_lock(fd, shared=True)
    finally:
        os.close(fd)


def try_lock(fd: int, *, shared: bool) -> bool:
    """Lock an open file without waiting; False if another holds it. Raises OSError."""
    import portalocker  # loaded with the first lock: it costs 60 ms, and a command without work takes none

    kind = portalocker.LockFlags.SHARED if shared else portalocker.LockFlags.EXCLUSIVE
    try:
        portalocker.lock(fd, kind | portalocker.LockFlags.NON_BLOCKING)
    except portalocker.AlreadyLocked:
        return False
    except portalocker.LockException as error:
        raise OSError(f"the file system refuses locks: {error}") from error
    return True


def _stands_at(file: os.stat_result, path: Path) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (file.st_dev, file.st_ino) == (there.st_dev, there.st_ino)


def _read_note(fd: int) -> dict[str, object]:
    try:
        note = json.loads(os.pread(fd, 65536, 0) or b"{}")
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}
