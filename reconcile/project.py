"""A project: the manifest and the lockfile that belong together, the mirrors they name, and whether one is stale.

Used by the command line and from Python alike. Only ``find_files`` is needed by a command that finds nothing to do; the
readers of both files are loaded when a file is read.
"""

from __future__ import annotations

import os

from .paths import absolute_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .desired.lockfile import Lockfile
    from .settings import Settings


def find_files(
    lockfile: str | os.PathLike[str] | None, manifest: str | None, environ: Mapping[str, str]
) -> tuple[str | None, str | None]:
    """Absolute paths of lockfile and manifest: as named by option or environment, else side by side, else in the current
    folder or one above. The files need not exist."""
    lock = _absolute(lockfile or environ.get("MODELSTOW_LOCK"))
    toml = _absolute(manifest or environ.get("MODELSTOW_MANIFEST"))
    if lock is None and toml is None:
        lock, toml = _find("models.lock"), _find("models.toml")
        if toml is not None and (lock is None or lock.count(os.sep) < toml.count(os.sep)):
            lock = _with_suffix(toml, ".lock")  # a lockfile further up belongs to another manifest
        elif lock is not None and (toml is None or os.path.dirname(toml) != os.path.dirname(lock)):
            toml = _with_suffix(lock, ".toml")
    elif lock is None and toml is not None:
        lock = _with_suffix(toml, ".lock")
    elif toml is None and lock is not None:
        toml = _with_suffix(lock, ".toml")
    return lock, toml


def _absolute(path: str | os.PathLike[str] | None) -> str | None:
    return absolute_path(path) if path else None


def _with_suffix(path: str, suffix: str) -> str:
    return os.path.splitext(path)[0] + suffix


def _find(name: str) -> str | None:
    folder = os.getcwd()
    while True:
        if os.path.isfile(path := os.path.join(folder, name)):
            return path
        above = os.path.dirname(folder)
        if above == folder:
            return None
        folder = above


def find_manifest(settings: Settings) -> Path:
    """The manifest's path. Raises InvalidConfigError where there is none."""
    from .errors import InvalidConfigError

    path = settings.manifest
    if path is None or not path.is_file():
        raise InvalidConfigError(
            f"there is no manifest at {path}" if path else "there is no models.toml here or in a folder above",
            hint="make one with `modelstow init`",
        )
    return path


class Project:
    """A lockfile as it was read, with what its manifest adds. ``reload`` reads both again."""

    __slots__ = ("lock", "lock_text", "mirrors", "path", "settings", "stale", "warnings")

    def __init__(self, settings: Settings) -> None:
        """*settings* name the files. Raises LockfileMissingError, LockfileInvalidError, LockfileStaleError (with
        ``locked``), SchemaVersionError, OSError; with ``locked`` also ManifestValidationError."""
        self.settings = settings
        self.reload()

    def reload(self) -> None:
        """Read lockfile and manifest. Raises as the constructor, and then nothing changes."""
        from pathlib import Path

        from .desired import lockfile as lockfiles
        from .errors import LockfileMissingError

        path = self.settings.lockfile or Path(os.path.abspath("models.lock"))
        try:
            lock, text = lockfiles.read(path)
        except FileNotFoundError:
            raise LockfileMissingError(f"there is no lockfile at {path}", hint="make one with `modelstow lock`") from None
        except IsADirectoryError:
            hint = f"name the file, e.g. {path / 'models.lock'}"
            raise LockfileMissingError(f"{path} is a folder, not a lockfile", hint=hint) from None
        mirrors, stale, warnings = self._read_manifest(path, lock)
        self.path: Path = path
        self.lock: Lockfile = lock
        self.lock_text: bytes = text
        self.stale: bool | None = stale
        """Whether the lockfile was made from another manifest; None where there is none, or it cannot be read."""
        self.mirrors: tuple[str, ...] = (*self.settings.mirrors, *mirrors)
        self.warnings: tuple[str, ...] = warnings

    def _read_manifest(self, path: Path, lock: Lockfile) -> tuple[tuple[str, ...], bool | None, tuple[str, ...]]:
        """The mirrors that the manifest names, whether the lockfile is stale, and what to warn of."""
        from .errors import LockfileStaleError

        manifest_path = self.settings.manifest
        if manifest_path is None or not manifest_path.is_file():
            return (), None, ()
        from .desired import manifest as manifests

        try:
            manifest = manifests.read(manifest_path)
        except Exception as error:
            if self.settings.locked:
                raise
            what = "so it is not known whether the lockfile is stale, nor which mirrors it names"
            return (), None, (f"{manifest_path} cannot be read, {what} ({error})",)
        stale = manifest.meaning != lock.manifest
        if stale and self.settings.locked:
            raise LockfileStaleError(f"{path} was not made from {manifest_path}", hint="run `modelstow lock`")
        warnings = (f"{path} was not made from {manifest_path}; run `modelstow lock`",) if stale else ()
        return manifest.mirrors, stale, warnings
