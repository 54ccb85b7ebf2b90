"""models.lock: the digest, size and locators of every file.

A text is read once, checked whole and believed from then on. Whatever is wrong is reported together, each with its
place, before anything is touched.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from modelstow.cas import EMPTY, Digest

from ..errors import LockfileInvalidError, Problem, SchemaVersionError
from ..paths import absolute_path
from . import validation
from .locators import check_locator

LOCK_VERSION = 1
_MOST_BYTES = 64 << 20  # before anything is parsed; 100,000 files are 40 MB
MOST_SIZE = 1 << 53
_MOST_NESTING = 100
_DIGEST_CHARACTERS = len(EMPTY)
_MOST_PROBLEMS = 200
_HINT = "restore it from git, or delete it and run `modelstow lock`"
_DIGESTS = re.compile(r"(?:sha256:[0-9a-f]{64})*")
_SPACED_COLON = re.compile(r'"[ \t\r\n]+:')


class LockedBlob(NamedTuple):
    """One blob: its size in bytes and its locators, in the order of sources."""

    size: int
    urls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedVariant:
    """The content of one variant. ``components`` name parts; those in ``optional`` are placed only on request."""

    files: Mapping[str, Digest]
    components: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()

    def select_files(self, with_: Iterable[str] = (), without: Iterable[str] = ()) -> dict[str, Digest]:
        """The files of this variant with some optional components added and some components left out."""
        out = (set(self.optional) - set(with_)) | set(without)
        dropped = {path for name in out for path in self.components.get(name, ())}
        # What a component that stays also names is kept.
        kept = {path for name, paths in self.components.items() if name not in out for path in paths}
        return {path: digest for path, digest in self.files.items() if path not in dropped or path in kept}


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedModel:
    """One ``name@version``. ``entry`` is the digest of the manifest's table that it was made from."""

    variants: Mapping[str, LockedVariant]
    default: str | None = None
    entry: str = ""
    pin: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Lockfile:
    """A whole lockfile. ``manifest`` is the digest of the meaning of the manifest that it was made from."""

    manifest: str
    models: Mapping[str, LockedModel]
    blobs: Mapping[Digest, LockedBlob]

    def format(self) -> str:
        """The one text form: the same lockfile gives the same bytes on every machine."""
        lines = ["{", f' "lock_version": {LOCK_VERSION},', f' "manifest": {_json(self.manifest)},', ' "models": {']
        lines += _joined(_model_lines(key, self.models[key]) for key in sorted(self.models))
        lines += [" },", ' "blobs": {']
        lines += _joined(
            [f'  {_json(d)}: {{"size": {blob.size}, "urls": {_json(list(blob.urls))}}}']
            for d, blob in sorted(self.blobs.items())
        )
        return "\n".join([*lines, " }", "}", ""])


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _joined(groups: Iterable[list[str]]) -> list[str]:
    """Groups of lines with a comma after each but the last."""
    lines: list[str] = []
    for group in groups:
        if lines:
            lines[-1] += ","
        lines += group
    return lines


def _model_lines(key: str, model: LockedModel) -> list[str]:
    parts = []
    if model.default is not None:
        parts.append([f'   "default": {_json(model.default)}'])
    if model.entry:
        parts.append([f'   "entry": {_json(model.entry)}'])
    if model.pin:
        parts.append(['   "pin": true'])
    variants = _joined(_variant_lines(name, model.variants[name]) for name in sorted(model.variants))
    parts.append(['   "variants": {', *variants, "   }"])
    return [f"  {_json(key)}: {{", *_joined(parts), "  }"]


