"""What a transfer may want next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .retry import Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request to *locator* for bytes ``[start, stop)``; *claim* is the right to write the missing pieces in it.

    *start* is inside a piece where the same source has begun it before.
    """

    claim: int
    locator: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Nobody may be asked for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Idle:
    """There is nothing to ask for beside what is on its way."""


@dataclass(frozen=True, slots=True)
class Verify:
    """Every piece is held and nothing is on its way: look at the digest of the whole."""


@dataclass(frozen=True, slots=True)
class Fail:
    """No source is left; ``failures`` has the reason of each."""

    failures: Mapping[str, Failure]


Step = Request | Backoff | Idle | Verify | Fail
