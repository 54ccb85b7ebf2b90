"""`bench`: the throughput of verification on this machine and disk, compared with plain reading of the same bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from modelstow.cas import BlobState, BlobStore, Digest, NoSpaceError
from modelstow.cas.buffers import STEP, aligned_buffer
from modelstow.cas.chunking import DEFAULT
from modelstow.cas.partial import read_fully
from modelstow.cas.scrub import Level, ScrubTarget, scrub

from .. import settings
from ..errors import IntegrityError, InvalidConfigError
from ..planning.observer import nearest_folder
from .output import count, size, table
from .session import Answer, Session

_READ = "read"
_DESCRIPTIONS = {
    _READ: "plain reading, one thread: the limit",
    Level.QUICK: "one stat per blob, reads no content",
    Level.FAST: "xxh3-128 of every piece",
    Level.FULL: "sha256 of the whole",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One row of the result: medians over the repeats. ``share`` is relative to plain reading; None without reading."""

    level: str
    seconds: float
    bytes: int  # read
    share: float | None

    @property
    def rate(self) -> float | None:
        """Bytes per second; None where no content is read."""
        return self.bytes / self.seconds if self.bytes else None


def run_bench(session: Session) -> Answer:
    """Measure in a temporary folder next to the store."""
    total = settings.parse_size(session.args.size, "--size")
    repeats = settings.parse_count(session.args.repeats, "--repeats")
    if total == 0:
        raise InvalidConfigError("--size 0 leaves nothing to read", hint="e.g. --size 1GiB")
    here = nearest_folder(session.settings.root)
    _check_space(here, total)
    folder = Path(tempfile.mkdtemp(prefix=".modelstow-bench-", dir=here))
    try:
        session.print_message(f"measuring with {size(total)} in {folder}, {count(repeats, 'time')} each")
        rows = _measure(*_store_with_blob(folder, total), repeats)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Answer(document={"rows": [_row(row) for row in rows]}, lines=tuple(_lines(rows)))


def _check_space(here: Path, total: int) -> None:
    needed, free = 2 * total, shutil.disk_usage(here).free
    if needed > free:
        raise NoSpaceError(
            f"{needed:,} bytes are needed in {here} while measuring, {free:,} are free",
            hint="measure with a smaller --size",
            bytes_needed=needed,
            bytes_available=free,
            path=str(here),
        )


# ---- the file


def _store_with_blob(folder: Path, total: int) -> tuple[BlobStore, ScrubTarget]:
    """A new store in *folder* with one blob of *total* bytes, ingested in the usual way."""
    store = BlobStore.open(folder / "store")
    store.prepare()
    path = folder / "file"
    digest = _write(path, total)
    with open(path, "rb") as file, store.lock_blob(digest, doing="bench"):
        store.ingest.copy(file.fileno(), digest, total)
    path.unlink()
    layout = store.layout
    return store, ScrubTarget(path=layout.blob(digest), digest=digest, size=total, table=layout.table(digest))


def _write(path: Path, total: int) -> Digest:
    """Write random bytes of which no two pieces are equal; their digest."""
    noise, hasher = os.urandom(min(DEFAULT.piece_bytes, total)), hashlib.sha256()
    with open(path, "wb") as file:
        for index in range(DEFAULT.count(total)):
            start, stop = DEFAULT.range(index, total)
            piece = (index.to_bytes(8, "little") + noise[8:])[: stop - start]
            hasher.update(piece)
            file.write(piece)
    return Digest.of_hex(hasher.hexdigest())


# ---- measuring


def _measure(store: BlobStore, target_file: ScrubTarget, repeats: int) -> list[Measured]:
    """Measure every level *repeats* times, in a rotating order, after one round of warming up."""
    levels: dict[str, Callable[[], int]] = {
        _READ: lambda: _read(target_file),
        Level.QUICK: lambda: _stat(store, target_file),
        Level.FAST: lambda: _scrub(target_file, Level.FAST),
        Level.FULL: lambda: _scrub(target_file, Level.FULL),
    }
    times: dict[str, list[float]] = {name: [] for name in levels}
    bytes_read: dict[str, int] = {}
    names = list(levels)
    for repeat in range(-1, repeats):
        shift = repeat % len(names)
        for name in (*names[shift:], *names[:shift]):
            began = time.perf_counter()
            bytes_read[name] = levels[name]()
            if repeat >= 0:
                times[name].append(time.perf_counter() - began)
    return [_measured(name, bytes_read[name], times[name], times[_READ]) for name in names]


def _measured(level: str, read: int, mine: Sequence[float], limit: Sequence[float]) -> Measured:
    shares = [a / b for a, b in zip(limit, mine, strict=True)]
    return Measured(level=level, seconds=median(mine), bytes=read, share=median(shares) if read else None)


def _read(target_file: ScrubTarget) -> int:
    view = aligned_buffer(min(STEP, target_file.size))
    with open(target_file.path, "rb", buffering=0) as file:
        for start in range(0, target_file.size, len(view)):
            read_fully(file.fileno(), view[: target_file.size - start], start)
    return target_file.size


def _stat(store: BlobStore, target_file: ScrubTarget) -> int:
    if store.blobs.stat(target_file.digest, target_file.size).state is not BlobState.INTACT:
        raise IntegrityError("a blob that was just committed is not intact by stat", hint="run `modelstow doctor`")
    return 0


def _scrub(target_file: ScrubTarget, level: Level) -> int:
    result = next(scrub([target_file], level))
    if not result.intact:
        raise IntegrityError("a blob that was just committed is damaged when read", hint="check this disk and its memory")
    return result.bytes_read


# ---- output


def _row(row: Measured) -> dict[str, str | float | None]:
    rate, share = row.rate, row.share
    return {
        "level": row.level,
        "seconds": row.seconds,
        "bytes": row.bytes,
        "bytes_per_second": None if rate is None else round(rate),
        "share": None if share is None else round(share, 4),
    }


def _lines(rows: Sequence[Measured]) -> list[str]:
    cells = [("level", "seconds", "GB/s", "of reading", "")]
    for row in rows:
        rate = "-" if row.rate is None else f"{row.rate / 1e9:.2f}"
        share = "-" if row.share is None else f"{row.share:.0%}"
        cells.append((row.level, f"{row.seconds:.6f}", rate, share, _DESCRIPTIONS[row.level]))
    return table(cells, right=frozenset({1, 2, 3}))
