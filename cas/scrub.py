"""Scrubbing: reading bytes at rest again, against the piece table (fast, all cores on one file) or the sha256 (full)."""

from __future__ import annotations

import enum
import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, local
from typing import TYPE_CHECKING

from .buffers import STEP, aligned_buffer
from .chunking import DEFAULT, Chunking
from .digest import EMPTY, Digest
from .durable import write_file
from .layout import TABLE_FROM
from .pieces import PieceTable, PieceTableBuilder, TableState, hash_piece_of, proven_table
from .untrusted import open_regular

if TYPE_CHECKING:
    from concurrent.futures import Future

_RUN_BYTES = 128 << 20  # taken by a thread at a time, so that one file of any size keeps every core busy
_MAX_IN_FLIGHT = 64  # targets, so that a million files are not a million futures

Buffer = Callable[[], memoryview]
"""The calling thread's buffer."""
OnBytes = Callable[[int], None]
"""Called with each count of bytes read, from any of the pool's threads."""


class Level(enum.StrEnum):
    """Depth of a verification: stat; piece table; sha256."""

    QUICK = "quick"
    FAST = "fast"
    FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubTarget:
    """A file that should hold a blob's bytes. ``table`` is the path of the blob's piece table, which may not exist."""

    path: str
    digest: Digest
    size: int  # bytes
    table: str
    makes_table: bool = False  # write a missing table (blobs over 1 MiB) from a pass whose sha256 matched


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubResult:
    """Outcome for one file. ``bad_pieces``, of ``chunking``, are empty if the whole is wrong and no table locates it."""

    target_file: ScrubTarget
    intact: bool
    bad_pieces: tuple[int, ...] = ()
    bytes_read: int = 0
    problem: str = ""  # why it could not be read
    chunking: Chunking = DEFAULT


def scrub(
    targets: Iterable[ScrubTarget],
    level: Level,
    *,
    threads: int | None = None,
    on_bytes: OnBytes | None = None,
) -> Iterator[ScrubResult]:
    """Results of reading every target once, in order, at level FAST or FULL.

    FAST is FULL for a target without a proven table. A file that cannot be read (EIO, truncated, absent) is not intact,
    with the reason in ``problem``; nothing is raised for content. *on_bytes* is called from several threads.
    """
    from concurrent.futures import ThreadPoolExecutor  # 4 ms that a command without reading does not pay

    workers, buffers, cancelled = threads or os.cpu_count() or 1, local(), Event()

    def count_bytes(count: int) -> None:
        if cancelled.is_set():
            raise _Cancelled
        if on_bytes is not None:
            on_bytes(count)

    def buffer() -> memoryview:
        if not hasattr(buffers, "view"):
            buffers.view = aligned_buffer(STEP)
        view: memoryview = buffers.view
        return view

    pool = ThreadPoolExecutor(workers)
    try:
        in_flight: list[tuple[ScrubTarget, list[Future[ScrubResult]]]] = []
        for target in targets:
            table = proven_table(target.table, target.digest, target.size) if target.size > TABLE_FROM else None
            if level is Level.FAST and table is not None:
                runs = [pool.submit(_check_pieces, target, table, run, buffer, count_bytes) for run in _runs(table)]
            else:
                runs = [pool.submit(_check_whole, target, table, buffer, count_bytes)]
            in_flight.append((target, runs))
            while len(in_flight) > _MAX_IN_FLIGHT:
                done, futures = in_flight.pop(0)
                yield _join(done, [future.result() for future in futures])
        for target, futures in in_flight:
            yield _join(target, [future.result() for future in futures])
    except BaseException:  # an interrupt, or the caller stopped iterating: what is queued may be hundreds of gigabytes
        cancelled.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class _Cancelled(Exception):
    """The caller stopped the scrub; ends its threads."""


def hash_file(fd: int, size: int) -> PieceTable:
    """Table of an open file of *size* bytes, with the digest that one pass finds; its state is UNFINISHED.

    Raises OSError, also for a file that is shorter.
    """
    hasher, builder, read = hashlib.sha256(), PieceTableBuilder(EMPTY, size), 0
    buffer = aligned_buffer(STEP)
    while read < size:
        count = os.preadv(fd, [buffer[: size - read]], read)
        if count == 0:
            raise OSError(errno.EIO, f"the file ended at {read:,} of {size:,} bytes while it was read")
        hasher.update(buffer[:count])
        builder.update(buffer[:count])
        read += count
    return builder.build(Digest.of_hex(hasher.hexdigest()))


