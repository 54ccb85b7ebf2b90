"""What a transfer may want next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .retry import Fact


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Ask *locator* for bytes ``[start, stop)``, which end pieces that are missing; *claim* is the right to write these.

    *start* is inside a piece where the same source has begun it before.
    """

    claim: int
    locator: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Nobody may be asked for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Idle:
    """There is nothing to ask for beside what is on its way."""


@dataclass(frozen=True, slots=True)
class Prove:
    """Every piece is held and nothing is on its way: look at the digest of the whole."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """No source is left; ``failures`` has the reason of each."""

    failures: Mapping[str, Fact]


Step = Ask | Wait | Idle | Prove | GiveUp
