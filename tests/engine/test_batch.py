"""Small blobs of one origin come in batches over one connection; whatever is odd is fetched by itself."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from builders import PATIENCE_S, some_bytes, wait_until
from origin import Fault, Origin

from modelstow.backends import Registry
from modelstow.backends.memory import MemorySource
from modelstow.cas import BlobState, BlobStore, Cancelled, Digest, ingest
from modelstow.reconcile.errors import SourceUnavailableError
from modelstow.reconcile.events.events import BlobFailed, BlobFetched, BlobReused, BytesArrived, Event, FetchStarted
from modelstow.reconcile.transfer import batch as batches
from modelstow.reconcile.transfer.batch import BatchFetcher
from modelstow.reconcile.transfer.concurrency import Connections
from modelstow.reconcile.transfer.context import TransferContext
from modelstow.reconcile.transfer.fetcher import Fetcher
from modelstow.reconcile.transfer.source_health import BadSources, FailureTable
from modelstow.reconcile.transfer.state import BlobRequest

pytestmark = pytest.mark.slow

FILES = [some_bytes(1000 + n, seed=n) for n in range(60)]
DIGESTS = [Digest.of(data) for data in FILES]


class World:
    """A store, a web server with FILES, and a fetcher between them."""

    def __init__(self, folder: Path, origin: Origin) -> None:
        self.origin, self.store = origin, BlobStore.open(folder / "root", lock_timeout_s=1)
        self.store.prepare()
        self.events: list[Event] = []
        self.groups: list[int] = []  # blobs that were committed together
        self.context = TransferContext(
            registry=Registry(),
            base=folder,
            failures=FailureTable(),
            bad_sources=BadSources(self.store.layout.state_dir("bad-sources")),
            emit=self.events.append,
            connections=Connections(1),
        )
        self.fetcher = Fetcher(store=self.store, context=self.context)
        commit_small = self.store.ingest.commit_small
        self.store.ingest.commit_small = lambda contents: (  # type: ignore[method-assign]
            self.groups.append(len(contents)) or commit_small(contents)  # type: ignore[func-returns-value]
        )

    def request(self, data: bytes) -> BlobRequest:
        return BlobRequest(digest=Digest.of(data), size=len(data), urls=(f"{self.origin.url}/{Digest.of(data).hex}",))

    def fetch(self) -> dict[Digest, bool | Exception]:
        return self.fetcher.obtain_all(map(self.request, FILES))

    def intact(self) -> list[Digest]:
        return [d for d, data in zip(DIGESTS, FILES, strict=True) if self.store.blobs.stat(d, len(data)).state is INTACT]

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def connections(self) -> int:
        return len({seen.client for seen in self.origin.requests})


INTACT = BlobState.INTACT


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with Origin({Digest.of(data).hex: data for data in FILES}) as origin:
        yield World(tmp_path, origin)


def test_small_blobs_come_in_growing_batches_over_one_connection(world: World):
    """The first opens the connection; each file is asked for once, and events say the same as otherwise."""
    outcomes = world.fetch()

    assert outcomes == dict.fromkeys(DIGESTS, False) and world.intact() == DIGESTS
    assert world.connections == 1 and len(world.origin.requests) == len(FILES)
    assert world.groups == [8, 16, 32, 3]
    for kind in FetchStarted, BytesArrived, BlobFetched:
        assert sorted(event.digest for event in world.of(kind)) == sorted(DIGESTS), kind
    assert sum(e.fetched_bytes for e in world.of(BlobFetched)) == sum(map(len, FILES))
    assert list(world.store.layout.partials.iterdir()) == []


def test_corrupt_bytes_are_fetched_again_and_counted(world: World):
    """A blob whose bytes are wrong is fetched by itself again; both count as fetched."""
    world.origin.fail(DIGESTS[5].hex, Fault(flip=3))

    assert world.fetch() == dict.fromkeys(DIGESTS, False) and world.intact() == DIGESTS
    (event,) = [event for event in world.of(BlobFetched) if event.digest == DIGESTS[5]]
    assert event.fetched_bytes == 2 * len(FILES[5])


def test_a_missing_file_fails_alone(world: World):
    """Its error is that of a single fetch; the others of the batch are there."""
    del world.origin.objects[DIGESTS[5].hex]

    outcomes = world.fetch()

    error = outcomes.pop(DIGESTS[5])
    assert isinstance(error, SourceUnavailableError) and "404" in str(error)
    assert set(outcomes.values()) == {False} and len(world.intact()) == len(FILES) - 1


def test_a_file_of_another_size_fails_alone(world: World):
    """It is not taken for the blob, whatever its beginning is."""
    world.origin.objects[DIGESTS[7].hex] = FILES[7] + b"more"

    outcomes = world.fetch()

    assert isinstance(outcomes.pop(DIGESTS[7]), Exception) and set(outcomes.values()) == {False}


def test_a_server_that_breaks_off_costs_nothing_but_what_it_had_not_sent(world: World):
    """What came before stays; the rest is fetched one by one."""
    world.origin.fail(DIGESTS[20].hex, Fault(cut_after=10))

    assert world.fetch() == dict.fromkeys(DIGESTS, False) and world.intact() == DIGESTS


def test_blobs_whose_lock_is_held_are_waited_for_at_the_end(world: World):
    """While a batch holds locks it waits for no other; what the holder committed meanwhile is not fetched."""
    lock = world.store.lock_blob(DIGESTS[3], doing="testing")

    def commit_and_release() -> None:
        world.store.ingest.commit_small({DIGESTS[3]: FILES[3]})
        lock.close()

    threading.Timer(0.05, commit_and_release).start()
    assert world.fetch() == dict.fromkeys(DIGESTS, False) and world.intact() == DIGESTS
    assert [seen.path for seen in world.origin.requests].count(DIGESTS[3].hex) == 0
    assert [event.digest for event in world.of(BlobReused)] == [DIGESTS[3]]


def test_blobs_that_are_there_by_now_are_not_fetched(world: World):
    """Another process committed them after the plan was made."""
    world.store.ingest.commit_small(dict(zip(DIGESTS[:5], FILES[:5], strict=True)))

    assert world.fetch() == dict.fromkeys(DIGESTS, False)
    assert len(world.origin.requests) == len(FILES) - 5 and len(world.of(BlobReused)) == 5


def test_a_damaged_blob_is_repaired_by_itself(world: World):
    """What has the blob's name is read and moved to quarantine first."""
    world.fetch()
    path = Path(world.store.layout.blob(DIGESTS[9]))
    path.chmod(0o644)
    path.write_bytes(b"damage")
    world.store.blobs.note_suspect(DIGESTS[9])

    outcomes = world.fetch()

    assert outcomes[DIGESTS[9]] is True and world.intact() == DIGESTS
    assert len(list(world.store.layout.quarantine.iterdir())) == 1


