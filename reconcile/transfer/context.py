"""The transfer context: what all downloads of one run share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from modelstow.backends import Registry
from modelstow.cas import CancellationToken

from ..desired.mirrors import COMPRESSED_SUFFIX, MirrorProvider
from ..events.events import Sink, Warning
from .concurrency import Connections
from .retry import RetryPolicy
from .source_health import BadSources, FailureTable
from .state import BlobRequest

STOPPED = "stopped; what was fetched is kept and the next run continues there"


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferContext:
    """The sources, records, limits and clock of one run. Cancelling *token* ends its downloads. Safe for threads."""

    registry: Registry
    base: Path  # the folder of relative locators
    failures: FailureTable
    bad_sources: BadSources
    emit: Sink
    mirrors: Sequence[MirrorProvider] = ()  # best first
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    connections: Connections = field(default_factory=lambda: Connections(1))
    limit_rate: float | None = None  # bytes a second of all sources together; None for no limit
    token: CancellationToken = field(default_factory=CancellationToken)
    clock: Callable[[], float] = time.monotonic
    _warned: set[str] = field(default_factory=set)

    def with_mirrors(self, request: BlobRequest) -> BlobRequest:
        """The request with what the mirrors answer for its blob before its own locators."""
        found: list[str] = []
        for mirrors in self.mirrors:
            try:
                found += mirrors.locators(request.digest, request.size)
            except Exception as error:
                # Only the kind: the text of a library's error may contain a signed URL.
                text = f"mirrors could not be asked and are not used ({type(error).__name__})"
                if text not in self._warned:  # once, and not for each of ten thousand blobs
                    self._warned.add(text)
                    self.emit(Warning(text=text))
        if not found:
            return request
        compressed = {url.removesuffix(COMPRESSED_SUFFIX): url for url in found if url.endswith(COMPRESSED_SUFFIX)}
        return replace(request, urls=tuple(dict.fromkeys((*found, *request.urls))), compressed=compressed)
