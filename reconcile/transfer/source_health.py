"""Source health: recent failures in this process, corrupt data on record, and the error when no source is left."""

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
    """When (monotonic seconds) and why a source failed."""

    at: float
    code: str
    what: str
    given_up: bool = False  # it had no attempt left


class FailureTable:
    """Failures by what fails together: a host or folder that cannot be reached, a locator that is not there.

    Other processes are not told: one may have the token that this one lacks. Safe for threads.
    """

    def __init__(self, *, ttl_s: float = 300.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.ttl_s, self._clock = ttl_s, clock
        self._failures: dict[str, SourceFailure] = {}
        self._mutex = Lock()

    def note(self, key: str, code: str, what: str, *, given_up: bool = False) -> None:
        with self._mutex:
            before = self._active(key)
            given_up |= before is not None and before.given_up
            self._failures[key] = SourceFailure(self._clock(), code, what, given_up)

    def given_up(self, keys: Iterable[str]) -> bool:
        """Whether one of these failed until no attempt was left, and none succeeded since."""
        with self._mutex:
            return any((failure := self._active(key)) is not None and failure.given_up for key in keys)

    def clear(self, keys: Iterable[str]) -> None:
        """Success: forget what failed before."""
        with self._mutex:
            for key in keys:
                self._failures.pop(key, None)

    def expire(self) -> None:
        """Forget what is older than ``ttl_s`` seconds."""
        with self._mutex:
            self._failures = {key: f for key in self._failures if (f := self._active(key)) is not None}

    @property
    def any(self) -> bool:
        """Whether anything is on record that still counts."""
        if not self._failures:  # mostly
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
        """Every failure that still counts."""
        self.expire()
        with self._mutex:
            return dict(self._failures)


_KIND = "bad-sources"
KEPT_S = 7 * 86_400.0
"""How long a lie counts: the source may have been mended."""


@dataclass(slots=True)
class BadSources:
    """One file a digest in *folder*, safe for threads. What cannot be read or written is no lie: it costs a download."""

    folder: Path
    clock: Callable[[], float] = time.time
    _known: frozenset[str] | None = None  # the files that there are, looked at once
    _mutex: Lock = field(default_factory=Lock)

    def of(self, digest: Digest) -> frozenset[str]:
        """The redacted locators that sent wrong bytes for this digest lately."""
        with self._mutex:
            known, now = self._read(digest), self.clock()
        return frozenset(locator for locator, at in known.items() if abs(now - at) < KEPT_S)

    def note(self, digest: Digest, locator: str) -> None:
        """A source was proven to have sent wrong bytes."""
        with self._mutex:
            self._write(digest, {**self._read(digest), redact(locator): self.clock()})

    def clear(self, digest: Digest, locators: frozenset[str]) -> None:
        """Sources sent the right bytes."""
        with self._mutex:
            known = self._read(digest)
            if honest := {redact(locator) for locator in locators} & known.keys():
                self._write(digest, {locator: at for locator, at in known.items() if locator not in honest})

    def _read(self, digest: Digest) -> dict[str, float]:
        if self._known is None:
            try:
                self._known = frozenset(os.listdir(self.folder))
            except OSError:
                self._known = frozenset()
        if digest.hex not in self._known:
            return {}
        try:
            rows = decode((self.folder / digest.hex).read_bytes(), _KIND, version=1)["sources"]
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
    """``note``, ``clear`` and ``right`` are called under the download's lock, ``tell`` outside of it."""

    def __init__(
        self,
        wanted: BlobRequest,
        locators: Mapping[str, str],
        pairs: CompressedForms,
        *,
        registry: Registry,
        failures: FailureTable,
        bad_sources: BadSources,
        emit: Sink,
    ) -> None:
        self._wanted, self._locators, self._pairs = wanted, locators, pairs
        self._registry, self._failures, self._bad_sources, self._emit = registry, failures, bad_sources, emit
        self._lied: dict[str, set[int]] = {}  # who sent wrong bytes, and the pieces that it has not sent right since
        self._untold = deque[tuple[str, Failure]]()

    def late(self) -> frozenset[str]:
        """Who failed lately, or lied about this blob: asked last."""
        failures, lies = self._failures, self._bad_sources.of(self._wanted.digest)
        failed = self._locators if failures.any else ()  # mostly nothing is on record: then nobody looks up keys
        late = {locator for locator in failed if any(key in failures for key in self._keys(locator))}
        return frozenset(late | {locator for locator in self._locators if redact(locator) in lies})

    def spent(self, late: Iterable[str]) -> frozenset[str]:
        """Of those, who had no attempt left."""
        return frozenset(locator for locator in late if self._failures.given_up(self._keys(locator)))

    def note(
        self, locator: str, failure: Failure, *, exactly: bool = False, given_up: bool = False, wrong: Iterable[int] = ()
    ) -> None:
        """A source failed: *exactly* at this locator, else what fails together with it; *wrong* pieces were lies."""
        if locator not in self._locators:
            return
        if self._pairs.shows_absence(locator, failure):
            plain = self._pairs.note_absent(locator)
            if plain is None:
                return
            locator, exactly = plain, True
        corrupt = failure.reason is Reason.CORRUPT_DATA
        if corrupt:
            self._lied.setdefault(locator, set()).update(wrong)
        key = self._keys(locator)[0 if exactly or corrupt else 1]
        self._failures.note(key, failure.code, failure.what, given_up=given_up)
        self._untold.append((locator, failure))

    def right(self, locator: str, piece: int) -> None:
        """A source sent a piece that may be right now."""
        if lies := self._lied.get(locator):
            lies.discard(piece)

    def clear(self, senders: Iterable[str]) -> None:
        """The blob is proven: whoever sent something of it, and nothing wrong, serves well."""
        lied = {locator for locator, pieces in self._lied.items() if pieces}
        honest = (frozenset(senders) & self._locators.keys()) - lied
        if self._failures.any:
            self._failures.clear(key for locator in honest for key in self._keys(locator))
        self._bad_sources.clear(self._wanted.digest, honest)

    def tell(self) -> None:
        """Write down and show what was noted: a disk and a terminal take their time."""
        with suppress(IndexError):  # told by now, by whoever was first
            while True:
                locator, failure = self._untold.popleft()
                corrupt = failure.reason is Reason.CORRUPT_DATA
                if corrupt:
                    self._bad_sources.note(self._wanted.digest, locator)
                self._emit(SourceFailed(locator=redact(locator), what=failure.what, corrupt=corrupt))

    def _keys(self, locator: str) -> tuple[str, str]:
        """Under what a failure of this locator may be on record: itself, and what fails together with it."""
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


def all_sources_failed(wanted: BlobRequest, failures: Mapping[str, Failure]) -> ModelstowError | ChecksumError:
    """The error for *failures* by locator: of several reasons the first in the order of ``BLOB_CODES`` is reported."""
    rows = [{"source": redact(locator), "code": f.code, "reason": f.what} for locator, f in failures.items()]
    names = ", ".join(wanted.paths[:3]) or wanted.digest.short
    reasons = "".join(f"\n  from {row['source']}: {row['reason']}" for row in rows) or "\n  no source is named"
    fields: dict[str, Any] = {"file_path": next(iter(wanted.paths), ""), "digest": wanted.digest, "sources": rows}
    unavailable = f"{names}: no source could give {wanted.digest.short}… ({wanted.size:,} bytes){reasons}"
    if not failures:
        hint = "give the model `sources` in models.toml, and run `modelstow lock`"
        return SourceUnavailableError(unavailable, hint=hint, missing_files=list(wanted.paths), **fields)
    ranked = sorted(failures.values(), key=lambda failure: BLOB_CODES.index(_ERRORS[failure.reason].code))
    first, error = ranked[0], _ERRORS[ranked[0].reason]
    if issubclass(error, SizeMismatchError):
        what = f"{names}: the lockfile says {wanted.size:,} bytes{reasons}"
        return SizeMismatchError(what, hint=_OTHER_BYTES, expected=wanted.size, actual=first.actual, **fields)
    if issubclass(error, ChecksumError):
        what = f"{names}: no source gave the bytes of {wanted.digest.short}… ({wanted.size:,} bytes){reasons}"
        return ChecksumError(what, hint=_OTHER_BYTES, expected=str(wanted.digest), actual=first.actual, **fields)
    own_hints = (f.hint for f in ranked if _ERRORS[f.reason] is error and f.hint)
    hint = next(own_hints, _HINTS.get(first.reason, _RETRY))
    return error(unavailable, hint=hint, missing_files=list(wanted.paths), **fields)
