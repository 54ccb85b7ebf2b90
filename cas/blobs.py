"""The committed blobs of a store: what one stat says of each, which are suspect, and the way into quarantine."""

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
from .layout import Layout


class BlobState(enum.Enum):
    """Whether a blob may be used as it is."""

    ABSENT = "absent"
    INTACT = "intact"  # size and mtime are those of its digest
    SUSPECT = "suspect"  # something has its name, and must be read before it is used


@dataclass(frozen=True, slots=True)
class BlobStatus:
    """A blob as one stat saw it. ``ino`` is 0 where there is nothing."""

    state: BlobState
    ino: int = 0


ABSENT = BlobStatus(BlobState.ABSENT)


class Blobs:
    """Blobs by digest below ``blobs/``. Reads no content. Safe for threads."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._suspects: frozenset[str] | None = None

    def stat(self, digest: Digest, size: int) -> BlobStatus:
        """The status of a blob of *size* bytes, by one stat. Raises OSError for anything but absence."""
        return self.stat_all({digest: size})[digest]

    def stat_all(self, sizes: Mapping[Digest, int]) -> dict[Digest, BlobStatus]:
        """The status of each of many blobs by its size in bytes, in their order. Raises as ``stat``."""
        lstat, regular, suspects = os.lstat, stat.S_ISREG, self.suspects()
        folder, intact, suspect = str(self._layout.blobs), BlobState.INTACT, BlobState.SUSPECT
        found: dict[Digest, BlobStatus] = {}
        for digest, size in sizes.items():
            hex_ = digest.hex
            try:
                there = lstat(f"{folder}/{hex_[:2]}/{hex_}")
            except (FileNotFoundError, NotADirectoryError):
                found[digest] = ABSENT
                continue
            proven = there.st_size == size and there.st_mtime_ns == digest.mtime * 1_000_000_000
            good = proven and regular(there.st_mode) and hex_ not in suspects
            found[digest] = BlobStatus(intact if good else suspect, there.st_ino)
        return found

    def entries(self) -> Iterator[tuple[Digest, os.DirEntry[str]]]:
        """Every committed blob with its directory entry, in no order. Foreign names are passed over."""
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
        """Hex digests that a verification found damaged and that were not repaired since; read once, until ``refresh``."""
        if self._suspects is None:
            self.refresh()
        assert self._suspects is not None
        return self._suspects

    def refresh(self) -> None:
        """Read again what verifications recorded."""
        try:
            self._suspects = frozenset(os.listdir(self._layout.suspects))
        except OSError:
            self._suspects = frozenset()

    def note_suspect(self, digest: Digest) -> None:
        """Record that a verification found this blob damaged. Raises OSError."""
        (self._layout.suspects / digest.hex).touch()
        self._suspects = None

    def clear_suspects(self, digests: Iterable[Digest]) -> None:
        """Remove blobs from the record of damaged ones, which is read again for it. Raises OSError."""
        self.refresh()
        for hex_ in self.suspects() & {digest.hex for digest in digests}:
            with suppress(FileNotFoundError):
                os.unlink(self._layout.suspects / hex_)
            self._suspects = None

    def restamp(self, digest: Digest) -> None:
        """Give a blob that was just proven in place its mode and mtime back. Hold its lock. Raises OSError."""
        path = self._layout.blob(digest)
        os.chmod(path, 0o444)
        os.utime(path, (digest.mtime, digest.mtime))
        self.clear_suspects([digest])

    # ---- quarantine

    def name_in_quarantine(self, digest: Digest) -> Path:
        """A free name in ``quarantine/`` for a file that has a blob's name."""
        return self._layout.quarantine / f"{digest.hex}-{int(time.time())}-{secrets.token_hex(4)}"

    def quarantine(self, digest: Digest) -> Path | None:
        """Move whatever has a blob's name to ``quarantine/`` and remove its table; where it is now. Raises OSError."""
        target = self.name_in_quarantine(digest)
        try:
            os.rename(self._layout.blob(digest), target)
        except FileNotFoundError:
            return None
        with suppress(FileNotFoundError):
            os.unlink(self._layout.table(digest))
        return target
