"""Bad sources are remembered on disk: who sent wrong bytes for which digest, for a week."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modelstow.cas import Digest
from modelstow.cas.records import encode
from modelstow.reconcile.transfer.source_health import BadSources

ONE, TWO = Digest.of(b"one"), Digest.of(b"two")
WEEK_S = 7 * 86_400.0
HERE, THERE = "https://here.example/x", "https://there.example/x"


class Clock:
    """Seconds, as the test sets them."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run(tmp_path: Path, clock: Clock) -> Callable[[], BadSources]:
    """Makes what each run has of its own, over one folder."""
    return lambda: BadSources(tmp_path, clock)


def test_a_noted_bad_source_is_found_by_the_next_run(run: Callable[[], BadSources]):
    """And by the one that noted it."""
    first = run()
    assert first.of(ONE) == set()

    first.note(ONE, HERE)

    assert first.of(ONE) == {HERE} == run().of(ONE)


def test_records_are_kept_by_source_and_digest(run: Callable[[], BadSources]):
    """A source that sent corrupt data for one blob may be right about another, and other sources about the first."""
    records = run()
    records.note(ONE, HERE)
    records.note(ONE, THERE)
    records.note(TWO, THERE)

    assert run().of(ONE) == {HERE, THERE}
    assert run().of(TWO) == {THERE}
    assert run().of(Digest.of(b"three")) == set()


def test_no_secret_of_a_locator_is_written(run: Callable[[], BadSources], tmp_path: Path):
    """What is noted, found and cleared is the redacted one."""
    signed = "https://me:canary@here.example/x?signature=canary"
    records = run()

    records.note(ONE, signed)

    assert run().of(ONE) == {HERE}
    assert b"canary" not in (tmp_path / ONE.hex).read_bytes()
    records.clear(ONE, frozenset({signed}))
    assert run().of(ONE) == set()


def test_a_source_that_sent_the_right_bytes_is_cleared(run: Callable[[], BadSources], tmp_path: Path):
    """The others stay; with the last one the file is removed."""
    run().note(ONE, HERE)
    run().note(ONE, THERE)
    run().note(TWO, HERE)

    run().clear(ONE, frozenset({HERE, "https://never.example/noted"}))
    assert run().of(ONE) == {THERE}
    run().clear(ONE, frozenset({THERE}))

    assert run().of(ONE) == set()
    assert [path.name for path in tmp_path.iterdir()] == [TWO.hex]


def test_clearing_what_was_never_noted_writes_nothing(run: Callable[[], BadSources], tmp_path: Path):
    """Nearly every fetch ends so: it costs no write."""
    run().note(ONE, HERE)
    before = (tmp_path / ONE.hex).stat()

    run().clear(ONE, frozenset({THERE}))
    run().clear(TWO, frozenset({HERE}))

    assert (tmp_path / ONE.hex).stat() == before
    assert [path.name for path in tmp_path.iterdir()] == [ONE.hex]


@pytest.mark.parametrize("passed", [WEEK_S, -WEEK_S], ids=["a week later", "a clock that was ahead"])
def test_a_record_counts_for_a_week(run: Callable[[], BadSources], clock: Clock, passed: float):
    """The source may have been repaired since. A clock that was set back must not exclude it for years."""
    run().note(ONE, HERE)

    clock.now += 0.999 * passed
    assert run().of(ONE) == {HERE}
    clock.now += 0.001 * passed
    assert run().of(ONE) == set()


def test_a_repeated_record_counts_from_the_last_time(run: Callable[[], BadSources], clock: Clock):
    """Others of the same digest keep their own time."""
    run().note(ONE, HERE)
    run().note(ONE, THERE)
    clock.now += 0.6 * WEEK_S
    run().note(ONE, HERE)
    clock.now += 0.6 * WEEK_S

    assert run().of(ONE) == {HERE}


def record(sources: object) -> bytes:
    return encode("bad-sources", 1, {"sources": sources})


GOOD = record({HERE: Clock.now})


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        GOOD[:-5],
        GOOD.replace(b"here", b"nope"),
        b"\xff\xfe\x00",
        encode("other", 1, {"sources": {HERE: Clock.now}}),
        record([HERE]),
        record({HERE: "yesterday"}),
        record({HERE: None}),
    ],
    ids=["empty", "torn", "altered", "binary", "another kind", "a list", "no number", "null"],
)
def test_a_file_that_cannot_be_read_is_no_record(run: Callable[[], BadSources], tmp_path: Path, raw: bytes):
    """It costs a download at most, and the next record overwrites it."""
    (tmp_path / ONE.hex).write_bytes(GOOD)
    assert run().of(ONE) == {HERE}
    (tmp_path / ONE.hex).write_bytes(raw)

    assert run().of(ONE) == set()
    run().clear(ONE, frozenset({HERE}))
    run().note(ONE, THERE)
    assert run().of(ONE) == {THERE}


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path, clock: Clock):
    """Nothing is remembered, and the transfer continues."""
    for place in (tmp_path / "no" / "where", tmp_path / "file" / "below"):
        (tmp_path / "file").write_bytes(b"")
        records = BadSources(place, clock)

        records.note(ONE, HERE)
        records.clear(ONE, frozenset({HERE}))

        assert records.of(ONE) == set()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_threads_may_share_what_a_run_has(run: Callable[[], BadSources]):
    """Each thread notes bad sources of its own blobs while others read."""
    digests, records = [Digest.of(bytes([n])) for n in range(32)], run()

    def work(digest: Digest) -> frozenset[str]:
        records.note(digest, HERE)
        records.note(digest, THERE)
        records.clear(digest, frozenset({THERE}))
        return records.of(digest)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, digests)) == {frozenset({HERE})}
    assert all(run().of(digest) == {HERE} for digest in digests)
