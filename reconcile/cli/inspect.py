"""`ls`, `du`, `which`, `diff`: the commands that only read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modelstow.cas import BlobStore

from .. import documents
from ..desired.selectors import VariantId
from ..inspect.diff import BlobGroup, compare
from ..inspect.owners import file_owners
from ..inspect.usage import DiskUsage, Totals, TreeUsage, disk_usage
from ..inspect.variants import VariantEntry, list_variants
from ..retention import pins
from .output import count, size, table
from .session import Answer, Session, read_lock

# ---- ls


def run_ls(session: Session) -> Answer:
    ensurer = session.ensurer()
    store = BlobStore.open_existing(ensurer.settings.root)
    pinned = pins.variants(store) if store else frozenset()
    variants = list_variants(ensurer.lock, ensurer.statuses(session.args.selectors or None), pinned)
    rows = [(f"{v.model}#{v.variant}", v.state, size(v.bytes), "pinned" * v.pinned, str(v.path)) for v in variants]
    document = {"models": [_variant_document(each) for each in variants]}
    return Answer(document=document, lines=tuple(table(rows, right=frozenset({2}))))


def _variant_document(entry: VariantEntry) -> dict[str, Any]:
    return {
        "model": entry.model,
        "variant": entry.variant,
        "state": entry.state,
        "path": str(entry.path),
        "bytes": entry.bytes,
        "pinned": entry.pinned,
    }


# ---- du


def run_du(session: Session) -> Answer:
    ensurer = session.ensurer_with_or_without_lock()
    store = BlobStore.open_existing(ensurer.settings.root)
    only: set[VariantId] | None = None
    if session.args.selectors:
        only = {id_ for tree in ensurer.desired(session.args.selectors).trees for id_ in tree.key.variants}
    usage = disk_usage(store, only=only) if store else DiskUsage()
    document = {"trees": [_tree_document(tree) for tree in usage.trees], "totals": _totals_document(usage.totals)}
    lines = _usage_lines(usage, ensurer.settings.root) if store else ["nothing stored yet"]
    return Answer(document=document, lines=tuple(lines))


def _tree_document(tree: TreeUsage) -> dict[str, Any]:
    return {
        **documents.variants_of_tree([(id_.model, id_.variant) for id_ in tree.variants]),
        "path": str(tree.path),
        "logical": tree.logical,
        "shared": tree.shared,
        "unique": tree.unique,
    }


def _totals_document(totals: Totals) -> dict[str, int]:
    document = {"logical": totals.logical, "physical": totals.physical, "reclaimable": totals.reclaimable}
    return document | ({"quarantine": totals.quarantine} if totals.quarantine else {})


def _usage_lines(usage: DiskUsage, root: Path) -> Iterable[str]:
    rows = [("tree", "logical", "shared", "unique")]
    for tree in usage.trees:
        place = "" if tree.path.is_relative_to(root) else f"  {tree.path}"
        rows.append(
            (f"{', '.join(map(str, tree.variants))}{place}", size(tree.logical), size(tree.shared), size(tree.unique))
        )
    yield from table(rows, right=frozenset({1, 2, 3}))
    totals = usage.totals
    yield f"{size(totals.logical)} of models in {size(totals.physical)} on disk; {size(totals.reclaimable)} reclaimable"
    if totals.quarantine:
        yield f"{size(totals.quarantine)} of it in quarantine, which `modelstow gc --quarantine` empties"


# ---- which


def run_which(session: Session) -> Answer:
    root = session.settings.root
    found = file_owners(BlobStore.open_existing(root), session.args.path)
    document = {
        "path": found.path,
        "digest": found.digest,
        "size": found.size,
        "models": found.models,
        "trees": found.trees,
    }
    if found.digest is None:
        return Answer(document=document, lines=(f"{found.path} is no blob of {root}",))
    models = f" ({', '.join(found.models)})" if found.models else ""
    lines = (f"{found.digest}  {size(found.size)}{models}", *(f"in {tree}" for tree in found.trees))
    return Answer(document=document, lines=lines)


# ---- diff


def run_diff(session: Session) -> Answer:
    found = compare(read_lock(session.args.old), read_lock(session.args.new))
    groups = {"fetch": found.fetch, "keep": found.keep, "drop": found.drop}
    rows = [(name, count(group.files, "file"), size(group.bytes)) for name, group in groups.items()]
    lines = table(rows, right=frozenset({1, 2}))
    for name in ("fetch", "drop"):
        lines += [f"{name} {path}" for path in groups[name].paths]
    document = {name: _group_document(group) for name, group in groups.items()}
    return Answer(document=document, lines=tuple(lines))


def _group_document(group: BlobGroup) -> dict[str, Any]:
    return {"files": group.files, "bytes": group.bytes, "paths": group.paths}
