"""Blobs in pieces of other sizes: downloaded, resumed, repaired, read from mirrors and pushed by their own chunking."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from builders import PATIENCE_S, Cli, ensurer_of, leftovers, lock_of, some_bytes, wait_until, write_lock
from mirror import name_of, packed, push_of, weights
from origin import Fault, Origin, gate_of

from modelstow import ModelEnsurer
from modelstow.backends import Body
from modelstow.cas import BlobStore, Digest, syscalls
from modelstow.cas.chunking import DEFAULT, MAX_FETCHED_PIECE_BYTES, Chunking
from modelstow.cas.pieces import PieceTable, piece_hash, proven_table, read_table
from modelstow.cas.scrub import Level
from modelstow.reconcile.desired.mirrors import PrefixMirrors
from modelstow.reconcile.errors import IntegrityError
from modelstow.reconcile.events.events import Event, SourceFailed
from modelstow.reconcile.transfer.retry import RetryPolicy
from modelstow.reconcile.transfer.state import Request
from modelstow.reconcile.transfer.worker import Worker

pytestmark = pytest.mark.slow

TINY, FINE, COARSE, HUGE = Chunking(64 << 10), Chunking(1 << 20), Chunking(64 << 20), Chunking(128 << 20)
SMALL = weights((9 << 20) + 77, seed=1)
LARGE = some_bytes(1 << 20, 2) * 65 + b"the end"  # more than a piece of 64 MiB


def lock_for(data: bytes, *sources: str):
    return lock_of({"m@1": {"v": {"model.bin": data}}}, sources)


def begun(root: Path, data: bytes, chunking: Chunking, *pieces: int) -> None:
    """Leave a partial of this chunking in a store."""
    store = BlobStore.open(root)
    store.prepare()
    partial = store.ingest.open(Digest.of(data), len(data), chunking=chunking)
    for piece in pieces:
        start, stop = partial.table.range(piece)
        partial.write(start, data[start:stop])
        partial.finish(piece, piece_hash(data[start:stop]))
    partial.close()


def rot(root: Path, data: bytes, at: int) -> BlobStore:
    """Flip a bit of a blob in a store behind stat's back."""
    store = BlobStore.open(root)
    blob = Path(store.layout.blob(Digest.of(data)))
    found = blob.stat()
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))
    blob.chmod(0o444)
    os.utime(blob, ns=(found.st_atime_ns, found.st_mtime_ns))
    return store


def table_of(root: Path, data: bytes) -> PieceTable:
    """The proven table of a blob."""
    table = proven_table(BlobStore.open(root).layout.table(Digest.of(data)), Digest.of(data), len(data))
    assert table is not None
    return table


@contextmanager
def held(folder: Path, data: bytes, chunking: Chunking) -> Iterator[tuple[ModelEnsurer, Origin]]:
    """An ensurer whose store holds a blob of this chunking, and its source."""
    with Origin({"m/model.bin": data}) as origin:
        begun(folder / "root", data, chunking, *range(chunking.count(len(data))))
        models = ensurer_of(folder, lock_for(data, f"{origin.url}/m"))
        models.ensure("m")
        assert table_of(folder / "root", data).chunking == chunking and origin.sent() == 0
        yield models, origin


