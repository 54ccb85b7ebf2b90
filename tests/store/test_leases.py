"""Leases: what work in flight keeps, and for how long."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

import pytest
from store_fixtures import age, store_at

from modelstow.cas import BlobStore, Digest, LockTimeoutError, StoreStateError, leases, locks, records

ONE, TWO = Digest.of(b"one"), Digest.of(b"two")
DAY = 86_400

_HOLD = """
import sys
from pathlib import Path
from modelstow.cas import BlobStore, Digest, leases
lease = leases.take(BlobStore.open(Path(sys.argv[1])), doing="fetching", digests=[Digest.parse(sys.argv[2])])
print("held", flush=True)
sys.stdin.read()
"""


def files(store: BlobStore) -> list[Path]:
    return sorted(store.layout.leases.iterdir())


def active_of(store: BlobStore) -> list[tuple[frozenset[Digest], bool]]:
    return [(record.digests, held) for _, record, held in leases.active(store)]


def test_a_lease_names_its_digests_while_it_is_held(tmp_path: Path):
    """And records what it is for."""
    store = store_at(tmp_path)

    lease = leases.take(store, doing="a test", digests=[ONE, TWO], reserved={TWO: 3})

    [(_, record, held)] = leases.active(store)
    assert (record.doing, record.digests, dict(record.reserved), held) == ("a test", {ONE, TWO}, {TWO: 3}, True)
    lease.finish()
    assert active_of(store) == [] and files(store) == []


def test_a_lease_of_unfinished_work_stays_for_a_week(tmp_path: Path):
    """An interrupted fetch of 400 GB is not garbage that night (D4)."""
    store = store_at(tmp_path)
    leases.take(store, doing="a test", digests=[ONE]).close()
    [path] = files(store)

    assert active_of(store) == [({ONE}, False)]
    age(path, 6.9 * DAY)
    assert active_of(store) == [({ONE}, False)]
    age(path, 7.1 * DAY)
    assert active_of(store) == []
    assert files(store) == [path], "looking removes nothing"
    leases.active(store, remove_expired=True)
    assert files(store) == []


def test_a_held_lease_never_expires(tmp_path: Path):
    """A process that slept for a month still lives."""
    store = store_at(tmp_path)
    lease = leases.take(store, doing="a test", digests=[ONE])
    age(files(store)[0], 30 * DAY)

    leases.active(store, remove_expired=True)

    assert active_of(store) == [({ONE}, True)]
    lease.finish()


def test_a_lease_from_the_future_is_fresh(tmp_path: Path):
    """A clock that was set back makes things young, never old (C17)."""
    store = store_at(tmp_path)
    leases.take(store, doing="a test", digests=[ONE]).close()
    age(files(store)[0], -1000 * DAY)

    leases.active(store, remove_expired=True)

    assert active_of(store) == [({ONE}, False)]


def test_the_lease_of_a_killed_process_is_dead_but_counts(tmp_path: Path):
    """Its lock is free, its file stays."""
    store = store_at(tmp_path)
    argv = [sys.executable, "-c", _HOLD, str(store.layout.root), ONE]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        alive = active_of(store)
        process.kill()

    assert alive == [({ONE}, True)]
    assert active_of(store) == [({ONE}, False)]


def test_a_lease_is_a_record_that_names_its_holder(tmp_path: Path):
    """With version and checksum, as every root; also where there are so many digests that it is compressed."""
    store = store_at(tmp_path)
    many = {Digest.of(b"%d" % number) for number in range(20_000)}
    small, large = (leases.take(store, doing="a test", digests=digests) for digests in ([ONE], many))

    records_ = [records.decode(path.read_bytes(), "lease", version=1) for path in files(store)]

    assert [record["holder"]["pid"] for record in records_] == [os.getpid()] * 2
    assert sorted(len(digests) for digests, _ in active_of(store)) == [1, 20_000]
    small.finish()
    large.finish()


def test_a_lease_of_an_earlier_version_counts(tmp_path: Path):
    """A process that still runs it may hold one."""
    store = store_at(tmp_path)
    path = store.layout.leases / "0123.lease"
    path.write_text(
        f'{{"holder": {{"doing": "fetching"}}, "digests": ["{ONE.hex}", "{TWO.hex}"], "reserved": {{"{TWO.hex}": 3}}}}   '
    )

    [(_, record, held)] = leases.active(store)

    assert (record.doing, record.digests, dict(record.reserved), held) == ("fetching", {ONE, TWO}, {TWO: 3}, False)


def test_a_torn_or_altered_lease_stops_those_who_delete(tmp_path: Path):
    """Its checksum shows it, wherever the bytes end or differ."""
    store = store_at(tmp_path)
    leases.take(store, doing="a test", digests=[ONE, TWO]).close()
    [path] = files(store)
    whole = path.read_bytes()

    for text in (whole[:-40], whole[:-20], whole.replace(ONE.hex.encode(), TWO.hex.encode())):
        path.write_bytes(text)
        with pytest.raises(StoreStateError, match="cannot be read"):
            leases.active(store)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"digests": ["zz"], "reserved": {}}', b'{"digests": 5}', b"\xff"])
def test_a_lease_that_cannot_be_read_stops_those_who_delete(tmp_path: Path, text: bytes):
    """It is not known what it keeps."""
    store = store_at(tmp_path)
    (store.layout.leases / "0123.lease").write_bytes(text)

    with pytest.raises(StoreStateError, match=r"0123\.lease cannot be read"):
        leases.active(store)


def test_renewing_a_valid_lease_costs_nothing(tmp_path: Path):
    """The same file, the same lock."""
    store = store_at(tmp_path)
    lease = leases.take(store, doing="a test", digests=[ONE])
    before = files(store)

    assert lease.renew() and files(store) == before
    lease.finish()


def test_a_lease_that_was_removed_is_recreated(tmp_path: Path):
    """A suspended process wakes after its lease was taken away (C20)."""
    store = store_at(tmp_path)
    lease = leases.take(store, doing="a test", digests=[ONE])
    [path] = files(store)
    path.unlink()

    assert lease.renew() is False

    assert active_of(store) == [({ONE}, True)] and files(store) != [path]
    assert lease.renew() is True
    lease.finish()
    assert files(store) == []


def test_a_lease_that_was_replaced_is_recreated(tmp_path: Path):
    """Another file under its name is not ours."""
    store = store_at(tmp_path)
    lease = leases.take(store, doing="a test", digests=[ONE])
    [path] = files(store)
    text = path.read_bytes()
    path.unlink()
    path.write_bytes(text)

    assert lease.renew() is False
    lease.finish()


def test_a_renewal_that_fails_closes_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A descriptor closed twice may belong to another file by then."""
    store = store_at(tmp_path)
    lease = leases.take(store, doing="a test", digests=[ONE])
    files(store)[0].unlink()

    def busy(*_: object, **__: object) -> locks.Lock:
        raise LockTimeoutError("busy")

    monkeypatch.setattr(leases, "shared_store_lock", busy)
    with pytest.raises(LockTimeoutError):
        lease.renew()
    innocent = [os.open(tmp_path, os.O_RDONLY) for _ in range(3)]

    lease.close()

    for fd in innocent:
        os.fstat(fd)
        os.close(fd)


