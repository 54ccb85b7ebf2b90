"""`gc`, `evict`, `pin`, `unpin`: the commands about what the store keeps."""

from __future__ import annotations

import os
from typing import Any

from modelstow.cas import BlobStore, Digest
from modelstow.cas.inventory import tree_id

from .. import settings
from ..desired import selectors
from ..desired.validation import Selector
from ..ensurer import ModelEnsurer
from ..errors import InvalidConfigError, ModelNotFoundError, listing
from ..events.events import Info
from ..inspect.owners import kept_by, list_roots
from ..paths import absolute_path
from ..retention import pins, roots
from ..retention.collector import GcResult
from ..retention.eviction import EvictionTargets
from ..retention.roots import Roots, TreeRoot
from .output import count, size, table
from .session import Answer, Session

# ---- gc


def run_gc(session: Session) -> Answer:
    args = session.args
    ensurer = session.ensurer_with_or_without_lock()
    if args.roots:
        return _list_roots(ensurer)
    if args.explain:
        return _explain(ensurer, args.explain)
    if args.forget:
        return _forget(ensurer, args.forget)
    targets = EvictionTargets(
        max_size=settings.parse_size(args.max_size, "--max-size") if args.max_size else None,
        free=settings.parse_size(args.free, "--free") if args.free else None,
        max_age_s=settings.parse_age(args.max_age, "--max-age") if args.max_age else None,
    )
    result = ensurer.collect_garbage(
        dry_run=args.dry_run,
        goals=targets,
        quarantine=args.quarantine,
        state_lost=args.state_lost,
        exclusive=args.exclusive,
    )
    _report_missed_targets(session, result)
    return Answer(document=_gc_document(result), lines=_gc_lines(result))


def _report_missed_targets(session: Session, result: GcResult) -> None:
    verb = "would be" if result.dry_run else "is"
    if result.over_bytes:
        missed = f"--max-size {verb} missed by {size(result.over_bytes)}"
        session.events.emit(Info(text=f"{missed}: pinned trees and trees in use are kept"))
    if result.lacking_bytes:
        missed = f"--free {verb} missed by {size(result.lacking_bytes)}"
        session.events.emit(Info(text=f"{missed}: pinned trees, trees in use and the files of other programs are kept"))


def _gc_document(result: GcResult) -> dict[str, Any]:
    targets = {"max_size": result.over_bytes, "free": result.lacking_bytes}
    missed = {target: bytes_ for target, bytes_ in targets.items() if bytes_}
    return {
        "dry_run": result.dry_run,
        "removed": {"blobs": result.blobs, "trees": result.trees, "partials": result.partials},
        "reclaimed_bytes": result.reclaimed_bytes,
        "kept": {"blobs": result.kept_blobs, "bytes": result.kept_bytes},
    } | ({"missed": missed} if missed else {})


def _gc_lines(result: GcResult) -> tuple[str, ...]:
    word = "would remove" if result.dry_run else "removed"
    lines = [f"{word} tree {path} ({size(freed)})" for path, freed in result.evicted]
    what = f"{count(len(result.blobs), 'blob')} and {count(len(result.partials), 'partial')}"
    if result.quarantined:
        what = f"{what}, {result.quarantined:,} of quarantine/"
    lines.append(
        f"{word} {what}, {size(result.reclaimed_bytes)}; kept {count(result.kept_blobs, 'blob')}, {size(result.kept_bytes)}"
    )
    return tuple(lines)


def _read_roots(ensurer: ModelEnsurer) -> Roots | None:
    store = BlobStore.open_existing(ensurer.settings.root)
    return None if store is None else roots.read(store)


def _list_roots(ensurer: ModelEnsurer) -> Answer:
    store = BlobStore.open_existing(ensurer.settings.root)
    entries = list_roots(store) if store else []
    lines = table([(entry.kind, entry.state, entry.id, entry.path) for entry in entries])
    rows = [{"id": entry.id, "kind": entry.kind, "path": entry.path, "state": entry.state} for entry in entries]
    return Answer(document={"roots": rows}, lines=tuple(lines))


def _explain(ensurer: ModelEnsurer, text: str) -> Answer:
    store = BlobStore.open_existing(ensurer.settings.root)
    if text.startswith("sha256:"):
        try:
            digests = [Digest.parse(text)]
        except ValueError as error:
            raise InvalidConfigError(str(error)) from error
    else:
        desired = ensurer.desired([text])
        digests = sorted({digest for tree in desired.trees for digest in tree.files.values()})
    reasons = kept_by(store, digests) if store else ()
    lines = [f"kept by {reason}" for reason in reasons] or ["nothing keeps it"]
    return Answer(document={"digests": digests, "kept_by": reasons}, lines=tuple(lines))


def _forget(ensurer: ModelEnsurer, text: str) -> Answer:
    store = BlobStore.open_readonly(ensurer.settings.root)
    absolute = absolute_path(text)
    candidates = [text, tree_id(text), tree_id(absolute)]
    if absolute.startswith(str(store.layout.root) + os.sep):
        candidates.append(tree_id(os.path.relpath(absolute, store.layout.root)))
    if not sum(roots.forget(store, id_) for id_ in candidates if os.sep not in id_):
        raise InvalidConfigError(
            f"{text!r} is not a root",
            hint="`modelstow gc --roots` lists the roots; `modelstow unpin` removes a pin, a lease ends with its process",
        )
    return Answer(document={"changed": True}, lines=(f"forgot {text}",))