def test_a_forced_fetch_is_none_for_batches(world: World):
    """It replaces what is there, and is shared with other processes that force it too."""
    world.fetch()
    world.groups.clear()
    asked = len(world.origin.requests)

    forced = [
        replace(world.request(data), force_refetch=True, seen_commit=world.store.commits_seen(Digest.of(data)))
        for data in FILES
    ]
    assert world.fetcher.obtain_all(forced).keys() == set(DIGESTS)
    assert world.groups == [] and len(world.origin.requests) == asked + len(FILES)


def test_on_a_full_disk_blobs_are_fetched_one_by_one(world: World, monkeypatch: pytest.MonkeyPatch):
    """A group that could not be written is left to the way that says how many bytes each needs."""

    def full(self: object) -> object:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ingest._TempFile, "__enter__", full)

    assert world.fetch() == dict.fromkeys(DIGESTS, False) and world.intact() == DIGESTS
    assert world.groups and sum(e.fetched_bytes for e in world.of(BlobFetched)) > sum(map(len, FILES))


def test_a_group_that_could_not_be_synced_is_reported_as_failed(world: World, monkeypatch: pytest.MonkeyPatch):
    """Its blobs have their names: found intact by a second attempt, they would pass for durable."""

    def broken(self: object, folder: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ingest.Syncer, "sync_folder", broken)
    outcomes = world.fetch()

    assert all(isinstance(outcome, OSError) for outcome in outcomes.values()) and world.of(BlobReused) == []
    assert sum(event.fetched_bytes for event in world.of(BlobFailed)) == sum(map(len, FILES))


def test_large_blobs_behind_small_ones_are_left_to_other_threads(world: World):
    """A batch takes at most one blob that does not fit in it."""
    large = [some_bytes(100_000 + n, seed=100 + n) for n in range(5)]
    requests = map(world.request, [*FILES[:10], *large])
    fetcher = BatchFetcher(world.store, world.context)
    world.fetcher.obtain_all([world.request(FILES[20])])  # opens a connection

    batch = fetcher.fetch(next(requests), requests, lambda: None)
    assert len(batch.outcomes) == 8 and batch.left() == []
    batch = fetcher.fetch(next(requests), requests, lambda: None)
    assert [request.size for request, _ in batch.left()] == [100_000] and len(list(requests)) == 4


def test_what_came_is_committed_while_the_server_stalls(world: World):
    """A response that does not come holds back no other."""
    gate = threading.Event()
    world.origin.gates[DIGESTS[5].hex] = 10, gate
    thread = threading.Thread(target=world.fetch)
    thread.start()
    try:
        assert world.origin.reached.wait(PATIENCE_S)
        wait_until(lambda: set(DIGESTS[1:5]) <= set(world.intact()))
    finally:
        gate.set()
        thread.join()
    assert world.intact() == DIGESTS


