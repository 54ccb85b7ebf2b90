"""Sources as the settings want them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from backends import Registry, Source
from backends.registry import FACTORIES

from .config import Settings


def registry_of(settings: Settings, factories: Mapping[str, Callable[[], Source]] = FACTORIES) -> Registry:
    """The sources as the settings want them: without networks, or no faster than so."""
    if settings.limit_rate is None:
        return Registry(factories, offline=settings.offline)
    from backends.throttle import RateBudget, ThrottledSource

    budget = RateBudget(settings.limit_rate)
    return Registry(factories, offline=settings.offline, wrap=lambda source: ThrottledSource(source, budget))
