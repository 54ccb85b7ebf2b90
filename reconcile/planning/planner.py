"""The difference between desired and actual: a pure function of two values, ordered, smallest.

Order: resumes (nearly finished first), fetches (largest first), links, replacements, removals; each by tree and path.
So equal inputs give equal plans, and nothing is linked before it is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import assert_never

from modelstow.cas import EMPTY, BlobState, Digest, Entry

from ..desired.mirrors import mirrored
from .state import NO_TREE, Actual, ActualTree, Desired, DesiredTree, ModelState, TreeKey, VariantStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """Fetch a blob. ``have`` is what a partial held when it was observed; apply observes again."""

    digest: Digest
    size: int  # bytes
    have: int = 0  # bytes, 0 <= have <= size
    url: str = ""  # the first locator, of a mirror where there are any; apply may use each


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Put an entry at a free path."""

    tree: TreeKey
    path: str
    entry: Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTree:
    """Put every entry of a tree in place that has none yet: one action, however many files."""

    tree: TreeKey
    entries: Mapping[str, Entry] = field(compare=False, repr=False)

    @property
    def path(self) -> str:
        """The tree itself."""
        return ""

    def links(self) -> list[Link]:
        """The same, file by file, by path."""
        return [Link(tree=self.tree, path=path, entry=self.entries[path]) for path in sorted(self.entries)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replace:
    """Put an entry where something else is, or where its own blob will be replaced."""

    tree: TreeKey
    path: str
    entry: Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Remove:
    """Take a path out of a tree; path "" is the whole tree."""

    tree: TreeKey
    path: str


Action = Fetch | Link | LinkTree | Replace | Remove


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A plan in figures, for people; apply plans again."""

    fetch_blobs: int
    fetch_bytes: int
    link_files: int
    remove_files: int
    disk_bytes: int  # new on disk
    elsewhere: Mapping[Path, int]  # how much of that on other disks than the store's, by tree
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The actions that make actual equal desired. Empty: in sync."""

    desired: Desired
    actions: tuple[Action, ...]
    summary: Summary
    local: frozenset[Digest] = frozenset()  # to be read from files of trees, and fetched only if those are others

    @property
    def changes(self) -> bool:
        return bool(self.actions)

    def trees(self) -> list[DesiredTree]:
        """The trees that have work, in the order of desired."""
        touched = {action.tree for action in self.actions if not isinstance(action, Fetch)}
        return [tree for tree in self.desired.trees if tree.key in touched]


def plan(desired: Desired, actual: Actual) -> Plan:
    """The smallest ordered list of actions that makes *actual* equal *desired*."""
    links: list[Link | LinkTree] = []
    replaces: list[Replace] = []
    removes: list[Remove] = []
    intact = _intact(actual)
    for tree in desired.trees:
        seen = actual.trees.get(tree.key, NO_TREE)
        for action in _tree_actions(tree, seen, actual, intact, prune=desired.prune and not tree.keeps_extra):
            match action:
                case Link() | LinkTree():
                    links.append(action)
                case Replace():
                    replaces.append(action)
                case Remove():
                    removes.append(action)
    removes += [Remove(tree=key, path="") for key in desired.removals]
    fetches, local = _fetches(desired, actual, intact)
    actions: tuple[Action, ...] = (*fetches, *_by_place(links), *_by_place(replaces), *_by_place(removes))
    return Plan(desired=desired, actions=actions, summary=_summary(actions, desired, actual), local=local)


def _intact(actual: Actual) -> frozenset[Digest]:
    """The digests that need nothing; computed once for all trees."""
    return frozenset([EMPTY, *(digest for digest, blob in actual.blobs.items() if blob.state is BlobState.INTACT)])


def _tree_actions(
    tree: DesiredTree, seen: ActualTree, actual: Actual, intact: frozenset[Digest], *, prune: bool
) -> Iterator[Link | LinkTree | Replace | Remove]:
    """The actions for one tree, in the order of its files."""
    entries = tree.entries
    if entries and not seen.placed and not seen.foreign:
        yield LinkTree(tree=tree.key, entries=entries)
        yield from (Remove(tree=tree.key, path=path) for path in _superfluous(tree, seen, prune=prune))
        return
    # Two comparisons in C say of a whole tree that there is nothing to do for its files.
    in_place = seen.placed == entries and intact.issuperset(tree.files.values())
    for path, entry in () if in_place else entries.items():
        if (action := _file_action(tree, path, entry, seen, actual)) is not None:
            yield action
    yield from (Remove(tree=tree.key, path=path) for path in _superfluous(tree, seen, prune=prune))


def _file_action(tree: DesiredTree, path: str, entry: Entry, seen: ActualTree, actual: Actual) -> Link | Replace | None:
    if seen.placed.get(path) == entry and actual.blob(entry) is BlobState.INTACT:
        return None
    if path in seen.placed or path in seen.foreign:
        return Replace(tree=tree.key, path=path, entry=entry)
    return Link(tree=tree.key, path=path, entry=entry)


def _superfluous(tree: DesiredTree, seen: ActualTree, *, prune: bool) -> Iterator[str]:
    for path in (*seen.placed, *seen.foreign):
        if path not in tree.files and path not in tree.others:
            yield path
    if prune:
        yield from seen.extra
    if seen.leftover:
        yield seen.leftover


def _fetches(desired: Desired, actual: Actual, intact: frozenset[Digest]) -> tuple[list[Fetch], frozenset[Digest]]:
    """Blobs that are needed and not intact: those that must come from a source, and those that a file of a tree may be."""
    force_refetch = desired.force_refetch
    missing: set[Digest] = {*force_refetch, *(desired.extra_blobs - intact)}
    local: set[Digest] = set()
    for tree in desired.trees:
        if intact.issuperset(tree.files.values()):
            continue
        seen = actual.trees.get(tree.key, NO_TREE)
        for path, digest in tree.files.items():
            if digest in intact:
                continue
            missing.add(digest)
            if actual.blob(digest) is BlobState.ABSENT and _may_be(path, digest, seen, desired.size(digest)):
                local.add(digest)  # a suspect one is counted whole: what it still has is known when it was read
    fetches = [
        Fetch(
            digest=digest,
            size=desired.size(digest),
            have=0 if digest in force_refetch else min(actual.partials.get(digest, 0), desired.size(digest)),
            url=_first_locator(digest, desired),
        )
        for digest in missing - (local - force_refetch)
    ]
    fetches.sort(key=lambda f: (f.have == 0, f.size - f.have if f.have else -f.size, f.digest))
    return fetches, frozenset(local - force_refetch)


def _first_locator(digest: Digest, desired: Desired) -> str:
    # Apply requests compressed pieces of the mirror first; their address would mean less to people.
    if desired.mirrors:
        return mirrored(desired.mirrors[0], digest)
    return next(iter(desired.blobs[digest].urls), "")


def _may_be(path: str, digest: Digest, seen: ActualTree, size: int) -> bool:
    foreign = seen.foreign.get(path)
    return seen.placed.get(path) == digest or (foreign is not None and foreign.could_match(size))


def _by_place(actions: Iterable[Link | LinkTree] | Iterable[Replace] | Iterable[Remove]) -> list[Action]:
    return sorted(actions, key=lambda action: (action.tree, action.path))


def _summary(actions: Iterable[Action], desired: Desired, actual: Actual) -> Summary:
    fetch_blobs = fetch_bytes = link_files = remove_files = copied = 0
    others = {tree.key: tree.path for tree in desired.trees if tree.other_disk}
    elsewhere: dict[Path, int] = {}
    for action in actions:
        match action:
            case Fetch(size=size, have=have):
                fetch_blobs, fetch_bytes = fetch_blobs + 1, fetch_bytes + size - have
            case Link(entry=entry, tree=key) | Replace(entry=entry, tree=key):
                link_files += 1
                if key in others:
                    elsewhere[others[key]] = elsewhere.get(others[key], 0) + _blob_bytes([entry], desired)
                else:
                    copied += _blob_bytes([entry], desired) if desired.needs_copies else 0
            case LinkTree(tree=key, entries=entries):
                link_files += len(entries)
                if key in others:
                    elsewhere[others[key]] = elsewhere.get(others[key], 0) + _blob_bytes(entries.values(), desired)
                elif desired.needs_copies:
                    copied += _blob_bytes(entries.values(), desired)
            case Remove():
                remove_files += 1
            case _:
                assert_never(action)
    return Summary(
        fetch_blobs=fetch_blobs,
        fetch_bytes=fetch_bytes,
        link_files=link_files,
        remove_files=remove_files,
        disk_bytes=fetch_bytes + copied + sum(elsewhere.values()),
        elsewhere=elsewhere,
        free_bytes=actual.free_bytes,
    )


def _blob_bytes(entries: Iterable[Entry], desired: Desired) -> int:
    """The bytes of the blobs among *entries*; the few of the others do not count."""
    return sum(desired.size(entry) for entry in entries if isinstance(entry, Digest))


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingWork:
    """The work that an observation found: the plan, the trees with work, and the sizes of blobs to be fetched for them."""

    plan: Plan
    trees: tuple[DesiredTree, ...] = ()
    missing: Mapping[Digest, int] = field(default_factory=dict)


def find_work(desired: Desired, actual: Actual) -> PendingWork:
    """The work for trees that need files, recovery of an interrupted change, a record, or other labels on it."""
    work = plan(desired, actual)
    touched = {tree.key for tree in work.trees()}
    found = []
    for tree in desired.trees:
        seen = actual.trees.get(tree.key, NO_TREE)
        again = desired.force_refetch and not desired.force_refetch.isdisjoint(tree.files.values())
        if tree.key in touched or again or not seen.recorded or not same_choice(seen.labels, tree.labels):
            found.append(tree)
    missing = {action.digest: action.size for action in work.actions if isinstance(action, Fetch)}
    return PendingWork(plan=work, trees=tuple(found), missing=missing)


def same_choice(recorded: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether labels are equal but for the lockfile: of several that name one tree, any may have put it there."""
    keys = (recorded.keys() | wanted.keys()) - {"lockfile"}
    return all(recorded.get(key) == wanted.get(key) for key in keys)


def statuses(desired: Desired, actual: Actual) -> list[VariantStatus]:
    """The status of each variant of each tree: the first state that fits, in the order of the enum by the contract
    (NOT_PRESENT, VERIFYING, CORRUPT, PARTIAL, COMPLETE)."""
    intact = _intact(actual)
    return [status for tree in desired.trees for status in _statuses(tree, desired, actual, intact)]


def _statuses(tree: DesiredTree, desired: Desired, actual: Actual, intact: frozenset[Digest]) -> Iterator[VariantStatus]:
    seen = actual.trees.get(tree.key, NO_TREE)
    fetches, _ = _fetches(Desired(trees=(tree,), blobs=desired.blobs), actual, intact)
    entries = tree.entries
    missing = [path for path in entries if path not in seen.placed and path not in seen.foreign]
    corrupt = [path for path, entry in entries.items() if _is_corrupt(path, entry, seen, desired, actual)]
    if not seen.exists:
        state = ModelState.NOT_PRESENT
    elif seen.verifying:
        state = ModelState.VERIFYING
    elif corrupt:
        state = ModelState.CORRUPT
    elif fetches or any(True for _ in _tree_actions(tree, seen, actual, intact, prune=False)):
        state = ModelState.PARTIAL
    else:
        state = ModelState.COMPLETE
    for id_ in tree.key.variants:
        yield VariantStatus(
            model=id_.model,
            variant=id_.variant,
            state=state,
            local_path=tree.path,
            missing_files=tuple(sorted(missing)),
            corrupt_files=tuple(sorted(corrupt)),
            extra_files=tuple(sorted(seen.extra)),
            bytes_needed=sum(fetch.size - fetch.have for fetch in fetches),
        )


def _is_corrupt(path: str, entry: Entry, seen: ActualTree, desired: Desired, actual: Actual) -> bool:
    if path in seen.placed:
        if seen.placed[path] != entry:
            return False  # an older version's file: merely not up to date
        return actual.blob(entry) is BlobState.SUSPECT
    foreign = seen.foreign.get(path)
    if foreign is None:
        return False
    return not isinstance(entry, Digest) or not foreign.could_match(desired.size(entry))
