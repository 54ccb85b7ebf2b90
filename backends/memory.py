"""In-memory objects under ``mem://host/path``: for tests, and the smallest example of a source."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import NotFound
from .source import Body, Listed, Listing


class MemorySource:
    """Bytes by locator. ``ranges`` records locator, start and stop of each ``open``."""

    network = True  # so that offline mode can be tested with it

    def __init__(self, objects: Mapping[str, bytes]) -> None:
        self.objects = dict(objects)
        self.ranges: list[tuple[str, int, int | None]] = []

    @property
    def opened(self) -> int:
        return len(self.ranges)

    def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body:
        self.ranges.append((locator, start, stop))
        data = memoryview(self._get(locator))
        at = start
        end = len(data) if stop is None else min(stop, len(data))

        def read_into(view: memoryview) -> int:
            nonlocal at
            count = max(0, min(len(view), end - at))
            view[:count] = data[at : at + count]
            at += count
            return count

        return Body(start=start, total=len(data), read_into=read_into)

    def size(self, locator: str) -> int | None:
        return len(self._get(locator))

    def listing(self, locator: str) -> Listing:
        prefix = locator.rstrip("/") + "/"
        names = sorted(name for name in self.objects if name.startswith(prefix))
        if not names:
            raise NotFound("nothing is listed", locator=locator)
        files = tuple(Listed(path=name[len(prefix) :], size=len(self.objects[name])) for name in names)
        return Listing(locator=locator, files=files)

    def origin(self, locator: str) -> str:
        return "/".join(locator.split("/")[:3])

    def _get(self, locator: str) -> bytes:
        if locator not in self.objects:
            raise NotFound("no such object", locator=locator)
        return self.objects[locator]