# ---- evict, pin, unpin

_UNPIN_HINT = "remove `pin = true` from models.toml, then run `modelstow lock` and `modelstow reconcile`"


def run_evict(session: Session) -> Answer:
    ensurer = session.ensurer_with_or_without_lock()
    known = _read_roots(ensurer)
    selected = [_tree_of(ensurer, known, text) for text in session.args.selectors]
    pinned = known.pinned() if known else frozenset()
    for id_ in (id_ for root in selected for id_ in root.key.variants if id_ in pinned):
        by_user = id_ in pins.variants(BlobStore.open_readonly(ensurer.settings.root))
        raise InvalidConfigError(f"{id_} is pinned", hint=f"run `modelstow unpin {id_}` first" if by_user else _UNPIN_HINT)
    lines = []
    for root in selected:
        path = root.record.path(ensurer.settings.root)
        if not session.args.dry_run:
            ensurer.remove_tree(root.record, root.key)
        lines.append(f"{'would evict' if session.args.dry_run else 'evicted'} {root.key}  {path}")
    named = known.named_by_lockfiles() if known else frozenset()
    if any(root.digests & named for root in selected):
        hint = "`modelstow gc --max-size` or `--free` removes them anyway"
        session.events.emit(Info(text=f"a reconciled lockfile keeps the blobs; {hint}"))
    return Answer(document={"changed": bool(selected) and not session.args.dry_run}, lines=tuple(lines))


def run_release(session: Session) -> Answer:
    ensurer = session.ensurer_with_or_without_lock()
    known = _read_roots(ensurer)
    lines = []
    for text in session.args.folders:
        root = _folder_of(ensurer, known, text)
        if root is None:
            hint = "`modelstow gc --roots` lists them"
            raise InvalidConfigError(f"{text} is no folder that `ensure --into` made a tree", hint=hint)
        store = ensurer.settings.open_store()
        with store.lock(f"tree-{root.record.id}", doing=f"releasing {root.record.tree}"):
            store.trees.remove(root.record.tree)
        lines.append(f"released {root.key}  {root.record.tree}")
    return Answer(document={"changed": True}, lines=tuple(lines))


def _folder_of(ensurer: ModelEnsurer, known: Roots | None, text: str) -> TreeRoot | None:
    """The tree outside the store at a path."""
    place = os.path.realpath(absolute_path(text))
    records = BlobStore.open_readonly(ensurer.settings.root).trees
    found = [root for root in (known.trees if known else ()) if root.record.tree == place and not root.unfinished]
    return next((root for root in found if records.may_change(root.record)), None)


def _tree_of(ensurer: ModelEnsurer, known: Roots | None, text: str) -> TreeRoot:
    """The tree that a selector means: one of the lockfile, or one on disk that no lockfile names any more; or a folder.

    Raises InvalidModelIdError, ModelNotFoundError, VariantNotFoundError.
    """
    if (folder := _folder_of(ensurer, known, text)) is not None:
        return folder
    inside = [r for r in (known.trees if known else ()) if not r.unfinished and not os.path.isabs(r.record.tree)]
    inside.sort(key=lambda root: -len(root.key.variants))  # a tree of this variant alone is meant before one of several
    trees = {str(id_): root for root in inside for id_ in root.key.variants}
    if text not in trees:
        selector = Selector.parse(text)
        matches = [name for name in trees if _matches(selector, name)]
        if ensurer.lock.models:
            try:
                text = str(selectors.select(ensurer.lock, text))
            except ModelNotFoundError:
                text = matches[0] if len(matches) == 1 else text
        elif len(matches) == 1:
            text = matches[0]
    if text not in trees:
        raise ModelNotFoundError(
            f"there is no tree of {text}; trees: {listing(sorted(trees)) or 'none'}",
            model_id=text,
            available_models=sorted(trees),
        )
    return trees[text]


def _matches(selector: Selector, name: str) -> bool:
    other = Selector.parse(name)
    same_version = selector.version in (None, other.version)
    return selector.name == other.name and same_version and selector.variant in (None, other.variant)


def run_pin(session: Session) -> Answer:
    ensurer = session.ensurer()
    selected = [selectors.select(ensurer.lock, text) for text in session.args.selectors]
    store = ensurer.settings.open_store()
    store.prepare()
    changed = False
    for each in selected:
        files = ensurer.lock.models[each.model].variants[each.variant].files
        changed = pins.pin(store, each, files.values()) or changed
    return Answer(document={"changed": changed}, lines=tuple(f"pinned {each}" for each in selected))


def run_unpin(session: Session) -> Answer:
    ensurer = session.ensurer_with_or_without_lock()
    store = BlobStore.open_readonly(ensurer.settings.root)
    pinned = {str(id_): id_ for id_ in pins.variants(store)}
    lines, changed = [], False
    for text in session.args.selectors:
        id_ = pinned.get(text) or selectors.select(ensurer.lock, text)
        removed = pins.unpin(store, id_)
        changed = changed or removed
        lines.append(f"unpinned {id_}" if removed else f"{id_} was not pinned")
        if id_.model in ensurer.lock.models and ensurer.lock.models[id_.model].pin:
            session.events.emit(Info(text=f"the manifest pins {id_.model}: {_UNPIN_HINT}"))
    return Answer(document={"changed": changed}, lines=tuple(lines))
