"""The transfer context: what all downloads of one run share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from modelstow.backends import Registry
from modelstow.cas import CancellationToken

from ..events.events import Sink
from .concurrency import Connections
from .retry import RetryPolicy
from .source_health import BadSources, FailureTable

STOPPED = "stopped; what was fetched is kept and the next run continues there"


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferContext:
    """The sources, records, limits and clock of one run. Cancelling *token* ends its downloads. Safe for threads."""

    registry: Registry
    base: Path  # the folder of relative locators
    failures: FailureTable
    bad_sources: BadSources
    emit: Sink
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    connections: Connections = field(default_factory=lambda: Connections(1))
    limit_rate: float | None = None  # bytes a second of all sources together; None for no limit
    token: CancellationToken = field(default_factory=CancellationToken)
    clock: Callable[[], float] = time.monotonic
