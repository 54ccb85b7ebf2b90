"""Source health: recent failures in this process, corrupt sources on record, and the error when every source failed."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from modelstow.backends import Registry, SourceError, redact
from modelstow.cas import ChecksumError, Digest, SizeMismatchError
from modelstow.cas.durable import write_file
from modelstow.cas.records import INVALID, decode, encode
from modelstow.cas.untrusted import EVERYBODY, Writers, read_state

from ..errors import (
    BLOB_CODES,
    AuthError,
    IncompleteDownloadError,
    ModelstowError,
    NetworkTimeoutError,
    RateLimitError,
    SourceUnavailableError,
)
from ..events.events import Sink, SourceFailed
from .compressed import CompressedForms
from .retry import Failure, Reason
from .state import BlobRequest


@dataclass(frozen=True, slots=True)
class SourceFailure:
    """The record of a failure: when (monotonic seconds) and why."""

    at: float
    code: str
    what: str
    exhausted: bool = False  # no attempt was left


class FailureTable:
    """The negative cache of sources, in memory: failures by host or folder, or by locator where only that one failed.

    Not shared with other processes, which may have the credentials that this one lacks. Safe for threads.
    """

    def __init__(self, *, ttl_s: float = 300.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.ttl_s, self._clock = ttl_s, clock
        self._failures: dict[str, SourceFailure] = {}
        self._mutex = Lock()

    def note(self, key: str, code: str, what: str, *, exhausted: bool = False) -> None:
        """Record a failure; an earlier one that still counts as *exhausted* stays so."""
        with self._mutex:
            before = self._active(key)
            exhausted |= before is not None and before.exhausted
            self._failures[key] = SourceFailure(self._clock(), code, what, exhausted)

    def exhausted(self, keys: Iterable[str]) -> bool:
        """Whether one of these failed until no attempt was left, without a success since."""
        with self._mutex:
            return any((failure := self._active(key)) is not None and failure.exhausted for key in keys)

    def clear(self, keys: Iterable[str]) -> None:
        """Remove the records of sources that succeeded."""
        with self._mutex:
            for key in keys:
                self._failures.pop(key, None)

    def expire(self) -> None:
        """Remove the records older than ``ttl_s`` seconds."""
        with self._mutex:
            self._failures = {key: f for key in self._failures if (f := self._active(key)) is not None}

    @property
    def any(self) -> bool:
        """Whether there is a record that still counts."""
        if not self._failures:  # the usual case
            return False
        self.expire()
        return bool(self._failures)

    def __contains__(self, key: str) -> bool:
        with self._mutex:
            return self._active(key) is not None

    def _active(self, key: str) -> SourceFailure | None:
        failure = self._failures.get(key)
        return failure if failure is not None and self._clock() - failure.at < self.ttl_s else None

    def active(self) -> dict[str, SourceFailure]:
        """The records that still count, by key."""
        self.expire()
        with self._mutex:
            return dict(self._failures)


_KIND = "bad-sources"
KEPT_S = 7 * 86_400.0
"""How long a record counts, in seconds: the source may have been repaired since."""


@dataclass(slots=True)
class BadSources:
    """The records of sources that sent corrupt data, one file a digest in *folder*. Safe for threads.

    A record that cannot be read or written is ignored: that costs a download at most.
    """

    folder: Path
    clock: Callable[[], float] = time.time
    writers: Writers = EVERYBODY
    _known: frozenset[str] | None = None  # the files in the folder, listed once
    _mutex: Lock = field(default_factory=Lock)

    def of(self, digest: Digest) -> frozenset[str]:
        """The redacted locators that sent corrupt data for this digest within ``KEPT_S`` seconds."""
        with self._mutex:
            known, now = self._read(digest), self.clock()
        return frozenset(locator for locator, at in known.items() if abs(now - at) < KEPT_S)

    def note(self, digest: Digest, locator: str) -> None:
        """Record a source that is proven corrupt."""
        with self._mutex:
            self._write(digest, {**self._read(digest), redact(locator): self.clock()})

    def clear(self, digest: Digest, locators: frozenset[str]) -> None:
        """Remove the records of sources that sent the correct bytes."""
        with self._mutex:
            known = self._read(digest)
            if correct := {redact(locator) for locator in locators} & known.keys():
                self._write(digest, {locator: at for locator, at in known.items() if locator not in correct})

    def _read(self, digest: Digest) -> dict[str, float]:
        if self._known is None:
            try:
                self._known = frozenset(os.listdir(self.folder))
            except OSError:
                self._known = frozenset()
        if digest.hex not in self._known:
            return {}
        try:
            rows = decode(read_state(self.folder / digest.hex, self.writers), _KIND, version=1)["sources"]
            return {str(locator): float(at) for locator, at in rows.items()}
        except (OSError, *INVALID):
            return {}

    def _write(self, digest: Digest, rows: dict[str, float]) -> None:
        path, self._known = self.folder / digest.hex, None
        try:
            if rows:
                self.folder.mkdir(exist_ok=True)
                write_file(path, encode(_KIND, 1, {"sources": dict(sorted(rows.items()))}))
            else:
                os.unlink(path)
        except OSError:
            return


class FailureAttribution:
    """The failures of one download, and the records that they are written to.

    The caller holds its mutex for every call but those of ``flush`` and, before any thread runs, ``recently_failed`` and
    ``exhausted``: these may read or write a disk.
    """

    def __init__(
        self,
        request: BlobRequest,
        locators: Mapping[str, str],
        forms: CompressedForms,
        *,
        registry: Registry,
        failures: FailureTable,
        bad_sources: BadSources,
        emit: Sink,
    ) -> None:
        self._digest, self._locators, self._forms = request.digest, locators, forms
        self._registry, self._failures, self._bad_sources, self._emit = registry, failures, bad_sources, emit
        self._corrupt: dict[str, set[int]] = {}  # by sender: corrupt pieces that it has not sent again since
        self._pending = deque[tuple[str, Failure]]()

    def recently_failed(self) -> frozenset[str]:
        """The locators with a record, as failed or as corrupt for this digest: they are requested last."""
        failures, corrupt = self._failures, self._bad_sources.of(self._digest)
        failed = self._locators if failures.any else ()  # usually there is no record, and no key is computed
        recent = {locator for locator in failed if any(key in failures for key in self._keys(locator))}
        return frozenset(recent | {locator for locator in self._locators if redact(locator) in corrupt})

    def exhausted(self, locators: Iterable[str]) -> frozenset[str]:
        """Of these, the ones whose record says that no attempt was left."""
        return frozenset(locator for locator in locators if self._failures.exhausted(self._keys(locator)))

    def note(
        self, locator: str, failure: Failure, *, exactly: bool = False, exhausted: bool = False, pieces: Iterable[int] = ()
    ) -> None:
        """Record a failure: *exactly* of this locator, else of its host or folder; with the *pieces* that were corrupt."""
        if locator not in self._locators:
            return
        if self._forms.shows_absence(locator, failure):
            plain = self._forms.note_absent(locator)
            if plain is None:
                return
            locator, exactly = plain, True
        corrupt = failure.reason is Reason.CORRUPT_DATA
        if corrupt:
            self._corrupt.setdefault(locator, set()).update(pieces)
        key = self._keys(locator)[0 if exactly or corrupt else 1]
        self._failures.note(key, failure.code, failure.what, exhausted=exhausted)
        self._pending.append((locator, failure))

    def sent_again(self, locator: str, piece: int) -> None:
        """A source sent a piece again, which may be correct this time."""
        if corrupt := self._corrupt.get(locator):
            corrupt.discard(piece)

    def clear(self, senders: Iterable[str]) -> None:
        """The blob is verified: remove the records of senders none of whose pieces were corrupt."""
        corrupt = {locator for locator, pieces in self._corrupt.items() if pieces}
        correct = (frozenset(senders) & self._locators.keys()) - corrupt
        if self._failures.any:
            self._failures.clear(key for locator in correct for key in self._keys(locator))
        self._bad_sources.clear(self._digest, correct)

    def flush(self) -> None:
        """Write and report the failures noted so far. Called without the mutex: a disk and a terminal take their time."""
        with suppress(IndexError):  # empty; another thread may be flushing too
            while True:
                locator, failure = self._pending.popleft()
                corrupt = failure.reason is Reason.CORRUPT_DATA
                if corrupt:
                    self._bad_sources.note(self._digest, locator)
                self._emit(SourceFailed(locator=redact(locator), what=failure.what, corrupt=corrupt))

    def _keys(self, locator: str) -> tuple[str, str]:
        """The keys of this locator's records: its own, and that of its host or folder."""
        try:
            return redact(locator), redact(self._registry.find(locator).origin(locator))
        except SourceError:
            return redact(locator), redact(locator)


