"""Publishing blobs to a mirror: by digest, in the layout of ``blobs/``, plain or as compressed pieces.

What is there is not sent again; what an interrupted push left unfinished is gone on with. Every byte is checked against
the blob's piece table, or its sha256, on its way out: a damaged blob is never published.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import TypeVar

from modelstow.backends import NotFound, Offline, Registry, SourceError, redact
from modelstow.backends.source import ReadRange, Source, Target
from modelstow.cas import BlobState, BlobStore, CancellationToken, Digest, leases
from modelstow.cas.chunking import DEFAULT, Chunking
from modelstow.cas.compressed import CompressedIndex, compress
from modelstow.cas.durable import write_all
from modelstow.cas.layout import TABLE_FROM
from modelstow.cas.pieces import (
    PieceTable,
    TableState,
    open_regular,
    piece_hash,
    proven_table,
)
from modelstow.cas.scrub import hash_file

from ..desired.mirrors import COMPRESSED_SUFFIX, mirrored
from ..errors import IntegrityError, InvalidConfigError, listing
from ..events.events import Sink
from ..events.progress import Task
from ..transfer.pool import WorkerPool
from ..transfer.retry import RetryPolicy, with_retries

_T = TypeVar("_T")
MIN_SAVING = 0.9
"""A blob is published compressed only if that takes less than so much of its size."""
_STOPPED = "stopped; what was sent is kept, and the next push continues there"
_SAMPLES = 4  # pieces that are tried before all are
PROGRESS_RESET_BYTES = 64 << 20  # an attempt that sent so many bytes was not in vain: all attempts are there again


@dataclass(slots=True)
class Pushed:
    """What a push did, or with *dry_run* would do."""

    sent: list[Digest] = field(default_factory=list)
    there: int = 0  # blobs that were there
    packed: int = 0  # of those sent, as compressed pieces
    bytes: int = 0  # of all blobs that were sent, as they are in the store
    sent_bytes: int = 0  # as they went out, tables and indexes included
    damaged: list[Digest] = field(default_factory=list)  # found so, and not sent


@dataclass(slots=True, kw_only=True)
class Push:
    """One push into the mirror at *url*. *pay* is told of every byte before it is sent. ``done`` tells how far it is."""

    store: BlobStore
    registry: Registry
    url: str
    compress: bool = False
    dry_run: bool = False
    threads: int = 8
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    token: CancellationToken = field(default_factory=CancellationToken)  # of this push, a child of the caller's
    pay: Callable[[int], None] = lambda count: None
    emit: Sink = lambda event: None
    done: Pushed = field(default_factory=Pushed)
    _mutex: Lock = field(default_factory=Lock)

    def run(self, sizes: Mapping[Digest, int]) -> Pushed:
        """Publish these blobs, by digest and size, largest first.

        Raises InvalidConfigError where one is not in the store or *url* cannot be written to, IntegrityError for damaged
        ones when the others are there, SourceError, Cancelled, OSError.
        """
        self._look_at_target()
        done = self.done
        lease = leases.take(self.store, doing="push", digests=list(sizes), token=self.token)
        try:
            absent = [d for d, size in sizes.items() if self.store.blobs.stat(d, size).state is not BlobState.INTACT]
            if absent:
                what = f"{len(absent)} of {len(sizes)} blobs are not in the store, or changed"
                raise InvalidConfigError(what, hint="run `modelstow ensure` with the same selectors first")
            with Task(f"sending {len(sizes):,} blob{'s' * (len(sizes) > 1)}", self.emit) as task:
                task.begin(sum(sizes.values()))
                self._publish_all(sizes, task)
        finally:
            lease.finish()
            done.sent.sort()
        if done.damaged:
            count, names = len(done.damaged), listing(sorted(f"{digest.short}…" for digest in done.damaged))
            what = (
                f"{count} blob{'s are' if count > 1 else ' is'} damaged, and {'were' if count > 1 else 'was'} not published"
            )
            faults = [{"kind": "corrupt", "digest": digest} for digest in sorted(done.damaged)]
            hint = "run `modelstow verify --repair`, then push again"
            raise IntegrityError(f"{what}: {names}", hint=hint, faults=faults)
        return done

    def _look_at_target(self) -> None:
        what = f"{redact(self.url)} cannot be written to"
        try:
            if isinstance(self.registry.find(self.url), Target):
                return
        except Offline:
            raise
        except SourceError as error:
            what = error.what
        raise InvalidConfigError(what, hint="push to a folder or to s3://bucket/prefix")

    def _publish_all(self, sizes: Mapping[Digest, int], task: Task) -> None:
        order = sorted(sizes, key=lambda digest: (-sizes[digest], digest))
        with WorkerPool(self.threads, "push", token=self.token, cancelled=_STOPPED) as pool:
            for digest in order:
                pool.start(self._publish, digest, sizes[digest], task)
            while pool.busy:
                pool.wait()

    def _publish(self, digest: Digest, size: int, task: Task) -> None:
        left = size  # what is sent twice is no progress

        def tell(count: int) -> None:
            nonlocal left
            count = min(count, left)
            left -= count
            task.advance(count)

        self._publish_once(digest, size, tell)
        tell(left)

    def _publish_once(self, digest: Digest, size: int, tell: Callable[[int], None]) -> None:
        plain = mirrored(self.url, digest)
        names = [plain + COMPRESSED_SUFFIX, plain] if self.compress and size > TABLE_FROM else [plain]
        if any(self._is_there(name, size if name == plain else None) for name in names):
            with self._mutex:
                self.done.there += 1
            return
        sent, packed = 0, False
        if not self.dry_run:
            try:
                sent, packed = self._send(digest, size, plain, tell)
            except _Damaged:
                self.store.blobs.note_suspect(digest)
                with self._mutex:
                    self.done.damaged.append(digest)
                return
        with self._mutex:
            self.done.sent.append(digest)
            self.done.packed += packed
            self.done.bytes += size
            self.done.sent_bytes += sent

    def _send(self, digest: Digest, size: int, plain: str, tell: Callable[[int], None]) -> tuple[int, bool]:
        """Put one blob and its table; how many bytes went out, and whether as compressed pieces. *tell* is told of each."""
        with _Blob(self.store, digest, size, self.token) as blob:
            sent = 0
            if blob.table is not None:
                table = blob.table.encode()
                if not self._is_there(f"{plain}.pieces", len(table)):
                    sent += self._put(f"{plain}.pieces", len(table), lambda start, stop: table[start:stop])
                if self.compress and blob.is_worth_compressing():
                    with tempfile.TemporaryFile(dir=self.store.layout.partials) as spool:
                        index = blob.compress_into(spool.fileno())
                        if index.total < size * MIN_SAVING:
                            sent += self._put(
                                plain + COMPRESSED_SUFFIX, index.total, _compressed_reader(index, spool.fileno()), tell
                            )
                            return sent, True
            return sent + self._put(plain, size, blob.read, tell), False

    def _is_there(self, locator: str, size: int | None) -> bool:
        try:
            found = self._patiently(lambda source: source.size(locator))
        except NotFound:
            return False
        return size is None or found in (None, size)

    def _put(self, locator: str, size: int, read: ReadRange, tell: Callable[[int], None] = lambda count: None) -> int:
        attempt_bytes = 0

        def go_on() -> None:
            self.token.check(_STOPPED)

        def checked(start: int, stop: int) -> bytes:
            go_on()
            return read(start, stop)

        def paid(count: int) -> None:
            nonlocal attempt_bytes
            self.pay(count)
            go_on()
            attempt_bytes += count
            tell(count)

        def put(source: Source) -> int:
            nonlocal attempt_bytes
            attempt_bytes = 0
            assert isinstance(source, Target)
            return source.put(locator, size, checked, paid)

        return self._patiently(put, lambda: attempt_bytes > PROGRESS_RESET_BYTES)

    def _patiently(self, ask: Callable[[Source], _T], progressed: Callable[[], bool] = lambda: False) -> _T:
        return with_retries(lambda: ask(self.registry.find(self.url)), self.policy, self.token, progressed=progressed)


class _Damaged(Exception):
    """What was read of a blob is not what it was proven to be."""


class _Blob:
    """A blob that is read for the outside: nothing leaves that is not what its table, or its name, says."""

    def __init__(self, store: BlobStore, digest: Digest, size: int, token: CancellationToken) -> None:
        self._store, self._digest, self._size, self._token = store, digest, size, token
        self._fd = open_regular(store.layout.blob(digest))
        self.table: PieceTable | None = None

    def __enter__(self) -> _Blob:
        """Raises _Damaged, OSError."""
        try:
            self.table = self._proven_table() if self._size > TABLE_FROM else None
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    @property
    def _chunking(self) -> Chunking:
        return self.table.chunking if self.table is not None else DEFAULT

    def _proven_table(self) -> PieceTable:
        table = proven_table(self._store.layout.table(self._digest), self._digest, self._size)
        if table is None:  # it was lost: only a whole sha256 makes another
            table = hash_file(self._fd, self._size)
            if table.digest != self._digest:
                raise _Damaged
            table.state = TableState.PROVEN
        return table

    def read(self, start: int, stop: int) -> bytes:
        """Bytes of whole pieces, checked. Raises _Damaged, OSError."""
        data = self._read(start, stop)
        if self.table is None:
            if Digest.of(data) != self._digest:
                raise _Damaged
            return data
        view = memoryview(data)
        for index in range(self._chunking.index_at(start), self._chunking.count(stop)):
            first, end = self.table.range(index)
            slot = self.table.slots[index]
            if slot is None or piece_hash(view[first - start : end - start]) != slot.hash:
                raise _Damaged
        return data

    def _read(self, start: int, stop: int) -> bytes:
        data = os.pread(self._fd, stop - start, start)
        while len(data) < stop - start:
            part = os.pread(self._fd, stop - start - len(data), start + len(data))
            if not part:
                raise _Damaged
            data += part
        return data

    def is_worth_compressing(self) -> bool:
        """Whether some pieces, evenly spread, become small enough: the rest is not read where they do not."""
        count = self._chunking.count(self._size)
        tried = sorted({index * count // _SAMPLES for index in range(_SAMPLES)})
        pieces = [self.read(*self._chunking.range(index, self._size)) for index in tried]
        return sum(len(compress(piece)) for piece in pieces) < MIN_SAVING * sum(map(len, pieces))

    def compress_into(self, fd: int) -> CompressedIndex:
        """Write every piece's frame, one after the other; where they are."""
        lengths = []
        for index in range(self._chunking.count(self._size)):
            self._token.check(_STOPPED)
            frame = compress(self.read(*self._chunking.range(index, self._size)))
            write_all(fd, frame)
            lengths.append(len(frame))
        return CompressedIndex.of(self._digest, self._size, lengths, self._chunking)


def _compressed_reader(index: CompressedIndex, fd: int) -> ReadRange:
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
