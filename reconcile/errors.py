"""Errors of this package under one base, each with its code; and the exit code of each code.

Errors of the lower packages (``cas``, ``backends``) carry codes of the same set and pass through unchanged.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelstow.cas import CasError, ChecksumError, LockTimeoutError, NoSpaceError, SizeMismatchError
from modelstow.cas.errors import FULL

from .hints import hint_of

_MOST_LINES = 20  # of a message; the details have every failure


class ModelstowError(Exception):
    """The base of this package's errors: what and where in the message, what to do in ``hint``, fields in ``details``."""

    code = "UNKNOWN_ERROR"

    def __init__(self, what: str, *, hint: str = "", **details: object) -> None:
        super().__init__(what)
        self.what, self.hint, self.details = what, hint, details


class InvalidConfigError(ModelstowError):
    """Options or environment variables are invalid, or conflict with another registered lockfile."""

    code = "INVALID_CONFIG"


class InvalidModelIdError(ModelstowError):
    """A selector is malformed or ambiguous."""

    code = "INVALID_MODEL_ID"


class ModelNotFoundError(ModelstowError):
    """The lockfile has no such model. ``details``: model_id, available_models."""

    code = "MODEL_NOT_FOUND"


class VariantNotFoundError(ModelstowError):
    """The model has no such variant. ``details``: model_id, variant, available_variants."""

    code = "VARIANT_NOT_FOUND"


@dataclass(frozen=True, slots=True)
class Problem:
    """One error in a file, with its place there."""

    place: str  # such as ``models["m"].sources[0]``; empty for the whole file
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}" if self.place else self.what


class _FileError(ModelstowError):
    """A file is invalid. ``details["problems"]`` has every problem with its place."""

    def __init__(self, file: str, problems: Sequence[Problem], *, hint: str = "") -> None:
        lines = "".join(f"\n  {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        details = [{"place": p.place, "message": p.what} for p in problems]
        super().__init__(f"{file} has {count}:{lines}", hint=hint, file=file, problems=details)


class ManifestValidationError(_FileError):
    """The manifest is invalid."""

    code = "MANIFEST_VALIDATION_ERROR"


class LockfileInvalidError(_FileError):
    """The lockfile is invalid. Nothing was changed."""

    code = "LOCKFILE_INVALID"


class LockfileMissingError(ModelstowError):
    """The lockfile does not exist."""

    code = "LOCKFILE_INVALID"


class SchemaVersionError(ModelstowError):
    """A file has a format that this version does not know. ``details``: found_version, supported_versions."""

    code = "SCHEMA_VERSION_MISMATCH"


class LockfileStaleError(ModelstowError):
    """The lockfile was not made from this manifest, and ``--locked`` forbids that."""

    code = "LOCKFILE_STALE"


class SourceUnavailableError(ModelstowError):
    """No source delivered the bytes. ``details``: sources, each with its reason."""

    code = "SOURCE_UNAVAILABLE"


class ConcurrentModificationError(SourceUnavailableError):
    """A file of a source was written to while `lock` read it."""

    code = "CONCURRENT_MODIFICATION"


class AuthError(SourceUnavailableError):
    """A source requires credentials, or rejects those that it got."""

    code = "AUTH_FAIL"


class RateLimitError(SourceUnavailableError):
    """A source limits the rate of requests."""

    code = "RATE_LIMIT"


class NetworkTimeoutError(SourceUnavailableError):
    """A source did not answer in time."""

    code = "NETWORK_TIMEOUT"


class IncompleteDownloadError(SourceUnavailableError):
    """A source lacks some of the files of a tree. ``details``: missing_files, sources."""

    code = "INCOMPLETE_DOWNLOAD"


class IntegrityError(ModelstowError):
    """Corruption was found and not repaired. ``details``: faults."""

    code = "INTEGRITY_FAIL"


class FilesystemError(ModelstowError):
    """The operating system reported an error about a file or folder."""

    code = "FILESYSTEM_ERROR"


class PermissionDeniedError(FilesystemError):
    """Reading or writing a path is not permitted."""

    code = "PERMISSION_DENIED"


class PathTooLongError(FilesystemError):
    """A path is longer than the file system allows."""

    code = "PATH_TOO_LONG"


class PolicyRefusedError(ModelstowError):
    """The manifest's policy forbids the operation."""

    code = "POLICY_REFUSED"


class ApplyError(ModelstowError):
    """Some variants failed; the others are done. ``details["failures"]`` has every failure; the code is the worst one's."""

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
    """The failure of one part of an apply."""

    where: str  # a variant, a short digest or a tree
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
    "CONCURRENT_MODIFICATION": 5,
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
"""The codes of a failed blob, most telling first: of several reasons the first of these is reported."""


def exit_code(code: str) -> int:
    """The exit code of a process that ends with an error of this code."""
    return EXIT_CODES.get(code, 1)


def _rank(code: str) -> tuple[int, int]:
    number = exit_code(code)
    first = _WORST_FIRST.index(number) if number in _WORST_FIRST else -1
    return first, BLOB_CODES.index(code) if code in BLOB_CODES else len(BLOB_CODES)


def from_os(error: OSError, doing: str = "") -> ModelstowError | CasError:
    """The error for an ``OSError``, with the path that it names."""
    path = error.filename2 or error.filename or ""
    what = f"{doing + ': ' if doing else ''}{error.strerror or error}" + (f": {path}" if path else "")
    if error.errno in FULL:
        return NoSpaceError(what, hint="free some space; `modelstow gc` removes what nothing keeps", path=str(path))
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionDeniedError(
            what, hint="check the owner and permissions of the folder, or choose another --root", path=str(path)
        )
    if error.errno == errno.ENAMETOOLONG:
        return PathTooLongError(what, hint="choose a shorter --root", path=str(path))
    return FilesystemError(what, path=str(path))


def as_ours(error: BaseException, doing: str = "") -> ModelstowError | CasError | None:
    """The error as one with a code; None for a bug or an interrupt."""
    if isinstance(error, ModelstowError | CasError):
        return error
    if isinstance(error, MemoryError):
        return ModelstowError("there is not enough memory", hint="raise the limit of memory, or use fewer --connections")
    return from_os(error, doing) if isinstance(error, OSError) else None


def listing(names: Iterable[str], *, most: int = 20) -> str:
    """Names for a message: the first *most*, and the number of the others."""
    all_names = list(names)
    text = ", ".join(all_names[:most])
    return text + (f" and {len(all_names) - most} more" if len(all_names) > most else "")


__all__ = [
    "ApplyError",
    "AuthError",
    "ChecksumError",
    "ConcurrentModificationError",
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


def single(error: ModelstowError) -> Exception:
    """The worst of the failures itself, so that callers can catch it by its type; its details list the others."""
    if not isinstance(error, ApplyError):
        return error
    worst = error.worst
    worst.details["failures"] = error.details["failures"]
    return worst
