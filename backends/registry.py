"""The source registry: one factory per URL scheme, called on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Lock

from .errors import Offline, SourceError
from .source import Source


def _file() -> Source:
    from .file import FileSource

    return FileSource()


def _http() -> Source:
    from .http.client import HttpSource  # imports requests, 70 ms: only for a transfer

    return HttpSource()


def _hub() -> Source:
    from .hf.hub import HubSource

    return HubSource()


def _s3() -> Source:
    from .s3.client import S3Source

    return S3Source()


FACTORIES: Mapping[str, Callable[[], Source]] = {
    "": _file,
    "file": _file,
    "http": _http,
    "https": _http,
    "hf": _hub,
    "s3": _s3,
}


def scheme_of(locator: str) -> str:
    """The URL scheme of a locator, in lower case; empty for a path."""
    scheme, separator, _ = locator.partition("://")
    return scheme.lower() if separator else ""


class Registry:
    """Lookup of sources by locator. Thread-safe; each factory is called once."""

    def __init__(
        self,
        factories: Mapping[str, Callable[[], Source]] = FACTORIES,
        *,
        offline: bool = False,
        wrap: Callable[[Source], Source] = lambda source: source,
    ) -> None:
        """*wrap* wraps every source (throttle, counter); *offline* refuses network sources."""
        self._factories, self._offline, self._wrap = dict(factories), offline, wrap
        self._made: dict[Callable[[], Source], Source] = {}
        self._mutex = Lock()

    def find(self, locator: str) -> Source:
        """The source for *locator*. Raises SourceError for an unknown scheme, Offline."""
        scheme = scheme_of(locator)
        factory = self._factories.get(scheme)
        if factory is None:
            known = ", ".join(sorted(f"{name}://" for name in self._factories if name))
            hint = f"use a path, or one of these schemes: {known}"
            raise SourceError(f"{scheme}:// is not supported", locator=locator, hint=hint)
        with self._mutex:
            source = self._made.get(factory)
            if source is None:
                source = self._made[factory] = self._wrap(factory())
        if self._offline and source.network:
            raise Offline("network access is disabled", locator=locator, reason="NetworkDisabled")
        return source


def open_source(locator: str) -> Source:
    """A source for *locator*, configured by the environment. Raises SourceError."""
    return Registry().find(locator)
