"""Reading a compressed mirror as if it held the plain blob: ranges of pieces in, plain bytes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock

from modelstow.backends import Body, EndedEarly, ProtocolError, Source
from modelstow.cas import Digest
from modelstow.cas.buffers import aligned_buffer
from modelstow.cas.compressed import CompressedIndex, decompress, index_bytes
from modelstow.cas.pieces import PIECE, piece_count, piece_range

from .retry import CorruptResponse, Failure, Reason, RetryPolicy
from .worker import BodyReader


@dataclass(slots=True)
class CompressedBlob:
    """One blob's ``.pzst`` at *locator*. Safe for threads."""

    locator: str
    digest: Digest
    size: int
    policy: RetryPolicy
    clock: Callable[[], float]
    _index: CompressedIndex | None = None
    _mutex: Lock = field(default_factory=Lock)

    def open(self, source: Source, start: int, stop: int, heard: Callable[[int], object]) -> Body:
        """Plain bytes ``[start, stop)``, whole pieces; all of them where the source ignores ranges.

        A frame is unpacked when it is whole, which takes time: as it arrives *heard* is told of the plain bytes that it
        stands for. Raises SourceError.
        """
        index = self._read_index(source)
        piece, last = start // PIECE, piece_count(stop) - 1
        begin, end = index.frame(piece)[0], index.frame(last)[1]
        inner = source.open(self.locator, start=begin, stop=end)
        intake = self._intake(inner)
        try:
            if inner.total not in (None, index.total) or inner.start != (begin if inner.ranged else 0):
                raise ProtocolError(
                    "it has another length than its index says, or sends another range", locator=self.locator
                )
            if not inner.ranged:
                piece, last = 0, piece_count(self.size) - 1
                _fill(intake, aligned_buffer(index.frame(0)[0]), self.locator)
        except BaseException:
            inner.close()
            raise
        plain = memoryview(b"")

        def read_into(view: memoryview) -> int:
            nonlocal piece, plain
            if not plain and piece <= last:
                frame_start, frame_stop = index.frame(piece)
                frame = aligned_buffer(frame_stop - frame_start)
                start, stop = piece_range(piece, self.size)
                _fill(intake, frame, self.locator, heard, stop - start)
                try:
                    plain = memoryview(decompress(frame, piece, self.size))
                except ValueError as error:
                    raise CorruptResponse(f"sent wrong bytes ({error})", locator=self.locator) from error
                piece += 1
            count = min(len(view), len(plain))
            view[:count], plain = plain[:count], plain[count:]
            return count

        at = 0 if not inner.ranged else start
        return Body(start=at, total=self.size, read_into=read_into, close=inner.close, ranged=inner.ranged)

    def _intake(self, body: Body) -> BodyReader:
        return BodyReader(body, self.locator, self.policy, self.clock)

    def _read_index(self, source: Source) -> CompressedIndex:
        with self._mutex:
            if self._index is None:
                raw = aligned_buffer(index_bytes(self.size))
                body = source.open(self.locator, start=0, stop=len(raw))
                try:
                    _fill(self._intake(body), raw, self.locator)
                    self._index = CompressedIndex.decode(bytes(raw), self.digest, self.size)
                except ValueError as error:
                    raise CorruptResponse(f"sent wrong bytes ({error})", locator=self.locator) from error
                finally:
                    body.close()
            return self._index


class CompressedForms:
    """What mirrors may hold of one blob in two forms: which addresses belong together, and which hold nothing."""

    def __init__(self, packs: Mapping[str, str], packed: Callable[[str], CompressedBlob]) -> None:
        """*packs*: the compressed one of each plain address; *packed* opens one."""
        self._packs = {pack: packed(pack) for pack in packs.values()}
        self._twins = {**packs, **{pack: plain for plain, pack in packs.items()}}
        self._absent: set[str] = set()

    def pack(self, locator: str) -> CompressedBlob | None:
        """What reads it, if it is a compressed one."""
        return self._packs.get(locator)

    def shows_absence(self, locator: str, failure: Failure) -> bool:
        """A mirror does not hold the blob in this form. Some buckets refuse what is not there; the plain form tells."""
        absent = failure.reason is Reason.NOT_FOUND
        refused = failure.reason is Reason.AUTHENTICATION and locator in self._packs
        return locator in self._twins and (absent or refused)

    def note_absent(self, locator: str) -> str | None:
        """The plain address if the mirror holds neither form; None as long as it may hold the other."""
        self._absent.add(locator)
        twin = self._twins[locator]
        if twin not in self._absent:
            return None
        return twin if locator in self._packs else locator


def _fill(
    intake: BodyReader, view: memoryview, locator: str, heard: Callable[[int], object] = lambda count: None, plain: int = 0
) -> None:
    """Read all of *view*, which stands for so many *plain* bytes."""
    done = told = 0
    while done < len(view):
        count = intake.read(view[done:])
        if count == 0:
            raise EndedEarly("the body ended early", locator=locator)
        done += count
        stands_for = plain * done // len(view)
        heard(stands_for - told)
        told = stands_for
