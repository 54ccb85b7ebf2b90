"""Sources as the settings want them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Event

from modelstow.backends import Registry, Source
from modelstow.backends.registry import FACTORIES

from .settings import Settings


def registry_of(settings: Settings, factories: Mapping[str, Callable[[], Source]] = FACTORIES) -> Registry:
    """The sources as the settings want them: without networks, or no faster than so."""
    if settings.limit_rate is None:
        return Registry(factories, offline=settings.offline)
    from modelstow.backends.throttle import RateBudget, ThrottledSource

    budget = RateBudget(settings.limit_rate)
    return Registry(factories, offline=settings.offline, wrap=lambda source: ThrottledSource(source, budget))


def targets_of(settings: Settings, factories: Mapping[str, Callable[[], Source]] = FACTORIES) -> Registry:
    """The same to write to, at any speed: who writes pays the toll by itself."""
    return Registry(factories, offline=settings.offline)


def toll(settings: Settings, stop: Event) -> Callable[[int], None]:
    """Holds back whoever tells it the bytes that it sends, to the rate of the settings; not beyond *stop*."""
    if settings.limit_rate is None:
        return lambda count: None
    from modelstow.backends.throttle import RateBudget

    return RateBudget(settings.limit_rate, sleep=stop.wait).spend
