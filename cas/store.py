"""The blob store: one ROOT, its blobs, trees and locks. From bytes to a blob:

1. *Lock.* The blob's lock is taken, one per digest; other processes wait for it and then find the blob.
2. *Open.* ``ingest.open`` resumes the partial of an earlier run with the pieces whose bytes still hash to the journal, or
   starts an empty one.
3. *Write.* Pieces are written and recorded in any order, without an fsync; the sha256 follows their contiguous front.
4. *Commit*, after every writer has ended, in the order that survives a power cut: the sha256 of the whole must equal the
   name; the journal is marked as committing; the file gets mode 0444 and its digest mtime; it is fsynced; it is linked
   under the blob's name and unlinked from the partial's; the folder is fsynced, and from then on the blob is durable; the
   journal is marked as proven and renamed to the blob's table.

A name in ``blobs/`` therefore always has bytes whose sha256 was verified. An intact blob is never overwritten; a damaged
one is moved to ``quarantine/`` first. After a failed fsync the partial is deleted: a second fsync would succeed without
having written what the first could not.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from . import layout as layouts
from . import locks
from .blobs import Blobs
from .cancellation import CancellationToken
from .digest import Digest
from .durable import Syncer, fsync_folder, remove_temp_files, write_file
from .errors import Cause, StoreFormatError
from .ingest import Ingest
from .inventory import TreeRecords
from .layout import Layout, StoreConfig
from .pieces import TableState, read_table
from .untrusted import Writers

LOCK_TIMEOUT_S = 300.0
"""Default time to wait for a lock, from its holder's last progress."""
_LOCK_TRIES = 100  # while another process removes what has a lock file's name and is none
_STRIPE_DIGITS = 3  # 4096 lock files for all blobs, never more; two digests that share one merely wait for each other


