"""Conformance suite of ``Source``: a test subclasses it and defines how its source is made."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Event, Thread

from .errors import NotFound, SourceError
from .source import Body, Source, join_locator

TEN = b"0123456789"
BIG = bytes(range(251)) * 8_000  # 2 MB; its prime period exposes misplaced reads


class SourceContract:
    """The contract of ``Source`` as tests: ``make`` serves ``OBJECTS`` below ``folder``."""

    OBJECTS = {"ten": TEN, "empty": b"", "deep/er/big.bin": BIG, "with space +%.txt": b"quoted"}  # noqa: RUF012

    def make(self) -> Source:
        """A source that serves OBJECTS."""
        raise NotImplementedError

    def folder(self) -> str:
        """The locator of the folder that contains OBJECTS."""
        raise NotImplementedError

    def read(self, source: Source, path: str, start: int = 0, stop: int | None = None, step: int = 1 << 16) -> bytes:
        """Bytes ``[start, stop)``, after checking the body against its own attributes."""
        body = source.open(join_locator(self.folder(), path), start=start, stop=stop)
        try:
            data, view = bytearray(), memoryview(bytearray(step))
            while count := body.read_into(view):
                data += view[:count]
        finally:
            body.close()
            body.close()
        whole = self.OBJECTS[path]
        assert body.start == (start if body.ranged else 0)
        # It may extend past stop: the reader stops by itself.
        assert whole[body.start :].startswith(data)
        assert body.ranged or data == whole
        tail = bytes(data[start - body.start :])
        return tail if stop is None else tail[: stop - start]

    def test_reading_from_every_offset_gives_the_tail(self) -> None:
        """A body starts at the requested offset, or at 0 and says so."""
        source = self.make()
        for start in range(10):
            assert self.read(source, "ten", start) == TEN[start:]

    def test_a_range_gives_exactly_its_bytes(self) -> None:
        """The first byte is included, the last excluded."""
        source = self.make()
        for start, stop in ((0, 1), (3, 7), (9, 10), (0, 10)):
            assert self.read(source, "ten", start, stop) == TEN[start:stop]

    def test_a_body_says_whether_it_kept_to_the_range(self) -> None:
        """If the range was ignored, the body starts at 0 and extends to the end of the object."""
        source = self.make()
        for start, stop in ((0, 1000), (1000, 2000), (len(BIG) - 1000, len(BIG))):
            assert self.read(source, "deep/er/big.bin", start, stop) == BIG[start:stop]

    def test_a_large_object_arrives_whole_by_small_steps(self) -> None:
        """The bytes do not depend on the size of the reads."""
        source = self.make()
        assert self.read(source, "deep/er/big.bin", step=1000) == BIG
        assert self.read(source, "deep/er/big.bin", 1_000_001, step=1 << 20) == BIG[1_000_001:]

    def test_an_empty_object_has_no_bytes(self) -> None:
        """Its body ends at once, and its size is 0."""
        source = self.make()
        assert self.read(source, "empty") == b""
        assert source.size(join_locator(self.folder(), "empty")) == 0

    def test_names_are_quoted_where_the_locator_needs_it(self) -> None:
        """Spaces, plus and percent signs in a name are preserved."""
        source = self.make()
        assert self.read(source, "with space +%.txt") == b"quoted"

    def test_the_size_and_the_total_agree_with_the_object(self) -> None:
        """Metadata matches the content."""
        source = self.make()
        locator = join_locator(self.folder(), "deep/er/big.bin")
        body = source.open(locator, start=5)
        body.close()
        assert source.size(locator) == len(BIG)
        assert body.total in (None, len(BIG))

    def test_the_listing_names_every_object(self) -> None:
        """Paths are relative to the folder, whatever its trailing slash; known sizes are right."""
        source = self.make()
        for folder in (self.folder(), self.folder().rstrip("/") + "/"):
            files = {listed.path: listed.size for listed in source.listing(folder).files}
            assert set(files) == set(self.OBJECTS)
            assert all(size in (None, len(self.OBJECTS[path])) for path, size in files.items())

    def test_a_missing_object_is_a_permanent_error_that_names_it(self) -> None:
        """A retry cannot help, and the message contains the locator."""
        source = self.make()
        locator = join_locator(self.folder(), "nowhere")
        for request in (lambda: source.open(locator), lambda: source.size(locator)):
            try:
                request()
            except NotFound as error:
                assert not error.transient
                assert "nowhere" in str(error)
            else:
                raise AssertionError("a missing object was found")

    def test_threads_may_share_a_source(self) -> None:
        """Each of sixteen concurrent readers gets its own bytes."""
        source = self.make()
        with ThreadPoolExecutor(16) as pool:
            parts = list(pool.map(lambda n: self.read(source, "deep/er/big.bin", n * 1000, n * 1000 + 5000), range(64)))
        assert parts == [BIG[n * 1000 : n * 1000 + 5000] for n in range(64)]

    def test_closing_early_leaves_the_source_usable(self) -> None:
        """An abandoned body leaks no connection."""
        source = self.make()
        for _ in range(20):
            body = source.open(join_locator(self.folder(), "deep/er/big.bin"))
            body.read_into(memoryview(bytearray(10)))
            body.close()
        assert self.read(source, "ten") == TEN

    def test_closing_from_another_thread_ends_the_reading(self) -> None:
        """The reader gets an error or an end, soon, and never bytes of another object."""
        source = self.make()
        for _ in range(5):
            body = source.open(join_locator(self.folder(), "deep/er/big.bin"))
            data, started = bytearray(), Event()

            def read(body: Body = body, data: bytearray = data, started: Event = started) -> None:
                view = memoryview(bytearray(1000))
                with suppress(SourceError):
                    while count := body.read_into(view):
                        data += view[:count]
                        started.set()

            reader = Thread(target=read, daemon=True)
            reader.start()
            assert started.wait(10)
            body.close()
            reader.join(10)
            assert not reader.is_alive()
            assert data == BIG[: len(data)]
