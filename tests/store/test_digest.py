"""The name of some bytes, and the timestamp that encodes it."""

import calendar
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelstow.cas import EMPTY, Digest

contents = st.binary(max_size=40)


@given(contents)
def test_parsing_the_text_form_gives_the_digest_back(data: bytes):
    """Parse and format are inverse."""
    digest = Digest.of(data)

    assert Digest.parse(str(digest)) == digest == Digest.of_hex(digest.hex)
    assert digest.hex.startswith(digest.short) and len(digest.short) == 12


@given(contents)
def test_the_mtime_of_a_digest_is_an_even_whole_second_between_1990_and_2020(data: bytes):
    """Far from any clock that runs today, and kept by file systems that know only even seconds."""
    mtime = Digest.of(data).mtime

    assert isinstance(mtime, int) and mtime % 2 == 0
    assert calendar.timegm((1990, 1, 1, 0, 0, 0)) <= mtime < calendar.timegm((2020, 1, 1, 0, 0, 0))


@given(contents, contents)
def test_two_digests_are_equal_exactly_when_their_bytes_are(one: bytes, other: bytes):
    """Identity is content."""
    assert (Digest.of(one) == Digest.of(other)) == (one == other)


@pytest.mark.parametrize(
    ("text", "output"),
    [
        (None, "text, not NoneType"),
        (b"sha256:" + b"0" * 64, "text, not bytes"),
        ("0" * 64, "no algorithm"),
        ("md5:" + "0" * 32, "unknown algorithm 'md5'"),
        ("SHA256:" + "0" * 64, "unknown algorithm 'SHA256'"),
        ("sha256:" + "0" * 63, "has 63 characters"),
        ("sha256:" + "0" * 65, "has 65 characters"),
        ("sha256:" + "A" * 64, "lower-case"),
        ("sha256:" + "0" * 64 + "\n", "64 lower-case"),
        ("sha256:" + "٠" * 64, "64 lower-case"),
        ("sha256:", "has 0 characters"),
    ],
)
def test_a_text_that_is_no_digest_is_refused_with_what_is_wrong(text: object, output: str):
    """Each way of being wrong has its own output."""
    with pytest.raises(ValueError, match=output):
        Digest.parse(text)


def test_a_complaint_never_repeats_a_megabyte_of_what_was_wrong():
    """Messages stay readable whatever a file holds."""
    with pytest.raises(ValueError) as caught:
        Digest.parse("sha256" * 200_000 + ":")
    assert len(str(caught.value)) < 300


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path):
    """Whether bytes are in memory or on disk makes no difference."""
    (tmp_path / "file").write_bytes(b"some bytes")

    assert Digest.of_path(tmp_path / "file") == Digest.of(b"some bytes") == Digest.of(memoryview(b"some bytes"))
    assert Digest.of(b"") == EMPTY
