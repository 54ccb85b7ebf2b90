"""Publishing blobs to a mirror: by digest, in the layout of ``blobs/``, plain or as compressed pieces.

What is there is not sent again; what an interrupted push left unfinished is gone on with. Every byte is checked against
the blob's piece table, or its sha256, on its way out: a damaged blob is never published.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import TypeVar

from backends import NotFound, Registry
from backends.base import Reader, Source, Target
from cas import BlobState, BlobStore, Digest, Stopped, leases, scrub
from cas.codec import PackIndex, pack
from cas.layout import TABLE_FROM
from cas.partial import read_fully
from cas.pieces import PieceTable, open_regular, piece_count, piece_hash, piece_range, proven_table
from cas.scrub import Level

from ..errors import IntegrityError, InvalidConfigError
from ..execution.executor import PACKED, mirrored
from ..execution.retry import RetryPolicy, patiently

_T = TypeVar("_T")
WORTH = 0.9
"""A blob is published compressed only if that takes less than so much of its size."""
_SAMPLES = 4  # pieces that are tried before all are


@dataclass(slots=True)
class Pushed:
    """What a push did, or with *dry_run* would do."""

    sent: list[Digest] = field(default_factory=list)
    there: int = 0  # blobs that were there
    packed: int = 0  # of those sent, as compressed pieces
    bytes: int = 0  # of all blobs that were sent, as they are in the store
    sent_bytes: int = 0  # as they went out, tables and indexes included


@dataclass(slots=True, kw_only=True)
class Push:
    """One push into the mirror at *url*. *pay* is told of every byte before it is sent."""

    store: BlobStore
    registry: Registry
    url: str
    compress: bool = False
    dry_run: bool = False
    threads: int = 8
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    stop: Event = field(default_factory=Event)
    pay: Callable[[int], None] = lambda count: None
    _mutex: Lock = field(default_factory=Lock)

    def run(self, sizes: Mapping[Digest, int]) -> Pushed:
        """Publish these blobs, by digest and size, largest first.

        Raises InvalidConfigError where one is not in the store or *url* cannot be written to, IntegrityError for a damaged
        one, SourceError, Stopped, OSError.
        """
        if not isinstance(self.registry.find(self.url), Target):
            raise InvalidConfigError(f"{self.url} cannot be written to", hint="push to a folder or to s3://bucket/prefix")
        done = Pushed()
        lease = leases.take(self.store, doing="push", digests=list(sizes), stop=self.stop)
        try:
            absent = [d for d, size in sizes.items() if self.store.look(d, size).state is not BlobState.INTACT]
            if absent:
                what = f"{len(absent)} of {len(sizes)} blobs are not in the store, or changed"
                raise InvalidConfigError(what, hint="run `modelstow ensure` with the same selectors first")
            self._publish_all(sizes, done)
        finally:
            lease.finish()
        done.sent.sort()
        return done

    def _publish_all(self, sizes: Mapping[Digest, int], done: Pushed) -> None:
        order = sorted(sizes, key=lambda digest: (-sizes[digest], digest))
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                list(pool.map(lambda digest: self._publish(digest, sizes[digest], done), order))
            except BaseException:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _publish(self, digest: Digest, size: int, done: Pushed) -> None:
        plain = mirrored(self.url, digest)
        names = [plain + PACKED, plain] if self.compress and size > TABLE_FROM else [plain]
        if any(self._is_there(name, size if name == plain else None) for name in names):
            with self._mutex:
                done.there += 1
            return
        sent, packed = 0, False
        if not self.dry_run:
            with _Blob(self.store, digest, size, self.stop) as blob:
                if size > TABLE_FROM:
                    table = blob.table.encode()
                    sent += self._put(f"{plain}.pieces", len(table), lambda start, stop: table[start:stop])
                if len(names) > 1 and blob.is_worth_packing():
                    with tempfile.TemporaryFile(dir=self.store.layout.partials) as spool:
                        index = blob.pack_into(spool.fileno())
                        if packed := index.total < size * WORTH:
                            sent += self._put(plain + PACKED, index.total, _packed_reader(index, spool.fileno()))
                if not packed:
                    sent += self._put(plain, size, blob.read)
        with self._mutex:
            done.sent.append(digest)
            done.packed, done.bytes, done.sent_bytes = done.packed + packed, done.bytes + size, done.sent_bytes + sent

    def _is_there(self, locator: str, size: int | None) -> bool:
        try:
            found = self._patiently(lambda source: source.size(locator))
        except NotFound:
            return False
        return size is None or found in (None, size)

    def _put(self, locator: str, size: int, read: Reader) -> int:
        def paid(start: int, stop: int) -> bytes:
            if self.stop.is_set():
                raise Stopped("stopped; what was sent is kept, and the next push continues there")
            self.pay(stop - start)
            return read(start, stop)

        def put(source: Source) -> int:
            assert isinstance(source, Target)
            return source.put(locator, size, paid)

        return self._patiently(put)

    def _patiently(self, ask: Callable[[Source], _T]) -> _T:
        return patiently(lambda: ask(self.registry.find(self.url)), self.policy, self.stop)


class _Blob:
    """A blob that is read for the outside: nothing leaves that is not what its table, or its name, says."""

    def __init__(self, store: BlobStore, digest: Digest, size: int, stop: Event) -> None:
        self._store, self._digest, self._size, self._stop = store, digest, size, stop
        self._fd = open_regular(store.layout.blob(digest))
        self.table = self._proven_table() if size > TABLE_FROM else PieceTable(digest, size)

    def __enter__(self) -> _Blob:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def _proven_table(self) -> PieceTable:
        path = self._store.layout.table(self._digest)
        table = proven_table(path, self._digest, self._size)
        if table is None:  # it was lost: only a whole sha256 makes another
            blob = self._store.layout.blob(self._digest)
            target = scrub.Target(path=blob, digest=self._digest, size=self._size, table=path, makes_table=True)
            next(scrub.scrub([target], Level.FULL))
            table = proven_table(path, self._digest, self._size)
        if table is None:
            raise self._damaged()
        return table

    def read(self, start: int, stop: int) -> bytes:
        """Bytes of whole pieces, checked. Raises IntegrityError, OSError."""
        data = bytearray(stop - start)
        if not read_fully(self._fd, memoryview(data), start):
            raise self._damaged()
        if self._size <= TABLE_FROM:
            if Digest.of(bytes(data)) != self._digest:
                raise self._damaged()
            return bytes(data)
        for index in range(piece_count(self._size)):
            first, end = piece_range(index, self._size)
            slot = self.table.slots[index]
            if start <= first < stop and (
                slot is None or piece_hash(memoryview(data)[first - start : end - start]) != slot.hash
            ):
                raise self._damaged()
        return bytes(data)

    def is_worth_packing(self) -> bool:
        """Whether some pieces, evenly spread, become small enough: the rest is not read where they do not."""
        count = piece_count(self._size)
        tried = sorted({index * count // _SAMPLES for index in range(_SAMPLES)})
        pieces = [self.read(*piece_range(index, self._size)) for index in tried]
        return sum(len(pack(piece)) for piece in pieces) < WORTH * sum(map(len, pieces))

    def pack_into(self, fd: int) -> PackIndex:
        """Write every piece's frame, one after the other; where they are."""
        lengths = []
        for index in range(piece_count(self._size)):
            if self._stop.is_set():
                raise Stopped("stopped")
            frame = pack(self.read(*piece_range(index, self._size)))
            done = 0
            while done < len(frame):
                done += os.write(fd, frame[done:])
            lengths.append(len(frame))
        return PackIndex.of(self._digest, self._size, lengths)

    def _damaged(self) -> IntegrityError:
        self._store.note_suspect(self._digest)
        what = f"blob {self._digest.short}… is damaged, and was not published"
        return IntegrityError(what, hint="run `modelstow verify --repair`, then push again", digest=self._digest)


def _packed_reader(index: PackIndex, fd: int) -> Reader:
    head = index.encode()

    def read(start: int, stop: int) -> bytes:
        data = bytearray(head[start:stop])
        at = max(0, start - len(head))
        while len(data) < stop - start:
            part = os.pread(fd, stop - start - len(data), at)
            if not part:
                raise OSError(f"the spool of {index.digest.short} ended early")
            data += part
            at += len(part)
        return bytes(data)

    return read
