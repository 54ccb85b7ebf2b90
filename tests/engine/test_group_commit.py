"""Small blobs come one after the other and are committed together."""

import errno
import os
import resource
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import PATIENCE_S, PIECE, some_bytes

from modelstow.backends import Body, ConnectionFailed, Registry, Throttled
from modelstow.backends.memory import MemorySource
from modelstow.backends.source import replaced
from modelstow.cas import BlobStore, Cancelled, ChecksumError, Digest, NoSpaceError, locks
from modelstow.cas.locks import Lock
from modelstow.reconcile.errors import SizeMismatchError, SourceUnavailableError
from modelstow.reconcile.events.events import BlobFailed, BlobFetched, Event, Info, Waiting
from modelstow.reconcile.transfer.concurrency import Connections
from modelstow.reconcile.transfer.context import TransferContext
from modelstow.reconcile.transfer.fetcher import Fetcher
from modelstow.reconcile.transfer.retry import RetryPolicy, RetrySchedule
from modelstow.reconcile.transfer.source_health import BadSources, FailureTable
from modelstow.reconcile.transfer.state import BlobRequest

FILES = [some_bytes(1000 + n, seed=n) for n in range(30)]


def locator_of(data: bytes) -> str:
    return f"mem://origin/{Digest.of(data).hex}"


def request_of(data: bytes) -> BlobRequest:
    return BlobRequest(digest=Digest.of(data), size=len(data), urls=(locator_of(data),))


class Watched(MemorySource):
    """Calls *on_open* before each answer."""

    def __init__(self, objects: Mapping[str, bytes]) -> None:
        super().__init__(objects)
        self.on_open: Callable[[str], object] = lambda locator: None
        self.asked: list[str] = []

    def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body:
        self.asked.append(locator)
        self.on_open(locator)
        return super().open(locator, start=start, stop=stop)


class World:
    """A store, a source of FILES, and a fetcher between them. ``time`` is what its clock shows."""

    def __init__(self, folder: Path) -> None:
        self.store = BlobStore.open(folder / "root")
        self.store.prepare()
        self.source = Watched({locator_of(data): data for data in FILES})
        self.events: list[Event] = []
        self.time = 0.0
        self.commits: list[int] = []  # blobs in each
        self.context = TransferContext(
            registry=Registry({"mem": lambda: self.source}),
            base=folder,
            failures=FailureTable(),
            bad_sources=BadSources(self.store.layout.state_dir("bad-sources")),
            emit=self.events.append,
            connections=Connections(1),
            clock=lambda: self.time,
        )
        self.fetcher = Fetcher(store=self.store, context=self.context)
        commit_all = self.store.ingest.commit_all

        def counted(partials: list[object], **options: object) -> dict[Digest, Exception]:
            self.commits += [len(partials)] if partials else []
            return commit_all(partials, **options)  # type: ignore[arg-type]

        self.store.ingest.commit_all = counted  # type: ignore[method-assign,assignment]

    def there(self) -> list[bytes]:
        return [data for data in FILES if os.path.exists(self.store.layout.blob(Digest.of(data)))]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_small_blobs_are_committed_together(world: World):
    """All are there on return, each with its event."""
    outcomes = world.fetcher.obtain_all(map(request_of, FILES))

    assert outcomes == dict.fromkeys(map(Digest.of, FILES), False)
    assert world.there() == FILES and world.commits == [len(FILES)]
    assert sum(isinstance(event, BlobFetched) for event in world.events) == len(FILES)
    assert list(world.store.layout.partials.iterdir()) == []


def test_what_waited_for_a_moment_is_committed_before_more_is_asked_for(world: World):
    """A kill costs no more than that of a slow source."""
    seen: list[int] = []

    def slow(locator: str) -> None:
        seen.append(len(world.there()))
        world.time += 0.1

    world.source.on_open = slow
    world.fetcher.obtain_all(map(request_of, FILES[:7]))

    assert seen == [0, 0, 0, 0, 4, 4, 4] and world.commits == [4, 3]


def test_no_more_than_a_mebibyte_waits_for_its_commit(world: World):
    """A batch that is full is committed before the next blob is taken."""
    large = [some_bytes(size, seed=99) for size in (600_000, 500_000, 3 << 20)]
    world.source.objects.update({locator_of(data): data for data in large})

    world.fetcher.obtain_all(map(request_of, [FILES[0], *large, FILES[1]]))

    assert world.commits == [3, 1, 1]


