"""Re-reading bytes at rest: against the piece table (fast, all cores on one file) or against sha256 (full)."""

from __future__ import annotations

import enum
import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from threading import Event, local

from .buffers import STEP, aligned_buffer
from .digest import EMPTY, Digest
from .durable import write_file
from .layout import TABLE_FROM
from .pieces import PieceTable, PieceTableBuilder, hash_piece_of, open_regular, piece_count, piece_range, proven_table

_RUN = 16  # pieces a thread takes at a time: 128 MiB, so that one file of any size keeps every core busy


class Level(enum.StrEnum):
    """How deep to look: by stat; against the piece table; against sha256."""

    QUICK = "quick"
    FAST = "fast"
    FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubTarget:
    """A file that should hold a blob's bytes. ``table`` is where the blob's piece table would be."""

    path: str
    digest: Digest
    size: int  # bytes
    table: str
    makes_table: bool = False  # a blob in the store without a table gets one from a pass whose sha256 matched


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubResult:
    """What reading one file showed. ``bad_pieces`` is empty where the whole is wrong but no table tells which part."""

    target_file: ScrubTarget
    intact: bool
    bad_pieces: tuple[int, ...] = ()
    bytes_read: int = 0
    problem: str = ""


def scrub(
    targets: Iterable[ScrubTarget],
    level: Level,
    *,
    threads: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[ScrubResult]:
    """Read the bytes of every target once and yield a result each, in order. Level FAST or FULL.

    Where a fast look finds no table that can be believed, it becomes a full one. A file that cannot be read (EIO,
    truncated) is not intact and the problem is told; nothing is raised for content.
    """
    from concurrent.futures import ThreadPoolExecutor  # 4 ms that a command without reading does not pay

    workers, buffers, ended = threads or os.cpu_count() or 1, local(), Event()

    def heard(count: int) -> None:
        if ended.is_set():
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
        waiting = []
        for target_file in targets:
            table = (
                proven_table(target_file.table, target_file.digest, target_file.size)
                if target_file.size > TABLE_FROM
                else None
            )
            if level is Level.FAST and table is not None:
                starts = range(0, piece_count(target_file.size), _RUN)
                runs = [pool.submit(_check_run, target_file, table, start, buffer, heard) for start in starts]
            else:
                runs = [pool.submit(_check_whole, target_file, table, buffer, heard)]
            waiting.append((target_file, runs))
            # Keep a bounded number in flight, so that a million files are not a million futures.
            while len(waiting) > 64:
                done, futures = waiting.pop(0)
                yield _join(done, [future.result() for future in futures])
        for target_file, futures in waiting:
            yield _join(target_file, [future.result() for future in futures])
    except BaseException:  # an interrupt, or nobody asks for the rest: what is queued may be hundreds of gigabytes
        ended.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class _Cancelled(Exception):
    """The verification was given up."""


def hash_file(fd: int, size: int) -> PieceTable:
    """What an open file of *size* bytes is called: its digest and its pieces, read once. Raises OSError."""
    hasher, maker, read = hashlib.sha256(), PieceTableBuilder(EMPTY, size), 0
    buffer = aligned_buffer(STEP)
    while read < size:
        count = os.preadv(fd, [buffer[: size - read]], read)
        if count == 0:
            raise OSError(errno.EIO, f"the file ended at {read:,} of {size:,} bytes while it was read")
        hasher.update(buffer[:count])
        maker.update(buffer[:count])
        read += count
    return maker.build(Digest.of_hex(hasher.hexdigest()))


def _join(target_file: ScrubTarget, verdicts: list[ScrubResult]) -> ScrubResult:
    if len(verdicts) == 1:
        return verdicts[0]
    return ScrubResult(
        target_file=target_file,
        intact=all(v.intact for v in verdicts),
        bad_pieces=tuple(piece for v in verdicts for piece in v.bad_pieces),
        bytes_read=sum(v.bytes_read for v in verdicts),
        problem=next((v.problem for v in verdicts if v.problem), ""),
    )


def _open(target_file: ScrubTarget) -> int:
    fd = open_regular(target_file.path)
    if os.fstat(fd).st_size == target_file.size:
        return fd
    # One that is too long has every piece right and is wrong all the same; one that is too short fails by the piece.
    if os.fstat(fd).st_size > target_file.size:
        os.close(fd)
        raise OSError(f"it is longer than {target_file.size:,} bytes")
    return fd


def _check_run(
    target_file: ScrubTarget,
    table: PieceTable,
    first: int,
    buffer: Callable[[], memoryview],
    on_bytes: Callable[[int], None],
) -> ScrubResult:
    last = min(first + _RUN, len(table.slots))
    try:
        fd = _open(target_file)
    except OSError as error:
        pieces = tuple(range(first, last)) if isinstance(error, FileNotFoundError) else ()
        return ScrubResult(target_file=target_file, intact=False, bad_pieces=pieces, problem=error.strerror or str(error))
    bad, read, problem = [], 0, ""
    try:
        for index in range(first, last):
            start, stop = piece_range(index, target_file.size)
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
    return ScrubResult(target_file=target_file, intact=not bad, bad_pieces=tuple(bad), bytes_read=read, problem=problem)


def _check_whole(
    target_file: ScrubTarget, table: PieceTable | None, buffer: Callable[[], memoryview], on_bytes: Callable[[int], None]
) -> ScrubResult:
    """By sha256. Which pieces are bad is looked up in a second pass, only where the first one failed."""
    try:
        fd = _open(target_file)
    except OSError as error:
        return ScrubResult(target_file=target_file, intact=False, problem=error.strerror or str(error))
    hasher, read, problem = hashlib.sha256(), 0, ""
    # In the same pass, or a bit that rots between the two would be certified for ever.
    maker = PieceTableBuilder(target_file.digest, target_file.size) if table is None and target_file.makes_table else None
    try:
        while read < target_file.size:
            count = os.preadv(fd, [buffer()[: target_file.size - read]], read)
            if count == 0:
                break
            hasher.update(buffer()[:count])
            if maker is not None:
                maker.update(buffer()[:count])
            read += count
            on_bytes(count)
        intact = hasher.hexdigest() == target_file.digest.hex
        if intact and maker is not None and target_file.size > TABLE_FROM:
            _keep_table(target_file.table, maker.proven())
    except OSError as error:
        intact, problem = False, error.strerror or str(error)
    finally:
        os.close(fd)
    bad: tuple[int, ...] = ()
    if not intact and table is not None:
        starts = range(0, len(table.slots), _RUN)
        runs = (
            _check_run(target_file, table, first, buffer, lambda count: on_bytes(0)) for first in starts
        )  # counted before
        bad = tuple(piece for run in runs for piece in run.bad_pieces)
    return ScrubResult(target_file=target_file, intact=intact, bad_pieces=bad, bytes_read=read, problem=problem)


def _keep_table(path: str, table: PieceTable) -> None:
    from pathlib import Path

    try:
        write_file(Path(path), table.encode())
    except OSError:
        pass  # a read-only store: the table only saves time
