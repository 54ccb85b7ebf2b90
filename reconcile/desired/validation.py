"""Validation of names and paths: only what every file system and every reader of a lockfile accepts is allowed."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import filterfalse

from ..errors import InvalidModelIdError, Problem

_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(rf"{_SEGMENT}(/{_SEGMENT})?\Z")
_VARIANT = re.compile(rf"{_SEGMENT}\Z")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*\Z")

# Most paths are plain and pass with one match; the others are checked rule by rule.
_PLAIN = re.compile(
    r"(?!(?:.*/)?(?i:con|prn|aux|nul|com[0-9]|lpt[0-9]|conin\$|conout\$)(?:\.[^/]*)?(?:/|\Z))"
    r"[A-Za-z0-9_-](?:[A-Za-z0-9._+=@,-]{0,99}[A-Za-z0-9_-])?(?:/[A-Za-z0-9_-](?:[A-Za-z0-9._+=@,-]{0,99}[A-Za-z0-9_-])?){0,9}\Z"
)
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)\s*(\.|\Z)", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[<>:"|?*]')
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_SEGMENT_BYTES, _PATH_BYTES = 255, 3_000  # Linux allows 4,096 in all, the store's own folder included
_SEGMENTS = 100


def path_problems(path: str) -> Iterator[str]:
    """The problems of a path within a tree; none for a valid one."""
    if _PLAIN.match(path):
        return
    if not path:
        yield "the path is empty"
        return
    excerpt = ascii(path[:80])
    if path.startswith("/"):
        yield f"{excerpt} is absolute"
    if re.match(r"[A-Za-z]:", path):
        yield f"{excerpt} begins with a drive letter"
    if "\\" in path:
        yield f"{excerpt} has a backslash; folders are separated by '/'"
    if _FORBIDDEN.search(path):
        yield f'{excerpt} has one of <>:"|?*, which Windows forbids'
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in _BIDI for c in path):
        yield f"{excerpt} has control, bidirectional-control or surrogate characters"
    elif len(path.encode("utf-8")) > _PATH_BYTES:
        yield f"{excerpt}… is longer than {_PATH_BYTES} bytes"
    segments = path.split("/")
    if len(segments) > _SEGMENTS:
        yield f"{excerpt}… has more than {_SEGMENTS} segments"
    for segment in segments:
        if problem := _segment_problem(segment):
            yield f"{excerpt} has {problem}"
            break


def _segment_problem(segment: str) -> str:
    if segment == "":
        return "an empty segment"
    if segment in (".", ".."):
        return f"the segment '{segment}'"
    if segment[-1] in ". ":
        return "a segment that ends in a dot or a space"
    if _RESERVED.match(segment):
        return f"a name that Windows reserves ({segment[:20]!a})"
    if len(segment.encode("utf-8", "surrogatepass")) > _SEGMENT_BYTES:
        return f"a segment longer than {_SEGMENT_BYTES} bytes"
    return ""


def folded(path: str) -> str:
    """A path as case-insensitive and normalizing file systems compare it: equal results are one file there."""
    if path.isascii():
        return path.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def collisions(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each path that cannot be next to an earlier one, with the reason: equal after folding, or file and folder."""
    paths = list(paths)
    keys = dict(zip(map(folded, paths), paths, strict=True))
    if len(keys) < len(paths):
        keys.clear()
        for path in paths:
            key = folded(path)
            if key in keys:
                yield path, f"is the same file as {keys[key]!a} where case or Unicode form does not count"
            else:
                keys[key] = path
    folders: set[str] = set()
    for key in keys:
        while "/" in key:
            key = key.rpartition("/")[0]
            if key in folders:
                break
            folders.add(key)
    for key in keys.keys() & folders:
        yield keys[key], "is both a file and a folder"


def name_problem(kind: str, name: str) -> str:
    """The problem of a model's name, a version or a variant (*kind*); empty for a valid one."""
    pattern = {"name": _NAME, "version": _VERSION, "variant": _VARIANT}[kind]
    if not pattern.match(name):
        return f"{name[:80]!a} is not a {kind}; expected {pattern.pattern.removesuffix(chr(92) + 'Z')}"
    return next(path_problems(name), "")


@dataclass(frozen=True, slots=True, order=True)
class ModelId:
    """One version of a model, ``name@version``."""

    name: str
    version: str

    @classmethod
    def parse(cls, text: str) -> ModelId:
        """Read the text form. Raises ValueError naming the part that is wrong."""
        name, at, version = text.partition("@")
        if not at:
            raise ValueError(f"{text[:80]!a} has no version; expected name@version")
        for kind, part in (("name", name), ("version", version)):
            if problem := name_problem(kind, part):
                raise ValueError(problem)
        return cls(name, version)

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Selector:
    """A selector as users type it, ``name[@version][#variant]``."""

    name: str
    version: str | None = None
    variant: str | None = None

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Read the text form. Raises InvalidModelIdError."""
        model, hash_, variant = text.partition("#")
        name, at, version = model.partition("@")
        parts = [("name", name)] + [("version", version)] * bool(at) + [("variant", variant)] * bool(hash_)
        for kind, part in parts:
            if problem := name_problem(kind, part):
                hint = "a selector is name[@version][#variant], e.g. minilm@1.0.0#fp16"
                raise InvalidModelIdError(f"selector {text[:80]!a}: {problem}", hint=hint, model_id=text)
        return cls(name, version if at else None, variant if hash_ else None)

    def __str__(self) -> str:
        return self.name + (f"@{self.version}" if self.version else "") + (f"#{self.variant}" if self.variant else "")


def check_paths(place: str, paths: Iterable[str], problems: list[Problem]) -> None:
    """Append every invalid or colliding path of one tree to *problems*, under *place*."""
    every = list(paths)
    for path in filterfalse(_PLAIN.match, every):
        problems += [Problem(f"{place}[{path[:80]!a}]", what) for what in path_problems(path)]
    problems += [Problem(f"{place}[{path[:80]!a}]", what) for path, what in collisions(every)]
