"""Reading a compressed mirror as if it held the plain blob: ranges of pieces in, plain bytes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

from backends import Body, EndedEarly, Misbehaved, Source
from cas import Digest
from cas.codec import PackIndex, index_bytes, unpack
from cas.pieces import PIECE, piece_count

_STEP = 1 << 16  # so small that a read returns with what has come


@dataclass(slots=True)
class Packed:
    """One blob's ``.pzst`` at *locator*. Safe for threads."""

    locator: str
    digest: Digest
    size: int
    _index: PackIndex | None = None
    _mutex: Lock = field(default_factory=Lock)

    def open(self, source: Source, start: int, stop: int, heard: Callable[[], object]) -> Body:
        """Plain bytes ``[start, stop)``, whole pieces. *heard* is told that something came, since a frame takes time.

        Raises SourceError; frames that make no sense are Misbehaved.
        """
        index = self._read_index(source)
        first, last = start // PIECE, piece_count(stop) - 1
        begin, end = index.frame(first)[0], index.frame(last)[1]
        inner = source.open(self.locator, start=begin, stop=end)
        if inner.start != begin or inner.total not in (None, index.total):
            inner.close()
            raise Misbehaved("it sends another range, or is of another length, than its index says", locator=self.locator)
        piece, plain = first, memoryview(b"")

        def read_into(view: memoryview) -> int:
            nonlocal piece, plain
            if not plain and piece <= last:
                frame_start, frame_stop = index.frame(piece)
                frame = memoryview(bytearray(frame_stop - frame_start))
                _fill(inner, frame, self.locator, heard)
                try:
                    plain = memoryview(unpack(frame, piece, self.size))
                except ValueError as error:
                    raise Misbehaved(str(error), locator=self.locator) from error
                piece += 1
            count = min(len(view), len(plain))
            view[:count], plain = plain[:count], plain[count:]
            return count

        return Body(start=start, total=self.size, read_into=read_into, close=inner.close)

    def _read_index(self, source: Source) -> PackIndex:
        with self._mutex:
            if self._index is None:
                raw = memoryview(bytearray(index_bytes(self.size)))
                body = source.open(self.locator, start=0, stop=len(raw))
                try:
                    _fill(body, raw, self.locator)
                    self._index = PackIndex.decode(bytes(raw), self.digest, self.size)
                except ValueError as error:
                    raise Misbehaved(str(error), locator=self.locator) from error
                finally:
                    body.close()
            return self._index


def _fill(body: Body, view: memoryview, locator: str, heard: Callable[[], object] = lambda: None) -> None:
    done = 0
    while done < len(view):
        count = body.read_into(view[done : done + _STEP])
        if count == 0:
            raise EndedEarly("the body ended early", locator=locator)
        done += count
        heard()
