"""The files of a source's listing that a variant takes: by its globs and its index. Pure functions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pathspec import GitIgnoreSpec

from modelstow.backends import Listed
from modelstow.cas import EMPTY

from ..errors import Problem
from . import validation
from .lockfile import MOST_SIZE
from .manifest import Variant

RENAME_HINT = "`rename` can give it another path"
_ANY_NAME = "modelstow-any-name"  # of a file in a folder whose files are not known


@dataclass(frozen=True, slots=True, kw_only=True)
class LockWarning:
    """What `lock` left out or cannot vouch for."""

    code: str  # LEFT_OUT_BY_INDEX, FOLDER_NOT_LISTED
    path: str  # at the source
    message: str


Warn = Callable[[LockWarning], object]


def select(files: Iterable[Listed], variant: Variant, place: str, problems: list[Problem], warn: Warn) -> list[Listed]:
    """The files that the globs of a variant select. Those with problems are reported and left out.

    One that cannot be had is among them, with its error, if it is wanted; of the others nothing is looked at but the path.
    """
    include, exclude = GitIgnoreSpec.from_lines(variant.include), GitIgnoreSpec.from_lines(variant.exclude)

    def wanted(path: str) -> bool:
        return include.match_file(path) and not exclude.match_file(path)

    files = sorted(files, key=lambda listed: listed.path)
    selected = []
    for listed in files:
        is_folder = listed.path.endswith("/")
        if wanted(listed.path + _ANY_NAME if is_folder else listed.path):
            selected.append(listed)
        elif is_folder and not exclude.match_file(listed.path):
            what = f"{listed.path[:80]!a} could not be listed, and nothing in it is locked ({listed.error})"
            warn(LockWarning(code="FOLDER_NOT_LISTED", path=listed.path, message=what))
    for number, pattern in enumerate(variant.include):
        if _is_literal(pattern) and not any(GitIgnoreSpec.from_lines([pattern]).match_file(f.path) for f in files):
            problems.append(Problem(f"{place}.include[{number}]", f"the source lists no {pattern!r}"))
    for path in sorted(set(variant.rename) - {f.path for f in selected}):
        problems.append(Problem(f"{place}.rename", f"{path!r} is not among the files of this variant"))
    good = []
    for listed in selected:
        # The paths of a hostile listing are checked before they are joined to a locator.
        found = [] if listed.error else list(_problems_of(listed, variant.rename.get(listed.path, listed.path)))
        problems += [Problem(f"{place}.include", what) for what in found]
        if not found:
            good.append(listed)
    return good


def _is_literal(pattern: str) -> bool:
    return not any(c in pattern for c in "*?[!")


def _problems_of(listed: Listed, tree_path: str) -> Iterator[str]:
    excerpt = f"{listed.path[:80]!a}"
    segments = listed.path.split("/")
    if {"", ".", ".."}.intersection(segments) or "\0" in listed.path:
        yield f"the source lists {excerpt}, which is no path below it"
    elif tree_path == listed.path:
        yield from (f"{what}; {RENAME_HINT}" for what in validation.path_problems(tree_path))
    if listed.size is not None and not 0 <= listed.size <= MOST_SIZE:
        yield f"the source lists {excerpt} with the size {listed.size}"
    if listed.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", listed.sha256):
        yield f"the source lists {excerpt} with {listed.sha256[:80]!a}, which is no sha256"
    if problem := contradiction(listed.path, listed.sha256, listed.size):
        yield problem


def contradiction(path: str, sha256: str | None, size: int | None) -> str:
    """Why a size cannot be that of a file with this sha256; empty if it can."""
    if sha256 is None or size is None or (sha256 == EMPTY.hex) == (size == 0):
        return ""
    return f"the source gives {path[:80]!a} {size:,} bytes and the sha256 {sha256[:12]}…, which contradict each other"


def match(files: Iterable[str], globs: Iterable[str]) -> tuple[str, ...]:
    """The paths that globs match, sorted."""
    spec = GitIgnoreSpec.from_lines(globs)
    return tuple(sorted(path for path in files if spec.match_file(path)))


# ---- an index of shards


def by_index(
    raw: bytes, variant: Variant, selected: Sequence[Listed], place: str, problems: list[Problem], warn: Warn
) -> list[Listed]:
    """The files without the shards next to the index that it does not name, unless `include` names them outright."""
    index = variant.index or ""
    shards = _shards(raw, f"{place}.index", index, problems)
    folder = str(PurePosixPath(index).parent)
    named = {str(PurePosixPath(folder) / shard) for shard in shards}
    suffixes = {PurePosixPath(shard).suffix for shard in shards}
    for path in sorted(named - {listed.path for listed in selected}):
        problems.append(Problem(f"{place}.index", f"names the shard {path!r}, which the source does not list"))
    outright = GitIgnoreSpec.from_lines(filter(_is_literal, variant.include))

    def belongs(listed: Listed) -> bool:
        path = PurePosixPath(listed.path)
        if str(path.parent) != folder or path.suffix not in suffixes or listed.path in named:
            return True
        return outright.match_file(listed.path)

    kept = [listed for listed in selected if belongs(listed)]
    if dropped := [listed for listed in selected if not belongs(listed)]:
        known = [listed.size for listed in dropped if listed.size is not None]
        total = f", {sum(known):,} bytes" if len(known) == len(dropped) else ""
        names = ", ".join(listed.path[:80] for listed in dropped[:3]) + (", …" if len(dropped) > 3 else "")
        files = "1 file" if len(dropped) == 1 else f"{len(dropped):,} files"
        what = f"{index} does not name {files} next to it{total}; left out: {names}"
        warn(LockWarning(code="LEFT_OUT_BY_INDEX", path=index, message=what))
    return kept


def _shards(raw: bytes, place: str, index: str, problems: list[Problem]) -> set[str]:
    """The shards that an index names, relative to its folder."""
    try:
        weights = json.loads(raw)["weight_map"]
        pairs = list(weights.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        problems.append(Problem(place, f"{index!r} is not an index: no weight_map"))
        return set()
    if not pairs:
        problems.append(Problem(place, f"{index!r} names no shards"))
    shards: set[str] = set()
    refused: dict[str, str] = {}
    for tensor, value in pairs:
        shard = value
        while isinstance(shard, str) and shard.startswith("./"):
            shard = shard[2:]
        if not isinstance(shard, str):
            refused.setdefault(repr(value)[:80], tensor)
        elif shard not in shards and any(validation.path_problems(shard)):
            refused.setdefault(f"{shard[:80]!a}", tensor)
        else:
            shards.add(shard)
    for value, tensor in list(refused.items())[:20]:
        what = f"the tensor {tensor[:80]!a} is in {value}, which is no path in the model"
        problems.append(Problem(place, what))
    return shards
