"""The error of a blob that no source could give: every source with its reason, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping

from modelstow.backends import redact
from modelstow.cas import ChecksumError, SizeMismatchError

from ..errors import (
    BLOB_CODES,
    AuthError,
    IncompleteDownloadError,
    ModelstowError,
    NetworkTimeoutError,
    RateLimitError,
    SourceUnavailableError,
)
from .context import BlobRequest
from .retry import Failure, Reason

_KINDS: dict[str, type[SourceUnavailableError]] = {
    "AUTH_FAIL": AuthError,
    "RATE_LIMIT": RateLimitError,
    "NETWORK_TIMEOUT": NetworkTimeoutError,
    "INCOMPLETE_DOWNLOAD": IncompleteDownloadError,
}
_OTHER_BYTES = "the remote file differs from the lockfile: run `modelstow lock --upgrade`, or restore the upload"
_HINTS = {
    "": "check the network and run the same command again: what was fetched is kept",
    "AUTH_FAIL": "put a login for the host into ~/.netrc, or check the one there",
    "INCOMPLETE_DOWNLOAD": "the source lacks files of the lockfile; add another source, or run `modelstow lock --upgrade`",
}


def all_sources_failed(wanted: BlobRequest, failures: Mapping[str, Failure]) -> ModelstowError | ChecksumError:
    """The error for *failures* by locator; its code is the first of the contract's order."""
    rows = [{"source": redact(locator), "code": f.code, "reason": f.what} for locator, f in failures.items()]
    ranked = sorted(failures.values(), key=lambda fact: _rank(fact.code))
    code = ranked[0].code if ranked else "SOURCE_UNAVAILABLE"
    names = ", ".join(wanted.paths[:3]) or wanted.digest.short
    reasons = "".join(f"\n  from {row['source']}: {row['reason']}" for row in rows) or "\n  no source is named"
    fields: dict[str, object] = {"file_path": next(iter(wanted.paths), ""), "digest": wanted.digest, "sources": rows}
    if code == "CHECKSUM_FAIL":
        what = f"{names}: no source gave the bytes of {wanted.digest.short}… ({wanted.size:,} bytes){reasons}"
        return ChecksumError(what, hint=_OTHER_BYTES, expected=str(wanted.digest), actual=ranked[0].actual, **fields)
    if code == "SIZE_MISMATCH":
        what = f"{names}: the lockfile says {wanted.size:,} bytes{reasons}"
        return SizeMismatchError(what, hint=_OTHER_BYTES, expected=wanted.size, actual=ranked[0].actual, **fields)
    kind = _KINDS.get(code, SourceUnavailableError)
    what = f"{names}: no source could give {wanted.digest.short}… ({wanted.size:,} bytes){reasons}"
    if not failures:
        hint = "give the model `sources` in models.toml, and run `modelstow lock`"
        return kind(what, hint=hint, missing_files=list(wanted.paths), **fields)
    # A body that broke off has the code of a file that is not there, and other advice.
    advice = _HINTS[""] if ranked[0].kind is Reason.TRANSIENT else _HINTS.get(code, _HINTS[""])
    hint = next((fact.hint for fact in ranked if fact.code == code and fact.hint), advice)
    return kind(what, hint=hint, missing_files=list(wanted.paths), **fields)


def _rank(code: str) -> int:
    return BLOB_CODES.index(code) if code in BLOB_CODES else len(BLOB_CODES)