def test_what_waits_is_committed_while_its_worker_is_at_something_that_takes_long(world: World):
    """A source that pauses delays only its own blob: the others are committed and their locks free."""
    asked, resume = threading.Event(), threading.Event()

    def slow(locator: str) -> None:
        if locator == locator_of(FILES[2]):
            asked.set()
            resume.wait(PATIENCE_S)

    world.source.on_open = slow
    done: dict[Digest, bool | Exception] = {}
    thread = threading.Thread(target=lambda: done.update(world.fetcher.obtain_all(map(request_of, FILES[:3]))))
    thread.start()
    assert asked.wait(PATIENCE_S)

    world.fetcher.commit_due()
    assert world.there() == []
    world.time += 1.0
    world.fetcher.commit_due()
    assert world.there() == FILES[:2]
    for data in FILES[:2]:
        world.store.lock_blob(Digest.of(data), doing="looking", timeout_s=0).close()
    resume.set()
    thread.join(PATIENCE_S)
    assert list(done.values()) == [False] * 3 and world.there() == FILES[:3]


def test_no_more_wait_than_a_process_may_have_open(world: World, monkeypatch: pytest.MonkeyPatch):
    """Each has two descriptors; half of them are left to others."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (40, 4096))

    world.fetcher.obtain_all(map(request_of, FILES))

    assert world.commits == [10, 10, 10]


def test_where_nothing_bounds_descriptors_nothing_else_is_bounded_by_them(world: World, monkeypatch: pytest.MonkeyPatch):
    """Unlimited is reported as minus one."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    world.fetcher.obtain_all(map(request_of, FILES))

    assert world.commits == [len(FILES)]


def test_a_small_blob_is_asked_for_once(world: World):
    """Nothing is asked before or after it where all goes well."""
    world.fetcher.obtain_all(map(request_of, FILES))

    assert sorted(world.source.asked) == sorted(map(locator_of, FILES))


def test_the_first_question_is_an_attempt_like_the_others(world: World):
    """A source that fails is asked as often as the policy says, and one that recovers meanwhile serves."""
    policy = RetryPolicy(transient=RetrySchedule(attempts=3))
    fetcher = Fetcher(store=world.store, context=replace(world.context, policy=policy))

    def fail(locator: str) -> None:
        if locator == locator_of(FILES[0]) or world.source.asked.count(locator) < 3:
            raise ConnectionFailed("down", locator=locator)

    world.source.on_open = fail
    outcomes = fetcher.obtain_all(map(request_of, [FILES[1], FILES[0]]))

    assert isinstance(outcomes[Digest.of(FILES[0])], SourceUnavailableError)
    assert outcomes[Digest.of(FILES[1])] is False
    assert [world.source.asked.count(locator_of(data)) for data in FILES[:2]] == [3, 3]


@pytest.mark.parametrize(
    ("sent", "asked", "kind"),
    [(b"\0" * 1000, 2, ChecksumError), (b"\0" * 999, 1, SizeMismatchError), (b"\0" * 1001, 1, SizeMismatchError)],
    ids=["wrong", "short", "long"],
)
def test_a_failure_of_a_small_blob_is_reported_like_any_other(world: World, sent: bytes, asked: int, kind: type[Exception]):
    """The error is that of a large one, and its bytes are counted."""
    world.source.objects[locator_of(FILES[0])] = sent

    outcomes = world.fetcher.obtain_all([request_of(FILES[0])])

    assert isinstance(outcomes[Digest.of(FILES[0])], kind)
    assert len(world.source.asked) == asked
    (failed,) = (event for event in world.events if isinstance(event, BlobFailed))
    assert failed.fetched_bytes == (2000 if kind is ChecksumError else 0)
    assert world.there() == [] and list(world.store.layout.partials.iterdir()) == []


def test_a_source_that_breaks_off_small_blobs_delivers_them_all_the_same(world: World):
    """Each answer delivers some bytes and the next starts after them: however often that happens, it is no failure."""
    data = some_bytes(60_000, seed=7)
    world.source.objects[locator_of(data)] = data

    class Breaking(Watched):
        def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body:
            body, left = super().open(locator, start=start, stop=stop), 13_000

            def read_into(view: memoryview) -> int:
                nonlocal left
                count = body.read_into(view[: min(left, 4096)])
                left -= count
                return count

            return replaced(body, read_into)

    world.source = Breaking(world.source.objects)
    policy = RetryPolicy(transient=RetrySchedule(attempts=5))
    fetcher = Fetcher(store=world.store, context=replace(world.context, policy=policy))

    assert fetcher.obtain_all([request_of(data)]) == {Digest.of(data): False}
    assert len(world.source.asked) <= 6


