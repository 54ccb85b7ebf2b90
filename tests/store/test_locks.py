"""Locks between threads and processes."""

import dataclasses
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
from builders import PATIENCE_S

from modelstow.cas import CancellationToken, Cancelled, LockTimeoutError, locks

_HOLD = """
import sys
from pathlib import Path
from modelstow.cas import locks
lock = locks.acquire(Path(sys.argv[1]), doing="holding", shared=sys.argv[2] == "shared")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_elsewhere(path: Path, kind: str = "exclusive") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock while the block runs."""
    argv = [sys.executable, "-c", _HOLD, str(path), kind]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_a_lock_excludes_threads(tmp_path: Path):
    """Four threads that count with a lock never lose a count."""
    count = 0

    def work() -> None:
        nonlocal count
        for _ in range(20):
            with locks.acquire(tmp_path / "lock", doing="counting"):
                seen = count
                os.stat(tmp_path)  # lets another thread run
                count = seen + 1

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work) for _ in range(4)]:
            future.result()

    assert count == 80


def test_a_lock_excludes_processes_and_names_its_holder(tmp_path: Path):
    """LOCK_TIMEOUT names the holder and what it is doing."""
    with held_elsewhere(tmp_path / "lock") as process:
        with pytest.raises(LockTimeoutError, match=rf"process {process.pid} on .* \(holding\)") as caught:
            locks.acquire(tmp_path / "lock", doing="a test", timeout_s=0)

        assert locks.is_held(tmp_path / "lock")
        assert caught.value.code == "LOCK_TIMEOUT" and caught.value.details["timeout"] == 0
        assert caught.value.details["holder"]["pid"] == process.pid
        assert caught.value.details["holder"]["doing"] == "holding"


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path):
    """The kernel frees it at once (C13)."""
    with held_elsewhere(tmp_path / "lock") as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

        assert not locks.is_held(tmp_path / "lock")
        with locks.acquire(tmp_path / "lock", doing="a test", timeout_s=0) as lock:
            assert lock.note["holder"]["pid"] == os.getpid()


def test_a_lock_is_not_inherited_by_a_child(tmp_path: Path):
    """A child that outlives its parent's lock would hold it until it ends (C14)."""
    with locks.acquire(tmp_path / "lock", doing="a test"):
        child = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)

    try:
        locks.acquire(tmp_path / "lock", doing="again", timeout_s=0).close()
    finally:
        child.kill()
        child.communicate()


def test_many_may_share_a_lock_and_none_with_an_exclusive_one(tmp_path: Path):
    """Readers share, a writer is alone."""
    path = tmp_path / "lock"
    with held_elsewhere(path, "shared"), locks.acquire(path, doing="reading", shared=True, timeout_s=0):
        with pytest.raises(LockTimeoutError):
            locks.acquire(path, doing="writing", timeout_s=0)
    with locks.acquire(path, doing="writing", timeout_s=0), pytest.raises(LockTimeoutError):
        locks.acquire(path, doing="reading", shared=True, timeout_s=0)


def test_is_held_asks_for_exclusive_holders_only(tmp_path: Path):
    """An absent lock is held by no process."""
    path = tmp_path / "lock"
    assert not locks.is_held(path) and not path.exists()
    with locks.acquire(path, doing="reading", shared=True):
        assert not locks.is_held(path)
    with locks.acquire(path, doing="writing"):
        assert locks.is_held(path)
    assert not locks.is_held(path) and path.exists(), "lock files are never unlinked"


def test_timeout_zero_tries_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It never waits, not even a moment."""

    def never(_: float) -> None:
        raise AssertionError("it waited")

    monkeypatch.setattr(locks.time, "sleep", never)
    with locks.acquire(tmp_path / "lock", doing="one"), pytest.raises(LockTimeoutError, match="other: process"):
        locks.acquire(tmp_path / "lock", doing="other", timeout_s=0)


class FakeClock:
    """Replaces the module ``time``: a sleep only lets the clock of the file system tick, then *meanwhile* is called."""

    def __init__(self, meanwhile: Callable[[float], object]) -> None:
        self.now, self._meanwhile = 0.0, meanwhile

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        time.sleep(0.005)
        self._meanwhile(self.now)


def test_the_progress_of_the_holder_extends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The time-out counts from the last sign of progress, so a long download is no reason to give up."""
    clock = FakeClock(lambda now: holder.progress() if now < 5 else None)
    monkeypatch.setattr(locks, "time", clock)

    with locks.acquire(tmp_path / "lock", doing="working") as holder, pytest.raises(LockTimeoutError):
        locks.acquire(tmp_path / "lock", doing="waiting", timeout_s=1)

    assert 5.5 < clock.now < 6.5, "it gave up a second after the last progress, not after the first"