def test_many_threads_may_renew_at_once(tmp_path: Path):
    """One fetcher serves any number of threads, and each renews before its commit."""
    store = store_at(tmp_path)
    lease = leases.take(store, doing="a test", digests=[ONE])
    failures: list[BaseException] = []
    files(store)[0].unlink()

    def renew() -> None:
        try:
            for _ in range(5):
                lease.renew()
        except BaseException as error:
            failures.append(error)

    threads = [Thread(target=renew) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert active_of(store) == [({ONE}, True)]
    lease.finish()
    assert files(store) == []


def test_a_lease_is_taken_only_while_no_sweep_runs(tmp_path: Path):
    """A blob that was seen under a lease is not swept while it is held (D3)."""
    store = store_at(tmp_path)
    with leases.exclusive_store_lock(store, doing="sweeping"), pytest.raises(LockTimeoutError, match="sweeping"):
        leases.take(store, doing="a test", digests=[ONE], timeout_s=0)

    assert files(store) == []


def test_a_waiting_sweep_is_not_starved_by_those_who_share(tmp_path: Path):
    """New shared takers queue behind the gate that the sweep holds while it waits (D15)."""
    store = store_at(tmp_path)
    reader = leases.shared_store_lock(store, doing="adding")
    waiting, had = Event(), Event()

    def sweep() -> None:
        waiting.set()
        with leases.exclusive_store_lock(store, doing="sweeping"):
            had.set()

    thread = Thread(target=sweep)
    thread.start()
    assert waiting.wait(10)
    while thread.is_alive() and not locks.is_held(store.layout.locks / "gate"):
        thread.join(0.001)
    with pytest.raises(LockTimeoutError):
        leases.shared_store_lock(store, doing="adding too", timeout_s=0)
    assert not had.is_set()
    reader.close()
    thread.join(10)

    assert had.is_set()


def test_leases_of_dead_work_go_when_all_they_name_was_fetched(tmp_path: Path):
    """Running again after a crash leaves no trace of the crash; what names more stays."""
    store = store_at(tmp_path)
    leases.take(store, doing="done by now", digests=[ONE]).close()
    leases.take(store, doing="not done", digests=[ONE, TWO]).close()
    held = leases.take(store, doing="at work", digests=[ONE])

    leases.drop_superseded(store, frozenset([ONE]))

    left = sorted((record.doing, held) for _, record, held in leases.active(store))
    assert left == [("at work", True), ("not done", False)]
    held.finish()


def test_a_lease_that_cannot_be_made_durable_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is relied on without it."""
    store = store_at(tmp_path)
    # The lock files are there already, so that only the lease is synced.
    leases.take(store, doing="warm up", digests=[]).finish()

    def failing(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output"):
        leases.take(store, doing="a test", digests=[ONE])
    assert active_of(store) == []


def test_what_a_crash_left_of_an_unborn_lease_counts_for_nothing_and_goes(tmp_path: Path):
    """It was never renamed, so no process relied on it."""
    store = store_at(tmp_path)
    unborn = store.layout.leases / ".tmp-0123"
    unborn.write_text("half")

    with locks.acquire(unborn, doing="writing it just now"):
        store.remove_temp_files()
        assert unborn.exists()

    store.remove_temp_files()
    assert leases.active(store) == [] and not unborn.exists()


def test_the_leases_of_a_shared_store_can_be_read_by_the_group(tmp_path: Path):
    """Else the gc of one user would stop at the lease of another (M5)."""
    store = store_at(tmp_path, shared=True)
    lease = leases.take(store, doing="a test", digests=[ONE])

    assert stat.S_IMODE(files(store)[0].stat().st_mode) == 0o664
    lease.finish()
