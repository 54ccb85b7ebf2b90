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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from . import layout as layouts
from . import locks
from .blobs import Blobs
from .cancellation import CancellationToken
from .digest import Digest
from .durable import remove_temp_files, write_file
from .errors import Cause, StoreFormatError
from .ingest import Ingest
from .inventory import TreeRecords
from .layout import Layout, StoreConfig
from .pieces import TableState, read_table

LOCK_TIMEOUT_S = 300.0
_STRIPES_HEX = 3  # 4096 lock files for all blobs, for ever; two digests that share one merely wait for each other


class BlobStore:
    """Blobs under their digests in ``ROOT/blobs``. Any number of threads, processes and hosts may share one ROOT."""

    def __init__(self, root: Path, config: StoreConfig, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """*lock_timeout_s*: how long a lock is waited for where nobody says, from its holder's last sign of progress."""
        self.layout, self.config, self.lock_timeout_s = Layout(root), config, lock_timeout_s
        self.blobs, self.trees = Blobs(self.layout), TreeRecords(self.layout.inventories)
        self.ingest = Ingest(
            self.layout, self.blobs, lambda digest, what: self.lock_blob(digest, doing=f"{what} {digest.short}")
        )

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
                f"{self.layout.config} asks for {list(self.config.ro_compat)}, which this version cannot write",
                cause=Cause.LATER_FORMAT,
            )
        layouts.make_folders(self.layout, self.config)

    def make_state_dir(self, name: str) -> Path:
        """The caller's folder *name* below ``state/``, made where it is missing. Raises OSError."""
        folder = self.layout.state_dir(name)
        layouts.make_folder(folder, self.config.folder_mode)
        return folder

    def remove_temp_files(self, *, in_blobs: bool = False) -> None:
        """Remove what killed writers left half written; *in_blobs*: next to the blobs too. Raises OSError."""
        at = self.layout
        remove_temp_files((at.root, at.pins, at.trash, at.state, *_subfolders(at.state)))
        if in_blobs:
            remove_temp_files(at.blobs / f"{fan:02x}" for fan in range(256))

    # ---- reading

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
        token: CancellationToken | None = None,
        on_wait: Callable[[locks.Holder | None], None] | None = None,
    ) -> locks.Lock:
        """The exclusive right to write this blob. Raises LockTimeoutError, Cancelled."""
        path, timeout_s = self.blob_lock_path(digest), self.lock_timeout_s if timeout_s is None else timeout_s
        return locks.acquire(path, doing=doing, timeout_s=timeout_s, token=token, on_wait=on_wait, mode=self.lock_mode)

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
        token: CancellationToken | None = None,
        on_wait: Callable[[locks.Holder | None], None] | None = None,
    ) -> locks.Lock:
        """One of the store's named locks (``store``, ``gate``, ``space``, ``tree-…``)."""
        path, timeout_s = self.layout.locks / name, self.lock_timeout_s if timeout_s is None else timeout_s
        return locks.acquire(
            path, doing=doing, shared=shared, timeout_s=timeout_s, token=token, on_wait=on_wait, mode=self.lock_mode
        )


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


def _subfolders(folder: Path) -> list[Path]:
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    return []


def _commit_token(note: dict[str, object], digest: Digest) -> str:
    return str(note.get("token", "")) if note.get("committed") == digest.hex else ""