class BlobStore:
    """A store at ROOT. Safe for threads; any number of processes and hosts may share one ROOT.

    ``blobs`` is the committed blobs, ``ingest`` the way in, ``trees`` the inventories.
    """

    def __init__(self, root: Path, config: StoreConfig, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """Use ``open``, ``open_existing`` or ``open_readonly``. *lock_timeout_s* is the default for every lock."""
        self.layout, self.config, self.lock_timeout_s = Layout(root), config, lock_timeout_s
        self.writers = Writers.of(self.layout.root, shared=config.shared)
        self.blobs, self.trees = Blobs(self.layout), TreeRecords(self.layout.inventories, self.writers)
        self.ingest = Ingest(
            self.layout, self.blobs, lambda digest, what: self.lock_blob(digest, doing=f"{what} {digest.short}")
        )

    @classmethod
    def open(
        cls, root: Path, *, create: bool = True, shared: bool = False, lock_timeout_s: float = LOCK_TIMEOUT_S
    ) -> BlobStore:
        """The store at *root*, made if there is none and *create* is true; *shared* is for a store that is made.

        Raises StoreFormatError for a store of another format, FileNotFoundError, LockTimeoutError, OSError.
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
        """The store at *root*; None if there is none. Writes nothing. Raises StoreFormatError, OSError."""
        layout = Layout(Path(os.path.abspath(root)))
        config = layouts.read_config(layout)
        return None if config is None else cls(layout.root, config)

    @classmethod
    def open_readonly(cls, root: Path) -> BlobStore:
        """The store at *root* for reading, as empty if there is none. Writes nothing. Raises StoreFormatError, OSError."""
        return cls.open_existing(root) or cls(Path(os.path.abspath(root)), StoreConfig())

    def prepare(self) -> None:
        """Make missing folders. Call it before the first write. Raises StoreFormatError, OSError."""
        if self.config.ro_compat:
            raise StoreFormatError(
                f"{self.layout.config} requires {list(self.config.ro_compat)}, which this version cannot write",
                cause=Cause.LATER_FORMAT,
            )
        layouts.make_folders(self.layout, self.config)

    def make_state_dir(self, name: str) -> Path:
        """A caller's folder below ``state/``, made if it is missing. Raises OSError."""
        folder = self.layout.state_dir(name)
        if layouts.make_folder(folder, self.config.folder_mode):
            fsync_folder(folder.parent)
        return folder

    def remove_temp_files(self, *, in_blobs: bool = False) -> None:
        """Remove temporary files of killed writers; *in_blobs*: also next to the blobs. Raises OSError."""
        layout = self.layout
        remove_temp_files((layout.root, layout.pins, layout.trash, layout.state, *_subfolders(layout.state)))
        if in_blobs:
            remove_temp_files(layout.blobs / f"{fan:02x}" for fan in range(256))

    def sync_blobs(self) -> None:
        """Make the names of all blobs durable. Raises OSError."""
        with Syncer(str(self.layout.blobs), 256) as syncer:
            for fan in range(256):
                syncer.sync_folder(f"{self.layout.blobs}/{fan:02x}")

    # ---- reading

    def held_in_partial(self, digest: Digest, size: int) -> int:
        """Bytes in a partial's finished pieces according to its journal, unverified; for display."""
        table = read_table(self.layout.journal(digest), digest)
        if table is None or table.size != size or table.state is not TableState.UNFINISHED:
            return 0
        return table.held_bytes

    # ---- locking

    def blob_lock_path(self, digest: Digest) -> Path:
        """The lock file of a blob."""
        return self.layout.locks / f"blob-{lock_stripe(digest)}"

    def lock_blob(
        self,
        digest: Digest,
        *,
        doing: str,
        timeout_s: float | None = None,
        token: CancellationToken | None = None,
        on_wait: Callable[[locks.Holder | None], None] | None = None,
    ) -> locks.Lock:
        """The exclusive lock of a blob; see ``locks.acquire``. Raises LockTimeoutError, Cancelled, OSError."""
        name = self.blob_lock_path(digest).name
        return self.lock(name, doing=doing, timeout_s=timeout_s, token=token, on_wait=on_wait)

    def commits_seen(self, digest: Digest) -> str:
        """A text that changes when a process commits this blob, so that concurrent refetches of it become one."""
        return _commit_token(locks.peek(self.blob_lock_path(digest)), digest)

    def note_commit(self, lock: locks.Lock, digest: Digest) -> None:
        """Record in the held *lock* that this blob was just committed, for ``commits_seen``. Not synced. Raises OSError."""
        lock.write_note(committed=digest.hex, token=secrets.token_hex(8))

    @property
    def lock_mode(self) -> int:
        """Mode of lock files."""
        return 0o664 if self.config.shared else 0o600

    def lock(
        self,
        name: str,
        *,
        doing: str,
        shared: bool = False,
        timeout_s: float | None = None,
        token: CancellationToken | None = None,
        on_wait: Callable[[locks.Holder | None], None] | None = None,
    ) -> locks.Lock:
        """One of the store's named locks (``store``, ``gate``, ``space``, ``tree-…``); see ``locks.acquire``.

        Raises LockTimeoutError, Cancelled, OSError.
        """
        path, timeout_s = self.layout.locks / name, self.lock_timeout_s if timeout_s is None else timeout_s
        for tries_left in reversed(range(_LOCK_TRIES)):
            try:
                return locks.acquire(
                    path, doing=doing, shared=shared, timeout_s=timeout_s, token=token, on_wait=on_wait, mode=self.lock_mode
                )
            except OSError as error:
                if error.errno not in locks.STRANGE or not tries_left:
                    raise
                locks.remove_strange(path)
        raise AssertionError("the last try returns or raises")


def lock_stripe(digest: Digest) -> str:
    """The key of the lock of a blob, which other digests may share."""
    return digest.hex[:_STRIPE_DIGITS]


def _create(layout: Layout, *, shared: bool) -> StoreConfig:
    config = StoreConfig(shared=shared)
    layouts.make_folders(layout, config, new=True)
    mode = 0o664 if shared else 0o600
    with locks.acquire(layout.locks / "store", doing="making the store", mode=mode):
        existing = layouts.read_config(layout)
        if existing is not None:
            return existing
        # The epoch first: in the other order, a crash here would look like a lost state/.
        write_file(layout.epoch, config.epoch.encode())
        write_file(layout.config, config.text().encode())
    return config


def _subfolders(folder: Path) -> list[Path]:
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    return []


def _commit_token(note: dict[str, object], digest: Digest) -> str:
    return str(note.get("token", "")) if note.get("committed") == digest.hex else ""
