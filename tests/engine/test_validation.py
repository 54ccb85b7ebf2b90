"""Laws of the path rules: what an accepted path may never do, and what is never accepted."""

from __future__ import annotations

import re
import unicodedata
from itertools import combinations
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from builders import lock_of
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import BAD_CHARACTERS, BAD_SEGMENTS, good_paths, path_texts

from modelstow.reconcile.desired import lockfile, validation
from modelstow.reconcile.desired.validation import collisions, path_problems


def accepted(path: str) -> bool:
    return not list(path_problems(path))


@given(path_texts)
def test_an_accepted_path_stays_below_its_root_on_every_system(path):
    """Joined to a root it adds exactly its own segments, by the rules of POSIX and of Windows."""
    assume(accepted(path))

    for root in (PurePosixPath("/root/tree"), PureWindowsPath("R:/root/tree")):
        joined = root / path
        assert joined.parts == (*root.parts, *path.split("/"))
        assert ".." not in joined.parts


@given(good_paths)
def test_a_path_of_good_segments_is_accepted(path):
    """The laws about accepted paths are not empty."""
    assert accepted(path)


@given(st.lists(path_texts | good_paths, max_size=6))
def test_accepted_paths_survive_the_text_of_a_lockfile(paths):
    """Paths that are accepted together are read back as they were written, and accepted again."""
    files = {path: path.encode() for path in paths if accepted(path)}
    assume(files and not list(collisions(files)))

    read = lockfile.parse(lock_of({"m@1": {"v": files}}).format().encode()).models["m@1"].variants["v"].files

    assert read.keys() == files.keys()
    assert all(map(accepted, read)) and not list(collisions(read))


@given(st.lists(good_paths, min_size=2, max_size=6, unique=True))
@example(["a/b", "A/b", "a"])
def test_paths_are_accepted_together_only_if_no_file_system_merges_two(paths):
    """Compared segment by segment without case and Unicode form, none is another or lies below it."""
    keys = [tuple(plain(segment) for segment in path.split("/")) for path in paths]
    merged = any(one[: len(other)] == other or other[: len(one)] == one for one, other in combinations(keys, 2))

    assert bool(list(collisions(paths))) == merged


def plain(segment: str) -> str:
    """A segment without case and Unicode form, by another way than the product's: decomposed, then folded twice."""
    text = unicodedata.normalize("NFD", segment).casefold()
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", text).casefold())


@given(good_paths, st.sampled_from([str.upper, str.lower, str.swapcase, str.casefold]), st.sampled_from(["NFC", "NFD"]))
def test_a_twin_in_another_case_or_unicode_form_is_refused(path, change_case, form):
    """A path and its twin are the same file on some file system, so one tree cannot hold both."""
    twin = unicodedata.normalize(form, change_case(path))
    assume(twin != path)

    assert [refused for refused, _ in collisions([path, twin])] == [twin]


@given(good_paths, st.sampled_from(BAD_CHARACTERS), st.data())
def test_a_path_with_one_forbidden_character_is_refused(path, character, data):
    """Wherever the character is inserted into a good path."""
    at = data.draw(st.integers(0, len(path)))

    assert not accepted(path[:at] + character + path[at:])


@given(good_paths, st.sampled_from(BAD_SEGMENTS), st.data())
def test_a_path_with_one_forbidden_segment_is_refused(path, segment, data):
    """Wherever the segment is inserted between the segments of a good path."""
    segments = path.split("/")
    at = data.draw(st.integers(0, len(segments)))

    assert not accepted("/".join([*segments[:at], segment, *segments[at:]]))


@given(good_paths, st.sampled_from(["/", "//", "C:", "c:/", "./", "../"]))
def test_a_path_that_begins_elsewhere_is_refused(path, start):
    """Absolute, on a drive, or relative to a folder outside the tree."""
    assert not accepted(start + path)


@given(path_texts | st.text("aA.-_/ cnoCNO1", max_size=9))
@example("con")
@example("a/com1.txt")
def test_the_fast_check_accepts_nothing_that_the_full_check_refuses(path):
    """The regular expression for plain paths is an optimisation, not a second rule."""
    assume(validation._PLAIN.match(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "_PLAIN", re.compile(r"(?!)"))
        assert accepted(path)
