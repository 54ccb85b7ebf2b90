"""What can go wrong, under one base, each with its code; and what an exit code a code means.

Errors of the rooms below (``cas``, ``backends``) carry codes of the same set and pass through as they are.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelstow.cas import CasError, ChecksumError, LockTimeoutError, NoSpaceError, SizeMismatchError
from modelstow.cas.errors import FULL

from .hints import hint_of

_MOST_LINES = 20  # of a message; details have every failure


class ModelstowError(Exception):
    """Base of this package's errors: what and where in the message, what next in ``hint``, fields in ``details``."""

    code = "UNKNOWN_ERROR"

    def __init__(self, what: str, *, hint: str = "", **details: object) -> None:
        super().__init__(what)
        self.what, self.hint, self.details = what, hint, details


class InvalidConfigError(ModelstowError):
    """Options or environment make no sense, or contradict what another lockfile wants."""

    code = "INVALID_CONFIG"


class InvalidModelIdError(ModelstowError):
    """A selector that is none, or that fits several versions."""

    code = "INVALID_MODEL_ID"


class ModelNotFoundError(ModelstowError):
    """No such model in the lockfile. ``details``: model_id, available_models."""

    code = "MODEL_NOT_FOUND"


class VariantNotFoundError(ModelstowError):
    """The model has no such variant. ``details``: model_id, variant, available_variants."""

    code = "VARIANT_NOT_FOUND"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a file, and its place there."""

    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}" if self.place else self.what


class _FileError(ModelstowError):
    """A file with problems; all of them, each with its place, in ``details["problems"]``."""

    def __init__(self, file: str, problems: Sequence[Problem], *, hint: str = "") -> None:
        lines = "".join(f"\n  {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        details = [{"place": p.place, "message": p.what} for p in problems]
        super().__init__(f"{file} has {count}:{lines}", hint=hint, file=file, problems=details)


class ManifestValidationError(_FileError):
    """models.toml cannot be used."""

    code = "MANIFEST_VALIDATION_ERROR"


class LockfileInvalidError(_FileError):
    """models.lock cannot be used; nothing was touched."""

    code = "LOCKFILE_INVALID"


class LockfileMissingError(ModelstowError):
    """There is no lockfile."""

    code = "LOCKFILE_INVALID"


class SchemaVersionError(ModelstowError):
    """A file of a later format. ``details``: found_version, supported_versions."""

    code = "SCHEMA_VERSION_MISMATCH"


class LockfileStaleError(ModelstowError):
    """The lockfile was not made from this manifest, and ``--locked`` was asked."""

    code = "LOCKFILE_STALE"


class SourceUnavailableError(ModelstowError):
    """No source could give the bytes. ``details``: sources, each with its reason."""

    code = "SOURCE_UNAVAILABLE"


class AuthError(SourceUnavailableError):
    """A source wants credentials, or others."""

    code = "AUTH_FAIL"


class RateLimitError(SourceUnavailableError):
    """A source asks to be left alone."""

    code = "RATE_LIMIT"


class NetworkTimeoutError(SourceUnavailableError):
    """A source did not answer in time."""

    code = "NETWORK_TIMEOUT"


class IncompleteDownloadError(SourceUnavailableError):
    """A source has some of the files of a tree and not these. ``details``: missing_files, sources."""

    code = "INCOMPLETE_DOWNLOAD"


class IntegrityError(ModelstowError):
    """Corruption was found and not repaired. ``details``: faults."""

    code = "INTEGRITY_FAIL"


class FilesystemError(ModelstowError):
    """The file system refused."""

    code = "FILESYSTEM_ERROR"


class PermissionDeniedError(FilesystemError):
    """Not allowed to write or read there."""

    code = "PERMISSION_DENIED"


class PathTooLongError(FilesystemError):
    """A path exceeds what the file system takes."""

    code = "PATH_TOO_LONG"


class PolicyRefusedError(ModelstowError):
    """The manifest's policy forbids it."""

    code = "POLICY_REFUSED"


class ApplyError(ModelstowError):
    """Some variants failed; the others are done. ``details["failures"]`` has every one; the code is the worst one's."""

    def __init__(self, failures: Sequence[ApplyFailure], changed: frozenset[Any] = frozenset()) -> None:
        worst = min(failures, key=lambda failure: _rank(failure.error.code))
        self.code, self.worst = worst.error.code, worst.error
        self.failures, self.changed = tuple(failures), changed
        lines = [f"{failure.where}: {failure.error}" for failure in failures[:_MOST_LINES]]
        lines += [f"and {len(failures) - _MOST_LINES} more"] if len(failures) > _MOST_LINES else []
        own = dict(worst.error.details)
        if "missing_files" in own:
            missing = (f.error.details.get("missing_files", ()) for f in failures)
            own["missing_files"] = sorted({path for paths in missing if isinstance(paths, list) for path in paths})
        rows = [{"where": f.where, "code": f.error.code, "message": str(f.error), **f.error.details} for f in failures]
        super().__init__("\n".join(lines), hint=hint_of(worst.error), **{**own, "failures": rows})