def _variant_lines(name: str, variant: LockedVariant) -> list[str]:
    parts = []
    if variant.components:
        rows = [[f"      {_json(c)}: {_json(sorted(paths))}"] for c, paths in sorted(variant.components.items())]
        parts.append(['     "components": {', *_joined(rows), "     }"])
    files = [[f"      {_json(path)}: {_json(digest)}"] for path, digest in sorted(variant.files.items())]
    parts.append(['     "files": {', *_joined(files), "     }"])
    if variant.optional:
        parts.append([f'     "optional": {_json(sorted(variant.optional))}'])
    return [f"    {_json(name)}: {{", *_joined(parts), "    }"]


# ---- reading


def read(path: Path) -> tuple[Lockfile, bytes]:
    """Read and check a lockfile once; also its bytes, since the file may change meanwhile.

    Raises LockfileInvalidError, SchemaVersionError, OSError.
    """
    with open(path, "rb") as file:
        raw = file.read(_MOST_BYTES + 1)
    return parse(raw, str(path)), raw


def parse(raw: bytes, name: str = "models.lock") -> Lockfile:
    """Check a lockfile's text and make it a value. Raises LockfileInvalidError with every problem, SchemaVersionError."""
    document = _load(raw, name)
    problems: list[Problem] = []
    version = document.get("lock_version")
    if type(version) is int and version > LOCK_VERSION:
        raise SchemaVersionError(
            f"{name} has lock_version {version}; this modelstow reads {LOCK_VERSION}",
            hint="upgrade modelstow, or lock again with this one",
            found_version=version,
            supported_versions=[LOCK_VERSION],
        )
    if type(version) is not int or version != LOCK_VERSION:
        problems.append(Problem("lock_version", f"expected {LOCK_VERSION}, got {_shown(version)}"))
    manifest = document.get("manifest", "")
    if not isinstance(manifest, str):
        problems.append(Problem("manifest", f"expected a digest, got {_shown(manifest)}"))
    blobs = _blobs(_table(document, "blobs", "blobs", problems), problems)
    known: dict[str, Digest] = dict(zip(blobs, blobs, strict=True))  # one Digest object for all paths that share it
    models = _models(_table(document, "models", "models", problems), known, problems)
    if problems:
        if len(problems) > _MOST_PROBLEMS:
            rest = len(problems) - _MOST_PROBLEMS
            problems = [*problems[:_MOST_PROBLEMS], Problem("", f"and {rest} more")]
        raise LockfileInvalidError(name, problems, hint=_HINT)
    return Lockfile(manifest=str(manifest), models=models, blobs=blobs)


class _Refused(ValueError):
    """JSON that parses and is refused all the same."""


def _load(raw: bytes, name: str) -> dict[str, object]:
    def refuse(what: str) -> LockfileInvalidError:
        return LockfileInvalidError(name, [Problem("", what)], hint=_HINT)

    if len(raw) > _MOST_BYTES:
        raise refuse(f"it is larger than {_MOST_BYTES:,} bytes")
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise refuse("it begins with a byte-order mark")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse(f"it is not UTF-8 (byte {error.start:,})") from error
    try:
        document = json.loads(text, parse_float=_finite, parse_constant=_finite)
        keys, nesting = _measure(document)
        if nesting > _MOST_NESTING:
            raise _Refused(f"it is nested more than {_MOST_NESTING} deep")
        if not _keys_are_distinct(text, keys):
            document = json.loads(text, object_pairs_hook=_no_duplicates, parse_float=_finite, parse_constant=_finite)
    except _Refused as error:
        raise refuse(str(error)) from error
    except RecursionError as error:
        raise refuse(f"it is nested more than {_MOST_NESTING} deep") from error
    except ValueError as error:  # bad JSON, or a number of more digits than Python converts
        raise refuse(f"it is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise refuse(f"expected an object, got {_shown(document)}")
    return document


def _measure(document: object) -> tuple[int, int]:
    """The number of keys in the objects of a document, and its depth, counted as far as is allowed."""
    keys, depth, level = 0, 0, [document]
    while level and depth <= _MOST_NESTING:
        tables = [value for value in level if type(value) is dict]
        lists = [value for value in level if type(value) is list]
        keys += sum(map(len, tables))
        depth += bool(tables or lists)
        children = chain(chain.from_iterable(map(dict.values, tables)), chain.from_iterable(lists))
        level = [child for child in children if type(child) in (dict, list)]
    return keys, depth


def _keys_are_distinct(text: str, keys: int) -> bool:
    """Whether no object of *text* has a key twice, by counting; False too where counting does not show it.

    Without escaped quotes each quote begins or ends a string, so that `":` ends a key or begins a string with a colon:
    it occurs at least as often as there are keys, and a key that is there twice is one more than the parsed *keys*.
    """
    return '\\"' not in text and text.count('":') == keys and not _SPACED_COLON.search(text)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"the key {key[:80]!a} is there twice")
            seen.add(key)
    return table


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # NaN, Infinity, or a literal like 1e999 that JSON's grammar allows
        raise _Refused(f"a number is not finite ({text[:20]})")
    return number


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _table(parent: Mapping[str, object], key: str, place: str, problems: list[Problem]) -> dict[str, object]:
    value = parent.get(key)
    if isinstance(value, dict):
        return value
    what = "is missing" if key not in parent else f"expected an object, got {_shown(value)}"
    problems.append(Problem(place, what))
    return {}