@pytest.mark.parametrize("kind", ["http", "whole", "file", "reflink"])
@pytest.mark.parametrize(("data", "chunking"), [(SMALL, TINY), (SMALL, FINE), (SMALL, COARSE), (LARGE, COARSE)])
def test_a_blob_of_any_chunking_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, chunking: Chunking, kind: str
):
    """In ranges, from a server that ignores them, from a file, and at once; its table is of that chunking, and right."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m/model.bin").write_bytes(data)
    begun(tmp_path / "root", data, chunking)
    with Origin({"m/model.bin": data}) as origin:
        origin.fail("*", Fault(ignore_range=kind == "whole", times=-1))
        source = str(tmp_path / "m") if kind in ("file", "reflink") else f"{origin.url}/m"
        if kind == "reflink":
            monkeypatch.setattr(syscalls, "reflink", lambda source, target: os.sendfile(target, source, 0, len(data)))

        path = ensurer_of(tmp_path, lock_for(data, source)).ensure("m")

    assert (path / "model.bin").read_bytes() == data and leftovers(tmp_path / "root") == []
    table = table_of(tmp_path / "root", data)
    assert table.chunking == chunking
    hashes = [piece_hash(data[slice(*table.range(index))]) for index in range(chunking.count(len(data)))]
    assert [slot and slot.hash for slot in table.slots] == hashes


def test_a_killed_download_is_resumed_by_its_own_chunking(cli: Cli):
    """kill -9 after some pieces of 1 MiB: they are not requested again."""
    begun(cli.root, SMALL, FINE, 0)
    journal = cli.root / "partial" / f"{Digest.of(SMALL).hex}.pieces"

    def finished() -> int:
        table = read_table(str(journal), Digest.of(SMALL))
        return 0 if table is None else sum(slot is not None for slot in table.slots)

    with Origin({"m/model.bin": SMALL}) as origin:
        write_lock(cli.folder, lock_for(SMALL, f"{origin.url}/m"))
        gate = gate_of(origin, "m/model.bin", after=(5 << 20) + 1000)
        with cli.start("ensure", "m", "--connections", "1") as process:
            assert origin.reached.wait(PATIENCE_S)
            wait_until(lambda: finished() == 5, running=lambda: process.poll() is None)
            process.kill()
        gate.set()

        done = cli.ok("ensure", "m", "--json", "--connections", "1").json["summary"]

    assert (done["resumed_bytes"], done["fetched_bytes"]) == (5 << 20, len(SMALL) - (5 << 20))
    assert table_of(cli.root, SMALL).chunking == FINE


@pytest.mark.parametrize(
    ("data", "chunking", "at", "fetched"),
    [
        (SMALL, TINY, (3 << 20) + 5, 64 << 10),
        (SMALL, FINE, (5 << 20) + 5, 1 << 20),
        (LARGE, COARSE, len(LARGE) - 1, len(LARGE) - (64 << 20)),
    ],
)
def test_a_repair_fetches_the_damaged_piece_of_the_tables_chunking(
    tmp_path: Path, data: bytes, chunking: Chunking, at: int, fetched: int
):
    """The others come from the damaged blob."""
    with held(tmp_path, data, chunking) as (models, origin):
        rot(tmp_path / "root", data, at)

        found, outcome = models.verify(None, Level.FAST, repair=True)

        assert [fault.pieces for fault in found.faults if fault.pieces] == [(chunking.index_at(at),)]
        assert outcome is not None and outcome.error is None
        assert origin.sent("m/model.bin") == outcome.report.repaired_bytes == fetched
    assert table_of(tmp_path / "root", data).chunking == chunking and models.verify_integrity("m").success


def test_a_table_of_pieces_that_are_too_large_is_no_help_for_a_repair(tmp_path: Path):
    """The blob is fetched as one without a table would be."""
    assert HUGE.piece_bytes > MAX_FETCHED_PIECE_BYTES
    with held(tmp_path, SMALL, HUGE) as (models, origin):
        rot(tmp_path / "root", SMALL, 5)

        _, outcome = models.verify(None, Level.FAST, repair=True)

        assert outcome is not None and outcome.error is None and origin.sent("m/model.bin") == len(SMALL)
    assert table_of(tmp_path / "root", SMALL).chunking == DEFAULT and models.verify_integrity("m").success


def test_a_source_that_is_right_gets_longer_for_a_larger_piece():
    """A piece of 64 MiB may take eight times as long as one of 8 MiB."""
    clock = itertools.count()

    class Sink:
        size, chunking = 64 << 20, COARSE

        def open(self, request: Request) -> Body:
            return Body(start=0, total=self.size, read_into=lambda view: 1)

        def __getattr__(self, name: str):
            return lambda *args: name != "whole_file"

    policy = RetryPolicy(piece_s=100.0, floor_bytes_s=0)
    request = Request(claim=1, locator="mem://x", start=0, stop=64 << 20)

    failure = Worker(Sink(), policy, lambda: float(next(clock))).run(request)

    assert failure is not None and failure.what == "a piece took longer than 800 s"


# ---- mirrors


@pytest.mark.parametrize("whole", [False, True], ids=["ranges", "whole"])
@pytest.mark.parametrize("partial", [TINY, DEFAULT, COARSE])
@pytest.mark.parametrize("frames", [TINY, FINE, DEFAULT])
def test_frames_of_other_pieces_than_the_partial_serve_it(tmp_path: Path, frames: Chunking, partial: Chunking, whole: bool):
    """What a range does not begin or end with is skipped."""
    heard: list[Event] = []
    first = [0] if partial == TINY else []  # so that a range begins in the middle of a frame
    begun(tmp_path / "root", SMALL, partial, *first)
    with Origin({name_of(SMALL, ".pzst"): packed(SMALL, chunking=frames)[1]}) as origin:
        origin.fail("*", Fault(ignore_range=whole, times=-1))
        models = ensurer_of(tmp_path, lock_for(SMALL), mirrors=[PrefixMirrors((origin.url,))], events=heard.append)

        path = models.ensure("m")

    assert (path / "model.bin").read_bytes() == SMALL
    assert [event for event in heard if isinstance(event, SourceFailed)] == []
    assert table_of(tmp_path / "root", SMALL).chunking == partial


def test_frames_of_pieces_that_are_too_large_are_refused(tmp_path: Path):
    """Each connection would take their memory; the plain blob of the same mirror serves."""
    heard: list[Event] = []
    names = {name_of(SMALL, ".pzst"): packed(SMALL, chunking=Chunking(16 << 20))[1], name_of(SMALL): SMALL}
    with Origin(names) as origin:
        models = ensurer_of(tmp_path, lock_for(SMALL), mirrors=[PrefixMirrors((origin.url,))], events=heard.append)

        path = models.ensure("m")

        assert (path / "model.bin").read_bytes() == SMALL and origin.sent(name_of(SMALL)) == len(SMALL)
    [failed] = [event for event in heard if isinstance(event, SourceFailed)]
    assert failed.locator.endswith(".pzst") and "its pieces have 16,777,216 bytes" in failed.what


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(("data", "chunking"), [(SMALL, TINY), (SMALL, FINE), (SMALL, COARSE), (LARGE, COARSE)])
def test_a_blob_of_any_chunking_is_pushed(tmp_path: Path, data: bytes, chunking: Chunking, compress: bool):
    """As its table divides it where its pieces are sent at once, else in pieces of the default size."""
    with held(tmp_path / "here", data, chunking):
        push_of(BlobStore.open(tmp_path / "here/root"), tmp_path / "mirror", compress=compress).run(
            {Digest.of(data): len(data)}
        )
    table = read_table(str(tmp_path / "mirror" / name_of(data, ".pieces")), Digest.of(data))
    assert table is not None and table.complete and table.chunking == (DEFAULT if chunking == COARSE else chunking)
    there = ensurer_of(tmp_path / "there", lock_for(data), mirrors=[PrefixMirrors((str(tmp_path / "mirror"),))])
    assert (there.ensure("m") / "model.bin").read_bytes() == data


@pytest.mark.parametrize("chunking", [FINE, COARSE])
def test_a_damaged_blob_of_any_chunking_is_not_pushed(tmp_path: Path, chunking: Chunking):
    """Neither by its table nor by the one that replaces it for the push."""
    with held(tmp_path, SMALL, chunking):
        store = rot(tmp_path / "root", SMALL, len(SMALL) - 1)

        with pytest.raises(IntegrityError):
            push_of(store, tmp_path / "mirror").run({Digest.of(SMALL): len(SMALL)})

    assert not (tmp_path / "mirror" / name_of(SMALL)).exists()
