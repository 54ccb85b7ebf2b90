"""The layout of a store on disk, and the file that says which format it has.

    ROOT/
      modelstow.json                       format, features, epoch, shared
      blobs/sha256/ab/<64 hex>             committed blobs (0444, mtime computed from the digest)
      blobs/sha256/ab/<64 hex>.pieces      piece table of a blob over 1 MiB
      models/<name>@<version>/<variant>/   trees
      pins/                                what the user wants kept
      partial/<64 hex>[.pieces]            unfinished blobs and their journals
      quarantine/  trash/                  damaged and displaced files / trees that were just removed
      state/                               inventories, used, leases, locks, suspects, epoch, and what callers keep there

Losing ``state/`` or ``partial/`` never loses a model; the epoch tells gc that it happened.
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

from .digest import Digest
from .errors import Cause, StoreFormatError

FORMAT = 1
TABLE_FROM = 1 << 20
"""Blobs up to this many bytes have no piece table: sha256 is quick enough there."""

_FOLDERS = ("models", "pins", "partial", "quarantine", "trash")
_STATE = ("inventories", "leases", "locks", "suspects", "used")


@dataclass(frozen=True)
class Layout:
    """Paths of one store. Pure: computes names, touches nothing.

    Paths of blobs and their companion files are plain strings, since a hundred thousand of them are made in a row.
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
        """The piece table of a partial."""
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
        """A folder of the caller's own below ``state/``; ``BlobStore.make_state_dir`` makes it."""
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
    """What modelstow.json says. ``incompat`` features forbid any use, ``ro_compat`` ones forbid writing (as in ext4)."""

    format: int = FORMAT
    epoch: str = field(default_factory=lambda: secrets.token_hex(16))
    shared: bool = False
    incompat: tuple[str, ...] = ()
    ro_compat: tuple[str, ...] = ()

    def text(self) -> str:
        features = {"incompat": list(self.incompat), "ro_compat": list(self.ro_compat)}
        document = {"format": self.format, "features": features, "epoch": self.epoch, "shared": self.shared}
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def parse(cls, text: str, *, where: Path) -> StoreConfig:
        """Read modelstow.json. Raises StoreFormatError for anything this version does not understand."""
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
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreFormatError(
                f"{where} is not a store's format file: {error}; it was left as it is", cause=Cause.NOT_A_STORE
            ) from error
        if config.format != FORMAT or config.incompat:
            known = f"format {config.format}, features {list(config.incompat)}"
            raise StoreFormatError(
                f"{where} says {known}; this version knows format {FORMAT} and no features",
                cause=Cause.LATER_FORMAT,
                found_version=config.format,
                supported_versions=[FORMAT],
            )
        return config

    @property
    def folder_mode(self) -> int:
        return 0o2775 if self.shared else 0o700


def read_config(layout: Layout) -> StoreConfig | None:
    """The store's format file, or None where no store is. Raises StoreFormatError, OSError."""
    try:
        text = layout.config.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        raise StoreFormatError(f"{layout.config} is not text; it was left as it is") from error
    return StoreConfig.parse(text, where=layout.config)


def make_folders(layout: Layout, config: StoreConfig) -> None:
    """Create what is missing, with explicit modes whatever the umask; never changes a folder that is there.

    All 256 fan-out folders are made at once and never removed, so that a sweep cannot take one from under a commit.
    """
    mode = config.folder_mode
    if not layout.root.is_dir():  # one that is there may be a mount point of any mode
        make_folder(layout.root, mode, parents=True)
    for folder in (*(layout.root / name for name in _FOLDERS), layout.state, *(layout.state / n for n in _STATE)):
        make_folder(folder, mode)
    make_folder(layout.root / "blobs", mode)
    make_folder(layout.blobs, mode)
    if len(os.listdir(layout.blobs)) < 256:
        for number in range(256):
            make_folder(layout.blobs / f"{number:02x}", mode)


def make_folder(path: Path, mode: int, *, parents: bool = False) -> None:
    """Make a folder with exactly this mode; one that exists is left as it is. Raises OSError, also for another user's."""
    try:
        path.mkdir(parents=parents)
    except FileExistsError:
        _check_ownership(path, mode)
        return
    os.chmod(path, mode)


def _check_ownership(path: Path, mode: int) -> None:
    """A private store's folders must be ours: their owner, or whoever may write to them, could put anything there."""
    found = os.lstat(path)
    me = os.geteuid()
    if mode == 0o700 and me != 0 and (found.st_uid not in (me, 0) or found.st_mode & stat.S_IWOTH):
        raise PermissionError(errno.EPERM, "belongs to another user, or every user may write to it", str(path))
