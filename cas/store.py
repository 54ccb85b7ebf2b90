"""The blob store. A blob's life:

1. Its lock is taken (per digest; others wait and find it done).
2. A partial is opened: what an earlier run left there counts as far as it proves good.
3. Pieces are written and put on record in any order; the sha256 follows the front.
4. ``commit``: the sha256 of the whole must equal the name. The partial is marked, made read-only, given the mtime that
   is computed from its digest, fsynced, linked under the blob's name, unlinked from its own; the folder is fsynced.

A name under ``blobs/`` therefore always stands for bytes that were proven. A good blob is never overwritten; a damaged
one is moved to ``quarantine/`` first. An fsync that failed is never repeated on that file: it is thrown away.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from threading import Event

from . import layout as layouts
from . import locks
from .commit import Commit
from .digest import Digest
from .durable import remove_temp_files, write_file
from .errors import ChecksumError, StoreFormatError
from .layout import TABLE_FROM, Layout, StoreConfig
from .look import ABSENT, BlobState, BlobStatus
from .partial import Partial, read_fully
from .pieces import PIECE, PieceTable, TableState, piece_count, piece_hash, piece_range, read_table

LOCK_TIMEOUT_S = 300.0
_STRIPES_HEX = 3  # 4096 lock files for all blobs, for ever; two digests that share one merely wait for each other


class BlobStore:
    """Blobs under their digests in ``ROOT/blobs``. Any number of threads, processes and hosts may share one ROOT."""

    def __init__(self, root: Path, config: StoreConfig, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """*lock_timeout_s*: how long a lock is waited for where nobody says, from its holder's last sign of progress."""
        self.layout, self.config, self.lock_timeout_s = Layout(root), config, lock_timeout_s
        self._suspects: frozenset[str] | None = None

    @classmethod
    def open(
        cls, root: Path, *, create: bool = True, shared: bool = False, lock_timeout_s: float = LOCK_TIMEOUT_S
    ) -> BlobStore:
        """Open the store at *root*, making it where none is (unless *create* is false).

        Raises StoreFormatError for a store of another format, FileNotFoundError, OSError.
        """
        layout = Layout(Path(os.path.abspath(root)))
        config = layouts.read_config(layout)
        if config is None:
            if not create:
                raise FileNotFoundError(errno.ENOENT, "there is no store", str(root))
            config = _create(layout, shared=shared)
        return cls(layout.root, config, lock_timeout_s=lock_timeout_s)

    @classmethod
    def open_existing(cls, root: Path) -> BlobStore | None:
        """The store at *root* for reading, or None where there is none yet. Writes nothing."""
        layout = Layout(Path(os.path.abspath(root)))
        config = layouts.read_config(layout)
        return None if config is None else cls(layout.root, config)

    @classmethod
    def open_readonly(cls, root: Path) -> BlobStore:
        """The store at *root*, or where one would be; for looking. Writes nothing. Raises StoreFormatError, OSError."""
        return cls.open_existing(root) or cls(Path(os.path.abspath(root)), StoreConfig())

    def prepare(self) -> None:
        """Make the folders that are missing; called before the first write. Raises StoreFormatError, OSError."""
        if self.config.ro_compat:
            raise StoreFormatError(
                f"{self.layout.config} asks for {list(self.config.ro_compat)}, which this modelstow cannot write",
                hint="use the newer modelstow that made this store",
            )
        layouts.make_folders(self.layout, self.config)

    def remove_temp_files(self, *, in_blobs: bool = False) -> None:
        """Remove what killed processes left half written; *in_blobs*: among the blobs' tables too. Raises OSError."""
        at = self.layout
        remove_temp_files((at.root, at.pins, at.trash, at.state, at.inventories, at.roots, at.leases, at.lies, at.pulled))
        if in_blobs:
            remove_temp_files(at.blobs / f"{fan:02x}" for fan in range(256))

    # ---- looking

    def stat(self, digest: Digest, size: int) -> BlobStatus:
        """What one stat tells of a blob of *size* bytes; reads no content. Raises OSError other than absence."""
        try:
            found = os.lstat(self.layout.blob(digest))
        except (FileNotFoundError, NotADirectoryError):
            return ABSENT
        intact = (
            stat.S_ISREG(found.st_mode)
            and found.st_size == size
            and found.st_mtime_ns == digest.mtime * 1_000_000_000
            and digest.hex not in self.suspects()
        )
        state = BlobState.INTACT if intact else BlobState.SUSPECT
        return BlobStatus(state, found.st_ino)

    def suspects(self) -> frozenset[str]:
        """Hex digests that a verification found damaged and nobody has repaired; read once for each store object."""
        if self._suspects is None:
            self.refresh()
        assert self._suspects is not None
        return self._suspects

    def refresh(self) -> None:
        """Read anew what verifications left on record."""
        try:
            self._suspects = frozenset(os.listdir(self.layout.suspects))
        except OSError:
            self._suspects = frozenset()

    def blobs(self) -> Iterator[tuple[Digest, os.DirEntry[str]]]:
        """Every committed blob with its directory entry, in no order. Foreign names are passed over."""
        for fan in range(256):
            folder = f"{self.layout.blobs}/{fan:02x}"
            try:
                entries = os.scandir(folder)
            except FileNotFoundError:
                continue
            with entries:
                for entry in entries:
                    name = entry.name
                    if len(name) == 64 and name.startswith(f"{fan:02x}"):
                        try:
                            yield Digest.parse("sha256:" + name), entry
                        except ValueError:
                            continue

    def held_in_partial(self, digest: Digest, size: int) -> int:
        """Bytes that a partial has on record, without proving them; for figures shown to people."""
        table = read_table(self.layout.journal(digest), digest)
        if table is None or table.size != size or table.state is not TableState.UNFINISHED:
            return 0
        return table.held_bytes

    # ---- locking

    def blob_lock_path(self, digest: Digest) -> Path:
        return self.layout.locks / f"blob-{digest.hex[:_STRIPES_HEX]}"

    def lock_blob(
        self,
        digest: Digest,
        *,
        doing: str,
        timeout_s: float | None = None,
        stop: Event | None = None,
        on_wait: Callable[[locks.Holder | None], None] | None = None,
    ) -> locks.Lock:
        """The exclusive right to write this blob. Raises LockTimeoutError, Stopped."""
        path, timeout_s = self.blob_lock_path(digest), self.lock_timeout_s if timeout_s is None else timeout_s
        return locks.acquire(path, doing=doing, timeout_s=timeout_s, stop=stop, on_wait=on_wait, mode=self.lock_mode)

    def commits_seen(self, digest: Digest) -> str:
        """A token that changes when somebody commits this very blob; for those who ask for a fetch at the same time."""
        return _commit_token(locks.peek(self.blob_lock_path(digest)), digest)

    def note_commit(self, lock: locks.Lock, digest: Digest) -> None:
        """Leave word in the held lock that this blob was just committed."""
        lock.write_note(committed=digest.hex, token=secrets.token_hex(8))

    @property
    def lock_mode(self) -> int:
        return 0o664 if self.config.shared else 0o600

    def lock(
        self,
        name: str,
        *,
        doing: str,
        shared: bool = False,
        timeout_s: float | None = None,
        stop: Event | None = None,
        on_wait: Callable[[locks.Holder | None], None] | None = None,
    ) -> locks.Lock:
        """One of the store's named locks (``store``, ``gate``, ``space``, ``tree-…``)."""
        path, timeout_s = self.layout.locks / name, self.lock_timeout_s if timeout_s is None else timeout_s
        return locks.acquire(
            path, doing=doing, shared=shared, timeout_s=timeout_s, stop=stop, on_wait=on_wait, mode=self.lock_mode
        )

    # ---- writing

    def partial(self, digest: Digest, size: int) -> Partial:
        """Open or adopt the partial of a blob; hold the blob's lock. Raises OSError."""
        return Partial(self.layout, digest, size)

    def commit(self, partial: Partial, *, replace: bool = False) -> None:
        """Make a partial a blob, if and only if its sha256 is its name. Durable on return.

        A blob that is already there and looks intact is kept, unless *replace* is set; a damaged one, or with
        *replace* any, goes to quarantine first. On ChecksumError the partial is left as it is, for the caller to
        judge its pieces. Once it is marked, any OSError discards it: what could not be synced is never trusted again.
        """
        for error in self.commit_all([partial], replace=[partial.digest] if replace else ()).values():
            raise error

    def commit_all(self, partials: Sequence[Partial], *, replace: Container[Digest] = ()) -> dict[Digest, Exception]:
        """The same for several at once, which wait for the disk together; *replace* names those to be replaced. Why some
        failed; the others are durable on return."""
        return Commit(self, replace=replace).run(partials)

    def add_bytes(self, data: bytes) -> Digest:
        """Commit bytes that are in memory; returns their name. Raises OSError."""
        digest = Digest.of(data)
        if not data:
            return digest
        with self.lock_blob(digest, doing=f"adding {digest.short}"):
            if self.stat(digest, len(data)).state is not BlobState.INTACT:
                partial = self.partial(digest, len(data))
                try:
                    partial.write(0, data)
                    view = memoryview(data)
                    for index in range(piece_count(len(data))):
                        start, stop = piece_range(index, len(data))
                        partial.finish(index, piece_hash(view[start:stop]))
                    self.commit(partial)
                finally:
                    partial.close_or_discard()
        return digest

    def copy_in(self, source_fd: int, digest: Digest, size: int) -> None:
        """Commit a copy of an open file believed to be this blob. Hold the blob's lock.

        Raises ChecksumError if it is not (what an earlier run had fetched stays), OSError.
        """
        partial = self.partial(digest, size)
        took = list(partial.table.missing())
        try:
            buffer = memoryview(bytearray(min(PIECE, size)))
            for index in took:
                start, stop = piece_range(index, size)
                view = buffer[: stop - start]
                if not read_fully(source_fd, view, start):
                    raise ChecksumError(f"the file ended early while it was copied as {digest.short}…")
                partial.write(start, view)
                partial.finish(index, piece_hash(view))
            self.commit(partial)
        except ChecksumError:
            partial.invalidate(took)
            raise
        finally:
            partial.close_or_discard()

    def take_in(self, spool: str, table: PieceTable) -> None:
        """Commit a spooled file of the store's own disk, without a copy; *table* was made by reading it. Hold the blob's
        lock. The spool is gone then. Raises ChecksumError if it was changed since, OSError.
        """
        digest, size = table.digest, table.size
        if size <= TABLE_FROM:
            fd = os.open(spool, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                self.copy_in(fd, digest, size)
            finally:
                os.close(fd)
            os.unlink(spool)
            return
        path = self.layout.partial(digest)
        with open(self.layout.journal(digest), "wb") as file:
            file.write(table.encode())
        os.rename(spool, path)
        partial = self.partial(digest, size)
        try:
            self.commit(partial)
        finally:
            partial.close_or_discard()

    def note_suspect(self, digest: Digest) -> None:
        """Put on record that a verification found this blob damaged, until it is repaired."""
        (self.layout.suspects / digest.hex).touch()
        self._suspects = None

    def clear_suspect(self, digest: Digest) -> None:
        """Strike a blob off the record of damaged ones."""
        try:
            os.unlink(self.layout.suspects / digest.hex)
        except FileNotFoundError:
            return
        self._suspects = None

    def restamp(self, digest: Digest) -> None:
        """Give a blob that was just proven in place its mode and mtime back. Hold its lock. Raises OSError."""
        path = self.layout.blob(digest)
        os.chmod(path, 0o444)
        os.utime(path, (digest.mtime, digest.mtime))
        self.clear_suspect(digest)

    def name_in_quarantine(self, digest: Digest) -> Path:
        """Where a file that carries a blob's name may go."""
        return self.layout.quarantine / f"{digest.hex}-{int(time.time())}-{secrets.token_hex(4)}"

    def quarantine_blob(self, digest: Digest) -> Path | None:
        """Move whatever carries a blob's name out of the way, with its table; where it went. Raises OSError."""
        target = self.name_in_quarantine(digest)
        try:
            os.rename(self.layout.blob(digest), target)
        except FileNotFoundError:
            return None
        try:
            os.unlink(self.layout.table(digest))
        except FileNotFoundError:
            pass
        return target


def _create(layout: Layout, *, shared: bool) -> StoreConfig:
    config = StoreConfig(shared=shared)
    layouts.make_folders(layout, config)
    mode = 0o664 if shared else 0o600
    with locks.acquire(layout.locks / "store", doing="making the store", mode=mode):
        existing = layouts.read_config(layout)
        if existing is not None:
            return existing
        # The epoch first: were the order reversed, a crash here would look like a lost state/.
        write_file(layout.epoch, config.epoch.encode())
        write_file(layout.config, config.text().encode())
    return config


def _commit_token(note: dict[str, object], digest: Digest) -> str:
    return str(note.get("token", "")) if note.get("committed") == digest.hex else ""
