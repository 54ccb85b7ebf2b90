"""Publication of blobs to a mirror: by digest, in the layout of ``blobs/``, plain or as compressed pieces.

A blob that is present is not sent again, and an interrupted upload is resumed. Every byte is checked against the blob's
piece table, or its sha256, before it is sent: a damaged blob is never published.
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
    piece_hash,
    proven_table,
)
from modelstow.cas.scrub import hash_file
from modelstow.cas.untrusted import open_regular

from ..desired.mirrors import COMPRESSED_SUFFIX, mirrored
from ..errors import IntegrityError, InvalidConfigError, listing
from ..events.events import Sink
from ..events.progress import Task
from ..transfer.pool import WorkerPool
from ..transfer.retry import RetryPolicy, with_retries

_T = TypeVar("_T")
MIN_SAVING = 0.9
"""The share of its size below which a compressed blob must be, to be published instead of the plain one."""
_STOPPED = "stopped; what was sent is kept, and the next push continues there"
_SAMPLES = 4  # pieces to compress on trial, before the whole blob
PROGRESS_RESET_BYTES = 64 << 20
"""The bytes that an attempt must have sent for the count of attempts to start again."""


@dataclass(slots=True)
class Pushed:
    """The result of a push, or with *dry_run* its forecast. It is filled while the push runs."""

    sent: list[Digest] = field(default_factory=list)
    present: int = 0  # blobs that the mirror had
    compressed: int = 0  # blobs that were sent as compressed pieces
    bytes: int = 0  # of the blobs that were sent, as they are in the store
    sent_bytes: int = 0  # that were sent for them, piece tables and indexes included
    damaged: list[Digest] = field(default_factory=list)  # blobs that were found damaged, and so not sent


@dataclass(slots=True, kw_only=True)
class Push:
    """One push into the mirror at *url*.

    *pay* is the rate limiter: it is called with each number of bytes before they are sent. *done* has the result so far.
    """

    store: BlobStore
    registry: Registry
    url: str
    compress: bool = False
    dry_run: bool = False
    threads: int = 8  # blobs at once
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    token: CancellationToken = field(default_factory=CancellationToken)  # of this push, a child of the caller's
    pay: Callable[[int], None] = lambda count: None
    emit: Sink = lambda event: None
    done: Pushed = field(default_factory=Pushed)
    _mutex: Lock = field(default_factory=Lock)

    def run(self, sizes: Mapping[Digest, int]) -> Pushed:
        """Publish blobs, given by digest and size in bytes, largest first.

        Raises InvalidConfigError where a blob is not in the store or *url* cannot be written to; IntegrityError for
        damaged blobs, once the others are published; SourceError, Cancelled, OSError.
        """
        self._check_target()
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

    def _check_target(self) -> None:
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
        remaining = size  # bytes that are sent twice are no progress

        def advance(count: int) -> None:
            nonlocal remaining
            count = min(count, remaining)
            remaining -= count
            task.advance(count)

        self._publish_once(digest, size, advance)
        advance(remaining)

    def _publish_once(self, digest: Digest, size: int, advance: Callable[[int], None]) -> None:
        plain = mirrored(self.url, digest)
        names = [plain + COMPRESSED_SUFFIX, plain] if self.compress and size > TABLE_FROM else [plain]
        if any(self._is_present(name, size if name == plain else None) for name in names):
            with self._mutex:
                self.done.present += 1
            return
        sent_bytes, compressed = 0, False
        if not self.dry_run:
            try:
                sent_bytes, compressed = self._send(digest, size, plain, advance)
            except _Damaged:
                self.store.blobs.note_suspect(digest)
                with self._mutex:
                    self.done.damaged.append(digest)
                return
        with self._mutex:
            self.done.sent.append(digest)
            self.done.compressed += compressed
            self.done.bytes += size
            self.done.sent_bytes += sent_bytes

    def _send(self, digest: Digest, size: int, plain: str, advance: Callable[[int], None]) -> tuple[int, bool]:
        """Upload a blob and its piece table. Returns the bytes sent, and whether they are compressed pieces."""
        with _Blob(self.store, digest, size, self.token) as blob:
            sent = 0
            if blob.table is not None:
                table = blob.table.encode()
                if not self._is_present(f"{plain}.pieces", len(table)):
                    sent += self._put(f"{plain}.pieces", len(table), lambda start, stop: table[start:stop])
                if self.compress and blob.is_worth_compressing():
                    with tempfile.TemporaryFile(dir=self.store.layout.partials) as spool:
                        index = blob.compress_into(spool.fileno())
                        if index.total < size * MIN_SAVING:
                            sent += self._put(
                                plain + COMPRESSED_SUFFIX, index.total, _compressed_reader(index, spool.fileno()), advance
                            )
                            return sent, True
            return sent + self._put(plain, size, blob.read, advance), False

    def _is_present(self, locator: str, size: int | None) -> bool:
        try:
            found = self._with_retries(lambda source: source.size(locator))
        except NotFound:
            return False
        return size is None or found in (None, size)

    def _put(self, locator: str, size: int, read: ReadRange, advance: Callable[[int], None] = lambda count: None) -> int:
        """Upload one file; the bytes sent, which are fewer than *size* where an upload was resumed."""
        attempt_bytes = 0

        def read_unless_cancelled(start: int, stop: int) -> bytes:
            self.token.check(_STOPPED)
            return read(start, stop)

        def on_send(count: int) -> None:
            nonlocal attempt_bytes
            self.pay(count)
            self.token.check(_STOPPED)
            attempt_bytes += count
            advance(count)

        def put(source: Source) -> int:
            nonlocal attempt_bytes
            attempt_bytes = 0
            assert isinstance(source, Target)
            return source.put(locator, size, read_unless_cancelled, on_send)

        return self._with_retries(put, lambda: attempt_bytes > PROGRESS_RESET_BYTES)

    def _with_retries(self, request: Callable[[Source], _T], progressed: Callable[[], bool] = lambda: False) -> _T:
        return with_retries(lambda: request(self.registry.find(self.url)), self.policy, self.token, progressed=progressed)


class _Damaged(Exception):
    """A blob does not have the content of its piece table or digest."""


class _Blob:
    """A blob opened for publication: every read is verified against its piece table, or its digest where it has none."""

    def __init__(self, store: BlobStore, digest: Digest, size: int, token: CancellationToken) -> None:
        self._store, self._digest, self._size, self._token = store, digest, size, token
        self._fd = open_regular(store.layout.blob(digest))
        self.table: PieceTable | None = None

    def __enter__(self) -> _Blob:
        """Open the piece table; raises _Damaged where it was lost and the content is wrong, OSError."""
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
        # It was lost, or its pieces are larger than what is sent at once and could only be read whole to be verified:
        # only a pass of sha256 over the whole proves another.
        if table is None or table.chunking.piece_bytes > DEFAULT.piece_bytes:
            table = hash_file(self._fd, self._size)
            if table.digest != self._digest:
                raise _Damaged
            table.state = TableState.PROVEN
        return table

    def read(self, start: int, stop: int) -> bytes:
        """The verified bytes of whole pieces. Raises _Damaged, OSError."""
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
        """Whether a sample of pieces, evenly spread, compresses well enough to try the whole."""
        count = self._chunking.count(self._size)
        sample = sorted({index * count // _SAMPLES for index in range(_SAMPLES)})
        pieces = [self.read(*self._chunking.range(index, self._size)) for index in sample]
        return sum(len(compress(piece)) for piece in pieces) < MIN_SAVING * sum(map(len, pieces))

    def compress_into(self, fd: int) -> CompressedIndex:
        """Write the frames of all pieces, one after the other, and return their index."""
        lengths = []
        for index in range(self._chunking.count(self._size)):
            self._token.check(_STOPPED)
            frame = compress(self.read(*self._chunking.range(index, self._size)))
            write_all(fd, frame)
            lengths.append(len(frame))
        return CompressedIndex.of(self._digest, self._size, lengths, self._chunking)


def _compressed_reader(index: CompressedIndex, fd: int) -> ReadRange:
    """A reader of the compressed form: the index, then the frames that *fd* holds."""
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