def test_nothing_is_waited_for_behind_the_last_byte(world: World):
    """A server that does not end its answer has given all that was asked for."""

    class Endless(Watched):
        def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body:
            body, left = super().open(locator, start=start, stop=stop), 1000

            def read_into(view: memoryview) -> int:
                nonlocal left
                assert left > 0, "a read waits forever"
                count = body.read_into(view)
                left -= count
                return count

            return replaced(body, read_into)

    world.source = Endless(world.source.objects)

    assert world.fetcher.obtain_all([request_of(FILES[0])]) == {Digest.of(FILES[0]): False}


def test_one_that_fails_takes_no_other_with_it(world: World):
    """Its error is its outcome."""
    missing = BlobRequest(digest=Digest.of(b"missing"), size=7, urls=("mem://origin/nowhere",))

    outcomes = world.fetcher.obtain_all([request_of(FILES[0]), missing, request_of(FILES[1])])

    assert isinstance(outcomes.pop(missing.digest), SourceUnavailableError)
    assert set(outcomes.values()) == {False} and world.there() == FILES[:2]


def test_a_full_disk_at_the_commit_is_reported_with_its_figures(world: World, monkeypatch: pytest.MonkeyPatch):
    """As where it fills up earlier."""
    real = os.fsync
    broken = Digest.of(FILES[1])

    def fsync(fd: int) -> None:
        if os.fstat(fd).st_size == len(FILES[1]):
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    outcomes = world.fetcher.obtain_all(map(request_of, FILES[:3]))

    error = outcomes.pop(broken)
    assert isinstance(error, NoSpaceError) and error.details["bytes_needed"] == len(FILES[1])
    assert set(outcomes.values()) == {False} and world.there() == [FILES[0], FILES[2]]
    assert [event.digest for event in world.events if isinstance(event, BlobFailed)] == [broken]


def test_a_worker_that_holds_locks_waits_for_none(world: World):
    """A blob that another process fetches is left to the end, when the others are committed and their locks free."""
    busy = request_of(FILES[1])
    held = world.store.lock_blob(busy.digest, doing=f"fetching {busy.digest.short}")
    done: dict[Digest, bool | Exception] = {}
    thread = threading.Thread(target=lambda: done.update(world.fetcher.obtain_all(map(request_of, FILES[:4]))))
    reported = threading.Event()
    sink = world.events.append

    def emit(event: Event) -> None:
        sink(event)
        if isinstance(event, Waiting):
            reported.set()

    object.__setattr__(world.context, "emit", emit)
    thread.start()

    assert reported.wait(PATIENCE_S)
    assert world.there() == [FILES[0], *FILES[2:4]]
    for data in (FILES[0], *FILES[2:4]):
        world.store.lock_blob(Digest.of(data), doing="looking", timeout_s=0).close()
    held.close()
    thread.join(PATIENCE_S)
    assert set(done) == set(map(Digest.of, FILES[:4])) and set(done.values()) == {False}


def test_a_neighbour_of_the_same_lock_is_not_reported(world: World):
    """Two blobs of one run that share a lock file wait for each other silently."""
    first, others = FILES[0], {}
    number = 0
    while not others:
        data = b"neighbour %d" % number
        if world.store.blob_lock_path(Digest.of(data)) == world.store.blob_lock_path(Digest.of(first)):
            others[locator_of(data)] = data
        number += 1
    world.source.objects.update(others)

    held = world.store.lock_blob(Digest.of(first), doing="fetching another of this lock")
    looked = threading.Event()
    acquire = world.store.lock_blob

    def watched(digest: Digest, **options: Any) -> locks.Lock:
        on_wait = options.pop("on_wait")
        return acquire(digest, on_wait=lambda holder: (on_wait(holder), looked.set()), **options)

    world.store.lock_blob = watched  # type: ignore[method-assign,assignment]
    done: dict[Digest, bool | Exception] = {}
    thread = threading.Thread(target=lambda: done.update(world.fetcher.obtain_all(map(request_of, [*others.values()]))))
    thread.start()
    assert looked.wait(PATIENCE_S)
    held.close()
    thread.join(PATIENCE_S)

    assert list(done.values()) == [False]
    assert not [event for event in world.events if isinstance(event, Waiting)]