@dataclass(frozen=True, slots=True)
class ApplyFailure:
    """One part of an apply that failed."""

    where: str
    error: ModelstowError | CasError = field(compare=False)


EXIT_CODES: Mapping[str, int] = {
    "INVALID_CONFIG": 2,
    "MODEL_NOT_FOUND": 2,
    "VARIANT_NOT_FOUND": 2,
    "INVALID_MODEL_ID": 2,
    "MANIFEST_VALIDATION_ERROR": 2,
    "SCHEMA_VERSION_MISMATCH": 2,
    "LOCKFILE_INVALID": 2,
    "INTEGRITY_FAIL": 4,
    "SOURCE_UNAVAILABLE": 5,
    "NETWORK_TIMEOUT": 5,
    "RATE_LIMIT": 5,
    "CHECKSUM_FAIL": 5,
    "SIZE_MISMATCH": 5,
    "INCOMPLETE_DOWNLOAD": 5,
    "NO_SPACE": 6,
    "LOCKFILE_STALE": 7,
    "AUTH_FAIL": 8,
    "SIGNATURE_FAIL": 9,
    "POLICY_REFUSED": 9,
    "LOCK_TIMEOUT": 10,
}
"""Exit code by error code; 1 for the rest."""

_WORST_FIRST = (9, 8, 6, 4, 5, 10, 1)
BLOB_CODES = (
    "CHECKSUM_FAIL",
    "SIZE_MISMATCH",
    "INCOMPLETE_DOWNLOAD",
    "AUTH_FAIL",
    "RATE_LIMIT",
    "NETWORK_TIMEOUT",
    "SOURCE_UNAVAILABLE",
)
"""Of several reasons why one blob could not be had, the first of these is told."""


def exit_code(code: str) -> int:
    """What a process ends with for an error of this code."""
    return EXIT_CODES.get(code, 1)


def _rank(code: str) -> tuple[int, int]:
    number = exit_code(code)
    first = _WORST_FIRST.index(number) if number in _WORST_FIRST else -1
    return first, BLOB_CODES.index(code) if code in BLOB_CODES else len(BLOB_CODES)


def from_os(error: OSError, doing: str = "") -> ModelstowError | CasError:
    """An operating system's refusal as one of ours, with the path it names."""
    path = error.filename2 or error.filename or ""
    what = f"{doing + ': ' if doing else ''}{error.strerror or error}" + (f": {path}" if path else "")
    if error.errno in FULL:
        return NoSpaceError(what, hint="free some space; `modelstow gc` removes what nothing keeps", path=str(path))
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionDeniedError(what, hint="check who owns the folder, or choose another --root", path=str(path))
    if error.errno == errno.ENAMETOOLONG:
        return PathTooLongError(what, hint="choose a shorter --root", path=str(path))
    return FilesystemError(what, path=str(path))


def as_ours(error: BaseException, doing: str = "") -> ModelstowError | CasError | None:
    """The error as one that has a code; None for what is not a failure of ours (a bug, an interrupt)."""
    if isinstance(error, ModelstowError | CasError):
        return error
    return from_os(error, doing) if isinstance(error, OSError) else None


def listing(names: Iterable[str], *, most: int = 20) -> str:
    """Names for a message: the first *most*, and how many more."""
    every = list(names)
    shown = ", ".join(every[:most])
    return shown + (f" and {len(every) - most} more" if len(every) > most else "")


__all__ = [
    "ApplyError",
    "AuthError",
    "ChecksumError",
    "FilesystemError",
    "IncompleteDownloadError",
    "IntegrityError",
    "InvalidConfigError",
    "InvalidModelIdError",
    "LockTimeoutError",
    "LockfileInvalidError",
    "LockfileMissingError",
    "LockfileStaleError",
    "ManifestValidationError",
    "ModelNotFoundError",
    "ModelstowError",
    "NetworkTimeoutError",
    "NoSpaceError",
    "PathTooLongError",
    "PermissionDeniedError",
    "PolicyRefusedError",
    "Problem",
    "RateLimitError",
    "SchemaVersionError",
    "SizeMismatchError",
    "SourceUnavailableError",
    "VariantNotFoundError",
]