def _blobs(table: Mapping[str, object], problems: list[Problem]) -> dict[Digest, LockedBlob]:
    if (plain := _plain_blobs(table)) is not None:
        return plain
    blobs: dict[Digest, LockedBlob] = {}
    for key, value in table.items():
        # The place is put into words only for what is wrong: there may be 100,000 that are right.
        found = list(_blob_problems(key, value))
        if found:
            place = f"blobs[{key[:80]!a}]"
            problems += [Problem(place + where, what) for where, what in found]
        elif isinstance(value, dict):
            blobs[Digest(key)] = LockedBlob(size=value["size"], urls=tuple(value.get("urls", ())))
    return blobs


def _plain_blobs(table: Mapping[str, object]) -> dict[Digest, LockedBlob] | None:
    """The blobs of a table without a fault, checked column by column; None where entries must be checked one by one."""
    if set(map(len, table)) - {_DIGEST_CHARACTERS} or not _DIGESTS.fullmatch("".join(table)):
        return None
    try:
        sizes = [entry["size"] for entry in table.values()]  # type: ignore[index]
        urls = [entry["urls"] for entry in table.values()]  # type: ignore[index]
        every = list(chain.from_iterable(urls))
        types = set(map(type, table.values())), set(map(type, sizes)), set(map(type, urls)), set(map(type, every))
    except (KeyError, TypeError):
        return None
    if types[0] - {dict} or types[1] - {int} or types[2] - {list} or types[3] - {str}:
        return None
    if (sizes and not 0 <= min(sizes) <= max(sizes) <= MOST_SIZE) or any(map(check_locator, every)):
        return None
    return dict(zip(map(Digest, table), map(LockedBlob, sizes, map(tuple, urls)), strict=True))


def _blob_problems(key: str, value: object) -> Iterator[tuple[str, str]]:
    """The problems of a blob's entry, each with its place below the entry."""
    try:
        Digest.parse(key)
    except ValueError as error:
        yield "", str(error)
    if not isinstance(value, dict):
        yield "", f"expected an object, got {_shown(value)}"
        return
    size, urls = value.get("size"), value.get("urls", [])
    if type(size) is not int or not 0 <= size <= MOST_SIZE:
        yield ".size", f"expected a whole number from 0 to 2^53, got {_shown(size)}"
    if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        yield ".urls", f"expected a list of locators, got {_shown(urls)}"
        return
    for number, url in enumerate(urls):
        if flaw := check_locator(url):
            yield f".urls[{number}]", str(flaw)


def absolute(locator: str, base: Path) -> str:
    """A locator made absolute: relative paths are relative to the manifest's folder."""
    if "://" in locator:
        return locator
    return absolute_path(locator) if locator.startswith("~") else os.path.normpath(base / locator)