def test_a_waiter_gets_the_lock_of_a_holder_that_worked_longer_than_the_time_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Once the holder lets go, the waiter has it."""
    monkeypatch.setattr(locks, "time", FakeClock(lambda now: holder.progress() if now < 5 else holder.close()))
    holder = locks.acquire(tmp_path / "lock", doing="working")

    with locks.acquire(tmp_path / "lock", doing="waiting", timeout_s=1) as lock:
        assert lock.is_current()


def test_a_waiter_is_told_once_whose_work_it_waits_for(tmp_path: Path):
    """For progress displays."""
    reported: list[locks.Holder | None] = []
    with locks.acquire(tmp_path / "lock", doing="fetching abc"), pytest.raises(LockTimeoutError):
        locks.acquire(tmp_path / "lock", doing="waiting", timeout_s=0.05, on_wait=reported.append)

    assert len(reported) == 1 and "fetching abc" in str(reported[0]) and str(os.getpid()) in str(reported[0])


def test_a_cancelled_token_ends_waiting(tmp_path: Path):
    """SIGTERM works while a thread waits for a lock (D15)."""
    token, waiting = CancellationToken(), Event()

    def wait() -> type[BaseException] | None:
        try:
            locks.acquire(tmp_path / "lock", doing="waiting", token=token, on_wait=lambda _: waiting.set()).close()
        except BaseException as error:
            return type(error)
        return None

    with locks.acquire(tmp_path / "lock", doing="working"), ThreadPoolExecutor(1) as pool:
        future = pool.submit(wait)
        assert waiting.wait(PATIENCE_S)
        token.cancel()
        assert future.result(PATIENCE_S) is Cancelled


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_lock_file_that_was_replaced_is_noticed(tmp_path: Path, how: str):
    """A second exclusive holder has become possible (C15)."""
    path = tmp_path / "lock"
    with locks.acquire(path, doing="one") as lock:
        assert lock.is_current()
        path.unlink()
        if how == "replaced":
            path.touch()

        assert not lock.is_current()
        with locks.acquire(path, doing="other", timeout_s=0) as other:
            assert other.is_current()


def test_a_waiter_whose_lock_file_is_replaced_takes_the_new_one(tmp_path: Path):
    """Inode and path are compared after locking: it never holds a lock that no other process sees (C15)."""
    path, waiting = tmp_path / "lock", Event()

    def wait() -> locks.Lock:
        return locks.acquire(path, doing="waiting", on_wait=lambda _: waiting.set())

    first = locks.acquire(path, doing="one")
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(wait)
        assert waiting.wait(PATIENCE_S)
        path.unlink()
        first.close()
        with future.result(PATIENCE_S) as lock:
            assert lock.is_current()
            with pytest.raises(LockTimeoutError):
                locks.acquire(path, doing="third", timeout_s=0)


def test_workers_exclude_each_other_while_the_lock_file_is_deleted(tmp_path: Path):
    """A worker that holds a lock whose file is current is the only such holder (C15)."""
    path, done, guard = tmp_path / "lock", Event(), threading.Lock()
    inside: set[int] = set()
    together: list[set[int]] = []

    def deleter() -> None:
        while not done.is_set():
            path.unlink(missing_ok=True)
            done.wait(0.001)

    def work(me: int) -> None:
        for _ in range(25):
            with locks.acquire(path, doing="working") as lock:
                with guard:
                    ino = os.fstat(lock.fd).st_ino
                    if ino in inside:
                        together.append({ino})
                    inside.add(ino)
                os.stat(tmp_path)
                with guard:
                    inside.discard(ino)

    thread = threading.Thread(target=deleter)
    thread.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(work, me) for me in range(4)]:
                future.result(PATIENCE_S)
    finally:
        done.set()
        thread.join()

    assert together == []


def test_the_note_of_a_lock_can_be_read_without_holding_it(tmp_path: Path):
    """What is left there outlives the holder."""
    path = tmp_path / "lock"
    with locks.acquire(path, doing="one") as lock:
        lock.write_note(committed="abc")
        assert locks.peek(path)["committed"] == "abc"

    assert locks.peek(path)["committed"] == "abc"
    with locks.acquire(path, doing="two") as lock:
        assert lock.note["committed"] == "abc"
    assert locks.peek(tmp_path / "absent") == {}


@pytest.mark.parametrize("torn", [b"", b"{", b"[]", b"\xff\xfe", b'{"holder": 7}'])
def test_a_torn_lock_file_is_still_a_lock(tmp_path: Path, torn: bytes):
    """Its text is for people; holding it is the kernel's business."""
    path = tmp_path / "lock"
    path.write_bytes(torn)

    with locks.acquire(path, doing="one", timeout_s=0):
        path.write_bytes(torn)
        with pytest.raises(LockTimeoutError, match="another process"):
            locks.acquire(path, doing="other", timeout_s=0)


def test_a_symlink_is_no_lock_file(tmp_path: Path):
    """Nothing is written through it (M6)."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "mine")

    with pytest.raises(OSError):
        locks.acquire(tmp_path / "lock", doing="a test", timeout_s=0)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_pid_alone_proves_no_life():
    """Pids are used again, machines restart, hosts share a store (C18)."""
    from dataclasses import replace

    me = locks.Holder.me("a test")

    assert me.alive
    assert not replace(me, started="1").alive
    assert not replace(me, boot="another").alive
    assert not replace(me, host="another").alive
    assert not replace(me, started="").alive


def test_lock_files_are_private_by_default(tmp_path: Path):
    """No other user may hold our locks (M4)."""
    locks.acquire(tmp_path / "lock", doing="a test").close()

    assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o600


def test_where_process_start_times_are_unknown_the_number_has_to_do(monkeypatch: pytest.MonkeyPatch):
    """macOS has no /proc: a holder that runs is alive there too, and one that is gone is not."""
    process = subprocess.Popen(["true"])
    process.wait()
    monkeypatch.setattr(locks, "_start_ticks", lambda pid: "")
    monkeypatch.setattr(locks, "_cached_start_ticks", lambda pid: "")
    me = locks.Holder.me("a test")

    assert me.alive and not dataclasses.replace(me, pid=process.pid).alive
