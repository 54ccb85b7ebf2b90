"""Compressed mirrors: sources of plain bytes over blobs stored as compressed pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock

from modelstow.backends import Body, EndedEarly, ProtocolError, Source
from modelstow.cas import Digest
from modelstow.cas.buffers import aligned_buffer
from modelstow.cas.chunking import DEFAULT
from modelstow.cas.compressed import HEAD_BYTES, CompressedIndex, chunking_of, decompress, index_bytes

from .retry import CorruptResponse, Failure, Reason, RetryPolicy
from .worker import BodyReader


@dataclass(slots=True)
class CompressedBlob:
    """One blob's ``.pzst`` file at *locator*, read as the plain blob. *size*: plain bytes. Safe for threads."""

    locator: str
    digest: Digest
    size: int
    policy: RetryPolicy
    clock: Callable[[], float]
    _index: CompressedIndex | None = None
    _mutex: Lock = field(default_factory=Lock)

    def open(self, source: Source, start: int, stop: int, on_received: Callable[[int], object]) -> Body:
        """The plain bytes from *start* to *stop* or the end of its frame; the whole blob where the source ignores ranges.

        A frame is decompressed when all of it is there, which takes time: as it arrives, *on_received* is called with the
        plain bytes that it stands for. The caller closes the body. Raises SourceError, also while reading.
        """
        index = self._read_index(source)
        piece, last = index.chunking.index_at(start), index.chunking.index_at(stop - 1)
        skip = start - index.chunking.range(piece, self.size)[0]  # frames may be of other pieces than the partial
        begin, end = index.frame(piece)[0], index.frame(last)[1]
        inner = source.open(self.locator, start=begin, stop=end)
        reader = self._reader(inner)
        try:
            if inner.total not in (None, index.total) or inner.start != (begin if inner.ranged else 0):
                raise ProtocolError("its length or range does not match its index", locator=self.locator)
            if not inner.ranged:
                piece, last, skip = 0, len(index.ends) - 1, 0
                _fill(reader, aligned_buffer(index.frame(0)[0]), self.locator)
        except BaseException:
            inner.close()
            raise
        plain = memoryview(b"")

        def read_into(view: memoryview) -> int:
            nonlocal piece, plain, skip
            if not plain and piece <= last:
                frame_start, frame_stop = index.frame(piece)
                frame = aligned_buffer(frame_stop - frame_start)
                start, stop = index.chunking.range(piece, self.size)
                _fill(reader, frame, self.locator, on_received, stop - start)
                try:
                    plain = memoryview(decompress(frame, piece, self.size, index.chunking))[skip:]
                except ValueError as error:
                    raise CorruptResponse(f"sent corrupt data ({error})", locator=self.locator) from error
                piece, skip = piece + 1, 0
            count = min(len(view), len(plain))
            view[:count], plain = plain[:count], plain[count:]
            return count

        at = 0 if not inner.ranged else start
        return Body(start=at, total=self.size, read_into=read_into, close=inner.close, ranged=inner.ranged)

    def _reader(self, body: Body) -> BodyReader:
        return BodyReader(body, self.locator, self.policy, self.clock)

    def _read_index(self, source: Source) -> CompressedIndex:
        """The index, by one request for as much as the default chunking needs, and another where it is longer."""
        with self._mutex:
            if self._index is None:
                try:
                    raw, length = self._read_start(source, index_bytes(self.size))
                    if length > len(raw):
                        raw, length = self._read_start(source, length)
                    self._index = CompressedIndex.decode(bytes(raw[:length]), self.digest, self.size)
                except ValueError as error:
                    raise CorruptResponse(f"sent corrupt data ({error})", locator=self.locator) from error
            return self._index

    def _read_start(self, source: Source, stop: int) -> tuple[memoryview, int]:
        """The file up to *stop* or the end of the index, whichever comes first, and the length of the index."""
        raw = aligned_buffer(stop)
        body = source.open(self.locator, start=0, stop=stop)
        try:
            reader = self._reader(body)
            _fill(reader, raw[:HEAD_BYTES], self.locator)
            chunking = chunking_of(bytes(raw[:HEAD_BYTES]))
            if chunking.piece_bytes > DEFAULT.piece_bytes:  # each connection takes the memory of a piece
                raise ValueError(f"its pieces have {chunking.piece_bytes:,} bytes")
            length = index_bytes(self.size, chunking)
            _fill(reader, raw[HEAD_BYTES : min(stop, length)], self.locator)
        finally:
            body.close()
        return raw, length


class CompressedForms:
    """The plain and the compressed locator of one blob at each mirror, and which of them are absent."""

    def __init__(self, compressed: Mapping[str, str], reader: Callable[[str], CompressedBlob]) -> None:
        """*compressed*: by plain locator; *reader* makes what reads one."""
        self._compressed = {locator: reader(locator) for locator in compressed.values()}
        self._other_form = {**compressed, **{locator: plain for plain, locator in compressed.items()}}
        self._absent: set[str] = set()

    def compressed(self, locator: str) -> CompressedBlob | None:
        """What reads this locator, if it is of a compressed form."""
        return self._compressed.get(locator)

    def shows_absence(self, locator: str, failure: Failure) -> bool:
        """Whether a mirror lacks this form. Some buckets deny access to what does not exist: the plain form decides."""
        absent = failure.reason is Reason.NOT_FOUND
        denied = failure.reason is Reason.AUTHENTICATION and locator in self._compressed
        return locator in self._other_form and (absent or denied)

    def note_absent(self, locator: str) -> str | None:
        """The plain locator if the mirror holds neither form; None as long as it may hold the other."""
        self._absent.add(locator)
        other = self._other_form[locator]
        if other not in self._absent:
            return None
        return other if locator in self._compressed else locator

    def without_absent(self, failures: Mapping[str, Failure]) -> dict[str, Failure]:
        """The failures without those of compressed forms that a mirror does not hold."""
        return {
            locator: failure
            for locator, failure in failures.items()
            if not (locator in self._compressed and self.shows_absence(locator, failure))
        }


def _fill(
    reader: BodyReader,
    view: memoryview,
    locator: str,
    on_received: Callable[[int], object] = lambda count: None,
    plain: int = 0,
) -> None:
    """Read all of *view*, which stands for *plain* bytes."""
    done = reported = 0
    while done < len(view):
        count = reader.read(view[done:])
        if count == 0:
            raise EndedEarly("the body ended early", locator=locator)
        done += count
        stands_for = plain * done // len(view)
        on_received(stands_for - reported)
        reported = stands_for
