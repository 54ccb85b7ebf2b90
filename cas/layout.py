"""The layout of a store on disk, and its format file.

    ROOT/
      modelstow.json                       format, features, epoch, shared
      blobs/sha256/ab/<64 hex>             committed blobs (0444, mtime computed from the digest)
      blobs/sha256/ab/<64 hex>.pieces      piece table of a blob over 1 MiB
      models/<name>@<version>/<variant>/   trees
      pins/                                roots that the user set
      partial/<64 hex>[.pieces]            partials and their journals
      quarantine/  trash/                  damaged and displaced files; removed trees
      state/                               inventories, used, leases, locks, suspects, epoch, and folders of the caller

Losing ``state/`` or ``partial/`` never loses a model; the epoch shows gc that it happened.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from . import durable
from .digest import Digest
from .errors import Cause, StoreFormatError
from .untrusted import read_state

FORMAT = 1
TABLE_FROM = 1 << 20
"""Bytes up to which a blob has no piece table: reading it whole is quick enough. (One with a foreign stamp has.)"""

_CONFIG_BYTES = 1 << 16
_FOLDERS = ("models", "pins", "partial", "quarantine", "trash")
_STATE = ("inventories", "leases", "locks", "suspects", "used")


@dataclass(frozen=True)
class Layout:
    """The paths of one store. Pure: computes names, reads and writes nothing.

    Paths of blobs and their tables are plain strings, because a hundred thousand of them are made in a row.
    """

    root: Path
    base: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", str(self.root))

    @cached_property
    def config(self) -> Path:
        return self.root / "modelstow.json"

    @cached_property
    def blobs(self) -> Path:
        return self.root / "blobs" / "sha256"

    def blob(self, digest: Digest) -> str:
        hex_ = digest.hex
        return f"{self.base}/blobs/sha256/{hex_[:2]}/{hex_}"

    def table(self, digest: Digest) -> str:
        return self.blob(digest) + ".pieces"

    @cached_property
    def trees(self) -> Path:
        return self.root / "models"

    @cached_property
    def pins(self) -> Path:
        return self.root / "pins"

    @cached_property
    def partials(self) -> Path:
        return self.root / "partial"

    def partial(self, digest: Digest) -> str:
        return f"{self.base}/partial/{digest.hex}"

    def journal(self, digest: Digest) -> str:
        """The path of a partial's piece table."""
        return self.partial(digest) + ".pieces"

    @cached_property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    @cached_property
    def trash(self) -> Path:
        return self.root / "trash"

    @cached_property
    def state(self) -> Path:
        return self.root / "state"

    def state_dir(self, name: str) -> Path:
        """The path of a caller's folder below ``state/``; ``BlobStore.make_state_dir`` makes it."""
        return self.state / name

    @cached_property
    def inventories(self) -> Path:
        return self.root / "state" / "inventories"

    @cached_property
    def leases(self) -> Path:
        return self.root / "state" / "leases"

    @cached_property
    def locks(self) -> Path:
        return self.root / "state" / "locks"

    @cached_property
    def suspects(self) -> Path:
        return self.root / "state" / "suspects"

    @cached_property
    def epoch(self) -> Path:
        return self.root / "state" / "epoch"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """The content of modelstow.json. Unknown ``incompat`` features forbid use, ``ro_compat`` ones writing (as in ext4)."""

    format: int = FORMAT
    epoch: str = field(default_factory=lambda: secrets.token_hex(16))
    shared: bool = False
    incompat: tuple[str, ...] = ()
    ro_compat: tuple[str, ...] = ()

    def text(self) -> str:
        """The file's content."""
        features = {"incompat": list(self.incompat), "ro_compat": list(self.ro_compat)}
        document = {"format": self.format, "features": features, "epoch": self.epoch, "shared": self.shared}
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def parse(cls, text: str, *, where: Path) -> StoreConfig:
        """The configuration in *text*. Raises StoreFormatError for anything that this version does not know."""
        try:
            document = json.loads(text)
            features = document.get("features", {})
            config = cls(
                format=document["format"],
                epoch=str(document["epoch"]),
                shared=bool(document.get("shared", False)),
                incompat=tuple(features.get("incompat", ())),
                ro_compat=tuple(features.get("ro_compat", ())),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise StoreFormatError(
                f"{where} is not a store's format file ({error}); it was left unchanged", cause=Cause.NOT_A_STORE
            ) from error
        if config.format != FORMAT or config.incompat:
            known = f"format {config.format}, features {list(config.incompat)}"
            raise StoreFormatError(
                f"{where} has {known}; this version knows format {FORMAT} and no features",
                cause=Cause.LATER_FORMAT,
                found_version=config.format,
                supported_versions=[FORMAT],
            )
        return config

    @property
    def folder_mode(self) -> int:
        """Mode of the store's folders."""
        return 0o2775 if self.shared else 0o700


def read_config(layout: Layout) -> StoreConfig | None:
    """The store's configuration; None if there is no store. Raises StoreFormatError, OSError."""
    try:
        text = read_state(layout.config, most=_CONFIG_BYTES).decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        raise StoreFormatError(f"{layout.config} is not text; it was left unchanged") from error
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EFBIG):
            raise
        what = f"{layout.config} is not a store's format file ({error.strerror}); it was left unchanged"
        raise StoreFormatError(what, cause=Cause.NOT_A_STORE) from error
    return StoreConfig.parse(text, where=layout.config)


def make_folders(layout: Layout, config: StoreConfig, *, new: bool = False) -> None:
    """Make the folders that are missing, with modes that do not depend on the umask. Durable on return. Raises OSError.

    *new*: an earlier attempt to make the store may have been killed before it synced them.

    All 256 fan-out folders are made at once and never removed, so that no sweep removes one while a commit links into it.
    """
    mode = config.folder_mode
    if not layout.root.is_dir() and durable.make_folders(layout.root):
        os.chmod(layout.root, mode)  # not that of an existing one, which may be a mount point
    below = [(layout.root, (*_FOLDERS, "state", "blobs")), (layout.state, _STATE), (layout.root / "blobs", ("sha256",))]
    if len(_names(layout.blobs)) < 256:
        below.append((layout.blobs, tuple(f"{number:02x}" for number in range(256))))
    for folder, names in below:
        made = [make_folder(folder / name, mode) for name in names]
        if new or any(made):
            durable.fsync_folder(folder)  # or a power cut could take the names with what was made durable below them


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def make_folder(path: Path, mode: int) -> bool:
    """Make a folder with exactly this mode; False where there is one, which stays as it is. Not synced.

    Raises OSError, also for another user's.
    """
    try:
        path.mkdir()
    except FileExistsError:
        _check_ownership(path, mode)
        return False
    os.chmod(path, mode)
    return True


def _check_ownership(path: Path, mode: int) -> None:
    """Check that a private store's folder belongs to this user or root: any other writer could put anything there."""
    found = os.lstat(path)
    euid = os.geteuid()
    if mode == 0o700 and euid != 0 and (found.st_uid not in (euid, 0) or found.st_mode & stat.S_IWOTH):
        raise PermissionError(errno.EPERM, "belongs to another user, or every user may write to it", str(path))
