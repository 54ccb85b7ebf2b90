"""Committed blobs: their status by stat, the record of suspects, integrity stamps, and quarantine."""

from __future__ import annotations

import enum
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .digest import Digest
from .durable import write_file
from .layout import Layout
from .pieces import ForeignStamp, PieceTable, TableState, proven_table


class BlobState(enum.Enum):
    """The state of a blob by stat: whether it may be used without reading it."""

    ABSENT = "absent"
    INTACT = "intact"  # size and integrity stamp are right
    SUSPECT = "suspect"  # something has its name, and must be read before it is used


@dataclass(frozen=True, slots=True)
class BlobStatus:
    """A blob as one stat showed it. ``ino`` is 0 if nothing has its name."""

    state: BlobState
    ino: int = 0


ABSENT = BlobStatus(BlobState.ABSENT)


class Blobs:
    """The blobs below ``blobs/``, by digest. Reads no content. Safe for threads."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._suspects: frozenset[str] | None = None

    def stat(self, digest: Digest, size: int) -> BlobStatus:
        """Status of a blob of *size* bytes. Raises OSError for anything but absence.

        One stat; only for a file of the right size with another mtime than the digest's is a piece table opened, which may
        hold a foreign stamp.
        """
        return self.stat_all({digest: size})[digest]

    def stat_all(self, sizes: Mapping[Digest, int]) -> dict[Digest, BlobStatus]:
        """Status of each of many blobs by its size in bytes, in their order. As ``stat``."""
        lstat, regular, suspects = os.lstat, stat.S_ISREG, self.suspects()
        folder, intact, suspect = str(self._layout.blobs), BlobState.INTACT, BlobState.SUSPECT
        result: dict[Digest, BlobStatus] = {}
        for digest, size in sizes.items():
            hex_ = digest.hex
            try:
                found = lstat(f"{folder}/{hex_[:2]}/{hex_}")
            except (FileNotFoundError, NotADirectoryError):
                result[digest] = ABSENT
                continue
            good = found.st_size == size and regular(found.st_mode) and hex_ not in suspects
            good = good and (found.st_mtime_ns == digest.mtime * 1_000_000_000 or self._has_foreign_stamp(digest, found))
            result[digest] = BlobStatus(intact if good else suspect, found.st_ino)
        return result

    def _has_foreign_stamp(self, digest: Digest, found: os.stat_result) -> bool:
        table = proven_table(self._layout.table(digest), digest, found.st_size)
        return table is not None and table.stamp == ForeignStamp.of(found)

    def entries(self) -> Iterator[tuple[Digest, os.DirEntry[str]]]:
        """Every committed blob with its directory entry, in no order. Names that are not digests are skipped."""
        for fan in range(256):
            try:
                entries = os.scandir(f"{self._layout.blobs}/{fan:02x}")
            except FileNotFoundError:
                continue
            with entries:
                for entry in entries:
                    if len(entry.name) == 64 and entry.name.startswith(f"{fan:02x}"):
                        try:
                            yield Digest.parse("sha256:" + entry.name), entry
                        except ValueError:
                            continue

    # ---- suspects

    def suspects(self) -> frozenset[str]:
        """Hex digests that a verification found damaged and that were not repaired since; cached until ``refresh``."""
        if self._suspects is None:
            self.refresh()
        assert self._suspects is not None
        return self._suspects

    def refresh(self) -> None:
        """Read the record of suspects again. A folder that cannot be read has none."""
        try:
            self._suspects = frozenset(os.listdir(self._layout.suspects))
        except OSError:
            self._suspects = frozenset()

    def note_suspect(self, digest: Digest) -> None:
        """Record that a verification found this blob damaged. Not synced. Raises OSError."""
        with suppress(FileExistsError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            os.close(os.open(self._layout.suspects / digest.hex, flags, 0o644))
        self._suspects = None

    def clear_suspects(self, digests: Iterable[Digest]) -> None:
        """Remove blobs from the record of suspects, which is read again first. Not synced. Raises OSError."""
        self.refresh()
        for hex_ in self.suspects() & {digest.hex for digest in digests}:
            with suppress(FileNotFoundError):
                os.unlink(self._layout.suspects / hex_)
            self._suspects = None

    # ---- integrity stamps

    def restamp(self, digest: Digest, before: os.stat_result) -> bool:
        """Set the mode and digest mtime of a blob that was just read and found right. Hold its lock.

        *before*: its stat before the first byte was read; a file that was written to since keeps its mtime, and so stays
        suspect. Not synced. Raises OSError; PermissionError for another user's file.
        """
        path = self._layout.blob(digest)
        if ForeignStamp.of(os.lstat(path)) != ForeignStamp.of(before):
            return False
        os.chmod(path, 0o444)
        os.utime(path, (digest.mtime, digest.mtime))
        self.clear_suspects([digest])
        return True

    def foreign_stamp(self, digest: Digest) -> ForeignStamp | None:
        """The stamp of a blob that is about to be read, for ``stamp_foreign``; None if it was modified too recently.

        Raises OSError.
        """
        return ForeignStamp.take(os.lstat(self._layout.blob(digest)))

    def stamp_foreign(self, digest: Digest, table: PieceTable) -> bool:
        """Write the table of a blob that must keep a foreign mtime, with its stamp; durable on return. Hold its lock.

        *table* is proven, and its ``stamp`` was taken before the pass that proved it. False, with nothing written, if it
        has none or the file is another by now. Raises ValueError for a table that is not proven, OSError.
        """
        if table.digest != digest or table.state is not TableState.PROVEN or not table.complete:
            raise ValueError(f"the table of {digest.short} is not proven")
        found = os.lstat(self._layout.blob(digest))
        if not stat.S_ISREG(found.st_mode) or found.st_size != table.size or table.stamp != ForeignStamp.of(found):
            return False
        write_file(Path(self._layout.table(digest)), table.encode(), mode=0o444)
        self.clear_suspects([digest])
        return True

    # ---- quarantine

    def name_in_quarantine(self, digest: Digest) -> Path:
        """A free path in ``quarantine/`` for a file that has this blob's name."""
        return self._layout.quarantine / f"{digest.hex}-{int(time.time())}-{secrets.token_hex(4)}"

    def quarantine(self, digest: Digest) -> Path | None:
        """Move what has a blob's name to ``quarantine/`` and remove its table; the new path, or None. Raises OSError."""
        target = self.name_in_quarantine(digest)
        try:
            os.rename(self._layout.blob(digest), target)
        except FileNotFoundError:
            return None
        with suppress(FileNotFoundError):
            os.unlink(self._layout.table(digest))
        return target