def test_after_a_failure_blobs_are_fetched_one_by_one(world: World):
    """A server that has not what it should have is judged by each answer."""
    del world.origin.objects[DIGESTS[20].hex]

    world.fetch()

    assert world.groups == [8, 15]


def test_bytes_that_the_file_system_did_not_keep_are_never_a_blob(world: World, monkeypatch: pytest.MonkeyPatch):
    """What was written is read back before it gets a name."""
    write_all, torn = ingest.write_all, [7, 20]

    def lying(fd: int, data: bytes, offset: int | None = None) -> None:
        torn[:] = [number - 1 for number in torn]
        write_all(fd, data[: 5 if 0 in torn else None], offset)

    monkeypatch.setattr(ingest, "write_all", lying)

    assert world.fetch() == dict.fromkeys(DIGESTS, False)
    for digest, data in zip(DIGESTS, FILES, strict=True):
        assert Path(world.store.layout.blob(digest)).read_bytes() == data


def test_a_server_that_mixes_up_responses_is_asked_one_by_one(world: World):
    """The bodies of one batch are dropped, and no further batch is tried."""
    for digest in DIGESTS[1:9]:
        world.origin.fail(digest.hex, Fault(flip=3))

    assert world.fetch() == dict.fromkeys(DIGESTS, False)
    assert world.groups == [8] and len(world.origin.requests) == len(FILES) + 8


def test_a_batch_whose_lock_was_removed_commits_nothing(world: World):
    """Where lock files are deleted another process may fetch the same: it is judged blob by blob."""
    removed = world.store.blob_lock_path(DIGESTS[4])
    open_gate = threading.Event()
    world.origin.gates[DIGESTS[4].hex] = 10, open_gate

    def remove() -> None:
        world.origin.reached.wait()
        removed.unlink()
        open_gate.set()

    threading.Thread(target=remove).start()
    assert world.fetch() == dict.fromkeys(DIGESTS, False) and world.intact() == DIGESTS
    assert [seen.path for seen in world.origin.requests].count(DIGESTS[2].hex) == 2  # the batch, and by itself


def test_what_came_from_a_slow_server_is_committed_meanwhile(world: World):
    """A kill costs no more than the blobs of the last moment, however long a batch takes."""
    clock = iter(range(10_000))
    fetcher = Fetcher(store=world.store, context=replace(world.context, clock=lambda: next(clock)))

    assert fetcher.obtain_all(map(world.request, FILES)) == dict.fromkeys(DIGESTS, False)
    assert set(world.groups) == {1}


def test_cancelled_while_a_batch_arrives_what_came_is_reported_as_failed(world: World):
    """Nothing of it is committed, its locks are free, and every byte is accounted for."""

    def cancel(event: Event) -> None:
        world.events.append(event)
        if len(world.of(BytesArrived)) == 4:
            world.context.token.cancel()

    object.__setattr__(world.context, "emit", cancel)
    with pytest.raises(Cancelled):
        world.fetch()

    received = sum(event.count for event in world.of(BytesArrived))
    assert sum(event.fetched_bytes for event in world.of(BlobFailed)) == received
    world.store.lock_blob(DIGESTS[3], doing="testing", timeout_s=0).close()


def test_blobs_of_several_sources_or_with_a_failure_on_record_are_fetched_one_by_one(world: World):
    """There is something to choose."""
    request = world.request(FILES[0])

    assert batches.is_simple(world.context, request)
    assert not batches.is_simple(world.context, replace(request, urls=(*request.urls, "http://mirror.invalid/x")))
    assert not batches.is_simple(world.context, replace(request, size=(1 << 16) + 1))
    world.context.failures.note(world.origin.url, "NOT_FOUND", "gone")
    assert not batches.is_simple(world.context, request)


def test_other_sources_are_not_asked_for_batches(world: World):
    """A source that cannot pipeline gets its blobs one by one."""
    source = MemorySource({f"mem://x/{d}": data for d, data in zip(DIGESTS, FILES, strict=True)})
    context = replace(world.context, registry=Registry({"mem": lambda: source}))
    fetcher = Fetcher(store=world.store, context=context)

    requests = [BlobRequest(digest=d, size=len(f), urls=(f"mem://x/{d}",)) for d, f in zip(DIGESTS, FILES, strict=True)]
    assert fetcher.obtain_all(requests) == dict.fromkeys(DIGESTS, False)
    assert world.groups == []


def test_batches_leave_descriptors_to_others(world: World, monkeypatch: pytest.MonkeyPatch):
    """However few this process may have open."""
    monkeypatch.setattr(batches, "most_open", lambda: 64)
    fetcher = Fetcher(store=world.store, context=world.context)

    assert fetcher.obtain_all(map(world.request, FILES)) == dict.fromkeys(DIGESTS, False)
    assert world.groups and max(world.groups) == 4