_ERRORS: Mapping[Reason, type[ChecksumError | SizeMismatchError | SourceUnavailableError]] = {
    Reason.CORRUPT_DATA: ChecksumError,
    Reason.WRONG_SIZE: SizeMismatchError,
    Reason.NOT_FOUND: IncompleteDownloadError,
    Reason.TRUNCATED: IncompleteDownloadError,
    Reason.AUTHENTICATION: AuthError,
    Reason.RATE_LIMIT: RateLimitError,
    Reason.STALLED: NetworkTimeoutError,
    Reason.TRANSIENT: SourceUnavailableError,
    Reason.PERMANENT: SourceUnavailableError,
}
_OTHER_BYTES = "the remote file differs from the lockfile: run `modelstow lock --upgrade`, or restore the upload"
_RETRY = "check the network and run the same command again: what was fetched is kept"
_HINTS = {
    Reason.AUTHENTICATION: "put a login for the host into ~/.netrc, or check the one there",
    Reason.NOT_FOUND: "the source lacks files of the lockfile; add another source, or run `modelstow lock --upgrade`",
}


def all_sources_failed(request: BlobRequest, failures: Mapping[str, Failure]) -> ModelstowError | ChecksumError:
    """The error for *failures* by locator: of several reasons the first in the order of ``BLOB_CODES`` is reported."""
    rows = [{"source": redact(locator), "code": f.code, "reason": f.what} for locator, f in failures.items()]
    names = ", ".join(request.paths[:3]) or request.digest.short
    reasons = "".join(f"\n  from {row['source']}: {row['reason']}" for row in rows) or "\n  no source is configured"
    fields: dict[str, Any] = {"file_path": next(iter(request.paths), ""), "digest": request.digest, "sources": rows}
    unavailable = f"{names}: no source could provide {request.digest.short}… ({request.size:,} bytes){reasons}"
    if not failures:
        hint = "give the model `sources` in models.toml, and run `modelstow lock`"
        return SourceUnavailableError(unavailable, hint=hint, missing_files=list(request.paths), **fields)
    ranked = sorted(failures.values(), key=lambda failure: BLOB_CODES.index(_ERRORS[failure.reason].code))
    first, error = ranked[0], _ERRORS[ranked[0].reason]
    if issubclass(error, SizeMismatchError):
        what = f"{names}: the lockfile says {request.size:,} bytes{reasons}"
        return SizeMismatchError(what, hint=_OTHER_BYTES, expected=request.size, actual=first.actual, **fields)
    if issubclass(error, ChecksumError):
        what = f"{names}: no source sent the content of {request.digest.short}… ({request.size:,} bytes){reasons}"
        return ChecksumError(what, hint=_OTHER_BYTES, expected=str(request.digest), actual=first.actual, **fields)
    own_hints = (f.hint for f in ranked if _ERRORS[f.reason] is error and f.hint)
    hint = next(own_hints, _HINTS.get(first.reason, _RETRY))
    return error(unavailable, hint=hint, missing_files=list(request.paths), **fields)