def _models(table: Mapping[str, object], known: Mapping[str, Digest], problems: list[Problem]) -> dict[str, LockedModel]:
    models = {}
    for key, value in table.items():
        place = f"models[{key[:80]!a}]"
        try:
            validation.ModelId.parse(key)
        except ValueError as error:
            problems.append(Problem(place, str(error)))
        if not isinstance(value, dict):
            problems.append(Problem(place, f"expected an object, got {_shown(value)}"))
            continue
        models[key] = _model(value, place, known, problems)
    problems += [Problem(f"models[{key!a}]", what) for key, what in validation.collisions(table)]
    return models


def _model(value: Mapping[str, object], place: str, known: Mapping[str, Digest], problems: list[Problem]) -> LockedModel:
    variants = {}
    for name, variant in _table(value, "variants", f"{place}.variants", problems).items():
        inner = f"{place}.variants[{name[:80]!a}]"
        if what := validation.name_problem("variant", name):
            problems.append(Problem(inner, what))
        if isinstance(variant, dict):
            variants[name] = _variant(variant, inner, known, problems)
        else:
            problems.append(Problem(inner, f"expected an object, got {_shown(variant)}"))
    problems += [Problem(f"{place}.variants[{name!a}]", what) for name, what in validation.collisions(variants)]
    default, entry, pin = value.get("default"), value.get("entry", ""), value.get("pin", False)
    if default is not None and (not isinstance(default, str) or default not in variants):
        problems.append(Problem(f"{place}.default", f"{_shown(default)} is not one of its variants"))
        default = None
    if not isinstance(entry, str):
        problems.append(Problem(f"{place}.entry", f"expected a digest, got {_shown(entry)}"))
    if not isinstance(pin, bool):
        problems.append(Problem(f"{place}.pin", f"expected true or false, got {_shown(pin)}"))
    return LockedModel(variants=variants, default=default, entry=str(entry), pin=bool(pin))


def _variant(
    value: Mapping[str, object], place: str, known: Mapping[str, Digest], problems: list[Problem]
) -> LockedVariant:
    raw_files = _table(value, "files", f"{place}.files", problems)
    files: dict[str, Digest] = {}
    for path, text in raw_files.items():
        digest = known.get(text) if type(text) is str else None
        if digest is None:
            digest = _file_digest(text, f"{place}.files[{path[:80]!a}]", known, problems)
        if digest is not None:
            files[path] = digest
    validation.check_paths(f"{place}.files", raw_files, problems)
    components: dict[str, tuple[str, ...]] = {}
    raw_components = value.get("components", {})
    if not isinstance(raw_components, dict):
        problems.append(Problem(f"{place}.components", f"expected an object, got {_shown(raw_components)}"))
        raw_components = {}
    for name, paths in raw_components.items():
        inner = f"{place}.components[{name[:80]!a}]"
        if what := validation.name_problem("variant", name):
            problems.append(Problem(inner, what))
        if not isinstance(paths, list) or not all(isinstance(path, str) and path in raw_files for path in paths):
            problems.append(Problem(inner, "expected a list of paths of this variant's files"))
            continue
        components[name] = tuple(paths)
    optional = value.get("optional", [])
    if not isinstance(optional, list) or not all(isinstance(name, str) and name in components for name in optional):
        problems.append(Problem(f"{place}.optional", "expected a list of names of this variant's components"))
        optional = []
    return LockedVariant(files=files, components=components, optional=tuple(optional))


def _file_digest(text: object, place: str, known: Mapping[str, Digest], problems: list[Problem]) -> Digest | None:
    try:
        digest = Digest.parse(text)
    except ValueError as error:
        problems.append(Problem(place, str(error)))
        return None
    if digest not in known:
        problems.append(Problem(place, f"{digest} has no entry in blobs"))
        return None
    return known[digest]