def prove(path: str, digest: Digest, size: int) -> PieceTable | None:
    """Proven table of a file of *size* bytes from one pass; None if its sha256 is not *digest*. Raises OSError."""
    fd = open_regular(path)
    try:
        table = hash_file(fd, size)
    finally:
        os.close(fd)
    table.state = TableState.PROVEN
    return table if table.digest == digest else None


def _runs(table: PieceTable) -> list[range]:
    """The pieces of a table in groups of about ``_RUN_BYTES``."""
    count, step = len(table.slots), max(1, _RUN_BYTES // table.chunking.piece_bytes)
    return [range(first, min(first + step, count)) for first in range(0, count, step)]


def _join(target: ScrubTarget, results: list[ScrubResult]) -> ScrubResult:
    if len(results) == 1:
        return results[0]
    return ScrubResult(
        target_file=target,
        intact=all(result.intact for result in results),
        bad_pieces=tuple(piece for result in results for piece in result.bad_pieces),
        bytes_read=sum(result.bytes_read for result in results),
        problem=next((result.problem for result in results if result.problem), ""),
        chunking=results[0].chunking if results else DEFAULT,
    )


def _open(target: ScrubTarget) -> int:
    fd = open_regular(target.path)
    # All pieces of a file that is too long are right, and it is wrong; one that is too short fails at a piece.
    if os.fstat(fd).st_size > target.size:
        os.close(fd)
        raise OSError(f"it is longer than {target.size:,} bytes")
    return fd


def _check_pieces(target: ScrubTarget, table: PieceTable, run: range, buffer: Buffer, on_bytes: OnBytes) -> ScrubResult:
    bad, read, problem = [], 0, ""
    try:
        fd = _open(target)
    except OSError as error:
        bad, problem = list(run) if isinstance(error, FileNotFoundError) else [], error.strerror or str(error)
        return _result(target, table, intact=False, bad=bad, why=problem)
    try:
        for index in run:
            start, stop = table.range(index)
            slot = table.slots[index]
            try:
                found = hash_piece_of(fd, start, stop, buffer())
            except OSError as error:  # a bad sector costs its piece, not the file
                found, problem = None, error.strerror or str(error)
            read += stop - start
            if slot is None or found != slot.hash:
                bad.append(index)
            on_bytes(stop - start)
    finally:
        os.close(fd)
    return _result(target, table, intact=not bad, bad=bad, read=read, why=problem)


def _check_whole(target: ScrubTarget, table: PieceTable | None, buffer: Buffer, on_bytes: OnBytes) -> ScrubResult:
    """Check a file by its sha256; only if that fails, find the bad pieces in a second pass."""
    try:
        fd = _open(target)
    except OSError as error:
        return _result(target, table, intact=False, why=error.strerror or str(error))
    hasher, read, problem = hashlib.sha256(), 0, ""
    # In the same pass: a bit that rots between two passes would be certified for ever.
    builder = PieceTableBuilder(target.digest, target.size) if table is None and target.makes_table else None
    try:
        while read < target.size:
            count = os.preadv(fd, [buffer()[: target.size - read]], read)
            if count == 0:
                break
            hasher.update(buffer()[:count])
            if builder is not None:
                builder.update(buffer()[:count])
            read += count
            on_bytes(count)
        intact = hasher.hexdigest() == target.digest.hex
        if intact and builder is not None and target.size > TABLE_FROM:
            _write_table(target.table, builder.proven())
    except OSError as error:
        intact, problem = False, error.strerror or str(error)
    finally:
        os.close(fd)
    bad: list[int] = []
    if not intact and table is not None:
        for run in _runs(table):  # these bytes were counted in the first pass
            bad += _check_pieces(target, table, run, buffer, lambda count: on_bytes(0)).bad_pieces
    return _result(target, table, intact=intact, bad=bad, read=read, why=problem)


def _result(
    target: ScrubTarget, table: PieceTable | None, *, intact: bool, bad: Iterable[int] = (), read: int = 0, why: str = ""
) -> ScrubResult:
    return ScrubResult(
        target_file=target,
        intact=intact,
        bad_pieces=tuple(bad),
        bytes_read=read,
        problem=why,
        chunking=table.chunking if table is not None else DEFAULT,
    )


def _write_table(path: str, table: PieceTable) -> None:
    try:
        write_file(Path(path), table.encode())
    except OSError:
        pass  # a read-only store: the table only saves time