def test_a_stop_leaves_nothing_half_done(world: World):
    """What was not committed yet is not kept: it is less than a piece. The locks are free."""

    def stop(locator: str) -> None:
        if locator == locator_of(FILES[5]):
            world.context.token.cancel()

    world.source.on_open = stop
    with pytest.raises(Cancelled):
        world.fetcher.obtain_all(map(request_of, FILES))

    assert world.there() == [] and list(world.store.layout.partials.iterdir()) == []
    for data in FILES:
        world.store.lock_blob(Digest.of(data), doing="looking", timeout_s=0).close()
    assert sum(isinstance(event, BlobFailed) for event in world.events) == 6


def test_a_lease_that_was_lost_forbids_every_commit(world: World):
    """``before_commit`` is asked for each."""

    def lost() -> None:
        raise RuntimeError("the lease is gone")

    world.fetcher.before_commit = lost
    outcomes = world.fetcher.obtain_all(map(request_of, FILES[:3]))

    assert {str(outcome) for outcome in outcomes.values()} == {"the lease is gone"} and world.there() == []
    assert list(world.store.layout.partials.iterdir()) == []


def test_a_wait_is_reported_with_its_reason_and_ended_by_a_stop(world: World):
    """The reason is shown to the user of a terminal that does not move."""
    reported: list[str] = []

    def busy(locator: str) -> None:
        raise Throttled("HTTP 503 Service Unavailable", locator=locator, retry_after=7.0)

    def emit(event: Event) -> None:
        if isinstance(event, Info):
            reported.append(event.text)
            world.context.token.cancel()

    world.source.on_open = busy
    object.__setattr__(world.context, "emit", emit)
    with pytest.raises(Cancelled):
        world.fetcher.obtain_all([request_of(FILES[0])])

    short = Digest.of(FILES[0]).short
    assert reported == [f"{short}: every source failed (HTTP 503 Service Unavailable); retrying in 7 s"]


def test_a_blob_whose_lock_cannot_be_written_to_stops_no_other(world: World, monkeypatch: pytest.MonkeyPatch):
    """It is there; only its own outcome says what failed."""
    real = world.store.note_commit

    def note(lock: Lock, digest: Digest) -> None:
        if digest == Digest.of(FILES[1]):
            raise OSError(28, "No space left on device")
        real(lock, digest)

    monkeypatch.setattr(world.store, "note_commit", note)
    outcomes = world.fetcher.obtain_all(map(request_of, FILES[:3]))

    assert isinstance(outcomes.pop(Digest.of(FILES[1])), OSError)
    assert set(outcomes.values()) == {False} and world.there() == FILES[:3]


def test_a_full_disk_during_a_transfer_is_reported_with_what_is_still_needed(world: World, monkeypatch: pytest.MonkeyPatch):
    """What was fetched is kept, so that it is not needed once more."""
    data = some_bytes(3 * PIECE, seed=5)
    world.source.objects[locator_of(data)] = data
    real = os.pwrite

    def full(fd: int, part: bytes, offset: int) -> int:
        if offset >= 2 * PIECE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, part, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        outcome = world.fetcher.obtain_all([request_of(data)])[Digest.of(data)]

    assert isinstance(outcome, NoSpaceError) and outcome.details["bytes_needed"] == PIECE
    assert world.store.held_in_partial(Digest.of(data), len(data)) == 2 * PIECE


def test_asking_whether_a_commit_is_due_does_not_wait_for_one(world: World, monkeypatch: pytest.MonkeyPatch):
    """A large blob's sync takes long, and the asking thread has signals to handle."""
    begun, resume = threading.Event(), threading.Event()
    commit_all = world.store.ingest.commit_all

    def slow(*about: Any, **options: Any) -> Any:
        begun.set()
        resume.wait(PATIENCE_S)
        return commit_all(*about, **options)

    monkeypatch.setattr(world.store.ingest, "commit_all", slow)
    thread = threading.Thread(target=world.fetcher.obtain_all, args=(map(request_of, FILES[:2]),))
    thread.start()
    assert begun.wait(PATIENCE_S)
    world.time += 10.0

    world.fetcher.commit_due()

    assert thread.is_alive() and world.there() == []
    resume.set()
    thread.join(PATIENCE_S)
    assert world.there() == FILES[:2]
